#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: udev_access
short_description: Decide who may open /dev/iommu and the vfio character devices
version_added: 0.1.0
author:
  - The iommufd.host authors (@iommufd)
description:
  - Writes one udev rules file for C(/dev/iommu), the vfio character devices (cdevs, C(/dev/vfio/devices/vfioN)) and,
    where wanted, the legacy group nodes (C(/dev/vfio/N)).
  - The live nodes are brought in line at once. Only nodes that differ are triggered, and each is checked afterwards.
    One that did not follow is a failure that names the rule that won, and everything is put back as it was.
  - A node that is not there yet (module not loaded, device not bound) gets its access when it appears.
  - For a node that others write rules for, too, the last rule counts. The default O(path) is read after everything
    that distributions ship, and before the C(99-) files of the administrator.
options:
  nodes:
    description:
      - The nodes to give access to. Either a name, or a dictionary with a name and its own owner, group and mode.
      - An empty list leaves all nodes as the kernel makes them (root only), which is right where a launcher opens
        them and passes the descriptors. The names that O(symlinks) makes are then the only thing the rules do.
      - The list is complete. Nodes that an earlier list of this module named get the kernel's default back.
    type: list
    elements: raw
    default: [iommu, cdevs]
    suboptions:
      name:
        description: C(iommu), C(cdevs) or C(groups).
        type: str
        required: true
      owner:
        description: Instead of O(owner).
        type: str
      group:
        description: Instead of O(group).
        type: str
      mode:
        description: Instead of O(mode).
        type: str
      acl_users:
        description: Instead of O(acl_users).
        type: list
        elements: str
        version_added: 0.2.0
      acl_groups:
        description: Instead of O(acl_groups).
        type: list
        elements: str
        version_added: 0.2.0
  owner:
    description:
      - User that owns the nodes.
      - The user must exist, in the host's own user database. udev starts before directory services.
    type: str
    default: root
  group:
    description:
      - Group of the nodes. QEMU's user is a member of V(kvm) on Debian and Ubuntu.
      - The group must exist, in the host's own group database. udev starts before directory services.
    type: str
    default: kvm
  mode:
    description:
      - Mode of the nodes, an octal string in quotes.
      - A mode that lets everybody in is refused, see O(allow_world).
    type: raw
    default: "0660"
  acl_users:
    description:
      - Users who may read and write the nodes as well, by an entry in the access list of each node. The users must
        exist, in the host's own user database.
      - The rule itself sets the list, by running C(setfacl) (package C(acl)) when a node appears or changes. So it is
        there for devices that are bound later, and after a reboot. udev's own C(uaccess) is not used, as it is for
        whoever sits at the screen.
      - The list is complete. An entry that somebody else sets on such a node is gone at the next event. Without users
        and groups here, access lists are left alone.
    type: list
    elements: str
    default: []
    version_added: 0.2.0
  acl_groups:
    description: Groups that may, in the same way.
    type: list
    elements: str
    default: []
    version_added: 0.2.0
  allow_world:
    description:
      - Accept a O(mode) with access for everybody. Any program of any user on the host can then take the devices.
    type: bool
    default: false
  symlinks:
    description:
      - Give each cdev a stable name, C(/dev/vfio/by-path/pci-0000:02:00.0), which leads to its present
        C(/dev/vfio/devices/vfioN). The numbers change at boot, the name does not.
      - Nothing else makes names in that directory. The kernel uses numbers, C(vfio), C(devices) and C(noiommu-N).
    type: bool
    default: true
  path:
    description: The rules file. Its directory must be one that udev reads.
    type: path
    default: /etc/udev/rules.d/90-iommufd-host.rules
  state:
    description:
      - With V(absent) the file is removed and the nodes it covered get the kernel's default back, C(/dev/iommu) 0660
        root:root and the cdevs 0600 root:root, or what other rules say.
    type: str
    choices: [present, absent]
    default: present
requirements:
  - systemd-udevd. The syntax of the rules is checked with C(udevadm verify) where it exists (systemd 254 and later).
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.changes
seealso:
  - module: iommufd.host.cgroup_acl
    description: The other gate before these nodes.
"""

EXAMPLES = r"""
- name: Let group kvm open /dev/iommu and the cdevs
  iommufd.host.udev_access:
    group: kvm
    mode: "0660"

- name: Leave the nodes to root, and give the cdevs stable names
  iommufd.host.udev_access:
    nodes: []

- name: Another group for the cdevs
  iommufd.host.udev_access:
    nodes:
      - iommu
      - name: cdevs
        group: disk
        mode: "0640"

- name: Leave group and mode as they are for others, and let two more users in
  iommufd.host.udev_access:
    group: root
    mode: "0600"
    acl_users: [alice, ci-runner]

- name: As it was
  iommufd.host.udev_access:
    state: absent
"""

RETURN = r"""
file:
  description: The rules file.
  returned: success
  type: str
  sample: /etc/udev/rules.d/90-iommufd-host.rules
nodes:
  description: The live nodes that the module looks after, as they are now (in check mode, as they are before).
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: The node.
      type: str
    kind:
      description: C(iommu), C(cdevs) or C(groups).
      type: str
    owner:
      description: Its owner.
      type: str
    group:
      description: Its group.
      type: str
    mode:
      description: Its mode, four octal digits.
      type: str
    acl:
      description: Users and groups in its access list that may read and write, as C(setfacl) takes them.
      type: list
      elements: str
      version_added: 0.2.0
    symlink:
      description: Its stable name, null where it has none.
      type: str
  sample:
    - {acl: [], group: kvm, kind: iommu, mode: "0660", owner: root, path: /dev/iommu, symlink: null}
    - acl: ["u:alice:rw"]
      group: kvm
      kind: cdevs
      mode: "0660"
      owner: root
      path: /dev/vfio/devices/vfio0
      symlink: /dev/vfio/by-path/pci-0000:00:12.0
waiting:
  description: Kinds of nodes that are wanted and of which there is none yet; they follow the rules when they appear.
  returned: success
  type: list
  elements: str
  sample: [cdevs]
plan:
  description: The steps, in order.
  returned: success
  type: list
  elements: str
  sample:
    - write /etc/udev/rules.d/90-iommufd-host.rules
    - have udev apply the rules to /dev/iommu
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _task_udev_access as task
from ansible_collections.iommufd.host.plugins.module_utils._ansible import run_task


def main() -> None:
    run_task(AnsibleModule(argument_spec=task.ARGUMENT_SPEC, supports_check_mode=True), task.work)


if __name__ == "__main__":
    main()
