# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The report of an audit: what a play registered for each host, judged and put together.

A report is a plain dict, which :mod:`_audit_page`, :mod:`_audit_junit` and :mod:`_audit_table` render, and which is
written as it is to report.json::

    format              1; rises when something here is renamed or taken away
    generated           when the hosts were surveyed, "2026-11-22T11:20:00Z"
    collection_version  "0.2.0"; null where it is not known
    summary             how many hosts there are: hosts, ready, not_ready, failed, unreachable
    hosts               by name, in the order of the inventory:
        status          ready, not_ready, failed (the survey failed) or unreachable
        reason          why it is not ready, in one sentence; null for a host that is
        checks          list of {id, status, detail, remedy}, the first two always strings; empty for a host that
                        could not be surveyed
        survey          what iommufd_info returned beside the checks, a mapping; null for a host that could not be
                        surveyed

Nothing in ``checks`` and ``survey`` is taken for granted: a captured tree may lack any part, and a later survey may
have more parts than this file knows.
"""

from __future__ import annotations

import json
import typing as t

from ansible_collections.iommufd.host.plugins.plugin_utils._audit_text import mapping, one_line, rows
from ansible_collections.iommufd.host.plugins.plugin_utils._packed import PackedSurvey
from ansible_collections.iommufd.host.plugins.plugin_utils._readiness import untold

FORMAT = 1

READY = "ready"
NOT_READY = "not_ready"
FAILED = "failed"
UNREACHABLE = "unreachable"

# The worst first: the order in which people want to see them.
STATUSES = (UNREACHABLE, FAILED, NOT_READY, READY)

# Not of the survey, but of the module call that it came with.
_OF_THE_CALL = ("changed", "failed", "invocation", "warnings", "deprecations", "ansible_facts", "checks")

Report = dict[str, t.Any]


def build_report(results: t.Mapping[str, object], generated: str, version: str | None) -> Report:
    """Put a report together.

    Args:
        results: what was registered for each host: the result of iommufd_info, or of its failure, or of the failure to
            reach the host; None for a host that the play never came to.
        generated: the time, "2026-11-22T11:20:00Z".
        version: the collection's version.
    """
    hosts = {name: _host(result) for name, result in results.items()}
    counts = dict.fromkeys(reversed(STATUSES), 0)
    for host in hosts.values():
        counts[host["status"]] += 1
    return {
        "format": FORMAT,
        "generated": generated,
        "collection_version": version,
        "summary": {"hosts": len(hosts), **counts},
        "hosts": hosts,
    }


def _host(result: object) -> dict[str, t.Any]:
    known = mapping(result)
    if known.get("unreachable"):
        return _lost(UNREACHABLE, known, "It could not be reached.")
    if known.get("failed") or not known:
        return _lost(FAILED, known, "It was not surveyed: the play ended before.")
    if "checks" not in known:
        return _lost(FAILED, known, "The survey returned no checks.")
    checks = [_check(check) for check in rows(known["checks"])]
    status, reason = judge(checks)
    survey: t.Mapping[str, t.Any] = {key: value for key, value in known.items() if key not in _OF_THE_CALL}
    if "packed" in known:
        try:
            survey = PackedSurvey(known["packed"])
        except ValueError:
            return _lost(FAILED, {}, "What the survey returned cannot be unpacked.")
    return {"status": status, "reason": reason, "checks": checks, "survey": survey}


def _check(check: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    named = {key: str(check.get(key) or "unknown") for key in ("id", "status")}
    said = {key: None if check.get(key) is None else str(check[key]) for key in ("detail", "remedy")}
    return {**check, **named, **said}


def _lost(status: str, result: t.Mapping[str, t.Any], otherwise: str) -> dict[str, t.Any]:
    said = one_line(result.get("msg") or "").removeprefix("Task failed: ")
    # A Python that does not start, or a shell that is none, says so only here.
    last = str(result.get("module_stderr") or result.get("module_stdout") or "").strip().rpartition("\n")[2]
    if last and one_line(last) not in said:
        said = f"{said} ({one_line(last)})" if said else one_line(last)
    return {"status": status, "reason": said or otherwise, "checks": [], "survey": None}


def judge(checks: t.Sequence[t.Mapping[str, t.Any]]) -> tuple[str, str | None]:
    """Whether a host is ready by its checks, and if not, why: no check fails, and none that is essential is missing."""
    failing = failing_ids(checks)
    if failing:
        return NOT_READY, f"{'This check fails' if len(failing) == 1 else 'These checks fail'}: {', '.join(failing)}."
    unknown = untold(checks)
    if unknown:
        return NOT_READY, f"Nothing that was seen is wrong, but this could not be told: {', '.join(unknown)}."
    return READY, None


def failing_ids(checks: t.Iterable[t.Mapping[str, t.Any]]) -> list[str]:
    """The ids of the checks that fail, in the order in which one would mend them."""
    return [one_line(check["id"]) for check in checks if check["status"] == "fail"]


def most_frequent(report: Report) -> list[tuple[str, int]]:
    """The checks that fail, with the number of hosts where they do, the most frequent one first."""
    counts: dict[str, int] = {}
    for host in report["hosts"].values():
        for name in dict.fromkeys(failing_ids(host["checks"])):
            counts[name] = counts.get(name, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])


def to_json(report: Report) -> t.Iterator[str]:
    """The report as JSON in pieces, one host a line: a fleet's report is large, and so it is still fit for grep."""
    head = {key: value for key, value in report.items() if key != "hosts"}
    yield "{\n"
    for key, value in head.items():
        yield f"{json.dumps(key)}: {json.dumps(value)},\n"
    yield '"hosts": {'
    for index, (name, host) in enumerate(report["hosts"].items()):
        # What is packed is a mapping, and no dict.
        yield f"{',' if index else ''}\n{json.dumps(name)}: {json.dumps(host, default=dict)}"
    yield "\n}\n}\n"
