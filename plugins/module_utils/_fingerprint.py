# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the success of a guest depends on, so that it is known when one has to be booted again.

Each part is read from the host as it is now. A part that cannot be read is null: it then never counts as changed
by itself, but stands beside all that can. Anything that differs, and every reboot, means that what was verified is no
longer what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._files import sha256
from ansible_collections.iommufd.host.plugins.module_utils._guest_machine import binaries
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._pci import read_functions

Json = dict[str, t.Any]

_MODULES = ("iommufd", "vfio", "vfio_iommu_type1", "vfio_pci_core", "vfio_pci", "kvm", "kvm_intel", "kvm_amd")

# The role verify's options that make another guest of it.
_SETTINGS = (
    "launcher", "started_by", "backend", "backends", "iommufds", "hot_plug", "hot_plug_expected", "expendable",
    "arp_target", "user", "memory", "cpus", "memlock", "accelerator",
)  # fmt: skip

# In words, for the reason of another guest.
WORDS = {
    "boot": "the host was rebooted",
    "kernel": "the kernel or its command line is another one",
    "modules": "modules of the kernel are others",
    "firmware": "the firmware is another one",
    "qemu": "QEMU is another one",
    "libraries": "QEMU's libraries are others",
    "busybox": "busybox is another one",
    "devices": "the devices, their drivers or their groups are others",
    "guest": "the guest has other settings",
}


def read_parts(host: Host, wanted: Json, addresses: t.Sequence[str]) -> Json:
    """All parts.

    Args:
        host: the host.
        wanted: the role verify's options.
        addresses: of the guest's devices, in order.
    """
    binary = _find_qemu(host, wanted["qemu"])
    busybox = host.which(wanted["busybox"] or "busybox")
    return {
        "boot": host.read_line("/proc/sys/kernel/random/boot_id"),
        "kernel": [host.read_line("/proc/version"), host.read_line("/proc/cmdline")],
        "modules": {name: _module(host, name) for name in _MODULES},
        "firmware": [host.read_line(f"/sys/class/dmi/id/{name}") for name in ("bios_version", "bios_date")],
        "qemu": [binary, _digest(host, binary)],
        "libraries": _libraries(host, binary),
        "busybox": [busybox, _digest(host, busybox)],
        "devices": _devices(host, addresses),
        "guest": {name: wanted.get(name) for name in _SETTINGS},
    }


def differences(before: Json, now: Json) -> list[str]:
    """In words, what is no longer as it was."""
    return [WORDS[name] for name in WORDS if name not in before or before[name] != _plain(now[name])]


def _plain(value: object) -> object:
    """As it is once it has been through JSON."""
    return json.loads(json.dumps(value))


def _find_qemu(host: Host, wanted: str | None) -> str | None:
    places = (wanted,) if wanted else binaries(platform.machine())
    return next((found for found in map(host.which, places) if found), None)


def _digest(host: Host, path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return sha256(host.path(path))
    except OSError:
        return None


def _libraries(host: Host, path: str | None) -> list[list[t.Any]] | None:
    """The shared libraries with size and time of change."""
    said = host.ask(["ldd", path]) if path is not None else None
    if said is None:
        return None
    found = []
    for library in sorted(set(re.findall(r"(/\S+) \(0x", said.stdout))):
        status = host.stat(library)
        found.append([library, *((status.st_size, status.st_mtime_ns) if status is not None else (None, None))])
    return found


def _module(host: Host, name: str) -> list[str | None] | None:
    """What tells one build of a loaded module from another; null where it is not loaded."""
    directory = f"/sys/module/{name}"
    if not host.exists(directory):
        return None
    build = host.read_bytes(f"{directory}/notes/.note.gnu.build-id")
    return [host.read_line(f"{directory}/srcversion"), hashlib.sha256(build).hexdigest() if build else None]


def _devices(host: Host, addresses: t.Sequence[str]) -> list[Json]:
    found = []
    for function in read_functions(host, addresses):
        shown = function.to_dict()
        names = ("vendor_id", "device_id", "subsystem_vendor_id", "subsystem_device_id", "driver", "iommu_group")
        members = host.listdir(f"/sys/kernel/iommu_groups/{function.iommu_group}/devices")
        found.append(
            {
                "address": function.address,
                **{name: shown.get(name) for name in names},
                "revision": host.read_line(f"/sys/bus/pci/devices/{function.address}/revision"),
                "cdev": function.vfio_device is not None,
                "group": {member: _driver(host, member) for member in members},
            }
        )
    return found


def _driver(host: Host, address: str) -> str | None:
    return host.link_name(os.path.join("/sys/bus/pci/devices", address, "driver"))
