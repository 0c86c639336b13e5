# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""QEMU's monitor, and devices that are plugged in over it; the other side speaks as a QEMU does."""

from __future__ import annotations

import json
import os
import socket
import threading
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _hot_plug, _launcher
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._evidence import PassedDevice
from ansible_collections.iommufd.host.plugins.module_utils._hot_plug import HotPlug
from ansible_collections.iommufd.host.plugins.module_utils._qemu_command import Port
from ansible_collections.iommufd.host.plugins.module_utils._qmp import Monitor, Refused

Json = dict[str, t.Any]


class Qemu(threading.Thread):
    """Answers commands; keeps what it was told, and the descriptors that came along."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ours, self._channel = socket.socketpair()
        self.commands: list[Json] = []
        self.received: list[int] = []
        self.objects = {"iommufd0": 1}
        self.on: dict[str, str] = {}
        self._channel.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\n')
        self.start()

    def run(self) -> None:
        rest = b""
        while True:
            data, descriptors, _flags, _address = socket.recv_fds(self._channel, 65536, 4)
            self.received += descriptors
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                command = json.loads(line)
                self.commands.append(command)
                for answer in self.answers(command["execute"], command.get("arguments", {})):
                    self._channel.sendall(json.dumps(answer).encode() + b"\n")

    def answers(self, command: str, given: Json) -> list[Json]:
        if command == "object-add":
            self.objects[given["id"]] = 0
        elif command == "object-del":
            if self.objects[given["id"]]:
                return [{"error": {"class": "GenericError", "desc": f"object '{given['id']}' is in use"}}]
            del self.objects[given["id"]]
        elif command == "device_add":
            self.on[given["id"]] = given.get("iommufd", "")
            self.objects[given["iommufd"]] += 1
            return [{"event": "SOMETHING"}, {"return": {}}]
        elif command == "device_del":
            self.objects[self.on[given["id"]]] -= 1
            return [{"return": {}}, {"event": "DEVICE_DELETED", "data": {"device": given["id"]}}]
        elif command == "nonsense":
            return [{"error": {"class": "CommandNotFound", "desc": "The command nonsense has not been found"}}]
        return [{"return": {}}]


def device(**more: t.Any) -> PassedDevice:
    fields = {"address": "0000:01:00.0", "slot": "0000:01:00.0", "node": "/dev/null", "number": (1, 3), **more}
    return PassedDevice(vendor_id="0x1b36", device_id="0x0010", class_id="0x010802", plugged=True, **fields)


def listen(condition: t.Callable[[], bool], timeout: float) -> bool:
    return any(condition() for _try in range(40))


def test_answers_and_events() -> None:
    qemu = Qemu()
    monitor = Monitor(qemu.ours)
    with pytest.raises(Refused, match="nonsense has not been found"):
        monitor.execute("nonsense")
    assert monitor.wait_for("NEVER", 0.05) is None


def test_a_qemu_that_is_gone() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(HostError, match="QEMU's monitor is gone"):
        Monitor(ours)


def test_a_descriptor_travels_with_its_command(tmp_path: t.Any) -> None:
    qemu = Qemu()
    (tmp_path / "file").write_text("x")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    Monitor(qemu.ours).execute("getfd", {"fdname": "a"}, descriptor)
    (theirs,) = qemu.received
    assert os.path.sameopenfile(descriptor, theirs)
    os.close(descriptor)


def test_a_device_goes_onto_the_guests_own_object_by_its_descriptor() -> None:
    qemu = Qemu()
    said: list[str] = []
    plug = HotPlug(qemu.ours, ["iommufd0"], True, (10, 262), listen)
    plug.plug(device(), Port(1, 0), said.append, lambda: True)
    (seen,) = plug.seen
    assert seen["problem"] == ""
    assert (seen["object_made"], seen["object_refused"], seen["object_removed"]) == (False, True, None)
    assert said == ["plug 0000:01:00.0"]
    added = next(one["arguments"] for one in qemu.commands if one["execute"] == "device_add")
    assert added == {
        "driver": "vfio-pci", "id": "plug0", "bus": "port0", "rombar": 0, "iommufd": "iommufd0", "fd": "plug0-fd",
    }  # fmt: skip
    assert len(qemu.received) == 1
    assert qemu.objects == {"iommufd0": 1}


def test_an_object_of_its_own_comes_and_goes_with_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hot_plug, "IOMMU", "/dev/zero")
    monkeypatch.setattr(_launcher, "account_per_process", lambda _descriptor: None)
    qemu = Qemu()
    plug = HotPlug(qemu.ours, ["iommufd0"], True, (1, 5), listen)
    plug.plug(device(object="later"), Port(1, 0), lambda _line: None, lambda: True)
    (seen,) = plug.seen
    assert (seen["problem"], seen["object_made"], seen["object_refused"], seen["object_removed"]) == (
        "",
        True,
        True,
        True,
    )
    assert len(qemu.received) == 2
    assert qemu.objects == {"iommufd0": 1}


def test_where_qemu_opens_nothing_is_passed() -> None:
    qemu = Qemu()
    plug = HotPlug(qemu.ours, ["iommufd0"], False, (10, 262), listen)
    plug.plug(device(), Port(1, 0), lambda _line: None, lambda: True)
    added = next(one["arguments"] for one in qemu.commands if one["execute"] == "device_add")
    assert (added["host"], "fd" in added, qemu.received) == ("0000:01:00.0", False, [])


def test_a_guest_that_does_not_report_is_told_of() -> None:
    plug = HotPlug(Qemu().ours, ["iommufd0"], False, (10, 262), listen)
    plug.plug(device(), Port(1, 0), lambda _line: None, lambda: False)
    assert "did not report it" in plug.seen[0]["problem"]
