# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Kernel arguments: which ones the IOMMU needs, and how they get into every boot entry.

How a host keeps its kernel arguments is a matter of its boot loader, so each way is a :class:`BootLoader`. There is
one so far: GRUB as Debian and its derivatives set it up, with drop-in files.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._files import (
    OWN_MARK,
    FileState,
    capture,
    own_header,
    write_atomic,
)
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import GROUPS
from ansible_collections.iommufd.host.plugins.module_utils._kernel import arguments, command_line, read_config
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan, RemoveFile, Step, WriteFile, run

_TABLES = "/sys/firmware/acpi/tables"

# What a boot loader's configuration, a shell file, and the kernel's parser take without quoting.
_ARGUMENT = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(=[A-Za-z0-9_.,:/@+%=-]*)?$")

# Arguments that switch an IOMMU off, by the table that announces it. Nothing later on the line switches AMD's or
# (with iommu=off) anybody's on again: drivers/iommu/amd/init.c and arch/x86/kernel/pci-dma.c only ever set the flag.
_OFF_FOR_GOOD = {"amd_iommu=off": ("AMD-Vi",), "iommu=off": ("VT-d", "AMD-Vi")}


def check_arguments(option: str, values: t.Sequence[str]) -> None:
    """Refuse what would not arrive at the kernel as one argument.

    Raises:
        OptionError: names the option with the index.
    """
    for number, value in enumerate(values):
        if not _ARGUMENT.match(value):
            raise OptionError(
                f"{option}[{number}]", value, "one kernel argument, such as intel_iommu=on, without spaces or quotes"
            )


# -- the IOMMU -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Iommu:
    """The machine's IOMMU as its firmware announces it.

    Attributes:
        kind: "VT-d", "AMD-Vi", "SMMU", "virtio-iommu"; None where the firmware announces none.
        on: whether the running kernel uses it (devices are in groups).
        needs: kernel arguments that it takes to be on.
        reason: why these, or why none.
    """

    kind: str | None
    on: bool
    needs: list[str]
    reason: str

    def to_dict(self) -> dict[str, t.Any]:
        return {"kind": self.kind, "on": self.on, "arguments": list(self.needs), "reason": self.reason}


def read_iommu(host: Host, foreign: t.Sequence[str] = ()) -> Iommu:
    """What the machine's IOMMU needs. Decided on the firmware's tables, not on the make of the cpu.

    Args:
        host: the host.
        foreign: kernel arguments that others have configured, in order.
    """
    kind = _kind(host)
    on = bool(host.listdir(GROUPS))
    if kind is None:
        return Iommu(None, on, [], "the firmware announces no IOMMU (no ACPI table DMAR, IVRS, IORT or VIOT)")
    if kind != "VT-d":
        return Iommu(kind, on, [], f"{kind} is on without any argument")
    config = read_config(host)
    default = config is not None and any(
        # The second is Debian's: on for all but integrated graphics.
        config.get(f"INTEL_IOMMU_DEFAULT_ON{suffix}") == "y"
        for suffix in ("", "_INTGPU_OFF")
    )
    turned_off = [argument for argument in foreign if argument.startswith("intel_iommu=")][-1:] == ["intel_iommu=off"]
    if turned_off:
        return Iommu(kind, on, ["intel_iommu=on"], "intel_iommu=off is configured, and the last one counts")
    if default and config is not None:
        return Iommu(kind, on, [], f"VT-d is on without any argument in this kernel ({config.source})")
    return Iommu(kind, on, ["intel_iommu=on"], "this kernel leaves VT-d off unless it is told otherwise")


def _kind(host: Host) -> str | None:
    tables = host.listdir(_TABLES)
    for table, kind in (("DMAR", "VT-d"), ("IVRS", "AMD-Vi"), ("VIOT", "virtio-iommu"), ("IORT", "SMMU")):
        if table in tables:
            return kind
    # Machines without ACPI describe it in a device tree; there it is on, or it is not there.
    units = host.listdir("/sys/class/iommu")
    return "SMMU" if units else None


def refuse_off(iommu: Iommu, foreign: t.Sequence[str]) -> None:
    """Refuse arguments of others that switch the IOMMU off in a way that nothing behind them can change.

    Raises:
        Refusal: names the argument.
    """
    for argument in foreign:
        if iommu.kind in _OFF_FOR_GOOD.get(argument, ()):
            raise Refusal(
                f"{argument} is among the configured kernel arguments and switches the IOMMU off, whatever else is "
                "given. It is not ours to remove: take it out of the boot loader's configuration and run again."
            )


# -- boot loaders ----------------------------------------------------------------------------------------------------


class BootLoader:
    """How a host keeps its kernel arguments."""

    name = ""

    def __init__(self, host: Host) -> None:
        self.host = host

    def foreign(self) -> list[str]:
        """The arguments that others have configured, in the order in which the kernel gets them."""
        raise NotImplementedError

    def line(self, ours: t.Sequence[str]) -> list[str]:
        """The arguments that a normal boot would get with these of ours (root= and the like left out)."""
        raise NotImplementedError

    def owned(self) -> list[str]:
        """The arguments that we have configured."""
        raise NotImplementedError

    def plan(self, ours: t.Sequence[str], gone: t.Collection[str] = ()) -> Plan:
        """Steps after which every entry has these arguments of ours and no other of ours.

        Args:
            ours: arguments, in order; empty: nothing of us stays.
            gone: arguments that must not be in the entries unless others have configured them.
        """
        raise NotImplementedError


class Grub(BootLoader):
    """GRUB with ``/etc/default/grub.d`` (Debian and derivatives): a drop-in file and ``update-grub``.

    The drop-in appends to GRUB_CMDLINE_LINUX, which every entry gets, recovery entries included. Where others give the
    same argument with another value in GRUB_CMDLINE_LINUX_DEFAULT, which comes behind it on the line of a normal
    entry, ours is appended there too: the last one counts for the kernel. Nothing of others is taken out.
    """

    name = "grub"
    drop_in = "/etc/default/grub.d/60-iommufd-host.cfg"
    defaults = "/etc/default/grub"
    config = "/boot/grub/grub.cfg"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._linux, self._default = self._evaluate()

    def foreign(self) -> list[str]:
        return [*self._linux, *self._default]

    def line(self, ours: t.Sequence[str]) -> list[str]:
        return [*self._linux, *ours, *self._default, *self._again(ours)]

    def owned(self) -> list[str]:
        for name, value in _assignments(self.host.read_text(self.drop_in) or ""):
            if name == "GRUB_CMDLINE_LINUX":
                return [word for word in arguments(value) if not word.startswith("$")]
        return []

    def plan(self, ours: t.Sequence[str], gone: t.Collection[str] = ()) -> Plan:
        plan = Plan()
        before = self.host.read_text(self.drop_in)
        if before is not None and OWN_MARK not in before:
            raise HostError(f"{self.drop_in} is not ours (it does not bear our mark). Move it away and run again.")
        content = self._content(ours) if ours else None
        if content is None and before is not None:
            plan.add(RemoveFile(f"remove {self.drop_in}", self.drop_in, before, "", path=self.drop_in))
        elif content is not None and content != before:
            plan.add(
                WriteFile(
                    f"write {self.drop_in}",
                    self.drop_in,
                    before or "",
                    content,
                    path=self.drop_in,
                    content=content.encode(),
                )
            )
        if plan.changed or not self._entries_follow(ours, gone):
            plan.add(
                _WriteEntries(
                    f"write the boot entries ({self.config})",
                    "kernel command line of the boot entries",
                    " ".join(self.line(self.owned())) + "\n",
                    " ".join(self.line(ours)) + "\n",
                    path=self.config,
                )
            )
        return plan

    def _content(self, ours: t.Sequence[str]) -> str:
        text = own_header() + f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {" ".join(ours)}"\n'
        again = self._again(ours)
        if again:
            text += (
                "# Others give another value behind it; the last one counts.\n"
                f'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT {" ".join(again)}"\n'
            )
        return text

    def _again(self, ours: t.Sequence[str]) -> list[str]:
        keys = {_key(argument) for argument in self._default}
        return [argument for argument in ours if _key(argument) in keys and argument not in self._default]

    def _entries_follow(self, ours: t.Sequence[str], gone: t.Collection[str]) -> bool:
        """Whether the generated entries are what the configuration says, as far as it concerns us."""
        drop_in, generated = self.host.stat(self.drop_in), self.host.stat(self.config)
        if ours and drop_in is not None and generated is not None and drop_in.st_mtime > generated.st_mtime:
            return False  # a run was interrupted between the two
        others = self.foreign()
        unwanted = [argument for argument in gone if argument not in others and argument not in ours]
        return all(
            not ineffective(entry, ours) and not any(argument in entry for argument in unwanted)
            for entry in self.entries()
        )

    def entries(self) -> list[list[str]]:
        """The kernel arguments of each entry that GRUB generated for this system."""
        text = self.host.read_text(self.config) or ""
        # Entries that a person wrote (40_custom) or that boot another system get no arguments from the configuration.
        section = re.search(
            r"^### BEGIN \S*/10_linux ###$(.*?)^### END \S*/10_linux ###$", text, re.DOTALL | re.MULTILINE
        )
        lines = re.findall(r"^\s*linux(?:16|efi)?\s+(\S+)\s+(.*)$", section[1] if section else "", re.MULTILINE)
        return [arguments(line) for _image, line in lines]

    def _evaluate(self) -> tuple[list[str], list[str]]:
        """GRUB_CMDLINE_LINUX and GRUB_CMDLINE_LINUX_DEFAULT as all files but ours leave them.

        They are shell files, and grub-mkconfig runs them; so does this, where there is a live host to ask.
        """
        files = [self.defaults]
        directory = "/etc/default/grub.d"
        names = [name for name in self.host.listdir(directory) if name.endswith(".cfg") and not name.startswith(".")]
        files.extend(f"{directory}/{name}" for name in names if f"{directory}/{name}" != self.drop_in)
        files = [path for path in files if self.host.exists(path)]
        script = (
            'for file in "$@"; do . "$file" >/dev/null; done\n'
            'printf "%s\\n" "$GRUB_CMDLINE_LINUX" "$GRUB_CMDLINE_LINUX_DEFAULT"'
        )
        output = self.host.ask(["sh", "-c", script, "sh", *files])
        if output is not None and output.ok:
            lines = output.stdout.split("\n")
            return arguments(lines[0]), arguments(lines[1] if len(lines) > 1 else "")
        values: dict[str, str] = {}
        for path in files:
            for name, value in _assignments(self.host.read_text(path) or ""):
                values[name] = re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], ""), value)
        return arguments(values.get("GRUB_CMDLINE_LINUX")), arguments(values.get("GRUB_CMDLINE_LINUX_DEFAULT"))


@dataclasses.dataclass
class _WriteEntries(Step):
    """Have grub-mkconfig write the boot entries, which replace the old ones in one step.

    ``update-grub`` writes into the file in place, and a host whose power goes then has no boot entries at all.
    """

    path: str = ""

    def __post_init__(self) -> None:
        self._previous: FileState | None = None

    def apply(self) -> None:
        previous = capture(self.path)
        if previous is None:
            raise HostError(f"{self.path} is gone")
        text = run(["grub-mkconfig"], 600)
        if "### BEGIN" not in text:
            raise HostError("grub-mkconfig wrote no boot entries")
        run(["grub-script-check"], 60, stdin=text)
        self._previous = previous
        write_atomic(self.path, dataclasses.replace(previous, content=text.encode("utf-8", "surrogateescape")))

    def undo(self) -> None:
        if self._previous is not None:
            write_atomic(self.path, self._previous)


def find_boot_loader(host: Host) -> BootLoader:
    """The host's boot loader.

    Raises:
        HostError: it is one that is not known here; names it where it can be told.
    """
    script = host.which("grub-mkconfig")
    text = host.read_text(script) if script is not None else None
    if host.exists(Grub.config) and host.exists(Grub.defaults) and "default/grub.d" in (text or ""):
        return Grub(host)
    found = "one that is not known"
    if host.which("grubby") is not None:
        found = "GRUB with boot loader specification entries (grubby)"
    elif any(host.exists(f"{path}/loader/loader.conf") for path in ("/boot", "/efi", "/boot/efi")):
        found = "systemd-boot"
    elif host.exists("/etc/zipl.conf"):
        found = "zipl"
    elif host.exists("/etc/default/u-boot") or host.is_dir("/boot/extlinux"):
        found = "U-Boot or extlinux"
    elif host.exists(Grub.config) or host.exists("/boot/grub2/grub.cfg"):
        found = "GRUB without /etc/default/grub.d"
    raise HostError(
        "Kernel arguments can only be set with GRUB as Debian sets it up so far, and this host's boot loader is "
        f"{found}."
    )


# -- lines -----------------------------------------------------------------------------------------------------------


def _key(argument: str) -> str:
    """The name of an argument; the kernel takes "-" and "_" in it for the same."""
    return argument.partition("=")[0].replace("-", "_")


def ineffective(line: t.Sequence[str], wanted: t.Sequence[str]) -> list[str]:
    """Those of some arguments that a command line lacks, or that another value behind them overrides."""
    last = {_key(argument): argument for argument in line}
    # Of an argument that is wanted with several values ("console=…" twice) the last one must be the last.
    wanted_last = {_key(argument): argument for argument in wanted}
    return [
        argument
        for argument in wanted
        if argument not in line or (wanted_last[_key(argument)] == argument and last[_key(argument)] != argument)
    ]


def booted(host: Host) -> list[str]:
    """The arguments that the running kernel was given."""
    return arguments(command_line(host))


def _assignments(text: str) -> list[tuple[str, str]]:
    """Plain assignments of a shell file, in order, with quotes taken off and expansions as written."""
    found = []
    for line in text.splitlines():
        match = re.match(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)$", line)
        if match is None:
            continue
        try:
            words = shlex.split(match[2], comments=True)
        except ValueError:
            words = [match[2].strip("\"' ")]
        found.append((match[1], words[0] if words else ""))
    return found


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


def decide_present(host: Host, args: t.Sequence[str], auto: bool) -> Decided:
    """What it takes for the IOMMU to be on and for further arguments to be given.

    Args:
        host: the host.
        args: further arguments.
        auto: whether the IOMMU's own arguments are wanted.

    Raises:
        HostError: the machine has no IOMMU, or arguments are needed and the boot loader is not known.
        Refusal: others switch the IOMMU off.
    """
    line = booted(host)
    loader, unknown = _try_boot_loader(host)
    foreign = loader.foreign() if loader is not None else line
    iommu = read_iommu(host, foreign)
    wanted: list[str] = []
    if auto:
        if iommu.kind is None and not iommu.on:
            raise HostError(
                f"This machine has no IOMMU that the kernel could use: {iommu.reason}. Turn VT-d or AMD-Vi on in the "
                "firmware's setup; a virtual machine needs one from its hypervisor."
            )
        refuse_off(iommu, foreign)
        wanted.extend(iommu.needs)
    wanted.extend(argument for argument in args if argument not in wanted)
    ours = [argument for argument in wanted if ineffective(foreign, [argument])]
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
        if argument not in wanted and argument in line and argument not in foreign
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
    foreign = loader.foreign() if loader is not None else line
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
            if argument in line and argument not in foreign
        ]
    return decided


def _try_boot_loader(host: Host) -> tuple[BootLoader | None, HostError | None]:
    try:
        return find_boot_loader(host), None
    except HostError as error:
        return None, error
