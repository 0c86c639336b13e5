# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the module memlock_limits does: its options, read, planned, and looked at afterwards."""

from __future__ import annotations

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _memlock
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._outcome import Outcome
from ansible_collections.iommufd.host.plugins.module_utils._systemd_unit import parse_unit

ARGUMENT_SPEC: dict[str, dict[str, t.Any]] = {
    "guests": {"type": "list", "elements": "raw"},
    "limit": {"type": "str"},
    "libvirt": {"type": "bool", "default": False},
    "units": {"type": "list", "elements": "str", "default": []},
    "users": {"type": "list", "elements": "str", "default": []},
    "restart": {"type": "bool", "default": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}


def parse_amount(params: t.Mapping[str, t.Any]) -> _memlock.Amount:
    """The limit that is asked for.

    Raises:
        OptionError: neither or both of guests and limit, or one that cannot be accepted.
    """
    if bool(params["guests"]) == bool(params["limit"]):
        raise OptionError(
            "guests", params["guests"], "the guests' memory, or limit in its place", "one of them is needed"
        )
    if params["limit"]:
        return _memlock.parse_limit("limit", params["limit"])
    return _memlock.parse_guests("guests", params["guests"])


def parse_units(host: Host, params: t.Mapping[str, t.Any]) -> list[str]:
    """The services that shall have the limit.

    Raises:
        OptionError: not a service.
        HostError: libvirt's daemon is asked for and not installed.
    """
    units = [parse_unit(f"units[{index}]", name) for index, name in enumerate(params["units"])]
    for index, name in enumerate(units):
        if not name.endswith(".service"):
            raise OptionError(f"units[{index}]", name, "a service", "slices and scopes start no process of their own")
    if params["libvirt"]:
        daemons = _memlock.installed_daemons(host)
        if not daemons:
            raise HostError("libvirt: neither virtqemud.service nor libvirtd.service is installed on this host.")
        units += [name for name in daemons if name not in units]
    return units


def work(params: t.Mapping[str, t.Any], check_mode: bool) -> Outcome:
    host = Host()
    amount = None
    units: list[str] = []
    users: list[str] = []
    if params["state"] == "present":
        amount = parse_amount(params)
        units = parse_units(host, params)
        users = [_memlock.parse_user(f"users[{index}]", name) for index, name in enumerate(params["users"])]
        if not units and not users:
            raise OptionError(
                "units", [], "at least one of units, users, libvirt: true, or state: absent", "nothing to do"
            )
    state = _memlock.read_state(host, units)
    plan = _memlock.plan(state, amount, units, users, params["restart"], host)

    def known(limit: int | None) -> int | None:
        return None if limit == -1 else limit

    def result(services: t.Iterable[_memlock.Service]) -> dict[str, t.Any]:
        rows = []
        for service in services:
            lacks = amount is not None and not _memlock.enough(service.live, amount.size)
            rows.append(
                {
                    "unit": service.state.unit,
                    "drop_in": service.state.path if service.state.content is not None else None,
                    "limit": known(_memlock.shown_limit(service.state.shown.get("LimitMEMLOCK"))),
                    "live": known(service.live),
                    "restart_required": service.process is not None and service.state.unit in units and lacks,
                }
            )
        found: dict[str, t.Any] = {"services": rows, "users": users}
        return found if amount is None else {**found, "limit": amount.size, "reason": amount.reason}

    def after() -> dict[str, t.Any]:
        return result(_memlock.read_service(host, name) for name in state.services)

    return Outcome(plan, result(state.services.values()), after)
