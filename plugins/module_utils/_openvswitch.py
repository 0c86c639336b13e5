# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The bridges of Open vSwitch. The kernel shows only that an interface is in its datapath, not in which bridge."""

from __future__ import annotations

import json
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host

_DATABASES = ("/etc/openvswitch/conf.db", "/var/lib/openvswitch/conf.db")
_LIMIT = 16 << 20

_Row = dict[str, t.Any]


def bridges(host: Host) -> dict[str, list[str]]:
    """The interfaces in each bridge, by the configuration database; empty without Open vSwitch."""
    for path in _DATABASES:
        content = host.read_bytes(path, _LIMIT)
        if content is not None:
            return parse_database(content)
    return {}


def parse_database(content: bytes) -> dict[str, list[str]]:
    """The bridges in a stand-alone database file (ovsdb(5)): a log of transactions, each a header line with the length
    of the JSON after it. A damaged end is left out."""
    tables: dict[str, dict[str, _Row]] = {"Bridge": {}, "Port": {}, "Interface": {}}
    at = 0
    while at < len(content):
        end = content.find(b"\n", at)
        header = content[at:end].split() if end >= 0 else []
        if header[:2] != [b"OVSDB", b"JSON"] or len(header) < 3 or not header[2].isdigit() or len(header[2]) > 9:
            break
        at = end + 1 + int(header[2])
        try:
            record = json.loads(content[end + 1 : at])
        except (ValueError, RecursionError):
            break
        if isinstance(record, dict):
            for name, table in tables.items():
                _apply(table, record.get(name), bool(record.get("_is_diff")))
    named: dict[str, list[str]] = {}
    for bridge in tables["Bridge"].values():
        interfaces = named.setdefault(str(bridge.get("name")), [])
        for port in _members(bridge.get("ports")):
            for interface in _members(tables["Port"].get(port, {}).get("interfaces")):
                label = tables["Interface"].get(interface, {}).get("name")
                if isinstance(label, str):
                    interfaces.append(label)
    return named


def _apply(table: dict[str, _Row], changes: object, difference: bool) -> None:
    """One transaction: a row is new, changed in some columns, or (null) gone. In a difference a set has only the
    members that came or went."""
    for identity, change in changes.items() if isinstance(changes, dict) else ():
        if not isinstance(change, dict):
            table.pop(identity, None)
            continue
        row = table.setdefault(identity, {})
        for column, value in change.items():
            if difference and column in ("ports", "interfaces") and column in row:
                value = ["set", [["uuid", one] for one in sorted(_members(row[column]) ^ _members(value))]]
            row[column] = value


def _members(value: object) -> set[str]:
    """The identities in a column: one as ["uuid", ID], several as ["set", [["uuid", ID], …]]."""
    if not isinstance(value, list) or len(value) != 2:
        return set()
    several = value[1] if value[0] == "set" and isinstance(value[1], list) else [value]
    return {
        one[1]
        for one in several
        if isinstance(one, list) and len(one) == 2 and one[0] == "uuid" and isinstance(one[1], str)
    }
