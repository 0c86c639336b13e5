# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pathlib

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _modules_load
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._files import own_header
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._modules_load import PATH

NAMES = ["iommufd", "vfio-pci"]
OURS = own_header() + "iommufd\nvfio-pci\n"


class Machine(Host):
    """A synthetic host with the modules of one kernel."""

    def __init__(self, root: pathlib.Path, iommufd: bool = True) -> None:
        super().__init__(str(root))
        self.base = root
        self.put("/proc/sys/kernel/osrelease", "6.12\n")
        self.put("/proc/modules", "ext4 1 0 - Live 0x0\n")
        dep = "kernel/drivers/vfio/pci/vfio-pci.ko.xz:\n"
        self.put("/usr/lib/modules/6.12/modules.dep", dep + ("updates/dkms/iommufd.ko.xz:\n" if iommufd else ""))

    def put(self, path: str, text: str = "") -> None:
        target = self.base / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def load(self, *holders: str) -> None:
        """Load the whole stack; an item "a<b" says that b holds a."""
        names = ("vfio_pci", "vfio_pci_core", "vfio_iommu_type1", "vfio", "iommufd")
        self.put("/proc/modules", "".join(f"{name} 1 0 - Live 0x0\n" for name in names))
        for name in names:
            held = [pair.partition("<")[2] for pair in holders if pair.partition("<")[0] == name]
            self.put(f"/sys/module/{name}/refcnt", f"{len(held)}\n")
            for holder in held:
                self.put(f"/sys/module/{name}/holders/{holder}")


STACK = ("vfio_pci_core<vfio_pci", "vfio<vfio_pci", "vfio<vfio_pci_core", "vfio<vfio_iommu_type1", "iommufd<vfio")


def test_a_fresh_host(tmp_path: pathlib.Path) -> None:
    planned = _modules_load.plan_present(Machine(tmp_path), NAMES)
    assert planned.plan.summary() == [f"write {PATH}", "load iommufd, vfio-pci"]
    assert planned.plan.steps[0].after == OURS


def test_only_what_is_missing_is_done(tmp_path: pathlib.Path) -> None:
    host = Machine(tmp_path)
    host.put(PATH, OURS)
    assert _modules_load.plan_present(host, NAMES).plan.summary() == ["load iommufd, vfio-pci"]
    host.load(*STACK)
    assert _modules_load.plan_present(host, NAMES).plan.summary() == []


def test_built_in_modules_are_left_out(tmp_path: pathlib.Path) -> None:
    host = Machine(tmp_path, iommufd=False)
    host.put("/usr/lib/modules/6.12/modules.builtin", "kernel/drivers/iommu/iommufd/iommufd.ko\n")
    planned = _modules_load.plan_present(host, NAMES)
    assert planned.plan.steps[0].after == own_header() + "vfio-pci\n"
    assert planned.plan.summary()[1] == "load vfio-pci"


def test_a_kernel_without_iommufd(tmp_path: pathlib.Path) -> None:
    host = Machine(tmp_path, iommufd=False)
    with pytest.raises(HostError, match=r"no module iommufd.*iommufd_dkms"):
        _modules_load.plan_present(host, NAMES)
    planned = _modules_load.plan_present(host, NAMES, pending=True)
    assert planned.plan.summary() == [f"write {PATH}", "load iommufd, vfio-pci"]
    assert "no module iommufd yet" in planned.warnings[0]


def test_absent_unloads_what_nothing_uses(tmp_path: pathlib.Path) -> None:
    host = Machine(tmp_path)
    host.put(PATH, OURS)
    host.load(*STACK)
    planned = _modules_load.plan_absent(host)
    assert planned.plan.summary() == [f"remove {PATH}", "unload vfio-pci, iommufd"]
    assert planned.staying == {}


def test_absent_leaves_what_is_in_use(tmp_path: pathlib.Path) -> None:
    host = Machine(tmp_path)
    host.put(PATH, OURS)
    host.load(*STACK)
    host.put("/sys/module/vfio_pci/drivers/pci:vfio-pci")
    host.put("/sys/bus/pci/drivers/vfio-pci/0000:01:00.0")
    planned = _modules_load.plan_absent(host)
    assert planned.plan.summary() == [f"remove {PATH}"]
    assert planned.staying == {"vfio-pci": "0000:01:00.0 is bound to it", "iommufd": "module vfio uses it"}


def test_absent_leaves_what_another_file_has_loaded(tmp_path: pathlib.Path) -> None:
    host = Machine(tmp_path)
    host.put(PATH, OURS)
    host.put("/etc/modules", "# words\nvfio_pci ids=1\n")
    host.load(*STACK)
    planned = _modules_load.plan_absent(host)
    assert planned.plan.summary() == [f"remove {PATH}"]
    assert planned.staying["vfio-pci"] == "/etc/modules has it loaded"


def test_absent_without_our_file_touches_nothing(tmp_path: pathlib.Path) -> None:
    host = Machine(tmp_path)
    host.load(*STACK)
    assert _modules_load.plan_absent(host).plan.summary() == []


def test_a_foreign_file_at_our_path_is_left_alone(tmp_path: pathlib.Path) -> None:
    host = Machine(tmp_path)
    host.put(PATH, "vfio\n")
    for plan in (lambda: _modules_load.plan_present(host, NAMES), lambda: _modules_load.plan_absent(host)):
        with pytest.raises(HostError, match="was not written by this collection"):
            plan()


@pytest.mark.parametrize("name", ["", "a b", "../x", "-r", "a;b", "vfio-pci\n"])
def test_bad_names(name: str) -> None:
    with pytest.raises(OptionError, match=r"names\[1\]"):
        _modules_load.check_names("names", ["iommufd", name])


def test_a_masked_file_is_refused_before_anything_is_done(tmp_path: pathlib.Path) -> None:
    host = Machine(tmp_path)
    (tmp_path / PATH[1:]).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / PATH[1:]).symlink_to("/dev/null")
    with pytest.raises(HostError, match="is not a file that can be read"):
        _modules_load.plan_present(host, NAMES)
    assert _modules_load.plan_absent(host).plan.summary() == []
