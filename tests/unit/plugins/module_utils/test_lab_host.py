# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The life of hosts, with a stand-in for the emulator: a program that behaves like one from the outside."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._lab_host import Boot, Machine, end, free_port, start, wait
from ansible_collections.iommufd.host.plugins.module_utils._lab_spec import HostSpec, parse_host
from ansible_collections.iommufd.host.plugins.module_utils._lab_state import Lab

# What it does is in the file "behaviour" of the host's directory.
EMULATOR = """#!@PYTHON@
import json, os, re, socket, sys, time

behaviour = open("behaviour").read() if os.path.exists("behaviour") else ""
port = int(re.search(r"hostfwd=tcp:127.0.0.1:(\\d+)-", " ".join(sys.argv)).group(1))
if behaviour == "refuse":
    sys.exit("qemu-system-x86_64: -device nvme: it does not like that")
ssh = socket.create_server(("127.0.0.1", port))
monitor = socket.socket(socket.AF_UNIX)
monitor.bind("qmp.sock")
monitor.listen()
log = open("serial.log", "a")
print("[    0.0] Linux version", file=log, flush=True)
open("qemu.pid", "w").write(str(os.getpid()))
if behaviour == "panic":
    print("\\x1b[0;31m[    1.0] Kernel panic - not syncing: no init", file=log, flush=True)
if behaviour == "die":
    print("about to die", file=log, flush=True)
    sys.exit("qemu-system-x86_64: it died")
ssh.settimeout(0.02)
monitor.settimeout(0.02)
while True:
    try:
        peer = ssh.accept()[0]
        if behaviour not in ("silent", "panic"):
            peer.send(b"SSH-2.0-stand-in\\r\\n")
    except socket.timeout:
        pass
    try:
        peer = monitor.accept()[0]
    except socket.timeout:
        continue
    lines = peer.makefile("rw")
    print(json.dumps({"QMP": {}}), file=lines, flush=True)
    for line in lines:
        word = json.loads(line)["execute"]
        print(json.dumps({"event": "SOMETHING"}), file=lines)
        print(json.dumps({"return": {}}), file=lines, flush=True)
        if word == "system_powerdown" and behaviour != "deaf" or word == "quit" and behaviour != "hung":
            sys.exit()
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> t.Iterator[Lab]:
    tools = tmp_path / "bin"
    tools.mkdir()
    emulator = tools / "qemu-system-x86_64"
    emulator.write_text(EMULATOR.replace("@PYTHON@", sys.executable))
    emulator.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    (tmp_path / "image").write_text("")
    # A path that is too long for a socket, on purpose.
    made = Lab(tmp_path / ("a-lab-with-a-long-name-" * 5), Host())
    yield made
    end(made.machines(), 0)


def host(lab: Lab, name: str = "alpha", behaviour: str = "", **more: t.Any) -> HostSpec:
    """A host that exists: its directory, with what tells the stand-in what to do."""
    spec = parse_host({"name": name, "image": str(lab.directory.parent / "image"), "memory": 512, **more})
    directory = lab.machine(name).directory
    directory.mkdir(parents=True)
    (directory / "behaviour").write_text(behaviour)
    lab.machine(name).update_state({"name": name, "image": spec.image, "hardware": {}})
    return spec


def up(lab: Lab, *hosts: HostSpec, restart: bool = False, timeout: float = 20) -> list[str]:
    # In check mode a plan does not ask for the emulator's version; it is applied all the same.
    plan = lab.plan_up(hosts, restart, timeout, check_mode=True)
    plan.apply()
    return plan.summary()


def test_up_and_down(lab: Lab) -> None:
    hosts = [host(lab, "alpha", devices=[{"type": "nvme", "size": "1M"}]), host(lab, "beta")]
    assert up(lab, *hosts) == ["start alpha, beta"]
    reports = lab.reports([])
    assert [report["state"] for report in reports.values()] == ["started", "started"]
    assert reports["alpha"]["port"] != reports["beta"]["port"]
    disk = (lab.machine("alpha").directory / "nvme0.raw").read_bytes()
    assert disk.startswith(b"alpha nvme0\n") and len(disk) == 1 << 20

    assert up(lab, *hosts) == []

    path = lab.settle()
    assert path is not None
    inventory = json.loads(Path(path).read_text().removeprefix("---\n"))
    assert inventory["lab"]["hosts"]["beta"]["ansible_port"] == reports["beta"]["port"]

    plan = lab.plan_down([], 20)
    assert plan.summary() == ["shut down alpha, beta"]
    plan.apply()
    assert [machine.status() for machine in lab.machines()] == ["stopped", "stopped"]
    assert lab.plan_down([], 20).summary() == []

    plan = lab.plan_removal([])
    assert plan.summary() == ["remove host alpha", "remove host beta"]
    plan.apply()
    assert lab.settle() is None
    assert not lab.directory.exists()


def test_a_disk_keeps_what_was_written_to_it(lab: Lab) -> None:
    spec = host(lab, devices=[{"type": "nvme", "size": "1M"}])
    up(lab, spec)
    disk = lab.machine("alpha").directory / "nvme0.raw"
    disk.write_bytes(b"mine".ljust(1 << 20))
    assert up(lab, spec, restart=True) == ["shut down alpha", "start alpha"]
    assert disk.read_bytes().startswith(b"mine")


@pytest.mark.parametrize(
    ("behaviour", "says", "console"),
    [
        ("panic", "the boot failed (Kernel panic - not syncing)", "Kernel panic - not syncing: no init"),
        ("die", "the emulator ended during the boot", "about to die"),
        ("silent", "no answer by ssh within 1 s", "Linux version"),
    ],
)
def test_where_one_fails_no_emulator_is_left(lab: Lab, behaviour: str, says: str, console: str) -> None:
    good, bad = host(lab, "good"), host(lab, "bad", behaviour)
    with pytest.raises(HostError) as caught:
        up(lab, good, bad, timeout=1 if behaviour == "silent" else 20)
    assert f"host bad: {says}" in caught.value.message
    assert console in " ".join(caught.value.details["console"])
    assert console in lab.machine("bad").failure_log.read_text()
    assert [machine.status() for machine in lab.machines()] == ["stopped", "stopped"]


def test_the_emulators_refusal_is_quoted(lab: Lab) -> None:
    spec = host(lab, behaviour="refuse")
    with pytest.raises(HostError, match=r"the emulator refused to start: .*it does not like that"):
        up(lab, spec)
    assert lab.machine("alpha").status() == "stopped"


@pytest.mark.parametrize("behaviour", ["deaf", "hung"])
def test_a_host_that_does_not_shut_down_is_ended(lab: Lab, behaviour: str) -> None:
    # The hung one does not listen to "quit" either, and is killed.
    up(lab, host(lab, behaviour=behaviour))
    machine = lab.machine("alpha")
    assert end([machine], 1 if behaviour == "deaf" else 0) == {"alpha": "ended"}
    assert machine.status() == "stopped"


def test_a_port_in_use_is_named(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert free_port(port) != port
        with pytest.raises(HostError, match=rf"host alpha: port {port} of 127\.0\.0\.1 is in use"):
            up(lab, host(lab, port=port))


def test_a_strangers_process_is_not_ours(lab: Lab) -> None:
    host(lab)
    machine = lab.machine("alpha")
    with subprocess.Popen(["sleep", "60"]) as stranger:
        machine.update_state({"pid": stranger.pid, "uuid": "11111111-2222-3333-4444-555555555555", "port": 1})
        assert machine.status() == "stopped"
        machine.remove()
        assert stranger.poll() is None
        stranger.kill()


def test_a_host_that_another_run_started_is_waited_for(lab: Lab) -> None:
    spec = host(lab)
    boot = start(lab.machine("alpha"), spec, "tcg")
    try:
        lab.wait_for_running([spec], 20)
    finally:
        boot.kill()
    with pytest.raises(HostError, match="the emulator ended"):
        wait([Boot(Machine(lab.directory, "alpha"), None, boot.port)], 20)


def test_other_hardware_needs_a_restart(lab: Lab) -> None:
    spec = host(lab)
    up(lab, spec)
    other = parse_host({"name": "alpha", "image": spec.image, "memory": 1024, "devices": [{"type": "edu"}]})
    with pytest.raises(HostError, match=r"host alpha runs with other hardware than declared \(memory, devices\)"):
        up(lab, other)
    up(lab, other, restart=True)
    assert lab.reports([])["alpha"]["memory"] == 1024


def test_another_image_needs_another_host(lab: Lab) -> None:
    spec = host(lab)
    with pytest.raises(HostError, match="host alpha was made from another image"):
        up(lab, parse_host({"name": "alpha", "image": "/other"}))
    Path(spec.image).unlink()
    with pytest.raises(HostError, match=r"its image .*/image is gone"):
        up(lab, spec)


def test_a_host_without_an_image_is_not_made(lab: Lab) -> None:
    for image, says in (("", "no image is declared"), ("/nowhere", "its image /nowhere does not exist")):
        with pytest.raises(HostError, match=says):
            lab.plan_up([parse_host({"name": "alpha", "image": image})], False, 20, check_mode=False)


def test_a_plan_changes_nothing(lab: Lab) -> None:
    plan = lab.plan_up([parse_host({"name": "alpha", "image": "/nowhere"})], False, 20, check_mode=True)
    assert plan.summary() == ["create host alpha", "start alpha"]
    assert plan.diff()[0]["before"] == "alpha: absent\n"
    assert not lab.directory.exists()


def test_the_lock_does_not_outlive_the_lab(lab: Lab) -> None:
    lab.acquire()
    assert (lab.directory / ".lock").exists()
    assert lab.settle() is None
    assert not lab.directory.exists()
