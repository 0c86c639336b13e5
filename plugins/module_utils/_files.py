# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat

# Every file that is wholly ours says so in its first lines; only such a file is overwritten or removed.
OWN_MARK = "Managed by the Ansible collection iommufd.host"


def own_header(comment: str = "#") -> str:
    """The first line of a file that is wholly ours, as a comment."""
    return f"{comment} {OWN_MARK}; edits are lost.\n"


@dataclasses.dataclass(frozen=True)
class FileState:
    """A file's content and the attributes that replacing it must keep. Mode without the file type; ids numeric."""

    content: bytes
    mode: int
    uid: int
    gid: int
    label: bytes | None = None

    @property
    def is_ours(self) -> bool:
        return OWN_MARK.encode() in self.content[:400]


def capture(path: str) -> FileState | None:
    """The file as it is now, or None where there is none.

    Raises:
        OSError: it exists but cannot be read, or it is not a regular file (EISDIR and the like).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        content = file.read()
    label = None
    with contextlib.suppress(OSError):
        label = os.getxattr(path, "security.selinux")
    return FileState(content, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, label)


def temporary_path(target: str) -> str:
    """Where a file is written before it takes its place; what is found there is what a killed run left behind."""
    directory, name = os.path.split(target)
    return os.path.join(directory, f".{name}.iommufd-host.tmp")


def write_atomic(path: str, state: FileState) -> None:
    """Replace a file in one step: a reader, or a power cut, sees the old or the new content, never a part.

    A link is followed, so that the file it names is replaced and the link stays. The temporary file lies beside the
    target under a fixed name that ends in ``.tmp`` (ignored by udev, modprobe, systemd and grub alike); a killed run
    leaves at most that one file, and the next run writes over it or removes it.

    Raises:
        OSError: the directory is missing, read-only or full; the target is then untouched.
    """
    target = os.path.realpath(path)
    directory = os.path.dirname(target)
    temporary = temporary_path(target)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(state.content)
            file.flush()
            os.fchown(file.fileno(), state.uid, state.gid)
            os.fchmod(file.fileno(), state.mode)
            if state.label is not None:
                with contextlib.suppress(OSError):
                    os.setxattr(temporary, "security.selinux", state.label)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(directory)


def remove(path: str) -> None:
    """Remove a file (or a link itself), durably; one that is gone already is fine.

    Raises:
        OSError: it cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    _sync_directory(os.path.dirname(path))


def _sync_directory(directory: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(directory or "/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
