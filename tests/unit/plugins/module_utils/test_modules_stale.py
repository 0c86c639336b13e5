# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import itertools

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._modules_stale import comment_out, plan_stale, restore
from ansible_collections.iommufd.host.tests.unit.machine import Machine

SAYS = "# iommufd.host: no kernel here has vfio_virqfd: "


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("vfio\nvfio_virqfd\nvfio_pci\n", f"vfio\n{SAYS}vfio_virqfd\nvfio_pci\n"),
        ("vfio-virqfd", f"{SAYS}vfio-virqfd"),
        (
            'add_drivers+=" vfio vfio_virqfd vfio_pci "\n',
            f'{SAYS}add_drivers+=" vfio vfio_virqfd vfio_pci "\nadd_drivers+=" vfio vfio_pci "\n',
        ),
        ("MODULES=(vfio_pci vfio_virqfd)", f"{SAYS}MODULES=(vfio_pci vfio_virqfd)\nMODULES=(vfio_pci)"),
        ("# vfio_virqfd\nmy_vfio_virqfd\nvfio_virqfd2\n", "# vfio_virqfd\nmy_vfio_virqfd\nvfio_virqfd2\n"),
        ("MODULES=(vfio_virqfd \\\n a)\n", "MODULES=(vfio_virqfd \\\n a)\n"),
        ('drivers+=" vfio \\\n vfio_virqfd "\n', 'drivers+=" vfio \\\n vfio_virqfd "\n'),
        ('drivers+=" vfio\nvfio_virqfd\na "\n', 'drivers+=" vfio\nvfio_virqfd\na "\n'),
        ('a=" b\nc "\n# "\nvfio_virqfd\n', f'a=" b\nc "\n# "\n{SAYS}vfio_virqfd\n'),
    ],
)
def test_out_and_back(before: str, after: str) -> None:
    assert comment_out(before) == after
    assert comment_out(after) == after
    assert restore(after) == before
    assert restore(before) == before


def test_every_byte_comes_back() -> None:
    pieces = ["vfio_virqfd", "\n", " a", "#", "vfio-virqfd b", "\t\n", "\\\n", "\r\n", '"']
    for parts in itertools.product(pieces, repeat=4):
        assert restore(comment_out("".join(parts))) == "".join(parts)


def test_files_of_all_tools_but_only_where_no_kernel_has_it(machine: Machine) -> None:
    machine.file("/usr/lib/modules/6.12/modules.dep", "kernel/vfio.ko:\n")
    paths = ["/etc/modules", "/etc/dracut.conf.d/vfio.conf", "/etc/initramfs-tools/modules", "/etc/mkinitcpio.conf"]
    for path in paths:
        machine.file(path, "vfio_virqfd\n")
    machine.directory("/etc/modules-load.d")
    machine.link("/etc/modules-load.d/modules.conf", "/etc/modules")
    machine.file("/etc/modules-load.d/x.conf", "vfio_virqfd \\\n")
    steps, warnings = plan_stale(machine.host, True)
    assert sorted(step.path for step in steps) == sorted(paths)
    assert [warning.split()[0] for warning in warnings] == ["/etc/modules-load.d/x.conf"]
    machine.file("/usr/lib/modules/6.1/modules.dep", "kernel/vfio_virqfd.ko:\n")
    assert plan_stale(machine.host, True) == ([], [])
    assert plan_stale(machine.host, False) == ([], [])
