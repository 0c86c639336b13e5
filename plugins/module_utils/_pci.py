# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""PCI functions as sysfs shows them, and their addresses as people write them."""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._device_lock import held
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Directory, Host

DEVICES = "/sys/bus/pci/devices"

ACCEPTED_ADDRESS = "a PCI address such as 0000:02:00.0 or 02:00.0 (`lspci -D` lists them)"

# The kernel prints the domain with at least four digits and more where it needs them (VMD starts at 10000).
_ADDRESS = re.compile(r"(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{2}):([01][0-9a-fA-F])\.([0-7])")
_EXACT_ADDRESS = re.compile(r"(?:[0-9a-f]{4}|[1-9a-f][0-9a-f]{4,7}):[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_MODALIAS = re.compile(
    r"pci:v(?P<vendor>[0-9A-F]{8})d(?P<device>[0-9A-F]{8})sv(?P<subvendor>[0-9A-F]{8})sd(?P<subdevice>[0-9A-F]{8})"
    r"bc(?P<base>[0-9A-F]{2})sc(?P<sub>[0-9A-F]{2})i(?P<interface>[0-9A-F]{2})"
)

# Where a tree without /sys/bus is searched: host bridges lie at most so deep below other devices, and not below these.
_HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")
_DEEPEST = 5
_NO_BUSES = ("virtual", "system", "breakpoint", "cpu", "software", "tracepoint", "pnp0", "power")

# include/linux/ioport.h: flags in the third column of the attribute `resource`.
_IORESOURCE_IO = 0x100
_IORESOURCE_MEM = 0x200
_IORESOURCE_PREFETCH = 0x2000
_IORESOURCE_MEM_64 = 0x100000
_STANDARD_BARS = 6

# How long a driver may take or leave a device before we go on without knowing what its lock hides. Loading a network
# card's firmware takes some seconds.
LOCK_SECONDS = 10.0

# What kernels read under the device's lock. Which of them depends on the kernel: Debian's 6.12.118 reads the first one
# without it.
LOCKED_ATTRIBUTES = ("driver_override", "sriov_numvfs")


def is_address(name: str) -> bool:
    """Whether a name is a PCI address exactly as the kernel writes it."""
    return _EXACT_ADDRESS.fullmatch(name) is not None


def parse_address(option: str, value: object) -> str:
    """A PCI address as the kernel writes it: lower case, with the domain ("02:00.0" becomes "0000:02:00.0").

    Args:
        option: the option's name for the error message.
        value: what the user wrote.

    Raises:
        OptionError: it is not a PCI address.
    """
    match = _ADDRESS.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise OptionError(option, value, ACCEPTED_ADDRESS)
    domain, bus, slot, function = match.groups()
    return f"{int(domain or '0', 16):04x}:{bus.lower()}:{slot.lower()}.{function}"


def address_key(address: str) -> tuple[int, int, int, int]:
    """Sort key of an address, by number (a domain of five digits sorts after ffff). Zeros where it is none."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        return (0, 0, 0, 0)
    domain, bus, slot, function = match.groups()
    return (int(domain or "0", 16), int(bus, 16), int(slot, 16), int(function, 16))


def vf_address(physfn: str, offset: int, stride: int, index: int) -> str | None:
    """The address that a PF's VF has, or will have; None where there is no such bus.

    PCI Express, 9.2.1.2: routing IDs (bus and devfn as one number) are counted from the PF's own.

    Args:
        physfn: the PF's address.
        offset, stride: First VF Offset and VF Stride, as sysfs has them (``sriov_offset``, ``sriov_stride``).
        index: number of the VF, from 0.
    """
    domain, bus, slot, function = address_key(physfn)
    routing = (bus << 8 | slot << 3 | function) + offset + stride * index
    if routing > 0xFFFF:
        return None
    return f"{domain:04x}:{routing >> 8:02x}:{routing >> 3 & 0x1F:02x}.{routing & 7}"


@dataclasses.dataclass
class Sriov:
    """SR-IOV of a function.

    Attributes:
        total_vfs: how many VFs a physical function can have; None for a VF.
        num_vfs: how many it has now; None for a VF.
        physfn: address of a VF's physical function; None for a PF.
        vfs: addresses of a PF's VFs, in their order.
        offset, stride: where a PF's VFs are, see :func:`vf_address`; None for a VF.
    """

    total_vfs: int | None = None
    num_vfs: int | None = None
    physfn: str | None = None
    vfs: list[str] = dataclasses.field(default_factory=list)
    offset: int | None = None
    stride: int | None = None

    def to_dict(self) -> dict[str, t.Any]:
        return {"total_vfs": self.total_vfs, "num_vfs": self.num_vfs, "physfn": self.physfn, "vfs": self.vfs}


@dataclasses.dataclass
class Function:
    """One PCI function. None where sysfs does not tell.

    Attributes:
        address: as the kernel writes it ("0000:02:00.0").
        vendor_id, device_id, subsystem_vendor_id, subsystem_device_id: "0x10de".
        class_id: six digits ("0x030200").
        revision: "0xa1".
        modalias: as sysfs has it ("pci:v…"), for a lookup in modules.alias.
        driver: name of the driver bound to it.
        driver_override: name written there; None when it is not set.
        iommu_group: number of its group; None with the IOMMU off.
        numa_node: None where the platform does not say (-1 in sysfs).
        vfio_name: "vfio0", when it is bound to a vfio driver and has a character device.
        vfio_number: "major:minor" of that character device.
        sriov: None for a function that is neither PF nor VF.
        boot_vga: True for the display that firmware lit; None for what is no display.
        reset_methods: names that the kernel would try, in order ("flr", "bus"); None before Linux 5.15.
        bars: {index, kind ("memory" or "io"), size (bytes), prefetchable, wide (64 bits)} of those in use.
        path: its real directory ("/sys/devices/pci0000:00/…"), which shows the bridges above it.
        locked: a driver has been taking or leaving it for seconds, and holds its lock; override and number of VFs are
            then unknown.
        entries: names of what that directory holds.
    """

    address: str
    vendor_id: str | None = None
    device_id: str | None = None
    subsystem_vendor_id: str | None = None
    subsystem_device_id: str | None = None
    class_id: str | None = None
    revision: str | None = None
    modalias: str | None = None
    driver: str | None = None
    driver_override: str | None = None
    iommu_group: int | None = None
    numa_node: int | None = None
    vfio_name: str | None = None
    vfio_number: str | None = None
    sriov: Sriov | None = None
    boot_vga: bool | None = None
    reset_methods: list[str] | None = None
    bars: list[dict[str, t.Any]] | None = None
    path: str | None = None
    locked: bool = False
    entries: frozenset[str] = dataclasses.field(default=frozenset(), repr=False, compare=False)

    @property
    def vfio_device(self) -> str | None:
        """The node of its character device ("/dev/vfio/devices/vfio0")."""
        return f"/dev/vfio/devices/{self.vfio_name}" if self.vfio_name else None

    @property
    def is_bridge(self) -> bool:
        """Whether it is a PCI-to-PCI bridge (class 0604), a root or switch port included."""
        return self.class_id is not None and self.class_id.startswith("0x0604")

    @property
    def above(self) -> list[str]:
        """Addresses of the functions above it, from the root down."""
        parts = (self.path or "").split("/")[:-1]
        return [part for part in parts if is_address(part)]

    def to_dict(self) -> dict[str, t.Any]:
        """The device as the collection returns it everywhere, without ``in_use``."""
        return {
            "address": self.address,
            "vendor_id": self.vendor_id,
            "device_id": self.device_id,
            "subsystem_vendor_id": self.subsystem_vendor_id,
            "subsystem_device_id": self.subsystem_device_id,
            "class_id": self.class_id,
            "revision": self.revision,
            "driver": self.driver,
            "driver_override": self.driver_override,
            "iommu_group": self.iommu_group,
            "numa_node": self.numa_node,
            "vfio_device": self.vfio_device,
            "sriov": self.sriov.to_dict() if self.sriov else None,
            "boot_vga": self.boot_vga,
            "reset_methods": self.reset_methods,
            "bars": self.bars,
        }


def vf_addresses(function: Function, count: int | None = None) -> list[str]:
    """Addresses that a PF's VFs have or will have, in their order; empty where it does not tell, or is no PF.

    Args:
        function: the PF.
        count: how many VFs; None: as many as it can have.
    """
    sriov = function.sriov
    if sriov is None or sriov.offset is None or sriov.stride is None or not sriov.offset:
        return []
    count = (sriov.total_vfs or 0) if count is None else count
    found = [vf_address(function.address, sriov.offset, sriov.stride, index) for index in range(count)]
    return [address for address in found if address is not None]


def list_addresses(host: Host) -> list[str]:
    """The addresses of all functions, in order."""
    return sorted(filter(is_address, host.listdir(DEVICES)), key=address_key)


def _find(host: Host) -> dict[str, str]:
    """Directories of the functions of a tree that has no /sys/bus, by address.

    They lie below a host bridge ("pci0000:00"), itself at the top or below devices of other buses.
    """
    found: dict[str, str] = {}
    todo = [("/sys/devices", 0)]
    while todo:
        path, depth = todo.pop()
        for name in host.listdir(path):
            here = f"{path}/{name}"
            if is_address(name):
                found[name] = here
                todo.append((here, _DEEPEST))
            elif _HOST_BRIDGE.fullmatch(name):
                todo.append((here, _DEEPEST))
            elif depth < _DEEPEST and name not in _NO_BUSES and host.readlink(here) is None:
                todo.append((here, depth + 1))
    return found


def read_function(host: Host, address: str) -> Function | None:
    """One function, or None where the host has no such address.

    Waits as long as the kernel holds the function's lock: for one that this process itself has moved or is about to.
    Any other is read by :func:`read_functions`.

    Args:
        host: the host.
        address: as :func:`parse_address` returns it.
    """
    path = host.realpath(f"{DEVICES}/{address}")
    return None if path is None else _read(host, address, path)


def read_functions(host: Host, only: t.Sequence[str] | None = None) -> list[Function]:
    """All functions, in the order of their addresses, each directory read once.

    Args:
        host: the host.
        only: addresses, where those will do.
    """
    addresses = list_addresses(host) if only is None else only
    if only is None and not addresses and not host.live:
        found = _find(host)
        return [_read(host, address, found[address]) for address in sorted(found, key=address_key)]
    locked = locked_functions(host, addresses, LOCK_SECONDS) if host.live else set()
    functions = []
    for address in addresses:
        path = host.realpath(f"{DEVICES}/{address}")
        if path is not None:
            functions.append(_read(host, address, path, address in locked))
    return functions


def locked_functions(host: Host, addresses: t.Sequence[str], seconds: float) -> set[str]:
    """The functions that have an attribute which cannot be read because the kernel holds their lock all the time.

    Args:
        host: the host.
        addresses: the functions to look at.
        seconds: how long to wait for each attribute.
    """
    locked: set[str] = set()
    for name in LOCKED_ATTRIBUTES:
        paths = {f"{DEVICES}/{address}/{name}": address for address in addresses if address not in locked}
        there = {host.path(path): address for path, address in paths.items() if host.exists(path)}
        locked.update(there[path] for path in held(list(there), seconds))
    return locked


def _read(host: Host, address: str, path: str, locked: bool = False) -> Function:
    directory = host.directory(path)
    if locked:
        directory.names -= set(LOCKED_ATTRIBUTES)
    line = directory.line
    modalias = line("modalias")
    spoken = _MODALIAS.fullmatch(modalias or "")

    def number(name: str, digits: int, *parts: str) -> str | None:
        text = _hex(line(name), digits)
        if text is None and spoken is not None:
            text = _hex("".join(spoken[part] for part in parts), digits)
        return text

    override = line("driver_override")
    function = Function(
        address=address,
        vendor_id=number("vendor", 4, "vendor"),
        device_id=number("device", 4, "device"),
        subsystem_vendor_id=number("subsystem_vendor", 4, "subvendor"),
        subsystem_device_id=number("subsystem_device", 4, "subdevice"),
        class_id=number("class", 6, "base", "sub", "interface"),
        revision=_hex(line("revision"), 2),
        modalias=modalias if spoken is not None else None,
        driver=directory.link_name("driver"),
        # drivers/pci/pci-sysfs.c prints a null pointer as "(null)".
        driver_override=None if override in (None, "(null)") else override,
        iommu_group=_decimal(directory.link_name("iommu_group")),
        numa_node=_decimal(line("numa_node")),
        sriov=_read_sriov(directory),
        boot_vga={"0": False, "1": True}.get(line("boot_vga") or ""),
        path=path,
        locked=locked,
        entries=directory.names,
    )
    if "reset_method" in directory:
        # An empty file says that there is none; one that cannot be read says nothing.
        methods = directory.text("reset_method", 4096)
        function.reset_methods = None if methods is None else methods.split()
    if "resource" in directory:
        function.bars = _parse_resources(directory.text("resource", 4096))
    if "vfio-dev" in directory:
        function.vfio_name, function.vfio_number = _read_vfio(host, path)
    return function


def _hex(text: str | None, digits: int) -> str | None:
    """A number in sysfs' or modalias' spelling as "0x" and that many digits; None where it is none or too large."""
    if text is None:
        return None
    try:
        value = int(text, 16)
    except ValueError:
        return None
    return f"0x{value:0{digits}x}" if 0 <= value < 16**digits else None


def _decimal(text: str | None) -> int | None:
    """A count, or None where there is none or it is negative (a NUMA node of -1: the platform does not say)."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 16 else None


def _read_sriov(directory: Directory) -> Sriov | None:
    if "physfn" in directory:
        name = directory.link_name("physfn")
        return Sriov(physfn=name) if name is not None and is_address(name) else None
    if "sriov_totalvfs" not in directory:
        return None
    virtual = [name for name in directory.names if name.startswith("virtfn") and _decimal(name[6:]) is not None]
    links = [directory.link_name(name) for name in sorted(virtual, key=lambda name: int(name[6:]))]
    return Sriov(
        total_vfs=_decimal(directory.line("sriov_totalvfs")),
        # The links are there, too, while the PF's lock is held and sriov_numvfs cannot be read.
        num_vfs=len(virtual) or _decimal(directory.line("sriov_numvfs")),
        vfs=[name for name in links if name is not None and is_address(name)],
        offset=_decimal(directory.line("sriov_offset")),
        stride=_decimal(directory.line("sriov_stride")),
    )


def _read_vfio(host: Host, path: str) -> tuple[str | None, str | None]:
    """Name and number of the character device. The directory alone proves nothing: vfio makes it even where the
    kernel has no VFIO_DEVICE_CDEV; the attribute ``dev`` is there only with a real character device."""
    for name in host.listdir(f"{path}/vfio-dev"):
        number = host.read_line(f"{path}/vfio-dev/{name}/dev")
        if re.fullmatch(r"vfio[0-9]+", name) and re.fullmatch(r"[0-9]+:[0-9]+", number or ""):
            return name, number
    return None, None


def _parse_resources(text: str | None) -> list[dict[str, t.Any]] | None:
    """The BARs in the attribute ``resource``: a line each of start, end and flags. None where it cannot be read."""
    if text is None:
        return None
    bars = []
    for index, row in enumerate(text.splitlines()[:_STANDARD_BARS]):
        try:
            start, end, flags = (int(field, 16) for field in row.split())
        except ValueError:
            continue
        if not flags or end < start:
            continue
        bars.append(
            {
                "index": index,
                "kind": "io" if flags & _IORESOURCE_IO and not flags & _IORESOURCE_MEM else "memory",
                "size": end - start + 1,
                "prefetchable": bool(flags & _IORESOURCE_PREFETCH),
                "wide": bool(flags & _IORESOURCE_MEM_64),
            }
        )
    return bars
