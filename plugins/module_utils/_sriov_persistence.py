# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Virtual functions that are there at boot, before guests start.

What is wanted stands in one readable file, ``/etc/iommufd-host/sriov.conf``. One small shell script reads it and makes
the VFs, at two moments:

* at boot, before ``sysinit.target`` and so before anything that could start a guest (``iommufd-host-sriov.service``);
  it waits for the drivers of the PFs, which a kernel loads while udev goes through the devices, and for the VFs' own;
* whenever a driver takes a PF later (reload, hot-plug), by a udev rule.

VFs that go to guests are caught as they appear by what ``_persistence.py`` leaves behind.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._files import own_header
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._own_files import (
    OWN_DIRECTORY,
    disable_unit,
    enable_unit,
    forget_unit,
    refuse_without_systemd,
    remove_own,
    write_own,
)
from ansible_collections.iommufd.host.plugins.module_utils._pci import address_key, is_address
from ansible_collections.iommufd.host.plugins.module_utils._plan import Step
from ansible_collections.iommufd.host.plugins.module_utils._sriov import CMODES, Param, VfSettings

CONF = f"{OWN_DIRECTORY}/sriov.conf"
SCRIPT = f"{OWN_DIRECTORY}/sriov.sh"
UNIT_NAME = "iommufd-host-sriov.service"
UNIT = f"/etc/systemd/system/{UNIT_NAME}"
UNIT_LINK = f"/etc/systemd/system/sysinit.target.wants/{UNIT_NAME}"
RULE = "/etc/udev/rules.d/11-iommufd-host-sriov.rules"

_IDENTITY = re.compile(r"[0-9a-f]{4}:[0-9a-f]{4}")


@dataclasses.dataclass(frozen=True)
class KeptPf:
    """A PF in the file.

    Attributes:
        address: PCI address.
        identity: "vendor:device"; a device of another kind at this address is left alone.
        count: number of its VFs.
        autoprobe: whether drivers of the host take them.
        settings: by index.
        params: devlink parameters by name.
    """

    address: str
    identity: str
    count: int
    autoprobe: bool
    settings: dict[int, VfSettings] = dataclasses.field(default_factory=dict)
    params: dict[str, Param] = dataclasses.field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        autoprobe = "on" if self.autoprobe else "off"
        return [
            f"pf {self.address} {self.identity} {self.count} autoprobe {autoprobe}",
            *(
                f"param {self.address} {name} {one.value} {one.cmode}" + (f" before {one.before}" if one.before else "")
                for name, one in sorted(self.params.items())
            ),
            *(f"vf {self.address} {index} {' '.join(one.words())}" for index, one in sorted(self.settings.items())),
        ]


_CONF_HEAD = (
    own_header()
    + """\
# Virtual functions (VFs) that are made at boot, and when a driver takes their physical function (PF) later:
#   pf ADDRESS VENDOR:DEVICE NUMBER autoprobe on|off
#   param ADDRESS NAME VALUE CMODE    set before that, as `devlink dev param set pci/ADDRESS` takes it
#   vf ADDRESS INDEX SETTINGS         as `ip link set DEV vf INDEX` takes them
# Kernel argument iommufd_host=off: none of it for that boot.
"""
)

_SCRIPT = r"""#!/bin/sh
@MARK@
# Makes the VFs that sriov.conf names.
#   sriov.sh boot         all of them; waits until the drivers have what they take
#   sriov.sh add ADDRESS  those of one PF that a driver has just taken

stage=${1:-boot}
only=${2:-}
conf=/etc/iommufd-host/sriov.conf
devices=/etc/iommufd-host/devices.conf
pci=/sys/bus/pci
lock=/run/iommufd-host-sriov.lock

say() {
    echo "<$1>iommufd-host: $2" >/dev/kmsg
}

# Runs a command; what it says when it fails goes to the kernel log. $1: what it is about.
try() {
    about=$1
    shift
    words=$("$@" 2>&1) || say 3 "$about: $*: $words"
}

# Prints the PF's own interface; representors of VFs are beside it in switchdev mode.
nic_of() {
    for net in "$pci/devices/$1"/net/*; do
        [ -e "$net" ] || continue
        port=
        read -r port 2>/dev/null <"$net/phys_port_name"
        case $port in
        *vf[0-9]* | *sf[0-9]*) continue ;;
        esac
        echo "${net##*/}"
        return
    done
}

# Drivers come while udev goes through the devices, and some probe on for a while after that.
await_driver() {
    tries=0
    while [ -e "$1" ] && ! [ -e "$1/driver" ] && [ $tries -lt 100 ]; do
        tries=$((tries + 1))
        sleep 0.1
    done
}

make() {
    device=$pci/devices/$1
    [ -e "$device" ] || return 0
    read -r vendor <"$device/vendor"
    read -r model <"$device/device"
    if [ "${vendor#0x}:${model#0x}" != "$2" ]; then
        say 4 "$1: is ${vendor#0x}:${model#0x}, not $2: no virtual functions"
        return 0
    fi
    [ "$stage" = boot ] && await_driver "$device"
    if ! [ -e "$device/driver" ] || [ -e "$device/vfio-dev" ]; then
        say 3 "$1: no driver that makes virtual functions"
        return 0
    fi
    if ! [ -e "$device/sriov_numvfs" ]; then
        say 3 "$1: offers no virtual functions (off in its firmware, or in the BIOS)"
        return 0
    fi
    while read -r kind address name value mode rest; do
        if [ "$kind $address" = "param $1" ]; then
            try "$1" devlink dev param set "pci/$1" name "$name" value "$value" cmode "$mode"
        fi
    done <"$conf"
    new=
    read -r number <"$device/sriov_numvfs"
    if [ "$number" = 0 ]; then
        # No driver of the host may see a VF before its settings are made, and that of a guest never.
        echo 0 >"$device/sriov_drivers_autoprobe"
        if ! (echo "$3" >"$device/sriov_numvfs") 2>/dev/null; then
            say 3 "$1: its driver did not make $3 virtual functions"
            return 0
        fi
        new=1
        say 6 "$1: $3 virtual functions"
    elif [ "$number" != "$3" ]; then
        say 4 "$1: has $number virtual functions already, not $3"
    fi
    nic=$(nic_of "$1")
    while read -r kind address index settings; do
        if [ "$kind $address" = "vf $1" ]; then
            # shellcheck disable=SC2086
            try "$1" ip link set dev "$nic" vf "$index" $settings
        fi
    done <"$conf"
    if [ "$4" = on ]; then
        echo 1 >"$device/sriov_drivers_autoprobe"
        [ -n "$new" ] && probe "$device"
    else
        echo 0 >"$device/sriov_drivers_autoprobe"
    fi
    return 0
}

# Lets drivers of the host take the VFs that are not for guests.
probe() {
    for link in "$1"/virtfn*; do
        vf=$(cd -P "$link" && echo "${PWD##*/}")
        if [ -e "$link/driver" ] || { [ -r "$devices" ] && grep -q "^$vf " "$devices"; }; then
            continue
        fi
        read -r alias <"$link/modalias"
        modprobe -qb "$alias"
        echo "$vf" >"$pci/drivers_probe"
    done 2>/dev/null
}

[ -r "$conf" ] || exit 0
read -r arguments </proc/cmdline
case " $arguments " in
*" iommufd_host=off "*)
    say 4 "iommufd_host=off: no virtual functions"
    exit 0
    ;;
esac
[ "$stage" = boot ] && udevadm settle --timeout=60
# The service and the rule may come for the same PF at once.
exec 9>"$lock"
flock 9
while read -r kind address identity number word autoprobe rest; do
    if [ "$kind" = pf ] && { [ -z "$only" ] || [ "$only" = "$address" ]; }; then
        make "$address" "$identity" "$number" "$autoprobe" </dev/null
    fi
done <"$conf"
exec 9>&-
[ "$stage" = boot ] && udevadm settle --timeout=60
exit 0
"""

_UNIT = (
    own_header()
    + f"""\
[Unit]
Description=Make the virtual functions of SR-IOV devices before guests start
DefaultDependencies=no
ConditionPathExists={CONF}
After=systemd-udev-trigger.service systemd-modules-load.service iommufd-host-devices.service
# Some drivers take their interface down for a moment.
Wants=network-pre.target
Before=network-pre.target sysinit.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh {SCRIPT} boot
TimeoutStartSec=300

[Install]
WantedBy=sysinit.target
"""
)

_RULE = (
    own_header()
    + f"""\
ACTION=="bind", SUBSYSTEM=="pci", ATTR{{sriov_totalvfs}}=="?*", TEST=="{CONF}", RUN+="/bin/sh {SCRIPT} add $kernel"
"""
)


def script_content() -> bytes:
    return _SCRIPT.replace("@MARK@\n", own_header()).encode()


def render(kept: t.Iterable[KeptPf]) -> bytes:
    """The file's content, in the order of addresses."""
    ordered = sorted(kept, key=lambda one: address_key(one.address))
    return (_CONF_HEAD + "".join(line + "\n" for one in ordered for line in one.lines)).encode()


def parse(text: str) -> dict[str, KeptPf]:
    """The PFs of a file by address; lines that are none of ours (comments, damage) are passed over."""
    found: dict[str, KeptPf] = {}
    rows = [line.split() for line in text.splitlines()]
    for row in rows:
        if len(row) < 6 or row[0] != "pf" or row[4] != "autoprobe":
            continue
        if is_address(row[1]) and _IDENTITY.fullmatch(row[2]) and row[3].isdigit():
            found[row[1]] = KeptPf(row[1], row[2], int(row[3]), row[5] == "on")
    for row in rows:
        one = found.get(row[1]) if len(row) > 3 else None
        if one is not None and row[0] == "vf" and row[2].isdigit():
            one.settings[int(row[2])] = VfSettings.parse(row[3:])
        elif one is not None and row[0] == "param" and len(row) > 4 and row[4] in CMODES:
            one.params[row[2]] = Param(row[3], row[4], row[6] if row[5:6] == ["before"] and len(row) > 6 else None)
    return found


def read_kept(host: Host) -> dict[str, KeptPf]:
    """What is made at boot now, by the PF's address."""
    return parse(host.read_text(CONF) or "")


def plan_kept(host: Host, wanted: t.Mapping[str, KeptPf]) -> list[Step]:
    """The steps after which exactly these PFs get their VFs at boot; none where that is so already.

    Args:
        host: the host as it is.
        wanted: the PFs by address; empty: nothing of ours stays.

    Raises:
        Refusal: a file at one of our paths is not ours.
        HostError: the host has no systemd.
    """
    enabled = host.readlink(UNIT_LINK) is not None
    if not wanted:
        steps = [disable_unit(UNIT_NAME)] if enabled else []
        unit = remove_own(host, UNIT)
        steps += remove_own(host, CONF) + remove_own(host, RULE) + unit + remove_own(host, SCRIPT)
        return [*steps, forget_unit()] if unit and host.exists("/run/systemd/system") else steps
    refuse_without_systemd(host)
    steps = write_own(host, SCRIPT, script_content(), 0o755)
    steps += write_own(host, RULE, _RULE.encode(), 0o644)
    steps += write_own(host, UNIT, _UNIT.encode(), 0o644)
    if not enabled:
        steps.append(enable_unit(UNIT_NAME))
    return steps + write_own(host, CONF, render(wanted.values()), 0o644)
