# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""libvirt's device ACL on a host: the file, the list it would use without us, and the daemon that reads it."""

from __future__ import annotations

import dataclasses
import re
import time
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_conf
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._nodes import KVM
from ansible_collections.iommufd.host.plugins.module_utils._packages import read_packages
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan, Step, WriteFile, run, wait_until

DEFAULT_PATH = "/etc/libvirt/qemu.conf"

# <driver iommufd='yes'/>: libvirt opens /dev/iommu and the character devices and passes the descriptors.
PASSES_SINCE = (12, 1)

# One of them runs guests: the modular daemon, or the monolithic one. Restarting it leaves guests alone: QEMU is in a
# scope of its own (machine-qemu*.scope) and the new daemon reconnects to it.
DAEMONS = ("virtqemud.service", "libvirtd.service")

# What a package manager leaves beside a configuration file that somebody edited: the one of the new version, so the
# better witness of what the installed libvirt does.
_SHIPPED_SUFFIXES = (".dpkg-dist", ".dpkg-new", ".rpmnew", ".pacnew")

# The packages that bring the QEMU driver, by the name that Debian's database has for them.
_DEBIAN_PACKAGES = ("libvirt-daemon-driver-qemu", "libvirt-daemon")


@dataclasses.dataclass(frozen=True)
class Libvirt:
    """What the planner needs to know.

    Attributes:
        path: qemu.conf.
        content: its bytes; None where it is not there.
        default: the list that a guest which uses KVM has where none is set.
        default_source: where that was learnt, in words.
        stale_daemons: daemons that run and were started before the file was last written.
        running_daemons: daemons that run.
        version: libvirt's, None where it is not known.
    """

    path: str
    content: bytes | None
    default: tuple[str, ...]
    default_source: str
    running_daemons: tuple[str, ...] = ()
    stale_daemons: tuple[str, ...] = ()
    version: str | None = None

    @property
    def passes_descriptors(self) -> bool | None:
        """Whether this libvirt can open the nodes itself; None: unknown."""
        return can_pass(self.version)


def can_pass(version: str | None) -> bool | None:
    """Whether a version passes iommufd descriptors itself; None where it is not known."""
    match = re.match(r"(?:\d+:)?(\d+)\.(\d+)", version or "")
    return None if match is None else (int(match[1]), int(match[2])) >= PASSES_SINCE


def read_libvirt(host: Host, path: str) -> Libvirt:
    """Read qemu.conf and what else decides.

    Raises:
        HostError: the path is there but cannot be read, or libvirt itself would refuse the file.
    """
    content = host.read_bytes(path)
    if content is None and host.exists(path):
        raise HostError(f"{path} is there, but is not a file that can be read.")
    running: list[str] = []
    stale: list[str] = []
    status = host.stat(path)
    for daemon in DAEMONS:
        started = _started(host, daemon)
        if started is not None:
            running.append(daemon)
            if status is not None and started < status.st_mtime:
                stale.append(daemon)
    version = installed_version(host)
    default, source = _default(host, path, content, version)
    if KVM not in default:
        default.append(KVM)
        source += f", and {KVM}"
    return Libvirt(path, content, tuple(default), source, tuple(running), tuple(stale), version)


def _default(host: Host, path: str, content: bytes | None, version: str | None) -> tuple[list[str], str]:
    """The list as libvirt shows it, and where from.

    A libvirt whose list has no /dev/kvm (12.8) adds that for guests that use KVM, but only where no list is set: with
    one that lacks it, their QEMU says "Could not access KVM kernel module". Both were seen.
    """
    for candidate in [*(path + suffix for suffix in _SHIPPED_SUFFIXES), path]:
        text = content if candidate == path else host.read_bytes(candidate)
        if text is None:
            continue
        try:
            listed = _qemu_conf.commented_default(text)
        except _qemu_conf.SyntaxProblem as problem:
            if candidate == path:
                raise refused(path, problem) from problem
            continue
        if listed is not None:
            return listed, f"the commented default in {candidate}"
    known = (
        f"the built-in list of libvirt {version}" if version else "the widest built-in list, as no version was found"
    )
    return _qemu_conf.built_in(version), known


def refused(path: str, problem: Exception) -> HostError:
    return HostError(f"{path}: {problem}. libvirt refuses the file as it is; nothing was changed. Repair it first.")


def installed_version(host: Host) -> str | None:
    """The version of libvirt's QEMU driver: by Debian's package database, else the daemon's word; or None."""
    packages = read_packages(host)
    for name in _DEBIAN_PACKAGES:
        package = packages.get(name)
        if package is not None and package.installed:
            return package.version.rpartition(":")[2]
    for command in ("virtqemud", "libvirtd"):
        answer = host.ask([command, "--version"])
        match = re.search(r"(\d+\.\d+\.\d+)", answer.stdout) if answer is not None and answer.ok else None
        if match:
            return match.group(1)
    return None


def _started(host: Host, unit: str) -> float | None:
    """When a daemon that runs was started, in seconds since the epoch; None for one that does not run."""
    answer = host.ask(["systemctl", "show", "-p", "ActiveState,MainPID", "--", unit])
    if answer is None:
        return None
    shown = dict(line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line)
    if shown.get("ActiveState") != "active" or not shown.get("MainPID", "0").isdecimal():
        return None
    # /proc/PID/stat, field 22: start in clock ticks after boot (proc(5)), 100 a second wherever libvirt runs. Counted
    # back from now, as the wall clock may have been set since; systemd's own time stamp would be the old clock's.
    fields = (host.read_text(f"/proc/{shown['MainPID']}/stat") or "").rpartition(")")[2].split()
    uptime = (host.read_text("/proc/uptime") or "").split()
    if len(fields) < 20 or not uptime:
        return None
    return time.time() - float(uptime[0]) + int(fields[19]) / 100


# -- planning ----------------------------------------------------------------------------------------------------------


def plan_present(state: Libvirt, devices: t.Sequence[str], restart: bool) -> Plan:
    """What is missing until the list holds the devices and the daemon has read it.

    Raises:
        HostError: no such file, or one that libvirt itself refuses.
    """
    if state.content is None:
        raise HostError(
            f"{state.path} does not exist: libvirt's QEMU driver is not installed here (Debian: libvirt-daemon-system)."
        )

    def edit(content: bytes) -> bytes:
        after = _qemu_conf.merge(content, devices, state.default)
        others = _qemu_conf.active_list(_qemu_conf.strip(content, state.default))
        base = list(state.default) if others is None else others
        missing = [device for device in dict.fromkeys(devices) if device not in base]
        _qemu_conf.check(content, after, base + missing if missing else others)
        return after

    return _plan(state, edit, restart, True)


def plan_absent(state: Libvirt, restart: bool) -> Plan:
    """What is missing until nothing of ours is in the list.

    Raises:
        HostError: libvirt itself refuses the file.
    """
    if state.content is None:
        return Plan()

    def edit(content: bytes) -> bytes:
        after = _qemu_conf.strip(content, state.default)
        ours = _qemu_conf.own_devices(content)
        left = [device for device in _qemu_conf.active_list(content) or [] if device not in ours]
        _qemu_conf.check(content, after, None if _qemu_conf.active_list(after) is None else left)
        return after

    return _plan(state, edit, restart, False)


def _plan(state: Libvirt, edit: t.Callable[[bytes], bytes], restart: bool, present: bool) -> Plan:
    before = state.content or b""
    plan = Plan()
    try:
        after = edit(before)
        ours = _qemu_conf.own_devices(after)
    except _qemu_conf.SyntaxProblem as problem:
        raise refused(state.path, problem) from problem
    except HostError as problem:
        raise HostError(f"{state.path}: {problem.message.rstrip('.')}.") from problem
    daemons = state.running_daemons if after != before else state.stale_daemons if present and ours else ()
    steps = [Restart(f"restart {daemon} (guests keep running)", daemon=daemon) for daemon in daemons if restart]
    if after != before:
        plan.add(
            WriteConf(
                f"write cgroup_device_acl in {state.path}",
                state.path,
                before.decode("utf-8", "replace"),
                after.decode("utf-8", "replace"),
                path=state.path,
                content=after,
                mode=0o600,
                restarts=steps,
            )
        )
    plan.add(*steps)
    return plan


@dataclasses.dataclass
class Restart(Step):
    """Restart a daemon if it runs, and see that it stays."""

    daemon: str = ""

    def __post_init__(self) -> None:
        self.tried = False

    def apply(self) -> None:
        self.tried = True
        run(["systemctl", "try-restart", "--", self.daemon], 120)
        if not wait_until(lambda: _is_active(self.daemon), 10):
            words = run(["journalctl", "--no-pager", "-n", "5", "-o", "cat", "-u", self.daemon]).strip().splitlines()
            raise HostError(f"{self.daemon} did not come back: {' / '.join(words[-3:])}")


def _is_active(unit: str) -> bool:
    answer = Host().ask(["systemctl", "is-active", "--", unit])
    return answer is not None and answer.ok


@dataclasses.dataclass
class WriteConf(WriteFile):
    """Write qemu.conf; taken back, the daemons that were restarted for it read the old one again."""

    restarts: t.Sequence[Restart] = ()

    def undo(self) -> None:
        super().undo()
        for step in self.restarts:
            if step.tried:
                run(["systemctl", "restart", "--", step.daemon], 120)
