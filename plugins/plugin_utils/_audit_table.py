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
        limit: the number of hosts that are listed one by one. Of a larger fleet, those with the same verdict for the
            same reason share a line, and those that are ready have none.
        width: columns; what is longer is cut.
    """
    hosts: t.Mapping[str, t.Mapping[str, t.Any]] = report["hosts"]
    worst_first = sorted(hosts, key=lambda name: STATUSES.index(hosts[name]["status"]))
    if len(hosts) <= limit:
        head = ("HOST", "VERDICT", "OK", "WARN", "FAIL", "FIRST TO MEND")
        lines = _columns([head, *(_row(name, hosts[name]) for name in worst_first)], "<<>>><", width)
    else:
        lines = _summary(hosts, worst_first, limit, width)
    lines.append(summary_line(report))
    ranked = most_frequent(report)[:_RANKED]
    if ranked and len(hosts) > 1:
        lines.append(_cut(f"most frequent: {', '.join(f'{name} on {count}' for name, count in ranked)}", width))
    return lines


def _summary(hosts: t.Mapping[str, t.Mapping[str, t.Any]], order: t.Sequence[str], limit: int, width: int) -> list[str]:
    alike: dict[tuple[str, str], list[str]] = {}
    for name in order:
        host = hosts[name]
        if host["status"] != READY:
            # A reason why a host was not reached names the host; that makes it no other reason.
            alike.setdefault((host["status"], _words(host).replace(name, "HOST")), []).append(name)
    rows = [("HOSTS", "VERDICT", "FIRST TO MEND", "WHICH")]
    for (status, words), names in list(alike.items())[:limit]:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        which = ", ".join(one_line(name) for name in names[:_NAMED]) + more
        rows.append((str(len(names)), WORDS[status], words, which))
    lines = _columns(rows, "><<<", width) if alike else []
    if len(alike) > limit:
        lines.append(f"and {len(alike) - limit} more lines, see the report")
    return lines


def _columns(rows: t.Sequence[t.Sequence[str]], sides: str, width: int) -> list[str]:
    """Rows in columns of equal width, each no wider than a good third of the whole.

    Args:
        rows: the cells of each line.
        sides: "<" or ">" for each column.
        width: of a line; what is longer is cut.
    """
    widths = [min(max(len(row[column]) for row in rows), width * 2 // 5) for column in range(len(sides))]
    lines = []
    for row in rows:
        # The last column has what room there is.
        cells = [_cut(cell, wide) for cell, wide in zip(row[:-1], widths)] + [row[-1]]
        lines.append("  ".join(f"{cell:{side}{wide}}" for cell, side, wide in zip(cells, sides, widths)).rstrip())
    return [_cut(line, width) for line in lines]


def summary_line(report: Report) -> str:
    """ "5 hosts: 2 ready, 1 not ready, 1 failed, 1 unreachable"."""
    counts = report["summary"]
    parts = [f"{counts[status]} {WORDS[status]}" for status in reversed(STATUSES) if counts[status]]
    return f"{counts['hosts']} host{'' if counts['hosts'] == 1 else 's'}: {', '.join(parts) or 'none'}"


def _row(name: str, host: t.Mapping[str, t.Any]) -> tuple[str, ...]:
    statuses = [check["status"] for check in host["checks"]]
    counts = [str(statuses.count(one)) for one in ("ok", "warn", "fail")] if host["survey"] is not None else ["-"] * 3
    return (one_line(name), WORDS[host["status"]], *counts, _words(host))


def _words(host: t.Mapping[str, t.Any]) -> str:
    """The first checks that fail; where none does, why the host is not ready all the same."""
    failing = failing_ids(host["checks"])
    if not failing:
        return one_line(host["reason"] or "")
    more = len(failing) - _NAMED
    return ", ".join(failing[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
