# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._lab_spec import (
    DEVICE_TYPES,
    describe,
    layout,
    mac_address,
    parse_host,
    parse_hosts,
)


def host(*devices: dict[str, t.Any], **more: t.Any) -> dict[str, t.Any]:
    return {"name": "alpha", "devices": list(devices), **more}


def addresses(*devices: dict[str, t.Any]) -> dict[str, str]:
    return {row["id"]: row["address"] for row in describe(parse_host(host(*devices)))}


def test_addresses_as_a_real_guest_had_them() -> None:
    """The expected values were read with lspci in a guest that was started with this declaration."""
    found = addresses(
        {"type": "nvme"},
        {"type": "e1000e"},
        {"type": "igb"},
        {"type": "edu"},
        {"type": "pci-testdev"},
        {"type": "bridge", "devices": [{"type": "e1000"}, {"type": "edu"}]},
        {"type": "switch", "devices": [{"type": "nvme"}, {"type": "e1000e"}]},
        {"type": "multifunction", "devices": [{"type": "display"}, {"type": "audio"}]},
    )
    assert found == {
        "nvme0": "0000:01:00.0",
        "e1000e0": "0000:02:00.0",
        "igb0": "0000:03:00.0",
        "edu0": "0000:00:13.0",
        "pci-testdev0": "0000:00:14.0",
        "e1000-0": "0000:05:01.0",
        "edu1": "0000:05:02.0",
        "nvme1": "0000:08:00.0",
        "e1000e1": "0000:09:00.0",
        "display0": "0000:0a:00.0",
        "audio0": "0000:0a:00.1",
    }


def test_buses_follow_the_slots_not_the_declaration() -> None:
    found = addresses({"type": "nvme", "id": "late", "slot": 0x1E}, {"type": "nvme", "id": "early"})
    assert found == {"late": "0000:02:00.0", "early": "0000:01:00.0"}


def test_a_slot_that_is_named_is_left_out_when_others_are_given_theirs() -> None:
    found = addresses({"type": "edu"}, {"type": "edu", "slot": "0x10"}, {"type": "edu"})
    assert found == {"edu0": "0000:00:11.0", "edu1": "0000:00:10.0", "edu2": "0000:00:12.0"}


def test_numbers_as_text_are_numbers() -> None:
    """Templates give text."""
    spec = parse_host({"name": "alpha", "memory": "1024", "cpus": "1", "port": "2222"})
    assert (spec.memory, spec.cpus, spec.port) == (1024, 1, 2222)


def test_defaults() -> None:
    spec = parse_host({"name": "alpha", "memory": None, "devices": None})
    assert (spec.memory, spec.cpus, spec.iommu, spec.port, spec.devices) == (3072, 2, "intel", 0, ())


def test_network_cards_keep_their_addresses() -> None:
    first, again = (parse_host(host({"type": "e1000e"}, {"type": "igb"})) for _attempt in range(2))
    assert [one.mac for one in first.devices] == [one.mac for one in again.devices]
    assert first.devices[0].mac != first.devices[1].mac
    assert mac_address("alpha", "net") != mac_address("beta", "net")
    assert first.devices[0].mac.startswith("52:54:00:")


def test_a_disk_says_whose_it_is() -> None:
    device = parse_host(host({"type": "nvme", "size": "2M"})).devices[0]
    assert (device.size, device.serial, device.content) == (2 << 20, "LAB-nvme0", "alpha nvme0\n")


def test_the_port_is_no_hardware() -> None:
    assert parse_host(host(port=2222)).hardware() == parse_host(host()).hardware()
    assert parse_host(host({"type": "edu"})).hardware() != parse_host(host()).hardware()


def test_every_type_can_stand_alone() -> None:
    spec = parse_host(host(*({"type": kind} for kind in DEVICE_TYPES)))
    assert len(layout(spec).placed) == len(DEVICE_TYPES)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (host({"type": "gpu"}), ("host alpha: devices[0].type", "'gpu'", "nvme, e1000e", "bridge")),
        (host({"type": "edu"}, "nvme"), ("host alpha: devices[1]", "'nvme'", "a mapping with type")),
        (host({"type": "edu", "size": "1G"}), ("host alpha: devices[0].size", "'1G'", "there is no such option")),
        (host({"type": "nvme", "mac": "x"}), ("devices[0].mac", "no such option", "serial")),
        (host({"type": "nvme", "size": "much"}), ("devices[0].size", "'much'", "64M")),
        (host({"type": "nvme", "size": "513"}), ("devices[0].size", "multiple of 512")),
        (host({"type": "nvme", "size": "512", "content": "a" * 600}), ("devices[0].content", "at most 512 bytes")),
        (host({"type": "nvme", "serial": "a,b"}), ("devices[0].serial", "'a,b'", "no comma")),
        (host({"type": "igb", "mac": "52:54:00"}), ("devices[0].mac", "'52:54:00'", "52:54:00:12:34:56")),
        (host({"type": "edu", "slot": 31}), ("devices[0].slot", "31", "6 to 30")),
        (host({"type": "edu", "slot": 3}), ("devices[0].slot", "3", "6 to 30")),
        (host({"type": "edu", "slot": 9}, {"type": "nvme", "slot": 9}), ("devices[1].slot", "'0x9'", "edu0 has it")),
        (host({"type": "edu", "id": "a"}, {"type": "edu", "id": "a"}), ("devices[1].id", "'a'", "devices[0] has it")),
        (host({"type": "edu", "id": "a.b"}), ("devices[0].id", "'a.b'")),
        (host({"type": "edu", "properties": "x"}), ("devices[0].properties", "a mapping")),
        (host(*[{"type": "edu"}] * 16), ("host alpha: devices[15]", "no slot is left")),
        (host({"type": "bridge"}), ("devices[0].devices", "1 to 31 devices")),
        (host({"type": "bridge", "devices": []}), ("devices[0].devices", "[]")),
        (
            host({"type": "bridge", "devices": [{"type": "edu"}, {"type": "nvme"}]}),
            ("host alpha: devices[0].devices[1].type", "'nvme'", "it cannot sit in a bridge", "e1000, edu"),
        ),
        (
            host({"type": "switch", "devices": [{"type": "bridge", "devices": [{"type": "edu"}]}]}),
            ("devices[0].devices[0].type", "'bridge'", "it cannot sit in a switch"),
        ),
        (
            host({"type": "switch", "devices": [{"type": "nvme", "slot": 20}]}),
            ("devices[0].devices[0].slot", "no such option"),
        ),
        (host({"type": "multifunction", "devices": [{"type": "edu"}] * 9}), ("devices[0].devices", "1 to 8")),
        (host(memory="lots"), ("host alpha: memory", "'lots'", "512 to 1048576 MiB")),
        (host(cpus=0), ("host alpha: cpus", "0", "1 to 64")),
        (host(iommu="vtd"), ("host alpha: iommu", "'vtd'", "intel, amd, virtio, none (on amd64)")),
        (host(port=70000), ("host alpha: port", "70000", "65535")),
        (host(memmory=1), ("host alpha: memmory", "there is no such option", "memory")),
        ({"name": "../etc"}, ("hosts[0].name", "'../etc'", "letters, digits and hyphens")),
        ({"name": ""}, ("hosts[0].name",)),
        ({"devices": []}, ("hosts[0].name",)),
    ],
)
def test_what_cannot_be_accepted_is_named(raw: dict[str, t.Any], says: tuple[str, ...]) -> None:
    with pytest.raises(OptionError) as caught:
        parse_host(raw)
    for words in says:
        assert words in caught.value.message


def test_a_name_is_given_once() -> None:
    with pytest.raises(OptionError, match=r"hosts\[1\]\.name: 'alpha'"):
        parse_hosts([{"name": "alpha"}, {"name": "alpha"}])
