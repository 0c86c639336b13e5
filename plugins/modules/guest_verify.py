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
  - With the launcher V(direct) the module opens C(/dev/iommu) once and the vfio character devices of the named devices,
    has pinned memory accounted per process, and starts QEMU as an unprivileged user without capabilities, with its
    sandbox on. The descriptors are inherited; that user could not open the nodes, which is tried too. The other
    launchers are those of production, see O(launcher).
  - The guest is the host's own kernel with a file system of busybox and the host's driver modules for the passed
    devices. A driver uses a device where the kernel has one; a disk is read, which is DMA through the shared
    descriptor. Nothing is written to a disk that is not in O(expendable), and no network frame is sent without
    O(arp_target).
  - Hosts can be x86_64 and aarch64. On the latter QEMU opens C(/dev/kvm) itself, whatever it is given, so that it gets
    a node of its own.
  - QEMU's limit of locked memory (RLIMIT_MEMLOCK) is set to O(memory) plus 64 MiB for each address space, since all of
    the guest's memory is pinned. Where pinned memory is charged to the user, as it is with V(systemd) and V(self),
    there is no limit unless O(memlock) sets one, because other guests of that user count as well.
  - The guest, its kernel and its file system live in memory alone. No process, unit, domain or file of it is left
    behind, whether the guest succeeds, fails, or the module is killed.
  - The devices have to be on vfio-pci (M(iommufd.host.vfio_bind)) and stay there.
  - What was seen of peer-to-peer is kept in C(/run) until the next boot, for O(backend=auto) and the survey.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.reads
  - iommufd.host._attributes.selecting
  - iommufd.host._guest
attributes:
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
  - QEMU 9.0 or later with iommufd (C(qemu-system-x86) on Debian and Ubuntu), on aarch64 9.1 (C(qemu-system-arm))
  - busybox (C(busybox-static) on Debian and Ubuntu)
  - an x86-64 or aarch64 host
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

- name: Verify four virtual functions in a hurry
  iommufd.host.guest_verify:
    devices:
      - vfs_of: ens3f0
        vf: "0-3"
    timeout: 120

- name: Verify as libvirt starts guests, on the backend that suits this host
  iommufd.host.guest_verify:
    devices: ["0000:01:00.0", "0000:02:00.0"]
    launcher: libvirt
    backend: auto

- name: Plug a second disk in while the guest runs, and write to it
  iommufd.host.guest_verify:
    devices: ["0000:01:00.0"]
    hot_plug: ["0000:02:00.0"]
    expendable: ["0000:02:00.0"]
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
decision:
  description: The backend that was chosen for each device, and why. Not there where a measurement has to be made first.
  returned: in check mode
  type: dict
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
    launcher:
      description: As asked.
      type: str
    backend:
      description: V(iommufd), V(legacy), or V(mixed) where that was asked for.
      type: str
    opened_by:
      description: Who opened C(/dev/iommu), V(launcher) or V(qemu).
      type: str
    decision:
      description:
        - The policy's choice, in C(backend), C(reason), C(mixed), C(opened_by), C(warnings) and, for each device, in
          C(devices).
      type: dict
    checks:
      description:
        - One judgement for each observation, in C(id), C(status), C(detail) and C(remedy).
        - The status is V(ok), V(fail), or V(skip) for what cannot be seen with these devices or on this host.
      type: list
      elements: dict
    devices:
      description:
        - Each device with its backend, its address in the guest, its BARs and configuration space there, the driver
          that attached, and the DMA done.
      type: list
      elements: dict
    descriptors:
      description:
        - Number of open C(/dev/iommu), whether that is the module's own open file, and from QEMU's trace who opened it
          (C(owned), 0 for somebody else) and how many devices use it (C(users)).
        - C(objects) are the iommufd objects with their number of devices, C(legacy) the open nodes of the legacy
          container.
      type: dict
    process:
      description:
        - Ids, capabilities, seccomp, limits, security profile, cgroup and arguments of QEMU, what that cgroup allows,
          and what its user was refused.
      type: dict
    peer_to_peer:
      description:
        - Whether the devices' BARs could be mapped for each other (C(works)), and how that was seen. C(transfers) are
          what one device wrote to another, where the guest has devices that do so when told (QEMU's edu).
        - C(measured) is what is known of this kernel and QEMU, from this guest or an earlier one since the last boot.
      type: dict
    hot_plug:
      description: What was seen of each device that was plugged in.
      type: list
      elements: dict
    guest:
      description: Kernel, memory and modules of the guest.
      type: dict
    qemu:
      description: Path, version and last words of QEMU.
      type: dict
    unsafe_interrupts:
      description:
        - Whether the host gives away devices whose interrupts are not isolated (C(allow_unsafe_interrupts)), which is a
          security hole.
      type: bool
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
from ansible_collections.iommufd.host.plugins.module_utils._guest import GUEST_OPTIONS, prepare, read_request, verify
from ansible_collections.iommufd.host.plugins.module_utils._host import Host


def work(module: AnsibleModule) -> Outcome:
    host = Host()
    request, missing = read_request(host, module.params, module.check_mode)
    ready = prepare(host, request)
    if module.check_mode:
        result: dict[str, t.Any] = {"verified": None, "would": ready.sentence()}
        if ready.decision is not None and ready.trial is None:
            result["decision"] = ready.decision.to_dict()
        if ready.passing:
            result["problems"] = ready.passing
        return Outcome(result=result, warnings=ready.check_mode_warnings(missing))

    def after() -> dict[str, t.Any]:
        found = verify(host, ready)
        for item in found["evidence"]["checks"]:
            # A guest without a disk, a cable or a driver for its devices is nothing to be warned of.
            if item["status"] == "skip" and item["id"] not in ("dma", "drivers", "link"):
                module.warn(f"Not seen, {item['id']}: {item['detail']}.")
        if found["evidence"]["unsafe_interrupts"]:
            module.warn(
                "This host gives away devices whose interrupts are not isolated (allow_unsafe_interrupts): a guest can "
                "forge interrupts of the host."
            )
        return found

    return Outcome(after=after)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "devices": {"type": "list", "elements": "raw", "required": True},
            **GUEST_OPTIONS,
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
