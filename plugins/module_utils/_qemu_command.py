# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The command line of the verification guest, as a pure function of what it is to hold.

Nothing here opens anything: where something comes as a descriptor, its number is known before.
"""

from __future__ import annotations

import dataclasses
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._guest_machine import GuestMachine

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


def guest_slot(number: int) -> str:
    """The PCI address that the device of that number (from 0) has in the guest."""
    return f"0000:00:{FIRST_SLOT + number:02x}.0"


def placement(number: int) -> dict[str, str | int]:
    """The properties of QEMU's device that put it there.

    rombar=0: an option ROM has no part in this, and firmware would run it.
    """
    return {"bus": "pcie.0", "addr": f"{FIRST_SLOT + number:#x}", "rombar": 0}


# What both firmware and Linux (DEFAULT_HOTPLUG_MMIO_SIZE) reserve behind a port by themselves, in bytes.
_RESERVED = 2 << 20


@dataclasses.dataclass(frozen=True)
class Port:
    """A PCI Express root port into which a device is plugged later.

    Attributes:
        number: of its slot on the root bus, counted like the devices', which come before it.
        order: its place among the ports, from 0. Firmware numbers the buses behind them in the order of the slots.
        window: bytes of memory below 4 GiB that are reserved behind it; 0: what is without a word (2 MiB).
        window64: bytes of prefetchable memory, anywhere.
    """

    number: int
    order: int
    window: int = 0
    window64: int = 0

    @property
    def name(self) -> str:
        return f"port{self.order}"

    @property
    def guest_address(self) -> str:
        """Of the device behind it."""
        return f"0000:{self.order + 1:02x}:00.0"

    def argument(self) -> str:
        """The device argument."""
        text = (
            f"pcie-root-port,id={self.name},bus=pcie.0,addr={FIRST_SLOT + self.number:#x},"
            f"chassis={self.order + 1},slot={self.order + 1}"
        )
        text += f",mem-reserve={self.window}" if self.window else ""
        return text + (f",pref64-reserve={self.window64}" if self.window64 else "")


@dataclasses.dataclass(frozen=True)
class Command:
    """What the verification guest is made of.

    Attributes:
        machine: the kind of machine.
        binary: path of QEMU.
        name: of the guest; stands in the process list.
        memory: MiB.
        cpus: processors.
        kernel: path of the kernel image.
        initramfs: path of the archive.
        console: where the guest's kernel messages go, as a chardev ("socket,fd=7").
        report: where its report goes, likewise; this one is read, too.
        accelerator: "kvm" or "tcg".
        kvm: descriptor of /dev/kvm; None: QEMU opens the node.
        devices: arguments for the vfio devices and their iommufd objects (:func:`_qemu_devices.arguments`).
        ports: for devices that are plugged in later.
        monitor: where QMP commands come from, as a chardev; empty: nowhere.
    """

    machine: GuestMachine
    binary: str
    name: str
    memory: int
    cpus: int
    kernel: str
    initramfs: str
    console: str
    report: str
    accelerator: str
    kvm: int | None
    devices: tuple[str, ...]
    ports: tuple[Port, ...] = ()
    monitor: str = ""

    def arguments(self) -> list[str]:
        """The argument vector."""
        found = [self.binary, "-name", self.name, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        found += ["-sandbox", SANDBOX, *trace_arguments()]
        found += ["-machine", self.machine.machine_argument(self.accelerator)]
        if self.accelerator == "tcg":
            # The translation cache would take a quarter of the host's memory by default.
            found += ["-accel", "tcg,tb-size=96", "-cpu", self.machine.tcg_processor]
        elif self.kvm is None:
            found += ["-accel", "kvm", "-cpu", "host"]
        else:
            # As a descriptor, so that the user needs no membership of the group that owns /dev/kvm.
            found += ["-add-fd", f"fd={self.kvm},set=1", "-accel", "kvm,device=/dev/fdset/1", "-cpu", "host"]
        found += ["-m", str(self.memory), "-smp", str(self.cpus)]
        found += ["-kernel", self.kernel, "-initrd", self.initramfs]
        found += ["-append", " ".join(kernel_arguments(self.machine, self.ports))]
        for number, (name, chardev) in enumerate((("console", self.console), ("report", self.report))):
            kind, _comma, rest = chardev.partition(",")
            found += ["-chardev", f"{kind},id={name},{rest}"]
            found += self.machine.serial_arguments(number, name)
        if self.monitor:
            kind, _comma, rest = self.monitor.partition(",")
            found += ["-chardev", f"{kind},id=monitor,{rest}", "-qmp", "chardev:monitor"]
        for port in self.ports:
            found += ["-device", port.argument()]
        return [*found, *self.devices]


def trace_arguments() -> list[str]:
    """What has QEMU say who opened a descriptor, who uses it and what is mapped."""
    return [word for trace in TRACES for word in ("-trace", trace)]


def kernel_arguments(machine: GuestMachine, ports: t.Sequence[Port] = ()) -> list[str]:
    """The guest kernel's command line: quiet, ends instead of hanging, and skips what this guest does not need."""
    largest = {
        "hpmmiosize": max([port.window for port in ports], default=0),
        "hpmmioprefsize": max([port.window64 for port in ports], default=0),
    }
    reserve = [f"{word}={size >> 20}M" for word, size in largest.items() if size > _RESERVED]
    return [
        # For all ports alike: what firmware would do for each by what QEMU tells it.
        *([f"pci={','.join(reserve)}"] if reserve and not machine.firmware else []),
        f"console={machine.console}",
        "quiet",
        "panic=-1",
        "rdinit=/init",
        "mitigations=off",
        "nokaslr",
        "random.trust_cpu=on",
        "cryptomgr.notests",
        # The random number source by jitter measures itself for as long as many drivers take together.
        "initcall_blacklist=jent_mod_init",
        *machine.settings,
    ]
