# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import io
import pathlib
import random
import shutil
import subprocess
import tarfile

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._tarball import NotSeekable, SortedTarball

TOP = "linux-source-6.12"


def make(directory: pathlib.Path, names: list[str], block: str = "64KiB", ordered: bool = True) -> dict[str, bytes]:
    """An archive t.tar.xz with files of random sizes; returns their contents below the top directory."""
    if shutil.which("xz") is None:
        pytest.skip("xz is not installed")
    chance = random.Random(7)
    contents = {name: chance.randbytes(chance.randint(0, 40_000)) for name in names}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        entries = sorted({TOP, *(f"{TOP}/{name}" for name in names), *_parents(names)})
        if not ordered:
            entries = [TOP, *reversed(entries[1:])]
        for entry in entries:
            content = contents.get(entry[len(TOP) + 1 :])
            info = tarfile.TarInfo(entry)
            if content is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    (directory / "t.tar").write_bytes(buffer.getvalue())
    subprocess.run(["xz", "-0", f"--block-size={block}", str(directory / "t.tar")], check=True)
    return contents


def _parents(names: list[str]) -> set[str]:
    # Of which Python 3.9 gives no slice.
    return {f"{TOP}/{parent}" for name in names for parent in list(pathlib.PurePosixPath(name).parents)[:-1]}


NAMES = [
    "Makefile",
    *(f"Documentation/{number:03}.rst" for number in range(60)),
    "drivers/vfio/Makefile",
    "drivers/vfio/pci/vfio_pci.c",
    "drivers/vfio/vfio.h",
    "drivers/vfio-other/x.c",
    "drivers/vfio.c",
    *(f"drivers/zz/{'long' * 40}/{number:03}.c" for number in range(20)),
    "lib/interval_tree.c",
    *(f"net/{number:03}.c" for number in range(60)),
]


def test_takes_exactly_what_is_wanted(tmp_path: pathlib.Path) -> None:
    contents = make(tmp_path, NAMES)
    wanted = ["Makefile", "drivers/vfio", "lib/interval_tree.c", "drivers/zz"]
    found = SortedTarball(str(tmp_path / "t.tar.xz")).extract(wanted)
    expected = {
        name: content
        for name, content in contents.items()
        if name in wanted or name.startswith(("drivers/vfio/", "drivers/zz/"))
    }
    assert found == expected


@pytest.mark.parametrize("name", NAMES[:: len(NAMES) // 12])
def test_finds_a_file_wherever_it_is(tmp_path: pathlib.Path, name: str) -> None:
    contents = make(tmp_path, NAMES)
    assert SortedTarball(str(tmp_path / "t.tar.xz")).extract([name]) == {name: contents[name]}


def test_a_member_that_leads_out_of_it_is_left_to_tar_which_refuses_it(tmp_path: pathlib.Path) -> None:
    make(tmp_path, [*NAMES, "drivers/vfio/../../../x"])
    with pytest.raises(NotSeekable, match=r"\.\./x leads out of it"):
        SortedTarball(str(tmp_path / "t.tar.xz")).extract(["drivers/vfio"])


def test_what_is_missing_is_said(tmp_path: pathlib.Path) -> None:
    make(tmp_path, NAMES)
    with pytest.raises(NotSeekable, match="drivers/iommu"):
        SortedTarball(str(tmp_path / "t.tar.xz")).extract(["drivers/iommu"])


def test_an_archive_in_another_order_is_not_guessed_at(tmp_path: pathlib.Path) -> None:
    contents = make(tmp_path, NAMES, ordered=False)
    try:
        found = SortedTarball(str(tmp_path / "t.tar.xz")).extract(["drivers/vfio"])
    except NotSeekable:
        return
    assert {name: contents[name] for name in found} == found


def test_one_block_is_left_to_tar(tmp_path: pathlib.Path) -> None:
    make(tmp_path, NAMES[:3], block="100MiB")
    with pytest.raises(NotSeekable):
        SortedTarball(str(tmp_path / "t.tar.xz"))


@pytest.mark.parametrize("content", [b"", b"\xfd7zXZ\x00", b"PK" * 100, b"\xfd7zXZ\x00" + b"\0" * 100])
def test_what_is_no_xz_file_is_left_to_tar(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "t.tar.xz").write_bytes(content)
    with pytest.raises(NotSeekable):
        SortedTarball(str(tmp_path / "t.tar.xz"))


def test_a_cut_archive_is_not_read(tmp_path: pathlib.Path) -> None:
    make(tmp_path, NAMES)
    path = tmp_path / "t.tar.xz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(NotSeekable):
        SortedTarball(str(path))
