# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Entries of modules that no kernel has any more.

Instructions for passthrough from before Linux 6.2 list ``vfio_virqfd``, which was folded into ``vfio`` then
(drivers/vfio/Makefile). dracut and mkinitcpio report an error for a module that they cannot find, each time that they
make an initramfs; users tell of kernels that did not boot afterwards.

A line with such an entry becomes a comment that says so, and what else stood on it follows on a line of its own. That
is all there is to remember, so taking it back gives the very same bytes.
"""

from __future__ import annotations

import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._boot_loader import read_exact, write
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._kernel import ModuleIndex, installed_releases
from ansible_collections.iommufd.host.plugins.module_utils._plan import WriteFile

_WORD = re.compile(r"[ \t]*(?<![\w.-])vfio[_-]virqfd(?![\w.-])")
_MARK = "# iommufd.host: no kernel here has vfio_virqfd: "

_FILES = ("/etc/modules", "/etc/initramfs-tools/modules", "/etc/dracut.conf", "/etc/mkinitcpio.conf")
_DIRECTORIES = ("/etc/modules-load.d", "/etc/dracut.conf.d", "/etc/mkinitcpio.conf.d")


def _files(host: Host) -> list[str]:
    found = list(_FILES)
    for directory in _DIRECTORIES:
        found.extend(f"{directory}/{name}" for name in host.listdir(directory) if name.endswith(".conf"))
    # A link (Debian's modules-load.d/modules.conf is /etc/modules) is no second file.
    return [path for path in found if host.exists(path) and host.readlink(path) is None]


def comment_out(text: str) -> str:
    """A configuration without entries of the module, the lines that had them kept as comments.

    A line that goes on in the next, or stands in a quoted string of several lines, stays: a comment has no place there.
    """
    lines: list[str] = []
    quoted = continued = False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("#"):
            lines.append(line)
            continue
        part = quoted or continued
        quoted ^= line.count('"') % 2 == 1
        continued = line.rstrip().endswith("\\")
        if part or quoted or continued or not _WORD.search(line):
            lines.append(line)
            continue
        rest = _WORD.sub("", line)
        left = rest if rest.strip() else ""
        end = "" if line.endswith("\n") else "\n"
        lines.append(f"{_MARK}{line}{end if left else ''}{left}")
    return "".join(lines)


def restore(text: str) -> str:
    """Takes back :func:`comment_out`."""
    lines = text.splitlines(keepends=True)
    restored: list[str] = []
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if not line.startswith(_MARK):
            restored.append(line)
            continue
        original = line[len(_MARK) :]
        left = _WORD.sub("", original)
        if left.strip() and number < len(lines) and lines[number].rstrip("\n") == left.rstrip("\n"):
            if not lines[number].endswith("\n"):
                original = original.rstrip("\n")
            number += 1
        restored.append(original)
    return "".join(restored)


def plan_stale(host: Host, present: bool) -> tuple[list[WriteFile], list[str]]:
    """Steps that take such entries out, or put them back, and warnings about those that must be left to a person.

    Nothing is taken out as long as an installed kernel has the module.
    """
    steps: list[WriteFile] = []
    warnings: list[str] = []
    if present and any(ModuleIndex(host, kernel).state("vfio_virqfd").usable for kernel in installed_releases(host)):
        return steps, warnings
    change: t.Callable[[str], str] = comment_out if present else restore
    for path in _files(host):
        before = read_exact(host, path) or ""
        after = change(before)
        if after != before:
            steps.append(write(path, before, after))
        live = (line for line in after.splitlines() if not line.lstrip().startswith("#"))
        if present and any(_WORD.search(line) for line in live):
            warnings.append(
                f"{path} names vfio_virqfd, which no installed kernel has, in one of several lines of one value; "
                "take it out by hand, or the next initramfs may fail to be built."
            )
    return steps, warnings
