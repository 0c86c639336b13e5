# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._distribution import parse_os_release, read_distribution
from ansible_collections.iommufd.host.tests.unit.machine import Machine


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("ID=debian\n", "debian"),
        ("ID=ubuntu\nID_LIKE=debian\n", "debian"),
        ("ID=linuxmint\nID_LIKE='ubuntu debian'\n", "debian"),
        ("ID=fedora\n", "redhat"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "redhat"),
        ('ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n', "suse"),
        ("ID=sles\n", "suse"),
        ("ID=endeavouros\nID_LIKE=arch\n", "arch"),
        ("ID=nixos\n", "other"),
        ("", "other"),
        ("ID='unfinished\n=\n# ID=debian\n", "other"),
    ],
)
def test_families(text: str, family: str) -> None:
    assert parse_os_release(text).family == family


def test_a_distribution_in_full(machine: Machine) -> None:
    assert read_distribution(machine.host).id is None
    machine.file(
        "/usr/lib/os-release",
        'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nVERSION_ID="13"\nVERSION_CODENAME=trixie\nID=debian\n',
    )
    machine.link("/etc/os-release", "/usr/lib/os-release")
    assert read_distribution(machine.host).to_dict() == {
        "id": "debian",
        "version_id": "13",
        "codename": "trixie",
        "name": "Debian GNU/Linux 13 (trixie)",
        "family": "debian",
    }
