# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options of cgroup_acl and udev_access as they become what the core takes."""

from __future__ import annotations

import pathlib
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _task_cgroup_acl as cgroup_acl
from ansible_collections.iommufd.host.plugins.module_utils import _task_udev_access as udev_access
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host


def test_devices_keep_their_order_and_an_address_becomes_its_stable_name() -> None:
    given = {"manager": "libvirt", "devices": ["/dev/iommu", "02:00.0", "0000:02:00.0"]}
    assert cgroup_acl.parse_devices(given) == ["/dev/iommu", "/dev/vfio/by-path/pci-0000:02:00.0"]


@pytest.mark.parametrize(
    ("manager", "device"),
    [
        ("libvirt", "char-vfio-dev"),
        ("libvirt", "/dev/vfio/*"),
        ("libvirt", "dev/iommu"),
        ("libvirt", "0000:zz:00.0"),
        ("systemd", "char-misc"),
        ("systemd", "/dev/vfio/*"),
        ("systemd", "iommu"),
    ],
)
def test_devices_that_are_refused_are_named_with_their_place(manager: str, device: str) -> None:
    with pytest.raises(OptionError, match=r"^devices\[1\]: "):
        cgroup_acl.parse_devices({"manager": manager, "devices": ["/dev/iommu", device]})


@pytest.mark.parametrize("devices", [None, []])
def test_devices_are_needed(devices: list[str] | None) -> None:
    with pytest.raises(OptionError, match=r"^devices: "):
        cgroup_acl.parse_devices({"manager": "libvirt", "devices": devices})


def test_open_file() -> None:
    good = [
        "/dev/iommu",
        "/dev/iommu:iommu",
        "/dev/iommu:iommu:graceful",
        r"/dev/vfio/by-path/pci-0000\x3a02\x3a00.0:gpu",
    ]
    assert cgroup_acl.parse_open_file(good) == tuple(good)
    # Of the ways to write a colon in a path systemd takes \x3a alone; without it, the path ends there.
    colons = (r"/dev/vfio/by-path/pci-0000\:02\:00.0:gpu", "/dev/vfio/by-path/pci-0000:02:00.0")
    for bad in ("iommu", "/etc/shadow:x", "/dev/iommu:a b", "/dev/*:x", "/dev/iommu:x\nUser=root", *colons):
        with pytest.raises(OptionError, match=r"^open_file\[0\]: "):
            cgroup_acl.parse_open_file([bad])


def nodes(root: pathlib.Path, entries: list[t.Any], **options: t.Any) -> dict[str, str]:
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0:::\n")
    (root / "etc/group").write_text("root:x:0:\nkvm:x:993:\ngpu:x:994:\n")
    params = {"nodes": entries, "owner": "root", "group": "kvm", "mode": "0660", "allow_world": False}
    params.update({"acl_users": [], "acl_groups": [], **options})
    return {kind: access.text for kind, access in udev_access.parse_nodes(Host(str(root)), params).items()}


def test_nodes_with_and_without_settings_of_their_own(tmp_path: pathlib.Path) -> None:
    assert nodes(tmp_path, ["iommu", {"name": "cdevs", "group": "gpu", "mode": "0640"}]) == {
        "iommu": "root:kvm 0660",
        "cdevs": "root:gpu 0640",
    }


@pytest.mark.parametrize(
    ("entry", "option"),
    [
        ("kvm", r"nodes\[0\]"),
        (7, r"nodes\[0\]"),
        ({"group": "kvm"}, r"nodes\[0\]"),
        ({"name": "iommu", "grp": "kvm"}, r"nodes\[0\]"),
        ({"name": "iommu", "mode": "0666"}, r"nodes\[0\]\.mode"),
        ({"name": "iommu", "mode": 432}, r"nodes\[0\]\.mode"),
        ({"name": "iommu", "group": "gone"}, r"nodes\[0\]\.group"),
    ],
)
def test_nodes_that_are_refused(tmp_path: pathlib.Path, entry: t.Any, option: str) -> None:
    with pytest.raises(OptionError, match=f"^{option}: "):
        nodes(tmp_path, [entry])


@pytest.mark.parametrize("path", ["/tmp/90-x.rules", "/etc/udev/rules.d/90-x.conf", "/etc/udev/rules.d/.x.rules"])
def test_a_path_that_udev_does_not_read(path: str) -> None:
    with pytest.raises(OptionError, match=r"^path: "):
        udev_access.parse_path(path)
