# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Drop-ins for systemd units that launch guests, and what systemd makes of them.

systemd opens the files of ``OpenFile=`` inside the unit's own cgroup, so a launcher needs the device ACL even where
QEMU never opens a node itself (seen with systemd 257: status 202/FDS without it).
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _device_filter
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._files import OWN_MARK, own_header
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._nodes import CDEVS, IOMMU, KVM
from ansible_collections.iommufd.host.plugins.module_utils._own_files import refuse_foreign
from ansible_collections.iommufd.host.plugins.module_utils._plan import (
    Plan,
    RemoveFile,
    Step,
    WriteFile,
    run,
    wait_until,
)

SYSTEM = "/etc/systemd/system"
DROP_IN = "50-iommufd-host.conf"

# systemd.unit(5): the characters of a unit name; a backslash stands in escaped names (machine-qemu\x2d1.scope).
_UNIT = re.compile(r"[A-Za-z0-9:_.\\-]+(@[A-Za-z0-9:_.\\-]*)?\.(service|slice|scope)")
_ACCEPTED_UNIT = (
    "the name of a service, slice or scope with its suffix, such as guests.service, guest@.service or machine.slice"
)
_ACCEPTED_DEVICE = "a path below /dev without wildcards, a PCI address, or a class of devices such as char-vfio-dev"
_PATH = re.compile(r"/dev(/[A-Za-z0-9_.:+@=,-]+)+")
_CLASS = re.compile(r"(char|block)-[A-Za-z0-9_-]+")
_SIZE = re.compile(r"[1-9][0-9]{0,17}[KMGTPE]?|infinity")

# systemd 253: OpenFile= (NEWS)
OPEN_FILE_SINCE = 253


def parse_unit(option: str, value: str) -> str:
    """The name of a unit that can have a device ACL.

    Raises:
        OptionError: it is not such a name.
    """
    if not _UNIT.fullmatch(value) or len(value) > 255 or value.startswith((".", "@")):
        raise OptionError(option, value, _ACCEPTED_UNIT)
    return value


def parse_path(option: str, value: str, accepted: str = _ACCEPTED_DEVICE) -> str:
    """An absolute path of a device node, exactly as it will be looked up.

    Raises:
        OptionError: relative, outside /dev, with a wildcard or with characters that would need quoting.
    """
    reason = ""
    if any(character in value for character in "*?[]{}"):
        reason = "wildcards are not expanded there"
    elif not value.startswith("/"):
        reason = "the path is relative"
    if reason or not _PATH.fullmatch(value) or any(part in ("..", ".") for part in value.split("/")):
        raise OptionError(option, value, accepted, reason)
    return value


def parse_class(option: str, value: str) -> str:
    """A class of devices from /proc/devices, as ``DeviceAllow=`` takes it.

    Raises:
        OptionError: not a class, with a wildcard, or one that is far too wide.
    """
    if value == "char-misc":
        raise OptionError(
            option,
            value,
            _ACCEPTED_DEVICE,
            "that class holds every misc device of the host, such as /dev/fuse, /dev/uinput and /dev/vhost-net; "
            "/dev/iommu has a minor number of its own and is allowed by its path",
        )
    if not _CLASS.fullmatch(value):
        raise OptionError(option, value, _ACCEPTED_DEVICE)
    return value


def check_size(option: str, value: str) -> str:
    """A memory limit.

    Raises:
        OptionError: neither a number of bytes with K, M, G, T, nor ``infinity``.
    """
    if not _SIZE.fullmatch(value):
        raise OptionError(option, value, "a size such as 17G or 512M (binary units), or infinity")
    return value


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the drop-in shall say.

    Attributes:
        devices: paths and classes for ``DeviceAllow=``, each read-write.
        policy: ``DevicePolicy=``; None: closed, or strict where the unit itself says strict.
        open_file: ``OpenFile=`` specifications (services only).
        memlock: ``LimitMEMLOCK=`` (services only).
    """

    devices: tuple[str, ...]
    policy: str | None = None
    open_file: tuple[str, ...] = ()
    memlock: str | None = None


@dataclasses.dataclass(frozen=True)
class UnitState:
    """A unit and its drop-in as they are.

    Attributes:
        unit: its name.
        content: our drop-in, None where there is none.
        shown: what ``systemctl show`` says; empty where systemd cannot be asked.
        drop_in: the name of our drop-in.
    """

    unit: str
    content: bytes | None
    shown: t.Mapping[str, str]
    drop_in: str = DROP_IN

    @property
    def path(self) -> str:
        return f"{SYSTEM}/{self.unit}.d/{self.drop_in}"

    @property
    def loaded(self) -> bool:
        return self.shown.get("LoadState") == "loaded"

    @property
    def active(self) -> bool:
        return self.shown.get("ActiveState") in ("active", "activating", "reloading", "deactivating")


def marked_drop_ins(host: Host, name: str = DROP_IN) -> list[str]:
    """The units that have a drop-in of ours with this name."""
    found = []
    for directory in host.listdir(SYSTEM):
        if directory.endswith(".d") and OWN_MARK in (host.read_text(f"{SYSTEM}/{directory}/{name}", 400) or ""):
            found.append(directory[:-2])
    return found


def show_name(unit: str) -> str:
    """The name to ask systemd about: a template itself cannot be shown, an instance of it can."""
    return unit.replace("@.", "@iommufd-host.", 1) if "@." in unit else unit


_PROPERTIES = (
    "LoadState,ActiveState,NeedDaemonReload,DropInPaths,DevicePolicy,DeviceAllow,OpenFile,LimitMEMLOCK,ControlGroup,"
    "FragmentPath,MainPID,User,Group,SupplementaryGroups,AppArmorProfile,Slice"
)


def read_unit(host: Host, unit: str, drop_in: str = DROP_IN) -> UnitState:
    """Our drop-in of that name and what systemd knows about the unit.

    Raises:
        HostError: something other than a regular file is in the drop-in's place.
    """
    path = f"{SYSTEM}/{unit}.d/{drop_in}"
    content = host.read_bytes(path)
    if content is None and host.exists(path):
        raise HostError(f"{path} is there, but is not a file that can be read.")
    return UnitState(unit, content, _show(host, unit), drop_in)


def _show(host: Host, unit: str) -> dict[str, str]:
    answer = host.ask(["systemctl", "show", "-p", _PROPERTIES, "--", show_name(unit)])
    if answer is None or not answer.ok:
        return {}
    shown: dict[str, str] = {}
    for line in answer.stdout.splitlines():
        key, separator, value = line.partition("=")
        if separator:  # DeviceAllow and OpenFile have a line for each value
            shown[key] = f"{shown[key]}\n{value}" if shown.get(key) else value
    return shown


def systemd_version(host: Host) -> int | None:
    """systemd's version, or None where it cannot be asked."""
    answer = host.ask(["systemctl", "--version"])
    match = re.match(r"systemd (\d+)", answer.stdout) if answer is not None else None
    return int(match.group(1)) if match else None


def check_support(host: Host, unit: str, wanted: Wanted) -> None:
    """Whether unit type and systemd know what is wanted.

    Raises:
        OptionError: they do not; names the option.
    """
    service = unit.endswith(".service")
    for option, value in (("open_file", wanted.open_file), ("limit_memlock", wanted.memlock)):
        if value and not service:
            raise OptionError(option, value, "nothing", f"{unit} starts no process of its own; only services do")
    version = systemd_version(host)
    if wanted.open_file and version is not None and version < OPEN_FILE_SINCE:
        raise OptionError(
            "open_file", list(wanted.open_file), "nothing", f"systemd {version} has no OpenFile=, 253 has"
        )


def drop_in_text(state: UnitState, wanted: Wanted) -> str:
    """The drop-in."""
    section = {"service": "Service", "slice": "Slice", "scope": "Scope"}[state.unit.rpartition(".")[2]]
    lines = [
        own_header().rstrip("\n"),
        "[Unit]",
        "# Device names resolve when the unit starts: the modules must be there by then.",
        "After=systemd-modules-load.service",
        "",
        f"[{section}]",
    ]
    policy = wanted.policy
    if policy is None and not _own_policy(state.content) and state.shown.get("DevicePolicy") == "strict":
        lines.append("# DevicePolicy=strict is the unit's own and stays.")
    else:
        lines.append(f"DevicePolicy={policy or 'closed'}")
    lines += [f"DeviceAllow={device} rw" for device in wanted.devices]
    lines += [f"OpenFile={spec}" for spec in wanted.open_file]
    if wanted.memlock:
        lines.append(f"LimitMEMLOCK={wanted.memlock}")
    return "\n".join(lines) + "\n"


def _own_policy(content: bytes | None) -> bool:
    return b"\nDevicePolicy=" in (content or b"")


def check_syntax(host: Host, text: str, unit: str) -> None:
    """Ask ``systemd-analyze verify`` about a unit made of our lines, before anything is written.

    Raises:
        HostError: systemd would not take a line; quotes it.
    """
    suffix = unit.rpartition(".")[2]
    if not host.live or suffix != "service":
        return  # slices and scopes get the same lines; a scope cannot be verified, it has no file
    with tempfile.TemporaryDirectory(prefix="iommufd-host-") as directory:
        copy = os.path.join(directory, "iommufd-host-check.service")
        with open(copy, "w", encoding="utf-8") as file:
            file.write(text + "ExecStart=/bin/true\n")
        answer = host.ask(["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", copy])
    if answer is None:
        return
    problems = [
        line.replace(copy, "line") for line in answer.stderr.splitlines() if copy in line or "check.service" in line
    ]
    if problems:
        raise HostError(
            "systemd would not take the drop-in, nothing was written: " + " / ".join(problems), drop_in=text
        )


# -- planning ----------------------------------------------------------------------------------------------------------


def plan_present(states: t.Sequence[UnitState], wanted: Wanted, host: Host, others: t.Sequence[UnitState] = ()) -> Plan:
    """What is missing until every unit has the drop-in and systemd goes by it.

    Args:
        states: the units that shall have it.
        wanted: what it shall say.
        host: the host.
        others: units that shall not have it any more.

    Raises:
        Refusal: a file that is not ours is in a drop-in's place.
    """
    plan = Plan()
    stale = _take_out(plan, others)
    for state in states:
        refuse_foreign(state.path, state.content)
        text = drop_in_text(state, wanted)
        if state.content != text.encode():
            before = (state.content or b"").decode("utf-8", "replace")
            plan.add(
                WriteDropIn(
                    f"write {state.path}", state.path, before, text, path=state.path, content=text.encode(), mode=0o644,
                    enforce_mode=True,
                )
            )  # fmt: skip
        # A killed run wrote the file and did not tell systemd.
        stale = stale or (state.loaded and state.path not in state.shown.get("DropInPaths", "").split())
        stale = stale or state.shown.get("NeedDaemonReload") == "yes"
    return _reloaded(plan, stale, [(state.unit, wanted) for state in states], host)


def plan_absent(states: t.Sequence[UnitState], host: Host) -> Plan:
    """What is missing until no unit has a drop-in of ours and systemd has forgotten them.

    Raises:
        Refusal: a file that is not ours is in a drop-in's place.
    """
    plan = Plan()
    stale = _take_out(plan, states)
    return _reloaded(plan, stale, [], host)


def _take_out(plan: Plan, states: t.Sequence[UnitState]) -> bool:
    """Plan the removal of drop-ins; returns whether systemd still knows one that is gone already."""
    stale = False
    for state in states:
        if state.content is not None:
            refuse_foreign(state.path, state.content)
            text = state.content.decode("utf-8", "replace")
            directory = os.path.dirname(state.path)
            plan.add(RemoveDropIn(f"remove {state.path}", state.path, text, path=state.path, prune=[directory]))
        elif state.path in state.shown.get("DropInPaths", "").split():
            stale = True
    return stale


def _reloaded(plan: Plan, stale: bool, units: t.Sequence[tuple[str, Wanted]], host: Host) -> Plan:
    """Add the daemon-reload; it also gives running units their new device policy."""
    if plan.changed or stale:
        names = ", ".join(unit for unit, _wanted in units)
        summary = "have systemd read its units again" + (f" and check the device policy of {names}" if names else "")
        plan.add(Reload(summary, units=units, host=host))
    return plan


def daemon_reload() -> None:
    """Have systemd read its units again.

    Raises:
        HostError: it did not.
    """
    run(["systemctl", "daemon-reload"], 120)


@dataclasses.dataclass
class WriteDropIn(WriteFile):
    """Write a drop-in; taken back, systemd reads its units again, which are then as before."""

    def undo(self) -> None:
        super().undo()
        daemon_reload()


@dataclasses.dataclass
class RemoveDropIn(RemoveFile):
    """Remove a drop-in; taken back, systemd reads its units again, which are then as before."""

    def undo(self) -> None:
        super().undo()
        daemon_reload()


@dataclasses.dataclass
class Reload(Step):
    """Have systemd read its units again, and check that it goes by our drop-ins."""

    units: t.Sequence[tuple[str, Wanted]] = ()
    host: Host = dataclasses.field(default_factory=Host)

    def apply(self) -> None:
        daemon_reload()
        problems: list[str] = []
        for unit, wanted in self.units:
            problems += policy_problems(read_unit(self.host, unit), wanted)
            problems += live_problems(self.host, unit, wanted) if not problems else []
        if problems:
            raise HostError("; ".join(problems))


# -- what systemd makes of it ------------------------------------------------------------------------------------------


def policy_problems(state: UnitState, wanted: Wanted) -> list[str]:
    """Where the policy that systemd has loaded is not what our drop-in says; empty for a unit that is not loaded."""
    if not state.loaded:
        return []
    drop_ins = state.shown.get("DropInPaths", "").split()
    if state.path not in drop_ins:
        return [f"systemd did not read {state.path} for {state.unit}"]
    problems = []
    shown = set(state.shown.get("DeviceAllow", "").splitlines())
    missing = [device for device in wanted.devices if not any(_allows(line, device) for line in shown)]
    if missing:
        problems.append(f"{state.unit} does not allow {', '.join(missing)}")
    policy = state.shown.get("DevicePolicy")
    if policy != (wanted.policy or ("strict" if policy == "strict" else "closed")):
        problems.append(f"{state.unit} has DevicePolicy={policy}")
    later = drop_ins[drop_ins.index(state.path) + 1 :]
    if problems and later:
        problems.append(f"read after our drop-in: {', '.join(later)}")
    return problems


def _allows(line: str, device: str) -> bool:
    path, _blank, access = line.partition(" ")
    return path == device and "r" in access and "w" in access


def live_problems(host: Host, unit: str, wanted: Wanted) -> list[str]:
    """What the cgroup of a unit that runs forbids though our drop-in allows it; empty where nobody can tell."""
    state = read_unit(host, unit)
    cgroup = state.shown.get("ControlGroup")
    if not cgroup or not state.active:
        return []
    paths = _node_paths(host, wanted.devices)
    refused: list[str] = []

    def all_open() -> bool:
        gate = _device_filter.read_filter(host, cgroup)
        refused[:] = [path for path in paths if _device_filter.allows_node(host, gate, path) is False]
        return not refused

    # systemd gives running units their new filter soon after a reload, not within it.
    wait_until(all_open, 5)
    return [f"the cgroup {cgroup} of {unit} forbids {', '.join(refused)}"] if refused else []


def _node_paths(host: Host, devices: t.Iterable[str]) -> list[str]:
    """The nodes that entries of DeviceAllow= mean and that are there."""
    found: list[str] = []
    for device in devices:
        if device == "char-vfio-dev":
            found += [f"{CDEVS}/{name}" for name in host.listdir(CDEVS)]
        elif device.startswith("/"):
            found.append(device)
    return [path for path in found if host.exists(path)]


def restart_required(was: UnitState, now: t.Mapping[str, t.Any]) -> bool:
    """Whether a service that runs has files or a limit that count from its next start only.

    Args:
        was: the unit before the change.
        now: what :func:`effective_policy` says after it.
    """
    # A systemd before 253 shows no OpenFile at all.
    opens_others = was.shown.get("OpenFile", "") != "\n".join(now["open_file"])
    before = was.shown.get("LimitMEMLOCK")
    return bool(
        now["active"] and was.unit.endswith(".service") and (opens_others or before != (now["memlock"] or before))
    )


def effective_policy(host: Host, unit: str) -> dict[str, t.Any]:
    """What systemd has loaded for a unit and, for one that runs, what its cgroup enforces.

    Returns:
        ``unit``, ``drop_in``, ``loaded``, ``active``, ``policy``, ``devices`` (each as systemd shows it),
        ``open_file``, ``memlock``, ``cgroup`` (its path or null), ``enforced`` (whether the cgroup has a filter for
        devices, null where nobody can tell) and ``effective``: for each node that matters whether that filter lets it
        be opened (null where the filter is one that cannot be read).
    """
    state = read_unit(host, unit)
    cgroup = (state.shown.get("ControlGroup") or None) if state.active else None
    gate = _device_filter.read_filter(host, cgroup) if cgroup else None
    nodes = _node_paths(host, [IOMMU, KVM, "char-vfio-dev"]) if gate is not None else []
    return {
        "unit": unit,
        "drop_in": state.path if state.content is not None else None,
        "loaded": state.loaded,
        "active": state.active,
        "policy": state.shown.get("DevicePolicy") if state.loaded else None,
        "devices": [line for line in state.shown.get("DeviceAllow", "").splitlines() if line],
        "open_file": [line for line in state.shown.get("OpenFile", "").splitlines() if line],
        "memlock": state.shown.get("LimitMEMLOCK") if state.loaded else None,
        "cgroup": cgroup,
        "enforced": None if gate is None else gate.enforced,
        "effective": {path: _device_filter.allows_node(host, gate, path) for path in nodes},
    }
