# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""AppArmor rules that let libvirt's guests open the IOMMUFD nodes themselves.

libvirt gives each guest a profile of its own (``libvirt-<uuid>``), made by virt-aa-helper when the guest starts; all of
them include ``abstractions/libvirt-qemu``, whose only vfio node is ``/dev/vfio/vfio``. The rules go where that file
includes additions from:

- ``abstractions/libvirt-qemu.d/`` (Debian 13, Ubuntu 24.04): a file that is wholly ours;
- ``local/abstractions/libvirt-qemu`` (Debian 12): a file of the administrator, which Debian 12 even ships empty and
  cannot do without. Our lines stand in one marked block at its beginning, all other bytes stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._apparmor_local import (
    plan_without_block,
    shown,
    with_block,
    write_rules,
)
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._files import OWN_MARK, own_header
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._own_files import refuse_foreign
from ansible_collections.iommufd.host.plugins.module_utils._plan import Action, Plan, RemoveFile

BASE = "/etc/apparmor.d"
ABSTRACTION = f"{BASE}/abstractions/libvirt-qemu"
DROP_IN = f"{ABSTRACTION}.d/iommufd-host"
LOCAL = f"{BASE}/local/abstractions/libvirt-qemu"

# kind of node -> the rules for it. QEMU finds the cdev of a PCI function by listing vfio-dev/ below the function in
# sysfs and reading vfioN/dev there (hw/vfio/iommufd.c, iommufd_cdev_getfd). AppArmor judges the path of the node
# itself, so the links by PCI address need no rule.
RULES = {
    "iommu": ("/dev/iommu rw,",),
    "cdevs": ("/dev/vfio/devices/* rw,", "/sys/devices/**/vfio-dev/ r,", "/sys/devices/**/vfio-dev/vfio*/dev r,"),
    "groups": ("/dev/vfio/[0-9]* rw,",),
}

_MADE_DIRECTORY = "# The directory was made for it.\n"


@dataclasses.dataclass(frozen=True)
class State:
    """What the planner needs to know.

    Attributes:
        enabled: whether the kernel enforces AppArmor; None where it cannot be told.
        abstraction: libvirt's abstraction is there.
        path: where our rules belong; None where the abstraction includes no additions.
        drop_in: that is a file of ours, not a block in a file of the administrator.
        required: the abstraction cannot do without that file.
        contents: what is in each of the two places (None: no such file).
        directory: the drop-in's directory is there.
        guests: profiles of guests that are loaded now; they keep their rules until their guest starts again.
    """

    enabled: bool | None
    abstraction: bool
    path: str | None
    drop_in: bool
    required: bool
    contents: t.Mapping[str, bytes | None]
    directory: bool
    guests: tuple[str, ...]

    @property
    def in_use(self) -> bool:
        return self.enabled is not False and self.abstraction


def is_enabled(host: Host) -> bool | None:
    """Whether the kernel enforces AppArmor; None where it cannot be told (a captured tree)."""
    found = {"Y": True, "N": False}.get(host.read_line("/sys/module/apparmor/parameters/enabled") or "")
    return False if found is None and host.live else found


def read_state(host: Host) -> State:
    """libvirt's abstraction, what it includes, and what is in those places.

    Raises:
        HostError: something other than a regular file is in one of the places.
    """
    text = host.read_text(ABSTRACTION)
    includes = {
        match["path"]: match["exists"] is None
        for match in re.finditer(
            r"^[ \t]*#?include(?P<exists>[ \t]+if[ \t]+exists)?[ \t]+<(?P<path>[^>]+)>", text or "", re.MULTILINE
        )
    }
    drop_in = "abstractions/libvirt-qemu.d" in includes
    local = "local/abstractions/libvirt-qemu"
    contents: dict[str, bytes | None] = {}
    for path in (DROP_IN, LOCAL):
        contents[path] = host.read_bytes(path)
        if contents[path] is None and host.exists(path):
            raise HostError(f"{path} is there, but is not a file that can be read.")
    loaded = (host.read_text("/sys/kernel/security/apparmor/profiles") or "").splitlines()
    return State(
        enabled=is_enabled(host),
        abstraction=text is not None,
        path=DROP_IN if drop_in else LOCAL if local in includes else None,
        drop_in=drop_in,
        required=includes.get(local, False),
        contents=contents,
        directory=host.is_dir(os.path.dirname(DROP_IN)),
        guests=tuple(match[1] for line in loaded if (match := re.match(r"(libvirt-[0-9a-f-]{36}) ", line))),
    )


def rules_of(nodes: t.Iterable[str]) -> list[str]:
    """The rules for some kinds of nodes (keys of :data:`RULES`), in the table's order."""
    wanted = set(nodes)
    return [rule for kind, rules in RULES.items() if kind in wanted for rule in rules]


def allows(content: str, path: str) -> bool:
    """Whether a text of rules lets a path be read and written. Globs of AppArmor are understood; a rule with variables
    or a backslash counts as none."""
    for line in content.splitlines():
        match = re.fullmatch(r"\s*(?:owner\s+)?\"?(/[^\s\"]*)\"?\s+([rwklmaix]+),.*", line.partition("#")[0])
        if match and {"r", "w"} <= set(match[2]):
            with contextlib.suppress(re.error):  # braces or brackets that do not pair
                if _glob(match[1]).fullmatch(path):
                    return True
    return False


def _glob(pattern: str) -> re.Pattern[str]:
    parts = {"**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")", ",": "|"}
    return re.compile(
        "".join(
            parts.get(piece, piece if piece.startswith("[") else re.escape(piece))
            for piece in re.findall(r"\*\*|\[[^\]]*\]|.", pattern)
        )
    )


# -- planning ----------------------------------------------------------------------------------------------------------


def plan_present(state: State, nodes: t.Iterable[str], host: Host) -> Plan:
    """What is missing until a guest that starts from now on may open the nodes.

    Raises:
        HostError: the abstraction includes no additions, or AppArmor would not take the rules.
        Refusal: a file that is not ours is in the drop-in's place.
    """
    rules = rules_of(nodes)
    if state.path is None:
        raise HostError(f"{ABSTRACTION} includes neither libvirt-qemu.d nor local/abstractions/libvirt-qemu.")
    before = state.contents[state.path]
    after = _with_rules(state, before, rules)
    plan = Plan()
    other = LOCAL if state.drop_in else DROP_IN
    _take_out(plan, state, other)
    if before != after:
        check_syntax(host, rules)
        plan.add(write_rules(state.path, before, after, enforce_mode=state.drop_in))
    if plan.changed:
        plan.add(
            Action(f"check that AppArmor takes {ABSTRACTION}", do=lambda: check_syntax(host, [])),
        )
    return plan


def plan_absent(state: State) -> Plan:
    """What is missing until nothing of ours is in either place."""
    plan = Plan()
    for path in (DROP_IN, LOCAL):
        _take_out(plan, state, path)
    return plan


def _with_rules(state: State, content: bytes | None, rules: t.Sequence[str]) -> bytes:
    if state.drop_in:
        refuse_foreign(DROP_IN, content)
        made = content is None and not state.directory
        made = made or (content is not None and _MADE_DIRECTORY.encode() in content)
        lines = "".join(f"{rule}\n" for rule in rules)
        return (own_header() + (_MADE_DIRECTORY if made else "") + lines).encode()
    return with_block(content, rules)


def _take_out(plan: Plan, state: State, path: str) -> None:
    content = state.contents[path]
    if path == LOCAL:
        plan_without_block(plan, path, content, state.required)
        return
    text = shown(content)
    if OWN_MARK in text[:400]:
        prune = [os.path.dirname(path)] if _MADE_DIRECTORY in text else []
        plan.add(RemoveFile(f"remove {path}", path, text, path=path, prune=prune))


# -- what AppArmor makes of it -----------------------------------------------------------------------------------------


def profile_text(name: str, rules: t.Sequence[str] = ()) -> str:
    """A profile as virt-aa-helper makes it for a guest, with more rules."""
    lines = "".join(f"  {rule}\n" for rule in rules)
    return (
        "#include <tunables/global>\n\n"
        f"profile {name} flags=(attach_disconnected) {{\n  #include <abstractions/libvirt-qemu>\n{lines}}}\n"
    )


def check_syntax(host: Host, rules: t.Sequence[str]) -> None:
    """Ask ``apparmor_parser`` about libvirt's abstraction with these rules; nothing is loaded or cached.

    Raises:
        HostError: it would not take them; quotes it.
    """
    argv = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "--skip-read-cache", "--base", BASE]
    answer = host.ask(argv, 120, stdin=profile_text("iommufd-host-check", rules))
    if answer is not None and not answer.ok:
        words = " / ".join(line.strip() for line in answer.stderr.splitlines() if "Warning" not in line)
        raise HostError(f"AppArmor would not take the rules: {words}")
