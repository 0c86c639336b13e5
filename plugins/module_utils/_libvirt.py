# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""libvirt on a host: its version, what it can do with iommufd, and the device ACL in force."""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_conf
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._libvirt_acl import DEFAULT_PATH, can_pass, installed_version
from ansible_collections.iommufd.host.plugins.module_utils._package_versions import package_versions

_UNITS = ("virtqemud.service", "virtqemud.socket", "libvirtd.service", "libvirtd.socket")
# The packages with libvirt's QEMU driver where it is not Debian's: Red Hat and SUSE, Arch.
_PACKAGES = ("libvirt-daemon-driver-qemu", "libvirt-daemon", "libvirt")

_PID_FILES = tuple(f"/run/{where}{daemon}.pid" for where in ("", "libvirt/") for daemon in ("virtqemud", "libvirtd"))

_UNIT_DIRECTORIES = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


@dataclasses.dataclass(frozen=True)
class LibvirtFacts:
    """What the survey says about libvirt.

    Attributes:
        version: "11.3.0" (with the distribution's suffix where its database has one).
        can_pass_iommufd: whether it opens /dev/iommu itself and passes the descriptor; None where it is not known.
        capability_source: where that was learnt: "domcapabilities" (libvirt's own word) or "version".
        user, group: whom its guests run as, by qemu.conf; None where it leaves that to the build.
        units: its systemd units that are installed.
        config: path of qemu.conf, where it is there.
        device_acl: the ``cgroup_device_acl`` in force.
        device_acl_source: "qemu.conf", "default" (commented in it), or "built-in"; or what is wrong with the file.
    """

    version: str | None
    can_pass_iommufd: bool | None
    capability_source: str | None
    user: str | None
    group: str | None
    units: list[str]
    config: str | None
    device_acl: list[str] | None
    device_acl_source: str | None

    def to_dict(self) -> dict[str, t.Any]:
        return dataclasses.asdict(self)


def read_libvirt_facts(host: Host) -> LibvirtFacts | None:
    """libvirt as it is installed, or None where it is not."""
    version = installed_version(host) or next(iter(package_versions(host, _PACKAGES).values()), None)
    units = [unit for unit in _UNITS if any(host.exists(f"{where}/{unit}") for where in _UNIT_DIRECTORIES)]
    config = DEFAULT_PATH if host.exists(DEFAULT_PATH) else None
    daemon = host.which("virtqemud") or host.which("libvirtd")
    if version is None and config is None and daemon is None:
        return None
    acl, source = _device_acl(host, version)
    own_word = _asked(host, version)
    able = can_pass(version) if own_word is None else own_word
    told = None if able is None else "version" if own_word is None else "domcapabilities"
    text = host.read_text(DEFAULT_PATH) or ""
    user, group = (_setting(text, name) for name in ("user", "group"))
    return LibvirtFacts(version, able, told, user, group, units, config, acl, source)


def _asked(host: Host, version: str | None) -> bool | None:
    """What a libvirt that runs says of itself; None where it cannot be asked.

    One that is not running is not asked: the question would start it. An older one has no word for it.
    """
    running = any(
        host.is_dir(f"/proc/{number}")
        for number in map(host.read_line, _PID_FILES)
        if number is not None and number.isdigit()
    )
    if not running or can_pass(version) is False:
        return None
    answer = host.ask(["virsh", "--connect", "qemu:///system", "--readonly", "domcapabilities"])
    return parse_capabilities(answer.stdout) if answer is not None and answer.ok else None


def parse_capabilities(text: str) -> bool | None:
    """Whether ``virsh domcapabilities`` offers iommufd for host devices; None where it is no such answer.

    The values are those of the attribute, so "yes" (or "on") has to be among them.
    """
    if "<domainCapabilities" not in text:
        return None
    offered = re.search(r"<enum name=['\"]iommufd['\"]>(.*?)</enum>", text, re.DOTALL)
    return offered is not None and re.search(r"<value>(yes|on)</value>", offered[1]) is not None


def _setting(text: str, name: str) -> str | None:
    """A string in qemu.conf; of a setting defined twice the first counts."""
    found = re.search(rf"^[ \t]*{name}[ \t]*=[ \t]*[\"']([^\"'\n]+)[\"']", text, re.MULTILINE)
    return found[1].lstrip("+") if found is not None else None


def _device_acl(host: Host, version: str | None) -> tuple[list[str] | None, str | None]:
    content = host.read_bytes(DEFAULT_PATH)
    if content is not None:
        try:
            active = _qemu_conf.active_list(content)
            if active is not None:
                return active, "qemu.conf"
            commented = _qemu_conf.commented_default(content)
            if commented is not None:
                return commented, "default"
        except _qemu_conf.SyntaxProblem as problem:
            return None, f"libvirt refuses the file: {problem}"
    return (_qemu_conf.built_in(version), "built-in") if version is not None else (None, None)
