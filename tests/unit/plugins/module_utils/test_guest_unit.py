# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pathlib
import shlex
import shutil
import socket
import subprocess
import sys
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._guest_unit import (
    Defaults,
    device_unit,
    open_file,
    quote,
    units,
)

GUEST: dict[str, t.Any] = {"name": "web1", "memory": "4G", "devices": ["0000:01:00.0", "0000:02:00.0"], "user": "web1"}


def one(**more: t.Any) -> dict[str, t.Any]:
    (found,) = units("guests", [{**GUEST, **more}], Defaults())
    return found


def test_a_guest() -> None:
    found = one(cpus=2)
    assert found["unit"] == "iommufd-guest-web1.service"
    assert found["open_files"] == [
        "/dev/iommu:iommufd0",
        r"/dev/vfio/by-path/pci-0000\x3a01\x3a00.0:vfio0",
        r"/dev/vfio/by-path/pci-0000\x3a02\x3a00.0:vfio1",
        "/dev/kvm:kvm",
    ]
    assert found["device_allow"] == [
        "/dev/iommu rw",
        "/dev/vfio/by-path/pci-0000:01:00.0 rw",
        "/dev/vfio/by-path/pci-0000:02:00.0 rw",
        "/dev/kvm rw",
    ]
    words = found["arguments"]
    for pair in (
        ("-object", "iommufd,id=iommufd0,fd=3"),
        ("-device", "vfio-pci,id=vfio0,fd=4,iommufd=iommufd0"),
        ("-device", "vfio-pci,id=vfio1,fd=5,iommufd=iommufd0"),
        ("-add-fd", "fd=6,set=1"),
        ("-accel", "kvm,device=/dev/fdset/1"),
        ("-m", "4096M"),
        ("-smp", "2"),
        ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
    ):
        assert any(pair == (words[at], words[at + 1]) for at in range(len(words) - 1)), pair


def test_the_numbers_on_the_command_line_are_those_of_the_lines() -> None:
    """systemd numbers from 3 in the order of the lines; each number in use is named exactly once, with what it is."""
    found = one(devices=[f"0000:{bus:02x}:00.0" for bus in range(1, 9)])
    assert [entry["number"] for entry in found["descriptors"]] == list(range(3, 3 + len(found["open_files"])))
    for entry, line in zip(found["descriptors"], found["open_files"]):
        path, _colon, name = line.rpartition(":")
        assert (path.replace(r"\x3a", ":"), name) == (entry["path"], entry["name"])
        users = [word for word in found["arguments"] if f"fd={entry['number']}" in word.split(",")]
        assert len(users) == 1
        assert entry["name"] == "kvm" or f"id={entry['name']}" in users[0].split(",")


def test_without_kvm() -> None:
    found = one(accelerator="tcg")
    assert not any("kvm" in word for word in [*found["arguments"], *found["open_files"], *found["device_allow"]])
    assert "max" in found["arguments"]


def test_pinned_memory_is_counted_for_all_guests_of_a_user() -> None:
    guests = [
        {**GUEST, "name": "a", "devices": ["01:00.0"], "user": None},
        {**GUEST, "name": "b", "devices": ["02:00.0"], "user": None, "memory": "8G"},
        {**GUEST, "name": "c", "devices": ["03:00.0"], "user": "other"},
        {**GUEST, "name": "d", "devices": ["04:00.0"], "user": None},
    ]
    found = {entry["name"]: entry for entry in units("guests", guests, Defaults(user="all"))}
    gib = 1 << 30
    assert {name: int(entry["memlock"]) for name, entry in found.items()} == {
        "a": 19 * gib, "b": 19 * gib, "c": 5 * gib, "d": 19 * gib,
    }  # fmt: skip
    assert "2 x (4 GiB + 1 GiB)" in found["a"]["memlock_reason"]
    assert found["c"]["user"] == "other"


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("-device", "-device"),
        ("vfio-pci,id=a,fd=4", "vfio-pci,id=a,fd=4"),
        ("100%", "100%%"),
        ("a b", '"a b"'),
        ('say "x"', '"say \\"x\\""'),
        ("$HOME", '"$$HOME"'),
        ("a\\b", '"a\\\\b"'),
        (";", '";"'),
        ("", '""'),
        ("it's", '"it\'s"'),
    ],
)
def test_words_reach_the_program_as_they_are(word: str, quoted: str) -> None:
    assert quote(word) == quoted


def test_names_of_device_units() -> None:
    path = "/dev/vfio/by-path/pci-0000:02:00.0"
    assert device_unit(path) == r"dev-vfio-by\x2dpath-pci\x2d0000:02:00.0.device"
    if shutil.which("systemd-escape") is not None:
        for name in (path, "/dev/a b/ü.x", "/dev/iommu"):
            said = subprocess.run(
                ["systemd-escape", "--path", "--suffix=device", name], capture_output=True, text=True, check=True
            ).stdout
            assert device_unit(name) == said.strip()


def test_a_guest_of_an_arm_host_opens_kvm_itself_and_is_in_its_group() -> None:
    (found,) = units("guests", [GUEST], Defaults(architecture="aarch64"))
    words = " ".join(found["arguments"])
    assert words.startswith("/usr/bin/qemu-system-aarch64 ")
    assert " -machine virt,gic-version=host -accel kvm -cpu host " in words
    assert found["supplementary_groups"] == ["kvm"] and not one()["supplementary_groups"]
    assert not [file for file in found["open_files"] if "/dev/kvm" in file] and "/dev/kvm rw" in found["device_allow"]
    with pytest.raises(OptionError, match=r"architecture: 's390x'.*x86_64, aarch64"):
        units("guests", [GUEST], Defaults(architecture="s390x"))


def test_an_open_file_with_a_specifier() -> None:
    assert open_file("/dev/a%b:c", "x") == r"/dev/a%%b\x3ac:x"


@pytest.mark.parametrize(
    ("change", "option", "words"),
    [
        ({"name": "../x"}, r"\.name: ", "letters"),
        ({"name": None}, r"\.name: None", "letters"),
        ({"user": None}, r"\.user: None", "an unprivileged user"),
        ({"user": "root"}, r"\.user: 'root'", "no privilege"),
        ({"user": "0"}, r"\.user: '0'", "an unprivileged user"),
        ({"group": "a b"}, r"\.group: ", "a group"),
        ({"memory": None}, r"\.memory: None", "such as 4G"),
        ({"memory": "1K"}, r"\.memory: '1K'", "MiB"),
        ({"cpus": 0}, r"\.cpus: 0", "1 to 4096"),
        ({"stop_timeout": 0}, r"\.stop_timeout: 0", "1 to 86400"),
        ({"cpus": True}, r"\.cpus: True", "1 to 4096"),
        ({"qemu": "qemu"}, r"\.qemu: ", "absolute path"),
        ({"machine": "q35 x"}, r"\.machine: ", "machine type"),
        ({"accelerator": "hvf"}, r"\.accelerator: ", "kvm, tcg"),
        ({"devices": []}, r"\.devices: ", "a list of devices"),
        ({"devices": ["83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"]}, r"\.devices\[0\]\.kind: 'mdev'", "stable name"),
        ({"devices": [{"address": "01:00.0", "backend": "legacy"}]}, r"\.devices\[0\]\.backend: ", "can be passed"),
        ({"devices": [{"address": "01:00.0", "fd": 9}]}, "first_fd: 3", "by hand"),
        ({"arguments": "-x"}, r"\.arguments: ", "a list of texts"),
        ({"arguments": ["a\nExecStartPre=/bin/sh"]}, r"\.arguments\[0\]: ", "control"),
        ({"arguments": [None]}, r"\.arguments\[0\]: ", "a list of texts"),
        ({"device_allow": ["/etc/shadow"]}, r"\.device_allow\[0\]: ", "below /dev"),
        ({"device_allow": ["char-misc"]}, r"\.device_allow\[0\]: ", "every misc device"),
        ({"device_allow": "/dev/net/tun"}, r"\.device_allow: ", "a list"),
        ({"enabled": "maybe"}, r"\.enabled: ", "true or false"),
        ({"disk": "x"}, r"\.disk: ", "no such key"),
    ],
)
def test_what_is_no_guest(change: dict[str, t.Any], option: str, words: str) -> None:
    with pytest.raises(OptionError, match=f"^(guests\\[0\\])?{option}") as error:
        one(**change)
    assert words in error.value.message


@pytest.mark.parametrize(
    ("guests", "option", "words"),
    [
        ("web1", "guests: ", "a list of guests"),
        (["web1"], r"guests\[0\]: ", "a dictionary"),
        ([GUEST, {**GUEST, "devices": ["03:00.0"]}], r"guests\[1\]: 'web1'", "a name that no other guest has"),
        ([GUEST, {**GUEST, "name": "b"}], r"guests\[1\]: '0000:01:00.0'", "a device that no other guest has"),
    ],
)
def test_what_is_no_list_of_guests(guests: t.Any, option: str, words: str) -> None:
    with pytest.raises(OptionError, match=f"^{option}") as error:
        units("guests", guests, Defaults())
    assert words in error.value.message


def test_further_arguments_and_nodes() -> None:
    found = one(arguments=["-nic", "tap,fd=9", 5], device_allow=["/dev/net/tun", "char-pts", "/dev/kvm"])
    assert found["arguments"][-3:] == ["-nic", "tap,fd=9", "5"]
    assert found["device_allow"][-2:] == ["/dev/net/tun rw", "char-pts rw"]
    assert found["device_allow"].count("/dev/kvm rw") == 1


def test_stopping_presses_the_power_button_and_waits_for_qemu(tmp_path: pathlib.Path) -> None:
    found = one()
    program, *words = shlex.split(" ".join(found["exec_stop"]))
    assert (program, words[0], words[2]) == ("/usr/bin/python3", "-c", "/run/iommufd-guest-web1/qmp.sock")
    path = str(tmp_path / "qmp.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        server.settimeout(60)
        stopping = subprocess.Popen([sys.executable, "-c", words[1], path])
        try:
            monitor, _peer = server.accept()
            with monitor:
                monitor.settimeout(60)
                monitor.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
                said = b""
                while said.count(b"}") < 2:
                    said += monitor.recv(4096)
                monitor.sendall(b'{"return": {}}\r\n{"return": {}}\r\n')
                assert said == b'{"execute": "qmp_capabilities"}{"execute": "system_powerdown"}'
                assert stopping.poll() is None, "it waits for QEMU's end"
            assert stopping.wait(60) == 0
        finally:
            stopping.kill()
            stopping.wait()
    # QEMU is gone already: that is no failure of the unit, whose line begins with a dash.
    assert subprocess.run([sys.executable, "-c", words[1], path], capture_output=True, check=False).returncode == 1
