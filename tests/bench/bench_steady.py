# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""site.yml on a host that has converged, against a playbook of builtin modules and shell that does the same.

Neither boots a guest: ours has verified one before and is told verify_when: changed. Both run over the same ssh
settings, with pipelining, in turn, on two lab hosts that are alike (both edit qemu.conf, each in its own way), and must
change nothing. Round trips are the calls of ssh by which something is run on the host.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import tempfile
import typing as t

from bench import CHECKOUT, HERE, Row, alternate

LAB = CHECKOUT / "build" / "bench" / "lab-steady"
HOSTS = HERE / "_steady" / "hosts.yml"
ROUNDS = int(os.environ.get("ROUNDS", "5"))


def play(*arguments: str, trips: pathlib.Path | None = None, steady: bool = False) -> int:
    """Run a playbook; returns the number of round trips."""
    command = ["ansible-playbook", "-i", str(HOSTS), *arguments]
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_PIPELINING": "1"}
    if trips is not None:
        trips.write_text("")
        environment.update(SSH_TRIPS=str(trips))
        command += ["-e", f"ansible_ssh_executable={HERE / '_steady' / 'ssh'}"]
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    if steady and not re.search(r"^(ours|theirs) .* changed=0 ", done.stdout, re.MULTILINE):
        raise RuntimeError(f"not steady:\n{done.stdout[-4000:]}")
    # "-O" only speaks to the connection that is kept open.
    return 0 if trips is None else sum(" -O " not in line for line in trips.read_text().splitlines())


def rows() -> t.Iterator[Row]:
    play("iommufd.host.lab")
    inventory = ("-i", str(LAB / "inventory.yml"))
    ours = (*inventory, "-l", "ours", "iommufd.host.site", "-e", "verify_when=changed")
    other = (*inventory, "-l", "theirs", str(HERE / "_steady" / "playbook.yml"))
    against = "builtin modules and shell"
    try:
        play(*other)
        play(*ours)
        with tempfile.TemporaryDirectory() as directory:
            note = pathlib.Path(directory) / "trips"
            # Once as it is by default, with a guest at each run.
            guest = play(*ours, "-e", "verify_when=always", trips=note, steady=True)
            trips = [play(*one, trips=note, steady=True) for one in (ours, other)]
        yield Row("steady state: round trips, with a guest", guest, trips[1], against, 4 / trips[1], "")
        yield Row("steady state: round trips", trips[0], trips[1], against, 4 / trips[1], "")
        seconds = alternate(lambda: play(*ours, steady=True), lambda: play(*other, steady=True), ROUNDS)
        yield Row("steady state of a host", *seconds, against, 0.4)
    finally:
        play("iommufd.host.lab", "-e", "lab_state=absent")
