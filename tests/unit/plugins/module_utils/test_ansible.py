# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import typing as t

import pytest
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.testing import patch_module_args

from ansible_collections.iommufd.host.plugins.module_utils._ansible import Outcome, Work, run_module
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._plan import Action, Plan, WriteFile


def outcome(work: Work, capsys: pytest.CaptureFixture[str], **arguments: t.Any) -> dict[str, t.Any]:
    with patch_module_args(arguments), pytest.raises(SystemExit):
        run_module(AnsibleModule({}, supports_check_mode=True), work, lock=False)
    answer: dict[str, t.Any] = json.loads(capsys.readouterr().out)
    return answer


def writing(path: pathlib.Path) -> Work:
    def work(module: AnsibleModule) -> Outcome:
        steps = [] if path.exists() else [WriteFile("write it", str(path), "", "x", path=str(path), content=b"x")]
        return Outcome(Plan(list(steps)), {"value": "planned"}, after=lambda: {"value": "seen"})

    return work


def test_a_plan_is_applied_verified_and_then_empty(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = outcome(writing(tmp_path / "f"), capsys)
    assert (first["changed"], first["plan"], first["value"]) == (True, ["write it"], "seen")
    second = outcome(writing(tmp_path / "f"), capsys)
    assert (second["changed"], second["plan"]) == (False, [])


def test_check_mode_shows_and_does_nothing(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = outcome(writing(tmp_path / "f"), capsys, _ansible_check_mode=True, _ansible_diff=True)
    assert (answer["changed"], answer["value"]) == (True, "planned")
    assert answer["diff"][0]["after"] == "x\n"
    assert not (tmp_path / "f").exists()


def test_an_error_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    def work(module: AnsibleModule) -> Outcome:
        raise OptionError("mode", "abc", "an octal mode such as 0660")

    answer = outcome(work, capsys)
    assert answer["failed"]
    assert answer["msg"] == "mode: 'abc' is not accepted. Accepted: an octal mode such as 0660."


def test_a_module_starts_without_what_few_need() -> None:
    what = "ansible_collections.iommufd.host.plugins.modules.vfio_bind"
    script = f"import {what}, sys; print('ansible.module_utils.urls' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_second_signal_does_not_end_the_way_back(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "f"
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}

    def work(module: AnsibleModule) -> Outcome:
        # As systemd ends a session: both at once.
        step = WriteFile("write it", path=str(path), content=b"x")
        first = Action("be taken back", take_back=lambda: os.kill(os.getpid(), signal.SIGHUP))
        return Outcome(Plan([step, first, Action("end", do=lambda: os.kill(os.getpid(), signal.SIGTERM))]))

    try:
        with pytest.raises(KeyboardInterrupt):
            outcome(work, capsys)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not path.exists()
