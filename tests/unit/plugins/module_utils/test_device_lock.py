# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A FIFO without a writer stands for an attribute whose device's lock is held: whoever opens it waits."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ansible_collections.iommufd.host.plugins.module_utils._device_lock import held


def test_what_can_be_read_is_not_held(tmp_path: Path) -> None:
    paths = []
    for number in range(100):
        (tmp_path / str(number)).write_text("(null)\n")
        paths.append(str(tmp_path / str(number)))
    start = time.monotonic()
    assert held(paths, 5.0) == set()
    assert time.monotonic() - start < 4.0


def test_those_that_block_are_found_among_the_others(tmp_path: Path) -> None:
    names = ["a", "stuck1", "b", "stuck2", "stuck3", "c"]
    for name in names:
        if name.startswith("stuck"):
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).write_text("vfio-pci\n")
    found = held([str(tmp_path / name) for name in names], 0.3)
    assert found == {str(tmp_path / name) for name in ("stuck1", "stuck2", "stuck3")}


def test_what_is_gone_is_not_held(tmp_path: Path) -> None:
    assert held([str(tmp_path / "unplugged"), str(tmp_path)], 1.0) == set()


def test_nothing_to_look_at(tmp_path: Path) -> None:
    assert held([], 1.0) == set()
