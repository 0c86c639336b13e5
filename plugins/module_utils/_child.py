# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""A process of its own for writes to sysfs that may block in the kernel.

Two reasons. A driver that does not let go of a device blocks the writer in the kernel, where no signal reaches it; it
must not be us who wait there. And the writes of one request belong together: the child finishes them even when its
parent is killed in between, so that a device is never left half way.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import time
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._plan import reason, wait_until

Request = t.Mapping[str, t.Any]

# What ends a module; none of it ends the child.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

_REQUESTS, _ANSWERS = 3, 4


class Stuck(HostError):
    """A request did not end in time; it still waits in the kernel."""


class Child:
    """The process. It is started with the first request and ends with its parent.

    Args:
        work: does one request, in the child; what it raises comes back as a HostError.
    """

    def __init__(self, work: t.Callable[[Request], None]) -> None:
        self._work = work
        self._process: int | None = None
        self._left: int | None = None
        self._requests = self._answers = -1

    def do(
        self, request: Request, back: Request | None, timeout: float, stuck: t.Callable[[int], str] | None = None
    ) -> None:
        """Have a request done and wait for its end, but not for ever.

        Args:
            request: what is to be done.
            back: what the child does on its own when nobody waits any more at the end of the request (it ended only
                after the time-out, or the parent was killed), so that all is as it was before; None: nothing.
            timeout: seconds.
            stuck: words for the time-out, given the child's process id.

        Raises:
            Stuck: it did not end in time. The child is left to itself; the next request gets a new one.
            HostError: it failed.
        """
        process = self._start()
        try:
            os.write(self._requests, json.dumps([dict(request), None if back is None else dict(back)]).encode() + b"\n")
            answer = self._await(process, timeout, stuck)
        except BaseException:  # a signal, too, ends only our waiting
            self._leave()
            raise
        words = json.loads(answer)
        if words:
            raise HostError(words)

    def _await(self, process: int, timeout: float, stuck: t.Callable[[int], str] | None) -> bytes:
        answer = b""
        deadline = time.monotonic() + timeout
        while not answer.endswith(b"\n"):
            ready, _writable, _failed = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                words = stuck(process) if stuck is not None else f"it did not end within {timeout:g} s"
                raise Stuck(words, stuck_process=process)
            chunk = os.read(self._answers, 65536)
            if not chunk:
                _pid, status = os.waitpid(process, 0)
                raise HostError(f"the process that wrote to sysfs ended with status {status}")
            answer += chunk
        return answer

    def _start(self) -> int:
        if self._process is None:
            request_reader, self._requests = os.pipe()
            self._answers, answer_writer = os.pipe()
            # A signal to us both must not send the child along our way back.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                self._process = os.fork()
                if self._process == 0:
                    _live(self._work, request_reader, answer_writer)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(request_reader)
            os.close(answer_writer)
        return self._process

    def _leave(self) -> None:
        """Leave the child to itself: it sees that nobody waits for its answer."""
        os.close(self._requests)
        os.close(self._answers)
        self._left, self._process = self._process, None

    def is_through(self, seconds: float) -> bool:
        """Whether nothing of the last request is under way any more, neither it nor what puts it back.

        Args:
            seconds: how long to wait for that.
        """

        def ended() -> bool:
            try:
                return self._left is None or os.waitpid(self._left, os.WNOHANG)[0] != 0
            except ChildProcessError:
                return True

        return wait_until(ended, seconds, 0.02)


def _live(work: t.Callable[[Request], None], requests: int, answers: int) -> t.NoReturn:
    """The child's whole life. It holds on to nothing of its parent: a child stuck in the kernel must keep neither the
    parent's lock nor the pipes on which Ansible waits for the module's end."""
    try:
        for number in (*_SIGNALS, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.setsid()
        # First out of the way of the numbers that they get next.
        requests, answers = (fcntl.fcntl(end, fcntl.F_DUPFD, _ANSWERS + 1) for end in (requests, answers))
        null = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.dup2(requests, _REQUESTS)
        os.dup2(answers, _ANSWERS)
        limit = os.sysconf("SC_OPEN_MAX")
        os.closerange(_ANSWERS + 1, limit if 0 < limit < 1 << 16 else 1 << 16)
        with os.fdopen(_REQUESTS, "rb") as lines:
            for line in lines:
                request, back = json.loads(line)
                if not _answer(work, request) and back is not None:
                    work(back)
    finally:
        os._exit(0)


def _answer(work: t.Callable[[Request], None], request: Request) -> bool:
    """Do one request and say how it went; False when nobody listens any more."""
    words = ""
    try:
        work(request)
    except Exception as error:  # whatever it is, the parent must hear of it
        words = reason(error) or "it failed"
    try:
        os.write(_ANSWERS, json.dumps(words).encode() + b"\n")
    except BrokenPipeError:
        return False
    return True
