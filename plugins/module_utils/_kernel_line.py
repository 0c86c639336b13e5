# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Kernel command lines: what counts on one, and how the files of boot loaders hold them.

Texts are changed as little as can be: what is added goes to the end of a line, what is taken out goes with the blank
before it, and every other byte stays. Adding and then taking out gives the text that was there.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._kernel import arguments

# What a boot loader's configuration, a shell file, and the kernel's parser take without quoting.
_ARGUMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(=[A-Za-z0-9_.,:/@+%=-]*)?")


def check_arguments(option: str, values: t.Sequence[str]) -> None:
    """Refuse what would not arrive at the kernel as one argument.

    Raises:
        OptionError: names the option with the index.
    """
    for number, value in enumerate(values):
        if not _ARGUMENT.fullmatch(value):
            raise OptionError(
                f"{option}[{number}]", value, "one kernel argument, such as intel_iommu=on, without spaces or quotes"
            )


def key(argument: str) -> str:
    """The name of an argument; the kernel takes "-" and "_" in it for the same."""
    return argument.partition("=")[0].replace("-", "_")


def ineffective(line: t.Sequence[str], wanted: t.Sequence[str]) -> list[str]:
    """Those of some arguments that a command line lacks, or that another value behind them overrides."""
    last = {key(argument): argument for argument in line}
    # Of an argument that is wanted with several values ("console=…" twice) the last one must be the last.
    wanted_last = {key(argument): argument for argument in wanted}
    return [
        argument
        for argument in wanted
        if argument not in line or (wanted_last[key(argument)] == argument and last[key(argument)] != argument)
    ]


def assignments(text: str) -> list[tuple[str, str]]:
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


@dataclasses.dataclass(frozen=True)
class Form:
    """How a kind of file holds kernel arguments.

    Attributes:
        name: of the kind, for people.
        value: finds each piece of text that holds arguments, in its group "value".
        joined: whether the pieces make up one command line (else each is one of its own).
        start: what begins such a line in a file that has none; None where a file without one has no command line.
    """

    name: str
    value: re.Pattern[str]
    joined: bool
    start: str | None = None

    def lines(self, text: str) -> list[list[str]]:
        """The command lines in a text, each as its arguments."""
        pieces = [arguments(match["value"]) for match in self.value.finditer(text)]
        if self.joined:
            return [[argument for piece in pieces for argument in piece]] if pieces or self.start is not None else []
        return pieces

    def add(self, text: str, wanted: t.Sequence[str]) -> str:
        """The text with those of some arguments added to each command line that lacks them or overrides them."""
        matches = list(self.value.finditer(text))
        if self.joined:
            line = self.lines(text)
            lacking = ineffective(line[0], wanted) if line else []
            if not lacking:
                return text
            if matches:
                return _appended(text, matches[-1], lacking)
            return append_lines(text, [f"{self.start}{' '.join(lacking)}"])
        for match in reversed(matches):
            lacking = ineffective(arguments(match["value"]), wanted)
            if lacking:
                text = _appended(text, match, lacking)
        return text

    def take_out(self, text: str, gone: t.Iterable[str]) -> str:
        """The text without the last occurrence of each of some arguments in each command line."""
        for argument in gone:
            matches = [match for match in self.value.finditer(text) if argument in arguments(match["value"])]
            for match in matches[-1:] if self.joined else reversed(matches):
                value = match["value"]
                found = [one.span() for one in re.finditer(rf"(?<!\S){re.escape(argument)}(?!\S)", value)]
                if not found:
                    continue  # it is part of a quoted argument
                start, end = found[-1]
                rest = value[: start - 1 if start else 0] + value[end:]
                if not rest.strip() and self.start is not None:
                    text = remove_line(text, match.start())
                else:
                    text = text[: match.start("value")] + rest + text[match.end("value") :]
        return text


def _appended(text: str, match: re.Match[str], lacking: t.Sequence[str]) -> str:
    value = match["value"]
    end = match.start("value") + len(value.rstrip())
    blank = " " if value.strip() else ""
    return f"{text[:end]}{blank}{' '.join(lacking)}{text[end:]}"


def append_lines(text: str, lines: t.Sequence[str]) -> str:
    """A text with lines at its end; where it ends without a newline it does so afterwards, too."""
    joined = "\n".join(lines)
    return f"{text}{joined}\n" if not text or text.endswith("\n") else f"{text}\n{joined}"


def remove_line(text: str, position: int) -> str:
    """A text without the line that has some position; takes back :func:`append_lines`."""
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    return text[:start] + text[end + 1 :] if end >= 0 else text[: max(start - 1, 0)]


# -- forms -----------------------------------------------------------------------------------------------------------

#: An entry of the Boot Loader Specification; several lines "options" make up one command line.
ENTRY = Form("boot entry", re.compile(r"^options[ \t]+(?P<value>\S.*)$", re.MULTILINE), True, "options ")

#: /etc/kernel/cmdline: what kernel-install puts into the entries of new kernels.
COMMAND_LINE = Form("default of new kernels", re.compile(r"^(?![ \t]*#)(?P<value>.*\S.*)$", re.MULTILINE), True, "")

#: zipl.conf, with one command line for each section.
ZIPL = Form(
    "sections of zipl", re.compile(r'^[ \t]*parameters[ \t]*=[ \t]*"?(?P<value>[^"\n]*)"?[ \t]*$', re.MULTILINE), False
)
