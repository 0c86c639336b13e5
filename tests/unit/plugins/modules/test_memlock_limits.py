# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options of memlock_limits as they become what the core takes."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _task_memlock_limits as memlock_limits
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.tests.unit.machine import Machine


@pytest.mark.parametrize("given", [{}, {"guests": ["4G"], "limit": "4G"}, {"guests": []}])
def test_guests_or_a_limit_but_not_both(given: dict[str, t.Any]) -> None:
    with pytest.raises(OptionError, match=r"^guests: .*one of them is needed"):
        memlock_limits.parse_amount({"guests": None, "limit": None, **given})


def test_services_only(machine: Machine) -> None:
    params = {"units": ["guest@.service"], "libvirt": False}
    assert memlock_limits.parse_units(machine.host, params) == ["guest@.service"]
    with pytest.raises(OptionError, match=r"^units\[0\]: .*start no process"):
        memlock_limits.parse_units(machine.host, {"units": ["machine.slice"], "libvirt": False})
    with pytest.raises(HostError, match=r"neither virtqemud.service nor libvirtd.service"):
        memlock_limits.parse_units(machine.host, {"units": [], "libvirt": True})
