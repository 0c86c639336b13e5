# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""AppArmor rules of ours in a file of the administrator (``/etc/apparmor.d/local``): one marked block at its beginning.

All other bytes of the file stay, and with the block it is gone again where it was made for it.
"""

from __future__ import annotations

import os
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._files import OWN_MARK
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan, RemoveFile, WriteFile

_MADE_FILE = "; this file was made for it"
_BLOCK = re.compile(
    rf"# BEGIN {re.escape(OWN_MARK)}; edits are lost(?P<made>{re.escape(_MADE_FILE)})?\.\n"
    r"(?:.*\n)*?# END iommufd\.host\n"
)


def with_block(content: bytes | None, rules: t.Sequence[str]) -> bytes:
    """The file with these rules in the block; ``content`` is None where there is no file."""
    text = None if content is None else content.decode("utf-8", "surrogateescape")
    block = None if text is None else _BLOCK.search(text)
    made = text is None or (block is not None and block["made"] is not None)
    head = f"# BEGIN {OWN_MARK}; edits are lost{_MADE_FILE if made else ''}.\n"
    rest = "" if text is None else _BLOCK.sub("", text, count=1)
    return (head + "".join(f"{rule}\n" for rule in rules) + "# END iommufd.host\n" + rest).encode(
        "utf-8", "surrogateescape"
    )


def plan_without_block(plan: Plan, path: str, content: bytes | None, required: bool) -> None:
    """Take the block out of a file, if it has one.

    Args:
        plan: gets the step.
        path: of the file.
        content: what is in it.
        required: AppArmor cannot do without the file.
    """
    text = (content or b"").decode("utf-8", "surrogateescape")
    block = _BLOCK.search(text)
    if block is None:
        return
    rest = _BLOCK.sub("", text, count=1).encode("utf-8", "surrogateescape")
    if not rest and block["made"] and not required:
        directory = os.path.dirname(path)
        plan.add(RemoveFile(f"remove {path}", path, shown(content), path=path, prune=[directory]))
    else:
        plan.add(write_rules(path, content, rest, enforce_mode=False))


def write_rules(path: str, before: bytes | None, after: bytes, enforce_mode: bool) -> WriteFile:
    """The step that writes a file of rules."""
    return WriteFile(
        f"write {path}", path, shown(before), shown(after), path=path, content=after, mode=0o644,
        enforce_mode=enforce_mode,
    )  # fmt: skip


def shown(content: bytes | None) -> str:
    """A file's content for ``--diff``."""
    return (content or b"").decode("utf-8", "replace")
