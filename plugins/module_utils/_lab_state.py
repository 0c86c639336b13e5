# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""A lab: the hosts of one directory, and the plans that bring them to a state.

Beside the hosts' own directories lie the lab's key pair, ``inventory.yml``, and a lock for as long as there is a lab.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import typing as t
from pathlib import Path

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._lab_host import Boot, Machine, end, start, wait, write_whole
from ansible_collections.iommufd.host.plugins.module_utils._lab_qemu import (
    accelerator,
    firmware_arguments,
    require_emulator,
    require_iommu,
    require_memory,
)
from ansible_collections.iommufd.host.plugins.module_utils._lab_spec import HostSpec, Json
from ansible_collections.iommufd.host.plugins.module_utils._plan import Action, Plan, stays_removed, wait_until

# Memory that an emulator takes beyond the guest's, in MiB: its own, and the translated code of TCG.
OVERHEAD = 256

_LOCK_TIMEOUT = 1800.0
_SHARED = ("id_ed25519", "id_ed25519.pub", "inventory.yml", ".lock")


class Lab:
    """The hosts of one directory.

    Args:
        lab_dir: the directory; made when it is needed, gone with its last host.
        host: the machine that emulates them.
    """

    def __init__(self, lab_dir: Path, host: Host) -> None:
        self.directory = lab_dir
        self._host = host
        self._lock: int | None = None

    def machine(self, name: str) -> Machine:
        return Machine(self.directory, name)

    def machines(self) -> list[Machine]:
        """All hosts that exist, by name."""
        return [self.machine(path.parent.name) for path in sorted(self.directory.glob("*/state.json"))]

    # -- one run at a time -----------------------------------------------------------------------------------------

    def acquire(self) -> None:
        """Take the lab's lock, and keep it until this process ends.

        Raises:
            HostError: another run held it all the time.
        """
        path = self.directory / ".lock"

        def taken() -> bool:
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The run before us may have removed the file together with the lab.
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                    self._lock = descriptor
                    return True
            except (BlockingIOError, FileNotFoundError):
                pass
            os.close(descriptor)
            return False

        if not wait_until(taken, _LOCK_TIMEOUT, 0.2):
            raise HostError(f"Another run has held the lab {self.directory} for {_LOCK_TIMEOUT:.0f} s")

    def settle(self) -> str | None:
        """Leave the lab in order: the inventory of what runs, or, with no host left, nothing at all.

        Returns:
            The path of the inventory, None where no host exists.
        """
        machines = self.machines()
        if machines:
            path = self.directory / "inventory.yml"
            running = {machine.name: machine.ansible_vars() for machine in machines if machine.pid() is not None}
            # JSON is YAML too, and needs no library to be written.
            write_whole(path, "---\n" + json.dumps({"lab": {"hosts": running}}, indent=2) + "\n", 0o600)
            return str(path)
        for name in _SHARED:
            (self.directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody keeps files of his own there
            self.directory.rmdir()
        return None

    # -- plans -----------------------------------------------------------------------------------------------------

    def plan_up(self, hosts: t.Sequence[HostSpec], restart: bool, timeout: float, check_mode: bool) -> Plan:
        """What brings all hosts up as declared, side by side.

        Args:
            hosts: the hosts.
            restart: shut down those that run, and give them the declared hardware.
            timeout: seconds within which each must answer by ssh.
            check_mode: nothing will be applied: what installs the emulator and builds images did not run either.

        Raises:
            HostError: a host was made of something else than declared, the emulator is missing or too old, or memory
                is short.
        """
        plan = Plan()
        starting: list[HostSpec] = []
        additional = 0
        for host in hosts:
            machine = self.machine(host.name)
            status = machine.status()
            if status == "started":
                if not restart:
                    _require_same_hardware(machine, host)
                    continue
                plan.add(_shut_down([machine], timeout))
            starting.append(host)
            if status == "absent":
                if not check_mode:
                    _require_image(host)
                plan.add(self._create(machine, host))
            else:
                _require_same_image(machine, host)
            if status != "started":
                additional += host.memory + OVERHEAD
        if starting:
            if not check_mode:
                versions: dict[str, tuple[int, int]] = {}
                for host in starting:
                    if host.program not in versions:
                        versions[host.program] = require_emulator(self._host, host.program, host.architecture)
                    require_iommu(versions[host.program], host)
                    firmware_arguments(self._host, host.architecture)
            require_memory(self._host, additional, [host.name for host in starting])
            plan.add(self._boot(starting, timeout))
        return plan

    def plan_down(self, names: t.Sequence[str], timeout: float) -> Plan:
        """What shuts hosts down; no names mean all hosts of the lab."""
        running = [machine for machine in self._named(names) if machine.status() == "started"]
        return Plan([_shut_down(running, timeout)] if running else [])

    def plan_removal(self, names: t.Sequence[str]) -> Plan:
        """What ends hosts and removes all that they had; no names mean all hosts of the lab."""
        plan = Plan()
        for machine in self._named(names):
            status = machine.status()
            if status != "absent" or machine.directory.exists() or machine.failure_log.exists():
                what = f"remove host {machine.name}"
                plan.add(Action(what, machine.name, status, "absent", do=machine.remove, take_back=stays_removed))
        return plan

    def wait_for_running(self, hosts: t.Sequence[HostSpec], timeout: float) -> None:
        """Wait for those hosts that another run started, and perhaps did not see up.

        Raises:
            HostError: one does not answer.
        """
        running = [self.machine(host.name) for host in hosts]
        wait([Boot(one, None, int(one.state()["port"])) for one in running if one.pid() is not None], timeout)

    def reports(self, names: t.Sequence[str]) -> dict[str, Json]:
        """What callers need to know about the named hosts and about all others of the lab."""
        others = [machine.name for machine in self.machines()]
        return {name: self.machine(name).report() for name in dict.fromkeys([*names, *others])}

    def _named(self, names: t.Sequence[str]) -> list[Machine]:
        return [self.machine(name) for name in names] or self.machines()

    # -- steps -----------------------------------------------------------------------------------------------------

    def _create(self, machine: Machine, host: HostSpec) -> Action:
        return Action(
            f"create host {host.name}",
            do=functools.partial(machine.create, host),
            take_back=functools.partial(self._take_back, machine),
        )

    @staticmethod
    def _take_back(machine: Machine) -> None:
        """Remove what was created, but not what tells why it failed."""
        kept = machine.failure_log.read_bytes() if machine.failure_log.exists() else None
        machine.remove()
        if kept is not None:
            machine.failure_log.write_bytes(kept)

    def _boot(self, hosts: t.Sequence[HostSpec], timeout: float) -> Action:
        names = ", ".join(host.name for host in hosts)
        before = "".join(f"{host.name}: {self.machine(host.name).status()}\n" for host in hosts)
        after = "".join(f"{host.name}: started\n" for host in hosts)
        boot = functools.partial(self._boot_all, hosts, timeout)
        return Action(f"start {names}", f"lab {self.directory}", before, after, do=boot)

    def _boot_all(self, hosts: t.Sequence[HostSpec], timeout: float) -> None:
        """Start all, and wait for all. Where one fails, every emulator that was started here is ended."""
        boots: list[Boot] = []
        try:
            for host in hosts:
                boots.append(start(self.machine(host.name), host, accelerator(self._host, host.architecture)))
            wait(boots, timeout)
        except BaseException:
            for boot in boots:
                boot.kill()
            raise


def _shut_down(machines: t.Sequence[Machine], timeout: float) -> Action:
    names = ", ".join(machine.name for machine in machines)

    def cannot() -> None:
        raise HostError("it stays shut down")

    return Action(
        f"shut down {names}",
        f"hosts {names}",
        "".join(f"{machine.name}: started\n" for machine in machines),
        "".join(f"{machine.name}: stopped\n" for machine in machines),
        do=functools.partial(end, machines, timeout),
        take_back=cannot,
    )


def _require_image(host: HostSpec) -> None:
    if not host.image:
        raise HostError(f"host {host.name}: no image is declared, and the host does not exist yet")
    if not Path(host.image).is_file():
        raise HostError(f"host {host.name}: its image {host.image} does not exist. Build it with lab_image")


def _require_same_image(machine: Machine, host: HostSpec) -> None:
    image = machine.state()["image"]
    if host.image and host.image != image:
        raise HostError(
            f"host {host.name} was made from another image than the declared one ({image}, now {host.image}). "
            "Remove the host first (state absent)"
        )
    if not Path(image).is_file():
        raise HostError(f"host {host.name}: its image {image} is gone. Remove the host (state absent)")


def _require_same_hardware(machine: Machine, host: HostSpec) -> None:
    _require_same_image(machine, host)
    runs_with = machine.state()["hardware"]
    different = [name for name, value in host.hardware().items() if value != runs_with.get(name)]
    if different:
        raise HostError(
            f"host {host.name} runs with other hardware than declared ({', '.join(different)}). "
            "The state restarted gives it the declared one"
        )
