# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the module iommufd_dkms does: its options, read, planned, and looked at afterwards."""

from __future__ import annotations

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _dkms
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._outcome import Outcome

ARGUMENT_SPEC: dict[str, dict[str, t.Any]] = {
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "install_packages": {"type": "bool", "default": True},
    "source": {"type": "path"},
}


def work(params: t.Mapping[str, t.Any], check_mode: bool) -> Outcome:
    host = Host()
    present = params["state"] == "present"
    if present:
        wanted = _dkms.Wanted(params["install_packages"], params["source"], check_mode)
        planned = _dkms.plan_present(host, wanted)
    else:
        planned = _dkms.plan_absent(host)
    return Outcome(
        plan=planned.plan,
        result=_result(host, planned),
        after=lambda: _verify(host, planned, present),
        warnings=planned.warnings,
    )


def _result(host: Host, planned: _dkms.Planned) -> dict[str, t.Any]:
    running = next((kernel for kernel in planned.kernels if kernel.running), None)
    secure_boot = _dkms.read_secure_boot(host)
    return {
        "needed": running is not None and running.ours,
        "reason": running.reason if running is not None else "the running kernel has no modules installed",
        "kernels": [kernel.to_dict() for kernel in planned.kernels],
        "source": planned.source,
        "packages_installed": planned.installs,
        "packages_purged": planned.purges,
        "packages_kept": planned.kept,
        "secure_boot": {
            "enabled": secure_boot.enabled,
            "certificate": secure_boot.certificate,
            "enrolled": secure_boot.enrolled,
        },
        "reboot_required": bool(planned.reboot_reasons),
        "reboot_reasons": planned.reboot_reasons,
    }


def _verify(host: Host, planned: _dkms.Planned, present: bool) -> dict[str, t.Any]:
    if planned.plan.changed:
        _dkms.look_again(host, planned)
    for kernel in planned.kernels:
        if present and kernel.state in ("missing", "partial") and (kernel.running or kernel.newest):
            raise HostError(f"Kernel {kernel.release} still has no iommufd: {kernel.reason}.")
        if not present and kernel.state in ("dkms", "partial"):
            raise HostError(f"Kernel {kernel.release} still has modules of ours: {kernel.reason}.")
    return _result(host, planned)
