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
  - qemu-system-x86_64 8.0 or later (or qemu-system-aarch64), qemu-img, ssh-keygen
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.changes
attributes:
  idempotent:
    support: partial
    details:
      - O(state=restarted) restarts the hosts each time.
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
      architecture:
        description: The processor of the host's image, by its name in Debian.
        type: str
        choices: [amd64, arm64]
        default: amd64
        version_added: 0.2.0
      emulator:
        description: Path of QEMU, where it is not the one that is installed.
        type: path
        version_added: 0.2.0
      iommu:
        description:
          - The emulated IOMMU. Without it V(intel), on V(arm64) V(smmuv3).
          - V(virtio) has no interrupt remapping.
          - V(amd) needs QEMU 10.2 or later.
        type: str
        choices: [intel, amd, smmuv3, virtio, none]
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
    default: 600
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
  description: The named hosts and all others of the lab, by name. In check mode as they are before.
  returned: success
  type: dict
  contains:
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
    seconds:
      description: Seconds from the emulator's start to the answer by ssh, null where the host does not run.
      type: float
      sample: 24.3
    directory:
      description: The host's directory, with C(serial.log) and the script C(ssh).
      type: str
      sample: /tmp/lab/alpha
    ansible_vars:
      description: The variables with which Ansible reaches the host.
      type: dict
      sample: {"ansible_host": "127.0.0.1", "ansible_port": 37617, "ansible_user": "root"}
inventory:
  description: Path of an inventory of the hosts that run, in the group C(lab); null where no host is left.
  returned: success
  type: str
  sample: /tmp/lab/inventory.yml
"""

import os
import typing as t
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils._ansible import Outcome, run_module
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._lab_spec import HostSpec, check_name, parse_hosts
from ansible_collections.iommufd.host.plugins.module_utils._lab_state import Lab
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan


def work(module: AnsibleModule) -> Outcome:
    """Plan the way of all hosts to the wanted state."""
    params: dict[str, t.Any] = module.params
    state, timeout = params["state"], float(params["timeout"])
    up = state in ("started", "restarted")
    hosts: list[HostSpec] = parse_hosts(params["hosts"]) if up else []
    names = [str(entry["name"]) for entry in params["hosts"]]
    for index, name in enumerate(names):
        check_name(name, f"hosts[{index}].name")
    lab = Lab(Path(os.path.abspath(params["lab_dir"])), Host())
    if not module.check_mode and state != "listed":
        lab.acquire()

    if up:
        plan = lab.plan_up(hosts, state == "restarted", timeout, module.check_mode)
    elif state == "stopped":
        plan = lab.plan_down(names, timeout)
    elif state == "absent":
        plan = lab.plan_removal(names)
    else:
        plan = Plan()

    def after() -> dict[str, t.Any]:
        if up:
            lab.wait_for_running(hosts, timeout)
        inventory = lab.settle() if state != "listed" else None
        return {"hosts": lab.reports(names), "inventory": inventory}

    return Outcome(plan=plan, result={"hosts": lab.reports(names), "inventory": None}, after=after)


def main() -> None:
    host = {
        "name": {"type": "str", "required": True},
        "image": {"type": "path"},
        "memory": {"type": "int", "default": 3072},
        "cpus": {"type": "int", "default": 2},
        "architecture": {"type": "str", "choices": ["amd64", "arm64"], "default": "amd64"},
        "emulator": {"type": "path"},
        "iommu": {"type": "str", "choices": ["intel", "amd", "smmuv3", "virtio", "none"]},
        "port": {"type": "int"},
        "devices": {"type": "list", "elements": "dict", "default": []},
    }
    states = ["started", "restarted", "stopped", "absent", "listed"]
    run_module(
        AnsibleModule(
            argument_spec={
                "lab_dir": {"type": "path", "required": True},
                "hosts": {"type": "list", "elements": "dict", "default": [], "options": host},
                "state": {"type": "str", "choices": states, "default": "started"},
                "timeout": {"type": "int", "default": 600},
            },
            supports_check_mode=True,
        ),
        work,
        lock=False,
    )


if __name__ == "__main__":
    main()
