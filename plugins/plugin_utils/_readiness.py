# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whether a host is ready by the checks of its survey, and what is in the way."""

from __future__ import annotations

import typing as t

from ansible.errors import AnsibleFilterError

# The links of the chain without which no guest has a device over iommufd. A host on which one of them could not be
# looked at (a captured tree without /boot and /dev, say) has not been shown to be ready.
ESSENTIAL = ("iommu.enabled", "kernel.iommufd", "kernel.cdev", "node.iommu", "qemu.iommufd")


def untold(checks: t.Iterable[t.Mapping[str, t.Any]]) -> list[str]:
    """The ids of the essential checks that could not be made, in the order in which one would mend them."""
    told = {check.get("id") for check in checks if check["status"] != "skip"}
    return [name for name in ESSENTIAL if name not in told]


def obstacles(name: str, survey: t.Any, warnings: bool = False) -> list[str]:
    """What keeps a host from being ready, a sentence or more each; empty when it is.

    Args:
        name: the filter's name, for messages.
        survey: the result of iommufd_info, or its checks.
        warnings: whether warnings count as well.

    Raises:
        AnsibleFilterError: it is neither.
    """
    checks = survey.get("checks") if isinstance(survey, dict) else survey
    if not isinstance(checks, list) or not all(isinstance(one, dict) and "status" in one for one in checks):
        said = f": {survey['msg']}" if isinstance(survey, dict) and survey.get("msg") else ""
        raise AnsibleFilterError(
            f"{name} takes what iommufd.host.iommufd_info returned, or its checks, not {type(survey).__name__}{said}"
        )
    if all(one["status"] == "skip" for one in checks):
        return ["Nothing is known about this host: none of the checks could be made."]
    counted = ("fail", "warn") if warnings else ("fail",)
    found = [
        " ".join(filter(None, (one.get("detail"), one.get("remedy")))) for one in checks if one["status"] in counted
    ]
    return found + [f"{name} could not be told." for name in untold(checks)]
