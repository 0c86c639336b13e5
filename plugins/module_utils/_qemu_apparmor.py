# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""AppArmor rules by which libvirt runs a QEMU outside of the distribution's directories.

Two profiles stand in the way. The guest's own includes ``abstractions/libvirt-qemu``, which knows ``/usr/bin`` alone;
additions go into ``libvirt-qemu.d`` (since the AppArmor packages of Debian 13 and Ubuntu 24.04). The daemon's lets it
run what lies in ``/usr/bin``, and libvirt asks every emulator what it can do before it starts a guest on it; additions
go into ``local/``, a file of the administrator, and count from when the profile is loaded again.
"""

from __future__ import annotations

import re

from ansible_collections.iommufd.host.plugins.module_utils._apparmor import ABSTRACTION, BASE
from ansible_collections.iommufd.host.plugins.module_utils._apparmor_local import (
    plan_without_block,
    with_block,
    write_rules,
)
from ansible_collections.iommufd.host.plugins.module_utils._files import OWN_MARK, own_header
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._own_files import write_own
from ansible_collections.iommufd.host.plugins.module_utils._plan import Command, Plan, RemoveFile

RULES_FILE = f"{ABSTRACTION}.d/iommufd-host-qemu"

_DAEMONS = ("libvirtd", "virtqemud")


def plan_rules(host: Host, plan: Plan, directory: str) -> None:
    """Let libvirt run the builds beneath a directory, where AppArmor's rules for it can be added to.

    Raises:
        Refusal: a file that is not ours is in our place.
    """
    if _guests_have_a_place(host):
        _plan_guests(host, plan, directory)
    for daemon in _daemons(host):
        path = _local(daemon)
        before = host.read_bytes(path)
        after = with_block(before, _daemon_rules(directory))
        if before != after:
            plan.add(write_rules(path, before, after, enforce_mode=False))
            _plan_reload(host, plan, daemon)


def plan_no_rules(host: Host, plan: Plan) -> None:
    """Take all of that away again."""
    text = host.read_text(RULES_FILE)
    if text is not None and OWN_MARK in text[:400]:
        plan.add(RemoveFile(f"remove {RULES_FILE}", RULES_FILE, text, path=RULES_FILE, prune=(f"{ABSTRACTION}.d",)))
    for daemon in _DAEMONS:
        steps = len(plan.steps)
        required = _include(host, daemon) == "required"
        plan_without_block(plan, _local(daemon), host.read_bytes(_local(daemon)), required)
        if len(plan.steps) > steps:
            _plan_reload(host, plan, daemon)


def missing_rules(host: Host, directory: str) -> list[str]:
    """A warning for each profile of libvirt's that stands in the way and that our rules have no place in."""
    found = []
    if host.exists(ABSTRACTION) and not _guests_have_a_place(host):
        found.append(
            f"{ABSTRACTION} includes no directory of additions, so that AppArmor may keep libvirt's guests from "
            f"running this QEMU. Add to its local additions: {directory}/versions/*/bin/qemu-system-* rmix,"
        )
    found += [
        f"{_profile(daemon)} includes no additions, so that AppArmor may keep {daemon} from running this QEMU. Add to "
        f"it: {' '.join(_daemon_rules(directory))}"
        for daemon in _DAEMONS
        if host.exists(_profile(daemon)) and _include(host, daemon) is None
    ]
    return found


# -- guests ------------------------------------------------------------------------------------------------------------


def _guests_have_a_place(host: Host) -> bool:
    text = host.read_text(ABSTRACTION) or ""
    return re.search(r"^\s*#?include\s+(if exists\s+)?<abstractions/libvirt-qemu\.d>", text, re.MULTILINE) is not None


def _plan_guests(host: Host, plan: Plan, directory: str) -> None:
    content = (
        own_header()
        + f"# libvirt's guests may run the QEMU that stands beneath {directory}.\n"
        + f"{directory}/versions/*/bin/qemu-system-* rmix,\n{directory}/versions/*/share/** r,\n"
    )
    for step in write_own(host, RULES_FILE, content.encode(), 0o644):
        plan.add(step)


# -- daemons -----------------------------------------------------------------------------------------------------------


def _daemons(host: Host) -> list[str]:
    return [daemon for daemon in _DAEMONS if _include(host, daemon) is not None]


def _profile(daemon: str) -> str:
    return f"{BASE}/usr.sbin.{daemon}"


def _local(daemon: str) -> str:
    return f"{BASE}/local/usr.sbin.{daemon}"


def _daemon_rules(directory: str) -> tuple[str, ...]:
    # As the profile has it for /usr/bin: with the profile of that name, or else without any; the guest gets its own.
    return (f"{directory}/versions/*/bin/* PUx,",)


def _include(host: Host, daemon: str) -> str | None:
    """How a daemon's profile includes the administrator's additions; None where it does not, or there is none."""
    text = host.read_text(_profile(daemon)) or ""
    match = re.search(rf"^\s*#?include(\s+if exists)?\s+<local/usr\.sbin\.{daemon}>", text, re.MULTILINE)
    return None if match is None else "if exists" if match[1] else "required"


def _plan_reload(host: Host, plan: Plan, daemon: str) -> None:
    """Where the daemon's profile is loaded; where it is not, it will be with what the files say then."""
    loaded = host.read_text("/sys/kernel/security/apparmor/profiles") or ""
    if re.search(rf"^(/usr/sbin/)?{daemon} \(", loaded, re.MULTILINE):
        argv = ["apparmor_parser", "--replace", "--write-cache", _profile(daemon)]
        plan.add(Command(f"load AppArmor's profile of {daemon} again", argv=argv))
