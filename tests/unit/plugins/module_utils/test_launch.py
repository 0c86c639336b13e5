# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the launchers make of a guest: a command line, a unit's policy, a domain."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _launch_direct, _launch_libvirt, _launch_systemd
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._evidence import PassedDevice
from ansible_collections.iommufd.host.plugins.module_utils._guest_machine import guest_machine
from ansible_collections.iommufd.host.plugins.module_utils._launch import Plan
from ansible_collections.iommufd.host.plugins.module_utils._launch_libvirt import Log
from ansible_collections.iommufd.host.plugins.module_utils._launcher import PrivateNode, User
from ansible_collections.iommufd.host.tests.unit.conftest import shared_data
from ansible_collections.iommufd.host.tests.unit.machine import Machine
from ansible_collections.iommufd.host.tests.unit.relaxng import Schema

FIRST, SECOND = "0000:01:00.0", "0000:02:00.0"


def device(number: int, backend: str = "iommufd", name: str = "iommufd0", **more: t.Any) -> PassedDevice:
    return PassedDevice(
        address=f"0000:0{number + 1}:00.0",
        slot=f"0000:00:0{number + 2}.0",
        node=f"/dev/vfio/devices/vfio{number}",
        number=(511, number),
        vendor_id="0x1b36",
        device_id="0x0010",
        class_id="0x010802",
        backend=backend,
        object=name if backend == "iommufd" else "",
        group=12 + number,
        **more,
    )


def plan(machine: Machine, *devices: PassedDevice, **more: t.Any) -> Plan:
    given = devices or (device(0), device(1))
    fields: dict[str, t.Any] = {
        "host": machine.host,
        "name": "iommufd-verify-7",
        "machine": guest_machine("x86_64"),
        "qemu": "/usr/bin/qemu-system-x86_64",
        "memory": 256,
        "cpus": 1,
        "accelerator": "kvm",
        "user": User("nobody", 65534, 65534),
        "kernel": b"",
        "initramfs": b"",
        "devices": [one for one in given if not one.plugged],
        "objects": list(dict.fromkeys(one.object for one in given if one.object and not one.plugged)),
        "plugged": [one for one in given if one.plugged],
        "ports": (),
        "iommu": (10, 262),
        "memlock": None,
        "timeout": 60.0,
        **more,
    }
    return Plan(**fields)


# -- QEMU's arguments


def test_one_object_and_every_device_on_it(machine: Machine) -> None:
    words = plan(machine).device_arguments({"iommufd0": 22, FIRST: 23, SECOND: 24})
    assert words == (
        "-object", "iommufd,id=iommufd0,fd=22",
        "-device", "vfio-pci,id=dev0,fd=23,iommufd=iommufd0,bus=pcie.0,addr=0x2,rombar=0",
        "-device", "vfio-pci,id=dev1,fd=24,iommufd=iommufd0,bus=pcie.0,addr=0x3,rombar=0",
    )  # fmt: skip


def test_a_qemu_that_opens_the_nodes_gets_addresses(machine: Machine) -> None:
    words = plan(machine).device_arguments({})
    assert words[1] == "iommufd,id=iommufd0"
    assert words[3].startswith(f"vfio-pci,id=dev0,host={FIRST},iommufd=iommufd0,")


def test_two_objects_and_the_legacy_container(machine: Machine) -> None:
    both = plan(machine, device(0), device(1, "legacy"), device(2, name="second"))
    words = both.device_arguments({"iommufd0": 22, "second": 23, FIRST: 24, "0000:03:00.0": 25})
    assert [word for word in words if word.startswith("iommufd,")] == [
        "iommufd,id=iommufd0,fd=22",
        "iommufd,id=second,fd=23",
    ]
    assert f"vfio-pci,id=dev1,host={SECOND},bus=pcie.0,addr=0x3,rombar=0" in words


def test_only_the_legacy_container(machine: Machine) -> None:
    words = plan(machine, device(0, "legacy")).device_arguments({})
    assert words == ("-device", f"vfio-pci,id=dev0,host={FIRST},bus=pcie.0,addr=0x2,rombar=0")


# -- nodes


def test_private_nodes_are_those_of_the_legacy_container_alone(machine: Machine) -> None:
    machine.file("/sys/class/vfio/13/dev", "236:1\n")
    both = plan(machine, device(0), device(1, "legacy"))
    assert _launch_direct.private_nodes(machine.host, both) == [
        PrivateNode("/dev/vfio/vfio", (10, 196)),
        PrivateNode("/dev/vfio/13", (236, 1)),
    ]
    assert _launch_direct.private_nodes(machine.host, plan(machine)) == []


def test_a_kernel_without_groups(machine: Machine) -> None:
    with pytest.raises(HostError, match="no legacy container"):
        _launch_direct.private_nodes(machine.host, plan(machine, device(0, "legacy")))


def test_a_unit_lets_open_what_is_opened_in_it(machine: Machine) -> None:
    assert _launch_systemd.allowed_nodes(plan(machine)) == [
        "/dev/iommu", "/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1", "/dev/kvm",
    ]  # fmt: skip
    later = plan(machine, device(0, "legacy"), device(1, plugged=True), accelerator="tcg")
    # What is plugged in later is opened by us and passed over the monitor.
    assert _launch_systemd.allowed_nodes(later) == ["/dev/vfio/vfio", "/dev/vfio/12"]


@pytest.mark.parametrize(("running", "words"), [(False, "does not run systemd"), (True, "has no OpenFile=")])
def test_a_host_without_the_right_systemd(machine: Machine, running: bool, words: str) -> None:
    if running:
        machine.at("/run/systemd/system").mkdir(parents=True)
    assert words in _launch_systemd.problems(machine.host)[0]


# -- libvirt


@pytest.fixture(scope="module")
def schema() -> Schema:
    if not shared_data().is_dir():
        pytest.skip("libvirt's schemas are not there; set IOMMUFD_HOST_SHARED")
    return Schema(shared_data() / "libvirt-schema" / "domain.rng")


@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
@pytest.mark.parametrize("passed", [True, False])
def test_a_domain_is_valid(machine: Machine, schema: Schema, accelerator: str, passed: bool) -> None:
    made = plan(machine, device(0), device(1, "legacy"), accelerator=accelerator)
    assert schema.errors(_launch_libvirt.domain(made, "/run/x", "12.8.0", passed)) == []
    made.machine = guest_machine("aarch64")
    assert schema.errors(_launch_libvirt.domain(made, "/run/x", "12.8.0", passed)) == []


def test_a_domain_with_iommufd_says_so_and_one_that_opens_itself_does_not(machine: Machine) -> None:
    passing = _launch_libvirt.domain(plan(machine), "/run/x", "12.8.0", True)
    opening = _launch_libvirt.domain(plan(machine), "/run/x", "11.3.0", False)
    assert passing.count("iommufd='yes'") == 2
    assert "<hostdev" not in opening
    assert f"host={FIRST},iommufd=iommufd0" in opening
    assert "hard_limit" in opening and "hard_limit" not in passing
    several = plan(machine, device(0), device(1, name="second"), device(2, "legacy"))
    for made, spaces in ((plan(machine), 1), (several, 3)):
        text = _launch_libvirt.domain(made, "/run/x", "11.3.0", False)
        size = re.search(r"<hard_limit unit='MiB'>(\d+)<", text)
        assert size is not None and int(size[1]) >= spaces * made.memory + 1024, "memory is pinned for each space"


def test_a_unit_whose_qemu_opens_kvm_itself_has_a_node_of_its_own() -> None:
    assert _launch_systemd.private_kvm("iommufd-verify-7", User("nobody", 65534, 65533), os.makedev(10, 232)) == [
        "DeviceAllow=/dev/kvm rwm",
        'ExecStartPre=+/bin/sh -c "mknod -m 0600 /dev/iommufd-verify-7-kvm c 10 232 && '
        'chown 65534:65533 /dev/iommufd-verify-7-kvm"',
        "BindPaths=-/dev/iommufd-verify-7-kvm:/dev/kvm",
        "ExecStopPost=+/bin/rm -f /dev/iommufd-verify-7-kvm",
    ]


@pytest.mark.parametrize(("ended", "calls"), [(True, 1), (False, 8)])
def test_a_log_that_libvirt_writes_after_the_end_is_removed(tmp_path: pathlib.Path, ended: bool, calls: int) -> None:
    virsh, log = tmp_path / "virsh", tmp_path / "guest.log"
    virsh.write_text(
        f"#!/bin/sh\necho x >>{tmp_path}/calls\n[ $(wc -l <{tmp_path}/calls) = 3 ] && touch {log}\nexit 1\n"
    )
    virsh.chmod(0o755)
    # No test waits eight seconds for a shell.
    (tmp_path / "sleep").symlink_to("/bin/true")
    if ended:
        (tmp_path / "ended").touch()
    script = _launch_libvirt.mop_up("guest", str(tmp_path), str(virsh), str(tmp_path))
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["sh", "-c", script], check=False, env={"PATH": path}, capture_output=True)
    assert len((tmp_path / "calls").read_text().splitlines()) == calls
    assert not log.exists()
    assert not set(script) & set('"$%'), "it stands in a unit's setting, in double quotes"


def test_an_older_libvirt_has_no_iommufd(machine: Machine) -> None:
    with pytest.raises(OptionError, match=r"12\.1 or later"):
        _launch_libvirt.domain(plan(machine), "/run/x", "11.3.0", True)
    assert "<hostdev" in _launch_libvirt.domain(plan(machine, device(0, "legacy")), "/run/x", "11.3.0", True)


LOG = b"""\
2026-11-25 19:37:20.000+0000: starting up libvirt version: 12.8.0, package: 1, qemu version: 11.1.2
LC_ALL=C \\
/usr/bin/qemu-system-x86_64 \\
-name guest=x \\
-msg timestamp=on
char device redirected to /dev/pts/0
iommufd_backend_connect fd=31 owned=0 users=1
"""


def test_a_domains_log_is_what_qemu_said(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(LOG)
    log = Log(str(path), os.getpid())
    assert log.read() == b"char device redirected to /dev/pts/0\niommufd_backend_connect fd=31 owned=0 users=1\n"
    assert (log.read(), log.poll()) == (b"", None)
    with path.open("ab") as file:
        file.write(b"qemu: bye\n2026-11-25 19:37:42.6+0000: shutting down, reason=shutdown\n")
    assert (log.read(), log.poll()) == (b"qemu: bye\n", 0)
    log.close()


@pytest.mark.parametrize("reason", ["destroyed", "crashed", "failed"])
def test_another_end_than_a_shutdown_is_none(tmp_path: pathlib.Path, reason: str) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(LOG + f"2026-11-25 19:37:42.6+0000: shutting down, reason={reason}\n".encode())
    log = Log(str(path), os.getpid())
    log.read()
    assert log.poll() == 1
    log.close()
