# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Which device nodes the cgroup of a running process lets it open, read back from the kernel.

With cgroup v1 the file ``devices.list`` says so. With v2 the gate is a BPF program for each cgroup on the way down,
which no file shows: the programs in force are fetched by bpf(2) and run here, on the three numbers that the kernel
would give them. They are straight-line code (systemd writes loads, masks and compares); one that calls a helper or
reads a map, as libvirt's does, cannot be followed, and the answer is then "unknown", never a guess.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import platform
import re
import stat
import struct
import sys
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host

CGROUPS = "/sys/fs/cgroup"

# The number of bpf(2), which has no wrapper in the C library; 280 is the one of asm-generic/unistd.h.
_NUMBERS = {"x86_64": 321, "i686": 357, "ppc64le": 361, "ppc64": 361, "s390x": 351, "armv7l": 386}
_GENERIC = 280

# linux/bpf.h
_PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD, _PROG_QUERY = 13, 15, 16
_CGROUP_DEVICE = 6
_QUERY_EFFECTIVE = 1
_DEVICE_BLOCK, _DEVICE_CHAR = 1, 2
_ACCESS_READ, _ACCESS_WRITE = 2, 4
_MAX_PROGRAMS = 64
_INSTRUCTION = struct.Struct("=BBhi")


@dataclasses.dataclass(frozen=True)
class DeviceFilter:
    """What stands between a cgroup and the devices.

    Attributes:
        programs: the BPF programs in force (cgroup v2); one that could not be fetched is None.
        rules: the lines of ``devices.list`` (v1); None with v2.
    """

    programs: tuple[bytes | None, ...] = ()
    rules: tuple[str, ...] | None = None

    @property
    def enforced(self) -> bool:
        """Whether there is a gate at all."""
        return bool(self.programs) if self.rules is None else "a *:* rwm" not in self.rules

    def allows(self, kind: str, major: int, minor: int) -> bool | None:
        """Whether a device may be opened for reading and writing; None where a program cannot be followed.

        Args:
            kind: "c" or "b".
            major: its major number.
            minor: its minor number.
        """
        if self.rules is not None:
            return any(_rule_allows(rule, kind, major, minor) for rule in self.rules)
        device = _DEVICE_CHAR if kind == "c" else _DEVICE_BLOCK
        context = struct.pack("=III", (_ACCESS_READ | _ACCESS_WRITE) << 16 | device, major, minor)
        answers = [None if program is None else run_program(program, context) for program in self.programs]
        if any(answer is not None and not answer & 1 for answer in answers):
            return False
        return None if None in answers else True


def allows_node(host: Host, gate: DeviceFilter | None, path: str) -> bool | None:
    """Whether a filter lets a node be opened; None where there is no such node or nobody can tell."""
    status = host.stat(path)
    if gate is None or status is None or not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        return None
    kind = "c" if stat.S_ISCHR(status.st_mode) else "b"
    return gate.allows(kind, os.major(status.st_rdev), os.minor(status.st_rdev))


def read_filter(host: Host, cgroup: str) -> DeviceFilter | None:
    """The filter of a cgroup.

    Args:
        host: the host.
        cgroup: its path as /proc/PID/cgroup and systemd have it ("/machine.slice/x.scope").

    Returns:
        None where it cannot be read: no such cgroup, a captured tree, or not permitted.
    """
    listed = host.read_text(f"{CGROUPS}/devices{cgroup}/devices.list")
    if listed is not None:
        return DeviceFilter(rules=tuple(listed.splitlines()))
    if not host.live or not host.exists(f"{CGROUPS}/cgroup.controllers"):
        return None
    try:
        return DeviceFilter(programs=_programs(f"{CGROUPS}{cgroup}"))
    except OSError:
        return None


def _rule_allows(rule: str, kind: str, major: int, minor: int) -> bool:
    match = re.fullmatch(r"([abc]) (\*|\d+):(\*|\d+) ([rwm]+)", rule.strip())
    if match is None or match[1] not in ("a", kind):
        return False
    numbers = ((match[2], major), (match[3], minor))
    return all(shown in ("*", str(number)) for shown, number in numbers) and {"r", "w"} <= set(match[4])


# -- fetching the programs ---------------------------------------------------------------------------------------------


def _bpf(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_long(_NUMBERS.get(platform.machine(), _GENERIC))
    answer = libc.syscall(number, ctypes.c_int(command), attributes, ctypes.c_uint(len(attributes)))
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(answer)


def _programs(directory: str) -> tuple[bytes | None, ...]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        ids = (ctypes.c_uint32 * _MAX_PROGRAMS)()
        query = struct.pack(
            "=IIIIQII", descriptor, _CGROUP_DEVICE, _QUERY_EFFECTIVE, 0, ctypes.addressof(ids), _MAX_PROGRAMS, 0
        )
        attributes = ctypes.create_string_buffer(query, len(query))
        _bpf(_PROG_QUERY, attributes)
    finally:
        os.close(descriptor)
    count = struct.unpack("=IIIIQII", attributes.raw)[5]
    return tuple(_program(number) for number in ids[:count])


def _program(number: int) -> bytes | None:
    """A program's instructions as the kernel runs them; None where it does not give them away."""
    try:
        descriptor = _bpf(_PROG_GET_FD_BY_ID, ctypes.create_string_buffer(struct.pack("=III", number, 0, 0), 12))
    except OSError:
        return None
    try:
        length = _info(descriptor, 0, 0)
        code = ctypes.create_string_buffer(length or 1)
        if not length or _info(descriptor, ctypes.addressof(code), length) != length:
            return None
        return code.raw[:length]
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _info(descriptor: int, address: int, length: int) -> int:
    """struct bpf_prog_info: type, id, tag, lengths of the jited and the translated program, their addresses."""
    info = ctypes.create_string_buffer(struct.pack("=II8sIIQQ", 0, 0, b"", 0, length, 0, address), 40)
    request = struct.pack("=IIQ", descriptor, len(info), ctypes.addressof(info))
    _bpf(_OBJ_GET_INFO_BY_FD, ctypes.create_string_buffer(request, len(request)))
    return int(struct.unpack("=II8sIIQQ", info.raw)[4])


# -- running them ------------------------------------------------------------------------------------------------------

_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1

_ALU: dict[int, t.Callable[[int, int], int]] = {
    0x00: lambda left, right: left + right,
    0x10: lambda left, right: left - right,
    0x40: lambda left, right: left | right,
    0x50: lambda left, right: left & right,
    0x60: lambda left, right: left << (right & 63),
    0x70: lambda left, right: left >> (right & 63),
    0xA0: lambda left, right: left ^ right,
    0xB0: lambda _left, right: right,
}

_JUMPS: dict[int, t.Callable[[int, int], bool]] = {
    0x00: lambda _left, _right: True,
    0x10: lambda left, right: left == right,
    0x20: lambda left, right: left > right,
    0x30: lambda left, right: left >= right,
    0x40: lambda left, right: bool(left & right),
    0x50: lambda left, right: left != right,
    0xA0: lambda left, right: left < right,
    0xB0: lambda left, right: left <= right,
}

_CONTEXT = 1 << 48  # an address that no program computes by itself


def run_program(program: bytes, context: bytes) -> int | None:
    """Run a BPF program without calls, maps and writes to memory.

    Args:
        program: instructions of eight bytes each (linux/bpf.h, struct bpf_insn).
        context: what register 1 points to.

    Returns:
        Register 0 at its end, or None for a program that does something else.
    """
    if sys.byteorder != "little":  # the halves of an instruction's second byte change places there
        return None
    code = list(_INSTRUCTION.iter_unpack(program[: len(program) // 8 * 8]))
    registers = [0] * 11
    registers[1] = _CONTEXT
    at = 0
    for _step in code:  # no instruction twice: there are no loops to follow
        if not 0 <= at < len(code):
            return None
        operation, pair, offset, value = code[at]
        target, source = pair & 0x0F, pair >> 4
        if target > 10 or source > 10:
            return None
        kind, name = operation & 0x07, operation & 0xF0
        at += 1
        if operation == 0x95:  # exit
            return registers[0] & _MASK32
        if operation == 0x18 and not source and at < len(code):  # a constant of 64 bits, in two instructions
            registers[target] = (value & _MASK32) | (code[at][3] & _MASK32) << 32
            at += 1
        elif kind in (0x04, 0x07):
            mask = _MASK32 if kind == 0x04 else _MASK64
            right = registers[source] if operation & 0x08 else value
            if name not in _ALU:
                return None
            registers[target] = _ALU[name](registers[target] & mask, right & mask) & mask
        elif kind in (0x05, 0x06):
            mask = _MASK64 if kind == 0x05 else _MASK32
            right = registers[source] if operation & 0x08 else value
            if name not in _JUMPS:
                return None
            if _JUMPS[name](registers[target] & mask, right & mask):
                at += offset
        elif kind == 0x01 and operation & 0xE0 == 0x60:  # load from memory
            size = {0x00: 4, 0x08: 2, 0x10: 1, 0x18: 8}[operation & 0x18]
            place = registers[source] + offset - _CONTEXT
            if not 0 <= place <= len(context) - size:
                return None
            registers[target] = int.from_bytes(context[place : place + size], "little")
        else:
            return None
    return None
