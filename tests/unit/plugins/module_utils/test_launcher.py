# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import re
import signal
import stat
import time
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _evidence, _launcher
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._launcher import Limits, Process, User

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up root")


@pytest.fixture
def user() -> User:
    return _launcher.find_user("nobody")


def output(process: Process) -> bytes:
    data = b""
    while process.wait(5.0) is None:
        pass
    while True:
        try:
            more = os.read(process.words, 65536)
        except BlockingIOError:
            return data
        if not more:
            return data
        data += more


def running(process: int) -> bool:
    """Whether a process exists and is not only waiting to be reaped."""
    try:
        with open(f"/proc/{process}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(process: int) -> bool:
    deadline = time.monotonic() + 10
    while running(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running(process)


# -- users and nodes


def test_unknown_user() -> None:
    with pytest.raises(OptionError, match=r"no-such-user.*no such user"):
        _launcher.find_user("no-such-user")


def test_root_is_refused() -> None:
    with pytest.raises(OptionError, match="root"):
        _launcher.find_user("root")


def test_open_node() -> None:
    status = os.stat("/dev/null")
    number = (os.major(status.st_rdev), os.minor(status.st_rdev))
    descriptor = _launcher.open_node("/dev/null", number)
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match=r"not the device.*sysfs says 10:262"):
        _launcher.open_node("/dev/null", (10, 262))
    assert set(os.listdir("/proc/self/fd")) == before


def test_another_device_is_not_even_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", lambda path, *_more: pytest.fail(f"{path} was opened"))
    with pytest.raises(HostError, match="not the device"):
        _launcher.open_node("/dev/null", (10, 262))


def test_open_node_missing() -> None:
    with pytest.raises(HostError, match=r"/dev/no-such-node cannot be opened: No such file"):
        _launcher.open_node("/dev/no-such-node", (1, 1))


def test_accounting_of_what_is_no_iommufd() -> None:
    descriptor = os.open("/dev/null", os.O_RDWR)
    try:
        with pytest.raises(HostError, match="accounted per process"):
            _launcher.account_per_process(descriptor)
    finally:
        os.close(descriptor)


@needs_root
def test_denied(user: User) -> None:
    refusals = _launcher.denied(user, ["/dev/mem", "/dev/null", "/dev/no-such-node"])
    assert refusals["/dev/null"] is None
    assert refusals["/dev/mem"] in ("Permission denied", "No such file or directory", "Operation not permitted")
    assert refusals["/dev/no-such-node"] == "No such file or directory"
    assert os.geteuid() == 0


# -- memory files


@needs_root
def test_memory_file_is_sealed_and_the_users(user: User) -> None:
    descriptor = _launcher.memory_file("test", b"content", user)
    try:
        status = os.fstat(descriptor)
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o400, user.uid)
        for attempt in (lambda: os.pwrite(descriptor, b"x", 0), lambda: os.ftruncate(descriptor, 0)):
            with pytest.raises(PermissionError):
                attempt()
        with Process(["/bin/cat", f"/proc/self/fd/{descriptor}"], user, Limits(1 << 20), [descriptor]) as process:
            assert output(process) == b"content"
    finally:
        os.close(descriptor)


# -- processes


@needs_root
def test_process_has_nothing_of_root(user: User) -> None:
    with Process(["/bin/cat", "/proc/self/status", "/proc/self/limits"], user, Limits(3 << 20), []) as process:
        text = output(process).decode()
    fields = dict(re.findall(r"^(\w+):[ \t]*(.*)$", text, re.MULTILINE))
    assert fields["Uid"].split() == [str(user.uid)] * 4
    assert fields["Gid"].split() == [str(user.gid)] * 4
    assert fields["Groups"].strip() == ""
    for name in _evidence.CAPABILITY_SETS:
        assert int(fields[name], 16) == 0, name
    assert fields["NoNewPrivs"] == "1"
    assert re.search(rf"^Max locked memory +{3 << 20} +{3 << 20} ", text, re.MULTILINE)
    assert re.search(r"^Max core file size +0 +0 ", text, re.MULTILINE)


@needs_root
def test_process_inherits_what_it_was_given_and_no_more(user: User) -> None:
    given = os.open("/dev/zero", os.O_RDONLY)
    leaked = os.open("/dev/full", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    with Process(["/bin/ls", "-l", "/proc/self/fd"], user, Limits(1 << 20), [given]) as process:
        found = dict(re.findall(r"(\d+) -> (\S+)", output(process).decode()))
    os.close(given)
    os.close(leaked)
    assert found[str(given)] == "/dev/zero"
    assert found["0"] == "/dev/null"
    assert found["1"] == found["2"]
    # Beside these ls has nothing open but the directory that it lists.
    others = [target for number, target in found.items() if number not in ("0", "1", "2", str(given))]
    assert all(re.fullmatch(r"/proc/\d+/fd", target) for target in others), found


@needs_root
def test_same_open_file(user: User) -> None:
    ours = os.open("/dev/null", os.O_RDWR)
    other = os.open("/dev/null", os.O_RDWR)
    with Process(["/bin/sleep", "30"], user, Limits(1 << 20), [ours, other]) as process:
        assert _launcher.same_open_file(process.pid, ours, ours) is True
        assert _launcher.same_open_file(process.pid, other, ours) is False
        assert _launcher.same_open_file(process.pid, 999, ours) is None
    assert _launcher.same_open_file(process.pid, ours, ours) is None


@needs_root
def test_observe_counts_by_device_number(user: User) -> None:
    null = os.stat("/dev/null").st_rdev
    first, second = os.open("/dev/null", os.O_RDWR), os.open("/dev/null", os.O_RDWR)
    with Process(["/bin/sleep", "30"], user, Limits(1 << 20), [first, second]) as process:
        state = _evidence.observe(Host(), process.pid, (os.major(null), os.minor(null)))
    # Standard input is /dev/null as well.
    assert sorted(state.iommu) == sorted([0, first, second])
    assert state.memlock == 1 << 20
    assert state.threads[0]["NoNewPrivs"] == "1"
    assert (state.cdevs, state.legacy) == ({}, [])


@needs_root
@pytest.mark.parametrize("binary", ["/no/such/binary", "/etc/passwd"])
def test_process_that_cannot_start_says_why(user: User, binary: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match=rf"{binary} could not be started as nobody: start: "):
        Process([binary], user, Limits(0), []).__enter__()
    assert set(os.listdir("/proc/self/fd")) == before


@needs_root
def test_leaving_ends_everything_in_the_session(user: User) -> None:
    script = "sleep 300 & echo $!; exec sleep 301"
    with Process(["/bin/sh", "-c", script], user, Limits(0), []) as process:
        deadline = time.monotonic() + 10
        child = b""
        while not child.endswith(b"\n") and time.monotonic() < deadline:
            try:
                child += os.read(process.words, 100)
            except BlockingIOError:
                time.sleep(0.01)
        assert running(int(child))
    assert gone(process.pid)
    assert gone(int(child))
    assert process.status == -signal.SIGKILL


@needs_root
def test_the_process_dies_with_its_launcher(user: User) -> None:
    reader, writer = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        with Process(["/bin/sleep", "300"], user, Limits(0), []) as process:
            os.write(writer, str(process.pid).encode())
            time.sleep(300)
        os._exit(0)
    try:
        started = int(os.read(reader, 32))
        assert running(started)
    finally:
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
        os.close(reader)
        os.close(writer)
    assert gone(started)


@needs_root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_the_process(user: User, number: signal.Signals) -> None:
    """As Ansible's adapter has it: the signal becomes an exception, which leaves the context."""

    def interrupted(_number: int, _frame: object) -> t.NoReturn:
        raise KeyboardInterrupt

    reader, writer = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        status = 1
        try:
            signal.signal(number, interrupted)
            with Process(["/bin/sleep", "300"], user, Limits(0), []) as process:
                os.write(writer, str(process.pid).encode())
                time.sleep(300)
        except KeyboardInterrupt:
            status = 7 if process.status == -signal.SIGKILL else 8
        finally:
            os._exit(status)
    try:
        started = int(os.read(reader, 32))
        assert running(started)
        os.kill(launcher, number)
        assert os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1]) == 7
    finally:
        os.close(reader)
        os.close(writer)
    assert gone(started)


@needs_root
def test_exit_status(user: User) -> None:
    with Process(["/bin/sh", "-c", "exit 7"], user, Limits(0), []) as process:
        assert process.wait(10) == 7


@pytest.mark.parametrize("flags", ["fpu vme", ""])
def test_kvm_needs_the_processors_flag(tmp_path: t.Any, flags: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    descriptor, why = _launcher.open_kvm(Host(str(tmp_path)))
    assert descriptor is None
    assert "neither vmx nor svm" in why
