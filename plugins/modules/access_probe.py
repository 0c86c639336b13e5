#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: access_probe
short_description: Try every gate between QEMU and /dev/iommu, and name the first that is shut
version_added: 0.2.0
author:
  - The iommufd.host authors (@iommufd)
description:
  - Opens C(/dev/iommu), the vfio character devices (cdevs) and C(/dev/kvm) with the rights that QEMU would have. That
    is as its user with all groups, in a transient systemd unit with the device policy of the place where guests run,
    and under the AppArmor profile that libvirt would give them. Each trial adds one gate, so the one that is shut can
    be told.
  - The gates, in order, are V(exists) (the node is there, the module loaded, the device bound), V(dac) (owner, group
    and mode), V(acl) (access list of the node), V(cgroup) (device policy), V(lsm) (AppArmor) and V(memlock) (the limit
    on pinned memory).
  - In mode V(launcher) it also tries that QEMU's user can B(not) open the nodes.
  - Nothing is changed and nothing stays behind. An opened node is closed at once, the unit and a profile loaded for the
    trial are gone afterwards. Guests that run are not disturbed.
  - A V(memlock) trial locks address space without touching memory, so that it costs none.
  - SELinux cannot be tried without a guest, as a process gets QEMU's type when it starts. That link is then V(skip).
options:
  mode:
    description:
      - V(group) is right where QEMU opens the nodes itself, V(launcher) where something else does and passes
        descriptors.
    type: str
    choices: [launcher, group]
    required: true
  manager:
    description:
      - What starts the guests. With V(libvirt) the device list, the user and the security driver come from C(qemu.conf)
        and the limit from the daemon. With V(systemd) all comes from O(units).
      - V(none) is a user who starts QEMU by hand, see O(user).
    type: str
    choices: [libvirt, systemd, none]
    required: true
  units:
    description: The services that launch guests. Required for O(manager=systemd).
    type: list
    elements: str
    default: []
  user:
    description: QEMU's user, instead of the one that the configuration says. Required for O(manager=none).
    type: str
  devices:
    description: PCI addresses of the devices whose cdevs are tried. Without it all cdevs that are there are.
    type: list
    elements: str
  memory:
    description: How much memory must be pinnable, such as V(4G). Without it V(memlock) is not tried.
    type: str
  apparmor_profile:
    description:
      - A loaded AppArmor profile to try under, or V(unconfined).
      - By default one as libvirt makes it for a guest, where libvirt would.
    type: str
  fail:
    description: Whether a broken link is a failure of the task. With V(false) only RV(ok) and RV(broken) tell.
    type: bool
    default: true
  timeout:
    description: Seconds for each trial.
    type: int
    default: 60
requirements:
  - systemd (C(systemd-run)); C(apparmor_parser) where AppArmor is in use.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.reads
seealso:
  - module: iommufd.host.udev_access
    description: Mends V(dac) and V(acl).
  - module: iommufd.host.cgroup_acl
    description: Mends V(cgroup).
  - module: iommufd.host.apparmor_access
    description: Mends V(lsm).
  - module: iommufd.host.memlock_limits
    description: Mends V(memlock).
  - module: iommufd.host.guest_verify
    description: Boots a guest.
"""

EXAMPLES = r"""
- name: Try what a guest of libvirt that opens the nodes itself could open, and whether it could pin 4 GiB
  iommufd.host.access_probe:
    mode: group
    manager: libvirt
    memory: 4G

- name: Try that a launcher can open the nodes, and its QEMU cannot
  iommufd.host.access_probe:
    mode: launcher
    manager: systemd
    units: [guest@.service]

- name: Only report
  iommufd.host.access_probe:
    mode: group
    manager: none
    user: alice
    devices: ["0000:02:00.0"]
    fail: false
"""

RETURN = r"""
ok:
  description: Whether everything opens that should, and nothing else does.
  returned: success
  type: bool
  sample: false
broken:
  description: The first broken link, null where there is none.
  returned: always
  type: dict
  contains:
    place:
      description: Where guests run.
      type: str
    node:
      description: The node.
      type: str
    user:
      description: Who tried.
      type: str
    link:
      description: V(exists), V(dac), V(acl), V(cgroup), V(lsm) or V(memlock).
      type: str
    detail:
      description: What was found.
      type: str
    remedy:
      description: What mends it.
      type: str
  sample:
    detail: "libvirt-qemu may not open /dev/iommu: root:root 0660, and libvirt-qemu is neither its owner nor in root."
    link: dac
    node: /dev/iommu
    place: guests of libvirt 11.3.0-3+deb13u3
    remedy: "Give it to a group that the user is in: the module udev_access (role iommufd.host.access, mode group)."
    user: libvirt-qemu
places:
  description: The chain of each place, link by link.
  returned: always
  type: list
  elements: dict
  contains:
    place:
      description: Where guests run.
      type: str
    ok:
      description: Whether its whole chain holds.
      type: bool
    broken:
      description: Its first broken link, null where there is none.
      type: dict
    nodes:
      description: For each node C(path), C(user), C(expected) (V(open) or V(refused)) and C(links), each with C(link),
        C(status) (V(ok), V(broken), V(skip)), C(detail) and C(remedy).
      type: list
      elements: dict
    memlock:
      description: The link V(memlock).
      type: dict
    process:
      description: What QEMU is there, C(user), C(uid), C(groups), C(device_policy), C(device_allow), C(apparmor) and
        C(memlock).
      type: dict
  sample: []
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _task_access_probe as task
from ansible_collections.iommufd.host.plugins.module_utils._ansible import run_task


def main() -> None:
    run_task(AnsibleModule(argument_spec=task.ARGUMENT_SPEC, supports_check_mode=True), task.work)


if __name__ == "__main__":
    main()
