# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Record what a host is, or compare it with a record: the tests' own eyes, independent of the collection.

usage: host_state.py record FILE      write the state of this host to FILE
       host_state.py compare FILE     print each difference from FILE on a line; exit 1 if there is one

Compared are: the files of /etc, /boot, /usr and of the package database (content in /etc and wherever the collection
writes, size elsewhere), what the initramfs images hold, the packages and their marks, driver and override of every
PCI function, the modes of the nodes, the kernel's command line and modules, and the daemons that run.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
import subprocess
import sys

HASHED = (
    "/etc",
    "/boot",
    "/usr/src",
    "/usr/lib/modules",
    "/usr/lib/udev",
    "/usr/lib/systemd",
    "/usr/local",
    "/var/lib/dkms",
)
SIZED = ("/usr", "/var/lib/dpkg/info", "/opt", "/root")

# Caches that their owners rebuild with the same meaning but other bytes, and what a login leaves.
IGNORED = (
    "/etc/ld.so.cache",
    "/etc/resolv.conf",
    "/etc/machine-id",
    "/root/.ansible",
    "/root/.cache",
    "/root/.bash_history",
    "/root/.lesshst",
    "/usr/share/man",
    "/usr/lib/locale",
    "/usr/share/icons",
    "/usr/share/mime",
)


def files() -> dict[str, str]:
    found: dict[str, str] = {}
    for top in HASHED + SIZED:
        for directory, names, leaves in os.walk(top):
            names[:] = [
                name for name in names if os.path.join(directory, name) not in IGNORED and name != "__pycache__"
            ]
            for name in names + leaves:
                path = os.path.join(directory, name)
                if path in IGNORED or path in found:
                    continue
                status = os.lstat(path)
                state = f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid}"
                if stat.S_ISLNK(status.st_mode):
                    state += " -> " + os.readlink(path)
                elif stat.S_ISREG(status.st_mode) and not path.startswith("/boot/initrd.img-"):
                    if path.startswith(HASHED):
                        with open(path, "rb") as file:
                            state += " " + hashlib.sha256(file.read()).hexdigest()[:20]
                    else:
                        state += f" {status.st_size} bytes"
                found[path] = state
    return found


def answer(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""


def initramfs() -> dict[str, str]:
    return {
        f"{image} {line}": "inside"
        for image in glob.glob("/boot/initrd.img-*")
        for line in answer("lsinitramfs", image).splitlines()
    }


def packages() -> dict[str, str]:
    automatic = set(answer("apt-mark", "showauto").split())
    return {
        name: state + (" auto" if name in automatic else " manual")
        for name, _space, state in (
            line.partition(" ")
            for line in answer("dpkg-query", "-W", "-f", "${Package} ${Status} ${Version}\n").splitlines()
        )
    }


def read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def functions() -> dict[str, str]:
    found = {}
    for path in glob.glob("/sys/bus/pci/devices/*"):
        driver = os.path.join(path, "driver")
        name = os.path.basename(os.readlink(driver)) if os.path.islink(driver) else "none"
        found[os.path.basename(path)] = f"driver {name} override {read(path + '/driver_override')}"
    return found


def nodes() -> dict[str, str]:
    found = {}
    for path in ["/dev/iommu", "/dev/kvm", *glob.glob("/dev/vfio/*"), *glob.glob("/dev/vfio/devices/*")]:
        try:
            status = os.lstat(path)
        except OSError:
            continue
        found[path] = f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid}"
    return found


def kernel() -> dict[str, str]:
    loaded = [line.split()[0] for line in read("/proc/modules").splitlines()]
    return {"command line": read("/proc/cmdline"), **{f"module {name}": "loaded" for name in loaded}}


def daemons() -> dict[str, str]:
    """System services only: whatever runs in a login session is this test itself or the task that started it."""
    passing = ("user@", "systemd-hostnamed", "systemd-timedated", "apt-daily", "man-db", "dpkg-db-backup")
    # It ends when it was idle for two minutes (--timeout in Debian's libvirtd.default), and its sockets start it again.
    passing += ("libvirtd.service",)
    found = {name: "running" for name in units("service", "running") if not name.startswith(passing)}
    return {**found, **dict.fromkeys(units("socket", "active"), "active")}


def units(kind: str, state: str) -> list[str]:
    said = answer("systemctl", "list-units", f"--type={kind}", f"--state={state}", "--plain", "--no-legend")
    return [line.split()[0] for line in said.splitlines() if line.split()]


def state() -> dict[str, dict[str, str]]:
    return {
        "file": files(),
        "initramfs": initramfs(),
        "package": packages(),
        "PCI function": functions(),
        "node": nodes(),
        "kernel": kernel(),
        "service": daemons(),
    }


def main() -> int:
    verb, path = sys.argv[1:]
    now = state()
    if verb == "record":
        with open(path, "w") as file:
            json.dump(now, file)
        return 0
    with open(path) as file:
        then = json.load(file)
    differences = [
        f"{kind} {name}: {then[kind].get(name, 'absent')} => {now[kind].get(name, 'absent')}"
        for kind in now
        for name in sorted(set(then[kind]) | set(now[kind]))
        if then[kind].get(name) != now[kind].get(name)
    ]
    print("\n".join(differences))
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
