# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Seconds until the verification guest is ready, against the same QEMU command started by hand, on a lab host.

The guest is one with an NVMe disk and an edu device, on KVM. Twice: from the start of QEMU, and from the start of the
module, which also looks at the host, builds the guest's file system and tries what its user may open.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import typing as t

from bench import CHECKOUT, HERE, Row

LAB = CHECKOUT / "build" / "bench" / "guest"
DECLARED = HERE / "_guest" / "hosts.yml"
ROUNDS = int(os.environ.get("ROUNDS", "5"))
DEVICES = ["0000:01:00.0", "0000:00:11.0"]


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=3600,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def lab(state: str) -> None:
    run("ansible-playbook", "-i", str(DECLARED), "iommufd.host.lab", "-e", f"lab_state={state}", "-e", f"lab_dir={LAB}")


def module(name: str, arguments: t.Mapping[str, t.Any], **environment: str) -> None:
    inventory = str(LAB / "inventory.yml")
    run("ansible", "-i", inventory, "all", "-m", f"iommufd.host.{name}", "-a", json.dumps(arguments), **environment)


def shell(script: str) -> str:
    return run(str(LAB / "guest" / "ssh"), script)


def rows() -> t.Iterator[Row]:
    lab("started")
    try:
        shell("modprobe -a iommufd vfio-pci")
        module("vfio_bind", {"devices": DEVICES, "persistent": False})
        shell("rm -rf ~/.ansible/tmp")
        module("guest_verify", {"devices": DEVICES}, ANSIBLE_KEEP_REMOTE_FILES="1", ANSIBLE_PIPELINING="0")
        (sent,) = shell("ls ~/.ansible/tmp/*/AnsiballZ_guest_verify.py").split()
        script = pathlib.Path(HERE / "_guest" / "measure.py").read_text()
        shell(f"cat >/root/measure.py <<'END'\n{script}\nEND")
        measured = json.loads(shell(f"python3 /root/measure.py {sent} {ROUNDS}").splitlines()[-1])
    finally:
        lab("absent")
    hand = "the same QEMU command by hand"
    yield Row("guest with two devices ready, from the start of QEMU", measured["start"], measured["hand"], hand, 1.15)
    yield Row("guest with two devices ready, from the module's start", measured["ours"], measured["hand"], hand, 1.15)
