# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from ansible_collections.iommufd.host.plugins.plugin_utils._selecting import SelectingAction


class ActionModule(SelectingAction):
    options = ("devices", "hot_plug")
