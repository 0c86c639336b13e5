# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The survey of a large host, against a plain script that lists and reads the same attributes and does nothing else.

Both are fresh Python processes on the same generated tree, run in turn: what importing and interpreting cost is in
both. Each checks that it saw every function, so that neither can be quick by reading less.
"""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import typing as t

from bench import CHECKOUT, Row, alternate

SIZES = (64, 512, 4096)

# What the survey reads of a function and of a group, and nothing more.
ATTRIBUTES = [
    "modalias",
    "vendor",
    "device",
    "subsystem_vendor",
    "subsystem_device",
    "class",
    "revision",
    "driver_override",
    "numa_node",
    "boot_vga",
    "reset_method",
    "resource",
    "sriov_totalvfs",
    "sriov_numvfs",
]
LINKS = ("driver", "iommu_group", "physfn")

# What else the kernel puts into a function's directory.
_OTHERS = [
    "ari_enabled",
    "broken_parity_status",
    "config",
    "consistent_dma_mask_bits",
    "current_link_speed",
    "current_link_width",
    "d3cold_allowed",
    "dma_mask_bits",
    "enable",
    "irq",
    "local_cpulist",
    "local_cpus",
    "max_link_speed",
    "max_link_width",
    "msi_bus",
    "power_state",
    "remove",
    "rescan",
    "reset",
    "uevent",
]

PLAIN = """\
import os, sys
root = sys.argv[1]
attributes, links = sys.argv[2].split(), sys.argv[3].split()
devices, groups = root + "/sys/bus/pci/devices", root + "/sys/kernel/iommu_groups"
found = {}
for address in os.listdir(devices):
    path = os.path.realpath(devices + "/" + address)
    names = set(os.listdir(path))
    values = {}
    for name in attributes:
        if name in names:
            with open(path + "/" + name) as file:
                values[name] = file.read()
    for name in names:
        if name in links or name.startswith("virtfn"):
            values[name] = os.path.basename(os.readlink(path + "/" + name))
    if "vfio-dev" in names:
        for name in os.listdir(path + "/vfio-dev"):
            with open(path + "/vfio-dev/" + name + "/dev") as file:
                values["vfio"] = name, file.read()
    found[address] = values
for number in os.listdir(groups):
    path = groups + "/" + number
    members = os.listdir(path + "/devices")
    for name in ("type", "reserved_regions"):
        with open(path + "/" + name) as file:
            found[number, name] = members, file.read()
for name in os.listdir(root + "/sys/class/net"):
    path = os.path.realpath(root + "/sys/class/net/" + name)
    os.listdir(path)
    with open(path + "/uevent") as file:
        found[name] = file.read()
print(sum(isinstance(key, str) and ":" in key for key in found))
"""

OURS = """\
import sys
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._survey import survey
print(len(survey(Host(sys.argv[1]))["devices"]))
"""


def generate(root: pathlib.Path, count: int) -> None:
    """A tree of ``count`` functions: root ports, each with a PF that has an interface and 62 VFs, a quarter of the VFs
    on vfio-pci with a character device; every function in a group of its own."""
    number = 0
    while number < count:
        domain, bus = divmod(number // 64, 256)
        parent = f"sys/devices/pci{domain:04x}:{bus:02x}"
        port, physical = f"{domain:04x}:{bus:02x}:00.0", f"{domain:04x}:{bus:02x}:01.0"
        for index in range(min(64, count - number)):
            slot, function = divmod(index, 8)
            address = (port, physical)[index] if index < 2 else f"{domain:04x}:{bus:02x}:{slot + 8:02x}.{function}"
            path = root / (f"{parent}/{address}" if index == 0 else f"{parent}/{port}/{address}")
            _function(root, path, number, "pcieport" if index == 0 else "igb" if index == 1 else "igbvf")
            if index == 1:
                (path / "sriov_totalvfs").write_text("62\n")
                (path / "sriov_numvfs").write_text("62\n")
                interface = path / f"net/eth{number // 64}"
                interface.mkdir(parents=True)
                (interface / "uevent").write_text(f"INTERFACE={interface.name}\n")
                (interface / "device").symlink_to("../..")
                _link(root / f"sys/class/net/{interface.name}", interface)
            elif index > 1:
                (path / "physfn").symlink_to(f"../{physical}")
                (path.parent / physical / f"virtfn{index - 2}").symlink_to(f"../{address}")
                if index % 4 == 0:
                    _link(path / "driver", root / "sys/bus/pci/drivers/vfio-pci", replace=True)
                    (path / f"vfio-dev/vfio{number}").mkdir(parents=True)
                    (path / f"vfio-dev/vfio{number}/dev").write_text(f"511:{number}\n")
            number += 1


def _function(root: pathlib.Path, path: pathlib.Path, number: int, driver: str) -> None:
    path.mkdir(parents=True)
    values = {
        "modalias": "pci:v00008086d000010CAsv00008086sd0000A04Cbc02sc00i00",
        "vendor": "0x8086",
        "device": "0x10ca",
        "subsystem_vendor": "0x8086",
        "subsystem_device": "0xa04c",
        "class": "0x060400" if driver == "pcieport" else "0x020000",
        "revision": "0x01",
        "driver_override": "(null)",
        "numa_node": "0",
        "reset_method": "flr bus",
        "resource": "\n".join(["0x00000000fe000000 0x00000000fe003fff 0x0000000000140204"] * 2 + ["0x0 0x0 0x0"] * 11),
    }
    for name in _OTHERS:
        values[name] = "0"
    for name, value in values.items():
        (path / name).write_text(f"{value}\n")
    _link(path / "driver", root / f"sys/bus/pci/drivers/{driver}")
    _link(root / f"sys/bus/pci/devices/{path.name}", path)
    group = root / f"sys/kernel/iommu_groups/{number}"
    group.mkdir(parents=True)
    (group / "type").write_text("DMA-FQ\n")
    (group / "reserved_regions").write_text("0x00000000fee00000 0x00000000feefffff msi\n")
    _link(path / "iommu_group", group)
    _link(group / f"devices/{path.name}", path)


def _link(here: pathlib.Path, target: pathlib.Path, replace: bool = False) -> None:
    here.parent.mkdir(parents=True, exist_ok=True)
    if replace:
        here.unlink()
    here.symlink_to(os.path.relpath(target, here.parent))


def rows() -> t.Iterator[Row]:
    for count in SIZES:
        with tempfile.TemporaryDirectory() as directory:
            generate(pathlib.Path(directory), count)
            ours, other = alternate(
                functools.partial(_run, OURS, directory, count), functools.partial(_run, PLAIN, directory, count)
            )
        yield Row(
            f"survey of {count:,} functions",
            ours,
            other,
            "a script that lists and reads the same",
            2.0 if count == max(SIZES) else None,
            series="survey of a host",
            size=count,
            counts="functions",
        )


def _run(script: str, directory: str, count: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT / "build/collections")}
    command = [sys.executable, "-c", script, directory, " ".join(ATTRIBUTES), " ".join(LINKS)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    if int(answer.stdout) != count:
        raise AssertionError(f"saw {answer.stdout.strip()} of {count} functions")
