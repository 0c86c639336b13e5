# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The module host_plan at its edges; what it plans is in test_site.py and test_records.py."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible.module_utils.testing import patch_module_args

from ansible_collections.iommufd.host.plugins.module_utils import _survey
from ansible_collections.iommufd.host.plugins.modules import host_plan
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import build_report
from ansible_collections.iommufd.host.tests.unit.machine import Machine


def test_a_plan_that_is_impossible_has_the_survey_nevertheless(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.pci("0000:01:00.0", driver="nvme", group=3)
    monkeypatch.setattr(host_plan, "Host", lambda: machine.host)
    arguments = {"roles": ["devices"], "devices": {"list": ["0000:09:00.0"]}, "survey": True}
    with patch_module_args(arguments), pytest.raises(SystemExit):
        host_plan.main()
    result: dict[str, t.Any] = json.loads(capsys.readouterr().out)
    assert result["failed"]
    assert result["role"] == "devices"
    assert "0000:09:00.0" in result["msg"]
    plain = _survey.survey(machine.host)
    read = [build_report({"h": one}, "", None)["hosts"]["h"] for one in (plain, result["survey"])]
    assert read[0]["checks"] == read[1]["checks"]
    assert dict(read[1]["survey"]) == {name: value for name, value in plain.items() if name != "checks"}
