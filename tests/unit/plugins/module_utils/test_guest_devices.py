# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import parse_devices
from ansible_collections.iommufd.host.plugins.module_utils._survey import survey
from ansible_collections.iommufd.host.tests.unit.machine import Machine

UUID = "83B8F4F2-509F-382F-3C1E-E6BFE0FA1001"


def test_the_ways_to_name_a_device() -> None:
    found = parse_devices(
        "devices",
        [
            "41:00.0",
            UUID,
            {"address": "0000:02:00.1", "backend": "legacy"},
            {"uuid": UUID.replace("1001", "1002"), "kind": "vfio-ap"},
            {"sysfsdev": "/sys/bus/pci/devices/0000:03:00.0"},
            {"sysfsdev": f"/sys/devices/css0/0.0.0313/{UUID.replace('1001', '1003')}", "kind": "vfio-ccw"},
        ],
    )
    assert [(one.kind, one.name, one.backend) for one in found] == [
        ("vfio-pci", "0000:41:00.0", None),
        ("mdev", UUID.lower(), None),
        ("vfio-pci", "0000:02:00.1", "legacy"),
        ("vfio-ap", UUID.lower().replace("1001", "1002"), None),
        ("vfio-pci", "0000:03:00.0", None),
        ("vfio-ccw", UUID.lower().replace("1001", "1003"), None),
    ]
    assert found[1].sysfsdev == f"/sys/bus/mdev/devices/{UUID.lower()}"
    assert found[5].sysfsdev == f"/sys/devices/css0/0.0.0313/{UUID.replace('1001', '1003')}"
    assert [one.is_pci for one in found] == [True, True, True, False, True, False]


def test_a_device_of_a_survey_is_taken_as_it_is(machine: Machine) -> None:
    machine.pci("0000:01:00.0", driver="nvme")
    assert [one.name for one in parse_devices("devices", survey(machine.host)["devices"])] == ["0000:01:00.0"]


@pytest.mark.parametrize(
    ("value", "option", "accepted"),
    [
        (None, "devices: ", "a list of devices"),
        ([], "devices: ", "a list of devices"),
        ("0000:01:00.0", "devices: ", "a list of devices"),
        ([3], r"devices\[0\]: 3", "UUID"),
        (["eth0"], r"devices\[0\]: 'eth0'", "PCI address"),
        ([{"address": "eth0"}], r"devices\[0\]: 'eth0'", "PCI address"),
        ([{"address": "eth0", "id": "a"}], r"devices\[0\]\.address: ", "PCI address"),
        ([{"address": "01:00.0", "backned": "legacy"}], r"devices\[0\]\.backned: ", "there is no such key"),
        ([{"address": "01:00.0", "backend": "vfio"}], r"devices\[0\]\.backend: 'vfio'", "legacy, iommufd, or auto"),
        ([{"address": "01:00.0", "uuid": UUID}], r"devices\[0\]: ", "one of address, uuid and sysfsdev"),
        ([{"kind": "mdev"}], r"devices\[0\]: ", "one of address, uuid and sysfsdev"),
        ([{"address": "01:00.0", "kind": "mdev"}], r"devices\[0\]\.kind: 'mdev'", "vfio-pci for a PCI address"),
        ([{"address": "01:00.0", "kind": "usb"}], r"devices\[0\]\.kind: 'usb'", "vfio-pci, mdev, vfio-ccw, vfio-ap"),
        ([{"uuid": "x"}], r"devices\[0\]\.uuid: 'x'", "UUID"),
        ([{"uuid": UUID, "kind": "vfio-pci"}], r"devices\[0\]\.kind: 'vfio-pci'", "mdev"),
        ([{"sysfsdev": "/etc/passwd", "kind": "mdev"}], r"devices\[0\]\.sysfsdev: ", "below /sys"),
        ([{"sysfsdev": "/sys/../etc", "kind": "mdev"}], r"devices\[0\]\.sysfsdev: ", "below /sys"),
        ([{"sysfsdev": f"/sys/bus/mdev/devices/{UUID}"}], r"devices\[0\]\.kind: None", "vfio-ap beside sysfsdev"),
        (["01:00.0", "0000:01:00.0"], r"devices\[1\]: '0000:01:00.0'", "each device once"),
    ],
)
def test_what_is_no_device(value: t.Any, option: str, accepted: str) -> None:
    with pytest.raises(OptionError, match=f"^{option}.*is not accepted") as error:
        parse_devices("devices", value)
    assert accepted in error.value.message


def test_none_at_all_where_that_is_accepted() -> None:
    assert parse_devices("devices", [], empty=True) == []
