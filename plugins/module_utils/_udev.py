# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Who may open the IOMMUFD nodes, as one udev rules file, and the live nodes that must follow it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import stat
import tempfile
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _posix_acl
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._files import OWN_MARK, own_header
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._nodes import Accounts
from ansible_collections.iommufd.host.plugins.module_utils._own_files import refuse_foreign
from ansible_collections.iommufd.host.plugins.module_utils._pci import is_address
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan, RemoveFile, Step, WriteFile, run

# udev reads all rules files of all directories in the order of their names and a later MODE, OWNER or GROUP replaces
# an earlier one. What distributions ship for permissions ends below 90 (50-udev-default, 60- and 65-*kvm*,
# 73-seat-late, 80-*); 99 is where administrators put what must come last, and they keep the last word.
_DIRECTORY = "/etc/udev/rules.d"
DEFAULT_PATH = f"{_DIRECTORY}/90-iommufd-host.rules"

# Stable names of the cdevs. The kernel itself only makes /dev/vfio/vfio, /dev/vfio/devices/, /dev/vfio/<number> and
# /dev/vfio/noiommu-<number>; by-path/pci-<address> is the form that /dev/disk and /dev/input have for the same purpose.
LINKS = "/dev/vfio/by-path"

# kind of node -> the match of its udev rule. A group in no-IOMMU mode (noiommu-0) protects nothing: never matched.
KINDS = {
    "iommu": 'SUBSYSTEM=="misc", KERNEL=="iommu"',
    "cdevs": 'SUBSYSTEM=="vfio-dev", KERNEL=="vfio[0-9]*"',
    "groups": 'SUBSYSTEM=="vfio", KERNEL=="[0-9]*"',
}

_ACCEPTED_MODE = 'a quoted octal mode of three permission digits, such as "0660" or "0600"'
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}")


def cdev_link(address: str) -> str:
    """The stable name of the cdev of a PCI device, as the rules make it."""
    return f"{LINKS}/pci-{address}"


@dataclasses.dataclass(frozen=True)
class Named:
    """A user or group in a node's access list, who may read and write. ``tag`` is one of :mod:`_posix_acl`."""

    tag: int
    name: str
    id: int

    @property
    def text(self) -> str:
        """As setfacl(1) takes it."""
        return f"{'u' if self.tag == _posix_acl.USER else 'g'}:{self.name}:rw"


@dataclasses.dataclass(frozen=True)
class Access:
    """Owner, group and mode of a node, by name and by number, and who else has access."""

    owner: str
    group: str
    mode: int
    uid: int
    gid: int
    acl: tuple[Named, ...] = ()

    @property
    def text(self) -> str:
        return " ".join([f"{self.owner}:{self.group} {self.mode:04o}", *(entry.text for entry in self.acl)])

    @property
    def named(self) -> frozenset[tuple[int, int]]:
        return frozenset((entry.tag, entry.id) for entry in self.acl)


@dataclasses.dataclass(frozen=True)
class LiveNode:
    """A node that is there.

    Attributes:
        kind: key of :data:`KINDS`.
        path: the node ("/dev/vfio/devices/vfio0").
        syspath: its device in sysfs, to trigger it.
        access: what it has now.
        default: what the kernel gives it.
        acl: its access list as the kernel keeps it; empty where it has none.
        link: the stable name that our rules give it; None where there is none (not a PCI device, not a cdev).
        linked: that name is there and leads to the node.
    """

    kind: str
    path: str
    syspath: str
    access: Access
    default: Access
    link: str | None = None
    linked: bool = False
    acl: bytes = b""

    def has(self, access: Access, acl: bool = True) -> bool:
        """Whether it has this access; ``acl``: its access list counts, too."""
        mine = (self.access.uid, self.access.gid, self.access.mode)
        same = mine == (access.uid, access.gid, access.mode)
        return same and (not acl or self.access.named == access.named)

    def to_dict(self) -> dict[str, t.Any]:
        return {
            "path": self.path,
            "kind": self.kind,
            "owner": self.access.owner,
            "group": self.access.group,
            "mode": f"{self.access.mode:04o}",
            "acl": [entry.text for entry in self.access.acl],
            "symlink": self.link if self.linked else None,
        }


@dataclasses.dataclass(frozen=True)
class State:
    """What the planner needs to know: the rules file (None: not there) and the live nodes."""

    path: str
    content: bytes | None
    nodes: tuple[LiveNode, ...]


# -- options -----------------------------------------------------------------------------------------------------------


def parse_mode(option: str, value: object, allow_world: bool) -> int:
    """A mode as the user wrote it.

    Raises:
        OptionError: not an octal string, or it lets everybody in and ``allow_world`` is not set.
    """
    if not isinstance(value, str):
        raise OptionError(option, value, _ACCEPTED_MODE, "YAML turns a mode without quotes into another number")
    if not re.fullmatch(r"0?[0-7]{3}", value):
        raise OptionError(option, value, _ACCEPTED_MODE)
    mode = int(value, 8)
    if mode & 0o007 and not allow_world:
        raise OptionError(
            option,
            value,
            'a mode whose last digit is 0, such as "0660", or allow_world: true beside it',
            "everybody on the host could open the node and program the IOMMU",
        )
    return mode


def resolve_access(
    accounts: Accounts,
    prefix: str,
    owner: str,
    group: str,
    mode: int,
    acl_users: t.Sequence[str] = (),
    acl_groups: t.Sequence[str] = (),
) -> Access:
    """Names to ids.

    Args:
        accounts: users and groups of the host.
        prefix: of the option names in an error ("", "nodes[0].").
        owner: user name or number.
        group: group name or number.
        mode: permission bits.
        acl_users: users who may read and write as well.
        acl_groups: groups that may.

    Raises:
        OptionError: not a name, or no such user or group.
    """
    users = [(f"acl_users[{index}]", name) for index, name in enumerate(acl_users)]
    groups = [(f"acl_groups[{index}]", name) for index, name in enumerate(acl_groups)]
    named = [
        Named(_posix_acl.USER, name, _resolve(accounts, f"{prefix}{option}", name, True)) for option, name in users
    ]
    named += [
        Named(_posix_acl.GROUP, name, _resolve(accounts, f"{prefix}{option}", name, False)) for option, name in groups
    ]
    return Access(
        owner,
        group,
        mode,
        _resolve(accounts, f"{prefix}owner", owner, True),
        _resolve(accounts, f"{prefix}group", group, False),
        tuple({(entry.tag, entry.id): entry for entry in named}.values()),
    )


def _resolve(accounts: Accounts, option: str, name: str, user: bool) -> int:
    what, database = ("user", "passwd") if user else ("group", "group")
    if not _NAME.fullmatch(name):
        raise OptionError(option, name, f"the name of a {what} of the host")
    look_up = accounts.user_id if user else accounts.group_id
    number = int(name) if name.isdecimal() else look_up(name)
    if number is None:
        raise OptionError(
            option,
            name,
            f"a {what} that exists on the host (`getent {database}`)",
            f"the host has no {what} of this name",
        )
    return number


# -- reading -----------------------------------------------------------------------------------------------------------


def read_state(host: Host, path: str) -> State:
    """The rules file and every node that the rules can be about.

    Raises:
        HostError: something other than a regular file is at ``path``.
    """
    content = host.read_bytes(path)
    if content is None and host.exists(path):
        raise HostError(f"{path} is there, but is not a file that can be read.")
    accounts = Accounts(host)
    nodes: list[LiveNode] = []
    for kind, directory, names in (
        ("iommu", "/sys/class/misc", ["iommu"]),
        ("cdevs", "/sys/class/vfio-dev", host.listdir("/sys/class/vfio-dev")),
        ("groups", "/sys/class/vfio", [name for name in host.listdir("/sys/class/vfio") if name.isdecimal()]),
    ):
        for name in names:
            node = _read_node(host, accounts, kind, f"{directory}/{name}")
            if node is not None:
                nodes.append(node)
    return State(path, content, tuple(nodes))


def _read_node(host: Host, accounts: Accounts, kind: str, device: str) -> LiveNode | None:
    syspath = host.realpath(device)
    uevent = dict(line.split("=", 1) for line in (host.read_text(f"{device}/uevent") or "").splitlines() if "=" in line)
    path = f"/dev/{uevent.get('DEVNAME', '')}"
    status = host.stat(path)
    if syspath is None or status is None or not (stat.S_ISCHR(status.st_mode) or not host.live):
        return None

    acl = _posix_acl.read(host, path)
    entries = _posix_acl.parse(acl)

    def access(uid: int, gid: int, mode: int, named: t.Iterable[tuple[int, int]] = ()) -> Access:
        owner, group = accounts.user_name(uid) or str(uid), accounts.group_name(gid) or str(gid)
        return Access(owner, group, mode, uid, gid, tuple(_named(accounts, tag, number) for tag, number in named))

    def number(key: str, default: int, base: int) -> int:
        try:
            return int(uevent.get(key, ""), base)
        except ValueError:
            return default

    # drivers/base/devtmpfs.c: 0600 root:root, unless the class says otherwise, which the uevent then shows.
    default = access(number("DEVUID", 0, 10), number("DEVGID", 0, 10), number("DEVMODE", 0o600, 8) & 0o777)
    address = syspath.split("/")[-3] if kind == "cdevs" and syspath.count("/") > 3 else ""
    link = cdev_link(address) if is_address(address) else None
    return LiveNode(
        kind,
        path,
        syspath,
        access(
            status.st_uid,
            status.st_gid,
            _posix_acl.real_mode(stat.S_IMODE(status.st_mode), entries),
            sorted(_posix_acl.named(entries)),
        ),
        default,
        link,
        link is not None and host.realpath(link) == path,
        acl,
    )


def _named(accounts: Accounts, tag: int, number: int) -> Named:
    look_up = accounts.user_name if tag == _posix_acl.USER else accounts.group_name
    return Named(tag, look_up(number) or str(number), number)


# -- the rules ---------------------------------------------------------------------------------------------------------


def setfacl(host: Host) -> str:
    """The path of setfacl(1), which the rules run.

    Raises:
        HostError: it is not installed.
    """
    path = host.which("setfacl")
    if path is None:
        raise HostError("setfacl is not installed, which access lists of nodes need (package acl).")
    return path


def rules_text(wanted: t.Mapping[str, Access], symlinks: bool, command: str = "/usr/bin/setfacl") -> str:
    """The rules file.

    Args:
        wanted: access by kind of node.
        symlinks: give the cdevs stable names.
        command: path of setfacl(1), for nodes with an access list.
    """
    lines = [
        own_header().rstrip("\n"),
        "# Who may open the IOMMUFD nodes, and stable names of the vfio character devices.",
        'ACTION=="remove", GOTO="iommufd_host_end"',
    ]
    for kind, match in KINDS.items():
        if kind not in wanted:
            continue
        access = wanted[kind]
        line = f'{match}, OWNER="{access.owner}", GROUP="{access.group}", MODE="{access.mode:04o}"'
        if access.acl:
            # udev sets owner, group and mode first and runs programs afterwards, at each event: the mode that it sets
            # shuts the list's mask, and setting the list opens it again. What an earlier rule put there goes (-b).
            line += f', RUN+="{command} -b -m {",".join(entry.text for entry in access.acl)} $devnode"'
        lines.append(line)
    if symlinks:
        # DEVPATH makes sure that the direct parent is a PCI function: a mediated device has one further up only, and
        # several of them would fight for one name. $id is the name of the parent that SUBSYSTEMS found first.
        # The tag has systemd make a device unit for the name, so that the unit of a guest can wait for it.
        lines.append(
            'SUBSYSTEM=="vfio-dev", DEVPATH=="*:??:??.?/vfio-dev/vfio*", SUBSYSTEMS=="pci", '
            f'SYMLINK+="{LINKS[len("/dev/") :]}/pci-$id", TAG+="systemd"'
        )
    lines.append('LABEL="iommufd_host_end"')
    return "\n".join(lines) + "\n"


def covered_kinds(content: bytes | None) -> set[str]:
    """The kinds of nodes whose access a rules file of ours sets."""
    lines = (content or b"").decode("utf-8", "replace").splitlines()
    return {kind for kind, match in KINDS.items() if any(line.startswith(f"{match}, OWNER=") for line in lines)}


def listed_kinds(content: bytes | None) -> set[str]:
    """The kinds of nodes whose access list a rules file of ours sets."""
    lines = [line for line in (content or b"").decode("utf-8", "replace").splitlines() if " -b -m " in line]
    return {kind for kind, match in KINDS.items() if any(line.startswith(f"{match}, OWNER=") for line in lines)}


@dataclasses.dataclass(frozen=True)
class Promise:
    """What installed rules of ours promise of each cdev.

    Attributes:
        access: its owner, group and mode; None: what the kernel gives it.
        linked: whether it has its stable name.
    """

    access: Access | None = None
    linked: bool = False


def read_promise(host: Host) -> Promise:
    """What the rules files of ours say about cdevs, wherever in udev's directory of the administrator they lie."""
    access: Access | None = None
    linked = False
    for name in host.listdir(_DIRECTORY):
        content = host.read_text(f"{_DIRECTORY}/{name}") or "" if name.endswith(".rules") else ""
        if OWN_MARK not in content[:400]:
            continue
        linked = linked or f'SYMLINK+="{LINKS[len("/dev/") :]}/' in content
        match = re.search(
            rf'^{re.escape(KINDS["cdevs"])}, OWNER="([^"]+)", GROUP="([^"]+)", MODE="(\d+)"', content, re.M
        )
        if match is not None:
            with contextlib.suppress(OptionError):  # a user or group that is gone; udev_access says that better
                access = resolve_access(Accounts(host), "", match[1], match[2], int(match[3], 8))
    return Promise(access, linked)


def check_promise(host: Host, promise: Promise, address: str, node: str) -> str | None:
    """What is wrong with the cdev of a PCI device, as a clause; None where it is as promised.

    Args:
        host: the host.
        promise: as :func:`read_promise` returns it.
        address: the device.
        node: its cdev.
    """
    status = host.stat(node)
    if status is None:
        return f"its character device {node} is not there"
    access = promise.access
    if access is not None:
        found = Access("", "", stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
        if (found.mode, found.uid, found.gid) != (access.mode, access.uid, access.gid):
            text = f"uid {found.uid}, gid {found.gid}, mode {found.mode:04o}"
            return f"its character device {node} has {text} and not {access.text}, as our rules of udev say"
    if promise.linked and host.realpath(cdev_link(address)) != node:
        return f"its stable name {cdev_link(address)} does not lead to {node}"
    return None


def check_syntax(host: Host, text: str) -> None:
    """Ask ``udevadm verify`` (systemd 254 and later) about a temporary copy; without it nothing is checked.

    Raises:
        HostError: udev would not take the rules; quotes it.
    """
    if not host.live:
        return
    with tempfile.TemporaryDirectory(prefix="iommufd-host-") as directory:
        copy = os.path.join(directory, "90-check.rules")
        with open(copy, "w", encoding="utf-8") as file:
            file.write(text)
        answer = host.ask(["udevadm", "verify", "--no-summary", copy])
    if answer is None or answer.ok or "Unknown command verb" in answer.stderr or "unrecognized option" in answer.stderr:
        return
    words = " / ".join(
        line.replace(copy, "line") for line in (answer.stderr + answer.stdout).split("\n") if line.strip()
    )
    raise HostError(f"udev would not take the rules, nothing was written: {words}", rules=text)


# -- planning ----------------------------------------------------------------------------------------------------------


def plan_present(state: State, wanted: t.Mapping[str, Access], symlinks: bool, host: Host) -> Plan:
    """What is missing until the rules are there and every live node follows them.

    Raises:
        Refusal: the file at the path is not ours.
    """
    refuse_foreign(state.path, state.content, "Give another name in path, or move it away")
    command = setfacl(host) if any(access.acl for access in wanted.values()) else ""
    text = rules_text(wanted, symlinks, command)
    plan = Plan()
    dropped = covered_kinds(state.content) - set(wanted)
    # udev takes no access list away: one that an earlier rule of ours set and none sets now is ours to remove. A list
    # that somebody set by hand stays, unless our rule has one.
    listed = listed_kinds(state.content)
    lists = listed | {kind for kind, access in wanted.items() if access.acl}
    unlisted = {kind for kind in listed if kind in wanted and not wanted[kind].acl}
    reset = [
        node
        for node in state.nodes
        if (node.kind in dropped and not node.has(node.default, node.kind in listed))
        or (node.kind in unlisted and node.acl)
    ]
    # New rules are tried on every node they are about, also on one that happens to have the right mode now: a rule of
    # somebody else that wins over ours shows here, and not at the next boot.
    rewrite = state.content != text.encode()
    follow = [
        node
        for node in state.nodes
        if (node.kind in wanted and (rewrite or not node.has(wanted[node.kind], node.kind in lists)))
        or (node.link is not None and (node.linked != symlinks or (rewrite and symlinks)))
    ]
    affected = follow + [node for node in reset if node not in follow]
    if reset:
        plan.add(ResetNodes.of(reset))
    if rewrite:
        before = (state.content or b"").decode("utf-8", "replace")
        plan.add(
            WriteRules(
                f"write {state.path}", state.path, before, text, path=state.path, content=text.encode(), mode=0o644,
                enforce_mode=True, nodes=affected,
            )
        )  # fmt: skip
    if affected:
        plan.add(FollowRules.of(affected, wanted, symlinks, host))
    return plan


def plan_absent(state: State, host: Host) -> Plan:
    """What is missing until the host is as it would be without us.

    Raises:
        Refusal: the file at the path is not ours.
    """
    refuse_foreign(state.path, state.content, "Give another name in path, or move it away")
    covered, listed = covered_kinds(state.content), listed_kinds(state.content)
    reset = [node for node in state.nodes if node.kind in covered and not node.has(node.default, node.kind in listed)]
    # A link of ours without the rule is what a killed run leaves: the rules file goes after the nodes' permissions.
    affected = reset + [node for node in state.nodes if node.linked and node not in reset]
    plan = Plan()
    if reset:
        plan.add(ResetNodes.of(reset))
    if state.content is not None:
        before = state.content.decode("utf-8", "replace")
        plan.add(RemoveRules(f"remove {state.path}", state.path, before, path=state.path, nodes=affected))
    if affected:
        plan.add(FollowRules.of(affected, {}, False, host))
    return plan


# -- steps -------------------------------------------------------------------------------------------------------------


def _reload() -> None:
    run(["udevadm", "control", "--reload"], 60)


def _trigger(nodes: t.Sequence[LiveNode]) -> None:
    """Have udev apply its rules to these nodes, and wait until it has."""
    here = [node.syspath for node in nodes if os.path.exists(node.syspath)]
    if here:
        run(["udevadm", "trigger", "--action=change", "--settle", *here], 120)


def _set_access(path: str, access: Access, acl: bytes = b"") -> None:
    """Set owner, group, mode and access list (empty: none) of a node."""
    try:
        # The list first: with it, chmod(2) would set its mask instead of the group's rights.
        _remove_acl(path)
        os.chown(path, access.uid, access.gid)
        os.chmod(path, access.mode)
        if acl:
            os.setxattr(path, _posix_acl.ATTRIBUTE, acl)
    except FileNotFoundError:
        pass  # the device went away in the meantime, and its node with it


def _remove_acl(path: str) -> None:
    try:
        os.removexattr(path, _posix_acl.ATTRIBUTE)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.ENOTSUP):
            raise


@dataclasses.dataclass
class _RulesChanged(Step):
    """Have udev read its rules after a change of the file; taken back, the nodes follow the rules of before."""

    nodes: t.Sequence[LiveNode] = ()

    def apply(self) -> None:
        super().apply()
        _reload()

    def undo(self) -> None:
        super().undo()
        _reload()
        _trigger(self.nodes)


@dataclasses.dataclass
class WriteRules(_RulesChanged, WriteFile):
    """Write the rules and have udev read them."""


@dataclasses.dataclass
class RemoveRules(_RulesChanged, RemoveFile):
    """Remove the rules and have udev forget them."""


@dataclasses.dataclass
class ResetNodes(Step):
    """Give nodes back what the kernel gave them; udev does not do that when a rule is gone."""

    nodes: t.Sequence[LiveNode] = ()

    @classmethod
    def of(cls, nodes: t.Sequence[LiveNode]) -> ResetNodes:
        return cls(
            "give " + ", ".join(node.path for node in nodes) + " back the kernel's owner, group and mode",
            "device nodes",
            "\n".join(f"{node.path} {node.access.text}" for node in nodes),
            "\n".join(f"{node.path} {node.default.text}" for node in nodes),
            nodes=nodes,
        )

    def apply(self) -> None:
        for node in self.nodes:
            _set_access(node.path, node.default)

    def undo(self) -> None:
        for node in self.nodes:
            _set_access(node.path, node.access, node.acl)


@dataclasses.dataclass
class FollowRules(Step):
    """Trigger nodes and check that they followed; one that did not is a failure that names the rule that won."""

    nodes: t.Sequence[LiveNode] = ()
    wanted: t.Mapping[str, Access] = dataclasses.field(default_factory=dict)
    symlinks: bool = False
    host: Host = dataclasses.field(default_factory=Host)

    @classmethod
    def of(cls, nodes: t.Sequence[LiveNode], wanted: t.Mapping[str, Access], symlinks: bool, host: Host) -> FollowRules:
        def line(node: LiveNode, access: Access, linked: bool) -> str:
            return f"{node.path} {access.text}" + (f" {node.link}" if linked and node.link else "")

        # A node that was reset before has its default by now.
        now = [node.access if node.kind in wanted else node.default for node in nodes]
        return cls(
            "have udev apply the rules to " + ", ".join(node.path for node in nodes),
            "device nodes",
            "\n".join(line(node, access, node.linked) for node, access in zip(nodes, now)),
            "\n".join(line(node, wanted.get(node.kind, node.default), symlinks) for node in nodes),
            nodes=nodes,
            wanted=wanted,
            symlinks=symlinks,
            host=host,
        )

    def apply(self) -> None:
        _trigger(self.nodes)
        # Once more where it is not so: on a host that had just booted, udev once handled an event by the old rules.
        _trigger([node for node in self.nodes if self._problem(node)])
        problems = [problem for problem in (self._problem(node) for node in self.nodes) if problem]
        if problems:
            raise HostError("; ".join(problems))

    def undo(self) -> None:
        for node in self.nodes:
            _set_access(node.path, node.access, node.acl)

    def _problem(self, before: LiveNode) -> str | None:
        status = self.host.stat(before.path)
        if status is None:
            return None  # the device went away; the rule is there for when it comes back
        wanted = self.wanted.get(before.kind)
        if wanted is not None:
            entries = _posix_acl.parse(_posix_acl.read(self.host, before.path))
            mode = _posix_acl.real_mode(stat.S_IMODE(status.st_mode), entries)
            found = {"OWNER": status.st_uid, "GROUP": status.st_gid, "MODE": mode}
            expected = {"OWNER": wanted.uid, "GROUP": wanted.gid, "MODE": wanted.mode}
            wrong = [key for key, value in expected.items() if found[key] != value]
            if wrong:
                text = f"uid {found['OWNER']}, gid {found['GROUP']}, mode {found['MODE']:04o}"
                return f"{before.path} did not become {wanted.text} but has {text}: {self._winner(before, wrong)}"
            if wanted.acl and not wanted.named <= _posix_acl.named(entries):
                return f"{before.path} did not get the access list {', '.join(entry.text for entry in wanted.acl)}"
        if before.link is not None and (self.host.realpath(before.link) == before.path) != self.symlinks:
            return f"udev did not {'make' if self.symlinks else 'remove'} the link {before.link}"
        return None

    def _winner(self, node: LiveNode, keys: t.Sequence[str]) -> str:
        answer = self.host.ask(["udevadm", "test", "--action=change", node.syspath])
        text = "" if answer is None else answer.stdout + "\n" + answer.stderr
        winners = winning_rules(text)
        places: dict[str, list[str]] = {}
        for key in keys:
            if key in winners:
                places.setdefault(winners[key], []).append(key)
        named = [f"{place} sets {' and '.join(found)}" for place, found in places.items()]
        return f"the rule {', the rule '.join(named)} after ours" if named else "`udevadm test` names no other rule"


def winning_rules(text: str) -> dict[str, str]:
    """From what ``udevadm test`` says: key (OWNER, GROUP, MODE) -> "file:line" of the rule that set it last."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = re.search(r"(/\S+?\.rules):(\d+):? .*?\b(OWNER|GROUP|MODE)\b", line)
        if match:
            found[match.group(3)] = f"{match.group(1)}:{match.group(2)}"
    return found
