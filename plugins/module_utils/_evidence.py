# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What is seen of a guest and of the process that runs it.

Three witnesses are heard, none of them takes another's word: the kernel (``/proc`` of the process, kcmp), QEMU (its
trace and messages) and the guest (its report over a serial port).
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._device_filter import allows_node, read_filter
from ansible_collections.iommufd.host.plugins.module_utils._host import Host

Json = dict[str, t.Any]
Number = tuple[int, int]

#: Keys of capability sets in /proc/PID/status: inheritable, permitted, effective, bounding, ambient.
CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")

# Major 10 is misc; 196 is VFIO_MINOR, the fixed minor of the legacy container /dev/vfio/vfio (linux/miscdevice.h).
LEGACY_NUMBER = (10, 196)

_CONTROL = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[@-Z\\-_c])|[\x00-\x08\x0b-\x1f\x7f]")


# -- the guest ---------------------------------------------------------------------------------------------------------


class GuestReport:
    """The guest's own words on its second serial port: lines ``SUBJECT KEY VALUE``.

    Lines of another form are kept in ``stray`` and otherwise ignored: whatever else a guest writes there is no report.

    Attributes:
        guest: what it says of itself: ``init`` and ``ready`` (seconds since its boot), ``kernel``.
        refused: modules that could not be loaded, each with the reason.
        devices: guest address to what it says of that device.
        memory: guest address to its BARs in memory, each with its number, first and last address.
        transfers: between two devices, each with the guest addresses of the one that wrote and of the one written to,
            the value that was to arrive, and what did.
    """

    def __init__(self) -> None:
        self.guest: dict[str, str] = {}
        self.refused: list[str] = []
        self.devices: dict[str, dict[str, str]] = {}
        self.memory: dict[str, list[tuple[int, int, int]]] = {}
        self.transfers: list[tuple[str, str, str, str]] = []
        self.stray: list[str] = []
        self._rest = b""

    @property
    def ready(self) -> bool:
        """The guest has said everything and waits for a word to power off."""
        return "ready" in self.guest

    def feed(self, data: bytes) -> None:
        """Take what came in; a line counts once its end has come."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line.decode("utf-8", "replace").strip())

    def _line(self, line: str) -> None:
        match = re.fullmatch(r"(guest|[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) ([a-z0-9_]+)(?: +(.*))?", line)
        if match is None:
            if line:
                self.stray.append(line)
            return
        subject, key, value = match.group(1), match.group(2), (match.group(3) or "").strip()
        if subject == "guest":
            if key == "refused":
                self.refused.append(value)
            else:
                self.guest[key] = value
            return
        device = self.devices.setdefault(subject, {})
        if key == "transfer" and len(value.split()) == 3:
            peer, expected, arrived = value.split()
            self.transfers.append((subject, peer, expected.lower(), arrived.lower()))
            return
        if key == "memory":
            words = value.split()
            try:
                self.memory.setdefault(subject, []).append((int(words[0]), int(words[1], 16), int(words[2], 16)))
            except (IndexError, ValueError):
                self.stray.append(line)
            return
        device[key] = value


def readable(data: bytes) -> list[str]:
    """Console output as lines for a person: without control characters, empty lines and repetitions."""
    text = _CONTROL.sub("", data.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n"))
    lines: list[str] = []
    for line in text.splitlines():
        line = line.rstrip()
        if line and (not lines or lines[-1] != line):
            lines.append(line)
    return lines


def panicked(console: t.Sequence[str]) -> str | None:
    """The line in which the guest's kernel says that it gives up, or None."""
    for line in console:
        if "Kernel panic" in line:
            return line
    return None


# -- QEMU --------------------------------------------------------------------------------------------------------------

_CONNECT = re.compile(r"\biommufd_backend_connect fd=(\d+) owned=(\d+) users=(\d+)")
_BOUND = re.compile(r"\biommufd_cdev_connect_and_bind\s+\[iommufd=(\d+)\].*\(fd=(\d+)\)")
_MAP = re.compile(r"\biommufd_backend_map(?:_file)?_dma\b.*\biova=0x([0-9a-f]+) size=0x([0-9a-f]+).*\((-?\d+)\)\s*$")
_TRACE = re.compile(r"\biommufd_(?:backend|cdev)_[a-z_]+\b")
_PEER_WORDS = ("PCI BAR?", "PCI peer-to-peer transactions on BARs are not supported")


class QemuWords:
    """What QEMU wrote to standard output and standard error: its trace, and words for people.

    Attributes:
        connects: (descriptor, owned, users) of every time a device joined the iommufd object, in order.
        bound: pairs (descriptor of /dev/iommu, descriptor of the device) that QEMU bound.
        maps: (start, end, status) of every range that it mapped for DMA; status 0 is success. End is inclusive.
        words: everything that is no trace, line by line.
    """

    def __init__(self) -> None:
        self.connects: list[tuple[int, int, int]] = []
        self.bound: list[tuple[int, int]] = []
        self.maps: list[tuple[int, int, int]] = []
        self.words: list[str] = []
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take what came in; a line counts once its end has come."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line.decode("utf-8", "replace").rstrip())

    def close(self) -> None:
        """There is no more: a last line without an end counts too."""
        if self._rest:
            self.feed(b"\n")

    def _line(self, line: str) -> None:
        connect = _CONNECT.search(line)
        bound = _BOUND.search(line)
        mapped = _MAP.search(line)
        if connect:
            self.connects.append((int(connect.group(1)), int(connect.group(2)), int(connect.group(3))))
        elif bound:
            self.bound.append((int(bound.group(1)), int(bound.group(2))))
        elif mapped:
            start = int(mapped.group(1), 16)
            self.maps.append((start, start + int(mapped.group(2), 16) - 1, int(mapped.group(3))))
        elif line and not _TRACE.search(line):
            self.words.append(line)

    @property
    def traces(self) -> bool:
        """Whether this QEMU's trace reaches us at all (one built for another trace back end keeps it to itself)."""
        return bool(self.connects)

    def users(self) -> dict[int, int]:
        """Descriptor of each iommufd object to the greatest number of devices that were on it at once."""
        found: dict[int, int] = {}
        for number, _owned, users in self.connects:
            found[number] = max(users, found.get(number, 0))
        return found

    def distinct(self) -> list[str]:
        """The last 20 of its words, each once, without its own name before them."""
        seen: list[str] = []
        for word in self.words:
            word = re.sub(r"^(?:\d{4}-\S+Z )?\S*qemu\S*: ", "", word).strip()
            if word and word not in seen:
                seen.append(word)
        return seen[-20:]

    def said(self) -> str:
        """The last of its words in one line; empty where it said nothing."""
        return " / ".join(self.distinct()[-4:])


def peer_to_peer(
    words: QemuWords,
    memory: t.Mapping[str, t.Sequence[tuple[int, int, int]]],
    transfers: t.Sequence[tuple[str, str, str, str]] = (),
) -> Json:
    """Whether the devices' BARs could be mapped for the devices on the same descriptor.

    Args:
        words: QEMU's trace: the ranges it mapped, with the kernel's answer.
        memory: where the guest sees the BARs of the devices on iommufd: guest address to (BAR, first, last address).
        transfers: what the guest had one device write to another.

    Returns:
        ``works`` (None: nothing was tried, or not seen), ``mapped`` and ``refused`` (number of BARs), ``detail``, and
        ``transfers``, each with ``from``, ``to``, ``expected``, ``arrived`` and ``ok``.
    """
    spans = [span for spans in memory.values() for span in spans]
    mapped = refused = 0
    for _bar, first, last in spans:
        answers = [status for start, end, status in words.maps if start <= last and end >= first]
        if any(answers):
            refused += 1
        elif answers:
            mapped += 1
    complaint = next((word for word in words.distinct() if any(part in word for part in _PEER_WORDS)), None)
    if refused or complaint:
        works: bool | None = False
        detail = (complaint or f"the kernel refused to map {refused} BARs").replace("warning: ", "", 1)
    elif mapped:
        works, detail = True, f"{mapped} BARs were mapped and none was refused"
    else:
        works, detail = None, "no BAR was seen to be mapped"
    done = [
        {"from": one, "to": other, "expected": expected, "arrived": arrived, "ok": expected == arrived}
        for one, other, expected, arrived in transfers
    ]
    return {"works": works, "mapped": mapped, "refused": refused, "detail": detail, "transfers": done}


# -- the process -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ProcessState:
    """What /proc tells of a process.

    Attributes:
        iommu: descriptors that are /dev/iommu.
        cdevs: descriptor to device number, for vfio character devices.
        legacy: paths of legacy vfio nodes (container, groups) that it holds.
        threads: for each thread the ids, capability sets, NoNewPrivs and Seccomp of its status file, as text.
        memlock: bytes it may pin; None: unlimited or not told.
        locked: bytes charged to the process itself (VmLck).
        pinned: bytes that the kernel holds in place for it (VmPin).
        cgroup: its cgroup ("/system.slice/x.service").
        allowed: node to whether that cgroup lets it be opened; None: cannot be told.
        enforced: whether a device policy stands before that cgroup at all; None: cannot be told.
        profile: its AppArmor profile or SELinux context; None without any.
    """

    iommu: list[int]
    cdevs: dict[int, Number]
    legacy: list[str]
    threads: list[dict[str, str]]
    memlock: int | None
    locked: int | None
    pinned: int | None
    cgroup: str | None = None
    allowed: dict[str, bool | None] = dataclasses.field(default_factory=dict)
    enforced: bool | None = None
    profile: str | None = None


def observe(host: Host, process: int, iommu: Number, nodes: t.Sequence[str] = ()) -> ProcessState:
    """Read the state of a process.

    Args:
        host: whose /proc.
        process: id.
        iommu: device number of /dev/iommu.
        nodes: those for which its cgroup is asked.
    """
    majors = character_majors(host)
    state = ProcessState([], {}, [], [], None, None, None)
    base = f"/proc/{process}"
    for name in host.listdir(f"{base}/fd"):
        status = host.stat(f"{base}/fd/{name}")
        if status is None or not stat.S_ISCHR(status.st_mode):
            continue
        number = (os.major(status.st_rdev), os.minor(status.st_rdev))
        if number == iommu:
            state.iommu.append(int(name))
        elif number[0] == majors.get("vfio-dev"):
            state.cdevs[int(name)] = number
        elif number == LEGACY_NUMBER or number[0] == majors.get("vfio"):
            state.legacy.append(host.readlink(f"{base}/fd/{name}") or f"{number[0]}:{number[1]}")
    for task in host.listdir(f"{base}/task"):
        state.threads.append(_fields(host.read_text(f"{base}/task/{task}/status")))
    status_fields = _fields(host.read_text(f"{base}/status"))
    state.locked = _kib(status_fields.get("VmLck"))
    state.pinned = _kib(status_fields.get("VmPin"))
    limit = re.search(r"^Max locked memory +(\d+) ", host.read_text(f"{base}/limits") or "", re.MULTILINE)
    state.memlock = int(limit.group(1)) if limit else None
    state.cgroup = _cgroup(host.read_text(f"{base}/cgroup") or "")
    gate = None if state.cgroup is None else read_filter(host, state.cgroup)
    state.enforced = None if gate is None else gate.enforced
    state.allowed = {node: allows_node(host, gate, node) for node in nodes}
    state.profile = (host.read_line(f"{base}/attr/current") or "").strip("\0 \n") or None
    return state


def _cgroup(text: str) -> str | None:
    """The cgroup that device policies hang on: the one of v1's controller, or else of v2."""
    found = None
    for line in text.splitlines():
        _number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if "devices" in controllers.split(","):
            return path
        if not controllers:
            found = path
    return found


def character_majors(host: Host) -> dict[str, int]:
    """Names of character devices in /proc/devices to their major numbers."""
    found: dict[str, int] = {}
    for line in (host.read_text("/proc/devices") or "").partition("Block devices")[0].splitlines():
        words = line.split()
        if len(words) == 2 and words[0].isdigit():
            found[words[1]] = int(words[0])
    return found


def _fields(text: str | None) -> dict[str, str]:
    pairs = (line.partition(":") for line in (text or "").splitlines())
    return {key: value.strip() for key, _colon, value in pairs}


def _kib(value: str | None) -> int | None:
    match = re.match(r"(\d+) kB", value or "")
    return int(match.group(1)) * 1024 if match else None


# -- the devices -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class PassedDevice:
    """A device of the guest, as far as it is known beforehand.

    Attributes:
        address: on the host.
        slot: in the guest.
        node: path of its vfio device; empty where it has none (legacy).
        number: device number of that.
        vendor_id: as sysfs says it ("0x8086").
        device_id: likewise.
        class_id: likewise ("0x010802").
        backend: "iommufd" or "legacy".
        object: the iommufd object that it is on; empty with the legacy container.
        group: its IOMMU group.
        drivers: modules that were given to the guest for it.
        firmware: firmware files that these may ask for.
        plugged: it is plugged in while the guest runs.
    """

    address: str
    slot: str
    node: str
    number: Number
    vendor_id: str
    device_id: str
    class_id: str
    backend: str = "iommufd"
    object: str = "iommufd0"
    group: int = -1
    drivers: t.Sequence[str] = ()
    firmware: t.Sequence[str] = ()
    plugged: bool = False

    @property
    def group_node(self) -> str:
        """The node of its group, which the legacy container wants."""
        return f"/dev/vfio/{self.group}"
