# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""A writer of cpio archives in the format that the kernel unpacks as its first root filesystem.

The format is "newc" as the kernel documents it (Documentation/driver-api/early-userspace/buffer-format.rst): for each
entry a header of 110 characters, the name with a final NUL, the content, each padded to 4 bytes; the last entry is
named ``TRAILER!!!``. Everything belongs to root and has the time 0, so that the same input gives the same bytes.
"""

from __future__ import annotations

import posixpath
import stat

_TRAILER = "TRAILER!!!"


class Archive:
    """A cpio archive in the making, in memory.

    Parent directories are added as they are needed. Names are absolute paths of the guest.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._names: set[str] = set()

    def directory(self, name: str, mode: int = 0o755) -> None:
        """Add a directory; one that is there already stays as it is."""
        name = _relative(name)
        if not name or name in self._names:
            return
        self.directory(posixpath.dirname(name))
        self._entry(name, stat.S_IFDIR | mode, b"")

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file.

        Raises:
            ValueError: the archive has an entry of that name, or the content does not fit the format (4 GiB).
        """
        self._with_parents(name, stat.S_IFREG | mode, content)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link.

        Raises:
            ValueError: the archive has an entry of that name.
        """
        self._with_parents(name, stat.S_IFLNK | 0o777, target.encode())

    def close(self) -> bytes:
        """The finished archive, padded to 512 bytes as the kernel's own gen_init_cpio does."""
        parts = [*self._parts, _record(0, _TRAILER, 0, b"", 1)]
        length = sum(len(part) for part in parts)
        parts.append(b"\0" * (-length % 512))
        return b"".join(parts)

    def _with_parents(self, name: str, mode: int, content: bytes) -> None:
        name = _relative(name)
        if name in self._names:
            raise ValueError(f"{name} is in the archive already")
        self.directory(posixpath.dirname(name))
        self._entry(name, mode, content)

    def _entry(self, name: str, mode: int, content: bytes) -> None:
        self._names.add(name)
        self._inode += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        self._parts.append(_record(self._inode, name, mode, content, links))


def _relative(name: str) -> str:
    return posixpath.normpath("/" + name).lstrip("/")


def _record(inode: int, name: str, mode: int, content: bytes, links: int) -> bytes:
    if len(content) >= 1 << 32:
        raise ValueError(f"{name}: {len(content)} bytes do not fit a cpio archive")
    encoded = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + encoded) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
