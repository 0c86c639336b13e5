# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the module kernel_args does: its options, read, planned, and looked at afterwards."""

from __future__ import annotations

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _boot
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._kernel_line import check_arguments
from ansible_collections.iommufd.host.plugins.module_utils._outcome import Outcome
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan

ARGUMENT_SPEC: dict[str, dict[str, t.Any]] = {
    "args": {"type": "list", "elements": "str", "default": []},
    "iommu": {"type": "str", "choices": ["auto", "ignore"], "default": "auto"},
    "passthrough": {"type": "bool", "default": False},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}


def work(params: t.Mapping[str, t.Any], check_mode: bool) -> Outcome:
    host = Host()
    check_arguments("args", params["args"])
    if params["state"] == "absent":
        decided = _boot.decide_absent(host, params["args"])
    else:
        decided = _boot.decide_present(host, params["args"], params["iommu"] == "auto", params["passthrough"])
    return Outcome(
        plan=decided.plan,
        result=_result(decided),
        after=lambda: _verify(host, decided),
        warnings=decided.warnings,
    )


def _result(decided: _boot.Decided) -> dict[str, t.Any]:
    return {
        "args": decided.args,
        "iommu": decided.iommu.to_dict(),
        "cmdline": {"booted": " ".join(decided.booted), "configured": decided.configured},
        "boot_loader": decided.loader.name if decided.loader is not None else None,
        "reboot_required": bool(decided.reasons),
        "reboot_reasons": decided.reasons,
    }


def _verify(host: Host, decided: _boot.Decided) -> dict[str, t.Any]:
    if decided.plan.changed and decided.loader is not None:
        left: Plan = _boot.find_boot_loader(host).plan(decided.args, decided.gone)
        if left.changed:
            raise HostError(
                "The boot entries do not have the arguments they should have; another file of the boot loader's "
                f"configuration probably overrides them. Still to be done: {'; '.join(left.summary())}."
            )
    return {}
