# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pathlib
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _packages
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host, Output
from ansible_collections.iommufd.host.plugins.module_utils._packages import (
    RECORD,
    Change,
    UnknownPackages,
    format_record,
    have_lists,
    missing,
    parse_simulation,
    plan_removal,
    read_packages,
    read_record,
    require_apt,
    simulate_build_dep,
    simulate_install,
)
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan


def stanza(name: str, status: str = "install ok installed", depends: str = "", provides: str = "") -> str:
    lines = [f"Package: {name}", f"Status: {status}", "Version: 1.0-1"]
    lines += [f"Depends: {depends}"] if depends else []
    lines += [f"Provides: {provides}"] if provides else []
    return "\n".join([*lines, "Description: words", " Package: not-one", ""])


class Debian(Host):
    """A host with packages and an apt that says what it is told to."""

    def __init__(self, root: pathlib.Path, *stanzas: str, automatic: t.Sequence[str] = (), record: str = "") -> None:
        super().__init__(str(root))
        self.root_path = root
        self.asked: list[list[str]] = []
        self.answers: list[Output] = []
        self.put("/var/lib/dpkg/status", "\n".join(stanzas))
        marks = [f"Package: {name}\nArchitecture: amd64\nAuto-Installed: 1\n" for name in automatic]
        self.put("/var/lib/apt/extended_states", "\n".join(marks))
        if record:
            self.put(RECORD, record)

    def put(self, path: str, text: str) -> None:
        target = self.root_path / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def ask(self, argv: t.Sequence[str], timeout: float = 30.0, stdin: str = "") -> Output | None:
        self.asked.append(list(argv))
        if self.answers:
            return self.answers.pop(0)
        names = [name for name in argv if not name.startswith("-")][2:]
        return Output(0, "".join(f"Purg {name} [1.0-1]\n" for name in names), "")


def test_reads_what_is_installed(tmp_path: pathlib.Path) -> None:
    host = Debian(
        tmp_path,
        stanza("gcc", depends="cpp (>= 4:14), gcc-14 (>= 14.2) | gcc-13, libc6:any"),
        stanza("gone", "deinstall ok config-files"),
        stanza("half", "install ok half-configured"),
        stanza("waits", "install ok triggers-pending", provides="c-compiler (= 1), cc"),
    )
    packages = read_packages(host)
    assert set(packages) == {"gcc", "gone", "half", "waits"}
    assert packages["gcc"].needs == {"cpp", "gcc-14", "gcc-13", "libc6"}
    assert packages["waits"].provides == {"c-compiler", "cc"}
    assert [name for name, one in packages.items() if one.partial] == ["half", "waits"]
    assert missing(packages, ["dkms", "gcc", "gone", "half"]) == ["dkms", "gone", "half"]


def test_a_foreign_twin_does_not_hide_the_installed_one(tmp_path: pathlib.Path) -> None:
    packages = read_packages(Debian(tmp_path, stanza("libc6"), stanza("libc6", "deinstall ok config-files")))
    assert packages["libc6"].installed


def test_a_host_without_dpkg_has_no_packages_and_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('NAME=Fedora\nPRETTY_NAME="Fedora Linux 43"\n')
    host = Host(str(tmp_path))
    assert read_packages(host) == {}
    with pytest.raises(HostError, match="this host is Fedora Linux 43"):
        require_apt(host)


def test_simulation_tells_new_from_upgraded_and_removed() -> None:
    text = """\
Remv old [1.0]
Inst libc6 [2.41-12] (2.41-12+deb13u1 Debian:13.5/stable [amd64]) []
Inst gcc-14 (14.2.0-19 Debian:13.5/stable [amd64])
Conf gcc-14 (14.2.0-19 Debian:13.5/stable [amd64])
Purg dkms [3.2.2]
"""
    change = parse_simulation(text)
    assert (change.new, change.upgraded, change.removed) == (["gcc-14"], ["libc6"], ["old", "dkms"])


@pytest.mark.parametrize(
    ("stderr", "names"),
    [
        ("E: Unable to locate package linux-source-6.99\n", ["linux-source-6.99"]),
        ("E: Package 'a' has no installation candidate\nE: Unable to locate package b\n", ["a", "b"]),
    ],
)
def test_packages_that_apt_does_not_know_are_named(tmp_path: pathlib.Path, stderr: str, names: list[str]) -> None:
    host = Debian(tmp_path)
    host.answers = [Output(100, "", stderr)]
    with pytest.raises(UnknownPackages) as caught:
        simulate_install(host, names)
    assert caught.value.names == names


def test_other_words_of_apt_are_quoted(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path)
    host.answers = [Output(100, "", "E: Unmet dependencies.\n")]
    with pytest.raises(HostError, match="Unmet dependencies"):
        simulate_install(host, ["dkms"])


def test_the_build_dependencies_that_apt_lacks_are_named(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path)
    said = """\
The following packages have unmet dependencies:
 builddeps:/q/qemu_10.0.13.dsc : Depends: libblkio-dev but it is not installable
                                 Depends: libbrlapi-dev but it is not going to be installed
"""
    host.answers = [Output(100, said, "E: Unable to correct problems, you have held broken packages.\n")]
    with pytest.raises(HostError) as caught:
        simulate_build_dep(host, "/q/qemu_10.0.13.dsc")
    assert "libblkio-dev but it is not installable / libbrlapi-dev but it" in caught.value.message
    assert "--arch-only" in host.asked[-1]  # or a dozen cross compilers for the firmware came along


def test_the_record_survives_writing_and_reading(tmp_path: pathlib.Path) -> None:
    record = {"dkms": {"iommufd_dkms"}, "make": {"iommufd_dkms", "verify"}}
    host = Debian(tmp_path, record=format_record(record))
    assert read_record(host) == record


def test_nothing_recorded_asks_nothing(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path, stanza("dkms"), record="dkms verify\n")
    assert plan_removal(host, "iommufd_dkms").forget is False
    assert host.asked == []


def test_takes_away_what_came(tmp_path: pathlib.Path) -> None:
    host = Debian(
        tmp_path,
        stanza("dkms", depends="make"),
        stanza("make"),
        automatic=["make"],
        record="dkms p\nmake p\nnever-came p\n",
    )
    removal = plan_removal(host, "p", ["dkms"])
    assert removal.purge == ["dkms", "make"]
    assert removal.keep == {}
    assert removal.forget


def test_keeps_what_others_need_by_now(tmp_path: pathlib.Path) -> None:
    host = Debian(
        tmp_path,
        stanza("dkms", depends="make | gmake"),
        stanza("make", depends="libguile"),
        stanza("libguile"),
        stanza("build-essential", depends="make, gcc"),
        automatic=["make", "libguile"],
        record="dkms p\nlibguile p\nmake p\n",
    )
    host.answers = [
        Output(0, "Purg dkms [1]\nPurg make [1]\nPurg libguile [1]\nRemv build-essential [1]\n", ""),
        Output(0, "Purg dkms [1]\n", ""),
    ]
    removal = plan_removal(host, "p", ["dkms"])
    assert removal.purge == ["dkms"]
    assert removal.keep == {"make": "build-essential needs it", "libguile": "make needs it"}


def test_keeps_what_somebody_wanted_since_and_what_serves_two_purposes(tmp_path: pathlib.Path) -> None:
    host = Debian(
        tmp_path,
        *(stanza(name) for name in ("dkms", "make", "patch")),
        automatic=["patch"],
        record="dkms p\nmake p\npatch p other\n",
    )
    removal = plan_removal(host, "p", ["dkms"])
    assert removal.purge == ["dkms"]
    assert removal.keep == {"make": "has been marked as wanted since", "patch": "also serves other"}


def test_a_tie_that_only_apt_sees_keeps_everything(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path, stanza("dkms"), stanza("odd"), record="dkms p\n")
    host.answers = [Output(0, "Purg dkms [1]\nRemv odd [1]\n", "")]
    removal = plan_removal(host, "p", ["dkms"])
    assert removal.purge == []
    assert removal.keep == {"dkms": "odd would go with it"}


def test_lists(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path)
    host.put("/var/lib/apt/lists/lock", "")
    assert not have_lists(host)
    host.put("/var/lib/apt/lists/mirror.example_debian_dists_trixie_main_binary-amd64_Packages", "")
    assert have_lists(host)


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> list[list[str]]:
    """The commands that a step runs; the first installation fails, as with lists that lag behind the archive."""
    commands: list[list[str]] = []

    def run(argv: t.Sequence[str], timeout: float) -> str:
        commands.append([word for word in argv if not word.startswith(("-", "D"))])
        if commands == [["apt-get", "install", "headers"]]:
            raise HostError("404 Not Found")
        return ""

    monkeypatch.setattr(_packages, "Host", lambda: Host(str(tmp_path)))
    monkeypatch.setattr(_packages, "RECORD", str(tmp_path / "record/packages"))
    monkeypatch.setattr(_packages, "run", run)
    return commands


def test_what_newer_lists_bring_is_remembered_too(
    apt: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    changes = [Change(["headers", "headers-2"], [], [])]
    monkeypatch.setattr(_packages, "simulate_install", lambda host, names: changes.pop())
    step = _packages.InstallPackages(
        "install", names=["headers"], purpose="p", change=Change(["headers", "headers-1"], [], [])
    )
    step.apply()
    assert apt == [["apt-get", "install", "headers"], ["apt-get", "update"], ["apt-get", "install", "headers"]]
    assert step.added == ["headers", "headers-1", "headers-2"]
    assert (tmp_path / "record/packages").read_text().splitlines()[2:] == ["headers p", "headers-1 p", "headers-2 p"]


def test_a_purge_that_failed_half_way_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path, stanza("a"), stanza("b"))

    def run(argv: t.Sequence[str], timeout: float) -> str:
        host.put("/var/lib/dpkg/status", stanza("b"))
        raise HostError("b cannot be removed")

    monkeypatch.setattr(_packages, "Host", lambda: host)
    monkeypatch.setattr(_packages, "run", run)
    with pytest.raises(
        HostError, match=r"b cannot be removed\. Not everything could be taken back: purge: a was purged"
    ):
        Plan([_packages.PurgePackages("purge", names=["a", "b"], purpose="p")]).apply()
