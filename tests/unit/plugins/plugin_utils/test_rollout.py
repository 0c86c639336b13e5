# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The report of a rollout: what became of each host, from what the play has noted of it."""

from __future__ import annotations

import typing as t
from xml.etree import ElementTree

import pytest

from ansible_collections.iommufd.host.plugins.plugin_utils import _rollout
from ansible_collections.iommufd.host.plugins.plugin_utils._rollout_page import to_lead

Json = dict[str, t.Any]

POLICY = {"require": "all", "on_failure": "stop", "max_failures": 0, "window": "", "timezone": ""}
READY = {"checks": [{"id": name, "status": "ok"} for name in (
    "iommu.enabled", "kernel.iommufd", "kernel.cdev", "node.iommu", "qemu.iommufd")]}  # fmt: skip
POOR = {"checks": [{"id": "kernel.iommufd", "status": "fail"}]}
PLAN = {
    "converged": False,
    "recorded": False,
    "roles": {"kernel": {"plan": ["write /etc/modules-load.d/iommufd-host.conf"]}, "access": {"plan": []}},
    "survey": POOR,
}
STARTED = {"rollout_first": PLAN, "rollout_started": {"wave": 1, "at": 1000}}
DONE = {
    **STARTED,
    "rollout_outcome": {"status": "done", "verified": True},
    "rollout_ended": 1090,
    "rollout_after": {"survey": READY},
}
FAILED = {
    **STARTED,
    "rollout_outcome": {
        "status": "failed",
        "task": "Boot a guest",
        "cause": "no <guest>",
        "put_back": {"complete": False, "differences": ["file /etc/x: a => b"], "words": "put back, but"},
    },
    "rollout_ended": 1050,
}
FLEET: dict[str, Json] = {
    "done": DONE,
    "failed": FAILED,
    "lost": STARTED,
    "next": {"site_plan": PLAN},
    "converged": {"site_plan": {"converged": True, "recorded": True, "survey": READY}},
    "half": {"site_plan": {"converged": True, "recorded": True, "back": {"unfinished": True}}},
    "in use": {"site_plan": {"failed": True, "msg": "Task failed: 0000:01:00.0 is in use", "survey": POOR}},
    "blocked": {"site_plan": PLAN, "rollout_blocked": "It needs a reboot (so), and kernel_reboot is false."},
    "away": {"site_plan": {"unreachable": True, "msg": "No route to host"}},
    "never": {},
}


def report(state: str = "ended", **more: t.Any) -> Json:
    return _rollout.build_rollout(FLEET, state, {**POLICY, **more.pop("policy", {})}, 900.0, 1100.0, "0.2.0", **more)


def test_what_became_of_each_host() -> None:
    found = report()
    assert {name: row["status"] for name, row in found["hosts"].items()} == {
        "done": "done",
        "failed": "failed",
        "lost": "lost",
        "next": "not_started",
        "converged": "converged",
        "half": "not_started",
        "in use": "impossible",
        "blocked": "impossible",
        "away": "unreachable",
        "never": "not_started",
    }
    assert (
        sum(count for status, count in found["summary"].items() if status != "hosts") == found["summary"]["hosts"] == 10
    )
    assert found["wave"] == 1


def test_before_and_after_and_how_long() -> None:
    row = report()["hosts"]["done"]
    assert (row["seconds"], row["wave"], row["verified"]) == (90, 1, True)
    assert row["before"] == {"status": "not_ready", "failing": ["kernel.iommufd"]}
    assert row["after"] == {"status": "ready", "failing": []}
    assert row["plan"] == {"kernel": ["write /etc/modules-load.d/iommufd-host.conf"]}
    lost = report()["hosts"]["lost"]
    assert (lost["seconds"], lost["after"]) == (None, None)


def test_the_hosts_of_a_wave_that_begins_are_being_worked_on() -> None:
    found = report("wave", batch=["next"])
    assert (found["wave"], found["hosts"]["next"]["wave"]) == (2, 2)
    assert found["hosts"]["next"]["status"] == "at_work"
    # One of an earlier wave without an outcome is no longer at work.
    assert found["hosts"]["lost"]["status"] == "lost"


@pytest.mark.parametrize(
    ("policy", "stops"),
    [({}, True), ({"max_failures": 1}, True), ({"max_failures": 2}, False), ({"on_failure": "continue"}, False)],
)
def test_when_no_further_wave_starts(policy: Json, stops: bool) -> None:
    assert bool(_rollout.stops(report("wave", policy=policy))) is stops


def test_what_ends_the_run_with_an_error() -> None:
    assert set(_rollout.verdicts(report())) == {"failed", "lost", "in use", "blocked", "away"}
    assert _rollout.obstacles(report()) == [
        "in use: 0000:01:00.0 is in use.",
        "blocked: It needs a reboot (so), and kernel_reboot is false.",
        "away: No route to host.",
    ]


def test_the_table_has_the_worst_first_and_can_be_cut() -> None:
    lines = _rollout.to_table(report(), 3)
    assert [line.split()[0] for line in lines[1:4]] == ["lost", "failed", "in"]
    assert lines[4] == "... and 7 more"
    assert lines[-1] == "10 hosts: 1 converged, 1 done, 3 not started, 1 unreachable, 2 impossible, 1 failed, 1 lost"


def test_junit_counts_and_carries_what_differs() -> None:
    suite = ElementTree.fromstring(_rollout.to_junit(report()).encode()).find("testsuite")
    assert suite is not None
    counts = [suite.get(name) for name in ("tests", "failures", "errors", "skipped")]
    assert counts == ["10", "3", "2", "3"]
    error = suite.find("testcase[@name='failed']/error")
    assert error is not None
    assert (error.text or "").splitlines()[-1] == "file /etc/x: a => b"


def test_what_hosts_say_is_text_on_the_page() -> None:
    lead = to_lead(report())
    assert "no &lt;guest&gt;" in lead
    assert "<guest>" not in lead
    assert "file /etc/x: a =&gt; b" in lead
    assert lead.count("<tr") == 11
