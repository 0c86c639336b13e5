# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Which devices the kernel holds the lock of.

While a driver takes or leaves a device, the kernel holds the device's lock, and whoever reads ``driver_override`` (not
with all kernels) or ``sriov_numvfs`` waits for it (drivers/pci/pci-sysfs.c, drivers/pci/iov.c), where no signal reaches
him. A driver that never lets go would so take along every process that only looks. Therefore a child looks first.
"""

from __future__ import annotations

import os
import select
import signal
import time
import typing as t


def held(paths: t.Sequence[str], seconds: float) -> set[str]:
    """Those of some attributes that cannot be read because their device's lock is held all the time.

    Args:
        paths: the attributes.
        seconds: how long to wait for each; a driver that takes its time is no reason to give up.
    """
    found = set()
    rest = list(paths)
    while rest:
        read = _read_in_child(rest, seconds)
        found.update(rest[read : read + 1])
        rest = rest[read + 1 :]
    return found


def _read_in_child(paths: t.Sequence[str], seconds: float) -> int:
    """Read attributes in order, in a child; returns how many could be read before one that could not, or all."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        _child(paths, sender)
    os.close(sender)
    count = 0
    try:
        deadline = time.monotonic() + seconds
        while count < len(paths):
            ready, _writable, _failed = select.select([receiver], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(receiver, 4096) if ready else b""
            if not ready:
                return count
            if not chunk:
                break
            count += len(chunk)
            deadline = time.monotonic() + seconds
    finally:
        os.close(receiver)
        if count < len(paths):
            # One that waits in the kernel dies when it comes out of it; nobody waits for it.
            os.kill(child, signal.SIGKILL)
        else:
            os.waitpid(child, 0)
    return len(paths)


def _child(paths: t.Sequence[str], sender: int) -> t.NoReturn:
    """The child keeps nothing of its parent: neither its locks nor the pipes on which Ansible waits for its end."""
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.dup2(sender, 3)
        os.closerange(4, min(os.sysconf("SC_OPEN_MAX"), 1 << 16))
        for path in paths:
            try:
                descriptor = os.open(path, os.O_RDONLY)
                os.read(descriptor, 16)
                os.close(descriptor)
            except OSError:
                pass  # gone, or not there at all: nothing to wait for
            os.write(3, b".")
    finally:
        os._exit(0)
