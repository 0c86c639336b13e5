# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Security modules and memory limits that stand between QEMU and the nodes."""

from __future__ import annotations

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host

_ABSTRACTION = "/etc/apparmor.d/abstractions/libvirt-qemu"
_LOCAL_ABSTRACTION = "/etc/apparmor.d/local/abstractions/libvirt-qemu"


def read_security(host: Host) -> dict[str, t.Any]:
    """AppArmor and SELinux: {apparmor: {enabled, libvirt_allows_iommu}, selinux: {mode}}; None where not known."""
    return {"apparmor": _apparmor(host), "selinux": _selinux(host)}


def _apparmor(host: Host) -> dict[str, t.Any] | None:
    enabled = {"Y": True, "N": False}.get(host.read_line("/sys/module/apparmor/parameters/enabled") or "")
    rules = [host.read_text(path) for path in (_ABSTRACTION, _LOCAL_ABSTRACTION)]
    if enabled is None and rules == [None, None]:
        return None
    lines = [line.split("#", 1)[0] for text in rules if text is not None for line in text.splitlines()]
    # A rule such as "/dev/iommu rw," or one with a glob that covers it.
    allowed = any(line.split()[:1] in (["/dev/iommu"], ["/dev/**"], ["/dev/*"]) for line in lines)
    return {"enabled": enabled, "libvirt_allows_iommu": allowed if rules != [None, None] else None}


def _selinux(host: Host) -> dict[str, t.Any] | None:
    live = {"1": "enforcing", "0": "permissive"}.get(host.read_line("/sys/fs/selinux/enforce") or "")
    if live is not None:
        return {"mode": live}
    for line in (host.read_text("/etc/selinux/config", 65536) or "").splitlines():
        key, equals, value = line.partition("=")
        if equals and key.strip() == "SELINUX":
            return {"mode": "disabled" if host.live else value.strip()}
    return None


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
