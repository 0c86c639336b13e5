# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
import pathlib
import stat
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _plan
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._files import FileState, write_atomic
from ansible_collections.iommufd.host.plugins.module_utils._plan import (
    Action,
    Command,
    Plan,
    RemoveFile,
    Step,
    WriteAttribute,
    WriteFile,
    run,
    wait_until,
)


def failing(message: str = "no luck") -> Step:
    def fail() -> None:
        raise HostError(message, log="its log")

    return Action("fail", do=fail)


def content(root: pathlib.Path) -> dict[str, t.Any]:
    """Every file below a directory with content and mode, and every directory."""
    return {
        str(path.relative_to(root)): (path.read_bytes() if path.is_file() else None, path.stat().st_mode)
        for path in sorted(root.rglob("*"))
    }


def test_an_empty_plan_changes_nothing() -> None:
    plan = Plan()
    plan.apply()
    assert (plan.changed, plan.summary(), plan.diff()) == (False, [], [])


def test_steps_are_done_in_order_and_shown() -> None:
    done: list[str] = []
    plan = Plan()
    plan.add(
        Action("do one", subject="thing", before="old", after="new", do=lambda: done.append("one")),
        Action("do two", do=lambda: done.append("two")),
    )
    assert done == []
    assert plan.summary() == ["do one", "do two"]
    assert plan.diff() == [{"before_header": "thing", "after_header": "thing", "before": "old\n", "after": "new\n"}]
    plan.apply()
    assert done == ["one", "two"]


def test_a_failure_takes_back_in_reverse_order_and_says_so() -> None:
    undone: list[str] = []
    plan = Plan(
        [
            Action("do one", take_back=lambda: undone.append("one")),
            Action("do two", take_back=lambda: undone.append("two")),
            failing(),
        ]
    )
    with pytest.raises(HostError) as caught:
        plan.apply()
    assert undone == ["two", "one"]
    assert caught.value.message == "Could not fail: no luck. Everything was put back as it was."
    assert caught.value.details["failed_step"] == "fail"
    assert caught.value.details["undone"] == ["fail", "do two", "do one"]
    assert caught.value.details["log"] == "its log"


def test_what_cannot_be_taken_back_is_named_and_the_rest_is_taken_back() -> None:
    undone: list[str] = []

    def stuck() -> None:
        raise OSError(16, os.strerror(16), "/sys/x")

    plan = Plan(
        [Action("do one", take_back=lambda: undone.append("one")), Action("do two", take_back=stuck), failing()]
    )
    with pytest.raises(HostError) as caught:
        plan.apply()
    assert undone == ["one"]
    assert caught.value.details["not_undone"] == ["do two: /sys/x: Device or resource busy"]
    assert "Not everything could be taken back" in caught.value.message


def test_files_are_as_before_after_a_failure(tmp_path: pathlib.Path) -> None:
    (tmp_path / "kept").write_text("old")
    (tmp_path / "kept").chmod(0o600)
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/gone").write_text("bytes\r\n")
    before = content(tmp_path)
    plan = Plan(
        [
            WriteFile("change kept", path=str(tmp_path / "kept"), content=b"new"),
            WriteFile("write new", path=str(tmp_path / "a/b/new"), content=b"new"),
            RemoveFile("remove gone", path=str(tmp_path / "dir/gone"), prune=[str(tmp_path / "dir")]),
            failing(),
        ]
    )
    with pytest.raises(HostError):
        plan.apply()
    assert content(tmp_path) == before


def test_files_are_written_and_removed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "kept").write_text("old")
    (tmp_path / "kept").chmod(0o600)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/other").touch()
    (tmp_path / "full/gone").touch()
    Plan(
        [
            WriteFile("change kept", path=str(tmp_path / "kept"), content=b"new", mode=0o644),
            WriteFile("write new", path=str(tmp_path / "a/new"), content=b"x", mode=0o755),
            RemoveFile("remove gone", path=str(tmp_path / "full/gone"), prune=[str(tmp_path / "full")]),
        ]
    ).apply()
    assert ((tmp_path / "kept").read_text(), (tmp_path / "kept").stat().st_mode & 0o777) == ("new", 0o600)
    assert (tmp_path / "a/new").stat().st_mode & 0o777 == 0o755
    assert os.listdir(str(tmp_path / "full")) == ["other"]


def test_an_attribute_is_written_and_written_back(tmp_path: pathlib.Path) -> None:
    attribute = tmp_path / "driver_override"
    attribute.write_text("(null)\n")
    step = WriteAttribute("override", path=str(attribute), value="vfio-pci", undo_value="\n")
    step.apply()
    assert attribute.read_text().startswith("vfio-pci")
    step.undo()
    assert attribute.read_text().startswith("\n")


def test_a_command_that_fails_is_quoted() -> None:
    with pytest.raises(HostError) as caught:
        Plan([Command("run it", argv=["sh", "-c", "echo one; echo two >&2; exit 4"])]).apply()
    assert "ended with status 4: two" in caught.value.message


def test_a_command_that_hangs_is_killed() -> None:
    with pytest.raises(HostError, match="did not end within"):
        run(["sleep", "20"], timeout=0.2)


def test_a_command_that_is_missing_is_named() -> None:
    with pytest.raises(HostError, match="no-such-command is not installed"):
        run(["no-such-command"])


def test_wait_until_gives_up() -> None:
    asked: list[int] = []

    def third_time() -> bool:
        asked.append(1)
        return len(asked) == 3

    assert wait_until(third_time, timeout=5, interval=0.001)
    assert not wait_until(lambda: False, timeout=0.01, interval=0.001)


def test_a_file_that_could_not_be_written_is_not_put_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(target: str, state: object, for_boot_loader: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", target)

    monkeypatch.setattr(_plan, "write_atomic", full)
    with pytest.raises(HostError, match=r"No space left on device\. Everything was put back as it was"):
        _plan.Plan([_plan.WriteFile("write", path=str(path), content=b"new")]).apply()
    assert path.read_text() == "old"


def test_a_node_behind_a_link_stays(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "node")
    (tmp_path / "masked").symlink_to("node")
    with pytest.raises(HostError, match=r"masked: is not a regular file\. Everything was put back"):
        Plan([WriteFile("write", path=str(tmp_path / "masked"), content=b"new")]).apply()
    assert stat.S_ISFIFO(os.stat(tmp_path / "node").st_mode)


@pytest.mark.parametrize("old", ["old", None])
def test_a_signal_right_behind_the_replacement_is_taken_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, old: str | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old)
    before = content(tmp_path)

    def interrupted(target: str, state: FileState, for_boot_loader: bool = False) -> None:
        monkeypatch.undo()
        write_atomic(target, state, for_boot_loader)
        raise KeyboardInterrupt

    monkeypatch.setattr(_plan, "write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Plan([WriteFile("write", path=str(path), content=b"new")]).apply()
    assert content(tmp_path) == before


def test_a_command_is_taken_back_once(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thing").touch()
    step = Command("make", argv=["true"], undo_argv=["rm", str(tmp_path / "thing")])
    step.apply()
    step.undo()
    step.undo()
