#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: guest_verify
short_description: Prove that a guest works with the named devices on one shared /dev/iommu descriptor
version_added: 0.1.0
description:
  - Boots a small guest with the named devices and returns evidence of how it held them. Each item is observed, none is
    assumed.
  - The module opens C(/dev/iommu) once and the vfio character devices of the named devices, has pinned memory accounted
    per process, and starts QEMU as an unprivileged user without capabilities, with its sandbox on. The descriptors
    are inherited; that user could not open the nodes, which is tried too.
  - The guest is the host's own kernel with a file system of busybox and the host's driver modules for the passed
    devices. A driver uses a device where the kernel has one; a disk is read, which is DMA through the shared
    descriptor. Nothing is ever written to a disk, and no network frame is sent.
  - QEMU's limit of locked memory (RLIMIT_MEMLOCK) is set to O(memory) plus 64 MiB, since all of the guest's memory
    is pinned.
  - The guest, its kernel and its file system live in memory alone. No process and no file is left behind, whether the
    guest succeeds, fails, or the module is killed.
  - The devices have to be on vfio-pci (M(iommufd.host.vfio_bind)) and stay there.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.reads
attributes:
  action:
    description: A part of this module runs on the controller.
    support: full
    details:
      - Only for a selector with C(query), which the controller evaluates after one survey of the host.
  check_mode:
    details:
      - In check mode everything that could stand in the way is checked, and the guest is not started.
options:
  devices:
    description:
      - The devices to pass, each a selector as in O(iommufd.host.vfio_bind#module:devices). They are passed in this
        order, those of one selector in the order of their addresses.
      - At most 29.
    type: list
    elements: raw
    required: true
  backend:
    description:
      - How the devices reach the guest.
      - V(iommufd) is one descriptor of C(/dev/iommu) for all of them.
    type: str
    choices: [iommufd]
    default: iommufd
  qemu:
    description:
      - The QEMU to use, as an absolute path.
      - Without it, the one that M(iommufd.host.qemu_install) made current, or else the distribution's, as it is found
        in the standard directories.
    type: path
  user:
    description: The user that QEMU runs as. It must not be root.
    type: str
    default: nobody
  memory:
    description: Memory of the guest in MiB. All of it is pinned.
    type: int
    default: 256
  cpus:
    description: Processors of the guest.
    type: int
    default: 1
  accelerator:
    description:
      - How the guest's processor is made.
      - V(auto) takes KVM where the processor offers it and C(/dev/kvm) works, and software (TCG) otherwise.
    type: str
    choices: [auto, kvm, tcg]
    default: auto
  timeout:
    description: Seconds from the start of QEMU to its end. It is killed then.
    type: int
    default: 600
  busybox:
    description: The busybox to put into the guest. Without it, the one in the standard directories.
    type: path
  kernel:
    description:
      - The kernel image to boot. Without it, the image of the running kernel.
      - The modules of that kernel have to be installed.
    type: path
  pending:
    description:
      - An earlier task of the same play is going to turn the IOMMU on, load modules or bind the devices, so that what
        is missing of that is only a warning. A missing QEMU or busybox is an error all the same.
      - Only honoured in check mode.
    type: bool
    default: false
  qemu_pending:
    description:
      - An earlier task of the same play is going to install QEMU, so that the one which is here is not judged.
      - Only honoured in check mode.
    type: bool
    default: false
    version_added: 0.2.0
requirements:
  - QEMU 9.0 or later with iommufd (C(qemu-system-x86) on Debian and Ubuntu)
  - busybox (C(busybox-static) on Debian and Ubuntu)
  - an x86-64 host
seealso:
  - module: iommufd.host.vfio_bind
  - module: iommufd.host.iommufd_info
author:
  - The iommufd.host authors (@iommufd)
"""

EXAMPLES = r"""
- name: Boot a guest with two devices on one descriptor
  iommufd.host.guest_verify:
    devices:
      - "0000:01:00.0"
      - "0000:02:00.0"
  register: verification

- name: Show what was seen
  ansible.builtin.debug:
    msg: "{{ verification.evidence.checks }}"

- name: Verify as the user that runs guests in production
  iommufd.host.guest_verify:
    devices:
      - vfs_of: ens3f0
        vf: "0-3"
    user: libvirt-qemu
    timeout: 120
"""

RETURN = r"""
verified:
  description:
    - V(true) when the guest booted and no item of the evidence failed. Whenever it would be V(false) the module fails.
    - Null in check mode.
  returned: always
  type: bool
  sample: true
would:
  description: What would be done.
  returned: in check mode
  type: str
  sample: >-
    boot a guest of 256 MiB with 0000:01:00.0, 0000:02:00.0 on one /dev/iommu descriptor, with QEMU as nobody (kvm)
step:
  description: The step that failed.
  returned: on failure
  type: str
  sample: boot
problems:
  description: What stands in the way of starting the guest.
  returned: when something does
  type: list
  elements: str
  sample:
    - "0000:01:00.0 is driven by nvme, not on vfio-pci: bind it first (iommufd.host.vfio_bind)."
qemu_words:
  description: The last lines that QEMU wrote.
  returned: on failure
  type: list
  elements: str
  sample: []
console:
  description: The last lines of the guest's console.
  returned: on failure
  type: list
  elements: str
  sample: []
evidence:
  description: What was seen of the guest and of the process that ran it.
  returned: when the guest was started
  type: dict
  contains:
    checks:
      description:
        - One judgement for each observation, in C(id), C(status), C(detail) and C(remedy).
        - The status is V(ok), V(fail), or V(skip) for what cannot be seen with these devices or on this host.
      type: list
      elements: dict
    devices:
      description: Each device with its address in the guest, the driver that attached, and the DMA done.
      type: list
      elements: dict
    descriptors:
      description:
        - Number of open C(/dev/iommu), whether that is the module's own open file, and from QEMU's trace who opened it
          (C(owned), 0 for somebody else) and how many devices use it (C(users)).
      type: dict
    process:
      description: Ids, capabilities, seccomp, limits and arguments of QEMU, and what its user was refused.
      type: dict
    peer_to_peer:
      description: Whether the devices' BARs could be mapped for each other (C(works)), and how that was seen.
      type: dict
    guest:
      description: Kernel, memory and modules of the guest.
      type: dict
    qemu:
      description: Path, version and last words of QEMU.
      type: dict
    accelerator:
      description: V(kvm) or V(tcg).
      type: str
    kernel:
      description: Release of the kernel that the guest ran.
      type: str
    seconds:
      description: Seconds from the start of QEMU until the devices were on the descriptor, ready, and to its end.
      type: dict
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils._ansible import Outcome, run_module
from ansible_collections.iommufd.host.plugins.module_utils._guest import Request, prepare, verify
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._memory import find_devices
from ansible_collections.iommufd.host.plugins.module_utils._pci import parse_address


def work(module: AnsibleModule) -> Outcome:
    options = module.params
    host = Host()
    pending = options["pending"] and module.check_mode
    choice = find_devices(host, "devices", options["devices"], pending)
    plugged = find_devices(host, "hot_plug", options["hot_plug"], pending) if options["hot_plug"] else None
    request = Request(
        devices=tuple(one.address for one in choice.chosen),
        plugged=() if plugged is None else tuple(one.address for one in plugged.chosen),
        launcher=options["launcher"],
        started_by=options["started_by"],
        backend=options["backend"],
        backends=_by_address("backends", options["backends"]),
        objects=_by_address("iommufds", options["iommufds"]),
        hot_plug=options["hot_plug_expected"],
        expendable=tuple(parse_address("expendable", one) for one in options["expendable"]),
        arp_target=options["arp_target"] or "",
        user=options["user"],
        qemu=options["qemu"] or "",
        busybox=options["busybox"] or "",
        kernel=options["kernel"] or "",
        memory=options["memory"],
        cpus=options["cpus"],
        memlock=options["memlock"],
        timeout=options["timeout"],
        accelerator=options["accelerator"],
        pending=pending,
        qemu_pending=options["qemu_pending"] and module.check_mode,
    )
    ready = prepare(host, request)
    if module.check_mode:
        result: dict[str, t.Any] = {"verified": None, "would": ready.sentence()}
        if ready.decision is not None and ready.trial is None:
            result["decision"] = ready.decision.to_dict()
        if ready.passing:
            result["problems"] = ready.passing
        missing = [*choice.missing, *(plugged.missing if plugged is not None else [])]
        return Outcome(
            result=result,
            warnings=[f"To be checked again when it is real: {problem}" for problem in [*missing, *ready.passing]],
        )

    def after() -> dict[str, t.Any]:
        found = verify(host, ready)
        for item in found["evidence"]["checks"]:
            # A guest without a disk, a cable or a driver for its devices is nothing to be warned of.
            if item["status"] == "skip" and item["id"] not in ("dma", "drivers", "link"):
                module.warn(f"Not seen, {item['id']}: {item['detail']}.")
        for warning in (found["evidence"]["decision"] or {}).get("warnings", []):
            module.warn(warning)
        return found

    return Outcome(after=after)


def _by_address(option: str, given: dict[str, t.Any]) -> dict[str, str]:
    return {parse_address(option, address): str(value) for address, value in given.items()}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "devices": {"type": "list", "elements": "raw", "required": True},
            "launcher": {"type": "str", "choices": ["direct", "systemd", "libvirt", "self"], "default": "direct"},
            "started_by": {"type": "str", "choices": ["module", "libvirt"], "default": "module"},
            "backend": {"type": "str", "choices": ["legacy", "iommufd", "auto"], "default": "iommufd"},
            "backends": {"type": "dict", "default": {}},
            "iommufds": {"type": "dict", "default": {}},
            "hot_plug": {"type": "list", "elements": "raw", "default": []},
            "hot_plug_expected": {"type": "bool", "default": False},
            "expendable": {"type": "list", "elements": "str", "default": []},
            "arp_target": {"type": "str"},
            "qemu": {"type": "path"},
            "user": {"type": "str", "default": "nobody"},
            "memory": {"type": "int", "default": 256},
            "cpus": {"type": "int", "default": 1},
            "memlock": {"type": "int"},
            "accelerator": {"type": "str", "choices": ["auto", "kvm", "tcg"], "default": "auto"},
            "timeout": {"type": "int", "default": 600},
            "busybox": {"type": "path"},
            "kernel": {"type": "path"},
            "pending": {"type": "bool", "default": False},
            "qemu_pending": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    # No lock: nothing is changed, and guests with other devices may be verified at the same time.
    run_module(module, work, lock=False)


if __name__ == "__main__":
    main()
