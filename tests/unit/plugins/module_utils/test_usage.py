# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pathlib
import shutil

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._pci import read_functions
from ansible_collections.iommufd.host.plugins.module_utils._usage import all_uses, survey_uses, uses
from ansible_collections.iommufd.host.tests.unit.machine import Machine

DISK = "0000:03:00.0"
OTHER = "0000:05:00.0"
NIC = "0000:04:00.0"


def reasons(machine: Machine, address: str) -> list[tuple[str, str, str]]:
    return [(use.kind, use.name, use.detail) for use in uses(machine.host, address)]


def disks(machine: Machine) -> None:
    for address, name in ((DISK, "nvme0n1"), (OTHER, "nvme1n1")):
        machine.pci(address, "1b36:0010", "010802", driver="nvme")
        machine.disk(name, address)


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_free_disk(machine: Machine) -> None:
    disks(machine)
    machine.mounts(("0:22", "/run", "tmpfs", "tmpfs"))
    assert all_uses(machine.host) == {}


def test_the_root_disk_is_vital(machine: Machine) -> None:
    disks(machine)
    machine.partition("nvme0n1", "nvme0n1p2")
    machine.mounts((machine.number("nvme0n1p2"), "/", "ext4", "/dev/nvme0n1p2"))
    (use,) = uses(machine.host, DISK)
    assert (use.kind, use.name) == ("mount", "/")
    assert use.detail == "nvme0n1 > nvme0n1p2 is mounted on /, the host's root filesystem"
    assert use.vital
    assert uses(machine.host, OTHER) == []


def test_through_raid_lvm_and_encryption(machine: Machine) -> None:
    disks(machine)
    machine.partition("nvme0n1", "nvme0n1p1")
    machine.block("md0")
    machine.stack("nvme0n1p1", "md0")
    machine.stack("nvme1n1", "md0")
    volume = machine.block("dm-0")
    machine.attributes(f"{volume}/dm", name="data-srv", uuid="LVM-abc")
    machine.stack("md0", "dm-0")
    secret = machine.block("dm-1")
    machine.attributes(f"{secret}/dm", name="secret", uuid="CRYPT-LUKS2-def-secret")
    machine.stack("dm-0", "dm-1")
    machine.mounts((machine.number("dm-1"), "/srv/my\\040data", "xfs", "/dev/mapper/secret"))
    chain = "nvme1n1 > md0"
    assert reasons(machine, OTHER) == [
        ("raid", "md0", f"{chain} is the RAID array md0"),
        ("lvm", "data-srv", f"{chain} > data-srv is the LVM volume data-srv"),
        ("crypt", "secret", f"{chain} > data-srv > secret is the encrypted volume secret"),
        ("mount", "/srv/my data", f"{chain} > data-srv > secret is mounted on /srv/my data"),
    ]
    assert [use[0] for use in reasons(machine, DISK)] == ["raid", "lvm", "crypt", "mount"]
    assert not any(use.vital for use in uses(machine.host, DISK))


def test_only_slaves_are_recorded(machine: Machine) -> None:
    disks(machine)
    machine.block("md0")
    machine.stack("nvme0n1", "md0")
    shutil.rmtree(machine.at(f"{machine.paths['nvme0n1']}/holders"))
    assert reasons(machine, DISK) == [("raid", "md0", "nvme0n1 > md0 is the RAID array md0")]


def test_multipath(machine: Machine) -> None:
    disks(machine)
    mapped = machine.block("dm-0")
    machine.attributes(f"{mapped}/dm", name="mpatha", uuid="mpath-3600")
    part = machine.block("dm-1")
    machine.attributes(f"{part}/dm", name="mpatha-part1", uuid="part1-mpath-3600")
    machine.stack("nvme0n1", "dm-0")
    machine.stack("nvme1n1", "dm-0")
    machine.stack("dm-0", "dm-1")
    for address in (DISK, OTHER):
        assert [use[:2] for use in reasons(machine, address)] == [
            ("multipath", "mpatha"),
            ("multipath", "mpatha-part1"),
        ]


@pytest.mark.parametrize(
    "path", ["/dev/nvme0n1", "/dev/mapper/vg--a-swap", "/dev/vg-a/swap", "/dev/disk/by-id/one", "/dev/dm-0"]
)
def test_swap_by_every_name(machine: Machine, path: str) -> None:
    disks(machine)
    volume = machine.block("dm-0")
    machine.attributes(f"{volume}/dm", name="vg--a-swap", uuid="LVM-abc")
    machine.stack("nvme0n1", "dm-0")
    machine.file("/dev/nvme0n1", "")
    machine.link("/dev/disk/by-id/one", "/dev/nvme0n1")
    machine.file("/proc/swaps", f"Filename Type Size Used Priority\n{path} partition 1 0 -2\n/swapfile file 1 0 -3\n")
    assert ("swap", path) in [use[:2] for use in reasons(machine, DISK)]
    assert uses(machine.host, OTHER) == []


def test_btrfs_on_two_disks(machine: Machine) -> None:
    """mountinfo has an anonymous number and names one of the two."""
    disks(machine)
    for name in ("nvme0n1", "nvme1n1"):
        machine.link(f"/sys/fs/btrfs/1234-abcd/devices/{name}", machine.paths[name])
    machine.mounts(("0:41", "/", "btrfs", "/dev/nvme0n1"))
    for address, name in ((DISK, "nvme0n1"), (OTHER, "nvme1n1")):
        assert reasons(machine, address) == [("mount", "/", f"{name} is mounted on /, the host's root filesystem")]


def test_the_source_of_a_tmpfs_proves_nothing(machine: Machine) -> None:
    disks(machine)
    machine.mounts(
        ("0:30", "/tmp", "tmpfs", "/dev/nvme0n1"), ("0:31", "/", "overlay", "/dev/nvme1n1"), ("", "/x", "ext4", "")
    )
    assert all_uses(machine.host) == {}


def test_a_device_number_goes_before_the_source(machine: Machine) -> None:
    disks(machine)
    machine.mounts((machine.number("nvme1n1"), "/data", "ext4", "/dev/root"))
    assert [use[:2] for use in reasons(machine, OTHER)] == [("mount", "/data")]


def test_mounts_without_mountinfo(machine: Machine) -> None:
    disks(machine)
    machine.file("/proc/self/mounts", "/dev/nvme0n1 /data ext4 rw 0 0\nproc /proc proc rw 0 0\n")
    assert [use[:2] for use in reasons(machine, DISK)] == [("mount", "/data")]


def test_an_xfs_journal_elsewhere(machine: Machine) -> None:
    disks(machine)
    row = f"21 1 {machine.number('nvme0n1')} / /data rw - xfs /dev/nvme0n1 rw,logdev=/dev/nvme1n1,noquota\n"
    machine.file("/proc/self/mountinfo", row)
    assert [use[:2] for use in reasons(machine, OTHER)] == [("mount", "/data")]


def test_a_loop_device_on_a_disk(machine: Machine) -> None:
    disks(machine)
    loop = machine.block("loop0")
    machine.file(f"{loop}/loop/backing_file", "/dev/nvme0n1\n")
    machine.mounts((machine.number("loop0"), "/image", "squashfs", "/dev/loop0"))
    assert reasons(machine, DISK) == [("mount", "/image", "nvme0n1 > loop0 is mounted on /image")]


def test_native_nvme_multipath(machine: Machine) -> None:
    """The disk stands below no PCI function; only its subsystem links to the controllers."""
    controller = f"{machine.pci(DISK, '144d:a808', '010802', driver='nvme')}/nvme/nvme0"
    machine.directory(controller)
    subsystem = "/sys/devices/virtual/nvme-subsystem/nvme-subsys0"
    machine.block("nvme0n1", f"{subsystem}/nvme0n1")
    machine.link(f"{subsystem}/nvme0", controller)
    machine.mounts((machine.number("nvme0n1"), "/", "ext4", "/dev/nvme0n1"))
    assert [use[:2] for use in reasons(machine, DISK)] == [("mount", "/")]


def test_a_disk_behind_a_vmd_uses_both(machine: Machine) -> None:
    machine.pci("0000:00:0e.0", "8086:9a0b", "010400", driver="vmd")
    machine.paths["port"] = f"{machine.paths['0000:00:0e.0']}/pci10000:e0"
    machine.pci("10000:e0:06.0", class_id="060400", driver="pcieport", below="port")
    machine.pci("10000:e1:00.0", "144d:a808", "010802", driver="nvme", below="10000:e0:06.0")
    machine.disk("nvme0n1", "10000:e1:00.0")
    machine.mounts((machine.number("nvme0n1"), "/", "ext4", "/dev/nvme0n1"))
    assert set(all_uses(machine.host)) == {"10000:e1:00.0", "0000:00:0e.0"}


def test_an_imported_zfs_pool(machine: Machine) -> None:
    disks(machine)
    machine.directory("/proc/spl/kstat/zfs/tank")
    machine.file(f"/run/udev/data/b{machine.number('nvme0n1')}", "E:ID_FS_TYPE=zfs_member\nE:ID_FS_LABEL=tank\n")
    machine.file(f"/run/udev/data/b{machine.number('nvme1n1')}", "E:ID_FS_TYPE=zfs_member\nE:ID_FS_LABEL=gone\n")
    assert reasons(machine, DISK) == [("zfs", "tank", "nvme0n1 belongs to the imported ZFS pool tank")]
    assert uses(machine.host, OTHER) == []


def test_a_disk_exported_by_the_kernel(machine: Machine) -> None:
    disks(machine)
    machine.file("/sys/kernel/config/target/core/iblock_0/store/udev_path", "/dev/nvme0n1\n")
    space = "/sys/kernel/config/nvmet/subsystems/nqn.x/namespaces/1"
    machine.attributes(space, device_path="/dev/nvme1n1", enable=1)
    assert [use[:2] for use in reasons(machine, DISK)] == [("export", "store")]
    assert [use[:2] for use in reasons(machine, OTHER)] == [("export", "nqn.x")]


# -- interfaces --------------------------------------------------------------------------------------------------------


def test_a_default_route_through_vlan_on_bridge_on_bond(machine: Machine) -> None:
    machine.pci(NIC, driver="ixgbe")
    machine.pci("0000:04:00.1", driver="ixgbe")
    machine.interface("eno1", NIC)
    machine.interface("eno2", "0000:04:00.1")
    machine.directory(f"{machine.interface('bond0')}/bonding")
    machine.directory(f"{machine.interface('br0')}/bridge")
    machine.interface("br0.7", kind="vlan")
    machine.enslave("eno1", "bond0")
    machine.enslave("bond0", "br0")
    machine.enslave("br0", "br0.7")
    machine.routes(("br0.7", "0.0.0.0", "10.7.0.1", "0.0.0.0"), ("br0.7", "10.7.0.0", "0.0.0.0", "255.255.255.0"))
    machine.file(
        "/proc/net/fib_trie", "Local:\n  |-- 10.7.0.9\n     /32 host LOCAL\n  |-- 10.7.0.0\n     /24 link UNICAST\n"
    )
    way = "eno1 > bond0 > br0 > br0.7"
    assert reasons(machine, NIC) == [
        ("bond", "bond0", "eno1 > bond0: part of the bond bond0"),
        ("bridge", "br0", "eno1 > bond0 > br0: part of the bridge br0"),
        ("vlan", "br0.7", f"{way}: part of the VLAN br0.7"),
        ("address", "10.7.0.9", f"{way} has the address 10.7.0.9"),
        ("route", "default", f"{way} carries the host's default route"),
        ("route", "10.7.0.0/24", f"{way} carries the route to 10.7.0.0/24"),
    ]
    assert uses(machine.host, "0000:04:00.1") == []


@pytest.mark.parametrize(
    ("kind", "name"),
    [("macvtap", "macvtap0"), ("vlan", "x.5"), ("macvlan", "mv0"), ("ovs", "ovs-system"), ("team", "team0")],
)
def test_what_can_stand_on_an_interface(machine: Machine, kind: str, name: str) -> None:
    machine.pci(NIC, driver="ixgbe")
    machine.interface("eno1", NIC)
    machine.interface(name, kind=kind if kind not in ("ovs", "team") else None)
    machine.enslave("eno1", name)
    assert [use[:2] for use in reasons(machine, NIC)] == [(kind, name)]


def test_only_the_master_is_recorded(machine: Machine) -> None:
    machine.pci(NIC, driver="ixgbe")
    path = machine.interface("eno1", NIC)
    machine.directory(f"{machine.interface('br0')}/bridge")
    machine.link(f"{path}/master", machine.paths["br0"])
    assert [use[:2] for use in reasons(machine, NIC)] == [("bridge", "br0")]


def test_ipv6(machine: Machine) -> None:
    """A link-local address and its routes are there on every interface that is up, and are no use."""
    machine.pci(NIC, driver="ixgbe")
    machine.pci("0000:04:00.1", driver="ixgbe")
    machine.interface("eno1", NIC)
    machine.interface("eno2", "0000:04:00.1")
    machine.file(
        "/proc/net/if_inet6",
        "fe800000000000000000000000000001 02 40 20 80     eno1\n"
        "fe800000000000000000000000000002 03 40 20 80     eno2\n"
        "20010db8000000000000000000000002 03 40 00 80     eno2\n",
    )
    zero, none = "0" * 32, "00000000"
    rows = [
        (f"fe80{'0' * 28}", "40", none, "00000001", "eno1"),
        (f"ff00{'0' * 28}", "08", none, "00000001", "eno1"),
        ("20010db8000000000000000000000002", "80", none, "80200001", "eno2"),
        ("20010db8000000000000000000000000", "40", none, "00000001", "eno2"),
        (zero, "00", none, "00450003", "eno2"),
        (zero, "00", none, "00200200", "lo"),
    ]
    text = "".join(
        f"{to} {size} {zero} 00 {zero} {metric} {none} {none} {flags} {name}\n"
        for to, size, metric, flags, name in rows
    )
    machine.file("/proc/net/ipv6_route", text)
    assert uses(machine.host, NIC) == []
    assert [use[:2] for use in reasons(machine, "0000:04:00.1")] == [
        ("address", "2001:db8::2"),
        ("route", "default (IPv6)"),
        ("route", "2001:db8::/64"),
    ]


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_the_console(machine: Machine) -> None:
    machine.pci("0000:00:02.0", "8086:1234", "030000", driver="i915", boot_vga=1)
    machine.pci("0000:01:00.0", "10de:2204", "030000", driver="vfio-pci", boot_vga=1)
    machine.pci("0000:02:00.0", "10de:2204", "030000", boot_vga=0)
    assert {address: [use.kind for use in found] for address, found in all_uses(machine.host).items()} == {
        "0000:00:02.0": ["console"]
    }


def test_a_running_guest_and_its_devices(machine: Machine) -> None:
    machine.pci("0000:01:00.0", driver="vfio-pci", group=7)
    machine.cdev("0000:01:00.0", 2, "511:2")
    machine.pci("0000:02:00.0", driver="vfio-pci", group=8)
    machine.pci("0000:02:00.1", driver=None, group=8)
    machine.process(
        77,
        "qemu-system-x86",
        ["/usr/bin/qemu-system-x86_64", "-name", "guest=web,,1,debug-threads=on"],
        ["/dev/null", "/dev/iommu", "/dev/vfio/devices/vfio2", "/dev/kvm", "/dev/vfio/8", "anon_inode:kvm-vm"],
    )
    functions = read_functions(machine.host)
    found, guests = survey_uses(machine.host, functions)
    assert {address: [(use.kind, use.name) for use in some] for address, some in found.items()} == {
        "0000:01:00.0": [("guest", "web,1")],
        "0000:02:00.0": [("guest", "web,1")],
    }
    assert (
        found["0000:01:00.0"][0].detail
        == "the running guest web,1 (qemu-system-x86_64, process 77) has /dev/vfio/devices/vfio2 open"
    )
    assert [(guest.name, guest.process, guest.devices) for guest in guests] == [
        ("web,1", 77, ["0000:01:00.0", "0000:02:00.0"])
    ]
    assert guests[0].nodes == ["/dev/iommu", "/dev/kvm", "/dev/vfio/8", "/dev/vfio/devices/vfio2"]


def test_a_process_with_a_device_open(machine: Machine) -> None:
    path = machine.pci("0000:01:00.0", driver="uio_pci_generic")
    machine.pci("0000:02:00.0", "10de:2204", "030200", driver="nvidia")
    machine.file("/proc/driver/nvidia/gpus/0000:02:00.0/information", "Model: A2\nDevice Minor: \t 1\n")
    machine.process(5, "dpdk-testpmd", ["dpdk-testpmd"], [f"{path}/resource0"])
    machine.process(6, "python3", ["python3"], ["/dev/nvidia1", "/dev/nvidiactl", "/dev/tty"])
    serial = machine.pci("0000:03:00.0", "1c00:3253", "070002", driver="serial")
    machine.link("/sys/class/tty/ttyS4", f"{serial}/tty/ttyS4")
    machine.file(f"{serial}/tty/ttyS4/dev", "4:68\n")
    machine.process(7, "upsd", ["upsd"], ["/dev/ttyS4"])
    assert reasons(machine, "0000:01:00.0") == [
        ("open", "dpdk-testpmd", f"the process dpdk-testpmd (5) has {path}/resource0 open")
    ]
    assert [use[:2] for use in reasons(machine, "0000:02:00.0")] == [("open", "python3")]
    assert [use[:2] for use in reasons(machine, "0000:03:00.0")] == [("open", "upsd")]


def test_a_physical_function_is_used_through_its_virtual_ones(machine: Machine) -> None:
    physical = machine.pci(NIC, driver="igb", sriov_totalvfs=7, sriov_numvfs=3)
    for index, driver in enumerate(("vfio-pci", "igbvf", "igbvf")):
        address = f"0000:04:10.{index}"
        path = machine.pci(address, "8086:10ca", driver=driver)
        machine.link(f"{path}/physfn", physical)
        machine.link(f"{physical}/virtfn{index}", path)
    machine.interface("vf1", "0000:04:10.1")
    machine.directory(f"{machine.interface('br0')}/bridge")
    machine.enslave("vf1", "br0")
    assert reasons(machine, NIC) == [
        ("vfs", "0000:04:10.0", "its VF 0000:04:10.0 is kept for guests on vfio-pci"),
        ("vfs", "0000:04:10.1", "its VF 0000:04:10.1 is in use: vf1 > br0: part of the bridge br0"),
    ]
    assert uses(machine.host, "0000:04:10.2") == []


def test_a_mediated_device(machine: Machine) -> None:
    path = machine.pci("0000:02:00.0", "10de:2204", "030200", driver="nvidia")
    machine.directory(f"{path}/8f3d")
    machine.link("/sys/bus/mdev/devices/8f3d", f"{path}/8f3d")
    assert reasons(machine, "0000:02:00.0") == [("mdev", "8f3d", "the mediated device 8f3d stands on it")]


def test_a_real_machine(vgpu_node: pathlib.Path) -> None:
    """The recording has no /proc: the root filesystem and the routes are lent to it."""
    machine = Machine(vgpu_node)
    try:
        machine.mounts(("8:4", "/", "ext4", "/dev/sda4"), ("0:25", "/proc", "proc", "proc"))
        machine.routes(("mgmt-br", "0.0.0.0", "192.168.1.1", "0.0.0.0"))
        found = all_uses(Host(str(vgpu_node)))
    finally:
        shutil.rmtree(vgpu_node / "proc")
    mediated = {
        "0000:08:00.4": [("mdev", "f715f63c-0d00-4007-9c5a-b07b0c6c05de")],
        "0000:08:00.6": [("mdev", "3deab9a4-200a-4c54-99b1-5eb0722d1d81")],
        "0000:08:02.0": [("mdev", "c728e022-f16f-434b-ad2c-9665ee634d3d")],
        "0000:08:00.0": [("vfs", "0000:08:00.4"), ("vfs", "0000:08:00.6"), ("vfs", "0000:08:02.0")],
    }
    assert {address: [(use.kind, use.name) for use in some] for address, some in found.items()} == {
        "0000:01:00.1": [("console", "display"), ("console", "fb0")],
        "0000:03:00.0": [("mount", "/")],
        **mediated,
        "0000:04:00.1": [("bond", "mgmt-bo"), ("bridge", "mgmt-br"), ("route", "default"), ("upper", "flannel.1")],
    }
    assert found["0000:03:00.0"][0].detail == "sda > sda4 is mounted on /, the host's root filesystem"
    assert found["0000:04:00.1"][2].detail == "eno50 > mgmt-bo > mgmt-br carries the host's default route"
