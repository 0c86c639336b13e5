# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the module access_probe does: its options, read, planned, and looked at afterwards."""

from __future__ import annotations

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _libvirt_acl, _probe
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._memlock import parse_size
from ansible_collections.iommufd.host.plugins.module_utils._outcome import Outcome
from ansible_collections.iommufd.host.plugins.module_utils._pci import parse_address
from ansible_collections.iommufd.host.plugins.module_utils._systemd_unit import parse_unit

ARGUMENT_SPEC: dict[str, dict[str, t.Any]] = {
    "mode": {"type": "str", "choices": ["launcher", "group"], "required": True},
    "manager": {"type": "str", "choices": ["libvirt", "systemd", "none"], "required": True},
    "units": {"type": "list", "elements": "str", "default": []},
    "user": {"type": "str"},
    "devices": {"type": "list", "elements": "str"},
    "memory": {"type": "str"},
    "apparmor_profile": {"type": "str"},
    "fail": {"type": "bool", "default": True},
    "timeout": {"type": "int", "default": 60},
}


def find_places(host: Host, params: t.Mapping[str, t.Any]) -> list[_probe.Place]:
    """The places that are asked about.

    Raises:
        OptionError: one that is needed is missing, or names what is not there.
        HostError: libvirt or a unit is not there.
    """
    launcher, user, profile = params["mode"] == "launcher", params["user"], params["apparmor_profile"]
    if params["manager"] == "libvirt":
        libvirt = _libvirt_acl.read_libvirt(host, _libvirt_acl.DEFAULT_PATH)
        return [_probe.libvirt_place(host, libvirt, launcher, user, profile)]
    if params["manager"] == "systemd":
        if not params["units"]:
            raise OptionError("units", params["units"], "at least one service, such as guest@.service")
        units = [parse_unit(f"units[{index}]", name) for index, name in enumerate(params["units"])]
        return [_probe.unit_place(host, unit, launcher, user, profile) for unit in units]
    if not user:
        raise OptionError("user", user, "the user who starts QEMU", "manager: none needs it")
    return [_probe.user_place(host, user, launcher, profile)]


def work(params: t.Mapping[str, t.Any], check_mode: bool) -> Outcome:
    host = Host()
    if not 5 <= params["timeout"] <= 3600:
        raise OptionError("timeout", params["timeout"], "seconds, from 5 to 3600")
    pin = None if params["memory"] is None else parse_size("memory", params["memory"])
    given = params["devices"]
    addresses = None if given is None else [parse_address(f"devices[{index}]", one) for index, one in enumerate(given)]
    targets = _probe.find_targets(host, addresses)
    places = [_probe.probe(host, place, targets, pin, params["timeout"]) for place in find_places(host, params)]
    broken = next(({"place": place["place"], **place["broken"]} for place in places if place["broken"]), None)
    if broken is not None and params["fail"]:
        raise HostError(
            f"{broken['place']}: the link {broken['link']} is broken. {broken['detail']} Remedy: {broken['remedy']}",
            broken=broken,
            places=places,
        )
    return Outcome(None, {"ok": broken is None, "broken": broken, "places": places})
