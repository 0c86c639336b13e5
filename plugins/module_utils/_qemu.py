# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""QEMU binaries: which there are and what each says that it can do."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import stat
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host, Output
from ansible_collections.iommufd.host.plugins.module_utils._package_versions import package_versions

# Where distributions, this collection and people put system emulators.
DIRECTORIES = (
    "/opt/iommufd-host/qemu/current/bin",
    "/usr/local/bin",
    "/usr/bin",
    "/usr/libexec",
    "/opt/qemu/bin",
    "/run/current-system/sw/bin",
)

_BINARY = re.compile(r"qemu-system-[a-z0-9_]+|qemu-kvm|kvm")
_VERSION = re.compile(r"QEMU emulator version (\d+(?:\.\d+)+)(?:\s*\(([^)]*)\))?")

# A binary that was built on a slow emulated host may need seconds to link its libraries.
_TIMEOUT = 60.0


@dataclasses.dataclass(frozen=True)
class Qemu:
    """A QEMU binary.

    Attributes:
        path: as found; :attr:`target` follows its links.
        target: the file itself.
        version: "10.0.13"; None where it was not asked or did not answer.
        build: what the builder says beside the version ("Debian 1:10.0.13+ds-1"), or None.
        iommufd: whether it has the object ``iommufd`` and vfio-pci can use it; None where it was not asked.
        passing: whether vfio-pci and iommufd take descriptors that somebody else opened (``fd=``).
        modified: time of the file's last change, in seconds since 1970.
        size: bytes.
        problem: why it did not answer, in its own words.
    """

    path: str
    target: str
    version: str | None = None
    build: str | None = None
    iommufd: bool | None = None
    passing: bool | None = None
    modified: int | None = None
    size: int | None = None
    problem: str | None = None

    @property
    def version_numbers(self) -> tuple[int, ...]:
        return tuple(int(part) for part in (self.version or "0").split("."))

    def to_dict(self) -> dict[str, t.Any]:
        return dataclasses.asdict(self)


def find_binaries(host: Host) -> list[str]:
    """Paths of the QEMU system emulators, the machine's own architecture first; names of one file only once."""
    found: dict[str, str] = {}
    others = [f"/opt/{name}/bin" for name in host.listdir("/opt")]
    for directory in dict.fromkeys([*DIRECTORIES, *others]):
        for name in host.listdir(directory):
            path = f"{directory}/{name}"
            if not _BINARY.fullmatch(name) or host.which(path) is None:
                continue
            target = host.realpath(path)
            if target is None or _is_script(host, target):
                continue
            # Of several names (/usr/bin/kvm, qemu-system-amd64) the file's own one.
            if target not in found or path == target:
                found[target] = path
    return sorted(found.values(), key=lambda path: (not _is_own(path), path))


# What brings the emulator: Debian, Red Hat, SUSE, Arch.
_PACKAGES = (
    "qemu-system-x86", "qemu-system-arm", "pve-qemu-kvm", "qemu-kvm-core", "qemu-system-x86-core",
    "qemu-system-aarch64-core", "qemu-kvm", "qemu-x86", "qemu-arm", "qemu",
)  # fmt: skip


def package_version(host: Host) -> str | None:
    """The version of the distribution's own QEMU by its package database, which a captured tree has as well."""
    return next(iter(package_versions(host, _PACKAGES).values()), None)


def _is_own(path: str) -> bool:
    """Whether a binary emulates the architecture of this machine."""
    return os.path.basename(path) in (f"qemu-system-{os.uname().machine}", "qemu-kvm", "kvm")


def read_qemus(host: Host) -> list[Qemu]:
    """All binaries. Those for the host's own architecture are asked (only they can give a guest a device at KVM's
    speed); the others, of which a distribution may install thirty, are only listed. So is one below /opt, where it is
    not root's alone: nobody named it, and root would run whatever was put there."""
    found = []
    for path in find_binaries(host):
        foreign = host.live and path.startswith("/opt/") and not is_roots(host, path)
        one = read_qemu(host, path, _is_own(path) and not foreign)
        if foreign and _is_own(path):
            one = dataclasses.replace(one, problem="others than root may change it, so it was not asked")
        found.append(one)
    return found


def is_roots(host: Host, path: str) -> bool:
    """Whether nobody but root can change what a path leads to: neither the file nor a directory on the way to it."""
    for place in (path, host.realpath(path) or path):
        while place != "/":
            status = host.stat(place, follow=False)
            if status is None or status.st_uid != 0:
                return False
            if status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode):
                return False
            place = os.path.dirname(place)
    return True


def read_qemu(host: Host, path: str, ask: bool = True) -> Qemu:
    """One binary, asked what it can do.

    It is asked itself: ``query-qmp-schema`` lists iommufd even where it is compiled out, and a version proves nothing,
    so both ``-object help`` and the properties of vfio-pci are read (QEMU 9.0 and later, where it was not left out).

    Args:
        host: the host.
        path: as the host sees it.
        ask: whether to run it; else only the file is looked at, as always on a captured tree.
    """
    status = host.stat(path)
    target = host.realpath(path)
    if status is None or target is None:
        return Qemu(path, path, problem="there is no such file")
    plain = Qemu(path, target, modified=int(status.st_mtime), size=status.st_size)
    if not host.live or not ask:
        return plain
    if host.which(path) is None:
        return dataclasses.replace(plain, problem="it is not executable")
    return _ask(plain)


@functools.lru_cache(maxsize=64)
def _ask(plain: Qemu) -> Qemu:
    """Ask a binary; one answer per file, size and time of change, so that a module asks each only once."""
    return question(plain, lambda argv: Host().ask(argv, _TIMEOUT))


def question(plain: Qemu, ask: t.Callable[[list[str]], Output | None]) -> Qemu:
    """Ask a binary what it can do.

    Args:
        plain: the binary as a file.
        ask: runs a command and returns what it said; None where it did not answer.
    """
    answer = ask([plain.path, "-version"])
    match = _VERSION.search(answer.stdout) if answer is not None else None
    if match is None:
        return dataclasses.replace(plain, problem=_words(answer))
    plain = dataclasses.replace(plain, version=match[1], build=match[2])
    device = ask([plain.path, "-device", "vfio-pci,help"])
    if device is None:
        return dataclasses.replace(plain, problem=_words(None))
    properties = set(re.findall(r"^\s*([\w-]+)=", device.stdout, re.MULTILINE))
    able = "iommufd" in properties
    if able:  # the object could still be missing; without the property there is no need to ask
        objects = ask([plain.path, "-object", "help"])
        if objects is None:
            return dataclasses.replace(plain, problem=_words(None))
        able = re.search(r"^\s*iommufd\s*$", objects.stdout, re.MULTILINE) is not None
    return dataclasses.replace(plain, iommufd=able, passing=able and "fd" in properties)


def _words(output: Output | None) -> str:
    if output is None:
        return "it did not answer"
    lines = (output.stderr or output.stdout).strip().splitlines()
    return lines[-1] if lines else f"it ended with status {output.status} and said nothing"


def _is_script(host: Host, path: str) -> bool:
    """Whether a file is a wrapper (Debian's /usr/bin/kvm), which would only lead to a binary that is listed anyway."""
    return (host.read_bytes(path, 2) or b"") == b"#!"
