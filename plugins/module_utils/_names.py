# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the host calls a PCI function: its driver, its network interfaces with MACs, its disks with serial numbers.

All of these go when the function goes to a guest's driver. They are remembered then, so that who named a device by one
of them finds it again: with the devices kept across reboots (:mod:`_persistence`), or for this boot
(:mod:`_given_away`).
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import is_vfio_driver
from ansible_collections.iommufd.host.plugins.module_utils._network import NET
from ansible_collections.iommufd.host.plugins.module_utils._pci import Function, is_address
from ansible_collections.iommufd.host.plugins.module_utils._storage import BLOCK

# The interface that a NIC in switch mode shows on its PF for the other end of a VF (phys_port_name in
# net/devlink/port.c).
_REPRESENTOR = re.compile(r"(c\d+)?pf\d+(vf|sf)\d+")
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:._@+!-")


@dataclasses.dataclass(frozen=True)
class Interface:
    """A network interface. ``mac`` is the one that the card came with, also while a bond has given it another."""

    name: str
    mac: str | None = None


@dataclasses.dataclass(frozen=True)
class Disk:
    """A disk, by its name in /sys/class/block ("nvme0n1")."""

    name: str
    serial: str | None = None


@dataclasses.dataclass(frozen=True)
class Names:
    """What the host calls one function.

    Attributes:
        driver: the host's driver; None on a vfio driver or without any.
        interfaces, disks: by name.
        virtual: of a VF, the address of its PF and its number there.
    """

    driver: str | None = None
    interfaces: tuple[Interface, ...] = ()
    disks: tuple[Disk, ...] = ()
    virtual: tuple[str, int] | None = None

    @property
    def given(self) -> bool:
        """Whether the host calls it anything now."""
        return bool(self.driver or self.interfaces or self.disks)

    def to_dict(self) -> dict[str, t.Any]:
        return {
            "driver": self.driver,
            "interfaces": [dataclasses.asdict(one) for one in self.interfaces],
            "disks": [dataclasses.asdict(one) for one in self.disks],
        }


def read_names(host: Host, functions: t.Sequence[Function]) -> dict[str, Names]:
    """The names of all functions by address, in one pass over interfaces and disks.

    What hangs on a USB controller is no name of the controller: nobody who names a stick means the whole bus.
    """
    interfaces: dict[str, list[Interface]] = {}
    for name in host.listdir(NET):
        path = host.realpath(f"{NET}/{name}") or ""
        address = _function_above(path)
        if address is not None and not _REPRESENTOR.fullmatch(host.read_line(f"{path}/phys_port_name") or ""):
            interfaces.setdefault(address, []).append(Interface(name, _mac(host, path)))
    disks: dict[str, list[Disk]] = {}
    block = BLOCK if host.is_dir(BLOCK) else "/sys/block"  # a captured tree may have only this
    for name in host.listdir(block):
        path = host.realpath(f"{block}/{name}") or ""
        if host.exists(f"{path}/partition"):
            continue
        for above in _hardware(host, path):
            address = _function_above(above)
            if address is not None:
                disks.setdefault(address, []).append(Disk(name, _serial(host, path)))
    physical = {one.address: one.sriov.vfs for one in functions if one.sriov is not None and one.sriov.vfs}
    virtual = {vf: (pf, number) for pf, vfs in physical.items() for number, vf in enumerate(vfs)}
    return {
        one.address: Names(
            one.driver if one.driver is not None and not is_vfio_driver(one.driver) else None,
            tuple(interfaces.get(one.address, ())),
            tuple(disks.get(one.address, ())),
            virtual.get(one.address),
        )
        for one in functions
    }


def _function_above(path: str) -> str | None:
    """The function that a device in sysfs hangs on directly; None for a virtual one, and for one on USB."""
    parts = path.split("/")
    if any(re.fullmatch(r"usb\d+", part) for part in parts):
        return None
    return next((part for part in reversed(parts) if is_address(part)), None)


def _hardware(host: Host, path: str) -> list[str]:
    """Paths of a disk through its hardware. One of NVMe native multipath is virtual; its controllers are linked from
    its subsystem, and each is a function that leads to it."""
    subsystem = re.match(r"(.*/nvme-subsystem/[^/]+)/", path)
    if subsystem is None:
        return [path]
    links = [one for one in host.listdir(subsystem[1]) if re.fullmatch(r"nvme\d+", one)]
    return [real for real in (host.realpath(f"{subsystem[1]}/{link}") for link in links) if real is not None]


def _mac(host: Host, path: str) -> str | None:
    mac = host.read_line(f"{path}/bonding_slave/perm_hwaddr") or host.read_line(f"{path}/address")
    return mac.lower() if mac is not None and re.fullmatch(r"([0-9a-fA-F]{2}:)+[0-9a-fA-F]{2}", mac) else None


def _serial(host: Host, path: str) -> str | None:
    """A disk's serial number: of an NVMe controller or an MMC card, of a virtio disk, or of a SCSI or SATA disk."""
    line = host.read_line(f"{path}/device/serial") or host.read_line(f"{path}/serial")
    if line is None:
        # The page "unit serial number" as the disk sent it: four bytes of header, the last two the length (SPC, 7.8).
        page = host.read_bytes(f"{path}/device/vpd_pg80", 260) or b""
        line = page[4 : 4 + int.from_bytes(page[2:4], "big")].decode("ascii", "replace") if page[1:2] == b"\x80" else ""
    return line.strip("\0 ") or None


# -- in one line of a file -----------------------------------------------------------------------------------------


def to_fields(names: Names) -> list[str]:
    """Fields for a line of a file that people read: ``host=igb nic=ens3f0/52:54:00:12:34:56 disk=nvme0n1/S6S2``."""
    fields = [f"host={_quote(names.driver)}"] if names.driver else []
    fields += [f"nic={_quote(one.name)}/{_quote(one.mac or '')}" for one in names.interfaces]
    fields += [f"disk={_quote(one.name)}/{_quote(one.serial or '')}" for one in names.disks]
    if names.virtual is not None:
        fields.append("vf={}/{}".format(*names.virtual))
    return fields


def from_fields(fields: t.Sequence[str]) -> Names:
    """What :func:`to_fields` wrote; a field that is none of it is passed over."""
    driver: str | None = None
    interfaces, disks = [], []
    virtual = None
    for field in fields:
        key, _equals, value = field.partition("=")
        name, _slash, more = value.partition("/")
        name, more = _unquote(name), _unquote(more)
        if not name:
            continue
        if key == "host":
            driver = name
        elif key == "nic":
            interfaces.append(Interface(name, more or None))
        elif key == "disk":
            disks.append(Disk(name, more or None))
        elif key == "vf" and is_address(name) and re.fullmatch(r"[0-9]{1,5}", more):
            virtual = (name, int(more))
    return Names(driver, tuple(interfaces), tuple(disks), virtual)


def _quote(text: str) -> str:
    """As in a URL: a serial number may hold blanks, and the kernel lets an interface be called nearly anything."""
    return "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in text.encode("utf-8", "surrogateescape"))


def _unquote(text: str) -> str:
    raw = re.sub(rb"%([0-9A-F]{2})", lambda match: bytes([int(match[1], 16)]), text.encode("utf-8", "surrogateescape"))
    return raw.decode("utf-8", "surrogateescape")
