# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The launcher ``systemd``: a transient unit whose descriptors systemd opens (``OpenFile=``), in the unit's own cgroup.

The unit is bound to a scope that holds one process of ours, and that process ends with us: so whatever happens to the
module, systemd stops the unit, and removes its directory below /run.
"""

from __future__ import annotations

import contextlib
import os
import socket
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _launcher
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._guest_unit import open_file
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._launch import Plan, Running, Words, hold
from ansible_collections.iommufd.host.plugins.module_utils._nodes import IOMMU, KVM, LEGACY_CONTAINER
from ansible_collections.iommufd.host.plugins.module_utils._plan import wait_until
from ansible_collections.iommufd.host.plugins.module_utils._qemu_devices import FIRST_DESCRIPTOR
from ansible_collections.iommufd.host.plugins.module_utils._systemd_unit import OPEN_FILE_SINCE, systemd_version

_SYSTEMD_RUN = "/usr/bin/systemd-run"
# Seconds beyond the guest's own time, after which systemd ends what nobody ended.
_GRACE = 60.0

#: What a unit gives up beside the devices: everything that QEMU does not need.
_HARDENING = (
    "NoNewPrivileges=yes", "CapabilityBoundingSet=", "AmbientCapabilities=", "KeyringMode=private", "LimitCORE=0",
    "ProtectControlGroups=yes", "ProtectKernelModules=yes", "ProtectKernelTunables=yes", "ProtectSystem=full",
    "RestrictSUIDSGID=yes", "UMask=0077",
)  # fmt: skip


def problems(host: Host) -> list[str]:
    """What stands in the way of this launcher."""
    if not host.is_dir("/run/systemd/system"):
        return ["This host does not run systemd, so no unit of it can launch the guest."]
    version = systemd_version(host)
    if version is None or version < OPEN_FILE_SINCE:
        return [f"systemd {version or '(version unknown)'} has no OpenFile=: 253 and later have it."]
    return []


@contextlib.contextmanager
def start(plan: Plan) -> t.Iterator[Running]:
    """Have systemd open the nodes and start QEMU on the descriptors."""
    with contextlib.ExitStack() as stack:
        scope = stack.enter_context(scope_of_ours(plan.host, plan.name))
        kernel = hold(stack, _launcher.memory_file("kernel", plan.kernel, plan.user))
        initramfs = hold(stack, _launcher.memory_file("initramfs", plan.initramfs, plan.user))
        files: list[str] = []
        numbers: dict[str, int] = {}

        def opened(path: str, name: str, reading: bool = False) -> int:
            files.append(open_file(path, name) + (":read-only" if reading else ""))
            return FIRST_DESCRIPTOR + len(files) - 1

        for name in plan.objects:
            numbers[name] = opened(IOMMU, name)
        for device in plan.on("iommufd"):
            numbers[device.address] = opened(device.node, f"vfio{len(files)}")
        kvm = opened(KVM, "kvm") if plan.accelerator == "kvm" and plan.machine.passes_kvm else None
        own = f"/proc/{os.getpid()}/fd"
        images = [opened(f"{own}/{fd}", name, True) for fd, name in ((kernel, "kernel"), (initramfs, "initramfs"))]
        directory = f"/run/{plan.name}"
        names = ("console", "report", *(["monitor"] if plan.monitor else []))
        # QEMU waits at each of them, in this order, until we are there: nothing it says is lost.
        chardevs = {name: f"socket,path={directory}/{name},server=on,wait=on" for name in names}
        arguments = plan.command(f"/proc/self/fd/{images[0]}", f"/proc/self/fd/{images[1]}", chardevs, numbers, kvm)
        properties = [f"OpenFile={text}" for text in files]
        properties += [f"DeviceAllow={node} rw" for node in allowed_nodes(plan)]
        if plan.accelerator == "kvm" and kvm is None:
            properties += private_kvm(plan.name, plan.user, os.stat(KVM).st_rdev)
        limit = "infinity" if plan.memlock is None else str(plan.memlock)
        properties += [
            "Type=exec", f"User={plan.user.name}", "DevicePolicy=closed", f"LimitMEMLOCK={limit}",
            f"RuntimeDirectory={plan.name}", "RuntimeDirectoryMode=0700",
            f"RuntimeMaxSec={plan.timeout + _GRACE:.0f}", "TimeoutStopSec=10", *_HARDENING,
        ]  # fmt: skip
        process = transient_service(plan.name, scope, properties, arguments)
        stack.enter_context(process)
        # Before the scope's end would do it, so that we know it.
        stack.callback(_stop, plan.host, f"{plan.name}.service")
        channels = {}
        for name in names:
            channels[name] = stack.enter_context(connect(f"{directory}/{name}", process, plan.timeout))
            channels[name].setblocking(name == "monitor")
        yield Running(
            pid=main_process(plan.host, f"{plan.name}.service"),
            words=Words(process.words),
            console=channels["console"],
            report=channels["report"],
            monitor=channels.get("monitor"),
            poll=process.poll,
            numbers=numbers,
        )


def private_kvm(name: str, user: _launcher.User, number: int) -> list[str]:
    """The properties by which a unit has a ``/dev/kvm`` that its user may open, and nobody else another one.

    To be in the group of the host's node would do, too, but where that group may open /dev/iommu as well nothing would
    show that the descriptors are what counts. The unit's own directory cannot hold it: /run takes no device nodes.

    Args:
        name: of the unit; the node is called so while the unit runs.
        user: whom QEMU runs as.
        number: of the device.
    """
    node = f"/dev/{name}-kvm"
    make = f"mknod -m 0600 {node} c {os.major(number)} {os.minor(number)} && chown {user.uid}:{user.gid} {node}"
    return [
        f"DeviceAllow={KVM} rwm",
        f'ExecStartPre=+/bin/sh -c "{make}"',
        # Not for the command that makes it: that one has such a /dev of its own, too, in which it is missing.
        f"BindPaths=-{node}:{KVM}",
        f"ExecStopPost=+/bin/rm -f {node}",
    ]


def allowed_nodes(plan: Plan) -> list[str]:
    """The nodes that something opens in the unit's cgroup: systemd for QEMU, or QEMU where nothing can be passed."""
    nodes = [IOMMU] if plan.objects else []
    nodes += [device.node for device in plan.on("iommufd")]
    legacy = [device for device in (*plan.devices, *plan.plugged) if device.backend == "legacy"]
    nodes += [LEGACY_CONTAINER, *(device.group_node for device in legacy)] if legacy else []
    nodes += [KVM] if plan.accelerator == "kvm" else []
    return list(dict.fromkeys(nodes))


@contextlib.contextmanager
def scope_of_ours(host: Host, name: str) -> t.Iterator[str]:
    """A scope with one process that ends with this one; units that are bound to it end then, too.

    Raises:
        HostError: systemd made none.
    """
    unit = f"{name}.scope"
    argv = [_SYSTEMD_RUN, "--scope", "--quiet", "--collect", f"--unit={unit}", "--", "/usr/bin/sleep", "infinity"]
    with _launcher.Process(argv, None) as process:

        def there() -> bool:
            answer = host.ask(["systemctl", "is-active", "--quiet", unit])
            return process.poll() is not None or (answer is not None and answer.ok)

        if not wait_until(there, 30.0) or process.poll() is not None:
            said = (Words(process.words).read() or b"").decode("utf-8", "replace").strip()
            raise HostError(f"systemd made no scope {unit}: {said or 'it said nothing'}.", step="start")
        yield unit


def transient_service(
    name: str, scope: str, properties: t.Sequence[str], arguments: t.Sequence[str]
) -> _launcher.Process:
    """A client of systemd that starts a service and ends with its status; its output is the service's."""
    argv = [_SYSTEMD_RUN, "--quiet", "--pipe", "--wait", "--collect", f"--unit={name}.service"]
    argv += [f"--property={text}" for text in (f"BindsTo={scope}", f"After={scope}", *properties)]
    return _launcher.Process([*argv, "--", *arguments], None)


def connect(path: str, process: _launcher.Process, timeout: float) -> socket.socket:
    """Connect to a socket as soon as somebody listens there.

    Args:
        path: of the socket.
        process: whose words are quoted where nobody comes: the one that starts whoever is to listen.
        timeout: seconds to wait; never more than 120.

    Raises:
        HostError: the process ended before, with its words; or nobody came in time.
    """
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def connected() -> bool:
        try:
            channel.connect(path)
        except OSError:
            return process.poll() is not None
        return True

    try:
        done = wait_until(connected, min(timeout, 120.0), 0.02)
        if done and process.poll() is None:
            return channel
        said = (Words(process.words).read() or b"").decode("utf-8", "replace").strip().replace("\n", " / ")
        raise HostError(
            f"QEMU did not start{f' (status {process.status})' if process.status is not None else ''}: "
            f"{said or 'it said nothing'}.{_meaning(process.status)}",
            step="start",
            said=said,
        )
    except BaseException:
        channel.close()
        raise


def _meaning(status: int | None) -> str:
    # systemd.exec(5), "Process exit codes"
    known = {
        202: "systemd could not open one of the files of OpenFile= in the unit's cgroup (DeviceAllow=, or the node).",
        217: "systemd could not become that user.",
        203: "systemd could not execute QEMU.",
    }
    return f" {known[status]}" if status in known else ""


def main_process(host: Host, unit: str) -> int:
    """The process of a service that runs.

    Raises:
        HostError: it has none.
    """
    answer = host.ask(["systemctl", "show", "--property=MainPID", "--value", unit])
    text = answer.stdout.strip() if answer is not None else ""
    if not text.isdigit() or text == "0":
        raise HostError(f"The unit {unit} has no process any more.", step="start")
    return int(text)


def _stop(host: Host, unit: str) -> None:
    host.ask(["systemctl", "stop", unit], 60)
