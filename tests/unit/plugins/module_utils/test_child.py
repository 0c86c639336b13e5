# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib
import signal
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._child import Child, Stuck
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._plan import wait_until


def work(request: t.Mapping[str, t.Any]) -> None:
    """Writes its process id to a file; a FIFO blocks it until somebody reads."""
    if "signal" in request:
        os.kill(os.getpid(), request["signal"])
    if "begun" in request:
        pathlib.Path(request["begun"]).touch()
    descriptor = os.open(request["path"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    os.close(descriptor)


def test_requests_are_done_in_one_process_that_is_not_ours(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "seen")
    child = Child(work)
    child.do({"path": path}, None, 10)
    child.do({"path": path}, None, 10)
    first, second = pathlib.Path(path).read_text().split()
    assert first == second != str(os.getpid())


def test_what_fails_is_told_and_the_next_request_is_done(tmp_path: pathlib.Path) -> None:
    child = Child(work)
    with pytest.raises(HostError, match="No such file or directory"):
        child.do({"path": str(tmp_path / "no" / "where")}, None, 10)
    child.do({"path": str(tmp_path / "seen")}, None, 10)
    assert (tmp_path / "seen").exists()


def test_what_blocks_is_left_and_puts_itself_back(tmp_path: pathlib.Path) -> None:
    blocking, back = str(tmp_path / "blocking"), tmp_path / "back"
    os.mkfifo(blocking)
    child = Child(work)
    with pytest.raises(Stuck, match="stuck in process") as caught:
        child.do({"path": blocking}, {"path": str(back)}, 0.2, lambda process: f"stuck in process {process}")
    child.do({"path": str(tmp_path / "next")}, None, 10)
    assert not back.exists()
    with open(blocking, "rb") as reader:
        assert reader.read().split() == [str(caught.value.details["stuck_process"]).encode()]
    assert wait_until(back.exists, 5)


def test_a_child_that_dies_is_told(tmp_path: pathlib.Path) -> None:
    child = Child(work)
    with pytest.raises(HostError, match="ended with status 9"):
        child.do({"signal": signal.SIGKILL}, None, 10)
    child.do({"path": str(tmp_path / "next")}, None, 10)


def test_a_request_that_has_begun_is_finished_when_the_parent_is_killed(tmp_path: pathlib.Path) -> None:
    blocking, begun, back = str(tmp_path / "blocking"), tmp_path / "begun", tmp_path / "back"
    os.mkfifo(blocking)
    parent = os.fork()
    if parent == 0:
        try:
            Child(work).do({"path": blocking, "begun": str(begun)}, {"path": str(back)}, 60)
        finally:
            os._exit(0)
    assert wait_until(begun.exists, 10)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    with open(blocking, "rb") as reader:
        assert reader.read()
    assert wait_until(back.exists, 5)


def test_whether_a_request_is_through(tmp_path: pathlib.Path) -> None:
    blocking, back = str(tmp_path / "blocking"), tmp_path / "back"
    os.mkfifo(blocking)
    child = Child(work)
    assert child.is_through(0)
    with pytest.raises(Stuck):
        child.do({"path": blocking}, {"path": str(back)}, 0.2)
    assert not child.is_through(0.2)
    with open(blocking, "rb") as reader:
        reader.read()
    assert child.is_through(10)
    assert back.exists()
    assert child.is_through(0)
