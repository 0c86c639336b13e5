# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The emulator: whether this machine can run it, and the command line of a lab host."""

from __future__ import annotations

import fcntl
import os
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._lab_spec import (
    ARCHITECTURES,
    DEVICE_TYPES,
    DISK_SLOT,
    ENTROPY_SLOT,
    IOMMU_SLOT,
    NETWORK_SLOT,
    HostSpec,
    disk_file,
    escape,
    join,
    layout,
    mac_address,
)

# The first version with igb, the one emulated network card that has virtual functions.
MINIMUM_VERSION = (8, 0)

# AMD-Vi before that: Linux panics ("timer doesn't work through Interrupt-remapped IO-APIC"), and devices time out.
_MINIMUM_AMD = (10, 2)

# What a host learns from its emulator at boot (systemd's system credentials); see the image's identity unit.
CREDENTIALS = ("lab.hostname", "lab.authorized_keys", "lab.host_key")

# The firmware of an aarch64 machine: Debian's and Ubuntu's package, Fedora's, and what QEMU itself brings.
_FIRMWARE = (
    "/usr/share/qemu-efi-aarch64/QEMU_EFI.fd",
    "/usr/share/edk2/aarch64/QEMU_EFI.fd",
    "/usr/share/qemu/edk2-aarch64-code.fd",
)

_KVM_CREATE_VM = 0xAE01  # linux/kvm.h: _IO(KVMIO, 0x01)


def machine_arguments(
    program: str, accelerator: str, memory: int, cpus: int, architecture: str, iommu: str = "none"
) -> list[str]:
    """The arguments that the machine of an image build and of a host have in common."""
    kvm = accelerator == "kvm"
    if architecture == "arm64":
        # With virtualization=on the processor starts in EL2, so that the host has a working /dev/kvm of its own; the
        # interrupt controller needs an ITS for the interrupts of PCI devices.
        machine = "virt,virtualization=on,gic-version=3"
        if iommu == "smmuv3":
            machine += ",iommu=smmuv3"
        # Cheaper to emulate: pointer authentication by a hash of QEMU's own, and page tables of one level less.
        processor = "max,pauth-impdef=on,lpa2=off"
    else:
        # A split interrupt controller is what interrupt remapping asks for under KVM.
        machine = "q35,kernel-irqchip=split" if kvm else "q35"
        # Under TCG "max" shows AMD SVM to the guest, so that it has a working /dev/kvm of its own. Without la57 the
        # guest has four levels of page tables instead of five, and an emulated page walk is a fifth shorter.
        processor = "max,la57=off"
    return [
        program,
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", machine),
        *("-accel", "kvm" if kvm else "tcg,thread=multi"),
        *("-cpu", processor),
        *("-smp", str(cpus), "-m", str(memory)),
    ]


def firmware_arguments(host: Host, architecture: str) -> list[str]:
    """What a machine boots its disk by, where that is not in the emulator itself.

    Raises:
        HostError: it is missing; names the package.
    """
    if architecture != "arm64":
        return []
    found = [path for path in _FIRMWARE if host.exists(path)]
    if not found:
        raise HostError("There is no UEFI firmware for aarch64. On Debian and Ubuntu: apt install qemu-efi-aarch64")
    return ["-bios", found[0]]


def host_arguments(host: HostSpec, accelerator: str, port: int, uuid: str, firmware: t.Sequence[str] = ()) -> list[str]:
    """The command line of a host. All file names are relative to the host's directory, where the process runs.

    Args:
        host: the host.
        accelerator: ``kvm`` or ``tcg``.
        port: the port of 127.0.0.1 that leads to the guest's ssh server.
        uuid: makes the process recognizable.
        firmware: what it boots by, see `firmware_arguments`.
    """
    arguments = machine_arguments(host.program, accelerator, host.memory, host.cpus, host.architecture, host.iommu)
    arguments += firmware
    arguments += ["-name", f"guest={host.name},debug-threads=on", "-uuid", uuid, "-pidfile", "qemu.pid"]
    arguments += ["-chardev", "file,id=serial,path=serial.log,append=on", "-serial", "chardev:serial"]
    arguments += ["-chardev", "socket,id=qmp,path=qmp.sock,server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
    # The guest's identity comes from files, so that no private key shows in the list of processes.
    for name in CREDENTIALS:
        arguments += ["-fw_cfg", f"name=opt/io.systemd.credentials/{name},file=identity/{name}"]

    def device(text: str) -> None:
        arguments.extend(["-device", text])

    # The IOMMU comes first: it takes charge only of what is created after it.
    if host.iommu == "intel":
        device("intel-iommu,intremap=on,device-iotlb=on")
    elif host.iommu == "amd":
        device("amd-iommu,intremap=on,xtsup=on,dma-remap=on")
    elif host.iommu == "virtio":
        device(f"virtio-iommu-pci,bus=pcie.0,addr={IOMMU_SLOT:#x}")

    arguments += ["-netdev", f"user,id=net,ipv6=off,hostfwd=tcp:127.0.0.1:{port}-:22"]
    device(f"virtio-net-pci,netdev=net,mac={mac_address(host.name, 'net')},romfile=,bus=pcie.0,addr={NETWORK_SLOT:#x}")
    # The overlay is thrown away with the host: nothing is gained by waiting for the disk below.
    arguments += ["-drive", "if=none,id=system,file=disk.qcow2,format=qcow2,cache=unsafe,discard=unmap"]
    device(f"virtio-blk-pci,drive=system,bootindex=0,bus=pcie.0,addr={DISK_SLOT:#x}")
    device(f"virtio-rng-pci,bus=pcie.0,addr={ENTROPY_SLOT:#x}")

    plan = layout(host)
    for bridge in plan.bridges:
        device(bridge)
    for placed in plan.placed:
        one = placed.device
        kind = DEVICE_TYPES[one.kind]
        text = f"{kind.model},id={one.identifier},bus={placed.bus},{placed.position}"
        for fixed in kind.fixed:
            text += f",{fixed}"
        if kind.network:
            # A network of its own, with nothing outside it.
            arguments += ["-netdev", f"user,id=net.{one.identifier},restrict=on"]
            text += f",netdev=net.{one.identifier},mac={one.mac},romfile="
        if kind.disk:
            arguments += [
                "-drive",
                f"if=none,id=disk.{one.identifier},file={disk_file(one)},format=raw,cache=unsafe",
            ]
            text += f",drive=disk.{one.identifier}"
        if one.serial:
            text += f",serial={escape(one.serial)}"
        device(join(text, one.properties))
    return arguments


def accelerator(host: Host, architecture: str = "amd64") -> str:
    """``kvm`` where it really works, else ``tcg``; that always for an arm64 host, which is to have a /dev/kvm itself.

    The node alone proves nothing: a machine without vmx or svm may still offer a /dev/kvm that opens.
    """
    if architecture != "amd64":
        return "tcg"
    flags = host.read_text("/proc/cpuinfo") or ""
    if not re.search(r"^flags\s*:.*\b(vmx|svm)\b", flags, re.MULTILINE):
        return "tcg"
    try:
        node = os.open(host.path("/dev/kvm"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return "tcg"
    try:
        os.close(fcntl.ioctl(node, _KVM_CREATE_VM, 0))
    except OSError:
        return "tcg"
    finally:
        os.close(node)
    return "kvm"


def require_emulator(host: Host, program: str, architecture: str) -> tuple[int, int]:
    """The version of an emulator of an architecture.

    Raises:
        HostError: it is missing or too old; names the package.
    """
    package = ARCHITECTURES[architecture].package
    if host.which(program) is None:
        raise HostError(f"{program} is not installed. On Debian and Ubuntu: apt install {package} qemu-utils")
    output = host.ask([program, "--version"])
    if output is None or not output.ok:
        words = output.stderr.strip() if output else "no answer within 30 s"
        raise HostError(f"{program} --version does not work: {words or 'it said nothing'}")
    return check_version(output.stdout, program, package)


def require_iommu(version: tuple[int, int], host: HostSpec) -> None:
    """Raises HostError where an emulator of that version has no IOMMU that works for the host."""
    if host.iommu == "amd" and version < _MINIMUM_AMD:
        raise HostError(
            f"host {host.name}: {host.program} is version {version[0]}.{version[1]}; iommu: amd needs "
            f"{_MINIMUM_AMD[0]}.{_MINIMUM_AMD[1]} or later (emulator names another one)"
        )


def check_version(text: str, program: str, package: str) -> tuple[int, int]:
    """Major and minor version in what the emulator says of itself.

    Raises:
        HostError: it is older than `MINIMUM_VERSION`, or there is no version in the text.
    """
    match = re.search(r"version (\d+)\.(\d+)", text)
    if match is None:
        raise HostError(f"{program} --version names no version: {text.strip()[:100]!r}")
    version = (int(match.group(1)), int(match.group(2)))
    if version < MINIMUM_VERSION:
        raise HostError(
            f"{program} is version {version[0]}.{version[1]}; lab hosts need {MINIMUM_VERSION[0]}."
            f"{MINIMUM_VERSION[1]} or later. On Debian 12: apt install -t bookworm-backports {package}"
        )
    return version


def require_memory(host: Host, needed: int, names: t.Sequence[str]) -> None:
    """Raises HostError where new processes cannot have ``needed`` MiB without swapping (MemAvailable)."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", host.read_text("/proc/meminfo") or "", re.MULTILINE)
    if match is not None and needed > int(match.group(1)) // 1024:
        raise HostError(
            f"Memory is short: {', '.join(names)} would need {needed} MiB, available are "
            f"{int(match.group(1)) // 1024} MiB. Stop other lab hosts, or declare less memory"
        )
