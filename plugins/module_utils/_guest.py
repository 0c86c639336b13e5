# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The verification: a guest with the named devices on one descriptor, from the first check to the verdict.

:func:`prepare` reads the host and finds everything that stands in the way; :func:`verify` opens, starts, listens,
looks, and ends. Between the two nothing is changed; after the second nothing is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
import selectors
import socket
import time
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _evidence, _initramfs, _launcher, _qemu_command
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import (
    blocks,
    is_vfio_driver,
    read_group,
    read_members,
)
from ansible_collections.iommufd.host.plugins.module_utils._pci import Function, read_function
from ansible_collections.iommufd.host.plugins.module_utils._qemu import read_qemu

Json = dict[str, t.Any]

MIB = 1 << 20
LEAST_MEMORY = 128

# What QEMU pins beyond the guest's memory: firmware, video and option ROM regions of a PC, a few MiB; the rest is air.
_MEMLOCK_MARGIN = 64 * MIB
# What QEMU itself needs beside the guest's memory (Debian's binary with its libraries; with TCG its translation cache).
_QEMU_MEMORY = {"kvm": 96, "tcg": 224}

BINARIES = (
    "/opt/iommufd-host/qemu/current/bin/qemu-system-x86_64",
    "qemu-system-x86_64",
    "/usr/libexec/qemu-kvm",
    "qemu-kvm",
)
_CONSOLE_LINES = 25
_CONSOLE_LIMIT = 1 << 20


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user wants.

    Attributes:
        devices: PCI addresses as the kernel writes them, in order, each once.
        user: name of the unprivileged user that QEMU runs as.
        qemu: path of the binary; empty: the distribution's.
        busybox: path; empty: found.
        kernel: path of the guest's kernel; empty: the running one.
        memory: of the guest, in MiB.
        cpus: of the guest.
        timeout: seconds for everything from the start of QEMU to its end.
        accelerator: "auto", "kvm" or "tcg".
        pending: earlier steps that turn the IOMMU on, load modules and bind devices are still to come, so what they
            bring about is only told where it is missing.
        qemu_pending: an earlier step that installs QEMU is still to come, so the one that is here does not count.
    """

    devices: tuple[str, ...]
    user: str = "nobody"
    qemu: str = ""
    busybox: str = ""
    kernel: str = ""
    memory: int = 256
    cpus: int = 1
    timeout: float = 600.0
    accelerator: str = "auto"
    pending: bool = False
    qemu_pending: bool = False


@dataclasses.dataclass
class Ready:
    """What was found on the host; complete when ``problems`` and ``passing`` are empty.

    Attributes:
        problems: what stands in the way, each a sentence or two with the remedy.
        passing: the same, of what earlier steps of a play bring about: the IOMMU, modules, nodes, bound devices.
    """

    request: Request
    user: _launcher.User
    functions: list[Function] = dataclasses.field(default_factory=list)
    iommu: tuple[int, int] = (0, 0)
    qemu: str = ""
    qemu_version: str = ""
    kernel: str = ""
    release: str = ""
    busybox: str = ""
    accelerator: str = "tcg"
    accelerator_reason: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)
    passing: list[str] = dataclasses.field(default_factory=list)

    def sentence(self) -> str:
        """What is going to happen, for check mode."""
        devices = ", ".join(self.request.devices) or "devices that are not there yet"
        return (
            f"boot a guest of {self.request.memory} MiB with {devices} on one /dev/iommu descriptor, with QEMU as "
            f"{self.user.name} ({self.accelerator})"
        )


# -- preparing ---------------------------------------------------------------------------------------------------------


def prepare(host: Host, request: Request) -> Ready:
    """Read the host and find what stands in the way. Changes nothing, starts nothing that stays.

    Raises:
        OptionError: an option names what the host does not have.
        HostError: something stands in the way (all of it in one message).
    """
    _check_options(request)
    ready = Ready(request, _launcher.find_user(request.user))
    _check_iommu(host, ready)
    _check_devices(host, ready)
    _check_programs(host, ready)
    _choose_accelerator(host, ready)
    _check_memory(host, ready)
    problems = ready.problems if request.pending else [*ready.passing, *ready.problems]
    if problems:
        raise HostError(problems[0] if len(problems) == 1 else _numbered(problems), step="prepare", problems=problems)
    return ready


def _numbered(problems: t.Sequence[str]) -> str:
    return f"{len(problems)} things stand in the way: " + " ".join(
        f"({number}) {problem}" for number, problem in enumerate(problems, 1)
    )


def _check_options(request: Request) -> None:
    if platform.machine() != "x86_64":
        raise HostError(f"The verification guest is a PC so far; this host is {platform.machine()}.", step="prepare")
    most = _qemu_command.MOST_DEVICES
    if len(request.devices) > most or not (request.devices or request.pending):
        raise OptionError("devices", list(request.devices), f"1 to {most} devices")
    if request.memory < LEAST_MEMORY:
        raise OptionError("memory", request.memory, f"{LEAST_MEMORY} MiB or more")
    if not 1 <= request.cpus <= 64:
        raise OptionError("cpus", request.cpus, "1 to 64")
    if request.timeout < 10:
        raise OptionError("timeout", request.timeout, "10 seconds or more")


def _check_iommu(host: Host, ready: Ready) -> None:
    number = host.read_line("/sys/class/misc/iommu/dev")
    if number is None:
        release = os.uname().release
        config = host.read_text(f"/boot/config-{release}") or host.read_text(f"/lib/modules/{release}/config") or ""
        known = host.read_text(f"/lib/modules/{release}/modules.dep") or ""
        if re.search(r"/iommufd\.ko[.a-z]*:", known):
            why = "the module iommufd is there but not loaded: modprobe iommufd"
        elif "# CONFIG_IOMMUFD is not set" in config:
            why = (
                f"the kernel {release} is built without iommufd (CONFIG_IOMMUFD); the role iommufd.host.kernel adds it "
                "where that is possible"
            )
        else:
            why = f"the kernel {release} has no module iommufd (it needs Linux 6.2 with CONFIG_IOMMUFD)"
        ready.passing.append(f"There is no {_launcher.IOMMU_NODE}: {why}.")
        return
    ready.iommu = _device_number(number)
    if not host.exists(_launcher.IOMMU_NODE):
        ready.passing.append(
            f"iommufd is loaded, but there is no node {_launcher.IOMMU_NODE}: udevadm trigger /sys/class/misc/iommu."
        )


def _device_number(text: str) -> tuple[int, int]:
    major, _colon, minor = text.partition(":")
    return int(major), int(minor)


def _check_devices(host: Host, ready: Ready) -> None:
    nodes: dict[str, str] = {}  # node to the address whose use it is
    for address in ready.request.devices:
        function = read_function(host, address)
        if function is None:
            continue
        ready.functions.append(function)
        if function.driver is None or not is_vfio_driver(function.driver):
            has = f"driven by {function.driver}" if function.driver else "without a driver"
            ready.passing.append(f"{address} is {has}, not on vfio-pci: bind it first (iommufd.host.vfio_bind).")
            continue
        if function.iommu_group is None:
            ready.passing.append(f"{address} is in no IOMMU group: the IOMMU is off (role iommufd.host.kernel).")
            continue
        node = function.vfio_device
        if node is None:
            ready.passing.append(
                f"{address} is on {function.driver} but has no vfio character device: the vfio module in use is built "
                "without CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or later has it)."
            )
            continue
        if not host.exists(node):
            ready.passing.append(f"{address}: there is no node {node}: udevadm trigger.")
        nodes[node] = address
        nodes[f"/dev/vfio/{function.iommu_group}"] = address
        group = read_group(host, function.iommu_group)
        others = [] if group is None else [one for one in read_members(host, group).values() if blocks(one)]
        if others:
            named = ", ".join(f"{one.address} ({one.driver})" for one in others)
            ready.passing.append(
                f"{address} cannot be used: its IOMMU group {function.iommu_group} also holds {named}, which a host "
                "driver uses. Bind them to vfio-pci too, or take another device."
            )
    for held, process in holders(host, list(nodes)).items():
        ready.problems.append(f"{nodes[held]} is in use: {process} holds {held}. End that guest first.")


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


def _check_programs(host: Host, ready: Ready) -> None:
    request = ready.request
    binaries = (request.qemu,) if request.qemu else BINARIES
    path = next((found for found in map(host.which, binaries) if found), None)
    if request.qemu_pending:
        ready.qemu = path or binaries[0]
    elif path is None:
        ready.problems.append(
            f"QEMU is not installed ({', '.join(binaries)}). On Debian and Ubuntu: apt install qemu-system-x86."
        )
    else:
        ready.qemu = path
        _check_qemu(host, ready)
    try:
        ready.busybox = _initramfs.find_busybox(host, request.busybox)
    except HostError as error:
        ready.problems.append(error.message)
    try:
        ready.release = os.uname().release
        ready.kernel = request.kernel or _initramfs.find_kernel(host, ready.release)
        if not host.exists(ready.kernel):
            ready.problems.append(f"There is no kernel image {ready.kernel}.")
    except HostError as error:  # an earlier step may reboot into another kernel
        ready.passing.append(error.message)


def _check_qemu(host: Host, ready: Ready) -> None:
    found = read_qemu(host, ready.qemu)
    ready.qemu_version = found.version or ""
    if found.problem or not found.version:
        ready.problems.append(f"{ready.qemu} does not say its version: {found.problem or 'it said nothing'}.")
    elif not found.iommufd or not found.passing:
        what = "takes no passed vfio descriptors" if found.iommufd else "has no iommufd"
        ready.problems.append(
            f"{ready.qemu} ({found.version}) {what} (seen in -object help and -device vfio-pci,help): it needs QEMU "
            "9.0 or later with CONFIG_IOMMUFD. The role iommufd.host.qemu builds one (qemu_source)."
        )


def _choose_accelerator(host: Host, ready: Ready) -> None:
    descriptor, why = _launcher.open_kvm(host)
    if descriptor is not None:
        os.close(descriptor)
    wanted = ready.request.accelerator
    ready.accelerator_reason = why
    if wanted == "auto":
        ready.accelerator = "tcg" if descriptor is None else "kvm"
    else:
        ready.accelerator = wanted
        if wanted == "kvm" and descriptor is None:
            raise OptionError("accelerator", wanted, "auto or tcg on this host", why)


def _check_memory(host: Host, ready: Ready) -> None:
    needed = ready.request.memory + _QEMU_MEMORY[ready.accelerator]
    match = re.search(r"^MemAvailable: +(\d+) kB", host.read_text("/proc/meminfo") or "", re.MULTILINE)
    if match and int(match.group(1)) // 1024 < needed:
        ready.problems.append(
            f"The guest needs {needed} MiB ({ready.request.memory} MiB of its own, all of it pinned, and QEMU's), but "
            f"the host has {int(match.group(1)) // 1024} MiB available."
        )


# -- verifying ---------------------------------------------------------------------------------------------------------


def verify(host: Host, ready: Ready) -> Json:
    """Boot the guest and judge what was seen.

    Returns:
        The module's result: ``verified`` (True) and ``evidence``.

    Raises:
        HostError: it was not verified. The message names the step, QEMU's own words and the guest's last lines;
            ``details`` has ``step``, ``evidence`` as far as there is any, ``qemu_words`` and ``console``.
    """
    run = _Run(host, ready)
    try:
        run.go()
    except HostError as error:
        error.details.setdefault("step", run.step)
        error.details.setdefault("verified", False)
        if run.arguments:
            error.details.setdefault("evidence", run.evidence())
        error.details.setdefault("qemu_words", run.words.distinct())
        error.details.setdefault("console", run.console_lines()[-_CONSOLE_LINES:])
        raise
    evidence = run.evidence()
    failed = [item for item in evidence["checks"] if item["status"] == "fail"]
    if failed:
        listed = "; ".join(f"{item['id']}: {item['detail']}" for item in failed)
        raise HostError(
            f"The guest booted, but not everything holds: {listed}.{run.quotes()}",
            step="judge",
            verified=False,
            evidence=evidence,
            qemu_words=run.words.distinct(),
            console=run.console_lines()[-_CONSOLE_LINES:],
        )
    return {"verified": True, "evidence": evidence}


class _Run:
    """One run of the guest, with what was seen of it so far."""

    def __init__(self, host: Host, ready: Ready) -> None:
        self.host = host
        self.ready = ready
        self.step = "prepare"
        self.words = _evidence.QemuWords()
        self.report = _evidence.GuestReport()
        self.console = bytearray()
        self.devices: list[_evidence.PassedDevice] = []
        self.iommu = -1
        self.process_state: _evidence.ProcessState | None = None
        self.same: dict[int, bool | None] = {}
        self.refusals: dict[str, str | None] = {}
        self.returned: dict[str, str] = {}
        self.exit_status: int | None = None
        self.seconds: dict[str, float] = {}
        self.arguments: list[str] = []
        self.modules: tuple[str, ...] = ()
        self.memlock = 0
        self._theirs: tuple[socket.socket, ...] = ()

    def go(self) -> None:
        """Open, start, listen, look, end; and look at the devices afterwards, however it ended."""
        try:
            self._boot()
        finally:
            self._look_at_devices()

    def _boot(self) -> None:
        with contextlib.ExitStack() as stack:
            command, console, report = self._open(stack)
            limits = _launcher.Limits(self.memlock)
            self.step = "start"
            self.arguments = command.arguments()
            started = time.monotonic()
            deadline = started + self.ready.request.timeout
            process = _launcher.Process(self.arguments, self.ready.user, limits, command.descriptors)
            with process:
                for end in self._theirs:
                    end.close()  # so that the process's end is the end of the sockets
                try:
                    self._listen(process, console, report, started, deadline)
                finally:
                    # What it said last is often why it ended.
                    self._drain(process.words, console, report)
                    self.words.close()
            self.seconds["total"] = round(time.monotonic() - started, 2)

    # -- opening -------------------------------------------------------------------------------------------------------

    def _open(self, stack: contextlib.ExitStack) -> tuple[_qemu_command.Command, socket.socket, socket.socket]:
        ready, user = self.ready, self.ready.user
        image = _initramfs.read_kernel(self.host, ready.kernel)
        ready.release = _initramfs.kernel_release(image)
        index = _initramfs.ModuleIndex(self.host, ready.release)
        guests = [
            _initramfs.GuestDevice(_qemu_command.guest_slot(number), one.class_id or "", one.modalias or "")
            for number, one in enumerate(ready.functions)
        ]
        settle = int(max(10.0, min(ready.request.timeout / 4, 120.0)))
        initramfs = _initramfs.build(self.host, index, ready.busybox, guests, settle=settle)
        self.modules = initramfs.modules

        self.step = "permissions"
        nodes = [one.vfio_device or "" for one in ready.functions]
        self.refusals = _launcher.denied(user, [_launcher.IOMMU_NODE, *nodes])

        self.step = "open"

        def held(descriptor: int) -> int:
            stack.callback(os.close, descriptor)
            return descriptor

        self.iommu = held(_launcher.open_node(_launcher.IOMMU_NODE, ready.iommu))
        self.step = "accounting"
        _launcher.account_per_process(self.iommu)
        self.memlock = ready.request.memory * MIB + _MEMLOCK_MARGIN
        self.step = "open"
        for one, guest in zip(ready.functions, guests):
            number = _device_number(one.vfio_number or "0:0")
            self.devices.append(
                _evidence.PassedDevice(
                    address=one.address,
                    slot=guest.slot,
                    node=one.vfio_device or "",
                    number=number,
                    descriptor=held(_launcher.open_node(one.vfio_device or "", number)),
                    vendor_id=one.vendor_id or "",
                    device_id=one.device_id or "",
                    class_id=one.class_id or "",
                    drivers=initramfs.drivers[guest.slot],
                    firmware=initramfs.firmware[guest.slot],
                )
            )
        kvm: int | None = None
        if ready.accelerator == "kvm":
            kvm, why = _launcher.open_kvm(self.host)
            if kvm is None:
                raise HostError(f"KVM cannot be used any more: {why}.")
            held(kvm)
        console, console_theirs = socket.socketpair()
        report, report_theirs = socket.socketpair()
        self._theirs = (console_theirs, report_theirs)
        for end in (console, report, *self._theirs):
            stack.enter_context(end)
        for end in (console, report):
            end.setblocking(False)
        command = _qemu_command.Command(
            binary=ready.qemu,
            name="iommufd-host-verify",
            memory=ready.request.memory,
            cpus=ready.request.cpus,
            kernel=held(_launcher.memory_file("kernel", image, user)),
            initramfs=held(_launcher.memory_file("initramfs", initramfs.data, user)),
            console=console_theirs.fileno(),
            report=report_theirs.fileno(),
            kvm=kvm,
            iommufd=self.iommu,
            devices=tuple(device.descriptor for device in self.devices),
        )
        return command, console, report

    # -- listening -----------------------------------------------------------------------------------------------------

    def _listen(
        self,
        process: _launcher.Process,
        console: socket.socket,
        report: socket.socket,
        started: float,
        deadline: float,
    ) -> None:
        """Until QEMU has ended by itself, or something went wrong."""
        self.step = "boot"
        with selectors.DefaultSelector() as selector:
            selector.register(process.words, selectors.EVENT_READ)
            selector.register(console, selectors.EVENT_READ)
            selector.register(report, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._timed_out(process)
                for key, _events in selector.select(min(left, 0.2)):
                    if not self._take(key.fileobj, process.words, console):
                        selector.unregister(key.fileobj)
                if "connected" not in self.seconds and len(self.words.connects) >= len(self.devices):
                    self.seconds["connected"] = round(time.monotonic() - started, 2)
                if "init" in self.report.guest and self.step == "boot":
                    self.step = "guest"
                if self.report.ready and self.process_state is None:
                    self.seconds["ready"] = round(time.monotonic() - started, 2)
                    self.step = "look"
                    self._look_at_process(process.pid)
                    self.step = "power off"
                    report.send(b"go\n")
                if process.poll() is not None:
                    self._drain(process.words, console, report)
                    self.words.close()
                    self.exit_status = process.status
                    if self.process_state is None or self.exit_status != 0:
                        raise self._ended(process.status or 0)
                    return

    def _take(self, source: t.Any, words: int, console: socket.socket) -> bool:
        try:
            data = os.read(source, 65536) if isinstance(source, int) else source.recv(65536)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        if source == words:
            self.words.feed(data)
        elif source is console:
            self.console += data
            del self.console[:-_CONSOLE_LIMIT]
        else:
            self.report.feed(data)
        return bool(data)

    def _drain(self, words: int, console: socket.socket, report: socket.socket) -> None:
        for source in (words, console, report):
            if source == -1:
                continue
            for _try in range(64):
                before = len(self.console), len(self.words.words), len(self.words.maps), len(self.report.devices)
                if not self._take(source, words, console):
                    break
                after = len(self.console), len(self.words.words), len(self.words.maps), len(self.report.devices)
                if before == after:
                    break

    def _look_at_process(self, process: int) -> None:
        self.process_state = _evidence.observe(self.host, process, self.ready.iommu)
        for descriptor in (self.iommu, *(device.descriptor for device in self.devices)):
            self.same[descriptor] = _launcher.same_open_file(process, descriptor, descriptor)

    def _look_at_devices(self) -> None:
        nodes = {device.node: device.address for device in self.devices}
        held = holders(self.host, list(nodes))
        for device in self.devices:
            function = read_function(self.host, device.address)
            driver = None if function is None else function.driver
            problem = ""
            if driver is None or not is_vfio_driver(driver):
                problem = f"no longer on vfio-pci ({driver or 'no driver'})"
            elif device.node in held:
                problem = f"still held by {held[device.node]}"
            self.returned[device.address] = problem

    # -- telling -------------------------------------------------------------------------------------------------------

    def _timed_out(self, process: _launcher.Process) -> HostError:
        waited = f"{self.ready.request.timeout:.0f} s"
        where = {
            "boot": "its kernel had not reached our program" if self.words.connects else "QEMU had not set it up",
            "guest": "it was looking at its devices",
            "look": "it was ready",
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
        return _evidence.readable(bytes(self.console))

    def evidence(self) -> Json:
        """Everything that was seen, with the judgement of it."""
        ready, state = self.ready, self.process_state
        seen = _evidence.Witnesses(
            devices=self.devices,
            iommu=self.iommu,
            user=(ready.user.name, ready.user.uid, ready.user.gid),
            memory=ready.request.memory * MIB,
            process=state,
            same=self.same,
            refusals=self.refusals,
            qemu=self.words,
            guest=self.report,
            exit_status=self.exit_status,
            returned=self.returned,
        )
        first = state.threads[0] if state and state.threads else {}
        connects = self.words.connects
        return {
            "launcher": "direct",
            "backend": "iommufd",
            "checks": _evidence.judge(seen),
            "devices": [_device_evidence(device, self.report) for device in self.devices],
            "descriptors": {
                "iommu": None if state is None else len(state.iommu),
                "same_open_file": self.same.get(self.iommu),
                "owned": max((owned for _number, owned, _users in connects), default=None),
                "users": max((users for _number, _owned, users in connects), default=None),
                "legacy": [] if state is None else state.legacy,
            },
            "process": {
                "user": ready.user.name,
                "uid": ready.user.uid if not first else _first_number(first.get("Uid")),
                "gid": ready.user.gid if not first else _first_number(first.get("Gid")),
                "groups": first.get("Groups", "").split(),
                "capabilities": {key: first.get(key) for key in _evidence.CAPABILITY_SETS},
                "no_new_privs": first.get("NoNewPrivs") == "1",
                "seccomp": _first_number(first.get("Seccomp")),
                "memlock": self.memlock,
                "charged": None if state is None else state.locked,
                "refusals": self.refusals,
                "arguments": self.arguments,
            },
            "guest": {
                "kernel": self.report.guest.get("kernel"),
                "memory": ready.request.memory,
                "cpus": ready.request.cpus,
                "modules": list(self.modules),
                "uptime": {key: _seconds(self.report.guest.get(key)) for key in ("init", "loaded", "settled", "ready")},
            },
            "peer_to_peer": _evidence.peer_to_peer(self.words, self.report.memory),
            "qemu": {"path": ready.qemu, "version": ready.qemu_version, "words": self.words.distinct()},
            "accelerator": ready.accelerator,
            "accelerator_reason": ready.accelerator_reason,
            "kernel": ready.release,
            "seconds": self.seconds,
        }


def _device_evidence(device: _evidence.PassedDevice, report: _evidence.GuestReport) -> Json:
    said = report.devices.get(device.slot, {})
    known = ("disk", "interface", "mac", "carrier", "serial", "model", "config", "bar")
    found: Json = {
        "address": device.address,
        "guest_address": device.slot,
        "vfio_device": device.node,
        "vendor_id": said.get("vendor"),
        "device_id": said.get("device"),
        "class_id": said.get("class"),
        "driver": said.get("driver"),
        "modules": list(device.drivers),
        "details": {key: said[key] for key in known if key in said},
        "dma": None,
    }
    if "disk" in said:
        found["dma"] = {
            "bytes": int(said["dma_bytes"]) if said.get("dma_bytes", "").isdigit() else None,
            "sha256": said.get("sha256_first"),
            "agrees": said.get("sha256_first") == said.get("sha256_second"),
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
        re.compile(r"(bind|attach).*Operation not permitted", re.IGNORECASE),
        "The kernel does not give the device away. No host driver was seen in its IOMMU group, so it must be that the "
        "IOMMU does not isolate interrupts (no interrupt remapping): turn that on in the firmware. "
        "iommufd.allow_unsafe_interrupts=1 would override it and is a security hole.",
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
