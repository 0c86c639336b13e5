# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Which distribution a host runs, and so by which means things are done there."""

from __future__ import annotations

import dataclasses
import shlex
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host

# By the ids in os-release; the first of ID and ID_LIKE that is listed decides.
_FAMILIES = {
    "debian": "debian",
    "ubuntu": "debian",
    "rhel": "redhat",
    "fedora": "redhat",
    "centos": "redhat",
    "suse": "suse",
    "opensuse": "suse",
    "sles": "suse",
    "arch": "arch",
}


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A distribution, by its os-release.

    Attributes:
        id: "debian", "ubuntu", "fedora", …; None where there is no os-release.
        version_id: "13"; None for a rolling one.
        codename: "trixie".
        name: for people ("Debian GNU/Linux 13 (trixie)").
        family: "debian", "redhat", "suse", "arch" or "other".
    """

    id: str | None = None
    version_id: str | None = None
    codename: str | None = None
    name: str | None = None
    family: str = "other"

    def to_dict(self) -> dict[str, t.Any]:
        return dataclasses.asdict(self)


def read_distribution(host: Host) -> Distribution:
    """The distribution of a host."""
    text = host.read_text("/etc/os-release", 65536) or host.read_text("/usr/lib/os-release", 65536)
    return parse_os_release(text or "")


def parse_os_release(text: str) -> Distribution:
    """The distribution in the format of os-release(5); lines that do not follow it are left out."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not key.startswith("#"):
            try:
                fields[key.strip()] = "".join(shlex.split(value)[:1])
            except ValueError:
                continue
    words = [fields.get("ID", ""), *fields.get("ID_LIKE", "").split()]
    families = (_FAMILIES.get(word.partition("-")[0].lower()) for word in words)
    return Distribution(
        id=fields.get("ID") or None,
        version_id=fields.get("VERSION_ID") or None,
        codename=fields.get("VERSION_CODENAME") or None,
        name=fields.get("PRETTY_NAME") or fields.get("NAME") or None,
        family=next((family for family in families if family is not None), "other"),
    )
