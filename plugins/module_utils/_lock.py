# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""One run at a time: modules that change a host take turns."""

from __future__ import annotations

import contextlib
import fcntl
import os
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._plan import LOCKS, wait_until

# /run is a tmpfs: the file is gone with the next boot, and the kernel drops the lock with the process.
LOCK_PATH = "/run/iommufd-host.lock"


@contextlib.contextmanager
def host_lock(timeout: float = 600.0, path: str = LOCK_PATH) -> t.Iterator[None]:
    """Hold the host's lock while planning and applying.

    Args:
        timeout: seconds to wait for another run.
        path: the lock file.

    Raises:
        HostError: another run held it all the time; names the process. Or this is not root.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except PermissionError as error:
        raise HostError(
            f"{path} cannot be opened: {error.strerror}. Changing a host takes root (become: true)."
        ) from error

    def taken() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    try:
        if not wait_until(taken, timeout, 0.1):
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise HostError(
                f"Another run of this collection (process {holder}) has been changing this host for more than "
                f"{timeout:.0f} s. Wait for it to end, or end it, and run again."
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        LOCKS.append(descriptor)
        try:
            yield
        finally:
            LOCKS.remove(descriptor)
    finally:
        os.close(descriptor)
