# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Debian 13 in a directory of this machine, reached by ssh under several names: builders as fast as the machine is."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time
import typing as t

from _lab import Json, check

# With its own processes and mounts: when the first of them ends, all of them do, a build under way among them.
_APART = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--"]

_START = """\
mount --make-rprivate /
mount -t proc proc "$1/proc" && mount -t sysfs -o ro sysfs "$1/sys" && mount --rbind /dev "$1/dev" || exit 1
mkdir -p "$1/run/sshd"
exec chroot "$1" /usr/sbin/sshd -D -e -p "$2" -o ListenAddress=127.0.0.1 -o PidFile=none
"""


@contextlib.contextmanager
def builders(place: pathlib.Path, log: pathlib.Path, **hosts: Json) -> t.Iterator[pathlib.Path]:
    """Have builders for the time of a ``with``.

    Args:
        place: a directory for it, which is kept.
        log: for what their ssh server says.
        hosts: their names, with the variables of each.

    Yields:
        The root directory of them all; ``inventory.json`` beside it names them.
    """
    root = place / "trixie"
    if not (root / "usr/sbin/sshd").exists():
        shutil.rmtree(root, ignore_errors=True)
        place.mkdir(exist_ok=True)
        make = ["mmdebstrap", "--mode=root", "--variant=minbase", "--include=openssh-server,python3", "trixie"]
        subprocess.run(["unshare", "--mount", "--", *make, str(root)], check=True)
        # Nothing is started in there but what we start.
        (root / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
        (root / "usr/sbin/policy-rc.d").chmod(0o755)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / "key")], check=True)
        (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
        shutil.copyfile(place / "key.pub", root / "root/.ssh/authorized_keys")
    shutil.copyfile("/etc/resolv.conf", root / "etc/resolv.conf")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    public = (root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2]
    (place / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(public)}\n")
    variables = {
        "ansible_host": "127.0.0.1",
        "ansible_port": port,
        "ansible_user": "root",
        "ansible_python_interpreter": "/usr/bin/python3",
        "ansible_ssh_private_key_file": str(place / "key"),
        "ansible_ssh_common_args": f"-F none -o UserKnownHostsFile={place / 'known_hosts'}",
    }
    inventory = {"builders": {"hosts": hosts, "vars": variables}}
    (place / "inventory.json").write_text(json.dumps(inventory, indent=2) + "\n")
    with open(log, "w", encoding="utf-8") as file:
        command = [*_APART, "sh", "-c", _START, "sh", str(root), str(port)]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        for _attempt in range(100):
            check(server.poll() is None, f"the ssh server ended: {log.read_text()}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield root
    finally:
        server.kill()
        server.wait()


def break_connections(root: pathlib.Path, seconds: float = 6) -> int:
    """End every process of the builders' ssh server that serves a connection; how many there were.

    For some seconds: ssh mends by itself what breaks between two commands.
    """
    ended, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                here = (process / "root").readlink() == root
                if here and (process / "cmdline").read_text().startswith("sshd-session:"):
                    os.kill(int(process.name), signal.SIGKILL)
                    ended += 1
        time.sleep(0.1)
    return ended
