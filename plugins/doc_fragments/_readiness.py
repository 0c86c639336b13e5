# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This doc fragment is private to the collection iommufd.host and can change at any time.

from __future__ import annotations


class ModuleDocFragment:
    # What the filters about a host's readiness take.
    DOCUMENTATION = r"""
positional: _input
options:
  _input:
    description: What M(iommufd.host.iommufd_info) returned, or its RV(iommufd.host.iommufd_info#module:checks).
    type: raw
    required: true
  warnings:
    description: Whether warnings count as well.
    type: bool
    default: false
"""
