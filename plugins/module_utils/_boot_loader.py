# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""How a host keeps its kernel arguments: GRUB's generated entries here, entries in files of their own in
``_boot_entries``. :func:`~._boot.find_boot_loader` tells which one a host has."""

from __future__ import annotations

import dataclasses
import os
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _grub_config
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._files import (
    OWN_MARK,
    FileState,
    capture,
    own_header,
    write_atomic,
)
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._kernel import arguments
from ansible_collections.iommufd.host.plugins.module_utils._kernel_line import (
    append_lines,
    assignments,
    ineffective,
    key,
    remove_line,
)
from ansible_collections.iommufd.host.plugins.module_utils._own_files import read_own
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan, RemoveFile, Step, WriteFile, run

DEFAULTS = "/etc/default/grub"


class BootLoader:
    """How a host keeps its kernel arguments."""

    name = ""

    def __init__(self, host: Host) -> None:
        self.host = host

    def foreign(self) -> dict[str, list[str]]:
        """The arguments that others have configured, in the order in which the kernel gets them, by where they stand.

        Where each boot entry has a line of its own, each is here.
        """
        raise NotImplementedError

    def line(self, ours: t.Sequence[str]) -> list[str]:
        """The arguments that a normal boot would get with these of ours."""
        raise NotImplementedError

    def owned(self) -> list[str]:
        """The arguments that we have configured."""
        raise NotImplementedError

    def plan(self, ours: t.Sequence[str], gone: t.Collection[str] = ()) -> Plan:
        """Steps after which every entry has these arguments of ours and no other of ours.

        Args:
            ours: arguments, in order; empty: nothing of us stays.
            gone: arguments that must not be in generated entries unless others have configured them.
        """
        raise NotImplementedError


class Grub(BootLoader):
    """GRUB with entries that ``grub-mkconfig`` generates.

    Where it reads ``/etc/default/grub.d`` (Debian and derivatives) ours is a drop-in file, else marked lines at the
    end of ``/etc/default/grub`` (SUSE, Arch). Either appends to GRUB_CMDLINE_LINUX, which every entry gets, recovery
    entries included. Where others give the same argument with another value in GRUB_CMDLINE_LINUX_DEFAULT, which comes
    behind it on the line of a normal entry, ours is appended there too: the last one counts for the kernel. Nothing of
    others is taken out.

    Args:
        host: the host.
        config: the generated file.
        command: "grub", or "grub2" where the distribution's programs are called so.
        drop_ins: whether ``grub-mkconfig`` reads ``/etc/default/grub.d``.
    """

    name = "grub"
    drop_in = "/etc/default/grub.d/60-iommufd-host.cfg"

    def __init__(
        self, host: Host, config: str = "/boot/grub/grub.cfg", command: str = "grub", drop_ins: bool = True
    ) -> None:
        super().__init__(host)
        self.config = config
        self.command = command
        self.path = self.drop_in if drop_ins else DEFAULTS
        self._linux, self._default = self._evaluate()

    def foreign(self) -> dict[str, list[str]]:
        return {DEFAULTS: [*self._linux, *self._default]}

    def line(self, ours: t.Sequence[str]) -> list[str]:
        return [*self._linux, *ours, *self._default, *self._again(ours)]

    def owned(self) -> list[str]:
        return owned_by_defaults(self.host.read_text(self.path) or "")

    def plan(self, ours: t.Sequence[str], gone: t.Collection[str] = ()) -> Plan:
        plan = Plan()
        before = read_exact(self.host, self.path)
        if self.path == self.drop_in:
            # Refuses also what is no file: a link to /dev/null.
            if ours or before is not None:
                read_own(self.host, self.path)
            content = own_header() + "".join(f"{line}\n" for line in self._lines(ours)) if ours else None
        else:
            content = with_own_lines(before or "", self._lines(ours))
        if content is None and before is not None:
            plan.add(RemoveFile(f"remove {self.path}", self.path, before, "", path=self.path))
        elif content is not None and content != before:
            plan.add(write(self.path, before, content))
        if plan.changed or not self._entries_follow(ours, gone):
            plan.add(
                _WriteEntries(
                    f"write the boot entries ({self.config})",
                    "kernel command line of the boot entries",
                    " ".join(self.line(self.owned())) + "\n",
                    " ".join(self.line(ours)) + "\n",
                    path=self.config,
                    command=self.command,
                    host=self.host,
                )
            )
        return plan

    def _lines(self, ours: t.Sequence[str]) -> list[str]:
        lines = [f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {" ".join(ours)}"'] if ours else []
        again = self._again(ours)
        if again:
            # Others give another value behind it; the last one counts.
            lines.append(f'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT {" ".join(again)}"')
        return lines

    def _again(self, ours: t.Sequence[str]) -> list[str]:
        keys = {key(argument) for argument in self._default}
        return [argument for argument in ours if key(argument) in keys and argument not in self._default]

    def _entries_follow(self, ours: t.Sequence[str], gone: t.Collection[str]) -> bool:
        """Whether the generated entries are what the configuration says, as far as it concerns us."""
        written, generated = self.host.stat(self.path), self.host.stat(self.config)
        if ours and written is not None and generated is not None and written.st_mtime > generated.st_mtime:
            return False  # a run was interrupted between the two
        others = [argument for line in self.foreign().values() for argument in line]
        unwanted = [argument for argument in gone if argument not in others and argument not in ours]
        return all(
            not ineffective(entry, ours) and not any(argument in entry for argument in unwanted)
            for entry in self.entries()
        )

    def entries(self) -> list[list[str]]:
        """The kernel arguments of each entry that GRUB generated for this system."""
        text = self.host.read_text(self.config) or ""
        # Entries that a person wrote (40_custom) or that boot another system get no arguments from the configuration.
        sections = re.findall(
            r"^### BEGIN \S*/10_linux ###$(.*?)^### END \S*/10_linux ###$", text, re.DOTALL | re.MULTILINE
        )
        lines = re.findall(r"^\s*linux(?:16|efi)?\s+(\S+)\s+(.*)$", "".join(sections), re.MULTILINE)
        return [arguments(line) for _image, line in lines]

    def _evaluate(self) -> tuple[list[str], list[str]]:
        """GRUB_CMDLINE_LINUX and GRUB_CMDLINE_LINUX_DEFAULT as everything but ours leaves them.

        They are shell files, and grub-mkconfig runs them; so does this, where there is a live host to ask.
        """
        files = [DEFAULTS]
        if self.path == self.drop_in:
            directory = "/etc/default/grub.d"
            names = [name for name in self.host.listdir(directory) if name.endswith(".cfg") and name[0] != "."]
            files.extend(f"{directory}/{name}" for name in names if f"{directory}/{name}" != self.drop_in)
        files = [path for path in files if self.host.exists(path)]
        texts = [with_own_lines(read_exact(self.host, path) or "", []) for path in files]
        script = (
            'for text in "$@"; do eval "$text" >/dev/null; done\n'
            'printf "%s\\n" "$GRUB_CMDLINE_LINUX" "$GRUB_CMDLINE_LINUX_DEFAULT"'
        )
        output = self.host.ask(["sh", "-c", script, "sh", *texts])
        if output is not None and output.ok:
            lines = output.stdout.split("\n")
            return arguments(lines[0]), arguments(lines[1] if len(lines) > 1 else "")
        values: dict[str, str] = {}
        for text in texts:
            for name, value in assignments(text):
                values[name] = re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], ""), value)
        return arguments(values.get("GRUB_CMDLINE_LINUX")), arguments(values.get("GRUB_CMDLINE_LINUX_DEFAULT"))


@dataclasses.dataclass
class _WriteEntries(Step):
    """Have grub-mkconfig write the boot entries, which replace the old ones in one step.

    ``update-grub`` writes into the file in place, and a host whose power goes then has no boot entries at all.
    """

    path: str = ""
    command: str = "grub"
    host: Host = dataclasses.field(default_factory=Host)

    def __post_init__(self) -> None:
        self._previous: FileState | None = None

    def apply(self) -> None:
        previous = capture(self.path)
        if previous is None:
            raise HostError(f"{self.path} is gone")
        text = self._entries(previous.content.decode("utf-8", "surrogateescape"))
        run([f"{self.command}-script-check"], 60, stdin=text)
        self._previous = previous
        state = dataclasses.replace(previous, content=text.encode("utf-8", "surrogateescape"))
        write_atomic(self.path, state, for_boot_loader=True)

    def _entries(self, before: str) -> str:
        """Generate them in the language of those before: the host's, or English where a service wrote them last."""
        environment = read_exact(self.host, f"{os.path.dirname(self.path)}/grubenv") or ""
        own = _grub_config.locale(self.host)
        fitting = ""
        lost: list[str] = []
        for locale in (own, {}) if own else ({},):
            text = run([f"{self.command}-mkconfig"], 600, locale=locale, exact=True)
            if "### BEGIN" not in text:
                raise HostError(f"{self.command}-mkconfig wrote no boot entries")
            if _grub_config.names(before) <= _grub_config.names(text):
                return text
            lost = _grub_config.lost(before, text, environment)
            if not lost:
                fitting = fitting or text
        if fitting:
            return fitting
        name = lost[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        raise HostError(
            f"{self.command}-mkconfig has no entry '{name}' any more, which this host starts; another would be "
            "started. The old entries stay. Titles depend on the language and on versions: name the entry by its "
            f"id ($menuentry_id_option in {self.path}), in {DEFAULTS} or with {self.command}-set-default"
        )

    def undo(self) -> None:
        if self._previous is not None and capture(self.path) != self._previous:
            write_atomic(self.path, self._previous, for_boot_loader=True)


# -- /etc/default/grub -----------------------------------------------------------------------------------------------


def owned_by_defaults(text: str) -> list[str]:
    """The arguments that a drop-in or marked lines of ours in GRUB's configuration add to every entry."""
    own = text if text.startswith(own_header()) else "\n".join(line for line in text.splitlines() if OWN_MARK in line)
    for name, value in assignments(own):
        if name == "GRUB_CMDLINE_LINUX":
            return [word for word in arguments(value) if not word.startswith("$")]
    return []


def with_own_lines(text: str, lines: t.Sequence[str]) -> str:
    """A configuration of somebody else with these lines of ours at its end, each marked, and no other of ours."""
    while OWN_MARK in text:
        text = remove_line(text, text.rindex(OWN_MARK))
    return append_lines(text, [f"{line}  # {OWN_MARK}" for line in lines]) if lines else text


# -- files of somebody else ------------------------------------------------------------------------------------------


def read_exact(host: Host, path: str) -> str | None:
    """A file's content so that :func:`write` gives back every byte of it, whatever its encoding."""
    content = host.read_bytes(path)
    return None if content is None else content.decode("utf-8", "surrogateescape")


def write(path: str, before: str | None, content: str, for_boot_loader: bool = False) -> WriteFile:
    """Write a text that was read by :func:`read_exact` and changed; ``for_boot_loader`` as for :func:`write_atomic`."""
    data = content.encode("utf-8", "surrogateescape")
    shown = [text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for text in (before or "", content)]
    return WriteFile(
        f"write {path}", path, shown[0], shown[1], path=path, content=data, for_boot_loader=for_boot_loader
    )
