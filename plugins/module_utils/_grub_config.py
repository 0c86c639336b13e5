# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the ``grub.cfg`` that ``grub-mkconfig`` generates says about the entry that is started."""

from __future__ import annotations

import re

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._kernel_line import assignments

_ENTRY = re.compile(r"^\s*(?:menuentry|submenu)\s+'((?:[^']|'\\'')*)'(.*)$", re.MULTILINE)
_ID = re.compile(r"(?:\$menuentry_id_option|--id)[\s=]+'((?:[^']|'\\'')*)'")
_DEFAULT = re.compile(r'^\s*set default="([^"]*)"\s*$', re.MULTILINE)


def names(config: str) -> set[str]:
    """The titles and ids of all entries and submenus."""
    found = set()
    for match in _ENTRY.finditer(config):
        found.add(match[1])
        found.update(_ID.findall(match[2]))
    return {name.replace("'\\''", "'") for name in found}


def started(config: str, environment: str) -> list[str]:
    """What is started without anybody at the console, as it is named: a number, a title, an id, or a path of these.

    Args:
        config: the generated file.
        environment: GRUB's environment block (``grubenv``), where ``grub-set-default`` and ``grub-reboot`` write.
    """
    saved = dict(line.partition("=")[::2] for line in environment.splitlines())
    wanted = [
        saved.get(value[2:-1], "") if re.fullmatch(r"\$\{\w+\}", value) else value for value in _DEFAULT.findall(config)
    ]
    return list(dict.fromkeys(name for name in wanted if name))


def lost(before: str, after: str, environment: str) -> list[str]:
    """What the entries before start and those after have no more, by name."""
    return [name for name in started(before, environment) if _finds(before, name) and not _finds(after, name)]


def _finds(config: str, name: str) -> bool:
    # Levels are divided by ">"; within a title that is doubled (grub-set-default(8), GRUB's manual on "default").
    levels = [level.replace(">>", ">") for level in re.split(r"(?<!>)>(?!>)", name)]
    known = names(config)
    return all(level.isdigit() or level in known for level in levels)


def locale(host: Host) -> dict[str, str]:
    """The variables of the host's own language, in which an administrator's ``update-grub`` writes the titles."""
    for path in ("/etc/default/locale", "/etc/locale.conf"):
        found = assignments(host.read_text(path) or "")
        if found:
            return {name: value for name, value in found if re.fullmatch(r"LANG|LANGUAGE|LC_[A-Z]+", name)}
    return {}
