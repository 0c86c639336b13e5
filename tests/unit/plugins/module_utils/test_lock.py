# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._lock import host_lock
from ansible_collections.iommufd.host.plugins.module_utils._plan import run

HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
os.write(descriptor, b"%d" % os.getpid())
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_waits_and_names_who_holds_the_lock(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "lock")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(HostError, match=f"process {holder.pid}"), host_lock(timeout=0.2, path=path):
            pass
        holder.communicate("")
    with host_lock(timeout=5, path=path):
        pass


def test_the_lock_is_given_back_after_an_error(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "lock")
    with pytest.raises(ValueError), host_lock(timeout=1, path=path):
        raise ValueError
    with host_lock(timeout=0.2, path=path):
        pass


@pytest.mark.parametrize("keep", [True, False])
def test_what_goes_on_after_we_were_killed_keeps_the_lock_if_told_to(tmp_path: pathlib.Path, keep: bool) -> None:
    path, stop = str(tmp_path / "lock"), tmp_path / "stop"
    os.mkfifo(stop)
    with host_lock(timeout=1, path=path):
        # It outlives `run`, as a command does whose caller is killed.
        run(["sh", "-c", f"(exec >/dev/null 2>&1; read line <{stop}) &"], keep_locks=keep)
    if keep:
        with pytest.raises(HostError, match="Another run"), host_lock(timeout=0.2, path=path):
            pass
    stop.write_text("end\n")
    with host_lock(timeout=5, path=path):
        pass


def test_who_may_not_open_the_lock_is_told_why(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *_arguments: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "open", refuse)
    words = r"lock cannot be opened: Permission denied\. .*become"
    with pytest.raises(HostError, match=words), host_lock(path=str(tmp_path / "lock")):
        pass
