# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _evidence
from ansible_collections.iommufd.host.plugins.module_utils._evidence import GuestReport
from ansible_collections.iommufd.host.tests.unit.guest_words import GUEST, QEMU, report, words
from ansible_collections.iommufd.host.tests.unit.machine import Machine

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


def test_users_of_each_object() -> None:
    two = QEMU.replace(b"connect fd=22 owned=0 users=2", b"connect fd=25 owned=0 users=1")
    assert words(QEMU).users() == {22: 2}
    assert words(two).users() == {22: 1, 25: 1}


def test_transfers_between_devices() -> None:
    found = report(
        b"0000:00:03.0 transfer 0000:00:04.0 0xFEFFFF12 0xfeffff12\n0000:00:04.0 transfer 0000:00:03.0 0x1\n"
    )
    assert found.transfers == [("0000:00:03.0", "0000:00:04.0", "0xfeffff12", "0xfeffff12")]
    seen = _evidence.peer_to_peer(words(b""), {}, found.transfers)
    assert [one["ok"] for one in seen["transfers"]] == [True]


@pytest.mark.parametrize(
    "word",
    [
        b"2026-11-25T19:37:26.892007Z qemu-system-x86_64: vfio: Cannot reset device hostdev0",
        b"qemu-system-x86_64: vfio: Cannot reset device hostdev0",
    ],
)
def test_words_without_their_speaker(word: bytes) -> None:
    assert words(word).distinct() == ["vfio: Cannot reset device hostdev0"]


# -- the process


@pytest.mark.parametrize(
    ("text", "cgroup"),
    [
        ("0::/system.slice/x.service\n", "/system.slice/x.service"),
        ("12:pids:/a\n9:devices:/b\n0::/c\n", "/b"),
        ("", None),
    ],
)
def test_the_cgroup_that_device_policies_hang_on(machine: Machine, text: str, cgroup: str | None) -> None:
    machine.file("/proc/7/cgroup", text)
    machine.file("/proc/7/attr/current", "libvirt-0815 (enforce)\n")
    found = _evidence.observe(machine.host, 7, (10, 262))
    assert (found.cgroup, found.profile) == (cgroup, "libvirt-0815 (enforce)")
