# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from hypothesis import given

from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import Report
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_table import to_table
from ansible_collections.iommufd.host.tests.unit.reports import (
    REPORTS,
    check,
    good_checks,
    hostile_report,
    report,
    unhurried,
)


def test_a_small_fleet() -> None:
    made = report(
        hv1={"checks": [*good_checks(), check("kvm", "warn")]},
        hv2={"checks": [check(name, "fail") for name in ("iommu.enabled", "node.iommu", "b", "c", "d")]},
        hv3={"failed": True, "msg": "No Python."},
        hv4={"unreachable": True, "msg": "Connection refused"},
    )
    assert to_table(made) == [
        "HOST  VERDICT      OK  WARN  FAIL  FIRST TO MEND",
        "hv4   unreachable   -     -     -  Connection refused",
        "hv3   failed        -     -     -  No Python.",
        "hv2   not ready     0     0     5  iommu.enabled, node.iommu, b and 2 more",
        "hv1   ready         5     1     0",
        "4 hosts: 1 ready, 1 not ready, 1 failed, 1 unreachable",
        "most frequent: iommu.enabled on 1, node.iommu on 1, b on 1, c on 1, d on 1",
    ]


def test_a_wide_fleet_shares_lines() -> None:
    results = {f"hv{number:03}": {"checks": good_checks()} for number in range(300)}
    for number in range(5):
        results[f"off{number}"] = {"checks": [check("iommu.enabled", "fail")]}
        results[f"gone{number}"] = {"unreachable": True, "msg": f"connect to gone{number} port 22: refused"}
    assert to_table(report(**results)) == [
        "HOSTS  VERDICT      FIRST TO MEND                     WHICH",
        "    5  unreachable  connect to HOST port 22: refused  gone0, gone1, gone2 and 2 more",
        "    5  not ready    iommu.enabled                     off0, off1, off2 and 2 more",
        "310 hosts: 300 ready, 5 not ready, 5 unreachable",
        "most frequent: iommu.enabled on 5",
    ]


def test_wide_and_all_ready() -> None:
    results = {f"hv{number:03}": {"checks": good_checks()} for number in range(50)}
    assert to_table(report(**results)) == ["50 hosts: 50 ready"]


def test_wide_and_all_different() -> None:
    results = {f"hv{number:03}": {"checks": [check(f"check{number}", "fail")]} for number in range(50)}
    lines = to_table(report(**results), limit=10)
    assert len(lines) == 1 + 10 + 3
    assert lines[11] == "and 40 more lines, see the report"


def test_no_host() -> None:
    assert to_table(report())[-1] == "0 hosts: none"


def test_hostile_hosts_do_not_drive_the_terminal() -> None:
    for limit in (100, 1):
        for line in to_table(hostile_report(), limit):
            assert line.isprintable()
            assert len(line) <= 120


@unhurried
@given(REPORTS)
def test_whatever_a_survey_holds(made: Report) -> None:
    for limit in (40, 1):
        assert all(line.isprintable() for line in to_table(made, limit))
