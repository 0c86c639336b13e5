# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Which backend a guest's devices get, iommufd or the legacy container, and why. A pure function of what was seen.

Without peer-to-peer the legacy container is the better choice for a guest with several PCI devices: it maps the BARs of
each device for the others, which iommufd does only where kernel (VFIO dma-buf, Linux 6.19) and QEMU (11.0) can. Whether
they can is measured, never derived from their versions.

Nothing is mixed silently: all devices of a guest get one backend, except those that say themselves what they want.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import BACKENDS, S390_KINDS, GuestDevice
from ansible_collections.iommufd.host.plugins.module_utils._libvirt_acl import can_pass

REQUESTS = (*BACKENDS, "auto")

#: Who opens the nodes: our verifier, a systemd unit (OpenFile=), libvirt, or QEMU itself.
LAUNCHERS = ("direct", "systemd", "libvirt", "self")
#: Those that open the nodes and pass the descriptors. libvirt does so, too, but only for PCI functions.
PASSING = ("direct", "systemd", "libvirt")

Json = dict[str, t.Any]


@dataclasses.dataclass(frozen=True)
class PeerToPeer:
    """What a measurement said about mapping one device's BARs for another over iommufd.

    Attributes:
        works: None where it was not measured, or not on this kernel and QEMU.
        detail: what was seen, or why nothing is known.
    """

    works: bool | None = None
    detail: str = "it was not measured on this host"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a host; None is not known.

    Attributes:
        architecture: as `uname -m` says it.
        kernel: its release.
        iommufd, cdev: whether the kernel has iommufd, and vfio character devices.
        groups: whether it has the legacy groups and a container for them.
        qemu: path and version, for reasons.
        qemu_iommufd, qemu_passing: whether that has iommufd, and takes descriptors that somebody else opened.
        libvirt: its version; None where it is not known or not installed.
        libvirt_passes: whether it opens the nodes itself (12.1 and later); None where it is not known.
        peer_to_peer: see there.
        details: words about one of the above by its name, where there are better ones than ours.
    """

    architecture: str | None = None
    kernel: str | None = None
    iommufd: bool | None = None
    cdev: bool | None = None
    groups: bool | None = None
    qemu: str | None = None
    qemu_iommufd: bool | None = None
    qemu_passing: bool | None = None
    libvirt: str | None = None
    libvirt_passes: bool | None = None
    peer_to_peer: PeerToPeer = PeerToPeer()
    details: t.Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend of one device; ``asked``: it said so itself."""

    device: GuestDevice
    backend: str
    reason: str
    asked: bool

    def to_dict(self, launcher: str) -> Json:
        return {
            "name": self.device.name,
            "kind": self.device.kind,
            "backend": self.backend,
            "reason": self.reason,
            "asked": self.asked,
            "opened_by": opener(self.backend, launcher),
        }


@dataclasses.dataclass(frozen=True)
class Decision:
    """The backend of a guest.

    Attributes:
        backend: of all devices that did not say themselves what they want.
        reason: why, always.
        choices: for each device, in the order given.
        launcher: as asked.
        warnings: what works otherwise than one might expect.
    """

    backend: str
    reason: str
    choices: tuple[Choice, ...]
    launcher: str
    warnings: tuple[str, ...] = ()

    @property
    def mixed(self) -> bool:
        return len({choice.backend for choice in self.choices}) > 1

    def to_dict(self) -> Json:
        return {
            "backend": self.backend,
            "reason": self.reason,
            "mixed": self.mixed,
            "opened_by": opener(self.backend, self.launcher),
            "devices": [choice.to_dict(self.launcher) for choice in self.choices],
            "warnings": list(self.warnings),
        }


def opener(backend: str, launcher: str) -> str:
    """Who opens the nodes: "launcher" or "qemu". A legacy container and its groups are always QEMU's own."""
    return "launcher" if backend == "iommufd" and launcher in PASSING else "qemu"


# -- what a survey says ------------------------------------------------------------------------------------------------


def parse_facts(survey: t.Mapping[str, t.Any], qemu: str | None = None, measured: object = None) -> Facts:
    """What a survey of a host (iommufd_info) says.

    Args:
        survey: its result.
        qemu: path of the binary that is going to run the guest; None: the best of those that the survey asked.
        measured: a measurement of peer-to-peer: whether it works, or the evidence of guest_verify. None: what the
            survey knows of one with this version of QEMU.

    Raises:
        OptionError: the survey has no such QEMU, or the measurement is none.
    """
    kernel = survey.get("kernel") or {}
    checks = {check.get("id"): check for check in survey.get("checks") or [] if isinstance(check, dict)}
    libvirt = survey.get("libvirt") or {}
    options = (kernel.get("config") or {}).get("options") or {}
    binary = _binary(survey.get("qemu"), qemu)

    def told(name: str) -> bool | None:
        # A warning is about a module that is there and not loaded.
        status = (checks.get(name) or {}).get("status")
        return {"ok": True, "warn": True, "fail": False}.get(str(status))

    iommufd, cdev = told("kernel.iommufd"), told("kernel.cdev")
    able: bool | None = binary.get("iommufd") if binary else told("qemu.iommufd")
    details = {
        name: _clause(str(checks[check].get("detail") or ""))
        for name, check in (("iommufd", "kernel.iommufd"), ("cdev", "kernel.cdev"))
        if told(check) is False
    }
    if able is False and not binary:
        details["qemu_iommufd"] = _clause(str(checks["qemu.iommufd"].get("detail") or ""))
    words = f"{binary.get('path')} ({binary.get('version') or 'version unknown'})" if binary else None
    passes = libvirt.get("can_pass_iommufd")
    # A kernel with character devices can leave the groups out; before them there was no such choice.
    no_groups = options.get("VFIO_DEVICE_CDEV") == "y" and options.get("VFIO_GROUP") == "n"
    facts = Facts(
        architecture=kernel.get("architecture"),
        kernel=kernel.get("release"),
        iommufd=iommufd,
        cdev=cdev,
        groups=False if no_groups else (True if options else None),
        qemu=words,
        qemu_iommufd=able,
        qemu_passing=binary.get("passing") if binary else (False if able is False else None),
        libvirt=libvirt.get("version"),
        libvirt_passes=can_pass(libvirt.get("version")) if passes is None else passes,
        details=details,
    )
    version = (binary or {}).get("version")
    if measured is None:
        known = [
            one for one in survey.get("peer_to_peer") or [] if isinstance(one, dict) and one.get("qemu") == version
        ]
        measured = known[-1] if known and version else None
    return dataclasses.replace(facts, peer_to_peer=parse_measurement("peer_to_peer", measured, facts.kernel, version))


def _clause(text: str) -> str:
    """The words of a check without their full stop, to go on with."""
    return text.rstrip(".")


def _binary(binaries: object, path: str | None) -> Json:
    listed = [one for one in binaries if isinstance(one, dict)] if isinstance(binaries, list) else []
    if path is not None:
        for one in listed:
            if path in (one.get("path"), one.get("target")):
                return one
        there = ", ".join(str(one.get("path")) for one in listed) or "none"
        raise OptionError("qemu", path, f"a QEMU of the survey ({there})")
    asked = [one for one in listed if one.get("iommufd") is not None]
    best = sorted(asked, key=lambda one: (not one.get("iommufd"), not one.get("passing")))
    return best[0] if best else {}


def parse_measurement(option: str, value: object, kernel: str | None = None, qemu: str | None = None) -> PeerToPeer:
    """A measurement of peer-to-peer.

    Args:
        option: its name, for messages.
        value: None; a truth value; or a dictionary: what guest_verify returned as ``evidence``, or its
            ``peer_to_peer``, where it may say in ``kernel`` and ``qemu`` (versions) what it was measured on.
        kernel: release of the kernel in question. A measurement on another one counts as none.
        qemu: version of the QEMU in question, likewise.

    Raises:
        OptionError: it is nothing of that.
    """
    if value is None:
        return PeerToPeer()
    if isinstance(value, bool):
        return PeerToPeer(value, "as given" if value else "it is said not to work")
    accepted = "true, false, null, or the evidence of iommufd.host.guest_verify"
    if not isinstance(value, dict):
        raise OptionError(option, value, accepted)
    inner = value.get("peer_to_peer", value)
    if not isinstance(inner, dict) or not isinstance(inner.get("works", ""), (bool, type(None))):
        raise OptionError(option, value, accepted)
    on_qemu = inner.get("qemu", value.get("qemu"))
    on = {
        "Linux": (inner.get("kernel", value.get("kernel")), kernel),
        "QEMU": (on_qemu.get("version") if isinstance(on_qemu, dict) else on_qemu, qemu),
    }
    for what, (then, now) in on.items():
        if then and now and then != now:
            return PeerToPeer(None, f"it was measured with {what} {then}, and this is {what} {now}")
    works = inner["works"]
    seen = _clause(str(inner.get("detail") or "")) or ("the measurement says so" if works else "it failed")
    return PeerToPeer(works, seen if works is not None else f"the measurement left it open: {seen}")


# -- what is impossible ------------------------------------------------------------------------------------------------


def is_spapr(architecture: str | None, machine: str | None) -> bool:
    """Whether the guest is a pseries machine, or the host a POWER machine: their TCE tables have no cdev."""
    return bool(
        (architecture and re.match(r"ppc64", architecture)) or (machine and re.match(r"(pseries|spapr)", machine))
    )


def obstacles(facts: Facts, device: GuestDevice, launcher: str, machine: str | None = None) -> list[str]:
    """Why a device cannot be on iommufd, a clause each; empty where nothing is known to stand in the way."""
    found: list[str] = []
    if is_spapr(facts.architecture, machine):
        found.append("spapr (pseries, POWER) has no vfio character devices, so there is only the legacy container")
    if facts.iommufd is False:
        found.append(
            facts.details.get("iommufd") or f"the kernel {facts.kernel or ''} has no iommufd".replace("  ", " ")
        )
    if facts.cdev is False:
        found.append(facts.details.get("cdev") or "vfio makes no character devices in this kernel (Linux 6.6 or later)")
    if facts.qemu_iommufd is False:
        found.append(facts.details.get("qemu_iommufd") or f"{facts.qemu or 'QEMU'} has no iommufd")
    if launcher in ("direct", "systemd"):
        if facts.qemu_iommufd is not False and facts.qemu_passing is False:
            found.append(f"{facts.qemu or 'QEMU'} takes no descriptors that somebody else opened")
        if device.kind == "mdev":
            found.append(
                f"{device.name} is a mediated device, and QEMU cannot tell that from a passed descriptor: it can only "
                "be named by its directory in sysfs, and QEMU opens it (launcher self)"
            )
    if launcher == "libvirt":
        if facts.libvirt_passes is False:
            version = f"libvirt {facts.libvirt}" if facts.libvirt else "libvirt"
            found.append(f"{version} has no iommufd for host devices (12.1 and later have it)")
        if device.kind != "vfio-pci":
            found.append(f"{device.name} is a {device.kind} device, for which libvirt's XML has no iommufd")
    return found


def unknowns(facts: Facts, launcher: str) -> list[str]:
    """What would have to be known before iommufd can be chosen, each a thing that is not."""
    found = []
    if facts.iommufd is None:
        found.append("whether the kernel has iommufd")
    if facts.cdev is None:
        found.append("whether vfio makes character devices")
    if facts.qemu_iommufd is None:
        found.append("whether QEMU has iommufd")
    if launcher in ("direct", "systemd") and facts.qemu_iommufd is not False and facts.qemu_passing is None:
        found.append("whether QEMU takes passed descriptors")
    if launcher == "libvirt" and facts.libvirt_passes is None:
        found.append("whether libvirt has iommufd for host devices")
    return found


_NO_GROUPS = "this kernel is built without vfio groups (CONFIG_VFIO_GROUP), so there is no legacy container"


# -- the decision ------------------------------------------------------------------------------------------------------


def decide(
    facts: Facts,
    devices: t.Sequence[GuestDevice],
    request: str = "auto",
    launcher: str = "direct",
    hot_plug: bool = False,
    machine: str | None = None,
    others: int = 0,
) -> Decision:
    """Choose the backend of a guest.

    Args:
        facts: what is known of the host.
        devices: those of the guest.
        request: "legacy", "iommufd" or "auto", for all devices that do not say themselves what they want.
        launcher: one of :data:`LAUNCHERS`.
        hot_plug: whether further devices are expected to be plugged in while the guest runs.
        machine: type of the guest's machine ("q35", "pseries"); None where it does not matter.
        others: number of PCI devices that the guest has from elsewhere.

    Raises:
        OptionError: the request, or that of a device, is none, or is impossible here.
    """
    if request not in REQUESTS:
        raise OptionError("backend", request, ", ".join(REQUESTS))
    if launcher not in LAUNCHERS:
        raise OptionError("launcher", launcher, ", ".join(LAUNCHERS))
    _check_architecture(facts, devices)
    plain = [device for device in devices if device.backend is None]
    count = others + sum(device.is_pci for device in devices)
    backend, reason = _for_guest(facts, plain, request, launcher, machine, lambda: _by_peers(facts, count, hot_plug))
    choices = []
    for device in devices:
        if device.backend is None:
            choices.append(Choice(device, backend, reason, False))
        else:
            option = f"{device.option}.backend"
            _check_possible(facts, option, device.backend, [device], launcher, machine)
            choices.append(Choice(device, device.backend, f"{option} asks for {device.backend}", True))
    if devices and not plain:
        asked = {choice.backend for choice in choices}
        if len(asked) == 1:
            backend, reason = asked.pop(), "every device asks for it"
    decision = Decision(backend, reason, tuple(choices), launcher)
    return dataclasses.replace(decision, warnings=_warnings(facts, decision, count, hot_plug))


def _check_architecture(facts: Facts, devices: t.Sequence[GuestDevice]) -> None:
    for device in devices:
        if device.kind in S390_KINDS and facts.architecture not in (None, "s390x"):
            raise OptionError(
                f"{device.option}.kind", device.kind, "vfio-pci or mdev", f"the host is {facts.architecture}, not s390x"
            )


def _check_possible(
    facts: Facts,
    option: str,
    backend: str,
    devices: t.Sequence[GuestDevice],
    launcher: str,
    machine: str | None,
) -> None:
    """Refuse what cannot be."""
    if backend == "legacy":
        if facts.groups is False:
            raise OptionError(option, backend, "iommufd or auto", _NO_GROUPS)
        return
    against = list(dict.fromkeys(why for device in devices for why in obstacles(facts, device, launcher, machine)))
    if against:
        accepted = "legacy or auto on this host" if facts.groups is not False else "nothing on this host"
        raise OptionError(option, backend, accepted, "; ".join(against))


def _for_guest(
    facts: Facts,
    plain: t.Sequence[GuestDevice],
    request: str,
    launcher: str,
    machine: str | None,
    by_peers: t.Callable[[], tuple[str, str]],
) -> tuple[str, str]:
    """The backend of the devices that leave it open, and why."""
    if request != "auto":
        _check_possible(facts, "backend", request, plain, launcher, machine)
        return request, f"backend asks for {request}"
    against = list(dict.fromkeys(why for device in plain for why in obstacles(facts, device, launcher, machine)))
    if against:
        if facts.groups is False:
            raise OptionError("backend", request, "nothing on this host", "; ".join([*against, f"and {_NO_GROUPS}"]))
        return "legacy", against[0]
    missing = unknowns(facts, launcher)
    if missing:
        if facts.groups is False:
            return "iommufd", f"{_NO_GROUPS}; it is not known {', '.join(missing)}"
        return "legacy", f"it is not known {', '.join(missing)}"
    backend, reason = by_peers()
    if backend == "legacy" and facts.groups is False:
        return "iommufd", f"{_NO_GROUPS}, though legacy would be the choice: {reason}"
    return backend, reason


def _by_peers(facts: Facts, count: int, hot_plug: bool) -> tuple[str, str]:
    peers = facts.peer_to_peer
    if peers.works:
        return "iommufd", f"iommufd maps devices for each other here ({peers.detail})"
    state = "does not work over iommufd here" if peers.works is False else "is not known to work over iommufd here"
    seen = f"peer-to-peer {state} ({peers.detail})"
    if count > 1:
        return "legacy", f"the guest has {count} PCI devices, and {seen}"
    if hot_plug:
        return "legacy", f"further devices may be plugged in, and {seen}"
    if count == 1:
        return "iommufd", f"the guest has a single PCI device and no hot-plug is expected, so it does without; {seen}"
    return "iommufd", f"the guest has no PCI device, so there is no peer-to-peer to lose; {seen}"


def _warnings(facts: Facts, decision: Decision, count: int, hot_plug: bool) -> tuple[str, ...]:
    found: list[str] = []
    on_iommufd = [choice for choice in decision.choices if choice.backend == "iommufd"]
    missing = unknowns(facts, decision.launcher) if on_iommufd or decision.backend == "iommufd" else []
    if missing:
        found.append(f"It is not known {', '.join(missing)}.")
    some = on_iommufd or (decision.backend == "iommufd" and not decision.choices)
    if some and facts.peer_to_peer.works is not True and (count > 1 or hot_plug):
        state = "does not work" if facts.peer_to_peer.works is False else "may not work"
        found.append(f"Peer-to-peer between the guest's devices {state}: {facts.peer_to_peer.detail}.")
    if decision.mixed:
        found.append(
            "Devices on different backends do not reach each other, and the guest's memory is pinned, and charged, "
            "once for each backend."
        )
    if decision.launcher in ("direct", "systemd") and any(one.backend == "legacy" for one in decision.choices):
        found.append(
            "There is no passing of descriptors with the legacy container: QEMU itself opens /dev/vfio/vfio and the "
            "group of each device, and needs the rights for it."
        )
    return tuple(found)
