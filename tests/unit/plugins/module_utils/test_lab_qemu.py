# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._lab_qemu import (
    accelerator,
    check_version,
    firmware_arguments,
    host_arguments,
    require_iommu,
    require_memory,
)
from ansible_collections.iommufd.host.plugins.module_utils._lab_spec import parse_host


def command(*devices: dict[str, t.Any], kind: str = "tcg", **more: t.Any) -> list[str]:
    spec = parse_host({"name": "alpha", "devices": list(devices), **more})
    return host_arguments(spec, kind, 2222, "the-uuid")


def values(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in zip(arguments, arguments[1:]) if name == option]


def device(arguments: list[str], identifier: str) -> str:
    (found,) = (text for text in values(arguments, "-device") if f",id={identifier}," in text)
    return found


def test_the_machine() -> None:
    arguments = command(memory=1024, cpus=3)
    assert values(arguments, "-machine") == ["q35"]
    assert values(arguments, "-accel") == ["tcg,thread=multi"]
    assert values(arguments, "-cpu")[0].startswith("max")
    assert values(arguments, "-m") == ["1024"]
    assert values(arguments, "-smp") == ["3"]
    assert values(arguments, "-uuid") == ["the-uuid"]


def test_interrupt_remapping_under_kvm_asks_for_a_split_interrupt_controller() -> None:
    arguments = command(kind="kvm")
    assert values(arguments, "-machine") == ["q35,kernel-irqchip=split"]
    assert values(arguments, "-accel") == ["kvm"]


def test_an_arm64_host_starts_in_el2_behind_an_smmu_with_uefi() -> None:
    spec = parse_host({"name": "alpha", "architecture": "arm64"})
    arguments = host_arguments(spec, "tcg", 2222, "the-uuid", ["-bios", "/QEMU_EFI.fd"])
    assert arguments[0] == "qemu-system-aarch64"
    assert values(arguments, "-machine") == ["virt,virtualization=on,gic-version=3,iommu=smmuv3"]
    assert values(arguments, "-bios") == ["/QEMU_EFI.fd"]
    assert not [text for text in values(arguments, "-device") if "iommu" in text]


def test_an_emulator_of_ones_own() -> None:
    spec = parse_host({"name": "alpha", "emulator": "/opt/qemu/bin/qemu-system-x86_64"})
    assert host_arguments(spec, "tcg", 2222, "the-uuid")[0] == "/opt/qemu/bin/qemu-system-x86_64"


def test_amd_vi_needs_a_newer_emulator() -> None:
    spec = parse_host({"name": "alpha", "iommu": "amd"})
    require_iommu((10, 2), spec)
    with pytest.raises(HostError, match=r"host alpha: .* is version 10\.1; iommu: amd needs 10\.2 or later"):
        require_iommu((10, 1), spec)


def test_the_firmware_of_an_arm64_host(tmp_path: Path) -> None:
    assert not firmware_arguments(Host(str(tmp_path)), "amd64")
    with pytest.raises(HostError, match="apt install qemu-efi-aarch64"):
        firmware_arguments(Host(str(tmp_path)), "arm64")
    path = "usr/share/edk2/aarch64/QEMU_EFI.fd"
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).touch()
    assert firmware_arguments(Host(str(tmp_path)), "arm64") == ["-bios", f"/{path}"]


@pytest.mark.parametrize(
    ("architecture", "iommu", "accepted"),
    [("amd64", "smmuv3", "intel, amd, virtio, none"), ("arm64", "intel", "smmuv3, virtio, none")],
)
def test_an_iommu_that_the_processor_does_not_have(architecture: str, iommu: str, accepted: str) -> None:
    with pytest.raises(OptionError, match=accepted):
        parse_host({"name": "alpha", "architecture": architecture, "iommu": iommu})


@pytest.mark.parametrize(
    ("iommu", "model"),
    [
        ("intel", "intel-iommu,intremap=on,device-iotlb=on"),
        ("amd", "amd-iommu,intremap=on,xtsup=on,dma-remap=on"),
        ("virtio", "virtio-iommu-pci,bus=pcie.0,addr=0x5"),
    ],
)
def test_the_iommu_comes_before_what_it_takes_charge_of(iommu: str, model: str) -> None:
    assert values(command({"type": "nvme"}, iommu=iommu), "-device")[0] == model


def test_no_iommu() -> None:
    assert not [text for text in values(command(iommu="none"), "-device") if "iommu" in text]


def test_the_way_in_is_on_the_loopback_only() -> None:
    (way_in,) = values(command(), "-netdev")
    assert way_in == "user,id=net,ipv6=off,hostfwd=tcp:127.0.0.1:2222-:22"


def test_networks_of_devices_lead_nowhere() -> None:
    arguments = command({"type": "igb"}, {"type": "bridge", "devices": [{"type": "e1000"}]})
    assert values(arguments, "-netdev")[1:] == ["user,id=net.igb0,restrict=on", "user,id=net.e1000-0,restrict=on"]


def test_no_private_key_on_the_command_line() -> None:
    assert "name=opt/io.systemd.credentials/lab.host_key,file=identity/lab.host_key" in values(command(), "-fw_cfg")


def test_an_express_device_is_behind_a_port_of_its_own() -> None:
    arguments = command({"type": "nvme", "serial": "DATA0"})
    assert "pcie-root-port,id=port.nvme0,bus=pcie.0,addr=0x10,chassis=1,slot=1" in values(arguments, "-device")
    assert device(arguments, "nvme0") == "nvme,id=nvme0,bus=port.nvme0,addr=0x0,drive=disk.nvme0,serial=DATA0"
    assert "if=none,id=disk.nvme0,file=nvme0.raw,format=raw,cache=unsafe" in values(arguments, "-drive")


def test_a_conventional_device_is_on_the_root_bus() -> None:
    assert device(command({"type": "edu"}), "edu0") == "edu,id=edu0,bus=pcie.0,addr=0x10"


def test_every_bus_is_made_before_it_is_used() -> None:
    arguments = command(
        {"type": "bridge", "devices": [{"type": "e1000"}, {"type": "edu"}]},
        {"type": "switch", "devices": [{"type": "nvme"}, {"type": "igb"}]},
        {"type": "multifunction", "devices": [{"type": "display"}, {"type": "audio"}]},
        {"type": "nvme", "slot": 6},
    )
    made = {"pcie.0"}
    for text in values(arguments, "-device"):
        options = dict(part.partition("=")[::2] for part in text.split(",")[1:])
        assert options.get("bus", "pcie.0") in made, text
        made.add(options.get("id", ""))


def test_the_functions_of_one_card() -> None:
    arguments = command({"type": "multifunction", "id": "gpu", "devices": [{"type": "display"}, {"type": "audio"}]})
    assert device(arguments, "display0") == "bochs-display,id=display0,bus=port.gpu,addr=0x0.0x0,multifunction=on"
    assert device(arguments, "audio0") == "intel-hda,id=audio0,bus=port.gpu,addr=0x0.0x1"


def test_properties_are_passed_on() -> None:
    arguments = command({"type": "edu", "properties": {"dma_mask": 4096, "x": True, "y": "a,b"}})
    assert device(arguments, "edu0").endswith(",dma_mask=4096,x=on,y=a,,b")


@pytest.mark.parametrize("flags", ["fpu vme", "fpu vmxoff svm_lock"])
def test_a_node_without_the_processors_flag_is_no_kvm(tmp_path: Path, flags: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor: 0\nflags\t\t: {flags}\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kvm").write_text("")
    assert accelerator(Host(str(tmp_path))) == "tcg"


def test_a_node_that_makes_no_machine_is_no_kvm(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("flags\t\t: fpu vmx sse\n")
    assert accelerator(Host(str(tmp_path))) == "tcg"
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kvm").write_text("")
    assert accelerator(Host(str(tmp_path))) == "tcg"


def test_the_emulators_version() -> None:
    assert check_version(
        "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\n", "qemu-system-x86_64", "qemu-system-x86"
    ) == (10, 0)
    with pytest.raises(HostError, match=r"is version 7\.2; lab hosts need 8\.0 .*bookworm-backports"):
        check_version("QEMU emulator version 7.2.15 (Debian 1:7.2+dfsg-7)\n", "qemu-system-x86_64", "qemu-system-x86")
    with pytest.raises(HostError, match="names no version"):
        check_version("nonsense", "qemu-system-x86_64", "qemu-system-x86")


def test_memory_is_counted_before_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  4096000 kB\nMemAvailable:   3072000 kB\n")
    host = Host(str(tmp_path))
    require_memory(host, 3000, ["alpha"])
    with pytest.raises(HostError, match="alpha, beta would need 3001 MiB, available are 3000 MiB"):
        require_memory(host, 3001, ["alpha", "beta"])
    require_memory(Host(str(tmp_path / "nowhere")), 1 << 30, ["alpha"])
