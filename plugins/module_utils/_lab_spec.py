# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What a lab host is made of, as declared, and where each device will sit.

Nothing here touches the machine: a declaration goes in, a checked one and the addresses come out.

Address scheme. The root bus carries at fixed slots what every host has: network 00:02.0, system disk 00:03.0,
entropy 00:04.0, and 00:05.0 for virtio-iommu. The declared devices follow from slot 0x10 on in the order of the
declaration, one slot each, unless ``slot`` names another one. A PCI Express device sits behind a root port in that
slot; the firmware numbers the buses behind the ports in ascending order of their slots, so that all addresses follow
from the declaration alone (see `layout`).
"""

from __future__ import annotations

import hashlib
import re
import typing as t
from dataclasses import dataclass, field, replace

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError

Json = dict[str, t.Any]

NETWORK_SLOT = 0x02
DISK_SLOT = 0x03
ENTROPY_SLOT = 0x04
IOMMU_SLOT = 0x05
FIRST_FREE_SLOT = 0x06
FIRST_DEVICE_SLOT = 0x10
# Slot 0x1f is the chipset's own (ISA bridge, SATA, SMBus).
LAST_DEVICE_SLOT = 0x1E


@dataclass(frozen=True)
class Architecture:
    """What differs between the processors of lab hosts.

    Attributes:
        machine: the processor's name in ``uname -m`` and in the emulator's.
        package: the Debian package with the emulator, on this machine and in a lab host.
        iommus: the IOMMUs that its machine can have; the first one is the default.
        console: the kernel's name of the serial console.
        packages: what else a lab host has for it alone.
    """

    machine: str
    package: str
    iommus: tuple[str, ...]
    console: str
    packages: tuple[str, ...]

    @property
    def emulator(self) -> str:
        return f"qemu-system-{self.machine}"


#: By their names in Debian.
ARCHITECTURES = {
    "amd64": Architecture(
        "x86_64",
        "qemu-system-x86",
        ("intel", "amd", "virtio", "none"),
        "ttyS0",
        ("grub-pc", "linux-image-amd64"),
    ),
    "arm64": Architecture(
        "aarch64",
        "qemu-system-arm",
        ("smmuv3", "virtio", "none"),
        "ttyAMA0",
        ("dosfstools", "grub-efi-arm64", "linux-image-arm64"),
    ),
}

_NAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")
_IDENTIFIER = re.compile(r"[a-zA-Z][a-zA-Z0-9_-]{0,40}")
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")
_SIZE = re.compile(r"([1-9][0-9]*)([KMGT]?)")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class DeviceType:
    """One kind of declarable device.

    ``model`` is the emulator's name of it. ``express`` devices get a root port of their own, the others sit on the
    root bus. ``conventional`` says whether the model works on a conventional PCI bus, behind a bridge.
    """

    model: str
    summary: str
    express: bool
    conventional: bool
    network: bool = False
    disk: bool = False
    fixed: tuple[str, ...] = ()


_VIRTIO = ("disable-legacy=on", "iommu_platform=on")

DEVICE_TYPES: dict[str, DeviceType] = {
    "nvme": DeviceType("nvme", "NVMe disk", True, False, disk=True),
    "e1000e": DeviceType("e1000e", "network card (Intel 82574L)", True, False, network=True),
    "igb": DeviceType("igb", "network card with 7 virtual functions (Intel 82576)", True, False, network=True),
    "virtio-net": DeviceType("virtio-net-pci", "paravirtual network card", True, True, network=True, fixed=_VIRTIO),
    "virtio-blk": DeviceType("virtio-blk-pci", "paravirtual disk", True, True, disk=True, fixed=_VIRTIO),
    "xhci": DeviceType("qemu-xhci", "USB controller", True, True),
    "display": DeviceType("bochs-display", "display controller", True, True),
    "audio": DeviceType("intel-hda", "audio controller", False, True),
    "e1000": DeviceType("e1000", "conventional network card (Intel 82540EM)", False, True, network=True),
    "edu": DeviceType("edu", "device with interrupts and DMA, without a driver", False, True),
    "pci-testdev": DeviceType("pci-testdev", "device without a driver", False, True),
}


@dataclass(frozen=True)
class ContainerType:
    """A declarable thing that holds up to ``most`` devices, which then share an IOMMU group.

    ``conventional``: what it holds sits on a conventional PCI bus.
    """

    summary: str
    conventional: bool
    most: int


CONTAINER_TYPES: dict[str, ContainerType] = {
    "bridge": ContainerType("several devices behind one conventional PCI bridge", True, 31),
    "switch": ContainerType("several devices behind one PCI Express switch without ACS", False, 31),
    "multifunction": ContainerType("one card with several functions", False, 8),
}

_COMMON_OPTIONS = ("type", "id", "properties")
_DEFAULT_DISK = "64M"


@dataclass(frozen=True)
class Device:
    """One declared device, checked. ``size`` is in bytes, 0 for what is no disk."""

    kind: str
    identifier: str
    slot: int = 0
    mac: str = ""
    size: int = 0
    serial: str = ""
    content: str = ""
    properties: tuple[tuple[str, str], ...] = ()
    devices: tuple[Device, ...] = ()

    def members(self) -> t.Iterator[Device]:
        """The devices that the guest's drivers see: the device itself, or what the container holds."""
        if self.devices:
            for device in self.devices:
                yield from device.members()
        else:
            yield self


@dataclass(frozen=True)
class HostSpec:
    """One declared host, checked.

    ``memory`` is in MiB; ``port`` 0 means one that is free; ``emulator`` is a path, or empty for the usual one of the
    architecture.
    """

    name: str
    image: str
    memory: int = 3072
    cpus: int = 2
    iommu: str = "intel"
    port: int = 0
    devices: tuple[Device, ...] = ()
    architecture: str = "amd64"
    emulator: str = ""

    @property
    def program(self) -> str:
        """What emulates it."""
        return self.emulator or ARCHITECTURES[self.architecture].emulator

    def hardware(self) -> Json:
        """What the emulated hardware depends on: two hosts with the same value have the same command line."""
        return {
            "memory": self.memory,
            "cpus": self.cpus,
            "iommu": self.iommu,
            "devices": [_plain(device) for device in self.devices],
            **({"architecture": self.architecture} if self.architecture != "amd64" else {}),
            **({"emulator": self.emulator} if self.emulator else {}),
        }


def _plain(device: Device) -> Json:
    found: Json = {"type": device.kind, "id": device.identifier}
    for name in ("slot", "mac", "size", "serial", "content"):
        value = getattr(device, name)
        if value:
            found[name] = value
    if device.properties:
        found["properties"] = dict(device.properties)
    if device.devices:
        found["devices"] = [_plain(member) for member in device.devices]
    return found


def size_in_bytes(value: str | int, option: str) -> int:
    """``64M`` in bytes; K, M, G and T are powers of 1024.

    Raises:
        OptionError: it is no size; names ``option``.
    """
    match = _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise OptionError(option, value, "a whole number with K, M, G or T, such as 64M")
    return int(match.group(1)) * _UNITS[match.group(2)]


def parse_hosts(raw: t.Sequence[t.Mapping[str, t.Any]]) -> list[HostSpec]:
    """Check the list of hosts.

    Raises:
        OptionError: an entry cannot be accepted, or a name is given twice.
    """
    hosts: list[HostSpec] = []
    for index, entry in enumerate(raw):
        host = parse_host(entry, index)
        if host.name in (other.name for other in hosts):
            raise OptionError(f"hosts[{index}].name", host.name, "a name that no other host of the list has")
        hosts.append(host)
    return hosts


def parse_host(raw: t.Mapping[str, t.Any], index: int = 0) -> HostSpec:
    """Check one entry of the list of hosts.

    Args:
        raw: the entry; an option that is None counts as not given.
        index: its place in the list, for messages.

    Raises:
        OptionError: names the host, the option, the value and what is accepted.
    """
    name = str(raw.get("name") or "")
    check_name(name, f"hosts[{index}].name")
    where = f"host {name}: "
    known = ("name", "image", "memory", "cpus", "iommu", "port", "devices", "architecture", "emulator")
    _refuse_unknown(raw, known, where)
    architecture = str(raw.get("architecture") or "amd64")
    if architecture not in ARCHITECTURES:
        raise OptionError(f"{where}architecture", architecture, ", ".join(ARCHITECTURES))
    iommus = ARCHITECTURES[architecture].iommus
    iommu = str(raw.get("iommu") or iommus[0])
    if iommu not in iommus:
        raise OptionError(f"{where}iommu", iommu, f"{', '.join(iommus)} (on {architecture})")
    declared = raw.get("devices") or []
    if not isinstance(declared, list):
        raise OptionError(f"{where}devices", declared, "a list of devices")
    parser = _DeviceParser(name)
    devices = [parser.parse(entry, f"{where}devices[{number}]") for number, entry in enumerate(declared)]
    return HostSpec(
        name=name,
        image=str(raw.get("image") or ""),
        memory=_whole(raw.get("memory"), 3072, 512, 1 << 20, f"{where}memory", "MiB"),
        cpus=_whole(raw.get("cpus"), 2, 1, 64, f"{where}cpus", "processors"),
        iommu=iommu,
        port=_whole(raw.get("port"), 0, 1, 65535, f"{where}port", "(or none, then a free one is taken)"),
        devices=_with_slots(devices, where),
        architecture=architecture,
        emulator=str(raw.get("emulator") or ""),
    )


def check_name(name: str, option: str) -> None:
    """Raises OptionError where a host cannot be called that: the name is its host name and its directory."""
    if not _NAME.fullmatch(name):
        raise OptionError(option, name, "letters, digits and hyphens, at most 63, no hyphen at either end")


def _whole(value: t.Any, default: int, least: int, most: int, option: str, unit: str) -> int:
    """A whole number, also as text, as templates give it."""
    if value is None:
        return default
    try:
        number = int(str(value), 0)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise OptionError(option, value, f"{least} to {most} {unit}")
    return number


def _refuse_unknown(raw: t.Mapping[str, t.Any], known: t.Sequence[str], where: str) -> None:
    for option, value in raw.items():
        if option not in known and value is not None:
            raise OptionError(f"{where}{option}", value, f"the options {', '.join(known)}", "there is no such option")


class _DeviceParser:
    """Checks the devices of one host, and gives each the name that it has on the emulator's command line."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._counts: dict[str, int] = {}
        self._taken: dict[str, str] = {}

    def parse(self, raw: t.Any, where: str, container: str = "") -> Device:
        """One entry; ``container`` is the type of what holds it, empty for a device that stands alone."""
        kind = self._kind(raw, where, container)
        properties = raw.get("properties") or {}
        if not isinstance(properties, dict):
            raise OptionError(f"{where}.properties", properties, "a mapping of the emulator's properties")
        device = Device(
            kind=kind,
            identifier=self._identifier(raw, kind, where),
            slot=_whole(raw.get("slot"), 0, FIRST_FREE_SLOT, LAST_DEVICE_SLOT, f"{where}.slot", "(on the root bus)"),
            properties=tuple((str(key), _property(value)) for key, value in properties.items()),
        )
        if kind in CONTAINER_TYPES:
            _refuse_unknown(raw, (*_COMMON_OPTIONS, "slot", "devices"), f"{where}.")
            return replace(device, devices=self._members(raw, kind, where))
        device_type = DEVICE_TYPES[kind]
        known = [*_COMMON_OPTIONS]
        known += [] if container else ["slot"]
        known += ["mac"] if device_type.network else []
        known += ["size", "content", "serial"] if device_type.disk else []
        _refuse_unknown(raw, known, f"{where}.")
        if device_type.network:
            mac = str(raw.get("mac") or mac_address(self._host, device.identifier)).lower()
            if not _MAC.fullmatch(mac):
                raise OptionError(f"{where}.mac", mac, "a MAC address such as 52:54:00:12:34:56")
            device = replace(device, mac=mac)
        if device_type.disk:
            device = self._disk(raw, device, where)
        return device

    @staticmethod
    def _kind(raw: t.Any, where: str, container: str) -> str:
        types = ", ".join([*DEVICE_TYPES, *CONTAINER_TYPES])
        if not isinstance(raw, dict) or "type" not in raw:
            raise OptionError(where, raw, f"a mapping with type, one of {types}")
        kind = str(raw["type"])
        if kind not in DEVICE_TYPES and kind not in CONTAINER_TYPES:
            raise OptionError(f"{where}.type", kind, types)
        if container:
            conventional = CONTAINER_TYPES[container].conventional
            fit = [name for name, other in DEVICE_TYPES.items() if other.conventional or not conventional]
            if kind not in fit:
                raise OptionError(f"{where}.type", kind, ", ".join(fit), f"it cannot sit in a {container}")
        return kind

    def _identifier(self, raw: t.Mapping[str, t.Any], kind: str, where: str) -> str:
        number = self._counts.get(kind, 0)
        self._counts[kind] = number + 1
        # A name that ends in a digit is kept apart from the number: e1000-0.
        separator = "-" if kind[-1].isdigit() else ""
        identifier = str(raw.get("id") or f"{kind}{separator}{number}")
        if not _IDENTIFIER.fullmatch(identifier):
            raise OptionError(f"{where}.id", identifier, "a letter, then letters, digits, - and _, at most 41")
        if identifier in self._taken:
            raise OptionError(f"{where}.id", identifier, "a name of its own", f"{self._taken[identifier]} has it")
        self._taken[identifier] = where
        return identifier

    def _members(self, raw: t.Mapping[str, t.Any], kind: str, where: str) -> tuple[Device, ...]:
        inner = raw.get("devices")
        most = CONTAINER_TYPES[kind].most
        if not isinstance(inner, list) or not 1 <= len(inner) <= most:
            raise OptionError(f"{where}.devices", inner, f"a list of 1 to {most} devices")
        return tuple(
            self.parse(entry, f"{where}.devices[{place}]", container=kind) for place, entry in enumerate(inner)
        )

    def _disk(self, raw: t.Mapping[str, t.Any], device: Device, where: str) -> Device:
        size = size_in_bytes(raw.get("size") or _DEFAULT_DISK, f"{where}.size")
        if size % 512:
            raise OptionError(f"{where}.size", raw["size"], "a multiple of 512 bytes")
        content = str(raw.get("content") or f"{self._host} {device.identifier}\n")
        if len(content.encode()) > size:
            raise OptionError(f"{where}.content", f"{content[:20]}...", f"at most {size} bytes, the size of the disk")
        serial = str(raw.get("serial") or f"LAB-{device.identifier}"[:20])
        if not re.fullmatch(r"[\x21-\x2b\x2d-\x7e]{1,20}", serial):
            raise OptionError(f"{where}.serial", serial, "1 to 20 ASCII characters, no space and no comma")
        return replace(device, size=size, content=content, serial=serial)


def _property(value: t.Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _with_slots(devices: t.Sequence[Device], where: str) -> tuple[Device, ...]:
    """Give every device without a slot the next free one, in the order of the declaration."""
    used: dict[int, str] = {}
    for number, device in enumerate(devices):
        if device.slot in used:
            option = f"{where}devices[{number}].slot"
            raise OptionError(option, hex(device.slot), "a slot of its own", f"{used[device.slot]} has it")
        if device.slot:
            used[device.slot] = device.identifier
    free = [slot for slot in range(FIRST_DEVICE_SLOT, LAST_DEVICE_SLOT + 1) if slot not in used]
    placed = []
    for number, device in enumerate(devices):
        if device.slot:
            placed.append(device)
        elif free:
            placed.append(replace(device, slot=free.pop(0)))
        else:
            raise OptionError(
                f"{where}devices[{number}]",
                device.identifier,
                f"{len(placed)} devices on the root bus, or several of them in a switch, bridge or multifunction",
                "no slot is left",
            )
    return tuple(placed)


def mac_address(host: str, identifier: str) -> str:
    """The MAC address of a network card: always the same for a host's name and a device's id."""
    digest = hashlib.sha256(f"{host}/{identifier}".encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


@dataclass(frozen=True)
class Placed:
    """One device with the address at which the guest will see it, and the ``-device`` position that leads there."""

    device: Device
    address: str
    bus: str
    position: str


@dataclass
class Layout:
    """Bridges and ports in the order of the command line, and the devices with their addresses."""

    bridges: list[str] = field(default_factory=list)
    placed: list[Placed] = field(default_factory=list)


def layout(host: HostSpec) -> Layout:
    """Where everything sits.

    Bus numbers: SeaBIOS walks the root bus in ascending order of slots and numbers each bridge's secondary bus as it
    meets it, going down before going on (src/fw/pciinit.c, pci_bios_init_bus_rec); Linux keeps these numbers.
    """
    found = Layout()
    bus = 0
    for number, device in enumerate(sorted(host.devices, key=lambda one: one.slot), start=1):
        slot = device.slot
        port = f"port.{device.identifier}"
        if device.kind in DEVICE_TYPES and not DEVICE_TYPES[device.kind].express:
            found.placed.append(Placed(device, f"0000:00:{slot:02x}.0", "pcie.0", f"addr={slot:#x}"))
            continue
        found.bridges.append(f"pcie-root-port,id={port},bus=pcie.0,addr={slot:#x},chassis={number},slot={number}")
        bus += 1
        if device.kind == "bridge":
            found.bridges.append(join(f"pcie-pci-bridge,id={device.identifier},bus={port}", device.properties))
            bus += 1
            for place, member in enumerate(device.devices, start=1):
                address = f"0000:{bus:02x}:{place:02x}.0"
                found.placed.append(Placed(member, address, device.identifier, f"addr={place:#x}"))
        elif device.kind == "switch":
            found.bridges.append(join(f"x3130-upstream,id={device.identifier},bus={port}", device.properties))
            bus += 1
            for place, member in enumerate(device.devices):
                down = f"{device.identifier}.{place}"
                chassis = 0x40 + number
                found.bridges.append(
                    f"xio3130-downstream,id={down},bus={device.identifier},addr={place:#x},"
                    f"chassis={chassis},slot={place}"
                )
                bus += 1
                found.placed.append(Placed(member, f"0000:{bus:02x}:00.0", down, "addr=0x0"))
        elif device.kind == "multifunction":
            for place, member in enumerate(device.devices):
                position = f"addr=0x0.{place:#x}" + (",multifunction=on" if place == 0 else "")
                found.placed.append(Placed(member, f"0000:{bus:02x}:00.{place}", port, position))
        else:
            found.placed.append(Placed(device, f"0000:{bus:02x}:00.0", port, "addr=0x0"))
    return found


def join(head: str, properties: t.Iterable[tuple[str, str]]) -> str:
    """A value of the emulator's option syntax with properties added to it."""
    return ",".join([head, *(f"{key}={escape(value)}" for key, value in properties)])


def escape(value: str) -> str:
    """A comma inside a value of the emulator's option syntax is written twice."""
    return value.replace(",", ",,")


def disk_file(device: Device) -> str:
    """The name of the file behind a declared disk, in the host's directory."""
    return f"{device.identifier}.raw"


def describe(host: HostSpec) -> list[Json]:
    """The declared devices with the address each will have in the guest, in the order of the declaration."""
    where = {placed.device.identifier: placed for placed in layout(host).placed}
    rows = []
    for top in host.devices:
        for device in top.members():
            row: Json = {"id": device.identifier, "type": device.kind, "address": where[device.identifier].address}
            row["behind"] = top.identifier if top.devices else None
            row["mac"] = device.mac or None
            row["serial"] = device.serial or None
            row["size"] = device.size or None
            rows.append(row)
    return rows
