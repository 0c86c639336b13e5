# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import dataclasses

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_command
from ansible_collections.iommufd.host.plugins.module_utils._qemu_command import Command

COMMAND = Command(
    binary="/usr/bin/qemu-system-x86_64",
    name="verify",
    memory=256,
    cpus=2,
    kernel=30,
    initramfs=31,
    console=32,
    report=33,
    kvm=34,
    iommufd=22,
    devices=(23, 24, 25),
)


def values(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in zip(arguments, arguments[1:]) if name == option]


def test_one_object_and_every_device_on_it() -> None:
    arguments = COMMAND.arguments()
    assert values(arguments, "-object") == ["iommufd,id=iommufd0,fd=22"]
    assert [value for value in values(arguments, "-device") if value.startswith("vfio-pci")] == [
        "vfio-pci,id=dev0,bus=pcie.0,addr=0x2,rombar=0,iommufd=iommufd0,fd=23",
        "vfio-pci,id=dev1,bus=pcie.0,addr=0x3,rombar=0,iommufd=iommufd0,fd=24",
        "vfio-pci,id=dev2,bus=pcie.0,addr=0x4,rombar=0,iommufd=iommufd0,fd=25",
    ]


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


def test_without_kvm() -> None:
    command = dataclasses.replace(COMMAND, kvm=None)
    arguments = command.arguments()
    assert values(arguments, "-add-fd") == []
    assert values(arguments, "-accel")[0].startswith("tcg")
    assert values(arguments, "-cpu") == ["max"]
    assert 34 not in command.descriptors


@pytest.mark.parametrize("descriptor", [22, 23, 24, 25, 30, 31, 32, 33, 34])
def test_every_descriptor_named_is_inherited(descriptor: int) -> None:
    assert descriptor in COMMAND.descriptors
    assert any(str(descriptor) in word for word in COMMAND.arguments())


def test_the_guest_ends_instead_of_hanging() -> None:
    (kernel_arguments,) = values(COMMAND.arguments(), "-append")
    assert "panic=-1" in kernel_arguments.split()
    assert "-no-reboot" in COMMAND.arguments()
