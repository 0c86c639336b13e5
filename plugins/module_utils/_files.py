# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import stat

# Every file that is wholly ours says so in its first lines; only such a file is overwritten or removed.
OWN_MARK = "Managed by the Ansible collection iommufd.host"


# EXT4_IOC_CHECKPOINT of <linux/ext4.h>: _IOW('f', 43, __u32), since Linux 5.14.
_EXT4_CHECKPOINT = 0x4004662B


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


def capture(path: str) -> FileState | None:
    """The file as it is now, or None where there is none.

    Raises:
        OSError: it exists but cannot be read, or it is not a regular file. A link to /dev/null is how an administrator
            masks a file of systemd's (modules-load.d(5)): writing "it" would replace the node.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", path)
        content = file.read()
    label = None
    with contextlib.suppress(OSError):
        label = os.getxattr(path, "security.selinux")
    return FileState(content, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, label)


def sha256(path: str) -> str:
    """The SHA-256 of a file, hexadecimal; read piece by piece, for it may be larger than the memory.

    Raises:
        OSError: it cannot be read.
    """
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def temporary_path(target: str) -> str:
    """Where a file is written before it takes its place; what is found there is what a killed run left behind."""
    directory, name = os.path.split(target)
    return os.path.join(directory, f".{name}.iommufd-host.tmp")


def former_path(target: str) -> str:
    """The second name that a file which a boot loader reads has while another one takes its place."""
    directory, name = os.path.split(target)
    return os.path.join(directory, f".{name}.iommufd-host.old")


def checkpoint(directory: str) -> None:
    """Have the file system put what its journal holds in its place, for readers that do not know of the journal.

    A boot loader is one (GRUB): after a power cut it sees the file system as it was before the last half a minute, or
    a mixture of then and now. Only ext4 offers this; with others nothing happens.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(directory or "/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _EXT4_CHECKPOINT, b"\0\0\0\0")
        finally:
            os.close(descriptor)


def write_atomic(path: str, state: FileState, for_boot_loader: bool = False) -> None:
    """Replace a file in one step: a reader, or a power cut, sees the old or the new content, never a part.

    A link is followed, so that the file it names is replaced and the link stays. The temporary file lies beside the
    target under a fixed name that ends in ``.tmp`` (ignored by udev, modprobe, systemd and grub alike); a killed run
    leaves at most that one file, and the next run writes over it or removes it.

    Args:
        path: the file.
        state: what it shall be.
        for_boot_loader: also a reader that passes over the file system's journal must at any time see one or the other:
            the new file is in its place on the disk before its name is, and the old one stays until then.

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
        if for_boot_loader:
            checkpoint(directory)
            _keep_former(target)
        os.replace(temporary, target)
    except BaseException:
        for left in (temporary, former_path(target)) if for_boot_loader else (temporary,):
            with contextlib.suppress(OSError):
                os.unlink(left)
        raise
    _sync_directory(directory)
    if for_boot_loader:
        checkpoint(directory)
        remove(former_path(target))


def _keep_former(target: str) -> None:
    former = former_path(target)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(former)
    with contextlib.suppress(OSError):  # there is none, or the file system has no hard links (FAT)
        os.link(target, former)


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
