#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Documentation of the action plugin of this name, which does the work.

from __future__ import annotations

DOCUMENTATION = r"""
module: rollout_report
short_description: Tell where a rollout is, and write its report
version_added: 0.2.0
author:
  - The iommufd.host authors (@iommufd)
description:
  - A part of the playbook C(iommufd.host.rollout), which decides whether the next wave starts, and writes on the
    controller what became of each host. Nothing runs on a host.
  - C(index.html) is the page of M(iommufd.host.audit_report) with a section about the rollout. C(report.json) has what
    became of each host, C(junit.xml) a test for each.
  - The report is written before the first wave and with each one, so that one is there also when the controller is
    killed.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.reports
options:
  state:
    description: Where the playbook is. V(checked) only checks O(policy), and writes nothing.
    type: str
    choices: [checked, planned, wave, ended]
    required: true
  path:
    description: Directory on the controller for the report. Needed for all but O(state=checked).
    type: path
  hosts:
    description: Names of all hosts.
    type: list
    elements: str
    required: true
  batch:
    description: With O(state=wave), those that are begun now.
    type: list
    elements: str
    default: []
  policy:
    description: What the rollout was told.
    type: dict
    required: true
    suboptions:
      require:
        description: C(rollout_require).
        type: str
        choices: [all, possible]
        default: all
      on_failure:
        description: C(rollout_on_failure).
        type: str
        choices: [stop, continue]
        default: stop
      max_failures:
        description: C(rollout_max_failures).
        type: int
        default: 0
      window:
        description: C(rollout_window).
        type: str
        default: ""
      timezone:
        description: C(rollout_timezone).
        type: str
        default: ""
attributes:
  check_mode:
    details:
      - In check mode no report is written.
  diff_mode:
    support: N/A
    details:
      - This module changes no host.
  idempotent:
    details:
      - The report is that of this very run. The result is never changed.
seealso:
  - module: iommufd.host.audit_report
"""

EXAMPLES = r"""
- name: See whether the next wave may start
  iommufd.host.rollout_report:
    state: wave
    path: /srv/reports/rollout
    hosts: "{{ ansible_play_hosts_all }}"
    batch: "{{ ansible_play_batch }}"
    policy:
      on_failure: stop
  run_once: true
  register: rollout_now
"""

RETURN = r"""
msg:
  description: Where the rollout is, in a sentence.
  returned: unless O(state=checked)
  type: str
  sample: "wave 1: hv1. So far 4 hosts: 3 not started, 1 at work"
began:
  description: When the rollout began, in seconds since 1970.
  returned: unless O(state=checked)
  type: float
  sample: 1795684200.5
hosts:
  description: O(hosts), for later plays.
  returned: unless O(state=checked)
  type: list
  elements: str
  sample: [hv1, hv2, hv3, hv4]
obstacles:
  description: Why nothing may start, a sentence for each host.
  returned: unless O(state=checked)
  type: list
  elements: str
  sample: []
open:
  description: Whether a host may be started now.
  returned: success
  type: bool
  sample: true
stop:
  description: Whether no further wave may start.
  returned: unless O(state=checked)
  type: bool
  sample: false
path:
  description: The directory.
  returned: unless O(state=checked)
  type: str
  sample: /srv/reports/rollout
summary:
  description: The number of hosts, in all and by status.
  returned: unless O(state=checked)
  type: dict
  sample: {hosts: 4, done: 1, not_started: 3}
table:
  description: The report in short, as lines for a terminal.
  returned: unless O(state=checked)
  type: list
  elements: str
  sample: ["4 hosts: 1 done, 3 not started"]
verdicts:
  description: For each host that makes the rollout end with an error, why.
  returned: unless O(state=checked)
  type: dict
  sample: {hv2: "failed: Verify: the guest did not boot"}
wave:
  description: Number of the wave that was begun last.
  returned: unless O(state=checked)
  type: int
  sample: 1
window:
  description: O(policy.window).
  returned: unless O(state=checked)
  type: str
  sample: "Mon-Fri 22:00-05:00"
"""
