# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A synthetic host for tests: a directory that a Host reads like a machine."""

from __future__ import annotations

import os
import pathlib

from ansible_collections.iommufd.host.plugins.module_utils._host import Host


class Machine:
    """Builds a tree piece by piece, in the layout that the kernel gives /sys and /proc.

    Args:
        root: an empty directory.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.paths: dict[str, str] = {}
        self.minor = 0

    @property
    def host(self) -> Host:
        return Host(str(self.root))

    def at(self, path: str) -> pathlib.Path:
        return self.root / path.lstrip("/")

    def file(self, path: str, content: str | bytes) -> None:
        target = self.at(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)

    def directory(self, path: str) -> None:
        self.at(path).mkdir(parents=True, exist_ok=True)

    def link(self, path: str, target: str) -> None:
        """A link as sysfs has them: relative, to a path of the machine that need not exist yet."""
        here = self.at(path)
        here.parent.mkdir(parents=True, exist_ok=True)
        here.symlink_to(os.path.relpath(target, os.path.dirname(path)))

    def attributes(self, path: str, **values: object) -> None:
        for name, value in values.items():
            self.file(f"{path}/{name}", f"{value}\n")

    # -- PCI -------------------------------------------------------------------------------------------------------

    def pci(
        self,
        address: str,
        identity: str = "8086:10d3",
        class_id: str = "020000",
        driver: str | None = None,
        group: int | None = None,
        below: str | None = None,
        **attributes: object,
    ) -> str:
        """A PCI function; returns its real directory."""
        domain_bus = address.rpartition(":")[0]
        parent = self.paths[below] if below else f"/sys/devices/pci{domain_bus}"
        path = f"{parent}/{address}"
        self.paths[address] = path
        vendor, device = identity.split(":")
        bc, sc, interface = class_id[:2], class_id[2:4], class_id[4:]
        values: dict[str, object] = {
            "vendor": f"0x{vendor}",
            "device": f"0x{device}",
            "subsystem_vendor": "0x1af4",
            "subsystem_device": "0x1100",
            "class": f"0x{class_id}",
            "revision": "0x01",
            "numa_node": -1,
            "driver_override": "(null)",
            "modalias": f"pci:v0000{vendor.upper()}d0000{device.upper()}sv00001AF4sd00001100"
            f"bc{bc.upper()}sc{sc.upper()}i{interface.upper()}",
        }
        self.attributes(path, **{**values, **attributes})
        self.link(f"/sys/bus/pci/devices/{address}", path)
        if driver is not None:
            self.directory(f"/sys/bus/pci/drivers/{driver}")
            self.link(f"{path}/driver", f"/sys/bus/pci/drivers/{driver}")
        if group is not None:
            self.directory(f"/sys/kernel/iommu_groups/{group}/devices")
            self.link(f"{path}/iommu_group", f"/sys/kernel/iommu_groups/{group}")
            self.link(f"/sys/kernel/iommu_groups/{group}/devices/{address}", path)
            self.file(f"/sys/kernel/iommu_groups/{group}/type", "DMA-FQ\n")
        return path

    def virtual_function(self, physical: str, address: str, identity: str = "8086:10ca", group: int = 31) -> None:
        """A PF on igb, where it is not there yet, and a VF of it on igbvf; VFs are numbered as they come."""
        parent = self.paths.get(physical) or self.pci(
            physical, "8086:10c9", driver="igb", group=30, sriov_totalvfs=7, sriov_numvfs=0
        )
        number = len(list(self.at(parent).glob("virtfn*")))
        path = self.pci(address, identity, driver="igbvf", group=group + number)
        self.link(f"{path}/physfn", parent)
        self.link(f"{parent}/virtfn{number}", path)
        self.attributes(parent, sriov_numvfs=number + 1)

    def cdev(self, address: str, number: int, dev: str | None = None) -> None:
        """The character device of a function on a vfio driver."""
        path = f"{self.paths[address]}/vfio-dev/vfio{number}"
        self.directory(path)
        if dev is not None:
            self.file(f"{path}/dev", f"{dev}\n")

    # -- disks -----------------------------------------------------------------------------------------------------

    def disk(self, name: str, behind: str) -> str:
        """A disk behind a PCI function; returns its real directory."""
        return self.block(name, f"{self.paths[behind]}/host0/block/{name}")

    def block(self, name: str, path: str | None = None, **attributes: object) -> str:
        """A block device; a virtual one where no path is given."""
        path = path or f"/sys/devices/virtual/block/{name}"
        self.paths[name] = path
        self.attributes(path, dev=f"8:{self.minor}", **attributes)
        self.minor += 1
        self.link(f"/sys/class/block/{name}", path)
        return path

    def partition(self, disk: str, name: str) -> str:
        return self.block(name, f"{self.paths[disk]}/{name}", partition=1)

    def stack(self, lower: str, upper: str) -> None:
        """One block device holds another."""
        self.link(f"{self.paths[lower]}/holders/{upper}", self.paths[upper])
        self.link(f"{self.paths[upper]}/slaves/{lower}", self.paths[lower])

    def number(self, name: str) -> str:
        return self.at(f"{self.paths[name]}/dev").read_text().strip()

    def mounts(self, *rows: tuple[str, str, str, str]) -> None:
        """Mounts as (device number, mount point, filesystem, source)."""
        lines = [
            f"{20 + index} 1 {number} / {point} rw,relatime shared:1 - {filesystem} {source} rw\n"
            for index, (number, point, filesystem, source) in enumerate(rows)
        ]
        self.file("/proc/self/mountinfo", "".join(lines))

    # -- interfaces ------------------------------------------------------------------------------------------------

    def interface(self, name: str, behind: str | None = None, kind: str | None = None) -> str:
        """A network interface; a virtual one where it is behind no PCI function."""
        path = f"{self.paths[behind]}/net/{name}" if behind else f"/sys/devices/virtual/net/{name}"
        self.paths[name] = path
        self.file(f"{path}/uevent", (f"DEVTYPE={kind}\n" if kind else "") + f"INTERFACE={name}\n")
        if behind:
            self.link(f"{path}/device", self.paths[behind])
        self.link(f"/sys/class/net/{name}", path)
        return path

    def enslave(self, lower: str, upper: str) -> None:
        """One interface stands on another."""
        self.link(f"{self.paths[lower]}/upper_{upper}", self.paths[upper])
        self.link(f"{self.paths[upper]}/lower_{lower}", self.paths[lower])

    def routes(self, *rows: tuple[str, str, str, str]) -> None:
        """IPv4 routes as (interface, destination, gateway, mask), each address in dotted form."""
        lines = ["Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"]
        for name, *addresses in rows:
            target, gateway, mask = (bytes(map(int, one.split(".")))[::-1].hex().upper() for one in addresses)
            lines.append(f"{name}\t{target}\t{gateway}\t0003\t0\t0\t0\t{mask}\t0\t0\t0\n")
        self.file("/proc/net/route", "".join(lines))

    # -- processes -------------------------------------------------------------------------------------------------

    def process(self, number: int, command: str, arguments: list[str], opened: list[str]) -> None:
        path = f"/proc/{number}"
        self.file(f"{path}/comm", f"{command}\n")
        self.file(f"{path}/cmdline", "\0".join(arguments) + "\0")
        self.directory(f"{path}/fd")
        for descriptor, target in enumerate(opened):
            self.at(f"{path}/fd/{descriptor}").symlink_to(target)
