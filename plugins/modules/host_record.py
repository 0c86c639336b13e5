#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: host_record
short_description: Note on a host what its roles were asked for
version_added: 0.2.0
description:
  - Writes C(/var/lib/iommufd-host/applied.json) on the host, which only root can read. It holds the options of all
    roles at the end of a run in which they were carried out, and what a guest was verified with.
  - The record never says that a host has converged, M(iommufd.host.host_plan) looks at the host itself. It says what a
    host goes back to when a rollout fails on it, and when a guest need not be booted again.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.changes
attributes:
  diff_mode:
    support: none
    details:
      - The record repeats the variables of the run.
options:
  wanted:
    description: RV(iommufd.host.host_plan#module:wanted) of the run.
    type: dict
  roles:
    description: The roles that the run was about. Of others, what was noted before stays. Without it, all.
    type: list
    elements: str
  verified:
    description:
      - PCI addresses of the devices that a guest was verified with just now. What that depends on is noted.
      - Without any, an earlier note of that kind stays. It counts only as long as all of it is still as it was.
    type: list
    elements: str
    default: []
  state:
    description: V(absent) removes the record, and one of M(iommufd.host.host_snapshot).
    type: str
    choices: [present, absent]
    default: present
seealso:
  - module: iommufd.host.host_plan
author:
  - The iommufd.host authors (@iommufd)
"""

EXAMPLES = r"""
- name: Note what was asked for
  iommufd.host.host_record:
    wanted: "{{ plan.wanted }}"
    verified: "{{ verify_evidence.devices | map(attribute='address') }}"

- name: Remove the record
  iommufd.host.host_record:
    state: absent
"""

RETURN = r"""
path:
  description: The record.
  returned: success
  type: str
  sample: /var/lib/iommufd-host/applied.json
plan:
  description: What was done, or would be done.
  returned: success
  type: list
  elements: str
  sample: [write /var/lib/iommufd-host/applied.json]
"""

import time

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _fingerprint, _records
from ansible_collections.iommufd.host.plugins.module_utils._ansible import Outcome, run_module
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan


def work(module: AnsibleModule) -> Outcome:
    params = module.params
    host = Host()
    if params["state"] == "absent":
        steps = [*_records.remove_record(host, _records.BEFORE), *_records.remove_record(host, _records.APPLIED)]
    else:
        old = _records.read_record(host, _records.APPLIED)
        wanted = params["wanted"]
        if params["roles"] is not None:
            noted = old.get("wanted") or {}
            wanted = {role: wanted[role] if role in params["roles"] else noted.get(role) for role in wanted}
        record = {"wanted": wanted}
        if params["verified"]:
            parts = _fingerprint.read_parts(host, wanted["verify"], params["verified"])
            record["verified"] = {"at": int(time.time()), "parts": parts}
        elif "verified" in old:
            record["verified"] = old["verified"]
        steps = _records.write_record(host, _records.APPLIED, record)
    return Outcome(Plan(steps), {"path": _records.APPLIED})


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "wanted": {"type": "dict"},
            "roles": {"type": "list", "elements": "str"},
            "verified": {"type": "list", "elements": "str", "default": []},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
        required_if=[("state", "present", ["wanted"])],
    )
    run_module(module, work)


if __name__ == "__main__":
    main()
