# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import pathlib
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._libvirt import (
    can_pass,
    parse_capabilities,
    read_libvirt_facts,
)
from ansible_collections.iommufd.host.plugins.module_utils._security import read_memlock, read_security
from ansible_collections.iommufd.host.plugins.module_utils._survey import survey
from ansible_collections.iommufd.host.tests.unit.machine import Machine

CONTRACT = {
    "address",
    "vendor_id",
    "device_id",
    "subsystem_vendor_id",
    "subsystem_device_id",
    "class_id",
    "driver",
    "driver_override",
    "iommu_group",
    "numa_node",
    "vfio_device",
    "sriov",
    "in_use",
}


def furnish(machine: Machine) -> None:
    """A machine with a piece of everything."""
    machine.pci("0000:00:02.0", class_id="060400", driver="pcieport", group=1)
    machine.pci("0000:01:00.0", driver="nvme", class_id="010802", group=2, below="0000:00:02.0", resource="0x0 0x0 0x0")
    machine.disk("nvme0n1", "0000:01:00.0")
    machine.partition("nvme0n1", "nvme0n1p1")
    mapped = machine.block("dm-0")
    machine.attributes(f"{mapped}/dm", name="vg-root", uuid="LVM-a")
    machine.stack("nvme0n1p1", "dm-0")
    physical = machine.pci("10000:02:00.0", driver="igb", group=3, sriov_totalvfs=7, sriov_numvfs=1, reset_method="flr")
    virtual = machine.pci("10000:02:10.0", driver="vfio-pci", group=4)
    machine.link(f"{virtual}/physfn", physical)
    machine.link(f"{physical}/virtfn0", virtual)
    machine.cdev("10000:02:10.0", 0, "511:0")
    machine.interface("eth0", "10000:02:00.0")
    machine.directory(f"{machine.interface('br0')}/bridge")
    machine.enslave("eth0", "br0")
    machine.mounts((machine.number("dm-0"), "/", "ext4", "/dev/mapper/vg-root"))
    machine.routes(("br0", "0.0.0.0", "10.0.0.1", "0.0.0.0"), ("br0", "10.0.0.0", "0.0.0.0", "255.0.0.0"))
    machine.file(
        "/proc/net/ipv6_route", f"{'0' * 32} 00 {'0' * 32} 00 {'0' * 32} 00000400 00000001 00000000 00000003 br0\n"
    )
    machine.file("/proc/net/if_inet6", f"2001{'0' * 27}1 02 40 00 80 br0\n")
    machine.file("/proc/net/fib_trie", "Local:\n  |-- 10.0.0.9\n     /32 host LOCAL\n")
    machine.file("/proc/swaps", "Filename Type Size Used Priority\n/dev/nvme0n1p1 partition 1 0 -2\n")
    machine.file("/proc/sys/kernel/osrelease", "6.12.95+deb13-amd64\n")
    machine.file("/proc/cmdline", "quiet intel_iommu=on\n")
    machine.file("/proc/cpuinfo", "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx\n\nprocessor: 1\n")
    machine.file("/proc/interrupts", "  1: 0 IR-PCI-MSI-0000:01:00.0 0-edge nvme0q0\n")
    machine.file("/proc/modules", "vfio 1 0 - Live 0x0\niommufd 1 0 - Live 0x0\n")
    machine.file("/proc/devices", "Character devices:\n511 vfio-dev\n")
    machine.directory("/sys/module/vfio")
    modules = "/usr/lib/modules/6.12.95+deb13-amd64"
    machine.file(f"{modules}/modules.dep", "kernel/drivers/vfio/vfio.ko.xz:\n")
    machine.file(f"{modules}/modules.alias", "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n")
    machine.file("/boot/config-6.12.95+deb13-amd64", "CONFIG_IOMMUFD=m\nCONFIG_VFIO_DEVICE_CDEV=y\n")
    machine.file("/etc/os-release", "ID=debian\nVERSION_ID=13\n")
    machine.file("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
    machine.file("/etc/group", "root:x:0:\n")
    machine.file("/etc/libvirt/qemu.conf", 'cgroup_device_acl = [ "/dev/null", "/dev/iommu" ]\n')
    machine.file(
        "/etc/security/limits.d/kvm.conf", "@kvm - memlock unlimited # guests\n* soft nofile 10\nx hard memlock 64\n"
    )
    machine.file("/etc/apparmor.d/abstractions/libvirt-qemu", "  /dev/kvm rw,\n")
    machine.file("/etc/apparmor.d/local/abstractions/libvirt-qemu", "/dev/iommu rw,\n")
    machine.file("/sys/module/apparmor/parameters/enabled", "Y\n")
    machine.file("/sys/fs/selinux/enforce", "0\n")
    machine.file("/sys/firmware/acpi/tables/DMAR", b"DMAR\0")
    machine.file("/sys/class/iommu/dmar0/intel-iommu/cap", "1\n")
    machine.file("/sys/kernel/iommu_groups/2/reserved_regions", "0x00000000fee00000 0x00000000feefffff msi\n")
    machine.file("/dev/iommu", "")
    machine.file("/dev/vfio/devices/vfio0", "")
    machine.process(9, "qemu-system-x86", ["qemu-system-x86_64", "-name", "vm"], ["/dev/vfio/devices/vfio0"])
    machine.file("/proc/9/status", "Name:\tqemu\nUid:\t64055\t64055\t64055\t64055\n")
    machine.file("/proc/9/limits", "Max locked memory         8388608              8388608              bytes\n")
    machine.file("/usr/bin/qemu-system-x86_64", b"\x7fELF")
    machine.file(f"/run/udev/data/b{machine.number('nvme0n1')}", "S:disk/by-id/one\nE:ID_FS_TYPE=zfs_member\n")
    machine.file("/etc/zfs/zpool.cache", b"\1\1\0\0" + bytes(8) + b"\0\0\0\x30" * 30)
    machine.file("/etc/openvswitch/conf.db", b'OVSDB JSON 16 0\n{"Bridge":{"b":{}}}\n')
    machine.file("/proc/spl/kstat/zfs/tank/state", "ONLINE\n")
    machine.file("/proc/mdstat", "md0 : active raid1 nvme0n1[0]\n")
    machine.file("/proc/misc", "124 iommu\n")
    machine.file("/proc/net/vlan/config", "VLAN Dev name | VLAN ID\nbr0 | 7 | eth0\n")
    machine.file("/boot/grub2/grubenv", "saved_entry=x\n")
    machine.file("/etc/systemd/system/libvirtd.service", "[Service]\nLimitMEMLOCK=64M:infinity\n")
    machine.file("/usr/lib/sysimage/rpm/rpmdb.sqlite", b"SQLite format 3\0" + bytes(100))
    machine.file("/installed-rpms", "libvirt-12.1.0-1.x86_64 x\n")
    machine.at("/usr/bin/qemu-system-x86_64").chmod(0o755)


def test_a_machine_with_everything(machine: Machine) -> None:
    furnish(machine)
    result = survey(machine.host)
    assert json.loads(json.dumps(result)) == result
    assert [device["address"] for device in result["devices"]] == [
        "0000:00:02.0",
        "0000:01:00.0",
        "10000:02:00.0",
        "10000:02:10.0",
    ]
    for device in result["devices"]:
        assert set(device) >= CONTRACT
    assert [use["kind"] for use in result["devices"][1]["in_use"]] == ["zfs", "swap", "lvm", "mount"]
    assert result["devices"][3]["vfio_drivers"] == ["vfio_pci"]
    assert result["groups"][1] == {
        "number": 2,
        "type": "DMA-FQ",
        "devices": ["0000:01:00.0"],
        "others": [],
        "reserved_regions": [{"start": "0xfee00000", "end": "0xfeefffff", "kind": "msi"}],
        "blocking": ["0000:01:00.0"],
        "vfio": [],
    }
    assert result["guests"] == [
        {
            "name": "vm",
            "process": 9,
            "program": "qemu-system-x86_64",
            "user": 64055,
            "locked_limit": 8388608,
            "nodes": ["/dev/vfio/devices/vfio0"],
            "devices": ["10000:02:10.0"],
        }
    ]
    assert result["kernel"]["config"]["options"]["IOMMUFD"] == "m"
    assert result["kernel"]["virtualization"] == "vmx"
    assert result["kernel"]["vfio_cdev"] is True
    assert result["iommu"]["interrupt_isolation"] is True
    assert result["iommu"]["firmware"] == "DMAR"
    assert result["libvirt"]["device_acl"] == ["/dev/null", "/dev/iommu"]
    assert result["security"] == {
        "apparmor": {"enabled": True, "libvirt_allows_iommu": True},
        "selinux": {"mode": "permissive", "booleans": {}, "contexts": {}},
    }
    assert result["memlock"] == [
        {"domain": "@kvm", "type": "-", "kib": None, "file": "/etc/security/limits.d/kvm.conf"},
        {"domain": "x", "type": "hard", "kib": 64, "file": "/etc/security/limits.d/kvm.conf"},
        {
            "domain": "libvirtd.service",
            "type": "unit",
            "kib": 65536,
            "file": "/etc/systemd/system/libvirtd.service",
        },
    ]


def test_an_empty_tree(machine: Machine) -> None:
    result = survey(machine.host)
    lacking = ("iommu", "nodes", "groups", "devices", "guests", "qemu", "libvirt", "memlock")
    assert {key: result[key] for key in lacking} == dict.fromkeys(lacking)
    assert {check["status"] for check in result["checks"]} == {"skip"}


def test_a_survey_changes_nothing(machine: Machine) -> None:
    furnish(machine)

    def picture() -> dict[str, tuple[int, int, int]]:
        found = {}
        for directory, names, files in os.walk(machine.root):
            for name in [*names, *files]:
                status = os.lstat(os.path.join(directory, name))
                found[os.path.join(directory, name)] = (status.st_mode, status.st_size, status.st_mtime_ns)
        return found

    before = picture()
    survey(machine.host)
    assert picture() == before


# What a damaged tree may hold in place of an attribute.
DAMAGE = st.one_of(
    st.just(b""),
    st.just(b"\0" * 64),
    st.just(b"\xff\xfe\x80" * 40),
    st.just(b"9" * 5000),
    st.just(b"0x" + b"f" * 300 + b"\n"),
    st.just(b"-1\n"),
    st.just(b"a" * (5 << 20)),
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(["gone", "directory", "unreadable", "loop", "dangling", "fifo", "huge", "truncated"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_a_damaged_tree_never_raises(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        machine = Machine(pathlib.Path(directory))
        furnish(machine)
        paths = sorted(path for path in machine.root.rglob("*") if path.is_file() or path.is_symlink())
        for path in data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=25, unique=True)):
            _damage(path, data.draw(DAMAGE))
        result = survey(machine.host)
    json.dumps(result)
    assert {check["status"] for check in result["checks"]} <= {"ok", "warn", "fail", "skip"}
    for device in result["devices"] or []:
        for number in (device["iommu_group"], device["numa_node"]):
            assert number is None or number >= 0


def _damage(path: pathlib.Path, how: bytes | str) -> None:
    if not os.path.lexists(path):  # something above it is damaged already
        return
    whole = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    path.unlink()
    if isinstance(how, bytes):
        path.write_bytes(how)
    elif how == "directory":
        path.mkdir()
    elif how == "unreadable":
        path.write_bytes(whole)
        path.chmod(0)
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "dangling":
        path.symlink_to("/no/such/thing")
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "huge":  # sparse: only reading it would cost
        path.write_bytes(whole)
        os.truncate(path, 1 << 30)
    elif how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("name", ["vgpu_node", "iommu_off"])
def test_real_machines(name: str, request: pytest.FixtureRequest) -> None:
    root: pathlib.Path = request.getfixturevalue(name)
    result = survey(Host(str(root)))
    checks = {check["id"]: check for check in result["checks"]}
    if name == "vgpu_node":
        assert (len(result["devices"]), len(result["groups"])) == (226, 106)
        assert checks["iommu.enabled"]["status"] == "ok"
    else:
        assert (len(result["devices"]), result["groups"]) == (208, [])
        assert checks["iommu.enabled"]["status"] == "fail"
        assert "firmware setup" in checks["iommu.enabled"]["remedy"]


# -- libvirt and security ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "answer"),
    [
        ("12.1.0", True),
        ("12.8.0-1", True),
        ("13.0.0", True),
        ("12.0.0", False),
        ("9.0.0-4+deb12u2", False),
        (None, None),
    ],
)
def test_which_libvirt_passes_descriptors(version: str | None, answer: bool | None) -> None:
    assert can_pass(version) is answer


def test_libvirt_by_debians_database(machine: Machine) -> None:
    assert read_libvirt_facts(machine.host) is None
    machine.file(
        "/var/lib/dpkg/status",
        "Package: libvirt-daemon\nStatus: install ok installed\nArchitecture: amd64\nVersion: 11.3.0-3\n\n",
    )
    machine.file("/usr/lib/systemd/system/libvirtd.service", "")
    facts = read_libvirt_facts(machine.host)
    assert facts is not None
    assert (facts.version, facts.can_pass_iommufd, facts.units) == ("11.3.0-3", False, ["libvirtd.service"])
    assert facts.device_acl_source == "built-in"
    assert "/dev/kvm" in (facts.device_acl or [])
    machine.file("/etc/libvirt/qemu.conf", "cgroup_device_acl = [ unclosed\n")
    facts = read_libvirt_facts(machine.host)
    assert facts is not None
    assert facts.device_acl is None
    assert "libvirt refuses the file" in (facts.device_acl_source or "")


def test_security_modules(machine: Machine) -> None:
    assert read_security(machine.host) == {"apparmor": None, "selinux": None}
    assert read_memlock(machine.host) is None
    machine.file("/etc/selinux/config", "# a comment\nSELINUX=enforcing\n")
    machine.file("/etc/apparmor.d/abstractions/libvirt-qemu", "  # /dev/iommu rw,\n")
    assert read_security(machine.host) == {
        "apparmor": {"enabled": None, "libvirt_allows_iommu": False},
        "selinux": {"mode": "enforcing", "booleans": {}, "contexts": {}},
    }


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<domainCapabilities><hostdev supported='yes'></hostdev></domainCapabilities>", False),
        ("<domainCapabilities>\n<enum name='iommufd'>\n<value>yes</value>\n<value>no</value>\n</enum>", True),
        ("<domainCapabilities><enum name='iommufd'><value>no</value></enum><value>yes</value>", False),
        ("error: failed to connect to the hypervisor", None),
    ],
)
def test_what_libvirt_says_of_itself(text: str, answer: bool | None) -> None:
    assert parse_capabilities(text) is answer


def test_whom_guests_of_libvirt_run_as(machine: Machine) -> None:
    machine.file("/etc/libvirt/qemu.conf", '#user = "x"\n user = "+107"\ngroup="kvm"\nuser = "later"\n')
    facts = read_libvirt_facts(machine.host)
    assert facts is not None
    assert (facts.user, facts.group) == ("107", "kvm")


def test_memory_limits_of_units(machine: Machine) -> None:
    """A drop-in of /etc replaces the one of the same name in /usr; a template's limit counts for all users."""
    machine.file("/usr/lib/systemd/system/virtqemud.service", "[Service]\nLimitMEMLOCK=64M\n")
    machine.file("/usr/lib/systemd/system/virtqemud.service.d/10.conf", "[Service]\nLimitMEMLOCK=1G\n")
    machine.file("/etc/systemd/system/virtqemud.service.d/10.conf", "[Service]\nLimitMEMLOCK=infinity\n")
    machine.file("/etc/systemd/system.conf", "[Manager]\n#DefaultLimitMEMLOCK=8M\nDefaultLimitMEMLOCK=16777216\n")
    assert read_memlock(machine.host) == [
        {"domain": "systemd", "type": "default", "kib": 16384, "file": "/etc/systemd/system.conf"},
        {
            "domain": "virtqemud.service",
            "type": "unit",
            "kib": 65536,
            "file": "/usr/lib/systemd/system/virtqemud.service",
        },
        {
            "domain": "virtqemud.service",
            "type": "unit",
            "kib": None,
            "file": "/etc/systemd/system/virtqemud.service.d/10.conf",
        },
    ]
