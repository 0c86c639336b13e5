# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the module udev_access does: its options, read, planned, and looked at afterwards."""

from __future__ import annotations

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _udev
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._nodes import Accounts
from ansible_collections.iommufd.host.plugins.module_utils._outcome import Outcome

ARGUMENT_SPEC: dict[str, dict[str, t.Any]] = {
    "nodes": {"type": "list", "elements": "raw", "default": ["iommu", "cdevs"]},
    "owner": {"type": "str", "default": "root"},
    "group": {"type": "str", "default": "kvm"},
    "mode": {"type": "raw", "default": "0660"},
    "acl_users": {"type": "list", "elements": "str", "default": []},
    "acl_groups": {"type": "list", "elements": "str", "default": []},
    "allow_world": {"type": "bool", "default": False},
    "symlinks": {"type": "bool", "default": True},
    "path": {"type": "path", "default": _udev.DEFAULT_PATH},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}


_SETTINGS = ("owner", "group", "mode", "acl_users", "acl_groups")


def parse_nodes(host: Host, params: t.Mapping[str, t.Any]) -> dict[str, _udev.Access]:
    """The wanted access by kind of node.

    Raises:
        OptionError: an entry, an owner, a group or a mode that cannot be accepted.
    """
    accounts = Accounts(host)
    accepted = f"one of {', '.join(_udev.KINDS)}, or a dictionary with name and any of {', '.join(_SETTINGS)}"
    _udev.parse_mode("mode", params["mode"], params["allow_world"])
    wanted: dict[str, _udev.Access] = {}
    for index, entry in enumerate(params["nodes"]):
        option = f"nodes[{index}]"
        settings = dict(entry) if isinstance(entry, dict) else {"name": entry}
        name = settings.pop("name", None)
        unknown = set(settings) - set(_SETTINGS)
        if not isinstance(name, str) or name not in _udev.KINDS or unknown:
            raise OptionError(option, entry, accepted)
        if name in wanted:
            raise OptionError(option, entry, "each name once")
        given = {key: value for key, value in settings.items() if value is not None}
        mode_option = f"{option}.mode" if "mode" in given else "mode"
        mode = _udev.parse_mode(mode_option, given.get("mode", params["mode"]), params["allow_world"])
        owner, group = (given.get(key, params[key]) for key in ("owner", "group"))
        prefix = f"{option}." if set(given) - {"mode"} else ""
        acl = {key: parse_names(f"{prefix}{key}", given.get(key, params[key])) for key in ("acl_users", "acl_groups")}
        wanted[name] = _udev.resolve_access(accounts, prefix, str(owner), str(group), mode, **acl)
    return wanted


def parse_names(option: str, value: object) -> list[str]:
    """A list of names.

    Raises:
        OptionError: something else.
    """
    if not isinstance(value, list) or not all(isinstance(name, (str, int)) for name in value):
        raise OptionError(option, value, "a list of names")
    return [str(name) for name in value]


def parse_path(value: str) -> str:
    """The rules file's path.

    Raises:
        OptionError: udev would not read it.
    """
    directory, _slash, name = value.rpartition("/")
    directories = ("/etc/udev/rules.d", "/run/udev/rules.d", "/usr/local/lib/udev/rules.d", "/usr/lib/udev/rules.d")
    if directory not in directories or not name.endswith(".rules") or name.startswith("."):
        raise OptionError("path", value, "a file that ends in .rules in " + ", ".join(directories))
    return value


def work(params: t.Mapping[str, t.Any], check_mode: bool) -> Outcome:
    host = Host()
    path = parse_path(params["path"])
    present = params["state"] == "present"
    wanted: dict[str, _udev.Access] = {}
    if present:
        wanted = parse_nodes(host, params)
        if not wanted and not params["symlinks"]:
            raise OptionError("nodes", [], "at least one node, or symlinks: true, or state: absent", "nothing to do")
    state = _udev.read_state(host, path)
    if host.which("udevadm") is None:
        if present or state.content is not None:
            raise HostError("udevadm is not installed: this host does not use systemd-udevd.")
        plan = None
    elif present:
        plan = _udev.plan_present(state, wanted, params["symlinks"], host)
        if plan.changed:
            _udev.check_syntax(host, _udev.rules_text(wanted, params["symlinks"]))
    else:
        plan = _udev.plan_absent(state, host)

    def result(now: _udev.State) -> dict[str, t.Any]:
        kinds = {node.kind for node in now.nodes}
        return {
            "file": path,
            "nodes": [node.to_dict() for node in now.nodes],
            "waiting": [kind for kind in wanted if kind not in kinds],
        }

    def after() -> dict[str, t.Any]:
        return result(_udev.read_state(host, path))

    return Outcome(plan, result(state), after)
