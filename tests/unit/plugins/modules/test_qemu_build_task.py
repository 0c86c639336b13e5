# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import types
import typing as t

import pytest
from ansible.errors import AnsibleConnectionFailure, AnsibleError

from ansible_collections.iommufd.host.plugins.action import qemu_build as action
from ansible_collections.iommufd.host.plugins.module_utils import _ansible, _packages
from ansible_collections.iommufd.host.plugins.module_utils import _qemu_build as build
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import wait_until
from ansible_collections.iommufd.host.plugins.modules import qemu_build
from ansible_collections.iommufd.host.tests.unit.qemu_tree import make_tarball, make_tree

needs_tools = pytest.mark.skipif(
    os.geteuid() != 0 or not all(Host().which(name) for name in ("cc", "ninja", "objdump", "setpriv")),
    reason="needs root, a C compiler and ninja",
)

Result = dict[str, t.Any]


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> t.Iterator[str]:
    # The tiny tree needs none of QEMU's packages, and a test must not install any.
    monkeypatch.setattr(build, "needed_packages", lambda *arguments: [])
    monkeypatch.setattr(action, "_INTERVAL", 0.1)
    place = tempfile.mkdtemp(dir="/var/tmp", prefix="iommufd-host-test-")
    os.chmod(place, 0o755)
    monkeypatch.setattr(_packages, "RECORD", f"{place}/packages")  # nor take away what is here because of a real build
    yield f"{place}/iommufd-host/qemu"

    def gone() -> bool:
        shutil.rmtree(place, ignore_errors=True)
        return not os.path.exists(place)

    # A job that has told its result is still clearing up for a moment.
    assert wait_until(gone, 20)


def call(check_mode: bool = False, **given: t.Any) -> Result:
    """The module as it runs on a builder, in this process."""
    parameters = {name: spec.get("default") for name, spec in qemu_build.ARGUMENT_SPEC.items()}
    module = types.SimpleNamespace(params={**parameters, **given}, check_mode=check_mode, _diff=True)
    module.warn = lambda text: None
    try:
        return _ansible._carry_out(t.cast(t.Any, module), qemu_build.work)
    except HostError as error:
        return {"failed": True, "changed": False, "msg": error.message, **error.details}


class Action(action.ActionModule):
    """The action plugin with this machine as the builder."""

    def __init__(self, arguments: Result, check_mode: bool = False) -> None:
        self._task = types.SimpleNamespace(args=arguments, delegate_to=None, check_mode=check_mode)
        self._connection = types.SimpleNamespace(fetch_file=shutil.copyfile)
        self.calls = 0

    def _call(self, arguments: Result, task_vars: Result | None) -> Result:
        self.calls += 1
        given = {name: value for name, value in arguments.items() if name in qemu_build.ARGUMENT_SPEC}
        return call(self._task.check_mode, **given)

    def _low_level_execute_command(self, cmd: str, sudoable: bool = True) -> Result:
        return {"stdout": subprocess.run(["sh", "-c", cmd], capture_output=True, text=True, check=False).stdout}

    def go(self) -> Result:
        """What :meth:`run` does after Ansible's own preparations."""
        return self.build({}, {"inventory_hostname": "builder1", "ansible_host": "127.0.0.1"})


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(action.display, "display", lambda text, **more: lines.append(text))
    return lines


@needs_tools
def test_built_shown_fetched_and_then_nothing_more(directory: str, tmp_path: pathlib.Path, shown: list[str]) -> None:
    tarball = make_tarball(make_tree(tmp_path / "tree"), tmp_path / "q.tar.xz")
    arguments = {
        "source": {"path": str(tarball)},
        "iommufd": "enabled",
        "directory": directory,
        "fetch": str(tmp_path / "controller"),
    }
    planned = Action(arguments, check_mode=True).go()
    assert planned["changed"] and planned["plan"] == [f"build QEMU 10.0.99 from {tarball}"]
    assert not os.path.exists(directory)
    first = Action(arguments).go()
    assert (first["changed"], first["running"], first["summary"]) == (True, False, "iommufd support: YES")
    assert first["binaries"]["x86_64"]["iommufd"] and set(first["seconds"]) == set(build.PHASES)
    assert pathlib.Path(first["local"]).read_bytes() == pathlib.Path(first["artefact"]).read_bytes()
    assert any("builder1: " in line for line in shown)
    shown.clear()
    again = Action(arguments)
    second = again.go()
    assert (second["changed"], second["key"], again.calls, shown) == (False, first["key"], 1, [])
    os.unlink(first["local"])
    assert Action(arguments).go()["changed"]  # fetched again
    removed = call(state="absent", directory=directory)
    assert removed["changed"] and not os.path.exists(os.path.dirname(directory))
    assert not call(state="absent", directory=directory)["changed"]


@needs_tools
def test_a_failure_is_one_error_and_the_next_run_works(
    directory: str, tmp_path: pathlib.Path, shown: list[str]
) -> None:
    tree = make_tree(tmp_path / "tree", code="int f(void) { return x; }")
    arguments = {"source": {"path": str(tree)}, "directory": directory, "fetch": str(tmp_path / "controller")}
    failed = Action(arguments).go()
    assert failed["failed"] and "one.c:2:22: error:" in failed["msg"] and "on builder1" in failed["msg"]
    assert len(failed["log"]) < 10 and not (tmp_path / "controller").exists()
    (tree / "one.c").write_text("int one;\n")
    assert Action(arguments).go()["artefact"]


@needs_tools
def test_a_run_that_was_cut_off_is_found_again(directory: str, tmp_path: pathlib.Path, shown: list[str]) -> None:
    tree = make_tree(tmp_path / "tree")
    configure = tree / "configure"
    configure.write_text(configure.read_text().replace("#!/bin/sh\n", "#!/bin/sh\nsleep 2\n", 1))
    arguments = {"source": {"path": str(tree)}, "directory": directory}
    started = Action({**arguments, "wait": False}).go()
    assert started["running"] and started["artefact"] is None
    assert "under way" in call(state="absent", directory=directory)["msg"]
    joined = Action(arguments).go()
    assert joined["plan"] == [f"wait for the build of {started['key']} that is under way"]
    assert joined["artefact"] and joined["key"] == started["key"]


class Shaky(Action):
    """The same over a connection that breaks."""

    breaks = 3

    def _low_level_execute_command(self, cmd: str, sudoable: bool = True) -> Result:
        self.breaks -= 1
        if self.breaks >= 0:
            raise AnsibleConnectionFailure("Connection closed by remote host.")
        return super()._low_level_execute_command(cmd, sudoable)


@needs_tools
def test_a_connection_that_breaks_and_comes_back(directory: str, tmp_path: pathlib.Path, shown: list[str]) -> None:
    arguments = {"source": {"path": str(make_tree(tmp_path / "tree"))}, "directory": directory}
    done = Shaky(arguments).go()
    assert done["artefact"] and sum("not reached, tried again" in line for line in shown) == 3
    worse = Shaky({**arguments, "iommufd": "disabled"})
    worse.breaks = 1000
    with pytest.raises(AnsibleConnectionFailure):
        worse.go()
    assert Action({**arguments, "iommufd": "disabled"}).go()["artefact"]  # the job went on


@needs_tools
def test_a_killed_build_is_told(directory: str, tmp_path: pathlib.Path, shown: list[str]) -> None:
    tree = make_tree(tmp_path / "tree")
    configure = tree / "configure"
    slow = "#!/bin/sh\ntest -e /var/tmp/iommufd-host-never || sleep 30\n"
    configure.write_text(configure.read_text().replace("#!/bin/sh\n", slow, 1))
    arguments = {"source": {"path": str(tree)}, "directory": directory}
    started = Action({**arguments, "wait": False}).go()
    builder = build.Builder(directory)

    def state() -> Result:
        return build.read_state(builder, started["key"]) or {}

    assert wait_until(lambda: state().get("phase") == "configure", 20)
    os.kill(state()["pid"], signal.SIGKILL)
    # The job's last process is gone a moment later; only then is the lock free.
    killed, _seconds = Action(arguments)._follow(started, 10)
    assert killed is not None and "was killed in phase configure" in killed["msg"]
    build._clear(builder, started["key"])


def test_a_wrong_checksum_and_an_old_source(directory: str, tmp_path: pathlib.Path) -> None:
    tarball = make_tarball(make_tree(tmp_path / "tree", "7.2.0", kconfig=False), tmp_path / "q.tar.xz")
    wrong = {"path": str(tarball), "checksum": "0" * 64}
    assert "It was not used" in call(source=wrong, directory=directory)["msg"]
    refused = call(source={"path": str(tarball)}, directory=directory, iommufd="enabled")
    assert "QEMU has iommufd since 9.0" in refused["msg"]
    assert not os.path.exists(directory)


def test_missing_packages_are_named(directory: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/var/lib/dpkg/status"):
        pytest.skip("not a Debian")
    monkeypatch.setattr(build, "needed_packages", lambda *arguments: ["libglib2.0-dev"])
    given = {"source": {"path": str(make_tree(tmp_path / "tree"))}, "directory": directory}
    assert "libglib2.0-dev" in call(install_packages=False, **given)["msg"]
    assert call(check_mode=True, **given)["plan"][0] == "install libglib2.0-dev"


def test_a_url_is_not_fetched_in_check_mode(directory: str) -> None:
    planned = call(
        check_mode=True, source={"url": "https://nowhere/q.tar.xz", "checksum": "0" * 64}, directory=directory
    )
    assert planned["changed"] and planned["plan"] == ["fetch https://nowhere/q.tar.xz and build QEMU from it"]


def test_what_others_keep_in_the_directory_stays(directory: str) -> None:
    build.Builder(directory).make()
    pathlib.Path(directory, "notes").write_text("mine")
    pathlib.Path(directory, "work/0").mkdir()
    assert call(state="absent", directory=directory)["changed"]
    assert os.listdir(directory) == ["notes"]
    assert not call(state="absent", directory=directory)["changed"]


def test_a_removal_that_ends_half_way_is_not_put_back(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*arguments: t.Any) -> t.NoReturn:
        raise HostError("dpkg is locked")

    build.Builder(directory).make()
    removal = _packages.Removal(["meson"], {}, forget=True)
    monkeypatch.setattr(_packages, "plan_removal", lambda *arguments: removal)
    monkeypatch.setattr(_packages.PurgePackages, "apply", locked)
    monkeypatch.setattr(_packages.PurgePackages, "undo", lambda self: None)
    said = call(state="absent", directory=directory)["msg"]
    assert "dpkg is locked. Not everything could be taken back" in said and "stays removed" in said


def test_a_builder_does_not_choose_where_the_archive_goes(tmp_path: pathlib.Path) -> None:
    archive = tmp_path / "archive"
    archive.write_text("x")
    answer = {"key": "../../etc/x", "artefact": str(archive), "checksum": action.sha256(str(archive))}
    with pytest.raises(AnsibleError, match="which is no key of a build"):
        Action({})._fetch(answer, str(tmp_path / "a/b"))
    assert os.listdir(tmp_path) == ["archive"]


@pytest.mark.parametrize("value", ["relative", "/tmp", "/"])
def test_directories_that_would_be_removed_with_everything(value: str) -> None:
    assert "an absolute path of at least two parts" in call(state="absent", directory=value)["msg"]


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"phase": "unpack", "since": 100}, "unpack, 0:20"),
        ({"phase": "compile", "done": 3, "total": 12, "since": 60}, "compile 3 of 12 (25 %), 0:20, about 3:00 left"),
        ({"phase": "compile", "done": 0, "total": 1293, "since": 119}, "compile 0 of 1293 (0 %), 0:20"),
    ],
)  # fmt: skip
def test_progress_in_words(state: Result, text: str) -> None:
    assert action.describe({"started": 100.0, "updated": 110.0, "now": 120.0, **state}) == text
