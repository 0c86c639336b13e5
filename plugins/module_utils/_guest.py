# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The verification of a guest with the named devices, from the first check to the verdict.

:func:`prepare` reads the host, chooses the backend and finds everything that stands in the way; :func:`verify` has the
guest run (:mod:`_guest_run`) and judges. Between the two nothing is changed; after the second nothing is left.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import (
    _guest_image,
    _launch_libvirt,
    _launch_systemd,
    _launcher,
    _peer_to_peer,
    _qemu_command,
)
from ansible_collections.iommufd.host.plugins.module_utils._backend import (
    LAUNCHERS,
    REQUESTS,
    Decision,
    Facts,
    PeerToPeer,
    decide,
)
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._given_away import find_devices
from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import BACKENDS, parse_devices
from ansible_collections.iommufd.host.plugins.module_utils._guest_machine import GuestMachine, binaries, guest_machine
from ansible_collections.iommufd.host.plugins.module_utils._guest_run import CONSOLE_LINES, Run, holders
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import (
    blocks,
    is_vfio_driver,
    read_group,
    read_members,
)
from ansible_collections.iommufd.host.plugins.module_utils._libvirt import read_libvirt_facts
from ansible_collections.iommufd.host.plugins.module_utils._nodes import IOMMU, LEGACY_CONTAINER
from ansible_collections.iommufd.host.plugins.module_utils._pci import Function, parse_address, read_function
from ansible_collections.iommufd.host.plugins.module_utils._plan import reason
from ansible_collections.iommufd.host.plugins.module_utils._qemu import Qemu, read_qemu
from ansible_collections.iommufd.host.plugins.module_utils._vfio import cdev_supported

Json = dict[str, t.Any]

# MiB
LEAST_MEMORY = 128

#: Who starts QEMU where it opens the nodes itself.
STARTERS = ("module", "libvirt")
#: Launchers whose guests have a monitor over which devices can be plugged in.
PLUGGING = ("direct", "systemd", "self")

_BYTE = r"(25[0-5]|2[0-4][0-9]|1?[0-9]{1,2})"
_IPV4 = re.compile(rf"({_BYTE}\.){{3}}{_BYTE}")

# What QEMU itself needs beside the guest's memory (Debian's binary with its libraries; with TCG its translation cache).
_QEMU_MEMORY = {"kvm": 96, "tcg": 224}


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user wants.

    Attributes:
        devices: PCI addresses as the kernel writes them, in order, each once.
        plugged: further ones, plugged in while the guest runs.
        launcher: one of :data:`_backend.LAUNCHERS`.
        started_by: one of :data:`STARTERS`; other than "module" only with launcher "self".
        backend: "legacy", "iommufd" or "auto", for the devices that are not in ``backends``.
        backends: address to the backend that was asked for this very device.
        objects: address to the iommufd object that the device is on, where that is not the usual one.
        hot_plug: whether further devices are expected to be plugged in; the policy counts with it.
        expendable: addresses of disks of which a part may be written.
        arp_target: address of IPv4 that network devices ask for; empty: no frame is sent.
        user: name of the unprivileged user that QEMU runs as; libvirt has its own.
        qemu: path of the binary; empty: the one that was built and installed, else the distribution's.
        busybox: path; empty: found.
        kernel: path of the guest's kernel; empty: the running one.
        memory: of the guest, in MiB.
        cpus: of the guest.
        memlock: MiB that QEMU may pin; None: what it takes.
        timeout: seconds for everything from the start of QEMU to its end.
        accelerator: "auto", "kvm" or "tcg".
        pending: earlier steps that turn the IOMMU on, load modules and bind devices are still to come, so what they
            bring about is only told where it is missing.
        qemu_pending: an earlier step that installs QEMU is still to come, so the one that is here does not count.
    """

    devices: tuple[str, ...]
    plugged: tuple[str, ...] = ()
    launcher: str = "direct"
    started_by: str = "module"
    backend: str = "iommufd"
    backends: t.Mapping[str, str] = dataclasses.field(default_factory=dict)
    objects: t.Mapping[str, str] = dataclasses.field(default_factory=dict)
    hot_plug: bool = False
    expendable: tuple[str, ...] = ()
    arp_target: str = ""
    user: str = "nobody"
    qemu: str = ""
    busybox: str = ""
    kernel: str = ""
    memory: int = 256
    cpus: int = 1
    memlock: int | None = None
    timeout: float = 600.0
    accelerator: str = "auto"
    pending: bool = False
    qemu_pending: bool = False

    @property
    def by_libvirt(self) -> bool:
        """Whether libvirt starts QEMU."""
        return self.launcher == "libvirt" or self.started_by == "libvirt"


@dataclasses.dataclass
class Ready:
    """What was found on the host; complete when ``problems`` and ``passing`` are empty.

    Attributes:
        decision: the backend of each device, and why; None while what decides is still to come.
        trial: the decision with which peer-to-peer is measured first, because it was not yet and decides; else None.
        confines: whether libvirt puts guests under a profile of a security module.
        problems: what stands in the way, each a sentence or two with the remedy.
        passing: the same, of what earlier steps of a play bring about: the IOMMU, modules, nodes, bound devices.
    """

    request: Request
    user: _launcher.User
    machine: GuestMachine
    functions: list[Function] = dataclasses.field(default_factory=list)
    plugged: list[Function] = dataclasses.field(default_factory=list)
    decision: Decision | None = None
    trial: Decision | None = None
    facts: Facts = dataclasses.field(default_factory=Facts)
    iommu: tuple[int, int] = (0, 0)
    qemu: str = ""
    qemu_version: str = ""
    kernel: str = ""
    release: str = ""
    busybox: str = ""
    accelerator: str = "tcg"
    accelerator_reason: str = ""
    confines: bool = False
    problems: list[str] = dataclasses.field(default_factory=list)
    passing: list[str] = dataclasses.field(default_factory=list)

    @property
    def qemu_opens(self) -> bool:
        """Whether libvirt starts a QEMU that opens the nodes itself."""
        return self.request.launcher == "self" and self.request.started_by == "libvirt"

    def backends(self) -> dict[str, str]:
        """Address to backend. Where nothing is decided yet, what is checked is iommufd."""
        decision = self.trial or self.decision
        everything = (*self.request.devices, *self.request.plugged)
        if decision is None:
            return {address: self.request.backends.get(address, "iommufd") for address in everything}
        return {str(choice.device.address): choice.backend for choice in decision.choices}

    def check_mode_warnings(self, missing: t.Sequence[str]) -> list[str]:
        """The warnings of check mode: what earlier steps of a play may still bring about.

        Args:
            missing: devices that are not there yet, as ``read_request`` tells of them.
        """
        return [f"To be checked again when it is real: {problem}" for problem in (*missing, *self.passing)]

    def sentence(self) -> str:
        """What is going to happen, for check mode."""
        request = self.request
        devices = ", ".join(request.devices) or "devices that are not there yet"
        backends = set(self.backends().values())
        how = {"direct": "", "systemd": " in a unit of systemd", "libvirt": " in a domain of libvirt", "self": ""}
        if self.decision is None or self.trial is not None:
            where = "on the backend that is chosen then" if request.backend == "auto" else "on /dev/iommu"
        elif backends == {"legacy"}:
            where = "on the legacy container"
        elif backends == {"iommufd"}:
            opener = "opened by QEMU itself" if request.launcher == "self" else ""
            count = len({request.objects.get(address, "") for address in request.devices})
            where = (
                f"on {'one' if count == 1 else count} /dev/iommu descriptor{'s' if count > 1 else ''} {opener}".rstrip()
            )
        else:
            where = "on /dev/iommu and the legacy container"
        user = "" if request.by_libvirt else f" as {self.user.name}"
        plugged = f", {', '.join(request.plugged)} plugged in while it runs" if request.plugged else ""
        return (
            f"boot a guest of {request.memory} MiB with {devices} {where}{plugged}, with QEMU{user}"
            f"{how[request.launcher]} ({self.accelerator})"
        )


# -- what is wanted ----------------------------------------------------------------------------------------------------


# What a guest is verified with, as options of guest_verify and of the plan of a host.
GUEST_OPTIONS: dict[str, Json] = {
    "launcher": {"type": "str", "choices": ["direct", "systemd", "libvirt", "self"], "default": "direct"},
    "started_by": {"type": "str", "choices": ["module", "libvirt"], "default": "module"},
    "backend": {"type": "str", "choices": ["legacy", "iommufd", "auto"], "default": "iommufd"},
    "backends": {"type": "dict", "default": {}},
    "iommufds": {"type": "dict", "default": {}},
    "hot_plug": {"type": "list", "elements": "raw", "default": []},
    "hot_plug_expected": {"type": "bool", "default": False},
    "expendable": {"type": "list", "elements": "str", "default": []},
    "arp_target": {"type": "str"},
    "qemu": {"type": "path"},
    "user": {"type": "str", "default": "nobody"},
    "memory": {"type": "int", "default": 256},
    "cpus": {"type": "int", "default": 1},
    "memlock": {"type": "int"},
    "accelerator": {"type": "str", "choices": ["auto", "kvm", "tcg"], "default": "auto"},
    "timeout": {"type": "int", "default": 600},
    "busybox": {"type": "path"},
}


def read_request(host: Host, options: t.Mapping[str, t.Any], check_mode: bool) -> tuple[Request, list[str]]:
    """What the options of guest_verify ask for.

    Args:
        host: on which selectors name devices.
        options: those of the module; one that is missing has its default.
        check_mode: whether earlier steps may be still to come (``pending``, ``qemu_pending``).

    Returns:
        The request, and what was said of devices that are not there yet.

    Raises:
        OptionError: a selector or an address that is none, or names no device.
    """
    pending = bool(options.get("pending")) and check_mode
    found: dict[str, tuple[str, ...]] = {"devices": (), "hot_plug": ()}
    missing: list[str] = []
    for option in found:
        if option == "devices" or options.get(option):
            choice = find_devices(host, option, options[option], pending)
            found[option] = tuple(one.address for one in choice.chosen)
            missing += choice.missing
    names = [field.name for field in dataclasses.fields(Request)]
    plain = {name: options[name] for name in names if name not in found and options.get(name) is not None}
    given: Json = {
        **plain,
        "devices": found["devices"],
        "plugged": found["hot_plug"],
        "hot_plug": bool(options.get("hot_plug_expected")),
        "backends": _by_address("backends", options.get("backends")),
        "objects": _by_address("iommufds", options.get("iommufds")),
        "expendable": tuple(parse_address("expendable", one) for one in options.get("expendable") or []),
        "pending": pending,
        "qemu_pending": bool(options.get("qemu_pending")) and check_mode,
    }
    return Request(**given), missing


def _by_address(option: str, given: t.Mapping[str, t.Any] | None) -> dict[str, str]:
    return {parse_address(option, address): str(value) for address, value in (given or {}).items()}


# -- preparing ---------------------------------------------------------------------------------------------------------


def prepare(host: Host, request: Request) -> Ready:
    """Read the host, choose the backend and find what stands in the way. Changes nothing, starts nothing that stays.

    Raises:
        OptionError: an option names what the host does not have.
        HostError: something stands in the way (all of it in one message).
    """
    _check_options(request)
    # A launcher that passes descriptors shows that the user needs no group for it; where QEMU opens, groups count.
    machine = guest_machine(platform.machine())
    user = _launcher.find_user(request.user, with_groups=request.launcher in ("systemd", "self"))
    ready = Ready(request, user, machine)
    for addresses, found in ((request.devices, ready.functions), (request.plugged, ready.plugged)):
        found += [one for one in (read_function(host, address) for address in addresses) if one is not None]
    qemu = _check_programs(host, ready)
    _decide(host, ready, qemu)
    backends = ready.backends()
    if "iommufd" in backends.values() or not backends:
        _check_iommu(host, ready)
        _check_qemu(ready, qemu)
    _check_devices(host, ready, backends)
    _check_launcher(host, ready, backends)
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
    most = _qemu_command.MOST_DEVICES - len(request.plugged)
    if len(request.devices) > most or not (request.devices or request.pending):
        raise OptionError("devices", list(request.devices), f"1 to {most} devices")
    for option, value, accepted in (
        ("launcher", request.launcher, LAUNCHERS),
        ("started_by", request.started_by, STARTERS),
        ("backend", request.backend, REQUESTS),
    ):
        if value not in accepted:
            raise OptionError(option, value, ", ".join(accepted))
    if request.started_by != "module" and request.launcher != "self":
        raise OptionError(
            "started_by", request.started_by, "module, or launcher: self", "it is the launcher that starts"
        )
    twice = sorted(set(request.devices) & set(request.plugged))
    if twice:
        raise OptionError("hot_plug", twice, "devices that the guest does not have from its start")
    if request.plugged and (request.launcher not in PLUGGING or request.by_libvirt):
        raise OptionError("hot_plug", list(request.plugged), f"nothing, or launcher: {' or '.join(PLUGGING)}")
    everything = (*request.devices, *request.plugged)
    for option, addresses in (
        ("backends", request.backends),
        ("iommufds", request.objects),
        ("expendable", request.expendable),
    ):
        for address in addresses:
            if address not in everything and not request.pending:
                raise OptionError(option, address, f"addresses of devices of the guest ({', '.join(everything)})")
    for address, backend in request.backends.items():
        if backend not in BACKENDS:
            raise OptionError(f"backends[{address}]", backend, ", ".join(BACKENDS))
    for address, name in request.objects.items():
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]{0,63}", name):
            raise OptionError(f"iommufds[{address}]", name, "a name that begins with a letter")
    if request.objects and request.launcher == "libvirt":
        raise OptionError(
            "iommufds", dict(request.objects), "nothing with launcher: libvirt, which has one for a guest"
        )
    if request.arp_target and not _IPV4.fullmatch(request.arp_target):
        raise OptionError("arp_target", request.arp_target, "an address of IPv4, such as 192.0.2.1")
    if request.memory < LEAST_MEMORY:
        raise OptionError("memory", request.memory, f"{LEAST_MEMORY} MiB or more")
    if request.memlock is not None and request.memlock < 1:
        raise OptionError("memlock", request.memlock, "1 MiB or more")
    if request.memlock is not None and request.by_libvirt:
        raise OptionError("memlock", request.memlock, "nothing where libvirt starts QEMU, which sets the limit itself")
    if not 1 <= request.cpus <= 64:
        raise OptionError("cpus", request.cpus, "1 to 64")
    if request.timeout < 10:
        raise OptionError("timeout", request.timeout, "10 seconds or more")


# -- the backend -------------------------------------------------------------------------------------------------------


def _decide(host: Host, ready: Ready, qemu: Qemu | None) -> None:
    """Choose the backend of each device.

    Raises:
        OptionError: what was asked for is impossible here.
    """
    request = ready.request
    if request.pending and request.backend == "auto":
        return
    ready.facts = _facts(host, ready, qemu)
    ready.decision = choose(ready, ready.facts.peer_to_peer)
    if request.backend == "auto" and ready.facts.peer_to_peer.works is None and ready.decision.backend == "legacy":
        other = choose(ready, PeerToPeer(True, "to be measured"))
        ready.trial = other if other.backend == "iommufd" else None


def choose(ready: Ready, peers: PeerToPeer) -> Decision:
    """The backend of each device, given what is known of peer-to-peer."""
    request = ready.request
    everything = (*request.devices, *request.plugged)
    given = [{"address": address, "backend": request.backends.get(address)} for address in everything]
    return decide(
        dataclasses.replace(ready.facts, peer_to_peer=peers),
        parse_devices("devices", given, empty=True),
        request.backend,
        request.launcher,
        request.hot_plug or bool(request.plugged),
        ready.machine.machine,
    )


def _facts(host: Host, ready: Ready, qemu: Qemu | None) -> Facts:
    request = ready.request
    kernel = os.uname().release
    functions = [*ready.functions, *ready.plugged]
    libvirt = read_libvirt_facts(host) if request.by_libvirt else None
    grouped = [one for one in functions if one.iommu_group is not None and one.driver and is_vfio_driver(one.driver)]
    facts = Facts(
        architecture=platform.machine(),
        kernel=kernel,
        groups=all(host.exists(f"/sys/class/vfio/{one.iommu_group}") for one in grouped) if grouped else None,
        libvirt=None if libvirt is None else libvirt.version,
        libvirt_passes=None if libvirt is None else libvirt.can_pass_iommufd,
    )
    if request.backend != "auto":
        # What is missing for iommufd is found in detail later, with what to do about it.
        return dataclasses.replace(facts, iommufd=True, cdev=True, qemu_iommufd=True, qemu_passing=True)
    measured = _peer_to_peer.read(host, kernel, ready.qemu) if ready.qemu else None
    return dataclasses.replace(
        facts,
        iommufd=host.exists("/sys/class/misc/iommu/dev"),
        cdev=all(one.vfio_device for one in functions) if grouped else cdev_supported(host),
        qemu=None if qemu is None else f"{qemu.path} ({qemu.version})",
        qemu_iommufd=None if qemu is None else qemu.iommufd,
        qemu_passing=None if qemu is None else qemu.passing,
        peer_to_peer=PeerToPeer() if measured is None else PeerToPeer(measured["works"], str(measured["detail"])),
    )


# -- what stands in the way --------------------------------------------------------------------------------------------


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
        ready.passing.append(f"There is no {IOMMU}: {why}.")
        return
    ready.iommu = _device_number(number)
    if not host.exists(IOMMU):
        ready.passing.append(f"iommufd is loaded, but there is no node {IOMMU}: udevadm trigger /sys/class/misc/iommu.")


def _device_number(text: str) -> tuple[int, int]:
    major, _colon, minor = text.partition(":")
    return int(major), int(minor)


def _check_devices(host: Host, ready: Ready, backends: t.Mapping[str, str]) -> None:
    nodes: dict[str, str] = {}  # node to the address whose use it is
    for function in (*ready.functions, *ready.plugged):
        address = function.address
        if function.driver is None or not is_vfio_driver(function.driver):
            has = f"driven by {function.driver}" if function.driver else "without a driver"
            ready.passing.append(f"{address} is {has}, not on vfio-pci: bind it first (iommufd.host.vfio_bind).")
            continue
        if function.iommu_group is None:
            ready.passing.append(f"{address} is in no IOMMU group: the IOMMU is off (role iommufd.host.kernel).")
            continue
        node = function.vfio_device
        legacy = backends.get(address) == "legacy"
        if legacy and not host.exists(f"/sys/class/vfio/{function.iommu_group}"):
            ready.passing.append(
                f"{address}: vfio makes no node for its IOMMU group {function.iommu_group}, so there is no legacy "
                "container for it (CONFIG_VFIO_GROUP)."
            )
            continue
        if node is None and not legacy:
            ready.passing.append(
                f"{address} is on {function.driver} but has no vfio character device: the vfio module in use is built "
                "without CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or later has it)."
            )
            continue
        if node is not None and not host.exists(node):
            ready.passing.append(f"{address}: there is no node {node}: udevadm trigger.")
        if node is not None:
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


def _check_launcher(host: Host, ready: Ready, backends: t.Mapping[str, str]) -> None:
    request = ready.request
    if request.launcher == "systemd":
        ready.problems += _launch_systemd.problems(host)
    if request.by_libvirt:
        ready.problems += _launch_libvirt.problems(host)
        ready.confines = host.read_line("/sys/module/apparmor/parameters/enabled") == "Y" and host.exists(
            "/etc/apparmor.d/libvirt/TEMPLATE.qemu"
        )
        return
    functions = [*ready.functions, *ready.plugged]
    opened: list[str] = []  # by QEMU itself, as its user
    if request.launcher == "self" and "iommufd" in backends.values():
        opened += [IOMMU]
        opened += [one.vfio_device for one in functions if one.vfio_device and backends.get(one.address) == "iommufd"]
    legacy = [one for one in functions if backends.get(one.address) == "legacy" and one.iommu_group is not None]
    if request.launcher in ("self", "systemd") and legacy:
        opened += [LEGACY_CONTAINER, *(f"/dev/vfio/{one.iommu_group}" for one in legacy)]
    there = [node for node in dict.fromkeys(opened) if host.exists(node)]
    if not host.live or not there:
        return
    refusals = _launcher.denied(ready.user, there)
    refused = [f"{node} ({refusal})" for node, refusal in refusals.items() if refusal is not None]
    if refused:
        ready.problems.append(
            f"QEMU opens the nodes itself {'with launcher self' if request.launcher == 'self' else 'for legacy'}, and "
            f"{ready.user.name} cannot open {', '.join(refused)}: the role iommufd.host.access in mode group gives a "
            f"group access{' (access_legacy_groups: true)' if legacy else ''}; name a user who is in it."
        )


def _check_programs(host: Host, ready: Ready) -> Qemu | None:
    request = ready.request
    found: Qemu | None = None
    places = (request.qemu,) if request.qemu else binaries(ready.machine.architecture)
    path = next((one for one in map(host.which, places) if one), None)
    if request.qemu_pending:
        ready.qemu = path or places[0]
    elif path is None:
        ready.problems.append(
            f"QEMU is not installed ({', '.join(places)}). On Debian and Ubuntu: apt install {ready.machine.package}."
        )
    else:
        ready.qemu = path
        found = read_qemu(host, path)
        ready.qemu_version = found.version or ""
        if found.problem or not found.version:
            ready.problems.append(
                f"{path} does not say its version or what it can do: {found.problem or 'it said nothing'}."
            )
            found = None
        else:
            ready.problems += _too_old(ready.machine, found)
    try:
        ready.busybox = _guest_image.find_busybox(host, request.busybox)
    except HostError as error:
        ready.problems.append(error.message)
    try:
        ready.release = os.uname().release
        ready.kernel = request.kernel or _guest_image.find_kernel(host, ready.release)
        if not host.exists(ready.kernel):
            ready.problems.append(f"There is no kernel image {ready.kernel}.")
    except HostError as error:  # an earlier step may reboot into another kernel
        ready.passing.append(error.message)
    return found


def _too_old(machine: GuestMachine, qemu: Qemu) -> list[str]:
    numbers = re.match(r"(\d+)\.(\d+)", qemu.version or "")
    if machine.least_qemu is None or numbers is None or (int(numbers[1]), int(numbers[2])) >= machine.least_qemu:
        return []
    least = ".".join(map(str, machine.least_qemu))
    return [f"{qemu.path} is {qemu.version}: on {machine.architecture} the guest needs QEMU {least} or later."]


def _check_qemu(ready: Ready, found: Qemu | None) -> None:
    passes = ready.request.launcher != "self"
    if found is not None and (not found.iommufd or (passes and not found.passing)):
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

    Where the backend is to be chosen and peer-to-peer, which decides, was not measured yet, the guest runs on iommufd
    first. If that shows that peer-to-peer works, that was the verification; else it runs once more on what is chosen.

    Returns:
        The module's result: ``verified`` (True) and ``evidence``.

    Raises:
        HostError: it was not verified. The message names the step, QEMU's own words and the guest's last lines;
            ``details`` has ``step``, ``evidence`` as far as there is any, ``qemu_words`` and ``console``.
    """
    if ready.trial is not None:
        run = _run(host, ready)
        measured = run.peer_to_peer()
        _keep(host, ready, run)
        ready.decision, ready.trial = choose(ready, PeerToPeer(measured["works"], measured["detail"])), None
        if ready.backends() == {one.address: one.backend for one in run.devices}:
            return _judged(run)
    run = _run(host, ready)
    _keep(host, ready, run)
    return _judged(run)


def _run(host: Host, ready: Ready) -> Run:
    run = Run(host, ready, ready.backends())
    try:
        try:
            run.go()
        except OSError as error:  # a full /run, no descriptor left
            raise HostError(f"The guest could not be run: {reason(error)}.") from error
    except HostError as error:
        error.details.setdefault("step", run.step)
        error.details.setdefault("verified", False)
        if run.arguments:
            error.details.setdefault("evidence", run.evidence())
        error.details.setdefault("qemu_words", run.words.distinct())
        error.details.setdefault("console", run.console_lines()[-CONSOLE_LINES:])
        raise
    return run


def _keep(host: Host, ready: Ready, run: Run) -> None:
    """Keep what was measured of peer-to-peer for the next guest."""
    measured = run.peer_to_peer()
    if measured["works"] is not None and {one.backend for one in run.devices} == {"iommufd"}:
        _peer_to_peer.keep(
            host, os.uname().release, ready.qemu, ready.qemu_version, measured["works"], measured["detail"]
        )


def _judged(run: Run) -> Json:
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
            console=run.console_lines()[-CONSOLE_LINES:],
        )
    return {"verified": True, "evidence": evidence}
