# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""On the host: what the modules kernel_args and kernel_modules do, failing or killed halfway.

usage: _kernel_agent.py apply STATE       bring the host to "present" or "absent"
       _kernel_agent.py sound             say what is wrong with the files that the boot depends on, if anything
       _kernel_agent.py failures          let each command fail that a run depends on, and disks be full
       _kernel_agent.py kills COUNT SEED  kill runs at random moments; each next run must converge

Prints one JSON document; exits 1 where something did not hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import typing as t

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from ansible_collections.iommufd.host.plugins.module_utils import _boot, _modules_load
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan

ARGUMENT = "intel_iommu=on"
MODULES = ["vfio-pci"]  # iommufd takes DKMS, which is another run's subject
DROP_IN = pathlib.Path("/etc/default/grub.d/60-iommufd-host.cfg")
LOAD = pathlib.Path("/etc/modules-load.d/iommufd-host.conf")
GRUB = pathlib.Path("/boot/grub/grub.cfg")


class Failed(AssertionError):
    """What is promised did not hold."""


def check(holds: t.Any, says: str) -> None:
    if not holds:
        raise Failed(says)


def plans(state: str) -> list[Plan]:
    if state == "present":
        return [_boot.decide_present(Host(), [], True).plan, _modules_load.plan_present(Host(), MODULES).plan]
    return [_modules_load.plan_absent(Host()).plan, _boot.decide_absent(Host(), []).plan]


def apply(state: str) -> None:
    for plan in plans(state):
        plan.apply()


def done(state: str) -> bool:
    return not any(plan.changed for plan in plans(state))


def files() -> dict[str, str]:
    """Content of what a run may touch, temporary files included."""
    found = {}
    for directory in ("/etc/default", "/etc/modules-load.d", "/boot/grub", "/etc/iommufd-host"):
        for path in sorted(pathlib.Path(directory).rglob("*")):
            if path.is_file() and path.suffix not in (".mod", ".img", ".pf2", ".lst"):
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def sound() -> list[str]:
    """What is wrong with the files that the boot depends on."""
    wrong = []
    text = GRUB.read_text(encoding="utf-8")
    if subprocess.run(["grub-script-check", str(GRUB)], check=False).returncode != 0:
        wrong.append(f"{GRUB} is not valid")
    if "menuentry 'Debian" not in text or not text.rstrip().splitlines()[-1].startswith("### END "):
        wrong.append(f"{GRUB} is not complete")
    entries = [line for line in text.splitlines() if line.strip().startswith("linux\t")]
    if len({ARGUMENT in line.split() for line in entries}) != 1:
        wrong.append(f"{GRUB} has {ARGUMENT} in some entries only")
    for path, wanted in ((DROP_IN, f'{ARGUMENT}"\n'), (LOAD, "vfio-pci\n")):
        if path.exists() and not path.read_text(encoding="utf-8").endswith(wanted):
            wrong.append(f"{path} is not complete")
    return wrong


# -- failures --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def command(name: str, script: str) -> t.Iterator[None]:
    """Another program in place of a command, for as long as the block lasts."""
    path = pathlib.Path("/usr/local/sbin", name)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    try:
        yield
    finally:
        path.unlink()


@contextlib.contextmanager
def full(directory: str) -> t.Iterator[None]:
    """A directory with its files on a file system that has no room left."""
    size = subprocess.run(["du", "-sk", directory], capture_output=True, text=True, check=True).stdout.split()[0]
    shell(f"rm -rf /run/full && cp -a {directory} /run/full")
    shell(f"mount -t tmpfs -o size={int(size) + 16}k full {directory} && cp -a /run/full/. {directory}")
    with contextlib.suppress(OSError), open(f"{directory}/filler", "wb") as filler:
        while True:
            filler.write(b"x" * 4096)
            filler.flush()
    try:
        yield
    finally:
        shell(f"umount {directory}")


def shell(script: str) -> None:
    subprocess.run(["sh", "-c", script], check=True)


FAILURES: dict[str, t.Callable[[], contextlib.AbstractContextManager[None]]] = {
    "grub-mkconfig fails": lambda: command("grub-mkconfig", "echo boom >&2; exit 1"),
    "grub-mkconfig says nothing": lambda: command("grub-mkconfig", "exit 0"),
    "grub-mkconfig writes half": lambda: command("grub-mkconfig", "head -c 3000 /boot/grub/grub.cfg"),
    "grub-mkconfig is killed": lambda: command("grub-mkconfig", "head -c 3000 /boot/grub/grub.cfg; kill -9 $$"),
    "modprobe fails": lambda: command(
        "modprobe", "echo 'modprobe: ERROR: could not insert: Key was rejected' >&2; exit 1"
    ),
    "no room in /boot/grub": lambda: full("/boot/grub"),
    "no room in /etc/default/grub.d": lambda: full("/etc/default/grub.d"),
    "no room in /etc/modules-load.d": lambda: full("/etc/modules-load.d"),
}


def failures() -> list[dict[str, str]]:
    """Each failure, from the host without us; the files must be as before, and one error must name the reason."""
    rows = []
    apply("absent")
    before = files()
    for name, failure in FAILURES.items():
        message = ""
        with failure():
            inside = files()
            for plan in plans("present"):
                try:
                    plan.apply()
                except HostError as error:
                    message = error.message
                    break
            check(message, f"{name}: the run did not fail")
            check("Everything was put back" in message, f"{name}: {message}")
            if "modprobe" not in name and "modules-load" not in name:
                check(files() == inside, f"{name}: left behind: {set(files().items()) ^ set(inside.items())}")
        check(not sound(), f"{name}: {sound()}")
        apply("absent")
        check(files() == before, f"{name}: not as before: {set(files().items()) ^ set(before.items())}")
        rows.append({"failure": name, "message": message})
    return rows


# -- kills -----------------------------------------------------------------------------------------------------------


def run_killed(state: str, delay: float) -> bool:
    """Run towards a state and kill the run, with everything it started, after some seconds; whether it was killed."""
    with subprocess.Popen([sys.executable, __file__, "apply", state], start_new_session=True) as child:
        try:
            child.wait(delay)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
        return child.wait() == -signal.SIGKILL


def kills(count: int, seed: int) -> list[dict[str, t.Any]]:
    """Kill runs at random moments; each next run must converge, and nothing may be broken in between."""
    chance = random.Random(seed)
    rows = []
    times = {}
    for state in ("absent", "present"):
        start = time.monotonic()
        subprocess.run([sys.executable, __file__, "apply", state], check=True)
        times[state] = time.monotonic() - start
    expected = {}
    for state in ("absent", "present"):
        apply(state)
        expected[state] = files()
    while sum(row["killed"] for row in rows) < count:
        state = chance.choice(["present", "absent"])
        apply("absent" if state == "present" else "present")
        delay = chance.uniform(0.0, times[state])
        killed = run_killed(state, delay)
        check(not sound(), f"killed after {delay:.2f} s on the way to {state}: {sound()}")
        left = sorted(set(files()) - set(expected["present"]) - set(expected["absent"]))
        goal = chance.choice(["present", "absent"])
        apply(goal)
        check(done(goal), f"killed after {delay:.2f} s: the second run to {goal} has something to do")
        own = {path: text for path, text in files().items() if not path.endswith("/grub.cfg")}
        wanted = {path: text for path, text in expected[goal].items() if not path.endswith("/grub.cfg")}
        check(own == wanted, f"killed after {delay:.2f} s, then {goal}: {set(own.items()) ^ set(wanted.items())}")
        check(not sound(), f"{goal}: {sound()}")
        rows.append({"state": state, "after": round(delay, 2), "killed": killed, "left": left, "then": goal})
    return rows


def main() -> None:
    what, *words = sys.argv[1:]
    try:
        if what == "apply":
            apply(words[0])
            return
        result: t.Any = sound() if what == "sound" else failures() if what == "failures" else None
        if what == "kills":
            result = kills(int(words[0]), int(words[1]))
    except Failed as error:
        print(json.dumps({"failed": str(error)}))
        sys.exit(1)
    print(json.dumps(result))
    sys.exit(1 if what == "sound" and result else 0)


if __name__ == "__main__":
    main()
