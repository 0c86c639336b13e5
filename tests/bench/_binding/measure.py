# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs on the lab host: binds all VFs to vfio-pci in three ways, in turn, from the same start, and prints the seconds.

usage: measure.py MODULE PING ROUNDS     MODULE is vfio_bind, PING is ansible.builtin.ping, as Ansible sends them

Two figures for each way: until its end, and until udev has gone through what it caused, after which the new nodes have
their owners, modes and names. vfio_bind itself waits for that where a rule speaks of them. ``nothing`` is vfio_bind
when nothing is left to do; ``ansible`` is a module that has nothing to do at all: the start of Python, and Ansible's
own part.
"""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

PCI = "/sys/bus/pci"

# The least that does it: no look at uses, groups or character devices, no way back.
LOOP = """
for vf in "$@"; do
    echo vfio-pci >/sys/bus/pci/devices/$vf/driver_override
    [ ! -e /sys/bus/pci/devices/$vf/driver ] || echo $vf >/sys/bus/pci/devices/$vf/driver/unbind
    echo $vf >/sys/bus/pci/drivers_probe
done
"""


def addresses() -> list[str]:
    return sorted(os.path.basename(os.path.realpath(link)) for link in glob.glob(f"{PCI}/devices/*/virtfn*"))


def driver(address: str) -> str:
    path = f"{PCI}/devices/{address}/driver"
    return os.path.basename(os.readlink(path)) if os.path.islink(path) else ""


def write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)


def back(vfs: list[str]) -> None:
    """All VFs with igbvf again, and nothing left to do for udev."""
    for vf in vfs:
        write(f"{PCI}/devices/{vf}/driver_override", "\n")
        if driver(vf) == "vfio-pci":
            write(f"{PCI}/drivers/vfio-pci/unbind", vf)
    # igbvf waits for seconds, with the processor in its hands, for an answer that the emulated PF does not give.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda vf: driver(vf) or write(f"{PCI}/drivers_probe", vf), vfs))
    settle()
    assert {driver(vf) for vf in vfs} == {"igbvf"}, {vf: driver(vf) for vf in vfs}


def settle() -> None:
    subprocess.run(["udevadm", "settle", "--timeout=300"], check=True)


def ours(module: str, vfs: list[str], changed: bool = True) -> None:
    done = subprocess.run([sys.executable, module], capture_output=True, text=True, check=False)
    result = json.loads(done.stdout)
    right = result["changed"] is changed and len(result["devices"]) == len(vfs)
    assert right, done.stdout[-2000:] + done.stderr[-2000:]


def loop(vfs: list[str]) -> None:
    subprocess.run(["sh", "-c", LOOP, "sh", *vfs], check=True)


def driverctl(vfs: list[str]) -> None:
    for vf in vfs:
        subprocess.run(["driverctl", "--nosave", "set-override", vf, "vfio-pci"], check=True)


def main() -> None:
    module, ping, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    vfs = addresses()
    seconds: dict[str, list[float]] = {"ours": [], "loop": [], "driverctl": [], "nothing": [], "ansible": []}
    ready: dict[str, list[float]] = {"ours": [], "loop": [], "driverctl": []}
    ways = {"ours": lambda: ours(module, vfs), "loop": lambda: loop(vfs), "driverctl": lambda: driverctl(vfs)}
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    for number in range(rounds):
        for name, way in ways.items():
            if name == "driverctl" and number:
                continue  # it takes long, and one round tells
            back(vfs)
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
            settle()
            ready[name].append(time.perf_counter() - start)
            left = [vf for vf in vfs if driver(vf) != "vfio-pci"]
            assert not left, f"{name} left {left}"
            if name == "ours":
                start = time.perf_counter()
                ours(module, vfs, changed=False)
                seconds["nothing"].append(time.perf_counter() - start)
                start = time.perf_counter()
                subprocess.run([sys.executable, ping], stdout=subprocess.DEVNULL, check=True)
                seconds["ansible"].append(time.perf_counter() - start)
    print(json.dumps({"vfs": len(vfs), "seconds": seconds, "ready": ready}))


if __name__ == "__main__":
    main()
