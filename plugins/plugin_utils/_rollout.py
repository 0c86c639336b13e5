# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The report of a rollout: what became of each host, put together from what the play has noted of it.

A report is a plain dict, written as it is to report.json::

    format              1; rises when something here is renamed or taken away
    generated, began    times, "2026-11-22T11:20:00Z"
    collection_version  "0.2.0"; null where it is not known
    state               planned, wave or ended: when in the run it was written. A report that still says planned or wave
                        was left behind by a run that did not come to its end
    policy              what the run was told: require, on_failure, max_failures, window, timezone
    wave                number of the last wave that was begun, 0 before the first
    summary             how many hosts there are: hosts, and each status
    hosts               by name, in the order of the inventory:
        status          one of STATUSES
        words           what that means for this host, in a sentence
        wave, seconds   null for a host that was not begun, or not ended
        plan            steps by role, as they were planned before anything was touched
        task, cause     where and why it failed; null
        put_back        complete, differences, unknown, words; null where nothing was to be put back
        verified        whether a guest was verified on it in this run
        before, after   verdict and failing checks of the survey before and after; null where there was none
"""

from __future__ import annotations

import time
import typing as t
from xml.etree import ElementTree

from ansible_collections.iommufd.host.plugins.plugin_utils import _audit_report
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_text import mapping, one_line, printable

FORMAT = 1

# The worst first.
LOST, FAILED, IMPOSSIBLE, UNREACHABLE, WORKING = "lost", "failed", "impossible", "unreachable", "at_work"
WAITING, PENDING, PLANNED, DONE, CONVERGED = "waiting", "not_started", "planned", "done", "converged"
STATUSES = (LOST, FAILED, IMPOSSIBLE, UNREACHABLE, WORKING, WAITING, PENDING, PLANNED, DONE, CONVERGED)

# What ends a run with an error.
BAD = (LOST, FAILED, IMPOSSIBLE, UNREACHABLE)
GOOD = (DONE, CONVERGED)

Json = dict[str, t.Any]


def build_rollout(
    hosts: t.Mapping[str, t.Mapping[str, t.Any]],
    state: str,
    policy: t.Mapping[str, t.Any],
    began: float,
    now: float,
    version: str | None,
    batch: t.Collection[str] = (),
) -> Json:
    """Put a report together.

    Args:
        hosts: the variables of each host, of which those of the play are read.
        state: when in the run: planned, wave, ended.
        policy: what the run was told.
        began: when it began, in seconds since 1970.
        now: the time.
        version: the collection's version.
        batch: with the state wave, the hosts that are begun now.
    """
    waves = [int(mapping(one.get("rollout_started")).get("wave") or 0) for one in hosts.values()]
    wave = max(waves, default=0) + (state == "wave")
    rows = {name: _host(one, wave if name in batch else None) for name, one in hosts.items()}
    counts = {status: sum(row["status"] == status for row in rows.values()) for status in STATUSES}
    return {
        "format": FORMAT,
        "generated": stamp(now),
        "began": stamp(began),
        "collection_version": version,
        "state": state,
        "policy": dict(policy),
        "wave": wave,
        "summary": {"hosts": len(rows), **counts},
        "hosts": rows,
    }


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def first_plan(host: t.Mapping[str, t.Any]) -> t.Mapping[str, t.Any]:
    """The plan that was made before anything was touched."""
    return mapping(host.get("rollout_first") or host.get("site_plan"))


def survey_of(host: t.Mapping[str, t.Any], when: str) -> t.Mapping[str, t.Any]:
    """The survey before or after; empty where there is none."""
    found = mapping(host.get("rollout_after")) if when == "after" else first_plan(host)
    return mapping(found.get("survey"))


def _host(host: t.Mapping[str, t.Any], joining: int | None) -> Json:
    plan = first_plan(host)
    outcome = mapping(host.get("rollout_outcome"))
    started = mapping(host.get("rollout_started"))
    ended = host.get("rollout_ended")
    wave = int(started["wave"]) if started else joining
    status, words = _status(plan, outcome, bool(started), joining, host.get("rollout_blocked"))
    put_back = mapping(outcome.get("put_back"))
    if status == FAILED and put_back:
        words += f" [{one_line(put_back.get('words') or '')}]"
    return {
        "status": status,
        "words": words,
        "wave": wave,
        "seconds": int(ended) - int(started["at"]) if started and ended else None,
        "plan": {
            role: [one_line(step) for step in mapping(part).get("plan") or []]
            for role, part in mapping(plan.get("roles")).items()
            if mapping(part).get("plan")
        },
        "task": one_line(outcome["task"]) if outcome.get("task") else None,
        "cause": printable(outcome["cause"]) if outcome.get("cause") else None,
        "put_back": dict(put_back) or None,
        "verified": bool(outcome.get("verified")),
        "before": _verdict(survey_of(host, "before")),
        "after": _verdict(survey_of(host, "after")),
    }


def _status(
    plan: t.Mapping[str, t.Any],
    outcome: t.Mapping[str, t.Any],
    started: bool,
    joining: int | None,
    blocked: object,
) -> tuple[str, str]:
    said = one_line(plan.get("msg") or "").removeprefix("Task failed: ")
    if outcome:
        status = str(outcome.get("status"))
        return status, _words(status, outcome)
    if joining is not None:
        return WORKING, "It is being worked on. If this stays so, the run ended without a word from it."
    if started:
        return (
            LOST,
            "It could not be reached any more while it was worked on, and is as that left it. The next run goes on.",
        )
    if plan.get("unreachable"):
        return UNREACHABLE, said or "It could not be reached."
    if plan.get("failed"):
        return IMPOSSIBLE, said or "It could not be planned."
    if blocked:
        return IMPOSSIBLE, one_line(blocked)
    if not plan:
        return PENDING, "The run ended before it was planned."
    if plan.get("converged") and plan.get("recorded") and not mapping(plan.get("back")).get("unfinished"):
        return CONVERGED, "There was nothing to do."
    return PENDING, "It was not started."


def _words(status: str, outcome: t.Mapping[str, t.Any]) -> str:
    cause = one_line(outcome.get("cause") or "")
    if status == DONE:
        return "Provisioned, and a guest was verified." if outcome.get("verified") else "Provisioned."
    if status == PLANNED:
        return "Planned (check mode)."
    if status == WAITING:
        return f"Not started: it is not in the window {cause}."
    task = one_line(outcome.get("task") or "")
    return f"{task}: {cause}" if task else cause


def _verdict(survey: t.Mapping[str, t.Any]) -> Json | None:
    if not survey:
        return None
    found = _audit_report.build_report({"host": survey}, "", None)["hosts"]["host"]
    return {"status": found["status"], "failing": _audit_report.failing_ids(found["checks"])}


# -- what follows from it ----------------------------------------------------------------------------------------------


def obstacles(report: Json) -> list[str]:
    """Why nothing may start, a sentence for each host."""
    found = [(name, row) for name, row in report["hosts"].items() if row["status"] in (IMPOSSIBLE, UNREACHABLE)]
    return [f"{one_line(name)}: {row['words'].rstrip('.')}." for name, row in found]


def stops(report: Json) -> str | None:
    """Why no further wave starts; None where one may."""
    policy = report["policy"]
    broken = [name for name, row in report["hosts"].items() if row["status"] in (FAILED, LOST)]
    if policy["on_failure"] == "stop" and len(broken) > int(policy["max_failures"]):
        return (
            f"{len(broken)} host{' has' if len(broken) == 1 else 's have'} failed ({', '.join(broken[:5])}"
            f"{', ...' if len(broken) > 5 else ''}), and rollout_on_failure is stop"
        )
    return None


def verdicts(report: Json) -> dict[str, str]:
    """For each host that ends the run with an error, why."""
    return {name: f"{row['status']}: {row['words']}" for name, row in report["hosts"].items() if row["status"] in BAD}


# -- for people and machines -------------------------------------------------------------------------------------------


def summary_line(report: Json) -> str:
    counts = report["summary"]
    parts = [f"{counts[status]} {status.replace('_', ' ')}" for status in reversed(STATUSES) if counts[status]]
    return f"{counts['hosts']} host{'' if counts['hosts'] == 1 else 's'}: {', '.join(parts) or 'none'}"


def to_table(report: Json, limit: int = 40) -> list[str]:
    """The report as lines for a terminal; of a large fleet those that need somebody first."""
    order = sorted(report["hosts"], key=lambda name: STATUSES.index(report["hosts"][name]["status"]))
    lines = [("HOST", "WAVE", "STATUS", "SECONDS", "BEFORE", "AFTER", "")]
    for name in order[:limit]:
        row = report["hosts"][name]
        steps = sum(map(len, row["plan"].values()))
        words = row["words"]
        if report["state"] == "planned" and row["status"] in (PENDING, PLANNED):
            words = f"{steps} steps: {', '.join(row['plan'])}" if steps else "to be verified and noted"
        shown = [str(row[key]) if row[key] is not None else "-" for key in ("wave", "seconds")]
        seen = [row[when]["status"].replace("_", " ") if row[when] else "-" for when in ("before", "after")]
        status = row["status"].replace("_", " ")
        lines.append(
            (one_line(name), shown[0], status, shown[1], *seen, words if len(words) < 160 else words[:159] + "…")
        )
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    table = ["  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[6]]).rstrip() for line in lines]
    if len(order) > limit:
        table.append(f"... and {len(order) - limit} more")
    return [*table, summary_line(report)]


def to_junit(report: Json) -> str:
    """The document: a case for each host. One that failed or was lost is an error, one whose plan is impossible or that
    cannot be reached a failure, one that was not started is skipped."""
    rows = report["hosts"]
    statuses = [row["status"] for row in rows.values()]
    counts = {
        "tests": len(rows),
        "failures": sum(one in (IMPOSSIBLE, UNREACHABLE) for one in statuses),
        "errors": sum(one in (FAILED, LOST, WORKING) for one in statuses),
        "skipped": sum(one in (WAITING, PENDING, PLANNED) for one in statuses),
    }
    numbers = {key: str(value) for key, value in counts.items()}
    document = ElementTree.Element("testsuites", attrib={"name": "iommufd rollout", **numbers})
    taken = str(sum(row["seconds"] or 0 for row in rows.values()))
    stamped = report["generated"].removesuffix("Z")
    suite = ElementTree.SubElement(
        document, "testsuite", attrib={"name": "rollout", "timestamp": stamped, "time": taken, **numbers}
    )
    for name, row in rows.items():
        case = ElementTree.SubElement(
            suite, "testcase", classname="rollout", name=printable(name), time=str(row["seconds"] or 0)
        )
        words = printable(row["words"])
        if row["status"] in (IMPOSSIBLE, UNREACHABLE):
            ElementTree.SubElement(case, "failure", message=words, type=row["status"]).text = words
        elif row["status"] in (FAILED, LOST, WORKING):
            differences = (row["put_back"] or {}).get("differences") or []
            ElementTree.SubElement(case, "error", message=words, type=row["status"]).text = "\n".join(
                [words, *map(printable, differences)]
            )
        elif row["status"] in (WAITING, PENDING, PLANNED):
            ElementTree.SubElement(case, "skipped", message=words)
    ElementTree.indent(document)
    text: str = ElementTree.tostring(document, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'
