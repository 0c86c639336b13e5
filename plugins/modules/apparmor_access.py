#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: apparmor_access
short_description: Let AppArmor's profiles of libvirt's guests open /dev/iommu and the vfio devices
version_added: 0.2.0
author:
  - The iommufd.host authors (@iommufd)
description:
  - libvirt confines each guest by an AppArmor profile of its own. All of them include C(abstractions/libvirt-qemu),
    which knows nothing of C(/dev/iommu). A QEMU that opens the nodes itself is then refused with "Permission denied",
    whatever owner, group and mode of the nodes say.
  - This module adds the few rules that are needed, where that file includes additions from. That is a file of its own
    in C(/etc/apparmor.d/abstractions/libvirt-qemu.d) (Debian 13), or a marked block in
    C(/etc/apparmor.d/local/abstractions/libvirt-qemu) (Debian 12), whose other content stays byte for byte.
  - The rules are compiled with the abstraction, without loading them, before anything is written and again afterwards.
  - A guest's profile is made and loaded when the guest starts. A guest that runs keeps its rules until its next start,
    see RV(guests_before).
  - A guest that gets its descriptors from libvirt (12.1 and later, C(<driver iommufd='yes'/>)) needs none of this.
options:
  nodes:
    description:
      - The nodes that guests may open. C(iommu) is C(/dev/iommu), C(cdevs) are the vfio character devices and what QEMU
        reads in C(/sys) to find them, C(groups) the legacy nodes C(/dev/vfio/N).
      - The list is complete. Rules of an earlier list of this module that are not in it are taken out.
    type: list
    elements: str
    choices: [iommu, cdevs, groups]
    default: [iommu, cdevs]
  if_missing:
    description:
      - What to do where AppArmor is not in use or libvirt's abstraction is not there. V(skip) changes nothing and says
        so in RV(skipped_reason).
    type: str
    choices: [fail, skip]
    default: fail
  state:
    description: With V(absent) everything that this module added is taken out, and nothing else.
    type: str
    choices: [present, absent]
    default: present
requirements:
  - C(apparmor_parser), which a host that uses AppArmor has.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.changes
seealso:
  - module: iommufd.host.udev_access
    description: Owner, group and mode of the nodes.
  - module: iommufd.host.cgroup_acl
    description: The device list of libvirt.
  - module: iommufd.host.access_probe
    description: Tries the whole chain.
"""

EXAMPLES = r"""
- name: Let guests of libvirt open /dev/iommu and the cdevs under AppArmor
  iommufd.host.apparmor_access:

- name: Do so where AppArmor is in use
  iommufd.host.apparmor_access:
    if_missing: skip

- name: As it was
  iommufd.host.apparmor_access:
    state: absent
"""

RETURN = r"""
file:
  description: Where the rules are. Null where they have no place.
  returned: success
  type: str
  sample: /etc/apparmor.d/abstractions/libvirt-qemu.d/iommufd-host
rules:
  description: The rules that are ours, once the plan is carried out.
  returned: success
  type: list
  elements: str
  sample: ["/dev/iommu rw,", "/dev/vfio/devices/* rw,"]
guests_before:
  description: Profiles of guests that run and were loaded before a change. They have the new rules from their next
    start.
  returned: when the rules change
  type: list
  elements: str
  sample: [libvirt-1b4e28ba-2fa1-11d2-883f-0016d3cca427]
skipped_reason:
  description: Why no rules were added, see O(if_missing).
  returned: when they were not
  type: str
  sample: AppArmor is not in use on this host.
plan:
  description: The steps, in order.
  returned: success
  type: list
  elements: str
  sample: ["write /etc/apparmor.d/abstractions/libvirt-qemu.d/iommufd-host"]
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _task_apparmor_access as task
from ansible_collections.iommufd.host.plugins.module_utils._ansible import run_task


def main() -> None:
    run_task(AnsibleModule(argument_spec=task.ARGUMENT_SPEC, supports_check_mode=True), task.work)


if __name__ == "__main__":
    main()
