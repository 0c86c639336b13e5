# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the module apparmor_access does: its options, read, planned, and looked at afterwards."""

from __future__ import annotations

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _apparmor
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._outcome import Outcome

ARGUMENT_SPEC: dict[str, dict[str, t.Any]] = {
    "nodes": {"type": "list", "elements": "str", "choices": list(_apparmor.RULES), "default": ["iommu", "cdevs"]},
    "if_missing": {"type": "str", "choices": ["fail", "skip"], "default": "fail"},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}


def work(params: t.Mapping[str, t.Any], check_mode: bool) -> Outcome:
    host = Host()
    present = params["state"] == "present"
    if present and not params["nodes"]:
        raise OptionError("nodes", [], "at least one of iommu, cdevs, groups, or state: absent")
    state = _apparmor.read_state(host)
    skipped = ""
    if present and not state.in_use:
        skipped = (
            "AppArmor is not in use on this host."
            if state.enabled is False
            else f"{_apparmor.ABSTRACTION} does not exist: libvirt's QEMU driver is not installed."
        )
        if params["if_missing"] == "fail":
            raise HostError(f"{skipped} if_missing: skip accepts that.")
    add = present and not skipped
    plan = _apparmor.plan_present(state, params["nodes"], host) if add else _apparmor.plan_absent(state)
    result: dict[str, t.Any] = {
        "file": state.path if add else None,
        "rules": _apparmor.rules_of(params["nodes"]) if add else [],
    }
    if plan.changed:
        result["guests_before"] = list(state.guests)
    if skipped:
        result["skipped_reason"] = skipped
    return Outcome(plan, result)
