# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filters about a guest's devices: their examples, and what they say where they refuse."""

from __future__ import annotations

import inspect
import json
import os
import pathlib
import subprocess
import sys
import typing as t

import pytest
import yaml
from ansible.errors import AnsibleFilterError

from ansible_collections.iommufd.host.plugins.filter import guest_units as units_file
from ansible_collections.iommufd.host.plugins.filter import libvirt_hostdev as hostdev_file
from ansible_collections.iommufd.host.plugins.filter import libvirt_iommufd as iommufd_file
from ansible_collections.iommufd.host.plugins.filter import qemu_args as args_file
from ansible_collections.iommufd.host.plugins.filter import vfio_backend as backend_file
from ansible_collections.iommufd.host.plugins.filter.guest_units import guest_units
from ansible_collections.iommufd.host.plugins.filter.libvirt_hostdev import libvirt_hostdev
from ansible_collections.iommufd.host.plugins.filter.libvirt_iommufd import libvirt_iommufd
from ansible_collections.iommufd.host.plugins.filter.qemu_args import qemu_args
from ansible_collections.iommufd.host.plugins.filter.vfio_backend import vfio_backend
from ansible_collections.iommufd.host.plugins.module_utils._survey import survey
from ansible_collections.iommufd.host.tests.unit.machine import Machine

DOMAIN = """<domain type='kvm'>
  <name>web1</name>
  <devices>
    <hostdev mode='subsystem' type='pci' managed='yes'>
      <source>
        <address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>
      </source>
    </hostdev>
  </devices>
</domain>
"""

FILES = [backend_file, args_file, hostdev_file, iommufd_file, units_file]


def able(**more: t.Any) -> dict[str, t.Any]:
    """A survey of a host that has all it takes."""
    return {
        "kernel": {"architecture": "x86_64", "release": "7.2.13"},
        "qemu": [{"path": "/usr/bin/qemu", "version": "11.1.3", "iommufd": True, "passing": True}],
        "libvirt": {"version": "12.8.0", "can_pass_iommufd": True},
        "checks": [{"id": name, "status": "ok", "detail": ""} for name in ("kernel.iommufd", "kernel.cdev")],
        **more,
    }


def test_a_survey_and_devices_give_a_backend() -> None:
    found = vfio_backend(able(), ["01:00.0"])
    assert (found["backend"], found["mixed"], found["opened_by"]) == ("iommufd", False, "launcher")
    assert found["devices"][0]["name"] == "0000:01:00.0"
    several = vfio_backend(able(), ["01:00.0", "02:00.0"], peer_to_peer={"works": False, "detail": "refused"})
    assert several["backend"] == "legacy"
    assert "(refused)" in several["reason"]
    assert qemu_args(["01:00.0", "02:00.0"], several["backend"]) == [
        "-device", "vfio-pci,id=vfio0,host=0000:01:00.0", "-device", "vfio-pci,id=vfio1,host=0000:02:00.0",
    ]  # fmt: skip


def test_a_measurement_on_the_host_decides() -> None:
    evidence = {"kernel": "7.2.13", "qemu": {"version": "11.1.3"}, "peer_to_peer": {"works": True, "detail": "mapped"}}
    assert vfio_backend(able(), ["01:00.0", "02:00.0"], peer_to_peer=evidence)["backend"] == "iommufd"
    old = {**evidence, "kernel": "6.12.95"}
    assert "Linux 6.12.95" in vfio_backend(able(), ["01:00.0", "02:00.0"], peer_to_peer=old)["reason"]


def test_a_domain_moves_or_says_why_not() -> None:
    moved = libvirt_iommufd(DOMAIN, able())
    assert moved["changed"]
    assert moved["xml"] == DOMAIN.replace("      <source>", "      <driver name='vfio' iommufd='yes'/>\n      <source>")
    old = libvirt_iommufd(DOMAIN, able(), version="11.3.0-3")
    assert (old["changed"], old["xml"]) == (False, DOMAIN)
    assert old["reason"].startswith("libvirt 11.3.0-3 has no iommufd")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: vfio_backend([], ["01:00.0"]), "vfio_backend takes what iommufd.host.iommufd_info returned, not list"),
        (lambda: vfio_backend({"failed": True, "msg": "ssh timed out"}, ["01:00.0"]), "ssh timed out"),
        (lambda: vfio_backend(able(), ["x"]), r"^vfio_backend: devices\[0\]: 'x' is not accepted"),
        (lambda: vfio_backend(able(), ["01:00.0"], "vfio"), "^vfio_backend: backend: 'vfio' .*legacy, iommufd, auto"),
        (lambda: qemu_args("01:00.0"), "^qemu_args: devices: '01:00.0' is not accepted"),
        (lambda: qemu_args(["01:00.0"], iommufd_fd=3), r"^qemu_args: devices\[0\]\.fd: "),
        (lambda: libvirt_hostdev(["01:00.0"], "11.3.0"), "^libvirt_hostdev: version: '11.3.0' .*12.1 or later"),
        (lambda: libvirt_hostdev(["01:00.0"]), "^libvirt_hostdev: version: None"),
        (lambda: libvirt_iommufd("<x/>", able()), "^libvirt_iommufd: domain: '<x/>' .*virsh dumpxml"),
        (lambda: libvirt_iommufd(DOMAIN, able(), version="x"), "^libvirt_iommufd: version: 'x'"),
        (lambda: libvirt_iommufd(DOMAIN, able(), backends=["a"]), "^libvirt_iommufd: backends: "),
        (lambda: libvirt_iommufd(DOMAIN, None), "libvirt_iommufd takes what iommufd.host.iommufd_info returned"),
        (lambda: guest_units([{"name": "a"}]), r"^guest_units: guests\[0\]\.user: None"),
    ],
)
def test_refusals_name_filter_option_and_what_is_accepted(call: t.Callable[[], t.Any], words: str) -> None:
    with pytest.raises(AnsibleFilterError, match=words):
        call()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__.split(".")[-1])
def test_arguments_are_as_documented(file: t.Any) -> None:
    documented = yaml.safe_load(file.DOCUMENTATION)
    name = documented["name"]
    parameters = inspect.signature(getattr(file, name)).parameters
    listed = documented["options"]
    assert list(file.FilterModule().filters()) == [name]
    assert list(parameters)[1:] == [key for key in listed if key != "_input"]
    for key, parameter in list(parameters.items())[1:]:
        default = listed[key].get("default")
        if key == "backends":
            assert (parameter.default, default) == (None, {})
        elif listed[key].get("required"):
            assert parameter.default is parameter.empty
        else:
            assert parameter.default == default, key


def test_the_examples_run(machine: Machine, tmp_path: pathlib.Path) -> None:
    machine.pci("0000:01:00.0", driver="vfio-pci", group=1)
    machine.pci("0000:02:00.0", driver="vfio-pci", group=2)
    plays = []
    for file in FILES:
        tasks = yaml.safe_load(file.EXAMPLES)
        for task in tasks:
            if "iommufd.host.iommufd_info" in task:
                task["iommufd.host.iommufd_info"] = {"root": str(machine.root)}
        plays.append(
            {
                "hosts": "localhost",
                "gather_facts": False,
                "vars": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable},
                "tasks": tasks,
            }
        )
    playbook = tmp_path / "examples.yml"
    playbook.write_text(json.dumps(plays))
    (tmp_path / "virsh").write_text(f"#!/bin/sh\ncat <<'END'\n{DOMAIN}END\n")
    (tmp_path / "virsh").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["ansible-playbook", str(playbook)], capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout
    shown = [json.JSONDecoder().raw_decode(text)[0]["msg"] for text in done.stdout.split("=> ")[1:] if text[0] == "{"]
    devices = ["0000:01:00.0", "0000:02:00.0"]
    chosen = vfio_backend(survey(machine.host), devices, launcher="self")
    assert shown[0] == f"{chosen['backend']}, for {chosen['reason']}"
    assert shown[1] == qemu_args(devices)
    assert shown[2] == " ".join(qemu_args(devices, first_fd=3))
    assert shown[3][-1] == "vfio-pci,id=vfio1,host=0000:02:00.0,iommufd=iommufd1"
    assert shown[4].count("<hostdev ") == 2
    assert shown[5] == libvirt_iommufd(DOMAIN, survey(machine.host))["reason"]
    assert shown[6][0][1] == r"/dev/vfio/by-path/pci-0000\x3a01\x3a00.0:vfio0"
    assert len(shown) == 7
