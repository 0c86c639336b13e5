# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Versions of installed packages, by the package manager's own database: no program is asked, so an image or a report
tells them like the live host."""

from __future__ import annotations

import re
import struct
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host

_DPKG = "/var/lib/dpkg/status"
_RPM = ("/usr/lib/sysimage/rpm/rpmdb.sqlite", "/var/lib/rpm/rpmdb.sqlite")
_PACMAN = "/var/lib/pacman/local"
# What sos writes into a report: `rpm -qa` and `dpkg-query` with the packages' names first.
_REPORTS = ("/installed-rpms", "/installed-debs")

_LIMIT = 64 << 20

# rpmtag.h: the tags in a package's header, each here a string.
_RPM_VERSION = 1001
_RPM_RELEASE = 1002


def package_versions(host: Host, names: t.Sequence[str]) -> dict[str, str]:
    """The versions of those of some packages that are installed, by name.

    Args:
        host: the host.
        names: names of packages, of any distribution.
    """
    for read in (_dpkg, _rpm, _pacman, _report):
        found = read(host, names)
        if found:
            return {name: found[name] for name in names if name in found}
    return {}


def _dpkg(host: Host, names: t.Sequence[str]) -> dict[str, str]:
    found = {}
    for paragraph in (host.read_text(_DPKG, _LIMIT) or "").split("\n\n"):
        name = paragraph.partition("\n")[0].rpartition("Package: ")[2]
        if name in names and "\nStatus: install ok installed" in paragraph:
            version = re.search(r"^Version: (?:\d+:)?(\S+)$", paragraph, re.MULTILINE)
            if version is not None:
                found[name] = version[1]
    return found


def _pacman(host: Host, names: t.Sequence[str]) -> dict[str, str]:
    found = {}
    for entry in host.listdir(_PACMAN):  # "libvirt-1:11.3.0-1"
        match = re.fullmatch(r"(.+?)-(?:\d+:)?([^-]+-[^-]+)", entry)
        if match is not None and match[1] in names:
            found[match[1]] = match[2]
    return found


def _report(host: Host, names: t.Sequence[str]) -> dict[str, str]:
    found = {}
    for path in _REPORTS:
        for line in (host.read_text(path, _LIMIT) or "").splitlines():
            words = line.split()
            if path == "/installed-rpms":  # "libvirt-daemon-driver-qemu-11.5.0-4.el9.x86_64  Mon 03 Nov 2026 …"
                match = re.fullmatch(r"(.+)-([^-]+-[^-]+)\.\w+", words[0]) if words else None
                pair = (match[1], match[2]) if match is not None else ("", "")
            else:  # "ii  libvirt-daemon  11.3.0-3  amd64 …", or the same without the state
                words = words[1:] if words[:1] == ["ii"] else words
                pair = (words[0].partition(":")[0], re.sub(r"^\d+:", "", words[1])) if len(words) > 1 else ("", "")
            if pair[0] in names:
                found[pair[0]] = pair[1]
    return found


def _rpm(host: Host, names: t.Sequence[str]) -> dict[str, str]:
    """rpm's database since 4.16 is SQLite: an index of names, and a header for each package."""
    path = next(filter(host.exists, _RPM), None)
    if path is None:
        return {}
    try:
        import sqlite3  # not in the smallest Pythons, and needed on few hosts
    except ImportError:
        return {}
    found = {}
    try:
        # Immutable: no lock is taken and no journal made beside a database that may be in use.
        database = sqlite3.connect(f"file:{_quoted(host.path(path))}?mode=ro&immutable=1", uri=True)
        try:
            for name in names:
                rows = database.execute(
                    "SELECT Packages.blob FROM Packages JOIN Name ON Name.hnum = Packages.hnum WHERE Name.key = ?",
                    (name,),
                )
                for (header,) in rows:
                    tags = rpm_strings(header) if isinstance(header, bytes) else {}
                    if _RPM_VERSION in tags:
                        found[name] = "-".join(tags[tag] for tag in (_RPM_VERSION, _RPM_RELEASE) if tag in tags)
        finally:
            database.close()
    except (OSError, ValueError, sqlite3.Error):
        return found
    return found


def _quoted(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def rpm_strings(header: bytes) -> dict[int, str]:
    """The string tags of an rpm header: the counts of entries and of data bytes, the index (tag, type, offset, count;
    16 bytes each), the data. All big-endian."""
    if len(header) < 8:
        return {}
    entries, size = struct.unpack_from(">II", header)
    start = 8 + 16 * entries
    if start + size > len(header):
        return {}
    found = {}
    for index in range(entries):
        tag, kind, offset, _count = struct.unpack_from(">IIII", header, 8 + 16 * index)
        if kind == 6 and offset < size:  # RPM_STRING_TYPE
            found[tag] = header[start + offset : header.find(b"\0", start + offset)].decode("utf-8", "replace")
    return found
