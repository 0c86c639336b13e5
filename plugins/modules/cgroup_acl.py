#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: cgroup_acl
short_description: Let the cgroup of guests, or of what launches them, open /dev/iommu and the vfio devices
version_added: 0.1.0
author:
  - The iommufd.host authors (@iommufd)
description:
  - A device cgroup forbids a process to open a node even where owner, group and mode allow it. This module opens that
    gate for the named devices, for guests of libvirt or for systemd units.
  - With O(manager=libvirt) the devices are merged into C(cgroup_device_acl) in C(qemu.conf). Setting that list replaces
    the one built into libvirt, so it is merged with the list that the installed version would use otherwise. Only our
    entries and one comment that names them are added, everything else in the file stays byte for byte, and
    O(state=absent) restores the original. The daemon is restarted if it runs, guests are not touched. libvirt reads
    the list when a guest starts.
  - With O(manager=systemd) each unit gets a drop-in with C(DevicePolicy) and C(DeviceAllow). A descriptor that is
    passed to a process needs no permission of its cgroup, but whoever opens the node does. That includes
    systemd itself when it opens the files of C(OpenFile) for a service.
options:
  manager:
    description: Whose list it is.
    type: str
    choices: [libvirt, systemd]
    required: true
  devices:
    description:
      - The devices, absolute paths below C(/dev). Neither manager expands wildcards.
      - A PCI address (V(0000:02:00.0)) stands for the stable name of that device's cdev, which the rules of
        M(iommufd.host.udev_access) make. It need not be bound yet. libvirt skips a path that does not exist.
      - With O(manager=systemd) also a class of devices. V(char-vfio-dev) covers all cdevs. V(char-misc) is refused,
        as it is far too wide.
      - The list is complete. Entries of an earlier list of this module that are not in it are taken out.
      - Required for O(state=present).
    type: list
    elements: str
  path:
    description: libvirt's configuration file.
    type: path
    default: /etc/libvirt/qemu.conf
  restart:
    description:
      - Restart C(virtqemud) or C(libvirtd), whichever runs, after a change of O(path). Guests keep running.
    type: bool
    default: true
  if_missing:
    description:
      - What to do where O(path) does not exist, because libvirt's QEMU driver is not installed. V(skip) changes nothing
        and says so in RV(skipped_reason).
    type: str
    choices: [fail, skip]
    default: fail
  if_passed:
    description:
      - What to do with a libvirt (12.1 and later) that can open the nodes itself and pass the descriptors to QEMU, as
        C(<driver iommufd='yes'/>) asks it to. Such a guest needs no entry. One whose C(<qemu:commandline>) opens the
        nodes still does.
      - V(skip) adds nothing there, takes out what is ours, and says so in RV(skipped_reason).
    type: str
    choices: [merge, skip]
    default: merge
  unit:
    description:
      - Services, templates, slices or scopes that launch guests, with their suffix.
      - A unit that does not exist yet gets its drop-in all the same, with a warning. It counts when the unit appears.
      - Required for O(manager=systemd) with O(state=present). With O(state=absent) and without units, every drop-in
        of this module is removed.
    type: list
    elements: str
    aliases: [units]
  policy:
    description:
      - C(DevicePolicy) of the unit. V(closed) adds the harmless standard devices (null, zero, full, random, urandom,
        tty, ptmx) to O(devices), V(strict) allows nothing else. With V(auto) the list of the unit's own file decides.
      - By default V(closed), or V(strict) where the unit itself says so.
      - A unit that was open before can then open the named devices only. Name everything that it needs, for guests
        usually also V(/dev/kvm) and V(/dev/net/tun).
    type: str
    choices: [auto, closed, strict]
  open_file:
    description:
      - Files that systemd opens and passes to a service, as in C(OpenFile), for example V(/dev/iommu:iommu).
        Needs systemd 253.
      - systemd wants a colon of the path as C(\\x3a). The stable name of a device is
        V(/dev/vfio/by-path/pci-0000\\x3a02\\x3a00.0:gpu). systemd 255 did not open such a path at first.
    type: list
    elements: str
    default: []
  limit_memlock:
    description:
      - C(LimitMEMLOCK) of a service, such as V(17G) or V(infinity). Guest memory is pinned and counts against it.
    type: str
  exclusive:
    description:
      - O(unit) is the complete list. A drop-in of this module that another unit still has, because an earlier list
        named it, is removed.
      - Without it other units are left alone.
    type: bool
    default: false
    version_added: 0.2.0
  state:
    description: With V(absent) everything that this module added is taken out, and nothing else.
    type: str
    choices: [present, absent]
    default: present
  pending:
    description:
      - An earlier task of the same play is going to install libvirt.
      - Only honoured in check mode, where a missing O(path) is then a warning.
    type: bool
    default: false
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.changes
seealso:
  - module: iommufd.host.udev_access
    description: The other gate before these nodes, and the stable names.
"""

EXAMPLES = r"""
- name: Let libvirt's guests open /dev/iommu and two devices
  iommufd.host.cgroup_acl:
    manager: libvirt
    devices:
      - /dev/iommu
      - "0000:02:00.0"
      - "0000:02:00.1"

- name: Let the service that launches guests open the nodes and pass them on
  iommufd.host.cgroup_acl:
    manager: systemd
    unit: guest@.service
    devices:
      - /dev/kvm
      - /dev/iommu
      - char-vfio-dev
    open_file:
      - /dev/iommu:iommu

- name: As libvirt's list was
  iommufd.host.cgroup_acl:
    manager: libvirt
    state: absent
"""

RETURN = r"""
file:
  description: The file with libvirt's list.
  returned: O(manager=libvirt)
  type: str
  sample: /etc/libvirt/qemu.conf
effective:
  description: The list that libvirt uses once the plan is carried out. Null where the file does not exist.
  returned: O(manager=libvirt)
  type: list
  elements: str
  sample:
    - /dev/null
    - /dev/full
    - /dev/zero
    - /dev/random
    - /dev/urandom
    - /dev/ptmx
    - /dev/kvm
    - /dev/userfaultfd
    - /dev/iommu
base:
  description: Where the list without our devices comes from.
  returned: O(manager=libvirt)
  type: str
  sample: the commented default in /etc/libvirt/qemu.conf
added:
  description: The entries in it that are ours.
  returned: O(manager=libvirt)
  type: list
  elements: str
  sample: [/dev/iommu]
libvirt_version:
  description: The version of libvirt's QEMU driver, null where it is not known.
  returned: O(manager=libvirt)
  type: str
  sample: 11.3.0-3+deb13u3
passes_descriptors:
  description: Whether that version can pass the descriptors to QEMU itself, null where it is not known.
  returned: O(manager=libvirt)
  type: bool
  sample: false
skipped_reason:
  description: Why the devices were not added, see O(if_missing) and O(if_passed).
  returned: when they were not
  type: str
  sample: libvirt 12.8.0-1 opens the nodes itself and passes the descriptors.
units:
  description: What systemd has loaded for each unit, and what its cgroup enforces (in check mode, before the change).
  returned: O(manager=systemd)
  type: list
  elements: dict
  contains:
    unit:
      description: The unit.
      type: str
    drop_in:
      description: Our drop-in, null where there is none.
      type: str
    loaded:
      description: Whether systemd has the unit.
      type: bool
    active:
      description: Whether it runs.
      type: bool
    policy:
      description: Its C(DevicePolicy).
      type: str
    devices:
      description: Its C(DeviceAllow).
      type: list
      elements: str
    open_file:
      description: Its C(OpenFile).
      type: list
      elements: str
    memlock:
      description: Its C(LimitMEMLOCK).
      type: str
    cgroup:
      description: The cgroup of a unit that runs.
      type: str
    enforced:
      description: Whether that cgroup has a device filter. Null where nobody can tell (not running).
      type: bool
    effective:
      description:
        - For C(/dev/iommu), C(/dev/kvm) and each cdev that is there whether the cgroup of the running unit lets it be
          opened, read back from the kernel (the BPF programs of cgroup v2, C(devices.list) of v1).
        - Null where the filter is not systemd's own and cannot be read.
      type: dict
      version_added: 0.2.0
    restart_required:
      description: The unit runs with another C(OpenFile) or C(LimitMEMLOCK) until it is restarted. Not done here.
      type: bool
  sample:
    - active: false
      cgroup: null
      devices: [/dev/iommu rw, char-vfio-dev rw]
      drop_in: /etc/systemd/system/guest@.service.d/50-iommufd-host.conf
      effective: {}
      enforced: null
      loaded: true
      memlock: "8388608"
      open_file: ["/dev/iommu:iommu:"]
      policy: closed
      restart_required: false
      unit: guest@.service
plan:
  description: The steps, in order.
  returned: success
  type: list
  elements: str
  sample:
    - write cgroup_device_acl in /etc/libvirt/qemu.conf
    - restart virtqemud.service (guests keep running)
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _task_cgroup_acl as task
from ansible_collections.iommufd.host.plugins.module_utils._ansible import run_task


def main() -> None:
    run_task(AnsibleModule(argument_spec=task.ARGUMENT_SPEC, supports_check_mode=True), task.work)


if __name__ == "__main__":
    main()
