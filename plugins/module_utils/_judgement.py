# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What was seen of a guest, held against what was promised. Pure: what is compared was gathered before."""

from __future__ import annotations

import dataclasses
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._evidence import (
    CAPABILITY_SETS,
    GuestReport,
    PassedDevice,
    ProcessState,
    QemuWords,
    peer_to_peer,
)
from ansible_collections.iommufd.host.plugins.module_utils._nodes import LEGACY_CONTAINER

Json = dict[str, t.Any]

_REMEDIES = {
    "cannot_open": "Leave the nodes with root (the role iommufd.host.access in mode launcher), or name a user who is "
    "no member of the group that owns them.",
    "seccomp": "Take a QEMU that is built with seccomp.",
    "drivers": "See whether the host's own kernel drives the device with these modules.",
    "devices_returned": "End the process that holds it; bind the device again (iommufd.host.vfio_bind).",
    "devices_clean": "See whether the device has a way to be reset (reset_method in sysfs); take its power once.",
    "confined": "See whether libvirt's security driver is on (security_driver in /etc/libvirt/qemu.conf).",
}


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What was promised.

    Attributes:
        launcher: one of :data:`_backend.LAUNCHERS`.
        passed: whether the launcher opens the nodes for iommufd and passes the descriptors; else QEMU opens them.
        objects: iommufd object to the number of devices on it, of those that the guest has from its start.
        peak: the same, with those that are plugged in later: the greatest number at once.
        user: name, uid and gid of the process; None: any that is not root.
        groups: ids of the further groups that it may be in.
        accounting: who is charged for memory pinned over iommufd: "process", "user" (the kernel's default), or "any".
        nodes: those that its cgroup has to allow, because something in there opens them.
        closed: whether its cgroup has to deny every other node.
        confined: whether it has to have a profile of AppArmor or a context of SELinux.
        bounded: whether the bounding set of capabilities has to be empty, too. libvirt leaves it, which is no privilege
            for a process that cannot gain any (NoNewPrivs).
    """

    launcher: str = "direct"
    passed: bool = True
    objects: t.Mapping[str, int] = dataclasses.field(default_factory=dict)
    peak: t.Mapping[str, int] = dataclasses.field(default_factory=dict)
    user: tuple[str, int, int] | None = None
    groups: frozenset[int] = frozenset()
    accounting: str = "process"
    nodes: tuple[str, ...] = ()
    closed: bool = False
    confined: bool = False
    bounded: bool = True


@dataclasses.dataclass
class Witnesses:
    """Everything that was seen of one run.

    Attributes:
        expected: what was promised.
        devices: those of the guest.
        memory: bytes of the guest.
        process: state of the process while the guest used the devices; None: it never came to that.
        numbers: name of an object or address of a device to the descriptor that the process was to have for it.
        same: the same names to whether that is our own open file; missing or None: the kernel does not tell.
        refusals: node to the kernel's refusal when the same user tried to open it; None: it could open it.
        qemu: QEMU's words.
        guest: the guest's words.
        exit_status: of QEMU; negative: the signal; None: it had to be killed.
        returned: address to what is wrong with the device afterwards; empty: nothing.
        changed: address to what is different in its configuration space afterwards; empty: nothing.
        plugged: what was seen of each device that was plugged in (see :class:`_hot_plug.HotPlug`).
    """

    expected: Expectation
    devices: t.Sequence[PassedDevice]
    memory: int
    process: ProcessState | None
    numbers: t.Mapping[str, int]
    same: t.Mapping[str, bool | None]
    refusals: t.Mapping[str, str | None]
    qemu: QemuWords
    guest: GuestReport
    exit_status: int | None
    returned: t.Mapping[str, str]
    changed: t.Mapping[str, str] = dataclasses.field(default_factory=dict)
    plugged: t.Sequence[Json] = ()

    def on(self, backend: str) -> list[PassedDevice]:
        """The devices on a backend."""
        return [device for device in self.devices if device.backend == backend]


Item = t.Callable[[str, t.Optional[bool], str], None]


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

    if seen.process is None:
        name = "one_descriptor" if len(seen.expected.objects) == 1 else "descriptors"
        item(name, False, "the guest never came so far that its process could be looked at")
    else:
        _judge_descriptors(seen, seen.process, item)
        _judge_process(seen, seen.process, item)
    _judge_guest(seen, item)
    _judge_plugging(seen, item)
    _judge_end(seen, item)
    return checks


# -- descriptors -------------------------------------------------------------------------------------------------------


def _judge_descriptors(seen: Witnesses, state: ProcessState, item: Item) -> None:
    expected = seen.expected
    count, wanted = len(state.iommu), len(expected.objects)
    said = f"{count} open /dev/iommu in the process ({_list(state.iommu)})"
    if wanted == 1:
        item("one_descriptor", count == 1, said)
    else:
        item("descriptors", count == wanted, f"{said} for {wanted} iommufd objects")
    if expected.objects:
        _judge_iommufd(seen, state, item)
    _judge_legacy(seen, state, item)


def _judge_iommufd(seen: Witnesses, state: ProcessState, item: Item) -> None:
    expected = seen.expected
    mine = {name: seen.numbers[name] for name in expected.objects if name in seen.numbers}
    if expected.launcher == "direct":
        same = [seen.same.get(name) if number in state.iommu else False for name, number in mine.items()]
        if None in same:
            item("same_open_file", None, "the kernel does not compare open files (kcmp, CONFIG_KCMP)")
        else:
            held = "is" if all(same) else "is not"
            item("same_open_file", all(same), f"its /dev/iommu {held} the open file of the launcher (kcmp)")
    name = "passed" if expected.passed else "opened_by_qemu"
    if seen.qemu.traces:
        # 1: QEMU opened it itself; 0: it came from outside.
        wrong = [
            f"fd={number} owned={owned}" for number, owned, _users in seen.qemu.connects if owned == expected.passed
        ]
        known = mine if set(expected.peak) <= set(mine) else {}  # one that is made later has a number that QEMU chose
        strange = [number for number, _owned, _users in seen.qemu.connects if known and number not in known.values()]
        good = "owned=0: the descriptor came from outside" if expected.passed else "owned=1: it opened the node itself"
        bad = "it opened itself" if expected.passed else "came from outside"
        said = f"QEMU says {good}"
        if wrong or strange:
            said = f"QEMU used a descriptor that {bad}: {_list(wrong or strange)}"
        item(name, not wrong and not strange, said)
        users = sorted(seen.qemu.users().values())
        spread = "" if len(users) == 1 else f" (of {len(users)} objects)"
        number = len(seen.on("iommufd"))
        item(
            "shared",
            users == sorted(expected.peak.values()),
            f"QEMU says users={_list(users)}{spread} for {number} devices",
        )
    else:
        for one in (name, "shared"):
            item(one, None, "this QEMU's trace does not go to its standard error")
    _judge_cdevs(seen, state, item)


def _judge_cdevs(seen: Witnesses, state: ProcessState, item: Item) -> None:
    """The process holds the cdevs of its devices, each once, and no other."""
    devices = [device for device in seen.on("iommufd") if not device.plugged]
    numbers = list(state.cdevs.values())
    problems = []
    missing = [
        device.address
        for device in devices
        if device.number not in numbers
        or (device.address in seen.numbers and state.cdevs.get(seen.numbers[device.address]) != device.number)
    ]
    foreign = [number for number, cdev in state.cdevs.items() if cdev not in [device.number for device in devices]]
    twice = [device.address for device in devices if numbers.count(device.number) > 1]
    differs = [device.address for device in devices if seen.same.get(device.address) is False]
    for what, found in (
        ("not held", missing),
        ("held more than once", twice),
        ("not the launcher's open file", differs),
        ("further vfio devices held", foreign),
    ):
        if found:
            problems.append(f"{what}: {_list(found)}")
    nodes = _list(device.node for device in devices)
    name = "devices_passed" if seen.expected.passed else "devices_held"
    item(name, not problems, "; ".join(problems) or f"holds {nodes}, and no other")


def _judge_legacy(seen: Witnesses, state: ProcessState, item: Item) -> None:
    groups = {device.group_node for device in seen.on("legacy") if not device.plugged}
    held = sorted(set(state.legacy))
    if not groups:
        item("no_legacy", not held, f"holds {_list(held)}" if held else "no legacy container or group is open")
        return
    wanted = sorted({LEGACY_CONTAINER, *groups})
    item("legacy_held", held == wanted, f"holds {_list(held)}" + ("" if held == wanted else f", not {_list(wanted)}"))


# -- the process -------------------------------------------------------------------------------------------------------


def _judge_process(seen: Witnesses, state: ProcessState, item: Item) -> None:
    threads = state.threads
    first = threads[0] if threads else {}
    count = f"{len(threads)} threads"
    _judge_user(seen.expected, threads, item)
    kinds = [kind for kind in CAPABILITY_SETS if seen.expected.bounded or kind != "CapBnd"]
    sets = [f"{kind}={fields.get(kind)}" for fields in threads for kind in kinds if _bits(fields.get(kind))]
    empty = "all sets" if seen.expected.bounded else "all sets but the bounding one"
    item("no_capabilities", bool(threads) and not sets, _list(sets[:5]) if sets else f"{empty} empty, {count}")
    bound = bool(threads) and all(fields.get("NoNewPrivs") == "1" for fields in threads)
    item("no_new_privileges", bound, f"NoNewPrivs={first.get('NoNewPrivs')}")
    filtered = bool(threads) and all(fields.get("Seccomp") == "2" for fields in threads)
    item("seccomp", filtered, f"Seccomp={first.get('Seccomp')} ({'filtered' if filtered else 'not filtered'}, {count})")
    if seen.refusals:
        name = seen.expected.user[0] if seen.expected.user else "its user"
        opened = [node for node, refusal in seen.refusals.items() if refusal is None]
        refused = ", ".join(f"{node}: {refusal}" for node, refusal in seen.refusals.items() if refusal is not None)
        item("cannot_open", not opened, f"{name} itself can open {', '.join(opened)}" if opened else refused)
    _judge_accounting(seen, state, item)
    _judge_cgroup(seen.expected, state, item)
    if seen.expected.confined:
        free = state.profile is None or state.profile.startswith("unconfined")
        item("confined", not free, f"profile {state.profile or 'none'}")


def _judge_user(expected: Expectation, threads: t.Sequence[t.Mapping[str, str]], item: Item) -> None:
    first = threads[0] if threads else {}
    ids = ", ".join(f"{key} {first.get(key, '?')}" for key in ("Uid", "Gid", "Groups"))
    if expected.user is None:
        right = bool(threads) and all(
            "0" not in fields.get("Uid", "0").split() and "0" not in fields.get("Gid", "0").split()
            for fields in threads
        )
        item("user", right, f"runs as {ids}")
        return
    name, uid, gid = expected.user
    allowed = {str(number) for number in (gid, *expected.groups)}
    right = bool(threads) and all(
        fields.get("Uid", "").split() == [str(uid)] * 4
        and fields.get("Gid", "").split() == [str(gid)] * 4
        and set(fields.get("Groups", "?").split()) <= (allowed if expected.launcher != "direct" else set())
        for fields in threads
    )
    groups = "without further groups" if not expected.groups else f"with the groups {_list(sorted(expected.groups))}"
    count = f"{len(threads)} threads"
    item("user", right, f"{count} run as {name} ({uid}:{gid}) {groups}" if right else f"runs as {ids}")


def _judge_accounting(seen: Witnesses, state: ProcessState, item: Item) -> None:
    """Pinned memory is charged: for the legacy container to the process, for iommufd as was set."""
    legacy = 1 if seen.on("legacy") else 0
    locked, pinned = state.locked or 0, state.pinned or 0
    objects = len(seen.expected.objects)
    # A little of a PC's memory is no target of DMA (the window at 0xa0000), so it is never pinned.
    one = seen.memory * 9 // 10
    by_process = locked >= one * (objects + legacy)
    by_user = locked >= one * legacy and pinned >= one * objects
    right = {"process": by_process, "user": by_user, "any": by_process or by_user}[seen.expected.accounting]
    limit = "none" if state.memlock is None else f"{state.memlock >> 20} MiB"
    item(
        "accounting",
        right,
        f"{locked >> 20} MiB are charged to the process itself, {pinned >> 20} MiB pinned, limit {limit}",
    )


def _judge_cgroup(expected: Expectation, state: ProcessState, item: Item) -> None:
    if not expected.nodes and not expected.closed:
        return
    denied = [node for node in expected.nodes if state.allowed.get(node) is False]
    open_to = [node for node, allowed in state.allowed.items() if allowed and node not in expected.nodes]
    unclear = [node for node, allowed in state.allowed.items() if allowed is None]
    where = f"cgroup {state.cgroup}"
    if expected.closed and state.enforced is False:
        item("device_policy", False, f"{where} has no device policy")
    elif denied or (expected.closed and open_to):
        words = f"denies {_list(denied)}" if denied else f"allows {_list(open_to)}, too"
        item("device_policy", False, f"{where} {words}")
    elif state.enforced is None or unclear:
        item(
            "device_policy",
            None,
            f"what {where} allows cannot be read back ({_list(unclear) if unclear else 'no filter'})",
        )
    else:
        others = [node for node in state.allowed if node not in expected.nodes]
        rest = f", denies {_list(others)}" if expected.closed and others else ""
        item("device_policy", True, f"{where} allows {_list(expected.nodes)}{rest}")


# -- the guest ---------------------------------------------------------------------------------------------------------


class _Seen:
    """What the guest said of its devices, sorted into what it means."""

    def __init__(self) -> None:
        self.unseen: list[str] = []
        self.undriven: list[str] = []
        self.excused: list[str] = []
        self.driven: list[str] = []
        self.moved: list[str] = []
        self.unmoved: list[str] = []
        self.linked: list[str] = []
        self.unlinked: list[str] = []

    def add(self, device: PassedDevice, said: t.Mapping[str, str]) -> None:
        """Take what was said of one device."""
        if said.get("vendor") != device.vendor_id or said.get("device") != device.device_id:
            found = f"{said.get('vendor')}:{said.get('device')} instead of {device.vendor_id}:{device.device_id}"
            self.unseen.append(f"{device.address} ({'missing' if not said or 'missing' in said else found})")
            return
        if said.get("driver"):
            self.driven.append(f"{device.address}: {said['driver']}")
        elif device.firmware:
            self.excused.append(f"{device.address}: {_list(device.drivers)} may want firmware, which the guest has not")
        elif device.drivers:
            self.undriven.append(f"{device.address}: {_list(device.drivers)} did not attach")
        self._add_disk(device, said)
        self._add_network(device, said)

    def _add_disk(self, device: PassedDevice, said: t.Mapping[str, str]) -> None:
        if "disk" in said:
            # At least what was asked for: the kernel may read more of its own accord.
            whole = _integer(said.get("dma_bytes")) >= _integer(said.get("asked_bytes"))
            agrees = said.get("sha256_first") == said.get("sha256_second")
            wrote = said.get("scratch_wrote")
            kept = wrote is None or (bool(wrote) and wrote == said.get("scratch_read"))
            if whole and agrees and kept:
                scratch = (
                    "" if wrote is None else f", {_integer(said.get('scratch_bytes'))} bytes written and read back"
                )
                self.moved.append(f"{device.address}: {_integer(said.get('dma_bytes'))} bytes{scratch}")
            else:
                self.unmoved.append(
                    f"{device.address}: {_integer(said.get('dma_bytes'))} of {said.get('asked_bytes')} bytes"
                    + ("" if agrees else ", two reads differ")
                    + ("" if kept else ", what was written is not what was read back")
                )
        elif device.class_id.startswith("0x0108") and said.get("driver"):
            self.unmoved.append(f"{device.address}: the driver shows no disk")

    def _add_network(self, device: PassedDevice, said: t.Mapping[str, str]) -> None:
        if "interface" not in said:
            return
        if said.get("carrier") == "1":
            self.linked.append(f"{device.address}: link up")
        else:
            self.unlinked.append(f"{device.address}: no link")
        if "frames_sent" in said:
            sent, received = _integer(said.get("frames_sent")), _integer(said.get("frames_received"))
            words = f"{device.address}: {sent} frames sent, {received} received"
            (self.moved if sent and received else self.unmoved).append(words)


def _judge_guest(seen: Witnesses, item: Item) -> None:
    if not seen.guest.ready:
        item("devices_seen", False, "the guest did not come so far as to report")
        return
    found = _Seen()
    for device in seen.devices:
        found.add(device, seen.guest.devices.get(device.slot, {}))
    total = len(seen.devices)
    item(
        "devices_seen",
        not found.unseen,
        f"not seen: {'; '.join(found.unseen)}" if found.unseen else f"{total} of {total}",
    )
    if found.undriven:
        refused = [f"not loaded: {text}" for text in seen.guest.refused]
        item("drivers", False, "; ".join([*found.undriven, *refused]))
    elif found.excused or not found.driven:
        item("drivers", None, "; ".join(found.excused) or "no driver of this kernel claims these devices")
    else:
        item("drivers", True, ", ".join(found.driven))
    if found.unmoved:
        item("dma", False, "; ".join(found.unmoved))
    elif found.moved:
        item("dma", True, ", ".join(found.moved))
    else:
        item("dma", None, "none of the devices is a disk, which is what the guest reads by DMA")
    _judge_transfers(seen, item)
    if found.linked or found.unlinked:
        # A cable that is not there says nothing about the passing of the device.
        item("link", None if found.unlinked else True, ", ".join([*found.unlinked, *found.linked]))


def _judge_transfers(seen: Witnesses, item: Item) -> None:
    """One device wrote to another, in a guest that has devices which do so when told."""
    if not seen.guest.transfers:
        return
    lost = [one for one in seen.guest.transfers if one[2] != one[3]]
    words = f"{len(seen.guest.transfers) - len(lost)} of {len(seen.guest.transfers)} writes to another device arrived"
    slots = {device.slot for device in seen.on("iommufd")}
    over_iommufd = any(slots & set(one[:2]) for one in lost)
    memory = {slot: spans for slot, spans in seen.guest.memory.items() if slot in slots}
    if lost and over_iommufd and peer_to_peer(seen.qemu, memory)["works"] is False:
        # What QEMU said before has come true.
        item("peer_to_peer", None, f"{words}: iommufd does not map devices for each other here")
    else:
        item("peer_to_peer", not lost, words)


def _judge_plugging(seen: Witnesses, item: Item) -> None:
    if not seen.plugged:
        return
    wrong = [f"{one['address']}: {one['problem']}" for one in seen.plugged if one.get("problem")]
    used = [f"{one['address']} at {one['guest_address']}" for one in seen.plugged]
    item("hot_plug", not wrong, "; ".join(wrong) or f"plugged in, used and removed: {_list(used)}")
    kept = [one for one in seen.plugged if one.get("object_refused") is not None]
    if kept:
        held = all(one["object_refused"] for one in kept)
        item("object_in_use", held, "QEMU keeps an iommufd object that a device is on" if held else "QEMU gave it up")


# -- the end -----------------------------------------------------------------------------------------------------------


def _judge_end(seen: Witnesses, item: Item) -> None:
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
    if seen.changed:
        wrong = [f"{address}: {what}" for address, what in seen.changed.items() if what]
        item("devices_clean", not wrong, "; ".join(wrong) or "their configuration is as before")


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
