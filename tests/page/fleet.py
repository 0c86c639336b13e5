# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A made-up fleet: trees of servers in several states of repair, surveyed by the real survey."""

from __future__ import annotations

import json
import pathlib
import random
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._checks import run_checks
from ansible_collections.iommufd.host.plugins.module_utils._survey import survey
from ansible_collections.iommufd.host.tests.unit.machine import Machine

Survey = dict[str, t.Any]

_KERNELS = {
    "debian": ("6.12.95+deb13-amd64", 'ID=debian\nVERSION_ID="13"\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n'),
    "ubuntu": ("6.14.0-37-generic", 'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="25.04"\nPRETTY_NAME="Ubuntu 25.04"\n'),
    "redhat": (
        "6.12.0-124.8.1.el10_1.x86_64",
        'ID=rhel\nID_LIKE=fedora\nVERSION_ID="10.1"\nPRETTY_NAME="Red Hat Enterprise Linux 10.1 (Coughlan)"\n',
    ),
}

KINDS = ("ready", "warned", "stock", "off", "split", "captured")


def server(root: pathlib.Path, kind: str, functions: int = 226) -> Survey:
    """The survey of one server with two sockets, two GPUs, a NIC with VFs, NVMe disks and a bonded uplink.

    Args:
        root: a directory to build its tree in.
        kind: one of KINDS: with iommufd and its devices on vfio; the same with flaws; on a kernel without iommufd; with
            the IOMMU off; with half a group on vfio; just a captured /sys.
        functions: how many PCI functions it has.
    """
    machine = Machine(root)
    grouped, bound = kind != "off", kind in ("ready", "warned", "split")
    counter = iter(range(10000))

    def pci(address: str, identity: str, class_id: str, driver: str | None, node: int, **more: t.Any) -> str:
        below, group = more.pop("below", None), more.pop("group", None)
        number = (next(counter) if group is None else group) if grouped else None
        return machine.pci(address, identity, class_id, driver, number, below, numa_node=node, **more)

    def given(driver: str) -> str:
        return "vfio-pci" if bound else driver

    cdevs = 0
    pci("0000:01:00.0", "144d:a80a", "010802", "nvme", 0, reset_method="flr bus")
    machine.disk("nvme0n1", "0000:01:00.0")
    machine.partition("nvme0n1", "nvme0n1p2")
    mapped = machine.block("dm-0")
    machine.attributes(f"{mapped}/dm", name="vg0-root", uuid="LVM-x")
    machine.stack("nvme0n1p2", "dm-0")
    for port in (0, 1):
        pci(f"0000:02:00.{port}", "8086:1563", "020000", "ixgbe", 0, reset_method="flr")
        machine.interface(f"eno{port + 1}", f"0000:02:00.{port}")
    machine.file(f"{machine.interface('bond0')}/bonding/mode", "802.3ad 4\n")
    machine.directory(f"{machine.interface('br0')}/bridge")
    for port in ("eno1", "eno2"):
        machine.enslave(port, "bond0")
    machine.enslave("bond0", "br0")
    pci("0000:03:00.0", "1a03:2000", "030000", "ast", 0, boot_vga=1)
    pci("0000:00:14.0", "8086:a1af", "0c0330", "xhci_hcd", 0)
    for bus, node in (("41", 0), ("c1", 1)):
        pci(f"0000:{bus}:00.0", "10de:26b9", "030200", given("nvidia"), node, reset_method="flr bus")
        audio = "snd_hda_intel" if kind == "split" and bus == "c1" else given("snd_hda_intel")
        number = (
            int(machine.at(f"{machine.paths[f'0000:{bus}:00.0']}/iommu_group").readlink().name) if grouped else None
        )
        pci(f"0000:{bus}:00.1", "10de:22ba", "040300", audio, node, group=number)
        for function, driver in (("0", given("nvidia")), ("1", audio)):
            if driver == "vfio-pci":
                machine.cdev(f"0000:{bus}:00.{function}", cdevs, f"511:{cdevs}")
                cdevs += 1
    physical = pci("0000:81:00.0", "15b3:101d", "020000", "mlx5_core", 1, sriov_totalvfs=16, sriov_numvfs=8)
    for index in range(8):
        address = f"0000:81:{index // 8:02x}.{index % 8 + 1 if index < 7 else 0}".replace("81:00.0", "81:01.0")
        path = pci(address, "15b3:101e", "020000", given("mlx5_core") if index < 4 else None, 1, reset_method="flr")
        machine.link(f"{path}/physfn", physical)
        machine.link(f"{physical}/virtfn{index}", path)
        if bound and index < 4:
            machine.cdev(address, cdevs, f"511:{cdevs}")
            cdevs += 1
    for index in range(4):
        pci(f"0000:{0x61 + index:02x}:00.0", "1e0f:0007", "010802", "nvme", index // 2, reset_method="flr bus")
    there = len(list(machine.at("/sys/bus/pci/devices").iterdir()))
    for index in range(functions - there):
        bus, slot = (0x17, 0x3A, 0x5D, 0x85, 0xAE, 0xD7)[index % 6], index // 6
        bridge = slot < 3
        pci(
            f"0000:{bus:02x}:{slot // 8 + 4:02x}.{slot % 8}",
            "8086:2030" if bridge else f"8086:20{0x40 + slot % 0x60:02x}",
            "060400" if bridge else ("088000", "110100")[slot % 2],
            "pcieport" if bridge else None,
            int(bus > 0x80),
        )
    if kind != "captured":
        _system(machine, kind)
    result = survey(machine.host)
    if kind != "captured":
        _ask_qemu(result, kind)
    return t.cast("Survey", json.loads(json.dumps(result)))


def _system(machine: Machine, kind: str) -> None:
    """What is not PCI: a mounted root, routes, a kernel, nodes, libvirt."""
    distribution = {"stock": "debian", "warned": "ubuntu", "off": "debian"}.get(kind, "redhat")
    kernel, release = _KERNELS[distribution]
    machine.mounts((machine.number("dm-0"), "/", "ext4", "/dev/mapper/vg0-root"))
    machine.routes(("br0", "0.0.0.0", "10.20.0.1", "0.0.0.0"), ("br0", "10.20.0.0", "0.0.0.0", "255.255.0.0"))
    machine.file("/etc/os-release", release)
    machine.file("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
    machine.file("/etc/group", "root:x:0:\n")
    machine.directory("/etc/security")
    machine.file("/proc/sys/kernel/osrelease", f"{kernel}\n")
    machine.file("/proc/cmdline", f"root=/dev/mapper/vg0-root ro quiet{' iommu=pt' if kind == 'warned' else ''}\n")
    machine.file("/proc/cpuinfo", "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx\n\nprocessor: 1\n")
    chips = "PCI-MSI" if kind == "off" else "IR-PCI-MSI"
    machine.file("/proc/interrupts", f" 25: 0 {chips}-0000:01:00.0 0-edge nvme0q0\n")
    modules = f"/usr/lib/modules/{kernel}"
    iommufd = "" if distribution == "debian" else "kernel/drivers/iommu/iommufd/iommufd.ko.xz:\n"
    machine.file(f"{modules}/modules.dep", f"kernel/drivers/vfio/vfio.ko.xz:\n{iommufd}")
    machine.file(f"{modules}/modules.alias", "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n")
    options = "CONFIG_VFIO=m\nCONFIG_VFIO_PCI=m\nCONFIG_VFIO_GROUP=y\nCONFIG_KVM=m\nCONFIG_INTEL_IOMMU=y\n"
    if iommufd:
        options += "CONFIG_IOMMUFD=m\nCONFIG_VFIO_DEVICE_CDEV=y\n"
        machine.file("/proc/modules", "vfio 1 0 - Live 0x0\niommufd 1 0 - Live 0x0\nkvm_intel 1 0 - Live 0x0\n")
        machine.file("/proc/devices", "Character devices:\n511 vfio-dev\n")
        machine.directory("/sys/module/vfio")
        machine.directory("/sys/module/iommufd")
        machine.file("/sys/class/misc/iommu/dev", "10:124\n")
        machine.file("/dev/iommu", "")
        machine.at("/dev/iommu").chmod(0o660)
        for node in machine.at("/sys/bus/pci/devices").glob("*/vfio-dev/*"):
            machine.file(f"/dev/vfio/devices/{node.name}", "")
            machine.at(f"/dev/vfio/devices/{node.name}").chmod(0o600)
    machine.file(f"/boot/config-{kernel}", options)
    machine.file("/sys/firmware/acpi/tables/DMAR", b"DMAR\0")
    if kind != "off":
        machine.file("/sys/class/iommu/dmar0/intel-iommu/cap", "1\n")
    machine.file("/dev/kvm", "")
    machine.file("/usr/bin/qemu-system-x86_64", b"\x7fELF")
    machine.at("/usr/bin/qemu-system-x86_64").chmod(0o755)
    if kind in ("ready", "warned"):
        command = ["/usr/bin/qemu-system-x86_64", "-name", "guest=train-7,debug-threads=on"]
        machine.process(4711, "qemu-system-x86", command, ["/dev/iommu", "/dev/vfio/devices/vfio0", "/dev/kvm"])


def _ask_qemu(result: Survey, kind: str) -> None:
    """What only the binary could have said, and the checks with it."""
    for one in result["qemu"] or []:
        one.update(version="10.0.13" if kind != "off" else "7.2.19", iommufd=kind != "off", passing=kind != "off")
    result["checks"] = [check.to_dict() for check in run_checks(result)]


def servers(directory: pathlib.Path) -> dict[str, Survey]:
    """The survey of one server of each kind, their trees in an empty directory."""
    surveys = {}
    for kind in KINDS:
        (directory / kind).mkdir()
        surveys[kind] = server(directory / kind, kind)
    return surveys


def results(surveys: t.Mapping[str, Survey], count: int, seed: int = 1) -> dict[str, t.Any]:
    """What a play would have registered for a fleet: mostly ready, some of every other kind, some lost.

    Args:
        surveys: as :func:`servers` returns them.
        count: how many hosts.
        seed: the same seed gives the same fleet.
    """
    chance = random.Random(seed)
    kinds = chance.choices((*KINDS, "failed", "unreachable"), (62, 10, 8, 5, 5, 2, 2, 6), k=count)
    fleet: dict[str, t.Any] = {}
    for index, kind in enumerate(kinds):
        name = f"hv-{'abcdefgh'[index * 8 // count]}{index + 1:03}.example.net"
        if kind == "unreachable":
            words = f"Failed to connect to the host via ssh: connect to host {name} port 22: Connection timed out"
            fleet[name] = {"unreachable": True, "changed": False, "msg": words}
        elif kind == "failed":
            fleet[name] = {"failed": True, "msg": "The module interpreter '/usr/bin/python3' was not found.", "rc": 127}
        else:
            fleet[name] = _another(surveys[kind], chance)
    return fleet


def _another(one: Survey, chance: random.Random) -> Survey:
    """A server of the same kind that is not the same server: addresses and models of its own."""
    shift = chance.randrange(24)
    text = re.sub(
        r"\b0000:([0-9a-f]{2}):(?=[0-9a-f]{2}\.[0-7])",
        lambda found: f"0000:{(int(found[1], 16) + shift) % 256:02x}:",
        json.dumps(one),
    )
    other = t.cast("Survey", json.loads(text))
    models = [f"0x{chance.randrange(1 << 16):04x}" for _index in range(12)]
    for device in other["devices"]:
        if device["driver"] is None:
            device["device_id"] = chance.choice(models)
    return other
