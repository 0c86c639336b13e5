# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pathlib

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import (
    Region,
    by_address,
    is_vfio_driver,
    read_group,
    read_groups,
    read_members,
    read_units,
    viable_with,
)
from ansible_collections.iommufd.host.plugins.module_utils._pci import read_functions
from ansible_collections.iommufd.host.tests.unit.machine import Machine


def blocking(machine: Machine, number: int, *moving: str) -> list[str]:
    group = read_group(machine.host, number)
    assert group is not None
    return [one.address for one in viable_with(group, read_members(machine.host, group), moving)]


def test_a_group_with_a_peer_on_a_host_driver_is_blocked_by_it(machine: Machine) -> None:
    machine.pci("0000:01:00.0", "10de:2204", "030000", driver="nouveau", group=5)
    machine.pci("0000:01:00.1", "10de:1aef", "040300", driver="snd_hda_intel", group=5)
    assert blocking(machine, 5) == ["0000:01:00.0", "0000:01:00.1"]
    assert blocking(machine, 5, "0000:01:00.0") == ["0000:01:00.1"]
    assert blocking(machine, 5, "0000:01:00.0", "0000:01:00.1") == []


@pytest.mark.parametrize(
    ("driver", "class_id"),
    [
        (None, "020000"),
        ("vfio-pci", "020000"),
        ("mlx5_vfio_pci", "020000"),
        ("nvgrace-gpu-vfio-pci", "030200"),
        ("pci-stub", "020000"),
        ("pcieport", "060400"),
    ],
)
def test_peers_that_do_not_block(machine: Machine, driver: str | None, class_id: str) -> None:
    machine.pci("0000:01:00.0", driver="nvme", group=5)
    machine.pci("0000:01:01.0", class_id=class_id, driver=driver, group=5)
    assert blocking(machine, 5, "0000:01:00.0") == []


def test_a_name_that_only_looks_like_vfio() -> None:
    assert not is_vfio_driver("vfionic")
    assert is_vfio_driver("vfio_pci")


def test_a_group_in_full(machine: Machine) -> None:
    machine.pci("10000:01:00.0", driver="nvme", group=12)
    machine.pci("0000:0a:00.0", driver="nvme", group=12)
    machine.directory("/sys/kernel/iommu_groups/12/devices/platform-thing")
    machine.file(
        "/sys/kernel/iommu_groups/12/reserved_regions",
        "0x00000000fee00000 0x00000000feefffff msi\n0x0000000000000000 0x0000000000ffffff direct-relaxable\nnonsense\n",
    )
    machine.directory("/sys/kernel/iommu_groups/x")
    groups = read_groups(machine.host)
    assert list(groups) == [12]
    assert groups[12].members == ["0000:0a:00.0", "10000:01:00.0"]
    assert groups[12].others == ["platform-thing"]
    assert groups[12].type == "DMA-FQ"
    assert groups[12].regions == [Region(0xFEE00000, 0xFEEFFFFF, "msi"), Region(0, 0xFFFFFF, "direct-relaxable")]


def test_no_groups(machine: Machine) -> None:
    assert read_groups(machine.host) == {}
    assert read_group(machine.host, 1) is None
    assert read_units(machine.host) == []


def test_units(machine: Machine) -> None:
    for name, inside in (("dmar0", "intel-iommu/cap"), ("ivhd0", "amd-iommu/cap"), ("smmu3.0x0000000002b400000", "x")):
        machine.file(f"/sys/class/iommu/{name}/{inside}", "1\n")
    assert {unit.name: unit.kind for unit in read_units(machine.host)} == {
        "dmar0": "VT-d",
        "ivhd0": "AMD-Vi",
        "smmu3.0x0000000002b400000": "SMMUv3",
    }


def test_a_real_machine(vgpu_node: pathlib.Path) -> None:
    host = Host(str(vgpu_node))
    groups, functions = read_groups(host), by_address(read_functions(host))
    assert len(groups) == 106
    assert sum(len(group.members) > 1 for group in groups.values()) == 30
    assert {address: group.number for group in groups.values() for address in group.members} == {
        address: one.iommu_group for address, one in functions.items()
    }
    assert {unit.kind for unit in read_units(host)} == {"VT-d"}


def test_a_real_machine_with_its_iommu_off(iommu_off: pathlib.Path) -> None:
    host = Host(str(iommu_off))
    assert read_groups(host) == {}
    assert all(one.iommu_group is None for one in read_functions(host))
