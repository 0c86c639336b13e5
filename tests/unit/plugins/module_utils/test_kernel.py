# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import gzip

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._kernel import (
    ModuleIndex,
    arguments,
    command_line,
    read_config,
    release,
)
from ansible_collections.iommufd.host.tests.unit.machine import Machine

RELEASE = "6.12.95+deb13-amd64"
MODULES = f"/usr/lib/modules/{RELEASE}"


@pytest.fixture
def installed(machine: Machine) -> Machine:
    machine.file("/proc/sys/kernel/osrelease", f"{RELEASE}\n")
    machine.file(
        f"{MODULES}/modules.dep",
        "updates/dkms/iommufd.ko.xz:\n"
        "updates/dkms/vfio.ko.xz: updates/dkms/iommufd.ko.xz\n"
        "kernel/drivers/vfio/pci/vfio-pci-core.ko.xz: kernel/virt/lib/irqbypass.ko.xz updates/dkms/vfio.ko.xz "
        "updates/dkms/iommufd.ko.xz\n"
        "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/pci/vfio-pci-core.ko.xz "
        "kernel/virt/lib/irqbypass.ko.xz updates/dkms/vfio.ko.xz updates/dkms/iommufd.ko.xz\n"
        "kernel/virt/lib/irqbypass.ko.xz:\n",
    )
    machine.file(f"{MODULES}/modules.builtin", "kernel/drivers/pci/pcie/aer.ko\nkernel/fs/ext4/ext4.ko\n")
    machine.file(
        f"{MODULES}/modules.alias",
        "# Aliases extracted from modules themselves.\n"
        "alias pci:v00008086d000010D3sv*sd*bc*sc*i* e1000e\n"
        "alias pci:v*d*sv*sd*bc01sc08i02* nvme\n"
        "alias pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_core\n"
        "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n"
        "alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci\n"
        "alias usb:v1234p5678d*dc*dsc*dp*ic*isc*ip*in* something\n",
    )
    machine.file("/proc/modules", "vfio 65536 0 - Live 0x0000000000000000\n")
    return machine


def test_release(installed: Machine) -> None:
    assert release(installed.host) == RELEASE


def test_release_without_proc(machine: Machine) -> None:
    assert release(machine.host) is None
    machine.file(f"{MODULES}/modules.dep", "")
    assert release(machine.host) == RELEASE
    machine.file("/usr/lib/modules/6.1.0-25-amd64/modules.dep", "")
    assert release(machine.host) is None
    machine.file("/proc/version", "Linux version 6.1.0-25-amd64 (debian-kernel@lists.debian.org) #1 SMP\n")
    assert release(machine.host) == "6.1.0-25-amd64"


@pytest.mark.parametrize("path", [f"/boot/config-{RELEASE}", f"{MODULES}/config"])
def test_config(installed: Machine, path: str) -> None:
    installed.file(path, "# CONFIG_IOMMUFD is not set\nCONFIG_VFIO=m\nCONFIG_VFIO_GROUP=y\nCONFIG_HZ=250\n")
    config = read_config(installed.host)
    assert config is not None
    assert config.source == path
    assert [config.get(name) for name in ("IOMMUFD", "VFIO", "VFIO_GROUP", "HZ", "NO_SUCH")] == [
        "n",
        "m",
        "y",
        "250",
        "n",
    ]
    assert config.has("VFIO")
    assert not config.has("IOMMUFD")


def test_config_of_the_running_kernel(installed: Machine) -> None:
    packed = gzip.compress(b"CONFIG_IOMMUFD=m\n" + b"".join(b"CONFIG_X%d=y\n" % number for number in range(5000)))
    installed.file("/proc/config.gz", packed)
    config = read_config(installed.host)
    assert config is not None
    assert config.source == "/proc/config.gz"
    assert config.get("IOMMUFD") == "m"
    assert read_config(installed.host, "6.1.0-25-amd64") is None
    installed.file("/proc/config.gz", packed[: len(packed) // 2])
    truncated = read_config(installed.host)
    assert truncated is not None
    assert truncated.get("IOMMUFD") == "m"
    installed.file("/proc/config.gz", b"no gzip")
    assert read_config(installed.host) is None


def test_command_line(machine: Machine) -> None:
    assert command_line(machine.host) is None
    machine.file("/proc/cmdline", 'root=/dev/vda1 quiet dyndbg="file x.c +p" intel_iommu=on\n')
    words = arguments(command_line(machine.host))
    assert words == ["root=/dev/vda1", "quiet", 'dyndbg="file x.c +p"', "intel_iommu=on"]


def test_module_states(installed: Machine) -> None:
    index = ModuleIndex(installed.host)
    vfio = index.state("vfio")
    assert (vfio.state, vfio.path, vfio.dkms) == ("loaded", f"{MODULES}/updates/dkms/vfio.ko.xz", True)
    pci = index.state("vfio-pci")
    assert (pci.name, pci.state, pci.dkms) == ("vfio_pci", "available", False)
    assert index.state("ext4").state == "builtin"
    assert index.state("nothing").state == "missing"
    assert not index.state("nothing").usable


def test_nothing_is_loaded_of_another_kernel(installed: Machine) -> None:
    installed.file("/usr/lib/modules/7.2-amd64/modules.dep", "kernel/drivers/vfio/vfio.ko.zst:\n")
    assert ModuleIndex(installed.host, "7.2-amd64").state("vfio").state == "available"


def test_modules_in_the_order_in_which_they_load(installed: Machine) -> None:
    index = ModuleIndex(installed.host)
    assert [path.rpartition("/")[2] for path in index.closure("vfio-pci")] == [
        "iommufd.ko.xz",
        "vfio.ko.xz",
        "irqbypass.ko.xz",
        "vfio-pci-core.ko.xz",
        "vfio-pci.ko.xz",
    ]
    assert index.closure("ext4") == []


def test_drivers(installed: Machine) -> None:
    index = ModuleIndex(installed.host)
    nic = "pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00"
    disk = "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02"
    virtual = "pci:v000015B3d0000101Esv000015B3sd00000023bc02sc00i00"
    assert index.drivers_for(nic) == ["e1000e"]
    assert index.drivers_for(disk) == ["nvme"]
    assert index.drivers_for("nonsense") == []
    assert index.vfio_drivers_for(nic) == ["vfio_pci"]
    assert index.vfio_drivers_for(virtual) == ["mlx5_vfio_pci", "vfio_pci"]


def test_a_kernel_without_files(machine: Machine) -> None:
    index = ModuleIndex(machine.host)
    assert index.state("vfio").state == "unknown"
    assert index.drivers_for("pci:v0") == []
    assert index.loaded is None
