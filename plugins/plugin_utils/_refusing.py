# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Our errors as filters raise them, and the survey that several of them take."""

from __future__ import annotations

import contextlib
import typing as t

from ansible.errors import AnsibleFilterError

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError


@contextlib.contextmanager
def refusing(name: str) -> t.Iterator[None]:
    """Turns our errors into a filter's; what they say begins with the filter's name."""
    try:
        yield
    except HostError as error:
        raise AnsibleFilterError(f"{name}: {error.message}") from error


def check_survey(name: str, survey: t.Any) -> dict[str, t.Any]:
    """A survey, as it is.

    Raises:
        AnsibleFilterError: it is none.
    """
    if not isinstance(survey, dict) or not isinstance(survey.get("kernel"), dict) or "checks" not in survey:
        said = f": {survey['msg']}" if isinstance(survey, dict) and survey.get("msg") else ""
        raise AnsibleFilterError(
            f"{name} takes what iommufd.host.iommufd_info returned, not {type(survey).__name__}{said}"
        )
    return survey
