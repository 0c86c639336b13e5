# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Trees that are no live host: reports, images, recordings, and what damage does to them."""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import sqlite3
import struct
import tempfile
import time
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._package_versions import package_versions
from ansible_collections.iommufd.host.plugins.module_utils._survey import survey
from ansible_collections.iommufd.host.tests.unit.machine import Machine

OLD, NEW = "6.1.0-25-amd64", "6.12.95+deb13-amd64"


def check(result: dict[str, t.Any], name: str) -> dict[str, t.Any]:
    return next(one for one in result["checks"] if one["id"] == name)


# -- reports -----------------------------------------------------------------------------------------------------------


def test_a_report_of_sos(machine: Machine) -> None:
    """It has parts of /proc and /etc, an index of modules below /lib, answers of programs, but neither PCI functions
    nor processes nor nodes: what it cannot know is not judged."""
    kernel = "5.14.0-570.el9.x86_64"
    machine.file("/etc/os-release", 'ID="rhel"\nID_LIKE="fedora"\nVERSION_ID="9.6"\n')
    machine.file("/sos_commands/kernel/uname_-a", f"Linux node7 {kernel} #1 SMP PREEMPT_DYNAMIC x86_64 GNU/Linux\n")
    machine.file("/sos_commands/kernel/dmesg", "[    0.1] DMAR-IR: Enabled IRQ remapping in x2apic mode\n")
    machine.file(f"/lib/modules/{kernel}/modules.dep", "kernel/drivers/iommu/iommufd/iommufd.ko.xz:\n")
    machine.file(f"/boot/config-{kernel}", "CONFIG_IOMMUFD=m\nCONFIG_VFIO_DEVICE_CDEV=y\n")
    machine.file("/sys/module/vfio/initstate", "live\n")
    machine.file("/proc/cmdline", "root=/dev/mapper/rhel-root intel_iommu=on\n")
    machine.file(
        "/installed-rpms", "libvirt-daemon-driver-qemu-11.5.0-4.el9.x86_64  Mon 03 Nov 2026\nbash-5.1-9.el9.x86_64 x\n"
    )
    result = survey(machine.host)
    assert (result["kernel"]["release"], result["kernel"]["release_source"]) == (kernel, "running")
    assert result["kernel"]["architecture"] == "x86_64"
    assert result["kernel"]["modules"]["vfio"]["state"] == "loaded"
    assert result["kernel"]["modules"]["iommufd"]["state"] == "available"
    assert result["libvirt"]["version"] == "11.5.0-4.el9"
    assert result["iommu"]["enabled"] is None
    assert result["iommu"]["interrupt_isolation"] is True
    assert [result[key] for key in ("devices", "nodes", "guests")] == [None, None, None]
    assert {check(result, name)["status"] for name in ("iommu.enabled", "node.iommu", "device.cdev", "kvm")} == {"skip"}
    assert check(result, "kernel.iommufd")["status"] == "warn"
    assert check(result, "kernel.cdev")["status"] == "ok"


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def image(machine: Machine) -> Machine:
    for kernel in (OLD, NEW):
        machine.file(f"/usr/lib/modules/{kernel}/modules.dep", "kernel/drivers/vfio/vfio.ko.xz:\n")
        machine.file(f"/boot/config-{kernel}", "CONFIG_VFIO=m\n# CONFIG_IOMMUFD is not set\n")
    machine.file("/etc/os-release", "ID=debian\n")
    machine.directory("/dev")
    return machine


def test_an_image_speaks_of_its_newest_kernel(image: Machine) -> None:
    result = survey(image.host)
    assert (result["kernel"]["release"], result["kernel"]["release_source"]) == (NEW, "newest")
    assert result["kernel"]["installed"] == [OLD, NEW]
    assert check(result, "kernel.iommufd")["status"] == "fail"
    assert "Debian builds its kernels without iommufd" in check(result, "kernel.iommufd")["detail"]
    assert result["nodes"] is None
    assert check(result, "node.iommu")["status"] == "skip"


@pytest.mark.parametrize("how", ["/vmlinuz", "/boot/vmlinuz", "/boot/grub2/grubenv"])
def test_an_image_speaks_of_the_kernel_that_would_boot(image: Machine, how: str) -> None:
    if how.endswith("grubenv"):
        image.file(how, f"# GRUB Environment Block\nsaved_entry={'a' * 32}-{OLD}\n")
    else:
        image.link(how, f"/boot/vmlinuz-{OLD}")
    result = survey(image.host)
    assert (result["kernel"]["release"], result["kernel"]["release_source"]) == (OLD, "boot")
    assert "which the boot loader would start" in json.dumps(result["checks"]) or OLD in json.dumps(result["checks"])


def test_a_truncated_configuration_proves_nothing(machine: Machine) -> None:
    machine.file("/proc/sys/kernel/osrelease", f"{NEW}\n")
    machine.file(f"/boot/config-{NEW}", "CONFIG_VFIO=m\n# CONFIG_KVM is not set\nCONFIG_VFIO_GR")
    result = survey(machine.host)
    options = result["kernel"]["config"]["options"]
    assert (options["VFIO"], options["KVM"], options["IOMMUFD"]) == ("m", "n", None)
    assert check(result, "kernel.iommufd")["status"] == "skip"


def test_a_module_that_the_tree_cannot_show(machine: Machine) -> None:
    """The configuration and the loaded modules, but no index of those on disk: it is not said to be missing."""
    machine.file("/proc/sys/kernel/osrelease", f"{NEW}\n")
    machine.file("/proc/modules", "kvm 1 0 - Live 0x0\n")
    machine.file(f"/boot/config-{NEW}", "CONFIG_IOMMUFD=m\n")
    result = survey(machine.host)
    assert result["kernel"]["modules"]["iommufd"]["state"] == "unknown"
    assert check(result, "kernel.iommufd")["status"] == "skip"


def test_links_stay_in_the_tree(machine: Machine) -> None:
    """Absolute links, a merged /usr, a /proc/self that leads nowhere: nothing of this very host is read."""
    machine.file("/usr/lib/os-release", "ID=arch\n")
    machine.at("/etc").mkdir()
    machine.at("/etc/os-release").symlink_to("/usr/lib/os-release")
    machine.at("/lib").symlink_to("/usr/lib")
    machine.file(f"/usr/lib/modules/{NEW}/modules.dep", "")
    machine.at("/boot").symlink_to("/../../../../../boot")
    machine.at("/proc").mkdir()
    machine.at("/proc/self").symlink_to("4711")
    machine.at("/proc/mounts").symlink_to("self/mounts")
    machine.at("/sys").symlink_to("/proc/../../../../../sys")
    result = survey(machine.host)
    assert result["distribution"]["id"] == "arch"
    assert result["kernel"]["release"] == NEW
    assert (result["devices"], result["kernel"]["config"], result["iommu"]) == (None, None, None)


# -- recordings --------------------------------------------------------------------------------------------------------


def test_groups_by_the_links_of_their_members(machine: Machine) -> None:
    for address, group in (("0000:01:00.0", 3), ("0000:01:00.1", 3)):
        path = machine.pci(address, driver="igb")
        machine.link(f"{path}/iommu_group", f"/sys/kernel/iommu_groups/{group}")
    machine.file("/sys/devices/virtual/iommu/smmu3.0x0000000009050000/power/control", "auto\n")
    result = survey(machine.host)
    (group,) = result["groups"]
    assert (group["number"], group["devices"], group["type"]) == (3, ["0000:01:00.0", "0000:01:00.1"], None)
    assert result["iommu"]["enabled"] is True
    assert [unit["kind"] for unit in result["iommu"]["units"]] == ["SMMUv3"]


def test_functions_without_groups_mean_that_the_iommu_is_off(machine: Machine) -> None:
    machine.pci("0000:00:00.0", "8086:29c0", "060000")
    result = survey(machine.host)
    assert (result["groups"], result["iommu"]["enabled"]) == ([], False)
    assert check(result, "iommu.enabled")["status"] == "fail"
    assert "intel_iommu=on" in check(result, "iommu.enabled")["remedy"]


def test_a_tree_of_devices_alone(machine: Machine) -> None:
    """No /sys/bus: the functions are found where they are, below bridges and below other buses' devices."""
    machine.pci("0000:00:02.0", class_id="060400")
    machine.pci("0000:01:00.0", driver="nvme", below="0000:00:02.0")
    machine.paths["host"] = "/sys/devices/platform/40000000.pcie/pci0001:00"
    machine.pci("0001:00:01.0", below="host")
    for path in machine.at("/sys/bus/pci/devices").iterdir():
        path.unlink()
    machine.at("/sys/bus/pci/devices").rmdir()
    result = survey(machine.host)
    assert [device["address"] for device in result["devices"]] == ["0000:00:02.0", "0000:01:00.0", "0001:00:01.0"]


def test_a_domain_above_ffff(machine: Machine) -> None:
    """Behind a VMD: five digits, sorted by number, kept apart from the domain that they end with."""
    machine.pci("10000:00:01.0", "8086:2020", "060400", group=2)
    machine.pci("0000:00:01.0", "8086:2020", "060400", group=1)
    machine.pci("ffff:00:01.0", "8086:2020", "060400", group=3)
    result = survey(machine.host)
    addresses = ["0000:00:01.0", "ffff:00:01.0", "10000:00:01.0"]
    assert [device["address"] for device in result["devices"]] == addresses
    assert {group["number"]: group["devices"] for group in result["groups"]}[2] == ["10000:00:01.0"]


# -- damage ------------------------------------------------------------------------------------------------------------

BIG = (
    "/sys/bus/pci/devices/0000:01:00.0/vendor",
    "/sys/bus/pci/devices/0000:01:00.0/resource",
    "/sys/kernel/iommu_groups/1/reserved_regions",
    "/proc/self/mountinfo",
    "/proc/net/route",
    "/proc/cmdline",
    "/proc/cpuinfo",
    "/etc/os-release",
    "/etc/libvirt/qemu.conf",
    f"/boot/config-{NEW}",
)


def test_files_of_a_gigabyte_are_read_in_part(machine: Machine) -> None:
    """Sparse files, so that only reading them would cost."""
    machine.pci("0000:01:00.0", group=1)
    machine.file("/proc/sys/kernel/osrelease", f"{NEW}\n")
    for path in BIG:
        machine.file(path, "")
        with machine.at(path).open("r+b") as file:
            file.truncate(1 << 30)
    started = time.process_time()
    result = survey(machine.host)
    assert time.process_time() - started < 10
    assert [device["address"] for device in result["devices"]] == ["0000:01:00.0"]
    json.dumps(result)


def test_pipes_in_place_of_files(machine: Machine) -> None:
    """None is waited for."""
    path = machine.pci("0000:01:00.0", group=1)
    for attribute in machine.at(path).iterdir():
        if attribute.is_file():
            attribute.unlink()
            os.mkfifo(attribute)
    for name in ("/proc/self/mountinfo", "/proc/cmdline", "/etc/os-release", "/proc/modules", f"/boot/config-{NEW}"):
        machine.at(name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(machine.at(name))
    (device,) = survey(machine.host)["devices"]
    assert (device["address"], device["vendor_id"], device["bars"]) == ("0000:01:00.0", None, None)


def _as_nobody(root: str, answer: t.Any) -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    answer.send(survey(Host(root)))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody who may not read")
def test_unreadable_attributes() -> None:
    """To root every file is readable, so this is another user's look at them."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        machine = Machine(pathlib.Path(directory))
        path = machine.pci("0000:01:00.0", driver="nvme", group=1, reset_method="flr")
        machine.pci("0000:02:00.0", driver="nvme", group=2)
        machine.file("/proc/1/mountinfo", "x\n")
        for hidden in (f"{path}/vendor", f"{path}/reset_method", "/proc/1/mountinfo", "/sys/kernel/iommu_groups/1"):
            machine.at(hidden).chmod(0)
        receive, send = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_as_nobody, args=(directory, send))
        process.start()
        assert receive.poll(60)
        result = receive.recv()
        process.join()
    first, second = result["devices"]
    assert first["vendor_id"] == "0x8086"  # its modalias says so, too
    assert first["reset_methods"] is None
    assert (second["address"], second["driver"]) == ("0000:02:00.0", "nvme")
    assert [group["number"] for group in result["groups"]] == [1, 2]


# -- packages ----------------------------------------------------------------------------------------------------------


def rpm_header(**tags: str) -> bytes:
    numbers = {"name": 1000, "version": 1001, "release": 1002}
    index = data = b""
    for tag, value in tags.items():
        index += struct.pack(">IIII", numbers[tag], 6, len(data), 1)
        data += value.encode() + b"\0"
    return struct.pack(">II", len(tags), len(data)) + index + data


def test_the_database_of_rpm(machine: Machine) -> None:
    machine.directory("/usr/lib/sysimage/rpm")
    database = sqlite3.connect(machine.at("/usr/lib/sysimage/rpm/rpmdb.sqlite"))
    database.execute("CREATE TABLE Packages (hnum INTEGER PRIMARY KEY, blob BLOB NOT NULL)")
    database.execute("CREATE TABLE Name (key TEXT NOT NULL, hnum INTEGER NOT NULL, idx INTEGER NOT NULL)")
    header = rpm_header(name="libvirt", version="12.1.0", release="1.fc44")
    database.execute("INSERT INTO Packages VALUES (7, ?)", (header,))
    database.execute("INSERT INTO Name VALUES ('libvirt', 7, 0)")
    database.commit()
    database.close()
    assert package_versions(machine.host, ["qemu-kvm", "libvirt"]) == {"libvirt": "12.1.0-1.fc44"}
    machine.file("/usr/lib/sysimage/rpm/rpmdb.sqlite", b"SQLite format 3\0" + b"\xff" * 4000)
    assert package_versions(machine.host, ["libvirt"]) == {}


def test_the_databases_of_debian_and_arch(machine: Machine) -> None:
    machine.directory("/var/lib/pacman/local/libvirt-1:12.2.0-1")
    assert package_versions(machine.host, ["libvirt"]) == {"libvirt": "12.2.0-1"}
    machine.file(
        "/var/lib/dpkg/status",
        "Package: libvirt\nStatus: deinstall ok config-files\nVersion: 9\n\n"
        "Package: qemu-system-x86\nStatus: install ok installed\nVersion: 1:7.2+dfsg-7\n",
    )
    assert package_versions(machine.host, ["qemu-system-x86"]) == {"qemu-system-x86": "7.2+dfsg-7"}
    machine.file("/usr/bin/qemu-system-x86_64", b"\x7fELF")
    machine.at("/usr/bin/qemu-system-x86_64").chmod(0o755)
    found = check(survey(machine.host), "qemu.iommufd")
    assert (found["status"], found["detail"]) == (
        "fail",
        "QEMU 7.2+dfsg-7 is older than its iommufd, which came with 9.0.",
    )
