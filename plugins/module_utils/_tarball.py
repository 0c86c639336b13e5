# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""A few files out of a big sorted tar archive compressed with xz, without unpacking the rest.

Debian's kernel source is 1.5 GB of sorted tar in some sixty independent xz blocks. The archive's index says where
each block begins, and decompression can start at any of them, so a bisection over the blocks finds a directory after
looking at a few kilobytes in half a dozen places. That takes a second where unpacking in order takes ten, and an
emulated or old machine ten times as long.
"""

from __future__ import annotations

import lzma
import os
import struct
import tarfile
import typing as t

_HEADER_MAGIC = b"\xfd7zXZ\x00"
_FOOTER_MAGIC = b"YZ"
_SECTOR = 512
_CHUNK = 1 << 16


class NotSeekable(Exception):
    """The archive is not one that can be read this way (one block only, not sorted, not xz); unpack it in order."""


class SortedTarball:
    """A sorted tar archive in xz blocks.

    Args:
        path: the archive.

    Raises:
        OSError: it cannot be read.
        NotSeekable: it is not a single xz stream of several blocks.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._blocks = _read_index(path)
        if len(self._blocks) < 2:
            raise NotSeekable(f"{path} has no independent blocks")
        self._first_names: dict[int, str] = {}
        self.top = self._first_name(0).partition("/")[0]

    def extract(self, wanted: t.Sequence[str]) -> dict[str, bytes]:
        """The regular files below some paths.

        Args:
            wanted: files or directories, relative to the archive's top directory.

        Returns:
            Content by path, relative to the top directory.

        Raises:
            NotSeekable: one of the paths is not where a sorted archive would have it, or a member leads out of it.
            OSError: the archive cannot be read.
        """
        found: dict[str, bytes] = {}
        for path in wanted:
            files = self._extract_one(f"{self.top}/{path}")
            if not files:
                raise NotSeekable(f"{self.path} does not have {path} where it should be")
            for name, content in files.items():
                if ".." in name.split("/"):
                    raise NotSeekable(f"{self.path}: {name} leads out of it")
                found[name[len(self.top) + 1 :]] = content
        return found

    def _extract_one(self, path: str) -> dict[str, bytes]:
        low, high = 0, len(self._blocks) - 1
        while low < high:  # the last block whose first member is not behind the path
            middle = (low + high + 1) // 2
            if self._first_name(middle) <= path:
                low = middle
            else:
                high = middle - 1
        files: dict[str, bytes] = {}
        for name, content in self._members(low, lambda name: name == path or name.startswith(path + "/")):
            if content is not None:
                files[name] = content
            # "drivers/vfio.c" sorts between "drivers/vfio" and "drivers/vfio/…": only what is behind both ends it.
            elif name > path + "/" and not name.startswith(path + "/"):
                break
        return files

    def _first_name(self, block: int) -> str:
        """Name of the first member that begins in a block; in a block without any, that of the next."""
        if block not in self._first_names:
            for name, _content in self._members(block, lambda name: False):
                self._first_names[block] = name
                break
            else:
                self._first_names[block] = "\U0010ffff"  # behind everything
        return self._first_names[block]

    def _members(self, block: int, want: t.Callable[[str], bool]) -> t.Iterator[tuple[str, bytes | None]]:
        """Members from the first that begins in a block on; content for regular files that are wanted."""
        try:
            with _Stream(self.path, self._blocks[block]) as stream:
                header = _find_header(stream)
                long_name = ""
                while header is not None:
                    if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE):
                        data = stream.read(_padded(header.size))[: header.size]
                        if header.type == tarfile.GNUTYPE_LONGNAME:
                            long_name = data.rstrip(b"\0").decode("utf-8", "replace")
                        elif header.type == tarfile.XHDTYPE:
                            long_name = _pax_path(data) or long_name
                    elif header.type == tarfile.XGLTYPE:
                        stream.read(_padded(header.size))
                    else:
                        name = (long_name or header.name).rstrip("/")
                        long_name = ""
                        content = stream.read(_padded(header.size)) if header.isreg() else b""
                        yield name, content[: header.size] if header.isreg() and want(name) else None
                    header = _header(stream.read(_SECTOR))
        except (lzma.LZMAError, EOFError):
            return  # behind the last block comes the index, which is no block


class _Stream:
    """Decompressed bytes of an xz file from a block on."""

    def __init__(self, path: str, block: _Block) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  closed by __exit__
        self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        # A block can only be decoded behind the header of its stream, which says which checksum blocks carry.
        self._buffer = bytearray(self._decompressor.decompress(self._file.read(12)))
        self._file.seek(block.offset)
        self.position = block.start

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """Exactly so many bytes.

        Raises:
            EOFError: the archive ends before.
            lzma.LZMAError: it ends or is damaged.
        """
        while len(self._buffer) < size:
            hungry = bool(self._decompressor.needs_input)
            data = self._file.read(_CHUNK) if hungry else b""
            if not data and (hungry or self._decompressor.eof):
                raise EOFError
            self._buffer += self._decompressor.decompress(data, max(_CHUNK, size - len(self._buffer)))
        content = bytes(self._buffer[:size])
        del self._buffer[:size]
        self.position += size
        return content


class _Block(t.NamedTuple):
    """Offset of a block in the file, and of its content in the decompressed stream."""

    offset: int
    start: int


def _read_index(path: str) -> list[_Block]:
    """The blocks of an xz file (https://tukaani.org/xz/xz-file-format.txt, sections 2.1.2 and 4)."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size < 32 or file.read(6) != _HEADER_MAGIC:
            raise NotSeekable(f"{path} is not an xz file")
        file.seek(size - 12)
        _check, stored_size, _flags, magic = struct.unpack("<II2s2s", file.read(12))
        index_size = (stored_size + 1) * 4
        if magic != _FOOTER_MAGIC or index_size > size - 24:
            raise NotSeekable(f"{path} does not end like an xz file")
        file.seek(size - 12 - index_size)
        index = file.read(index_size)
    blocks = []
    offset, start = 12, 0
    try:
        if index[0] != 0:
            raise NotSeekable(f"{path} has no index")
        count, position = _varint(index, 1)
        for _number in range(count):
            unpadded, position = _varint(index, position)
            length, position = _varint(index, position)
            blocks.append(_Block(offset, start))
            offset += (unpadded + 3) // 4 * 4
            start += length
    except IndexError as error:
        raise NotSeekable(f"{path} has a damaged index") from error
    if offset != size - 12 - index_size:
        raise NotSeekable(f"{path} is more than one xz stream")
    return blocks


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if not byte & 0x80:
            return value, position
        shift += 7


def _find_header(stream: _Stream) -> tarfile.TarInfo | None:
    """The first header in a stream that begins anywhere in the archive."""
    stream.read(-stream.position % _SECTOR)
    while True:
        sector = stream.read(_SECTOR)
        if sector[257:262] == b"ustar":
            header = _header(sector)
            if header is not None:  # its checksum is right: not a file that looks like one
                return header


def _header(sector: bytes) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(sector, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _padded(size: int) -> int:
    return (size + _SECTOR - 1) // _SECTOR * _SECTOR


def _pax_path(data: bytes) -> str | None:
    """The path in a pax header ("27 path=linux-source-6.12/…\\n")."""
    for record in data.decode("utf-8", "replace").splitlines():
        key, _equals, value = record.partition(" ")[2].partition("=")
        if key == "path":
            return value
    return None
