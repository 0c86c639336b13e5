# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""IOMMU units and groups, and which members of a group keep it from being passed through."""

from __future__ import annotations

import dataclasses
import os
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._pci import Function, address_key, is_address, read_functions

GROUPS = "/sys/kernel/iommu_groups"

# Drivers that leave the DMA ownership of their group to others (`driver_managed_dma` in the kernel): a member on one
# of them, or on any vfio driver, does not block the group.
_HARMLESS_DRIVERS = ("pcieport", "pci-stub")

# The directory of attributes that a driver gives its unit, or the beginning of the unit's name.
_KINDS = {
    "intel-iommu": "VT-d",
    "amd-iommu": "AMD-Vi",
    "arm-smmu-v3": "SMMUv3",
    "smmu3": "SMMUv3",
    "arm-smmu": "SMMU",
    "smmu": "SMMU",
    "virtio-iommu": "virtio-iommu",
    "riscv-iommu": "RISC-V IOMMU",
}


@dataclasses.dataclass(frozen=True)
class Region:
    """A range of I/O virtual addresses that a guest's memory must not use. Addresses are integers, end included.

    Attributes:
        kind: "msi" (where the IOMMU takes writes as interrupts), "reserved", or "direct" and "direct-relaxable"
            (RMRRs: memory that the firmware keeps for the device).
    """

    start: int
    end: int
    kind: str

    def to_dict(self) -> dict[str, t.Any]:
        return {"start": f"0x{self.start:x}", "end": f"0x{self.end:x}", "kind": self.kind}


@dataclasses.dataclass
class Group:
    """An IOMMU group: the smallest set of devices that the IOMMU can keep apart from the rest.

    Attributes:
        number: its number; not stable across boots or kernels.
        members: addresses of its PCI functions, in order.
        others: names of members on other buses (platform devices, for example).
        type: default domain ("DMA-FQ", "DMA", "identity", "blocked"); None where the kernel does not say.
        regions: reserved regions; None where the tree lacks them.
    """

    number: int
    members: list[str] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)
    type: str | None = None
    regions: list[Region] | None = None


@dataclasses.dataclass(frozen=True)
class Unit:
    """A hardware IOMMU as in /sys/class/iommu (which has nothing to do with /dev/iommu)."""

    name: str
    kind: str


def read_groups(host: Host, functions: t.Iterable[Function] = ()) -> dict[int, Group]:
    """All groups by number; empty with the IOMMU off.

    Args:
        host: the host.
        functions: as read_functions returns them; each links to its group, and a captured tree may have these links
            alone.
    """
    groups = {}
    for name in host.listdir(GROUPS):
        if name.isascii() and name.isdigit() and len(name) < 10:
            groups[int(name)] = _read(host, int(name))
    linked: dict[int, set[str]] = {}
    for function in functions:
        if function.iommu_group is not None:
            linked.setdefault(function.iommu_group, set()).add(function.address)
    for number, members in linked.items():
        group = groups.setdefault(number, Group(number))
        if not members.issubset(group.members):
            group.members = sorted(members.union(group.members), key=address_key)
    return dict(sorted(groups.items()))


def read_group(host: Host, number: int) -> Group | None:
    """One group, or None where there is none of that number."""
    return _read(host, number) if host.is_dir(f"{GROUPS}/{number}") else None


def _read(host: Host, number: int) -> Group:
    path = f"{GROUPS}/{number}"
    names = host.listdir(f"{path}/devices")
    return Group(
        number=number,
        members=sorted(filter(is_address, names), key=address_key),
        others=[name for name in names if not is_address(name)],
        type=host.read_line(f"{path}/type"),
        regions=_parse_regions(host.read_text(f"{path}/reserved_regions", 65536)),
    )


def _parse_regions(text: str | None) -> list[Region] | None:
    if text is None:
        return None
    regions = []
    for line in text.splitlines():
        match = re.fullmatch(r"0x([0-9a-f]{1,16}) 0x([0-9a-f]{1,16}) ([a-z-]+)", line.strip())
        if match is not None:
            regions.append(Region(int(match[1], 16), int(match[2], 16), match[3]))
    return regions


def is_vfio_driver(driver: str) -> bool:
    """Whether a driver hands devices to user space through vfio (vfio-pci or a variant of it).

    Variant drivers name themselves with ``vfio`` in it: mlx5_vfio_pci, nvgrace-gpu-vfio-pci, qat_vfio_pci, …
    """
    return "vfio" in driver.replace("-", "_").split("_")


def blocks(function: Function) -> bool:
    """Whether a function keeps the rest of its group from being passed through.

    The kernel gives a group's DMA to user space when every member is unbound or on a driver that leaves DMA alone
    (``driver_managed_dma``, checked at bind since Linux 5.19). Bridges stay on pcieport and are fine.
    """
    driver = function.driver
    if driver is None or function.is_bridge:
        return False
    return driver not in _HARMLESS_DRIVERS and not is_vfio_driver(driver)


def viable_with(group: Group, functions: t.Mapping[str, Function], moving: t.Collection[str] = ()) -> list[Function]:
    """The members that would still block the group once some of them have moved to a vfio driver.

    Args:
        group: the group.
        functions: functions by address (:func:`by_address`); a member that is not in it cannot block.
        moving: addresses of those that are about to be bound to a vfio driver.

    Returns:
        The blocking members in order; empty: the group is viable.
    """
    members = [functions[address] for address in group.members if address in functions]
    return [function for function in members if function.address not in moving and blocks(function)]


def read_members(host: Host, group: Group) -> dict[str, Function]:
    """The functions of one group by address."""
    return by_address(read_functions(host, group.members))


def by_address(functions: t.Iterable[Function]) -> dict[str, Function]:
    """Functions by their address."""
    return {function.address: function for function in functions}


def read_units(host: Host) -> list[Unit]:
    """The hardware IOMMUs that the kernel uses; empty with the IOMMU off."""
    # Those of ACPI and of device trees are virtual devices, and have a place of their own beside the class.
    where = next(filter(host.listdir, ("/sys/class/iommu", "/sys/devices/virtual/iommu")), "/sys/class/iommu")
    return [Unit(name, _kind(host, f"{where}/{name}")) for name in host.listdir(where)]


def _kind(host: Host, path: str) -> str:
    name = os.path.basename(path)
    attributes = host.listdir(path)
    for hint, kind in _KINDS.items():
        if hint in attributes or name.startswith(hint):
            return kind
    if name.startswith("dmar"):
        return "VT-d"
    if name.startswith("ivhd"):
        return "AMD-Vi"
    driver = host.link_name(f"{path}/device/driver")
    return {"virtio_iommu": "virtio-iommu"}.get(driver or "", driver or name)
