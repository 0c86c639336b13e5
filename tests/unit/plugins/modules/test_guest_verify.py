# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.modules import guest_verify


def test_addresses() -> None:
    assert guest_verify.addresses(["02:00.0", {"address": "0000:0A:00.1"}]) == ("0000:02:00.0", "0000:0a:00.1")


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (["nvme0"], r"^devices\[0\]: 'nvme0'"),
        (["02:00.0", {"vendor": "8086"}], r"^devices\[1\]: .*the one key address"),
        ([{"address": "02:00.0", "vendor": "8086"}], r"^devices\[0\]: .*the one key address"),
        ([{"address": "x"}], r"^devices\[0\].address: 'x'"),
        ([5], r"^devices\[0\]: 5 "),
        ([None], r"^devices\[0\]: None "),
    ],
)
def test_what_is_no_address(devices: list[t.Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        guest_verify.addresses(devices)
