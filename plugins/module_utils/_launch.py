# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What a launcher of the verification guest is given, and what it gives back.

Each launcher is a context manager ``start(plan)`` that yields a :class:`Running`; on leaving, however that happens,
the guest and everything that was made for it are gone. A killed module leaves nothing either: the kernel, systemd or
libvirt end the guest then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _launcher, _qemu_command, _qemu_devices
from ansible_collections.iommufd.host.plugins.module_utils._evidence import PassedDevice
from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import parse_devices
from ansible_collections.iommufd.host.plugins.module_utils._guest_machine import GuestMachine
from ansible_collections.iommufd.host.plugins.module_utils._host import Host


@dataclasses.dataclass
class Plan:
    """A guest that is to be started.

    Attributes:
        host: where.
        name: of the guest; also of a unit, a domain, a directory below /run. No other guest has it.
        machine: the kind of machine.
        qemu: path of the binary.
        memory: MiB.
        cpus: processors.
        accelerator: "kvm" or "tcg".
        user: whom QEMU runs as, where the launcher does not decide that.
        kernel: content of the kernel image.
        initramfs: content of the archive.
        devices: those that the guest has from the start, in the order of their slots.
        objects: the iommufd objects that they are on, in order.
        plugged: devices that are plugged in later.
        ports: for these.
        iommu: device number of /dev/iommu.
        memlock: bytes that QEMU may pin; None: the launcher decides.
        timeout: seconds from the start to the end.
        monitor: whether QMP commands are going to be given.
    """

    host: Host
    name: str
    machine: GuestMachine
    qemu: str
    memory: int
    cpus: int
    accelerator: str
    user: _launcher.User
    kernel: bytes
    initramfs: bytes
    devices: t.Sequence[PassedDevice]
    objects: t.Sequence[str]
    plugged: t.Sequence[PassedDevice]
    ports: t.Sequence[_qemu_command.Port]
    iommu: tuple[int, int]
    memlock: int | None
    timeout: float
    monitor: bool = False

    def on(self, backend: str) -> list[PassedDevice]:
        """The devices on a backend."""
        return [device for device in self.devices if device.backend == backend]

    def device_arguments(self, numbers: t.Mapping[str, int]) -> tuple[str, ...]:
        """QEMU's arguments for the devices and their iommufd objects.

        Args:
            numbers: descriptor by the name of the object or the address of the device; empty: QEMU opens the nodes.
        """
        given = []
        for number, device in enumerate(self.devices):
            entry: dict[str, t.Any] = {
                "address": device.address,
                "id": f"dev{number}",
                "backend": device.backend,
                "properties": _qemu_command.placement(number),
            }
            if device.backend == "iommufd":
                entry.update(iommufd=device.object, fd=numbers.get(device.address))
            given.append(entry)
        objects = [{"id": name, "fd": numbers.get(name)} for name in self.objects]
        listed = parse_devices("devices", given, empty=True)
        return _qemu_devices.arguments(listed, _qemu_devices.parse_objects("objects", objects or None)).words

    def command(
        self,
        kernel: str,
        initramfs: str,
        chardevs: t.Mapping[str, str],
        numbers: t.Mapping[str, int],
        kvm: int | None,
    ) -> list[str]:
        """QEMU's command line.

        Args:
            kernel: path of the image, as QEMU will see it.
            initramfs: likewise.
            chardevs: "console", "report" and "monitor" to what they are, as chardevs.
            numbers: see :meth:`device_arguments`.
            kvm: descriptor of /dev/kvm; None: QEMU opens the node.
        """
        return _qemu_command.Command(
            machine=self.machine,
            binary=self.qemu,
            name=self.name,
            memory=self.memory,
            cpus=self.cpus,
            kernel=kernel,
            initramfs=initramfs,
            console=chardevs["console"],
            report=chardevs["report"],
            accelerator=self.accelerator,
            kvm=kvm,
            devices=self.device_arguments(numbers),
            ports=tuple(self.ports),
            monitor=chardevs.get("monitor", ""),
        ).arguments()


class Words:
    """What QEMU writes, from a pipe. Another source has the same two methods."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def read(self) -> bytes | None:
        """What has come in; None when nothing ever comes again."""
        try:
            return os.read(self.descriptor, 65536) or None
        except (BlockingIOError, InterruptedError):
            return b""
        except OSError:
            return None

    def fileno(self) -> int:
        """What can be waited for; -1: look again from time to time."""
        return self.descriptor


@dataclasses.dataclass
class Running:
    """A guest on its way.

    Attributes:
        pid: process id of QEMU.
        words: what QEMU writes to its standard output and error.
        console: the guest's first serial port, not blocking.
        report: its second, likewise.
        monitor: QEMU's monitor; None where none was asked for.
        poll: the exit status (negative: the signal that ended it), or None while it runs.
        held: name of an object or address of a device to our own descriptor, where we opened it.
        numbers: the same names to the descriptor in QEMU, where that is known.
    """

    pid: int
    words: Words
    console: socket.socket
    report: socket.socket
    monitor: socket.socket | None
    poll: t.Callable[[], int | None]
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    numbers: dict[str, int] = dataclasses.field(default_factory=dict)


def hold(stack: contextlib.ExitStack, descriptor: int) -> int:
    """Have a descriptor closed at the end."""
    stack.callback(os.close, descriptor)
    return descriptor
