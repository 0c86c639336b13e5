# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The launcher ``libvirt``: a transient domain that libvirt destroys when the connection that made it ends.

With libvirt 12.1 and later its daemon opens the nodes for iommufd and passes the descriptors (``iommufd='yes'``). With
an older one QEMU opens them itself: that is the launcher ``self`` with libvirt as the one who starts QEMU, and the
devices stand on QEMU's command line, as people write them there.

What libvirt has to read lies in a directory below /run that belongs to a unit, and goes with it; so does the log that
libvirt keeps of each domain.
"""

from __future__ import annotations

import contextlib
import os
import re
import typing as t
from xml.sax.saxutils import escape, quoteattr

from ansible_collections.iommufd.host.plugins.module_utils import _launcher, _qemu_command
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import parse_devices
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._launch import Plan, Running, Words
from ansible_collections.iommufd.host.plugins.module_utils._launch_systemd import (
    connect,
    scope_of_ours,
    transient_service,
)
from ansible_collections.iommufd.host.plugins.module_utils._libvirt import read_libvirt_facts
from ansible_collections.iommufd.host.plugins.module_utils._libvirt_xml import hostdevs
from ansible_collections.iommufd.host.plugins.module_utils._plan import wait_until

URI = "qemu:///system"

_VIRSH = "/usr/bin/virsh"
_LOGS = "/var/log/libvirt/qemu"
# A file in the domain's directory that says that the domain has been ended in an orderly way.
_ENDED = "ended"
# MiB beside the guest's memory, for a limit that we have to name ourselves: what QEMU itself needs.
_LIMIT_MARGIN = 1024


def problems(host: Host) -> list[str]:
    """What stands in the way of this launcher."""
    if host.which("virsh") is None:
        return ["virsh is not installed, so no domain can be made. On Debian and Ubuntu: apt install libvirt-clients."]
    refusal = _refusal(host)
    if refusal is not None:
        return [f"libvirt's daemon for QEMU does not answer at {URI}: {refusal or 'it said nothing'}."]
    return []


def _refusal(host: Host) -> str | None:
    """Why libvirt's daemon does not answer; None where it does."""
    answer = host.ask([_VIRSH, "--quiet", "--connect", URI, "list", "--name"], 60)
    if answer is None:
        return "no answer within 60 s"
    return None if answer.ok else " ".join(answer.stderr.strip().splitlines()[-1:])


@contextlib.contextmanager
def start(plan: Plan, passed: bool) -> t.Iterator[Running]:
    """Have libvirt start the guest.

    Args:
        plan: the guest.
        passed: libvirt opens the nodes for iommufd; else QEMU does.
    """
    with contextlib.ExitStack() as stack:
        scope = stack.enter_context(scope_of_ours(plan.host, plan.name))
        directory = stack.enter_context(_scratch(plan, scope))
        facts = read_libvirt_facts(plan.host)
        version = facts.version if facts is not None else None
        _write(f"{directory}/kernel", plan.kernel)
        _write(f"{directory}/initramfs", plan.initramfs)
        _write(f"{directory}/domain.xml", domain(plan, directory, version, passed).encode())
        commands, theirs = os.pipe2(os.O_CLOEXEC)[::-1]
        stack.callback(os.close, commands)
        try:
            virsh = _launcher.Process([_VIRSH, "--quiet", "--connect", URI], None, stdin=theirs)
            stack.enter_context(virsh)
        finally:
            os.close(theirs)
        stack.callback(_gone, plan.host, plan.name, virsh, commands)
        os.write(commands, f"create {directory}/domain.xml --paused --autodestroy\n".encode())
        pid = _process_of(plan, virsh)
        channels = {}
        for name in ("console", "report"):
            channels[name] = stack.enter_context(connect(f"{directory}/{name}", virsh, plan.timeout))
            channels[name].setblocking(False)
        os.write(commands, f"resume {plan.name}\n".encode())
        log = Log(f"{_LOGS}/{plan.name}.log", pid)
        stack.callback(log.close)
        yield Running(pid, log, channels["console"], channels["report"], None, log.poll)


@contextlib.contextmanager
def _scratch(plan: Plan, scope: str) -> t.Iterator[str]:
    """A directory that goes with a unit, and the domain's log with it."""
    directory = f"/run/{plan.name}"
    properties = [
        f"RuntimeDirectory={plan.name}",
        "RuntimeDirectoryMode=0711",
        f'ExecStopPost=-/bin/sh -c "{mop_up(plan.name, directory)}"',
    ]
    with transient_service(plan.name, scope, properties, ["/usr/bin/sleep", "infinity"]) as process:
        if not wait_until(lambda: plan.host.is_dir(directory) or process.poll() is not None, 30.0):
            raise HostError(f"systemd made no directory {directory} within 30 s.", step="start")
        if process.poll() is not None:
            said = (Words(process.words).read() or b"").decode("utf-8", "replace").strip()
            raise HostError(f"systemd made no directory {directory}: {said or 'it said nothing'}.", step="start")
        try:
            yield directory
        finally:
            with contextlib.suppress(OSError):
                _write(f"{directory}/{_ENDED}", b"")
            plan.host.ask(["systemctl", "stop", f"{plan.name}.service"], 60)


def mop_up(name: str, directory: str, virsh: str = _VIRSH, logs: str = _LOGS) -> str:
    """A shell script that removes the domain and its log.

    Where this process was killed, libvirt may be about to make the domain only now: with its directory gone it fails,
    and writes a log. So it is looked for a while, unless the domain's orderly end is known.
    """
    return (
        f"for round in 1 2 3 4 5 6 7 8; do {virsh} --quiet --connect {URI} destroy {name}; rm -f {logs}/{name}.log; "
        f"[ -e {directory}/{_ENDED} ] && break; sleep 1; done"
    )


def _write(path: str, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def domain(plan: Plan, directory: str, version: str | None, passed: bool) -> str:
    """The domain's XML.

    Args:
        plan: the guest.
        directory: where kernel and initramfs lie, and the sockets will.
        version: of libvirt.
        passed: see :func:`start`.
    """
    extra = _qemu_command.trace_arguments()
    elements: list[str] = []
    limit = ""
    if passed or not plan.on("iommufd"):
        given = [
            {"address": device.address, "backend": device.backend, "guest_address": device.slot}
            for device in plan.devices
        ]
        elements = hostdevs(parse_devices("devices", given), version, rom=False)
    else:
        extra += plan.device_arguments({})
        # libvirt does not know of these devices, and so not of the memory that they pin: once for each address space.
        spaces = len(plan.objects) + bool(plan.on("legacy"))
        size = plan.memory * (spaces + 1) + _LIMIT_MARGIN
        limit = f"<memtune><hard_limit unit='MiB'>{size}</hard_limit></memtune>"
    cpu = "<cpu mode='host-passthrough'/>" if plan.accelerator == "kvm" else "<cpu mode='maximum'/>"
    serials = [
        f"<serial type='unix'><source mode='bind' path={quoteattr(f'{directory}/{name}')}/>"
        f"<target type='{plan.machine.libvirt_serial}' port='{number}'/></serial>"
        for number, name in enumerate(("console", "report"))
    ]
    words = "".join(f"<qemu:arg value={quoteattr(word)}/>" for word in extra)
    kind = "kvm" if plan.accelerator == "kvm" else "qemu"
    return f"""<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{escape(plan.name)}</name>
  <memory unit='MiB'>{plan.memory}</memory>
  {limit}<vcpu>{plan.cpus}</vcpu>
  <os>
    <type arch='{plan.machine.architecture}' machine='{plan.machine.machine}'>hvm</type>
    <kernel>{escape(directory)}/kernel</kernel>
    <initrd>{escape(directory)}/initramfs</initrd>
    <cmdline>{escape(" ".join(_qemu_command.kernel_arguments(plan.machine)))}</cmdline>
  </os>
  <features>{plan.machine.libvirt_features}</features>
  {cpu}
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{escape(plan.qemu)}</emulator>
    <controller type='usb' model='none'/>
    {"".join(serials)}
    {"".join(elements)}
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>{words}</qemu:commandline>
</domain>
"""


def _process_of(plan: Plan, virsh: _launcher.Process) -> int:
    """The process of the domain once it is there.

    Raises:
        HostError: libvirt did not make it; its own words.
    """
    path = f"/run/libvirt/qemu/{plan.name}.pid"
    said = bytearray()

    def decided() -> bool:
        said.extend(Words(virsh.words).read() or b"")
        return plan.host.exists(path) or b"error:" in said or virsh.poll() is not None

    wait_until(decided, min(plan.timeout, 120.0), 0.05)
    wait_until(lambda: b"error:" in said or _runs(plan.host, plan.name), 30.0, 0.2)
    said.extend(Words(virsh.words).read() or b"")
    text = said.decode("utf-8", "replace")
    problem = re.search(r"error: (?!Failed to create domain from)(.*)", text) or re.search(r"error: (.*)", text)
    pid = plan.host.read_line(path) or ""
    if problem is None and pid.isdigit():
        return int(pid)
    log = (plan.host.read_text(f"{_LOGS}/{plan.name}.log") or "").strip().splitlines()
    last = [line for line in log if not line.endswith("\\") and "starting up libvirt" not in line][-3:]
    raise HostError(
        f"libvirt did not start the guest: {problem.group(1).strip().rstrip('.') if problem else 'it said nothing'}."
        + (f" QEMU's words: {' / '.join(last)}." if last else ""),
        step="start",
        said=" / ".join([text.strip(), *last]),
    )


def _runs(host: Host, name: str) -> bool:
    answer = host.ask([_VIRSH, "--quiet", "--connect", URI, "domstate", name], 60)
    return answer is not None and answer.stdout.strip() in ("paused", "running")


def _gone(host: Host, name: str, virsh: _launcher.Process, commands: int) -> None:
    """End the domain and wait until libvirt has put everything back."""
    with contextlib.suppress(OSError):
        os.write(commands, b"quit\n")
    virsh.wait(30.0)

    def away() -> bool:
        answer = host.ask([_VIRSH, "--quiet", "--connect", URI, "domstate", name], 60)
        return answer is not None and not answer.ok

    if not wait_until(away, 30.0, 0.1):
        host.ask([_VIRSH, "--quiet", "--connect", URI, "destroy", name], 60)


class Log(Words):
    """What QEMU writes, in the file in which libvirt keeps it.

    Args:
        path: of the file.
        pid: of QEMU.
    """

    def __init__(self, path: str, pid: int) -> None:
        super().__init__(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        self._pid = pid
        self._rest = b""
        self._kept = b""
        self._command = False
        self._reason = ""

    def close(self) -> None:
        """Not to be read any more."""
        self._fill()
        os.close(self.descriptor)
        self.descriptor = -1

    def fileno(self) -> int:
        return -1  # a file cannot be waited for

    def read(self) -> bytes | None:
        self._fill()
        kept, self._kept = self._kept, b""
        return kept

    def _fill(self) -> None:
        data = os.read(self.descriptor, 1 << 20) if self.descriptor >= 0 else b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._kept += b"".join(line + b"\n" for line in lines if self._is_qemus(line))

    def _is_qemus(self, line: bytes) -> bool:
        """Whether a line is QEMU's: libvirt's own are the command line, and when and why QEMU started and ended."""
        ends = re.search(rb": shutting down, reason=(\w+)", line)
        if ends:
            self._reason = ends.group(1).decode()
        if ends or b": starting up libvirt version: " in line:
            self._command = not ends
            return False
        if self._command:
            self._command = line.endswith(b"\\")
            return False
        return True

    def poll(self) -> int | None:
        """0 where libvirt says that the guest shut down; another number for any other end; None while it runs."""
        if not self._reason and os.path.isdir(f"/proc/{self._pid}"):
            return None
        wait_until(self._ended, 10.0)
        return 0 if self._reason == "shutdown" else 1

    def _ended(self) -> bool:
        self._fill()
        return bool(self._reason)
