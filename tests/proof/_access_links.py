# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""On the lab host: break each link between QEMU and the nodes, have the probe name it, see what a guest of libvirt
says, mend it, and have the probe find the chain whole again. One process: on an emulated host each start counts.

usage: _access_links.py MODE FILE [CASE...]     MODE: group, or launcher (a libvirt that passes descriptors)

Prints a line for each link and writes the rows to the file; fails where a link was not named.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _apparmor, _libvirt_acl, _memlock, _probe, _udev
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._nodes import Accounts
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan

ADDRESSES = ["0000:01:00.0", "0000:02:00.0"]
VFIO = "/sys/bus/pci/drivers/vfio-pci"
UNLOAD = "modprobe -r vfio-pci vfio-pci-core vfio_iommu_type1 vfio iommufd"
AMOUNT = _memlock.parse_guests("guests", ["512M"])


class Case(t.NamedTuple):
    """A link: how it is broken and mended (a shell command or a plan), what the probe has to say, and QEMU."""

    name: str
    link: str
    says: str
    break_: str | t.Callable[[Host], Plan]
    mend: str | t.Callable[[Host], Plan]
    guest: str | None = None


def udev(host: Host) -> Plan:
    access = _udev.resolve_access(Accounts(host), "", "root", "kvm", 0o660)
    return _udev.plan_present(
        _udev.read_state(host, _udev.DEFAULT_PATH), {"iommu": access, "cdevs": access}, True, host
    )


def acl(present: bool) -> t.Callable[[Host], Plan]:
    def plan(host: Host) -> Plan:
        state = _libvirt_acl.read_libvirt(host, _libvirt_acl.DEFAULT_PATH)
        devices = ["/dev/iommu", *(_udev.cdev_link(address) for address in ADDRESSES)]
        return _libvirt_acl.plan_present(state, devices, True) if present else _libvirt_acl.plan_absent(state, True)

    return plan


def apparmor(present: bool) -> t.Callable[[Host], Plan]:
    def plan(host: Host) -> Plan:
        state = _apparmor.read_state(host)
        return _apparmor.plan_present(state, ["iommu", "cdevs"], host) if present else _apparmor.plan_absent(state)

    return plan


def memlock(present: bool) -> t.Callable[[Host], Plan]:
    def plan(host: Host) -> Plan:
        units = _memlock.installed_daemons(host) if present else []
        state = _memlock.read_state(host, units)
        return _memlock.plan(state, AMOUNT if present else None, units, [], True, host)

    return plan


def rules(present: bool) -> t.Callable[[Host], Plan]:
    def plan(host: Host) -> Plan:
        return udev(host) if present else _udev.plan_absent(_udev.read_state(host, _udev.DEFAULT_PATH), host)

    return plan


def every_gate(present: bool) -> t.Callable[[Host], Plan]:
    """What mode group does, for a guest that shall not need it."""
    return lambda host: Plan([step for plan in (rules, acl, apparmor) for step in plan(present)(host).steps])


UNBIND = "; ".join(f"echo {address} >{VFIO}/unbind" for address in ADDRESSES)
BIND = "modprobe iommufd; modprobe vfio-pci; " + "; ".join(
    f"[ -e {VFIO}/{address} ] || echo {address} >/sys/bus/pci/drivers_probe" for address in ADDRESSES
)

MISSING = [
    Case(
        "device on no vfio driver",
        "exists",
        "0000:02:00.0 has no vfio character device: it is bound to no driver",
        f"echo 0000:02:00.0 >{VFIO}/unbind",
        BIND,
    ),
    Case("module not loaded", "exists", "the module iommufd is not loaded", f"{UNBIND}; {UNLOAD}", BIND),
]

ACCOUNTS = "passwd group shadow gshadow passwd- group- shadow- gshadow-"

GROUP = [
    Case(
        "group membership",
        "dac",
        "neither its owner nor in kvm",
        # Debian 13 has kvm as the user's own group, forky among the further ones.
        f"cd /etc; cp -p {ACCOUNTS} /var/tmp/proof; usermod -g libvirt-qemu -G '' libvirt-qemu",
        f"cd /var/tmp/proof; cp -p {ACCOUNTS} /etc",
    ),
    Case("mode of the node", "dac", "root:kvm 0600", "chmod 0600 /dev/iommu", udev),
    Case("mode of a cdev", "dac", "devices/vfio[01]: root:kvm 0600", "chmod 0600 /dev/vfio/devices/vfio0", udev),
    Case(
        "access list",
        "acl",
        "entry for the user libvirt-qemu",
        "setfacl -m u:libvirt-qemu:--- /dev/iommu",
        "setfacl -b /dev/iommu",
    ),
    Case(
        "libvirt's device list",
        "cgroup",
        "cgroup_device_acl does not list /dev/iommu",
        acl(False),
        acl(True),
        # QEMU 10.0, and 11.1.
        "Failed to open /dev/vfio/devices|/dev/iommu does not exist",
    ),
    Case(
        "AppArmor",
        "lsm",
        "profile of libvirt's guests forbids /dev/iommu",
        apparmor(False),
        apparmor(True),
        "Permission denied",
    ),
    Case(
        "limit on pinned memory", "memlock", "may pin 64 MiB", memlock(False), memlock(True), "Cannot allocate memory"
    ),
    *MISSING,
]

POLICY = "/run/systemd/system/libvirtd.service.d/proof.conf"
CLOSED = r"[Service]\nDevicePolicy=closed\nDeviceAllow=/dev/kvm rw\n"
RESTART = "systemctl daemon-reload; systemctl restart libvirtd"
DENY = "/etc/apparmor.d/local/usr.sbin.libvirtd"
RELOAD = "apparmor_parser -r /etc/apparmor.d/usr.sbin.libvirtd"

# libvirt's daemon opens the nodes; QEMU must not be able to.
LAUNCHER = [
    Case(
        "device policy of libvirt's daemon",
        "cgroup",
        "device policy of libvirtd.service .* forbids /dev/iommu to root",
        f"mkdir -p $(dirname {POLICY}); printf '{CLOSED}' >{POLICY}; {RESTART}",
        f"rm -r $(dirname {POLICY}); {RESTART}",
        # libvirt 12.8's own words, which do not lead there.
        "IOMMUFD is not supported by host kernel",
    ),
    Case(
        "AppArmor's profile of libvirt's daemon",
        "lsm",
        "AppArmor's profile libvirtd forbids /dev/iommu",
        f"cp -p {DENY} /var/tmp/proof/local; echo 'deny /dev/iommu rw,' >>{DENY}; {RELOAD}",
        f"cp -p /var/tmp/proof/local {DENY}; {RELOAD}",
        "failed to set memory accounting for iommufd: Bad file descriptor",
    ),
    Case(
        "nodes that QEMU may open as well",
        "dac",
        "libvirt-qemu could open /dev/iommu itself, which mode launcher is to prevent",
        every_gate(True),
        every_gate(False),
    ),
    *MISSING,
]


def change(host: Host, how: str | t.Callable[[Host], Plan]) -> None:
    if isinstance(how, str):
        subprocess.run(["bash", "-c", how], check=True)
        subprocess.run(["udevadm", "settle"], check=True)
    else:
        plan = how(host)
        assert plan.changed, "there was something to do"
        plan.apply()


def probe(host: Host, launcher: bool) -> dict[str, t.Any]:
    libvirt = _libvirt_acl.read_libvirt(host, _libvirt_acl.DEFAULT_PATH)
    place = _probe.libvirt_place(host, libvirt, launcher, None, None)
    return _probe.probe(host, place, _probe.find_targets(host, ADDRESSES), 1 << 30, 300)


def main() -> int:
    host = Host()
    mode, result, *wanted = sys.argv[1:]
    launcher = mode == "launcher"
    rows = []
    for case in LAUNCHER if launcher else GROUP:
        if wanted and case.name not in wanted:
            continue
        change(host, case.break_)
        broken = probe(host, launcher)["broken"] or {"link": None, "detail": "nothing is broken"}
        said = ""
        if case.guest is not None:
            guest = subprocess.run(
                ["/var/tmp/proof/_access_guest.sh", "libvirt-passing" if launcher else "libvirt"],
                capture_output=True,
                text=True,
                check=False,
            )
            said = guest.stderr.strip() if guest.returncode else "the guest started"
        change(host, case.mend)
        mended = probe(host, launcher)
        good = (
            broken["link"] == case.link
            and re.search(case.says, broken["detail"]) is not None
            and (case.guest is None or re.search(case.guest, said) is not None)
            and mended["ok"]
        )
        rows.append({"name": case.name, "good": good, "broken": broken, "guest": said, "mended": mended["broken"]})
        print(
            f"{'ok' if good else 'NOT OK'}: {case.name}: {broken['link']}: {broken['detail']} | {said[-300:]}",
            flush=True,
        )
        with open(result, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 0 if all(row["good"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
