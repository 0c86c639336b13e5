# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Which PCI functions go to a guest's driver or back to the host: selection, refusals, plan.

The plan covers all functions of a call and their whole IOMMU groups before any is touched, and is refused as a whole
when a part of it is unsafe or impossible.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._given_away import (
    merge,
    plan_memory,
    read_memory,
    remembered,
    view_of_gone,
)
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import (
    Group,
    blocks,
    is_vfio_driver,
    read_groups,
    viable_with,
)
from ansible_collections.iommufd.host.plugins.module_utils._kernel import (
    Config,
    Module,
    ModuleIndex,
    modules_directory,
    read_config,
)
from ansible_collections.iommufd.host.plugins.module_utils._names import Names, read_names
from ansible_collections.iommufd.host.plugins.module_utils._pci import (
    DEVICES,
    Function,
    address_key,
    read_functions,
    vf_addresses,
)
from ansible_collections.iommufd.host.plugins.module_utils._persistence import (
    Entry,
    identity_of,
    plan_persistence,
    read_entries,
)
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan, Step
from ansible_collections.iommufd.host.plugins.module_utils._refusals import Refusals, refuse_locked
from ansible_collections.iommufd.host.plugins.module_utils._selectors import Selector, choose, parse_selectors, view
from ansible_collections.iommufd.host.plugins.module_utils._udev import (
    Promise,
    cdev_link,
    check_promise,
    read_promise,
)
from ansible_collections.iommufd.host.plugins.module_utils._usage import Use, all_uses
from ansible_collections.iommufd.host.plugins.module_utils._vfio import (
    NO_CDEV,
    Bind,
    LoadDriver,
    Mover,
    Release,
    cdev_of,
    cdev_ready,
    cdev_supported,
)

ACCEPTED_DRIVER = "vfio-pci, the name of a variant of it such as mlx5_vfio_pci, or auto"

IOMMU_OFF = (
    "the IOMMU is off. Turn it on in the firmware (VT-d, AMD-Vi) and in the kernel (role iommufd.host.kernel; "
    "on Intel the argument intel_iommu=on), and reboot"
)

_DRIVER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user wants.

    Attributes:
        devices: selectors as written, see :mod:`_selectors`.
        bound: True: to a vfio driver; False: back to the host.
        persistent: whether that also holds after a reboot.
        force: take also what is in use and addressed, but never the root disk or the interface of this connection.
        include_group: take the companions in the IOMMU groups along.
        driver: a vfio driver's name, or "auto".
        require_cdev: whether a character device must appear.
        timeout: seconds for a driver to let go.
        pending: the IOMMU, modules or packages are only about to come (check mode of a whole play).
    """

    devices: t.Sequence[t.Any]
    bound: bool = True
    persistent: bool = True
    force: bool = False
    include_group: bool = False
    driver: str = "vfio-pci"
    require_cdev: bool = True
    timeout: float = 30.0
    pending: bool = False


@dataclasses.dataclass
class Situation:
    """What was read from the host before anything is decided.

    Attributes:
        functions: all PCI functions by address.
        groups: IOMMU groups by number.
        uses: uses by address.
        kept: what is kept across reboots now.
        memory: what is remembered of devices for this boot.
        names: what the host calls each function now, by address.
        remembered: what it called those that it has given away, by address.
        index: modules of the running kernel.
        config: the running kernel's configuration, where it is known; not read where ``cdev_supported`` tells all.
        cdev_supported: whether the loaded vfio makes character devices; None while it is not loaded.
    """

    functions: dict[str, Function]
    groups: dict[int, Group]
    uses: dict[str, list[Use]]
    kept: dict[str, Entry]
    index: ModuleIndex
    config: Config | None = None
    cdev_supported: bool | None = None
    memory: dict[str, Entry] = dataclasses.field(default_factory=dict)
    names: dict[str, Names] = dataclasses.field(default_factory=dict)
    remembered: dict[str, Names] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Move:
    """One function of a call.

    Attributes:
        function: as it is before.
        reason: why it is part of the call.
        named: whether its address is written out in the call; force is for nothing else.
        to: driver that it shall have; None: whatever the host has for it.
        needed: whether anything has to be done with it now.
        expected: modules of the host that claim it, for its way back.
    """

    function: Function
    reason: str
    named: bool
    to: str | None = None
    needed: bool = False
    expected: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        return self.function.address


@dataclasses.dataclass
class Binding:
    """A decided call: its moves, the plan that carries them out, and what the user should know."""

    moves: list[Move]
    plan: Plan
    kept: dict[str, Entry]
    names: dict[str, Names]
    warnings: list[str] = dataclasses.field(default_factory=list)


def read_situation(host: Host) -> Situation:
    """Read all that a decision depends on."""
    functions = read_functions(host)
    supported = cdev_supported(host)
    return Situation(
        functions={function.address: function for function in functions},
        groups=read_groups(host),
        uses=all_uses(host, functions),
        kept=read_entries(host),
        memory=read_memory(host),
        names=read_names(host, functions),
        remembered=remembered(host, functions),
        index=ModuleIndex(host),
        config=read_config(host) if supported is None else None,
        cdev_supported=supported,
    )


# -- selection -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Selection:
    """What the selectors of a call name.

    Attributes:
        moves: the functions, in the order of their addresses, each once.
        gone: addresses of devices that are no longer there but still remembered.
        excluded: addresses that must not be taken, not even as companions.
        by_name: whether a selector uses what a device loses with the host's driver.
        missing: sentences about VFs that are not there.
    """

    moves: list[Move]
    gone: list[str]
    excluded: set[str]
    by_name: bool
    missing: list[str]


def select(situation: Situation, request: Request) -> Selection:
    """The functions that the selectors name.

    Giving back, a selector that only describes devices concerns those on a vfio driver and those that we keep; and one
    that is remembered but no longer there can be forgotten.

    Raises:
        OptionError: a selector is malformed, or names what the host does not have.
    """
    selectors = parse_selectors("devices", list(request.devices))
    names, memory = situation.names, situation.remembered
    views = [view(one, names.get(one.address), memory.get(one.address)) for one in situation.functions.values()]
    entries = {**situation.memory, **situation.kept}
    if not request.bound:
        views += [view_of_gone(one) for address, one in entries.items() if address not in situation.functions]
    selectors, absent = _without_absent_vfs(situation, request, selectors, entries)
    choice = choose(selectors, views, pending=request.pending, lenient=not request.bound)
    moves: list[Move] = []
    gone: list[str] = []
    for one in choice.chosen:
        function = situation.functions.get(one.address)
        if function is None:
            gone.append(one.address)
        elif request.bound or one.addressed or one.address in entries or _on_vfio(function):
            moves.append(Move(function, one.reason, named=one.addressed))
    moves.sort(key=lambda move: address_key(move.address))
    by_name = any(selector.by_name for selector in selectors)
    return Selection(moves, gone, choice.excluded, by_name, [*choice.missing, *absent])


def _without_absent_vfs(
    situation: Situation, request: Request, selectors: t.Sequence[Selector], entries: t.Collection[str]
) -> tuple[list[Selector], list[str]]:
    """The selectors without those that write out the address of a VF that is about to be made, or that has been removed
    before it could be given back; and a sentence about each that is about to be made."""
    if request.bound and not request.pending:
        return list(selectors), []
    possible = {address for function in situation.functions.values() for address in vf_addresses(function)}
    absent = possible.difference(situation.functions, entries)
    left_out = [selector for selector in selectors if selector.address in absent]
    words = [f"{one.option}: the VF {one.address} is not there yet and is left out." for one in left_out]
    return [selector for selector in selectors if selector not in left_out], words if request.bound else []


def _on_vfio(function: Function) -> bool:
    return any(is_vfio_driver(one) for one in (function.driver, function.driver_override) if one is not None)


def companions(
    situation: Situation, moves: t.Sequence[Move], bound: bool, excluded: t.Collection[str] = ()
) -> list[Move]:
    """The other members of the moves' groups that must go along: on a host driver (they block) or on vfio already."""
    found: dict[str, Move] = {}
    chosen = {move.address for move in moves}.union(excluded)
    for move in moves:
        number = move.function.iommu_group
        group = None if number is None else situation.groups.get(number)
        for address in group.members if group else ():
            function = situation.functions.get(address)
            if function is None or address in chosen or function.is_bridge:
                continue
            vfio = function.driver is not None and is_vfio_driver(function.driver)
            if vfio or (bound and blocks(function)):
                why = f"companion of {move.address} in IOMMU group {number} (include_group)"
                found.setdefault(address, Move(function, why, named=False))
    return [found[address] for address in sorted(found, key=address_key)]


def check_driver(name: str) -> None:
    """Refuse a name that is no vfio driver: the devices would end up anywhere.

    Raises:
        OptionError: it is none.
    """
    if name != "auto" and not (_DRIVER_NAME.fullmatch(name) and is_vfio_driver(name)):
        raise OptionError("driver", name, ACCEPTED_DRIVER)


def driver_for(situation: Situation, function: Function, driver: str) -> str:
    """The vfio driver for a function: the one named, or with "auto" the most specific that modules.alias offers.

    A variant's driver is called like its module (``KBUILD_MODNAME`` in drivers/vfio/pci/*/main.c); vfio-pci alone
    writes itself with a hyphen.
    """
    if driver != "auto":
        return driver
    modules = situation.index.vfio_drivers_for(function.modalias) if function.modalias else []
    best = modules[0] if modules else "vfio_pci"
    return "vfio-pci" if best == "vfio_pci" else best


# -- refusals ------------------------------------------------------------------------------------------------------


def _refuse_uses(refusals: Refusals, situation: Situation, move: Move, force: bool) -> bool:
    """Add what uses a function; returns whether force (with the address written out) would help."""
    found = situation.uses.get(move.address, [])
    forced = force and move.named
    counting = [use for use in found if use.vital or not forced]
    if not counting:
        return False
    words = "; ".join(use.detail for use in counting)
    vital = any(use.vital for use in counting)
    if force and not vital:
        words += f". It was taken up as {move.reason}, and force is only for a device whose address is written out"
    refusals.add(f"{move.address} is in use: {words}", move.address, counting)
    return not vital


def _refuse_virtual(refusals: Refusals, situation: Situation, move: Move, chosen: set[str], force: bool) -> bool:
    """A physical function's driver takes its VFs along when it goes; returns whether not even force may do that."""
    sriov = move.function.sriov
    if sriov is None or not sriov.num_vfs:
        return False
    busy = []
    for address in sriov.vfs:
        function = situation.functions.get(address)
        driver = function.driver if function else None
        if address in chosen or situation.uses.get(address) or (driver is not None and is_vfio_driver(driver)):
            busy.append(address)
    if busy or not (force and move.named):
        which = f", of which {', '.join(busy)} are given to guests or in use" if busy else ""
        refusals.add(
            f"{move.address} has {sriov.num_vfs} virtual functions{which}; they go when its driver does. "
            "Set their number to 0 first",
            move.address,
        )
    return bool(busy)


def _group_comes_late(situation: Situation, function: Function) -> bool:
    """Whether a function may get its IOMMU group only when a driver takes it.

    On Arm, where firmware tables tell which IOMMU a device is behind, Linux before 6.15 reads them at that moment only
    ("iommu: Get DT/ACPI parsing into the proper probe path"), so that a device without a driver has no group.
    """
    return function.driver is None and bool(situation.groups)


def _refuse_group(refusals: Refusals, situation: Situation, move: Move, chosen: set[str]) -> None:
    number = move.function.iommu_group
    if number is None:
        refusals.add(f"{move.address} has no IOMMU group: {IOMMU_OFF}", move.address)
        return
    group = situation.groups.get(number)
    if group is None:
        return
    blocking = viable_with(group, situation.functions, chosen)
    if blocking:
        listed = ", ".join(f"{one.address} ({one.driver})" for one in blocking)
        mine = ", ".join(sorted((one for one in group.members if one in chosen), key=address_key))
        refusals.add(
            f"IOMMU group {number} of {mine} also holds {listed}, which {'is' if len(blocking) == 1 else 'are'} on "
            "drivers of the host; a group goes to a guest as a whole or not at all (include_group=true takes it all)",
            move.address,
        )


def _refuse_driver(refusals: Refusals, situation: Situation, driver: str, require_cdev: bool) -> None:
    module: Module = situation.index.state(driver)
    if not module.usable:
        refusals.add(
            f"kernel {situation.index.kernel or 'of this host'} has no module {driver}; install the kernel's full set "
            "of modules, or choose another driver"
        )
    elif require_cdev and not _cdev_possible(situation):
        refusals.add(NO_CDEV)


def _cdev_possible(situation: Situation) -> bool:
    if situation.cdev_supported is not None:
        return situation.cdev_supported
    # Not loaded yet. Modules that were installed beside the kernel's own may have what its configuration lacks.
    vfio = situation.index.state("vfio")
    return vfio.dkms or situation.config is None or situation.config.get("VFIO_DEVICE_CDEV") == "y"


# -- decisions -----------------------------------------------------------------------------------------------------


def decide(host: Host, situation: Situation, request: Request) -> Binding:
    """Turn a request into a plan.

    Raises:
        OptionError: a selector or the driver is not acceptable.
        Refusal: the call is unsafe or impossible; all reasons at once, as data in ``refusals``.
    """
    check_driver(request.driver)
    selection = select(situation, request)
    moves = selection.moves
    if request.include_group:
        along = companions(situation, moves, request.bound, selection.excluded)
        moves = sorted([*moves, *along], key=lambda move: address_key(move.address))
    warnings = list(selection.missing)
    if request.bound:
        _decide_bound(situation, request, moves, warnings)
    else:
        _decide_unbound(host, situation, request, moves)
    kept = {address: entry for address, entry in situation.kept.items() if address not in selection.gone}
    memory = {address: entry for address, entry in situation.memory.items() if address not in selection.gone}
    names = {
        move.address: merge(situation.names.get(move.address), situation.remembered.get(move.address)) for move in moves
    }
    for move in moves:
        was_kept = kept.pop(move.address, None) is not None
        was_remembered = memory.pop(move.address, None) is not None
        if not request.bound or move.to is None:
            continue
        named = names[move.address]
        if request.persistent:
            kept[move.address] = _entry(move.function, move.to, named)
        # A run by names that is interrupted, and one that does not keep the devices, must find them again by the same.
        in_run = was_remembered or (selection.by_name and move.needed) or (was_kept and not request.persistent)
        if in_run and named.given:
            memory[move.address] = _entry(move.function, move.to, named)
    remember, live = plan_memory(host, memory), _live_steps(host, request, moves)
    plan = Plan([*remember, *live] if request.bound else [*live, *remember])
    plan.add(*plan_persistence(host, kept, _Claims(host, situation)))
    return Binding(moves, plan, kept, names, warnings)


def _decide_bound(situation: Situation, request: Request, moves: list[Move], warnings: list[str]) -> None:
    refusals = Refusals()
    chosen = {move.address for move in moves}
    helps = False
    for move in moves:
        function = move.function
        if function.is_bridge:
            refusals.add(
                f"{move.address} is a PCI bridge; it stays with the host. Name the devices behind it", move.address
            )
            continue
        if refuse_locked(refusals, move.function):
            continue
        move.to = driver_for(situation, function, request.driver)
        ready = not request.require_cdev or function.vfio_name is not None
        move.needed = not (function.driver == move.to and function.driver_override == move.to and ready)
        if function.driver != move.to:
            would = _refuse_uses(refusals, situation, move, request.force)
            never = _refuse_virtual(refusals, situation, move, chosen, request.force)
            helps = helps or (would and not never)
        if not (function.iommu_group is None and (request.pending or _group_comes_late(situation, function))):
            _refuse_group(refusals, situation, move, chosen)
        if move.needed and not request.pending:
            _refuse_driver(refusals, situation, move.to, request.require_cdev)
    if request.pending and any(move.function.iommu_group is None for move in moves):
        warnings.append(
            "The IOMMU is not on yet, so that the groups of these devices are unknown; whether each group can go to a "
            "guest as a whole is checked when it is real."
        )
    hint = " With force=true a device is taken although it is in use, if its address is written out."
    refusals.speak(hint if helps and not request.force else "")


def _decide_unbound(host: Host, situation: Situation, request: Request, moves: list[Move]) -> None:
    refusals = Refusals()
    chosen = {move.address for move in moves}
    claims = _Claims(host, situation)
    for move in moves:
        function = move.function
        if refuse_locked(refusals, move.function):
            continue
        on_vfio = function.driver is not None and is_vfio_driver(function.driver)
        override = function.driver_override
        # Somebody else's override to a driver of the host is not ours to clear.
        ours = override is not None and is_vfio_driver(override)
        unfinished = function.driver is None and move.address in situation.kept
        move.needed = on_vfio or ours or unfinished
        move.expected = tuple(claims.modules(situation.index, function)) if _probed(host, function) else ()
        if not on_vfio:
            continue
        _refuse_uses(refusals, situation, move, request.force)
        number = function.iommu_group
        group = None if number is None else situation.groups.get(number)
        for address in group.members if group else ():
            # While a guest holds the group no driver of the host may join it (EBUSY).
            for use in situation.uses.get(address, []) if address not in chosen else ():
                if use.kind in ("guest", "open"):
                    refusals.add(
                        f"{move.address} shares IOMMU group {number} with {address}, which is in use: {use.detail}",
                        move.address,
                        [use],
                    )
    refusals.speak("")


def _probed(host: Host, function: Function) -> bool:
    """Whether the kernel looks for a driver of the host at all: not for VFs of a PF whose autoprobe is off."""
    physfn = function.sriov.physfn if function.sriov else None
    return physfn is None or host.read_line(f"{DEVICES}/{physfn}/sriov_drivers_autoprobe") != "0"


def _entry(function: Function, driver: str, names: Names) -> Entry:
    identity = identity_of(function)
    if identity is None:
        raise HostError(f"{function.address} does not tell its vendor and device; it cannot be recognized at boot")
    return Entry(function.address, driver, identity, names)


def _live_steps(host: Host, request: Request, moves: t.Sequence[Move]) -> list[Step]:
    steps: list[Step] = []
    mover = Mover(host)
    needed = [move for move in moves if move.needed]
    if request.bound:
        for driver in sorted({move.to for move in needed if move.to is not None}):
            if not host.is_dir(f"/sys/bus/pci/drivers/{driver}"):
                steps.append(
                    LoadDriver(
                        f"load {driver}",
                        f"module {driver}",
                        "not loaded",
                        "loaded",
                        driver=driver,
                        module=driver,
                        require_cdev=request.require_cdev,
                        host=host,
                    )
                )
    for move in needed:
        function = move.function
        had = function.driver or "no driver"
        before = _state_text(function.driver, function.driver_override)
        if move.to is not None:
            steps.append(
                Bind(
                    f"bind {move.address} to {move.to} (it has {had}; {move.reason})",
                    move.address,
                    before,
                    _state_text(move.to, move.to) + f"reason: {move.reason}\n",
                    address=move.address,
                    driver=move.to,
                    from_driver=function.driver,
                    from_override=function.driver_override,
                    require_cdev=request.require_cdev,
                    timeout=request.timeout,
                    host=host,
                    mover=mover,
                    late_group=function.iommu_group is None,
                    moving=frozenset(one.address for one in moves),
                )
            )
        else:
            back = " or ".join(move.expected) if move.expected else "none, no driver of the host claims it"
            steps.append(
                Release(
                    f"give {move.address} back to the host (it has {had}; {move.reason})",
                    move.address,
                    before,
                    _state_text(back, None) + f"reason: {move.reason}\n",
                    address=move.address,
                    from_driver=function.driver,
                    from_override=function.driver_override,
                    modalias=function.modalias,
                    expected=move.expected,
                    timeout=request.timeout,
                    host=host,
                    mover=mover,
                )
            )
    return steps


def _state_text(driver: str | None, override: str | None) -> str:
    return f"driver: {driver or 'none'}\ndriver_override: {override or 'none'}\n"


class _Claims:
    """Which drivers of the host claim a function, for each installed kernel."""

    def __init__(self, host: Host, situation: Situation) -> None:
        self._host = host
        self._situation = situation
        self._indexes: dict[str, ModuleIndex] = {}
        self._builtin: dict[str, list[tuple[str, str]]] = {}

    def __call__(self, release: str, address: str) -> bool:
        """Whether a kernel has a driver of the host for a function; when in doubt, it has."""
        index = self._indexes.setdefault(release, ModuleIndex(self._host, release))
        function = self._situation.functions.get(address)
        if function is None or function.modalias is None or not index.dependencies:
            return True
        return bool(self.modules(index, function))

    def modules(self, index: ModuleIndex, function: Function) -> list[str]:
        """Names of the modules, built-in ones included, without the vfio drivers."""
        if function.modalias is None:
            return []
        names = index.drivers_for(function.modalias)
        names += [name for name in self._builtin_for(index, function.modalias) if name not in names]
        return [name for name in names if not is_vfio_driver(name)]

    def _builtin_for(self, index: ModuleIndex, modalias: str) -> list[str]:
        """Built-in drivers: modules.alias has no line for them, modules.builtin.modinfo has ("NAME.alias=pci:…")."""
        if index.kernel is None:
            return []
        if index.kernel not in self._builtin:
            text = self._host.read_text(f"{modules_directory(self._host, index.kernel)}/modules.builtin.modinfo") or ""
            self._builtin[index.kernel] = re.findall(r"(?:^|\0)([\w-]+)\.alias=(pci:[^\0]*)", text)
        vendor = modalias[:13]
        found = []
        for name, pattern in self._builtin[index.kernel]:
            if pattern.startswith((vendor, "pci:v*")) and name not in found:
                words = "".join(".*" if part == "*" else re.escape(part) for part in re.split(r"(\*)", pattern))
                if re.fullmatch(words, modalias):
                    found.append(name)
        return found


# -- afterwards ----------------------------------------------------------------------------------------------------


def verify(host: Host, request: Request, binding: Binding, functions: t.Mapping[str, Function]) -> None:
    """Look at the host again: every function must have what was promised.

    A driver of the host that does not take its device back is none of our doing: that is a warning.

    Args:
        host: the host.
        request: what was wanted.
        binding: what was decided and done.
        functions: all functions by address, as they are now.

    Raises:
        HostError: one does not; ``details`` has ``unkept``.
    """
    unkept = []
    promise: Promise | None = None
    for move in binding.moves:
        function = functions.get(move.address)
        if function is None:
            unkept.append(f"{move.address} is no longer there")
        elif move.to is None:
            if function.driver is not None and is_vfio_driver(function.driver):
                unkept.append(f"{move.address} is still bound to {function.driver}")
            elif move.expected and function.driver is None and move.needed:
                binding.warnings.append(
                    f"{move.address} has no driver now: {' or '.join(move.expected)} of the host claims it and did not "
                    "take it (blacklisted, or its probe failed)."
                )
        elif function.driver != move.to:
            unkept.append(f"{move.address} is bound to {function.driver or 'no driver'}, not to {move.to}")
        elif request.require_cdev:
            node = cdev_of(host, move.address)
            if node is None or not cdev_ready(host, move.address):
                unkept.append(f"{move.address} is bound to {move.to}, but has no usable character device")
                continue
            promise = promise or read_promise(host)
            wrong = check_promise(host, promise, move.address, node)
            if wrong is not None:
                unkept.append(f"{move.address} is bound to {move.to}, but {wrong}")
    if read_entries(host) != binding.kept:
        unkept.append("the list of devices kept across reboots is not as it was written")
    if unkept:
        raise HostError("The host is not as promised: " + "; ".join(unkept) + ".", unkept=unkept)


def describe(
    host: Host, binding: Binding, uses: t.Mapping[str, list[Use]], functions: t.Mapping[str, Function] | None = None
) -> list[dict[str, t.Any]]:
    """The functions of a call for the module's result.

    Args:
        host: the host.
        binding: the decided call.
        uses: uses by address.
        functions: all functions by address, as they are now; None: show what is to come (check mode).
    """
    result = []
    planned = functions is None
    for move in binding.moves:
        function = (functions or {}).get(move.address, move.function)
        device = function.to_dict()
        device["remembered"] = binding.names[move.address].to_dict() if move.to is not None else None
        device["in_use"] = [use.to_dict() for use in uses.get(move.address, [])]
        if planned and move.needed:
            expected = move.expected[0] if move.expected else None
            device.update(driver=move.to or expected, driver_override=move.to, vfio_device=None)
        # Only a name that leads to this very device will do on a command line.
        link = cdev_link(move.address)
        device["vfio_link"] = link if device["vfio_device"] and host.realpath(link) == device["vfio_device"] else None
        device["from_driver"] = move.function.driver
        device["to_driver"] = device["driver"]
        device["reason"] = move.reason
        device["persistent"] = move.address in binding.kept
        result.append(device)
    return result
