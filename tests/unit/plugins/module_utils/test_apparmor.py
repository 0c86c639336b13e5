# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""AppArmor rules in the places that Debian 12 and 13 include, written and taken back to the byte."""

from __future__ import annotations

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _apparmor
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan, RemoveFile, WriteFile
from ansible_collections.iommufd.host.tests.unit.machine import Machine

DEBIAN_13 = (
    "  /dev/kvm rw,\n  include if exists <abstractions/libvirt-qemu.d>\n"
    "  include if exists <local/abstractions/libvirt-qemu>\n"
)
DEBIAN_12 = "  /dev/kvm rw,\n  #include <local/abstractions/libvirt-qemu>\n"


def carry_out(machine: Machine, plan: Plan) -> None:
    """The file steps of a plan, in the tree."""
    for step in plan.steps:
        if isinstance(step, WriteFile):
            machine.file(step.path, step.content)
        elif isinstance(step, RemoveFile):
            machine.at(step.path).unlink()
            for directory in step.prune:
                machine.at(directory).rmdir()


def present(machine: Machine, *nodes: str) -> Plan:
    plan = _apparmor.plan_present(_apparmor.read_state(machine.host), nodes or ["iommu", "cdevs"], machine.host)
    carry_out(machine, plan)
    return plan


def absent(machine: Machine) -> Plan:
    plan = _apparmor.plan_absent(_apparmor.read_state(machine.host))
    carry_out(machine, plan)
    return plan


def tree(machine: Machine) -> dict[str, bytes | None]:
    top = machine.at("/etc/apparmor.d")
    return {str(path.relative_to(top)): path.read_bytes() if path.is_file() else None for path in top.rglob("*")}


@pytest.mark.parametrize(
    ("abstraction", "others"),
    [
        pytest.param(DEBIAN_13, {}, id="Debian 13"),
        pytest.param(DEBIAN_13, {_apparmor.LOCAL: b"/dev/x rw,"}, id="Debian 13 with an old local file"),
        pytest.param(
            DEBIAN_13, {f"{_apparmor.ABSTRACTION}.d/other": b"/dev/x rw,\n"}, id="Debian 13 with the directory"
        ),
        pytest.param(DEBIAN_12, {_apparmor.LOCAL: b""}, id="Debian 12"),
        pytest.param(DEBIAN_12, {_apparmor.LOCAL: b"  /dev/x rw,\r\n\xff no end"}, id="Debian 12 with additions"),
        pytest.param(DEBIAN_12.replace("include", "include if exists"), {}, id="no local file, none needed"),
    ],
)
def test_written_once_and_taken_back_to_the_byte(machine: Machine, abstraction: str, others: dict[str, bytes]) -> None:
    machine.file(_apparmor.ABSTRACTION, abstraction)
    for path, content in others.items():
        machine.file(path, content)
    before = tree(machine)
    assert present(machine).changed
    path = _apparmor.read_state(machine.host).path or ""
    rules = machine.at(path).read_bytes()
    assert b"\n/dev/iommu rw,\n/dev/vfio/devices/* rw,\n" in rules
    assert all(
        content in (b"" if other == path else machine.at(other).read_bytes()) + rules
        for other, content in others.items()
    )
    assert not present(machine).changed, "the second time there is nothing to do"
    assert present(machine, "iommu").changed
    assert b"devices" not in machine.at(path).read_bytes()
    absent(machine)
    after = tree(machine)
    after.pop("local/abstractions", None)
    after.pop("local", None)
    before.pop("local/abstractions", None)
    before.pop("local", None)
    assert after == before
    assert not absent(machine).changed


def test_an_empty_local_file_that_the_abstraction_needs_stays(machine: Machine) -> None:
    machine.file(_apparmor.ABSTRACTION, DEBIAN_12)
    present(machine)
    absent(machine)
    assert machine.at(_apparmor.LOCAL).read_bytes() == b""


def test_rules_move_when_an_upgrade_brings_the_directory(machine: Machine) -> None:
    machine.file(_apparmor.ABSTRACTION, DEBIAN_12)
    machine.file(_apparmor.LOCAL, b"/dev/x rw,\n")
    present(machine)
    machine.file(_apparmor.ABSTRACTION, DEBIAN_13)
    present(machine)
    assert machine.at(_apparmor.LOCAL).read_bytes() == b"/dev/x rw,\n"
    assert machine.at(_apparmor.DROP_IN).exists()


def test_a_file_of_somebody_else_is_neither_overwritten_nor_removed(machine: Machine) -> None:
    machine.file(_apparmor.ABSTRACTION, DEBIAN_13)
    machine.file(_apparmor.DROP_IN, b"/dev/x rw,\n")
    with pytest.raises(Refusal, match="not written by this collection"):
        present(machine)
    assert not absent(machine).changed


def test_an_abstraction_without_additions(machine: Machine) -> None:
    machine.file(_apparmor.ABSTRACTION, "/dev/kvm rw,\n")
    with pytest.raises(HostError, match="includes neither"):
        present(machine)


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ("/dev/iommu rw,", True),
        ("  owner /dev/iommu rwk, # why", True),
        ("/dev/iommu r,", False),
        ("# /dev/iommu rw,", False),
        ("/dev/* rw,", True),
        ("/dev/** rw,", True),
        ("/dev/vfio/* rw,", False),
        ("/{dev,run}/iommu rw,", True),
        ("/dev/iomm[a-u] rw,", True),
        ("deny /dev/iommu rw,", False),
        (r"/srv/a\{b rw,", False),
        ("/srv/{a rw,\n/dev/iommu rw,", True),
    ],
)
def test_what_rules_allow(rules: str, allowed: bool) -> None:
    assert _apparmor.allows(rules, "/dev/iommu") is allowed
