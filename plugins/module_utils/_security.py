# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Security modules and memory limits that stand between QEMU and the nodes."""

from __future__ import annotations

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _apparmor
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._nodes import IOMMU


def read_security(host: Host) -> dict[str, t.Any]:
    """AppArmor and SELinux, each None where not known.

    Returns:
        ``apparmor``: ``enabled`` and ``libvirt_allows_iommu``; ``selinux``: ``mode``, ``booleans`` (those about guests,
        on or off) and ``contexts`` (type that the policy gives /dev/iommu and the vfio nodes, by path pattern).
    """
    return {"apparmor": _read_apparmor(host), "selinux": _read_selinux(host)}


def _read_apparmor(host: Host) -> dict[str, t.Any] | None:
    enabled = {"Y": True, "N": False}.get(host.read_line("/sys/module/apparmor/parameters/enabled") or "")
    directory = f"{_apparmor.ABSTRACTION}.d"
    additions = [f"{directory}/{name}" for name in host.listdir(directory)]
    rules = [host.read_text(path) for path in (_apparmor.ABSTRACTION, _apparmor.LOCAL, *additions)]
    known = [text for text in rules if text is not None]
    if enabled is None and not known:
        return None
    allowed = any(_apparmor.allows(text, IOMMU) for text in known)
    return {"enabled": enabled, "libvirt_allows_iommu": allowed if known else None}


def _read_selinux(host: Host) -> dict[str, t.Any] | None:
    mode = {"1": "enforcing", "0": "permissive"}.get(host.read_line("/sys/fs/selinux/enforce") or "")
    policy = None
    for line in (host.read_text("/etc/selinux/config", 65536) or "").splitlines():
        key, equals, value = line.partition("=")
        if equals and key.strip() == "SELINUX" and mode is None:
            mode = "disabled" if host.live else value.strip()
        elif equals and key.strip() == "SELINUXTYPE":
            policy = value.strip()
    if mode is None:
        return None
    directory = "/sys/fs/selinux/booleans"
    booleans = {
        name: (host.read_line(f"{directory}/{name}") or "").startswith("1")
        for name in host.listdir(directory)
        if name.startswith("virt_")
    }
    return {"mode": mode, "booleans": booleans, "contexts": _file_contexts(host, policy)}


def _file_contexts(host: Host, policy: str | None) -> dict[str, str]:
    """Which type the policy gives the nodes: pattern of the path -> type, as file_contexts has them."""
    found = {}
    for name in ("file_contexts", "file_contexts.local"):
        text = host.read_text(f"/etc/selinux/{policy}/contexts/files/{name}", 16 << 20) if policy else None
        for line in (text or "").splitlines():
            fields = line.split()
            if len(fields) >= 2 and fields[0].startswith(("/dev/iommu", "/dev/vfio")) and fields[-1].count(":") >= 2:
                found[fields[0]] = fields[-1].split(":")[2]
    return found


def read_memlock(host: Host) -> list[dict[str, t.Any]] | None:
    """The limits on locked memory that PAM sets: [{domain, type, kib, file}], ``kib`` None for unlimited.

    None where the host has no /etc/security.
    """
    if not host.is_dir("/etc/security"):
        return None
    drop_ins = [name for name in host.listdir("/etc/security/limits.d") if name.endswith(".conf")]
    found = []
    for path in ["/etc/security/limits.conf", *(f"/etc/security/limits.d/{name}" for name in drop_ins)]:
        for line in (host.read_text(path, 1 << 20) or "").splitlines():
            fields = line.split("#", 1)[0].split()
            if len(fields) != 4 or fields[2] != "memlock":
                continue
            unlimited = fields[3] in ("unlimited", "infinity", "-1")
            if unlimited or (fields[3].isascii() and fields[3].isdigit() and len(fields[3]) < 20):
                kib = None if unlimited else int(fields[3])
                found.append({"domain": fields[0], "type": fields[1], "kib": kib, "file": path})
    return found
