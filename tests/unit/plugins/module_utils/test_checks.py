# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._checks import add_argument, run_checks

NODE = {
    "path": "/dev/iommu",
    "owner": "root",
    "group": "root",
    "mode": "0660",
    "device": "10:124",
    "expected": "10:124",
    "links": [],
    "label": None,
    "acl": False,
    "acl_entries": [],
}
MODULE = {"name": "iommufd", "state": "loaded", "path": "/m/updates/dkms/iommufd.ko.xz", "dkms": True}

READY: dict[str, t.Any] = {
    "live": True,
    "distribution": {"id": "debian", "family": "debian"},
    "kernel": {
        "release": "6.12.95+deb13-amd64",
        "release_source": "running",
        "virtual_machine": False,
        "architecture": "x86_64",
        "cpu_vendor": "GenuineIntel",
        "virtualization": "vmx",
        "config": {"source": "/boot/config", "options": {"IOMMUFD": "n", "VFIO_DEVICE_CDEV": "n"}},
        "command_line": "quiet",
        "arguments": ["quiet"],
        "modules": {"iommufd": MODULE, "vfio": {**MODULE, "name": "vfio"}},
        "vfio_cdev": True,
    },
    "iommu": {
        "enabled": True,
        "units": [{"name": "dmar0", "kind": "VT-d"}],
        "firmware": "DMAR",
        "firmware_known": True,
        "interrupt_isolation": True,
        "unsafe_interrupts": {"iommufd": False, "vfio_iommu_type1": None},
    },
    "nodes": {"iommu": NODE, "kvm": {**NODE, "path": "/dev/kvm"}, "container": None, "cdevs": [], "groups": []},
    "groups": [{"number": 1, "devices": ["0000:01:00.0"], "vfio": ["0000:01:00.0"], "blocking": []}],
    "devices": [{"address": "0000:01:00.0", "driver": "vfio-pci", "vfio_device": "/dev/vfio/devices/vfio0"}],
    "guests": [],
    "qemu": [
        {"path": "/usr/bin/qemu-system-x86_64", "version": "10.0.13", "iommufd": True, "passing": True, "problem": None}
    ],
    "libvirt": {
        "version": "12.8.0",
        "can_pass_iommufd": True,
        "capability_source": "version",
        "device_acl": ["/dev/null"],
        "device_acl_source": "default",
    },
    "security": {"apparmor": {"enabled": True, "libvirt_allows_iommu": False}, "selinux": None},
    "memlock": [],
    "peer_to_peer": [{"works": True, "detail": "3 BARs were mapped", "qemu": "10.0.13"}],
}

# Nothing known, as for a tree that holds nothing.
BLANK: dict[str, t.Any] = {
    "distribution": {"id": None, "family": "other"},
    "kernel": {"release": None, "config": None, "command_line": None, "arguments": None, "modules": None},
    **dict.fromkeys(("iommu", "nodes", "groups", "devices", "guests", "qemu", "libvirt", "memlock", "peer_to_peer")),
    "security": {"apparmor": None, "selinux": None},
}


def changed(survey: dict[str, t.Any], **values: t.Any) -> dict[str, t.Any]:
    """A survey with values replaced by path (``kernel__release``)."""
    result = copy.deepcopy(survey)
    for path, value in values.items():
        *parents, last = path.split("__")
        here = result
        for parent in parents:
            here = here[parent]
        here[last] = value
    return result


def status(name: str, **values: t.Any) -> tuple[str, str, str]:
    check = next(one for one in run_checks(changed(READY, **values)) if one.id == name)
    return check.status, check.detail, check.remedy or ""


def test_the_ids_are_stable() -> None:
    assert [check.id for check in run_checks(READY)] == [
        "iommu.enabled",
        "iommu.interrupt_remapping",
        "kernel.iommufd",
        "kernel.cdev",
        "kernel.arguments",
        "node.iommu",
        "node.permissions",
        "device.cdev",
        "group.viable",
        "kvm",
        "qemu.iommufd",
        "qemu.peer_to_peer",
        "libvirt.iommufd",
        "libvirt.acl",
        "security.apparmor",
        "security.selinux",
        "memlock",
    ]


def test_a_host_that_is_ready() -> None:
    assert {check.id: check.status for check in run_checks(READY) if check.status not in ("ok", "skip")} == {}
    assert [check.id for check in run_checks(READY) if check.status == "skip"] == [
        "libvirt.acl",
        "security.apparmor",
        "security.selinux",
    ]


def test_nothing_known_is_nothing_claimed() -> None:
    assert {check.status for check in run_checks(BLANK)} == {"skip"}


def test_every_failure_has_a_remedy() -> None:
    broken = changed(
        READY,
        groups=[],
        iommu__interrupt_isolation=False,
        kernel__modules={},
        kernel__vfio_cdev=None,
        nodes__iommu=None,
        nodes__kvm=None,
        qemu=[],
    )
    bad = [check for check in run_checks(broken) if check.status in ("fail", "warn")]
    assert [check.id for check in bad] == [
        "iommu.enabled",
        "kernel.iommufd",
        "kernel.cdev",
        "node.iommu",
        "kvm",
        "qemu.iommufd",
    ]
    assert all(check.remedy for check in bad)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("debian", "update-grub"),
        ("redhat", "grubby --update-kernel=ALL --args=intel_iommu=on"),
        ("suse", "grub2-mkconfig"),
        ("arch", "grub-mkconfig"),
        ("other", "boot loader"),
    ],
)
def test_the_iommu_is_off_with_vt_d_in_the_firmware(family: str, words: str) -> None:
    got = status("iommu.enabled", groups=[], distribution__family=family)
    assert got[0] == "fail"
    assert words in got[2]
    assert "intel_iommu=on" in got[2]
    assert words in add_argument(family, "intel_iommu=on")


def test_the_iommu_is_off_for_other_reasons() -> None:
    off = status("iommu.enabled", groups=[], kernel__arguments=["intel_iommu=off"])
    assert (off[0], off[2]) == ("fail", "Remove intel_iommu=off from the kernel command line, and reboot.")
    firmware = status("iommu.enabled", groups=[], iommu__firmware=None, kernel__cpu_vendor="AuthenticAMD")
    assert "firmware setup" in firmware[2]
    assert "intel_iommu" not in firmware[2]
    assert "dmesg" in status("iommu.enabled", groups=[], iommu__firmware="IVRS")[2]


def test_interrupts() -> None:
    assert status("iommu.interrupt_remapping", iommu__interrupt_isolation=False)[0] == "fail"
    assert status("iommu.interrupt_remapping", iommu__interrupt_isolation=None)[0] == "skip"
    assert status("iommu.interrupt_remapping", iommu__unsafe_interrupts={"iommufd": True})[0] == "warn"


def test_debians_own_kernel_is_explained() -> None:
    got = status("kernel.iommufd", kernel__modules={}, nodes__iommu=None)
    assert got[0] == "fail"
    assert "Debian builds its kernels without iommufd" in got[1]
    assert "iommufd.host.kernel" in got[2]


@pytest.mark.parametrize(
    ("values", "expected", "words"),
    [
        ({"kernel__release": "6.18.2-custom", "kernel__modules": {}}, "fail", "CONFIG_IOMMUFD is not set"),
        ({"kernel__release": "6.1.0-25-amd64", "kernel__modules": {}}, "fail", "older than iommufd"),
        ({"kernel__modules": {"iommufd": {**MODULE, "state": "available"}}}, "warn", "not loaded"),
        ({"kernel__modules": {}, "kernel__config": {"options": {"IOMMUFD": "m"}}}, "fail", "not installed"),
        ({"kernel__modules": {}, "kernel__config": {"options": {"IOMMUFD": "y"}}}, "ok", "built in"),
        ({"kernel__modules": None, "kernel__config": None, "nodes__iommu": NODE}, "ok", "/dev/iommu exists"),
        (
            {"kernel__modules": None, "kernel__config": None, "nodes__iommu": {**NODE, "expected": None}},
            "skip",
            "cannot be told",
        ),
        ({"kernel__modules": None, "kernel__config": None, "nodes": None}, "skip", "cannot be told"),
    ],
)
def test_iommufd_in_the_kernel(values: dict[str, t.Any], expected: str, words: str) -> None:
    if "nodes" not in values:
        values = {"nodes__iommu": None, **values}
    got = status("kernel.iommufd", **values)
    assert got[0] == expected
    assert words in got[1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"kernel__vfio_cdev": None}, "ok"),
        ({"kernel__vfio_cdev": False}, "fail"),
        ({"kernel__vfio_cdev": None, "kernel__modules": {}}, "fail"),
        ({"kernel__vfio_cdev": None, "kernel__modules": {}, "kernel__config": None}, "skip"),
        ({"kernel__vfio_cdev": None, "kernel__config": {"options": {"VFIO_DEVICE_CDEV": "y"}}}, "ok"),
    ],
)
def test_character_devices_in_the_kernel(values: dict[str, t.Any], expected: str) -> None:
    assert status("kernel.cdev", **values)[0] == expected


@pytest.mark.parametrize(
    "argument",
    ["vfio-pci.ids=10de:2204", "iommu=pt", "iommu.passthrough=1", "amd_iommu=on", "pcie_acs_override=downstream"],
)
def test_arguments_that_are_in_the_way(argument: str) -> None:
    got = status("kernel.arguments", kernel__arguments=["quiet", argument])
    assert got[0] == "warn"
    assert argument in got[1]
    assert status("kernel.arguments", kernel__arguments=["intel_iommu=on", "iommu=on"])[0] == "ok"


def test_nodes() -> None:
    assert status("node.iommu", nodes__iommu=None)[0] == "fail"
    stale = status("node.iommu", nodes__iommu={**NODE, "device": "10:99"})
    assert stale[0] == "fail"
    assert "stale" in stale[1]
    world = status("node.permissions", nodes__cdevs=[{**NODE, "path": "/dev/vfio/devices/vfio3", "mode": "0666"}])
    assert world[0] == "fail"
    assert "/dev/vfio/devices/vfio3 (0666)" in world[1]
    assert status("node.permissions", nodes__iommu=None)[0] == "skip"


def test_devices_and_groups() -> None:
    device = {"address": "0000:01:00.0", "driver": "vfio-pci", "vfio_device": None}
    assert status("device.cdev", devices=[device])[0] == "fail"
    assert status("device.cdev", devices=[{**device, "driver": "nvme"}])[0] == "skip"
    group = {"number": 3, "devices": ["a", "b"], "vfio": ["0000:01:00.0"], "blocking": ["0000:01:00.1"]}
    got = status("group.viable", groups=[group])
    assert got[0] == "fail"
    assert "group 3: 0000:01:00.0 on vfio, 0000:01:00.1 on a host driver" in got[1]


def test_kvm_is_decided_by_the_processor() -> None:
    useless = status("kvm", kernel__virtualization="")
    assert useless[0] == "warn"
    assert "/dev/kvm is there all the same" in useless[1]
    assert "modprobe kvm_intel" in status("kvm", nodes__kvm=None)[2]
    assert status("kvm", kernel__virtualization=None)[0] == "ok"
    assert status("kvm", kernel__virtualization="svm", nodes=None)[0] == "skip"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"iommufd": False, "passing": False}, "fail"),
        ({"passing": False}, "warn"),
        ({"iommufd": None, "passing": None, "version": None, "problem": "no libx.so"}, "fail"),
        ({"iommufd": None, "passing": None, "version": None}, "fail"),
    ],
)
def test_qemu(values: dict[str, t.Any], expected: str) -> None:
    assert status("qemu.iommufd", qemu=[{**READY["qemu"][0], **values}])[0] == expected
    assert status("qemu.iommufd", qemu=[])[0] == "fail"


def test_a_qemu_that_nobody_could_ask() -> None:
    one = {**READY["qemu"][0], "iommufd": None, "version": None}
    assert status("qemu.iommufd", qemu=[one], live=False)[0] == "skip"


def test_peer_to_peer_is_what_was_measured() -> None:
    assert status("qemu.peer_to_peer", peer_to_peer=[])[0] == "skip"
    lacking = {"works": False, "detail": "IOMMU_IOAS_MAP failed", "qemu": "10.0.13"}
    verdict, detail, remedy = status("qemu.peer_to_peer", peer_to_peer=[*READY["peer_to_peer"], lacking])
    assert verdict == "warn"
    assert "QEMU 10.0.13: IOMMU_IOAS_MAP failed" in detail
    assert "backend auto" in remedy


def test_an_older_libvirt_needs_the_acl_and_apparmor() -> None:
    older = {**READY["libvirt"], "version": "11.3.0", "can_pass_iommufd": False}
    assert status("libvirt.iommufd", libvirt=older)[0] == "warn"
    assert status("libvirt.acl", libvirt=older)[0] == "warn"
    assert status("libvirt.acl", libvirt={**older, "device_acl": ["/dev/iommu"]})[0] == "ok"
    assert status("security.apparmor", libvirt=older)[0] == "warn"
    allowed = {"apparmor": {"enabled": True, "libvirt_allows_iommu": True}}
    assert status("security.apparmor", libvirt=older, security=allowed)[0] == "ok"


def test_selinux_is_reported_by_the_policy_s_own_file_contexts() -> None:
    older = {**READY["libvirt"], "can_pass_iommufd": False}

    def found(mode: str, contexts: dict[str, str]) -> str:
        selinux = {"mode": mode, "booleans": {}, "contexts": contexts}
        return status("security.selinux", libvirt=older, security={"apparmor": None, "selinux": selinux})[0]

    assert found("disabled", {}) == "skip"
    assert found("permissive", {}) == "ok"
    assert found("enforcing", {}) == "warn"
    assert found("enforcing", {"/dev/iommu": "iommu_device_t"}) == "ok"


def test_memlock_matters_where_a_group_may_open_the_node() -> None:
    shared = {**NODE, "group": "kvm"}
    assert status("memlock", nodes__iommu=shared)[0] == "warn"
    limit = {"domain": "@kvm", "type": "-", "kib": None, "file": "/etc/security/limits.d/kvm.conf"}
    assert status("memlock", nodes__iommu=shared, memlock=[limit])[0] == "ok"
    assert status("memlock", nodes__iommu=shared, memlock=[{**limit, "kib": 65536}])[0] == "warn"


def test_no_iommu_in_a_virtual_machine() -> None:
    got = status("iommu.enabled", groups=[], iommu__firmware=None, kernel__virtual_machine=True)
    assert got[0] == "fail"
    assert "itself a virtual machine" in got[1]
    assert "intremap=on" in got[2]


@pytest.mark.parametrize(
    ("table", "words"), [("IVRS", "update the firmware"), ("IORT", "SMMU"), ("VIOT", "virtio_iommu (and virtio_pci)")]
)
def test_no_iommu_though_the_firmware_has_one(table: str, words: str) -> None:
    got = status("iommu.enabled", groups=[], iommu__firmware=table)
    assert got[0] == "fail"
    assert words in got[2]


def test_no_iommu_for_want_of_its_driver() -> None:
    options = {"AMD_IOMMU": "n"}
    got = status("iommu.enabled", groups=[], iommu__firmware="IVRS", kernel__config={"source": "", "options": options})
    assert got[0] == "fail"
    assert "built without CONFIG_AMD_IOMMU" in got[1]


@pytest.mark.parametrize("argument", ["iommu=off", "intel_iommu=off", "intel_iommu=sm_on,off", "amd_iommu=off"])
def test_the_iommu_was_turned_off(argument: str) -> None:
    got = status("iommu.enabled", groups=[], kernel__arguments=["quiet", argument, "intel_iommu=igfx_off"])
    assert got == (
        "fail",
        f"The IOMMU is off: the kernel was started with {argument}.",
        f"Remove {argument} from the kernel command line, and reboot.",
    )


def test_an_iommu_that_cannot_be_seen() -> None:
    assert status("iommu.enabled", groups=[], iommu__enabled=None)[0] == "skip"


@pytest.mark.parametrize(
    ("vendor", "words"),
    [("0x8086", "add intel_iommu=on"), ("0x1022", "AMD-Vi; Arm: SMMU)."), (None, "Intel processor")],
)
def test_the_host_bridge_tells_whose_processor_it_is(vendor: str | None, words: str) -> None:
    bridges = (
        [{"address": "0000:00:00.0", "class_id": "0x060000", "vendor_id": vendor, "driver": None}] if vendor else []
    )
    values = {"groups": [], "iommu__firmware": None, "kernel__cpu_vendor": None, "devices": bridges}
    assert words in status("iommu.enabled", **values)[2]


OLDER = {"version": "11.5.0", "can_pass_iommufd": False, "capability_source": "version", "device_acl": []}


def test_a_libvirt_that_says_itself_that_it_cannot() -> None:
    libvirt = {**OLDER, "version": "12.8.0", "capability_source": "domcapabilities"}
    got = status("libvirt.iommufd", libvirt=libvirt)
    assert got[0] == "warn"
    assert "virsh domcapabilities" in got[1]


def test_a_kernel_whose_number_proves_nothing() -> None:
    """RHEL 9 has iommufd in a kernel that calls itself 5.14."""
    values = {
        "kernel__release": "5.14.0-570.el9.x86_64",
        "kernel__modules": None,
        "kernel__config": None,
        "nodes__iommu": None,
    }
    assert status("kernel.iommufd", **values)[0] == "fail"
    assert status("kernel.iommufd", distribution={"id": "rhel", "family": "redhat"}, **values)[0] == "skip"


def test_kvm_on_arm() -> None:
    values = {"kernel__virtualization": None, "kernel__architecture": "aarch64"}
    assert status("kvm", nodes__kvm=None, **values)[0] == "warn"
    assert status("kvm", **values)[0] == "ok"


def test_who_else_may_open_a_node() -> None:
    node = {**NODE, "acl": True, "acl_entries": ["user:libvirt-qemu:rw-"]}
    assert "access lists user:libvirt-qemu:rw-" in status("node.permissions", nodes__iommu=node)[1]
