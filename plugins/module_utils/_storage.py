# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Block devices: how they stand on each other, and what uses them (mounts, swap, LVM, RAID, encryption, …)."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._zfs import members

BLOCK = "/sys/class/block"
DISKS = "/sys/block"

# Filesystems with an anonymous device number whose source in mountinfo names real devices; every other one with
# major 0 (tmpfs, overlay, proc…) may carry any text there.
_ANONYMOUS = ("btrfs", "bcachefs")

# What made a device-mapper device, by the prefix of its UUID ("part1-mpath-…" is a partition on multipath).
_MAPPERS = (("LVM-", "lvm"), ("CRYPT-", "crypt"), ("mpath-", "multipath"), ("DMRAID-", "raid"))


@dataclasses.dataclass(frozen=True)
class StorageUse:
    """Something that uses a block device directly.

    Attributes:
        kind, name: as in a Use.
        words: what it does, to be put after the chain of devices ("is mounted on /").
    """

    kind: str
    name: str
    words: str


@dataclasses.dataclass
class BlockDevice:
    """A disk, a partition or a virtual block device.

    Attributes:
        name: "sda2".
        path: its real directory in sysfs.
        number: "8:2".
        kind: lvm, crypt, multipath, raid, bcache, device-mapper for what stands on other devices; else "".
        label: its name for people ("vg-root" for dm-0).
        cache_set: identity of the bcache set that it is registered with.
    """

    name: str
    path: str
    number: str | None = None
    kind: str = ""
    label: str = ""
    cache_set: str | None = None


@dataclasses.dataclass(frozen=True)
class Mount:
    """A mounted filesystem. ``number`` is "major:minor", None where only /proc/self/mounts is there."""

    number: str | None
    point: str
    filesystem: str
    source: str
    options: str = ""


class Storage:
    """All block devices of a host, read once.

    Args:
        host: the host.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.devices: dict[str, BlockDevice] = {}
        self.above: dict[str, set[str]] = collections.defaultdict(set)
        self.below: dict[str, set[str]] = collections.defaultdict(set)
        self._read()

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        for name, link in self._list():
            path = self.host.realpath(link)
            if path is not None:
                self.devices[name] = self._read_device(name, path)
        loops = {}
        for name, device in self.devices.items():
            entries = set(self.host.listdir(device.path))
            parent = os.path.basename(os.path.dirname(device.path))
            if parent in self.devices:  # partitions, and nothing else, lie in the directory of another
                self._stack(parent, name)
            # Both directions, for a captured tree may have only one of them.
            for holder in self.host.listdir(f"{device.path}/holders") if "holders" in entries else ():
                self._stack(name, holder)
            for slave in self.host.listdir(f"{device.path}/slaves") if "slaves" in entries else ():
                self._stack(slave, name)
            if "loop" in entries:
                loops[name] = self.host.read_line(f"{device.path}/loop/backing_file")
            if "bcache" in entries:
                device.cache_set = self.host.link_name(f"{device.path}/bcache/set")
        for row in (self.host.read_text("/proc/mdstat") or "").splitlines():
            array, colon, rest = row.partition(" : ")
            for member in re.findall(r"(\S+?)\[\d+\]", rest) if colon else ():
                self._stack(member, array)
        for name, backing in loops.items():  # last, for a file's filesystem may lie on any of them
            for under in self._carriers(backing) if backing else ():
                if name not in self.roots(under):
                    self._stack(under, name)

    def _list(self) -> t.Iterator[tuple[str, str]]:
        names = self.host.listdir(BLOCK)
        if names:
            yield from ((name, f"{BLOCK}/{name}") for name in names)
            return
        for disk in self.host.listdir(DISKS):
            yield disk, f"{DISKS}/{disk}"
            for name in self.host.listdir(f"{DISKS}/{disk}"):
                if name.startswith(disk) and self.host.exists(f"{DISKS}/{disk}/{name}/partition"):
                    yield name, f"{DISKS}/{disk}/{name}"

    def _read_device(self, name: str, path: str) -> BlockDevice:
        device = BlockDevice(name, path, self.host.read_line(f"{path}/dev"), label=name)
        if name.startswith("dm-"):
            device.label = self.host.read_line(f"{path}/dm/name") or name
            identity = re.sub(r"^part\d+-", "", self.host.read_line(f"{path}/dm/uuid") or "")
            device.kind = next((kind for prefix, kind in _MAPPERS if identity.startswith(prefix)), "device-mapper")
        elif re.match(r"md[\d_]", name):
            device.kind = "raid"
        elif name.startswith("bcache"):
            device.kind = "bcache"
        return device

    def _stack(self, lower: str, upper: str) -> None:
        if lower != upper and lower in self.devices and upper in self.devices:
            self.above[lower].add(upper)
            self.below[upper].add(lower)

    @functools.cached_property
    def by_number(self) -> dict[str, str]:
        """Names by "major:minor"."""
        return {device.number: name for name, device in self.devices.items() if device.number}

    @functools.cached_property
    def _by_label(self) -> dict[str, str]:
        return {device.label: name for name, device in self.devices.items() if device.label != name}

    def resolve(self, path: str) -> str | None:
        """The name of the block device that a path in /dev means, or None."""
        if not path.startswith("/dev/"):
            return None
        rest = path[len("/dev/") :]
        if rest in self.devices:
            return rest
        if rest.startswith("mapper/"):
            name = self._by_label.get(rest[len("mapper/") :])
            if name is not None:
                return name
        group, slash, volume = rest.partition("/")
        if slash:  # /dev/VG/LV: device-mapper doubles the hyphens of both names
            mapped = f"{group.replace('-', '--')}-{volume.replace('-', '--')}"
            if mapped in self._by_label:
                return self._by_label[mapped]
        real = os.path.basename(self.host.realpath(path) or "")
        if real in self.devices:
            return real
        plain = rest.replace("/", "!")  # sysfs writes /dev/cciss/c0d0 so
        return plain if plain in self.devices else self._by_link.get(rest)

    @functools.cached_property
    def _by_link(self) -> dict[str, str]:
        """Names by the links that udev keeps for them ("disk/by-uuid/…"), for a tree that has no /dev."""
        return {link: name for name in self.devices for link in re.findall(r"^S:(.+)$", self._udev(name), re.MULTILINE)}

    def _udev(self, name: str) -> str:
        """What udev's database says about a device."""
        number = self.devices[name].number
        return (self.host.read_text(f"/run/udev/data/b{number}", 65536) or "") if number else ""

    # -- walking ---------------------------------------------------------------------------------------------------

    def roots(self, name: str) -> set[str]:
        """The devices at the bottom of a stack: those that stand on no other block device."""
        seen: set[str] = set()
        bottom: set[str] = set()
        todo = [name]
        while todo:
            here = todo.pop()
            if here in seen:
                continue
            seen.add(here)
            lower = self.below.get(here, set())
            todo.extend(lower)
            if not lower:
                bottom.add(here)
        return bottom

    def paths(self, name: str) -> list[str]:
        """Real sysfs paths that lead through the hardware of a disk.

        A disk of NVMe native multipath stands under /sys/devices/virtual/nvme-subsystem and its controllers are only
        linked from there.
        """
        path = self.devices[name].path
        match = re.match(r"(.*/nvme-subsystem/[^/]+)/", path)
        if match is None:
            return [path]
        links = [f"{match[1]}/{one}" for one in self.host.listdir(match[1]) if re.fullmatch(r"nvme\d+", one)]
        if not links:  # a tree without them: each controller has its own path to the disk, nvme0c1n1 for nvme0n1
            path_name = re.compile(re.sub(r"^nvme(\d+)(n\d+).*", r"nvme\1c\\d+\2", name))
            controllers = (f"/sys/class/nvme/{one}" for one in self.host.listdir("/sys/class/nvme"))
            links = [one for one in controllers if any(map(path_name.fullmatch, self.host.listdir(one)))]
        return [real for real in map(self.host.realpath, links) if real is not None]

    # -- uses ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def uses(self) -> dict[str, list[StorageUse]]:
        """What uses each device directly, by its name."""
        found: dict[str, list[StorageUse]] = collections.defaultdict(list)

        def note(name: str | None, use: StorageUse) -> None:
            if name is not None and use not in found[name]:
                found[name].append(use)

        for name, device in self.devices.items():
            if device.kind and self.below.get(name):
                note(name, StorageUse(device.kind, device.label, f"is {_ROLE[device.kind]} {device.label}"))
            if device.cache_set is not None and not self.above.get(name):
                note(name, StorageUse("bcache", device.cache_set, f"belongs to the bcache set {device.cache_set}"))
        for mount in self.mounts:
            words = f"is mounted on {mount.point}{_ROOT if mount.point == '/' else ''}"
            for name in self._mounted(mount):
                note(name, StorageUse("mount", mount.point, words))
        for path in read_swaps(self.host):
            if path.startswith("/dev/"):
                note(self.resolve(path), StorageUse("swap", path, "is swap space"))
            else:
                for name in self._carriers(path):
                    note(name, StorageUse("swap", path, f"carries the swap file {path}"))
        for name, pool in self._zfs_members:
            note(name, StorageUse("zfs", pool, f"belongs to the imported ZFS pool {pool}"))
            for mount in self.mounts:
                if mount.filesystem == "zfs" and mount.source.partition("/")[0] == pool:
                    words = f"belongs to the ZFS pool {pool}: {mount.source} is mounted on {mount.point}"
                    note(name, StorageUse("mount", mount.point, words + (_ROOT if mount.point == "/" else "")))
        for path, target in self._exports():
            note(self.resolve(path), StorageUse("export", target, f"is exported by the storage target {target}"))
        return dict(found)

    @functools.cached_property
    def mounts(self) -> list[Mount]:
        return read_mounts(self.host)

    def _carriers(self, path: str) -> set[str]:
        """The devices that a file lies on, by the innermost mount that it is in; a device's node means the device."""
        if path.startswith("/dev/"):
            return set(filter(None, [self.resolve(path)]))
        around = [
            (len(mount.point), index)
            for index, mount in enumerate(self.mounts)
            if mount.filesystem != "overlay" and f"{path}/".startswith(f"{mount.point.rstrip('/')}/")
        ]
        return self._mounted(self.mounts[max(around)[1]]) if around else set()

    def _mounted(self, mount: Mount) -> set[str]:
        """The devices of a mounted filesystem."""
        names: set[str] = set()
        if mount.filesystem == "overlay" and mount.point in ("/", "/usr"):  # the system itself, not one of containers
            for paths in re.findall(r"\b(?:lowerdir|upperdir)=([^,]+)", mount.options):
                for path in paths.split(":"):
                    names.update(self._carriers(path))
            return names
        if mount.filesystem == "btrfs":
            own = self.resolve(mount.source)
            names.update(next((members for members in self._btrfs if own in members), set()))
        if mount.number is not None and not mount.number.startswith("0:"):
            known = self.by_number.get(mount.number)
            if known is not None:
                names.add(known)
        elif mount.number is not None and mount.filesystem not in _ANONYMOUS:
            return names
        if not names:  # no number (mounts), an anonymous one (btrfs, bcachefs), or one that the tree does not have
            sources = [self._root_source] if mount.source == "/dev/root" else mount.source.split(":")
            names.update(filter(None, map(self.resolve, sources)))
        # An XFS journal or realtime section of its own shows up only among the options.
        for path in re.findall(r"\b(?:logdev|rtdev)=([^,]+)", mount.options):
            name = self.resolve(path)
            if name is not None:
                names.add(name)
        return names

    @functools.cached_property
    def _btrfs(self) -> list[set[str]]:
        """The member devices of each mounted btrfs: mountinfo names only one of them."""
        found = []
        for identity in self.host.listdir("/sys/fs/btrfs"):
            members = set(self.host.listdir(f"/sys/fs/btrfs/{identity}/devices")) & set(self.devices)
            if members:
                found.append(members)
        return found

    @functools.cached_property
    def _root_source(self) -> str:
        """The root filesystem's device by the kernel's command line; /proc/self/mounts calls it /dev/root."""
        found = re.findall(r"\broot=(\S+)", self.host.read_line("/proc/cmdline") or "")
        kind, equals, value = (found[-1] if found else "").partition("=")
        return f"/dev/disk/by-{kind.lower()}/{value}" if equals else kind

    @functools.cached_property
    def _zfs_members(self) -> list[tuple[str, str]]:
        """Members of imported ZFS pools, each with its pool.

        ZFS leaves no link in sysfs. The kernel names the pools that are imported; which disk belongs to which is asked
        of zpool, and read from udev's database and from the list that ZFS itself keeps for the next import.
        """
        pools = {
            name for name in self.host.listdir("/proc/spl/kstat/zfs") if self.host.is_dir(f"/proc/spl/kstat/zfs/{name}")
        }
        pools.update(mount.source.partition("/")[0] for mount in self.mounts if mount.filesystem == "zfs")
        found = set()
        for pool, path in members(self.host) if pools else ():
            name = self.resolve(path)
            if name is not None and pool in pools:
                found.add((name, pool))
        known = {name for name, _pool in found}
        for name in self.devices if pools else ():
            text = self._udev(name)
            if name not in known and re.search(r"^E:ID_FS_TYPE=zfs_member$", text, re.MULTILINE):
                label = re.search(r"^E:ID_FS_LABEL=(.+)$", text, re.MULTILINE)
                if label is None or label[1] in pools:
                    found.add((name, label[1] if label else sorted(pools)[0]))
        return sorted(found)

    def _exports(self) -> t.Iterator[tuple[str, str]]:
        """Disks that the kernel itself exports (LIO, nvmet), with the name of the export."""
        core = "/sys/kernel/config/target/core"
        for backend in self.host.listdir(core):
            for name in self.host.listdir(f"{core}/{backend}") if backend.startswith(("iblock", "pscsi")) else ():
                path = self.host.read_line(f"{core}/{backend}/{name}/udev_path")
                if path is not None:
                    yield path, name
        systems = "/sys/kernel/config/nvmet/subsystems"
        for system in self.host.listdir(systems):
            for space in self.host.listdir(f"{systems}/{system}/namespaces"):
                base = f"{systems}/{system}/namespaces/{space}"
                path = self.host.read_line(f"{base}/device_path")
                if path is not None and self.host.read_line(f"{base}/enable") == "1":
                    yield path, system


_ROOT = ", the host's root filesystem"

_ROLE = {
    "lvm": "the LVM volume",
    "crypt": "the encrypted volume",
    "multipath": "the multipath device",
    "raid": "the RAID array",
    "bcache": "the cached device",
    "device-mapper": "the mapped device",
}


def read_mounts(host: Host) -> list[Mount]:
    """The mounted filesystems, also those that only other mount namespaces have (live)."""
    for path in ("/proc/self/mountinfo", "/proc/1/mountinfo"):
        mounts = parse_mountinfo(host.read_text(path) or "")
        if not mounts:
            continue
        seen = {mount.number for mount in mounts}
        for process, other in _other_namespaces(host):
            # What is mounted here as well is named by the mount point that people know. A path over there is not the
            # one of that name here: "/" is a container's root. The host's is what the first process has.
            where = "" if process == "1" else " in another mount namespace"
            mounts.extend(
                dataclasses.replace(mount, point=mount.point + where)
                for mount in parse_mountinfo(other)
                if mount.number not in seen
            )
        return mounts
    for path in ("/proc/self/mounts", "/proc/mounts", "/proc/1/mounts"):
        rows = [line.split() for line in (host.read_text(path) or "").splitlines()]
        mounts = [Mount(None, unescape(row[1]), row[2], unescape(row[0]), row[3]) for row in rows if len(row) >= 4]
        if mounts:
            return mounts
    return []


def parse_mountinfo(text: str) -> list[Mount]:
    """The mounts in the format of proc(5), /proc/PID/mountinfo; a line that does not follow it is left out."""
    mounts = []
    for line in text.splitlines():
        left, dash, right = line.partition(" - ")
        before, after = left.split(), right.split()
        if dash and len(before) >= 6 and len(after) >= 2:
            options = after[2] if len(after) > 2 else ""
            mounts.append(Mount(before[2], unescape(before[4]), after[0], unescape(after[1]), options))
    return mounts


def _other_namespaces(host: Host) -> t.Iterator[tuple[str, str]]:
    """One process of each other mount namespace, and its mountinfo."""
    if not host.live:
        return
    seen = {host.readlink("/proc/self/ns/mnt")}
    for process in host.listdir("/proc"):
        if process.isdigit():
            namespace = host.readlink(f"/proc/{process}/ns/mnt")
            if namespace is not None and namespace not in seen:
                seen.add(namespace)
                yield process, host.read_text(f"/proc/{process}/mountinfo") or ""


def read_swaps(host: Host) -> list[str]:
    """Paths of the swap areas: devices, and files on mounted filesystems."""
    rows = [line.split() for line in (host.read_text("/proc/swaps") or "").splitlines()]
    return [unescape(row[0]) for row in rows if len(row) >= 2 and row[0].startswith("/")]


def unescape(text: str) -> str:
    """A path from /proc/self/mountinfo, /proc/swaps and the like, where blanks are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
