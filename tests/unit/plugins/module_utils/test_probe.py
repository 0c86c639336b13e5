# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the probe concludes from the kernel's answers, and the process that gets them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pathlib
import resource
import sys
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _libvirt_acl, _probe, _probe_child
from ansible_collections.iommufd.host.plugins.module_utils import _posix_acl as acl
from ansible_collections.iommufd.host.plugins.module_utils import _task_access_probe as access_probe
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host, Output
from ansible_collections.iommufd.host.plugins.module_utils._nodes import Node
from ansible_collections.iommufd.host.plugins.module_utils._probe import Actor, Place, Target, Trial
from ansible_collections.iommufd.host.tests.unit.machine import Machine

QEMU = Actor("libvirt-qemu", 64055, 993, (993, 64055))
IOMMU = "/dev/iommu"
TARGET = Target(IOMMU, "/sys/class/misc/iommu/dev")
LIBVIRT = Place("libvirt", "guests of libvirt 11.3.0", QEMU, None, QEMU, policy="strict", profile="libvirt")
LAUNCHER = Place("systemd", "guest.service", _probe.ROOT, QEMU, QEMU, policy="closed")
DENIED, FORBIDDEN = errno.EACCES, errno.EPERM


def node(mode: int = 0o660, gid: int = 993, group: str = "kvm", expected: str | None = "10:123") -> Node:
    return Node(IOMMU, 0, gid, "root", group, mode, "10:123", expected)


def answers(plain: int, cgroup: int = 0, lsm: int = 0) -> Trial:
    return Trial({IOMMU: plain}, {IOMMU: cgroup}, {IOMMU: lsm}, None)


def last(machine: Machine, trial: Trial, place: Place = LIBVIRT, one: Node | None = None) -> _probe.Link:
    links = _probe.opening_links(machine.host, place, TARGET, one or node(), place.opener, trial)
    assert [link.link for link in links] == list(_probe.LINKS[: len(links)])
    assert all(link.status != _probe.BROKEN for link in links[:-1]), "nothing is tried beyond a broken link"
    return links[-1]


# -- which link --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trial", "one", "link", "detail"),
    [
        (answers(DENIED), node(gid=0, group="root"), "dac", "neither its owner nor in root"),
        (answers(DENIED), node(0o600), "dac", "root:kvm 0600, and libvirt-qemu is in kvm"),
        (answers(0, FORBIDDEN), node(), "cgroup", "cgroup_device_acl does not list /dev/iommu"),
        (answers(0, 0, DENIED), node(), "lsm", "profile of libvirt's guests forbids /dev/iommu"),
        (answers(errno.ENODEV), node(), "dac", "No such device"),
    ],
)
def test_the_gate_at_which_the_answer_changes_is_the_one(
    machine: Machine, trial: Trial, one: Node, link: str, detail: str
) -> None:
    found = last(machine, trial, one=one)
    assert (found.link, found.status) == (link, _probe.BROKEN)
    assert detail in found.detail
    assert found.remedy


def test_a_whole_chain(machine: Machine) -> None:
    assert last(machine, answers(0)).link == "lsm"
    assert last(machine, answers(0)).status == _probe.OK
    assert "no device policy" in _probe._cgroup_link(dataclasses.replace(LIBVIRT, policy=None), IOMMU, QEMU, 0).detail


def test_the_remedy_for_the_group_depends_on_what_is_missing(machine: Machine) -> None:
    stranger = dataclasses.replace(LIBVIRT, opener=Actor("stranger", 7, 7, (7,)))
    assert "usermod -aG kvm stranger" in (last(machine, answers(DENIED), stranger).remedy or "")
    assert 'mode "0660"' in (last(machine, answers(DENIED), one=node(0o600)).remedy or "")
    assert "udev_access" in (last(machine, answers(DENIED), one=node(gid=0, group="root")).remedy or "")


def entries(*rows: tuple[int, int, int]) -> list[acl.Entry]:
    return [acl.Entry(*row) for row in rows]


@pytest.mark.parametrize(
    ("rows", "allowed"),
    [
        ([], True),
        ([(acl.USER, 0, QEMU.uid), (acl.GROUP_OBJ, 6, 0), (acl.MASK, 6, 0)], False),
        ([(acl.USER, 6, 1000), (acl.GROUP_OBJ, 6, 0), (acl.MASK, 4, 0)], False),
        ([(acl.GROUP, 6, 64055), (acl.GROUP_OBJ, 0, 0), (acl.MASK, 6, 0)], True),
        ([(acl.USER, 6, QEMU.uid), (acl.GROUP_OBJ, 0, 0), (acl.MASK, 6, 0)], True),
    ],
)
def test_access_lists_are_judged_as_the_kernel_does(rows: list[tuple[int, int, int]], allowed: bool) -> None:
    assert _probe.judge(node(), entries(*rows), QEMU)[0] is allowed


def test_a_list_that_shuts_the_user_out_is_told_from_owner_and_mode() -> None:
    shut = entries((acl.USER, 0, QEMU.uid), (acl.GROUP_OBJ, 6, 0), (acl.MASK, 6, 0))
    links = _probe.permission_links(node(), QEMU, DENIED, shut)
    assert [(link.link, link.status) for link in links] == [("dac", "ok"), ("acl", "broken")]
    assert "entry for the user libvirt-qemu" in links[1].detail


# -- existence ---------------------------------------------------------------------------------------------------------


def exists(machine: Machine, target: Target = TARGET, one: Node | None = None) -> _probe.Link:
    return _probe.exists_link(machine.host, target, one)


def test_a_module_that_is_not_loaded(machine: Machine) -> None:
    release = os.uname().release
    machine.file(f"/lib/modules/{release}/modules.dep", "updates/dkms/iommufd.ko.xz:\n")
    assert "the module iommufd is not loaded" in exists(machine).detail
    assert "modprobe iommufd" in (exists(machine).remedy or "")


def test_a_kernel_without_the_module(machine: Machine) -> None:
    assert "has no module iommufd" in exists(machine).detail
    assert "iommufd.host.kernel" in (exists(machine).remedy or "")


def test_a_node_that_somebody_removed_and_a_stale_one(machine: Machine) -> None:
    machine.file("/sys/class/misc/iommu/dev", "10:123\n")
    assert "somebody removed the node" in exists(machine).detail
    assert "stale" in exists(machine, one=node(expected="10:99")).detail


def test_cdevs_by_address(machine: Machine) -> None:
    for address, driver in (("0000:02:00.0", "nvme"), ("0000:03:00.0", None), ("0000:04:00.0", "vfio-pci")):
        machine.pci(address, driver=driver)
    machine.cdev("0000:04:00.0", 3, "511:3")
    targets = _probe.find_targets(machine.host, ["0000:02:00.0", "0000:03:00.0", "0000:04:00.0", "0000:05:00.0"])
    assert [target.path for target in targets] == [IOMMU, None, None, "/dev/vfio/devices/vfio3", None]
    details = [exists(machine, target).detail for target in (targets[1], targets[2], targets[4])]
    assert "bound to nvme" in details[0]
    assert "bound to no driver" in details[1]
    assert "no PCI device 0000:05:00.0" in details[2]


# -- mode launcher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trial", "link"),
    [(answers(DENIED, DENIED), "dac"), (answers(0, FORBIDDEN), "cgroup"), (answers(0, 0, DENIED), "lsm")],
)
def test_one_shut_gate_is_enough_for_whom_nothing_shall_open(machine: Machine, trial: Trial, link: str) -> None:
    (found,) = _probe.refusal_links(machine.host, LAUNCHER, TARGET, node(), QEMU, trial)
    assert (found.link, found.status) == (link, _probe.OK)


def test_a_node_that_opens_though_it_must_not(machine: Machine) -> None:
    (found,) = _probe.refusal_links(machine.host, LAUNCHER, TARGET, node(0o666), QEMU, answers(0))
    assert found.status == _probe.BROKEN
    assert "libvirt-qemu could open /dev/iommu itself" in found.detail


def test_a_node_that_is_another_device_is_not_opened(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def try_place(_host: Host, _place: Place, paths: t.Iterable[str], *_more: t.Any) -> dict[Actor, Trial]:
        tried.extend(paths)
        return {}

    right = dataclasses.replace(node(), path="/dev/null")
    found = {IOMMU: dataclasses.replace(right, expected="10:99"), "/dev/vfio/devices/vfio0": right}
    monkeypatch.setattr(_probe, "try_place", try_place)
    monkeypatch.setattr(_probe, "read_node", lambda _host, path, *_more: found.get(path))
    targets = [TARGET, Target("/dev/vfio/devices/vfio0", None)]
    said = _probe.probe(Host(), dataclasses.replace(LAUNCHER, kvm=None), targets, None, 60)
    assert tried == ["/dev/null"], "the right one alone"
    refused = next(row for row in said["nodes"] if row["path"] == IOMMU and row["expected"] == "refused")
    assert [(link["link"], link["status"]) for link in refused["links"]] == [("exists", _probe.SKIP)]
    assert said["broken"]["link"] == "exists"


def test_each_trial_has_a_unit_of_its_own(machine: Machine) -> None:
    units = [
        next(word for word in _probe._transient(machine.host, LAUNCHER, 60) if word.startswith("--unit="))
        for _number in range(2)
    ]
    assert len(set(units)) == 2


# -- pinned memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "pinned", "others_kib", "status"),
    [
        (64 << 20, errno.ENOMEM, 0, "broken"),
        (64 << 20, 0, 0, "broken"),
        (2 << 30, 0, 0, "ok"),
        (2 << 30, 0, 2 << 20, "broken"),
        (None, 0, 2 << 20, "ok"),
        (-1, None, 0, "skip"),
    ],
)
def test_memlock(machine: Machine, limit: int | None, pinned: int | None, others_kib: int, status: str) -> None:
    uid = QEMU.uid
    machine.file("/proc/9/status", f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}\nVmPin:\t{others_kib} kB\n")
    place = dataclasses.replace(LIBVIRT, memlock=limit, memlock_source="libvirtd.service runs with it")
    link = _probe.memlock_link(machine.host, place, QEMU, 1 << 30, pinned)
    assert (link.link, link.status) == ("memlock", status)
    if status == "broken":
        assert "memlock_limits" in (link.remedy or "")


def test_memlock_without_an_amount_only_reports(machine: Machine) -> None:
    place = dataclasses.replace(LIBVIRT, memlock=64 << 20)
    assert "the limit is 64 MiB" in _probe.memlock_link(machine.host, place, QEMU, None, None).detail


# -- the process that tries --------------------------------------------------------------------------------------------


def trial(paths: t.Sequence[pathlib.Path], uid: int = 65534, pin: int | None = None) -> dict[str, t.Any]:
    names = [str(path) for path in paths]
    return {"uid": uid, "gid": 65534, "groups": [], "profile": None, "paths": names, "pin": pin}


@pytest.mark.skipif(os.geteuid() != 0, reason="takes on another user")
def test_the_kernel_answers_as_it_would_to_that_user(tmp_path: pathlib.Path) -> None:
    open_, shut = pathlib.Path("/dev/null"), tmp_path / "shut"
    shut.write_text("")
    shut.chmod(0o600)
    job = [trial([open_, shut, tmp_path / "gone"]), trial([shut], uid=0)]
    found = _probe._run([sys.executable, "-I", "-c", _probe._BOOTSTRAP], job, 60)
    assert found[0]["error"] is None
    assert list(found[0]["opened"].values())[:2] == [0, errno.EACCES]
    assert found[1]["opened"][str(shut)] == 0
    assert json.dumps(found), "plain data"


@pytest.mark.skipif(os.geteuid() != 0, reason="takes on another user")
def test_locking_is_bound_by_the_limit_and_costs_no_memory() -> None:
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    (found,) = _probe_child.run_trials([trial([], pin=1 << 20)])
    assert found["pinned"] == 0
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, before[1]))
    try:
        (found,) = _probe_child.run_trials([trial([], pin=1 << 30)])
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
    assert found["pinned"] == errno.ENOMEM


def test_a_profile_that_cannot_be_taken_on_is_said() -> None:
    job = {**trial([], uid=os.getuid()), "gid": os.getgid(), "groups": os.getgroups(), "profile": "no-such-profile"}
    (found,) = _probe_child.run_trials([job])
    assert found["error"]


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def libvirt_host(machine: Machine) -> Machine:
    machine.file("/etc/passwd", "root:x:0:0:::\nlibvirt-qemu:x:64055:993:::\nqemu:x:107:107:::\n")
    machine.file("/etc/group", "root:x:0:\nkvm:x:993:\nlibvirt-qemu:x:64055:libvirt-qemu\nqemu:x:107:\n")
    machine.file("/etc/libvirt/qemu.conf", '#user = "root"\n')
    machine.file("/sys/module/apparmor/parameters/enabled", "Y\n")
    machine.file("/etc/apparmor.d/abstractions/libvirt-qemu", "/dev/kvm rw,\n")
    return machine


def libvirt_place(machine: Machine, conf: str = "", launcher: bool = False, **options: t.Any) -> Place:
    if conf:
        machine.file("/etc/libvirt/qemu.conf", conf)
    libvirt = _libvirt_acl.read_libvirt(machine.host, _libvirt_acl.DEFAULT_PATH)
    return _probe.libvirt_place(machine.host, libvirt, launcher, options.get("user"), options.get("profile"))


def test_guests_of_libvirt_run_as_debian_says(libvirt_host: Machine) -> None:
    place = libvirt_place(libvirt_host)
    assert (place.opener.name, place.opener.uid, place.opener.gid) == ("libvirt-qemu", 64055, 64055)
    assert 993 in place.opener.all_groups
    assert (place.policy, place.profile, place.process) == ("strict", "libvirt", None)
    assert "/dev/kvm" in place.allow
    assert "/dev/iommu" not in place.allow


def test_qemu_conf_decides_about_user_policy_and_profile(libvirt_host: Machine) -> None:
    conf = 'user = "+107"\ngroup = "qemu"\ncgroup_controllers = [ "cpu" ]\nsecurity_driver = "none"\n'
    place = libvirt_place(libvirt_host, conf)
    assert (place.opener.name, place.opener.gid, place.policy, place.profile) == ("qemu", 107, None, None)
    assert "security_driver" in place.profile_reason
    listed = libvirt_place(libvirt_host, 'cgroup_device_acl = [ "/dev/null", "/dev/iommu" ]\n')
    assert listed.allow == ("/dev/null", "/dev/iommu")


def test_a_launcher_opens_as_root_and_qemu_must_not(libvirt_host: Machine) -> None:
    place = libvirt_place(libvirt_host, launcher=True)
    assert place.opener == _probe.ROOT
    assert place.process is not None
    assert (place.process.name, place.memlock) == ("libvirt-qemu", -1)


@pytest.mark.parametrize("confined", [True, False])
def test_where_libvirt_passes_descriptors_its_daemon_opens_the_nodes_in_its_own_cgroup(
    libvirt_host: Machine, monkeypatch: pytest.MonkeyPatch, confined: bool
) -> None:
    shown = "LoadState=loaded\nActiveState=active\nMainPID=747\nSlice=system.slice\nDevicePolicy=closed\n"
    shown += "DeviceAllow=/dev/iommu rw\nLimitMEMLOCK=67108864\n"
    monkeypatch.setattr(Host, "ask", lambda _self, argv, *_more: Output(0, shown if "show" in argv else "", ""))
    libvirt_host.file("/proc/747/attr/current", "libvirtd (enforce)\n" if confined else "unconfined\n")
    place = libvirt_place(libvirt_host, launcher=True)
    daemon = place.launcher
    assert daemon is not None
    assert (daemon.name, daemon.opener, daemon.process, daemon.kvm) == ("virtqemud.service", _probe.ROOT, None, None)
    assert (daemon.policy, daemon.allow, daemon.slice) == ("closed", ("/dev/iommu",), "system.slice")
    assert daemon.profile == ("libvirtd" if confined else None)
    assert "/dev/iommu" not in place.allow, "the guest's own list has no part in it"
    shut = _probe.opening_links(
        libvirt_host.host, daemon, TARGET, node(gid=0, group="root"), daemon.opener, answers(0, FORBIDDEN)
    )[-1]
    assert "device policy of virtqemud.service" in shut.detail


def test_a_user_or_profile_given_counts_more(libvirt_host: Machine) -> None:
    place = libvirt_place(libvirt_host, user="qemu", profile="unconfined")
    assert (place.opener.name, place.profile) == ("qemu", None)
    with pytest.raises(OptionError, match=r"^user: 'nosuch'"):
        libvirt_place(libvirt_host, user="nosuch")


def test_a_session_has_the_limit_of_its_user_before_that_of_its_groups(libvirt_host: Machine) -> None:
    limits = "* - memlock 64\n@kvm - memlock 1024\nlibvirt-qemu hard memlock unlimited\n"
    libvirt_host.file("/etc/security/limits.conf", limits)
    assert _probe.user_place(libvirt_host.host, "libvirt-qemu", False, None).memlock is None
    libvirt_host.file("/etc/security/limits.conf", limits.rpartition("libvirt")[0])
    assert _probe.user_place(libvirt_host.host, "libvirt-qemu", False, None).memlock == 1 << 20
    assert _probe.user_place(libvirt_host.host, "qemu", False, None).memlock == 64 << 10


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"manager": "systemd", "units": []}, "^units: "),
        ({"manager": "systemd", "units": ["guest"]}, r"^units\[0\]: "),
        ({"manager": "systemd", "units": ["no-such-unit-here.service"]}, "systemd has no unit"),
        ({"manager": "none", "user": None}, "^user: "),
        ({"manager": "libvirt"}, "qemu.conf does not exist"),
    ],
)
def test_places_that_cannot_be_tried(machine: Machine, params: dict[str, t.Any], message: str) -> None:
    defaults = {"mode": "group", "user": None, "units": [], "apparmor_profile": None}
    with pytest.raises(HostError, match=message):
        access_probe.find_places(machine.host, {**defaults, **params})
