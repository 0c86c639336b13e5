# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""What a lab host is made of: from its declaration to the emulator's command line.

Everything here but the section on the emulator itself is pure: a declaration goes in, a list of arguments and the
addresses at which the guest will find its devices come out.

Address scheme. The root bus carries at fixed slots what every host has: network 00:02.0, system disk 00:03.0,
entropy 00:04.0, and 00:05.0 for virtio-iommu. The declared devices follow from slot 0x10 on in the order of the
declaration, one slot each, unless ``slot`` names another one. A PCI Express device sits behind a root port in that
slot; the firmware numbers the buses behind the ports in ascending order of their slots, so that the addresses follow
from the declaration alone (see `layout`).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import typing as t
from dataclasses import dataclass, field
from pathlib import Path

Json = t.Dict[str, t.Any]

#: The binary, and the first version with igb, the one emulated network card that has virtual functions.
EMULATOR = "qemu-system-x86_64"
MINIMUM_VERSION = (8, 0)

NETWORK_SLOT = 0x02
DISK_SLOT = 0x03
ENTROPY_SLOT = 0x04
IOMMU_SLOT = 0x05
FIRST_FREE_SLOT = 0x06
FIRST_DEVICE_SLOT = 0x10
#: Slot 0x1f is the chipset's own (ISA bridge, SATA, SMBus).
LAST_DEVICE_SLOT = 0x1E

IOMMUS = ("intel", "virtio", "none")

_NAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")
_IDENTIFIER = re.compile(r"[a-zA-Z][a-zA-Z0-9_-]{0,40}")
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")
_SIZE = re.compile(r"([1-9][0-9]*)([KMGT]?)")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class LabError(Exception):
    """Something that the person at the keyboard can put right: the message says what, and how."""


# --------------------------------------------------------------------------------------------------------------------
# Declarations


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
    options: t.Tuple[str, ...] = ()
    fixed: t.Tuple[str, ...] = ()


_VIRTIO = ("disable-legacy=on", "iommu_platform=on")

DEVICE_TYPES: t.Dict[str, DeviceType] = {
    "nvme": DeviceType("nvme", "NVMe disk", True, False, disk=True, options=("serial",)),
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

#: Declarable things that hold other devices: what they are, and whether what they hold is conventional PCI.
CONTAINER_TYPES: t.Dict[str, t.Tuple[str, bool]] = {
    "bridge": ("several devices behind one conventional PCI bridge: they share an IOMMU group", True),
    "switch": ("several devices behind one PCI Express switch without ACS: they share an IOMMU group", False),
    "multifunction": ("one card with up to 8 functions: they share an IOMMU group", False),
}

_COMMON_OPTIONS = ("type", "id", "properties")
_NETWORK_OPTIONS = ("mac",)
_DISK_OPTIONS = ("size", "content")
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
    properties: t.Tuple[t.Tuple[str, str], ...] = ()
    devices: t.Tuple["Device", ...] = ()

    def members(self) -> t.Iterator["Device"]:
        """The devices that the guest's drivers see: the device itself, or what the container holds."""
        if self.devices:
            for device in self.devices:
                yield from device.members()
        else:
            yield self


@dataclass(frozen=True)
class HostSpec:
    """One declared host, checked. ``memory`` is in MiB."""

    name: str
    image: str
    memory: int = 3072
    cpus: int = 2
    iommu: str = "intel"
    devices: t.Tuple[Device, ...] = ()

    def hardware(self) -> Json:
        """What the emulated hardware depends on: two hosts with the same value have the same command line."""
        return {
            "memory": self.memory,
            "cpus": self.cpus,
            "iommu": self.iommu,
            "devices": [_plain(device) for device in self.devices],
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


def size_in_bytes(text: t.Union[str, int], where: str) -> int:
    """``64M`` in bytes; K, M, G and T are powers of 1024.

    Raises LabError, beginning with ``where``, for anything else.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise LabError(f"{where}: {text!r} is not a size; accepted are whole numbers with K, M, G or T, such as 64M")
    return int(match.group(1)) * _UNITS[match.group(2)]


def parse_host(raw: t.Mapping[str, t.Any], index: int) -> HostSpec:
    """Check one entry of the list of hosts.

    Raises LabError naming the host, the option, the value and what is accepted.
    """
    name = str(raw.get("name") or "")
    if not _NAME.fullmatch(name):
        raise LabError(
            f"hosts[{index}].name: {name!r} is not a host name; accepted are letters, digits and hyphens, at most 63"
        )
    where = f"host {name}"
    known = ("name", "image", "memory", "cpus", "iommu", "devices")
    _refuse_unknown(raw, known, where)
    memory = _whole(raw.get("memory"), 3072, 512, 1 << 20, f"{where}: memory", "MiB")
    cpus = _whole(raw.get("cpus"), 2, 1, 64, f"{where}: cpus", "processors")
    iommu = str(raw.get("iommu") or "intel")
    if iommu not in IOMMUS:
        raise LabError(f"{where}: iommu: {iommu!r} is unknown; accepted are {', '.join(IOMMUS)}")
    declared = raw.get("devices") or []
    if not isinstance(declared, list):
        raise LabError(f"{where}: devices: expected a list, got {type(declared).__name__}")
    counts: t.Dict[str, int] = {}
    taken: t.Dict[str, str] = {}
    devices = [
        _parse_device(entry, f"{where}: devices[{number}]", name, counts, taken, "")
        for number, entry in enumerate(declared)
    ]
    return HostSpec(name, str(raw.get("image") or ""), memory, cpus, iommu, _with_slots(devices, where))


def parse_hosts(raw: t.Sequence[t.Mapping[str, t.Any]]) -> t.List[HostSpec]:
    """Check the list of hosts; raises LabError as `parse_host` does, and for a name given twice."""
    hosts = [parse_host(entry, index) for index, entry in enumerate(raw)]
    seen: t.Set[str] = set()
    for host in hosts:
        if host.name in seen:
            raise LabError(f"host {host.name}: named twice in the list of hosts")
        seen.add(host.name)
    return hosts


def _whole(value: t.Any, default: int, least: int, most: int, where: str, unit: str) -> int:
    if value is None:
        return default
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise LabError(f"{where}: {value!r} is not accepted; accepted are {least} to {most} {unit}")
    return number


def _refuse_unknown(raw: t.Mapping[str, t.Any], known: t.Sequence[str], where: str) -> None:
    for option, value in raw.items():
        if option not in known and value is not None:
            raise LabError(f"{where}: unknown option {option!r} (value {value!r}); accepted are {', '.join(known)}")


def _parse_device(
    raw: t.Any, where: str, host: str, counts: t.Dict[str, int], taken: t.Dict[str, str], container: str
) -> Device:
    types = [*DEVICE_TYPES, *CONTAINER_TYPES]
    if not isinstance(raw, dict) or "type" not in raw:
        raise LabError(f"{where}: {raw!r} is not a device; expected a mapping with type, one of {', '.join(types)}")
    kind = str(raw["type"])
    if kind not in types:
        raise LabError(f"{where}: type: {kind!r} is unknown; accepted are {', '.join(types)}")
    where = f"{where} ({kind})"
    if container:
        if kind in CONTAINER_TYPES:
            raise LabError(f"{where}: a {kind} inside a {container} is not supported")
        if CONTAINER_TYPES[container][1] and not DEVICE_TYPES[kind].conventional:
            fit = [name for name, other in DEVICE_TYPES.items() if other.conventional]
            raise LabError(
                f"{where}: a PCI Express device does not fit behind a conventional bridge; "
                f"accepted are {', '.join(fit)} (or take a switch in place of the bridge)"
            )

    number = counts.get(kind, 0)
    counts[kind] = number + 1
    identifier = str(raw.get("id") or f"{kind}{number}")
    if not _IDENTIFIER.fullmatch(identifier):
        raise LabError(f"{where}: id: {identifier!r} is not accepted; a letter, then letters, digits, - and _")
    if identifier in taken:
        raise LabError(f"{where}: id: {identifier!r} is already the name of {taken[identifier]}")
    taken[identifier] = where

    known = list(_COMMON_OPTIONS)
    if not container:
        known.append("slot")
    if kind in CONTAINER_TYPES:
        known.append("devices")
    else:
        device_type = DEVICE_TYPES[kind]
        known += device_type.options
        known += _NETWORK_OPTIONS if device_type.network else ()
        known += _DISK_OPTIONS if device_type.disk else ()
    _refuse_unknown(raw, known, where)

    slot = _whole(raw.get("slot"), 0, FIRST_FREE_SLOT, LAST_DEVICE_SLOT, f"{where}: slot", "(slots of the root bus)")
    properties = raw.get("properties") or {}
    if not isinstance(properties, dict):
        raise LabError(f"{where}: properties: expected a mapping, got {properties!r}")
    pairs = tuple((str(key), _property(value)) for key, value in properties.items())

    if kind in CONTAINER_TYPES:
        inner = raw.get("devices")
        if not isinstance(inner, list) or not inner:
            raise LabError(f"{where}: devices: expected a list of at least one device, got {inner!r}")
        most = 8 if kind == "multifunction" else 31
        if len(inner) > most:
            raise LabError(f"{where}: devices: {len(inner)} devices, at most {most} are accepted")
        members = tuple(
            _parse_device(entry, f"{where}: devices[{place}]", host, counts, taken, kind)
            for place, entry in enumerate(inner)
        )
        return Device(kind, identifier, slot, properties=pairs, devices=members)

    mac, size, serial, content = "", 0, "", ""
    if device_type.network:
        mac = str(raw.get("mac") or mac_address(host, identifier)).lower()
        if not _MAC.fullmatch(mac):
            raise LabError(f"{where}: mac: {mac!r} is not a MAC address such as 52:54:00:12:34:56")
    if device_type.disk:
        size = size_in_bytes(raw.get("size") or _DEFAULT_DISK, f"{where}: size")
        content = str(raw.get("content") or f"{host} {identifier}\n")
        if len(content.encode()) > size:
            raise LabError(f"{where}: content: longer than the disk ({size} bytes)")
    if "serial" in device_type.options:
        serial = str(raw.get("serial") or f"LAB-{identifier}")
        if not re.fullmatch(r"[\x21-\x2b\x2d-\x7e]{1,20}", serial):
            raise LabError(f"{where}: serial: {serial!r} is not accepted; 1 to 20 ASCII characters, no space or comma")
    return Device(kind, identifier, slot, mac, size, serial, content, pairs)


def _property(value: t.Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _with_slots(devices: t.Sequence[Device], where: str) -> t.Tuple[Device, ...]:
    """Give every device without a slot the next free one, in the order of the declaration."""
    used: t.Dict[int, str] = {}
    for device in devices:
        if device.slot:
            if device.slot in used:
                raise LabError(
                    f"{where}: slot {device.slot:#x} is claimed by {used[device.slot]} and by {device.identifier}"
                )
            used[device.slot] = device.identifier
    free = [slot for slot in range(FIRST_DEVICE_SLOT, LAST_DEVICE_SLOT + 1) if slot not in used]
    placed = []
    for device in devices:
        if not device.slot:
            if not free:
                raise LabError(
                    f"{where}: more devices than slots ({LAST_DEVICE_SLOT - FIRST_DEVICE_SLOT + 1}); "
                    "put several of them behind one switch, bridge or multifunction card"
                )
            device = Device(**{**device.__dict__, "slot": free.pop(0)})
        placed.append(device)
    return tuple(placed)


def mac_address(host: str, identifier: str) -> str:
    """The MAC address of a network card: always the same for a host's name and a device's id."""
    digest = hashlib.sha256(f"{host}/{identifier}".encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


# --------------------------------------------------------------------------------------------------------------------
# Layout: which device sits where


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

    bridges: t.List[str] = field(default_factory=list)
    placed: t.List[Placed] = field(default_factory=list)


def layout(host: HostSpec) -> Layout:
    """Where everything sits.

    Bus numbers: SeaBIOS walks the root bus in ascending order of slots and numbers each bridge's secondary bus as it
    meets it, going down before going on (src/fw/pciinit.c, pci_bios_init_bus_rec); Linux keeps these numbers.
    """
    found = Layout()
    bus = 0
    for number, device in enumerate(sorted(host.devices, key=lambda one: one.slot), start=1):
        slot = device.slot
        port = f"port-{device.identifier}"
        if device.kind in DEVICE_TYPES and not DEVICE_TYPES[device.kind].express:
            found.placed.append(Placed(device, f"0000:00:{slot:02x}.0", "pcie.0", f"addr={slot:#x}"))
            continue
        found.bridges.append(f"pcie-root-port,id={port},bus=pcie.0,addr={slot:#x},chassis={number},slot={number}")
        bus += 1
        if device.kind == "bridge":
            found.bridges.append(_join(f"pcie-pci-bridge,id={device.identifier},bus={port}", device.properties))
            bus += 1
            for place, member in enumerate(device.devices, start=1):
                address = f"0000:{bus:02x}:{place:02x}.0"
                found.placed.append(Placed(member, address, device.identifier, f"addr={place:#x}"))
        elif device.kind == "switch":
            found.bridges.append(_join(f"x3130-upstream,id={device.identifier},bus={port}", device.properties))
            bus += 1
            for place, member in enumerate(device.devices):
                down = f"{device.identifier}-{place}"
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


def _join(head: str, properties: t.Iterable[t.Tuple[str, str]]) -> str:
    return ",".join([head, *(f"{key}={_escape(value)}" for key, value in properties)])


def _escape(value: str) -> str:
    """A comma inside a value of the emulator's option syntax is written twice."""
    return value.replace(",", ",,")


def disk_file(device: Device) -> str:
    """The name of the file behind a declared disk, in the host's directory."""
    return f"{device.identifier}.raw"


def describe(host: HostSpec) -> t.List[Json]:
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


# --------------------------------------------------------------------------------------------------------------------
# The command line


def machine_arguments(accelerator: str, memory: int, cpus: int) -> t.List[str]:
    """The arguments that the machine of an image build and of a host have in common."""
    kvm = accelerator == "kvm"
    # A split interrupt controller is what interrupt remapping asks for under KVM.
    machine = "q35,kernel-irqchip=split" if kvm else "q35"
    return [
        EMULATOR,
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", machine),
        *("-accel", "kvm" if kvm else "tcg,thread=multi"),
        # Under TCG "max" shows AMD SVM to the guest, so that it has a working /dev/kvm of its own.
        *("-cpu", "max,la57=off"),
        *("-smp", str(cpus), "-m", str(memory)),
    ]


def host_arguments(host: HostSpec, accelerator: str, port: int, uuid: str) -> t.List[str]:
    """The command line of a host. All file names are relative to the host's directory, the process's own.

    ``port`` is the port of 127.0.0.1 that leads to the guest's ssh server; ``uuid`` makes the process recognizable.
    """
    arguments = machine_arguments(accelerator, host.memory, host.cpus)
    arguments += ["-name", f"guest={host.name},debug-threads=on", "-uuid", uuid, "-pidfile", "qemu.pid"]
    arguments += ["-chardev", "file,id=serial,path=serial.log,append=on", "-serial", "chardev:serial"]
    arguments += ["-chardev", "socket,id=qmp,path=qmp.sock,server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
    # The guest's identity comes from files, so that no private key shows in the list of processes.
    for name in CREDENTIALS:
        arguments += ["-fw_cfg", f"name=opt/io.systemd.credentials/{name},file=identity/{name}"]

    def device(text: str) -> None:
        arguments.extend(["-device", text])

    # The IOMMU comes first: it takes charge only of what is created after it.
    if host.iommu == "intel":
        device("intel-iommu,intremap=on,device-iotlb=on")
    elif host.iommu == "virtio":
        device(f"virtio-iommu-pci,bus=pcie.0,addr={IOMMU_SLOT:#x}")

    arguments += ["-netdev", f"user,id=net,ipv6=off,hostfwd=tcp:127.0.0.1:{port}-:22"]
    device(f"virtio-net-pci,netdev=net,mac={mac_address(host.name, 'net')},romfile=,bus=pcie.0,addr={NETWORK_SLOT:#x}")
    # The overlay is thrown away with the host: nothing is gained by waiting for the disk below.
    arguments += ["-drive", "if=none,id=system,file=disk.qcow2,format=qcow2,cache=unsafe,discard=unmap"]
    device(f"virtio-blk-pci,drive=system,bootindex=0,bus=pcie.0,addr={DISK_SLOT:#x}")
    device(f"virtio-rng-pci,bus=pcie.0,addr={ENTROPY_SLOT:#x}")

    plan = layout(host)
    for bridge in plan.bridges:
        device(bridge)
    for placed in plan.placed:
        one = placed.device
        kind = DEVICE_TYPES[one.kind]
        text = f"{kind.model},id={one.identifier},bus={placed.bus},{placed.position}"
        for fixed in kind.fixed:
            text += f",{fixed}"
        if kind.network:
            # A network of its own, with nothing outside it.
            arguments += ["-netdev", f"user,id=net-{one.identifier},restrict=on"]
            text += f",netdev=net-{one.identifier},mac={one.mac},romfile="
        if kind.disk:
            arguments += [
                "-drive",
                f"if=none,id=disk-{one.identifier},file={disk_file(one)},format=raw,cache=unsafe",
            ]
            text += f",drive=disk-{one.identifier}"
        if one.serial:
            text += f",serial={_escape(one.serial)}"
        device(_join(text, one.properties))
    return arguments


#: What a host learns from its emulator at boot (systemd's system credentials); see the image's identity unit.
CREDENTIALS = ("lab.hostname", "lab.authorized_keys", "lab.host_key")


# --------------------------------------------------------------------------------------------------------------------
# The emulator and the machine that it runs on

_KVM_CREATE_VM = 0xAE01  # linux/kvm.h: _IO(KVMIO, 0x01)


def accelerator(root: Path = Path("/")) -> str:
    """``kvm`` where it really works, else ``tcg``.

    The node alone proves nothing: a machine without vmx or svm may still offer a /dev/kvm that opens.
    """
    try:
        flags = (root / "proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "tcg"
    if not re.search(r"^flags\s*:.*\b(vmx|svm)\b", flags, re.MULTILINE):
        return "tcg"
    try:
        node = os.open(root / "dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return "tcg"
    try:
        os.close(fcntl.ioctl(node, _KVM_CREATE_VM, 0))
    except OSError:
        return "tcg"
    finally:
        os.close(node)
    return "kvm"


def emulator_version() -> t.Tuple[int, int]:
    """Version of the emulator; raises LabError where it is missing or too old, naming the package."""
    path = shutil.which(EMULATOR)
    if path is None:
        raise LabError(f"{EMULATOR} is not installed; on Debian and Ubuntu: apt install qemu-system-x86 qemu-utils")
    output = subprocess.run([path, "--version"], stdout=subprocess.PIPE, text=True, check=False).stdout
    match = re.search(r"version (\d+)\.(\d+)", output)
    if match is None:
        raise LabError(f"{path} --version prints no version: {output.strip()!r}")
    version = (int(match.group(1)), int(match.group(2)))
    if version < MINIMUM_VERSION:
        raise LabError(
            f"{path} is QEMU {version[0]}.{version[1]}; lab hosts need {MINIMUM_VERSION[0]}.{MINIMUM_VERSION[1]} or "
            "later (igb, and an emulated host that boots guests of its own); on Debian 12: "
            "apt install -t bookworm-backports qemu-system-x86"
        )
    return version


def memory_available(root: Path = Path("/")) -> t.Optional[int]:
    """MiB that new processes can have without swapping (MemAvailable), None where the kernel does not say."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) // 1024 if match else None


def process_alive(pid: int) -> bool:
    """Whether the process exists."""
    try:
        os.kill(pid, 0)
    except OSError as exc:
        return exc.errno == errno.EPERM
    return True
