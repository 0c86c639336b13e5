# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What is seen of a guest and of the process that runs it, and the judgement of it.

Three witnesses are heard, none of them takes another's word: the kernel (``/proc`` of the process, kcmp), QEMU (its
trace and messages) and the guest (its report over a serial port). :func:`judge` is pure.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host

Json = dict[str, t.Any]
Number = tuple[int, int]

#: Keys of capability sets in /proc/PID/status: inheritable, permitted, effective, bounding, ambient.
CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")

# Major 10 is misc; 196 is VFIO_MINOR, the fixed minor of the legacy container /dev/vfio/vfio (linux/miscdevice.h).
_LEGACY_CONTAINER = (10, 196)

_CONTROL = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[@-Z\\-_c])|[\x00-\x08\x0b-\x1f\x7f]")


# -- the guest ---------------------------------------------------------------------------------------------------------


class GuestReport:
    """The guest's own words on its second serial port: lines ``SUBJECT KEY VALUE``.

    Lines of another form are kept in ``stray`` and otherwise ignored: whatever else a guest writes there is no report.

    Attributes:
        guest: what it says of itself: ``init`` and ``ready`` (seconds since its boot), ``kernel``; ``refused`` is a
            list of modules that could not be loaded, each with the reason.
        devices: guest address to what it says of that device.
    """

    def __init__(self) -> None:
        self.guest: dict[str, str] = {}
        self.refused: list[str] = []
        self.devices: dict[str, dict[str, str]] = {}
        self.memory: dict[str, list[tuple[int, int, int]]] = {}
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

    def distinct(self) -> list[str]:
        """The last 20 of its words, each once, without its own name before them."""
        seen: list[str] = []
        for word in self.words:
            word = re.sub(r"^\S*qemu\S*: ", "", word).strip()
            if word and word not in seen:
                seen.append(word)
        return seen[-20:]

    def said(self) -> str:
        """The last of its words in one line; empty where it said nothing."""
        return " / ".join(self.distinct()[-4:])


def peer_to_peer(words: QemuWords, memory: t.Mapping[str, t.Sequence[tuple[int, int, int]]]) -> Json:
    """Whether the devices' BARs could be mapped for the devices on the same descriptor.

    Args:
        words: QEMU's trace: the ranges it mapped, with the kernel's answer.
        memory: where the guest sees the BARs: guest address to (BAR, first, last address).

    Returns:
        ``works`` (None: nothing was tried, or not seen), ``mapped`` and ``refused`` (number of BARs), ``detail``.
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
        detail = complaint or f"the kernel refused to map {refused} BARs"
    elif mapped:
        works, detail = True, f"{mapped} BARs were mapped and none was refused"
    else:
        works, detail = None, "no BAR was seen to be mapped"
    return {"works": works, "mapped": mapped, "refused": refused, "detail": detail}


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
    """

    iommu: list[int]
    cdevs: dict[int, Number]
    legacy: list[str]
    threads: list[dict[str, str]]
    memlock: int | None
    locked: int | None
    pinned: int | None


def observe(host: Host, process: int, iommu: Number) -> ProcessState:
    """Read the state of a process.

    Args:
        host: whose /proc.
        process: id.
        iommu: device number of /dev/iommu.
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
        elif number == _LEGACY_CONTAINER or number[0] == majors.get("vfio"):
            state.legacy.append(host.readlink(f"{base}/fd/{name}") or f"{number[0]}:{number[1]}")
    for task in host.listdir(f"{base}/task"):
        state.threads.append(_fields(host.read_text(f"{base}/task/{task}/status")))
    status_fields = _fields(host.read_text(f"{base}/status"))
    state.locked = _kib(status_fields.get("VmLck"))
    state.pinned = _kib(status_fields.get("VmPin"))
    limit = re.search(r"^Max locked memory +(\d+) ", host.read_text(f"{base}/limits") or "", re.MULTILINE)
    state.memlock = int(limit.group(1)) if limit else None
    return state


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


# -- the judgement -----------------------------------------------------------------------------------------------------


_REMEDIES = {
    "cannot_open": "Leave the nodes with root (the role iommufd.host.access in mode launcher), or name a user who is "
    "no member of the group that owns them.",
    "seccomp": "Take a QEMU that is built with seccomp.",
    "drivers": "See whether the host's own kernel drives the device with these modules.",
    "devices_returned": "End the process that holds it; bind the device again (iommufd.host.vfio_bind).",
}


@dataclasses.dataclass
class PassedDevice:
    """What is known of a passed device beforehand.

    Attributes:
        address: on the host.
        slot: in the guest.
        node: path of its vfio device.
        number: device number of that.
        descriptor: the launcher's own, and the one the process inherits.
        vendor_id: as sysfs says it ("0x8086").
        device_id: likewise.
        class_id: likewise ("0x010802").
        drivers: modules that were given to the guest for it.
        firmware: firmware files that these may ask for.
    """

    address: str
    slot: str
    node: str
    number: Number
    descriptor: int
    vendor_id: str
    device_id: str
    class_id: str
    drivers: t.Sequence[str] = ()
    firmware: t.Sequence[str] = ()


@dataclasses.dataclass
class Witnesses:
    """Everything that was seen of one run.

    Attributes:
        devices: what was passed.
        iommu: the launcher's descriptor of /dev/iommu.
        user: name, uid and gid that the process was to have.
        memory: bytes of the guest.
        process: state of the process while the guest used the devices; None: it never came to that.
        same: descriptors of the process that kcmp found to be our open file of the same number; missing: not told.
        refusals: node to the kernel's refusal when the same user tried to open it; None: it could open it.
        qemu: QEMU's words.
        guest: the guest's words.
        exit_status: of QEMU; negative: the signal; None: it had to be killed.
        returned: address to what is wrong with the device afterwards; empty: nothing.
    """

    devices: t.Sequence[PassedDevice]
    iommu: int
    user: tuple[str, int, int]
    memory: int
    process: ProcessState | None
    same: t.Mapping[int, bool | None]
    refusals: t.Mapping[str, str | None]
    qemu: QemuWords
    guest: GuestReport
    exit_status: int | None
    returned: t.Mapping[str, str]


def judge(seen: Witnesses) -> list[Json]:
    """Hold what was seen against what was promised.

    Returns:
        One check for each observation, so that what failed is what did not hold: ``id``, ``status`` (ok; fail; skip:
        could not be seen here, for the reason given), ``detail``, and ``remedy`` of what failed, None where there is
        none.
    """
    checks: list[Json] = []

    def item(name: str, status: bool | None, detail: str) -> None:
        word = "skip" if status is None else "ok" if status else "fail"
        remedy = _REMEDIES.get(name) if status is False else None
        checks.append({"id": name, "status": word, "detail": detail, "remedy": remedy})

    _judge_descriptors(seen, item)
    _judge_process(seen, item)
    _judge_guest(seen, item)
    item(
        "powered_off",
        seen.exit_status == 0,
        "the guest powered itself off"
        if seen.exit_status == 0
        else "QEMU had to be killed"
        if seen.exit_status is None
        else f"QEMU ended with status {seen.exit_status}",
    )
    wrong = [f"{address}: {what}" for address, what in seen.returned.items() if what]
    if seen.returned:
        item("devices_returned", not wrong, "; ".join(wrong) or "still on vfio and held by no process")
    else:
        item("devices_returned", None, "none was opened")
    return checks


Item = t.Callable[[str, t.Optional[bool], str], None]


def _judge_descriptors(seen: Witnesses, item: Item) -> None:
    state = seen.process
    if state is None:
        item("one_descriptor", False, "the guest never came so far that its process could be looked at")
        return
    count = len(state.iommu)
    item("one_descriptor", count == 1, f"{count} open /dev/iommu in the process ({_list(state.iommu)})")
    same = seen.same.get(seen.iommu) if seen.iommu in state.iommu else False
    if same is None:
        item("same_open_file", None, "the kernel does not compare open files (kcmp, CONFIG_KCMP)")
    else:
        is_not = "is" if same else "is not"
        item("same_open_file", same, f"its /dev/iommu {is_not} the open file of the launcher (kcmp)")

    if seen.qemu.traces:
        others = [f"fd={number} owned={owned}" for number, owned, _users in seen.qemu.connects if owned]
        strange = [number for number, _owned, _users in seen.qemu.connects if number != seen.iommu]
        item(
            "passed",
            not others and not strange,
            "QEMU says owned=0: the descriptor came from outside"
            if not others and not strange
            else f"QEMU used a descriptor that it opened itself: {'; '.join(others) or _list(strange)}",
        )
        users = max(users for _number, _owned, users in seen.qemu.connects)
        item("shared", users == len(seen.devices), f"QEMU says users={users} for {len(seen.devices)} devices")
    else:
        for name in ("passed", "shared"):
            item(name, None, "this QEMU's trace does not go to its standard error")

    expected = {device.descriptor: device.number for device in seen.devices}
    foreign = [number for number in state.cdevs if number not in expected]
    missing = [device.address for device in seen.devices if state.cdevs.get(device.descriptor) != device.number]
    differs = [device.address for device in seen.devices if seen.same.get(device.descriptor) is False]
    nodes = ", ".join(device.node for device in seen.devices)
    problems = [
        f"not held: {', '.join(missing)}" if missing else "",
        f"not the launcher's open file: {', '.join(differs)}" if differs else "",
        f"further vfio devices held: {_list(foreign)}" if foreign else "",
    ]
    said = "; ".join(part for part in problems if part)
    item("devices_passed", not said, said or f"holds {nodes}, and no other")
    held = ", ".join(state.legacy)
    item("no_legacy", not held, f"holds {held}" if held else "no legacy container or group is open")


def _judge_process(seen: Witnesses, item: Item) -> None:
    state = seen.process
    if state is None:
        return
    name, uid, gid = seen.user
    threads = state.threads
    first = threads[0] if threads else {}
    count = f"{len(threads)} threads"
    right = bool(threads) and all(
        fields.get("Uid", "").split() == [str(uid)] * 4
        and fields.get("Gid", "").split() == [str(gid)] * 4
        and not fields.get("Groups", "?").split()
        for fields in threads
    )
    ids = ", ".join(f"{key} {first.get(key, '?')}" for key in ("Uid", "Gid", "Groups"))
    item("user", right, f"{count} run as {name} ({uid}:{gid}) without further groups" if right else f"runs as {ids}")
    sets = [f"{key}={fields.get(key)}" for fields in threads for key in CAPABILITY_SETS if _bits(fields.get(key))]
    item("no_capabilities", bool(threads) and not sets, _list(sets[:5]) if sets else f"all sets empty, {count}")
    bound = bool(threads) and all(fields.get("NoNewPrivs") == "1" for fields in threads)
    item("no_new_privileges", bound, f"NoNewPrivs={first.get('NoNewPrivs')}")
    filtered = bool(threads) and all(fields.get("Seccomp") == "2" for fields in threads)
    item("seccomp", filtered, f"Seccomp={first.get('Seccomp')} ({'filtered' if filtered else 'not filtered'}, {count})")
    opened = [node for node, refusal in seen.refusals.items() if refusal is None]
    refused = ", ".join(f"{node}: {refusal}" for node, refusal in seen.refusals.items() if refusal is not None)
    item("cannot_open", not opened, f"{name} itself can open {', '.join(opened)}" if opened else refused)
    charged = state.locked or 0
    # A little of a PC's memory is no target of DMA (the window at 0xa0000), so it is never pinned.
    item(
        "accounting",
        charged >= seen.memory * 9 // 10,
        f"{charged >> 20} MiB are charged to the process itself, {(state.pinned or 0) >> 20} MiB pinned, "
        f"limit {'none' if state.memlock is None else f'{state.memlock >> 20} MiB'}",
    )


def _judge_guest(seen: Witnesses, item: Item) -> None:
    if not seen.guest.ready:
        item("devices_seen", False, "the guest did not come so far as to report")
        return
    unseen: list[str] = []
    undriven: list[str] = []
    excused: list[str] = []
    driven: list[str] = []
    read: list[str] = []
    unread: list[str] = []
    for device in seen.devices:
        said = seen.guest.devices.get(device.slot, {})
        if said.get("vendor") != device.vendor_id or said.get("device") != device.device_id:
            found = f"{said.get('vendor')}:{said.get('device')} instead of {device.vendor_id}:{device.device_id}"
            unseen.append(f"{device.address} ({'missing' if not said or 'missing' in said else found})")
            continue
        if said.get("driver"):
            driven.append(f"{device.address}: {said['driver']}")
        elif device.firmware:
            excused.append(f"{device.address}: {_list(device.drivers)} may want firmware, which the guest has not")
        elif device.drivers:
            undriven.append(f"{device.address}: {_list(device.drivers)} did not attach")
        if "disk" in said:
            # At least what was asked for: the kernel may read more of its own accord.
            whole = _integer(said.get("dma_bytes")) >= _integer(said.get("asked_bytes"))
            agrees = said.get("sha256_first") == said.get("sha256_second")
            if whole and agrees:
                read.append(f"{device.address}: {_integer(said.get('dma_bytes'))} bytes")
            else:
                unread.append(
                    f"{device.address}: {_integer(said.get('dma_bytes'))} of {said.get('asked_bytes')} bytes"
                    + ("" if agrees else ", two reads differ")
                )
        elif device.class_id.startswith("0x0108") and said.get("driver"):
            unread.append(f"{device.address}: the driver shows no disk")
    total = len(seen.devices)
    item("devices_seen", not unseen, f"not seen: {'; '.join(unseen)}" if unseen else f"{total} of {total}")
    if undriven:
        refused = [f"not loaded: {text}" for text in seen.guest.refused]
        item("drivers", False, "; ".join([*undriven, *refused]))
    elif excused or not driven:
        item("drivers", None, "; ".join(excused) or "no driver of this kernel claims these devices")
    else:
        item("drivers", True, ", ".join(driven))
    if unread:
        item("dma", False, "; ".join(unread))
    elif read:
        item("dma", True, ", ".join(read))
    else:
        item("dma", None, "none of the devices is a disk, which is what the guest reads by DMA")


def _bits(value: str | None) -> bool:
    """Whether a capability set is not empty; one that is missing or no number counts as not empty."""
    try:
        return int(value or "?", 16) != 0
    except ValueError:
        return True


def _integer(value: str | None) -> int:
    try:
        return int(value or "0")
    except ValueError:
        return 0


def _list(values: t.Iterable[t.Any]) -> str:
    return ", ".join(str(value) for value in values) or "none"
