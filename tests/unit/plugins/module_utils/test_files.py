# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import hashlib
import os
import pathlib

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _files
from ansible_collections.iommufd.host.plugins.module_utils._files import FileState, capture, write_atomic


def state(content: bytes, mode: int = 0o640) -> FileState:
    return FileState(content, mode, os.geteuid(), os.getegid())


def test_a_missing_file_is_none(tmp_path: pathlib.Path) -> None:
    assert capture(str(tmp_path / "none")) is None


def test_written_and_captured_are_the_same(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "file")
    write_atomic(path, state(b"one\r\n\xff"))
    assert capture(path) == state(b"one\r\n\xff")
    assert os.listdir(str(tmp_path)) == ["file"]


def test_a_link_stays_a_link(tmp_path: pathlib.Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_atomic(str(tmp_path / "link"), state(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_the_remains_of_a_killed_run_do_not_stand_in_the_way(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".file.iommufd-host.tmp").write_text("half")
    write_atomic(str(tmp_path / "file"), state(b"whole"))
    assert os.listdir(str(tmp_path)) == ["file"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: pathlib.Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/inner").write_text("kept")
    with pytest.raises(OSError):
        write_atomic(str(tmp_path / "directory"), state(b"x"))  # a directory cannot be replaced by a file
    assert os.listdir(str(tmp_path)) == ["directory"]
    assert (tmp_path / "directory/inner").read_text() == "kept"


def test_a_boot_loader_that_passes_over_the_journal_sees_the_old_or_the_new(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def checkpoint(directory: str) -> None:
        seen.append({name.name: name.read_bytes() for name in pathlib.Path(directory).iterdir()})

    monkeypatch.setattr(_files, "checkpoint", checkpoint)
    path = tmp_path / "image"
    for content in (b"old", b"new"):
        write_atomic(str(path), state(content), for_boot_loader=True)
    assert seen == [
        {".image.iommufd-host.tmp": b"old"},
        {"image": b"old"},
        {"image": b"old", ".image.iommufd-host.tmp": b"new"},
        {"image": b"new", ".image.iommufd-host.old": b"old"},
    ]
    assert os.listdir(str(tmp_path)) == ["image"]


def test_a_failure_leaves_no_second_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: str) -> None:
        raise OSError("no")

    (tmp_path / "image").write_text("old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_atomic(str(tmp_path / "image"), state(b"new"), for_boot_loader=True)
    assert os.listdir(str(tmp_path)) == ["image"]


def test_a_file_system_without_checkpoints_does_without(tmp_path: pathlib.Path) -> None:
    _files.checkpoint(str(tmp_path))
    _files.checkpoint(str(tmp_path / "gone"))


def test_what_is_no_regular_file_is_not_taken_for_one(tmp_path: pathlib.Path) -> None:
    """A link to /dev/null, with a pipe in place of the node."""
    os.mkfifo(tmp_path / "node")
    (tmp_path / "masked").symlink_to("node")
    with pytest.raises(OSError, match="is not a regular file"):
        capture(str(tmp_path / "masked"))


def test_the_digest_of_a_file(tmp_path: pathlib.Path) -> None:
    content = b"x" * (3 << 20) + b"y"
    (tmp_path / "file").write_bytes(content)
    assert _files.sha256(str(tmp_path / "file")) == hashlib.sha256(content).hexdigest()
