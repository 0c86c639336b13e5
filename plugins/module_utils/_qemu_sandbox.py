# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Commands of a build: as a user that owns nothing else, without network, within limits, with their output in a log.

Root only starts them. The user is a number without an account, as systemd's DynamicUser= has them, so that there is
none to make and to remove again, and nothing on the machine belongs to it but the build.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import signal
import subprocess
import time
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host, Output

#: The user ids that systemd takes for users without an account (systemd.exec(5), DynamicUser=).
FIRST_UID, LAST_UID = 61184, 65519

# Bytes. What reads the output is not within the build's limits.
_LINE_LIMIT = 1 << 16

_SEARCH_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a build may take.

    Attributes:
        jobs: commands side by side.
        memory: bytes; of the whole build where systemd runs, else of each process.
        niceness: added to the priority, 0 to 19.
    """

    jobs: int
    memory: int
    niceness: int = 10


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """Where and as whom the commands of one build run.

    Attributes:
        directory: the build's private directory.
        uid: user and group.
        limits: what the build may take.
        network: whether the commands see the machine's network; False wherever the kernel lets us take it away.
        slices: whether systemd can limit the whole build.
        environment: variables beside the few that every command has.
    """

    directory: str
    uid: int
    limits: Limits
    network: bool
    slices: bool
    environment: t.Mapping[str, str] = dataclasses.field(default_factory=dict)

    def wrap(self, argv: t.Sequence[str]) -> list[str]:
        """A command with all that confines it in front."""
        found: list[str] = []
        if self.slices:
            found += ["systemd-run", "--scope", "--quiet", "--collect", "-p", f"MemoryMax={self.limits.memory}", "--"]
        else:
            found += ["prlimit", f"--as={self.limits.memory}", "--"]
        if not self.network:
            found += ["unshare", "--net", "--"]
        found += ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "--no-new-privs"]
        found += ["--inh-caps=-all", "--bounding-set=-all", "--"]
        return [*found, "nice", f"--adjustment={self.limits.niceness}", *argv]

    def variables(self) -> dict[str, str]:
        """The environment of a command; nothing of the caller's."""
        return {
            "PATH": _SEARCH_PATH,
            "LC_ALL": "C.UTF-8",
            "HOME": f"{self.directory}/home",
            "TMPDIR": f"{self.directory}/tmp",
            **self.environment,
        }

    def run(self, argv: t.Sequence[str], cwd: str, on_line: t.Callable[[str], None]) -> int:
        """Run a command to its end.

        Args:
            argv: command and arguments.
            cwd: its directory.
            on_line: called with each line of its output; one of more than 64 KiB comes in pieces.

        Returns:
            Its status; negative where a signal ended it.
        """
        process = subprocess.Popen(  # pylint: disable=ansible-bad-function
            self.wrap(argv),
            cwd=cwd,
            env=self.variables(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            for line in iter(lambda: t.cast("t.IO[bytes]", process.stdout).readline(_LINE_LIMIT), b""):
                on_line(line.decode("utf-8", "replace").rstrip("\r\n"))
            return process.wait()
        except BaseException:
            process.kill()
            end_processes(self.uid)
            process.wait()
            raise

    def ask(self, argv: t.Sequence[str], timeout: float) -> Output | None:
        """Run a command that only answers; None where it does not."""
        try:
            done = subprocess.run(  # pylint: disable=ansible-bad-function
                self.wrap(argv),
                cwd=self.directory,
                env=self.variables(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return Output(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


def make_sandbox(host: Host, directory: str, limits: Limits, environment: t.Mapping[str, str]) -> Sandbox:
    """The sandbox of one build, as tight as the machine allows.

    Raises:
        HostError: a tool for it is missing, or every user id is taken.
    """
    for tool in ("setpriv", "prlimit", "nice"):
        if host.which(tool) is None:
            raise HostError(f"{tool} is not installed; a build runs as an unprivileged user by it")
    unshared = host.ask(["unshare", "--net", "--", "true"])
    slices = host.is_dir("/run/systemd/system") and host.which("systemd-run") is not None
    return Sandbox(directory, _free_uid(), limits, not (unshared and unshared.ok), slices, dict(environment))


def _free_uid() -> int:
    used = set(_process_uids().values())
    start = FIRST_UID + os.getpid() % 1000  # two builds that begin at once should not meet
    for uid in range(start, LAST_UID):
        with contextlib.suppress(KeyError):
            pwd.getpwuid(uid)
            continue
        if uid not in used:
            return uid
    raise HostError(f"every user id between {start} and {LAST_UID} is in use")


def _process_uids() -> dict[int, int]:
    found: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                found[int(name)] = os.stat(f"/proc/{name}").st_uid
    return found


def end_processes(uid: int, beneath: str = "") -> None:
    """Kill whatever a build's user still runs.

    Args:
        uid: the user.
        beneath: kill only those whose working directory lies beneath this one; empty: all.

    Raises:
        HostError: something of it does not end.
    """
    if not FIRST_UID <= uid <= LAST_UID:
        return
    for _attempt in range(100):
        mine = [process for process, owner in _process_uids().items() if owner == uid and not _is_zombie(process)]
        left = [process for process in mine if not beneath or _works_beneath(process, beneath)]
        if not left:
            return
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    raise HostError(f"processes of an earlier build (user id {uid}) do not end")


def _works_beneath(process: int, directory: str) -> bool:
    try:
        return os.readlink(f"/proc/{process}/cwd").startswith(f"{os.path.realpath(directory)}/")
    except OSError:
        return False


def _is_zombie(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[:1] == ["Z"]
    except OSError:
        return True
