# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: ready
author:
  - The iommufd.host authors (@iommufd)
version_added: 0.2.0
short_description: Whether a surveyed host is ready for guests with devices over iommufd
description:
  - V(true) when no check of the survey failed, and each of those was made without which nothing is shown,
    V(iommu.enabled), V(kernel.iommufd), V(kernel.cdev), V(node.iommu) and V(qemu.iommufd). Only the QEMU of a live
    host can be asked, so a captured tree is never ready.
extends_documentation_fragment:
  - iommufd.host._readiness
seealso:
  - plugin: iommufd.host.why_not
    plugin_type: filter
  - module: iommufd.host.iommufd_info
"""

EXAMPLES = r"""
- name: Survey this host
  iommufd.host.iommufd_info:
  register: survey

- name: Stop where guests could not use iommufd
  ansible.builtin.assert:
    that: survey | iommufd.host.ready
    fail_msg: "{{ survey | iommufd.host.why_not | join('\n') }}"
"""

RETURN = r"""
_value:
  description: Whether the host is ready.
  type: bool
"""

import typing as t

from ansible_collections.iommufd.host.plugins.plugin_utils._readiness import obstacles


def ready(survey: t.Any, warnings: bool = False) -> bool:
    """Whether nothing is in the way, see DOCUMENTATION."""
    return not obstacles("ready", survey, warnings)


class FilterModule:
    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"ready": ready}
