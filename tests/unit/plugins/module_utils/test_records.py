# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Records on the host: what was asked for, what a guest was verified with, and what a host was before."""

from __future__ import annotations

import os
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _fingerprint, _records, _snapshot
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._pci import LOCKED_ATTRIBUTES, Function
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan
from ansible_collections.iommufd.host.plugins.modules import host_plan
from ansible_collections.iommufd.host.tests.unit.machine import Machine

Json = dict[str, t.Any]

WANTED: Json = {
    "devices": ["0000:01:00.0"], "qemu": None, "busybox": None, "user": "nobody", "memory": 256, "cpus": 1,
    "accelerator": "auto", "when": "changed", "max_age": 7,
}  # fmt: skip
DEVICE = "0000:01:00.0"


@pytest.fixture
def provisioned(machine: Machine) -> Machine:
    machine.pci(DEVICE, "1b36:0010", "010802", driver="vfio-pci", group=3)
    machine.cdev(DEVICE, 0, "511:0")
    machine.file("/proc/sys/kernel/random/boot_id", "aaaa\n")
    machine.file("/proc/version", "Linux version 6.12\n")
    machine.file("/proc/cmdline", "root=/dev/vda1 ro\n")
    machine.file("/sys/module/vfio_pci/srcversion", "ABC\n")
    machine.file("/sys/class/dmi/id/bios_version", "1.0\n")
    for path in ("/usr/bin/qemu-system-x86_64", "/usr/bin/busybox"):
        machine.file(path, path)
        machine.at(path).chmod(0o755)
    return machine


def carry_out(machine: Machine, path: str, record: Json) -> bool:
    plan = Plan(_records.write_record(machine.host, path, record))
    plan.apply()
    return plan.changed


def test_a_record_is_written_once_for_root_alone_and_goes_with_its_directory(machine: Machine) -> None:
    assert carry_out(machine, _records.APPLIED, {"wanted": {"a": 1}})
    assert not carry_out(machine, _records.APPLIED, {"wanted": {"a": 1}})
    assert _records.read_record(machine.host, _records.APPLIED)["wanted"] == {"a": 1}
    assert os.stat(machine.at(_records.APPLIED)).st_mode & 0o777 == 0o600
    Plan(_records.remove_record(machine.host, _records.APPLIED)).apply()
    assert not machine.at(_records.DIRECTORY).exists()
    assert _records.remove_record(machine.host, _records.APPLIED) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}', '{"format": 1, "wanted": {}}', "null"])
def test_a_record_that_is_not_understood_or_not_ours_is_none(machine: Machine, content: str) -> None:
    machine.file(_records.APPLIED, content)
    assert _records.read_record(machine.host, _records.APPLIED) == {}


def parts(machine: Machine, **other: t.Any) -> Json:
    return _fingerprint.read_parts(machine.host, {**WANTED, **other}, [DEVICE])


def test_nothing_differs_where_nothing_changed(provisioned: Machine) -> None:
    before = parts(provisioned)
    carry_out(provisioned, _records.APPLIED, {"verified": {"parts": before}})
    kept = _records.read_record(provisioned.host, _records.APPLIED)["verified"]["parts"]
    assert _fingerprint.differences(kept, parts(provisioned)) == []


CHANGES: dict[str, t.Callable[[Machine], t.Any]] = {
    "boot": lambda machine: machine.file("/proc/sys/kernel/random/boot_id", "bbbb\n"),
    "kernel": lambda machine: machine.file("/proc/cmdline", "root=/dev/vda1 ro iommu=pt\n"),
    "modules": lambda machine: machine.file("/sys/module/vfio_pci/srcversion", "DEF\n"),
    "firmware": lambda machine: machine.file("/sys/class/dmi/id/bios_version", "1.1\n"),
    "qemu": lambda machine: machine.at("/usr/bin/qemu-system-x86_64").write_text("another"),
    "busybox": lambda machine: machine.at("/usr/bin/busybox").write_text("another"),
    "devices": lambda machine: machine.pci("0000:02:00.0", driver="nvme", group=3),
}


@pytest.mark.parametrize("part", CHANGES)
def test_each_part_is_seen_when_it_changes(part: str, provisioned: Machine) -> None:
    before = parts(provisioned)
    CHANGES[part](provisioned)
    assert _fingerprint.differences(before, parts(provisioned)) == [_fingerprint.WORDS[part]]


def test_another_guest_is_another_guest(provisioned: Machine) -> None:
    assert _fingerprint.differences(parts(provisioned), parts(provisioned, memory=512)) == [_fingerprint.WORDS["guest"]]


def test_a_record_that_lacks_a_part_counts_as_changed(provisioned: Machine) -> None:
    before = parts(provisioned)
    del before["firmware"]
    assert _fingerprint.differences(before, parts(provisioned)) == [_fingerprint.WORDS["firmware"]]


def test_when_a_guest_is_booted(provisioned: Machine) -> None:
    host = provisioned.host
    verified = {"at": 1000000, "parts": parts(provisioned)}
    day = 86400
    assert host_plan.judge_guest(host, {**WANTED, "when": "always"}, verified, 1000000)[0]
    assert host_plan.judge_guest(host, WANTED, None, 1000000)[0]
    needed, reason = host_plan.judge_guest(host, WANTED, verified, 1000000 + 6 * day)
    assert not needed
    assert "a guest was verified at 1970-01-12 13:46 UTC" in reason
    assert host_plan.judge_guest(host, WANTED, verified, 1000000 + 8 * day)[0]
    assert host_plan.judge_guest(host, WANTED, verified, 1000000 - 1)[0]  # the clock was set back
    CHANGES["boot"](provisioned)
    needed, reason = host_plan.judge_guest(host, WANTED, verified, 1000000)
    assert needed
    assert "the host was rebooted" in reason


def test_whether_a_host_was_asked_for_this_already() -> None:
    noted: Json = {"kernel": {"dkms": "auto"}, "access": {"mode": "auto", "probe": True}, "verify": {"timeout": 600}}
    assert _records.covers(noted, noted)
    # How it is tried, and how long that may take, leaves no trace on it.
    assert _records.covers(noted, {**noted, "access": {"mode": "auto", "probe": False}, "verify": {"timeout": 9}})
    assert not _records.covers(noted, {**noted, "access": {"mode": "group", "probe": True}})
    # A run for some roles says nothing about the others.
    assert _records.covers(noted, {"access": {"mode": "auto", "probe": True}})
    assert not _records.covers({**noted, "kernel": None}, noted)
    assert not _records.covers(None, noted)


def test_a_snapshot_sees_files_drivers_overrides_nodes_and_the_kernel(provisioned: Machine) -> None:
    provisioned.file("/etc/default/grub", "GRUB_CMDLINE_LINUX=\n")
    provisioned.file("/boot/initrd.img-6.12", "packed\n")
    before = _snapshot.take(provisioned.host)
    assert _snapshot.differences(before, _snapshot.take(provisioned.host)) == []
    # Packed anew it has other bytes with the same meaning; what it holds is compared by its list.
    provisioned.file("/boot/initrd.img-6.12", "packed anew\n")
    # Ours while a rollout is under way.
    provisioned.file(_records.BEFORE, "{}")
    assert _snapshot.differences(before, _snapshot.take(provisioned.host)) == []
    provisioned.file("/etc/default/grub", "GRUB_CMDLINE_LINUX=iommu=pt\n")
    provisioned.file("/etc/new", "")
    provisioned.at("/etc/default/grub").chmod(0o600)
    provisioned.attributes(provisioned.paths[DEVICE], driver_override="vfio-pci")
    provisioned.file("/proc/cmdline", "root=/dev/vda1 ro iommu=pt\n")
    provisioned.file("/proc/modules", "iommufd 1 0 - Live 0x0\nnvme 1 0 - Live 0x0\n")
    seen = _snapshot.differences(before, _snapshot.take(provisioned.host))
    assert [line.partition(": ")[0] for line in seen] == [
        "file /etc/default/grub",
        "file /etc/new",
        f"PCI function {DEVICE}",
        "kernel command line",
        "kernel module iommufd",
    ]
    assert seen[2].endswith("override none => driver vfio-pci override vfio-pci")


def test_a_function_whose_lock_is_held_is_not_waited_for(provisioned: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads such an attribute himself hangs; :func:`_pci.read_functions` finds out first."""
    read_line = Host.read_line

    def guarded(host: Host, path: str) -> str | None:
        assert not path.endswith(LOCKED_ATTRIBUTES)
        return read_line(host, path)

    def read_functions(host: Host, only: t.Sequence[str] = ()) -> list[Function]:
        return [Function(DEVICE, driver="nvme", locked=True)]

    monkeypatch.setattr(Host, "read_line", guarded)
    for module in (_fingerprint, _snapshot):
        monkeypatch.setattr(module, "read_functions", read_functions)
    assert _snapshot.take(provisioned.host)["PCI function"] == {DEVICE: "driver nvme override none"}
    assert _fingerprint.read_parts(provisioned.host, WANTED, [DEVICE])["devices"][0]["driver"] == "nvme"
