# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""One run of the verification guest: started by its launcher, listened to, looked at, ended, and told of."""

from __future__ import annotations

import collections
import contextlib
import os
import pwd
import re
import selectors
import socket
import time
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import (
    _evidence,
    _guest_image,
    _judgement,
    _launch,
    _launch_direct,
    _launch_libvirt,
    _launch_systemd,
    _launcher,
    _peer_to_peer,
    _qemu_command,
    _qemu_devices,
)
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._hot_plug import HotPlug
from ansible_collections.iommufd.host.plugins.module_utils._iommu import is_vfio_driver
from ansible_collections.iommufd.host.plugins.module_utils._nodes import IOMMU, KVM, LEGACY_CONTAINER
from ansible_collections.iommufd.host.plugins.module_utils._pci import Function, read_function

if t.TYPE_CHECKING:
    from ansible_collections.iommufd.host.plugins.module_utils._guest import Ready

Json = dict[str, t.Any]

MIB = 1 << 20

# What QEMU pins beyond the guest's memory: firmware, video and option ROM regions of a PC, a few MiB; the rest is air.
MEMLOCK_MARGIN = 64 * MIB

CONSOLE_LINES = 25
_CONSOLE_LIMIT = 1 << 20

# A node that no guest has business with: where a unit's policy is closed, it has to deny it.
_FOREIGN_NODE = "/dev/mem"

# The header of a function's configuration space that the kernel gives back to it: class, BARs, ROM, interrupt line.
# Status and the like may change by themselves. Of the command register only bus mastering is vfio's promise (it is off
# while nobody has the device); that it decodes its memory remains from the first use (pci_disable_device).
_HEADER = ((0x08, 0x0E), (0x10, 0x34), (0x3C, 0x3E))
_COMMAND, _BUS_MASTER = 0x04, 0x04


class Run:
    """One run of the guest, with what was seen of it so far.

    Args:
        host: the host.
        ready: what was found on it.
        backends: PCI address to backend, for every device.
    """

    def __init__(self, host: Host, ready: Ready, backends: t.Mapping[str, str]) -> None:
        self.host = host
        self.ready = ready
        self.request = ready.request
        self.passed = self.request.launcher != "self" and not ready.qemu_opens
        self.step = "prepare"
        self.words = _evidence.QemuWords()
        self.report = _evidence.GuestReport()
        self.console = bytearray()
        self.devices = self._devices(backends)
        self.process_state: _evidence.ProcessState | None = None
        self.numbers: dict[str, int] = {}
        self.same: dict[str, bool | None] = {}
        self.refusals: dict[str, str | None] = {}
        self.returned: dict[str, str] = {}
        self.changed: dict[str, str] = {}
        self.plugged: list[Json] = []
        self.exit_status: int | None = None
        self.seconds: dict[str, float] = {}
        self.arguments: list[str] = []
        self.modules: tuple[str, ...] = ()
        self.memlock: int | None = None
        self._headers: dict[str, bytes | None] = {}
        self._started = 0.0
        self._deadline = 0.0

    # -- what it is made of --------------------------------------------------------------------------------------------

    def _devices(self, backends: t.Mapping[str, str]) -> list[_evidence.PassedDevice]:
        ports = {port.order: port for port in self.ports}
        found: list[_evidence.PassedDevice] = []
        count = len(self.ready.functions)
        for number, one in enumerate([*self.ready.functions, *self.ready.plugged]):
            plugged = number >= count
            backend = backends[one.address]
            major, _colon, minor = (one.vfio_number or "0:0").partition(":")
            found.append(
                _evidence.PassedDevice(
                    address=one.address,
                    slot=ports[number - count].guest_address if plugged else _qemu_command.guest_slot(number),
                    node=one.vfio_device or "",
                    number=(int(major), int(minor)),
                    vendor_id=one.vendor_id or "",
                    device_id=one.device_id or "",
                    class_id=one.class_id or "",
                    backend=backend,
                    object=self._object(one.address) if backend == "iommufd" else "",
                    group=-1 if one.iommu_group is None else one.iommu_group,
                    plugged=plugged,
                )
            )
        return found

    def _object(self, address: str) -> str:
        return self.request.objects.get(address, _qemu_devices.DEFAULT_OBJECT)

    @property
    def ports(self) -> list[_qemu_command.Port]:
        first = len(self.ready.functions)
        return [
            _qemu_command.Port(first + order, order, *_windows(one)) for order, one in enumerate(self.ready.plugged)
        ]

    @property
    def objects(self) -> list[str]:
        """The iommufd objects that the guest has from its start."""
        return list(dict.fromkeys(one.object for one in self.devices if one.object and not one.plugged))

    def _plan(self) -> _launch.Plan:
        ready, request = self.ready, self.request
        image = _guest_image.read_kernel(self.host, ready.kernel)
        ready.release = _guest_image.kernel_release(image, ready.machine.architecture)
        index = _guest_image.ModuleIndex(self.host, ready.release)
        functions = [*ready.functions, *ready.plugged]
        guests = [
            _guest_image.GuestDevice(
                device.slot,
                one.class_id or "",
                one.modalias or "",
                plugged=device.plugged,
                expendable=one.address in request.expendable,
            )
            for device, one in zip(self.devices, functions)
        ]
        settle = int(max(10.0, min(request.timeout / 4, 120.0)))
        initramfs = _guest_image.build(
            self.host, index, ready.busybox, guests, ready.machine.report, settle=settle, arp_target=request.arp_target
        )
        self.modules = initramfs.modules
        for device in self.devices:
            device.drivers = initramfs.drivers[device.slot]
            device.firmware = initramfs.firmware[device.slot]
        spaces = len({one.object for one in self.devices if one.object}) + any(
            one.backend == "legacy" for one in self.devices
        )
        self.memlock = spaces * (request.memory * MIB + MEMLOCK_MARGIN)
        if request.launcher != "direct":
            self.memlock = None  # what other processes of the same user have pinned counts as well
        if request.memlock is not None:
            self.memlock = request.memlock * MIB
        return _launch.Plan(
            host=self.host,
            name=f"iommufd-verify-{os.getpid()}",
            machine=ready.machine,
            qemu=ready.qemu,
            memory=request.memory,
            cpus=request.cpus,
            accelerator=ready.accelerator,
            user=ready.user,
            kernel=image,
            initramfs=initramfs.data,
            devices=[one for one in self.devices if not one.plugged],
            objects=self.objects,
            plugged=[one for one in self.devices if one.plugged],
            ports=self.ports,
            iommu=ready.iommu,
            memlock=self.memlock,
            timeout=request.timeout,
            monitor=bool(ready.plugged),
        )

    def _start(self, plan: _launch.Plan) -> t.ContextManager[_launch.Running]:
        if self.request.launcher == "systemd":
            return _launch_systemd.start(plan)
        if self.request.launcher == "libvirt" or self.ready.qemu_opens:
            return _launch_libvirt.start(plan, self.passed)
        return _launch_direct.start(plan) if self.passed else _launch_direct.start_self(plan)

    # -- running -------------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """Start, listen, look, end; and look at the devices afterwards, however it ended."""
        plan = self._plan()
        nodes = [one.node for one in self.devices if one.backend == "iommufd"]
        # A user whom the host lets open groups for the legacy container may well be let open the others, too.
        lets = self.request.launcher == "systemd" and len(nodes) < len(self.devices)
        if self.request.launcher in ("direct", "systemd") and nodes and not lets:
            self.step = "permissions"
            self.refusals = _launcher.denied(self.ready.user, [IOMMU, *nodes])
        self._headers = {one.address: self._header(one.address) for one in self.devices}
        self.step = "start"
        self._started = time.monotonic()
        self._deadline = self._started + self.request.timeout
        try:
            with self._start(plan) as running:
                self.numbers = running.numbers
                self.arguments = _arguments(self.host, running.pid)
                try:
                    self._listen(running)
                finally:
                    # What it said last is often why it ended.
                    self._hear(running)
                    self.words.close()
        except HostError as error:
            for line in str(error.details.pop("said", "")).split(" / "):
                self.words.feed(line.encode() + b"\n")
            raise
        finally:
            self.seconds["total"] = self._elapsed()
            self._look_at_devices()

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._started, 2)

    def _listen(self, running: _launch.Running) -> None:
        """Until QEMU has ended by itself, or something went wrong."""
        self.step = "boot"
        if not self._pump(running, lambda: self.report.ready, None):
            raise self._ended(running.poll() or 0)
        self.seconds["ready"] = self._elapsed()
        self.step = "look"
        self._look_at_process(running)
        if self.ready.plugged:
            self.step = "hot plug"
            self._plug(running)
        self.step = "power off"
        running.report.send(b"go\n")
        self._pump(running, lambda: False, None)
        self.exit_status = running.poll()
        if self.exit_status != 0:
            raise self._ended(self.exit_status or 0)

    def _pump(self, running: _launch.Running, condition: t.Callable[[], bool], timeout: float | None) -> bool:
        """Take in what is said until a condition holds (True), or time is up or QEMU has ended (False).

        Raises:
            HostError: the guest's own time is up.
        """
        until = None if timeout is None else time.monotonic() + timeout
        on_iommufd = len([one for one in self.devices if one.object and not one.plugged])
        with selectors.DefaultSelector() as selector:
            for source in (running.console, running.report, running.words):
                if source.fileno() >= 0:
                    selector.register(source, selectors.EVENT_READ)
            while True:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise self._timed_out()
                selector.select(min(left, 0.2 if running.words.fileno() >= 0 else 0.1))
                over = running.poll() is not None
                for ended in self._hear(running):
                    with contextlib.suppress(KeyError, ValueError):
                        selector.unregister(ended)
                if "connected" not in self.seconds and len(self.words.connects) >= on_iommufd > 0:
                    self.seconds["connected"] = self._elapsed()
                if "init" in self.report.guest and self.step == "boot":
                    self.step = "guest"
                if condition():
                    return True
                if over or (until is not None and time.monotonic() >= until):
                    return False

    def _hear(self, running: _launch.Running) -> list[t.Any]:
        """Take in what has come so far. Returns the sources from which nothing comes any more."""
        over: list[t.Any] = []
        while True:
            data = running.words.read()
            if not data:
                over += [running.words] if data is None else []
                break
            self.words.feed(data)
        for channel, take in ((running.console, self._take_console), (running.report, self.report.feed)):
            while True:
                data = _receive(channel)
                if not data:
                    over += [channel] if data is None else []
                    break
                take(data)
        return over

    def _take_console(self, data: bytes) -> None:
        self.console += data
        del self.console[:-_CONSOLE_LIMIT]

    def _plug(self, running: _launch.Running) -> None:
        if running.monitor is None:
            raise AssertionError("a guest whose devices are plugged in later has a monitor")
        plug = HotPlug(
            running.monitor,
            self.objects,
            self.passed,
            self.ready.iommu,
            lambda condition, timeout: self._pump(running, condition, timeout),
        )
        self.plugged = plug.seen
        for port, device in zip(self.ports, [one for one in self.devices if one.plugged]):

            def reported(address: str = port.guest_address) -> bool:
                return "reported" in self.report.devices.get(address, {})

            plug.plug(device, port, lambda line: running.report.sendall(f"{line}\n".encode()), reported)

    # -- looking -------------------------------------------------------------------------------------------------------

    def _look_at_process(self, running: _launch.Running) -> None:
        nodes = [*self._expected_nodes(), _FOREIGN_NODE]
        self.process_state = _evidence.observe(self.host, running.pid, self.ready.iommu, nodes)
        for name, descriptor in running.held.items():
            self.same[name] = _launcher.same_open_file(running.pid, descriptor, descriptor)

    def _expected_nodes(self) -> list[str]:
        """Nodes that the cgroup of QEMU lets something open."""
        iommufd = [one for one in self.devices if one.backend == "iommufd" and not one.plugged]
        legacy = [one for one in self.devices if one.backend == "legacy"]
        nodes = [IOMMU, *(one.node for one in iommufd)] if iommufd else []
        nodes += [LEGACY_CONTAINER, *(one.group_node for one in legacy)] if legacy else []
        return [*nodes, KVM] if self.ready.accelerator == "kvm" else nodes

    def _look_at_devices(self) -> None:
        holding = {one.node or one.group_node: one.address for one in self.devices}
        held = holders(self.host, [*holding, *(one.group_node for one in self.devices)])
        for device in self.devices:
            function = read_function(self.host, device.address)
            driver = None if function is None else function.driver
            holder = held.get(device.node) or held.get(device.group_node)
            problem = ""
            if driver is None or not is_vfio_driver(driver):
                problem = f"no longer on vfio-pci ({driver or 'no driver'})"
            elif holder:
                problem = f"still held by {holder}"
            self.returned[device.address] = problem
            before, after = self._headers.get(device.address), self._header(device.address)
            if before is not None:
                self.changed[device.address] = compare_headers(before, after)

    def _header(self, address: str) -> bytes | None:
        content = self.host.read_bytes(f"/sys/bus/pci/devices/{address}/config")
        return content[:64] if content is not None and len(content) >= 64 else None

    # -- telling -------------------------------------------------------------------------------------------------------

    def _timed_out(self) -> HostError:
        waited = f"{self.request.timeout:.0f} s"
        where = {
            "boot": "its kernel had not reached our program" if self.words.connects else "QEMU had not set it up",
            "guest": "it was looking at its devices",
            "look": "it was ready",
            "hot plug": "devices were being plugged in",
            "power off": "it did not power off",
        }.get(self.step, self.step)
        return HostError(
            f"The guest did not finish within {waited} ({self.ready.accelerator}): {where}. "
            f"A larger timeout helps where it is only slow.{self.quotes()}"
        )

    def _ended(self, status: int) -> HostError:
        panic = _evidence.panicked(self.console_lines())
        if panic:
            return HostError(f"The guest's kernel panicked: {panic.strip()}.{self.quotes()}")
        if status != 0 and not self.report.guest:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            return HostError(f"QEMU ended with {how} before the guest ran.{self.explain()}{self.quotes()}")
        how = "powered off or reset" if status == 0 else f"ended (QEMU's status {status})"
        return HostError(f"The guest {how} before it was ready.{self.explain()}{self.quotes()}")

    def explain(self) -> str:
        """What QEMU's words mean, where that is known; begins with a space."""
        meaning = explain(self.words.said())
        return f" {meaning}" if meaning else ""

    def quotes(self) -> str:
        """QEMU's own words and the guest's last lines; begins with a space."""
        said = self.words.said()
        lines = self.console_lines()[-4:]
        quotes = f" QEMU's words: {said.rstrip('.')}." if said else " QEMU said nothing."
        last = " / ".join(lines).rstrip(".")
        return quotes + (f" The guest's last lines: {last}." if lines else " The guest's console is empty.")

    def console_lines(self) -> list[str]:
        """What the guest's kernel said, for a person."""
        return _evidence.readable(bytes(self.console))

    def peer_to_peer(self) -> Json:
        """What was seen of peer-to-peer over iommufd."""
        slots = {one.slot for one in self.devices if one.backend == "iommufd"}
        memory = {slot: spans for slot, spans in self.report.memory.items() if slot in slots}
        found = _evidence.peer_to_peer(self.words, memory, self.report.transfers)
        if not slots:
            found.update(works=None, detail="no device of this guest is on iommufd")
        return found

    def _unsafe_interrupts(self) -> bool:
        """Whether the host lets devices go whose interrupts are not isolated, so that one could forge others'."""
        modules = {"iommufd": "iommufd", "legacy": "vfio_iommu_type1"}
        used = {modules[one.backend] for one in self.devices}
        said = (self.host.read_line(f"/sys/module/{one}/parameters/allow_unsafe_interrupts") for one in used)
        return "Y" in said

    def expectation(self) -> _judgement.Expectation:
        """What the launcher promises."""
        launcher, user = self.request.launcher, self.ready.user
        by_libvirt = launcher == "libvirt" or self.ready.qemu_opens
        counts = collections.Counter(one.object for one in self.devices if one.object and not one.plugged)
        # One after the other: there is never more than one of them.
        peak = counts + collections.Counter({one.object for one in self.devices if one.object and one.plugged})
        return _judgement.Expectation(
            launcher=launcher,
            passed=self.passed,
            objects=counts,
            peak=peak,
            user=None if by_libvirt else (user.name, user.uid, user.gid),
            groups=frozenset(user.groups),
            accounting="any" if by_libvirt else "process" if launcher == "direct" else "user",
            nodes=tuple(self._expected_nodes()) if launcher == "systemd" else (),
            closed=launcher == "systemd",
            confined=by_libvirt and self.ready.confines,
            bounded=not by_libvirt,
        )

    def witnesses(self) -> _judgement.Witnesses:
        """Everything that was seen."""
        return _judgement.Witnesses(
            expected=self.expectation(),
            devices=self.devices,
            memory=self.request.memory * MIB,
            process=self.process_state,
            numbers=self.numbers,
            same=self.same,
            refusals=self.refusals,
            qemu=self.words,
            guest=self.report,
            exit_status=self.exit_status,
            returned=self.returned,
            changed=self.changed,
            plugged=self.plugged,
        )

    def evidence(self) -> Json:
        """Everything that was seen, with the judgement of it."""
        ready, state = self.ready, self.process_state
        first = state.threads[0] if state and state.threads else {}
        connects = self.words.connects
        backends = {one.backend for one in self.devices}
        return {
            "launcher": self.request.launcher,
            "backend": backends.pop() if len(backends) == 1 else "mixed",
            "opened_by": "launcher" if self.passed and self.objects else "qemu",
            "decision": None if ready.decision is None else ready.decision.to_dict(),
            "checks": _judgement.judge(self.witnesses()),
            "devices": [_device_evidence(device, self.report) for device in self.devices],
            "descriptors": {
                "iommu": None if state is None else len(state.iommu),
                "same_open_file": all(self.same[name] or False for name in self.objects if name in self.same)
                if any(name in self.same for name in self.objects)
                else None,
                "owned": max((owned for _number, owned, _users in connects), default=None),
                "users": max((users for _number, _owned, users in connects), default=None),
                "objects": dict(self.expectation().objects),
                "legacy": [] if state is None else state.legacy,
            },
            "process": {
                "user": ready.user.name if self.expectation().user else _name_of(_first_number(first.get("Uid"))),
                "uid": ready.user.uid if not first else _first_number(first.get("Uid")),
                "gid": ready.user.gid if not first else _first_number(first.get("Gid")),
                "groups": first.get("Groups", "").split(),
                "capabilities": {key: first.get(key) for key in _evidence.CAPABILITY_SETS},
                "no_new_privs": first.get("NoNewPrivs") == "1",
                "seccomp": _first_number(first.get("Seccomp")),
                "memlock": self.memlock if state is None else state.memlock,
                "charged": None if state is None else state.locked,
                "pinned": None if state is None else state.pinned,
                "cgroup": None if state is None else state.cgroup,
                "allowed": {} if state is None else state.allowed,
                "profile": None if state is None else state.profile,
                "refusals": self.refusals,
                "arguments": self.arguments,
            },
            "guest": {
                "kernel": self.report.guest.get("kernel"),
                "memory": self.request.memory,
                "cpus": self.request.cpus,
                "modules": list(self.modules),
                "uptime": {key: _seconds(self.report.guest.get(key)) for key in ("init", "loaded", "settled", "ready")},
            },
            "peer_to_peer": {
                **self.peer_to_peer(),
                "kernel": os.uname().release,
                "qemu": ready.qemu_version,
                # What is known of this kernel and QEMU, from this guest or an earlier one.
                "measured": _peer_to_peer.read(self.host, os.uname().release, ready.qemu),
            },
            "hot_plug": self.plugged,
            "qemu": {"path": ready.qemu, "version": ready.qemu_version, "words": self.words.distinct()},
            "unsafe_interrupts": self._unsafe_interrupts(),
            "accelerator": ready.accelerator,
            "accelerator_reason": ready.accelerator_reason,
            "kernel": ready.release,
            "seconds": self.seconds,
        }


def holders(host: Host, nodes: t.Sequence[str]) -> dict[str, str]:
    """Which nodes another process holds open: node to "process 1234 (qemu-system-x86)"."""
    found: dict[str, str] = {}
    if not nodes:
        return found
    own = str(os.getpid())
    for process in host.listdir("/proc"):
        if not process.isdigit() or process == own:
            continue
        for descriptor in host.listdir(f"/proc/{process}/fd"):
            target = host.readlink(f"/proc/{process}/fd/{descriptor}")
            if target is not None and target in nodes and target not in found:
                name = host.read_line(f"/proc/{process}/comm") or "?"
                found[target] = f"process {process} ({name})"
    return found


def compare_headers(before: bytes, after: bytes | None) -> str:
    """What is different in a function's configuration space; empty where nothing is."""
    if after is None:
        return "its configuration space cannot be read any more"
    if after[_COMMAND] & _BUS_MASTER:
        return "it can still do DMA (bus mastering is on)"
    wrong = [f"{start:#04x}" for start, end in _HEADER if before[start:end] != after[start:end]]
    return f"its configuration space differs at {', '.join(wrong)}" if wrong else ""


def _windows(function: Function) -> tuple[int, int]:
    """Memory that a port reserves for a function: below 4 GiB, and prefetchable anywhere; powers of 2, in bytes."""
    low = sum(one["size"] for one in function.bars or [] if one["kind"] == "memory" and not one["prefetchable"])
    high = sum(one["size"] for one in function.bars or [] if one["kind"] == "memory" and one["prefetchable"])

    def window(size: int) -> int:
        # Twice the size leaves room for the alignment; up to 2 MiB is what the firmware reserves anyway.
        return 0 if size <= 2 * MIB else 1 << (2 * size - 1).bit_length()

    return window(low), window(high)


def _receive(channel: socket.socket) -> bytes | None:
    """What has come in; empty: nothing so far; None: nothing ever comes again."""
    try:
        return channel.recv(65536) or None
    except (BlockingIOError, InterruptedError):
        return b""
    except OSError:
        return None


def _arguments(host: Host, process: int) -> list[str]:
    content = host.read_bytes(f"/proc/{process}/cmdline") or b""
    return [word.decode("utf-8", "replace") for word in content.split(b"\0")[:-1]]


def _name_of(uid: int | None) -> str:
    try:
        return pwd.getpwuid(uid).pw_name if uid is not None else "?"
    except KeyError:
        return str(uid)


def _device_evidence(device: _evidence.PassedDevice, report: _evidence.GuestReport) -> Json:
    said = report.devices.get(device.slot, {})
    known = (
        "disk", "interface", "mac", "carrier", "frames_sent", "frames_received", "serial", "model", "config", "bar",
        "interrupts",
    )  # fmt: skip
    found: Json = {
        "address": device.address,
        "guest_address": device.slot,
        "backend": device.backend,
        "iommufd": device.object or None,
        "plugged": device.plugged,
        "vfio_device": device.node,
        "vendor_id": said.get("vendor"),
        "device_id": said.get("device"),
        "class_id": said.get("class"),
        "driver": said.get("driver"),
        "modules": list(device.drivers),
        "memory": [list(span) for span in report.memory.get(device.slot, [])],
        "details": {key: said[key] for key in known if key in said},
        "dma": None,
    }
    if "disk" in said:
        found["dma"] = {
            "bytes": int(said["dma_bytes"]) if said.get("dma_bytes", "").isdigit() else None,
            "sha256": said.get("sha256_first"),
            "agrees": said.get("sha256_first") == said.get("sha256_second"),
            "written": int(said["scratch_bytes"]) if said.get("scratch_bytes", "").isdigit() else 0,
        }
    return found


def _first_number(text: str | None) -> int | None:
    words = (text or "").split()
    return int(words[0]) if words and words[0].isdigit() else None


def _seconds(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


# What QEMU passes on from the kernel, and what it means here: the first pattern that fits.
_MEANINGS = (
    (
        re.compile(r"is not an instance of type vfio-iommu-(legacy|iommufd)"),
        "This QEMU ends where one guest has devices on both backends, which is its own fault (seen with 11.1.2; 10.0 "
        "can do it): give all devices the same backend.",
    ),
    (
        re.compile(r"(bind|attach|set ?up|set iommu).*Operation not permitted", re.IGNORECASE),
        "The kernel does not give the device away. No host driver was seen in its IOMMU group, so it must be that the "
        "IOMMU does not isolate interrupts (no interrupt remapping): turn that on in the firmware. "
        "allow_unsafe_interrupts=1 of iommufd, or of vfio_iommu_type1 for legacy, would override it and is a security "
        "hole.",
    ),
    (
        re.compile(r"(bind|attach).*(Device or resource busy|Invalid argument)", re.IGNORECASE),
        "Another process holds the device or its IOMMU group.",
    ),
    (
        re.compile(r"(IOAS_MAP|map).*Cannot allocate memory", re.IGNORECASE),
        "The guest's memory could not be pinned: the limit of locked memory (RLIMIT_MEMLOCK) or the host's memory is "
        "too small.",
    ),
    (
        re.compile(r"(IOAS_MAP|dma_map).*Invalid argument", re.IGNORECASE),
        "The guest's memory covers addresses that the IOMMU keeps for itself (reserved_regions of the device's IOMMU "
        "group in sysfs), so it cannot be mapped there. virtio-iommu has such on a PC.",
    ),
    (
        re.compile(r"cannot set up guest memory|Cannot allocate memory", re.IGNORECASE),
        "The host has not enough memory for the guest.",
    ),
    (
        re.compile(r"(iommufd|fd).*(not found|invalid|Parameter|unknown)", re.IGNORECASE),
        "This QEMU does not take passed iommufd descriptors (it needs 9.0 or later with CONFIG_IOMMUFD).",
    ),
    (re.compile(r"seccomp|sandbox", re.IGNORECASE), "This QEMU is built without its sandbox (seccomp)."),
)


def explain(words: str) -> str:
    """What QEMU's words mean, or an empty text."""
    for pattern, meaning in _MEANINGS:
        if pattern.search(words):
            return meaning
    return ""
