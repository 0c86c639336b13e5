# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import typing as t

import pytest
from ansible.module_utils.testing import patch_module_args

from ansible_collections.iommufd.host.plugins.modules import iommufd_info
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_page import to_page
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import build_report, to_json
from ansible_collections.iommufd.host.tests.unit.machine import Machine


def run(capsys: pytest.CaptureFixture[str], **arguments: t.Any) -> dict[str, t.Any]:
    with patch_module_args(arguments), pytest.raises(SystemExit):
        iommufd_info.main()
    result: dict[str, t.Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("check", [False, True])
def test_a_captured_tree(machine: Machine, capsys: pytest.CaptureFixture[str], check: bool) -> None:
    machine.pci("0000:01:00.0", driver="nvme", group=3)
    result = run(capsys, root=str(machine.root), _ansible_check_mode=check)
    assert result["changed"] is False
    assert [device["address"] for device in result["devices"]] == ["0000:01:00.0"]
    assert {"kernel", "iommu", "nodes", "groups", "devices", "qemu", "libvirt", "checks"} <= set(result)


def test_packed_it_says_the_same(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.pci("0000:01:00.0", driver="nvme", group=3)
    plain = run(capsys, root=str(machine.root))
    packed = run(capsys, root=str(machine.root), packed=True)
    assert packed["checks"] == plain["checks"]
    assert set(packed) - {"checks", "packed"} <= {"changed", "invocation", "warnings"}
    reports = [
        list(to_json(build_report({"h": result}, "2026-11-22T11:20:00Z", "0.2.0"))) for result in (plain, packed)
    ]
    assert reports[0] == reports[1]
    pages = [
        "".join(to_page(build_report({"h": result}, "2026-11-22T11:20:00Z", "0.2.0"))) for result in (plain, packed)
    ]
    assert pages[0] == pages[1]


def test_a_root_that_is_not_there(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, root=f"{machine.root}/nowhere")
    assert result["failed"] is True
    assert result["msg"].startswith("root: '")
    assert "Accepted: a directory that exists." in result["msg"]
