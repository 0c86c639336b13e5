# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import stat

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._cpio import Archive


def entries(data: bytes) -> list[tuple[str, int, int, bytes]]:
    """Read an archive as the kernel does: name, mode, inode, content; up to the trailer."""
    found = []
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * number : at + 14 + 8 * number], 16) for number in range(13)]
        inode, mode, size, name_size = fields[0], fields[1], fields[6], fields[11]
        at += 110
        assert data[at + name_size - 1 : at + name_size] == b"\0"
        name = data[at : at + name_size - 1].decode()
        at += name_size + (-(110 + name_size) % 4)
        content = data[at : at + size]
        assert len(content) == size
        at += size + (-size % 4)
        if name == "TRAILER!!!":
            assert data[at:] == b"\0" * (-at % 512)
            return found
        found.append((name, mode, inode, content))


def test_parents_come_first_and_once() -> None:
    archive = Archive()
    archive.file("/a/b/one", b"1")
    archive.file("/a/b/two", b"22", 0o755)
    assert [(name, stat.filemode(mode)) for name, mode, _inode, _content in entries(archive.close())] == [
        ("a", "drwxr-xr-x"),
        ("a/b", "drwxr-xr-x"),
        ("a/b/one", "-rw-r--r--"),
        ("a/b/two", "-rwxr-xr-x"),
    ]


@pytest.mark.parametrize("size", range(6))
def test_content_of_every_alignment_comes_back(size: int) -> None:
    archive = Archive()
    archive.file("/" + "n" * (size + 1), b"x" * size)
    archive.link("/link", "target" + "t" * size)
    archive.file("/last", b"end")
    contents = [content for _name, _mode, _inode, content in entries(archive.close())]
    assert contents == [b"x" * size, b"target" + b"t" * size, b"end"]


def test_every_entry_has_its_own_inode() -> None:
    # The kernel takes entries of one inode with several links as one file.
    archive = Archive()
    for number in range(5):
        archive.file(f"/f{number}", b"")
    inodes = [inode for _name, _mode, inode, _content in entries(archive.close())]
    assert len(set(inodes)) == 5


def test_a_name_cannot_be_taken_twice() -> None:
    archive = Archive()
    archive.file("/bin/sh", b"")
    with pytest.raises(ValueError, match="bin/sh"):
        archive.link("/bin//sh", "busybox")


def test_the_same_input_gives_the_same_bytes() -> None:
    def made() -> bytes:
        archive = Archive()
        archive.directory("/dev")
        archive.file("/init", b"#!/bin/sh\n", 0o755)
        return archive.close()

    assert made() == made()
