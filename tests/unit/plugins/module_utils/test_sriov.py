# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _sriov_plan
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._host import Host, Output
from ansible_collections.iommufd.host.plugins.module_utils._pci import read_function, vf_address, vf_addresses
from ansible_collections.iommufd.host.plugins.module_utils._persistence import CONF as DEVICES_CONF
from ansible_collections.iommufd.host.plugins.module_utils._persistence import Entry
from ansible_collections.iommufd.host.plugins.module_utils._persistence import render as render_devices
from ansible_collections.iommufd.host.plugins.module_utils._plan import Command, RemoveFile, WriteAttribute, WriteFile
from ansible_collections.iommufd.host.plugins.module_utils._sriov import (
    Param,
    VfSettings,
    interface_of,
    read_params,
    read_settings,
)
from ansible_collections.iommufd.host.plugins.module_utils._sriov_persistence import (
    CONF,
    RULE,
    SCRIPT,
    UNIT,
    UNIT_LINK,
    KeptPf,
    parse,
    plan_kept,
    read_kept,
    render,
    script_content,
)
from ansible_collections.iommufd.host.plugins.module_utils._sriov_plan import (
    MakeVfs,
    ProbeVfs,
    RemoveVfs,
    Request,
    TellVfs,
    decide,
    describe,
    describe_planned,
    tell,
    verify,
)
from ansible_collections.iommufd.host.tests.unit.machine import Machine

PF = "0000:01:00.0"
OTHER = "0000:02:00.0"
VFS = ["0000:01:10.0", "0000:01:10.2", "0000:01:10.4"]
RELEASE = "6.12.0"


class Answering(Host):
    """A host whose `ip` and `devlink` say what a test wants."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.settings: list[dict[str, t.Any]] = []
        self.params: list[dict[str, t.Any]] = []

    def ask(self, argv: t.Sequence[str], timeout: float = 30.0, stdin: str = "") -> Output | None:
        if argv[0] == "ip":
            return Output(0, json.dumps([{"ifname": argv[-1], "vfinfo_list": self.settings}]), "")
        if argv[0] == "devlink":
            return Output(0, json.dumps({"param": {argv[-1]: self.params}}), "") if self.params else Output(1, "", "")
        return None


def reported(index: int, **changes: t.Any) -> dict[str, t.Any]:
    """A VF as `ip -j -d link show` has it (iproute2 6.15, igb)."""
    row = {
        "vf": index,
        "link_type": "ether",
        "address": "00:00:00:00:00:00",
        "broadcast": "ff:ff:ff:ff:ff:ff",
        "vlan_list": [{"vlan": 0}],
        "rate": {"max_tx": 0, "min_tx": 0},
        "spoofchk": True,
        "link_state": "auto",
        "trust": False,
    }
    return {**row, **changes}


@pytest.fixture
def host(machine: Machine) -> Answering:
    """Two cards that can have seven VFs each and have none."""
    machine.file("/proc/sys/kernel/osrelease", RELEASE + "\n")
    machine.directory("/usr/lib/systemd/system")
    modules = f"/usr/lib/modules/{RELEASE}"
    machine.file(f"{modules}/modules.dep", "kernel/igbvf.ko:\n")
    machine.file(f"{modules}/modules.alias", "alias pci:v00008086d000010CAsv*sd*bc*sc*i* igbvf\n")
    for address, nic in ((PF, "enp1s0"), (OTHER, "enp2s0")):
        machine.pci(
            address,
            "8086:10c9",
            driver="igb",
            sriov_totalvfs=7,
            sriov_numvfs=0,
            sriov_offset=128,
            sriov_stride=2,
            sriov_drivers_autoprobe=1,
        )
        machine.interface(nic, address)
    machine.pci("0000:00:1f.0", "8086:2918", "060100")
    return Answering(str(machine.root))


def with_vfs(machine: Machine, host: Answering, count: int, driver: str | None = None, autoprobe: int = 0) -> None:
    path = machine.paths[PF]
    machine.attributes(path, sriov_numvfs=count, sriov_drivers_autoprobe=autoprobe)
    for index, address in enumerate(VFS[:count]):
        machine.pci(address, "8086:10ca", driver=driver, group=30 + index)
        machine.link(f"{path}/virtfn{index}", machine.paths[address])
        machine.link(f"{machine.paths[address]}/physfn", path)
    host.settings = [reported(index) for index in range(count)]


def pf(vfs: int | None = 2, address: str | None = PF, **options: t.Any) -> dict[str, t.Any]:
    return {"address": address, "vfs": vfs, "autoprobe": False, **options}


def decided(host: Host, *pfs: dict[str, t.Any], **options: t.Any) -> _sriov_plan.Decision:
    options.setdefault("persistent", False)
    return decide(host, Request(pfs, **options))


def refused(host: Host, *pfs: dict[str, t.Any], **options: t.Any) -> str:
    with pytest.raises(Refusal) as caught:
        decided(host, *pfs, **options)
    assert caught.value.details["refusals"]
    return caught.value.message


# -- addresses and reports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("physfn", "offset", "stride", "index", "expected"),
    [
        ("0000:01:00.0", 128, 2, 0, "0000:01:10.0"),  # igb
        ("0000:01:00.0", 128, 2, 6, "0000:01:11.4"),
        ("0000:03:00.1", 128, 2, 1, "0000:03:10.3"),
        ("0000:3b:00.0", 4, 1, 9, "0000:3b:01.5"),
        ("10000:e1:00.0", 256, 1, 0, "10000:e2:00.0"),
        ("0000:ff:00.0", 256, 1, 0, None),
    ],
)
def test_where_a_vf_is(physfn: str, offset: int, stride: int, index: int, expected: str | None) -> None:
    assert vf_address(physfn, offset, stride, index) == expected


def test_the_vfs_of_a_real_machine_are_where_they_are_predicted(vgpu_node: pathlib.Path) -> None:
    host = Host(str(vgpu_node))
    found = 0
    for address in host.listdir("/sys/bus/pci/devices"):
        function = read_function(host, address)
        if function is None or function.sriov is None or not function.sriov.vfs:
            continue
        assert vf_addresses(function, len(function.sriov.vfs)) == function.sriov.vfs
        found += len(function.sriov.vfs)
    assert found


def test_what_a_driver_reports(host: Answering) -> None:
    host.settings = [
        reported(0, address="02:00:00:AA:00:01", vlan_list=[{"vlan": 100, "qos": 3}], trust=True),
        {"vf": 1, "mac": "02:00:00:aa:00:02", "spoofchk": False},
    ]
    assert read_settings(host, "enp1s0") == {
        0: VfSettings("02:00:00:aa:00:01", 100, 3, True, True, "auto", 0, 0),
        1: VfSettings("02:00:00:aa:00:02", 0, 0, False),
    }


def test_without_ip_nothing_is_known(machine: Machine) -> None:
    assert read_settings(machine.host, "enp1s0") is None


def test_settings_in_the_words_of_ip_and_back() -> None:
    settings = VfSettings("02:00:00:00:00:01", 100, 3, False, True, "enable", 10, 100)
    words = settings.words()
    assert " ".join(words) == (
        "mac 02:00:00:00:00:01 vlan 100 qos 3 min_tx_rate 10 max_tx_rate 100 spoofchk off state enable trust on"
    )
    assert VfSettings.parse(words) == settings


def test_vlan_and_priority_are_told_together() -> None:
    now = VfSettings("02:00:00:00:00:01", 100, 0, True)
    assert VfSettings(vlan=100, qos=3).differing(now) == VfSettings(vlan=100, qos=3)
    assert VfSettings(vlan=100, qos=0, spoof_check=True).differing(now) == VfSettings()


def test_a_representor_is_not_the_interface_of_the_pf(machine: Machine, host: Answering) -> None:
    path = machine.interface("eth0", PF)
    machine.file(f"{path}/phys_port_name", "pf0vf3\n")
    assert interface_of(host, PF) == "enp1s0"


def test_devlink_parameters(host: Answering) -> None:
    host.params = [
        {"name": "enable_sriov", "type": "generic", "values": [{"cmode": "permanent", "value": True}]},
        {"name": "msix_vec_per_pf_max", "values": [{"cmode": "permanent", "value": 16}, {"cmode": "runtime"}]},
    ]
    assert read_params(host, PF) == {"enable_sriov": {"permanent": "true"}, "msix_vec_per_pf_max": {"permanent": "16"}}


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pfs", "option", "says"),
    [
        ([pf(address=None)], "pfs[0]", "one of the keys address and nic"),
        ([pf(nic="enp1s0")], "pfs[0]", "one of the keys address and nic"),
        ([pf(address="zz")], "pfs[0].address", "PCI address"),
        ([pf(address="0000:09:00.0")], "pfs[0].address", f"no such device.*{PF}, {OTHER}"),
        ([pf(address="0000:00:1f.0")], "pfs[0].address", "offers no SR-IOV.*this host has: 0000:01:00.0"),
        ([pf(address=None, nic="eth7")], "pfs[0].nic", "this host has: enp1s0, enp2s0"),
        ([pf(address=None, nic="../enp1s0")], "pfs[0].nic", "this host has"),
        ([pf(), pf(address=None, nic="enp1s0")], "pfs[1]", r"pfs\[0\] is the same PF"),
        ([pf(8)], "pfs[0].vfs", "from 0 to 7"),
        ([pf(-1)], "pfs[0].vfs", "from 0 to 7"),
        ([pf(None)], "pfs[0].vfs", "from 0 to 7"),
        ([pf(vf_settings=[{"index": 2, "trust": True}])], "pfs[0].vf_settings[0].index", "from 0 to 1"),
        ([pf(0, vf_settings=[{"index": 0}])], "pfs[0].vf_settings[0].index", "vfs is 0"),
        ([pf(vf_settings=[{"index": 1}, {"index": 1}])], "pfs[0].vf_settings[1].index", "each VF once"),
        ([pf(vf_settings=[{"index": 0, "mac": "02:00:00:00:01"}])], "pfs[0].vf_settings[0].mac", "unicast MAC"),
        ([pf(vf_settings=[{"index": 0, "mac": "01:00:5e:00:00:01"}])], "pfs[0].vf_settings[0].mac", "multicast"),
        ([pf(vf_settings=[{"index": 0, "mac": "00:00:00:00:00:00"}])], "pfs[0].vf_settings[0].mac", "zeros"),
        ([pf(vf_settings=[{"mac": "02:00:00:00:00:01"}])], "pfs[0].vf_settings[0].mac", "together with index"),
        (
            [
                pf(vf_settings=[{"index": 0, "mac": "02:00:00:00:00:01"}]),
                pf(address=OTHER, vf_settings=[{"index": 1, "mac": "02-00-00-00-00-01"}]),
            ],
            "pfs[1].vf_settings[0].mac",
            r"pfs\[0\]\.vf_settings\[0\]\.mac has it",
        ),
        ([pf(vf_settings=[{"vlan": 4095}])], "pfs[0].vf_settings[0].vlan", "1 to 4094"),
        ([pf(vf_settings=[{"vlan": -1}])], "pfs[0].vf_settings[0].vlan", "1 to 4094"),
        ([pf(vf_settings=[{"vlan": 5, "qos": 8}])], "pfs[0].vf_settings[0].qos", "0 to 7"),
        ([pf(vf_settings=[{"qos": 1}])], "pfs[0].vf_settings.qos", "together with vlan"),
        ([pf(vf_settings=[{"max_tx_rate": -5}])], "pfs[0].vf_settings[0].max_tx_rate", "Mbit/s"),
        (
            [pf(vf_settings=[{"index": 0, "max_tx_rate": 10, "min_tx_rate": 11}])],
            "pfs[0].vf_settings[0].min_tx_rate",
            "max_tx_rate, 10",
        ),
        ([pf(devlink_params={"x": {"values": 1}})], "pfs[0].devlink_params.x", "value and cmode"),
        ([pf(devlink_params={"x": {"value": 1, "cmode": "now"}})], "pfs[0].devlink_params.x.cmode", "runtime"),
        ([pf(devlink_params={"x": "a b"})], "pfs[0].devlink_params.x", "a word"),
    ],
)
def test_what_is_not_acceptable_is_named(host: Answering, pfs: t.Any, option: str, says: str) -> None:
    with pytest.raises(OptionError, match=says) as caught:
        decided(host, *pfs)
    assert caught.value.option == option


def test_a_vf_is_no_pf(machine: Machine, host: Answering) -> None:
    with_vfs(machine, host, 1)
    with pytest.raises(OptionError, match=f"a VF itself, of {PF}"):
        decided(host, pf(address=VFS[0]))


def test_what_is_for_one_vf_wins_over_what_is_for_all(host: Answering) -> None:
    rows = [{"index": 1, "vlan": 7, "trust": None}, {"vlan": 5, "trust": True}]
    (step,) = [one for one in decided(host, pf(vf_settings=rows)).plan.steps if isinstance(one, TellVfs)]
    assert step.settings == {0: VfSettings(vlan=5, qos=0, trust=True), 1: VfSettings(vlan=7, qos=0, trust=True)}


# -- the plan ------------------------------------------------------------------------------------------------------


def test_vfs_are_made_with_autoprobe_off_and_told_their_settings(host: Answering) -> None:
    decision = decided(host, pf(vf_settings=[{"index": 0, "mac": "02:00:00:00:00:0A"}]), pf(3, OTHER))
    assert [type(step) for step in decision.plan.steps] == [MakeVfs, TellVfs, MakeVfs]
    assert decision.plan.summary()[0] == f"make 2 VFs of {PF} (0000:01:10.0, 0000:01:10.2)"
    assert decision.plan.summary()[1].endswith("VF 0 mac 02:00:00:00:00:0a")
    assert decision.plan.diff()[0]["after"] == "autoprobe: off\n2 VFs\n0000:01:10.0\n0000:01:10.2\n"


def test_by_interface_it_is_the_same(host: Answering) -> None:
    assert decided(host, pf(address=None, nic="enp2s0")).pfs[0][0].address == OTHER


def test_drivers_of_the_host_come_last(machine: Machine, host: Answering) -> None:
    machine.file(DEVICES_CONF, render_devices([Entry(VFS[0], "vfio-pci", "8086:10ca")]))
    plan = decided(host, pf(autoprobe=True, vf_settings=[{"vlan": 5}])).plan
    assert [type(step) for step in plan.steps] == [MakeVfs, TellVfs, WriteAttribute, ProbeVfs]
    assert plan.summary()[-1] == f"let drivers of the host take {VFS[1]}", "a guest's VF is not for them"


def test_nothing_to_do(machine: Machine, host: Answering) -> None:
    with_vfs(machine, host, 2)
    host.settings[1].update(address="02:00:00:00:00:01", vlan_list=[{"vlan": 5, "qos": 2}])
    rows = [{"index": 1, "mac": "02:00:00:00:00:01", "vlan": 5, "qos": 2}, {"trust": False}]
    decision = decided(host, pf(vf_settings=rows))
    assert not decision.plan.changed
    assert describe(decision, verify(host, decision)) == describe_planned(decision)


def test_only_what_differs_is_told(machine: Machine, host: Answering) -> None:
    with_vfs(machine, host, 2)
    host.settings[0].update(trust=True, vlan_list=[{"vlan": 5}])
    (step,) = decided(host, pf(vf_settings=[{"trust": True, "vlan": 5, "qos": 1}])).plan.steps
    assert isinstance(step, TellVfs)
    assert step.settings == {0: VfSettings(vlan=5, qos=1), 1: VfSettings(vlan=5, qos=1, trust=True)}
    assert step.had == {0: VfSettings(vlan=5, qos=0), 1: VfSettings(vlan=0, qos=0, trust=False)}


def test_autoprobe_alone(machine: Machine, host: Answering) -> None:
    with_vfs(machine, host, 1, "igbvf", autoprobe=1)
    (step,) = decided(host, pf(1)).plan.steps
    assert isinstance(step, WriteAttribute)
    assert (step.value, step.undo_value) == ("0", "1")


def test_what_a_killed_run_left_without_a_driver_is_taken_up(machine: Machine, host: Answering) -> None:
    with_vfs(machine, host, 2, autoprobe=1)
    machine.attributes(machine.paths[VFS[0]], driver_override="vfio-pci")
    (step,) = decided(host, pf(autoprobe=True)).plan.steps
    assert isinstance(step, ProbeVfs)
    assert step.summary.endswith(f"take {VFS[1]}")


def test_another_number_removes_all_first(machine: Machine, host: Answering) -> None:
    with_vfs(machine, host, 2)
    plan = decided(host, pf(3)).plan
    assert [type(step) for step in plan.steps] == [RemoveVfs, MakeVfs]
    assert plan.summary()[0] == f"remove the 2 VFs of {PF} ({VFS[0]}, {VFS[1]})"


@pytest.mark.parametrize("present", [True, False])
def test_none(machine: Machine, host: Answering, present: bool) -> None:
    with_vfs(machine, host, 2)
    machine.attributes(machine.paths[PF], sriov_drivers_autoprobe=0)
    decision = decided(host, pf(0 if present else None), present=present)
    plan = decision.plan
    assert describe_planned(decision)[0]["autoprobe"], "check mode says so, too"
    assert [type(step) for step in plan.steps] == [RemoveVfs, WriteAttribute]
    assert plan.summary()[1] == f"turn autoprobe of {PF} on", "as the kernel has it"


def test_none_where_there_are_none_is_nothing(machine: Machine, host: Answering) -> None:
    machine.attributes(machine.paths[PF], sriov_drivers_autoprobe=0)
    assert not decided(host, pf(None), present=False).plan.changed, "nor is autoprobe ours"


def test_to_come_is_shown_as_far_as_it_is_known(host: Answering) -> None:
    rows = [{"index": 1, "mac": "02:00:00:00:00:01"}]
    (shown,) = describe_planned(decided(host, pf(vf_settings=rows)))
    assert shown["num_vfs"] == 2
    assert [(vf["address"], vf["driver"], vf["mac"]) for vf in shown["vfs"]] == [
        (VFS[0], None, None),
        (VFS[1], None, "02:00:00:00:00:01"),
    ]


def test_parameters_come_first_and_go_back(machine: Machine, host: Answering) -> None:
    host.params = [{"name": "flow_steering_mode", "values": [{"cmode": "runtime", "value": "dmfs"}]}]
    decision = decided(host, pf(devlink_params={"flow_steering_mode": "smfs"}), persistent=True)
    first = decision.plan.steps[0]
    assert isinstance(first, Command)
    assert first.argv[-3:] == ["smfs", "cmode", "runtime"]
    assert first.undo_argv is not None
    assert first.undo_argv[-3:] == ["dmfs", "cmode", "runtime"]
    assert decision.kept[PF].params == {"flow_steering_mode": Param("smfs", "runtime", "dmfs")}
    # Later, with the value set and no longer wanted.
    with_vfs(machine, host, 2)
    machine.file(CONF, render(decision.kept.values()))
    host.params[0]["values"][0]["value"] = "smfs"
    assert "to dmfs (runtime)" in decided(host, pf(), persistent=True).plan.summary()[0]
    again = decided(host, pf(devlink_params={"flow_steering_mode": "smfs"}), persistent=True)
    assert again.kept == decision.kept, "what it was before is not forgotten"


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_pf_for_a_guest_is_refused(machine: Machine, host: Answering) -> None:
    machine.at(f"{machine.paths[PF]}/driver").unlink()
    assert "has no driver" in refused(host, pf())
    machine.link(f"{machine.paths[PF]}/driver", "/sys/bus/pci/drivers/vfio-pci")
    assert "enable_sriov" in refused(host, pf())
    assert not decided(host, pf(None), present=False).plan.changed


def test_a_vf_kept_for_guests_stays(machine: Machine, host: Answering) -> None:
    with_vfs(machine, host, 2, "vfio-pci")
    message = refused(host, pf(3))
    assert f"({VFS[0]}, {VFS[1]})" in message
    assert f"{VFS[1]} is kept for guests on vfio-pci" in message
    assert "force=true" in message
    assert isinstance(decided(host, pf(3), force=True).plan.steps[0], RemoveVfs)
    assert not decided(host, pf(2)).plan.changed, "the number stays"


def test_vfs_that_an_earlier_task_will_give_back_do_not_hinder_a_plan(machine: Machine, host: Answering) -> None:
    with_vfs(machine, host, 2, "vfio-pci")
    assert decided(host, pf(None), present=False, pending=True).plan.changed
    machine.cdev(VFS[0], 0, "241:0")
    machine.process(77, "qemu-system-x86", ["qemu-system-x86_64", "-name", "web"], ["/dev/vfio/devices/vfio0"])
    assert "the running guest web" in refused(host, pf(None), present=False, pending=True)


def test_a_vf_in_use_stays(machine: Machine, host: Answering) -> None:
    with_vfs(machine, host, 1, "igbvf", autoprobe=1)
    machine.interface("enp1s0v0", VFS[0])
    machine.routes(("enp1s0v0", "10.0.0.0", "0.0.0.0", "255.0.0.0"))
    assert "enp1s0v0 carries the route to 10.0.0.0/8" in refused(host, pf(None), present=False)
    assert decided(host, pf(None), present=False, force=True).plan.changed


def test_a_guest_keeps_its_vf_even_from_force(machine: Machine, host: Answering) -> None:
    with_vfs(machine, host, 1, "vfio-pci")
    machine.cdev(VFS[0], 0, "241:0")
    machine.process(77, "qemu-system-x86", ["qemu-system-x86_64", "-name", "web"], ["/dev/vfio/devices/vfio0"])
    message = refused(host, pf(None), present=False, force=True)
    assert "the running guest web" in message
    assert "force=true" not in message


def test_settings_need_an_interface(machine: Machine, host: Answering) -> None:
    machine.pci("0000:04:00.0", "144d:a824", "010802", driver="nvme", sriov_totalvfs=4, sriov_numvfs=0)
    wanted = pf(1, "0000:04:00.0")
    assert "no network interface of its own (driver nvme)" in refused(host, {**wanted, "vf_settings": [{"vlan": 5}]})
    assert decided(host, wanted).plan.changed


def test_an_unknown_parameter_is_refused(host: Answering) -> None:
    host.params = [{"name": "enable_roce", "values": [{"cmode": "driverinit", "value": True}]}]
    assert "no devlink parameter nosuch of mode runtime; it has: enable_roce" in refused(
        host, pf(devlink_params={"nosuch": 1})
    )


def test_all_reasons_are_told_at_once(machine: Machine, host: Answering) -> None:
    with_vfs(machine, host, 1, "vfio-pci")
    machine.at(f"{machine.paths[OTHER]}/driver").unlink()
    message = refused(host, pf(2), pf(2, OTHER))
    assert "kept for guests" in message
    assert f"{OTHER} has no driver" in message


# -- carrying it out -----------------------------------------------------------------------------------------------


class Kernel:
    """What the kernel does when ``sriov_numvfs`` is written, for the child that writes."""

    def __init__(self, machine: Machine, refuse: tuple[int, ...] = ()) -> None:
        self.machine = machine
        self.refuse = refuse

    def __call__(self, path: str, value: str) -> None:
        attribute = pathlib.Path(path)
        if attribute.name == "sriov_numvfs":
            if int(value) in self.refuse:
                raise OSError(12, "Cannot allocate memory")
            directory = self.machine.paths[PF]
            for link in self.machine.at(directory).glob("virtfn*"):
                link.unlink()
            for index in range(int(value)):
                self.machine.link(f"{directory}/virtfn{index}", f"/sys/devices/pci0000:01/{VFS[index]}")
        attribute.write_text(value + "\n")


def attribute(machine: Machine, name: str) -> str:
    return machine.at(f"{machine.paths[PF]}/{name}").read_text().strip()


def test_vfs_are_made(machine: Machine, host: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sriov_plan, "_write", Kernel(machine))
    decided(host, pf()).plan.apply()
    assert (attribute(machine, "sriov_numvfs"), attribute(machine, "sriov_drivers_autoprobe")) == ("2", "0")


@pytest.mark.parametrize("had", [0, 1])
def test_a_failure_puts_number_and_autoprobe_back(
    machine: Machine, host: Answering, monkeypatch: pytest.MonkeyPatch, had: int
) -> None:
    if had:
        with_vfs(machine, host, had, "igbvf", autoprobe=1)
    monkeypatch.setattr(_sriov_plan, "_write", Kernel(machine, refuse=(3,)))
    with pytest.raises(HostError, match=r"igb of 0000:01:00\.0 did not set.*to 3: Cannot allocate memory.*put back"):
        decided(host, pf(3)).plan.apply()
    assert (attribute(machine, "sriov_numvfs"), attribute(machine, "sriov_drivers_autoprobe")) == (str(had), "1")


def test_settings_that_fail_take_the_new_vfs_with_them(
    machine: Machine, host: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def ip(argv: t.Sequence[str], timeout: float = 120.0, stdin: str = "") -> str:
        told.append(stdin)
        raise HostError(
            "`ip -batch -` ended with status 1: RTNETLINK answers: Operation not supported / Command failed -:2"
        )

    monkeypatch.setattr(_sriov_plan, "_write", Kernel(machine))
    monkeypatch.setattr(_sriov_plan, "run", ip)
    with pytest.raises(HostError, match=r"vf 1 vlan 5 qos 0` failed: RTNETLINK answers: Operation not supp.*put back"):
        decided(host, pf(vf_settings=[{"vlan": 5}])).plan.apply()
    assert told == ["link set dev enp1s0 vf 0 vlan 5 qos 0\nlink set dev enp1s0 vf 1 vlan 5 qos 0\n"]
    assert attribute(machine, "sriov_numvfs") == "0"


def test_what_a_driver_refused_is_not_in_the_way_back(
    machine: Machine, host: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_vfs(machine, host, 2, "igbvf", autoprobe=1)
    host.settings = [reported(index, trust=False, link_state="auto") for index in range(2)]
    told: list[str] = []

    def ip(argv: t.Sequence[str], timeout: float = 120.0, stdin: str = "") -> str:
        told.append(stdin)
        for number, line in enumerate(stdin.splitlines(), start=1):
            words = line.split()
            if "state" in words:
                raise HostError(f"status 1: RTNETLINK answers: Operation not supported / Command failed -:{number}")
            host.settings[int(words[5])]["trust"] = words[7] == "on"
        return ""

    monkeypatch.setattr(_sriov_plan, "run", ip)
    rows = [{"index": 0, "trust": True}, {"index": 1, "link_state": "disable"}]
    with pytest.raises(HostError, match=r"vf 1 state disable` failed: .*Everything was put back"):
        decided(host, pf(autoprobe=True, vf_settings=rows)).plan.apply()
    assert told[1:] == ["link set dev enp1s0 vf 0 trust off\n"]
    assert host.settings[0]["trust"] is False


def test_a_driver_that_silently_keeps_its_own_is_found_out(host: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sriov_plan, "run", lambda argv, timeout=120.0, stdin="": "")
    host.settings = [{"vf": 0, "address": "02:00:00:00:00:09"}]
    step = TellVfs(host, PF, "enp1s0", {0: VfSettings(mac="02:00:00:00:00:01", trust=True)}, {})
    with pytest.raises(HostError, match=r"mac of VF 0 is 02:00:00:00:00:09, not .*; trust of VF 0 is not reported"):
        step.apply()


def test_nothing_is_told_when_there_is_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sriov_plan, "run", lambda *_arguments, **_options: pytest.fail("asked"))
    tell("enp1s0", {0: VfSettings()})


# -- across reboots ------------------------------------------------------------------------------------------------

KEPT = KeptPf(
    PF,
    "8086:10c9",
    2,
    True,
    {0: VfSettings(mac="02:00:00:00:00:01", trust=True), 1: VfSettings(vlan=5, qos=0)},
    {"flow_steering_mode": Param("smfs", "runtime", "dmfs"), "enable_roce": Param("true", "driverinit")},
)


def test_the_file_comes_back_as_it_was_written() -> None:
    text = render([KeptPf(OTHER, "8086:10c9", 7, False), KEPT]).decode()
    assert list(parse(text).values()) == [KEPT, KeptPf(OTHER, "8086:10c9", 7, False)]
    assert f"pf {PF} 8086:10c9 2 autoprobe on\n" in text
    assert f"vf {PF} 0 mac 02:00:00:00:00:01 trust on\n" in text


@pytest.mark.parametrize(
    "line",
    [
        "",
        "# x",
        f"pf {PF} 8086 2 autoprobe on",
        f"pf {PF} 8086:10c9 x autoprobe on",
        "vf a 0 mac b",
        "pf",
        f"vf {PF} 0 x y",
    ],
)
def test_damaged_lines_are_passed_over(line: str) -> None:
    assert parse(f"{line}\n") == {}


def test_files_are_written_once_and_removed_without_a_trace(machine: Machine, host: Answering) -> None:
    def carry_out(wanted: dict[str, KeptPf]) -> list[str]:
        steps = plan_kept(host, wanted)
        for step in steps:
            if isinstance(step, (WriteFile, RemoveFile)):
                step.apply()
            elif isinstance(step, Command) and "enable" in step.argv:
                machine.link(UNIT_LINK, UNIT)
            elif isinstance(step, Command) and "disable" in step.argv:
                machine.at(UNIT_LINK).unlink()
        return [step.subject for step in steps]

    assert carry_out({PF: KEPT}) == [SCRIPT, RULE, UNIT, "iommufd-host-sriov.service", CONF]
    assert read_kept(host) == {PF: KEPT}
    assert carry_out({PF: KEPT}) == []
    assert carry_out({}) == ["iommufd-host-sriov.service", CONF, RULE, UNIT, SCRIPT]
    assert [path for path in machine.at("/etc").rglob("*") if not path.is_dir()] == []
    assert not machine.at("/etc/iommufd-host").exists()


def test_what_is_kept_for_other_pfs_stays(machine: Machine, host: Answering) -> None:
    machine.file(CONF, render([KeptPf(OTHER, "8086:10c9", 4, False)]))
    decision = decided(host, pf(), persistent=True)
    assert {address: one.count for address, one in decision.kept.items()} == {OTHER: 4, PF: 2}
    assert decided(host, pf(None, OTHER), present=False).kept == {}


def test_a_pf_that_is_gone_can_be_forgotten(machine: Machine, host: Answering) -> None:
    machine.file(CONF, render([KeptPf("0000:07:00.0", "8086:10c9", 4, False)]))
    decision = decided(host, pf(None, "0000:07:00.0"), present=False)
    assert decision.kept == {}
    assert decision.plan.changed


def test_somebody_elses_file_is_refused(machine: Machine, host: Answering) -> None:
    machine.file(CONF, "mine\n")
    with pytest.raises(Refusal, match=re.escape(CONF)):
        decided(host, pf(), persistent=True)


class Script:
    """The script on a synthetic host, where an attribute keeps what is written to it, and commands note how they are
    called."""

    def __init__(self, machine: Machine, shell: list[str], *kept: KeptPf) -> None:
        self.machine = machine
        self.shell = shell
        machine.file("/proc/cmdline", "quiet\n")
        machine.file("/dev/kmsg", "")
        machine.directory("/run")
        machine.file(CONF, render(kept))
        text = script_content().decode()
        text = re.sub(r"(?<=[=<])(?=/(?:sys|proc|etc|run)/)", str(machine.root), text)
        text = text.replace(">/dev/kmsg", f">>{machine.root}/dev/kmsg")
        machine.file(SCRIPT, text)
        for name in ("ip", "devlink", "udevadm", "flock", "modprobe"):
            machine.file(f"/bin/{name}", f'#!/bin/sh\necho {name} "$@" >>{machine.root}/called\n')
            machine.at(f"/bin/{name}").chmod(0o755)

    def run(self, *arguments: str) -> tuple[str, str]:
        """The kernel log, and the commands that were called (without udevadm and flock)."""
        path = f"{self.machine.at('/bin')}:/usr/bin:/bin"
        command = [*self.shell, str(self.machine.at(SCRIPT)), *arguments]
        done = subprocess.run(command, env={"PATH": path}, stderr=subprocess.PIPE, timeout=60, check=True)
        assert done.stderr == b""
        called = self.machine.at("/called")
        lines = called.read_text().splitlines() if called.exists() else []
        return self.machine.at("/dev/kmsg").read_text(), "\n".join(
            line for line in lines if not line.startswith(("udevadm", "flock"))
        )


@pytest.fixture(params=[["sh"], ["bash", "--posix"]], ids=lambda shell: shell[0])
def script(machine: Machine, host: Answering, request: pytest.FixtureRequest) -> Script:
    if shutil.which(request.param[0]) is None:
        pytest.skip(f"{request.param[0]} is not installed")
    return Script(machine, request.param, dataclasses.replace(KEPT, autoprobe=False))


def test_the_script_makes_vfs_and_tells_their_settings(machine: Machine, script: Script) -> None:
    log, called = script.run("boot")
    assert f"<6>iommufd-host: {PF}: 2 virtual functions\n" == log
    assert (attribute(machine, "sriov_numvfs"), attribute(machine, "sriov_drivers_autoprobe")) == ("2", "0")
    assert called.splitlines() == [
        f"devlink dev param set pci/{PF} name enable_roce value true cmode driverinit",
        f"devlink dev param set pci/{PF} name flow_steering_mode value smfs cmode runtime",
        "ip link set dev enp1s0 vf 0 mac 02:00:00:00:00:01 trust on",
        "ip link set dev enp1s0 vf 1 vlan 5 qos 0",
    ]


def test_the_script_makes_only_what_is_named_and_missing(machine: Machine, script: Script) -> None:
    assert script.run("add", OTHER) == ("", "")
    machine.attributes(machine.paths[PF], sriov_numvfs=2)
    log, called = script.run("add", PF)
    assert log == ""
    assert "vf 1 vlan 5" in called, "settings are told again: the driver may have lost them"
    machine.attributes(machine.paths[PF], sriov_numvfs=4)
    assert "has 4 virtual functions already, not 2" in script.run("add", PF)[0]
    assert attribute(machine, "sriov_numvfs") == "4"


def test_the_script_leaves_another_kind_of_device_alone(machine: Machine, script: Script) -> None:
    machine.attributes(machine.paths[PF], device="0x1521")
    assert "is 8086:1521, not 8086:10c9" in script.run("boot")[0]
    assert attribute(machine, "sriov_numvfs") == "0"


def test_the_script_needs_a_driver_of_the_host(machine: Machine, script: Script) -> None:
    machine.directory(f"{machine.paths[PF]}/vfio-dev")
    assert "no driver that makes virtual functions" in script.run("add", PF)[0]


def test_the_script_tells_that_a_device_offers_none_any_more(machine: Machine, script: Script) -> None:
    machine.at(f"{machine.paths[PF]}/sriov_numvfs").unlink()
    log, called = script.run("boot")
    assert (log, called) == (
        f"<3>iommufd-host: {PF}: offers no virtual functions (off in its firmware, or in the BIOS)\n",
        "",
    )


def test_the_kernel_argument_turns_the_script_off(machine: Machine, script: Script) -> None:
    machine.file("/proc/cmdline", "quiet iommufd_host=off\n")
    log, called = script.run("boot")
    assert ("iommufd_host=off: no virtual functions" in log, called) == (True, "")


def test_what_fails_is_in_the_kernel_log(machine: Machine, script: Script) -> None:
    machine.file("/bin/ip", "#!/bin/sh\necho RTNETLINK answers: no >&2\nexit 2\n")
    log, _called = script.run("boot")
    assert f"<3>iommufd-host: {PF}: ip link set dev enp1s0 vf 1 vlan 5 qos 0: RTNETLINK answers: no" in log


def test_drivers_of_the_host_get_vfs_that_are_not_for_guests(machine: Machine, host: Answering) -> None:
    with_vfs(machine, host, 2)
    machine.attributes(machine.paths[PF], sriov_numvfs=0)  # the links are there at once
    machine.file(DEVICES_CONF, render_devices([Entry(VFS[0], "vfio-pci", "8086:10ca")]))
    _log, called = Script(machine, ["sh"], KEPT).run("boot")
    assert attribute(machine, "sriov_drivers_autoprobe") == "1"
    assert machine.at("/sys/bus/pci/drivers_probe").read_text() == f"{VFS[1]}\n"
    assert called.splitlines()[-1].startswith("modprobe -qb pci:v00008086d000010CA")
