# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The audit of a fleet against ansible.builtin.ping on the same hosts: time, and memory of the controller.

The hosts are captured trees with a local connection: what they cost is this machine's time for both, a process each, so
ssh is not in it. The trees are recordings of real servers (IOMMUFD_HOST_SHARED), or made up by the tests where there
are none. Memory is the largest that ansible-playbook itself had (its forks share most of it).
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import typing as t

from bench import CHECKOUT, Row

SIZES = tuple(int(size) for size in os.environ.get("SIZES", "50 150 500").split())
FORKS = os.environ.get("FORKS", "10")

MEASURE = """\
import os, resource, subprocess, sys, time
start = time.perf_counter()
child = os.fork()
if child == 0:
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(null, number)
    os.execvp(sys.argv[1], sys.argv[1:])
_pid, status, usage = os.wait4(child, 0)
print(status, time.perf_counter() - start, usage.ru_maxrss / 1024)
"""


def trees(root: pathlib.Path) -> list[str]:
    """Captured trees, of which each host of the fleet is one."""
    data = pathlib.Path(os.environ.get("IOMMUFD_HOST_SHARED") or CHECKOUT.parent / "shared") / "data/host-trees"
    made = []
    for recording in sorted(data.glob("*.umockdev.xz")):
        tree = root / recording.name.partition(".")[0]
        command = [sys.executable, str(data / "umockdev_to_sysfs.py"), str(recording), str(tree)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        made.append(str(tree))
    if made:
        return made
    sys.path.insert(0, str(CHECKOUT / "tests/page"))
    sys.path.insert(0, str(CHECKOUT / "build/collections"))
    import fleet

    for kind in fleet.KINDS:
        tree = root / kind
        tree.mkdir()
        fleet.server(tree, kind)
        made.append(str(tree))
    return made


def measure(directory: pathlib.Path, *arguments: str) -> tuple[float, float]:
    """Seconds and MiB of a run of ansible-playbook."""
    command = ["ansible-playbook", "-i", str(directory / "hosts.json"), "--forks", FORKS, *arguments]
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=directory,
        env={**os.environ, "ANSIBLE_PIPELINING": "1"},
    )
    status, seconds, memory = answer.stdout.split()
    if status != "0":
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    return float(seconds), float(memory)


def rows() -> t.Iterator[Row]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    seen: dict[int, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        made = trees(directory)
        ping = [{"hosts": "all", "gather_facts": False, "tasks": [{"ansible.builtin.ping": {}}]}]
        (directory / "ping.json").write_text(json.dumps(ping))
        for size in SIZES:
            hosts = {f"host{number:03}": {"audit_root": made[number % len(made)]} for number in range(size)}
            variables = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
            (directory / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts, "vars": variables}}))
            report = ("iommufd.host.audit", "-e", f"audit_dir={directory}/report")
            measured = {"ours": measure(directory, *report), "ping": measure(directory, str(directory / "ping.json"))}
            found = json.loads((directory / "report/report.json").read_text())["summary"]
            if found["hosts"] != size or found["failed"] or found["unreachable"]:
                raise AssertionError(f"the report of {size} hosts has {found}")
            seen[size] = measured
            for index, (what, unit) in enumerate((("time", "s"), ("memory of the controller", "MiB"))):
                yield Row(
                    f"audit of {size} hosts, {what}",
                    measured["ours"][index],
                    measured["ping"][index],
                    "ansible.builtin.ping",
                    2.5,
                    unit,
                    series=f"audit of a fleet, {what}",
                    size=size,
                    counts="hosts",
                )
    few, many = min(seen), max(seen)
    if few != many:
        for index, what in enumerate(("time", "memory")):
            ours, other = (seen[many][who][index] / seen[few][who][index] for who in ("ours", "ping"))
            yield Row(
                f"growth of {what} from {few} to {many} hosts", ours, other, "ansible.builtin.ping's growth", 2.5, "x"
            )
