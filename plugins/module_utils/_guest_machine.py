# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What differs in the verification guest by the host's processor.

The guest is always of the host's own kind: KVM makes no other, and its kernel and busybox are the host's.
"""

from __future__ import annotations

import dataclasses

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError


@dataclasses.dataclass(frozen=True)
class GuestMachine:
    """A kind of machine.

    Attributes:
        architecture: as ``uname -m`` and QEMU call it.
        machine: QEMU's type of machine.
        options: of that machine; each controller left out is one that firmware and kernel do not probe.
        kvm_options: further ones with KVM.
        tcg_options: further ones without.
        passes_kvm: whether QEMU does with a descriptor of /dev/kvm. On Arm it opens the node itself to learn what the
            processor has, whatever it was given (target/arm/kvm.c, kvm_arm_create_scratch_host_vcpu).
        tcg_processor: the processor's model without KVM; with KVM it is the host's.
        firmware: whether firmware lays out the PCI buses; else the guest's kernel does, which knows nothing of what a
            root port is told to reserve.
        console: the guest kernel's name of its first serial port, with its speed.
        report: the name of its second one.
        serial_device: QEMU's device for a serial port; empty: the ports are the machine's own (``-serial``).
        libvirt_serial: the type of a serial port's target in libvirt.
        libvirt_features: libvirt's ``<features>``.
        settings: words for the guest kernel's command line.
        package: the Debian package with its QEMU.
        least_qemu: the first version that has such a machine, major and minor; None: any that has iommufd.
    """

    architecture: str
    machine: str
    options: str
    kvm_options: str
    tcg_options: str
    passes_kvm: bool
    tcg_processor: str
    firmware: bool
    console: str
    report: str
    serial_device: str
    libvirt_serial: str
    libvirt_features: str
    settings: tuple[str, ...]
    package: str
    least_qemu: tuple[int, int] | None = None

    def machine_argument(self, accelerator: str) -> str:
        """QEMU's ``-machine``, for "kvm" or "tcg"."""
        return self.machine + self.options + (self.kvm_options if accelerator == "kvm" else self.tcg_options)

    def plain_argument(self, accelerator: str) -> str:
        """The same for a guest that may have what that kind of machine has."""
        return self.machine + (self.kvm_options if accelerator == "kvm" else self.tcg_options)

    def serial_arguments(self, number: int, name: str) -> list[str]:
        """QEMU's arguments for the serial port of that number, which is the chardev of that name."""
        if self.serial_device:
            return ["-device", f"{self.serial_device},id=serial-{name},chardev={name},index={number}"]
        return ["-serial", f"chardev:{name}"]


_MACHINES = {
    "x86_64": GuestMachine(
        architecture="x86_64",
        machine="q35",
        # The i8042 alone costs seconds.
        options=",usb=off,sata=off,smbus=off,i8042=off,vmport=off,graphics=off",
        kvm_options="",
        tcg_options="",
        passes_kvm=True,
        tcg_processor="max",
        firmware=True,
        console="ttyS0,115200",
        report="ttyS1",
        serial_device="isa-serial",
        libvirt_serial="isa-serial",
        libvirt_features="<acpi/><vmport state='off'/>",
        settings=("8250.nr_uarts=2",),
        package="qemu-system-x86",
    ),
    "aarch64": GuestMachine(
        architecture="aarch64",
        machine="virt",
        options=",usb=off",
        # The host's interrupt controller: only GICv3 and later has an ITS, which the interrupts of PCI devices need.
        kvm_options=",gic-version=host",
        tcg_options=",gic-version=3",
        passes_kvm=False,
        tcg_processor="max,pauth-impdef=on",
        firmware=False,
        console="ttyAMA0",
        report="ttyAMA1",
        serial_device="",
        libvirt_serial="system-serial",
        libvirt_features="<gic/>",
        settings=(),
        package="qemu-system-arm",
        # The second serial port ("hw/arm/virt: allow creation of a second NonSecure UART").
        least_qemu=(9, 1),
    ),
}


#: What there is a machine for, as ``uname -m`` calls it.
ARCHITECTURES = tuple(_MACHINES)


def binaries(architecture: str) -> tuple[str, ...]:
    """Where a processor's QEMU is looked for, in this order: the one that was built, then the distribution's."""
    name = f"qemu-system-{architecture}"
    return (f"/opt/iommufd-host/qemu/current/bin/{name}", name, "/usr/libexec/qemu-kvm", "qemu-kvm")


def guest_machine(architecture: str) -> GuestMachine:
    """The kind of machine for a host.

    Args:
        architecture: as ``uname -m`` has it.

    Raises:
        HostError: there is no guest for that.
    """
    found = _MACHINES.get(architecture)
    if found is None:
        raise HostError(
            f"There is a verification guest for {' and '.join(_MACHINES)} only; this host is {architecture}.",
            step="prepare",
        )
    return found
