# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib
import stat
import struct

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._nodes import Accounts, acl_entries, read_node, read_nodes
from ansible_collections.iommufd.host.tests.unit.machine import Machine


@pytest.fixture
def peopled(machine: Machine) -> Machine:
    machine.file("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nlibvirt-qemu:x:64055:994::/:/bin/false\nbroken:x:y\n")
    machine.file("/etc/group", "root:x:0:\nkvm:x:994:someone,libvirt-qemu\ndisk:x:6:libvirt-qemu\n")
    return machine


def test_accounts_of_a_captured_tree(peopled: Machine) -> None:
    accounts = Accounts(peopled.host)
    assert accounts.user_id("libvirt-qemu") == 64055
    assert accounts.user_id("broken") is None
    assert accounts.group_id("kvm") == 994
    assert accounts.user_name(64055) == "libvirt-qemu"
    assert accounts.group_name(6) == "disk"
    assert accounts.group_name(7) is None
    assert accounts.groups_of("libvirt-qemu") == [994, 6]
    assert accounts.groups_of("nobody") == []


def test_accounts_of_this_machine() -> None:
    accounts = Accounts(Host())
    assert accounts.user_id("root") == 0
    assert accounts.user_name(0) == "root"
    assert accounts.user_id("no such user\0") is None
    assert accounts.groups_of("root")[0] == 0


def test_nodes_in_the_order_of_their_numbers_with_their_links(peopled: Machine) -> None:
    """Plain files stand for the nodes: a captured tree seldom has device nodes."""
    for path in ("/dev/iommu", "/dev/vfio/vfio", "/dev/vfio/12", "/dev/vfio/devices/vfio10", "/dev/vfio/devices/vfio2"):
        peopled.file(path, "")
    os.chmod(peopled.at("/dev/iommu"), 0o660)
    peopled.file("/sys/class/misc/iommu/dev", "10:124\n")
    peopled.link("/dev/vfio/by-path/pci-0000:01:00.0", "/dev/vfio/devices/vfio2")
    nodes = read_nodes(peopled.host)
    assert nodes.iommu is not None
    shown = nodes.iommu.to_dict()
    assert (shown["mode"], shown["device"], shown["expected"], shown["links"]) == ("0660", None, "10:124", [])
    assert [node.path for node in nodes.cdevs] == ["/dev/vfio/devices/vfio2", "/dev/vfio/devices/vfio10"]
    assert nodes.cdevs[0].links == ["/dev/vfio/by-path/pci-0000:01:00.0"]
    assert [node.path for node in nodes.groups] == ["/dev/vfio/12"]
    assert nodes.container is not None
    assert nodes.kvm is None


def test_an_empty_tree(machine: Machine) -> None:
    assert read_nodes(machine.host).to_dict() == {
        "iommu": None,
        "kvm": None,
        "container": None,
        "cdevs": [],
        "groups": [],
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes are made by root only")
def test_a_real_node(peopled: Machine) -> None:
    path: pathlib.Path = peopled.at("/dev/iommu")
    path.parent.mkdir()
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(10, 124))
    except PermissionError:
        pytest.skip("device nodes cannot be made here")
    os.chown(path, 64055, 994)
    os.chmod(path, 0o640)
    node = read_node(peopled.host, "/dev/iommu")
    assert node is not None
    assert (node.owner, node.group, node.mode_text, node.number) == ("libvirt-qemu", "kvm", "0640", "10:124")


def test_what_an_access_list_grants(machine: Machine) -> None:
    """As the kernel encodes it: owner, a user, the group, another group, the mask, others."""
    machine.file("/etc/passwd", "qemu:x:107:107::/:/sbin/nologin\n")
    entries = [(1, 6, 2**32 - 1), (2, 6, 107), (4, 6, 2**32 - 1), (8, 4, 36), (16, 6, 2**32 - 1), (32, 0, 2**32 - 1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    assert acl_entries(acl, Accounts(machine.host)) == ["user:qemu:rw-", "group:36:r--"]
    shut = acl.replace(struct.pack("<HH", 16, 6), struct.pack("<HH", 16, 0))
    assert acl_entries(shut, Accounts(machine.host)) == ["user:qemu:---", "group:36:---"], "the mask counts"
    assert acl_entries(acl[:-3], Accounts(machine.host)) == [], "the kernel gives no such thing"
    assert acl_entries(b"", Accounts(machine.host)) == []


def test_the_number_by_the_list_of_minors(machine: Machine) -> None:
    machine.file("/dev/iommu", "")
    machine.file("/proc/misc", "232 kvm\n124 iommu\n")
    node = read_nodes(machine.host).iommu
    assert node is not None
    assert node.expected == "10:124"
