# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""The life of lab hosts: create, start, wait for, stop, remove.

Everything of a host lies in one directory, ``<lab_dir>/<name>``: its overlay disk, the disks of its devices, its keys,
``state.json`` (what it was made of), ``serial.log``, ``qemu.stderr``, ``qemu.pid``, ``qmp.sock`` and ``ssh``, a script
that leads into it. What all hosts of a lab share lies beside: the client's key pair and ``inventory.yml``.
"""

from __future__ import annotations

import contextlib
import fcntl
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

from ansible_collections.iommufd.host.plugins.module_utils._lab_image import tail
from ansible_collections.iommufd.host.plugins.module_utils._lab_qemu import (
    Device,
    HostSpec,
    Json,
    LabError,
    accelerator,
    describe,
    disk_file,
    emulator_version,
    host_arguments,
    memory_available,
)

Progress = t.Callable[[str], None]

#: Memory that an emulator takes beyond the guest's, in MiB: its own, and the translated code of TCG.
OVERHEAD = 256

_POLL = 0.2
_ADDRESS = "127.0.0.1"

#: Words on the serial console after which nobody will answer by ssh any more.
_HOPELESS = re.compile(
    rb"Kernel panic - not syncing|You are in emergency mode|Entering emergency mode|grub rescue>"
    rb"|No bootable device|\(initramfs\)"
)


@dataclass
class Machine:
    """One host's directory, whether it exists or not."""

    lab_dir: Path
    name: str

    @property
    def directory(self) -> Path:
        return self.lab_dir / self.name

    def state(self) -> Json:
        """What the host was made of; empty where there is no host."""
        try:
            found: Json = json.loads((self.directory / "state.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return found

    def write_state(self, state: Json) -> None:
        write_whole(self.directory / "state.json", json.dumps(state, indent=2, sort_keys=True) + "\n")

    def pid(self) -> t.Optional[int]:
        """The emulator's process, None where it does not run.

        Never a stranger's: the process must carry the random uuid of this start on its command line.
        """
        state = self.state()
        pid = state.get("pid")
        if not pid:
            return None
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return None
        return int(pid) if str(state["uuid"]).encode() in words else None

    def status(self) -> str:
        """``started``, ``stopped`` or ``absent``."""
        if not (self.directory / "state.json").is_file():
            return "absent"
        return "started" if self.pid() is not None else "stopped"

    def qmp(self, command: str, timeout: float = 5.0) -> bool:
        """Send one command to the emulator. False where it did not take it (it ended meanwhile, or hangs)."""
        try:
            # Through the directory's descriptor: a socket's path may not be longer than 107 bytes, a lab's may.
            directory = os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
                channel.settimeout(timeout)
                channel.connect(f"/proc/self/fd/{directory}/qmp.sock")
                with channel.makefile("rw", encoding="utf-8") as lines:
                    lines.readline()
                    for word in ("qmp_capabilities", command):
                        lines.write(json.dumps({"execute": word}) + "\n")
                        lines.flush()
                        while True:
                            line = lines.readline()
                            if not line:
                                # "quit" may close the channel before it answers.
                                return word == "quit"
                            answer = json.loads(line)
                            if "error" in answer:
                                return False
                            if "return" in answer:
                                break
        except (OSError, ValueError):
            return False
        finally:
            os.close(directory)
        return True

    def report(self) -> Json:
        """What callers need to know about the host."""
        state = self.state()
        status = self.status()
        return {
            "name": self.name,
            "state": status,
            "directory": str(self.directory),
            "image": state.get("image"),
            "memory": state.get("memory"),
            "cpus": state.get("cpus"),
            "iommu": state.get("iommu"),
            "accelerator": state.get("accelerator") if status == "started" else None,
            "port": state.get("port") if status == "started" else None,
            "pid": state.get("pid") if status == "started" else None,
            "devices": state.get("devices", []),
            "ansible_vars": connection(self, state) if status == "started" else {},
        }


def connection(machine: Machine, state: Json) -> Json:
    """The variables with which Ansible reaches a host."""
    return {
        "ansible_connection": "ssh",
        "ansible_host": _ADDRESS,
        "ansible_port": state["port"],
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(machine.lab_dir / "id_ed25519"),
        "ansible_ssh_common_args": " ".join(shlex.quote(word) for word in _ssh_options(machine)),
        "ansible_python_interpreter": "/usr/bin/python3",
    }


def _ssh_options(machine: Machine) -> t.List[str]:
    return [
        *("-F", "none", "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes"),
        *("-o", f'UserKnownHostsFile="{machine.directory / "known_hosts"}"'),
        *("-o", f"HostKeyAlias={machine.name}"),
    ]


def write_whole(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file so that readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as handle:
        handle.write(text)
    os.replace(temporary, path)


@contextlib.contextmanager
def locked(lab_dir: Path) -> t.Iterator[None]:
    """One caller at a time in a lab. The lock file is removed with the last host."""
    lab_dir.mkdir(parents=True, exist_ok=True)
    path = lab_dir / ".lock"
    while True:
        with open(path, "w", encoding="ascii") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                current = os.stat(path).st_ino
            except FileNotFoundError:
                current = 0
            if current != os.fstat(handle.fileno()).st_ino:
                # Removed while we waited for it, together with the lab.
                lab_dir.mkdir(parents=True, exist_ok=True)
                continue
            try:
                yield
            finally:
                if not machines(lab_dir):
                    # The last host is gone, and so is the lab.
                    for name in ("id_ed25519", "id_ed25519.pub", "inventory.yml", ".lock"):
                        with contextlib.suppress(FileNotFoundError):
                            (lab_dir / name).unlink()
                    with contextlib.suppress(OSError):
                        lab_dir.rmdir()
            return


def machines(lab_dir: Path) -> t.List[Machine]:
    """All hosts of a lab, by name."""
    return [Machine(lab_dir, path.parent.name) for path in sorted(lab_dir.glob("*/state.json"))]


# --------------------------------------------------------------------------------------------------------------------
# What is to be done


def plan_start(machine: Machine, host: HostSpec, restart: bool) -> t.List[str]:
    """The steps that bring a host up as declared: of ``stop``, ``create``, ``start``.

    Raises LabError where the host exists but was made of something else than declared, and says how to go on.
    """
    status = machine.status()
    if status == "absent":
        if not host.image:
            raise LabError(f"host {host.name}: image: missing; expected the path of an image made by lab_image")
        if not Path(host.image).is_file():
            raise LabError(f"host {host.name}: image: {host.image} does not exist; build it with lab_image")
        return ["create", "start"]
    state = machine.state()
    if host.image and host.image != state["image"]:
        raise LabError(
            f"host {host.name} was made from another image ({state['image']}, declared is {host.image}); "
            "remove the host first (state absent)"
        )
    if not Path(state["image"]).is_file():
        raise LabError(f"host {host.name}: its image {state['image']} is gone; remove the host (state absent)")
    if status == "stopped":
        return ["start"]
    if restart:
        return ["stop", "start"]
    hardware = host.hardware()
    different = [name for name, value in hardware.items() if value != state["hardware"][name]]
    if different:
        raise LabError(
            f"host {host.name} runs with other hardware than declared ({', '.join(different)}); "
            "state restarted gives it the declared one"
        )
    return []


# --------------------------------------------------------------------------------------------------------------------
# Steps


def ensure_client_key(lab_dir: Path) -> None:
    """The lab's own key pair; no key of the user is touched."""
    if not (lab_dir / "id_ed25519").exists():
        _ssh_keygen(lab_dir / "id_ed25519", "lab")


def _ssh_keygen(path: Path, comment: str) -> None:
    tool = shutil.which("ssh-keygen")
    if tool is None:
        raise LabError("ssh-keygen is not installed; on Debian and Ubuntu: apt install openssh-client")
    subprocess.run(
        [tool, "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
    )


def create(machine: Machine, host: HostSpec) -> None:
    """Make the host's directory with its overlay disk and its keys. Leaves nothing where it fails."""
    ensure_client_key(machine.lab_dir)
    directory = machine.directory
    shutil.rmtree(directory, ignore_errors=True)
    try:
        identity = directory / "identity"
        identity.mkdir(parents=True)
        _ssh_keygen(identity / "lab.host_key", host.name)
        public = (identity / "lab.host_key.pub").read_text(encoding="ascii").split()
        write_whole(directory / "known_hosts", f"{host.name} {public[0]} {public[1]}\n")
        shutil.copyfile(machine.lab_dir / "id_ed25519.pub", identity / "lab.authorized_keys")
        write_whole(identity / "lab.hostname", f"{host.name}\n")
        _overlay(host.image, directory / "disk.qcow2")
        machine.write_state({"name": host.name, "image": host.image, "hardware": {}, "port": 0, "uuid": "", "pid": 0})
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _overlay(image: str, path: Path) -> None:
    tool = shutil.which("qemu-img")
    if tool is None:
        raise LabError("qemu-img is not installed; on Debian and Ubuntu: apt install qemu-utils")
    done = subprocess.run(
        [tool, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image, str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise LabError(f"qemu-img could not make an overlay of {image}: {done.stdout.strip()}")


def _device_disk(directory: Path, device: Device) -> None:
    """The file behind a declared disk: made once, then kept over restarts like a real disk's content."""
    path = directory / disk_file(device)
    if path.exists() and path.stat().st_size == device.size:
        return
    with open(path, "wb") as handle:
        handle.write(device.content.encode())
        handle.truncate(device.size)


def free_port(preferred: int = 0) -> int:
    """A port of 127.0.0.1 on which nobody listens: the preferred one where that is free."""
    for candidate in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_ADDRESS, candidate))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise LabError("no free port on 127.0.0.1")


@dataclass
class Boot:
    """A host on its way up."""

    machine: Machine
    process: "subprocess.Popen[bytes]"
    port: int
    log_start: int
    started: float
    seconds: float = 0.0
    channel: t.Optional[socket.socket] = None
    channel_since: float = 0.0

    def words(self) -> bytes:
        """What the serial console printed since this start."""
        try:
            with open(self.machine.directory / "serial.log", "rb") as handle:
                handle.seek(self.log_start)
                return handle.read()
        except OSError:
            return b""

    def failure(self, reason: str) -> LabError:
        text = f"host {self.machine.name}: {reason}"
        errors = tail(self.machine.directory / "qemu.stderr")
        if errors:
            text += f"\nthe emulator's own words:\n{errors}"
        console = tail(self.machine.directory / "serial.log") if self.words() else ""
        if console:
            text += f"\nthe last lines of the serial console ({self.machine.directory / 'serial.log'}):\n{console}"
        else:
            text += "\nthe serial console stayed silent"
        return LabError(text)

    def ready(self) -> bool:
        """Whether the ssh server has sent its banner.

        The open port alone proves nothing: the emulator itself accepts, whether or not a guest listens behind it.
        """
        if self.channel is None:
            self.channel = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self.channel.setblocking(False)
            self.channel.connect_ex((_ADDRESS, self.port))
            self.channel_since = time.monotonic()
        try:
            data = self.channel.recv(64)
        except BlockingIOError:
            # A connection made before the guest had a network may never be answered: try another one.
            if time.monotonic() - self.channel_since > 3:
                self.close()
            return False
        except OSError:
            data = b""
        self.close()
        return data.startswith(b"SSH-")

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None


def start(machine: Machine, host: HostSpec, port: int = 0) -> Boot:
    """Start the emulator; returns as soon as it runs, see `wait`. ``port`` 0 lets us choose one."""
    directory = machine.directory
    state = machine.state()
    for top in host.devices:
        for device in top.members():
            if device.size:
                _device_disk(directory, device)
    if port and free_port(port) != port:
        raise LabError(f"host {host.name}: port {port} of {_ADDRESS} is in use; name another one, or none")
    kind = accelerator()
    last = ""
    for attempt in range(5):
        chosen = port or free_port(0 if attempt else int(state.get("port") or 0))
        token = str(uuid.uuid4())
        arguments = host_arguments(host, kind, chosen, token)
        for leftover in ("qemu.pid", "qmp.sock"):
            with contextlib.suppress(FileNotFoundError):
                (directory / leftover).unlink()
        try:
            log_start = (directory / "serial.log").stat().st_size
        except OSError:
            log_start = 0
        with open(directory / "qemu.stderr", "wb") as errors:
            process = subprocess.Popen(  # pylint: disable=consider-using-with
                arguments,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
        boot = Boot(machine, process, chosen, log_start, time.monotonic())
        try:
            state.update(host.hardware())
            state.update(
                hardware=host.hardware(),
                devices=describe(host),
                accelerator=kind,
                port=chosen,
                uuid=token,
                pid=process.pid,
            )
            machine.write_state(state)
            # The pidfile is the last thing that the emulator writes before the guest runs.
            while process.poll() is None and not (directory / "qemu.pid").exists():
                time.sleep(0.02)
        except BaseException:
            kill(boot)
            raise
        if process.poll() is None:
            _write_ssh(machine, chosen)
            return boot
        last = tail(directory / "qemu.stderr")
        if port or "host forwarding" not in last:
            break
        # Somebody took the port between our look and the emulator's: choose another one.
    raise LabError(f"host {host.name}: the emulator ended at once:\n{last}")


def kill(boot: Boot) -> None:
    """End what `start` started, at once."""
    boot.close()
    with contextlib.suppress(ProcessLookupError):
        boot.process.kill()
    boot.process.wait()


def _write_ssh(machine: Machine, port: int) -> None:
    words = ["ssh", *_ssh_options(machine), "-i", str(machine.lab_dir / "id_ed25519"), "-p", str(port)]
    text = f'#!/bin/sh\nexec {" ".join(shlex.quote(word) for word in words)} root@{_ADDRESS} "$@"\n'
    write_whole(machine.directory / "ssh", text, 0o755)


def wait(boots: t.Sequence[Boot], timeout: float, progress: Progress) -> None:
    """Wait until every host's ssh server answers, ``timeout`` seconds each from its start.

    Raises LabError for the first host that dies, panics or is late, with its last words; the caller ends the rest.
    """
    pending = list(boots)
    while pending:
        for boot in list(pending):
            if boot.process.poll() is not None:
                raise boot.failure(f"the emulator ended during the boot (status {boot.process.returncode})")
            if boot.ready():
                boot.seconds = round(time.monotonic() - boot.started, 1)
                progress(f"{boot.machine.name} answers by ssh on port {boot.port} after {boot.seconds} s")
                pending.remove(boot)
                continue
            hopeless = _HOPELESS.search(boot.words())
            if hopeless:
                raise boot.failure(f"the boot failed ({hopeless.group().decode()})")
            if time.monotonic() - boot.started > timeout:
                raise boot.failure(f"no ssh banner within {timeout:.0f} s")
        if pending:
            time.sleep(_POLL)


def stop(machine: Machine, timeout: float) -> str:
    """Shut the host down; after ``timeout`` seconds end the emulator instead.

    Returns how it went: ``powered off``, ``ended`` (by the emulator's own quit) or ``killed``.
    """
    pid = machine.pid()
    if pid is None:
        return "powered off"
    way = "powered off"
    deadline = time.monotonic() + timeout
    # A guest early in its boot does not hear the power button: press it again every few seconds.
    pressed = 0.0
    while machine.pid() is not None and time.monotonic() < deadline:
        if time.monotonic() - pressed > 5:
            machine.qmp("system_powerdown")
            pressed = time.monotonic()
        time.sleep(_POLL)
    if machine.pid() is not None:
        way = "ended"
        machine.qmp("quit")
        deadline = time.monotonic() + 5
        while machine.pid() is not None and time.monotonic() < deadline:
            time.sleep(_POLL)
    if machine.pid() is not None:
        way = "killed"
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        while machine.pid() is not None:
            time.sleep(_POLL)
    return way


def remove(machine: Machine) -> None:
    """End the host, whatever it does, and remove all that it had."""
    if machine.pid() is not None:
        stop(machine, 0)
    shutil.rmtree(machine.directory)


def write_inventory(lab_dir: Path) -> None:
    """``inventory.yml`` with the hosts that run, in the group ``lab``; JSON, which is YAML too."""
    hosts = {}
    for machine in machines(lab_dir):
        if machine.status() == "started":
            hosts[machine.name] = connection(machine, machine.state())
    text = json.dumps({"lab": {"hosts": hosts}}, indent=2)
    write_whole(lab_dir / "inventory.yml", f"---\n{text}\n")


# --------------------------------------------------------------------------------------------------------------------
# The whole


def require_resources(hosts: t.Sequence[HostSpec]) -> None:
    """Raises LabError where the emulator is missing or too old, or where memory is short."""
    emulator_version()
    needed = sum(host.memory + OVERHEAD for host in hosts)
    available = memory_available()
    if available is not None and needed > available:
        raise LabError(
            f"memory is short: {', '.join(host.name for host in hosts)} need {needed} MiB, available are "
            f"{available} MiB; stop other hosts, or declare less memory"
        )


def bring_up(
    lab_dir: Path,
    hosts: t.Sequence[HostSpec],
    restart: bool,
    timeout: float,
    check_mode: bool,
    progress: Progress,
    ports: t.Optional[t.Mapping[str, int]] = None,
) -> t.Dict[str, t.List[str]]:
    """Bring all hosts up, side by side. Returns the steps taken (in check mode: to be taken) for each.

    Where one fails, every emulator that this call started is ended before the error is raised.
    """
    plans = {host.name: plan_start(Machine(lab_dir, host.name), host, restart) for host in hosts}
    busy = [host for host in hosts if "start" in plans[host.name]]
    require_resources([host for host in busy if "stop" not in plans[host.name]])
    if check_mode or not busy:
        return plans
    with locked(lab_dir):
        _bring_up(lab_dir, busy, plans, timeout, progress, ports or {})
    return plans


def _bring_up(
    lab_dir: Path,
    busy: t.Sequence[HostSpec],
    plans: t.Mapping[str, t.List[str]],
    timeout: float,
    progress: Progress,
    ports: t.Mapping[str, int],
) -> None:
    boots: t.List[Boot] = []
    try:
        for host in busy:
            machine = Machine(lab_dir, host.name)
            if "stop" in plans[host.name]:
                progress(f"stopping {host.name}")
                stop(machine, 60)
            if "create" in plans[host.name]:
                create(machine, host)
            boots.append(start(machine, host, ports.get(host.name, 0)))
            progress(f"{host.name} boots ({machine.state()['accelerator']}, {len(host.devices)} devices)")
        wait(boots, timeout, progress)
    except BaseException:
        for boot in boots:
            kill(boot)
        raise
    finally:
        for boot in boots:
            boot.close()
        write_inventory(lab_dir)


def bring_down(
    lab_dir: Path, names: t.Sequence[str], state: str, timeout: float, check_mode: bool, progress: Progress
) -> t.Dict[str, t.List[str]]:
    """Stop or remove hosts, or only list them (``state``: stopped, absent, listed); no names: all of the lab.

    Returns the steps taken (in check mode: to be taken) for each: of ``stop``, ``remove``.
    """
    chosen = [Machine(lab_dir, name) for name in names] or machines(lab_dir)
    plans: t.Dict[str, t.List[str]] = {}
    for machine in chosen:
        if state == "stopped":
            plans[machine.name] = ["stop"] if machine.status() == "started" else []
        elif state == "absent":
            plans[machine.name] = ["remove"] if machine.status() != "absent" else []
        else:
            plans[machine.name] = []
    if check_mode or not any(plans.values()):
        return plans
    with locked(lab_dir):
        for machine in chosen:
            if "stop" in plans[machine.name]:
                progress(f"{machine.name}: {stop(machine, timeout)}")
            elif "remove" in plans[machine.name]:
                remove(machine)
                progress(f"{machine.name}: removed")
        write_inventory(lab_dir)
    return plans
