# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The udev rules: what is planned from which state of file and nodes."""

from __future__ import annotations

import os
import pathlib
import stat
import struct
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _posix_acl, _udev
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._nodes import Accounts

ME, MINE = os.getuid(), os.getgid()
ADDRESS = "10000:e1:00.0"


def write(path: pathlib.Path, text: str = "", mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """A host with /dev/iommu, one cdev of a PCI device, one of a mediated device, and a group."""
    write(tmp_path / "etc/passwd", f"me:x:{ME}:{MINE}:::\n")
    write(tmp_path / "etc/group", f"mine:x:{MINE}:\nkvm:x:993:\n")
    pci = f"/sys/devices/pci10000:e0/{ADDRESS}"
    for path, uevent in (
        ("/sys/devices/virtual/misc/iommu", "DEVNAME=iommu\nDEVMODE=0660\n"),
        (f"{pci}/vfio-dev/vfio0", "DEVNAME=vfio/devices/vfio0\n"),
        (f"{pci}/c0ffee/vfio-dev/vfio1", "DEVNAME=vfio/devices/vfio1\n"),
        ("/sys/devices/virtual/vfio/7", "DEVNAME=vfio/7\n"),
    ):
        write(tmp_path / path[1:] / "uevent", uevent)
        kind, name = path.split("/")[-2:]
        link = tmp_path / "sys/class" / kind / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    write(tmp_path / "dev/iommu", mode=0o660)
    for name in ("devices/vfio0", "devices/vfio1", "7"):
        write(tmp_path / "dev/vfio" / name, mode=0o600)
    return tmp_path


def access(mode: int) -> _udev.Access:
    return _udev.Access("me", "mine", mode, ME, MINE)


def follow(tree: pathlib.Path, text: str, nodes: dict[str, int]) -> None:
    """Bring the tree into the state that udev would bring it to."""
    write(tree / _udev.DEFAULT_PATH[1:], text)
    for name, mode in nodes.items():
        (tree / "dev" / name).chmod(mode)
    link = tree / "dev/vfio/by-path" / f"pci-{ADDRESS}"
    if "SYMLINK" in text and not link.is_symlink():
        link.parent.mkdir(exist_ok=True)
        link.symlink_to("../devices/vfio0")


def read(tree: pathlib.Path) -> _udev.State:
    return _udev.read_state(Host(str(tree)), _udev.DEFAULT_PATH)


def test_nodes_are_read_with_their_default_and_stable_name(tree: pathlib.Path) -> None:
    found = {node.path: node for node in read(tree).nodes}
    assert set(found) == {"/dev/iommu", "/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1", "/dev/vfio/7"}
    assert found["/dev/iommu"].default.mode == 0o660
    assert found["/dev/vfio/devices/vfio0"].default.mode == 0o600
    assert found["/dev/vfio/devices/vfio0"].link == f"/dev/vfio/by-path/pci-{ADDRESS}"
    assert not found["/dev/vfio/devices/vfio0"].linked
    assert found["/dev/vfio/devices/vfio1"].link is None, "a mediated device has no name of its own by PCI address"


def test_fresh_host_gets_the_file_and_then_the_nodes(tree: pathlib.Path) -> None:
    plan = _udev.plan_present(read(tree), {"iommu": access(0o640), "cdevs": access(0o640)}, True, Host(str(tree)))
    assert plan.summary() == [
        "write /etc/udev/rules.d/90-iommufd-host.rules",
        "have udev apply the rules to /dev/iommu, /dev/vfio/devices/vfio0, /dev/vfio/devices/vfio1",
    ]
    nodes = plan.diff()[1]
    assert "/dev/iommu me:mine 0660\n" in nodes["before"]
    assert "/dev/iommu me:mine 0640\n" in nodes["after"]
    assert f"/dev/vfio/devices/vfio0 me:mine 0640 /dev/vfio/by-path/pci-{ADDRESS}" in nodes["after"]


def test_nothing_to_do_when_file_and_nodes_agree(tree: pathlib.Path) -> None:
    wanted = {"iommu": access(0o640)}
    follow(tree, _udev.rules_text(wanted, True), {"iommu": 0o640})
    assert _udev.plan_present(read(tree), wanted, True, Host(str(tree))).summary() == []


def test_only_the_node_that_differs_is_triggered(tree: pathlib.Path) -> None:
    wanted = {"iommu": access(0o640), "cdevs": access(0o640)}
    text = _udev.rules_text(wanted, True)
    follow(tree, text, {"iommu": 0o640, "vfio/devices/vfio0": 0o640, "vfio/devices/vfio1": 0o600})
    plan = _udev.plan_present(read(tree), wanted, True, Host(str(tree)))
    assert plan.summary() == ["have udev apply the rules to /dev/vfio/devices/vfio1"]


def test_new_rules_are_tried_on_nodes_that_look_right_already(tree: pathlib.Path) -> None:
    follow(tree, "", {"iommu": 0o640})
    (tree / _udev.DEFAULT_PATH[1:]).unlink()
    plan = _udev.plan_present(read(tree), {"iommu": access(0o640)}, False, Host(str(tree)))
    assert plan.summary()[-1] == "have udev apply the rules to /dev/iommu"


def test_systemd_learns_of_the_stable_names_also_where_older_rules_made_them(tree: pathlib.Path) -> None:
    text = _udev.rules_text({}, True)
    assert ', TAG+="systemd"' in next(line for line in text.splitlines() if "SYMLINK" in line)
    follow(tree, text.replace(', TAG+="systemd"', ""), {})
    plan = _udev.plan_present(read(tree), {}, True, Host(str(tree)))
    assert plan.summary() == [
        "write /etc/udev/rules.d/90-iommufd-host.rules",
        "have udev apply the rules to /dev/vfio/devices/vfio0",
    ]
    follow(tree, text, {})
    assert _udev.plan_present(read(tree), {}, True, Host(str(tree))).summary() == []
    assert "systemd" not in _udev.rules_text({"cdevs": access(0o640)}, False)


def test_a_kind_that_is_no_longer_named_gets_its_default_back_first(tree: pathlib.Path) -> None:
    both = {"iommu": access(0o640), "cdevs": access(0o640)}
    follow(
        tree, _udev.rules_text(both, False), {"iommu": 0o640, "vfio/devices/vfio0": 0o640, "vfio/devices/vfio1": 0o640}
    )
    plan = _udev.plan_present(read(tree), {"iommu": access(0o640)}, False, Host(str(tree)))
    reset = plan.steps[0]
    assert isinstance(reset, _udev.ResetNodes)
    # The tree belongs to whoever runs the test; a default of root cannot be given by others than root.
    assert {node.path for node in reset.nodes} == {"/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1"}
    assert plan.steps[1].summary == "write /etc/udev/rules.d/90-iommufd-host.rules"


def test_absent_gives_nodes_back_before_the_file_goes(tree: pathlib.Path) -> None:
    follow(tree, _udev.rules_text({"iommu": access(0o640)}, True), {"iommu": 0o640})
    plan = _udev.plan_absent(read(tree), Host(str(tree)))
    assert [type(step) for step in plan.steps] == [_udev.ResetNodes, _udev.RemoveRules, _udev.FollowRules]
    assert "/dev/vfio/devices/vfio0" in plan.steps[2].summary, "its link must go"


def test_absent_after_a_killed_run_removes_the_links(tree: pathlib.Path) -> None:
    follow(tree, _udev.rules_text({}, True), {})
    (tree / _udev.DEFAULT_PATH[1:]).unlink()
    plan = _udev.plan_absent(read(tree), Host(str(tree)))
    assert plan.summary() == ["have udev apply the rules to /dev/vfio/devices/vfio0"]


def test_absent_leaves_a_host_alone_where_we_never_were(tree: pathlib.Path) -> None:
    (tree / "dev/iommu").chmod(0o644)
    assert _udev.plan_absent(read(tree), Host(str(tree))).summary() == []


@pytest.mark.parametrize("present", [True, False])
def test_a_file_of_somebody_else_is_refused(tree: pathlib.Path, present: bool) -> None:
    write(tree / _udev.DEFAULT_PATH[1:], 'KERNEL=="iommu", MODE="0666"\n')
    with pytest.raises(Refusal, match="was not written by this collection"):
        if present:
            _udev.plan_present(read(tree), {}, True, Host(str(tree)))
        else:
            _udev.plan_absent(read(tree), Host(str(tree)))


def test_rules_never_match_no_iommu_groups_and_have_no_world_access(tree: pathlib.Path) -> None:
    text = _udev.rules_text({kind: access(0o660) for kind in _udev.KINDS}, True)
    assert 'SUBSYSTEM=="vfio", KERNEL=="[0-9]*"' in text
    assert _udev.covered_kinds(text.encode()) == set(_udev.KINDS)
    assert _udev.covered_kinds(_udev.rules_text({}, True).encode()) == set()


@pytest.mark.parametrize("value", ["0660", "660", "0600", "0000"])
def test_modes_that_are_accepted(value: str) -> None:
    assert _udev.parse_mode("mode", value, False) == int(value, 8)


@pytest.mark.parametrize("value", [432, 0o660, None, "", "rw", "0888", "00660", "4660", "-660", "u=rw", "0666", "0604"])
def test_modes_that_are_not(value: object) -> None:
    with pytest.raises(OptionError, match=r"^mode: "):
        _udev.parse_mode("mode", value, False)


def test_world_access_must_be_asked_for_by_name() -> None:
    assert _udev.parse_mode("mode", "0666", True) == 0o666


def test_names_are_resolved_on_the_host_that_is_read(tree: pathlib.Path) -> None:
    accounts = Accounts(Host(str(tree)))
    assert _udev.resolve_access(accounts, "", "me", "kvm", 0o660).gid == 993
    with pytest.raises(OptionError, match=r"^nodes\[1\]\.group: 'nosuch' is not accepted: the host has no group"):
        _udev.resolve_access(accounts, "nodes[1].", "me", "nosuch", 0o660)
    with pytest.raises(OptionError, match=r"^owner: "):
        _udev.resolve_access(accounts, "", 'me", MODE="0666', "kvm", 0o660)


def test_reset_and_its_undo(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "node"
    write(path, mode=0o660)
    node = _udev.LiveNode("cdevs", str(path), "/nonexistent", access(0o660), access(0o600))
    step = _udev.ResetNodes.of([node])
    step.apply()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    step.undo()
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_the_rule_that_won_is_found_in_both_forms_of_udevadm_test() -> None:
    # Lines of udev 252 and of udev 257.
    old = (
        "iommu: /etc/udev/rules.d/90-iommufd-host.rules:4 GROUP 993\n"
        "iommu: /etc/udev/rules.d/90-iommufd-host.rules:4 MODE 0660\n"
        "iommu: /etc/udev/rules.d/99-zz.rules:1 MODE 0640\n"
    )
    new = old.replace(" GROUP 993", ' GROUP="kvm": Set group ID: 993').replace(
        " MODE 0640", ' MODE="0640": Set mode: 0640'
    )
    for text in (old, new):
        assert _udev.winning_rules(text) == {
            "GROUP": "/etc/udev/rules.d/90-iommufd-host.rules:4",
            "MODE": "/etc/udev/rules.d/99-zz.rules:1",
        }


# -- access lists ------------------------------------------------------------------------------------------------------

ALICE = _udev.Named(_posix_acl.USER, "alice", 1000)
OPS = _udev.Named(_posix_acl.GROUP, "ops", 50)


def listed(mode: int = 0o640) -> _udev.Access:
    return _udev.Access("me", "mine", mode, ME, MINE, (ALICE, OPS))


def with_list(path: pathlib.Path, *entries: tuple[int, int]) -> None:
    """Give a file an access list as `setfacl -b -m` does."""
    own = stat.S_IMODE(path.stat().st_mode)
    rows = [(_posix_acl.USER_OBJ, own >> 6 & 7, 0xFFFFFFFF)]
    rows += [(tag, 6, number) for tag, number in entries if tag == _posix_acl.USER]
    rows.append((_posix_acl.GROUP_OBJ, own >> 3 & 7, 0xFFFFFFFF))
    rows += [(tag, 6, number) for tag, number in entries if tag == _posix_acl.GROUP]
    rows += [(_posix_acl.MASK, 6, 0xFFFFFFFF), (_posix_acl.OTHER, own & 7, 0xFFFFFFFF)]
    try:
        os.setxattr(
            path, _posix_acl.ATTRIBUTE, struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)
        )
    except OSError as error:
        pytest.skip(f"no access lists here: {error}")


def test_the_rule_sets_the_list_whenever_a_node_appears() -> None:
    text = _udev.rules_text({"cdevs": listed()}, False, "/usr/bin/setfacl")
    assert 'MODE="0640", RUN+="/usr/bin/setfacl -b -m u:alice:rw,g:ops:rw $devnode"' in text
    assert _udev.listed_kinds(text.encode()) == {"cdevs"}
    assert _udev.covered_kinds(text.encode()) == {"cdevs"}


def test_a_node_with_the_list_is_left_alone_and_one_without_it_is_triggered(tree: pathlib.Path) -> None:
    write(tree / "usr/bin/setfacl", mode=0o755)
    wanted = {"cdevs": listed()}
    text = _udev.rules_text(wanted, False)
    follow(tree, text, {"vfio/devices/vfio0": 0o640, "vfio/devices/vfio1": 0o640})
    with_list(tree / "dev/vfio/devices/vfio0", (_posix_acl.USER, 1000), (_posix_acl.GROUP, 50))
    found = {node.path: node for node in read(tree).nodes}["/dev/vfio/devices/vfio0"]
    assert found.access.mode == 0o640, "not the mask that stat shows"
    assert found.has(listed())
    plan = _udev.plan_present(read(tree), wanted, False, Host(str(tree)))
    assert plan.summary() == ["have udev apply the rules to /dev/vfio/devices/vfio1"]


def test_a_list_that_is_no_longer_wanted_is_taken_away_and_one_of_somebody_else_is_not(tree: pathlib.Path) -> None:
    node = tree / "dev/vfio/devices/vfio0"
    follow(tree, _udev.rules_text({"cdevs": listed()}, False), {"vfio/devices/vfio0": 0o640})
    with_list(node, (_posix_acl.USER, 1000))
    plan = _udev.plan_present(read(tree), {"cdevs": access(0o640)}, False, Host(str(tree)))
    reset = plan.steps[0]
    assert isinstance(reset, _udev.ResetNodes)
    assert [one.path for one in reset.nodes] == ["/dev/vfio/devices/vfio0"]
    follow(tree, _udev.rules_text({"cdevs": access(0o640)}, False), {"vfio/devices/vfio1": 0o640})
    plan = _udev.plan_present(read(tree), {"cdevs": access(0o640)}, False, Host(str(tree)))
    assert plan.summary() == []


def test_reset_takes_the_list_away_and_undo_brings_it_back(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "node"
    write(path, mode=0o640)
    with_list(path, (_posix_acl.USER, 1000))
    before = os.getxattr(path, _posix_acl.ATTRIBUTE)
    node = _udev.LiveNode("cdevs", str(path), "/nonexistent", listed(), access(0o600), acl=before)
    step = _udev.ResetNodes.of([node])
    step.apply()
    assert _posix_acl.ATTRIBUTE not in os.listxattr(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    step.undo()
    assert os.getxattr(path, _posix_acl.ATTRIBUTE) == before


def test_users_of_the_list_must_exist_and_setfacl_must_be_there(tree: pathlib.Path) -> None:
    accounts = Accounts(Host(str(tree)))
    with pytest.raises(OptionError, match=r"^acl_users\[0\]: 'nosuch'"):
        _udev.resolve_access(accounts, "", "me", "mine", 0o660, ["nosuch"])
    with pytest.raises(OptionError, match=r"^nodes\[0\]\.acl_groups\[1\]: "):
        _udev.resolve_access(accounts, "nodes[0].", "me", "mine", 0o660, [], ["kvm", 'a", RUN+="x'])
    with pytest.raises(HostError, match="package acl"):
        _udev.plan_present(read(tree), {"cdevs": listed()}, False, Host(str(tree)))


def test_a_node_that_udev_handled_as_before_is_triggered_once_more(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("first", "late", "never")]
    for path in paths:
        path.touch()
        path.chmod(0o600)
    nodes = [
        _udev.LiveNode("iommu", str(path), "/sys/x", *[_udev.Access("me", "us", 0o600, ME, MINE)] * 2) for path in paths
    ]
    rounds: list[list[str]] = []

    def trigger(here: t.Sequence[_udev.LiveNode]) -> None:
        rounds.append([pathlib.Path(node.path).name for node in here])
        for node in here:
            if node.path == str(paths[len(rounds) - 1]):
                os.chmod(node.path, 0o660)

    monkeypatch.setattr(_udev, "_trigger", trigger)
    host = Host()
    wanted = {"iommu": _udev.Access("me", "us", 0o660, ME, MINE)}
    _udev.FollowRules("follow", nodes=nodes[:2], wanted=wanted, host=host).apply()
    assert rounds == [["first", "late"], ["late"]]
    rounds.clear()
    paths[0].chmod(0o600)
    paths[1].chmod(0o600)
    with pytest.raises(HostError, match="never did not become me:us 0660 but has uid"):
        _udev.FollowRules("follow", nodes=nodes, wanted=wanted, host=host).apply()
    assert rounds == [["first", "late", "never"], ["late", "never"]]
