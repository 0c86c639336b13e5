# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""A device that is plugged into a running guest over QMP, used there, and taken out again.

With a launcher that passes descriptors, the cdev is opened here and goes to QEMU over the monitor's socket (``getfd``);
QEMU could not open it. An iommufd object that the guest does not have yet is made likewise, and removed with the last
device on it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _launcher
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._evidence import PassedDevice
from ansible_collections.iommufd.host.plugins.module_utils._nodes import IOMMU
from ansible_collections.iommufd.host.plugins.module_utils._qemu_command import Port
from ansible_collections.iommufd.host.plugins.module_utils._qmp import Monitor, Refused

Json = dict[str, t.Any]


class HotPlug:
    """Devices that come and go.

    Args:
        channel: QEMU's monitor.
        objects: iommufd objects that the guest has.
        passed: whether descriptors are passed; else QEMU opens the nodes.
        iommu: device number of /dev/iommu.
        listen: lets the guest's words in until a condition holds; False when it does not in time.

    Attributes:
        seen: for each device ``address``, ``guest_address``, ``backend``, ``iommufd``, ``problem`` (empty: none),
            ``object_made``, ``object_refused`` (whether QEMU refused to remove the object that is in use) and
            ``object_removed``.
    """

    def __init__(
        self,
        channel: socket.socket,
        objects: t.Sequence[str],
        passed: bool,
        iommu: tuple[int, int],
        listen: t.Callable[[t.Callable[[], bool], float], bool],
    ) -> None:
        self._monitor = Monitor(channel)
        self._objects = list(objects)
        self._passed = passed
        self._iommu = iommu
        self._listen = listen
        self.seen: list[Json] = []

    def plug(
        self, device: PassedDevice, port: Port, say: t.Callable[[str], None], reported: t.Callable[[], bool]
    ) -> None:
        """Plug a device in, have the guest use it, and take it out. What goes wrong is in :attr:`seen`.

        Args:
            device: the device.
            port: where.
            say: gives the guest a line.
            reported: whether the guest has said everything of the device.
        """
        name = f"plug{port.order}"
        found: Json = {
            "address": device.address,
            "guest_address": port.guest_address,
            "backend": device.backend,
            "iommufd": device.object or None,
            "problem": "",
            "object_made": False,
            "object_refused": None,
            "object_removed": None,
        }
        self.seen.append(found)
        try:
            if device.backend == "iommufd" and device.object not in self._objects:
                self._make_object(device.object)
                found["object_made"] = True
            self._add(device, port, name)
            say(f"plug {port.guest_address}")
            if not self._listen(reported, 90.0):
                raise HostError("the guest did not report it within 90 s")
            if device.backend == "iommufd":
                found["object_refused"] = self._is_kept(device.object)
            self._remove(name)
            if found["object_made"]:
                self._monitor.execute("object-del", {"id": device.object})
                found["object_removed"] = True
        except HostError as error:
            found["problem"] = error.message

    def _make_object(self, name: str) -> None:
        arguments: Json = {"qom-type": "iommufd", "id": name}
        if self._passed:
            with _opened(IOMMU, self._iommu) as descriptor:
                _launcher.account_per_process(descriptor)
                self._monitor.execute("getfd", {"fdname": f"{name}-fd"}, descriptor)
            arguments["fd"] = f"{name}-fd"
        self._monitor.execute("object-add", arguments)

    def _add(self, device: PassedDevice, port: Port, name: str) -> None:
        arguments: Json = {"driver": "vfio-pci", "id": name, "bus": port.name, "rombar": 0}
        if device.backend == "iommufd":
            arguments["iommufd"] = device.object
        if device.backend == "iommufd" and self._passed:
            with _opened(device.node, device.number) as descriptor:
                self._monitor.execute("getfd", {"fdname": f"{name}-fd"}, descriptor)
            arguments["fd"] = f"{name}-fd"
        else:
            arguments["host"] = device.address
        self._monitor.execute("device_add", arguments)

    def _is_kept(self, name: str) -> bool:
        """Whether QEMU keeps an object that devices are on."""
        try:
            self._monitor.execute("object-del", {"id": name})
        except Refused:
            return True
        return False

    def _remove(self, name: str) -> None:
        self._monitor.execute("device_del", {"id": name})

        def gone() -> bool:
            return self._monitor.wait_for("DEVICE_DELETED", 0.05, device=name) is not None

        if not self._listen(gone, 60.0):
            raise HostError("the guest did not let go of it within 60 s")


@contextlib.contextmanager
def _opened(path: str, number: tuple[int, int]) -> t.Iterator[int]:
    """A node's descriptor while it is handed over; QEMU has its own then."""
    descriptor = _launcher.open_node(path, number)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
