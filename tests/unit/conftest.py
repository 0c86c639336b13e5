# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from ansible_collections.iommufd.host.tests.unit.machine import Machine


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Machine:
    """An empty synthetic host."""
    root = tmp_path / "machine"
    root.mkdir()
    return Machine(root)


def shared_data() -> pathlib.Path:
    """Recordings of real machines, which are no part of this repository; tests that need them skip without."""
    beside = pathlib.Path(__file__).resolve().parents[3] / "shared"
    return pathlib.Path(os.environ.get("IOMMUFD_HOST_SHARED") or beside) / "data"


def _captured(name: str, factory: pytest.TempPathFactory) -> pathlib.Path:
    trees = shared_data() / "host-trees"
    if not (trees / f"{name}.umockdev.xz").exists():
        pytest.skip(f"{name}.umockdev.xz is not there; set IOMMUFD_HOST_SHARED")
    root = factory.mktemp(name)
    converter = [sys.executable, str(trees / "umockdev_to_sysfs.py"), str(trees / f"{name}.umockdev.xz"), str(root)]
    subprocess.run(converter, check=True, stdout=subprocess.DEVNULL)
    return root


@pytest.fixture(scope="session")
def vgpu_node(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A server with two sockets, 226 functions, 106 groups and an NVIDIA A2 with 16 VFs; without /proc."""
    return _captured("vgpu-node", tmp_path_factory)


@pytest.fixture(scope="session")
def iommu_off(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A server with 208 functions and its IOMMU off; without /proc."""
    return _captured("iommu-off", tmp_path_factory)
