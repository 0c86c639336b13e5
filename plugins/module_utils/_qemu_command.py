# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The command line of the verification guest, as a pure function of what it is to hold.

Nothing here opens anything: descriptors are numbers that the process will inherit.
"""

from __future__ import annotations

import dataclasses

#: Slots of the guest's root bus that passed devices get, in their order; 0x1f is the chipset's own.
FIRST_SLOT = 0x02
LAST_SLOT = 0x1E
MOST_DEVICES = LAST_SLOT - FIRST_SLOT + 1

#: Everything that seccomp can deny QEMU: obsolete calls, other credentials, new processes, other priorities.
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

#: What QEMU is asked to say: who opened the descriptor and how many use it; which device was bound to it; what was
#: mapped (a device's BAR in another's address space is peer-to-peer). Patterns, because QEMU warns of an exact name
#: that it does not know.
TRACES = ("iommufd_backend_connect*", "iommufd_cdev_connect*", "iommufd_backend_map*dma*")

IOMMUFD_ID = "iommufd0"


def guest_slot(number: int) -> str:
    """The PCI address that the passed device of that number (from 0) has in the guest."""
    return f"0000:00:{FIRST_SLOT + number:02x}.0"


@dataclasses.dataclass(frozen=True)
class Command:
    """What the verification guest is made of.

    Attributes:
        binary: path of QEMU.
        name: of the guest; stands in the process list.
        memory: MiB.
        cpus: processors.
        kernel: descriptor of the kernel image.
        initramfs: descriptor of the archive.
        console: descriptor of a socket that gets the guest's kernel messages.
        report: descriptor of a socket for the guest's report.
        kvm: descriptor of /dev/kvm; None: emulation in software (TCG).
        iommufd: descriptor of /dev/iommu.
        devices: descriptors of the vfio devices, in their order.
        settings: words for the guest kernel's command line beside our own.
    """

    binary: str
    name: str
    memory: int
    cpus: int
    kernel: int
    initramfs: int
    console: int
    report: int
    kvm: int | None
    iommufd: int
    devices: tuple[int, ...]
    settings: tuple[str, ...] = ()

    @property
    def descriptors(self) -> list[int]:
        """Every descriptor that the process has to inherit."""
        kvm = [] if self.kvm is None else [self.kvm]
        return [self.kernel, self.initramfs, self.console, self.report, *kvm, self.iommufd, *self.devices]

    def arguments(self) -> list[str]:
        """The argument vector for a PC (q35)."""
        found = [self.binary, "-name", self.name, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        found += ["-sandbox", SANDBOX]
        for trace in TRACES:
            found += ["-trace", trace]
        # Each controller left out is one that firmware and kernel do not probe; the i8042 alone costs seconds.
        found += ["-machine", "q35,usb=off,sata=off,smbus=off,i8042=off,vmport=off,graphics=off"]
        if self.kvm is None:
            # The translation cache would take a quarter of the host's memory by default.
            found += ["-accel", "tcg,tb-size=96", "-cpu", "max"]
        else:
            # As a descriptor, so that the user needs no membership of the group that owns /dev/kvm.
            found += ["-add-fd", f"fd={self.kvm},set=1", "-accel", "kvm,device=/dev/fdset/1", "-cpu", "host"]
        found += ["-m", str(self.memory), "-smp", str(self.cpus)]
        found += ["-kernel", f"/proc/self/fd/{self.kernel}", "-initrd", f"/proc/self/fd/{self.initramfs}"]
        found += ["-append", " ".join(self.kernel_arguments())]
        for number, (name, descriptor) in enumerate((("console", self.console), ("report", self.report))):
            found += ["-chardev", f"socket,id={name},fd={descriptor}"]
            found += ["-device", f"isa-serial,id=serial-{name},chardev={name},index={number}"]
        found += ["-object", f"iommufd,id={IOMMUFD_ID},fd={self.iommufd}"]
        for number, descriptor in enumerate(self.devices):
            # rombar=0: an option ROM has no part in this, and firmware would run it.
            found += [
                "-device",
                f"vfio-pci,id=dev{number},bus=pcie.0,addr={FIRST_SLOT + number:#x},rombar=0,"
                f"iommufd={IOMMUFD_ID},fd={descriptor}",
            ]
        return found

    def kernel_arguments(self) -> list[str]:
        """The guest kernel's command line: quiet, ends instead of hanging, and skips what this guest does not need."""
        return [
            "console=ttyS0,115200",
            "quiet",
            "panic=-1",
            "rdinit=/init",
            "mitigations=off",
            "nokaslr",
            "random.trust_cpu=on",
            "cryptomgr.notests",
            # The random number source by jitter measures itself for as long as many drivers take together.
            "initcall_blacklist=jent_mod_init",
            "8250.nr_uarts=2",
            *self.settings,
        ]
