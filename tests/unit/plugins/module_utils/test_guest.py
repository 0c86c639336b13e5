# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
import platform
import types
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _guest, _guest_image, _guest_run
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._guest import Request
from ansible_collections.iommufd.host.plugins.module_utils._guest_machine import guest_machine
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._qemu import Qemu
from ansible_collections.iommufd.host.tests.unit.machine import Machine

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="a PC's guest is asked for")

NVME = "0000:01:00.0"
NIC = "0000:02:00.0"
RELEASE = os.uname().release


@pytest.fixture
def ready_machine(machine: Machine) -> Machine:
    """A machine on which nothing but the programs stands in the way (a tree has none that could be asked)."""
    machine.pci(NVME, "1b36:0010", "010802", driver="vfio-pci", group=12)
    machine.pci(NIC, "8086:10d3", "020000", driver="vfio-pci", group=13)
    machine.cdev(NVME, 0, "511:0")
    machine.cdev(NIC, 1, "511:1")
    for node in ("/dev/iommu", "/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1"):
        machine.file(node, "")
    machine.file("/sys/class/misc/iommu/dev", "10:262\n")
    machine.file("/proc/meminfo", "MemTotal:  4000000 kB\nMemAvailable:    2500000 kB\n")
    machine.file("/proc/cpuinfo", "flags\t\t: fpu vme\n")
    machine.file(f"/boot/vmlinuz-{RELEASE}", "kernel")
    return machine


def problems(machine: Machine, *devices: str, **options: t.Any) -> list[str]:
    """What stands in the way, the programs left out."""
    with pytest.raises(HostError) as caught:
        _guest.prepare(machine.host, Request(devices=devices or (NVME, NIC), **options))
    found = caught.value.details["problems"]
    assert caught.value.details["step"] == "prepare"
    assert all(problem in caught.value.message for problem in found)
    return [problem for problem in found if not problem.startswith(("QEMU is not", "busybox is not"))]


def test_nothing_else_stands_in_the_way(ready_machine: Machine) -> None:
    assert problems(ready_machine) == []


@pytest.mark.parametrize(
    ("architecture", "version", "old"),
    [
        ("aarch64", "9.0.4", True),
        ("aarch64", "9.1.0", False),
        ("aarch64", "10.0.13", False),
        ("x86_64", "9.0.4", False),
    ],
)
def test_a_qemu_without_the_machine_that_the_guest_needs(architecture: str, version: str, old: bool) -> None:
    found = _guest._too_old(guest_machine(architecture), Qemu("/usr/bin/qemu", "/usr/bin/qemu", version))
    assert found == ([f"/usr/bin/qemu is {version}: on aarch64 the guest needs QEMU 9.1 or later."] if old else [])


def test_missing_programs_are_named_with_the_package(ready_machine: Machine) -> None:
    with pytest.raises(
        HostError, match=r"^2 things .*\(1\) QEMU.*apt install qemu-system-x86.*\(2\) busybox.*busybox-static"
    ):
        _guest.prepare(ready_machine.host, Request(devices=(NVME,)))


def test_missing_programs_are_an_error_while_the_rest_is_pending(machine: Machine) -> None:
    machine.pci(NVME, "1b36:0010", "010802", driver="nvme")
    with pytest.raises(HostError) as caught:
        _guest.prepare(machine.host, Request(devices=(NVME,), qemu="/opt/q", busybox="/opt/b", pending=True))
    assert [problem.split(" ")[0] for problem in caught.value.details["problems"]] == ["QEMU", "/opt/b"]
    assert "/opt/q" in caught.value.message


def test_a_qemu_that_is_still_to_come_is_not_judged(machine: Machine) -> None:
    machine.pci(NVME, "1b36:0010", "010802", driver="nvme")
    with pytest.raises(HostError) as caught:
        _guest.prepare(
            machine.host,
            Request(devices=(NVME,), qemu="/opt/q", busybox="/opt/b", pending=True, qemu_pending=True),
        )
    assert [problem.split(" ")[0] for problem in caught.value.details["problems"]] == ["/opt/b"]


@pytest.mark.parametrize(
    ("config", "modules", "words"),
    [
        ("# CONFIG_IOMMUFD is not set\n", "", "built without iommufd"),
        ("# CONFIG_IOMMUFD is not set\n", "updates/dkms/iommufd.ko.xz: kernel/x.ko\n", "modprobe iommufd"),
        ("CONFIG_IOMMUFD=m\n", "kernel/drivers/iommu/iommufd/iommufd.ko: \n", "modprobe iommufd"),
        ("", "", "no module iommufd"),
    ],
)
def test_no_iommufd(ready_machine: Machine, config: str, modules: str, words: str) -> None:
    ready_machine.at("/sys/class/misc/iommu/dev").unlink()
    ready_machine.file(f"/boot/config-{RELEASE}", config)
    ready_machine.file(f"/lib/modules/{RELEASE}/modules.dep", modules)
    (problem,) = problems(ready_machine)
    assert problem.startswith("There is no /dev/iommu")
    assert words in problem


def test_no_node(ready_machine: Machine) -> None:
    ready_machine.at("/dev/iommu").unlink()
    (problem,) = problems(ready_machine)
    assert "no node /dev/iommu" in problem


@pytest.mark.parametrize(("driver", "words"), [("nvme", "driven by nvme"), (None, "without a driver")])
def test_not_on_vfio(machine: Machine, ready_machine: Machine, driver: str | None, words: str) -> None:
    machine.pci("0000:03:00.0", driver=driver, group=14)
    (problem,) = problems(machine, "0000:03:00.0")
    assert words in problem
    assert "vfio_bind" in problem


def test_iommu_off(machine: Machine, ready_machine: Machine) -> None:
    machine.pci("0000:03:00.0", driver="vfio-pci")
    (problem,) = problems(machine, "0000:03:00.0")
    assert "IOMMU is off" in problem


def test_a_directory_is_no_character_device(machine: Machine, ready_machine: Machine) -> None:
    machine.pci("0000:03:00.0", driver="vfio-pci", group=14)
    machine.cdev("0000:03:00.0", 5)
    (problem,) = problems(machine, "0000:03:00.0")
    assert "CONFIG_VFIO_DEVICE_CDEV" in problem


def test_group_with_a_host_driver(machine: Machine, ready_machine: Machine) -> None:
    machine.pci("0000:01:00.1", driver="snd_hda_intel", group=12)
    machine.pci("0000:01:00.2", driver="pcieport", class_id="060400", group=12)
    machine.pci("0000:01:00.3", group=12)
    (problem,) = problems(machine)
    assert "0000:01:00.1 (snd_hda_intel)" in problem
    assert "0000:01:00.2" not in problem
    assert "0000:01:00.3" not in problem


@pytest.mark.parametrize("node", ["/dev/vfio/devices/vfio1", "/dev/vfio/13"])
def test_held_by_another_process(ready_machine: Machine, node: str) -> None:
    ready_machine.process(4711, "qemu-system-x86", ["qemu"], ["/dev/null", node])
    (problem,) = problems(ready_machine)
    assert problem == f"{NIC} is in use: process 4711 (qemu-system-x86) holds {node}. End that guest first."
    assert problems(ready_machine, NVME) == []


def test_memory_short(ready_machine: Machine) -> None:
    (problem,) = problems(ready_machine, memory=4096)
    assert "4096 MiB of its own" in problem
    assert "2441 MiB available" in problem


def test_kernel_image_missing(ready_machine: Machine) -> None:
    ready_machine.at(f"/boot/vmlinuz-{RELEASE}").unlink()
    assert f"vmlinuz-{RELEASE}" in problems(ready_machine)[0]
    assert problems(ready_machine, kernel="/boot/other") == ["There is no kernel image /boot/other."]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": (NVME,) * 30}, "devices: .*1 to 29"),
        ({"memory": 64}, "memory: 64 .*128 MiB"),
        ({"cpus": 0}, "cpus: 0 "),
        ({"timeout": 1}, "timeout: 1 "),
        ({"arp_target": "192.0.2.256"}, r"arp_target: '192\.0\.2\.256' .*an address of IPv4"),
        ({"user": "no-such-user"}, "user: 'no-such-user'"),
        ({"user": "root"}, "user: 'root'"),
        ({"accelerator": "kvm"}, "accelerator: 'kvm'.*neither vmx nor svm"),
    ],
)
def test_bad_options(ready_machine: Machine, options: dict[str, t.Any], words: str) -> None:
    # Also while other things are pending: an option does not get better by itself.
    for pending in (False, True):
        with pytest.raises(OptionError, match=words):
            _guest.prepare(ready_machine.host, Request(**{"devices": (NVME,), "pending": pending, **options}))


def test_what_the_system_refuses_names_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def go() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/iommufd-verify-7/kernel")

    words = types.SimpleNamespace(distinct=list)
    run = types.SimpleNamespace(go=go, step="start", arguments=[], words=words, console_lines=list)
    monkeypatch.setattr(_guest, "Run", lambda *_arguments: run)
    ready: t.Any = types.SimpleNamespace(backends=dict)
    with pytest.raises(HostError, match=r"could not be run: /run/iommufd-verify-7/kernel: No space left") as caught:
        _guest._run(Host(), ready)
    assert (caught.value.details["step"], caught.value.details["verified"]) == ("start", False)


def test_without_devices_there_is_no_guest_unless_they_are_still_to_come(ready_machine: Machine) -> None:
    with pytest.raises(OptionError, match="1 to 29"):
        _guest.prepare(ready_machine.host, Request(devices=()))
    with pytest.raises(HostError, match="QEMU is not installed"):
        _guest.prepare(ready_machine.host, Request(devices=(), pending=True))


# -- the backend


@pytest.fixture
def capable(ready_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine on which a guest could be started; a QEMU cannot be asked in a tree."""
    binary = Qemu(path="/usr/bin/qemu", target="/usr/bin/qemu", version="11.1.2", iommufd=True, passing=True)
    monkeypatch.setattr(_guest, "read_qemu", lambda _host, _path: binary)
    monkeypatch.setattr(_guest_image, "find_busybox", lambda _host, _wanted: "/bin/busybox")
    ready_machine.file("/usr/bin/qemu-system-x86_64", "x")
    ready_machine.at("/usr/bin/qemu-system-x86_64").chmod(0o755)
    for group in (12, 13):
        ready_machine.file(f"/sys/class/vfio/{group}/dev", f"236:{group}\n")
    return ready_machine


def prepared(machine: Machine, *devices: str, **options: t.Any) -> _guest.Ready:
    return _guest.prepare(machine.host, Request(devices=devices or (NVME, NIC), **options))


def test_several_devices_wait_for_a_measurement(capable: Machine) -> None:
    ready = prepared(capable, backend="auto")
    assert ready.decision is not None
    assert ready.decision.backend == "legacy"
    assert "it was not measured" in ready.decision.reason
    # The first guest is the measurement.
    assert set(ready.backends().values()) == {"iommufd"}
    assert "on the backend that is chosen then" in ready.sentence()


@pytest.mark.parametrize(("works", "backend"), [(True, "iommufd"), (False, "legacy")])
def test_what_was_measured_decides(
    capable: Machine, monkeypatch: pytest.MonkeyPatch, works: bool, backend: str
) -> None:
    measured = {"works": works, "detail": "seen", "kernel": RELEASE, "qemu": "11.1.2"}
    monkeypatch.setattr(_guest._peer_to_peer, "read", lambda *_words: measured)
    ready = prepared(capable, backend="auto")
    assert ready.trial is None
    assert set(ready.backends().values()) == {backend}
    assert "seen" in (ready.decision.reason if ready.decision else "")
    # A single device does without, unless others are to come.
    assert prepared(capable, NVME, backend="auto").backends() == {NVME: "iommufd"}
    assert prepared(capable, NVME, backend="auto", hot_plug=True).backends() == {NVME: backend}
    assert prepared(capable, NVME, backend="auto", plugged=(NIC,)).backends() == {NVME: backend, NIC: backend}


def test_without_iommufd_auto_is_legacy_and_says_why(capable: Machine) -> None:
    capable.at("/sys/class/misc/iommu/dev").unlink()
    ready = prepared(capable, NVME, backend="auto")
    assert ready.backends() == {NVME: "legacy"}
    assert "has no iommufd" in (ready.decision.reason if ready.decision else "")


def test_a_device_can_say_what_it_wants(capable: Machine) -> None:
    ready = prepared(capable, backends={NIC: "legacy"})
    assert ready.backends() == {NVME: "iommufd", NIC: "legacy"}
    assert ready.decision is not None
    assert ready.decision.mixed


def test_a_kernel_without_groups_has_no_legacy_container(capable: Machine) -> None:
    capable.at("/sys/class/vfio/12/dev").unlink()
    capable.at("/sys/class/vfio/12").rmdir()
    with pytest.raises(OptionError, match=r"backend: 'legacy' is not accepted.*without vfio groups"):
        prepared(capable, backend="legacy")


def test_a_backend_that_is_still_to_be_chosen_is_checked_as_iommufd(capable: Machine) -> None:
    ready = prepared(capable, backend="auto", pending=True)
    assert ready.decision is None
    assert "on the backend that is chosen then" in ready.sentence()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "with 0000:01:00.0, 0000:02:00.0 on one /dev/iommu descriptor, with QEMU as nobody"),
        ({"launcher": "self"}, "on one /dev/iommu descriptor opened by QEMU itself, with QEMU as nobody"),
        ({"objects": {NIC: "b"}}, "on 2 /dev/iommu descriptors"),
        ({"backend": "legacy"}, "on the legacy container"),
        ({"backends": {NIC: "legacy"}}, "on /dev/iommu and the legacy container"),
        ({"devices": (NVME,), "plugged": (NIC,)}, ", 0000:02:00.0 plugged in while it runs"),
    ],
)
def test_what_is_going_to_happen(capable: Machine, options: dict[str, t.Any], words: str) -> None:
    ready = _guest.prepare(capable.host, Request(**{"devices": (NVME, NIC), **options}))
    assert words in ready.sentence()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"launcher": "magic"}, "launcher: 'magic'.*direct, systemd, libvirt, self"),
        ({"backend": "new"}, "backend: 'new'"),
        ({"started_by": "libvirt"}, "started_by: 'libvirt'.*launcher: self"),
        ({"plugged": (NVME,)}, "hot_plug: .*does not have from its start"),
        ({"plugged": (NIC,), "launcher": "libvirt"}, "hot_plug: .*launcher: direct or systemd or self"),
        ({"backends": {NIC: "legacy"}}, f"backends: '{NIC}'"),
        ({"backends": {NVME: "auto"}}, "backends.*: 'auto'.*legacy, iommufd"),
        ({"objects": {NVME: "1,x=y"}}, "iommufds.*begins with a letter"),
        ({"objects": {NVME: "b"}, "launcher": "libvirt"}, "iommufds: .*launcher: libvirt"),
        ({"expendable": (NIC,)}, f"expendable: '{NIC}'"),
        ({"arp_target": "example.com"}, "arp_target: 'example.com'.*IPv4"),
        ({"memlock": 0}, "memlock: 0"),
        ({"memlock": 64, "launcher": "libvirt"}, "memlock: 64.*sets the limit itself"),
    ],
)
def test_options_that_do_not_go_together(capable: Machine, options: dict[str, t.Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        _guest.prepare(capable.host, Request(**{"devices": (NVME,), **options}))


# -- afterwards


def test_a_configuration_space_that_came_back() -> None:
    before = bytes([0, 1, 2, 3, 0x02, *range(5, 64)])
    status = before[:6] + b"\xff\xff" + before[8:]
    assert _guest_run.compare_headers(before, before) == ""
    assert _guest_run.compare_headers(before, status) == ""  # status bits come and go
    assert _guest_run.compare_headers(before[:4] + b"\0" + before[5:], before) == ""  # it was never used before
    assert "bus mastering" in _guest_run.compare_headers(before, before[:4] + b"\x06" + before[5:])
    assert "0x10" in _guest_run.compare_headers(before, before[:16] + b"\xff" + before[17:])
    assert "cannot be read" in _guest_run.compare_headers(before, None)


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        # Said by QEMU 10.0 on Linux 6.12.
        ("vfio VFIO_FD4: error bind device fd=4 to iommufd=3: Operation not permitted", "isolate interrupts"),
        (
            "vfio 0000:01:00.0: failed to setup container for group 9: Failed to set iommu for container: "
            "Operation not permitted",
            "isolate interrupts",
        ),
        ("vfio VFIO_FD4: error bind device fd=4 to iommufd=3: Device or resource busy", "Another process"),
        (
            "vfio VFIO_FD4: memory listener initialization failed: Region pc.ram: "
            "vfio_container_dma_map(0x564286b74e90, 0x0, 0x10000000, 0x7f5d1be00000) = -12 (Cannot allocate memory)",
            "RLIMIT_MEMLOCK",
        ),
        ("cannot set up guest memory 'pc.ram': Cannot allocate memory", "not enough memory"),
        (
            "hw/vfio/vfio-iommufd.h:33:VFIO_IOMMU_IOMMUFD: Object 0x55e8d9dcbd30 is not an instance of type "
            "vfio-iommu-iommufd",
            "the same backend",
        ),
        (
            "-device vfio-pci,id=dev0,fd=5,iommufd=iommufd0: vfio VFIO_FD5: memory listener initialization failed: "
            "Region pc.ram: vfio_container_dma_map(0x55ba18dbb810, 0x0, 0x10000000, 0x7f19efe00000) = -22 "
            "(Invalid argument)",
            "reserved_regions",
        ),
        ("linux kernel too old to load a ram disk", None),
        ("", None),
    ],
)
def test_explanations(words: str, meaning: str | None) -> None:
    found = _guest_run.explain(words)
    assert found == "" if meaning is None else meaning in found
