# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._lab_run import clean, logged, tail
from ansible_collections.iommufd.host.plugins.module_utils._plan import wait_until


def test_a_console_as_plain_text() -> None:
    console = (
        "\x1b[2J\x1b[1;1HBooting\r\n\r\n[    0.1] Linux\r\n"
        "\x1b[K[\x1b[0;31m*\x1b[0;1;31m*\x1b[0m    ] (1 of 2) Job x/start running\r"
        "\x1b[K[\x1b[0;32m  OK  \x1b[0m] Started x.\r\nlogin: \x07\x00"
    )
    assert clean(console) == ["Booting", "[    0.1] Linux", "[  OK  ] Started x.", "login:"]


def test_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(100000)))
    assert tail(log, 2) == ["line 99998", "line 99999"]
    assert tail(tmp_path / "none") == []


def test_a_failure_shows_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    logged(["sh", "-c", "echo one"], "counting", log, 10)
    with pytest.raises(HostError, match=r"counting failed with status 3; the last lines of .*/log") as caught:
        logged(["sh", "-c", "echo two >&2; exit 3"], "counting", log, 10)
    assert caught.value.details["log"] == [
        "$ sh -c echo one",
        "one",
        "$ sh -c echo two >&2; exit 3",
        "two",
    ]


def test_a_missing_command_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="counting: no-such-tool is not installed"):
        logged(["no-such-tool"], "counting", tmp_path / "log", 10)


def test_what_is_late_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "pid"
    started = time.monotonic()
    with pytest.raises(HostError, match=r"sleeping did not end within 1 s"):
        logged(["sh", "-c", f"sleep 100 & echo $! >{child}; wait"], "sleeping", None, 1.0)
    assert time.monotonic() - started < 10
    pid = int(child.read_text())
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists() or _is_dead(pid), 5)


def _is_dead(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_path_has_the_tools_of_the_system(tmp_path: Path) -> None:
    log = tmp_path / "log"
    logged(["sh", "-c", "echo $PATH"], "asking", log, 10)
    assert "/usr/sbin" in tail(log)[-1]
