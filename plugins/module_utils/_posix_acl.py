# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Access lists of files (POSIX ACLs), read from the attribute that the kernel keeps them in."""

from __future__ import annotations

import os
import struct
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host

ATTRIBUTE = "system.posix_acl_access"

# linux/posix_acl.h and linux/posix_acl_xattr.h
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_HEADER, _ENTRY, _VERSION = struct.Struct("<I"), struct.Struct("<HHI"), 2


class Entry(t.NamedTuple):
    """An entry: its tag, permission bits (4 read, 2 write, 1 execute), and the id of a named user or group."""

    tag: int
    bits: int
    id: int


def parse(value: bytes) -> list[Entry]:
    """The entries in the attribute's value; empty where it is not in the known form."""
    if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _ENTRY.size:
        return []
    if _HEADER.unpack_from(value)[0] != _VERSION:
        return []
    return [Entry(*_ENTRY.unpack_from(value, at)) for at in range(_HEADER.size, len(value), _ENTRY.size)]


def read(host: Host, path: str) -> bytes:
    """The attribute's value; empty where the file has no access list beyond its mode."""
    try:
        return os.getxattr(host.path(path), ATTRIBUTE)
    except (OSError, ValueError):
        return b""


def real_mode(mode: int, entries: t.Sequence[Entry]) -> int:
    """The mode with what the owning group may really do: with an access list, stat(2) shows the mask in its place."""
    own = next((entry.bits for entry in entries if entry.tag == GROUP_OBJ), None)
    return mode if own is None else (mode & ~0o070) | own << 3


def mask(entries: t.Sequence[Entry]) -> int:
    """The permission bits that named users and all groups have at most (acl(5))."""
    return next((entry.bits for entry in entries if entry.tag == MASK), 7)


def named(entries: t.Sequence[Entry]) -> frozenset[tuple[int, int]]:
    """Named users and groups that may read and write, the mask considered, as (tag, id)."""
    most = mask(entries)
    return frozenset((one.tag, one.id) for one in entries if one.tag in (USER, GROUP) and one.bits & most & 6 == 6)
