#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: host_snapshot
short_description: Record what a host is, and compare it with that
version_added: 0.2.0
description:
  - Records what a host is before it is changed, and tells later what differs. That is the files of C(/etc),
    C(/boot) and of wherever the collection writes, the content of the initramfs by name, the packages with their marks,
    driver, override and number of VFs of every PCI function, the modes of the nodes, the kernel's command line and the
    vfio modules.
  - The record lies in C(/var/lib/iommufd-host/before.json) on the host, so that a controller that was killed finds it
    again. It is there only as long as somebody is at work on the host.
  - It is no backup. Nothing can be put back from it.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.changes
attributes:
  diff_mode:
    support: none
    details:
      - The differences are in RV(differences).
options:
  state:
    description:
      - V(taken) records the host. One that was taken before and not removed stays, since the host may have been changed
        in the meantime. Only O(touched) grows.
      - V(compared) tells the differences.
      - V(absent) removes the record.
    type: str
    choices: [taken, compared, absent]
    default: taken
  touched:
    description: What is going to be changed, by names of roles.
    type: list
    elements: str
    default: []
  data:
    description: Kept with the record, and returned each time. That of the record counts, where there is one.
    type: dict
    default: {}
author:
  - The iommufd.host authors (@iommufd)
"""

EXAMPLES = r"""
- name: Record what the host is
  iommufd.host.host_snapshot:
    touched: [kernel, devices]

- name: See what differs
  iommufd.host.host_snapshot:
    state: compared
  register: compared

- name: Remove the record
  iommufd.host.host_snapshot:
    state: absent
"""

RETURN = r"""
differences:
  description: What is not as it was, one line each. Null where there is no record.
  returned: with O(state=compared)
  type: list
  elements: str
  sample: []
data:
  description: What was kept with the record.
  returned: success
  type: dict
  sample: {}
touched:
  description: What was to be changed since the record was taken.
  returned: success
  type: list
  elements: str
  sample: [kernel, devices]
earlier:
  description: Whether the record was there before, of a run that did not come to its end.
  returned: with O(state=taken)
  type: bool
  sample: false
plan:
  description: What was done, or would be done.
  returned: success
  type: list
  elements: str
  sample: [write /var/lib/iommufd-host/before.json]
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _records, _snapshot
from ansible_collections.iommufd.host.plugins.module_utils._ansible import Outcome, run_module
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan
from ansible_collections.iommufd.host.plugins.module_utils._vfio import settle


def work(module: AnsibleModule) -> Outcome:
    params = module.params
    host = Host()
    settle(host)
    record = _records.read_record(host, _records.BEFORE)
    known: dict[str, t.Any] = {"data": record.get("data", params["data"]), "touched": record.get("touched", [])}
    if params["state"] == "absent":
        return Outcome(Plan(_records.remove_record(host, _records.BEFORE)), known)
    if params["state"] == "compared":
        found = _snapshot.differences(record["host"], _snapshot.take(host)) if record else None
        return Outcome(Plan(), {**known, "differences": found})
    known["touched"] = list(dict.fromkeys([*known["touched"], *params["touched"]]))
    state = record["host"] if record else _snapshot.take(host)
    steps = _records.write_record(host, _records.BEFORE, {**known, "host": state})
    return Outcome(Plan(steps), {**known, "earlier": bool(record)})


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["taken", "compared", "absent"], "default": "taken"},
            "touched": {"type": "list", "elements": "str", "default": []},
            "data": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    run_module(module, work)


if __name__ == "__main__":
    main()
