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
        self._directories: dict[str, str] = {}

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
        if self.live:
            return path
        directory, _slash, name = path.rpartition("/")
        if name in ("", ".", ".."):
            return self._real(self._resolve(path, follow))
        here = self._real(f"{self._directory(directory).rstrip('/')}/{name}")
        return self._real(self._resolve(path, follow)) if follow and os.path.islink(here) else here

    def _directory(self, path: str) -> str:
        """A directory with its links resolved, remembered: a device's many attributes lie in one directory, and each
        of its links would be looked up again for each of them."""
        known = self._directories.get(path)
        if known is None:
            known = self._resolve(path, follow=True)
            if os.path.isdir(self._real(known)):
                self._directories[path] = known
        return known

    def _real(self, path: str) -> str:
        return self.root + path if path != "/" else self.root

    def _resolve(self, path: str, follow: bool) -> str:
        todo = [part for part in path.split("/") if part][::-1]
        done: list[str] = []
        links = 0
        while todo:
            part = todo.pop()
            if part == ".":
                continue
            if part == "..":
                if done:
                    done.pop()
                continue
            here = self._real("/" + "/".join([*done, part]))
            if (todo or follow) and os.path.islink(here):
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                target = os.readlink(here)
                if target.startswith("/"):
                    done = []
                todo.extend([piece for piece in target.split("/") if piece][::-1])
            else:
                done.append(part)
        return "/" + "/".join(done)

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
            descriptor = os.open(self.path(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except (OSError, ValueError):
            return None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            chunks: list[bytes] = []
            left = limit
            while left > 0:
                chunk = os.read(descriptor, min(left, 1 << 20))
                if not chunk:
                    break
                chunks.append(chunk)
                left -= len(chunk)
            return b"".join(chunks)
        except OSError:  # many sysfs attributes answer EIO, EINVAL or ENODEV when read
            return None
        finally:
            os.close(descriptor)

    def read_text(self, path: str, limit: int = READ_LIMIT) -> str | None:
        """The content as text; bytes that are not UTF-8 become U+FFFD. None where it cannot be read."""
        content = self.read_bytes(path, limit)
        return None if content is None else content.decode("utf-8", "replace")

    def read_line(self, path: str) -> str | None:
        """The first line of an attribute without surrounding whitespace; None where missing or empty."""
        text = self.read_text(path, 4096)
        if text is None:
            return None
        return text.strip().partition("\n")[0].strip("\0 \t\r") or None

    def read_int(self, path: str, base: int = 10) -> int | None:
        """The integer in an attribute (``base`` 0 understands ``0x`` prefixes); None where there is none."""
        line = self.read_line(path)
        if line is None:
            return None
        try:
            return int(line, base)
        except ValueError:
            return None

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
            done = subprocess.run(
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
