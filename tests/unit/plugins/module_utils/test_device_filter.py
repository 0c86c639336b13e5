# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The device policy of a cgroup, read back: cgroup v1's list, and the BPF programs that systemd makes for v2."""

from __future__ import annotations

import struct

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _device_filter
from ansible_collections.iommufd.host.plugins.module_utils._device_filter import DeviceFilter
from ansible_collections.iommufd.host.tests.unit.machine import Machine

R0, R1, R2, R3, R4, R5 = range(6)
CHAR = 2


def op(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, target | source << 4, offset, value)


def allow(major: int, minor: int | None) -> bytes:
    """As systemd's src/core/bpf-devices.c: one device, or one class, for reading and writing."""
    checks = [op(0x55, R2, value=CHAR), op(0x55, R4, value=major)]
    if minor is not None:
        checks.append(op(0x55, R5, value=minor))
    checks = [op(0xBC, R1, R3), op(0x54, R1, value=6), op(0x5D, R1, R3), *checks]
    body = b""
    for index, check in enumerate(checks):
        jump = len(checks) - index + 1  # over the rest of the checks and the two instructions that say yes
        body += check if check[0] not in (0x55, 0x5D) else check[:2] + struct.pack("=h", jump) + check[4:]
    return body + op(0xB7, R0, value=1) + op(0x05, offset=0x7F)


def program(*devices: tuple[int, int | None]) -> bytes:
    prologue = op(0x61, R2, R1, 0) + op(0x54, R2, value=0xFFFF) + op(0x61, R3, R1, 0) + op(0x74, R3, value=16)
    prologue += op(0x61, R4, R1, 4) + op(0x61, R5, R1, 8)
    text = prologue + b"".join(allow(*device) for device in devices) + op(0xB7, R0, value=0)
    # "Yes" jumps to the exit, wherever that is in the end.
    code = [text[at : at + 8] for at in range(0, len(text), 8)]
    code = [
        one[:2] + struct.pack("=h", len(code) - at - 1) + one[4:] if one[:1] == b"\x05" else one
        for at, one in enumerate(code)
    ]
    return b"".join(code) + op(0x95)


def test_what_systemd_allows() -> None:
    gate = DeviceFilter((program((10, 123), (511, None)),))
    assert gate.enforced
    assert gate.allows("c", 10, 123) is True
    assert gate.allows("c", 10, 124) is False
    assert gate.allows("c", 511, 0) is True
    assert gate.allows("c", 511, 77) is True
    assert gate.allows("b", 511, 0) is False


def test_every_program_on_the_way_down_has_to_agree() -> None:
    wide, narrow = program((10, None)), program((10, 123))
    assert DeviceFilter((wide, narrow)).allows("c", 10, 1) is False
    assert DeviceFilter((wide, narrow)).allows("c", 10, 123) is True
    assert DeviceFilter(()).allows("c", 1, 1) is True
    assert not DeviceFilter(()).enforced


def test_a_program_that_cannot_be_followed_gives_no_answer() -> None:
    call = op(0xB7, R0, value=1) + op(0x85, value=1) + op(0x95)
    assert DeviceFilter((call,)).allows("c", 1, 1) is None
    assert DeviceFilter((None,)).allows("c", 1, 1) is None
    assert DeviceFilter((None, program())).allows("c", 1, 1) is False, "one that says no is enough"
    assert DeviceFilter((b"",)).allows("c", 1, 1) is None
    assert DeviceFilter((op(0x05, offset=-1),)).allows("c", 1, 1) is None, "a loop without end"


@pytest.mark.parametrize(
    ("rules", "iommu", "enforced"),
    [
        ("a *:* rwm\n", True, False),
        ("c 10:123 rw\nc 1:3 rwm\n", True, True),
        ("c 10:* rwm\n", True, True),
        ("c 10:123 r\n", False, True),
        ("b 10:123 rw\n", False, True),
        ("", False, True),
    ],
)
def test_cgroup_v1(machine: Machine, rules: str, iommu: bool, enforced: bool) -> None:
    machine.file("/sys/fs/cgroup/devices/guests.slice/devices.list", rules)
    gate = _device_filter.read_filter(machine.host, "/guests.slice")
    assert gate is not None
    assert (gate.allows("c", 10, 123), gate.enforced) == (iommu, enforced)


def test_a_cgroup_that_is_not_there(machine: Machine) -> None:
    assert _device_filter.read_filter(machine.host, "/none.slice") is None
