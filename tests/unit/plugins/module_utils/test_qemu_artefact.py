# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import hashlib
import json
import lzma
import os
import pathlib
import tarfile
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_artefact as artefact
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError

KEY = "a" * 32


def make(tmp_path: pathlib.Path, name: str = "one") -> tuple[str, dict[str, t.Any]]:
    """An archive of a small stage, and its manifest."""
    stage = tmp_path / f"stage-{name}"
    (stage / "bin").mkdir(parents=True)
    (stage / "bin/qemu").write_text("binary\n")
    (stage / "bin/qemu").chmod(0o755)
    (stage / "bin/kvm").symlink_to("qemu")
    (stage / "share").mkdir()
    (stage / "share/bios.bin").write_bytes(bytes(range(256)) * 500)
    manifest = {"format": artefact.FORMAT, "key": KEY, "files": artefact.list_files(str(stage))}
    path = str(tmp_path / f"{name}.tar.xz")
    artefact.pack(str(stage), manifest, path, 1_000_000)
    return path, manifest


def test_the_key_is_that_of_the_content() -> None:
    assert artefact.key_of({"a": 1, "b": [2]}) == artefact.key_of({"b": [2], "a": 1})
    assert artefact.key_of({"a": 1}) != artefact.key_of({"a": 2})
    assert len(artefact.key_of({})) == 32


def test_two_archives_of_the_same_files_are_the_same(tmp_path: pathlib.Path) -> None:
    first, _manifest = make(tmp_path, "one")
    os.utime(tmp_path / "stage-one/bin/qemu", (5, 5))
    second, _manifest = make(tmp_path, "two")
    assert pathlib.Path(first).read_bytes() == pathlib.Path(second).read_bytes()
    with tarfile.open(first) as archive:
        assert {(one.uid, one.gid, one.uname, one.mtime) for one in archive} == {(0, 0, "", 1_000_000)}


def test_there_and_back(tmp_path: pathlib.Path) -> None:
    path, manifest = make(tmp_path)
    target = str(tmp_path / "out")
    assert artefact.unpack(path, target) == manifest == artefact.read_manifest(path)
    assert artefact.verify(target, manifest) is None
    assert (tmp_path / "out/bin/qemu").stat().st_mode & 0o777 == 0o755
    (tmp_path / "out/share/bios.bin").write_bytes(b"x")
    assert artefact.verify(target, manifest) == "share/bios.bin was changed"
    (tmp_path / "out/bin/kvm").unlink()
    assert "bin/kvm" in str(artefact.verify(target, manifest))


def test_what_a_build_must_not_install(tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").symlink_to("/etc/passwd")
    with pytest.raises(HostError, match="leads out of it"):
        artefact.list_files(str(tmp_path))
    (tmp_path / "out").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(HostError, match="neither a file nor a link"):
        artefact.list_files(str(tmp_path))


def test_a_truncated_archive_leaves_nothing(tmp_path: pathlib.Path) -> None:
    path, _manifest = make(tmp_path)
    content = pathlib.Path(path).read_bytes()
    for size in (10, len(content) // 2, len(content) * 3 // 4):
        pathlib.Path(path).write_bytes(content[:size])
        with pytest.raises(HostError, match=r"truncated or damaged"):
            artefact.unpack(path, str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def hostile(tmp_path: pathlib.Path, change: t.Callable[[tarfile.TarInfo], t.Any], listed: dict[str, t.Any]) -> str:
    """An archive whose one member is changed, and whose manifest lists it."""
    path = str(tmp_path / "hostile.tar.xz")
    text = json.dumps({"format": artefact.FORMAT, "key": KEY, "files": listed}).encode()
    (tmp_path / "manifest").write_bytes(text)
    (tmp_path / "file").write_bytes(b"x")
    with lzma.open(path, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(tmp_path / "manifest", artefact.MANIFEST)
        member = archive.gettarinfo(tmp_path / "file", "bin/qemu")
        change(member)
        with open(tmp_path / "file", "rb") as file:
            archive.addfile(member, file if member.isreg() else None)
    return path


def renamed(name: str) -> t.Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        member.name = name

    return change


def turned(kind: bytes, link: str = "") -> t.Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = kind, link, 0

    return change


X = hashlib.sha256(b"x").hexdigest()
ANY = {"sha256": "0" * 64, "size": 1, "mode": "0644"}


@pytest.mark.parametrize(
    ("change", "listed", "words"),
    [
        (renamed("../evil"), {"../evil": ANY}, "none that qemu_build makes"),
        (renamed("/evil"), {"/evil": ANY}, "none that qemu_build makes"),
        (turned(tarfile.CHRTYPE), {"bin/qemu": ANY}, "none that qemu_build makes"),
        (turned(tarfile.LNKTYPE, "/etc/passwd"), {"bin/qemu": ANY}, "none that qemu_build makes"),
        (turned(tarfile.SYMTYPE, "/etc"), {"bin/qemu": {"link": "/etc"}}, "not the one that its manifest lists"),
        (turned(tarfile.SYMTYPE, "../.."), {"bin/qemu": {"link": "../.."}}, "not the one that its manifest lists"),
        (renamed("bin/other"), {"bin/qemu": ANY}, "does not list"),
        (renamed("bin/qemu"), {"bin/qemu": ANY}, "is not the file that its manifest lists"),
        (renamed("bin/qemu"), {"bin/qemu": {**ANY, "sha256": X}, "bin/more": ANY}, "lacks 'bin/more'"),
    ],
)
def test_hostile_archives(
    tmp_path: pathlib.Path, change: t.Callable[[tarfile.TarInfo], None], listed: dict[str, t.Any], words: str
) -> None:
    with pytest.raises(HostError, match=words):
        artefact.unpack(hostile(tmp_path, change, listed), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not (tmp_path.parent / "evil").exists()


def test_an_archive_of_somebody_else(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "x.tar.xz")
    with tarfile.open(path, "w:xz") as archive:
        archive.add("/etc/hostname", "hostname")
    with pytest.raises(HostError, match="no archive of a QEMU"):
        artefact.read_manifest(path)


def test_no_room(tmp_path: pathlib.Path) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    manifest = {"format": 1, "key": KEY, "files": {}}
    with pytest.raises(OSError):
        artefact.pack(str(stage), manifest, str(tmp_path / "missing/x.tar.xz"), 1)
