# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pathlib
import sys
import typing as t

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import fleet
from browser import Browser

from ansible_collections.iommufd.host.tests.unit.conftest import iommu_off, vgpu_node

__all__ = ["iommu_off", "vgpu_node"]  # fixtures: servers that were recorded


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, t.Any]:
    """The survey of one server of each kind."""
    return fleet.servers(tmp_path_factory.mktemp("servers"))


@pytest.fixture(scope="session")
def browser() -> t.Iterator[Browser]:
    with Browser() as one:
        yield one
