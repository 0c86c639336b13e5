# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Boot entries in files of their own: the Boot Loader Specification (GRUB of Fedora and RHEL, systemd-boot, zipl), and
zipl's configuration.

Each entry's file is edited, minimally, and so is what the entries of new kernels are made from:
``/etc/kernel/cmdline`` (kernel-install) and, with GRUB, ``/etc/default/grub``. ``grubby`` is not used for it: it
replaces the value of an argument that others have set, and merges several of one name ("console=…"), so that what was
there is lost (function update_args in its source); what is written here ``grubby --info=ALL`` shows like its own. Nor
is ``kernel-install``: it writes entries anew, without what somebody added to one of them by hand, and builds an
initramfs for each.

Which arguments are ours cannot be seen in such files, so they are recorded in :data:`RECORD`: an argument a line, and
behind it the files that had it before, where it stays. The record is written before the first file and goes after the
last.
"""

from __future__ import annotations

import contextlib
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._boot_loader import (
    DEFAULTS,
    BootLoader,
    owned_by_defaults,
    read_exact,
    with_own_lines,
    write,
)
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._files import own_header
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._kernel import release
from ansible_collections.iommufd.host.plugins.module_utils._kernel_line import (
    COMMAND_LINE,
    ENTRY,
    ZIPL,
    Form,
    ineffective,
)
from ansible_collections.iommufd.host.plugins.module_utils._plan import Action, Plan, RemoveFile, run

RECORD = "/etc/iommufd-host/kernel-arguments"
CMDLINE = "/etc/kernel/cmdline"
ZIPL_CONF = "/etc/zipl.conf"

# Where boot loaders look for loader/entries: the ESP and the extended boot partition, at their usual mount points.
_BOOTS = ("/boot", "/efi", "/boot/efi")

# What zipl installs; the boot record knows its blocks.
_BOOTMAP = "/boot/bootmap"


def entry_files(host: Host) -> list[str]:
    """The boot loader specification's entries of this system, wherever they are."""
    found: dict[str, str] = {}
    machine = host.read_line("/etc/machine-id")
    for boot in _BOOTS:
        directory = f"{boot}/loader/entries"
        for name in host.listdir(directory):
            path = f"{directory}/{name}"
            fields = _fields(host.read_text(path) or "") if name.endswith(".conf") else {}
            if "linux" not in fields or fields.get("machine-id", machine) != machine:
                continue  # of another program or another system
            found.setdefault(host.realpath(path) or path, path)  # a partition may be mounted twice
    return list(found.values())


def unified_images(host: Host) -> list[str]:
    """Unified kernel images, which carry their command line (and often a signature over it) within."""
    found: list[str] = []
    for boot in _BOOTS:
        directory = f"{boot}/EFI/Linux"
        found.extend(f"{directory}/{name}" for name in host.listdir(directory) if name.lower().endswith(".efi"))
    return found


def _fields(text: str) -> dict[str, str]:
    pairs = (line.split(None, 1) for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


class EntryFiles(BootLoader):
    """Boot entries in files of their own.

    Args:
        host: the host.
        name: "grub" (with entries of the Boot Loader Specification), "systemd-boot" or "zipl".
    """

    def __init__(self, host: Host, name: str) -> None:
        super().__init__(host)
        self.name = name
        self._forms: dict[str, Form] = dict.fromkeys(entry_files(host), ENTRY)
        if name == "zipl" and not self._forms:
            self._forms[ZIPL_CONF] = ZIPL
        elif host.exists(CMDLINE):
            self._forms[CMDLINE] = COMMAND_LINE
        self._texts = {path: read_exact(host, path) or "" for path in self._forms}
        self._record = read_record(host)

    def foreign(self) -> dict[str, list[str]]:
        lines: dict[str, list[str]] = {}
        for path, form in self._forms.items():
            for number, line in enumerate(form.lines(form.take_out(self._texts[path], self._ours_in(path)))):
                lines[path if number == 0 else f"{path} ({number + 1})"] = self._expanded(line)
        return lines

    def line(self, ours: t.Sequence[str]) -> list[str]:
        lines = self.foreign()
        running = release(self.host) or ""
        first = next((line for path, line in lines.items() if running in path), next(iter(lines.values()), []))
        return [*first, *ineffective(first, ours)]

    def owned(self) -> list[str]:
        return list(self._record)

    def plan(self, ours: t.Sequence[str], gone: t.Collection[str] = ()) -> Plan:
        plan = Plan()
        self._refuse(ours)
        edits = []
        for path, form in self._forms.items():
            before = self._texts[path]
            after = form.add(form.take_out(before, [one for one in self._ours_in(path) if one not in ours]), ours)
            if after != before:
                edits.append(write(path, before, after, form is ENTRY))
        if self.name == "grub":
            before = read_exact(self.host, DEFAULTS) or ""
            lines = [f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {" ".join(ours)}"'] if ours else []
            if before and owned_by_defaults(before) != list(ours):
                edits.append(write(DEFAULTS, before, with_own_lines(before, lines)))
        wanted = {argument: self._record.get(argument, self._had(argument)) for argument in ours}
        both = {**self._record, **wanted}
        text = self.host.read_text(RECORD)
        if edits and text != format_record(both):
            plan.add(write(RECORD, text, format_record(both)))
            text = format_record(both)
        zipl = self.name == "zipl" and (bool(edits) or self._bootmap_lags())
        if zipl and edits:
            plan.add(Action("have zipl write the old entries again where a later step fails", take_back=_zipl))
        plan.add(*edits)
        if zipl:
            plan.add(Action("have zipl install the boot entries", do=_zipl))
        if not wanted and text is not None:
            plan.add(RemoveFile(f"remove {RECORD}", RECORD, text, "", path=RECORD, prune=["/etc/iommufd-host"]))
        elif wanted and text != format_record(wanted):
            plan.add(write(RECORD, text, format_record(wanted)))
        return plan

    def _refuse(self, ours: t.Sequence[str]) -> None:
        images = unified_images(self.host)
        if ours and images:
            raise HostError(
                f"This host has unified kernel images ({', '.join(images)}), whose command line is part of the image. "
                f"Add {' '.join(ours)} to {CMDLINE} and have them built again (kernel-install add-all)."
            )
        text = self._texts.get(ZIPL_CONF)
        if ours and text is not None:
            images = [line for line in text.splitlines() if line.split("=")[0].strip() == "image"]
            if len(images) != len(ZIPL.lines(text)):
                raise HostError(
                    f"A section of {ZIPL_CONF} has an image and no parameters on a line of their own, so that not "
                    f"every entry can be given {' '.join(ours)}. Add such a line and run again."
                )

    def _ours_in(self, path: str) -> list[str]:
        """The arguments in a file that are ours, or have come from us with a new kernel."""
        return [argument for argument, theirs in self._record.items() if path not in theirs]

    def _had(self, argument: str) -> list[str]:
        """Files in whose every line others have an argument in effect."""
        found = []
        for path, form in self._forms.items():
            lines = form.lines(self._texts[path])
            lacking = [line for line in lines if ineffective(line, [argument])]
            if lines and not lacking:
                found.append(path)
            elif not form.joined and len(lacking) < len(lines):
                raise HostError(
                    f"Some sections of {path} have {argument} and some have not, so that it could not be told later "
                    "which are ours. Add it to the others by hand, or take it out, and run again."
                )
        return found

    def _expanded(self, line: t.Sequence[str]) -> list[str]:
        """A line with GRUB's variable kernelopts, in which RHEL 8 kept them, replaced by what it holds."""
        words: list[str] = []
        for word in line:
            if word != "$kernelopts":
                words.append(word)
                continue
            for one in (self.host.read_text("/boot/grub2/grubenv") or "").splitlines():
                if one.startswith("kernelopts="):
                    words.extend(one.partition("=")[2].split())
        return words

    def _bootmap_lags(self) -> bool:
        """Whether a run was interrupted before zipl had run."""
        bootmap = self.host.stat(_BOOTMAP)
        times = [status.st_mtime for status in map(self.host.stat, [*self._forms, RECORD]) if status is not None]
        return bool(self._record) and bootmap is not None and max(times, default=0.0) > bootmap.st_mtime


def _zipl() -> None:
    run(["zipl"], 300)


# -- the record ------------------------------------------------------------------------------------------------------


def read_record(host: Host) -> dict[str, list[str]]:
    """Our arguments, each with the files that had it before us."""
    record: dict[str, list[str]] = {}
    for line in (host.read_text(RECORD) or "").splitlines():
        words = line.split()
        if words and not words[0].startswith("#"):
            record[words[0]] = words[1:]
    return record


def format_record(record: t.Mapping[str, t.Sequence[str]]) -> str:
    """The record as a file."""
    lines = [own_header(), "# Kernel arguments that were added; behind each the files that had it before.\n"]
    lines.extend(" ".join([argument, *theirs]) + "\n" for argument, theirs in record.items())
    return "".join(lines)


# -- which one -------------------------------------------------------------------------------------------------------

# "systemd-boot 257…" in UTF-16; set by the boot loader at each boot (https://systemd.io/BOOT_LOADER_INTERFACE).
_LOADER_INFO = "/sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"


def booted_by_systemd(host: Host) -> bool:
    """Whether systemd-boot started the running kernel."""
    with contextlib.suppress(UnicodeDecodeError):
        return (host.read_bytes(_LOADER_INFO) or b"")[4:].decode("utf-16-le").startswith("systemd-boot")
    return False


def has_systemd_boot(host: Host) -> bool:
    """Whether systemd-boot is installed."""
    return any(host.exists(f"{boot}/loader/loader.conf") or host.is_dir(f"{boot}/EFI/systemd") for boot in _BOOTS)
