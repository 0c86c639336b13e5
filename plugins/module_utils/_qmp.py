# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""A client of QEMU's monitor (QMP), which can also hand QEMU a descriptor."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError

Json = dict[str, t.Any]


class Refused(HostError):
    """QEMU did not do it; the message is its own, ``details["error_class"]`` its class of errors."""


class Monitor:
    """A conversation with a QEMU.

    Args:
        channel: a connected socket of the Unix family (descriptors travel over nothing else).
        timeout: seconds that an answer may take.

    Raises:
        HostError: nobody answers there as a QEMU does.
    """

    def __init__(self, channel: socket.socket, timeout: float = 60.0) -> None:
        self._channel = channel
        self._timeout = timeout
        self._rest = b""
        self._events: list[Json] = []
        if "QMP" not in self._read(time.monotonic() + timeout):
            raise HostError("What answers at QEMU's monitor is no QEMU.")
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: Json | None = None, descriptor: int | None = None) -> t.Any:
        """Run a command and return its answer.

        Args:
            command: its name.
            arguments: its arguments.
            descriptor: one that goes with it, for ``getfd``.

        Raises:
            Refused: QEMU says why not.
            HostError: no answer.
        """
        data = json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})}).encode() + b"\n"
        try:
            self._channel.settimeout(self._timeout)
            if descriptor is None:
                self._channel.sendall(data)
            else:
                # In one piece: the descriptor goes with the first byte, and QEMU takes it when it reads the command.
                socket.send_fds(self._channel, [data], [descriptor])
        except OSError as error:
            raise HostError(f"QEMU's monitor took no {command}: {error.strerror or error}.") from error
        deadline = time.monotonic() + self._timeout
        while True:
            answer = self._read(deadline)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                problem = answer["error"]
                raise Refused(str(problem.get("desc")), error_class=problem.get("class"), command=command)
            self._events.append(answer)

    def wait_for(self, event: str, timeout: float, **data: t.Any) -> Json | None:
        """The next event of that name with that data, or None when it does not come in time."""
        deadline = time.monotonic() + timeout
        while True:
            for index, one in enumerate(self._events):
                has = one.get("data") or {}
                if one.get("event") == event and all(has.get(key) == value for key, value in data.items()):
                    return self._events.pop(index)
            try:
                self._events.append(self._read(deadline))
            except _TooLate:
                return None

    def _read(self, deadline: float) -> Json:
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _TooLate("QEMU's monitor did not answer in time.")
            self._channel.settimeout(left)
            try:
                data = self._channel.recv(65536)
            except (TimeoutError, socket.timeout):
                continue
            except OSError as error:
                raise HostError(f"QEMU's monitor is gone: {error.strerror or error}.") from error
            if not data:
                raise HostError("QEMU's monitor is gone: QEMU has ended.")
            self._rest += data
        line, _end, self._rest = self._rest.partition(b"\n")
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                return answer
        raise HostError("QEMU's monitor answered with something that is no JSON object.")


class _TooLate(HostError):
    """Nothing came in time."""
