# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _qemu
from ansible_collections.iommufd.host.plugins.module_utils._host import Host, Output
from ansible_collections.iommufd.host.plugins.module_utils._qemu import (
    Qemu,
    find_binaries,
    is_roots,
    question,
    read_qemu,
    read_qemus,
)
from ansible_collections.iommufd.host.tests.unit.machine import Machine


def binary(tmp_path: pathlib.Path, objects: str, properties: str, version: str = "10.0.13") -> str:
    """A stand-in that answers the three questions like a QEMU."""
    path = tmp_path / "qemu-system-x86_64"
    path.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'-version) echo "QEMU emulator version {version} (Debian 1:{version}+ds-1)";;\n'
        f'"-object help") printf "List of user creatable objects:\\n{objects}";;\n'
        f'*) printf "vfio-pci options:\\n{properties}";;\n'
        "esac\n"
    )
    path.chmod(0o755)
    return str(path)


PROPERTIES = "  addr=<int32>\\n  fd=<string>\\n  host=<str>\\n  iommufd=<link<iommufd>>\\n"


def test_a_qemu_with_iommufd(tmp_path: pathlib.Path) -> None:
    qemu = read_qemu(Host(), binary(tmp_path, "  iommufd\\n  iothread\\n", PROPERTIES))
    assert (qemu.version, qemu.build) == ("10.0.13", "Debian 1:10.0.13+ds-1")
    assert qemu.version_numbers == (10, 0, 13)
    assert (qemu.iommufd, qemu.passing, qemu.problem) == (True, True, None)


@pytest.mark.parametrize(
    ("objects", "properties", "iommufd", "passing"),
    [
        ("  iothread\\n", "  addr=<int32>\\n  host=<str>\\n", False, False),
        ("  iommufd\\n", "  host=<str>\\n", False, False),
        ("  iothread\\n", PROPERTIES, False, False),
        ("  iommufd\\n", "  host=<str>\\n  iommufd=<str>\\n", True, False),
    ],
)
def test_a_qemu_that_lacks_some_of_it(
    tmp_path: pathlib.Path, objects: str, properties: str, iommufd: bool, passing: bool
) -> None:
    qemu = read_qemu(Host(), binary(tmp_path, objects, properties))
    assert (qemu.iommufd, qemu.passing) == (iommufd, passing)


def test_a_changed_binary_is_asked_again(tmp_path: pathlib.Path) -> None:
    assert read_qemu(Host(), binary(tmp_path, "  iothread\\n", "")).iommufd is False
    assert read_qemu(Host(), binary(tmp_path, "  iommufd\\n  iothread\\n", PROPERTIES)).iommufd is True


def test_what_does_not_run(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "qemu-system-x86_64"
    assert read_qemu(Host(), str(path)).problem == "there is no such file"
    path.write_text("#!/bin/sh\necho 'error while loading shared libraries: libx.so' >&2; exit 127\n")
    assert read_qemu(Host(), str(path)).problem == "it is not executable"
    path.chmod(0o755)
    broken = read_qemu(Host(), str(path))
    assert broken.problem == "error while loading shared libraries: libx.so"
    assert broken.iommufd is None


@pytest.mark.parametrize("silent", ["-device", "-object"])
def test_a_question_without_an_answer_is_no_lack_of_iommufd(silent: str) -> None:
    said = {
        "-version": "QEMU emulator version 10.0.13\n",
        "-device": PROPERTIES.replace("\\n", "\n"),
        "-object": "  iommufd\n",
    }

    def ask(argv: list[str]) -> Output | None:
        return None if argv[1] == silent else Output(0, said[argv[1]], "")

    found = question(Qemu("/usr/bin/qemu", "/usr/bin/qemu"), ask)
    assert (found.version, found.iommufd, found.passing) == ("10.0.13", None, None)
    assert found.problem == "it did not answer"


@pytest.mark.skipif(os.geteuid() != 0, reason="files are root's")
def test_what_others_than_root_may_change(machine: Machine) -> None:
    path = "/opt/emulator/bin/qemu-kvm"
    machine.file("/opt/emulator/versions/1/qemu-kvm", "\x7fELF")
    machine.link(path, "/opt/emulator/versions/1/qemu-kvm")
    for place in ("/opt", "/opt/emulator", "/opt/emulator/bin", "/opt/emulator/versions", "/opt/emulator/versions/1"):
        machine.at(place).chmod(0o755)
    machine.at(path).chmod(0o755)  # of the file that it leads to
    assert is_roots(machine.host, path)
    for place in ("/opt/emulator/bin", "/opt/emulator/versions/1", "/opt/emulator/versions/1/qemu-kvm"):
        machine.at(place).chmod(0o775)
        assert not is_roots(machine.host, path), place
        machine.at(place).chmod(0o755)
        os.chown(machine.at(place), 1000, 0)
        assert not is_roots(machine.host, path), place
        os.chown(machine.at(place), 0, 0)
    assert not is_roots(machine.host, "/opt/gone")


@pytest.mark.parametrize(("path", "asked"), [("/opt/emulator/bin/qemu-kvm", False), ("/usr/bin/qemu-kvm", True)])
def test_root_does_not_run_what_it_happens_to_find_below_opt(
    monkeypatch: pytest.MonkeyPatch, path: str, asked: bool
) -> None:
    calls: list[bool] = []

    def read(_host: Host, _path: str, ask: bool) -> Qemu:
        calls.append(ask)
        return Qemu(path, path)

    monkeypatch.setattr(_qemu, "find_binaries", lambda _host: [path])
    monkeypatch.setattr(_qemu, "is_roots", lambda _host, _path: False)
    monkeypatch.setattr(_qemu, "read_qemu", read)
    (found,) = read_qemus(Host())
    assert calls == [asked]
    assert (found.problem is None) is asked


def test_binaries_of_a_captured_tree_are_found_and_not_asked(machine: Machine) -> None:
    for name in ("qemu-system-x86_64", "qemu-system-aarch64", "qemu-img"):
        machine.file(f"/usr/bin/{name}", "\x7fELF")
        machine.at(f"/usr/bin/{name}").chmod(0o755)
    machine.file("/usr/bin/kvm", "#!/bin/sh\n")
    machine.at("/usr/bin/kvm").chmod(0o755)
    machine.link("/usr/bin/qemu-system-amd64", "/usr/bin/qemu-system-x86_64")
    machine.file("/usr/local/bin/qemu-system-x86_64", "not executable")
    assert sorted(find_binaries(machine.host)) == ["/usr/bin/qemu-system-aarch64", "/usr/bin/qemu-system-x86_64"]
    qemu = read_qemu(machine.host, "/usr/bin/qemu-system-amd64")
    assert (qemu.target, qemu.version, qemu.iommufd) == ("/usr/bin/qemu-system-x86_64", None, None)
