#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: memlock_limits
short_description: Let QEMU pin the memory of guests with devices
version_added: 0.2.0
author:
  - The iommufd.host authors (@iommufd)
description:
  - All memory of a guest with a device is pinned, and counts against the limit on locked memory (RLIMIT_MEMLOCK) of the
    QEMU process. Where the limit is too small, the guest does not start, with "Cannot allocate memory".
  - iommufd counts what all processes of the same user have pinned, and compares that with the limit of the process that
    pins. Each QEMU of a user therefore needs a limit that covers all guests of that user together. The module derives
    it from O(guests), with 1 GiB more for each guest, as libvirt does, and says so in RV(reason).
  - The limit is set where QEMU gets it from. For services that is a drop-in with C(LimitMEMLOCK), for libvirt's guests
    one for the daemon, whose limit they inherit, for users who start QEMU by hand a file for C(pam_limits).
  - libvirt itself raises the limit for a guest with a C(<hostdev>) or a C(<hard_limit>). It does not for one whose
    C(<qemu:commandline>) opens the devices.
options:
  guests:
    description:
      - The guests that run at the same time, each the size of its memory (V(4G), binary units), or a dictionary.
      - O(guests) or O(limit) is required for O(state=present).
    type: list
    elements: raw
    suboptions:
      memory:
        description: Memory of one guest.
        type: str
        required: true
      count:
        description: How many of them there are.
        type: int
        default: 1
  limit:
    description: The limit itself, such as V(17G) or V(infinity).
    type: str
  libvirt:
    description: Whether libvirt's daemon (C(virtqemud) or C(libvirtd), whichever is installed) gets the limit.
    type: bool
    default: false
  units:
    description: Other services that start QEMU, with their suffix.
    type: list
    elements: str
    default: []
  users:
    description: Users, or groups with C(@) before their name, whose sessions get the limit.
    type: list
    elements: str
    default: []
  restart:
    description:
      - Restart libvirt's daemon where it runs with another limit. Guests keep running. Guests that run already keep
        their limit.
      - Other services are never restarted, see RV(services[].restart_required).
    type: bool
    default: true
  state:
    description:
      - With V(present) exactly the services and users named have the limit. What an earlier run gave others is taken
        back.
      - A service whose own limit is enough already is left as it is.
      - With V(absent) everything that this module added is taken out, and nothing else.
    type: str
    choices: [present, absent]
    default: present
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.changes
seealso:
  - module: iommufd.host.cgroup_acl
    description: Sets C(LimitMEMLOCK) of a launcher together with its device policy, too.
  - module: iommufd.host.access_probe
    description: Tries whether the memory can be locked.
"""

EXAMPLES = r"""
- name: Two guests of 8 GiB and one of 32 GiB, started by libvirt
  iommufd.host.memlock_limits:
    guests:
      - {memory: 8G, count: 2}
      - 32G
    libvirt: true

- name: A launcher of one's own
  iommufd.host.memlock_limits:
    guests: [16G]
    units: [guest@.service]

- name: Members of the group kvm
  iommufd.host.memlock_limits:
    limit: 64G
    users: ["@kvm"]

- name: As it was
  iommufd.host.memlock_limits:
    state: absent
"""

RETURN = r"""
limit:
  description: The limit in bytes, null for none.
  returned: O(state=present)
  type: int
  sample: 54760833024
reason:
  description: How it came about.
  returned: O(state=present)
  type: str
  sample: 2 x (8 GiB + 1 GiB) + 1 x (32 GiB + 1 GiB) = 51 GiB
services:
  description: The services (in check mode, before the change).
  returned: success
  type: list
  elements: dict
  contains:
    unit:
      description: The service.
      type: str
    drop_in:
      description: Our drop-in, null where there is none.
      type: str
    limit:
      description: The limit that it has from its next start, in bytes. Null for none, or where it is not known.
      type: int
    live:
      description: The limit of its main process, in bytes. Null for none, or where it does not run.
      type: int
    restart_required:
      description: It runs with less than the limit until it is restarted. Not done here.
      type: bool
  sample:
    - drop_in: /etc/systemd/system/libvirtd.service.d/50-iommufd-host-memlock.conf
      limit: 54760833024
      live: 54760833024
      restart_required: false
      unit: libvirtd.service
users:
  description: Users and groups in C(/etc/security/limits.d).
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
    - write /etc/systemd/system/libvirtd.service.d/50-iommufd-host-memlock.conf
    - have systemd read its units again
    - restart libvirtd.service (guests keep running)
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _task_memlock_limits as task
from ansible_collections.iommufd.host.plugins.module_utils._ansible import run_task


def main() -> None:
    run_task(AnsibleModule(argument_spec=task.ARGUMENT_SPEC, supports_check_mode=True), task.work)


if __name__ == "__main__":
    main()
