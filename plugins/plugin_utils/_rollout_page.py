# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The part of the page that a rollout adds before the fleet. What hosts say is escaped, as everywhere on the page."""

from __future__ import annotations

import html
import typing as t

from ansible_collections.iommufd.host.plugins.plugin_utils._audit_text import one_line
from ansible_collections.iommufd.host.plugins.plugin_utils._rollout import BAD, GOOD, STATUSES, summary_line

Json = dict[str, t.Any]


def to_lead(report: Json) -> str:
    """The section: the state of the run, and a row for each host with its steps and what differs."""
    order = sorted(report["hosts"], key=lambda name: STATUSES.index(report["hosts"][name]["status"]))
    body = "".join(_row(name, report["hosts"][name]) for name in order)
    state = {
        "planned": "Planned, nothing was started.",
        "wave": f"Wave {report['wave']} is under way; if this stays so, the run did not come to its end.",
        "ended": f"Ended after wave {report['wave']}." if report["wave"] else "Ended; there was nothing to do.",
    }[report["state"]]
    return (
        '<section class="rollout" aria-label="Rollout">\n'
        f"<h2>Rollout</h2><p>{_escape(state)} {_escape(summary_line(report))}. Began {_escape(report['began'])}.</p>\n"
        '<div class="scroll" tabindex="0" role="region" aria-label="Hosts of the rollout"><table class="rollout">'
        "<thead><tr><th>Host</th><th>Wave</th><th>Status</th><th>Seconds</th><th>Before</th><th>After</th>"
        f"<th>What happened</th></tr></thead><tbody>{body}</tbody></table></div></section>\n"
    )


def _escape(value: object) -> str:
    return html.escape(one_line(value))


def _row(name: str, row: Json) -> str:
    kind = "bad" if row["status"] in BAD else "good" if row["status"] in GOOD else "open"
    seen = "".join(f"<td>{_verdict(row[when])}</td>" for when in ("before", "after"))
    wave, seconds = ("" if row[key] is None else row[key] for key in ("wave", "seconds"))
    status = _escape(row["status"].replace("_", " "))
    details = ""
    if row["plan"]:
        details += _details("Plan", "ol", [f"{role}: {step}" for role, part in row["plan"].items() for step in part])
    differences = (row["put_back"] or {}).get("differences") or []
    if differences:
        details += _details(f"What differs from before ({len(differences)})", "ul", differences)
    return (
        f'<tr class="{kind}"><th scope="row">{_escape(name)}</th><td>{wave}</td>'
        f'<td><span class="outcome">{status}</span></td><td>{seconds}</td>{seen}'
        f"<td>{_escape(row['words'])}{details}</td></tr>\n"
    )


def _details(title: str, kind: str, lines: t.Sequence[object]) -> str:
    items = "".join(f"<li>{_escape(one)}</li>" for one in lines)
    return f"<details><summary>{_escape(title)}</summary><{kind}>{items}</{kind}></details>"


def _verdict(seen: Json | None) -> str:
    if seen is None:
        return ""
    words = _escape(str(seen["status"]).replace("_", " "))
    failing = ", ".join(seen["failing"][:3])
    return f"{words}<br><small>{_escape(failing)}</small>" if failing else words
