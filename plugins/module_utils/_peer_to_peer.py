# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What was measured of peer-to-peer over iommufd on this host, kept for as long as the host is up.

Each measurement names the kernel and the QEMU that it was made with, and counts for these alone. It lies in /run, so
the next boot, which may be one of another kernel, begins anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host

Json = dict[str, t.Any]

PATH = "/run/iommufd-host-peer-to-peer.json"

# Of QEMUs that come and go, the last ones.
_MOST = 16


def identity(host: Host, qemu: str) -> list[t.Any] | None:
    """What tells a binary from another one at the same path: the file itself, its size and time of change (ns)."""
    path = host.realpath(qemu)
    status = None if path is None else host.stat(path)
    return None if status is None else [path, status.st_size, status.st_mtime_ns]


def read_all(host: Host) -> list[Json]:
    """Every measurement that is kept; one that is malformed is passed over."""
    try:
        listed = json.loads(host.read_text(PATH) or "[]")
    except ValueError:
        return []
    found = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return [one for one in found if isinstance(one.get("works"), bool) and isinstance(one.get("kernel"), str)]


def read(host: Host, kernel: str, qemu: str) -> Json | None:
    """The measurement made with this kernel and this QEMU.

    Args:
        host: the host.
        kernel: release of the running kernel.
        qemu: path of the binary.

    Returns:
        ``works``, ``detail``, ``kernel`` and ``qemu`` (its version), or None.
    """
    this = identity(host, qemu)
    for one in read_all(host):
        if this is not None and one["kernel"] == kernel and one.get("binary") == this:
            return {key: one.get(key) for key in ("works", "detail", "kernel", "qemu")}
    return None


def keep(host: Host, kernel: str, qemu: str, version: str, works: bool, detail: str) -> None:
    """Keep a measurement. One that cannot be kept (a full /run) is lost, and measured again when it is asked for.

    Args:
        host: the host.
        kernel: release of the running kernel.
        qemu: path of the binary.
        version: what that says of itself.
        works: whether devices' BARs could be mapped for each other.
        detail: what was seen.
    """
    this = identity(host, qemu)
    new = {"kernel": kernel, "qemu": version, "binary": this, "works": works, "detail": detail}
    known = read_all(host)
    others = [one for one in known if (one["kernel"], one.get("binary")) != (kernel, this)]
    if this is None or new in known:
        return
    # Several guests may end at once: each writes a whole file, and any of them is right.
    temporary = f"{PATH}.{os.getpid()}.tmp"
    try:
        with contextlib.suppress(OSError):
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(json.dumps([*others, new][-_MOST:], indent=1) + "\n")
            os.replace(temporary, PATH)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
