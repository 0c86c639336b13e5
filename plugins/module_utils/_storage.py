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

BLOCK = "/sys/class/block"

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
    """

    name: str
    path: str
    number: str | None = None
    kind: str = ""
    label: str = ""


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
        for name in self.host.listdir(BLOCK):
            path = self.host.realpath(f"{BLOCK}/{name}")
            if path is not None:
                self.devices[name] = self._read_device(name, path)
        for name, device in self.devices.items():
            entries = set(self.host.listdir(device.path))
            parent = os.path.basename(os.path.dirname(device.path))
            if "partition" in entries and parent in self.devices:
                self._stack(parent, name)
            # Both directions, for a captured tree may have only one of them.
            for holder in self.host.listdir(f"{device.path}/holders") if "holders" in entries else ():
                self._stack(name, holder)
            for slave in self.host.listdir(f"{device.path}/slaves") if "slaves" in entries else ():
                self._stack(slave, name)
            if "loop" in entries:
                backing = self.host.read_line(f"{device.path}/loop/backing_file")
                under = self.resolve(backing) if backing and backing.startswith("/dev/") else None
                if under is not None:
                    self._stack(under, name)

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
        return real if real in self.devices else None

    # -- walking ---------------------------------------------------------------------------------------------------

    def chains(self, name: str) -> t.Iterator[list[str]]:
        """Every device that stands on one, with the way to it: ["sda"], ["sda", "sda2"], ["sda", "sda2", "md0"], …

        Each device appears once, by the shortest way.
        """
        seen = {name}
        todo = collections.deque([[name]])
        while todo:
            chain = todo.popleft()
            yield chain
            for upper in sorted(self.above.get(chain[-1], ())):
                if upper not in seen:
                    seen.add(upper)
                    todo.append([*chain, upper])

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
        links = [entry for entry in self.host.listdir(match[1]) if re.fullmatch(r"nvme\d+", entry)]
        return [real for real in (self.host.realpath(f"{match[1]}/{link}") for link in links) if real is not None]

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
        for mount in read_mounts(self.host):
            words = f"is mounted on {mount.point}"
            if mount.point == "/":
                words += ", the host's root filesystem"
            for name in self._mounted(mount):
                note(name, StorageUse("mount", mount.point, words))
        for path in read_swaps(self.host):
            note(self.resolve(path), StorageUse("swap", path, "is swap space"))
        for name, pool in self._zfs():
            note(name, StorageUse("zfs", pool, f"belongs to the imported ZFS pool {pool}"))
        for path, target in self._exports():
            note(self.resolve(path), StorageUse("export", target, f"is exported by the storage target {target}"))
        return dict(found)

    def _mounted(self, mount: Mount) -> set[str]:
        """The devices of a mounted filesystem."""
        names: set[str] = set()
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
            names.update(filter(None, (self.resolve(source) for source in mount.source.split(":"))))
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

    def _zfs(self) -> t.Iterator[tuple[str, str]]:
        """Members of imported ZFS pools. ZFS leaves no link in sysfs: udev's database says which disk belongs where."""
        pools = {
            name for name in self.host.listdir("/proc/spl/kstat/zfs") if self.host.is_dir(f"/proc/spl/kstat/zfs/{name}")
        }
        for name, device in self.devices.items() if pools else ():
            text = self.host.read_text(f"/run/udev/data/b{device.number}") or ""
            if re.search(r"^E:ID_FS_TYPE=zfs_member$", text, re.MULTILINE):
                label = re.search(r"^E:ID_FS_LABEL=(.+)$", text, re.MULTILINE)
                if label is None or label[1] in pools:
                    yield name, label[1] if label else sorted(pools)[0]

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
    text = host.read_text("/proc/self/mountinfo")
    if text is not None:
        mounts = parse_mountinfo(text)
        seen = {mount.number for mount in mounts}
        for other in _other_namespaces(host):
            # What is mounted here as well is named by the mount point that people know.
            mounts.extend(mount for mount in parse_mountinfo(other) if mount.number not in seen)
        return mounts
    text = host.read_text("/proc/self/mounts") or host.read_text("/proc/mounts") or ""
    rows = [line.split() for line in text.splitlines()]
    return [Mount(None, unescape(row[1]), row[2], unescape(row[0]), row[3]) for row in rows if len(row) >= 4]


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


def _other_namespaces(host: Host) -> t.Iterator[str]:
    """mountinfo of one process of each other mount namespace."""
    if not host.live:
        return
    seen = {host.readlink("/proc/self/ns/mnt")}
    for process in host.listdir("/proc"):
        if process.isdigit():
            namespace = host.readlink(f"/proc/{process}/ns/mnt")
            if namespace is not None and namespace not in seen:
                seen.add(namespace)
                yield host.read_text(f"/proc/{process}/mountinfo") or ""


def read_swaps(host: Host) -> list[str]:
    """Paths of the swap areas that are devices (a swap file lies on a mounted filesystem)."""
    rows = [line.split() for line in (host.read_text("/proc/swaps") or "").splitlines()[1:]]
    return [unescape(row[0]) for row in rows if len(row) >= 2 and row[0].startswith("/dev/")]


def unescape(text: str) -> str:
    """A path from /proc/self/mountinfo, /proc/swaps and the like, where blanks are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
