# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""From what physical functions are to what they shall be: refusals, plan, steps, and the look afterwards.

The plan covers all PFs of a call before any is touched, and is refused as a whole when a part of it is unsafe or
impossible.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _persistence
from ansible_collections.iommufd.host.plugins.module_utils._child import Child, Stuck
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import is_vfio_driver
from ansible_collections.iommufd.host.plugins.module_utils._kernel import ModuleIndex
from ansible_collections.iommufd.host.plugins.module_utils._pci import (
    DEVICES,
    Function,
    read_function,
    read_functions,
    vf_addresses,
)
from ansible_collections.iommufd.host.plugins.module_utils._plan import (
    Command,
    Plan,
    Step,
    WriteAttribute,
    run,
    wait_until,
)
from ansible_collections.iommufd.host.plugins.module_utils._refusals import Refusals, refuse_locked
from ansible_collections.iommufd.host.plugins.module_utils._sriov import (
    Param,
    VfSettings,
    Wanted,
    given_mac,
    interface_of,
    parse_request,
    read_params,
    read_settings,
)
from ansible_collections.iommufd.host.plugins.module_utils._sriov_persistence import KeptPf, plan_kept, read_kept
from ansible_collections.iommufd.host.plugins.module_utils._usage import Use, all_uses
from ansible_collections.iommufd.host.plugins.module_utils._vfio import PCI_PROBE, driver_of, last_words, override_of

# How long VFs may take to be in sysfs once the write that makes them has returned. The kernel makes them before that.
_APPEAR_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user wants.

    Attributes:
        pfs: the option as given.
        present: False: no VFs.
        persistent: whether that also holds after a reboot.
        force: remove VFs that are bound for guests or carry traffic of the host; never those that a guest has open.
        timeout: seconds for the PF's driver to make or remove its VFs.
        pending: VFs that are bound for guests are only about to be given back (check mode of a whole play).
    """

    pfs: t.Sequence[t.Mapping[str, t.Any]]
    present: bool = True
    persistent: bool = True
    force: bool = False
    timeout: float = 60.0
    pending: bool = False


@dataclasses.dataclass
class Physical:
    """A PF as it is.

    Attributes:
        function: itself.
        vfs: its VFs, in their order.
        nic: its interface; None where it has none.
        autoprobe: whether drivers of the host take VFs that appear.
        settings: what its driver reports about the VFs, by index; None where it cannot be asked.
        params: its devlink parameters, value by cmode by name.
    """

    function: Function
    vfs: list[Function]
    nic: str | None
    autoprobe: bool
    settings: dict[int, VfSettings] | None
    params: dict[str, dict[str, str]]

    @property
    def address(self) -> str:
        return self.function.address

    @property
    def count(self) -> int:
        return (self.function.sriov.num_vfs if self.function.sriov else None) or 0


@dataclasses.dataclass
class Decision:
    """A decided call: what each PF is and shall be, the plan, and what is kept across reboots afterwards."""

    pfs: list[tuple[Physical, Wanted]]
    plan: Plan
    kept: dict[str, KeptPf]
    warnings: list[str] = dataclasses.field(default_factory=list)


def read_physical(host: Host, function: Function, with_params: bool = False) -> Physical:
    """A PF with its VFs."""
    addresses = function.sriov.vfs if function.sriov else []
    nic = interface_of(host, function.address)
    settings: dict[int, VfSettings] | None = {}
    if nic is not None and addresses:
        settings = read_settings(host, nic)
    return Physical(
        function,
        [one for one in (read_function(host, address) for address in addresses) if one is not None],
        nic,
        host.read_line(f"{DEVICES}/{function.address}/sriov_drivers_autoprobe") != "0",
        settings,
        read_params(host, function.address) if with_params else {},
    )


# -- decisions -----------------------------------------------------------------------------------------------------


def decide(host: Host, request: Request) -> Decision:
    """Turn a request into a plan.

    Raises:
        OptionError: an option is not acceptable.
        Refusal: the call is unsafe or impossible; all reasons at once, as data in ``refusals``.
    """
    functions = {function.address: function for function in read_functions(host)}
    kept = read_kept(host)
    bound = _persistence.read_entries(host)
    wanted = parse_request(host, functions, request.pfs, request.present, kept)
    gone = [one.address for one in wanted if one.address not in functions]
    pfs = [
        (read_physical(host, functions[one.address], bool(one.params or _kept_params(kept, one.address))), one)
        for one in wanted
        if one.address in functions
    ]
    _refuse(host, request, functions, pfs)
    child = Child(lambda row: _write(row["path"], row["value"]))
    steps: list[Step] = []
    claims = ModuleIndex(host)
    for physical, one in pfs:
        steps += _steps(host, request, physical, one, kept.get(one.address), bound, claims, child)
    after = {address: one for address, one in kept.items() if address not in gone}
    for physical, one in pfs:
        after.pop(one.address, None)
        if one.count and request.persistent:
            after[one.address] = _keep(physical, one, kept.get(one.address))
    steps += plan_kept(host, after)
    return Decision(pfs, Plan(steps), after)


def _kept_params(kept: t.Mapping[str, KeptPf], address: str) -> dict[str, Param]:
    return kept[address].params if address in kept else {}


def _keep(physical: Physical, wanted: Wanted, kept: KeptPf | None) -> KeptPf:
    function = physical.function
    if function.vendor_id is None or function.device_id is None:
        raise HostError(f"{function.address} does not tell its vendor and device; it cannot be recognized at boot")
    params = {}
    for name, param in wanted.params.items():
        old = kept.params.get(name) if kept is not None else None
        before = old.before if old is not None else physical.params.get(name, {}).get(param.cmode)
        params[name] = dataclasses.replace(param, before=before)
    identity = f"{function.vendor_id[2:]}:{function.device_id[2:]}"
    return KeptPf(wanted.address, identity, wanted.count, wanted.autoprobe, wanted.settings, params)


def _refuse(
    host: Host, request: Request, functions: t.Mapping[str, Function], pfs: t.Sequence[tuple[Physical, Wanted]]
) -> None:
    refusals = Refusals()
    uses: dict[str, list[Use]] | None = None
    helps = False
    for physical, wanted in pfs:
        if refuse_locked(refusals, physical.function):
            continue
        _refuse_driver(refusals, physical, wanted)
        for name, param in wanted.params.items():
            if param.cmode not in physical.params.get(name, {}):
                known = ", ".join(sorted(physical.params)) or "none"
                refusals.add(
                    f"{physical.address} has no devlink parameter {name} of mode {param.cmode}; it has: {known}",
                    physical.address,
                )
        if wanted.settings and physical.nic is None and physical.function.driver is not None:
            refusals.add(
                f"{physical.address} has no network interface of its own (driver {physical.function.driver}), and "
                "vf_settings are made through it",
                physical.address,
            )
        if not physical.count or physical.count == wanted.count:
            continue
        if uses is None:
            uses = all_uses(host, list(functions.values()))
        helps = _refuse_removal(refusals, request, physical, wanted, uses) or helps
    hint = " With force=true VFs are removed although they are bound for guests or in use by the host."
    refusals.speak(hint if helps and not request.force else "")


def _refuse_driver(refusals: Refusals, physical: Physical, wanted: Wanted) -> None:
    driver = physical.function.driver
    if physical.count == wanted.count and not wanted.count:
        return
    if driver is None:
        refusals.add(
            f"{physical.address} has no driver, and VFs are made by the driver of their PF. Bind the host's driver",
            physical.address,
        )
    elif is_vfio_driver(driver):
        refusals.add(
            f"{physical.address} is on {driver}, for a guest as a whole. Whoever has a PF has power over its VFs; "
            "that is why vfio-pci makes VFs only with its parameter enable_sriov, which this module does not use. Give "
            "the PF back to its driver of the host first (vfio_bind with state unbound)",
            physical.address,
        )


def _refuse_removal(
    refusals: Refusals, request: Request, physical: Physical, wanted: Wanted, uses: t.Mapping[str, list[Use]]
) -> bool:
    """Add what speaks against removing a PF's VFs; returns whether force would help."""
    hard: list[Use] = []
    soft: list[Use] = []
    for vf in physical.vfs:
        found = uses.get(vf.address, [])
        hard += [use for use in found if use.vital or use.kind in ("guest", "open")]
        soft += [use for use in found if use not in hard]
        if not found and not request.pending and vf.driver is not None and is_vfio_driver(vf.driver):
            soft.append(Use("vfio", vf.driver, f"{vf.address} is kept for guests on {vf.driver}"))
    counting = hard if request.force else hard + soft
    if counting:
        words = "; ".join(use.detail for use in counting)
        listed = ", ".join(vf.address for vf in physical.vfs)
        change = f"changed from {physical.count} to {wanted.count}" if wanted.count else "set to 0"
        refusals.add(
            f"the number of VFs of {physical.address} cannot be {change}: that removes all it has ({listed}), and some "
            f"are in use: {words}",
            physical.address,
            counting,
        )
    return bool(counting) and not hard


def _steps(
    host: Host,
    request: Request,
    physical: Physical,
    wanted: Wanted,
    kept: KeptPf | None,
    bound: t.Mapping[str, _persistence.Entry],
    claims: ModuleIndex,
    child: Child,
) -> list[Step]:
    steps = _param_steps(physical, wanted, kept)
    number = Number(host, physical.address, child, request.timeout)
    fresh = physical.count != wanted.count
    if fresh and physical.count:
        listed = ", ".join(vf.address for vf in physical.vfs)
        steps.append(
            RemoveVfs(
                f"remove the {physical.count} VFs of {physical.address} ({listed})",
                _text(physical),
                f"autoprobe: {_on(physical.autoprobe)}\nno VFs\n",
                number,
                physical,
            )
        )
    if fresh and wanted.count:
        predicted = vf_addresses(physical.function, wanted.count)
        before = f"autoprobe: {_on(physical.autoprobe)}\nno VFs\n"
        steps.append(
            MakeVfs(
                f"make {wanted.count} VFs of {physical.address}" + (f" ({', '.join(predicted)})" if predicted else ""),
                before,
                f"autoprobe: off\n{wanted.count} VFs\n" + "".join(f"{address}\n" for address in predicted),
                number,
                wanted.count,
                physical.autoprobe,
            )
        )
    steps += _setting_steps(host, physical, wanted, fresh)
    # Without VFs a PF that had some goes back to the kernel's default.
    autoprobe = wanted.autoprobe if wanted.count else physical.autoprobe or physical.count > 0 or kept is not None
    if autoprobe != (physical.autoprobe and not (fresh and wanted.count)):
        steps.append(
            WriteAttribute(
                f"turn autoprobe of {physical.address} {_on(autoprobe)}",
                physical.address,
                f"autoprobe: {_on(not autoprobe)}\n",
                f"autoprobe: {_on(autoprobe)}\n",
                path=host.path(f"{DEVICES}/{physical.address}/sriov_drivers_autoprobe"),
                value=_digit(autoprobe),
                undo_value=_digit(physical.autoprobe),
            )
        )
    if wanted.count and autoprobe:
        waiting = vf_addresses(physical.function, wanted.count) if fresh else _driverless(physical, claims)
        waiting = [address for address in waiting if address not in bound]
        if waiting:
            steps.append(
                ProbeVfs(
                    f"let drivers of the host take {', '.join(waiting)}",
                    "driver: none\n",
                    "driver: what the host has for them\n",
                    number,
                    bound,
                )
            )
    return steps


def _driverless(physical: Physical, claims: ModuleIndex) -> list[str]:
    """VFs that a driver of the host would take, as a run that was killed leaves them."""
    return [
        vf.address
        for vf in physical.vfs
        if vf.driver is None and vf.driver_override is None and vf.modalias and claims.drivers_for(vf.modalias)
    ]


def _on(value: bool) -> str:
    return "on" if value else "off"


def _digit(value: bool) -> str:
    return "1" if value else "0"


def _text(physical: Physical) -> str:
    rows = [f"{vf.address} driver: {vf.driver or 'none'}" for vf in physical.vfs]
    return f"autoprobe: {_on(physical.autoprobe)}\n{physical.count} VFs\n" + "".join(f"{row}\n" for row in rows)


def _param_steps(physical: Physical, wanted: Wanted, kept: KeptPf | None) -> list[Step]:
    """Parameters that are wanted, and those no longer wanted that have a value to go back to."""
    targets = dict(wanted.params)
    for name, param in (kept.params if kept is not None else {}).items():
        if name not in targets and param.before is not None:
            targets[name] = dataclasses.replace(param, value=param.before)
    steps: list[Step] = []
    for name, param in sorted(targets.items()):
        now = physical.params.get(name, {}).get(param.cmode)
        if now is None or now == param.value:
            continue
        steps.append(
            Command(
                f"set the devlink parameter {name} of {physical.address} to {param.value} ({param.cmode})",
                f"{physical.address} devlink {name}",
                f"{now} ({param.cmode})",
                f"{param.value} ({param.cmode})",
                argv=_devlink(physical.address, name, param.value, param.cmode),
                undo_argv=_devlink(physical.address, name, now, param.cmode),
            )
        )
    return steps


def _devlink(address: str, name: str, value: str, cmode: str) -> list[str]:
    return ["devlink", "dev", "param", "set", f"pci/{address}", "name", name, "value", value, "cmode", cmode]


def _setting_steps(host: Host, physical: Physical, wanted: Wanted, fresh: bool) -> list[Step]:
    now = {} if fresh else physical.settings or {}
    tell: dict[int, VfSettings] = {}
    for index, told in wanted.settings.items():
        needed = told if fresh else told.differing(now.get(index, VfSettings()))
        if needed.given:
            tell[index] = needed
    if not tell or physical.nic is None:
        return []
    had = {index: now.get(index, VfSettings()).only(needed) for index, needed in tell.items()}
    return [TellVfs(host, physical.address, physical.nic, tell, {} if fresh else had)]


# -- steps ---------------------------------------------------------------------------------------------------------


def _write(path: str, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)


@dataclasses.dataclass
class Number:
    """The number of a PF's VFs, and its autoprobe.

    Attributes:
        host: the live host (or a tree, in tests).
        address: the PF.
        child: does the writes, which end only when the drivers of all VFs have let go.
        timeout: seconds for that.
    """

    host: Host
    address: str
    child: Child
    timeout: float

    def __post_init__(self) -> None:
        self.stuck: Stuck | None = None

    def path(self, name: str) -> str:
        return self.host.path(f"{DEVICES}/{self.address}/{name}")

    def vfs(self) -> list[str]:
        function = read_function(self.host, self.address)
        return function.sriov.vfs if function is not None and function.sriov is not None else []

    def autoprobe(self, value: bool) -> None:
        if self.stuck is not None:
            raise self.stuck
        _write(self.path("sriov_drivers_autoprobe"), _digit(value))

    def set(self, count: int) -> None:
        """Write it, and wait until exactly that many VFs are in sysfs."""
        if self.stuck is not None:
            raise self.stuck  # the kernel holds the PF's lock: whoever writes to it would be stuck, too
        driver = driver_of(self.host, self.address) or "its driver"
        path = self.path("sriov_numvfs")
        try:
            self.child.do({"path": path, "value": str(count)}, None, self.timeout, self._stuck_words)
        except Stuck as error:
            self.stuck = error
            raise
        except HostError as error:
            why = error.message
            # drivers/pci/pci-sysfs.c: ENOENT for a driver without sriov_configure.
            if why.endswith(os.strerror(errno.ENOENT)):
                why = f"{driver} has no support for it"
            raise HostError(
                f"{driver} of {self.address} did not set the number of VFs to {count}: {why}"
                + last_words(self.host, self.address)
            ) from error
        if not wait_until(lambda: len(self.vfs()) == count, _APPEAR_SECONDS):
            raise HostError(
                f"{self.address} has {len(self.vfs())} VFs and not {count}, {_APPEAR_SECONDS:g} s after their number "
                "was set" + last_words(self.host, self.address)
            )

    def _stuck_words(self, child: int) -> str:
        return (
            f"{self.address} did not change the number of its VFs within {self.timeout:g} s: the driver of one does "
            f"not let go of it. The request still waits in the kernel, as process {child}"
        )


class TellVfs(Step):
    """Tell a PF's driver what its VFs may do, and see whether it reports the same.

    Args:
        host: the host.
        address: the PF.
        nic: its interface.
        settings: what is to be told, by index.
        had: what is told to take it back; empty for new VFs, which go as a whole.
    """

    def __init__(
        self, host: Host, address: str, nic: str, settings: dict[int, VfSettings], had: dict[int, VfSettings]
    ) -> None:
        rows = {index: " ".join(one.words()) for index, one in settings.items()}
        summary = f"tell {nic} about VFs of {address}: " + "; ".join(f"VF {index} {row}" for index, row in rows.items())
        before = "".join(f"VF {index} {' '.join(one.words())}\n" for index, one in had.items())
        after = "".join(f"VF {index} {row}\n" for index, row in rows.items())
        super().__init__(summary, f"VF settings of {address}", before, after)
        self.host = host
        self.nic = nic
        self.settings = settings
        self.had = had

    def apply(self) -> None:
        tell(self.nic, self.settings)
        driver = self.host.link_name(f"/sys/class/net/{self.nic}/device/driver") or "its driver"
        unlike = differences(read_settings(self.host, self.nic) or {}, self.settings)
        if unlike:
            raise HostError(f"{driver} took it without an error, but {'; '.join(unlike)}")

    def undo(self) -> None:
        # Not what it still has: a driver that refused a setting refuses the way back as well.
        tell(self.nic, _still_to_tell(self.host, self.nic, self.had))


def _still_to_tell(host: Host, nic: str, settings: t.Mapping[int, VfSettings]) -> dict[int, VfSettings]:
    """Of settings, what the driver does not report already."""
    now = read_settings(host, nic) or {}
    return {index: one.differing(now.get(index, VfSettings())) for index, one in settings.items()}


def tell(nic: str, settings: t.Mapping[int, VfSettings]) -> None:
    """Tell the driver behind an interface, with one `ip` for all VFs.

    Raises:
        HostError: the driver refused; names the VF.
    """
    rows = [(index, " ".join(one.words())) for index, one in settings.items() if one.given]
    lines = [f"link set dev {nic} vf {index} {words}\n" for index, words in rows]
    if not lines:
        return
    try:
        run(["ip", "-batch", "-"], stdin="".join(lines))
    except HostError as error:
        where = re.search(r"Command failed -:(\d+)", error.message)
        if where is None or not 0 < int(where[1]) <= len(rows):
            raise
        index, words = rows[int(where[1]) - 1]
        why = error.message.partition(": ")[2].replace(where[0], "").strip(" /")
        raise HostError(f"`ip link set dev {nic} vf {index} {words}` failed: {why}") from error


def differences(reported: t.Mapping[int, VfSettings], wanted: t.Mapping[int, VfSettings]) -> list[str]:
    """Where what a driver reports is not what it was told, in words."""
    found = []
    for index, told in wanted.items():
        now = reported.get(index, VfSettings())
        for name, value in told.given.items():
            if getattr(now, name) is None:
                found.append(f"{name} of VF {index} is not reported")
            elif getattr(now, name) != value:
                found.append(f"{name} of VF {index} is {getattr(now, name)}, not {value}")
    return found


class RemoveVfs(Step):
    """Remove all VFs of a PF; taken back, they are there again with settings and drivers as they had."""

    def __init__(self, summary: str, before: str, after: str, number: Number, physical: Physical) -> None:
        super().__init__(summary, number.address, before, after)
        self.number = number
        self.physical = physical

    def apply(self) -> None:
        self.number.set(0)

    def undo(self) -> None:
        number, physical = self.number, self.physical
        number.autoprobe(False)
        number.set(physical.count)
        if physical.nic is not None and physical.settings:
            tell(physical.nic, _still_to_tell(number.host, physical.nic, physical.settings))
        number.autoprobe(physical.autoprobe)
        for vf in physical.vfs:
            device = f"{DEVICES}/{vf.address}"
            if vf.driver_override is not None:
                _write(number.host.path(f"{device}/driver_override"), vf.driver_override)
            if vf.driver is not None and driver_of(number.host, vf.address) is None:
                _probe(number, vf.address)


class MakeVfs(Step):
    """Make VFs where there are none, with autoprobe off; ``autoprobe`` is what it was."""

    def __init__(self, summary: str, before: str, after: str, number: Number, count: int, autoprobe: bool) -> None:
        super().__init__(summary, number.address, before, after)
        self.number = number
        self.count = count
        self.autoprobe = autoprobe

    def apply(self) -> None:
        self.number.autoprobe(False)
        self.number.set(self.count)

    def undo(self) -> None:
        self.number.set(0)
        self.number.autoprobe(self.autoprobe)


class ProbeVfs(Step):
    """Let drivers of the host take those VFs that have none, but not those in ``leave``, which are for guests."""

    def __init__(self, summary: str, before: str, after: str, number: Number, leave: t.Collection[str]) -> None:
        super().__init__(summary, f"VFs of {number.address}", before, after)
        self.number = number
        self.leave = leave

    def apply(self) -> None:
        host = self.number.host
        loaded: set[str] = set()
        for address in self.number.vfs():
            function = read_function(host, address)
            if function is None or function.driver is not None or address in self.leave:
                continue
            if function.modalias and function.modalias not in loaded:
                # As udev does it, the blacklist heeded (-b); it may be busy doing so.
                host.ask(["modprobe", "-q", "-b", "--", function.modalias], timeout=60.0)
                loaded.add(function.modalias)
            if override_of(host, address) is None:
                _probe(self.number, address)


def _probe(number: Number, address: str) -> None:
    try:
        _write(number.host.path(PCI_PROBE), address)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a driver was found and its probe failed: the VF stays without
            raise


# -- afterwards ----------------------------------------------------------------------------------------------------


def verify(host: Host, decision: Decision) -> list[Physical]:
    """Look at the host again: every PF must have what was promised.

    A driver of the host that does not take its VF is none of our doing: that is a warning.

    Returns:
        The PFs as they are.

    Raises:
        HostError: one has not; ``details`` has ``unkept``.
    """
    unkept: list[str] = []
    found: list[Physical] = []
    for _before, wanted in decision.pfs:
        function = read_function(host, wanted.address)
        if function is None:
            unkept.append(f"{wanted.address} is no longer there")
            continue
        now = read_physical(host, function, bool(wanted.params))
        found.append(now)
        if now.count != wanted.count:
            unkept.append(f"{wanted.address} has {now.count} VFs, not {wanted.count}")
            continue
        if wanted.count and now.autoprobe != wanted.autoprobe:
            unkept.append(f"autoprobe of {wanted.address} is {_on(now.autoprobe)}")
        for index, told in wanted.settings.items():
            reported = (now.settings or {}).get(index, VfSettings())
            for name, value in told.differing(reported).given.items():
                is_now = getattr(reported, name)
                what = "does not report it" if is_now is None else f"reports {is_now}"
                unkept.append(
                    f"{name} of VF {index} of {wanted.address} shall be {value}, and {function.driver} {what}"
                )
        for name, param in wanted.params.items():
            value = now.params.get(name, {}).get(param.cmode)
            if value != param.value:
                unkept.append(f"the devlink parameter {name} of {wanted.address} is {value}, not {param.value}")
        without = [vf.address for vf in now.vfs if vf.driver is None and vf.driver_override is None]
        if wanted.count and wanted.autoprobe and without:
            decision.warnings.append(
                f"No driver of the host took {', '.join(without)} (there is none, it is blacklisted, or its probe "
                "failed)."
            )
    if read_kept(host) != decision.kept:
        unkept.append("the list of PFs whose VFs are made at boot is not as it was written")
    if unkept:
        raise HostError("The host is not as promised: " + "; ".join(unkept) + ".", unkept=unkept)
    return found


def describe(decision: Decision, pfs: t.Sequence[Physical]) -> list[dict[str, t.Any]]:
    """The PFs of a call, with their VFs, for the module's result.

    Args:
        decision: the decided call.
        pfs: the PFs as they are now.
    """
    result = []
    for physical in pfs:
        function = physical.function
        reported = physical.settings or {}
        rows = [
            {
                "index": index,
                "address": vf.address,
                "driver": vf.driver,
                "iommu_group": vf.iommu_group,
                "numa_node": vf.numa_node,
                **dataclasses.asdict(reported.get(index, VfSettings())),
                "mac": given_mac(reported.get(index)),
            }
            for index, vf in enumerate(physical.vfs)
        ]
        result.append(_described(decision, physical, function, physical.autoprobe, rows))
    return result


def describe_planned(decision: Decision) -> list[dict[str, t.Any]]:
    """The same as it would be; what only the kernel can say (driver, group) of VFs to come is null."""
    result = []
    for physical, wanted in decision.pfs:
        fresh = physical.count != wanted.count
        if not fresh:
            vfs: list[tuple[str | None, Function | None]] = [(vf.address, vf) for vf in physical.vfs]
        else:
            predicted: list[str | None] = [*vf_addresses(physical.function, wanted.count)]
            vfs = [(address, None) for address in predicted or [None] * wanted.count]
        rows = []
        for index, (address, vf) in enumerate(vfs):
            now = VfSettings() if fresh else (physical.settings or {}).get(index, VfSettings())
            planned = {**dataclasses.asdict(now), **wanted.settings.get(index, VfSettings()).given}
            rows.append(
                {
                    "index": index,
                    "address": address,
                    "driver": vf.driver if vf else None,
                    "iommu_group": vf.iommu_group if vf else None,
                    "numa_node": vf.numa_node if vf else physical.function.numa_node,
                    **planned,
                    "mac": given_mac(VfSettings(**planned)),
                }
            )
        autoprobe = wanted.autoprobe if wanted.count else physical.autoprobe or physical.count > 0
        result.append(_described(decision, physical, physical.function, autoprobe, rows))
    return result


def _described(
    decision: Decision, physical: Physical, function: Function, autoprobe: bool, rows: list[dict[str, t.Any]]
) -> dict[str, t.Any]:
    return {
        "address": function.address,
        "nic": physical.nic,
        "driver": function.driver,
        "numa_node": function.numa_node,
        "total_vfs": function.sriov.total_vfs if function.sriov else None,
        "num_vfs": len(rows),
        "autoprobe": autoprobe,
        "persistent": function.address in decision.kept,
        "vfs": rows,
    }
