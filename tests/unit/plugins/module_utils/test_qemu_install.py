# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import io
import os
import pathlib
import shutil
import subprocess
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_apparmor
from ansible_collections.iommufd.host.plugins.module_utils import _qemu_artefact as artefact
from ansible_collections.iommufd.host.plugins.module_utils import _qemu_install as install
from ansible_collections.iommufd.host.plugins.module_utils._elf import interpreter
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._host import Host

A, B, C, D = ("abcd"[number] * 32 for number in range(4))

SCRIPT = """#!/bin/sh
case "$*" in
-version) echo "QEMU emulator version 10.0.13";;
"-object help") echo "  iommufd";;
*) echo "  fd=<str>"; echo "  iommufd=<link>";;
esac
"""


def archive(tmp_path: pathlib.Path, key: str, machine: str = os.uname().machine, **said: t.Any) -> str:
    """An archive whose QEMU is a script that answers like one."""
    stage = tmp_path / f"stage-{key}"
    shutil.rmtree(stage, ignore_errors=True)
    (stage / "bin").mkdir(parents=True)
    binary = stage / "bin/qemu-system-x86_64"
    binary.write_text(SCRIPT + f"# {key}\n")
    binary.chmod(0o755)
    manifest = {
        "format": artefact.FORMAT,
        "key": key,
        "version": "10.0.13",
        "decides": {"builder": {"machine": machine}},
        "binaries": {"x86_64": {"version": "10.0.13", "iommufd": True, "passing": True, **said}},
        "files": artefact.list_files(str(stage)),
    }
    path = str(tmp_path / f"{key}.tar.xz")
    artefact.pack(str(stage), manifest, path, 1)
    return path


@pytest.fixture(autouse=True)
def no_apparmor(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's own profiles of libvirt, where it has them, are none of these tests' business."""
    for name in ("ABSTRACTION", "BASE", "RULES_FILE"):
        monkeypatch.setattr(_qemu_apparmor, name, str(tmp_path / "no-apparmor"))


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> str:
    return str(tmp_path / "opt/qemu")


def put(tmp_path: pathlib.Path, directory: str, key: str, keep: int = 1) -> install.Plan:
    plan = install.plan_present(
        Host(), install.read_installed(Host(), directory), install.Wanted(key, archive(tmp_path, key), keep)
    )
    plan.apply()
    return plan


def state(directory: str) -> tuple[str | None, str | None, tuple[str, ...]]:
    found = install.read_installed(Host(), directory)
    return found.current, found.previous, found.keys


def test_one_after_the_other(tmp_path: pathlib.Path, directory: str) -> None:
    assert put(tmp_path, directory, A).summary() == [f"unpack QEMU {A} and check it", f"make QEMU {A} the current one"]
    assert state(directory) == (A, None, (A,))
    assert not put(tmp_path, directory, A).changed
    put(tmp_path, directory, B)
    assert state(directory) == (B, A, (A, B))
    assert os.readlink(f"{directory}/current") == f"versions/{B}"
    assert put(tmp_path, directory, C).summary()[-1] == f"remove QEMU {A}, which is an old one"
    assert state(directory) == (C, B, (B, C))


def test_back_without_an_archive(tmp_path: pathlib.Path, directory: str) -> None:
    put(tmp_path, directory, A)
    put(tmp_path, directory, B)
    plan = install.plan_present(Host(), install.read_installed(Host(), directory), install.Wanted(A))
    assert plan.summary() == [f"make QEMU {A} the current one"]
    plan.apply()
    assert state(directory) == (A, B, (A, B))
    lacking = install.plan_present(Host(), install.read_installed(Host(), directory), install.Wanted(D))
    with pytest.raises(HostError, match="no archive was given"):
        lacking.apply()
    assert state(directory) == (A, B, (A, B))


def test_what_a_process_runs_stays(tmp_path: pathlib.Path, directory: str) -> None:
    put(tmp_path, directory, A)
    # The kernel shows a script's interpreter as the program, so the process runs a copy of sleep.
    program = f"{directory}/versions/{A}/bin/guest"
    shutil.copy(str(shutil.which("sleep")), program)
    with subprocess.Popen([program, "60"]) as process:
        try:
            put(tmp_path, directory, B)
            put(tmp_path, directory, C)
            assert state(directory) == (C, B, (A, B, C))
            assert install.read_installed(Host(), directory).users == {A: (process.pid,)}
            with pytest.raises(Refusal, match=f"in use by process {process.pid}"):
                install.plan_absent(Host(), install.read_installed(Host(), directory))
        finally:
            process.kill()
    put(tmp_path, directory, C)
    assert state(directory) == (C, B, (B, C))


def test_absent_leaves_nothing(tmp_path: pathlib.Path, directory: str) -> None:
    assert not install.plan_absent(Host(), install.read_installed(Host(), directory)).changed
    put(tmp_path, directory, A)
    put(tmp_path, directory, B)
    install.plan_absent(Host(), install.read_installed(Host(), directory)).apply()
    assert not os.path.exists(tmp_path / "opt")
    assert not install.plan_absent(Host(), install.read_installed(Host(), directory)).changed


def test_what_cannot_be_taken_back_is_said(
    tmp_path: pathlib.Path, directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: str, *arguments: t.Any, **more: t.Any) -> None:
        if path == f"{directory}/versions/{A}":
            os.unlink(f"{path}/manifest.json")
            raise PermissionError(1, "Operation not permitted", path)
        real(path, *arguments, **more)

    put(tmp_path, directory, A)
    put(tmp_path, directory, B)
    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", failing)
    with pytest.raises(HostError, match=f"could be taken back: remove QEMU {A}, which is an old one: what was removed"):
        put(tmp_path, directory, C)
    assert state(directory) == (B, A, (A, B))


def test_absent_where_the_builds_were_removed_by_hand(tmp_path: pathlib.Path, directory: str) -> None:
    put(tmp_path, directory, A)
    shutil.rmtree(f"{directory}/versions")
    install.plan_absent(Host(), install.read_installed(Host(), directory)).apply()
    assert not os.path.exists(tmp_path / "opt")


def test_a_changed_file_is_put_right(tmp_path: pathlib.Path, directory: str) -> None:
    put(tmp_path, directory, A)
    pathlib.Path(f"{directory}/versions/{A}/bin/qemu-system-x86_64").write_text("changed")
    assert put(tmp_path, directory, A).summary() == [f"unpack QEMU {A} and check it"]
    assert install.whole(Host(), install.read_installed(Host(), directory), A)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"machine": "vax"}, "built for vax, and this host is"),
        ({"iommufd": False}, "answers otherwise here than on the builder: version 10.0.13, iommufd True"),
        ({"version": "9.0.0"}, "answers otherwise here"),
    ],
)
def test_what_does_not_fit_is_not_installed(
    tmp_path: pathlib.Path, directory: str, said: dict[str, t.Any], words: str
) -> None:
    put(tmp_path, directory, A)
    wanted = install.Wanted(B, archive(tmp_path, B, **said))
    with pytest.raises(HostError, match=f"{words}.*Everything was put back"):
        install.plan_present(Host(), install.read_installed(Host(), directory), wanted).apply()
    assert state(directory) == (A, None, (A,))
    assert os.listdir(f"{directory}/versions") == [A]


def test_a_damaged_archive_leaves_nothing(tmp_path: pathlib.Path, directory: str) -> None:
    path = archive(tmp_path, A)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    with pytest.raises(HostError, match="truncated or damaged"):
        install.plan_present(Host(), install.read_installed(Host(), directory), install.Wanted(A, path)).apply()
    assert not os.path.exists(tmp_path / "opt")


def test_what_an_interrupted_run_left(tmp_path: pathlib.Path, directory: str) -> None:
    put(tmp_path, directory, A)
    os.mkdir(f"{directory}/versions/.{B}.new")
    assert put(tmp_path, directory, A).summary() == [
        f"remove {directory}/versions/.{B}.new, left by an interrupted run"
    ]
    assert os.listdir(f"{directory}/versions") == [A]


def test_missing_libraries_are_named(tmp_path: pathlib.Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "lib.c").write_text("int there(void) { return 1; }\n")
    (tmp_path / "main.c").write_text("int there(void); int main(void) { return there(); }\n")
    subprocess.run(["cc", "-shared", "-o", "libabsent.so", "lib.c"], cwd=tmp_path, check=True)
    subprocess.run(["cc", "-o", "main", "main.c", "-L.", "-labsent"], cwd=tmp_path, check=True)
    binary = str(tmp_path / "main")
    assert install.missing_libraries(Host(), binary) == ["libabsent.so"]
    (tmp_path / "plain.c").write_text("int main(void) { return 0; }\n")
    subprocess.run(["cc", "-o", "plain", "plain.c"], cwd=tmp_path, check=True)
    assert install.missing_libraries(Host(), str(tmp_path / "plain")) == []
    data = pathlib.Path(binary).read_bytes()
    loader = str(interpreter(io.BytesIO(data)))
    (tmp_path / "other").write_bytes(data.replace(loader.encode(), b"/lib/ld-other".ljust(len(loader), b"\0")))
    assert install.missing_libraries(Host(), str(tmp_path / "other")) == ["the loader /lib/ld-other"]


def test_a_missing_version_of_a_symbol_is_named() -> None:
    class Loader(Host):
        def ask(self, argv: t.Sequence[str], timeout: float = 30.0, stdin: str = "") -> t.Any:
            from ansible_collections.iommufd.host.plugins.module_utils._host import Output

            return Output(1, "", "/x/q: /lib/libc.so.6: version `GLIBC_2.38' not found (required by /x/q)\n")

    assert install.missing_libraries(Loader(), "/bin/sh") == ["GLIBC_2.38 in /lib/libc.so.6"]
