# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The chain between QEMU and the IOMMUFD nodes, tried link by link with the rights that QEMU would have.

The links, in the order in which the kernel comes to them: the node *exists*; owner, group and mode (*dac*) and its
access list (*acl*) let the user in; the *cgroup* lets the device be opened; the *lsm* (AppArmor) allows the path; and
memory may be pinned (*memlock*). Each trial has one gate more than the one before it, so the gate at which the answer
changes is the one that is shut:

1. a process of the user, in this process's own cgroup, tells about dac and acl;
2. the same in a transient systemd unit with the device policy of the place where QEMU runs tells about the cgroup;
3. the same under the AppArmor profile that QEMU would have tells about the lsm, and locks memory with its limit.

Nothing stays behind: the unit is transient and ends with the trial, a profile that has to be loaded for it is unloaded,
nothing is written to disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import itertools
import json
import os
import re
import stat
import subprocess
import sys
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _apparmor, _posix_acl, _probe_child, _qemu_conf
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._libvirt_acl import Libvirt
from ansible_collections.iommufd.host.plugins.module_utils._memlock import (
    enough,
    installed_daemons,
    process_limit,
    read_service,
    show_size,
    shown_limit,
)
from ansible_collections.iommufd.host.plugins.module_utils._nodes import CDEVS, IOMMU, KVM, Accounts, Node, read_node
from ansible_collections.iommufd.host.plugins.module_utils._security import read_memlock
from ansible_collections.iommufd.host.plugins.module_utils._systemd_unit import read_unit, show_name

LINKS = ("exists", "dac", "acl", "cgroup", "lsm", "memlock")
OK, BROKEN, SKIP = "ok", "broken", "skip"

_PROFILE = "iommufd-host-probe"
_NUMBERS = itertools.count(1)
_BOOTSTRAP = "import json,sys; job=json.load(sys.stdin); exec(job['source'], job['space']); "
_BOOTSTRAP += "json.dump(job['space']['run_trials'](job['trials']), sys.stdout)"

# What libvirt runs QEMU as where qemu.conf does not say, by distribution: Debian and Ubuntu, Fedora and RHEL.
_QEMU_USERS = (("libvirt-qemu", "libvirt-qemu"), ("qemu", "qemu"))


@dataclasses.dataclass(frozen=True)
class Actor:
    """Somebody who opens nodes, or must not: a user with all groups."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]

    @property
    def all_groups(self) -> set[int]:
        return {self.gid, *self.groups}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where guests run.

    Attributes:
        manager: "libvirt", "systemd" or "none".
        name: for people ("guests of libvirt 11.3.0", "guest@.service").
        opener: who has to be able to open the nodes.
        process: who must not be (the QEMU that gets descriptors); None where QEMU opens them itself.
        kvm: who opens /dev/kvm; None where that is not wanted (a unit that does not list it).
        policy: DevicePolicy of the cgroup; None: no policy.
        allow: what DeviceAllow= has, each path or class.
        slice: the slice that it belongs to, where that runs; its policy counts, too.
        memlock: RLIMIT_MEMLOCK that QEMU has, in bytes; None: none; -1: not known.
        memlock_source: where that was learnt.
        profile: the AppArmor profile: a name, "libvirt" for one as libvirt makes it, or None.
        profile_reason: why there is none.
        launcher: where the opener runs, if not where guests do (libvirt's daemon, which has a cgroup of its own).
    """

    manager: str
    name: str
    opener: Actor
    process: Actor | None
    kvm: Actor | None
    policy: str | None = None
    allow: tuple[str, ...] = ()
    slice: str | None = None
    memlock: int | None = -1
    memlock_source: str = ""
    profile: str | None = None
    profile_reason: str = "no profile applies"
    launcher: Place | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """A node to be tried.

    Attributes:
        path: of the node; None where the device has none.
        sysfs: its attribute ``dev``.
        address: PCI address, for a cdev that was asked for by it.
    """

    path: str | None
    sysfs: str | None
    address: str | None = None

    @property
    def name(self) -> str:
        return self.path if self.path is not None else f"the cdev of {self.address}"


@dataclasses.dataclass(frozen=True)
class Link:
    """What was found at one link."""

    link: str
    status: str
    detail: str
    remedy: str | None = None

    def to_dict(self) -> dict[str, t.Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Trial:
    """The kernel's answers (errno, 0 for success) for one actor: outside, in the cgroup, and under the profile."""

    plain: t.Mapping[str, int]
    cgroup: t.Mapping[str, int]
    lsm: t.Mapping[str, int]
    pinned: int | None


# -- who and where -----------------------------------------------------------------------------------------------------


def find_actor(host: Host, option: str, name: str, group: str | None = None) -> Actor:
    """A user with primary and supplementary groups.

    Raises:
        OptionError: no such user or group.
    """
    accounts = Accounts(host)
    uid = int(name) if name.isdecimal() else accounts.user_id(name)
    if uid is None:
        raise OptionError(option, name, "the name of a user of the host", "the host has no such user")
    known = accounts.user_name(uid) or name
    groups = accounts.groups_of(known)
    gid: int | None = groups[0] if groups else uid
    if group is not None:
        gid = int(group) if group.isdecimal() else accounts.group_id(group)
        if gid is None:
            raise OptionError(option, group, "the name of a group of the host", "the host has no such group")
    return Actor(known, uid, int(gid or 0), tuple(dict.fromkeys([*groups, int(gid or 0)])))


ROOT = Actor("root", 0, 0, (0,))


def libvirt_place(host: Host, libvirt: Libvirt, launcher: bool, user: str | None, profile: str | None) -> Place:
    """Where libvirt runs its guests.

    Args:
        host: the host.
        libvirt: its configuration.
        launcher: libvirt opens the nodes; else QEMU does.
        user: QEMU's user; None: what qemu.conf says.
        profile: the AppArmor profile to use; None: one as libvirt makes it.

    Raises:
        HostError: libvirt is not installed, or its configuration cannot be used.
    """
    if libvirt.content is None:
        raise HostError(f"{libvirt.path} does not exist: libvirt's QEMU driver is not installed.")
    settings = _qemu_conf.settings(libvirt.content)
    accounts = Accounts(host)
    default = next((pair for pair in _QEMU_USERS if accounts.user_id(pair[0]) is not None), ("root", "root"))
    name = user or str(settings.get("user") or default[0]).lstrip("+")
    group = str(settings.get("group") or default[1]).lstrip("+") if user is None else None
    qemu = find_actor(host, "user" if user else f"user in {libvirt.path}", name, group)
    listed = _qemu_conf.active_list(libvirt.content)
    allow = tuple(libvirt.default if listed is None else listed)
    controllers = settings.get("cgroup_controllers")
    limited = controllers is None or (isinstance(controllers, list) and "devices" in controllers)
    limit, source = _daemon_limit(host)
    confined, why = _libvirt_profile(host, settings.get("security_driver"))
    return Place(
        manager="libvirt",
        name=f"guests of libvirt {libvirt.version or '(version unknown)'}",
        opener=ROOT if launcher else qemu,
        process=qemu if launcher else None,
        kvm=qemu,
        policy="strict" if limited else None,
        allow=allow,
        slice="machine.slice",
        memlock=-1 if launcher else limit,
        memlock_source="libvirt sets the limit for each guest itself" if launcher else source,
        profile=_given(profile, "libvirt" if confined else None),
        profile_reason=why,
        launcher=_daemon_place(host) if launcher else None,
    )


def _daemon_place(host: Host) -> Place | None:
    """libvirt's daemon as the opener of the nodes: it does so before QEMU has a cgroup, as root, under its own profile.

    Seen with libvirt 12.8: ``cgroup_device_acl``, the guest's profile and the guest's limit have no part in it.
    """
    for daemon in installed_daemons(host):
        process = read_service(host, daemon).process
        current = host.read_line(f"/proc/{process}/attr/current") if process is not None else None
        confined = re.fullmatch(r"(\S+) \((?:enforce|kill)\)", current or "")
        place = unit_place(host, daemon, False, None, confined[1] if confined else "unconfined")
        return dataclasses.replace(place, opener=ROOT, kvm=None, profile_reason=f"{daemon} runs without one")
    return None


def _daemon_limit(host: Host) -> tuple[int | None, str]:
    for daemon in installed_daemons(host):
        service = read_service(host, daemon)
        if service.process is not None:
            return service.live, f"{daemon} runs with it, and guests inherit it"
        return shown_limit(service.state.shown.get("LimitMEMLOCK")), f"{daemon} will run with it"
    return -1, "no daemon of libvirt is installed"


def _libvirt_profile(host: Host, driver: object) -> tuple[bool, str]:
    drivers = [driver] if isinstance(driver, str) else driver if isinstance(driver, list) else []
    if drivers and "apparmor" not in drivers:
        return False, f"qemu.conf sets security_driver to {', '.join(map(str, drivers))}"
    state = _apparmor.read_state(host)
    if not state.enabled:
        return False, "AppArmor is not in use on this host"
    return state.abstraction, f"{_apparmor.ABSTRACTION} does not exist"


def _given(option: str | None, default: str | None) -> str | None:
    return default if option is None else None if option == "unconfined" else option


def unit_place(host: Host, unit: str, launcher: bool, user: str | None, profile: str | None) -> Place:
    """A service (or a slice or scope) that guests run in.

    Raises:
        HostError: systemd has no such unit.
        OptionError: the user does not exist.
    """
    shown = read_unit(host, unit).shown
    if shown.get("LoadState") != "loaded":
        raise HostError(f"systemd has no unit {unit} (asked about {show_name(unit)}).")
    owner = user or shown.get("User") or "root"
    qemu = find_actor(host, "user" if user else f"User= of {unit}", owner, (shown.get("Group") or None))
    more = [
        find_group(host, f"SupplementaryGroups= of {unit}", name)
        for name in shown.get("SupplementaryGroups", "").split()
    ]
    qemu = dataclasses.replace(qemu, groups=tuple(dict.fromkeys([*qemu.groups, *more])))
    policy = shown.get("DevicePolicy") or "auto"
    lines = [line for line in shown.get("DeviceAllow", "").splitlines() if line]
    allow = tuple(line.split()[0] for line in lines if {"r", "w"} <= set(line.partition(" ")[2]))
    limit = shown_limit(shown.get("LimitMEMLOCK"))
    return Place(
        manager="systemd",
        name=unit,
        opener=ROOT if launcher else qemu,
        process=qemu if launcher and qemu.uid != 0 else None,
        kvm=None if lines and KVM not in allow else qemu,
        policy=None if policy == "auto" and not lines else policy,
        allow=allow,
        slice=shown.get("Slice"),
        memlock=limit,
        memlock_source=f"LimitMEMLOCK of {unit}",
        profile=_given(profile, shown.get("AppArmorProfile") or None),
        profile_reason=f"{unit} names none",
    )


def find_group(host: Host, option: str, name: str) -> int:
    """The id of a group.

    Raises:
        OptionError: there is none.
    """
    number = int(name) if name.isdecimal() else Accounts(host).group_id(name)
    if number is None:
        raise OptionError(option, name, "the name of a group of the host", "the host has no such group")
    return number


def user_place(host: Host, user: str, launcher: bool, profile: str | None) -> Place:
    """A user who starts QEMU by hand, in a login session."""
    actor = find_actor(host, "user", user)
    limit, source = _session_limit(host, actor)
    return Place(
        manager="none",
        name=f"a session of {actor.name}",
        opener=ROOT if launcher else actor,
        process=actor if launcher and actor.uid != 0 else None,
        kvm=actor,
        memlock=limit,
        memlock_source=source,
        profile=_given(profile, None),
    )


def _session_limit(host: Host, actor: Actor) -> tuple[int | None, str]:
    """What pam_limits gives a user: the user's own line counts more than a group's, that more than ``*``."""
    accounts = Accounts(host)
    groups = {f"@{accounts.group_name(number)}" for number in actor.all_groups}
    found: dict[int, tuple[int | None, str]] = {}
    for row in read_memlock(host) or []:
        rank = 2 if row["domain"] == actor.name else 1 if row["domain"] in groups else 0 if row["domain"] == "*" else -1
        if rank >= 0 and row["type"] in ("-", "hard", "soft"):
            found[rank] = (None if row["kib"] is None else row["kib"] * 1024, f"{row['domain']} in {row['file']}")
    if found:
        return found[max(found)]
    return process_limit(host, "self"), "this session's own limit, as /etc/security sets none"


# -- the nodes ---------------------------------------------------------------------------------------------------------


def find_targets(host: Host, addresses: t.Sequence[str] | None) -> list[Target]:
    """/dev/iommu, and the cdevs of the devices (without addresses: all that are there)."""
    targets = [Target(IOMMU, "/sys/class/misc/iommu/dev")]
    if addresses is None:
        names = sorted(host.listdir("/sys/class/vfio-dev"), key=lambda name: (len(name), name))
        return targets + [Target(f"{CDEVS}/{name}", f"/sys/class/vfio-dev/{name}/dev") for name in names]
    for address in addresses:
        directory = f"/sys/bus/pci/devices/{address}/vfio-dev"
        name = next((entry for entry in host.listdir(directory) if host.exists(f"{directory}/{entry}/dev")), None)
        path = None if name is None else f"{CDEVS}/{name}"
        targets.append(Target(path, None if name is None else f"{directory}/{name}/dev", address))
    return targets


def exists_link(host: Host, target: Target, node: Node | None) -> Link:
    """Whether the node is there and is the device that it should be."""
    if target.path is None:
        return Link("exists", BROKEN, *_no_cdev(host, target.address or ""))
    if node is None:
        if target.sysfs is not None and host.exists(target.sysfs):
            return Link(
                "exists",
                BROKEN,
                f"{target.path} does not exist though the kernel has the device: somebody removed the node.",
                f"`udevadm trigger --action=add {os.path.dirname(target.sysfs)}`, or reboot.",
            )
        return Link("exists", BROKEN, *_no_module(host, target.path))
    if node.number is None or (node.expected is not None and node.number != node.expected):
        return Link(
            "exists",
            BROKEN,
            f"{target.path} is not the device that it should be ({node.number or 'no device at all'}, sysfs says "
            f"{node.expected}): a stale node.",
            f"Remove {target.path} and run `udevadm trigger --action=add` for its device.",
        )
    return Link("exists", OK, f"{target.path} is {node.number}.")


def _no_module(host: Host, path: str) -> tuple[str, str]:
    module = {IOMMU: "iommufd", KVM: "kvm"}.get(path, "vfio-pci")
    if host.exists(f"/sys/module/{module.replace('-', '_')}"):
        return f"{path} does not exist though the module {module} is loaded.", "Look at `dmesg` for the reason."
    release = os.uname().release
    known = (host.read_text(f"/lib/modules/{release}/modules.dep", 64 << 20) or "") + (
        host.read_text(f"/lib/modules/{release}/modules.builtin") or ""
    )
    if re.search(rf"/{module}\.ko", known):
        return (
            f"{path} does not exist: the module {module} is not loaded, and opening the node never loads it.",
            f"`modprobe {module}`; the role iommufd.host.kernel loads it at each boot.",
        )
    return (
        f"{path} does not exist: the kernel {release} has no module {module}.",
        "The role iommufd.host.kernel builds it on Debian; else run a kernel that has it.",
    )


def _no_cdev(host: Host, address: str) -> tuple[str, str]:
    directory = f"/sys/bus/pci/devices/{address}"
    if not host.is_dir(directory):
        return f"There is no PCI device {address}.", "Compare with `lspci -D`."
    driver = host.link_name(f"{directory}/driver")
    if driver is None or not host.is_dir(f"{directory}/vfio-dev"):
        bound = f"bound to {driver}, not to a vfio driver" if driver else "bound to no driver"
        return f"{address} has no vfio character device: it is {bound}.", "Bind it: role iommufd.host.devices."
    return (
        f"{address} has no vfio character device though it is on {driver}: this vfio was built without them.",
        "Run a kernel with CONFIG_VFIO_DEVICE_CDEV, see the check kernel.cdev of iommufd_info.",
    )


# -- owner, group, mode and access list --------------------------------------------------------------------------------


def judge(node: Node, entries: t.Sequence[_posix_acl.Entry], actor: Actor) -> tuple[bool, str]:
    """Whether owner, group, mode and access list let somebody read and write, and why, in words (acl(5))."""
    shown = f"{node.owner}:{node.group} {node.mode_text}"
    if actor.uid == 0:
        return True, "root may open it whatever its mode is"
    mask = _posix_acl.mask(entries)
    own_group = next((entry.bits for entry in entries if entry.tag == _posix_acl.GROUP_OBJ), node.mode >> 3 & 7)
    if actor.uid == node.uid:
        return _both(node.mode >> 6), f"{shown}, and {actor.name} owns it"
    for entry in entries:
        if entry.tag == _posix_acl.USER and entry.id == actor.uid:
            return _both(entry.bits & mask), f"its access list has an entry for the user {actor.name}"
    found = []
    if node.gid in actor.all_groups:
        found.append((own_group & mask, f"{shown}, and {actor.name} is in {node.group}"))
    for entry in entries:
        if entry.tag == _posix_acl.GROUP and entry.id in actor.all_groups:
            found.append((entry.bits & mask, f"its access list has an entry for a group of {actor.name}"))
    if found:
        bits, why = max(found, key=lambda item: _both(item[0]))
        return _both(bits), why
    return _both(node.mode), f"{shown}, and {actor.name} is neither its owner nor in {node.group}"


def _both(bits: int) -> bool:
    return bits & 6 == 6


def permission_links(node: Node, actor: Actor, answer: int | None, entries: t.Sequence[_posix_acl.Entry]) -> list[Link]:
    """The links dac and acl, by the kernel's answer to a process of the user without any other gate."""
    extended = [entry for entry in entries if entry.tag in (_posix_acl.USER, _posix_acl.GROUP)]
    allowed, why = judge(node, entries, actor)
    plain, plain_why = judge(node, [], actor) if extended else (allowed, why)
    if answer is None:
        return [Link("dac", SKIP, "It was not tried."), Link("acl", SKIP, "It was not tried.")]
    if answer == 0:
        by_list = extended and why.startswith("its access list")
        return [
            Link("dac", OK, f"{why}."),
            Link("acl", OK, f"{why}." if by_list else "It has no access list that would matter."),
        ]
    if answer == errno.EPERM:
        words = "The process that tries is itself in a cgroup whose device policy forbids the node."
        return [Link("dac", SKIP, words), Link("acl", SKIP, words)]
    if answer != errno.EACCES or allowed:
        detail = f"{node.path} cannot be opened by {actor.name}: {os.strerror(answer)} ({why})."
        return [
            Link("dac", BROKEN, detail, f"Look at the directories above {node.path}: each needs x for {actor.name}.")
        ]
    if extended:
        return [
            Link("dac", OK if plain else SKIP, f"{plain_why}."),
            Link(
                "acl",
                BROKEN,
                f"{actor.name} may not open {node.path}: it has an access list, and {why}.",
                f"`getfacl {node.path}`; udev_access with acl_users gives a user access and lets it last.",
            ),
        ]
    return [
        Link("dac", BROKEN, f"{actor.name} may not open {node.path}: {why}.", _dac_remedy(node, actor)),
    ]


def _dac_remedy(node: Node, actor: Actor) -> str:
    if _both(node.mode >> 3) and node.gid != 0:
        return f"`usermod -aG {node.group} {actor.name}`; it counts for guests that start afterwards."
    if node.gid in actor.all_groups:
        return f'Give its group read and write: the module udev_access with mode "0660" and group {node.group}.'
    return "Give it to a group that the user is in: the module udev_access (role iommufd.host.access, mode group)."


# -- trying ------------------------------------------------------------------------------------------------------------


def try_place(
    host: Host, place: Place, paths: t.Mapping[str, tuple[Actor, ...]], pin: int | None, timeout: float
) -> dict[Actor, Trial]:
    """Make the three trials for everybody concerned.

    Args:
        host: the host.
        place: where.
        paths: for each node that exists who shall try it.
        pin: bytes to lock as the one who pins; None: none.
        timeout: seconds for the trial outside, and again for those in the unit.

    Raises:
        HostError: a trial could not be made at all.
    """
    pinning = place.process or place.opener
    actors = list(dict.fromkeys([pinning, *(actor for group in paths.values() for actor in group)]))
    own = {actor: [path for path, group in paths.items() if actor in group] for actor in actors}

    def trials(profile: str | None, pinned: int | None) -> list[dict[str, t.Any]]:
        return [
            {
                "uid": actor.uid,
                "gid": actor.gid,
                "groups": list(actor.groups),
                # The launcher is not under QEMU's profile.
                "profile": profile if actor is not ROOT or place.process is None else None,
                "paths": own[actor],
                "pin": pinned if actor == pinning else None,
            }
            for actor in actors
        ]

    plain = _run([sys.executable, "-I", "-c", _BOOTSTRAP], trials(None, None), timeout)
    with _profile(host, place.profile) as profile:
        inside = _run(
            _transient(host, place, timeout),
            trials(None, None if profile else pin) + (trials(profile, pin) if profile else []),
            timeout,
        )
    found: dict[Actor, Trial] = {}
    for index, actor in enumerate(actors):
        cgroup = inside[index]
        lsm = inside[index + len(actors)] if profile else cgroup
        for answer in (plain[index], cgroup, lsm):
            if answer["error"]:
                raise HostError(f"The rights of {actor.name} in {place.name} could not be tried: {answer['error']}.")
        found[actor] = Trial(plain[index]["opened"], cgroup["opened"], lsm["opened"], lsm["pinned"])
    return found


def _transient(host: Host, place: Place, timeout: float) -> list[str]:
    """The command that runs a process in a unit with the same device policy and limit as the place."""
    properties = ["Type=exec", f"RuntimeMaxSec={timeout:.0f}", "KillMode=control-group"]
    if place.policy is not None:
        properties.append(f"DevicePolicy={place.policy}")
        for device in place.allow:
            path = host.realpath(device) if device.startswith("/") else device
            if path is not None:  # what is not there cannot be allowed, and both managers skip it
                properties.append(f"DeviceAllow={path} rw")
    if place.memlock != -1:
        properties.append(f"LimitMEMLOCK={'infinity' if place.memlock is None else place.memlock}")
    # Each under a name of its own: systemd forgets the one before only some time after its end.
    name = f"{_PROFILE}-{os.getpid()}-{next(_NUMBERS)}.service"
    argv = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", f"--unit={name}"]
    if place.slice and _is_active(host, place.slice):
        argv.append(f"--slice={place.slice}")
    argv += [f"--property={text}" for text in properties]
    return [*argv, "--", sys.executable, "-I", "-c", _BOOTSTRAP]


def _is_active(host: Host, unit: str) -> bool:
    answer = host.ask(["systemctl", "is-active", "--quiet", "--", unit])
    return answer is not None and answer.ok


def _run(argv: t.Sequence[str], trials: t.Sequence[t.Mapping[str, t.Any]], timeout: float) -> list[dict[str, t.Any]]:
    job = json.dumps({"source": inspect.getsource(_probe_child), "space": {}, "trials": list(trials)})
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(  # pylint: disable=ansible-bad-function
            list(argv), input=job.encode(), capture_output=True, timeout=timeout, env=environment, cwd="/", check=False
        )
    except FileNotFoundError as error:
        raise HostError(f"{argv[0]} is not installed; without it no cgroup can be tried.") from error
    except subprocess.TimeoutExpired as error:
        _stop(argv)
        raise HostError(f"Trying to open the nodes took longer than {timeout:.0f} s and was ended.") from error
    try:
        answers: list[dict[str, t.Any]] = json.loads(done.stdout)
        return answers
    except ValueError:
        words = " / ".join(done.stderr.decode("utf-8", "replace").strip().splitlines()[-3:]) or "no word"
        raise HostError(f"Opening the nodes could not be tried (status {done.returncode}): {words}") from None


def _stop(argv: t.Sequence[str]) -> None:
    unit = next((word.partition("=")[2] for word in argv if word.startswith("--unit=")), None)
    if unit is not None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["systemctl", "stop", unit], capture_output=True, timeout=30, check=False)  # pylint: disable=ansible-bad-function


@contextlib.contextmanager
def _profile(host: Host, profile: str | None) -> t.Iterator[str | None]:
    """The name of the profile to take on; one as libvirt makes it is loaded for the time of the trial."""
    if profile != "libvirt":
        yield profile
        return
    name = f"{_PROFILE}-{os.getpid()}"
    text = _apparmor.profile_text(name)
    _forget_profiles(host)
    answer = host.ask(
        ["apparmor_parser", "--add", "--skip-cache", "--skip-read-cache", "--base", _apparmor.BASE], 120, text
    )
    if answer is None or not answer.ok:
        raise HostError(
            f"AppArmor did not take a profile with {_apparmor.ABSTRACTION}: "
            f"{'apparmor_parser is not installed' if answer is None else answer.stderr.strip()}"
        )
    try:
        yield name
    finally:
        _unload(host, name)


def _forget_profiles(host: Host) -> None:
    """Unload what a killed probe has left."""
    for line in (host.read_text("/sys/kernel/security/apparmor/profiles") or "").splitlines():
        match = re.match(rf"({_PROFILE}-(\d+)) ", line)
        if match and not host.exists(f"/proc/{match[2]}"):
            _unload(host, match[1])


def _unload(host: Host, name: str) -> None:
    host.ask(["apparmor_parser", "--remove"], 60, f"profile {name} {{ }}\n")


# -- judging -----------------------------------------------------------------------------------------------------------


def opening_links(
    host: Host, place: Place, target: Target, node: Node | None, actor: Actor, trial: Trial
) -> list[Link]:
    """The chain for a node that somebody has to be able to open, up to the first broken link."""
    links = [exists_link(host, target, node)]
    if links[0].status != OK or node is None:
        return links
    path = node.path
    links += permission_links(node, actor, trial.plain.get(path), _posix_acl.parse(_posix_acl.read(host, path)))
    if any(link.status == BROKEN for link in links):
        return links
    links.append(_cgroup_link(place, path, actor, trial.cgroup.get(path)))
    if links[-1].status == BROKEN:
        return links
    links.append(_lsm_link(host, place, path, actor, trial))
    return links


def _cgroup_link(place: Place, path: str, actor: Actor, answer: int | None) -> Link:
    if place.policy is None:
        return Link("cgroup", OK, f"{place.name}: no device policy.")
    if answer in (0, None):
        return Link("cgroup", OK, f"The device policy of {place.name} lets {path} be opened.")
    if place.manager == "libvirt":
        detail = (
            f"libvirt's cgroup_device_acl does not list {path}: the cgroup of a guest forbids it "
            f"({os.strerror(answer or 0)}), and libvirt makes no such node in the guest's own /dev."
        )
        return Link(
            "cgroup",
            BROKEN,
            detail,
            "The module cgroup_acl (manager: libvirt) merges it into qemu.conf; guests have it from their next start.",
        )
    return Link(
        "cgroup",
        BROKEN,
        f"The device policy of {place.name} (DevicePolicy={place.policy}) forbids {path} to {actor.name}: "
        f"{os.strerror(answer or 0)}.",
        f"The module cgroup_acl (manager: systemd) with unit {place.name} and this device.",
    )


def _lsm_link(host: Host, place: Place, path: str, actor: Actor, trial: Trial) -> Link:
    if place.profile is None or (actor is ROOT and place.process is not None):
        if host.exists("/sys/fs/selinux/enforce"):
            return Link(
                "lsm", SKIP, "SELinux: the type that QEMU gets at its start cannot be taken on without a guest."
            )
        reason = "the launcher runs without one" if place.profile is not None else place.profile_reason
        return Link("lsm", OK, f"No AppArmor profile: {reason}.")
    answer = trial.lsm.get(path)
    name = "profile of libvirt's guests" if place.profile == "libvirt" else f"profile {place.profile}"
    if answer in (0, None):
        return Link("lsm", OK, f"AppArmor's {name} allows {path}.")
    return Link(
        "lsm",
        BROKEN,
        f"AppArmor's {name} forbids {path}: {os.strerror(answer or 0)}.",
        "The module apparmor_access adds the rules; a guest has them from its next start."
        if place.profile == "libvirt"
        else f"Add `{path} rw,` to the profile and load it again.",
    )


def refusal_links(
    host: Host, place: Place, target: Target, node: Node | None, actor: Actor, trial: Trial
) -> list[Link]:
    """The chain for a node that somebody must not be able to open: it has to be shut at one link at least."""
    if node is None or target.path is None:
        return [Link("exists", SKIP, f"{target.name} is not there.")]
    path = node.path
    if exists_link(host, target, node).status != OK:
        return [Link("exists", SKIP, f"{path} is not the device that it should be, so it was not tried.")]
    _allowed, why = judge(node, _posix_acl.parse(_posix_acl.read(host, path)), actor)
    gates = (("dac", trial.plain.get(path)), ("cgroup", trial.cgroup.get(path)), ("lsm", trial.lsm.get(path)))
    for link, answer in gates:
        if answer:
            return [Link(link, OK, f"{actor.name} cannot open {path}, as it should be: {os.strerror(answer)}.")]
    return [
        Link(
            "dac",
            BROKEN,
            f"{actor.name} could open {path} itself, which mode launcher is to prevent: {why}.",
            "Leave the nodes to root: the module udev_access with nodes: [] (role iommufd.host.access, mode launcher).",
        )
    ]


def memlock_link(host: Host, place: Place, actor: Actor, pin: int | None, pinned: int | None) -> Link:
    """Whether so much memory may be pinned, with what the user's other processes have pinned already."""
    limit = "not known" if place.memlock == -1 else show_size(place.memlock)
    if pin is None:
        return Link("memlock", SKIP, f"No amount was given to try; the limit is {limit}: {place.memlock_source}.")
    if actor.uid == 0:
        return Link("memlock", OK, "QEMU runs as root, whom no limit binds.")
    if place.memlock == -1:
        return Link("memlock", SKIP, f"{place.memlock_source}.")
    others = pinned_by(host, actor.uid)
    remedy = "The module memlock_limits derives the limit from the guests' memory and sets it."
    if place.manager == "libvirt":
        remedy += " Or give the guest <memtune><hard_limit>, from which libvirt sets its limit."
    if pinned not in (0, None) or not enough(place.memlock, pin):
        return Link(
            "memlock",
            BROKEN,
            f"{actor.name} may pin {limit} ({place.memlock_source}), not {show_size(pin)}"
            + (f": {os.strerror(pinned)}." if pinned else "."),
            remedy,
        )
    if not enough(place.memlock, pin + others):
        return Link(
            "memlock",
            BROKEN,
            f"{actor.name} may pin {limit}, and processes of this user have pinned {show_size(others)} already, which "
            f"counts against it; {show_size(pin)} more is too much.",
            remedy,
        )
    already = f", {show_size(others)} pinned by other processes of this user included" if others else ""
    return Link("memlock", OK, f"{actor.name} could lock {show_size(pin)} within {limit}{already}.")


def pinned_by(host: Host, uid: int) -> int:
    """Bytes that the processes of a user have pinned for devices (VmPin in /proc/PID/status)."""
    total = 0
    for name in host.listdir("/proc"):
        if not name.isdecimal():
            continue
        text = host.read_text(f"/proc/{name}/status", 65536) or ""
        owner = re.search(r"^Uid:\s+(\d+)", text, re.MULTILINE)
        pinned = re.search(r"^VmPin:\s+(\d+) kB", text, re.MULTILINE)
        if owner is not None and pinned is not None and int(owner[1]) == uid:
            total += int(pinned[1]) * 1024
    return total


# -- the whole chain ---------------------------------------------------------------------------------------------------


def probe(host: Host, place: Place, targets: t.Sequence[Target], pin: int | None, timeout: float) -> dict[str, t.Any]:
    """Try the chain of one place.

    Returns:
        ``place``, ``ok``, ``broken`` (null, or the first broken link with ``node``, ``link``, ``detail``, ``remedy``),
        ``nodes`` (each with ``path``, ``user``, ``expected`` and its ``links``), ``memlock`` (a link) and ``process``.

    Raises:
        HostError: a trial could not be made at all.
    """
    accounts = Accounts(host)
    nodes = {target: read_node(host, target.path, accounts, target.sysfs) for target in targets if target.path}
    kvm = Target(KVM, "/sys/class/misc/kvm/dev")
    kvm_node = read_node(host, KVM, accounts, kvm.sysfs)
    where = place.launcher or place
    there = [node.path for node in nodes.values() if node is not None and is_right_device(host, node)]
    here = tuple(actor for actor in (place.opener if where is place else None, place.process) if actor is not None)
    paths = dict.fromkeys(there, here)
    if kvm_node is not None and place.kvm is not None and is_right_device(host, kvm_node):
        paths[KVM] = (place.kvm,)
    pinning = place.process or place.opener
    trials = try_place(host, place, paths, pin, timeout)
    empty = Trial({}, {}, {}, None)
    opened = trials
    if where is not place:
        opened = try_place(host, where, dict.fromkeys(there, (where.opener,)), None, timeout)
    opening = opened.get(where.opener, empty)
    found: list[tuple[str, str, str, list[Link]]] = []
    for target in targets:
        links = opening_links(host, where, target, nodes.get(target), where.opener, opening)
        found.append((target.name, where.opener.name, "open", links))
    if kvm_node is not None and place.kvm is not None:
        links = opening_links(host, place, kvm, kvm_node, place.kvm, trials.get(place.kvm, empty))
        found.append((KVM, place.kvm.name, "open", links))
    if place.process is not None:
        for target in targets:
            links = refusal_links(
                host, place, target, nodes.get(target), place.process, trials.get(place.process, empty)
            )
            found.append((target.name, place.process.name, "refused", links))
    memlock = memlock_link(host, place, pinning, pin, trials.get(pinning, empty).pinned)
    broken = [
        (LINKS.index(link.link), {"node": name, "user": user, **link.to_dict()})
        for name, user, _expected, links in [*found, (IOMMU, pinning.name, "open", [memlock])]
        for link in links
        if link.status == BROKEN
    ]
    first = min(broken, key=lambda item: item[0])[1] if broken else None
    if first is not None:
        del first["status"]
    return {
        "place": place.name,
        "ok": not broken,
        "broken": first,
        "nodes": [
            {"path": name, "user": user, "expected": expected, "links": [link.to_dict() for link in links]}
            for name, user, expected, links in found
        ],
        "memlock": memlock.to_dict(),
        "process": {
            "user": pinning.name,
            "uid": pinning.uid,
            "groups": sorted(accounts.group_name(number) or str(number) for number in pinning.all_groups),
            "device_policy": place.policy,
            "device_allow": list(place.allow),
            "apparmor": place.profile,
            "memlock": None if place.memlock in (None, -1) else place.memlock,
        },
    }


def is_right_device(host: Host, node: Node) -> bool:
    """Whether a node is the character device that it should be, which alone is opened: opening another one, such as a
    watchdog, has an effect of its own."""
    status = host.stat(node.path)
    return status is not None and stat.S_ISCHR(status.st_mode) and node.expected in (None, node.number)
