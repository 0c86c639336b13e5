# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import json
import zlib

from hypothesis import given

from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import (
    STATUSES,
    Report,
    judge,
    most_frequent,
    to_json,
)
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_text import one_line, printable
from ansible_collections.iommufd.host.plugins.plugin_utils._readiness import ESSENTIAL
from ansible_collections.iommufd.host.tests.unit.reports import (
    HOSTILE,
    REPORTS,
    check,
    good_checks,
    hostile_report,
    report,
    unhurried,
)


def test_every_verdict() -> None:
    made = report(
        good={"checks": [*good_checks(), check("kvm", "warn")], "devices": [], "changed": False, "failed": False},
        bad={"checks": [check("iommu.enabled", "fail"), *good_checks()], "devices": None},
        broken={"failed": True, "msg": "No Python.\n", "module_stderr": "Traceback\nsh: python3: not found\n"},
        gone={"unreachable": True, "msg": "Task failed: Connection refused"},
        never=None,
        odd={"changed": False},
        cut={"checks": good_checks(), "packed": "eJyr"},
        none={"checks": good_checks(), "packed": "no base64"},
    )
    assert made["summary"] == {"hosts": 8, "ready": 1, "not_ready": 1, "failed": 5, "unreachable": 1}
    said = {name: (host["status"], host["reason"]) for name, host in made["hosts"].items()}
    assert said == {
        "good": ("ready", None),
        "bad": ("not_ready", "This check fails: iommu.enabled."),
        "broken": ("failed", "No Python. (sh: python3: not found)"),
        "gone": ("unreachable", "Connection refused"),
        "never": ("failed", "It was not surveyed: the play ended before."),
        "odd": ("failed", "The survey returned no checks."),
        "cut": ("failed", "What the survey returned cannot be unpacked."),
        "none": ("failed", "What the survey returned cannot be unpacked."),
    }
    assert made["hosts"]["good"]["survey"] == {"devices": []}  # the checks once, and nothing of the module call
    assert made["hosts"]["gone"]["survey"] is None


def test_a_packed_survey_that_would_fill_the_memory_is_none() -> None:
    for text in (b'"' + b" " * (65 << 20) + b'"', b'{"a":' * 100000):
        packed = base64.b64encode(zlib.compress(text)).decode()
        made = report(h={"checks": good_checks(), "packed": packed})["hosts"]["h"]
        assert (made["status"], made["survey"]) == ("failed", None)


def test_what_could_not_be_told_is_not_ready() -> None:
    for name in ESSENTIAL:
        skipped = [check(one, "skip" if one == name else "ok") for one in ESSENTIAL]
        assert judge(skipped) == ("not_ready", f"Nothing that was seen is wrong, but this could not be told: {name}.")
    assert judge([*good_checks(), check("libvirt.acl", "skip"), check("kvm", "warn")]) == ("ready", None)


def test_the_most_frequent_failures() -> None:
    fail = {
        name: {"checks": [check(one, "fail") for one in ids]} for name, ids in {"a": "xy", "b": "y", "c": "yy"}.items()
    }
    assert most_frequent(report(**fail)) == [("y", 3), ("x", 1)]


def test_json_is_the_report_with_a_host_a_line() -> None:
    made = hostile_report()
    text = "".join(to_json(made))
    assert json.loads(text) == made
    assert sum(line.startswith('"') and '"status"' in line for line in text.splitlines()) == len(made["hosts"])
    assert json.loads("".join(to_json(report()))) == report()


@unhurried
@given(REPORTS)
def test_whatever_a_survey_holds(made: Report) -> None:
    json.loads("".join(to_json(made)))
    assert sum(made["summary"][status] for status in STATUSES) == made["summary"]["hosts"] == len(made["hosts"])
    for host in made["hosts"].values():
        assert host["status"] in STATUSES
        assert (host["reason"] is None) == (host["status"] == "ready")


def test_printable() -> None:
    assert printable("naïve ✓ 漢字\n\t") == "naïve ✓ 漢字\n\t"
    assert printable("a\u00a0b") == "a b"
    for text in HOSTILE:
        assert all(one.isprintable() or one in "\n\t" for one in printable(text))
        printable(text).encode()
    assert one_line("a\n b\t\tc ") == "a b c"
