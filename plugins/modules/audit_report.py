#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Documentation of the action plugin of this name, which does the work.

from __future__ import annotations

DOCUMENTATION = r"""
module: audit_report
short_description: Write the report of a fleet's survey
version_added: 0.2.0
author:
  - The iommufd.host authors (@iommufd)
description:
  - Takes what M(iommufd.host.iommufd_info) returned for each host of a play and writes one report of all of them on the
    controller, for people and for machines. Nothing runs on a host.
  - C(index.html) is one self-contained page with a matrix of hosts and checks, and a section per host with its IOMMU
    groups. C(report.json) has everything. C(junit.xml) shows each check as a test, for CI systems.
  - A host that failed or could not be reached is in the report as such, with the reason.
  - A host is ready when no check fails, and none of C(iommu.enabled), C(kernel.iommufd), C(kernel.cdev),
    C(node.iommu) and C(qemu.iommufd) was skipped. What could not be told has not been shown to be ready.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.reports
options:
  path:
    description:
      - Directory on the controller for the report. It is made where it is missing.
      - The surveys tell much about the hosts (addresses, versions, mounts). The umask decides who may read the files.
    type: path
    required: true
  hosts:
    description: Names of the hosts that the report is about, in its order.
    type: list
    elements: str
    required: true
  variable:
    description:
      - Name of the variable in which each host's survey was registered. For a large fleet ask for it with
        O(iommufd.host.iommufd_info#module:packed=true).
    type: str
    default: audit_survey
  table_hosts:
    description:
      - Number of hosts that the table lists. For a larger fleet, it lists no more than that many which are not ready.
    type: int
    default: 40
attributes:
  diff_mode:
    support: full
    details:
      - The difference shown is that of the two tables.
  idempotent:
    details:
      - Every run writes the files with its own time. The result is changed when something else in the report differs.
seealso:
  - module: iommufd.host.iommufd_info
"""

EXAMPLES = r"""
# This is the core of the playbook iommufd.host.audit.
- name: Survey the hosts
  iommufd.host.iommufd_info:
  register: audit_survey
  ignore_errors: true
  ignore_unreachable: true

- name: Write the report
  iommufd.host.audit_report:
    path: /srv/reports/hypervisors
    hosts: "{{ ansible_play_hosts_all }}"
  run_once: true
  register: report

- name: Show it in short
  ansible.builtin.debug:
    msg: "{{ report.table }}"
  run_once: true
"""

RETURN = r"""
path:
  description: The directory.
  returned: success
  type: str
  sample: /srv/reports/hypervisors
files:
  description: The files in it.
  returned: success
  type: list
  elements: str
  sample:
    - /srv/reports/hypervisors/report.json
    - /srv/reports/hypervisors/junit.xml
    - /srv/reports/hypervisors/index.html
summary:
  description: The number of hosts, in all and by verdict.
  returned: success
  type: dict
  sample: {hosts: 4, ready: 1, not_ready: 1, failed: 1, unreachable: 1}
not_ready:
  description: Names of the hosts that are not ready, or could not be surveyed.
  returned: success
  type: list
  elements: str
  sample: [hv2, hv3, hv4]
table:
  description: The report in short, as lines for a terminal.
  returned: success
  type: list
  elements: str
  sample:
    - "HOST  VERDICT      OK  WARN  FAIL  FIRST TO MEND"
    - "hv4   unreachable   -     -     -  Failed to connect to the host via ssh: Connection refused"
    - "hv3   failed        -     -     -  root: '/srv/nowhere' is not accepted. Accepted: a directory that exists."
    - "hv2   not ready     3     2     1  iommu.enabled"
    - "hv1   ready        12     1     0"
    - "4 hosts: 1 ready, 1 not ready, 1 failed, 1 unreachable"
    - "most frequent: iommu.enabled on 1"
"""
