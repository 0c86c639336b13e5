#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: kernel_args
short_description: Have the kernel arguments that the IOMMU needs in every boot entry
version_added: 0.1.0
author:
  - The iommufd.host authors (@iommufd)
description:
  - Decides which arguments the machine's IOMMU needs, puts them with those of O(args) into the boot loader's
    configuration, and says whether the host must be rebooted for them to take effect. It never reboots.
  - Most machines need none. AMD, Arm and virtio IOMMUs are on whenever the firmware offers them, and so is Intel's in
    kernels that are built so, as Debian's are (for everything but integrated graphics). C(intel_iommu=on) is set where
    the kernel leaves VT-d off, or where somebody configured C(intel_iommu=off).
  - Arguments of others are never taken out. One that is there already is not added again.
  - C(amd_iommu=off) and C(iommu=off) of others cannot be overridden by anything behind them. They are refused, with the
    place where they stand.
  - Every entry is reached, recovery and rescue entries included, and read back.
  - GRUB with generated entries gets the drop-in file C(/etc/default/grub.d/60-iommufd-host.cfg) where it reads such
    (Debian and derivatives), else marked lines in C(/etc/default/grub) (SUSE, Arch). C(grub.cfg) is replaced in one
    step.
  - Where each entry is a file of its own (GRUB of Fedora and RHEL, systemd-boot, zipl), the arguments are added to
    each file, and to what entries of new kernels are made from, C(/etc/kernel/cmdline) where it exists, and
    C(/etc/default/grub). Where it does not exist, C(kernel-install) takes the arguments of the running kernel.
    C(/etc/iommufd-host/kernel-arguments) records what was added. With zipl, it is run afterwards.
  - Unified kernel images, image-based hosts (ostree), U-Boot and extlinux are refused, with what to do there, but only
    where an argument is needed at all.
options:
  args:
    description:
      - Further arguments, in order.
      - The list is complete. Arguments that an earlier list of this module named are taken out.
    type: list
    elements: str
    default: []
  iommu:
    description:
      - With V(auto), the arguments that the IOMMU needs are added. A machine without an IOMMU is an error then.
      - With V(ignore), only O(args) count.
    type: str
    choices: [auto, ignore]
    default: auto
  passthrough:
    description:
      - Let the host's own devices go past the IOMMU (C(iommu=pt), or C(iommu.passthrough=1) where the IOMMU is not
        VT-d or AMD-Vi). Devices given to guests are not concerned.
      - It saves the host's devices the cost of mapping for each transfer. The price is that none of them is isolated
        from the host's memory any more. A faulty or hostile device, or a faulty driver, reads and writes all of it by
        DMA. The passing of devices to guests does not need it.
    type: bool
    default: false
    version_added: 0.2.0
  state:
    description: With V(absent), everything that this module configured is taken out.
    type: str
    choices: [present, absent]
    default: present
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.changes
"""

EXAMPLES = r"""
- name: Have the IOMMU on
  iommufd.host.kernel_args:
  register: arguments

- name: Reboot where that is needed
  ansible.builtin.reboot:
  when: arguments.reboot_required

- name: A further argument, whatever the IOMMU needs
  iommufd.host.kernel_args:
    args:
      - intel_iommu=on
    iommu: ignore

- name: As it was
  iommufd.host.kernel_args:
    state: absent
"""

RETURN = r"""
args:
  description: The arguments that are configured by this module.
  returned: success
  type: list
  elements: str
  sample: [intel_iommu=on]
iommu:
  description: The machine's IOMMU.
  returned: success
  type: dict
  contains:
    kind:
      description: V(VT-d), V(AMD-Vi), V(SMMUv3), V(SMMU), V(virtio-iommu), or null where the firmware announces none.
      type: str
    "on":
      description: Whether the running kernel uses it, that is, has devices in IOMMU groups.
      type: bool
    arguments:
      description: The arguments it needs to be on.
      type: list
      elements: str
    reason:
      description: Why these, or why none.
      type: str
  sample:
    arguments: []
    kind: VT-d
    "on": true
    reason: VT-d is on without any argument in this kernel (/boot/config-6.12.117+deb13-amd64)
cmdline:
  description: Kernel command lines.
  returned: success
  type: dict
  contains:
    booted:
      description: That of the running kernel.
      type: str
    configured:
      description: What a normal boot entry gets from the configuration, without the root file system and the like. Null
        where the boot loader is not known and nothing needs to be set.
      type: str
  sample:
    booted: BOOT_IMAGE=/boot/vmlinuz-6.12.117+deb13-amd64 root=/dev/vda1 ro console=ttyS0
    configured: console=ttyS0
boot_loader:
  description: V(grub), V(systemd-boot) or V(zipl), null where it is not known and nothing needs to be set.
  returned: success
  type: str
  sample: grub
reboot_required:
  description: Whether the host must be rebooted for the arguments to take effect.
  returned: success
  type: bool
  sample: false
reboot_reasons:
  description: Why.
  returned: success
  type: list
  elements: str
  sample: []
plan:
  description: The steps, in order.
  returned: success
  type: list
  elements: str
  sample:
    - write /etc/default/grub.d/60-iommufd-host.cfg
    - write the boot entries (/boot/grub/grub.cfg)
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _task_kernel_args as task
from ansible_collections.iommufd.host.plugins.module_utils._ansible import run_task


def main() -> None:
    run_task(AnsibleModule(argument_spec=task.ARGUMENT_SPEC, supports_check_mode=True), task.work)


if __name__ == "__main__":
    main()
