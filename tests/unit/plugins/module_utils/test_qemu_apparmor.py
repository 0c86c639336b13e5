# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_apparmor as apparmor
from ansible_collections.iommufd.host.plugins.module_utils._errors import Refusal
from ansible_collections.iommufd.host.plugins.module_utils._plan import Command, Plan, Step, WriteFile
from ansible_collections.iommufd.host.tests.unit.machine import Machine

DIRECTORY = "/opt/iommufd-host/qemu"
ABSTRACTION = "/etc/apparmor.d/abstractions/libvirt-qemu"
PROFILE = "/etc/apparmor.d/usr.sbin.libvirtd"
LOCAL = "/etc/apparmor.d/local/usr.sbin.libvirtd"
LOADED = "/sys/kernel/security/apparmor/profiles"


def present(machine: Machine) -> list[Step]:
    plan = Plan()
    apparmor.plan_rules(machine.host, plan, DIRECTORY)
    return plan.steps


def absent(machine: Machine) -> list[Step]:
    plan = Plan()
    apparmor.plan_no_rules(machine.host, plan)
    return plan.steps


def test_where_there_is_no_libvirt(machine: Machine) -> None:
    assert present(machine) == absent(machine) == apparmor.missing_rules(machine.host, DIRECTORY) == []


def test_guests_may_run_it(machine: Machine) -> None:
    machine.file(ABSTRACTION, "  include if exists <local/abstractions/libvirt-qemu>\n")
    (warning,) = apparmor.missing_rules(machine.host, DIRECTORY)
    assert "Add to its local additions" in warning
    machine.file(ABSTRACTION, "  include if exists <abstractions/libvirt-qemu.d>\n")
    assert apparmor.missing_rules(machine.host, DIRECTORY) == []
    (step,) = present(machine)
    assert step.subject == apparmor.RULES_FILE
    assert "/opt/iommufd-host/qemu/versions/*/bin/qemu-system-* rmix,\n" in step.after
    machine.file(apparmor.RULES_FILE, step.after)
    assert present(machine) == []
    assert [one.subject for one in absent(machine)] == [apparmor.RULES_FILE]
    machine.file(apparmor.RULES_FILE, "somebody else's\n")
    with pytest.raises(Refusal, match="was not written by this collection"):
        present(machine)
    machine.file(apparmor.RULES_FILE, f"{'# somebody else, who speaks of us' * 20}\n{step.after}")
    assert absent(machine) == []


@pytest.mark.parametrize("before", [None, "# Site-specific additions\n/srv/qemu PUx,\n"])
def test_the_daemon_may_run_it(machine: Machine, before: str | None) -> None:
    machine.file(PROFILE, "profile libvirtd /usr/sbin/libvirtd {\n  include if exists <local/usr.sbin.libvirtd>\n}\n")
    if before is not None:
        machine.file(LOCAL, before)
    (step,) = present(machine)
    assert isinstance(step, WriteFile) and step.path == LOCAL
    assert "\n/opt/iommufd-host/qemu/versions/*/bin/* PUx,\n" in step.after and step.after.endswith(before or "")
    machine.file(LOCAL, step.after)
    assert present(machine) == []
    (step,) = absent(machine)
    assert step.subject == LOCAL and step.after == (before or "")
    assert isinstance(step, WriteFile) == (before is not None)


@pytest.mark.parametrize("name", ["libvirtd", "/usr/sbin/libvirtd"])
def test_a_profile_that_is_loaded_is_loaded_again(machine: Machine, name: str) -> None:
    machine.file(PROFILE, "  #include <local/usr.sbin.libvirtd>\n")
    machine.file(LOADED, "libvirtd-other (enforce)\n")
    assert len(present(machine)) == 1
    machine.file(LOADED, f"virt-aa-helper (enforce)\n{name} (enforce)\n{name}//qemu_bridge_helper (enforce)\n")
    write, load = present(machine)
    assert isinstance(load, Command) and load.argv[-1] == PROFILE
    machine.file(LOCAL, write.after)
    # Older parsers cannot do without the file that a profile includes so.
    write, load = absent(machine)
    assert isinstance(write, WriteFile) and write.after == "" and isinstance(load, Command)


def test_a_profile_without_additions(machine: Machine) -> None:
    machine.file(PROFILE, "profile libvirtd /usr/sbin/libvirtd {\n}\n")
    assert present(machine) == []
    (warning,) = apparmor.missing_rules(machine.host, DIRECTORY)
    assert "keep libvirtd from running" in warning and "/opt/iommufd-host/qemu/versions/*/bin/* PUx," in warning
