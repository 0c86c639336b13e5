# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""On the lab host: seconds until the guest is ready, by the module and by the same QEMU command started by hand.

    python3 measure.py ANSIBALLZ ROUNDS

By hand, kernel and file system lie in files already, and nothing but the start of QEMU is counted.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import typing as t

KERNEL, INITRAMFS = f"/boot/vmlinuz-{os.uname().release}", "/run/bench-initramfs"


def by_module(script: str) -> tuple[float, dict[str, t.Any]]:
    """From the start of Python until the guest said that it is ready; and the evidence."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, check=False)
    seconds = time.monotonic() - start
    result = json.loads(done.stdout)
    if not result.get("verified"):
        raise SystemExit(f"not verified: {result.get('msg')}")
    evidence = result["evidence"]
    # What comes after it, the look at the process and the way down, is not part of it.
    return seconds - (evidence["seconds"]["total"] - evidence["seconds"]["ready"]), evidence


def write_initramfs(script: str, addresses: list[str]) -> None:
    """The same file system as the module makes."""
    subprocess.run([sys.executable, script, "explode"], cwd=os.path.dirname(script), stdout=subprocess.PIPE, check=True)
    sys.path.insert(0, os.path.join(os.path.dirname(script), "debug_dir"))
    from ansible_collections.iommufd.host.plugins.module_utils import _guest_image, _qemu_command
    from ansible_collections.iommufd.host.plugins.module_utils._host import Host
    from ansible_collections.iommufd.host.plugins.module_utils._pci import read_function

    host = Host()
    devices = []
    for number, address in enumerate(addresses):
        one = read_function(host, address)
        if one is None:
            raise SystemExit(f"there is no {address}")
        slot = _qemu_command.guest_slot(number)
        devices.append(_guest_image.GuestDevice(slot, one.class_id or "", one.modalias or ""))
    made = _guest_image.build(host, _guest_image.ModuleIndex(host, os.uname().release), "/usr/bin/busybox", devices)
    with open(INITRAMFS, "wb") as file:
        file.write(made.data)


def by_hand(arguments: list[str], nodes: list[str]) -> float:
    """From the start of QEMU until the guest said that it is ready."""
    words = list(arguments)
    given = [os.open(node, os.O_RDWR) for node in nodes]
    console, console_theirs = socket.socketpair()
    report, report_theirs = socket.socketpair()
    opened = [*given, console_theirs.fileno(), report_theirs.fileno()]
    order = iter(given)
    for place, word in enumerate(words):
        if re.match(r"iommufd,|vfio-pci,", word):
            words[place] = re.sub(r"\bfd=\d+", f"fd={next(order)}", word)
        elif word.startswith("socket,id=console"):
            words[place] = f"socket,id=console,fd={console_theirs.fileno()}"
        elif word.startswith("socket,id=report"):
            words[place] = f"socket,id=report,fd={report_theirs.fileno()}"
        elif word == "-kernel":
            words[place + 1] = KERNEL
        elif word == "-initrd":
            words[place + 1] = INITRAMFS
        elif word == "-add-fd":
            kvm = os.open("/dev/kvm", os.O_RDWR)
            given.append(kvm)
            opened.append(kvm)
            words[place + 1] = f"fd={kvm},set=1"
    start = time.monotonic()
    process = subprocess.Popen(words, pass_fds=opened, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    console_theirs.close()
    report_theirs.close()
    console.setblocking(False)
    said = b""
    while b"guest ready" not in said:
        data = report.recv(65536)
        if not data:
            raise SystemExit(f"the guest by hand ended: {said!r}")
        said += data
    seconds = time.monotonic() - start
    report.sendall(b"go\n")
    process.wait(60)
    for descriptor in given:
        os.close(descriptor)
    return seconds


def main() -> None:
    script, rounds = sys.argv[1], int(sys.argv[2])
    seconds: dict[str, list[float]] = {"ours": [], "start": [], "hand": []}
    _warm, evidence = by_module(script)
    nodes = ["/dev/iommu", *(one["vfio_device"] for one in evidence["devices"])]
    write_initramfs(script, [one["address"] for one in evidence["devices"]])
    for _round in range(rounds):
        ours, evidence = by_module(script)
        seconds["ours"].append(ours)
        seconds["start"].append(evidence["seconds"]["ready"])
        seconds["hand"].append(by_hand(evidence["process"]["arguments"], nodes))
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
