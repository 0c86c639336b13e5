# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Kernel arguments: which ones the IOMMU needs, and what it takes to have them in every boot entry."""

from __future__ import annotations

import dataclasses
import struct
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._boot_entries import (
    ZIPL_CONF,
    EntryFiles,
    booted_by_systemd,
    entry_files,
    has_systemd_boot,
    unified_images,
)
from ansible_collections.iommufd.host.plugins.module_utils._boot_loader import DEFAULTS, BootLoader, Grub
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import GROUPS
from ansible_collections.iommufd.host.plugins.module_utils._kernel import arguments, command_line, read_config
from ansible_collections.iommufd.host.plugins.module_utils._kernel_line import assignments, ineffective
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan

_TABLES = "/sys/firmware/acpi/tables"

# By the table that announces it. SMMUs older than version 3 are in the same table.
_DRIVERS = {
    "VT-d": ("INTEL_IOMMU",),
    "AMD-Vi": ("AMD_IOMMU",),
    "SMMU": ("ARM_SMMU", "ARM_SMMU_V3"),
    "SMMUv3": ("ARM_SMMU_V3",),
    "virtio-iommu": ("VIRTIO_IOMMU",),
}

# Arguments that switch an IOMMU off. Nothing later on the line switches AMD's or (with iommu=off) anybody's on again:
# drivers/iommu/amd/init.c and arch/x86/kernel/pci-dma.c only ever set the flag.
_OFF_FOR_GOOD = {"amd_iommu=off": ("AMD-Vi",), "iommu=off": ("VT-d", "AMD-Vi")}

# -- the IOMMU -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Iommu:
    """The machine's IOMMU as its firmware announces it.

    Attributes:
        kind: "VT-d", "AMD-Vi", "SMMUv3", "SMMU", "virtio-iommu"; None where the firmware announces none.
        on: whether the running kernel uses it (devices are in groups).
        needs: kernel arguments that it takes to be on.
        reason: why these, or why none.
        driver: whether the kernel has a driver for it, as far as its configuration is known.
    """

    kind: str | None
    on: bool
    needs: list[str]
    reason: str
    driver: bool = True

    def to_dict(self) -> dict[str, t.Any]:
        return {"kind": self.kind, "on": self.on, "arguments": list(self.needs), "reason": self.reason}


def read_iommu(host: Host, foreign: t.Mapping[str, t.Sequence[str]]) -> Iommu:
    """What the machine's IOMMU needs. Decided on the firmware's tables, not on the make of the cpu.

    Args:
        host: the host.
        foreign: kernel arguments that others have configured, in order, by where they stand.
    """
    kind = _kind(host)
    on = bool(host.listdir(GROUPS))
    if kind is None:
        return Iommu(None, on, [], "the firmware announces no IOMMU (no ACPI table DMAR, IVRS, VIOT, no SMMU in IORT)")
    config = read_config(host)
    if config is not None and not any(config.has(option) for option in _DRIVERS[kind]):
        names = " or ".join(f"CONFIG_{option}" for option in _DRIVERS[kind])
        return Iommu(kind, on, [], f"this kernel was built without {names} ({config.source})", driver=False)
    if kind != "VT-d":
        return Iommu(kind, on, [], f"{kind} is on without any argument")
    for place, line in foreign.items():
        if [argument for argument in line if argument.startswith("intel_iommu=")][-1:] == ["intel_iommu=off"]:
            why = f"intel_iommu=off is configured ({place}), and the last one counts"
            return Iommu(kind, on, ["intel_iommu=on"], why)
    default = config is not None and any(
        # The second is Debian's: on for all but integrated graphics.
        config.get(f"INTEL_IOMMU_DEFAULT_ON{suffix}") == "y"
        for suffix in ("", "_INTGPU_OFF")
    )
    if default and config is not None:
        return Iommu(kind, on, [], f"VT-d is on without any argument in this kernel ({config.source})")
    return Iommu(kind, on, ["intel_iommu=on"], "this kernel leaves VT-d off unless it is told otherwise")


def _kind(host: Host) -> str | None:
    tables = host.listdir(_TABLES)
    for table, kind in (("DMAR", "VT-d"), ("IVRS", "AMD-Vi"), ("VIOT", "virtio-iommu")):
        if table in tables:
            return kind
    if "IORT" in tables:
        return _smmu(host.read_bytes(f"{_TABLES}/IORT") or b"")
    # Machines without ACPI describe it in a device tree; there it is on, or it is not there.
    units = host.listdir("/sys/class/iommu")
    return "SMMU" if units else None


def _smmu(table: bytes) -> str | None:
    """The kind of SMMU in an IORT table, which Arm machines without one have, too.

    "IO Remapping Table" (Arm DEN 0049): number and offset of the nodes at 36; each node has its type (3: SMMU,
    4: SMMUv3) and length in its first three bytes.
    """
    if len(table) < 44:
        return "SMMU"  # it cannot be read; say what is likely
    count, offset = struct.unpack_from("<II", table, 36)
    types = []
    for _node in range(min(count, 4096)):
        if offset + 3 > len(table):
            break
        kind, length = struct.unpack_from("<BH", table, offset)
        types.append(kind)
        offset += max(length, 3)
    return "SMMUv3" if 4 in types else "SMMU" if 3 in types else None


def passthrough_argument(iommu: Iommu) -> str:
    """The argument that lets the host's own devices go past the IOMMU."""
    return "iommu=pt" if iommu.kind in ("VT-d", "AMD-Vi") else "iommu.passthrough=1"


def refuse_off(iommu: Iommu, foreign: t.Mapping[str, t.Sequence[str]]) -> None:
    """Refuse arguments of others that switch the IOMMU off in a way that nothing behind them can change.

    Raises:
        Refusal: names the argument and where it stands.
    """
    for place, line in foreign.items():
        for argument in line:
            if iommu.kind in _OFF_FOR_GOOD.get(argument, ()):
                raise Refusal(
                    f"{argument} is among the configured kernel arguments ({place}) and switches the IOMMU off, "
                    "whatever else is given. It is not ours to remove: take it out there and run again."
                )


# -- boot loaders ----------------------------------------------------------------------------------------------------


def find_boot_loader(host: Host) -> BootLoader:
    """The host's boot loader.

    Raises:
        HostError: it is one that is not known here; names it where it can be told, and what to do there.
    """
    if host.exists("/run/ostree-booted"):
        raise HostError(
            "The kernel arguments of an image-based host (ostree) belong to its deployments and are set with "
            "`rpm-ostree kargs --append-if-missing=…`, not here."
        )
    if host.which("zipl") is not None and (host.exists(ZIPL_CONF) or entry_files(host)):
        return EntryFiles(host, "zipl")
    configs = [(path, command) for path, command in _GRUBS if host.exists(path) and host.which(f"{command}-mkconfig")]
    if configs and host.exists(DEFAULTS) and not booted_by_systemd(host):
        config, command = configs[0]
        settings = dict(assignments(host.read_text(DEFAULTS) or ""))
        if settings.get("GRUB_ENABLE_BLSCFG") == "true" and entry_files(host):
            return EntryFiles(host, "grub")
        script = host.read_text(host.which(f"{command}-mkconfig") or "") or ""
        return Grub(host, config, command, "default/grub.d" in script)
    if has_systemd_boot(host) and (entry_files(host) or unified_images(host)):
        return EntryFiles(host, "systemd-boot")
    found = "one that is not known"
    if host.exists("/etc/default/u-boot") or host.is_dir("/boot/extlinux"):
        found = "U-Boot or extlinux"
    elif any(host.exists(path) for path, _command in _GRUBS):
        found = f"GRUB without {DEFAULTS} or grub-mkconfig"
    raise HostError(
        f"Kernel arguments can be set with GRUB, systemd-boot and zipl, and this host's boot loader is {found}."
    )


# What grub-mkconfig generates, with the prefix of the programs' names.
_GRUBS = (("/boot/grub/grub.cfg", "grub"), ("/boot/grub2/grub.cfg", "grub2"))


def booted(host: Host) -> list[str]:
    """The arguments that the running kernel was given."""
    return arguments(command_line(host))


# -- decisions -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Decided:
    """What is to be configured and why.

    Attributes:
        args: the arguments that are ours to configure.
        gone: arguments that must not be left in the entries unless others have configured them.
        configured: the arguments that a normal entry gets; None where the boot loader is not known.
        reasons: why the host must be rebooted; empty: it need not be.
    """

    plan: Plan
    iommu: Iommu
    booted: list[str]
    loader: BootLoader | None = None
    args: list[str] = dataclasses.field(default_factory=list)
    gone: list[str] = dataclasses.field(default_factory=list)
    configured: str | None = None
    reasons: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


def decide_present(host: Host, args: t.Sequence[str], auto: bool, passthrough: bool = False) -> Decided:
    """What it takes for the IOMMU to be on and for further arguments to be given.

    Args:
        host: the host.
        args: further arguments.
        auto: whether the IOMMU's own arguments are wanted.
        passthrough: whether the host's own devices shall go past the IOMMU.

    Raises:
        HostError: the machine has no IOMMU, or arguments are needed and the boot loader is not known.
        Refusal: others switch the IOMMU off.
    """
    line = booted(host)
    loader, unknown = _try_boot_loader(host)
    foreign = loader.foreign() if loader is not None else {"/proc/cmdline": line}
    iommu = read_iommu(host, foreign)
    wanted: list[str] = []
    if auto:
        if iommu.kind is None and not iommu.on:
            raise HostError(
                f"This machine has no IOMMU that the kernel could use: {iommu.reason}. Turn VT-d or AMD-Vi on in the "
                "firmware's setup; a virtual machine needs one from its hypervisor."
            )
        if not iommu.driver and not iommu.on:
            raise HostError(f"{iommu.kind} cannot be turned on: {iommu.reason}. No kernel argument changes that.")
        refuse_off(iommu, foreign)
        wanted.extend(iommu.needs)
    if passthrough:
        wanted.append(passthrough_argument(iommu))
    wanted.extend(argument for argument in args if argument not in wanted)
    ours = [argument for argument in wanted if any(ineffective(one, [argument]) for one in foreign.values())]
    decided = Decided(Plan(), iommu, line, loader, ours)
    if loader is not None:
        decided.plan = loader.plan(ours)
        decided.configured = " ".join(loader.line(ours))
    elif ours and unknown is not None:
        raise HostError(f"{unknown.message} To be added by hand: {' '.join(ours)}.")
    decided.reasons = [
        f"{argument} is not in effect in the running kernel yet" for argument in ineffective(line, wanted)
    ]
    decided.reasons.extend(
        f"the running kernel was started with {argument}, which is not configured any more"
        for argument in (loader.owned() if loader is not None else [])
        if argument not in wanted and argument in line and not _given(foreign, argument)
    )
    if auto and not iommu.on and not decided.reasons:
        off = [argument for argument in line if argument in ("intel_iommu=off", "amd_iommu=off", "iommu=off")]
        if off:
            decided.reasons.append(f"the running kernel was started with {off[-1]}, which is not configured")
        else:
            decided.warnings.append(
                f"No device is in an IOMMU group although {iommu.kind} is there and should be on; the kernel log has "
                "the reason (dmesg | grep -i -e dmar -e iommu)."
            )
    return decided


def decide_absent(host: Host, args: t.Sequence[str]) -> Decided:
    """What it takes to undo :func:`decide_present`.

    Args:
        host: the host.
        args: arguments that an interrupted run may have left in the boot entries.
    """
    line = booted(host)
    loader, _unknown = _try_boot_loader(host)
    foreign = loader.foreign() if loader is not None else {"/proc/cmdline": line}
    iommu = read_iommu(host, foreign)
    decided = Decided(Plan(), iommu, line, loader)
    if loader is not None:
        owned = loader.owned()
        decided.gone = list(dict.fromkeys([*owned, *args, "intel_iommu=on"]))
        decided.plan = loader.plan([], decided.gone)
        decided.configured = " ".join(loader.line([]))
        decided.reasons = [
            f"{argument} is still in effect in the running kernel"
            for argument in decided.gone
            if argument in line and not _given(foreign, argument)
        ]
    return decided


def _given(foreign: t.Mapping[str, t.Sequence[str]], argument: str) -> bool:
    return any(argument in line for line in foreign.values())


def _try_boot_loader(host: Host) -> tuple[BootLoader | None, HostError | None]:
    try:
        return find_boot_loader(host), None
    except HostError as error:
        return None, error
