# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Kernel modules that are loaded now and at every boot.

Nothing loads iommufd by itself: /dev/iommu has no devname alias, so opening it does not (Linux 6.2 and later,
drivers/iommu/iommufd/main.c). A file in /etc/modules-load.d has systemd-modules-load do it, before sysinit.target and
at the same time as udev goes through the devices.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._files import own_header
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._kernel import ModuleIndex
from ansible_collections.iommufd.host.plugins.module_utils._modules_stale import plan_stale
from ansible_collections.iommufd.host.plugins.module_utils._own_files import read_own
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan, RemoveFile, Step, WriteFile, run

PATH = "/etc/modules-load.d/iommufd-host.conf"

# Directories that systemd-modules-load reads, and the file that Debian links into them.
_DIRECTORIES = (
    "/etc/modules-load.d",
    "/run/modules-load.d",
    "/usr/local/lib/modules-load.d",
    "/usr/lib/modules-load.d",
)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")

# Where a module is known to bring a device node with it.
NODES = {"iommufd": "/dev/iommu"}


def canonical(name: str) -> str:
    """A module's name as the kernel writes it, with underscores."""
    return name.replace("-", "_")


def check_names(option: str, names: t.Sequence[str]) -> None:
    """Refuse what cannot be a module's name.

    Raises:
        OptionError: names the option with the index.
    """
    for number, name in enumerate(names):
        if not _NAME.fullmatch(name):
            raise OptionError(f"{option}[{number}]", name, "the name of a kernel module, such as vfio-pci")


@dataclasses.dataclass
class LoadModules(Step):
    """Load modules, with what they need; :meth:`undo` unloads those that were not loaded before."""

    names: t.Sequence[str] = ()

    def __post_init__(self) -> None:
        self._before: set[str] = set()

    def apply(self) -> None:
        self._before = loaded(Host())
        try:
            run(["modprobe", "-a", *self.names], 120)
        except HostError as error:
            hint = ""
            if "Key was rejected" in error.message:
                hint = (
                    ". Secure Boot is on and the key that signed the module is not trusted: enrol it "
                    "(mokutil --import /var/lib/dkms/mok.pub), reboot and confirm at the console"
                )
            elif "Exec format error" in error.message or "nvalid argument" in error.message:
                hint = ". The kernel log has the reason (dmesg | tail)"
            raise HostError(error.message.rstrip(".") + hint, **error.details) from error

    def undo(self) -> None:
        unload([name for name in self.names if canonical(name) not in self._before], self._before)


@dataclasses.dataclass
class UnloadModules(Step):
    """Unload modules, and those that are there for them only.

    Attributes:
        names: the modules.
        keep: names of modules that stay even when nothing uses them.
    """

    names: t.Sequence[str] = ()
    keep: t.Collection[str] = ()

    def __post_init__(self) -> None:
        self._before: list[str] = []

    def apply(self) -> None:
        running = loaded(Host())
        self._before = [name for name in self.names if canonical(name) in running]
        unload(self._before, self.keep)

    def undo(self) -> None:
        if self._before:
            run(["modprobe", "-a", *reversed(self._before)], 60)


def unload(names: t.Sequence[str], keep: t.Collection[str] = ()) -> None:
    """Unload modules, and what they needed as far as nothing else uses it.

    ``modprobe -r`` alone does not do: vfio asks for vfio_iommu_type1 by itself, which then holds vfio, and with it
    iommufd.

    Raises:
        HostError: one of the modules is in use.
    """
    if not names:
        return
    host = Host()
    index = ModuleIndex(host)
    kept = {canonical(name) for name in keep}
    going = {canonical(name) for name in names}
    for name in list(going):
        going.update(canonical(os.path.basename(path).partition(".ko")[0]) for path in index.closure(name))
    if "vfio" in going:
        going.add("vfio_iommu_type1")
    going -= kept
    while True:
        idle = [name for name in sorted(going & loaded(host)) if host.read_int(f"/sys/module/{name}/refcnt") == 0]
        if not idle:
            break
        run(["rmmod", *idle], 60)
    left = [name for name in names if canonical(name) in loaded(host)]
    if left:
        raise HostError(f"{', '.join(left)} cannot be unloaded: something uses it")


def loaded(host: Host) -> set[str]:
    """Names of the loaded modules."""
    return set(ModuleIndex(host).loaded or ())


def content(names: t.Sequence[str]) -> str:
    """The file that has modules loaded at boot."""
    return own_header() + "".join(f"{name}\n" for name in names)


def listed_elsewhere(host: Host) -> dict[str, str]:
    """Modules that files of others have loaded at boot: file by name (with underscores)."""
    files = ["/etc/modules"]
    for directory in _DIRECTORIES:
        files.extend(f"{directory}/{name}" for name in host.listdir(directory) if name.endswith(".conf"))
    found: dict[str, str] = {}
    for path in files:
        if path == PATH:
            continue
        for line in (host.read_text(path) or "").splitlines():
            name = line.strip()
            if name and name[0] not in "#;":
                found.setdefault(canonical(name.split()[0]), path)
    return found


@dataclasses.dataclass
class Planned:
    """What is to be done, and what the module's result says of it."""

    plan: Plan
    warnings: list[str] = dataclasses.field(default_factory=list)
    staying: dict[str, str] = dataclasses.field(default_factory=dict)


def plan_present(host: Host, names: t.Sequence[str], pending: bool = False) -> Planned:
    """What it takes for modules to be loaded now and at boot.

    Args:
        host: the host.
        names: the modules, in the order in which they are to be loaded.
        pending: an earlier task is going to install a module that is not there (check mode).

    Raises:
        HostError: the kernel has no such module.
    """
    index = ModuleIndex(host)
    states = {name: index.state(name) for name in names}
    absent = [name for name in names if not states[name].usable]
    planned = Planned(Plan())
    if absent and not pending:
        remedy = ""
        if "iommufd" in absent:
            remedy = (
                " Debian's kernels are built without it (CONFIG_IOMMUFD); the module iommufd_dkms builds it from the "
                "kernel's own sources."
            )
        raise HostError(
            f"The running kernel {index.kernel or '(unknown)'} has no module {', '.join(absent)}.{remedy}",
            missing=absent,
        )
    if absent:
        planned.warnings.append(
            f"The running kernel has no module {', '.join(absent)} yet; whether it loads shows when it is there."
        )
    stale, warnings = plan_stale(host, True)
    planned.plan.add(*stale)
    planned.warnings.extend(warnings)
    wanted = [name for name in names if states[name].state != "builtin"]
    before = host.read_text(PATH)
    after = content(wanted) if wanted else None
    if after is not None or before is not None:
        read_own(host, PATH)  # refuses also what is no file
    if after is None and before is not None:
        planned.plan.add(RemoveFile(f"remove {PATH}", PATH, before, "", path=PATH))
    elif after is not None and before != after:
        planned.plan.add(WriteFile(f"write {PATH}", PATH, before or "", after, path=PATH, content=after.encode()))
    idle = [name for name in wanted if states[name].state != "loaded"]
    if idle:
        planned.plan.add(LoadModules(f"load {', '.join(idle)}", "loaded modules", "", _lines(idle), names=idle))
    return planned


def plan_absent(host: Host) -> Planned:
    """What it takes to undo :func:`plan_present`.

    Modules are unloaded where our file had them loaded, no other file does, and nothing uses them; without our file
    nobody can say why they are loaded, and they stay.
    """
    planned = Planned(Plan())
    planned.plan.add(*plan_stale(host, False)[0])
    before = host.read_text(PATH)
    if before is None:
        return planned
    read_own(host, PATH)
    planned.plan.add(RemoveFile(f"remove {PATH}", PATH, before, "", path=PATH))
    running = loaded(host)
    others = listed_elsewhere(host)
    names = [line for line in before.splitlines() if line and not line.startswith("#")]
    idle: list[str] = []
    for name in reversed(names):
        if canonical(name) not in running:
            continue
        if canonical(name) in others:
            planned.staying[name] = f"{others[canonical(name)]} has it loaded"
            continue
        users = _users(host, canonical(name), {canonical(one) for one in idle})
        if users:
            planned.staying[name] = "; ".join(users)
        else:
            idle.append(name)
    if idle:
        planned.plan.add(
            UnloadModules(
                f"unload {', '.join(idle)}",
                "loaded modules",
                _lines(idle),
                "",
                names=idle,
                keep={*planned.staying, *others},
            )
        )
    return planned


def _users(host: Host, name: str, going: set[str]) -> list[str]:
    """What keeps a loaded module from being unloaded once some others are gone."""
    holders = host.listdir(f"/sys/module/{name}/holders")
    count = host.read_int(f"/sys/module/{name}/refcnt") or 0
    users = []
    for holder in holders:
        if holder not in going and not _only_helps(host, holder, going):
            users.append(f"module {holder} uses it")
    if count > len(holders):
        users.append("it is in use")
    for driver in host.listdir(f"/sys/module/{name}/drivers"):
        bus, _colon, short = driver.partition(":")
        devices = [
            entry for entry in host.listdir(f"/sys/bus/{bus}/drivers/{short}") if re.match(r"[0-9a-f]{4,}:", entry)
        ]
        users.extend(f"{device} is bound to it" for device in devices)
    return users


def _only_helps(host: Host, name: str, going: set[str]) -> bool:
    """Whether a module is there for modules that go only, so that modprobe -r takes it along."""
    holders = host.listdir(f"/sys/module/{name}/holders")
    count = host.read_int(f"/sys/module/{name}/refcnt") or 0
    if count > len(holders) or not holders:
        # Nothing holds vfio_iommu_type1, the back end of legacy containers, which vfio itself asks for.
        return name == "vfio_iommu_type1" and count == 0
    return all(holder in going or _only_helps(host, holder, going) for holder in holders)


def _lines(names: t.Iterable[str]) -> str:
    return "".join(f"{name}\n" for name in names)


def node_of(host: Host, name: str) -> str | None:
    """The device node that a module brings, where it is there as a character device."""
    path = NODES.get(canonical(name))
    status = host.stat(path) if path is not None else None
    return path if status is not None and stat.S_ISCHR(status.st_mode) else None
