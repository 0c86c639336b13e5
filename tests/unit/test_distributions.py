# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""That a host of each family of distributions is told what to do in its own words.

The roles have no package names of their own: what is missing is named by the survey's remedies, and only apt is driven.
"""

from __future__ import annotations

import re
import typing as t

import pytest
import yaml

from ansible_collections.iommufd.host.plugins.module_utils import _checks, _packages
from ansible_collections.iommufd.host.plugins.module_utils._checks import run_checks
from ansible_collections.iommufd.host.plugins.module_utils._distribution import _FAMILIES
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.tests.unit.examples import CHECKOUT
from ansible_collections.iommufd.host.tests.unit.machine import Machine
from ansible_collections.iommufd.host.tests.unit.plugins.module_utils.test_checks import READY, changed

FAMILIES = ("debian", "redhat", "suse", "arch")
ID = {"debian": "debian", "redhat": "fedora", "suse": "opensuse-tumbleweed", "arch": "arch", "other": "gentoo"}
# Tools that only one family has.
OWN = {
    "debian": r"\bapt(-get)? install|update-grub|update-initramfs",
    "redhat": r"\bdnf\b|\bgrubby\b|\byum\b",
    "suse": r"\bzypper\b|grub2-mkconfig",
    "arch": r"\bpacman\b|[^2]-mkconfig|mkinitcpio",
}


def troubled(family: str) -> list[dict[str, t.Any]]:
    """Surveys of hosts in which each check fails for some reason or other."""
    of = {"distribution": {"id": ID[family], "family": family}}
    off = {"iommu__enabled": False, "groups": [], "devices": []}
    no_iommufd = {"kernel__modules": {}, "kernel__vfio_cdev": False, "nodes__iommu": None}
    return [
        changed(READY, **of, **off, **no_iommufd, qemu=[], nodes__kvm=None),
        changed(READY, **of, **off, iommu__firmware=None, iommu__units=[]),
        changed(READY, **of, **off, iommu__firmware=None, kernel__virtual_machine=True),
        changed(READY, **of, **off, iommu__firmware=None, kernel__cpu_vendor=None),
        changed(READY, **of, **no_iommufd, kernel__release="5.4.0-1"),
        changed(READY, **of, **no_iommufd, kernel__config={"source": "", "options": {"IOMMUFD": "m"}}),
        changed(READY, **of, qemu=[], libvirt__can_pass_iommufd=False),
    ]


@pytest.mark.parametrize("family", [*FAMILIES, "other"])
def test_remedies_are_in_the_words_of_the_family(family: str) -> None:
    seen = set()
    own = re.compile(OWN[family]) if family in OWN else None
    for survey in troubled(family):
        for check in run_checks(survey):
            if check.status != "fail":
                continue
            seen.add(check.id)
            assert check.remedy, check.id
            for other, tools in OWN.items():
                if other != family:
                    assert re.search(tools, check.remedy) is None, f"{check.id} on {family}: {check.remedy}"
    assert {"iommu.enabled", "kernel.iommufd", "kernel.cdev", "node.iommu", "qemu.iommufd"} <= seen
    assert own is None or any(
        own.search(check.remedy or "") for survey in troubled(family) for check in run_checks(survey)
    )


def test_every_family_has_its_words() -> None:
    assert set(_FAMILIES.values()) == set(FAMILIES)
    assert set(_checks._QEMU_PACKAGE) == set(FAMILIES)
    assert len({_checks.add_argument(family, "quiet") for family in (*FAMILIES, "other")}) == 5


@pytest.mark.parametrize("family", [*FAMILIES[1:], "other"])
def test_packages_are_refused_with_the_name_of_the_distribution(machine: Machine, family: str) -> None:
    machine.file("/etc/os-release", f'ID={ID[family]}\nPRETTY_NAME="A {family} host"\n')
    with pytest.raises(HostError, match=f"this host is A {family} host"):
        _packages.require_apt(machine.host)


def test_no_role_names_a_package_or_a_distribution() -> None:
    """Differences of distributions are in the code that reads the host; the lab runs on Debian and says so."""
    words = re.compile(r"\b(apt|dnf|yum|zypper|pacman)\b|os_family|ansible_distribution")
    for path in sorted(CHECKOUT.glob("roles/*/*/*.yml")):
        if path.parts[-3] != "lab" and path.parts[-2] in ("tasks", "defaults", "vars"):
            assert words.search(path.read_text()) is None, path


def test_only_what_was_run_is_a_platform() -> None:
    for path in sorted(CHECKOUT.glob("roles/*/meta/main.yml")):
        platforms = yaml.safe_load(path.read_text())["galaxy_info"]["platforms"]
        assert [platform["name"] for platform in platforms] == ["Debian"], path
