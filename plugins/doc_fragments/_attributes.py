# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This doc fragment is private to the collection iommufd.host and can change at any time.

from __future__ import annotations


class ModuleDocFragment:
    # Attributes that every module documents.
    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and return changed status prediction without modifying the host.
  diff_mode:
    description: Will return details on what has changed (or needs changing in C(check_mode)), when in diff mode.
  idempotent:
    description:
      - When run twice in a row outside check mode, with the same arguments, the second invocation indicates no change.
      - This assumes that the host has not changed in between.
  platform:
    description: Platform the module runs on.
"""

    # A member of the action group, so that O(module_defaults) reach it.
    ACTIONGROUP = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/iommufd.host.host) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - iommufd.host.host
"""

    # A module that changes a host.
    CHANGES = r"""
options: {}
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
  platform:
    platforms: linux
    support: full
"""

    # A module that only reads.
    READS = r"""
options: {}
attributes:
  check_mode:
    support: full
  diff_mode:
    support: N/A
    details:
      - This module does not change anything.
  idempotent:
    support: full
    details:
      - This module does not change anything.
  platform:
    platforms: linux
    support: full
"""

    # A module whose devices are selectors.
    SELECTING = r"""
options: {}
attributes:
  action:
    description: A part of this module runs on the controller.
    support: full
    details:
      - Only for a selector with C(query), which the controller evaluates after one survey of the host.
"""

    # A module that is its action plugin: it reports on the hosts of a play, and runs on none.
    REPORTS = r"""
options: {}
attributes:
  action:
    description: Indicates this has a corresponding action plugin, so that it can be executed on the controller.
    support: full
  check_mode:
    support: full
  idempotent:
    support: full
  platform:
    platforms: posix
    support: full
"""
