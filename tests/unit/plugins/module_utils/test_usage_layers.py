# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import struct
import subprocess
import time
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _network, _storage, _usage
from ansible_collections.iommufd.host.plugins.module_utils._host import Host, Output
from ansible_collections.iommufd.host.plugins.module_utils._network import Network, ask_interfaces, other_namespaces
from ansible_collections.iommufd.host.plugins.module_utils._openvswitch import parse_database
from ansible_collections.iommufd.host.plugins.module_utils._usage import all_uses, survey_uses, uses
from ansible_collections.iommufd.host.plugins.module_utils._zfs import parse_cache, parse_list
from ansible_collections.iommufd.host.tests.unit.machine import Machine

DISK, OTHER, NIC = "0000:01:00.0", "0000:02:00.0", "0000:04:00.0"


@pytest.fixture
def disks(machine: Machine) -> Machine:
    for address, name in ((DISK, "nvme0n1"), (OTHER, "nvme1n1")):
        machine.pci(address, "144d:a808", "010802", driver="nvme")
        machine.disk(name, address)
    return machine


def details(machine: Machine, address: str) -> list[tuple[str, str]]:
    return [(use.kind, use.detail) for use in uses(machine.host, address)]


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_file_mounted_by_loop_is_on_the_innermost_filesystem(disks: Machine) -> None:
    """The root filesystem of a host that starts from an image: the disk below is what it stands on."""
    disks.partition("nvme0n1", "nvme0n1p3")
    loop = disks.block("loop0")
    disks.file(f"{loop}/loop/backing_file", "/run/state/images/active.img\n")
    disks.mounts(
        (disks.number("loop0"), "/", "ext2", "/dev/loop0"),
        (disks.number("nvme1n1"), "/run", "ext4", "/dev/nvme1n1"),
        (disks.number("nvme0n1p3"), "/run/state", "ext4", "/dev/nvme0n1p3"),
    )
    assert details(disks, DISK) == [
        ("mount", "nvme0n1 > nvme0n1p3 is mounted on /run/state"),
        ("mount", "nvme0n1 > nvme0n1p3 > loop0 is mounted on /, the host's root filesystem"),
    ]
    assert details(disks, OTHER) == [("mount", "nvme1n1 is mounted on /run")]


def test_a_loop_device_that_would_carry_itself(disks: Machine) -> None:
    loop = disks.block("loop0")
    disks.file(f"{loop}/loop/backing_file", "/image\n")
    disks.mounts((disks.number("loop0"), "/", "ext2", "/dev/loop0"))
    assert all_uses(disks.host) == {}


def test_a_swap_file(disks: Machine) -> None:
    disks.mounts((disks.number("nvme0n1"), "/", "ext4", "/dev/nvme0n1"))
    disks.file("/proc/swaps", "Filename Type Size Used Priority\n/swap\\040file file 1024 0 -2\n")
    assert ("swap", "nvme0n1 carries the swap file /swap file") in details(disks, DISK)


def test_the_system_as_an_overlay(disks: Machine) -> None:
    """The layers are found by the mounts that they lie in; an overlay of a container says nothing."""
    options = "rw,lowerdir=/run/lower,upperdir=/run/state/upper,workdir=/run/state/work"
    disks.file(
        "/proc/self/mountinfo",
        f"20 1 0:30 / / rw - overlay overlay {options}\n"
        f"21 1 {disks.number('nvme0n1')} / /run/lower ro - squashfs /dev/nvme0n1 ro\n"
        f"22 1 {disks.number('nvme1n1')} / /run/state rw - ext4 /dev/nvme1n1 rw\n"
        "23 1 0:31 / /var/lib/docker/overlay2/x rw - overlay overlay rw,lowerdir=/run/lower\n",
    )
    for address in (DISK, OTHER):
        assert [use.name for use in uses(disks.host, address) if use.vital] == ["/"]
        assert not any("docker" in use.name for use in uses(disks.host, address))


@pytest.mark.parametrize("path", ["/proc/1/mountinfo", "/proc/1/mounts", "/proc/mounts", "/proc/self/mounts"])
def test_mounts_wherever_the_tree_has_them(disks: Machine, path: str) -> None:
    row = "/dev/nvme0n1 /data ext4 rw 0 0\n"
    if path.endswith("mountinfo"):
        row = f"21 1 {disks.number('nvme0n1')} / /data rw - ext4 /dev/nvme0n1 rw\n"
    disks.file(path, row)
    assert details(disks, DISK) == [("mount", "nvme0n1 is mounted on /data")]


def test_a_source_that_only_udev_knows(disks: Machine) -> None:
    """A tree without /dev; /dev/root is what the kernel's command line says."""
    disks.file(f"/run/udev/data/b{disks.number('nvme0n1')}", "S:disk/by-uuid/12-34\nE:ID_FS_TYPE=ext4\n")
    disks.file(f"/run/udev/data/b{disks.number('nvme1n1')}", "S:disk/by-label/data\n")
    disks.file("/proc/cmdline", "quiet root=UUID=12-34 ro\n")
    disks.file("/proc/mounts", "/dev/root / ext4 rw 0 0\n/dev/disk/by-label/data /data ext4 rw 0 0\n")
    assert details(disks, DISK) == [("mount", "nvme0n1 is mounted on /, the host's root filesystem")]
    assert details(disks, OTHER) == [("mount", "nvme1n1 is mounted on /data")]


def test_an_array_that_only_mdstat_shows(disks: Machine) -> None:
    disks.block("md127")
    disks.file(
        "/proc/mdstat", "Personalities : [raid1]\nmd127 : active raid1 nvme1n1[1] nvme0n1[0](W)\n      1 blocks\n"
    )
    for address, name in ((DISK, "nvme0n1"), (OTHER, "nvme1n1")):
        assert details(disks, address) == [("raid", f"{name} > md127 is the RAID array md127")]


def test_a_cache_device_of_bcache(disks: Machine) -> None:
    """One that caches nothing yet has no device above it."""
    disks.link(f"{disks.paths['nvme0n1']}/bcache/set", "/sys/fs/bcache/1234-5678")
    cached = disks.block("bcache0")
    disks.stack("nvme1n1", "bcache0")
    assert cached
    assert details(disks, DISK) == [("bcache", "nvme0n1 belongs to the bcache set 1234-5678")]
    assert details(disks, OTHER) == [("bcache", "nvme1n1 > bcache0 is the cached device bcache0")]


def test_a_tree_with_the_older_class_only(machine: Machine) -> None:
    machine.pci(DISK, driver="nvme")
    path = f"{machine.paths[DISK]}/nvme/nvme0/nvme0n1"
    machine.file(f"{path}/dev", "259:0\n")
    machine.file(f"{path}/nvme0n1p1/dev", "259:1\n")
    machine.file(f"{path}/nvme0n1p1/partition", "1\n")
    machine.link("/sys/block/nvme0n1", path)
    machine.mounts(("259:1", "/", "ext4", "/dev/nvme0n1p1"))
    assert [kind for kind, _detail in details(machine, DISK)] == ["mount"]


def test_native_nvme_multipath_without_its_links(machine: Machine) -> None:
    for address, controller, name in ((DISK, "nvme0", "nvme0c0n1"), (OTHER, "nvme3", "nvme0c3n1")):
        machine.pci(address, driver="nvme")
        path = f"{machine.paths[address]}/nvme/{controller}"
        machine.directory(f"{path}/{name}")
        machine.link(f"/sys/class/nvme/{controller}", path)
    machine.block("nvme0n1", "/sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1")
    machine.mounts((machine.number("nvme0n1"), "/", "ext4", "/dev/nvme0n1"))
    assert set(all_uses(machine.host)) == {DISK, OTHER}


def test_a_usb_disk_uses_the_usb_controller(machine: Machine) -> None:
    machine.pci("0000:00:14.0", "8086:a36d", "0c0330", driver="xhci_hcd")
    machine.block("sdb", f"{machine.paths['0000:00:14.0']}/usb2/2-1/2-1:1.0/host6/target6:0:0/6:0:0:0/block/sdb")
    machine.partition("sdb", "sdb1")
    machine.mounts((machine.number("sdb1"), "/media/stick", "vfat", "/dev/sdb1"))
    assert details(machine, "0000:00:14.0") == [("mount", "sdb > sdb1 is mounted on /media/stick")]


# -- ZFS ---------------------------------------------------------------------------------------------------------------


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">I", len(data)) + data + b"\0" * (-len(data) % 4)


def pair(name: str, kind: int, count: int, value: bytes) -> bytes:
    body = string(name) + struct.pack(">II", kind, count) + value
    return struct.pack(">II", len(body) + 8, len(body) + 8) + body


def nvlist(*pairs: bytes) -> bytes:
    return struct.pack(">II", 0, 1) + b"".join(pairs) + bytes(8)


def cache(pool: str, *paths: str) -> bytes:
    """zpool.cache with one pool: a mirror of some disks, as libnvpair encodes it."""
    leaves = [
        nvlist(pair("type", 9, 1, string("disk")), pair("id", 8, 1, bytes(8)), pair("path", 9, 1, string(path)))
        for path in paths
    ]
    mirror = nvlist(pair("type", 9, 1, string("mirror")), pair("children", 20, len(leaves), b"".join(leaves)))
    tree = nvlist(pair("type", 9, 1, string("root")), pair("children", 20, 1, mirror))
    config = nvlist(pair("name", 9, 1, string(pool)), pair("vdev_tree", 19, 1, tree))
    return b"\1\1\0\0" + nvlist(pair(pool, 19, 1, config))


def test_the_disks_in_zpool_cache() -> None:
    content = cache("tank", "/dev/sda1", "/dev/disk/by-id/nvme-x-part1")
    assert parse_cache(content) == [("tank", "/dev/sda1"), ("tank", "/dev/disk/by-id/nvme-x-part1")]
    for cut in range(len(content)):
        assert set(parse_cache(content[:cut])) <= set(parse_cache(content))


def test_the_disks_that_zpool_lists() -> None:
    text = "tank\t1G\t0\n\tmirror-0\t1G\n\t/dev/sda1\t-\n\t/dev/sdb1\t-\nother\t1G\n\t/dev/sdc\t1G\n"
    assert parse_list(text) == [("tank", "/dev/sda1"), ("tank", "/dev/sdb1"), ("other", "/dev/sdc")]


def test_a_root_filesystem_on_zfs(disks: Machine) -> None:
    """Without udev's database; the cache also names a pool that is not imported."""
    disks.file("/etc/zfs/zpool.cache", cache("rpool", "/dev/nvme0n1"))
    disks.mounts(("0:29", "/", "zfs", "rpool/ROOT/system"), ("0:30", "/home", "zfs", "rpool/home"))
    assert details(disks, DISK) == [
        ("zfs", "nvme0n1 belongs to the imported ZFS pool rpool"),
        (
            "mount",
            "nvme0n1 belongs to the ZFS pool rpool: rpool/ROOT/system is mounted on /, the host's root filesystem",
        ),
        ("mount", "nvme0n1 belongs to the ZFS pool rpool: rpool/home is mounted on /home"),
    ]
    assert uses(disks.host, OTHER) == []
    disks.file("/etc/zfs/zpool.cache", cache("gone", "/dev/nvme1n1"))
    assert uses(disks.host, OTHER) == []


# -- interfaces --------------------------------------------------------------------------------------------------------


def ovsdb(*transactions: dict[str, object]) -> bytes:
    records = [json.dumps(one).encode() for one in transactions]
    return b"".join(b"OVSDB JSON %d %s\n%s\n" % (len(one) + 1, b"0" * 40, one) for one in records)


BRIDGE = ovsdb(
    {"name": "Open_vSwitch", "tables": {}},
    {
        "Bridge": {"b": {"name": "br-ex", "ports": ["set", [["uuid", "p1"], ["uuid", "p0"]]]}},
        "Port": {"p0": {"name": "br-ex", "interfaces": ["uuid", "i0"]}, "p1": {"interfaces": ["uuid", "i1"]}},
        "Interface": {"i0": {"name": "br-ex"}, "i1": {"name": "eno1"}},
    },
    {
        "_is_diff": True,
        "Bridge": {"b": {"ports": ["set", [["uuid", "p1"], ["uuid", "p2"]]]}},
        "Port": {"p1": None, "p2": {"interfaces": ["set", [["uuid", "i2"], ["uuid", "i3"]]]}},
        "Interface": {"i1": None, "i2": {"name": "eno2"}, "i3": {"name": "eno3"}},
    },
)


def test_the_bridges_of_open_vswitch() -> None:
    assert {name: sorted(ports) for name, ports in parse_database(BRIDGE).items()} == {
        "br-ex": ["br-ex", "eno2", "eno3"]
    }
    for cut in range(0, len(BRIDGE), 7):
        parse_database(BRIDGE[:cut])
    assert parse_database(b"\0\xff" * 99) == {}


def test_a_port_of_open_vswitch(machine: Machine) -> None:
    """The address is the bridge's, which nothing in sysfs connects with its port."""
    machine.pci(NIC, driver="ixgbe")
    machine.interface("eno2", NIC)
    machine.interface("ovs-system")
    machine.interface("br-ex")
    machine.enslave("eno2", "ovs-system")
    machine.file("/etc/openvswitch/conf.db", BRIDGE)
    machine.routes(("br-ex", "0.0.0.0", "10.0.0.1", "0.0.0.0"))
    assert details(machine, NIC) == [
        ("ovs", "eno2 > br-ex: part of the Open vSwitch bridge br-ex"),
        ("route", "eno2 > br-ex carries the host's default route"),
        ("ovs", "eno2 > ovs-system: part of the Open vSwitch datapath ovs-system"),
    ]


def test_a_vlan_that_only_procfs_shows(machine: Machine) -> None:
    machine.pci(NIC, driver="ixgbe")
    machine.interface("eno1", NIC)
    machine.interface("storage")
    machine.file(
        "/proc/net/vlan/config",
        "VLAN Dev name\t | VLAN ID\nName-Type: VLAN_NAME_TYPE_RAW_PLUS_VID_NO_PAD\nstorage        | 7  | eno1\n",
    )
    machine.file("/proc/net/vlan/storage", "storage  VID: 7\n")
    assert details(machine, NIC) == [("vlan", "eno1 > storage: part of the VLAN storage")]


def test_a_team_with_a_name_of_its_own(machine: Machine) -> None:
    machine.pci(NIC, driver="ixgbe")
    machine.interface("eno1", NIC)
    machine.interface("uplink")
    machine.enslave("eno1", "uplink")
    assert [kind for kind, _detail in details(machine, NIC)] == ["upper"]
    machine.file("/run/teamd/uplink.pid", "7\n")
    assert [kind for kind, _detail in details(machine, NIC)] == ["team"]


def test_addresses_beneath_another_process(machine: Machine) -> None:
    """/proc/net is a link to self/net; a captured tree may have the directory of process 1 alone."""
    machine.pci(NIC, driver="ixgbe")
    machine.interface("eno1", NIC)
    machine.file("/proc/1/net/if_inet6", f"2001{'0' * 27}1 02 40 00 80 eno1\n")
    assert details(machine, NIC) == [("address", "eno1 has the address 2001::1")]


# -- displays, mediated devices, processes -----------------------------------------------------------------------------


def test_a_tree_without_classes_and_buses(machine: Machine) -> None:
    display = machine.pci("0000:01:00.0", "102b:0533", "030000", driver="mgag200")
    machine.directory(f"{display}/graphics/fb0")
    card = machine.pci("0000:02:00.0", "10de:25b6", "030200", driver="nvidia")
    machine.file(f"{card}/c728e022-f16f-434b-ad2c-9665ee634d3d/mdev_type/name", "A2-2Q\n")
    assert {address: [use.kind for use in some] for address, some in all_uses(machine.host).items()} == {
        "0000:01:00.0": ["console"],
        "0000:02:00.0": ["mdev"],
    }


def test_open_files_by_name_alone(disks: Machine) -> None:
    """A captured descriptor is a link that leads nowhere."""
    card = disks.pci("0000:05:00.0", "1002:73bf", "030000", driver="amdgpu")
    disks.link("/sys/class/drm/renderD128", f"{card}/drm/renderD128")
    disks.directory(f"{card}/drm/renderD128")
    disks.process(5, "ceph-osd", ["ceph-osd"], ["/dev/nvme0n1"])
    disks.process(6, "ollama", ["ollama"], ["/dev/dri/renderD128", "/dev/net/tun", "/dev/null"])
    assert details(disks, DISK) == [("open", "the process ceph-osd (5) has /dev/nvme0n1 open")]
    assert details(disks, "0000:05:00.0") == [("open", "the process ollama (6) has /dev/dri/renderD128 open")]


def test_a_captured_guest_with_the_number_of_the_process_that_reads(machine: Machine) -> None:
    machine.process(os.getpid(), "qemu-system-x86", ["/usr/bin/qemu-system-x86_64", "-name", "same"], [])
    assert [guest.name for guest in survey_uses(machine.host, [])[1]] == ["same"]


def test_a_guest_that_has_nothing_open(machine: Machine) -> None:
    machine.process(7, "qemu-system-x86", ["/usr/bin/qemu-system-x86_64", "-name", "plain"], [])
    machine.process(8, "qemu-nbd", ["qemu-nbd"], [])
    machine.process(9, "bash", ["bash"], [])
    guests = survey_uses(machine.host, [])[1]
    assert [(guest.name, guest.nodes, guest.devices) for guest in guests] == [("plain", [], [])]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to enter another network namespace")
def test_the_interfaces_of_another_namespace() -> None:
    """On this very host: a process in a namespace of its own, which has nothing but a loopback interface."""
    host = Host()
    if any(host.which(program) is None for program in ("unshare", "nsenter", "ip")):
        pytest.skip("unshare, nsenter or ip is not installed")
    with subprocess.Popen(["unshare", "--net", "sleep", "60"]) as process:
        try:
            path = f"/proc/{process.pid}/ns/net"
            deadline = time.monotonic() + 30
            while os.stat(path).st_ino == os.stat("/proc/self/ns/net").st_ino and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            if process.poll() is not None:
                pytest.skip("a namespace cannot be made here")
            assert other_namespaces(host)[path] == f"the network namespace of process {process.pid}"
            assert list(ask_interfaces(host, path)) == ["lo"]
        finally:
            process.kill()


def test_the_way_of_this_connection_is_asked_with_its_own_address(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule sends what comes from the management address another way than the default route."""

    class Live(Host):
        def ask(self, argv: t.Sequence[str], timeout: float = 30.0, stdin: str = "") -> Output | None:
            if argv[:4] != ["ip", "-j", "route", "get"]:
                return None
            return Output(0, json.dumps([{"dev": "mgmt0" if argv[5:] == ["from", "192.0.2.7"] else "ens3f0"}]), "")

    monkeypatch.setattr(_network, "_ssh_connection", lambda host: "198.51.100.9 50000 192.0.2.7 22")
    assert Network(Live(machine.host.root)).connection == ("mgmt0", "198.51.100.9")


def test_the_root_of_a_container_is_not_the_hosts(disks: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = disks.number("nvme0n1"), disks.number("nvme1n1")
    disks.mounts((own, "/", "ext4", "/dev/nvme0n1"))
    disks.file("/proc/swaps", "Filename Type Size Used Priority\n/swap.img file 1 0 -2\n")
    there = f"9 1 {other} / / rw - ext4 /dev/nvme1n1 rw\n8 1 {own} / /host rw - ext4 /dev/nvme0n1 rw\n"
    for process, name, vital in (("7", "/ in another mount namespace", False), ("1", "/", True)):
        monkeypatch.setattr(_storage, "_other_namespaces", lambda host, process=process: [(process, there)])
        mounts = [use for use in uses(disks.host, OTHER) if use.kind == "mount"]
        assert [(use.name, use.vital) for use in mounts] == [(name, vital)]
        if not vital:
            assert [(use.kind, use.name) for use in uses(disks.host, DISK)] == [("mount", "/"), ("swap", "/swap.img")]


def test_an_interface_that_may_be_anywhere_counts_as_used(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.pci(NIC, driver="igb")
    for count, kinds in ((_network.MOST_NAMESPACES - 1, []), (_network.MOST_NAMESPACES, ["namespace"])):
        namespaces = {f"/proc/{number}/ns/net": "somebody" for number in range(count)}
        monkeypatch.setattr(_usage, "other_namespaces", lambda host, namespaces=namespaces: namespaces)
        assert [use.kind for use in uses(machine.host, NIC)] == kinds
