# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What an ELF file says about how it is loaded (elf(5))."""

from __future__ import annotations

import struct
import typing as t

_PT_INTERP = 3


def interpreter(file: t.BinaryIO) -> str | None:
    """The dynamic loader that an ELF file asks for; None for a static one, one cut short, and what is no ELF."""
    head = file.read(64)
    if len(head) < 64 or head[:4] != b"\x7fELF":
        return None
    wide, order = head[4] == 2, "<" if head[5] == 1 else ">"
    table = struct.unpack_from(order + ("Q" if wide else "I"), head, 0x20 if wide else 0x1C)[0]
    size, count = struct.unpack_from(order + "HH", head, 0x36 if wide else 0x2A)
    for number in range(count):
        file.seek(table + number * size)
        entry = file.read(size)
        if len(entry) < (56 if wide else 32):
            return None
        if struct.unpack_from(order + "I", entry)[0] == _PT_INTERP:
            if wide:
                start, _virtual, _physical, length = struct.unpack_from(order + "QQQQ", entry, 8)
            else:
                start, _virtual, _physical, length = struct.unpack_from(order + "IIII", entry, 4)
            file.seek(start)
            return file.read(min(length, 4096)).split(b"\0")[0].decode("utf-8", "replace")
    return None
