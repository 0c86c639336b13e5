# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import hashlib
import io
import os
import pathlib
import subprocess
import tarfile

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_source as source
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.tests.unit.machine import Machine
from ansible_collections.iommufd.host.tests.unit.qemu_tree import make_tarball, make_tree

SUM = "0" * 64


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "exactly one of url"),
        ({"url": "https://x/q.tar.xz", "path": "/q"}, "exactly one of url"),
        ({"url": "https://x/q.tar.xz"}, "source.checksum"),
        ({"url": "https://x/q.tar.xz", "checksum": "12"}, "64 hexadecimal digits"),
        ({"url": "javascript:x", "checksum": SUM}, "source.url"),
        ({"path": "q.tar.xz"}, "absolute path"),
        ({"git": "https://x/q", "commit": "v10.0.0"}, "full id of a commit"),
        ({"git": "--upload-pack=x", "commit": "0" * 40}, "source.git"),
        ({"git": "ext::sh -c x", "commit": "0" * 40}, "source.git"),
        ({"package": "qemu"}, "source.version"),
        ({"package": "../qemu", "version": "1"}, "source.package"),
        ({"path": "/q", "signature": "/q.sig"}, "source.keyring"),
    ],
)
def test_what_is_no_source(value: dict[str, str], words: str) -> None:
    with pytest.raises(OptionError) as caught:
        source.parse_source(value)
    assert words in caught.value.message


def test_credentials_of_a_url_are_not_shown() -> None:
    assert source.parse_source({"url": "https://me:secret@x/q.tar.xz?t=1", "checksum": SUM}).describe() == (
        "https://x/q.tar.xz"
    )


def archive(path: pathlib.Path, *members: tarfile.TarInfo) -> str:
    with tarfile.open(path, "w:xz") as file:
        for member in members:
            file.addfile(member, io.BytesIO(b"x" * member.size))
    return str(path)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    found.size = 1 if kind == tarfile.REGTYPE else 0
    return found


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (member("qemu/../../etc/passwd"), "leads out of its directory"),
        (member("/etc/passwd"), "leads out of its directory"),
        (member("qemu/null", tarfile.CHRTYPE), "device node"),
        (member("qemu/disk", tarfile.BLKTYPE), "device node"),
        (member("qemu/pipe", tarfile.FIFOTYPE), "pipe"),
        (member("qemu/shadow", tarfile.LNKTYPE, "qemu/../../../etc/shadow"), "leads out of its directory"),
        (member("qemu/shadow", tarfile.LNKTYPE, "/etc/shadow"), "leads out of its directory"),
    ],
)
def test_members_that_no_source_has(tmp_path: pathlib.Path, bad: tarfile.TarInfo, words: str) -> None:
    path = archive(tmp_path / "q.tar.xz", member("qemu/VERSION"), bad)
    with pytest.raises(HostError, match=words):
        source.examine(source.Fetched("", (path,)))
    with pytest.raises(HostError, match=words):
        source.unpack(path, str(tmp_path / "out"), os.getuid())
    assert not (tmp_path.parent / "etc").exists()


def test_nothing_is_written_behind_a_link(tmp_path: pathlib.Path) -> None:
    (tmp_path / "outside").mkdir()
    out = member("qemu/out", tarfile.SYMTYPE, str(tmp_path / "outside"))
    inside = member("qemu/in", tarfile.SYMTYPE, "sub")
    path = archive(tmp_path / "a.tar.xz", out, member("qemu/out/file"))
    source.unpack(path, str(tmp_path / "a"), os.getuid())  # the link is left out, so that it is a plain directory
    assert (tmp_path / "a/out/file").is_file() and not list((tmp_path / "outside").iterdir())
    path = archive(tmp_path / "b.tar.xz", inside, member("qemu/in/file"))
    with pytest.raises(HostError, match="lies behind a link"):
        source.unpack(path, str(tmp_path / "b"), os.getuid())


def test_a_tarball_is_examined_and_unpacked(tmp_path: pathlib.Path) -> None:
    tree = make_tree(tmp_path / "tree", "9.1.0")
    (tree / "pythondeps.toml").write_text('[meson]\nmeson = { accepted = ">=1.5.0" }\n#pycotap = { x }\n[docs]\n')
    (tree / "link").symlink_to("VERSION")
    path = str(make_tarball(tree, tmp_path / "q.tar.xz"))
    traits = source.examine(source.Fetched("", (path,)))
    assert (traits.version, traits.kconfig, traits.option) == ("9.1.0", True, False)
    assert (traits.meson, traits.pycotap, traits.wheels) == ("1.5.0", False, False)
    assert traits.date == int((tree / "VERSION").stat().st_mtime) or traits.date > 0
    source.unpack(path, str(tmp_path / "out"), os.getuid())
    assert source.tree_digest(str(tmp_path / "out")) == source.tree_digest(str(tree))


def test_a_truncated_archive(tmp_path: pathlib.Path) -> None:
    whole = make_tarball(make_tree(tmp_path / "tree"), tmp_path / "q.tar.xz").read_bytes()
    path = tmp_path / "short.tar.xz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HostError, match="truncated or damaged"):
        source.examine(source.Fetched("", (str(path),)))
    with pytest.raises(HostError, match="truncated or damaged"):
        source.unpack(str(path), str(tmp_path / "out"), os.getuid())


def test_something_that_is_no_qemu(tmp_path: pathlib.Path) -> None:
    path = archive(tmp_path / "q.tar.xz", member("linux/Makefile"))
    with pytest.raises(HostError, match="no source of QEMU"):
        source.examine(source.Fetched("", (path,)))


def test_a_url_with_the_right_and_the_wrong_checksum(tmp_path: pathlib.Path) -> None:
    tarball = make_tarball(make_tree(tmp_path / "tree"), tmp_path / "q.tar.xz")
    downloads = str(tmp_path / "downloads")
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    wrong = source.parse_source({"url": tarball.as_uri(), "checksum": SUM})
    with pytest.raises(HostError, match="was asked for"):
        source.fetch(wrong, downloads)
    assert os.listdir(downloads) == []
    right = source.parse_source({"url": tarball.as_uri(), "checksum": f"sha256:{digest.upper()}"})
    assert source.known_digest(right, downloads) == f"sha256:{digest}"
    found = source.fetch(right, downloads)
    assert found.digest == f"sha256:{digest}"
    tarball.unlink()
    assert source.fetch(right, downloads) == found  # from what is here
    with open(found.tarballs[0], "ab") as file:
        file.write(b"x")
    with pytest.raises(HostError, match="It was not used"):
        source.fetch(right, downloads)


def test_a_url_that_is_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(HostError, match="did not come"):
        source.fetch(source.parse_source({"url": f"file://{tmp_path}/no.tar", "checksum": SUM}), str(tmp_path / "d"))


def test_a_source_that_root_may_not_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that another machine exports."""

    def refused(path: str) -> str:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(source, "sha256", refused)
    path = make_tarball(make_tree(tmp_path / "tree"), tmp_path / "q.tar.xz")
    with pytest.raises(HostError, match=f"{path} cannot be read: Permission denied"):
        source.fetch(source.parse_source({"path": str(path)}), str(tmp_path / "d"))


def test_a_git_commit(tmp_path: pathlib.Path) -> None:
    tree = make_tree(tmp_path / "tree", "9.2.0")
    git = ["git", "-C", str(tree), "-c", "user.name=n", "-c", "user.email=e@example.com"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (tree / "VERSION").write_text("1.0.0\n")  # what is not committed does not count
    found = source.fetch(source.parse_source({"git": str(tree), "commit": commit}), str(tmp_path / "d"))
    assert found.digest == f"git:{commit}"
    assert source.examine(found).version == "9.2.0"
    with pytest.raises(HostError, match="did not come"):
        source.fetch(source.parse_source({"git": str(tree), "commit": "1" * 40}), str(tmp_path / "d"))
    assert sorted(os.listdir(tmp_path / "d")) == [f"{commit}.tar"]


def test_a_tree_is_known_by_its_content_alone(tmp_path: pathlib.Path) -> None:
    first, second = make_tree(tmp_path / "a"), make_tree(tmp_path / "b")
    os.utime(second / "main.c", (1, 1))
    assert source.tree_digest(str(first)) == source.tree_digest(str(second))
    (second / "main.c").write_text("int main;")
    assert source.tree_digest(str(first)) != source.tree_digest(str(second))


def dsc(directory: pathlib.Path, tarball: pathlib.Path, name: str | None = None) -> pathlib.Path:
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    path = directory / "qemu_10.dsc"
    path.write_text(
        "Format: 3.0 (quilt)\nChecksums-Sha1:\n 1 2 x\n"
        f"Checksums-Sha256:\n {digest} {tarball.stat().st_size} {name or tarball.name}\nFiles:\n a 1 b\n"
    )
    return path


def test_a_source_package_and_its_companions(tmp_path: pathlib.Path) -> None:
    tarball = make_tarball(make_tree(tmp_path / "tree"), tmp_path / "qemu_10.orig.tar.xz")
    path = dsc(tmp_path, tarball)
    found = source.fetch(source.parse_source({"path": str(path)}), str(tmp_path / "d"))
    assert (found.dsc, found.tarballs) == (str(path), (str(tarball),))
    tarball.write_bytes(b"another")
    with pytest.raises(HostError, match="its SHA-256 differs"):
        source.fetch(source.parse_source({"path": str(path)}), str(tmp_path / "d"))
    tarball.unlink()
    with pytest.raises(HostError, match="which is not there"):
        source.fetch(source.parse_source({"path": str(path)}), str(tmp_path / "d"))


def test_a_source_package_that_names_files_elsewhere(tmp_path: pathlib.Path) -> None:
    tarball = make_tarball(make_tree(tmp_path / "tree"), tmp_path / "q.tar.xz")
    with pytest.raises(HostError, match="no source package"):
        source.dsc_files(str(dsc(tmp_path, tarball, "../../etc/passwd")))


def test_a_source_package_that_the_archive_has_not(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apt(argv: list[str], timeout: float = 0) -> str:
        if "source" in argv:
            raise HostError(
                "`sh -c cd …` ended with status 100: …", stderr="W: x\nE: Failed to fetch q.dsc  404\nE: y\n"
            )
        return ""

    monkeypatch.setattr(source, "run", apt)
    monkeypatch.setattr(source, "source_stanzas", lambda host, suite: "")
    with pytest.raises(HostError) as caught:
        source.fetch(source.parse_source({"package": "qemu", "version": "1:99"}), str(tmp_path))
    assert caught.value.message == "source package qemu 1:99 did not come: Failed to fetch q.dsc  404"
    assert os.listdir(tmp_path) == []


def test_a_signature_by_another_key(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def gpgv(argv: list[str], timeout: float = 0) -> str:
        asked.append(argv)
        if "stranger.gpg" in argv[3]:
            raise HostError("`gpgv …` ended with status 2", stderr="gpgv: made by X\ngpgv: No public key\n")
        return ""

    monkeypatch.setattr(source, "run", gpgv)
    tarball = make_tarball(make_tree(tmp_path / "tree"), tmp_path / "q.tar.xz")
    given = {"path": str(tarball), "signature": "/q.sig"}
    source.fetch(source.parse_source({**given, "keyring": "/our.gpg"}), str(tmp_path))
    assert asked == [["gpgv", "--quiet", "--keyring", "/our.gpg", "/q.sig", str(tarball)]]
    with pytest.raises(HostError, match=r"q.tar.xz is not signed by a key of /stranger.gpg \(gpgv: No public key\)"):
        source.fetch(source.parse_source({**given, "keyring": "/stranger.gpg"}), str(tmp_path))


def test_only_the_signed_text_of_a_source_package_counts(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpgv says yes to a file with a signed text in it, whatever stands around that."""
    monkeypatch.setattr(source, "run", lambda argv, timeout=0: "")
    path = dsc(tmp_path, make_tarball(make_tree(tmp_path / "tree"), tmp_path / "qemu_10.orig.tar.xz"))
    text = path.read_text()
    head = "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n"
    tail = "-----BEGIN PGP SIGNATURE-----\n\niHUE+/=\n=M8w+\n-----END PGP SIGNATURE-----\n"
    given = source.parse_source({"path": str(path), "keyring": "/our.gpg"})
    path.write_text(f"{head}{text}- -dash\n{tail}")
    assert source.fetch(given, str(tmp_path)).dsc == str(path)
    armor = tail.replace("\n\n", f"\nComment: x\n{text}\n", 1)
    for bad in (text + head + "x\n" + tail, head + text + tail + text, text, head + text + armor, head + text):
        path.write_text(bad)
        with pytest.raises(HostError, match=r"is not signed by a key of /our\.gpg as a whole"):
            source.fetch(given, str(tmp_path))


def test_source_lists_come_from_the_machines_own(machine: Machine) -> None:
    machine.file(
        "/etc/apt/sources.list.d/debian.sources",
        "Types: deb\nURIs: http://mirror/debian\nSuites: trixie\nComponents: main\nSigned-By: /k.gpg\n\n"
        "Types: deb\nURIs: http://mirror/debian-security\nSuites: trixie-security\nComponents: main\n",
    )
    machine.file(
        "/etc/apt/sources.list", "deb [signed-by=/x.gpg] http://old/debian bookworm main\n# deb http://no x y\n"
    )
    assert source.source_stanzas(machine.host, "sid") == (
        "Types: deb-src\nURIs: http://mirror/debian\nSuites: sid\nComponents: main\nSigned-By: /k.gpg\n"
    )
    text = source.source_stanzas(machine.host, "")
    assert text.count("Types: deb-src") == 3 and "URIs: http://old/debian\nSuites: bookworm" in text
