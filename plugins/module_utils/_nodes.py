# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Device nodes: /dev/iommu, the vfio character devices and groups, /dev/kvm; and the users that own them."""

from __future__ import annotations

import dataclasses
import grp
import os
import pwd
import re
import stat
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _posix_acl
from ansible_collections.iommufd.host.plugins.module_utils._host import Host

IOMMU = "/dev/iommu"
CDEVS = "/dev/vfio/devices"
GROUPS = "/dev/vfio"
LEGACY_CONTAINER = "/dev/vfio/vfio"
KVM = "/dev/kvm"

# include/uapi/linux/major.h
_MISC_MAJOR = 10

# The entries of an access list that the mode does not show.
_ACL_ENTRIES = {_posix_acl.USER: "user", _posix_acl.GROUP: "group"}


@dataclasses.dataclass(frozen=True)
class Node:
    """A device node.

    Attributes:
        path: "/dev/iommu".
        mode: permission bits; :attr:`mode_text` as four octal digits.
        owner, group: names, or the numbers as text where the host has no such name.
        number: "major:minor"; None where it is not a device node (in a captured tree).
        expected: "major:minor" as sysfs has it; a node that differs is stale. None where sysfs does not tell.
        links: other names in /dev that point to it, in order.
        label: its SELinux label, where it has one.
        acl: whether it has an access list beyond owner, group and mode.
        acl_entries: what that list grants to others, within its mask ("user:libvirt-qemu:rw-", "group:tss:r--").
    """

    path: str
    uid: int
    gid: int
    owner: str
    group: str
    mode: int
    number: str | None
    expected: str | None = None
    links: list[str] = dataclasses.field(default_factory=list)
    label: str | None = None
    acl: bool = False
    acl_entries: list[str] = dataclasses.field(default_factory=list)

    @property
    def mode_text(self) -> str:
        return f"{self.mode:04o}"

    def to_dict(self) -> dict[str, t.Any]:
        return {
            "path": self.path,
            "owner": self.owner,
            "group": self.group,
            "mode": self.mode_text,
            "device": self.number,
            "expected": self.expected,
            "links": self.links,
            "label": self.label,
            "acl": self.acl,
            "acl_entries": self.acl_entries,
        }


@dataclasses.dataclass
class Nodes:
    """The nodes that matter for passing devices through; None or empty where they are not there."""

    iommu: Node | None = None
    kvm: Node | None = None
    container: Node | None = None
    cdevs: list[Node] = dataclasses.field(default_factory=list)
    groups: list[Node] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, t.Any]:
        return {
            "iommu": self.iommu.to_dict() if self.iommu else None,
            "kvm": self.kvm.to_dict() if self.kvm else None,
            "container": self.container.to_dict() if self.container else None,
            "cdevs": [node.to_dict() for node in self.cdevs],
            "groups": [node.to_dict() for node in self.groups],
        }


def has_nodes(host: Host) -> bool:
    """Whether a tree shows the nodes of a running host; the /dev of an image that does not run is empty."""
    return host.live or any(map(host.exists, ("/dev/null", IOMMU, GROUPS, KVM)))


def read_nodes(host: Host) -> Nodes:
    """All of them in one pass."""
    accounts = Accounts(host)
    links = _links(host)
    minors = {row[1]: row[0] for row in map(str.split, (host.read_text("/proc/misc") or "").splitlines()) if row[1:]}

    def node(path: str, sysfs: str) -> Node | None:
        found = read_node(host, path, accounts, sysfs, links)
        misc = re.fullmatch(r"/sys/class/misc/(\w+)/dev", sysfs)
        if found is not None and found.expected is None and misc is not None and misc[1] in minors:
            return dataclasses.replace(found, expected=f"{_MISC_MAJOR}:{minors[misc[1]]}")
        return found

    def several(directory: str, pattern: str, sysfs: str) -> list[Node]:
        names = [name for name in host.listdir(directory) if re.fullmatch(pattern, name)]
        names.sort(key=lambda name: int(re.sub(r"\D", "", name)))
        found = [node(f"{directory}/{name}", f"{sysfs}/{name}/dev") for name in names]
        return [one for one in found if one is not None]

    return Nodes(
        iommu=node(IOMMU, "/sys/class/misc/iommu/dev"),
        kvm=node(KVM, "/sys/class/misc/kvm/dev"),
        container=node(LEGACY_CONTAINER, "/sys/class/misc/vfio/dev"),
        cdevs=several(CDEVS, r"vfio[0-9]{1,9}", "/sys/class/vfio-dev"),
        groups=several(GROUPS, r"(noiommu-)?[0-9]{1,9}", "/sys/class/vfio"),
    )


def read_node(
    host: Host,
    path: str,
    accounts: Accounts | None = None,
    sysfs: str | None = None,
    links: t.Mapping[str, list[str]] | None = None,
) -> Node | None:
    """One node, or None where it does not exist.

    Args:
        host: the host.
        path: its path; a link is followed.
        accounts: names of users and groups, where they have been read already.
        sysfs: path of the attribute ``dev`` that says which number it should have.
        links: other names by the node's path, as :func:`read_nodes` finds them.
    """
    status = host.stat(path)
    if status is None:
        return None
    accounts = accounts or Accounts(host)
    is_device = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
    label, acl = _attributes(host, path)
    entries = [] if acl is None else acl_entries(acl, accounts)
    return Node(
        path=path,
        uid=status.st_uid,
        gid=status.st_gid,
        owner=accounts.user_name(status.st_uid) or str(status.st_uid),
        group=accounts.group_name(status.st_gid) or str(status.st_gid),
        mode=stat.S_IMODE(status.st_mode),
        number=f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if is_device else None,
        expected=host.read_line(sysfs) if sysfs else None,
        links=list((links or {}).get(path, [])),
        label=label,
        acl=acl is not None,
        acl_entries=entries,
    )


def _attributes(host: Host, path: str) -> tuple[str | None, bytes | None]:
    """SELinux label, and the access list as the kernel encodes it."""
    try:
        real = host.path(path)
        names = os.listxattr(real)
        label = acl = None
        if "security.selinux" in names:
            label = os.getxattr(real, "security.selinux").rstrip(b"\0").decode("utf-8", "replace")
        if _posix_acl.ATTRIBUTE in names:
            acl = os.getxattr(real, _posix_acl.ATTRIBUTE)
        return label, acl
    except (OSError, ValueError):
        return None, None


def acl_entries(acl: bytes, accounts: Accounts) -> list[str]:
    """What an access list grants to named users and groups, in the form of getfacl(1). The mask is taken into account:
    udev shuts it with the mode that it sets, and the entries stay.

    Args:
        acl: the extended attribute system.posix_acl_access; empty where it is not in the known form.
        accounts: for the names.
    """
    found = []
    entries = _posix_acl.parse(acl)
    mask = _posix_acl.mask(entries)
    for tag, permissions, number in entries:
        kind = _ACL_ENTRIES.get(tag)
        if kind is not None:
            name = accounts.user_name(number) if kind == "user" else accounts.group_name(number)
            bits = permissions & mask
            allowed = "".join(letter if bits & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
            found.append(f"{kind}:{name or number}:{allowed}")
    return found


def _links(host: Host) -> dict[str, list[str]]:
    """Links in /dev/vfio and below that point to a vfio node, by that node."""
    found: dict[str, list[str]] = {}
    todo = [GROUPS]
    while todo:
        directory = todo.pop()
        for name in host.listdir(directory):
            path = f"{directory}/{name}"
            if host.readlink(path) is not None:
                target = host.realpath(path)
                if target is not None:
                    found.setdefault(target, []).append(path)
            elif directory.count("/") < 4 and host.is_dir(path):
                todo.append(path)
    return {target: sorted(names) for target, names in found.items()}


class Accounts:
    """Users and groups of a host: on the live host by its name service, in a captured tree from its /etc files."""

    def __init__(self, host: Host) -> None:
        self._live = host.live
        self._users = {} if host.live else _read_table(host, "/etc/passwd", 7)
        self._groups = {} if host.live else _read_table(host, "/etc/group", 4)

    def user_id(self, name: str) -> int | None:
        """The id of a user, or None where there is no such user."""
        if self._live:
            try:
                return pwd.getpwnam(name).pw_uid
            except (KeyError, ValueError):
                return None
        return self._number(self._users.get(name))

    def group_id(self, name: str) -> int | None:
        """The id of a group, or None where there is no such group."""
        if self._live:
            try:
                return grp.getgrnam(name).gr_gid
            except (KeyError, ValueError):
                return None
        return self._number(self._groups.get(name))

    def user_name(self, number: int) -> str | None:
        """The name of a user id, or None where nobody has it."""
        if self._live:
            try:
                return pwd.getpwuid(number).pw_name
            except (KeyError, OverflowError):
                return None
        return self._name(self._users, number)

    def group_name(self, number: int) -> str | None:
        """The name of a group id, or None where no group has it."""
        if self._live:
            try:
                return grp.getgrgid(number).gr_name
            except (KeyError, OverflowError):
                return None
        return self._name(self._groups, number)

    def groups_of(self, user: str) -> list[int]:
        """The ids of a user's groups, the primary one first; empty where there is no such user."""
        if self._live:
            try:
                return os.getgrouplist(user, pwd.getpwnam(user).pw_gid)
            except (KeyError, ValueError):
                return []
        row = self._users.get(user)
        primary = None if row is None else _integer(row[3])
        if primary is None:
            return []
        others = [self._number(entry) for entry in self._groups.values() if user in entry[3].split(",")]
        return [primary, *(number for number in others if number is not None and number != primary)]

    @staticmethod
    def _number(row: list[str] | None) -> int | None:
        return None if row is None else _integer(row[2])

    @staticmethod
    def _name(table: t.Mapping[str, list[str]], number: int) -> str | None:
        return next((name for name, row in table.items() if _integer(row[2]) == number), None)


def _integer(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 11 else None


def _read_table(host: Host, path: str, fields: int) -> dict[str, list[str]]:
    rows = [line.split(":") for line in (host.read_text(path) or "").splitlines()]
    return {row[0]: row for row in reversed(rows) if len(row) == fields}
