# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""A host as it is, in so much detail that whatever the collection may change shows; and the differences from that.

Taken before a rollout touches a host, and compared when that host was put back. It looks at more than the collection
writes: a file that some tool wrote in passing shall show, too. What changes by itself (logs, package lists, caches
that are made anew) is left out.
"""

from __future__ import annotations

import os
import stat

from ansible_collections.iommufd.host.plugins.module_utils import _records
from ansible_collections.iommufd.host.plugins.module_utils._files import sha256
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._pci import read_functions

State = dict[str, dict[str, str]]

# With content; of the others only size, mode, owner and target.
HASHED = ("/etc", "/boot", "/usr/lib/udev", "/usr/lib/systemd", "/usr/local", "/var/lib/dkms")
SIZED = ("/usr/lib/modules", "/usr/src", "/opt/iommufd-host", "/var/cache/iommufd-host")

# Caches that their owners write again with the same meaning, and what the network and logins leave.
_PASSING = ("/etc/ld.so.cache", "/etc/resolv.conf", "/etc/machine-id", "/etc/adjtime", "/etc/mtab")

_IMAGES = ("/boot/initrd.img-", "/boot/initramfs-")


def take(host: Host) -> State:
    """The host as it is now."""
    return {
        "file": _files(host),
        "initramfs": _initramfs(host),
        "package": _packages(host),
        "PCI function": _functions(host),
        "node": _nodes(host),
        "kernel": _kernel(host),
    }


def differences(before: State, now: State) -> list[str]:
    """One line for each thing that is not as it was."""
    lines = []
    for kind in dict.fromkeys([*before, *now]):
        old, new = before.get(kind, {}), now.get(kind, {})
        lines += [
            f"{kind} {name}: {old.get(name, 'absent')} => {new.get(name, 'absent')}"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
    return lines


def _files(host: Host) -> dict[str, str]:
    found: dict[str, str] = {}
    for top in HASHED + SIZED:
        real = host.path(top)
        for directory, names, leaves in os.walk(real):
            shown = top + directory[len(real) :]
            names[:] = [name for name in names if name != "__pycache__"]
            for name in names + leaves:
                path = f"{shown}/{name}"
                if path in found or path.startswith((*_PASSING, _records.DIRECTORY)):
                    continue
                said = _file(os.path.join(directory, name), path.startswith(HASHED) and not path.startswith(_IMAGES))
                if said is not None:
                    found[path] = said
    return found


def _file(real: str, with_content: bool) -> str | None:
    try:
        status = os.lstat(real)
        said = f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid}"
        if stat.S_ISLNK(status.st_mode):
            return f"{said} -> {os.readlink(real)}"
        if not stat.S_ISREG(status.st_mode):
            return said
        if with_content:
            return f"{said} {sha256(real)[:20]}"
        # An initramfs is packed anew with other times; what it holds is compared by its list.
        return said if real.rpartition("/")[2].startswith(("initrd", "initramfs")) else f"{said} {status.st_size} bytes"
    except OSError:  # gone, or of a file system that does not answer
        return None


def _initramfs(host: Host) -> dict[str, str]:
    found = {}
    for name in host.listdir("/boot"):
        path = f"/boot/{name}"
        if path.startswith(_IMAGES):
            said = host.ask(["lsinitramfs", path], 300) or host.ask(["lsinitrd", "--only-names", path], 300)
            if said is None or not said.ok:
                found[path] = "not listed"
            else:
                found.update({f"{path} {line}": "inside" for line in said.stdout.splitlines()})
    return found


def _packages(host: Host) -> dict[str, str]:
    listed = host.ask(["dpkg-query", "-W", "-f", "${Package}:${Architecture} ${Status} ${Version}\n"], 120)
    if listed is not None:
        marks = host.ask(["apt-mark", "showauto"], 120)
        automatic = set(marks.stdout.split()) if marks is not None else set()
        rows = (line.partition(" ") for line in listed.stdout.splitlines())
        return {
            name: state + (" auto" if name.partition(":")[0] in automatic else " manual")
            for name, _space, state in rows
        }
    listed = host.ask(["rpm", "-qa", "--qf", "%{NAME}.%{ARCH} %{EPOCH}:%{VERSION}-%{RELEASE}\n"], 120)
    return {} if listed is None else dict(line.split(" ", 1) for line in listed.stdout.splitlines() if " " in line)


def _functions(host: Host) -> dict[str, str]:
    found = {}
    for function in read_functions(host):
        found[function.address] = f"driver {function.driver or 'none'} override {function.driver_override or 'none'}"
        if function.sriov is not None and function.sriov.physfn is None:
            found[function.address] += f" VFs {function.sriov.num_vfs}"
    return found


def _nodes(host: Host) -> dict[str, str]:
    found = {}
    for path in [
        "/dev/iommu",
        "/dev/kvm",
        *(f"/dev/vfio/{name}" for name in host.listdir("/dev/vfio")),
        *(f"/dev/vfio/devices/{name}" for name in host.listdir("/dev/vfio/devices")),
    ]:
        status = host.stat(path, follow=False)
        if status is not None:
            found[path] = f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid}"
    return found


def _kernel(host: Host) -> dict[str, str]:
    """The command line, and of the modules those that matter here: others come and go by themselves."""
    modules = (line.partition(" ")[0] for line in (host.read_text("/proc/modules") or "").splitlines())
    ours = {f"module {name}": "loaded" for name in modules if name.startswith(("iommufd", "vfio"))}
    return {"command line": host.read_line("/proc/cmdline") or "", **ours}
