# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The report of an audit as one HTML file that needs nothing else: no network, no server, no framework.

The matrix of hosts and checks is written as HTML here, so it is there at once, also without JavaScript. What a host's
own section needs is embedded as compressed JSON, and drawn by ``page/page.js`` when somebody opens it: that is what
keeps a fleet of hundreds of hosts usable. Strings repeat from host to host, so they are kept once, in one list, and
rows of numbers point into it.

Everything that came from a host is hostile until shown otherwise. In the HTML it is escaped; the JSON is embedded in
base64; the script makes text nodes only; and the page's policy (Content-Security-Policy) names the hashes of its own
style and script, so nothing else would run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import pathlib
import typing as t
import urllib.parse
import zlib

from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import (
    FAILED,
    NOT_READY,
    READY,
    STATUSES,
    UNREACHABLE,
    Report,
    most_frequent,
)
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_text import mapping, one_line, printable, rows
from ansible_collections.iommufd.host.plugins.plugin_utils._pci_names import class_name, vendor_name

_ASSETS = pathlib.Path(__file__).with_name("page")

# Shape and words beside the colour, for those who do not see the colour.
_VERDICTS = {
    READY: ("✓", "Ready"),
    NOT_READY: ("✕", "Not ready"),
    FAILED: ("!", "Failed"),
    UNREACHABLE: ("?", "Unreachable"),
}
_MARKS = {
    "ok": "in order",
    "warn": "works, with a flaw",
    "fail": "fails: no guest",
    "skip": "not known, or does not apply",
}

# What a row says of a function; page.js is told the names.
_FUNCTION = (
    "address",
    "identity",
    "vendor",
    "class",
    "driver",
    "group",
    "node",
    "state",
    "platform",
    "cdev",
    "vfs",
    "physfn",
    "resets",
    "uses",
)

# States of a function.
_VFIO, _USED, _FREE, _BRIDGE, _UNKNOWN = "vfio", "used", "free", "bridge", "unknown"
_COUNTED = (_VFIO, _FREE, _USED)

# Base classes of the functions that make up the machine itself: memory controllers, bridges, system peripherals, signal
# processing (a processor's performance counters). They are drawn, but folded.
_PLATFORM = ("05", "06", "08", "11")
_SMBUS = "0c05"


def to_page(
    report: Report,
    title: str = "IOMMUFD audit",
    lead: str = "",
    origin: str = "Made by the audit playbook; nothing was changed on the hosts.",
) -> t.Iterator[str]:
    """The page in pieces.

    Args:
        report: see :mod:`_audit_report`.
        title: its heading.
        lead: HTML of a section of its own before the fleet.
        origin: what made the report, a sentence.
    """
    style, script = (_ASSETS / "page.css").read_text("utf-8"), (_ASSETS / "page.js").read_text("utf-8")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    order = sorted(report["hosts"], key=lambda name: STATUSES.index(report["hosts"][name]["status"]))
    hosts = [(name, report["hosts"][name]) for name in order]
    columns = _columns(host for _name, host in hosts)
    strings = _Strings()
    data = [_host_data(host, strings) for _name, host in hosts]
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{_escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
    )
    totals = {state: sum(one["states"][state] for one in data) for state in _COUNTED}
    yield _top(report, title, totals, lead)
    yield _matrix(hosts, columns, [one["states"] for one in data])
    yield '<section id="host" hidden aria-live="polite"></section>\n</main>\n'
    yield _bottom(report, origin)
    shared = {"strings": strings.all, "function": _FUNCTION, "marks": list(_MARKS)}
    yield f'<script type="application/octet-stream" id="data">{_pack([shared, *data])}</script>\n'
    yield f"<script>{script}</script>\n</body>\n</html>\n"


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _escape(value: object) -> str:
    return html.escape(one_line(value))


def _pack(values: t.Iterable[object]) -> str:
    """JSON, one value a line, compressed, in an alphabet that means nothing to an HTML parser."""
    packer, packed = zlib.compressobj(), []
    for value in values:
        packed.append(packer.compress(json.dumps(value, separators=(",", ":")).encode() + b"\n"))
    return base64.b64encode(b"".join([*packed, packer.flush()])).decode()


# -- the data behind the hosts' sections -------------------------------------------------------------------------------


class _Strings:
    """Every string once; elsewhere its place in the list stands for it, and -1 for null."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._places: dict[str, int] = {}
        self._seen: dict[str, int] = {}  # as it came, so that a string is cleaned once only

    def place(self, value: object) -> int:
        if value is None:
            return -1
        given = str(value)
        if given not in self._seen:
            text = one_line(given)
            if text not in self._places:
                self._places[text] = len(self.all)
                self.all.append(text)
            self._seen[given] = self._places[text]
        return self._seen[given]


def _host_data(host: t.Mapping[str, t.Any], strings: _Strings) -> dict[str, t.Any]:
    survey = mapping(host["survey"])
    functions, states = [], dict.fromkeys(_COUNTED, 0)
    for device in rows(survey.get("devices")):
        state, platform = _state(device), _is_platform(device)
        if state in states and not platform:
            states[state] += 1
        functions.append(_function(device, state, platform, strings))
    place = strings.place
    return {
        "reason": place(host["reason"]),
        "states": states,
        "functions": functions,
        "checks": [[place(check[key]) for key in ("id", "status", "detail", "remedy")] for check in host["checks"]],
        "groups": [_group(group, strings) for group in rows(survey.get("groups"))],
        "facts": {one_line(key): _clean(value) for key, value in survey.items() if key not in ("devices", "groups")},
    }


def _clean(value: object) -> t.Any:
    """A copy that is plain and printable: a script shows text as it is, control characters included."""
    if isinstance(value, t.Mapping):
        return {one_line(key): _clean(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no word for it
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float)) else printable(value)


def _group(group: t.Mapping[str, t.Any], strings: _Strings) -> list[t.Any]:
    """Number, type, whether a guest cannot have its members although some are on vfio, and members that are no PCI
    functions."""
    others = group.get("others")
    return [
        strings.place(group.get("number")),
        strings.place(group.get("type")),
        int(bool(group.get("vfio")) and bool(group.get("blocking"))),
        [strings.place(one) for one in others] if isinstance(others, (list, tuple)) else [],
    ]


def _hex(value: object) -> str:
    text = str(value or "").lower()
    return text[2:] if text.startswith("0x") else text


def _state(device: t.Mapping[str, t.Any]) -> str:
    if "vfio" in str(device.get("driver") or ""):
        return _VFIO
    if device.get("in_use"):
        return _USED
    if _hex(device.get("class_id")).startswith("06"):
        return _BRIDGE
    return _UNKNOWN if device.get("in_use") is None else _FREE


def _is_platform(device: t.Mapping[str, t.Any]) -> bool:
    return _hex(device.get("class_id")).startswith((*_PLATFORM, _SMBUS)) and _state(device) not in (_VFIO, _USED)


def _function(device: t.Mapping[str, t.Any], state: str, platform: bool, strings: _Strings) -> list[t.Any]:
    place, sriov, resets = strings.place, mapping(device.get("sriov")), device.get("reset_methods")
    vendor, model = _hex(device.get("vendor_id")), _hex(device.get("device_id"))
    row = {
        "address": place(device.get("address")),
        "identity": place(f"{vendor or '????'}:{model or '????'}" if vendor or model else None),
        "vendor": place(vendor_name(vendor)),
        "class": place(class_name(_hex(device.get("class_id")))),
        "driver": place(device.get("driver")),
        "group": place(device.get("iommu_group")),
        "node": place(device.get("numa_node")),
        "state": place(state),
        "platform": int(platform),
        "cdev": place(device.get("vfio_device")),
        # A physical function: how many VFs there are, and could be.
        "vfs": place(f"{sriov.get('num_vfs') or 0} of {sriov['total_vfs']}" if sriov.get("total_vfs") else None),
        "physfn": place(sriov.get("physfn")),
        "resets": place(" ".join(map(str, resets)) or None if isinstance(resets, (list, tuple)) else None),
        "uses": [
            place(f"{use.get('kind')}: {use.get('detail') or use.get('name')}") for use in rows(device.get("in_use"))
        ],
    }
    return [row[name] for name in _FUNCTION]


# -- the page itself ---------------------------------------------------------------------------------------------------


def _columns(hosts: t.Iterable[t.Mapping[str, t.Any]]) -> dict[str, list[str]]:
    """The checks of all hosts by the first part of their ids, each in the order in which it first came up."""
    columns: dict[str, list[str]] = {}
    for host in hosts:
        for check in host["checks"]:
            name = one_line(check["id"])
            prefix = columns.setdefault(name.partition(".")[0], [])
            if name not in prefix:
                prefix.append(name)
    return columns


def _top(report: Report, title: str, functions: t.Mapping[str, int], lead: str) -> str:
    counts = report["summary"]
    version = report["collection_version"]
    tiles = [
        f'<button type="button" class="tile" data-status="" aria-pressed="true"><b>{counts["hosts"]}</b> Hosts</button>'
    ]
    for status in reversed(STATUSES):
        mark, word = _VERDICTS[status]
        tiles.append(
            f'<button type="button" class="tile {status}" data-status="{status}" aria-pressed="false">'
            f'<b>{counts[status]}</b> <span aria-hidden="true">{mark}</span> {word}</button>'
        )
    ranked = most_frequent(report)[:6]
    frequent = "".join(
        f'<li><button type="button" data-filter="fail:{_escape(name)}"><code>{_escape(name)}</code>'
        f'<svg aria-hidden="true"><rect width="{100 * count / counts["hosts"]:.2f}%" height="100%"/></svg>'
        f"<span>{count} host{'' if count == 1 else 's'}</span></button></li>"
        for name, count in ranked
    )
    return (
        f'<header class="top"><div><h1>{_escape(title)}</h1><p>Surveyed {_time(report["generated"])}'
        f"{f' · iommufd.host {_escape(version)}' if version else ''}</p></div>"
        '<div class="tools"><a href="report.json">report.json</a><a href="junit.xml">junit.xml</a>'
        '<button type="button" id="theme" aria-label="Light or dark">◐</button></div></header>\n'
        '<main aria-busy="true">\n'
        f"{lead}"
        '<section id="fleet" aria-label="Fleet">\n<div class="overview"><div class="verdicts">'
        f'<div class="tiles" role="group" aria-label="Show hosts by verdict">{"".join(tiles)}</div>'
        '<div class="shares"><span>Hosts</span>'
        f"{_bar('bar', {status: counts[status] for status in reversed(STATUSES)}, 'Hosts by verdict')}"
        f"<span>{counts[READY]} of {counts['hosts']} ready</span><span>Functions</span>"
        f"{_bar('bar', functions, _states_words(functions))}<span>{_states_words(functions)}</span></div></div>"
        + (f'<div class="frequent"><h2>Fails most often</h2><ol>{frequent}</ol></div>' if frequent else "")
        + "</div>\n"
        '<form class="filter" role="search"><label for="filter">Filter</label>'
        '<input id="filter" type="search" autocomplete="off" spellcheck="false" '
        'placeholder="host name, check, fail:kernel.iommufd, vendor:device, driver, address …">'
        '<output id="shown" for="filter"></output><ul class="legend" aria-label="Legend">'
        + "".join(f'<li><span class="mark {status}">{status}</span>{words}</li>' for status, words in _MARKS.items())
        + "</ul></form>\n"
        "<noscript><p>The hosts' sections and the filter need JavaScript. All data is in report.json.</p></noscript>\n"
    )


def _time(generated: object) -> str:
    text = _escape(generated)
    return f'<time datetime="{text}">{text.replace("T", " ").replace("Z", " UTC")}</time>'


def _matrix(
    hosts: t.Sequence[tuple[str, t.Mapping[str, t.Any]]],
    columns: t.Mapping[str, t.Sequence[str]],
    states: t.Sequence[t.Mapping[str, int]],
) -> str:
    names = [name for prefix in columns.values() for name in prefix]
    head = "".join(
        f'<th scope="colgroup" colspan="{len(members)}"{_first(True)}>{_escape(prefix)}</th>'
        for prefix, members in columns.items()
    )
    ids = "".join(
        f'<th scope="col"{_first(not position)} data-check="{_escape(name)}" title="{_escape(name)}">'
        f'<button type="button">{_escape(name.partition(".")[2] or name).replace("_", "_<wbr>")}</button></th>'
        for members in columns.values()
        for position, name in enumerate(members)
    )
    firsts = {members[0] for members in columns.values()}
    body = "".join(_row(index, name, host, names, firsts, states[index]) for index, (name, host) in enumerate(hosts))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Hosts and checks"><table id="matrix">\n'
        '<caption class="sr">Hosts and readiness checks</caption>\n'
        '<colgroup><col class="c-host"><col class="c-verdict"><col class="c-functions">'
        f"{'<col>' * len(names)}</colgroup><thead>"
        '<tr><th scope="col" rowspan="2" class="name"><button type="button">Host</button></th>'
        '<th scope="col" rowspan="2"><button type="button">Verdict</button></th>'
        '<th scope="col" rowspan="2" title="PCI functions other than those of the platform itself">Functions</th>'
        f"{head}</tr>"
        f"<tr>{ids}</tr></thead>\n<tbody>{body}</tbody></table></div>\n</section>\n"
    )


def _first(is_first: bool) -> str:
    return ' class="first"' if is_first else ""


def _row(
    index: int,
    name: str,
    host: t.Mapping[str, t.Any],
    columns: t.Sequence[str],
    firsts: t.Collection[str],
    states: t.Mapping[str, int],
) -> str:
    status = host["status"]
    mark, word = _VERDICTS[status]
    survey = mapping(host["survey"])
    system = mapping(survey.get("distribution")).get("name"), mapping(survey.get("kernel")).get("release")
    below = " · ".join(_escape(one) for one in system if one)
    checks = {one_line(check["id"]): check for check in host["checks"]}
    start = (
        f'\n<tr data-index="{index}" data-status="{status}"><th scope="row" class="name">'
        f'<a href="#host/{urllib.parse.quote(printable(name), safe="")}">{_escape(name)}</a>'
        f"{f'<small>{below}</small>' if below else ''}</th>"
        f'<td title="{_escape(host["reason"] or "")}">'
        f'<span class="verdict {status}"><span aria-hidden="true">{mark}</span> {word}</span></td>'
    )
    if host["survey"] is None:
        return f'{start}<td class="reason" colspan="{len(columns) + 1}">{_escape(host["reason"])}</td></tr>'
    cells = []
    for column in columns:
        check = checks.get(column)
        if check is None:
            cells.append(f"<td{_first(column in firsts)}></td>")
            continue
        found = one_line(check["status"])
        kind = found if found in _MARKS else "other"
        cells.append(f'<td{_first(column in firsts)}><span class="mark {kind}">{html.escape(found)}</span></td>')
    words = _states_words(states)
    return f'{start}<td title="{words}">{_meter(states)}</td>{"".join(cells)}</tr>'


def _meter(states: t.Mapping[str, int]) -> str:
    """A bar of the functions that are on vfio, free and in use, and how many there are."""
    total = sum(states.values())
    if not total:
        return '<span class="none">none</span>'
    return f"{_bar('meter', states, _states_words(states))}{total}"


def _states_words(states: t.Mapping[str, int]) -> str:
    return f"{states[_VFIO]} on vfio, {states[_FREE]} free, {states[_USED]} in use"


def _bar(kind: str, parts: t.Mapping[str, int], label: str) -> str:
    """A bar of parts, each as wide as its share and coloured by its name."""
    total, done, drawn = sum(parts.values()) or 1, 0, []
    for name, count in parts.items():
        if not count:
            continue
        drawn.append(
            f'<rect class="{name}" x="{100 * done / total:.2f}%" width="{100 * count / total:.2f}%" height="100%"/>'
        )
        done += count
    return f'<svg class="{kind}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def _bottom(report: Report, origin: str) -> str:
    version = report["collection_version"]
    collection = f"Ansible collection iommufd.host{f' {_escape(version)}' if version else ''}"
    return f"<footer><p>{_escape(origin)} {collection}.</p></footer>\n"
