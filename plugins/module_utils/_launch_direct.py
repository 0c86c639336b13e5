# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The launchers ``direct`` and ``self``: QEMU is our own child.

``direct``: we open the nodes and QEMU inherits the descriptors; it could not have opened them. Descriptors cannot be
passed to the legacy container, so for a device on that QEMU gets a private ``/dev/vfio`` with its nodes alone, as
libvirt makes one; the host's nodes stay as they are. Likewise a private ``/dev/kvm`` where QEMU opens that itself.

``self``: QEMU opens the nodes with what the host lets its user open.
"""

from __future__ import annotations

import contextlib
import os
import socket
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _launcher
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._evidence import LEGACY_NUMBER
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._launch import Plan, Running, Words, hold
from ansible_collections.iommufd.host.plugins.module_utils._nodes import IOMMU, KVM, LEGACY_CONTAINER


@contextlib.contextmanager
def start(plan: Plan) -> t.Iterator[Running]:
    """``direct``: open the nodes, and have QEMU inherit the descriptors."""
    with contextlib.ExitStack() as stack:
        held: dict[str, int] = {}
        for name in plan.objects:
            held[name] = hold(stack, _launcher.open_node(IOMMU, plan.iommu))
            _launcher.account_per_process(held[name])
        for device in plan.on("iommufd"):
            held[device.address] = hold(stack, _launcher.open_node(device.node, device.number))
        kvm: int | None = None
        if plan.accelerator == "kvm":
            kvm, why = _launcher.open_kvm(plan.host)
            if kvm is None:
                raise HostError(f"KVM cannot be used any more: {why}.", step="open")
            hold(stack, kvm)
        nodes = private_nodes(plan.host, plan)
        if kvm is not None and not plan.machine.passes_kvm:
            number = os.fstat(kvm).st_rdev
            nodes.append(_launcher.PrivateNode(KVM, (os.major(number), os.minor(number))))
            kvm = None
        yield stack.enter_context(_run(plan, held, kvm, nodes))


@contextlib.contextmanager
def start_self(plan: Plan) -> t.Iterator[Running]:
    """``self``: nothing is passed."""
    with _run(plan, {}, None, ()) as running:
        yield running


def private_nodes(host: Host, plan: Plan) -> list[_launcher.PrivateNode]:
    """The nodes that QEMU has to open for devices on the legacy container.

    Raises:
        HostError: the kernel has no group node for one of them.
    """
    devices = [device for device in (*plan.devices, *plan.plugged) if device.backend == "legacy"]
    if not devices:
        return []
    nodes = {LEGACY_CONTAINER: LEGACY_NUMBER}
    for device in devices:
        number = host.read_line(f"/sys/class/vfio/{device.group}/dev")
        if number is None:
            raise HostError(
                f"{device.address}: vfio makes no node for its IOMMU group {device.group}, so there is no legacy "
                "container for it (CONFIG_VFIO_GROUP).",
                step="open",
            )
        major, _colon, minor = number.partition(":")
        nodes[device.group_node] = (int(major), int(minor))
    return [_launcher.PrivateNode(path, number) for path, number in nodes.items()]


@contextlib.contextmanager
def _run(
    plan: Plan, held: dict[str, int], kvm: int | None, nodes: t.Sequence[_launcher.PrivateNode]
) -> t.Iterator[Running]:
    with contextlib.ExitStack() as stack:
        kernel = hold(stack, _launcher.memory_file("kernel", plan.kernel, plan.user))
        initramfs = hold(stack, _launcher.memory_file("initramfs", plan.initramfs, plan.user))
        ours: dict[str, socket.socket] = {}
        theirs: dict[str, socket.socket] = {}
        for name in ("console", "report", *(["monitor"] if plan.monitor else [])):
            ours[name], theirs[name] = socket.socketpair()
            stack.enter_context(ours[name])
            stack.enter_context(theirs[name])
        for name in ("console", "report"):
            ours[name].setblocking(False)
        arguments = plan.command(
            f"/proc/self/fd/{kernel}",
            f"/proc/self/fd/{initramfs}",
            {name: f"socket,fd={end.fileno()}" for name, end in theirs.items()},
            held,
            kvm,
        )
        inherited = [kernel, initramfs, *(end.fileno() for end in theirs.values()), *held.values()]
        inherited += [] if kvm is None else [kvm]
        process = _launcher.Process(arguments, plan.user, _launcher.Limits(plan.memlock), inherited, nodes)
        stack.enter_context(process)
        for end in theirs.values():
            end.close()  # so that the process's end is the end of the sockets
        yield Running(
            pid=process.pid,
            words=Words(process.words),
            console=ours["console"],
            report=ours["report"],
            monitor=ours.get("monitor"),
            poll=process.poll,
            held=held,
            numbers=dict(held),
        )
