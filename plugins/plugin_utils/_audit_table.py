# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The report of an audit as a short table for a terminal."""

from __future__ import annotations

import typing as t

from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import (
    FAILED,
    NOT_READY,
    READY,
    STATUSES,
    UNREACHABLE,
    Report,
    failing_ids,
    most_frequent,
)
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_text import one_line

WORDS = {READY: "ready", NOT_READY: "not ready", FAILED: "failed", UNREACHABLE: "unreachable"}

# How many checks a line names, and how many checks the summary ranks.
_NAMED = 3
_RANKED = 5


def to_table(report: Report, limit: int = 40, width: int = 120) -> list[str]:
    """Lines: the hosts with their verdict and the first checks that fail, then the counts.

    Args:
        report: see :mod:`_audit_report`.
        limit: the number of hosts that are listed; of a larger fleet those are that are not ready, the worst first.
        width: columns; what is longer is cut.
    """
    hosts: t.Mapping[str, t.Mapping[str, t.Any]] = report["hosts"]
    shown = sorted(hosts, key=lambda name: STATUSES.index(hosts[name]["status"]))
    if len(shown) > limit:
        shown = [name for name in shown if hosts[name]["status"] != READY][:limit]
    cells = [("HOST", "VERDICT", "OK", "WARN", "FAIL", "FIRST TO MEND")] if shown else []
    cells += [_row(name, hosts[name]) for name in shown]
    widths = [max(len(row[column]) for row in cells) for column in range(5)] if cells else []
    widths[:1] = [min(one, 40) for one in widths[:1]]
    lines = []
    for row in cells:
        name = _cut(row[0], widths[0]).ljust(widths[0])
        counts = "  ".join(cell.rjust(one) for cell, one in zip(row[2:5], widths[2:]))
        lines.append(_cut(f"{name}  {row[1].ljust(widths[1])}  {counts}  {row[5]}".rstrip(), width))
    if len(shown) < len(hosts):
        lines.append(f"and {len(hosts) - len(shown)} more hosts, see the report")
    lines.append(summary_line(report))
    ranked = most_frequent(report)[:_RANKED]
    if ranked and len(hosts) > 1:
        lines.append(_cut(f"most frequent: {', '.join(f'{name} on {count}' for name, count in ranked)}", width))
    return lines


def summary_line(report: Report) -> str:
    """ "5 hosts: 2 ready, 1 not ready, 1 failed, 1 unreachable"."""
    counts = report["summary"]
    parts = [f"{counts[status]} {WORDS[status]}" for status in reversed(STATUSES) if counts[status]]
    return f"{counts['hosts']} host{'' if counts['hosts'] == 1 else 's'}: {', '.join(parts) or 'none'}"


def _row(name: str, host: t.Mapping[str, t.Any]) -> tuple[str, ...]:
    statuses = [check.get("status") for check in host["checks"]]
    counts = [str(statuses.count(one)) for one in ("ok", "warn", "fail")] if host["survey"] is not None else ["-"] * 3
    failing = failing_ids(host["checks"])
    if failing:
        more = len(failing) - _NAMED
        words = ", ".join(failing[:_NAMED]) + (f" and {more} more" if more > 0 else "")
    else:
        words = one_line(host["reason"] or "")
    return (one_line(name), WORDS[host["status"]], *counts, words)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
