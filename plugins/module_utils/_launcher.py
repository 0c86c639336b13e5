# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Opening device nodes as root and handing them to a process that could not have opened them.

Who owns what: the launcher (this process, root) opens ``/dev/iommu`` and the vfio devices, keeps its own descriptors
until the process has ended, and is the only one that ever opens a node. The process inherits the same open files,
under the same numbers, after it has given up root for good. Nothing is written to disk: what the process has to read
lies in sealed memory files, so that even SIGKILL of the launcher leaves nothing behind; the kernel then ends the
process too.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import os
import platform
import pwd
import resource
import signal
import stat
import struct
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._nodes import IOMMU
from ansible_collections.iommufd.host.plugins.module_utils._plan import reason, wait_until

VFIO_DIRECTORY = "/dev/vfio"

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

# linux/sched.h, linux/mount.h
_CLONE_NEWNS = 0x20000
_MS_NOSUID, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 8, 0x1000, 0x4000, 0x40000

# linux/iommufd.h: IOMMU_OPTION is _IO(';', 0x87) over struct iommu_option.
_IOMMU_OPTION = 0x3B87
_OPTION_STRUCT = struct.Struct("=IIHHIQ")  # size, option_id, op, reserved, object_id, val64
_RLIMIT_MODE = 0
_OPTION_SET, _OPTION_GET = 0, 1

# linux/kvm.h: KVM_CREATE_VM is _IO(0xAE, 0x01).
_KVM_CREATE_VM = 0xAE01

# The number of kcmp(2), which has no wrapper in the C library; 272 is the one of asm-generic/unistd.h.
_KCMP_NUMBERS = {"x86_64": 312, "i686": 349, "ppc64le": 354, "ppc64": 354, "s390x": 343}
_KCMP_GENERIC = 272
_KCMP_FILE = 0

# Where direction bits stand in an ioctl number, _IO() is not 0 there.
_IO_NONE = {"ppc64le": 1 << 29, "ppc64": 1 << 29}


@dataclasses.dataclass(frozen=True)
class User:
    """An unprivileged user: name, numeric user id, numeric ids of the primary group and of further ones."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def find_user(name: str, option: str = "user", with_groups: bool = False) -> User:
    """Look a user up.

    Args:
        name: of the user.
        option: the module option, for the error.
        with_groups: whether the process is to be in the further groups that the user is a member of.

    Raises:
        OptionError: unknown, or root.
    """
    accepted = "the name of an existing user without privileges, such as nobody"
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise OptionError(option, name, accepted, "the host has no such user") from None
    if entry.pw_uid == 0:
        raise OptionError(option, name, accepted, "this user is root")
    groups = sorted(set(os.getgrouplist(name, entry.pw_gid)) - {entry.pw_gid}) if with_groups else []
    return User(name, entry.pw_uid, entry.pw_gid, tuple(groups))


# -- nodes -------------------------------------------------------------------------------------------------------------


def open_node(path: str, number: tuple[int, int]) -> int:
    """Open a character device for reading and writing, and make sure that it is the one meant.

    Args:
        path: of the node.
        number: its major and minor number, as sysfs tells them.

    Returns:
        The descriptor; not inherited unless asked for.

    Raises:
        HostError: missing, not permitted, busy, or another device.
    """
    try:
        # Before it is opened, too: with another device, such as a watchdog, opening alone has an effect.
        _check_number(path, os.stat(path), number)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        hint = ""
        if error.errno == errno.EPERM:
            hint = " (as root this means that the device ACL of this process's cgroup does not list it)"
        elif error.errno in (errno.EBUSY, errno.EINVAL):
            hint = " (another process holds it)"
        raise HostError(f"{path} cannot be opened: {error.strerror}{hint}.", step="open") from error
    try:
        _check_number(path, os.fstat(descriptor), number)
    except HostError:
        os.close(descriptor)
        raise
    return descriptor


def _check_number(path: str, status: os.stat_result, number: tuple[int, int]) -> None:
    found = (os.major(status.st_rdev), os.minor(status.st_rdev))
    if not stat.S_ISCHR(status.st_mode) or found != number:
        raise HostError(
            f"{path} is not the device it should be: {found[0]}:{found[1]}, sysfs says {number[0]}:{number[1]}. "
            "A stale node: remove it and let udev make it anew (udevadm trigger).",
            step="open",
        )


def account_per_process(descriptor: int) -> None:
    """Have the memory pinned through an empty iommufd context charged to the process, not to its user.

    By default it is charged to the user, all whose processes share one limit (RLIMIT_MEMLOCK of the one that pins).
    IOMMU_OPTION_RLIMIT_MODE of linux/iommufd.h, there from the beginning (Linux 6.2).

    Raises:
        HostError: the kernel refused (it needs CAP_SYS_RESOURCE and an empty context), or did not keep it.
    """
    request = _IOMMU_OPTION | _IO_NONE.get(platform.machine(), 0)
    try:
        _iommu_option(descriptor, request, _OPTION_SET, 1)
        kept = _iommu_option(descriptor, request, _OPTION_GET, 0)
    except OSError as error:
        raise HostError(
            f"{IOMMU}: pinned memory cannot be accounted per process (IOMMU_OPTION RLIMIT_MODE): {error.strerror}.",
            step="accounting",
        ) from error
    if kept != 1:
        raise HostError(f"{IOMMU}: RLIMIT_MODE is {kept} after it was set to 1.", step="accounting")


def _iommu_option(descriptor: int, request: int, operation: int, value: int) -> int:
    data = bytearray(_OPTION_STRUCT.pack(_OPTION_STRUCT.size, _RLIMIT_MODE, operation, 0, 0, value))
    fcntl.ioctl(descriptor, request, data)
    return int(_OPTION_STRUCT.unpack(data)[5])


def open_kvm(host: Host) -> tuple[int | None, str]:
    """Open /dev/kvm where it is of use.

    The node alone says nothing: decided on whether a machine can be made, and on x86, where a paravirtual KVM may make
    one that is of no use, on the processor's own flag. Other processors have no such flag.

    Returns:
        The descriptor or None, and the reason in words.
    """
    has = f"the processor is an {platform.machine()}"
    if platform.machine() == "x86_64":
        flags = set()
        for line in (host.read_text("/proc/cpuinfo") or "").splitlines():
            if line.startswith("flags"):
                flags = set(line.partition(":")[2].split())
                break
        flag = next((name for name in ("vmx", "svm") if name in flags), None)
        if flag is None:
            return None, "the processor offers neither vmx nor svm"
        has = f"the processor offers {flag}"
    try:
        descriptor = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return None, f"{has}, but /dev/kvm cannot be opened: {error.strerror}"
    try:
        os.close(fcntl.ioctl(descriptor, _KVM_CREATE_VM, 0))
    except OSError as error:
        os.close(descriptor)
        return None, f"{has}, but /dev/kvm makes no machine: {error.strerror}"
    return descriptor, f"{has} and /dev/kvm makes machines"


def memory_file(name: str, content: bytes, user: User) -> int:
    """A file in memory that the user may open through ``/proc/self/fd`` and nobody can change.

    Args:
        name: shown in /proc, without further meaning.
        content: what it holds.
        user: who may read it.
    """
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        os.fchown(descriptor, user.uid, user.gid)
        os.fchmod(descriptor, 0o400)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


# -- the same open file ------------------------------------------------------------------------------------------------


def same_open_file(process: int, theirs: int, ours: int) -> bool | None:
    """Whether a descriptor of another process and one of this process are one open file (kcmp(2)).

    Args:
        process: id of the other process.
        theirs: number of its descriptor.
        ours: number of our descriptor.

    Returns:
        None where the kernel does not tell (built without CONFIG_KCMP, or the process is gone).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    number = _KCMP_NUMBERS.get(platform.machine(), _KCMP_GENERIC)
    answer = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_long(os.getpid()),
        ctypes.c_long(process),
        ctypes.c_long(_KCMP_FILE),
        ctypes.c_ulong(ours),
        ctypes.c_ulong(theirs),
    )
    return None if answer < 0 else answer == 0


# -- the process -------------------------------------------------------------------------------------------------------


_HANDLED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Resource limits of the process.

    Attributes:
        memlock: bytes that it may pin (RLIMIT_MEMLOCK); None: without limit.
        core: bytes of a core dump; 0, because it would hold the guest's memory.
    """

    memlock: int | None
    core: int = 0


@dataclasses.dataclass(frozen=True)
class PrivateNode:
    """A device node that only the process is to see, and may open: its path, and its number."""

    path: str
    number: tuple[int, int]


class _Privileges:
    """Gives up root for good; everything it needs is looked up before the fork."""

    def __init__(self, user: User, limits: Limits, nodes: t.Sequence[PrivateNode] = ()) -> None:
        self.user = user
        self.limits = limits
        self.nodes = nodes
        self.libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
            self.last_capability = int(file.read())
        self.parent = os.getpid()

    def give_up(self) -> None:
        """In the child. The order matters: limits and the bounding set need root, and a change of credentials clears
        the signal that the parent's death is to send."""
        if self.nodes:
            self._make_nodes()
        memlock = resource.RLIM_INFINITY if self.limits.memlock is None else self.limits.memlock
        for kind, value in ((resource.RLIMIT_MEMLOCK, memlock), (resource.RLIMIT_CORE, self.limits.core)):
            resource.setrlimit(kind, (value, value))
        self._prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
        for capability in range(self.last_capability + 1):
            self._prctl(_PR_CAPBSET_DROP, capability)
        os.setgroups(list(self.user.groups))
        os.setresgid(self.user.gid, self.user.gid, self.user.gid)
        os.setresuid(self.user.uid, self.user.uid, self.user.uid)
        self._prctl(_PR_SET_NO_NEW_PRIVS, 1)
        self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.parent:  # it died before the line above
            os._exit(1)

    def _make_nodes(self) -> None:
        """A /dev/vfio of the process's own, with its nodes alone, and those that lie elsewhere in the place of the
        host's: the kernel takes it all away with the process."""
        if self.libc.unshare(ctypes.c_int(_CLONE_NEWNS)):
            raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")
        self._mount(None, "/", None, _MS_REC | _MS_PRIVATE, None)
        self._mount("tmpfs", VFIO_DIRECTORY, "tmpfs", _MS_NOSUID | _MS_NOEXEC, "mode=0755,size=64k")
        for node in self.nodes:
            elsewhere = not node.path.startswith(f"{VFIO_DIRECTORY}/")
            path = f"{VFIO_DIRECTORY}/{os.path.basename(node.path)}" if elsewhere else node.path
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(*node.number))
            os.chown(path, self.user.uid, self.user.gid)
            if elsewhere:
                self._mount(path, node.path, None, _MS_BIND, None)

    def _mount(self, source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
        words = [None if text is None else text.encode() for text in (source, target, kind, data)]
        if self.libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]):
            raise OSError(ctypes.get_errno(), f"mount on {target}: {os.strerror(ctypes.get_errno())}")

    def _prctl(self, option: int, argument: int) -> None:
        if self.libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)):
            number = ctypes.get_errno()
            raise OSError(number, f"prctl({option}, {argument}): {os.strerror(number)}")


def _child(privileges: _Privileges | None, body: t.Callable[[], None], report: int) -> int:
    """Fork; the child gives up its privileges, runs ``body`` and exits. What it raises goes to ``report`` as text.

    Without privileges to give up it stays root, and ends with its parent all the same.
    """
    # The handlers are Python's, and the child is a copy of Python that must never get back to Ansible: no signal may
    # reach it before they are gone.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        process = os.fork()
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise HostError(f"No process can be started: {error.strerror}.") from error
    if process:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return process
    step = "give up root"
    try:
        for number in (*_HANDLED, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.setsid()
        if privileges is not None:
            privileges.give_up()
        else:
            libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), *[ctypes.c_ulong(0)] * 3)
            if os.getppid() != parent:
                os._exit(1)
        step = "start"
        body()
    except BaseException as error:  # whatever it was: report it and end, nothing may unwind further
        with contextlib.suppress(OSError):
            os.write(report, f"{step}: {reason(error)}".encode()[:2000])
    os._exit(127)


def denied(user: User, paths: t.Sequence[str]) -> dict[str, str | None]:
    """Try to open nodes for reading and writing with exactly the rights that the process will have.

    Returns:
        For each path the kernel's refusal in words; None where it could be opened.

    Raises:
        HostError: the attempt itself could not be made.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    privileges = _Privileges(user, Limits(0))

    def attempt() -> None:
        for path in paths:
            try:
                os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
                said = "opened"
            except OSError as error:
                said = os.strerror(error.errno or 0)
            os.write(writer, f"{path}\t{said}\n".encode())
        os._exit(0)

    process = _child(privileges, attempt, writer)
    os.close(writer)
    try:
        with os.fdopen(reader, "r", encoding="utf-8", errors="replace") as answers:
            text = answers.read()
    finally:
        os.waitpid(process, 0)
    found = dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)
    if any(path not in found for path in paths):
        raise HostError(f"Could not try to open nodes as {user.name}: {text or 'no answer'}.", step="permissions")
    return {path: None if found[path] == "opened" else found[path] for path in paths}


class Process:
    """A process with inherited descriptors, its own session, and an end that is certain.

    Use it as a context manager: on leaving, however that happens, the process is gone. One that still ran takes its
    process group with it; what left that group, or outlived its leader, is not looked for.

    Args:
        arguments: the program's path, and its arguments.
        user: whom it runs as, without any privilege; None: it stays root.
        limits: its resource limits, with a user.
        descriptors: what it inherits, under the same numbers.
        nodes: the only device nodes that it sees in /dev/vfio; without any it sees the host's.
        stdin: what it reads from; None: nothing.

    Attributes:
        pid: process id.
        words: what it writes to standard output and standard error (our end of the pipe, not blocking).
    """

    def __init__(
        self,
        arguments: t.Sequence[str],
        user: User | None,
        limits: Limits | None = None,
        descriptors: t.Iterable[int] = (),
        nodes: t.Sequence[PrivateNode] = (),
        stdin: int | None = None,
    ) -> None:
        self._arguments = list(arguments)
        self._user = user
        self._limits = limits or Limits(None)
        self._descriptors = sorted(set(descriptors))
        self._nodes = nodes
        self._stdin = stdin
        self.pid = 0
        self.words = -1
        self.status: int | None = None

    def __enter__(self) -> Process:
        """Start it.

        Raises:
            HostError: it could not be started; says at which step and why.
        """
        privileges = _Privileges(self._user, self._limits, self._nodes) if self._user else None
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        stdin = null if self._stdin is None else self._stdin
        self.words, output = os.pipe2(os.O_CLOEXEC)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.words, False)

        def execute() -> None:
            os.dup2(stdin, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            keep = {0, 1, 2, writer, *self._descriptors}
            for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
                if descriptor not in keep:
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
            for descriptor in self._descriptors:
                os.set_inheritable(descriptor, True)
            os.chdir("/")
            os.umask(0o077)
            environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "HOME": "/nonexistent"}
            if privileges is None:
                environment["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
            os.execve(self._arguments[0], self._arguments, environment)

        try:
            self.pid = _child(privileges, execute, writer)
        finally:
            for descriptor in (null, output, writer):
                os.close(descriptor)
        try:
            # Closed by a successful execve: end of file is the good news.
            problem = os.read(reader, 4096).decode("utf-8", "replace")
            if problem:
                name = self._user.name if self._user else "root"
                raise HostError(f"{self._arguments[0]} could not be started as {name}: {problem}.", step="start")
        except BaseException:
            self.end()
            raise
        finally:
            os.close(reader)
        return self

    def __exit__(self, *_exception: object) -> None:
        self.end()

    def poll(self) -> int | None:
        """The exit status (negative: the signal that ended it), or None while it runs."""
        if self.status is None and self.pid:
            process, status = os.waitpid(self.pid, os.WNOHANG)
            if process:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, timeout: float) -> int | None:
        """As `poll`, waiting at most so many seconds."""
        wait_until(lambda: self.poll() is not None, timeout, 0.02)
        return self.status

    def end(self) -> None:
        """Kill it and its process group; nothing is done where it has ended by itself.

        Raises:
            HostError: it does not end (stuck in the kernel).
        """
        if self.words >= 0:
            os.close(self.words)
            self.words = -1
        if not self.pid or self.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # before it made its own session
            os.kill(self.pid, signal.SIGKILL)
        if self.wait(60.0) is None:
            raise HostError(
                f"Process {self.pid} ({self._arguments[0]}) does not end although it was killed; "
                f"it is stuck in the kernel (see /proc/{self.pid}/stack).",
                step="end",
            )
