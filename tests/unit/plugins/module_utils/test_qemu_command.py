# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import dataclasses

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_command
from ansible_collections.iommufd.host.plugins.module_utils._guest_machine import guest_machine
from ansible_collections.iommufd.host.plugins.module_utils._qemu_command import Command, Port

COMMAND = Command(
    machine=guest_machine("x86_64"),
    binary="/usr/bin/qemu-system-x86_64",
    name="verify",
    memory=256,
    cpus=2,
    kernel="/proc/self/fd/30",
    initramfs="/proc/self/fd/31",
    console="socket,fd=32",
    report="socket,fd=33",
    accelerator="kvm",
    kvm=34,
    devices=("-object", "iommufd,id=iommufd0,fd=22", "-device", "vfio-pci,id=dev0,fd=23"),
)


def values(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in zip(arguments, arguments[1:]) if name == option]


def test_the_devices_come_last_as_they_are() -> None:
    assert COMMAND.arguments()[-4:] == list(COMMAND.devices)


def test_no_node_is_named() -> None:
    assert not [
        word for word in COMMAND.arguments() if "/dev/vfio" in word or "/dev/iommu" in word or "/dev/kvm" in word
    ]


def test_guest_slots_are_those_of_the_command_line() -> None:
    slots = [_qemu_command.guest_slot(number) for number in range(_qemu_command.MOST_DEVICES)]
    assert slots[0] == "0000:00:02.0"
    assert slots[-1] == "0000:00:1e.0"
    assert len(set(slots)) == _qemu_command.MOST_DEVICES


def test_sandbox_denies_everything() -> None:
    (sandbox,) = values(COMMAND.arguments(), "-sandbox")
    for name in ("obsolete", "elevateprivileges", "spawn", "resourcecontrol"):
        assert f"{name}=deny" in sandbox


def test_kvm_comes_as_a_descriptor() -> None:
    arguments = COMMAND.arguments()
    assert values(arguments, "-add-fd") == ["fd=34,set=1"]
    assert values(arguments, "-accel") == ["kvm,device=/dev/fdset/1"]
    assert values(arguments, "-cpu") == ["host"]


def test_a_qemu_that_opens_kvm_itself() -> None:
    arguments = dataclasses.replace(COMMAND, kvm=None).arguments()
    assert values(arguments, "-add-fd") == []
    assert values(arguments, "-accel") == ["kvm"]


def test_without_kvm() -> None:
    arguments = dataclasses.replace(COMMAND, accelerator="tcg", kvm=None).arguments()
    assert values(arguments, "-add-fd") == []
    assert values(arguments, "-accel")[0].startswith("tcg")
    assert values(arguments, "-cpu") == ["max"]


def test_serial_ports_and_monitor_are_chardevs() -> None:
    monitored = dataclasses.replace(COMMAND, monitor="socket,path=/run/x,server=on,wait=on").arguments()
    assert values(COMMAND.arguments(), "-chardev") == ["socket,id=console,fd=32", "socket,id=report,fd=33"]
    assert values(COMMAND.arguments(), "-qmp") == []
    assert values(monitored, "-chardev")[-1] == "socket,id=monitor,path=/run/x,server=on,wait=on"
    assert values(monitored, "-qmp") == ["chardev:monitor"]


def test_ports_for_what_is_plugged_in_later() -> None:
    ports = (Port(1, 0), Port(2, 1, 32 << 20, 1 << 34))
    arguments = dataclasses.replace(COMMAND, ports=ports).arguments()
    assert [one for one in values(arguments, "-device") if one.startswith("pcie-root-port")] == [
        "pcie-root-port,id=port0,bus=pcie.0,addr=0x3,chassis=1,slot=1",
        "pcie-root-port,id=port1,bus=pcie.0,addr=0x4,chassis=2,slot=2,mem-reserve=33554432,pref64-reserve=17179869184",
    ]
    assert [port.guest_address for port in ports] == ["0000:01:00.0", "0000:02:00.0"]


def test_the_guest_ends_instead_of_hanging() -> None:
    (kernel_arguments,) = values(COMMAND.arguments(), "-append")
    assert "panic=-1" in kernel_arguments.split()
    assert "-no-reboot" in COMMAND.arguments()


def test_a_guest_of_an_arm64_host_has_its_processors_machine_and_serial_ports() -> None:
    arguments = dataclasses.replace(COMMAND, machine=guest_machine("aarch64")).arguments()
    assert values(arguments, "-machine") == ["virt,usb=off,gic-version=host"]
    assert values(arguments, "-serial") == ["chardev:console", "chardev:report"]
    assert "console=ttyAMA0" in values(arguments, "-append")[0].split()
    assert not [word for word in arguments if "isa-serial" in word]


def test_where_no_firmware_reserves_memory_behind_ports_the_kernel_is_told_to() -> None:
    ports = (Port(1, 0), Port(2, 1, 32 << 20, 1 << 34))
    arguments = dataclasses.replace(COMMAND, machine=guest_machine("aarch64"), ports=ports).arguments()
    assert "pci=hpmmiosize=32M,hpmmioprefsize=16384M" in values(arguments, "-append")[0].split()
    small = dataclasses.replace(COMMAND, machine=guest_machine("aarch64"), ports=ports[:1]).arguments()
    for command in (small, dataclasses.replace(COMMAND, ports=ports).arguments()):
        assert not [word for word in values(command, "-append")[0].split() if word.startswith("pci=")]
