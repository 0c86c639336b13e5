# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Binding 56 VFs on a lab host: one call of vfio_bind, driverctl for each VF, and a bare shell loop of sysfs writes.

The VFs are with igbvf before, as a host has them. The module is timed as Ansible runs it on the host, from the start of
Python to its result; how it gets there is not part of it, for any of the three.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import typing as t

from bench import CHECKOUT, HERE, Row

LAB = CHECKOUT / "build" / "bench" / "lab"
DECLARED = HERE / "_binding" / "hosts.yml"
ROUNDS = int(os.environ.get("ROUNDS", "3"))

PFS = [{"address": f"0000:{bus:02x}:00.0", "vfs": 7} for bus in range(1, 9)]


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=False, timeout=3600
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def lab(state: str) -> None:
    run("ansible-playbook", "-i", str(DECLARED), "iommufd.host.lab", "-e", f"lab_state={state}")


def send(name: str, arguments: t.Mapping[str, t.Any], **environment: str) -> None:
    inventory = str(LAB / "inventory.yml")
    run("ansible", "-i", inventory, "all", "-m", name, "-a", json.dumps(arguments), **environment)


def shell(script: str) -> str:
    return run(str(LAB / "binding" / "ssh"), script)


def rows() -> t.Iterator[Row]:
    lab("started")
    try:
        # The host's DHCP client would try each of them.
        unmanaged = "[Match]\\nDriver=igbvf\\n[Link]\\nUnmanaged=yes\\n"
        shell(f"printf '{unmanaged}' >/etc/systemd/network/00-vfs.network; networkctl reload; modprobe igbvf")
        send("iommufd.host.sriov_vfs", {"pfs": PFS, "persistent": False})
        # Ansible leaves behind what it sent and ran.
        shell("rm -rf ~/.ansible/tmp")
        bind = {"devices": [{"vfs_of": one["address"]} for one in PFS], "persistent": False, "require_cdev": False}
        keep = {"ANSIBLE_KEEP_REMOTE_FILES": "1", "ANSIBLE_PIPELINING": "0"}
        send("iommufd.host.vfio_bind", bind, **keep)
        send("ansible.builtin.ping", {"data": "pong"}, **keep)
        # From here on igbvf takes what has no override: measure.py begins each round with that.
        shell("for switch in /sys/bus/pci/devices/*/sriov_drivers_autoprobe; do echo 1 >$switch; done")
        sent = shell("ls ~/.ansible/tmp/*/AnsiballZ_vfio_bind.py ~/.ansible/tmp/*/AnsiballZ_ping.py").split()
        ours, ping = sorted(sent, key=lambda path: path.endswith("_ping.py"))
        script = pathlib.Path(HERE / "_binding" / "measure.py").read_text()
        shell(f"cat >/root/measure.py <<'END'\n{script}\nEND")
        measured = json.loads(shell(f"python3 /root/measure.py {ours} {ping} {ROUNDS}").splitlines()[-1])
    finally:
        lab("absent")
    seconds, ready = measured["seconds"], measured["ready"]
    median = {name: statistics.median(times) for name, times in seconds.items()}
    what = f"binding {measured['vfs']} VFs in one call"
    # What nobody who writes to sysfs device by device gets below: the kernel's own work is in it.
    least = f"driverctl called for each, of which the bare loop is {median['loop'] / median['driverctl']:.2f}"
    yield Row(f"{what}, to driverctl", seconds["ours"], seconds["driverctl"], least, 0.1)
    # When nothing is to do, what is left is the start of Python, the module's own text to be read, and the survey.
    start = f"{median['nothing']:.1f} s of it when nothing is to do, {median['ansible']:.1f} s for ping"
    yield Row(
        f"{what} ({start}), to a shell loop", seconds["ours"], seconds["loop"], "bare shell loop of sysfs writes", 1.5
    )
    waiting = "the same loop and the wait for udev"
    yield Row(f"{what}, until the nodes are ready", ready["ours"], ready["loop"], waiting, 1.5)
