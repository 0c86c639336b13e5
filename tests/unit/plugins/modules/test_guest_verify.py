# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import typing as t

import pytest
from ansible.module_utils.testing import patch_module_args

from ansible_collections.iommufd.host.plugins.modules import guest_verify
from ansible_collections.iommufd.host.tests.unit.machine import Machine


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (["nvme0"], "devices[0]: 'nvme0' is not accepted"),
        (["02:00.0", {"vendor": "8086"}], "devices[1]: "),
        ([{"class": "sata"}], "what names devices of this host; none is like it"),
        (["03:00.0"], "devices[0]: '03:00.0' is not accepted: there is no such device"),
    ],
)
def test_devices_are_selectors(
    machine: Machine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    devices: list[t.Any],
    words: str,
) -> None:
    machine.pci("0000:02:00.0")
    monkeypatch.setattr(guest_verify, "Host", lambda: machine.host)
    with patch_module_args({"devices": devices}), pytest.raises(SystemExit):
        guest_verify.main()
    assert words in json.loads(capsys.readouterr().out)["msg"]
