# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib
import shutil
import types
import typing as t

import pytest
from ansible.errors import AnsibleActionFail

from ansible_collections.iommufd.host.plugins.action import qemu_install as action
from ansible_collections.iommufd.host.plugins.module_utils import (
    _ansible,
    _qemu_apparmor,
    _qemu_artefact,
    _qemu_install,
)
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.modules import qemu_install

Result = dict[str, t.Any]

SCRIPT = """#!/bin/sh
echo "QEMU emulator version 10.0.13"
printf '  iommufd\\n  iommufd=<link>\\n  fd=<str>\\n'
"""


def archive(tmp_path: pathlib.Path, key: str) -> str:
    stage = tmp_path / key
    (stage / "bin").mkdir(parents=True)
    (stage / "bin/qemu-system-x86_64").write_text(SCRIPT)
    (stage / "bin/qemu-system-x86_64").chmod(0o755)
    manifest = {
        "format": _qemu_artefact.FORMAT,
        "key": key,
        "version": "10.0.13",
        "decides": {"builder": {"machine": os.uname().machine}},
        "binaries": {"x86_64": {"version": "10.0.13", "iommufd": True, "passing": True}},
        "files": _qemu_artefact.list_files(str(stage)),
    }
    path = str(tmp_path / f"{key}.tar.xz")
    _qemu_artefact.pack(str(stage), manifest, path, 1)
    return path


class Action(action.ActionModule):
    """The action plugin with a directory of this machine as the host."""

    def __init__(self, tmp_path: pathlib.Path, check_mode: bool = False, **arguments: t.Any) -> None:
        self._task = types.SimpleNamespace(args=arguments, check_mode=check_mode)
        (tmp_path / "remote").mkdir(exist_ok=True)
        shell = types.SimpleNamespace(tmpdir=str(tmp_path / "remote"), join_path=os.path.join)
        self._connection = types.SimpleNamespace(_shell=shell)
        self.sent: list[str] = []
        self.calls = 0

    def _call(self, arguments: Result, task_vars: Result | None) -> Result:
        self.calls += 1
        parameters = {name: spec.get("default") for name, spec in qemu_install.ARGUMENT_SPEC.items()}
        parameters.update({name: value for name, value in arguments.items() if value is not None})
        module = types.SimpleNamespace(params=parameters, check_mode=self._task.check_mode, _diff=True)
        module.warn = lambda text: None
        try:
            return _ansible._carry_out(t.cast(t.Any, module), qemu_install.work)
        except HostError as error:
            return {"failed": True, "changed": False, "msg": error.message, **error.details}

    def _find_needle(self, dirname: str, needle: str) -> str:
        return needle

    def _transfer_file(self, local_path: str, remote_path: str) -> None:
        self.sent.append(local_path)
        shutil.copy(local_path, remote_path)

    def _fixup_perms2(self, *arguments: t.Any, **more: t.Any) -> None:
        pass

    def _remove_tmp_path(self, tmp_path: str | None, force: bool = False) -> None:
        shutil.rmtree(str(tmp_path))


A = "a" * 32
B = "b" * 32


@pytest.fixture(autouse=True)
def directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_qemu_install, "DIRECTORY", str(tmp_path / "opt/qemu"))
    for name in ("ABSTRACTION", "BASE", "RULES_FILE"):
        monkeypatch.setattr(_qemu_apparmor, name, str(tmp_path / "no-apparmor"))
    return str(tmp_path / "opt/qemu")


def test_sent_once_and_then_never_again(tmp_path: pathlib.Path, directory: str) -> None:
    path = archive(tmp_path, A)
    planned = Action(tmp_path, check_mode=True, src=path)
    found = planned.install({}, None)
    assert found["changed"] and planned.sent == [] and not os.path.exists(directory)
    assert found["plan"] == [f"unpack QEMU {A} and check it", f"make QEMU {A} the current one"]
    first = Action(tmp_path, src=path)
    found = first.install({}, None)
    assert found["changed"] and first.sent == [path] and not (tmp_path / "remote").exists()
    assert found["emulators"] == {"x86_64": f"{directory}/current/bin/qemu-system-x86_64"}
    assert (found["key"], found["previous"], found["needs_archive"]) == (A, None, False)
    second = Action(tmp_path, src=path)
    found = second.install({}, None)
    assert (found["changed"], second.sent, second.calls) == (False, [], 1)


def test_check_mode_needs_no_archive_that_was_only_about_to_be_fetched(tmp_path: pathlib.Path) -> None:
    """qemu_build fetches nothing in check mode, and tells the path all the same."""
    arguments = {"src": str(tmp_path / "not-yet.tar.xz"), "key": A}
    planned = Action(tmp_path, check_mode=True, **arguments).install({}, None)
    assert planned["plan"] == [f"unpack QEMU {A} and check it", f"make QEMU {A} the current one"]
    Action(tmp_path, src=archive(tmp_path, A)).install({}, None)
    assert not Action(tmp_path, check_mode=True, **arguments).install({}, None)["changed"]
    with pytest.raises(AnsibleActionFail, match="cannot be read"):
        Action(tmp_path, **arguments).install({}, None)


def test_forth_and_back(tmp_path: pathlib.Path) -> None:
    Action(tmp_path, src=archive(tmp_path, A)).install({}, None)
    found = Action(tmp_path, src=archive(tmp_path, B)).install({}, None)
    assert (found["key"], found["previous"]) == (B, A)
    found = Action(tmp_path, key=A).install({}, None)
    assert (found["key"], found["previous"], found["changed"]) == (A, B, True)
    assert not Action(tmp_path, key=A).install({}, None)["changed"]
    lacking = Action(tmp_path, key="c" * 32).install({}, None)
    assert lacking["failed"] and "is not on this host; name its archive" in lacking["msg"]
    assert Action(tmp_path, state="absent").install({}, None)["changed"]
    assert not Action(tmp_path, state="absent").install({}, None)["changed"]


def test_an_archive_that_is_on_the_host(tmp_path: pathlib.Path) -> None:
    one = Action(tmp_path, src=archive(tmp_path, A), remote_src=True)
    assert one.install({}, None)["key"] == A and one.sent == []


def test_what_is_no_archive_is_told_before_anything(tmp_path: pathlib.Path) -> None:
    path = archive(tmp_path, A)
    with pytest.raises(AnsibleActionFail, match=r"the key b+ was asked for"):
        Action(tmp_path, src=path, key=B).install({}, None)
    with open(path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(AnsibleActionFail, match="truncated or damaged"):
        Action(tmp_path, src=path).install({}, None)
    assert "32 hexadecimal digits" in Action(tmp_path, key="../x").install({}, None)["msg"]
