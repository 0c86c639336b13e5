# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""libvirt on a host: its version, what it can do with iommufd, and the device ACL in force."""

from __future__ import annotations

import dataclasses
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_conf
from ansible_collections.iommufd.host.plugins.module_utils._access import DEFAULT_PATH, can_pass, installed_version
from ansible_collections.iommufd.host.plugins.module_utils._host import Host

_UNITS = ("virtqemud.service", "virtqemud.socket", "libvirtd.service", "libvirtd.socket")
_UNIT_DIRECTORIES = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


@dataclasses.dataclass(frozen=True)
class LibvirtFacts:
    """What the survey says about libvirt.

    Attributes:
        version: "11.3.0" (with the distribution's suffix where its database has one).
        can_pass_iommufd: whether it opens /dev/iommu itself and passes the descriptor; None with an unknown version.
        units: its systemd units that are installed.
        config: path of qemu.conf, where it is there.
        device_acl: the ``cgroup_device_acl`` in force.
        device_acl_source: "qemu.conf", "default" (commented in it), or "built-in"; or what is wrong with the file.
    """

    version: str | None
    can_pass_iommufd: bool | None
    units: list[str]
    config: str | None
    device_acl: list[str] | None
    device_acl_source: str | None

    def to_dict(self) -> dict[str, t.Any]:
        return dataclasses.asdict(self)


def read_libvirt_facts(host: Host) -> LibvirtFacts | None:
    """libvirt as it is installed, or None where it is not."""
    version = installed_version(host) or _rpm_version(host)
    units = [unit for unit in _UNITS if any(host.exists(f"{where}/{unit}") for where in _UNIT_DIRECTORIES)]
    config = DEFAULT_PATH if host.exists(DEFAULT_PATH) else None
    daemon = host.which("virtqemud") or host.which("libvirtd")
    if version is None and config is None and daemon is None:
        return None
    acl, source = _device_acl(host, version)
    return LibvirtFacts(version, can_pass(version), units, config, acl, source)


def _rpm_version(host: Host) -> str | None:
    if not host.is_dir("/var/lib/rpm") and not host.is_dir("/usr/lib/sysimage/rpm"):
        return None
    answer = host.ask(["rpm", "-q", "--qf", "%{VERSION}-%{RELEASE}\n", "libvirt-daemon-driver-qemu"])
    return answer.stdout.split("\n")[0].strip() or None if answer is not None and answer.ok else None


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
