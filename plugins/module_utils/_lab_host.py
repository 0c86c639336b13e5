# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""One lab host: what is on disk of it, the process that emulates it, and the way in.

Everything of a host lies in one directory, ``<lab_dir>/<name>``: its overlay disk, the disks of its devices, its keys,
``state.json`` (what it was made of), ``serial.log``, ``qemu.stderr``, ``qemu.pid``, ``qmp.sock`` and ``ssh``, a script
that leads into it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
import typing as t
import uuid
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._lab_qemu import firmware_arguments, host_arguments
from ansible_collections.iommufd.host.plugins.module_utils._lab_run import tail
from ansible_collections.iommufd.host.plugins.module_utils._lab_spec import Device, HostSpec, Json, describe, disk_file
from ansible_collections.iommufd.host.plugins.module_utils._plan import run, wait_until

LOOPBACK = "127.0.0.1"
_POLL = 0.2

# Words on the serial console after which nobody will answer by ssh any more.
_HOPELESS = re.compile(
    rb"Kernel panic - not syncing|You are in emergency mode|Entering emergency mode|grub rescue>"
    rb"|No bootable device|\(initramfs\)"
)


def write_whole(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file so that readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def new_key(path: Path, comment: str) -> None:
    """Make a key pair without a passphrase; raises HostError where ssh-keygen is missing."""
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)])


@dataclass(frozen=True)
class Machine:
    """One host's directory, whether it exists or not, and what runs from it."""

    lab_dir: Path
    name: str

    @property
    def directory(self) -> Path:
        return self.lab_dir / self.name

    @property
    def client_key(self) -> Path:
        """The lab's own private key; no key of the user is touched."""
        return self.lab_dir / "id_ed25519"

    @property
    def failure_log(self) -> Path:
        """Where the console of a start that failed is kept."""
        return self.lab_dir / f"{self.name}-failed.log"

    def state(self) -> Json:
        """What the host was made of; empty where there is no host."""
        try:
            found: Json = json.loads((self.directory / "state.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return found

    def pid(self) -> int | None:
        """The emulator's process, None where it does not run.

        Never a stranger's: the process must carry the random uuid of this host's last start on its command line.
        """
        state = self.state()
        pid, token = int(state.get("pid") or 0), str(state.get("uuid") or "")
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if pid and token else []
        except OSError:
            return None
        return pid if token.encode() in words else None

    def status(self) -> str:
        """``started``, ``stopped`` or ``absent``."""
        if not (self.directory / "state.json").is_file():
            return "absent"
        return "started" if self.pid() is not None else "stopped"

    # -- the way in ------------------------------------------------------------------------------------------------

    def ssh_options(self) -> list[str]:
        """Options of ssh: only the lab's key, and only the host key that this host was given."""
        return [
            *("-F", "none", "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes"),
            *("-o", f'UserKnownHostsFile="{self.directory / "known_hosts"}"'),
            *("-o", f"HostKeyAlias={self.name}"),
        ]

    def ansible_vars(self) -> Json:
        """The variables with which Ansible reaches the host; empty where it does not run."""
        if self.status() != "started":
            return {}
        return {
            "ansible_connection": "ssh",
            "ansible_host": LOOPBACK,
            "ansible_port": self.state()["port"],
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.client_key),
            "ansible_ssh_common_args": " ".join(shlex.quote(word) for word in self.ssh_options()),
            "ansible_python_interpreter": "/usr/bin/python3",
        }

    def report(self) -> Json:
        """What callers need to know about the host."""
        state = self.state()
        running = self.status() == "started"
        return {
            "name": self.name,
            "state": self.status(),
            "directory": str(self.directory),
            "image": state.get("image"),
            "memory": state.get("memory"),
            "cpus": state.get("cpus"),
            "iommu": state.get("iommu"),
            "devices": state.get("devices", []),
            "accelerator": state.get("accelerator") if running else None,
            "port": state.get("port") if running else None,
            "pid": state.get("pid") if running else None,
            "seconds": state.get("seconds") if running else None,
            "ansible_vars": self.ansible_vars(),
        }

    # -- making and removing ---------------------------------------------------------------------------------------

    def create(self, host: HostSpec) -> None:
        """Make the host's directory with its overlay disk and its keys."""
        if not self.client_key.exists():
            new_key(self.client_key, "lab")
        shutil.rmtree(self.directory, ignore_errors=True)
        identity = self.directory / "identity"
        identity.mkdir(parents=True)
        new_key(identity / "lab.host_key", host.name)
        kind, public = (identity / "lab.host_key.pub").read_text(encoding="ascii").split()[:2]
        write_whole(self.directory / "known_hosts", f"{host.name} {kind} {public}\n")
        shutil.copyfile(f"{self.client_key}.pub", identity / "lab.authorized_keys")
        write_whole(identity / "lab.hostname", f"{host.name}\n")
        overlay = str(self.directory / "disk.qcow2")
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", host.image, overlay])
        # Last: with it the host exists.
        self.update_state({"name": host.name, "image": host.image, **_hardware(host)})

    def remove(self) -> None:
        """End the host, whatever it does, and remove all that it had."""
        end([self], 0)
        if self.directory.is_dir():
            shutil.rmtree(self.directory)
        self.failure_log.unlink(missing_ok=True)

    def update_state(self, changes: Json) -> None:
        """Write down what the host is made of."""
        state = dict(self.state(), **changes)
        write_whole(self.directory / "state.json", json.dumps(state, indent=2, sort_keys=True) + "\n")

    # -- the emulator's monitor ------------------------------------------------------------------------------------

    def command(self, word: str, timeout: float = 5.0) -> bool:
        """Send a command without arguments to the emulator; False where it did not take it (it hangs, or is gone)."""
        with contextlib.ExitStack() as stack:
            try:
                # Through the directory's descriptor: a socket's path has at most 107 bytes, a lab's may have more.
                directory = os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, directory)
                channel = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                channel.settimeout(timeout)
                channel.connect(f"/proc/self/fd/{directory}/qmp.sock")
                lines = stack.enter_context(channel.makefile("rw", encoding="utf-8"))
                lines.readline()  # the greeting
                return _execute(lines, "qmp_capabilities") and _execute(lines, word)
            except (OSError, ValueError):
                return False


def _execute(lines: t.TextIO, word: str) -> bool:
    lines.write(json.dumps({"execute": word}) + "\n")
    lines.flush()
    for line in lines:  # events may come before the answer
        answer = json.loads(line)
        if "return" in answer or "error" in answer:
            return "return" in answer
    return False


def _hardware(host: HostSpec) -> Json:
    hardware = host.hardware()
    return {
        "hardware": hardware,
        "memory": host.memory,
        "cpus": host.cpus,
        "iommu": host.iommu,
        "devices": describe(host),
    }


# -- starting ----------------------------------------------------------------------------------------------------------


@dataclass
class Boot:
    """A host on its way up; ``process`` is None where another run started it."""

    machine: Machine
    process: subprocess.Popen[bytes] | None
    port: int
    log_start: int = 0
    channel: socket.socket | None = None

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self._connected = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def ended(self) -> bool:
        """Whether the emulator is gone."""
        if self.process is None:
            return self.machine.pid() is None
        return self.process.poll() is not None

    def running_or_ended(self) -> bool:
        """Whether the emulator has set up all that it was asked for (then it writes its pidfile), or has given up."""
        return self.ended or (self.machine.directory / "qemu.pid").exists()

    def ready(self) -> bool:
        """Whether the ssh server has sent its banner.

        The open port alone proves nothing: the emulator itself accepts, whether or not a guest listens behind it.

        Raises:
            HostError: it never will: the emulator ended, or the console says so.
        """
        if self.ended:
            raise self.failure("the emulator ended during the boot")
        hopeless = _HOPELESS.search(self.console())
        if hopeless:
            raise self.failure(f"the boot failed ({hopeless.group().decode()})")
        return self._banner()

    def _banner(self) -> bool:
        if self.channel is None:
            self.channel = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self.channel.setblocking(False)
            self.channel.connect_ex((LOOPBACK, self.port))
            self._connected = time.monotonic()
        try:
            data = self.channel.recv(64)
        except BlockingIOError:
            # A connection made before the guest had a network may never be answered: try another one. A busy machine
            # takes its time to answer, so not too soon.
            if time.monotonic() - self._connected > 10:
                self.close()
            return False
        except OSError:
            data = b""
        self.close()
        return data.startswith(b"SSH-")

    def console(self) -> bytes:
        """What the serial console printed since this start."""
        try:
            with open(self.machine.directory / "serial.log", "rb") as file:
                file.seek(self.log_start)
                return file.read()
        except OSError:
            return b""

    def failure(self, reason: str) -> HostError:
        """The error that ends the wait; the last words of emulator and guest are its details."""
        directory = self.machine.directory
        text = f"host {self.machine.name}: {reason}"
        if self.console():
            shutil.copyfile(directory / "serial.log", self.machine.failure_log)
            text += f"; the serial console's last lines are below, all of it is in {self.machine.failure_log}"
        else:
            text += "; the serial console stayed silent"
        return HostError(text, emulator=tail(directory / "qemu.stderr"), console=tail(directory / "serial.log"))

    def close(self) -> None:
        """Let go of the connection, not of the host."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def kill(self) -> None:
        """End what `start` started, at once."""
        self.close()
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()


def free_port(preferred: int = 0) -> int:
    """A port of 127.0.0.1 on which nobody listens: the preferred one where that is free."""
    for candidate in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # Connections of the last start that linger in TIME_WAIT do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, candidate))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise HostError(f"There is no free port on {LOOPBACK}")


def start(machine: Machine, host: HostSpec, accelerator: str) -> Boot:
    """Start the emulator; returns as soon as the guest runs, see `wait`.

    Raises:
        HostError: the emulator refused; quotes it.
    """
    directory = machine.directory
    for top in host.devices:
        for device in top.members():
            if device.size:
                _make_disk(directory / disk_file(device), device)
    if host.port and free_port(host.port) != host.port:
        raise HostError(f"host {host.name}: port {host.port} of {LOOPBACK} is in use. Declare another one, or none")
    # Where somebody takes the port between our look and the emulator's, another one is chosen.
    for last_attempt in (False, False, True):
        port = host.port or free_port(int(machine.state().get("port") or 0))
        boot = _launch(machine, host, accelerator, port)
        try:
            wait_until(boot.running_or_ended, 60)
        except BaseException:
            boot.kill()
            raise
        # One that ended after the guest ran is for `wait` to tell.
        if not boot.ended or boot.console():
            _write_ssh(machine, port)
            return boot
        words = tail(directory / "qemu.stderr")
        if last_attempt or "host forwarding" not in "".join(words):
            raise HostError(f"host {host.name}: the emulator refused to start: {' / '.join(words[-3:])}")
        machine.update_state({"port": 0})
    raise AssertionError("the last attempt returns or raises")


def _launch(machine: Machine, host: HostSpec, accelerator: str, port: int) -> Boot:
    directory = machine.directory
    for leftover in ("qemu.pid", "qmp.sock"):
        (directory / leftover).unlink(missing_ok=True)
    log = directory / "serial.log"
    log_start = log.stat().st_size if log.exists() else 0
    token = str(uuid.uuid4())
    with open(directory / "qemu.stderr", "wb") as errors:
        process = subprocess.Popen(  # pylint: disable=ansible-bad-function
            host_arguments(host, accelerator, port, token, firmware_arguments(Host(), host.architecture)),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            # The host outlives this process, and the terminal that it was started from.
            start_new_session=True,
        )
    boot = Boot(machine, process, port, log_start)
    try:
        facts = {"accelerator": accelerator, "port": port, "uuid": token, "pid": process.pid, "seconds": None}
        machine.update_state({**_hardware(host), **facts})
    except BaseException:
        boot.kill()
        raise
    return boot


def _make_disk(path: Path, device: Device) -> None:
    """The file behind a declared disk: made once, then kept over restarts as a real disk's content is."""
    if path.exists() and path.stat().st_size == device.size:
        return
    with open(path, "wb") as file:
        file.write(device.content.encode())
        file.truncate(device.size)


def _write_ssh(machine: Machine, port: int) -> None:
    words = ["ssh", *machine.ssh_options(), "-i", str(machine.client_key), "-p", str(port), f"root@{LOOPBACK}"]
    text = f'#!/bin/sh\nexec {" ".join(shlex.quote(word) for word in words)} "$@"\n'
    write_whole(machine.directory / "ssh", text, 0o755)


def wait(boots: t.Sequence[Boot], timeout: float) -> None:
    """Wait until every host's ssh server answers.

    Args:
        boots: the hosts.
        timeout: seconds from each host's start.

    Raises:
        HostError: for the first host that dies, panics or is late, with its last words. All are left as they are.
    """
    pending = list(boots)
    try:
        while pending:
            for boot in list(pending):
                if boot.ready():
                    boot.machine.failure_log.unlink(missing_ok=True)
                    if boot.process is not None:
                        boot.machine.update_state({"seconds": round(boot.seconds, 1)})
                    pending.remove(boot)
                elif boot.seconds > timeout:
                    raise boot.failure(f"no answer by ssh within {timeout:.0f} s")
            if pending:
                time.sleep(_POLL)
    finally:
        for boot in boots:
            boot.close()


# -- ending ------------------------------------------------------------------------------------------------------------


def end(machines: t.Sequence[Machine], timeout: float) -> dict[str, str]:
    """Shut hosts down, side by side; after ``timeout`` seconds the emulator is ended instead.

    Returns:
        How it went with each that ran: ``powered off``, or ``ended`` (the emulator was told to, or killed).
    """
    pids = {machine: machine.pid() for machine in machines}
    running = [machine for machine in machines if pids[machine] is not None]
    ways = {machine.name: "powered off" for machine in running}
    pressed = 0.0

    def all_off() -> bool:
        nonlocal pressed
        left = [machine for machine in running if machine.pid() is not None]
        # A guest early in its boot does not hear the power button, so it is pressed again.
        if timeout > 0 and time.monotonic() - pressed > 5:
            pressed = time.monotonic()
            for machine in left:
                machine.command("system_powerdown")
        return not left

    wait_until(all_off, timeout, _POLL)
    for machine in running:
        if machine.pid() is None:
            continue
        ways[machine.name] = "ended"
        machine.command("quit")
        if not wait_until(lambda one=machine: one.pid() is None, 5):  # type: ignore[misc]
            with contextlib.suppress(ProcessLookupError):
                os.kill(t.cast(int, pids[machine]), signal.SIGKILL)
            wait_until(lambda one=machine: one.pid() is None, 60)  # type: ignore[misc]
    return ways
