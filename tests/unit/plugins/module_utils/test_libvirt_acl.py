# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""libvirt's device list on a host: where the default comes from, and what is planned."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _libvirt_acl, _qemu_conf
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host

OLD = '#cgroup_device_acl = [\n#    "/dev/null", "/dev/kvm"\n#]\n'
NEW = '#cgroup_device_acl = [\n#    "/dev/null", "/dev/userfaultfd"\n#]\n'
STATUS = """Package: other
Status: install ok installed
Version: 1.0

Package: libvirt-daemon-driver-qemu
Status: install ok installed
Priority: optional
Version: {version}

"""


def host(root: pathlib.Path, conf: str | None = OLD, version: str | None = None, **beside: str) -> Host:
    directory = root / "etc/libvirt"
    directory.mkdir(parents=True)
    if conf is not None:
        (directory / "qemu.conf").write_text(conf)
    for suffix, text in beside.items():
        (directory / f"qemu.conf.{suffix.replace('_', '-')}").write_text(text)
    if version:
        (root / "var/lib/dpkg").mkdir(parents=True)
        (root / "var/lib/dpkg/status").write_text(STATUS.format(version=version))
    return Host(str(root))


def read(host: Host) -> _libvirt_acl.Libvirt:
    return _libvirt_acl.read_libvirt(host, _libvirt_acl.DEFAULT_PATH)


def test_the_default_is_the_one_in_the_file(tmp_path: pathlib.Path) -> None:
    state = read(host(tmp_path, version="12.8.0-1"))
    assert state.default == ("/dev/null", "/dev/kvm")
    assert state.default_source == "the commented default in /etc/libvirt/qemu.conf"


def test_the_file_that_the_package_would_have_installed_knows_better(tmp_path: pathlib.Path) -> None:
    state = read(host(tmp_path, dpkg_dist=NEW))
    assert state.default == ("/dev/null", "/dev/userfaultfd", "/dev/kvm")


@pytest.mark.parametrize(
    ("version", "passes", "faults"),
    [("9.0.0-4+deb12u2", False, False), ("2:11.3.0-3", False, True), ("12.1.0", True, True), ("12.8.0", True, True)],
)
def test_without_a_comment_the_version_decides(
    tmp_path: pathlib.Path, version: str, passes: bool, faults: bool
) -> None:
    state = read(host(tmp_path, 'user = "x"\n', version))
    assert state.passes_descriptors is passes
    assert ("/dev/userfaultfd" in state.default) is faults
    assert "built-in list of libvirt" in state.default_source


def test_guests_keep_kvm_where_libvirt_gives_it_only_without_a_list(tmp_path: pathlib.Path) -> None:
    conf = '#cgroup_device_acl = [\n#    "/dev/null", "/dev/userfaultfd"\n#]\n'
    state = read(host(tmp_path, conf, "12.8.0"))
    (write,) = [step for step in _libvirt_acl.plan_present(state, ["/dev/iommu"], True).steps if step.subject]
    assert isinstance(write, _libvirt_acl.WriteConf)
    assert _qemu_conf.active_list(write.content) == ["/dev/null", "/dev/userfaultfd", "/dev/kvm", "/dev/iommu"]
    assert _qemu_conf.strip(write.content, state.default) == conf.encode()
    # A list that an earlier version of ours wrote without it is written anew.
    earlier = _qemu_conf.merge(conf.encode(), ["/dev/iommu"], ["/dev/null", "/dev/userfaultfd"])
    assert _qemu_conf.merge(earlier, ["/dev/iommu"], state.default) == write.content


def test_nothing_known(tmp_path: pathlib.Path) -> None:
    state = read(host(tmp_path, ""))
    assert state.passes_descriptors is None
    assert {"/dev/kvm", "/dev/userfaultfd"} <= set(state.default)


def test_plan(tmp_path: pathlib.Path) -> None:
    state = dataclasses.replace(read(host(tmp_path)), running_daemons=("libvirtd.service",))
    plan = _libvirt_acl.plan_present(state, ["/dev/iommu"], True)
    assert plan.summary() == [
        "write cgroup_device_acl in /etc/libvirt/qemu.conf",
        "restart libvirtd.service (guests keep running)",
    ]
    assert len(_libvirt_acl.plan_present(state, ["/dev/iommu"], False).steps) == 1
    step = plan.steps[0]
    assert isinstance(step, _libvirt_acl.WriteConf)
    done = dataclasses.replace(state, content=step.content)
    assert _libvirt_acl.plan_present(done, ["/dev/iommu"], True).summary() == []
    # A killed run wrote the file and did not restart the daemon.
    stale = dataclasses.replace(done, stale_daemons=("libvirtd.service",))
    assert _libvirt_acl.plan_present(stale, ["/dev/iommu"], True).summary() == plan.summary()[1:]
    # Somebody else's edit of a file without anything of ours is none of our business.
    foreign = dataclasses.replace(state, stale_daemons=("libvirtd.service",))
    assert _libvirt_acl.plan_absent(foreign, True).summary() == []
    absent = _libvirt_acl.plan_absent(done, True)
    assert isinstance(absent.steps[0], _libvirt_acl.WriteConf)
    assert absent.steps[0].content == state.content


def test_a_missing_file(tmp_path: pathlib.Path) -> None:
    state = read(host(tmp_path, None))
    with pytest.raises(HostError, match="libvirt's QEMU driver is not installed"):
        _libvirt_acl.plan_present(state, ["/dev/iommu"], True)
    assert _libvirt_acl.plan_absent(state, True).summary() == []


def test_a_file_that_libvirt_refuses_is_left_alone(tmp_path: pathlib.Path) -> None:
    with pytest.raises(HostError, match=r"^/etc/libvirt/qemu\.conf: line 1: unterminated string\. libvirt refuses"):
        read(host(tmp_path, 'user = "x\n'))


def test_a_list_that_is_none(tmp_path: pathlib.Path) -> None:
    state = read(host(tmp_path, 'cgroup_device_acl = "/dev/null"\n'))
    with pytest.raises(
        HostError, match=r"^/etc/libvirt/qemu\.conf: line 1: cgroup_device_acl is not a list of strings"
    ):
        _libvirt_acl.plan_present(state, ["/dev/iommu"], True)


def test_the_write_keeps_owner_and_mode_and_is_taken_back_to_the_byte(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "qemu.conf"
    path.write_text(OLD)
    path.chmod(0o600)
    state = _libvirt_acl.Libvirt(str(path), OLD.encode(), ("/dev/null", "/dev/kvm"), "")
    plan = _libvirt_acl.plan_present(state, ["/dev/iommu"], False)
    plan.apply()
    assert path.stat().st_mode & 0o777 == 0o600
    assert _qemu_conf.active_list(path.read_bytes()) == ["/dev/null", "/dev/kvm", "/dev/iommu"]
    plan.steps[0].undo()
    assert path.read_text() == OLD
