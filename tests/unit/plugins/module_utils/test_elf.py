# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import io
import struct

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._elf import interpreter


def elf(loader: bytes, wide: bool = True, order: str = "<") -> bytes:
    """The headers of an ELF file: one segment, and one that names the loader if there is one."""
    header = bytearray(b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(57))
    size = 56 if wide else 32
    struct.pack_into(order + ("Q" if wide else "I"), header, 0x20 if wide else 0x1C, 64)
    struct.pack_into(order + "HH", header, 0x36 if wide else 0x2A, size, 2 if loader else 1)
    at, length = 64 + 2 * size, len(loader) + 1
    load = struct.pack(order + "I", 1).ljust(size, b"\0")
    if wide:
        named = struct.pack(order + "IIQQQQQQ", 3, 4, at, 0, 0, length, 0, 1)
    else:
        named = struct.pack(order + "IIIIIIII", 3, at, 0, 0, length, 0, 4, 1)
    return bytes(header) + load + (named + loader + b"\0" if loader else b"")


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_loader_that_is_asked_for(wide: bool, order: str) -> None:
    assert interpreter(io.BytesIO(elf(b"/lib/ld.so.1", wide, order))) == "/lib/ld.so.1"
    assert interpreter(io.BytesIO(elf(b"", wide, order))) is None


@pytest.mark.parametrize(
    "content", [b"", b"#!/bin/sh\n", b"#!/bin/sh\n".ljust(100), elf(b"/lib")[:100], elf(b"/lib")[:140]]
)
def test_no_loader(content: bytes) -> None:
    assert interpreter(io.BytesIO(content)) is None
