# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import dataclasses
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _evidence
from ansible_collections.iommufd.host.plugins.module_utils._evidence import (
    GuestReport,
    PassedDevice,
    ProcessState,
    QemuWords,
    Witnesses,
)

# Said by QEMU 10.0 on Linux 6.12 with two devices on one descriptor.
QEMU = b"""\
iommufd_backend_connect fd=22 owned=0 users=1
iommufd_cdev_connect_and_bind  [iommufd=22] Successfully bound device VFIO_FD23 (fd=23): output devid=1
iommufd_backend_map_dma  iommufd=22 ioas=2 iova=0x100000 size=0xff00000 addr=0x7f25a8100000 readonly=0 (0)
iommufd_backend_connect fd=22 owned=0 users=2
iommufd_cdev_connect_and_bind  [iommufd=22] Successfully bound device VFIO_FD24 (fd=24): output devid=2
qemu-system-x86_64: warning: IOMMU_IOAS_MAP failed: Bad address, PCI BAR?
qemu-system-x86_64: warning: IOMMU_IOAS_MAP failed: Bad address, PCI BAR?
iommufd_backend_map_dma  iommufd=22 ioas=2 iova=0xfeb40000 size=0x2000 addr=0x7f4f44ae4000 readonly=0 (-14)
qemu-system-x86_64: VFIO_FD23: PCI peer-to-peer transactions on BARs are not supported.
"""

# Said by the guest, one nvme and one edu.
GUEST = b"""\
guest init 7.75
guest kernel 6.12.117+deb13-amd64
guest loaded 8.10
guest settled 8.30
0000:00:02.0 vendor 0x1b36
0000:00:02.0 device 0x0010
0000:00:02.0 class 0x010802
0000:00:02.0 memory 0 0x00000000feb40000 0x00000000feb43fff
0000:00:02.0 driver nvme
0000:00:02.0 sha256_first ac93db71
0000:00:02.0 sha256_second ac93db71
0000:00:02.0 disk nvme0n1
0000:00:02.0 disk_bytes 67108864
0000:00:02.0 asked_bytes 2097152
0000:00:02.0 dma_bytes 2097152
0000:00:02.0 model QEMU NVMe Ctrl
0000:00:03.0 vendor 0x1234
0000:00:03.0 device 0x11e8
0000:00:03.0 class 0x00ff00
0000:00:03.0 memory 0 0x00000000fea00000 0x00000000feafffff
0000:00:03.0 config  11e81234 00100103
0000:00:03.0 bar 0 0x00000000fea00000 0x010000ED
guest ready 8.90
"""

THREAD = {
    "Uid": "65534\t65534\t65534\t65534",
    "Gid": "65534\t65534\t65534\t65534",
    "Groups": "",
    "CapInh": "0000000000000000",
    "CapPrm": "0000000000000000",
    "CapEff": "0000000000000000",
    "CapBnd": "0000000000000000",
    "CapAmb": "0000000000000000",
    "NoNewPrivs": "1",
    "Seccomp": "2",
}


def report(text: bytes) -> GuestReport:
    found = GuestReport()
    found.feed(text)
    return found


def words(text: bytes) -> QemuWords:
    found = QemuWords()
    found.feed(text)
    found.close()
    return found


def device(number: int, **more: t.Any) -> PassedDevice:
    known = {
        0: {"vendor_id": "0x1b36", "device_id": "0x0010", "class_id": "0x010802", "drivers": ("nvme",)},
        1: {"vendor_id": "0x1234", "device_id": "0x11e8", "class_id": "0x00ff00", "drivers": ()},
    }[number]
    return PassedDevice(
        address=f"0000:0{number + 1}:00.0",
        slot=f"0000:00:0{number + 2}.0",
        node=f"/dev/vfio/devices/vfio{number}",
        number=(511, number),
        descriptor=23 + number,
        **{**known, **more},
    )


@pytest.fixture
def good() -> Witnesses:
    return Witnesses(
        devices=[device(0), device(1)],
        iommu=22,
        user=("nobody", 65534, 65534),
        memory=256 << 20,
        process=ProcessState(
            iommu=[22],
            cdevs={23: (511, 0), 24: (511, 1)},
            legacy=[],
            threads=[dict(THREAD) for _number in range(4)],
            memlock=320 << 20,
            locked=256 << 20,
            pinned=256 << 20,
        ),
        same={22: True, 23: True, 24: True},
        refusals={"/dev/iommu": "Permission denied", "/dev/vfio/devices/vfio0": "Permission denied"},
        qemu=words(QEMU),
        guest=report(GUEST),
        exit_status=0,
        returned={"0000:01:00.0": "", "0000:02:00.0": ""},
    )


def statuses(seen: Witnesses) -> dict[str, str]:
    return {item["id"]: item["status"] for item in _evidence.judge(seen)}


def failures(seen: Witnesses) -> list[str]:
    return [name for name, status in statuses(seen).items() if status == "fail"]


# -- the guest's report


def test_report() -> None:
    found = report(GUEST)
    assert found.ready
    assert found.guest["kernel"] == "6.12.117+deb13-amd64"
    assert found.devices["0000:00:02.0"]["model"] == "QEMU NVMe Ctrl"
    assert found.memory == {
        "0000:00:02.0": [(0, 0xFEB40000, 0xFEB43FFF)],
        "0000:00:03.0": [(0, 0xFEA00000, 0xFEAFFFFF)],
    }
    assert found.stray == []


def test_report_in_pieces_is_the_same() -> None:
    found = GuestReport()
    for at in range(len(GUEST)):
        found.feed(GUEST[at : at + 1])
    assert (found.guest, found.devices, found.memory) == (
        report(GUEST).guest,
        report(GUEST).devices,
        report(GUEST).memory,
    )


def test_a_line_counts_only_once_it_has_ended() -> None:
    found = report(b"guest ready 8.9")
    assert not found.ready
    found.feed(b"0\r\n")
    assert found.guest["ready"] == "8.90"


def test_what_is_no_report_is_ignored() -> None:
    found = report(b"\xff\xfe\x00\n[ 1.0] nvme nvme0: pci\nguest\n\n0000:00:02.0\nguest READY 1\nrm -rf /\n")
    assert (found.guest, found.devices) == ({}, {})
    assert len(found.stray) == 6


def test_damaged_memory_line_is_no_exception() -> None:
    found = report(b"0000:00:02.0 memory 0 0xzz\n0000:00:02.0 memory\n")
    assert found.memory.get("0000:00:02.0", []) == []
    assert len(found.stray) == 2


def test_console_for_people() -> None:
    lines = _evidence.readable(
        b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS\r\n\r\nBooting\r\nBooting\r\n\x07[ 1.0] Kernel panic - x\r\n"
    )
    assert lines == ["SeaBIOS", "Booting", "[ 1.0] Kernel panic - x"]
    assert _evidence.panicked(lines) == "[ 1.0] Kernel panic - x"
    assert _evidence.panicked(lines[:2]) is None


# -- QEMU's words


def test_trace() -> None:
    found = words(QEMU)
    assert found.connects == [(22, 0, 1), (22, 0, 2)]
    assert found.bound == [(22, 23), (22, 24)]
    assert found.maps == [(0x100000, 0xFFFFFFF, 0), (0xFEB40000, 0xFEB41FFF, -14)]
    assert found.distinct() == [
        "warning: IOMMU_IOAS_MAP failed: Bad address, PCI BAR?",
        "VFIO_FD23: PCI peer-to-peer transactions on BARs are not supported.",
    ]


def test_a_last_line_without_end_counts() -> None:
    assert words(b"qemu-system-x86_64: -device vfio-pci: no").said() == "-device vfio-pci: no"


@pytest.mark.parametrize(
    ("text", "works"),
    [
        (QEMU, False),
        (QEMU.replace(b"(-14)", b"(0)"), False),  # QEMU still complains
        (b"iommufd_backend_map_dma  iommufd=22 ioas=2 iova=0xfeb40000 size=0x2000 addr=0x1 readonly=0 (0)\n", True),
        (b"iommufd_backend_map_dma  iommufd=22 ioas=2 iova=0xfeb40000 size=0x2000 addr=0x1 readonly=0 (-14)\n", False),
        (
            b"iommufd_backend_map_file_dma  iommufd=9 ioas=2 iova=0xfea00000 size=0x1000 fd=3 start=0 readonly=0 (0)\n",
            True,
        ),
        (b"iommufd_backend_map_dma  iommufd=22 ioas=2 iova=0x100000 size=0xff00000 addr=0x1 readonly=0 (0)\n", None),
        (b"", None),
    ],
)
def test_peer_to_peer(text: bytes, works: bool | None) -> None:
    assert _evidence.peer_to_peer(words(text), report(GUEST).memory)["works"] is works


# -- judgement


def test_everything_holds(good: Witnesses) -> None:
    assert set(statuses(good).values()) == {"ok"}


def changed(seen: Witnesses, **fields: t.Any) -> Witnesses:
    return dataclasses.replace(seen, **fields)


def with_process(seen: Witnesses, **fields: t.Any) -> Witnesses:
    assert seen.process is not None
    return dataclasses.replace(seen, process=dataclasses.replace(seen.process, **fields))


def with_thread(seen: Witnesses, **fields: str) -> Witnesses:
    """One thread of four is different: a promise about the process is one about every thread."""
    assert seen.process is not None
    threads = copy.deepcopy(seen.process.threads)
    threads[2].update(fields)
    return with_process(seen, threads=threads)


def said(old: bytes, new: bytes) -> dict[str, t.Any]:
    assert old in GUEST
    return {"guest": report(GUEST.replace(old, new))}


@pytest.mark.parametrize(
    ("spoil", "item"),
    [
        (lambda seen: with_process(seen, iommu=[22, 40]), "one_descriptor"),
        (lambda seen: changed(seen, same={22: False, 23: True, 24: True}), "same_open_file"),
        (lambda seen: changed(seen, qemu=words(QEMU.replace(b"owned=0 users=2", b"owned=1 users=2"))), "passed"),
        (lambda seen: changed(seen, qemu=words(QEMU.replace(b"connect fd=22", b"connect fd=40"))), "passed"),
        (lambda seen: changed(seen, qemu=words(QEMU.replace(b"users=2", b"users=1"))), "shared"),
        (lambda seen: with_process(seen, cdevs={23: (511, 0)}), "devices_passed"),
        (lambda seen: with_process(seen, cdevs={23: (511, 1), 24: (511, 0)}), "devices_passed"),
        (lambda seen: with_process(seen, cdevs={23: (511, 0), 24: (511, 1), 25: (511, 2)}), "devices_passed"),
        (lambda seen: changed(seen, same={22: True, 23: True, 24: False}), "devices_passed"),
        (lambda seen: with_process(seen, legacy=["/dev/vfio/12"]), "no_legacy"),
        (lambda seen: with_thread(seen, Uid="0 65534 65534 65534"), "user"),
        (lambda seen: with_thread(seen, Gid="0 0 0 0"), "user"),
        (lambda seen: with_thread(seen, Groups="104 "), "user"),
        (lambda seen: with_thread(seen, CapBnd="0000000000000400"), "no_capabilities"),
        (lambda seen: with_thread(seen, CapEff=""), "no_capabilities"),
        (lambda seen: with_thread(seen, NoNewPrivs="0"), "no_new_privileges"),
        (lambda seen: with_thread(seen, Seccomp="0"), "seccomp"),
        (lambda seen: changed(seen, refusals={"/dev/iommu": None}), "cannot_open"),
        (lambda seen: with_process(seen, locked=0), "accounting"),
        (lambda seen: changed(seen, **said(b"02.0 vendor 0x1b36", b"02.0 vendor 0x1b37")), "devices_seen"),
        (lambda seen: changed(seen, guest=report(b"0000:00:02.0 missing 1\nguest ready 1\n")), "devices_seen"),
        (lambda seen: changed(seen, **said(b"0000:00:02.0 driver nvme\n", b"")), "drivers"),
        (lambda seen: changed(seen, **said(b"dma_bytes 2097152", b"dma_bytes 65536")), "dma"),
        (lambda seen: changed(seen, **said(b"dma_bytes 2097152", b"dma_bytes")), "dma"),
        (lambda seen: changed(seen, **said(b"sha256_second ac93", b"sha256_second 0000")), "dma"),
        (lambda seen: changed(seen, **said(b"0000:00:02.0 disk nvme0n1\n", b"")), "dma"),
        (lambda seen: changed(seen, exit_status=1), "powered_off"),
        (lambda seen: changed(seen, exit_status=None), "powered_off"),
        (lambda seen: changed(seen, returned={"0000:01:00.0": "still held by process 7"}), "devices_returned"),
        (lambda seen: changed(seen, process=None), "one_descriptor"),
    ],
)
def test_each_promise_broken_is_told(good: Witnesses, spoil: t.Callable[[Witnesses], Witnesses], item: str) -> None:
    assert failures(spoil(good)) == [item]


def test_no_threads_prove_nothing(good: Witnesses) -> None:
    assert failures(with_process(good, threads=[])) == ["user", "no_capabilities", "no_new_privileges", "seccomp"]


def test_what_cannot_be_seen_is_not_called_seen(good: Witnesses) -> None:
    blind = changed(good, same={}, qemu=words(b""))
    assert {name for name, status in statuses(blind).items() if status == "skip"} == {
        "same_open_file",
        "passed",
        "shared",
    }
    assert failures(blind) == []


def test_a_driver_that_wants_firmware_is_excused(good: Witnesses) -> None:
    seen = changed(
        good,
        devices=[device(0, class_id="0x020000", firmware=("a.bin",)), device(1)],
        **said(b"0000:00:02.0 driver nvme\n", b""),
    )
    assert statuses(seen)["drivers"] == "skip"


def test_a_module_that_was_refused_counts_only_where_a_driver_is_missing(good: Witnesses) -> None:
    refused = GUEST + b"guest refused nvme.ko insmod: can't insert: unknown symbol\n"
    assert failures(changed(good, guest=report(refused))) == []
    lacking = report(refused.replace(b"0000:00:02.0 driver nvme\n", b""))
    (item,) = [item for item in _evidence.judge(changed(good, guest=lacking)) if item["status"] == "fail"]
    assert "unknown symbol" in item["detail"]


def test_nothing_opened_is_not_called_returned(good: Witnesses) -> None:
    assert statuses(changed(good, returned={}))["devices_returned"] == "skip"
