# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: why_not
author:
  - The iommufd.host authors (@iommufd)
version_added: 0.2.0
short_description: What keeps a surveyed host from being ready, with the remedies
description:
  - Lists what each failed check of the survey found and what to do about it, in the order in which one would mend it.
  - Empty for a host that is ready in the sense of P(iommufd.host.ready#filter).
extends_documentation_fragment:
  - iommufd.host._readiness
seealso:
  - plugin: iommufd.host.ready
    plugin_type: filter
  - module: iommufd.host.iommufd_info
"""

EXAMPLES = r"""
- name: Survey this host
  iommufd.host.iommufd_info:
  register: survey

- name: Show what is in the way, and what is not as good as it could be
  ansible.builtin.debug:
    msg: "{{ survey | iommufd.host.why_not(warnings=true) }}"
"""

RETURN = r"""
_value:
  description: One text for each failed check, what was found and its remedy.
  type: list
  elements: str
  sample:
    - >-
      /dev/iommu is not there: the module iommufd makes it, and nothing has loaded that. Run `modprobe iommufd`, and
      write `iommufd` to /etc/modules-load.d/iommufd.conf for the next boot.
"""

import typing as t

from ansible_collections.iommufd.host.plugins.plugin_utils._readiness import obstacles


def why_not(survey: t.Any, warnings: bool = False) -> list[str]:
    """What is in the way, see DOCUMENTATION."""
    return obstacles("why_not", survey, warnings)


class FilterModule:
    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"why_not": why_not}
