# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The devices of ZFS pools, as zpool says or as ZFS itself keeps them for the next import."""

from __future__ import annotations

import struct
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host

CACHE = "/etc/zfs/zpool.cache"

# sys/nvpair.h: the encoding of a list in a file, and the types that matter here.
_XDR = 1
_STRING = 9
_LIST = 19
_LISTS = 20

# A pool's vdevs nest three deep (root, mirror, disk; one more for a spare); damage must not nest for ever.
_DEEPEST = 16


def members(host: Host) -> list[tuple[str, str]]:
    """Pools and the paths of their devices ("tank", "/dev/sda1"); empty where ZFS is not in use.

    Args:
        host: the host.
    """
    answer = host.ask(["zpool", "list", "-v", "-H", "-P", "-L"])
    if answer is not None and answer.ok:
        return parse_list(answer.stdout)
    return parse_cache(host.read_bytes(CACHE) or b"")


def parse_list(text: str) -> list[tuple[str, str]]:
    """The answer of ``zpool list -vHPL``: a pool at the start of its line, its vdevs after a tab."""
    found = []
    pool = ""
    for line in text.splitlines():
        name = line.strip().partition("\t")[0]
        if line[:1] not in ("\t", " "):
            pool = name
        elif name.startswith("/dev/"):
            found.append((pool, name))
    return found


def parse_cache(content: bytes) -> list[tuple[str, str]]:
    """zpool.cache: an XDR-encoded name-value list with one list for each pool.

    What cannot be read (a truncated or foreign file) is left out.
    """
    if len(content) < 4 or content[0] != _XDR:
        return []
    found: list[tuple[str, str]] = []
    for pool, kind, body in _pairs(content[4:]):
        if kind == _LIST:
            found.extend((pool, path) for path in _paths(body, 0))
    return found


def _paths(body: bytes, depth: int) -> t.Iterator[str]:
    for name, kind, value in _pairs(body):
        if kind == _STRING and name == "path":
            text = _string(value, 0)
            if text is not None and text[0].startswith("/dev/"):
                yield text[0]
        elif kind == _LIST and depth < _DEEPEST:
            yield from _paths(value, depth + 1)
        elif kind == _LISTS and depth < _DEEPEST:
            # The lists of an array stand one behind the other, each with its own end; together they read like one.
            yield from _paths(value, depth + 1)


def _pairs(body: bytes) -> t.Iterator[tuple[str, int, bytes]]:
    """Name, type and encoded value of each pair of a list (or of an array of lists)."""
    at = 0
    start = True
    while at + 8 <= len(body):
        if start:  # version and flags of the list
            at += 8
            start = False
            continue
        size, _decoded = struct.unpack_from(">II", body, at)
        if size == 0:
            at += 8
            start = True
            continue
        if size < 20 or at + size > len(body):
            return
        named = _string(body[: at + size], at + 8)
        if named is None or named[1] + 8 > at + size:
            return
        name, after = named
        kind, _count = struct.unpack_from(">II", body, after)
        yield name, kind, body[after + 8 : at + size]
        at += size


def _string(body: bytes, at: int) -> tuple[str, int] | None:
    """An XDR string (length, bytes, padding to four) and where the next item starts."""
    if at + 4 > len(body):
        return None
    (length,) = struct.unpack_from(">I", body, at)
    end = at + 4 + length
    if end > len(body):
        return None
    return body[at + 4 : end].decode("utf-8", "replace"), at + 4 + (length + 3) // 4 * 4
