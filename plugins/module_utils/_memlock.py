# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""How much memory guests may pin: the limit that QEMU needs, and the files that give it.

A guest with a device has all of its memory pinned. iommufd compares what it pins with RLIMIT_MEMLOCK of the process
that pins, but by default (RLIMIT_MODE 0) it counts what *all* processes of the same user have pinned through iommufd
(drivers/iommu/iommufd/pages.c, incr_user_locked_vm). So each guest's limit has to cover the sum of all guests that
run as one user. Only a launcher with CAP_SYS_RESOURCE can have it counted per process (RLIMIT_MODE 1), as libvirt 12.1
does.

Who sets the limit: libvirt raises it itself for guests with a ``<hostdev>`` or a ``<hard_limit>``; a guest whose
``<qemu:commandline>`` opens the nodes inherits that of the daemon (Debian: 64 MiB). A service has ``LimitMEMLOCK=``, a
login session pam_limits.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._files import OWN_MARK, own_header
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._libvirt_acl import DAEMONS, Restart
from ansible_collections.iommufd.host.plugins.module_utils._own_files import refuse_foreign
from ansible_collections.iommufd.host.plugins.module_utils._plan import Action, Plan, RemoveFile, Step, WriteFile, run
from ansible_collections.iommufd.host.plugins.module_utils._systemd_unit import (
    RemoveDropIn,
    UnitState,
    WriteDropIn,
    daemon_reload,
    marked_drop_ins,
    read_unit,
)

DROP_IN = "50-iommufd-host-memlock.conf"
LIMITS = "/etc/security/limits.d/90-iommufd-host.conf"

GIB = 1 << 30

# What libvirt adds to the memory of a guest with a VFIO device, for what else is mapped: BARs of other devices, ROMs,
# video memory (qemuDomainGetMemLockLimitBytes in src/qemu/qemu_domain.c).
OVERHEAD = GIB

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": GIB, "T": 1 << 40}
_ACCEPTED_SIZE = "a size such as 4G or 512M (binary units)"
_ACCEPTED_GUEST = "the memory of a guest, such as 4G, or a dictionary with memory and count"
_ACCEPTED_USER = "the name of a user, or of a group with @ before it"


def parse_size(option: str, value: object) -> int:
    """A size in bytes.

    Raises:
        OptionError: not a whole number with K, M, G or T.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,14})([KMGT]?)(?:i?B)?", str(value).strip())
    if match is None or isinstance(value, (bool, float)):
        raise OptionError(option, value, _ACCEPTED_SIZE)
    return int(match[1]) * _UNITS[match[2]]


def show_size(size: int | None) -> str:
    """A size in bytes for people; None is no limit."""
    if size is None:
        return "unlimited"
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f}".rstrip("0").rstrip(".") + f" {name}"
    return f"{size} bytes"


@dataclasses.dataclass(frozen=True)
class Amount:
    """A limit in bytes (None: none) and how it came about, in words."""

    size: int | None
    reason: str

    @property
    def systemd(self) -> str:
        return "infinity" if self.size is None else str(self.size)

    @property
    def kib(self) -> str:
        return "unlimited" if self.size is None else str(-(-self.size // 1024))


def parse_guests(option: str, guests: t.Sequence[object]) -> Amount:
    """The limit for guests that run at the same time as one user.

    Args:
        option: its name, for errors.
        guests: sizes, or dictionaries with ``memory`` and ``count``.

    Raises:
        OptionError: an entry that is neither.
    """
    total = 0
    words = []
    for index, entry in enumerate(guests):
        where = f"{option}[{index}]"
        given = dict(entry) if isinstance(entry, dict) else {"memory": entry}
        count: t.Any = given.pop("count", 1)
        memory = given.pop("memory", None)
        if given or memory is None or isinstance(memory, (list, dict)):
            raise OptionError(where, entry, _ACCEPTED_GUEST)
        if isinstance(count, bool) or not str(count).isdecimal() or not 1 <= int(count) <= 10000:
            raise OptionError(f"{where}.count", count, "a whole number from 1 to 10000")
        size = parse_size(f"{where}.memory" if isinstance(entry, dict) else where, memory)
        total += int(count) * (size + OVERHEAD)
        words.append(f"{int(count)} x ({show_size(size)} + {show_size(OVERHEAD)})")
    return Amount(total, f"{' + '.join(words)} = {show_size(total)}")


def parse_limit(option: str, value: str) -> Amount:
    """A limit that the user gives.

    Raises:
        OptionError: neither a size nor ``infinity``.
    """
    if value in ("infinity", "unlimited"):
        return Amount(None, "no limit, as asked")
    try:
        size = parse_size(option, value)
    except OptionError:
        raise OptionError(option, value, f"{_ACCEPTED_SIZE}, or infinity") from None
    return Amount(size, f"{show_size(size)}, as asked")


def parse_user(option: str, value: str) -> str:
    """A domain of limits.conf.

    Raises:
        OptionError: not a name; wildcards would give the limit to everybody.
    """
    if not re.fullmatch(r"@?[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", value):
        raise OptionError(option, value, _ACCEPTED_USER)
    return value


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Service:
    """A service that starts QEMU.

    Attributes:
        state: the unit with our drop-in for the limit.
        base: its limit without us, in bytes (None: none); ``-1`` where nothing sets one.
        process: its main process where it runs.
        live: the limit of that process (None: none).
    """

    state: UnitState
    base: int | None
    process: int | None
    live: int | None

    @property
    def daemon(self) -> bool:
        return self.state.unit in DAEMONS


@dataclasses.dataclass(frozen=True)
class State:
    """What the planner needs to know: the services, those of them that we are asked about, and limits.d."""

    services: t.Mapping[str, Service]
    limits: bytes | None


def read_state(host: Host, units: t.Iterable[str]) -> State:
    """The services named, and all that have a drop-in of ours.

    Raises:
        HostError: something other than a regular file is in the place of one of ours.
    """
    names = dict.fromkeys([*units, *marked_drop_ins(host, DROP_IN)])
    content = host.read_bytes(LIMITS)
    if content is None and host.exists(LIMITS):
        raise HostError(f"{LIMITS} is there, but is not a file that can be read.")
    return State({name: read_service(host, name) for name in names}, content)


def read_service(host: Host, unit: str) -> Service:
    """A service and the limit of its main process."""
    state = read_unit(host, unit, DROP_IN)
    process = int(state.shown.get("MainPID") or 0) if state.active else 0
    return Service(state, _base(host, state), process or None, process_limit(host, process) if process else -1)


def installed_daemons(host: Host) -> list[str]:
    """libvirt's daemons that this host has and that start guests."""
    return [name for name in DAEMONS if read_unit(host, name, DROP_IN).loaded]


def process_limit(host: Host, process: int | str) -> int | None:
    """RLIMIT_MEMLOCK (soft) of a process in bytes, None for none; -1 where it cannot be read."""
    match = re.search(r"^Max locked memory\s+(\S+)", host.read_text(f"/proc/{process}/limits") or "", re.MULTILINE)
    if match is None:
        return -1
    return None if match[1] == "unlimited" else int(match[1])


def shown_limit(value: str | None) -> int | None:
    """What ``systemctl show`` says about LimitMEMLOCK: bytes, None for none, -1 where it says nothing."""
    if value in ("infinity", "18446744073709551615"):
        return None
    return int(value) if value and value.isdecimal() else -1


def _base(host: Host, state: UnitState) -> int | None:
    """LimitMEMLOCK of the unit's own files and of others' drop-ins; the last one counts, and of "soft:hard"
    (systemd.exec(5)) the soft limit, which is the one that the kernel compares with."""
    found: int | None = -1
    paths = [state.shown.get("FragmentPath", ""), *state.shown.get("DropInPaths", "").split()]
    for path in paths:
        if not path or path == state.path:
            continue
        for line in (host.read_text(path) or "").splitlines():
            match = re.fullmatch(r"\s*LimitMEMLOCK\s*=\s*([^:\s]*)(?::\S*)?\s*", line)
            if match is None:
                continue
            if match[1] in ("", "infinity"):
                found = None if match[1] else -1
            else:
                size = re.fullmatch(r"(\d+)([KMGT]?)", match[1])
                found = int(size[1]) * _UNITS[size[2]] if size else found
    return found


def enough(limit: int | None, needed: int | None) -> bool:
    """Whether a limit (None: none) covers another."""
    return limit is None or (needed is not None and limit >= needed)


# -- planning ----------------------------------------------------------------------------------------------------------


def drop_in_text(amount: Amount) -> str:
    """The drop-in of a service."""
    return f"{own_header()}# {amount.reason}\n[Service]\nLimitMEMLOCK={amount.systemd}\n"


def limits_text(amount: Amount, users: t.Sequence[str]) -> str:
    """The file for pam_limits; ``-`` sets soft and hard limit."""
    return f"{own_header()}# {amount.reason}\n" + "".join(f"{user} - memlock {amount.kib}\n" for user in users)


def plan(
    state: State, amount: Amount | None, units: t.Sequence[str], users: t.Sequence[str], restart: bool, host: Host
) -> Plan:
    """What is missing until exactly these services and users have the limit.

    Args:
        state: as read.
        amount: the limit; None with no units and no users, to take everything back.
        units: services that shall have it. One whose own limit is enough gets no drop-in.
        users: domains for limits.d.
        restart: restart libvirt's daemon where it runs with another limit.
        host: the host.

    Raises:
        Refusal: a file that is not ours is in the place of one of ours.
    """
    result = Plan()
    reload = False
    restarts: list[Restart] = []
    for name, service in state.services.items():
        wanted = amount is not None and name in units and not enough(service.base, amount.size)
        target = amount.size if amount is not None and wanted else service.base
        step = None
        if restart and service.daemon and service.process is not None and _differs(service, target, wanted):
            step = Restart(f"restart {name} (guests keep running)", daemon=name)
            restarts.append(step)
        text = drop_in_text(amount) if amount is not None and wanted else None
        reload = _plan_unit(result, service, text, step) or reload
    _plan_limits(result, state.limits, limits_text(amount, users) if amount is not None and users else None)
    if reload or any(service.state.shown.get("NeedDaemonReload") == "yes" for service in state.services.values()):
        result.add(Action("have systemd read its units again", do=daemon_reload))
    result.add(*restarts)
    if restarts and amount is not None:
        result.add(
            Action(
                "check the limit of " + ", ".join(step.daemon for step in restarts),
                do=lambda: _check(host, [step.daemon for step in restarts], amount.size),
            )
        )
    return result


def _differs(service: Service, target: int | None, wanted: bool) -> bool:
    """Whether a daemon that runs has to be restarted: it lacks what is wanted, or still has what we gave it."""
    if wanted:
        return service.live != target
    return service.state.content is not None and (target == -1 or service.live != target)


@dataclasses.dataclass
class _LimitChanged(Step):
    """A change of the drop-in; taken back, a daemon that was restarted for it has its old limit again."""

    restart: Restart | None = None

    def undo(self) -> None:
        super().undo()
        if self.restart is not None and self.restart.tried:
            run(["systemctl", "restart", "--", self.restart.daemon], 120)


@dataclasses.dataclass
class WriteLimit(_LimitChanged, WriteDropIn):
    """Write the drop-in."""


@dataclasses.dataclass
class RemoveLimit(_LimitChanged, RemoveDropIn):
    """Remove the drop-in."""


def _plan_unit(plan_: Plan, service: Service, text: str | None, restart: Restart | None) -> bool:
    state = service.state
    content = state.content
    refuse_foreign(state.path, content)
    before = (content or b"").decode("utf-8", "replace")
    if text is None:
        if content is not None:
            plan_.add(
                RemoveLimit(
                    f"remove {state.path}", state.path, before, path=state.path, prune=[os.path.dirname(state.path)],
                    restart=restart,
                )
            )  # fmt: skip
        return content is not None or state.path in state.shown.get("DropInPaths", "").split()
    if before != text:
        plan_.add(
            WriteLimit(
                f"write {state.path}", state.path, before, text, path=state.path, content=text.encode(), mode=0o644,
                enforce_mode=True, restart=restart,
            )
        )  # fmt: skip
        return True
    return state.loaded and state.path not in state.shown.get("DropInPaths", "").split()


def _plan_limits(plan_: Plan, content: bytes | None, text: str | None) -> None:
    before = (content or b"").decode("utf-8", "replace")
    if text is not None:
        refuse_foreign(LIMITS, content)
    elif OWN_MARK in before[:400]:
        plan_.add(RemoveFile(f"remove {LIMITS}", LIMITS, before, path=LIMITS))
    if text is not None and text != before:
        plan_.add(
            WriteFile(
                f"write {LIMITS}", LIMITS, before, text, path=LIMITS, content=text.encode(), mode=0o644,
                enforce_mode=True,
            )
        )  # fmt: skip


def _check(host: Host, daemons: t.Sequence[str], size: int | None) -> None:
    for name in daemons:
        service = read_service(host, name)
        if service.state.content is not None and service.process is not None and service.live != size:
            later = service.state.shown.get("DropInPaths", "").split()
            raise HostError(
                f"{name} runs with a limit of {show_size(service.live)} instead of {show_size(size)}; its drop-ins in "
                f"the order in which they are read: {', '.join(later)}"
            )
