# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Access lists as the kernel keeps them."""

from __future__ import annotations

import struct

from ansible_collections.iommufd.host.plugins.module_utils import _posix_acl as acl


def attribute(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


# getfattr of a file after chmod 600 and setfacl -m u:1000:rw,g:50:r
RECORDED = bytes.fromhex(
    "0200000001000600ffffffff02000600e803000004000000ffffffff080004003200000010000600ffffffff20000000ffffffff"
)


def test_a_recorded_attribute() -> None:
    entries = acl.parse(RECORDED)
    assert entries == [
        (1, 6, 0xFFFFFFFF),
        (2, 6, 1000),
        (4, 0, 0xFFFFFFFF),
        (8, 4, 50),
        (16, 6, 0xFFFFFFFF),
        (32, 0, 0xFFFFFFFF),
    ]
    assert acl.named(entries) == {(acl.USER, 1000)}
    assert acl.real_mode(0o660, entries) == 0o600, "stat shows the mask where the group's rights were"


def test_the_mask_counts() -> None:
    entries = acl.parse(attribute((acl.USER, 6, 1000), (acl.GROUP_OBJ, 6, 0), (acl.MASK, 4, 0)))
    assert acl.named(entries) == frozenset()


def test_what_is_no_access_list() -> None:
    for value in (b"", b"\x02", b"\x03\0\0\0", attribute((1, 6, 0))[:-1]):
        assert acl.parse(value) == []
    assert acl.real_mode(0o640, []) == 0o640
