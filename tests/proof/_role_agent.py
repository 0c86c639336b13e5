# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""On the host: what the modules of the roles kernel (but DKMS) and access do, failing or killed halfway.

usage: _role_agent.py apply STATE       bring the host to "present" or "absent"
       _role_agent.py sound             say what is wrong with the files that the boot depends on, if anything
       _role_agent.py failures          let each command fail that a run depends on, and disks be full
       _role_agent.py kills COUNT SEED  kill runs at random moments; each next run must converge

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

from ansible_collections.iommufd.host.plugins.module_utils import (
    _apparmor,
    _boot,
    _libvirt_acl,
    _memlock,
    _modules_load,
    _qemu_conf,
    _systemd_unit,
    _udev,
)
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._nodes import Accounts
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan

ARGUMENT = "intel_iommu=on"
MODULES = ["iommufd", "vfio-pci"]
UNITS = ["proof-guest.service"]
GUESTS = ["512M"]

DROP_IN = pathlib.Path("/etc/default/grub.d/60-iommufd-host.cfg")
LOAD = pathlib.Path("/etc/modules-load.d/iommufd-host.conf")
GRUB = pathlib.Path("/boot/grub/grub.cfg")
QEMU_CONF = pathlib.Path(_libvirt_acl.DEFAULT_PATH)
RULES = pathlib.Path(_udev.DEFAULT_PATH)
# As the package has brought it, kept by the first call.
SHIPPED_CONF = pathlib.Path("/var/tmp/proof-qemu.conf")


class Failed(AssertionError):
    """What is promised did not hold."""


def check(holds: t.Any, says: str) -> None:
    if not holds:
        raise Failed(says)


# -- the modules, in the order in which the roles run them (kernel, then access) ---------------------------------------


def arguments(present: bool) -> Plan:
    return (_boot.decide_present(Host(), [], True) if present else _boot.decide_absent(Host(), [])).plan


def modules(present: bool) -> Plan:
    return (_modules_load.plan_present(Host(), MODULES) if present else _modules_load.plan_absent(Host())).plan


def rules(present: bool) -> Plan:
    host = Host()
    state = _udev.read_state(host, _udev.DEFAULT_PATH)
    if not present:
        return _udev.plan_absent(state, host)
    access = _udev.resolve_access(Accounts(host), "", "root", "kvm", 0o660)
    return _udev.plan_present(state, {"iommu": access, "cdevs": access}, True, host)


def device_list(present: bool) -> Plan:
    state = _libvirt_acl.read_libvirt(Host(), _libvirt_acl.DEFAULT_PATH)
    return _libvirt_acl.plan_present(state, ["/dev/iommu"], True) if present else _libvirt_acl.plan_absent(state, True)


def apparmor(present: bool) -> Plan:
    state = _apparmor.read_state(Host())
    return _apparmor.plan_present(state, ["iommu", "cdevs"], Host()) if present else _apparmor.plan_absent(state)


def drop_ins(present: bool) -> Plan:
    host = Host()
    states = [_systemd_unit.read_unit(host, unit) for unit in UNITS]
    wanted = _systemd_unit.Wanted(("/dev/iommu", "char-vfio-dev"), None, (), None)
    return _systemd_unit.plan_present(states, wanted, host) if present else _systemd_unit.plan_absent(states, host)


def memlock(present: bool) -> Plan:
    host = Host()
    units = _memlock.installed_daemons(host) if present else []
    amount = _memlock.parse_guests("guests", GUESTS) if present else None
    return _memlock.plan(_memlock.read_state(host, units), amount, units, ["@kvm"] if present else [], True, host)


PLANS = (arguments, modules, rules, device_list, apparmor, drop_ins, memlock)


def apply(state: str) -> None:
    """Each is planned when those before it are done, as in the roles."""
    for plan in PLANS if state == "present" else reversed(PLANS):
        plan(state == "present").apply()


def done(state: str) -> bool:
    return not any(plan(state == "present").changed for plan in PLANS)


def files() -> dict[str, str]:
    """Content of what a run may touch, temporary files included."""
    found = {}
    directories = ["default", "modules-load.d", "iommufd-host", "udev", "libvirt", "apparmor.d", "systemd", "security"]
    for directory in (pathlib.Path("/boot/grub"), *(pathlib.Path("/etc", name) for name in directories)):
        for path in sorted(directory.rglob("*")):
            if path.is_file() and path.suffix not in (".mod", ".img", ".pf2", ".lst"):
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def sound() -> list[str]:
    """What is wrong with the files that the boot, udev, AppArmor and libvirt depend on, at any moment."""
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
    if RULES.exists() and subprocess.run(["udevadm", "verify", "--no-summary", str(RULES)], check=False).returncode:
        wrong.append(f"{RULES} is not valid")
    conf, shipped = QEMU_CONF.read_bytes(), SHIPPED_CONF.read_bytes()
    default = _qemu_conf.commented_default(shipped) or []
    if _qemu_conf.strip(conf, default) != shipped:
        wrong.append(f"{QEMU_CONF} without our list is not what it was")
    profile = _apparmor.profile_text("proof")
    parser = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "--base", _apparmor.BASE]
    if subprocess.run(parser, input=profile.encode(), check=False).returncode != 0:
        wrong.append("AppArmor does not take the profile of a guest")
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


def but(name: str, word: str) -> t.Callable[[], contextlib.AbstractContextManager[None]]:
    """A command that works but for one of its subcommands (a pattern of the shell)."""
    return lambda: command(name, f'case $1 in {word}) echo boom >&2; exit 1 ;; esac; exec /usr/bin/{name} "$@"')


Failure = t.Callable[[], contextlib.AbstractContextManager[None]]

# What can fail in each of PLANS.
FAILURES: dict[t.Callable[[bool], Plan], dict[str, Failure]] = {
    arguments: {
        "grub-mkconfig fails": lambda: command("grub-mkconfig", "echo boom >&2; exit 1"),
        "grub-mkconfig says nothing": lambda: command("grub-mkconfig", "exit 0"),
        "grub-mkconfig writes half": lambda: command("grub-mkconfig", "head -c 3000 /boot/grub/grub.cfg"),
        "grub-mkconfig is killed": lambda: command("grub-mkconfig", "head -c 3000 /boot/grub/grub.cfg; kill -9 $$"),
        "no room in /boot/grub": lambda: full("/boot/grub"),
        "no room in /etc/default/grub.d": lambda: full("/etc/default/grub.d"),
    },
    modules: {
        "modprobe fails": lambda: command(
            "modprobe", "echo 'modprobe: ERROR: could not insert: Key was rejected' >&2; exit 1"
        ),
        "no room in /etc/modules-load.d": lambda: full("/etc/modules-load.d"),
    },
    rules: {
        "udevadm trigger fails": but("udevadm", "trigger"),
        "no room in /etc/udev/rules.d": lambda: full("/etc/udev/rules.d"),
    },
    device_list: {
        "libvirt's daemon does not start": but("systemctl", "*restart"),
        "no room in /etc/libvirt": lambda: full("/etc/libvirt"),
    },
    apparmor: {
        "AppArmor refuses the rules": lambda: command("apparmor_parser", "echo boom >&2; exit 1"),
    },
    drop_ins: {"systemd cannot be reloaded": but("systemctl", "daemon-reload")},
    memlock: {"libvirt's daemon cannot be restarted": but("systemctl", "*restart")},
}


def failures() -> list[dict[str, str]]:
    """Each failure, when what comes before it is done; one error must name the reason, the files must be as before."""
    rows = []
    apply("absent")
    before = files()
    for plan in PLANS:
        for name, failure in FAILURES[plan].items():
            message = ""
            # It ends by itself after a while; one that does not run has nothing to be told.
            shell("systemctl start libvirtd.service")
            with failure():
                inside = files()
                try:
                    plan(True).apply()
                except HostError as error:
                    message = error.message
                changed = sorted(set(files().items()) ^ set(inside.items()))
            check(message, f"{name}: the run did not fail")
            check(not changed, f"{name}: left behind: {changed}")
            check(not sound(), f"{name}: {sound()}")
            rows.append({"failure": name, "message": message})
        plan(True).apply()
    check(done("present"), "after the failures a second run has something to do")
    apply("absent")
    check(files() == before, f"not as before: {set(files().items()) ^ set(before.items())}")
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
    if not SHIPPED_CONF.exists():
        SHIPPED_CONF.write_bytes(QEMU_CONF.read_bytes())
        os.sync()
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
