# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Playbooks run as a user runs them, and what their recap says."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import time
import typing as t

from _lab import CHECKOUT, Json, check


@dataclasses.dataclass(frozen=True)
class Played:
    """One run of ansible-playbook.

    Attributes:
        status: its exit status.
        seconds: its wall time.
        output: all that it printed.
        changed: how many tasks changed something, by host.
    """

    status: int
    seconds: float
    output: str
    changed: t.Mapping[str, int]

    def went_well(self) -> Played:
        check(self.status == 0, f"ansible-playbook ended with status {self.status}: {self.output[-2500:]}")
        return self


def run_playbook(log: pathlib.Path, *arguments: str, **variables: t.Any) -> Played:
    """Run a playbook; its output goes to a file while it runs."""
    command = ["ansible-playbook", *arguments, "-e", json.dumps(variables)]
    started = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=CHECKOUT,
            env=dict(os.environ, ANSIBLE_NOCOLOR="1"),
            check=False,
        )
    seconds = round(time.monotonic() - started, 1)
    output = log.read_text(encoding="utf-8")
    changed = {
        host: int(number) for host, number in re.findall(r"^(\S+) +: ok=\d+ +changed=(\d+)", output, re.MULTILINE)
    }
    return Played(done.returncode, seconds, output, changed)


def run_task(
    log: pathlib.Path, module: str, options: Json, inventory: t.Sequence[str] = (), host: str = "localhost"
) -> tuple[Json, Played]:
    """One task by a play of its own; the task's result and the run's. A task that fails is no failure of the run."""
    answer = log.resolve().with_suffix(".answer.json")
    answer.unlink(missing_ok=True)
    keep = {"content": "{{ answer | to_nice_json }}", "dest": str(answer), "mode": "0644"}
    here = {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"}
    tasks: list[Json] = [
        {module: options, "register": "answer", "ignore_errors": True},
        {"ansible.builtin.copy": keep, "delegate_to": "localhost", "changed_when": False, "vars": here},
    ]
    # On this machine the distribution's Python, as on a user's hosts, whatever others there are.
    variables = {} if inventory else {"ansible_python_interpreter": "/usr/bin/python3"}
    play = log.resolve().with_suffix(".yml")
    play.write_text(json.dumps([{"hosts": host, "gather_facts": False, "vars": variables, "tasks": tasks}]) + "\n")
    local = ["-i", "localhost,", "-c", "local"]
    played = run_playbook(log, *(inventory or local), str(play)).went_well()
    return json.loads(answer.read_text(encoding="utf-8")), played
