# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""That what is documented about selectors is what is understood."""

from __future__ import annotations

import pathlib
import re
import typing as t

import yaml

from ansible_collections.iommufd.host.plugins.module_utils import _selectors
from ansible_collections.iommufd.host.plugins.modules import guest_verify, vfio_bind
from ansible_collections.iommufd.host.plugins.plugin_utils._query import compile_query

CHECKOUT = pathlib.Path(__file__).parents[4]


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


def test_the_lists_in_the_texts_for_people_are_understood() -> None:
    for path in ("README.md", "roles/devices/README.md"):
        blocks = re.findall(r"```yaml\n(.*?)```", (CHECKOUT / path).read_text(), re.DOTALL)
        lists = [found for block in blocks for found in _lists(yaml.safe_load(block))]
        assert lists, path
        for one in lists:
            understood(one)


def _lists(node: t.Any) -> t.Iterator[t.Any]:
    """Every devices_list in a piece of YAML."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key == "devices_list":
            yield value
        else:
            yield from _lists(value)
