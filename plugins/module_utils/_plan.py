# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Plans: what a module is going to do, as data, before it does anything.

A planner (a function without side effects) returns a :class:`Plan`. Check mode shows it and stops; otherwise
:meth:`Plan.apply` runs its steps in order, and when one fails undoes those done before it in reverse order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import time
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._files import FileState, capture, remove, write_atomic

# A step's own words for "nothing there" in a diff.
ABSENT = ""

# Descriptors of the locks that this process holds (see _lock.py).
LOCKS: list[int] = []


@dataclasses.dataclass
class Step:
    """One change of the host, or one action that a change makes necessary.

    Attributes:
        summary: what it does, in the infinitive and with the thing named ("write /etc/…", "bind 0000:02:00.0 …").
        subject: what is changed (a path, a PCI address, a unit); the header of its diff. Empty: no diff of its own.
        before: state before, as text for the diff.
        after: state after, as text for the diff.
    """

    summary: str
    subject: str = ""
    before: str = ABSENT
    after: str = ABSENT

    def apply(self) -> None:
        """Do it. Must leave things as they were when it raises, or be safe to :meth:`undo` afterwards."""
        raise NotImplementedError

    def undo(self) -> None:
        """Take it back; only called when :meth:`apply` was called."""


@dataclasses.dataclass
class WriteFile(Step):
    """Write a whole file atomically, making its missing parent directories (mode 0755).

    Attributes:
        path: the file.
        content: what it shall hold.
        mode: mode of a file that is new; one that exists keeps its mode, owner and label unless ``enforce_mode``.
        enforce_mode: give an existing file ``mode`` too (for files that are wholly ours).
        for_boot_loader: as for :func:`write_atomic`.
    """

    path: str = ""
    content: bytes = b""
    mode: int = 0o644
    enforce_mode: bool = False
    for_boot_loader: bool = False

    def __post_init__(self) -> None:
        self._previous: FileState | None = None
        self._made: list[str] = []
        self._begun = False

    def apply(self) -> None:
        self._previous = capture(self.path)
        self._begun = True
        self._made = _make_parents(self.path)
        if self._previous is None:
            state = FileState(self.content, self.mode, os.geteuid(), os.getegid())
        else:
            mode = self.mode if self.enforce_mode else self._previous.mode
            state = dataclasses.replace(self._previous, content=self.content, mode=mode)
        write_atomic(self.path, state, self.for_boot_loader)

    def undo(self) -> None:
        # Looked at, not remembered: a signal may come right behind the replacement. And where the disk was full nothing
        # was replaced, and there is no room for putting it back either.
        if self._begun and capture(self.path) != self._previous:
            if self._previous is None:
                remove(self.path)
            else:
                write_atomic(self.path, self._previous, self.for_boot_loader)
        for directory in reversed(self._made):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


@dataclasses.dataclass
class RemoveFile(Step):
    """Remove a file, and those of its parent directories named in ``prune`` that are empty then."""

    path: str = ""
    prune: t.Sequence[str] = ()

    def __post_init__(self) -> None:
        self._previous: FileState | None = None
        self._pruned: list[tuple[str, os.stat_result]] = []

    def apply(self) -> None:
        self._previous = capture(self.path)
        remove(self.path)
        for directory in sorted(self.prune, key=len, reverse=True):
            with contextlib.suppress(OSError):
                status = os.stat(directory)
                os.rmdir(directory)
                self._pruned.append((directory, status))

    def undo(self) -> None:
        for directory, status in reversed(self._pruned):
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, status.st_mode & 0o7777)
                os.chown(directory, status.st_uid, status.st_gid)
        if self._previous is not None:
            write_atomic(self.path, self._previous)


@dataclasses.dataclass
class WriteAttribute(Step):
    """Write a sysfs or procfs attribute.

    Attributes:
        path: the attribute.
        value: what to write, newline included where the kernel wants one.
        undo_value: what to write to take it back; None where that needs no write.
        tolerate: errno values that mean "already so" (for example ENODEV of a device that is gone).
    """

    path: str = ""
    value: str = ""
    undo_value: str | None = None
    tolerate: t.Sequence[int] = ()

    def apply(self) -> None:
        self._write(self.value)

    def undo(self) -> None:
        if self.undo_value is not None:
            self._write(self.undo_value)

    def _write(self, value: str) -> None:
        try:
            # Unbuffered and in one write(): the kernel takes each write as one value.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, value.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in self.tolerate:
                raise


@dataclasses.dataclass
class Command(Step):
    """Run a command of the system; a status other than 0 is a failure that quotes its last words.

    Attributes:
        argv: command and arguments.
        undo_argv: command that takes it back; None where nothing needs taking back.
        timeout: seconds.
    """

    argv: t.Sequence[str] = ()
    undo_argv: t.Sequence[str] | None = None
    timeout: float = 120.0

    def apply(self) -> None:
        run(self.argv, self.timeout)

    def undo(self) -> None:
        if self.undo_argv is not None:
            run(self.undo_argv, self.timeout)
            self.undo_argv = None  # a step that builds on this one may take it back before its turn


@dataclasses.dataclass
class Action(Step):
    """A step given as functions, for what no other kind of step covers."""

    do: t.Callable[[], t.Any] | None = None
    take_back: t.Callable[[], t.Any] | None = None

    def apply(self) -> None:
        if self.do is not None:
            self.do()

    def undo(self) -> None:
        if self.take_back is not None:
            self.take_back()


def stays_removed() -> t.NoReturn:
    """What takes a removal back that cannot be: without it a failure would say that everything was put back."""
    raise HostError("what was removed of it stays removed")


@dataclasses.dataclass
class Plan:
    """Steps in the order in which they are to be done; empty: the host is as it should be."""

    steps: list[Step] = dataclasses.field(default_factory=list)

    @property
    def changed(self) -> bool:
        return bool(self.steps)

    def add(self, *steps: Step) -> None:
        self.steps.extend(steps)

    def summary(self) -> list[str]:
        """One line a step, for the result and for check mode."""
        return [step.summary for step in self.steps]

    def diff(self) -> list[dict[str, str]]:
        """The plan in Ansible's diff format: a before and after for each step that has a subject."""
        return [
            {
                "before_header": step.subject,
                "after_header": step.subject,
                "before": _terminated(step.before),
                "after": _terminated(step.after),
            }
            for step in self.steps
            if step.subject and step.before != step.after
        ]

    def apply(self) -> None:
        """Do every step; when one fails, take back what was done, in reverse order.

        Raises:
            HostError: a step failed. The message names the step, the reason, and what became of the others;
                ``details`` has ``failed_step``, ``undone`` and ``not_undone`` (lists of summaries).
        """
        started: list[Step] = []
        for step in self.steps:
            started.append(step)
            try:
                step.apply()
            except Exception as error:  # whatever went wrong, what was done must be taken back
                undone, not_undone = _take_back(started)
                raise _failure(step, error, undone, not_undone) from error
            except BaseException:  # SIGINT or SIGTERM turned into an exception: take back as well, then go
                _take_back(started)
                raise


def _terminated(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


def _take_back(started: list[Step]) -> tuple[list[str], list[str]]:
    undone: list[str] = []
    not_undone: list[str] = []
    for step in reversed(started):
        try:
            step.undo()
        except Exception as error:  # keep taking back the rest; what did not work is reported
            not_undone.append(f"{step.summary}: {reason(error)}")
        else:
            undone.append(step.summary)
    return undone, not_undone


def _failure(step: Step, error: Exception, undone: list[str], not_undone: list[str]) -> HostError:
    message = f"Could not {step.summary}: {reason(error)}."
    if not_undone:
        message += " Not everything could be taken back: " + "; ".join(not_undone) + "."
    else:
        message += " Everything was put back as it was."
    details = dict(error.details) if isinstance(error, HostError) else {}
    details.update(failed_step=step.summary, undone=undone, not_undone=not_undone)
    return HostError(message, **details)


def reason(error: BaseException) -> str:
    """An error in words, without a final full stop."""
    if isinstance(error, HostError):
        return error.message.rstrip(".")
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error).rstrip(".") or type(error).__name__


def _make_parents(path: str) -> list[str]:
    """Make the missing parents of a file; returns those made, outermost first."""
    missing: list[str] = []
    directory = os.path.dirname(path)
    while directory and not os.path.isdir(directory):
        missing.append(directory)
        directory = os.path.dirname(directory)
    made: list[str] = []
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o755)
            os.chmod(directory, 0o755)  # whatever the umask of the caller is
            made.append(directory)
    return made


def run(
    argv: t.Sequence[str],
    timeout: float = 120.0,
    stdin: str = "",
    keep_locks: bool = False,
    locale: t.Mapping[str, str] | None = None,
    exact: bool = False,
) -> str:
    """Run a command and return its standard output.

    Args:
        argv: command and arguments.
        timeout: seconds; it is killed then.
        stdin: text given to it.
        keep_locks: whether it holds our locks as well. When we are killed it goes on by itself, and the next run must
            not start before it has ended; not for a command that may leave a daemon behind.
        locale: variables of the language that it speaks; None: ``LC_ALL=C.UTF-8``.
        exact: whether bytes of its output that are not UTF-8 are kept (as ``surrogateescape`` has it); else they become
            U+FFFD, which can be shown.

    Raises:
        HostError: it is missing, was killed or ended with a status other than 0; quotes its last lines.
    """
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    if locale is None:
        environment["LC_ALL"] = "C.UTF-8"
    else:
        inherited = [name for name in environment if name in ("LANG", "LANGUAGE") or name.startswith("LC_")]
        for name in inherited:
            del environment[name]
        environment.update(locale)
    environment["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    try:
        done = subprocess.run(  # pylint: disable=ansible-bad-function
            list(argv),
            input=stdin.encode("utf-8", "surrogateescape"),
            capture_output=True,
            timeout=timeout,
            env=environment,
            check=False,
            pass_fds=LOCKS if keep_locks else (),
        )
    except FileNotFoundError as error:
        raise HostError(f"{argv[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise HostError(f"`{' '.join(argv)}` did not end within {timeout:.0f} s and was killed") from error
    if done.returncode != 0:
        words = (done.stderr or done.stdout).decode("utf-8", "replace").strip().splitlines()
        last = " / ".join(line.strip() for line in words[-4:]) or "it said nothing"
        raise HostError(
            f"`{' '.join(argv)}` ended with status {done.returncode}: {last}",
            stdout=done.stdout.decode("utf-8", "replace")[-4000:],
            stderr=done.stderr.decode("utf-8", "replace")[-4000:],
        )
    return done.stdout.decode("utf-8", "surrogateescape" if exact else "replace")


def wait_until(condition: t.Callable[[], bool], timeout: float, interval: float = 0.05) -> bool:
    """Poll a condition until it holds.

    Args:
        condition: asked at once, then every ``interval`` seconds.
        timeout: seconds after which the answer is False.
        interval: seconds between two questions.
    """
    deadline = time.monotonic() + timeout
    while True:
        if condition():
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(interval)
