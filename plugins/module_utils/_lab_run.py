# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Long commands with a log, and what a log or a console said last."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import typing as t
from pathlib import Path

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError

_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def logged(argv: t.Sequence[str], what: str, log: Path | None, timeout: float) -> None:
    """Run a command to its end, with its output added to a log.

    Args:
        argv: command and arguments.
        what: what it does, for messages ("making the file system").
        log: the log; None where only the failure counts.
        timeout: seconds.

    Raises:
        HostError: it is missing, ended with a status other than 0, or was ended because it was late; the log's last
            lines are its detail ``log``. Where this is left before the command has ended, it and its children are gone.
    """
    environment = dict(os.environ, PATH=_SEARCH_PATH, LC_ALL="C.UTF-8", DEBIAN_FRONTEND="noninteractive")
    with open(log or os.devnull, "ab") as output:
        output.write(f"$ {' '.join(argv)}\n".encode())
        output.flush()
        try:
            process = subprocess.Popen(  # pylint: disable=ansible-bad-function
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise HostError(f"{what}: {argv[0]} is not installed") from error
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise _failure(f"{what} did not end within {timeout:.0f} s", log) from None
        finally:
            _end_group(process)
    if status != 0:
        raise _failure(f"{what} failed with status {status}", log)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a command and its children: asked first, so that they can clean up, then made to."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return


def _failure(text: str, log: Path | None) -> HostError:
    if log is None:
        return HostError(text)
    return HostError(f"{text}; the last lines of {log} are below", log=tail(log))


def tail(path: Path, lines: int = 25) -> list[str]:
    """The last lines of a log as plain text, without the pictures of progress; empty where there is no log."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 400 * lines - 4096))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return clean(text)[-lines:]


_ESCAPE = re.compile(r"\x1b(\[[0-9;?=]*[ -/]*[@-~]|\][^\x07]*\x07|[@-Z\\^_])")
# systemd's moving stars while it waits for a job.
_STARS = re.compile(r"\[[* ]{6}\] ")


def clean(text: str) -> list[str]:
    """The lines of a terminal's text without escape sequences, control characters, blank lines and moving stars."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\n", _ESCAPE.sub("", text))
    return [line.rstrip() for line in text.split("\n") if line.strip() and not _STARS.match(line)]
