# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs on a lab host for the long runs: takes an order as a JSON line, answers with a JSON line.

Knows nothing of the collection but how to call its module: what it reports of the host it reads on its own.
"""

from __future__ import annotations

import collections
import glob
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import typing as t

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import host_state

PAYLOAD = "/var/tmp/proof/payload"
MODULE = "ansible_collections.iommufd.host.plugins.modules.vfio_bind"
ARGUMENTS = "/var/tmp/proof/arguments.json"

Json = dict[str, t.Any]


def functions(only: t.Sequence[str] = ()) -> dict[str, list[str]]:
    """Driver and override of PCI functions, by address.

    Args:
        only: the functions to look at; empty: all. Reading the override of one whose driver does not let go would wait
            for it.
    """
    found = {}
    for address in only or os.listdir("/sys/bus/pci/devices"):
        path = f"/sys/bus/pci/devices/{address}"
        if os.path.exists(path):
            override = host_state.read(f"{path}/driver_override")
            driver = os.path.basename(os.readlink(f"{path}/driver")) if os.path.islink(f"{path}/driver") else ""
            found[address] = [driver, "" if override == "(null)" else override]
    return found


def call(options: Json, check: bool = False, kill: Json | None = None, timeout: float = 300) -> Json:
    """Run the module once.

    Args:
        options: the module's options.
        check: in check mode.
        kill: ``after`` (seconds), ``signal`` (its name) and ``group`` (the whole process group).
        timeout: seconds.
    """
    arguments = {"ANSIBLE_MODULE_ARGS": {**options, "_ansible_check_mode": check, "_ansible_diff": check}}
    # In a file: as an argument Ansible would first take it for the name of one, and a long name is an error.
    with open(ARGUMENTS, "w") as file:
        json.dump(arguments, file)
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, ARGUMENTS],
        env=dict(os.environ, PYTHONPATH=PAYLOAD),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    with open("/var/tmp/proof/pid", "w") as file:
        file.write(str(process.pid))
    killed = False
    if kill is not None:
        try:
            process.wait(kill["after"])
        except subprocess.TimeoutExpired:
            number = signal.Signals["SIG" + kill["signal"]]
            os.killpg(process.pid, number) if kill.get("group") else process.send_signal(number)
            killed = True
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += f"\nthe module did not end within {timeout} s"
    lines = [line for line in out.splitlines() if line.startswith("{")]
    result = json.loads(lines[-1]) if lines else {}
    return {
        "rc": process.returncode,
        "result": result,
        "stderr": err[-3000:],
        "seconds": round(time.monotonic() - start, 2),
        "killed": killed,
    }


def children() -> list[str]:
    """Processes of the module, or of a child that it left behind, that are still there."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if MODULE.encode() in words:
            found.append(path.split("/")[2])
    return found


def quiet(timeout: float = 180) -> Json:
    """Wait until no process of the module is left."""
    start = time.monotonic()
    while children() and time.monotonic() - start < timeout:
        time.sleep(0.05)
    return {"left": children(), "seconds": round(time.monotonic() - start, 2)}


def sh(script: str, timeout: float) -> Json:
    try:
        done = subprocess.run(
            ["/bin/bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return {"rc": -1, "out": f"did not end within {timeout} s: {error.output!r}"}
    return {"rc": done.returncode, "out": done.stdout}


# -- the state that a refusal must not change ----------------------------------------------------------------------


def processes() -> dict[str, str]:
    """Command lines in user space and how many run of each; without this agent and what carries it."""
    own = set()
    pid = os.getpid()
    while pid > 1:
        own.add(pid)
        with open(f"/proc/{pid}/stat") as file:
            pid = int(file.read().rpartition(")")[2].split()[1])
    found: collections.Counter[str] = collections.Counter()
    for path in glob.glob("/proc/[0-9]*"):
        try:
            with open(f"{path}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            with open(f"{path}/cmdline", "rb") as file:
                words = file.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        except OSError:
            continue
        # udev and ssh keep workers for a while; they come and go with every event and connection.
        passing = re.search(r"udev-worker|^sshd|\(sd-pam\)|systemd --user", words) is not None
        if parent != 2 and words and not passing and int(path[6:]) not in own and parent not in own:
            found[words] += 1
    return {words: str(count) for words, count in found.items()}


def digests(*tops: str) -> dict[str, str]:
    found = {}
    for top in tops:
        for directory, _names, leaves in os.walk(top):
            status = os.lstat(directory)
            found[directory] = f"{status.st_mode:o}"
            for leaf in leaves:
                path = os.path.join(directory, leaf)
                status = os.lstat(path)
                state = f"{status.st_mode:o} {status.st_uid}:{status.st_gid} inode {status.st_ino} {status.st_mtime_ns}"
                if os.path.islink(path):
                    state += " -> " + os.readlink(path)
                elif os.path.isfile(path) and status.st_size < 1 << 20:
                    with open(path, "rb") as file:
                        state += " " + hashlib.sha256(file.read()).hexdigest()[:20]
                found[path] = state
    return found


def light_state() -> dict[str, dict[str, str]]:
    state = {
        "function": host_state.functions(),
        "node": host_state.nodes(),
        "kernel": host_state.kernel(),
        "process": processes(),
        "file": digests("/etc", "/boot"),
    }
    for name, command in (
        ("mount", ["cat", "/proc/self/mountinfo"]),
        ("swap", ["cat", "/proc/swaps"]),
        ("link", ["ip", "-o", "-br", "link"]),
        ("address", ["ip", "-o", "-br", "address"]),
        ("route", ["ip", "route"]),
    ):
        # A virtual function draws a new hardware address whenever its driver takes it.
        text = re.sub(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", "MAC", host_state.answer(*command))
        state[name] = dict.fromkeys(text.splitlines(), "there")
    return state


_kept: dict[str, dict[str, dict[str, str]]] = {}


def remember(name: str) -> int:
    """Record the light state; returns how many things it holds."""
    _kept[name] = light_state()
    return sum(map(len, _kept[name].values()))


def differences(name: str) -> list[str]:
    """What is not as it was recorded."""
    then, now = _kept[name], light_state()
    return [
        f"{kind} {key}: {then[kind].get(key, 'absent')} => {now[kind].get(key, 'absent')}"
        for kind in now
        for key in sorted(set(then[kind]) | set(now[kind]))
        if then[kind].get(key) != now[kind].get(key)
    ]


# -- initramfs -----------------------------------------------------------------------------------------------------


def initramfs(path: str) -> dict[str, str]:
    """Mode and digest of every file in an image, the later archive's where two hold it, as the kernel unpacks it."""
    with open(path, "rb") as file:
        data = file.read()
    found: dict[str, str] = {}
    position = 0
    while position < len(data):
        if data[position] == 0:
            position += 1
        elif data[position : position + 6] in (b"070701", b"070702"):
            position = _archive(data, position, found)
        else:
            tool = ["zstd", "-dcq"] if data[position : position + 4] == b"\x28\xb5\x2f\xfd" else ["gzip", "-dc"]
            plain = subprocess.run(tool, input=data[position:], capture_output=True, check=True).stdout
            inner = 0
            while inner < len(plain):
                inner = inner + 1 if plain[inner] == 0 else _archive(plain, inner, found)
            break
    return found


def _archive(data: bytes, position: int, found: dict[str, str]) -> int:
    """Read one cpio archive ("newc"); returns where it ends."""
    while True:
        fields = [int(data[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = data[position + 110 : position + 110 + length - 1].decode()
        start = (position + 110 + length + 3) & ~3
        position = (start + size + 3) & ~3
        if name == "TRAILER!!!":
            return position
        found[name] = f"{mode:o} {hashlib.sha256(data[start : start + size]).hexdigest()[:20]}"


def images() -> dict[str, str]:
    """The content of all images, in one dictionary."""
    return {
        f"{image} {name}": state
        for image in sorted(glob.glob("/boot/initrd.img-*"))
        for name, state in initramfs(image).items()
    }


ORDERS: dict[str, t.Callable[..., t.Any]] = {
    one.__name__: one for one in (functions, call, children, quiet, sh, remember, differences, images)
}


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"value": ORDERS[order.pop("do")](**order)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
