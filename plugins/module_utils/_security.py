# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Security modules and memory limits that stand between QEMU and the nodes."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _apparmor
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._nodes import IOMMU

# The daemons that start guests, and in which guests' limits begin.
_UNITS = ("virtqemud.service", "libvirtd.service", "user@.service")
_UNIT_DIRECTORIES = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


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
    """The limits on locked memory: [{domain, type, kib, file}], ``kib`` None for unlimited.

    Those that PAM sets have as ``domain`` what limits.conf has (a user, "@group", "*") and as ``type`` "soft", "hard"
    or "-". Those of systemd have the type "unit" and the unit's name, or "default" and "systemd".

    None where the host has neither /etc/security nor units.
    """
    if not host.is_dir("/etc/security") and not any(map(host.is_dir, _UNIT_DIRECTORIES)):
        return None
    return [*_pam_limits(host), *_unit_limits(host)]


def _unit_limits(host: Host) -> t.Iterator[dict[str, t.Any]]:
    for path in _with_drop_ins(host, ("/etc/systemd/system.conf", "/usr/lib/systemd/system.conf"), "/system.conf"):
        yield from _limit_lines(host, path, "DefaultLimitMEMLOCK", "systemd", "default")
    for unit in _UNITS:
        candidates = tuple(f"{directory}/{unit}" for directory in _UNIT_DIRECTORIES)
        for path in _with_drop_ins(host, candidates, f"/system/{unit}"):
            yield from _limit_lines(host, path, "LimitMEMLOCK", unit, "unit")


def _with_drop_ins(host: Host, candidates: t.Sequence[str], name: str) -> list[str]:
    """The first of some files that is there, and the drop-ins for it, in the order in which they count."""
    drop_ins = {
        entry: f"{parent}/systemd{name}.d/{entry}"
        for parent in ("/usr/lib", "/run", "/etc")  # a later one replaces those of the same name
        for entry in host.listdir(f"{parent}/systemd{name}.d")
        if entry.endswith(".conf")
    }
    return [*[path for path in candidates if host.exists(path)][:1], *(drop_ins[entry] for entry in sorted(drop_ins))]


def _limit_lines(host: Host, path: str, key: str, domain: str, kind: str) -> t.Iterator[dict[str, t.Any]]:
    for value in re.findall(rf"^[ \t]*{key}[ \t]*=[ \t]*(\S+)", host.read_text(path, 1 << 20) or "", re.MULTILINE):
        soft = value.partition(":")[0]  # systemd.exec(5): one value, or "soft:hard"
        size = re.fullmatch(r"(\d{1,18})([KMGTPE]?)", soft)
        if soft == "infinity" or size is not None:
            kib = None if size is None else int(size[1]) * 1024 ** " KMGTPE".index(size[2] or " ") // 1024
            yield {"domain": domain, "type": kind, "kib": kib, "file": path}


def _pam_limits(host: Host) -> list[dict[str, t.Any]]:
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
