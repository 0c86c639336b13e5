# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import given

from ansible_collections.iommufd.host.plugins.plugin_utils._audit_junit import to_junit
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import Report
from ansible_collections.iommufd.host.tests.unit.reports import (
    REPORTS,
    check,
    good_checks,
    hostile_report,
    report,
    unhurried,
)

# What XML 1.0 allows, https://www.w3.org/TR/xml/#charsets
_XML = re.compile("[\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]*")


def parse(made: Report) -> ElementTree.Element:
    text = to_junit(made)
    assert _XML.fullmatch(text)
    return ElementTree.fromstring(text.encode())


def test_a_case_per_check() -> None:
    checks = [
        *good_checks(),
        check("node.iommu", "fail", "It is <not> there.", "Run `modprobe iommufd`."),
        check("kvm", "warn", "Slow.", "Turn it on."),
        check("memlock", "skip", "No tree."),
    ]
    suites = parse(report(one={"checks": checks}))
    assert {key: suites.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "8",
        "failures": "1",
        "errors": "0",
        "skipped": "1",
    }
    (suite,) = suites
    assert (suite.get("name"), suite.get("timestamp")) == ("one", "2026-11-22T11:20:00")
    cases = {case.get("name"): case for case in list(suite)[5:]}
    (failure,) = cases["node.iommu"]
    assert (failure.tag, failure.get("message")) == ("failure", "It is <not> there.")
    assert failure.text == "It is <not> there.\nRemedy: Run `modprobe iommufd`."
    (output,) = cases["kvm"]
    assert (output.tag, output.text) == ("system-out", "warn: Slow.\nRemedy: Turn it on.")
    (skipped,) = cases["memlock"]
    assert (skipped.tag, skipped.get("message")) == ("skipped", "No tree.")
    assert not list(suite[0])


def test_hosts_that_could_not_be_judged_are_errors() -> None:
    suites = parse(
        report(
            gone={"unreachable": True, "msg": "Connection refused"},
            broken={"failed": True, "msg": "No Python."},
            untold={"checks": [check("iommu.enabled", "ok")]},
        )
    )
    assert (suites.get("tests"), suites.get("errors")) == ("4", "3")
    errors = {suite.get("name"): suite.find("testcase/error") for suite in suites}
    assert {name: error.get("type") for name, error in errors.items() if error is not None} == {
        "gone": "unreachable",
        "broken": "failed",
        "untold": "not_ready",
    }
    assert errors["gone"] is not None and errors["gone"].text == "Connection refused"


def test_hostile_hosts() -> None:
    suites = parse(hostile_report())
    assert len(suites) == len(hostile_report()["hosts"])


@unhurried
@given(REPORTS)
def test_whatever_a_survey_holds(made: Report) -> None:
    suites = parse(made)
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"), ("tests", None)):
        found = suites.findall(f"testsuite/testcase/{tag}" if tag else "testsuite/testcase")
        assert int(suites.get(name) or -1) == len(found)
