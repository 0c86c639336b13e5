# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the checks of a survey say, for the filters ready and why_not."""

from __future__ import annotations

import typing as t

from ansible.errors import AnsibleFilterError


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
    return [
        " ".join(filter(None, (one.get("detail"), one.get("remedy")))) for one in checks if one["status"] in counted
    ]
