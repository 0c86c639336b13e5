# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The report of an audit as JUnit XML, as the CI systems read it: a suite per host, a case per check."""

from __future__ import annotations

import typing as t
from xml.etree import ElementTree

from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import NOT_READY, Report
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_text import printable


def to_junit(report: Report) -> str:
    """The document. A check that fails is a failure with its remedy, one that warns passes with the words in its
    output, one that was skipped is skipped; a host that could not be surveyed is an error, and so is one that was not
    shown to be ready though no check fails."""
    document = ElementTree.Element("testsuites", name="iommufd audit")
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for name, host in report["hosts"].items():
        suite = _suite(printable(name), host, report["generated"])
        document.append(suite)
        for key in totals:
            totals[key] += int(suite.get(key) or 0)
    document.attrib.update({key: str(value) for key, value in totals.items()})
    ElementTree.indent(document)
    text: str = ElementTree.tostring(document, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _suite(name: str, host: t.Mapping[str, t.Any], generated: str) -> ElementTree.Element:
    checks: list[t.Mapping[str, t.Any]] = host["checks"]
    statuses = [check["status"] for check in checks]
    not_shown = host["survey"] is None or (host["status"] == NOT_READY and "fail" not in statuses)
    suite = ElementTree.Element(
        "testsuite",
        name=name,
        hostname=name,
        timestamp=generated.removesuffix("Z"),
        tests=str(len(checks) + not_shown),
        failures=str(statuses.count("fail")),
        errors=str(int(not_shown)),
        skipped=str(statuses.count("skip")),
        time="0",
    )
    if not_shown:
        case = ElementTree.SubElement(suite, "testcase", classname=name, name="survey", time="0")
        reason = printable(host["reason"] or "")
        ElementTree.SubElement(case, "error", message=reason, type=host["status"]).text = reason
    for check in checks:
        _case(suite, name, check)
    return suite


def _case(suite: ElementTree.Element, host: str, check: t.Mapping[str, t.Any]) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=host, name=printable(check["id"]), time="0")
    status, detail, remedy = check["status"], printable(check["detail"] or ""), check["remedy"]
    words = f"{detail}\nRemedy: {printable(remedy)}" if remedy else detail
    if status == "fail":
        ElementTree.SubElement(case, "failure", message=detail, type="check").text = words
    elif status == "skip":
        ElementTree.SubElement(case, "skipped", message=detail)
    elif status != "ok":
        ElementTree.SubElement(case, "system-out").text = f"{printable(status)}: {words}"
