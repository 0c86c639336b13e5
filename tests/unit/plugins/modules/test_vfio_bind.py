# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""That what is documented about selectors is what is understood."""

from __future__ import annotations

import typing as t

import yaml

from ansible_collections.iommufd.host.plugins.module_utils import _selectors
from ansible_collections.iommufd.host.plugins.modules import guest_verify, vfio_bind
from ansible_collections.iommufd.host.plugins.plugin_utils._query import compile_query


def understood(devices: t.Any) -> None:
    assert devices
    _selectors.parse_selectors("devices", devices, compile_query)


def test_every_key_and_every_class_is_documented() -> None:
    keys = yaml.safe_load(vfio_bind.DOCUMENTATION)["options"]["devices"]["suboptions"]
    assert set(keys) == set(_selectors._KEYS)
    assert keys["class"]["choices"] == list(_selectors.CLASSES)


def test_the_examples_are_understood() -> None:
    for module, name in ((vfio_bind, "vfio_bind"), (guest_verify, "guest_verify")):
        for task in yaml.safe_load(module.EXAMPLES):
            if f"iommufd.host.{name}" in task:
                understood(task[f"iommufd.host.{name}"]["devices"])
