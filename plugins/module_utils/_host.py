# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The one reader of a host.

Everything the collection learns from ``/sys``, ``/proc``, ``/etc``, ``/dev``, ``/boot`` and ``/usr`` comes through
a :class:`Host`. Its ``root`` makes a captured tree (an unpacked sosreport, an image, a test's own tree) read exactly
like the live host. It never writes, and it never raises for what is not there: what a tree lacks is ``None`` or empty.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
import subprocess
import typing as t

# sysfs attributes are at most one page; configuration files of a host are small. The bound keeps a damaged or
# hostile tree (a "text" attribute of gigabytes) from filling memory.
READ_LIMIT = 4 * 1024 * 1024

# Linux gives up after 40 nested links (ELOOP); a captured tree may hold a loop that the live host had not.
_MAX_LINKS = 40

_PAGE = 4096

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

_SEARCH_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


@dataclasses.dataclass(frozen=True)
class Output:
    """What a command that only reads said: exit status (negative: ended by that signal), stdout and stderr."""

    status: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        return self.status == 0


class Host:
    """A host to be read, live (``root="/"``) or captured.

    Args:
        root: directory that is the host's ``/``.
    """

    def __init__(self, root: str = "/") -> None:
        self.root = os.path.abspath(root)
        self._links: dict[str, str | None] = {}

    @property
    def live(self) -> bool:
        """True for the running host: only there commands can be asked and device nodes opened."""
        return self.root == "/"

    # -- paths -----------------------------------------------------------------------------------------------------

    def path(self, path: str, follow: bool = True) -> str:
        """The real path of a path of the host.

        Beneath another root every link on the way is resolved as the host itself would resolve it (an absolute link
        stays inside the root, ``..`` does not leave it).

        Args:
            path: absolute path as the host sees it.
            follow: whether a link in the last component is resolved too.

        Raises:
            OSError: ELOOP, for a loop of links in a captured tree.
        """
        return path if self.live else self._real(self._resolve(path, follow))

    def _real(self, path: str) -> str:
        return self.root + path if path != "/" else self.root

    def _resolve(self, path: str, follow: bool) -> str:
        todo = [part for part in path.split("/") if part][::-1]
        done = ""
        links = 0
        while todo:
            part = todo.pop()
            if part == ".":
                continue
            if part == "..":
                done = done.rpartition("/")[0]
                continue
            here = f"{done}/{part}"
            target = self._link(here) if todo or follow else None
            if target is None:
                done = here
                continue
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            if target.startswith("/"):
                done = ""
            todo.extend([piece for piece in target.split("/") if piece][::-1])
        return done or "/"

    def _link(self, path: str) -> str | None:
        """The target of what may be a link, below a directory that is resolved; None for anything else.

        Remembered for what exists: thousands of functions share the directories on the way to them.
        """
        try:
            return self._links[path]
        except KeyError:
            pass
        try:
            target = os.readlink(self._real(path))
        except OSError as problem:
            if problem.errno == errno.EINVAL:  # there, and no link
                self._links[path] = None
            return None
        self._links[path] = target
        return target

    def realpath(self, path: str) -> str | None:
        """The path as the host sees it with every link resolved, or None where it does not exist."""
        try:
            if self.live:
                return os.path.realpath(path) if os.path.exists(path) else None
            resolved = self._resolve(path, follow=True)
            return resolved if os.path.exists(self._real(resolved)) else None
        except (OSError, ValueError):
            return None

    # -- files -----------------------------------------------------------------------------------------------------

    def read_bytes(self, path: str, limit: int = READ_LIMIT) -> bytes | None:
        """The content of a regular file, at most ``limit`` bytes, or None where it is missing or cannot be read.

        Device nodes, sockets and FIFOs are not opened: opening one can block or have an effect.
        """
        try:
            return _read(self.path(path), limit, _OPEN)
        except (OSError, ValueError):  # many sysfs attributes answer EIO, EINVAL or ENODEV when read
            return None

    def read_text(self, path: str, limit: int = READ_LIMIT) -> str | None:
        """The content as text; bytes that are not UTF-8 become U+FFFD. None where it cannot be read."""
        content = self.read_bytes(path, limit)
        return None if content is None else content.decode("utf-8", "replace")

    def read_line(self, path: str) -> str | None:
        """The first line of an attribute without surrounding whitespace; None where missing or empty."""
        return _first_line(self.read_bytes(path, _PAGE))

    def read_int(self, path: str, base: int = 10) -> int | None:
        """The integer in an attribute (``base`` 0 understands ``0x`` prefixes); None where there is none."""
        line = self.read_line(path)
        if line is None:
            return None
        try:
            return int(line, base)
        except ValueError:
            return None

    def directory(self, path: str) -> Directory:
        """A directory of which several attributes will be read."""
        return Directory(self, path)

    def listdir(self, path: str) -> list[str]:
        """Names in a directory, sorted; empty where it is missing or cannot be read."""
        try:
            return sorted(os.listdir(self.path(path)))
        except (OSError, ValueError):
            return []

    def readlink(self, path: str) -> str | None:
        """The target of a link, as written; None where it is missing or not a link."""
        try:
            return os.readlink(self.path(path, follow=False))
        except (OSError, ValueError):
            return None

    def link_name(self, path: str) -> str | None:
        """The last component of a link's target (the driver, the IOMMU group of a device in sysfs), or None."""
        target = self.readlink(path)
        return None if target is None else os.path.basename(target.rstrip("/")) or None

    def stat(self, path: str, follow: bool = True) -> os.stat_result | None:
        """The status of a file, or None where it does not exist."""
        try:
            real = self.path(path, follow)
            return os.stat(real) if follow else os.lstat(real)
        except (OSError, ValueError):
            return None

    def exists(self, path: str) -> bool:
        return self.stat(path) is not None

    def is_dir(self, path: str) -> bool:
        status = self.stat(path)
        return status is not None and stat.S_ISDIR(status.st_mode)

    # -- questions to commands -------------------------------------------------------------------------------------

    def which(self, name: str) -> str | None:
        """The path (as the host sees it) of an executable in the standard directories, or None."""
        candidates = [name] if name.startswith("/") else [f"{directory}/{name}" for directory in _SEARCH_PATH]
        for candidate in candidates:
            status = self.stat(candidate)
            if status is not None and stat.S_ISREG(status.st_mode) and status.st_mode & 0o111:
                return candidate
        return None

    def ask(self, argv: t.Sequence[str], timeout: float = 30.0, stdin: str = "") -> Output | None:
        """Run a command of the live host that only reads.

        Args:
            argv: command and arguments; the command is looked up in the standard directories.
            timeout: seconds after which it is killed; it then counts as not answering.
            stdin: text given to it.

        Returns:
            What it said, or None on a captured tree, where there is no such command, or on time-out.
        """
        if not self.live:
            return None
        command = self.which(argv[0])
        if command is None:
            return None
        environment = {"PATH": ":".join(_SEARCH_PATH), "LC_ALL": "C.UTF-8", "HOME": os.environ.get("HOME", "/")}
        try:
            done = subprocess.run(  # pylint: disable=ansible-bad-function
                [command, *argv[1:]],
                input=stdin.encode(),
                capture_output=True,
                timeout=timeout,
                env=environment,
                check=False,
            )
        except (OSError, ValueError, subprocess.TimeoutExpired):
            return None
        return Output(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


class Directory:
    """A directory of the host, listed and resolved once, for reading many attributes of it at the least cost.

    It answers like the methods of :class:`Host`, with names in place of paths.

    Attributes:
        names: what it holds; empty where it is missing or cannot be read.
    """

    def __init__(self, host: Host, path: str) -> None:
        self.host = host
        self.path = path
        try:
            self._real = host.path(path)
            self.names = frozenset(os.listdir(self._real))
        except (OSError, ValueError):
            self.names = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def bytes(self, name: str, limit: int = READ_LIMIT) -> bytes | None:
        if name not in self.names:
            return None
        try:
            return _read(f"{self._real}/{name}", limit, _OPEN | os.O_NOFOLLOW)
        except OSError as problem:
            if problem.errno != errno.ELOOP:
                return None
        return self.host.read_bytes(f"{self.path}/{name}", limit)  # a link, to be resolved within the root

    def text(self, name: str, limit: int = READ_LIMIT) -> str | None:
        content = self.bytes(name, limit)
        return None if content is None else content.decode("utf-8", "replace")

    def line(self, name: str) -> str | None:
        return _first_line(self.bytes(name, _PAGE)) if name in self.names else None

    def link_name(self, name: str) -> str | None:
        if name not in self.names:
            return None
        try:
            return os.readlink(f"{self._real}/{name}").rstrip("/").rpartition("/")[2] or None
        except OSError:
            return None


def _read(path: str, limit: int, flags: int) -> bytes | None:
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        if limit <= _PAGE:  # an attribute comes whole at the first read
            return os.read(descriptor, limit)
        chunks: list[bytes] = []
        left = limit
        while left > 0:
            chunk = os.read(descriptor, min(left, 1 << 20))
            if not chunk:
                break
            chunks.append(chunk)
            left -= len(chunk)
        return b"".join(chunks)
    finally:
        os.close(descriptor)


def _first_line(content: bytes | None) -> str | None:
    if content is None:
        return None
    return content.decode("utf-8", "replace").strip().partition("\n")[0].strip("\0 \t\r") or None
