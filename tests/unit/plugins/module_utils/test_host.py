# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._host import Host


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hostname").write_text("captured\n")
    return tmp_path


def test_reads_beneath_its_root(tree: pathlib.Path) -> None:
    assert Host(str(tree)).read_line("/etc/hostname") == "captured"


def test_what_is_missing_is_none_or_empty(tree: pathlib.Path) -> None:
    host = Host(str(tree))
    assert host.read_bytes("/etc/none") is None
    assert host.read_int("/etc/none") is None
    assert host.listdir("/none") == []
    assert host.readlink("/etc/none") is None
    assert host.stat("/etc/none") is None
    assert host.realpath("/etc/none") is None
    assert host.which("none") is None


def test_absolute_links_stay_inside_the_root(tree: pathlib.Path) -> None:
    (tree / "usr").mkdir()
    (tree / "usr/real").write_text("inside")
    (tree / "etc/link").symlink_to("/usr/real")
    (tree / "etc/dir").symlink_to("/usr")
    host = Host(str(tree))
    assert host.read_text("/etc/link") == "inside"
    assert host.read_text("/etc/dir/real") == "inside"
    assert host.realpath("/etc/dir/real") == "/usr/real"


def test_parent_links_do_not_leave_the_root(tree: pathlib.Path) -> None:
    (tree.parent / "secret").write_text("outside")
    (tree / "etc/up").symlink_to("../../../secret")
    assert Host(str(tree)).read_text("/etc/up") is None
    (tree / "secret").write_text("inside")
    assert Host(str(tree)).read_text("/etc/up") == "inside"


def test_a_loop_of_links_is_nothing(tree: pathlib.Path) -> None:
    (tree / "etc/a").symlink_to("b")
    (tree / "etc/b").symlink_to("a")
    assert Host(str(tree)).read_text("/etc/a") is None


@pytest.mark.parametrize(
    ("content", "base", "expected"),
    [("17\n", 10, 17), ("0x10\n", 0, 16), ("-1\n", 10, -1), ("x\n", 10, None), ("", 10, None), ("\x00\xff", 10, None)],
)
def test_read_int(tree: pathlib.Path, content: str, base: int, expected: int | None) -> None:
    (tree / "etc/number").write_bytes(content.encode("latin-1"))
    assert Host(str(tree)).read_int("/etc/number", base) == expected


def test_binary_content_is_replaced_not_raised(tree: pathlib.Path) -> None:
    (tree / "etc/bin").write_bytes(b"a\xff\xfeb")
    assert Host(str(tree)).read_text("/etc/bin") == "a\ufffd\ufffdb"


def test_huge_content_is_cut(tree: pathlib.Path) -> None:
    (tree / "etc/huge").write_bytes(b"x" * 5000)
    content = Host(str(tree)).read_bytes("/etc/huge", limit=1000)
    assert content == b"x" * 1000


def test_a_fifo_is_not_waited_for(tree: pathlib.Path) -> None:
    os.mkfifo(str(tree / "etc/fifo"))
    assert Host(str(tree)).read_bytes("/etc/fifo") is None


def test_a_captured_tree_is_never_asked(tree: pathlib.Path) -> None:
    assert Host(str(tree)).ask(["true"]) is None


def test_the_live_host_is_asked_with_a_time_limit() -> None:
    host = Host("/")
    said = host.ask(["sh", "-c", "cat; echo err >&2; exit 3"], stdin="in")
    assert said is not None
    assert (said.status, said.stdout, said.stderr, said.ok) == (3, "in", "err\n", False)
    assert host.ask(["sleep", "10"], timeout=0.1) is None
    assert host.ask(["no-such-command"]) is None
