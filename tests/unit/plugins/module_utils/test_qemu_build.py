# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import types
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_artefact as artefact
from ansible_collections.iommufd.host.plugins.module_utils import _qemu_build as build
from ansible_collections.iommufd.host.plugins.module_utils import _qemu_sandbox as sandbox
from ansible_collections.iommufd.host.plugins.module_utils import _qemu_source as source
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._packages import Package
from ansible_collections.iommufd.host.plugins.module_utils._plan import wait_until
from ansible_collections.iommufd.host.plugins.module_utils._qemu_profile import Request
from ansible_collections.iommufd.host.tests.unit.qemu_tree import make_tarball, make_tree

# Builds are real: other users, a compiler, ninja.
needs_tools = pytest.mark.skipif(
    os.geteuid() != 0 or not all(Host().which(name) for name in ("cc", "ninja", "objdump", "setpriv")),
    reason="needs root, a C compiler and ninja",
)


@pytest.fixture
def builder() -> t.Iterator[build.Builder]:
    """A builder's directory where other users can get to, as pytest's own ones do not let them."""
    directory = tempfile.mkdtemp(dir="/var/tmp", prefix="iommufd-host-test-")
    os.chmod(directory, 0o755)
    yield build.Builder(f"{directory}/cache")
    subprocess.run(["umount", f"{directory}/cache"], capture_output=True, check=False)
    shutil.rmtree(directory)


def job(builder: build.Builder, path: pathlib.Path, keep: int = 3, **request: t.Any) -> build.Job:
    builder.make()
    wanted = Request(**request)
    fetched = source.present(source.parse_source({"path": str(path)}), builder.downloads)
    assert fetched is not None
    decides = build.decides(Host(), wanted, fetched.digest)
    limits = sandbox.Limits(2, 2 << 30)
    key = artefact.key_of(decides)
    return build.Job(builder, key, decides, wanted, fetched, str(path), source.examine(fetched), limits, keep)


def finish(one: build.Job) -> dict[str, t.Any]:
    """Start a build, wait for its end, and return its last state."""
    assert build.start(one)
    assert wait_until(lambda: not build.is_running(one.builder, one.key), 60)
    state = build.read_state(one.builder, one.key)
    assert state is not None and state["finished"], state
    return state


def is_clean(one: build.Job) -> bool:
    """Whether a build that failed left no artefact and nothing of its trees."""
    left = set(os.listdir(one.builder.work(one.key)))
    return not os.path.exists(one.builder.artefact(one.key)) and left <= {"lock", "log", "state.json"}


@needs_tools
@pytest.mark.parametrize(
    ("tree", "iommufd", "has"),
    [
        ({}, "enabled", True),
        ({}, "disabled", False),
        ({}, "auto", True),
        ({"kconfig": False, "option": True}, "enabled", True),
        ({"kconfig": False, "option": True}, "disabled", False),
        ({"kconfig": False}, "auto", False),
    ],
)
def test_a_build_is_what_was_asked_for(
    builder: build.Builder, tmp_path: pathlib.Path, tree: dict[str, bool], iommufd: str, has: bool
) -> None:
    one = job(builder, make_tarball(make_tree(tmp_path / "tree", **tree), tmp_path / "q.tar.xz"), iommufd=iommufd)
    state = finish(one)
    assert state["error"] is None, state
    assert set(state["seconds"]) == set(build.PHASES) and state["processor"] > 0
    manifest = artefact.read_manifest(builder.artefact(one.key))
    assert manifest["summary"] == f"iommufd support: {'YES' if has else 'NO'}"
    assert manifest["binaries"] == {"x86_64": {"version": "10.0.99", "iommufd": has, "passing": has}}
    assert manifest["libraries"]["x86_64"] == ["libc.so.6"]
    assert {"bin/qemu-system-x86_64", "share/qemu/bios-256k.bin", "share/doc/qemu/COPYING"} <= set(manifest["files"])
    log = pathlib.Path(builder.artefact_log(one.key)).read_text()
    assert "--prefix=/opt/iommufd-host/qemu/current" in log and "[4/4]" in log
    assert ("--enable-iommufd" in log) == (bool(tree.get("option")) and iommufd == "enabled")


@needs_tools
def test_two_builds_in_two_places_are_the_same(builder: build.Builder, tmp_path: pathlib.Path) -> None:
    tarball = make_tarball(make_tree(tmp_path / "tree"), tmp_path / "q.tar.xz")
    contents = []
    for name in ("one", "another-and-longer"):
        # By whatever name the source comes.
        copy = pathlib.Path(shutil.copyfile(tarball, tmp_path / f"{name}.tar.xz"))
        one = job(build.Builder(f"{builder.directory}/{name}"), copy)
        assert finish(one)["error"] is None
        contents.append(pathlib.Path(one.builder.artefact(one.key)).read_bytes())
    assert contents[0] == contents[1]


@needs_tools
def test_a_tree_and_a_patch(builder: build.Builder, tmp_path: pathlib.Path) -> None:
    tree = make_tree(tmp_path / "tree")
    patch = tmp_path / "version.patch"
    patch.write_text(
        "--- a/two.c\n+++ b/two.c\n@@ -1 +1 @@\n-int two(void) { return 2; }\n+int two(void) { return 3; }\n"
    )
    one = job(builder, tree, patches=(str(patch),))
    assert finish(one)["error"] is None
    assert one.key != job(builder, tree).key
    (tree / "two.c").write_text("int other;\n")
    failed = job(builder, tree, patches=(str(patch),))
    state = finish(failed)
    assert "patch" in state["error"]["message"] and "failed with status 1" in state["error"]["message"]
    assert is_clean(failed)


@needs_tools
def test_a_stub_is_added_and_nothing_is_written_behind_a_link(builder: build.Builder, tmp_path: pathlib.Path) -> None:
    tree = make_tree(tmp_path / "tree")
    stubs = "hw/cxl/cxl-host-stubs.c"
    for name, text in (("include/hw/cxl/cxl_host.h", "cxl_fmws_get_all_sorted(void);"), (stubs, ";")):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text(f"{text}\n")
    script = (tree / "configure").read_text()
    look = f'grep -qx "GSList .cxl_fmws_get_all_sorted(void)" "$source/{stubs}" || exit 1\n'
    (tree / "configure").write_text(script.replace("has=n\n", f"has=n\n{look}", 1))
    one = job(builder, tree)
    assert finish(one)["error"] is None
    assert "hw/cxl/cxl-host-stubs.c lacks" in pathlib.Path(builder.log(one.key)).read_text()
    outside = pathlib.Path(builder.directory).parent / "outside"
    shutil.move(tree / "hw/cxl", outside)
    (tree / "hw/cxl").symlink_to(outside)
    state = finish(job(builder, tree))
    assert "has no directory hw/cxl" in state["error"]["message"]
    assert (outside / "cxl-host-stubs.c").read_text() == ";\n"


@needs_tools
@pytest.mark.parametrize("way", ["opt", "share", "share/qemu", "share/qemu/bios-256k.bin"])
def test_root_adds_nothing_behind_a_link_that_the_build_made(
    builder: build.Builder, tmp_path: pathlib.Path, way: str
) -> None:
    outside = pathlib.Path(builder.directory).parent / "outside"
    for name in ("bios-256k.bin", "qemu/bios-256k.bin"):
        (outside / name).parent.mkdir(exist_ok=True)
        (outside / name).write_text("the host's\n")
    target = outside / "bios-256k.bin" if way.endswith(".bin") else outside
    tree = make_tree(tmp_path / "tree")
    main = (tree / "configure").read_text()
    if way == "opt":  # all that the build installs goes there
        outside.chmod(0o777)
    place = "../stage/opt" if way == "opt" else f"../stage/opt/iommufd-host/qemu/current/{way}"
    evil = f'#!/bin/sh\nmkdir -p "$(dirname {place})" && ln -s {target} {place} || exit 1\n'
    (tree / "configure").write_text(main.replace("#!/bin/sh\n", evil, 1))
    one = job(builder, tree)
    state = finish(one)
    assert (outside / "bios-256k.bin").read_text() == (outside / "qemu/bios-256k.bin").read_text() == "the host's\n"
    if way.endswith(".bin"):
        assert state["error"] is None
        assert "link" not in artefact.read_manifest(builder.artefact(one.key))["files"][way]
    else:
        assert "the build installed a link on the way to" in state["error"]["message"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_build_gets_the_cache_and_nothing_behind_a_link(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build that had the cache before puts a link in place of a directory, just when root is in it."""
    (tmp_path / "ccache/0").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for name in ("ccache/0/passwd", "outside/passwd"):
        (tmp_path / name).touch()
    seen = []

    def meddling(real: t.Callable[..., None]) -> t.Callable[..., None]:
        def changed(path: str, *arguments: t.Any, **more: t.Any) -> None:
            if os.path.basename(path) == ".":
                seen.append(path)
                if len(seen) == 2:
                    (tmp_path / "ccache/0").rename(tmp_path / "ccache/1")
                    (tmp_path / "ccache/0").symlink_to(tmp_path / "outside")
            real(path, *arguments, **more)

        return changed

    for name in ("chown", "lchown"):
        monkeypatch.setattr(os, name, meddling(getattr(os, name)))
    user = types.SimpleNamespace(uid=sandbox.FIRST_UID, environment={"CCACHE_DIR": f"{tmp_path}/ccache"}, network=False)
    build._Run._prepare(t.cast(t.Any, types.SimpleNamespace(sandbox=user, work=str(tmp_path))))
    assert len(seen) == 2 and os.stat(tmp_path / "outside/passwd").st_uid == 0
    assert os.stat(tmp_path / "ccache/1/passwd").st_uid == sandbox.FIRST_UID


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_only_processes_of_the_build_itself_are_ended(builder: build.Builder) -> None:
    """The number of a build's user may be that of a service by now."""
    uid, key = sandbox.LAST_UID - 7, "0" * 32
    os.makedirs(f"{builder.work(key)}/build")
    pathlib.Path(builder.state_file(key)).write_text(json.dumps({"uid": uid}))
    sleeping = [
        subprocess.Popen(["sleep", "60"], cwd=place, user=uid, group=uid)
        for place in ("/", f"{builder.work(key)}/build")
    ]
    try:
        build._clear(builder, key)
        assert [one.poll() for one in sleeping] == [None, -signal.SIGKILL]
        assert os.listdir(builder.work(key)) == []
        sandbox.end_processes(uid)
        assert sleeping[0].wait(10) == -signal.SIGKILL
    finally:
        for one in sleeping:
            one.kill()
            one.wait()


def test_a_line_without_end_comes_in_pieces(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.Sandbox, "wrap", lambda self, argv: list(argv))
    lines: list[str] = []
    box = sandbox.Sandbox(str(tmp_path), sandbox.FIRST_UID, sandbox.Limits(1, 1 << 30), False, False)
    assert box.run(["sh", "-c", "echo one; head -c 300000 /dev/zero | tr '\\0' x"], str(tmp_path), lines.append) == 0
    assert lines[0] == "one" and sum(map(len, lines[1:])) == 300000 and max(map(len, lines)) <= 1 << 16


@needs_tools
def test_an_error_of_the_compiler(builder: build.Builder, tmp_path: pathlib.Path) -> None:
    one = job(builder, make_tarball(make_tree(tmp_path / "tree", code="int f(void) { return x; }"), tmp_path / "q.tar"))
    state = finish(one)
    assert state["phase"] == "compile"
    assert re.search(r"failed with status 1: one\.c:2:22: error: .x. undeclared", state["error"]["message"])
    assert len(state["error"]["log"]) < 10
    assert is_clean(one)
    assert "FAILED: one.o" in pathlib.Path(builder.log(one.key)).read_text()


@needs_tools
def test_a_binary_that_disagrees_is_an_error(builder: build.Builder, tmp_path: pathlib.Path) -> None:
    tree = make_tree(tmp_path / "tree")
    (tree / "main.c").write_text((tree / "main.c").read_text().replace("#ifdef CONFIG_IOMMUFD", "#if 0"))
    one = job(builder, tree, iommufd="enabled")
    state = finish(one)
    assert state["phase"] == "check" and "says that it does not have it" in state["error"]["message"]
    assert is_clean(one)


@needs_tools
def test_configure_that_disagrees_stops_before_compiling(builder: build.Builder, tmp_path: pathlib.Path) -> None:
    tree = make_tree(tmp_path / "tree")
    (tree / "configure").write_text((tree / "configure").read_text().replace("&& has=y", "&& :"))
    one = job(builder, tree, iommufd="enabled")
    state = finish(one)
    assert state["phase"] == "configure" and "'iommufd support: NO'" in state["error"]["message"]


@needs_tools
def test_the_build_is_confined(builder: build.Builder, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = make_tree(tmp_path / "tree")
    probe = (
        "#!/bin/sh\nid -u; id -G; cat /proc/self/status | grep -E '^(CapBnd|NoNewPrivs)'; nice; env | sort\n"
        "ls /sys/class/net; cat /proc/net/dev | wc -l; touch /root/x /var/tmp/x 2>&1; rm -f /var/tmp/x\n"
        "grep -E 'address space' /proc/self/limits; exit 1\n"
    )
    (tree / "configure").write_text(probe)
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "secret")
    one = job(builder, tree)
    finish(one)
    log = pathlib.Path(builder.log(one.key)).read_text()
    uid = int(log.split("\n$ ")[1].splitlines()[1])
    assert sandbox.FIRST_UID <= uid <= sandbox.LAST_UID
    assert f"{uid}\n{uid}\nCapBnd:\t{0:016x}\n" in log and "NoNewPrivs:\t1\n" in log
    assert "secret" not in log and "SOURCE_DATE_EPOCH=315532800" in log
    assert "touch: cannot touch '/root/x': Permission denied" in log
    if not Host().is_dir("/run/systemd/system"):
        assert str(2 << 30) in log


@needs_tools
def test_a_second_start_joins_the_first(builder: build.Builder, tmp_path: pathlib.Path) -> None:
    tree = make_tree(tmp_path / "tree")
    (tree / "configure").write_text((tree / "configure").read_text().replace("#!/bin/sh\n", "#!/bin/sh\nsleep 2\n", 1))
    one = job(builder, tree)
    assert build.start(one)
    assert build.is_running(builder, one.key) and builder.running() == [one.key]
    assert not build.start(one)
    assert wait_until(lambda: not build.is_running(builder, one.key), 60)
    assert builder.finished() == [one.key]


@needs_tools
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_was_killed_begins_anew(
    builder: build.Builder, tmp_path: pathlib.Path, number: signal.Signals
) -> None:
    tree = make_tree(tmp_path / "tree")
    flag = pathlib.Path(builder.directory).parent / "slow"
    flag.touch()
    slow = f"#!/bin/sh\ntest ! -e {flag} || sleep 60\n"
    (tree / "configure").write_text((tree / "configure").read_text().replace("#!/bin/sh\n", slow, 1))
    one = job(builder, tree)
    assert build.start(one)

    def in_configure() -> bool:
        state = build.read_state(builder, one.key)
        return state is not None and state["phase"] == "configure" and "sleep" in processes_of(state["uid"])

    assert wait_until(in_configure, 30)
    state = build.read_state(builder, one.key)
    assert state is not None
    os.kill(state["pid"], number)
    assert wait_until(lambda: not build.is_running(builder, one.key), 30)
    after = build.read_state(builder, one.key)
    assert after is not None
    if number == signal.SIGTERM:
        assert "ended by a signal 15" in after["error"]["message"]
        assert is_clean(one) and processes_of(state["uid"]) == ""
    else:
        assert not after["finished"] and not os.path.exists(builder.artefact(one.key))
    flag.unlink()
    assert finish(one)["error"] is None
    assert processes_of(state["uid"]) == ""


def processes_of(uid: int) -> str:
    """Names of a user's processes, without those that only wait to be collected."""
    answer = subprocess.run(["ps", "-o", "stat=,comm=", "-u", str(uid)], capture_output=True, text=True, check=False)
    lines = [line.split() for line in answer.stdout.splitlines()]
    return " ".join(name for state, name in lines if not state.startswith("Z"))


@needs_tools
def test_a_full_disk(builder: build.Builder, tmp_path: pathlib.Path) -> None:
    os.makedirs(builder.directory)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", builder.directory], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    tree = make_tree(tmp_path / "tree")
    (tree / "big").write_bytes(os.urandom(2 << 20))
    one = job(builder, make_tarball(tree, tmp_path / "q.tar.xz"))
    state = finish(one)
    assert state["phase"] == "unpack" and "No space left on device" in state["error"]["message"]
    assert is_clean(one)
    subprocess.run(["mount", "-o", "remount,size=64M", builder.directory], check=True)
    assert finish(one)["error"] is None


@needs_tools
def test_old_artefacts_go(builder: build.Builder, tmp_path: pathlib.Path) -> None:
    keys = []
    for number in range(3):
        tree = make_tree(tmp_path / f"tree{number}", code=f"int number = {number};")
        one = job(builder, tree, keep=2)
        assert finish(one)["error"] is None
        keys.append(one.key)
        os.utime(builder.artefact(one.key), (number + 1, number + 1))
    assert builder.finished() == [keys[2], keys[1]]


def test_the_key_changes_with_what_decides(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiler", lambda host: "gcc 14")
    first = build.decides(Host(), Request(), "sha256:1")
    assert first == json.loads(json.dumps(first))
    keys = {artefact.key_of(first)}
    keys.add(artefact.key_of(build.decides(Host(), Request(), "sha256:2")))
    keys.add(artefact.key_of(build.decides(Host(), Request(iommufd="enabled"), "sha256:1")))
    keys.add(artefact.key_of(build.decides(Host(), Request(features={"slirp": True}), "sha256:1")))
    (tmp_path / "p").write_text("1")
    keys.add(artefact.key_of(build.decides(Host(), Request(patches=(str(tmp_path / "p"),)), "sha256:1")))
    (tmp_path / "p").write_text("2")
    keys.add(artefact.key_of(build.decides(Host(), Request(patches=(str(tmp_path / "p"),)), "sha256:1")))
    monkeypatch.setattr(build, "compiler", lambda host: "gcc 15")
    keys.add(artefact.key_of(build.decides(Host(), Request(), "sha256:1")))
    assert len(keys) == 7


def test_which_meson_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    if Host().which("dpkg") is None:
        pytest.skip("compares versions by dpkg")
    said = "meson | 1.7.0-1~bpo12+1 | http://x bookworm-backports/main\n meson | 1.0.1-5 | http://x bookworm/main\n"

    class Apt(Host):
        def ask(self, argv: t.Sequence[str], timeout: float = 30.0, stdin: str = "") -> t.Any:
            if argv[0] == "apt-cache":
                return sandbox.Output(0, said, "")
            return super().ask(argv, timeout, stdin)

    installed: dict[str, Package] = {}
    monkeypatch.setattr(build, "read_packages", lambda host: installed)
    tarball = source.Fetched("", ("/q.tar",))

    def wanted(**traits: t.Any) -> list[str]:
        tree = source.Traits("10.0.0", False, True, **traits)
        return [
            name for name in build.needed_packages(Apt(), Request(), tarball, tree) if "meson" in name or "py" in name
        ]

    assert wanted(meson="1.5.0", pycotap=True) == ["python3-venv", "meson=1.7.0-1~bpo12+1", "python3-pycotap"]
    assert wanted(meson="1.0.0") == ["python3-venv", "meson=1.0.1-5"]
    assert wanted(meson="1.5.0", wheels=True) == ["python3-venv"]
    with pytest.raises(build.HostError, match=r"needs meson 2\.0 or later"):
        wanted(meson="2.0")
    installed["meson"] = Package("meson", "1.5.1-1", True, False, frozenset(), frozenset())
    assert wanted(meson="1.5.0") == ["python3-venv"]


def test_a_builder_without_the_tools_says_so(
    builder: build.Builder, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*arguments: t.Any) -> t.NoReturn:
        raise build.HostError("setpriv is not installed")

    monkeypatch.setattr(build, "make_sandbox", lacking)  # the job is forked from here, and so has it too
    state = finish(job(builder, make_tree(tmp_path / "tree")))
    assert state["error"]["message"] == "setpriv is not installed"
