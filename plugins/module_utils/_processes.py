# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The processes of a host that have device nodes open, and which of them are guests."""

from __future__ import annotations

import dataclasses
import os
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._pci import address_key

# Nodes that nearly every process has open and that lead to no PCI function; not worth a look each.
_DULL = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx", "/dev/kmsg")

_GUEST_PROGRAMS = ("kvm", "crosvm", "cloud-hypervisor", "cloud-hyperviso", "firecracker")


@dataclasses.dataclass
class Process:
    """A process.

    Attributes:
        number: its id.
        command: the name that the kernel has for it (15 characters at most); "unknown" where the tree lacks it.
        opened: device nodes, and files in /sys, that it has open; for each the descriptor's link in /proc.
    """

    number: int
    command: str
    opened: dict[str, str]


@dataclasses.dataclass
class Guest:
    """A running virtual machine.

    Attributes:
        name: its name ("vm1"), or "process 1234" where it has none.
        process: the id of its process.
        program: "qemu-system-x86_64".
        user: the id of the user that it runs as; None where it is not known.
        locked_limit: its limit on locked memory in bytes; None for unlimited or unknown.
        nodes: paths of the iommufd, vfio and KVM nodes that it has open, in order.
        devices: addresses of the functions that it has open, in order.
    """

    name: str
    process: int
    program: str
    user: int | None = None
    locked_limit: int | None = None
    nodes: list[str] = dataclasses.field(default_factory=list)
    devices: list[str] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, t.Any]:
        return dataclasses.asdict(self)


def read_processes(host: Host) -> t.Iterator[Process]:
    """All processes but this one. What another user's process has open, only root sees."""
    # In a captured tree that number is somebody else's.
    own = str(os.getpid()) if host.live else ""
    for name in host.listdir("/proc"):
        if not name.isdigit() or not name.isascii() or name == own:
            continue
        opened: dict[str, str] = {}
        for descriptor in host.listdir(f"/proc/{name}/fd"):
            link = f"/proc/{name}/fd/{descriptor}"
            target = host.readlink(link) or ""
            dull = target in _DULL or target.startswith(("/dev/pts/", "/dev/shm/"))
            if target.startswith(("/dev/", "/sys/")) and not dull:
                opened.setdefault(target, link)
        yield Process(int(name), host.read_line(f"/proc/{name}/comm") or "unknown", opened)


def read_guest(host: Host, process: Process, devices: t.Collection[str]) -> Guest | None:
    """The guest that a process is; None for any other program.

    Args:
        host: the host.
        process: the process.
        devices: addresses of the functions that it has open.
    """
    base = f"/proc/{process.number}"
    if not process.opened and not _is_guest(process.command):
        return None  # most processes: not worth a look at their arguments
    arguments = (host.read_text(f"{base}/cmdline", 262144) or "").split("\0")
    # The first argument is what the launcher wanted it to be; the file itself and the kernel's name are not.
    programs = [os.path.basename(one) for one in (arguments[0], host.readlink(f"{base}/exe") or "", process.command)]
    program = next(filter(_is_guest, programs), None)
    if program is None:
        return None
    status = host.read_text(f"{base}/status", 65536) or ""
    user = re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)
    limits = host.read_text(f"{base}/limits", 65536) or ""
    locked = re.search(r"^Max locked memory\s+(\d+)", limits, re.MULTILINE)
    return Guest(
        name=guest_name(arguments) or f"process {process.number}",
        process=process.number,
        program=program,
        user=int(user[1]) if user is not None else None,
        locked_limit=int(locked[1]) if locked is not None else None,
        nodes=sorted(one for one in process.opened if one.startswith(("/dev/iommu", "/dev/vfio/", "/dev/kvm"))),
        devices=sorted(devices, key=address_key),
    )


def _is_guest(program: str) -> bool:
    return program.startswith(("qemu-system-", "qemu-kvm")) or program in _GUEST_PROGRAMS


def guest_name(arguments: t.Sequence[str]) -> str | None:
    """The guest's name on a QEMU command line: ``-name NAME`` or ``-name guest=NAME,debug-threads=on``."""
    for option, value in zip(arguments, arguments[1:]):
        if option in ("-name", "--name"):
            named = re.search(r"(?:^|,)guest=((?:[^,]|,,)*)", value)
            text = named[1] if named is not None else value.partition(",")[0]
            return text.replace(",,", ",") or None
    return None
