#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_host
short_description: Start and stop disposable emulated hosts
version_added: 0.1.0
description:
  - Runs emulated hosts with an IOMMU and with the PCI devices that their declaration names, several at once.
  - Each host runs on an overlay of its image that is thrown away with it, and answers by ssh on a port
    of 127.0.0.1.
  - KVM is used where the processor has it and the node works, else emulation in software.
  - Runs on the machine that emulates the hosts, usually the controller.
author:
  - The iommufd.host authors (@iommufd)
requirements:
  - qemu-system-x86_64 8.0 or later, qemu-img, ssh-keygen
attributes:
  check_mode:
    support: full
    description: Can run in check mode without changing anything.
  diff_mode:
    support: none
    description: RV(hosts) tells what was done to each host.
options:
  lab_dir:
    description: Directory of the lab, with one directory for each host.
    type: path
    required: true
  hosts:
    description:
      - The hosts to act on.
      - For O(state=stopped), O(state=absent) and O(state=listed) only the names count, and no name means all hosts
        of the lab.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the host.
        type: str
        required: true
      image:
        description: Path of its image, see M(iommufd.host.lab_image).
        type: path
      memory:
        description: Memory in MiB.
        type: int
        default: 3072
      cpus:
        description: Number of processors.
        type: int
        default: 2
      iommu:
        description:
          - The emulated IOMMU.
          - V(virtio) has no interrupt remapping.
        type: str
        choices: [intel, virtio, none]
        default: intel
      port:
        description: Port of 127.0.0.1 for ssh. Without it a free one is chosen.
        type: int
      devices:
        description:
          - The PCI devices. Each is a mapping with C(type), one of V(nvme), V(e1000e), V(igb) (with 7 virtual
            functions), V(virtio-net), V(virtio-blk), V(xhci), V(display), V(audio), V(e1000), V(edu) and
            V(pci-testdev), or one of V(bridge), V(switch) and V(multifunction), which hold others in C(devices) and
            make them share an IOMMU group.
          - Each may have an C(id), a C(slot) on the root bus and C(properties), passed to the emulator as they are.
            Disks have C(size) and C(content), V(nvme) has C(serial), network cards have C(mac).
          - Devices take the slots from 0x10 on, in their order. The addresses that follow are in RV(hosts).
        type: list
        elements: dict
        default: []
  state:
    description:
      - V(started) has the hosts running and answering by ssh.
      - V(restarted) shuts down those that run and starts all with the declared hardware.
      - V(stopped) shuts them down; their disks stay.
      - V(absent) ends them and removes all that they had.
      - V(listed) only returns them.
    type: str
    choices: [started, restarted, stopped, absent, listed]
    default: started
  timeout:
    description: Seconds within which each host must answer by ssh, or shut down.
    type: int
    default: 300
seealso:
  - module: iommufd.host.lab_image
"""

EXAMPLES = r"""
- name: Have an image
  iommufd.host.lab_image:
  register: image

- name: Run a host with a disk, and with two devices that share an IOMMU group
  iommufd.host.lab_host:
    lab_dir: /tmp/lab
    hosts:
      - name: alpha
        image: "{{ image.path }}"
        devices:
          - type: nvme
            serial: DATA0
          - type: bridge
            devices:
              - type: e1000
              - type: edu

- name: Remove the whole lab
  iommufd.host.lab_host:
    lab_dir: /tmp/lab
    state: absent
"""

RETURN = r"""
hosts:
  description: The hosts, by name.
  returned: success
  type: dict
  contains:
    steps:
      description: What was done to the host, in check mode what would be done.
      type: list
      elements: str
      sample: [create, start]
    state:
      description: V(started), V(stopped) or V(absent).
      type: str
      sample: started
    port:
      description: Port of 127.0.0.1 for ssh, null where the host does not run.
      type: int
      sample: 37617
    accelerator:
      description: V(kvm) or V(tcg), null where the host does not run.
      type: str
      sample: tcg
    devices:
      description: The devices, in the order of their declaration, with the addresses that they have in the host.
      type: list
      elements: dict
      sample:
        - {"id": "nvme0", "type": "nvme", "address": "0000:01:00.0", "behind": null, "mac": null, "serial": "DATA0",
           "size": 67108864}
    directory:
      description: The host's directory, with C(serial.log) and the script C(ssh).
      type: str
      sample: /tmp/lab/alpha
    ansible_vars:
      description: The variables with which Ansible reaches the host.
      type: dict
      sample: {"ansible_host": "127.0.0.1", "ansible_port": 37617, "ansible_user": "root"}
inventory:
  description: Path of an inventory of the hosts that run, in the group C(lab); null where none is left.
  returned: success
  type: str
  sample: /tmp/lab/inventory.yml
"""

import signal
import typing as t
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _lab_host
from ansible_collections.iommufd.host.plugins.module_utils._lab_qemu import LabError, parse_hosts


def run(params: t.Mapping[str, t.Any], check_mode: bool) -> t.Dict[str, t.Any]:
    """The whole module between its options and its result; raises LabError."""
    lab_dir = Path(params["lab_dir"]).absolute()
    state = params["state"]
    named = params["hosts"]
    steps: t.Dict[str, t.List[str]]
    if state in ("started", "restarted"):
        ports = {entry["name"]: int(entry["port"]) for entry in named if entry.get("port")}
        hosts = parse_hosts([{key: value for key, value in entry.items() if key != "port"} for entry in named])
        steps = _lab_host.bring_up(
            lab_dir, hosts, state == "restarted", params["timeout"], check_mode, lambda text: None, ports
        )
    else:
        steps = _lab_host.bring_down(
            lab_dir, [entry["name"] for entry in named], state, params["timeout"], check_mode, lambda text: None
        )
    reports = {}
    for name, taken in steps.items():
        reports[name] = dict(_lab_host.Machine(lab_dir, name).report(), steps=taken)
    inventory = lab_dir / "inventory.yml"
    return {
        "changed": any(steps.values()),
        "hosts": reports,
        "inventory": str(inventory) if inventory.exists() else None,
    }


def main() -> None:
    """Options in, hosts out."""
    host = {
        "name": {"type": "str", "required": True},
        "image": {"type": "path"},
        "memory": {"type": "int", "default": 3072},
        "cpus": {"type": "int", "default": 2},
        "iommu": {"type": "str", "choices": ["intel", "virtio", "none"], "default": "intel"},
        "port": {"type": "int"},
        "devices": {"type": "list", "elements": "dict", "default": []},
    }
    states = ["started", "restarted", "stopped", "absent", "listed"]
    module = AnsibleModule(
        argument_spec={
            "lab_dir": {"type": "path", "required": True},
            "hosts": {"type": "list", "elements": "dict", "default": [], "options": host},
            "state": {"type": "str", "choices": states, "default": "started"},
            "timeout": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    # Whoever interrupts a boot is not left with emulators.
    signal.signal(signal.SIGTERM, lambda *_ignored: module.fail_json(msg="interrupted"))
    try:
        module.exit_json(**run(module.params, module.check_mode))
    except LabError as exc:
        module.fail_json(msg=str(exc))


if __name__ == "__main__":
    main()
