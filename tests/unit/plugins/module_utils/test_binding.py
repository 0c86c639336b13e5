# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import dataclasses
import shutil
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _binding
from ansible_collections.iommufd.host.plugins.module_utils._binding import (
    Binding,
    Request,
    decide,
    describe,
    read_situation,
    verify,
)
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._given_away import MEMORY
from ansible_collections.iommufd.host.plugins.module_utils._iommu import by_address
from ansible_collections.iommufd.host.plugins.module_utils._names import Names
from ansible_collections.iommufd.host.plugins.module_utils._pci import read_functions
from ansible_collections.iommufd.host.plugins.module_utils._persistence import CONF, Entry, render
from ansible_collections.iommufd.host.plugins.module_utils._plan import RemoveFile, WriteFile
from ansible_collections.iommufd.host.plugins.module_utils._udev import Access, rules_text
from ansible_collections.iommufd.host.plugins.module_utils._vfio import Bind, LoadDriver, Release
from ansible_collections.iommufd.host.tests.unit.machine import Machine

RELEASE = "6.12.0"
NVME = "0000:01:00.0"
NIC = "0000:03:00.0"
AUDIO = "0000:03:00.1"


@pytest.fixture
def server(machine: Machine) -> Machine:
    """A disk and a NIC in groups of their own, vfio-pci loaded with character devices."""
    machine.file("/proc/sys/kernel/osrelease", RELEASE + "\n")
    machine.file("/proc/cmdline", "quiet\n")
    machine.file("/proc/devices", "Character devices:\n  1 mem\n241 vfio-dev\n")
    machine.directory("/sys/module/vfio")
    machine.directory("/sys/bus/pci/drivers/vfio-pci")
    machine.directory("/usr/lib/systemd/system")
    modules = f"/usr/lib/modules/{RELEASE}"
    machine.file(f"{modules}/modules.dep", "kernel/vfio/vfio-pci.ko:\nkernel/nvme.ko:\nkernel/mlx5_vfio_pci.ko:\n")
    machine.file(
        f"{modules}/modules.alias",
        "alias pci:v*d*sv*sd*bc01sc08i02* nvme\n"
        "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n"
        "alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci\n",
    )
    machine.pci(NVME, "1b36:0010", "010802", driver="nvme", group=13)
    machine.pci(NIC, "8086:10d3", "020000", driver="e1000e", group=15)
    return machine


def decided(machine: Machine, *devices: t.Any, **options: t.Any) -> Binding:
    options.setdefault("persistent", False)
    return decide(machine.host, read_situation(machine.host), Request(devices=devices, **options))


def refused(machine: Machine, *devices: t.Any, **options: t.Any) -> str:
    with pytest.raises(Refusal) as caught:
        decided(machine, *devices, **options)
    assert caught.value.details["refusals"]
    return caught.value.message


def bind(machine: Machine, address: str, driver: str = "vfio-pci", override: str | None = "vfio-pci") -> None:
    """What a bound function looks like."""
    path = machine.paths[address]
    link = machine.at(f"{path}/driver")
    if link.is_symlink():
        link.unlink()
    machine.link(f"{path}/driver", f"/sys/bus/pci/drivers/{driver}")
    machine.file(f"{path}/driver_override", f"{override or '(null)'}\n")
    machine.cdev(address, 0, "241:0")


def in_use(machine: Machine, address: str) -> None:
    machine.disk("sda", address)
    machine.mounts((machine.number("sda"), "/data", "ext4", "/dev/sda"))


def test_each_function_is_bound_from_what_it_has(server: Machine) -> None:
    steps = decided(server, "01:00.0", {"address": NIC}).plan.steps
    assert [type(step) for step in steps] == [Bind, Bind]
    assert [(step.address, step.from_driver) for step in steps if isinstance(step, Bind)] == [
        (NVME, "nvme"),
        (NIC, "e1000e"),
    ]
    assert "named by devices[0]" in steps[0].summary


def test_a_driver_that_is_not_there_is_loaded_first(server: Machine) -> None:
    server.at("/sys/bus/pci/drivers/vfio-pci").rmdir()
    assert [type(step) for step in decided(server, NVME).plan.steps] == [LoadDriver, Bind]


def test_a_bound_function_needs_nothing(server: Machine) -> None:
    bind(server, NVME)
    assert not decided(server, NVME).plan.changed


def test_bound_by_id_alone_it_would_not_stay(server: Machine) -> None:
    bind(server, NVME, override=None)
    assert len(decided(server, NVME).plan.steps) == 1


def test_a_running_guest_does_not_hinder_what_is_done_already(server: Machine) -> None:
    bind(server, NVME)
    server.process(77, "qemu-system-x86", ["qemu-system-x86_64", "-name", "web"], ["/dev/vfio/devices/vfio0"])
    assert not decided(server, NVME).plan.changed


def test_the_same_device_twice_is_one_move(server: Machine) -> None:
    assert len(decided(server, NVME, "1:00.0".rjust(7, "0"), {"address": NVME}).moves) == 1


@pytest.mark.parametrize(
    ("selector", "option"),
    [("zz", "devices[0]"), (7, "devices[0]"), ({"adress": NVME}, "devices[0]"), ({"address": 3}, "devices[0].address")],
)
def test_a_malformed_selector_is_named(server: Machine, selector: t.Any, option: str) -> None:
    with pytest.raises(OptionError) as caught:
        decided(server, selector)
    assert caught.value.option == option


def test_an_unknown_address_comes_with_the_nearest(server: Machine) -> None:
    with pytest.raises(OptionError, match=r"no such device.*0000:03:00\.0"):
        decided(server, "0000:03:00.7")


@pytest.mark.parametrize("driver", ["nvme", "", "vfio-pci;x", "pci-stub"])
def test_only_a_vfio_driver_will_do(server: Machine, driver: str) -> None:
    with pytest.raises(OptionError, match="vfio-pci"):
        decided(server, NVME, driver=driver)


def test_auto_takes_the_variant_that_the_kernel_offers(server: Machine) -> None:
    server.pci("0000:05:00.1", "15b3:101e", "020000", driver="mlx5_core", group=20)
    binding = decided(server, "05:00.1", NVME, driver="auto")
    assert {move.address: move.to for move in binding.moves} == {NVME: "vfio-pci", "0000:05:00.1": "mlx5_vfio_pci"}


def test_a_device_in_use_is_refused_with_its_use(server: Machine) -> None:
    in_use(server, NVME)
    message = refused(server, NVME, NIC)
    assert f"{NVME} is in use: sda is mounted on /data" in message
    assert "force=true" in message
    assert NIC not in message


def test_force_takes_a_named_device_in_use(server: Machine) -> None:
    in_use(server, NVME)
    assert decided(server, NVME, force=True).plan.changed


def test_force_never_takes_the_root_disk(server: Machine) -> None:
    server.disk("sda", NVME)
    server.mounts((server.number("sda"), "/", "ext4", "/dev/sda"))
    message = refused(server, NVME, force=True)
    assert "mounted on /" in message
    assert "force=true" not in message


def test_force_is_not_for_companions(server: Machine) -> None:
    server.pci("0000:03:00.1", "1b36:0010", "010802", driver="nvme", group=15)
    in_use(server, "0000:03:00.1")
    assert "0000:03:00.1 is in use" in refused(server, NIC, force=True, include_group=True)


def test_all_reasons_are_told_at_once(server: Machine) -> None:
    in_use(server, NVME)
    server.pci(AUDIO, "8086:0001", "040300", driver="snd_hda_intel", group=15)
    message = refused(server, NVME, NIC)
    assert "is in use" in message
    assert f"IOMMU group 15 of {NIC} also holds {AUDIO} (snd_hda_intel)" in message


def test_a_group_is_taken_as_a_whole_on_request(server: Machine) -> None:
    server.pci(AUDIO, "8086:0001", "040300", driver="snd_hda_intel", group=15)
    server.pci("0000:00:1c.0", "8086:0002", "060400", driver="pcieport", group=15)
    moves = decided(server, NIC, include_group=True).moves
    assert [(move.address, move.named) for move in moves] == [(NIC, True), (AUDIO, False)]


def test_a_group_on_vfio_stays_one_call(server: Machine) -> None:
    server.pci(AUDIO, "8086:0001", "040300", driver="snd_hda_intel", group=15)
    bind(server, NIC)
    bind(server, AUDIO)
    binding = decided(server, NIC, include_group=True)
    assert [move.address for move in binding.moves] == [NIC, AUDIO]
    assert not binding.plan.changed


def test_both_named_make_a_group_viable(server: Machine) -> None:
    server.pci(AUDIO, "8086:0001", "040300", driver="snd_hda_intel", group=15)
    assert len(decided(server, NIC, AUDIO).plan.steps) == 2


def test_unbound_peers_and_bridges_do_not_hinder(server: Machine) -> None:
    server.pci(AUDIO, "8086:0001", "040300", group=15)
    server.pci("0000:00:1c.0", "8086:0002", "060400", driver="pcieport", group=15)
    assert len(decided(server, NIC).plan.steps) == 1


def test_a_bridge_stays_with_the_host(server: Machine) -> None:
    server.pci("0000:00:1c.0", "8086:0002", "060400", driver="pcieport", group=4)
    assert "is a PCI bridge" in refused(server, "00:1c.0")


def test_without_an_iommu_there_is_a_remedy(server: Machine) -> None:
    server.pci("0000:09:00.0", "8086:10d3", driver="e1000e")
    assert "the IOMMU is off. Turn it on" in refused(server, "09:00.0")


def test_a_device_without_a_driver_may_get_its_group_later(server: Machine) -> None:
    server.pci("0000:09:00.0", "1234:11e8", "00ff00")
    (bind,) = [step for step in decided(server, "09:00.0").plan.steps if isinstance(step, Bind)]
    assert bind.late_group and bind.moving == {"0000:09:00.0"}


def test_pending_plans_what_can_be_planned_and_warns(server: Machine) -> None:
    server.pci("0000:09:00.0", "8086:10d3", driver="e1000e")
    binding = decided(server, "09:00.0", pending=True)
    assert binding.plan.changed
    assert "checked when it is real" in binding.warnings[0]


def test_a_kernel_without_character_devices_is_refused(server: Machine) -> None:
    server.file("/proc/devices", "Character devices:\n  1 mem\n")
    assert "CONFIG_VFIO_DEVICE_CDEV" in refused(server, NVME)
    assert decided(server, NVME, require_cdev=False).plan.changed


def test_the_configuration_tells_before_vfio_is_loaded(server: Machine) -> None:
    server.at("/sys/module/vfio").rmdir()
    server.file(f"/boot/config-{RELEASE}", "CONFIG_VFIO=m\n# CONFIG_VFIO_DEVICE_CDEV is not set\n")
    assert "CONFIG_VFIO_DEVICE_CDEV" in refused(server, NVME)
    # Modules from beside the kernel have what its configuration lacks.
    server.file(f"/usr/lib/modules/{RELEASE}/modules.dep", "updates/vfio.ko:\nkernel/vfio/vfio-pci.ko:\n")
    assert decided(server, NVME).plan.changed


def test_a_missing_module_is_named(server: Machine) -> None:
    assert "has no module pds_vfio_pci" in refused(server, NVME, driver="pds_vfio_pci")


@pytest.mark.parametrize("force", [False, True])
def test_a_physical_function_is_not_taken_from_its_virtual_ones(server: Machine, force: bool) -> None:
    path = server.pci("0000:05:00.0", "8086:10c9", driver="igb", group=20, sriov_totalvfs=7, sriov_numvfs=1)
    server.pci("0000:05:10.0", "8086:10ca", driver="igbvf", group=21)
    server.link(f"{path}/virtfn0", server.paths["0000:05:10.0"])
    assert "1 virtual functions" in refused(server, "05:00.0", "05:10.0", force=force)


def test_force_is_not_offered_where_virtual_functions_stand_in_the_way(server: Machine) -> None:
    path = server.pci("0000:05:00.0", "8086:10c9", driver="igb", group=20, sriov_totalvfs=7, sriov_numvfs=1)
    vf = server.pci("0000:05:10.0", "8086:10ca", driver="vfio-pci", group=21)
    server.link(f"{path}/virtfn0", vf)
    server.link(f"{vf}/physfn", path)
    message = refused(server, "05:00.0")
    assert "kept for guests on vfio-pci" in message
    assert "force=true" not in message


@pytest.mark.parametrize("bound", [True, False])
def test_a_device_whose_lock_is_held_is_refused(server: Machine, bound: bool) -> None:
    situation = read_situation(server.host)
    situation.functions[NIC].locked = True
    with pytest.raises(Refusal, match=f"lock of {NIC} .*e1000e"):
        decide(server.host, situation, Request(devices=[NVME, NIC], bound=bound, persistent=False))


def test_what_is_kept_is_added_to(server: Machine) -> None:
    old = Entry("0000:0a:00.0", "vfio-pci", "1234:11e8")
    server.file(CONF, render([old]))
    binding = decided(server, NVME, persistent=True)
    assert binding.kept == {"0000:0a:00.0": old, NVME: Entry(NVME, "vfio-pci", "1b36:0010")}


# -- selectors -----------------------------------------------------------------------------------------------------


def test_a_class_is_planned_from_what_each_device_has_with_the_reason(server: Machine) -> None:
    server.pci("0000:02:00.0", "144d:a808", "010802", driver="nvme", group=14)
    (first, second) = decided(server, {"class": "nvme"}).plan.diff()
    assert first["before_header"] == NVME
    assert first["before"] == "driver: nvme\ndriver_override: none\n"
    assert first["after"] == "driver: vfio-pci\ndriver_override: vfio-pci\nreason: class nvme, devices[0]\n"
    assert second["before_header"] == "0000:02:00.0"


def test_a_class_never_takes_bridges(server: Machine) -> None:
    server.pci("0000:00:1c.0", "8086:0002", "060400", driver="pcieport", group=4)
    assert [move.address for move in decided(server, "*").moves] == [NVME, NIC]


def test_force_needs_the_address_written_out(server: Machine) -> None:
    in_use(server, NVME)
    for selector in ({"class": "nvme"}, "01:00.*", {"disk": "sda"}):
        message = refused(server, selector, force=True)
        assert "sda is mounted on /data" in message
        assert "force is only for a device whose address is written out" in message
    assert decided(server, {"class": "nvme"}, NVME, force=True).plan.changed


def test_one_refusal_of_a_wide_selector_refuses_all_with_every_reason(server: Machine) -> None:
    in_use(server, NVME)
    server.pci("0000:02:00.0", "144d:a808", "010802", driver="nvme", group=15)
    message = refused(server, {"class": "nvme"})
    assert f"{NVME} is in use" in message
    assert f"IOMMU group 15 of 0000:02:00.0 also holds {NIC} (e1000e)" in message
    assert [
        move.address for move in decided(server, {"class": "nvme"}, NIC, {"disk": "sda", "excluded": True}).moves
    ] == [
        "0000:02:00.0",
        NIC,
    ]


def test_what_is_excluded_does_not_come_along_with_its_group(server: Machine) -> None:
    server.pci(AUDIO, "8086:0001", "040300", driver="snd_hda_intel", group=15)
    message = refused(server, NIC, {"address": AUDIO, "excluded": True}, include_group=True)
    assert f"also holds {AUDIO} (snd_hda_intel)" in message


def test_virtual_functions_to_come_are_planned_as_far_as_they_are_there(server: Machine) -> None:
    server.pci("0000:05:00.0", "8086:10c9", driver="igb", group=20, sriov_totalvfs=7, sriov_numvfs=0)
    server.interface("ens5", "0000:05:00.0")
    binding = decided(server, {"vfs_of": "ens5"}, pending=True)
    assert (binding.moves, binding.warnings[0][:26]) == ([], "devices[0]: 0000:05:00.0 h")
    with pytest.raises(OptionError, match="create them first"):
        decided(server, {"vfs_of": "ens5"})


def run(machine: Machine, *devices: t.Any, **options: t.Any) -> Binding:
    """Decide, write the files that the plan writes, and make the devices look as it promises."""
    binding = decided(machine, *devices, **options)
    for step in binding.plan.steps:
        if isinstance(step, (WriteFile, RemoveFile)):
            step.apply()
    for move in binding.moves:
        if move.needed and move.to is not None:
            for name in ("net", "host0"):
                shutil.rmtree(machine.at(f"{machine.paths[move.address]}/{name}"), ignore_errors=True)
            bind(machine, move.address)
    return binding


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize(
    "selector",
    [{"nic": "ens3f0"}, {"mac": "52:54:00:00:00:09"}, {"driver": "e1000e"}, {"vfs_of": "ens5"}, {"disk": "sdb"}],
)
def test_a_second_run_finds_the_same_device_and_changes_nothing(
    server: Machine, selector: t.Any, persistent: bool
) -> None:
    server.file(f"{server.interface('ens3f0', NIC)}/address", "52:54:00:00:00:09\n")
    server.disk("sdb", NVME)
    server.virtual_function("0000:05:00.0", "0000:05:10.0")
    server.interface("ens5", "0000:05:00.0")
    if persistent:  # what systemctl would have done
        server.link("/etc/systemd/system/sysinit.target.wants/iommufd-host-devices.service", "/nowhere")
    first = run(server, selector, persistent=persistent)
    assert len(first.moves) == 1
    for boot in range(1 + persistent):
        if boot:
            server.at(MEMORY).unlink(missing_ok=True)
        second = decided(server, selector, persistent=persistent)
        assert [move.address for move in second.moves] == [move.address for move in first.moves]
        assert second.plan.summary() == []


def test_what_is_kept_no_longer_is_remembered_until_the_next_boot(server: Machine) -> None:
    server.interface("ens3f0", NIC)
    run(server, NIC, persistent=True)
    run(server, {"nic": "ens3f0"}, persistent=False)
    assert CONF not in [step.subject for step in decided(server, {"nic": "ens3f0"}, persistent=False).plan.steps]
    assert [move.address for move in decided(server, {"nic": "ens3f0"}, persistent=False).moves] == [NIC]


def test_a_run_that_was_killed_after_the_binding_finds_its_device_again(server: Machine) -> None:
    server.interface("ens3f0", NIC)
    steps = decided(server, {"nic": "ens3f0"}, persistent=True).plan.steps
    assert (steps[0].subject, type(steps[1])) == (MEMORY, Bind)
    steps[0].apply()
    bind(server, NIC)
    shutil.rmtree(server.at(f"{server.paths[NIC]}/net"))
    assert [move.address for move in decided(server, {"nic": "ens3f0"}, persistent=True).moves] == [NIC]


def test_another_card_at_the_address_is_not_what_was_remembered(server: Machine) -> None:
    server.interface("ens3f0", NIC)
    run(server, {"nic": "ens3f0"}, persistent=False)
    server.file(f"{server.paths[NIC]}/device", "0x1521\n")
    with pytest.raises(OptionError, match="matches none of the 2 devices"):
        decided(server, {"nic": "ens3f0"})


def test_the_disk_that_has_got_the_name_since_is_not_taken(server: Machine) -> None:
    server.disk("sda", NVME)
    run(server, {"disk": "sda"}, persistent=False)
    server.at("/sys/class/block/sda").unlink()
    server.pci("0000:02:00.0", "144d:a808", "010802", driver="nvme", group=14)
    server.disk("sda", "0000:02:00.0")
    with pytest.raises(OptionError, match=f"disk sda was {NVME} .* and then 0000:02:00.0"):
        decided(server, {"disk": "sda"})


def test_what_is_selected_by_address_leaves_no_trace_in_run(server: Machine) -> None:
    assert MEMORY not in [step.subject for step in decided(server, NVME, persistent=True).plan.steps]


def test_not_persistent_means_not_kept(server: Machine) -> None:
    server.file(CONF, render([Entry(NVME, "vfio-pci", "1b36:0010")]))
    assert decided(server, NVME, persistent=False).kept == {}


# -- back to the host ----------------------------------------------------------------------------------------------


def test_a_bound_function_is_given_back(server: Machine) -> None:
    bind(server, NVME)
    (step,) = decided(server, NVME, bound=False).plan.steps
    assert isinstance(step, Release)
    assert step.expected == ("nvme",)
    assert step.from_driver == "vfio-pci"


def test_what_the_host_has_needs_nothing(server: Machine) -> None:
    assert not decided(server, NVME, NIC, bound=False).plan.changed


def test_an_override_of_somebody_else_stays(server: Machine) -> None:
    server.file(f"{server.paths[NVME]}/driver_override", "nvme\n")
    assert not decided(server, NVME, bound=False).plan.changed


def test_a_guest_keeps_its_device(server: Machine) -> None:
    bind(server, NVME)
    server.process(77, "qemu-system-x86", ["qemu-system-x86_64", "-name", "web"], ["/dev/vfio/devices/vfio0"])
    assert f"{NVME} is in use" in refused(server, NVME, bound=False)


def test_a_guest_keeps_its_whole_group(server: Machine) -> None:
    server.pci(AUDIO, "8086:0001", "040300", group=15)
    bind(server, NIC)
    bind(server, AUDIO)
    server.at(f"{server.paths[NIC]}/vfio-dev/vfio0").rename(server.at(f"{server.paths[NIC]}/vfio-dev/vfio1"))
    server.process(77, "qemu-system-x86", ["qemu-system-x86_64", "-name", "web"], ["/dev/vfio/devices/vfio1"])
    assert f"shares IOMMU group 15 with {NIC}" in refused(server, AUDIO, bound=False)


def test_a_device_that_is_gone_can_be_forgotten(server: Machine) -> None:
    server.file(CONF, render([Entry("0000:0a:00.0", "vfio-pci", "1234:11e8")]))
    binding = decided(server, "0a:00.0", bound=False)
    assert binding.kept == {}
    assert [step.subject for step in binding.plan.steps] == [CONF]


def test_by_its_names_a_device_is_given_back_and_forgotten(server: Machine) -> None:
    server.interface("ens3f0", NIC)
    run(server, {"nic": "ens3f0"}, persistent=False)
    binding = decided(server, {"nic": "ens3*"}, bound=False)
    assert [type(step) for step in binding.plan.steps] == [Release, RemoveFile]
    assert binding.plan.steps[1].subject == MEMORY


def test_a_wide_selector_gives_back_only_what_is_with_guests(server: Machine) -> None:
    assert decided(server, {"class": "network"}, bound=False).moves == []
    bind(server, NIC)
    server.pci("0000:06:00.0", driver="e1000e", group=16)
    assert [move.address for move in decided(server, {"class": "network"}, bound=False).moves] == [NIC]
    assert decided(server, {"class": "sata"}, bound=False).moves == []


def test_virtual_functions_that_are_gone_are_forgotten_by_their_physical_one(server: Machine) -> None:
    server.virtual_function("0000:05:00.0", "0000:05:10.0")
    server.file(CONF, render([Entry("0000:05:10.2", "vfio-pci", "8086:10ca", Names(virtual=("0000:05:00.0", 1)))]))
    assert decided(server, {"vfs_of": "05:00.0", "vf": 0}, bound=False).kept != {}
    assert decided(server, {"vfs_of": "05:00.0"}, bound=False).kept == {}


def test_a_builtin_driver_claims_too(server: Machine) -> None:
    server.file(
        f"/usr/lib/modules/{RELEASE}/modules.builtin.modinfo",
        "e1000e.license=GPL\0e1000e.alias=pci:v00008086d000010D3sv*sd*bc*sc*i*\0",
    )
    bind(server, NIC)
    (move,) = decided(server, NIC, bound=False).moves
    assert move.expected == ("e1000e",)


def test_a_request_is_not_changed_by_deciding(server: Machine) -> None:
    request = Request(devices=[NVME])
    copy = dataclasses.replace(request)
    decide(server.host, read_situation(server.host), request)
    assert request == copy


def test_a_vf_whose_pf_probes_nothing_stays_without_a_driver(server: Machine) -> None:
    server.file(f"/usr/lib/modules/{RELEASE}/modules.alias", "alias pci:v00008086d000010CAsv*sd*bc*sc*i* igbvf\n")
    path = server.pci("0000:05:00.0", "8086:10c9", driver="igb", group=20, sriov_drivers_autoprobe=0)
    vf = server.pci("0000:05:10.0", "8086:10ca", driver="igbvf", group=21)
    server.link(f"{vf}/physfn", path)
    bind(server, "0000:05:10.0")
    (move,) = decided(server, "05:10.0", bound=False).moves
    assert move.expected == ()
    server.attributes(path, sriov_drivers_autoprobe=1)
    (move,) = decided(server, "05:10.0", bound=False).moves
    assert move.expected == ("igbvf",)


def test_a_vf_that_is_not_there_can_be_planned_and_given_back_but_not_taken(server: Machine) -> None:
    server.pci("0000:05:00.0", "8086:10c9", driver="igb", group=20, sriov_totalvfs=7, sriov_offset=128, sriov_stride=2)
    binding = decided(server, "05:10.0", NVME, pending=True)
    assert [move.address for move in binding.moves] == [NVME]
    assert "0000:05:10.0 is not there yet" in binding.warnings[0]
    assert not decided(server, "05:10.0", bound=False).plan.changed
    for options in ({}, {"bound": False, "pending": True}):
        with pytest.raises(OptionError, match="no such device"):
            decided(server, "05:10.1", **options)
    with pytest.raises(OptionError, match="no such device"):
        decided(server, "05:10.0")


# -- afterwards ----------------------------------------------------------------------------------------------------

NODE = "/dev/vfio/devices/vfio0"


def promised(machine: Machine, mode: int, links: bool) -> Binding:
    """A bound function, and rules of udev about it."""
    bind(machine, NVME)
    machine.file(NODE, "")
    here = machine.at(NODE).stat()
    access = Access(str(here.st_uid), str(here.st_gid), mode, here.st_uid, here.st_gid)
    machine.file("/etc/udev/rules.d/90-x.rules", rules_text({"cdevs": access}, links))
    machine.at(NODE).chmod(0o640)
    return decided(machine, NVME)


def verified(machine: Machine, binding: Binding, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    # A node cannot be made without being root.
    monkeypatch.setattr(_binding, "cdev_ready", lambda host, address: True)
    request = Request(devices=[NVME], persistent=False)
    try:
        verify(machine.host, request, binding, by_address(read_functions(machine.host)))
    except HostError as error:
        return list(error.details["unkept"])
    return []


def test_a_cdev_is_as_the_rules_say_or_it_is_an_error(server: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verified(server, promised(server, 0o640, links=False), monkeypatch) == []
    (words,) = verified(server, promised(server, 0o660, links=False), monkeypatch)
    assert "mode 0640 and not" in words


def test_a_stable_name_leads_to_the_cdev_or_it_is_an_error(server: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    binding = promised(server, 0o640, links=True)
    (words,) = verified(server, binding, monkeypatch)
    assert f"/dev/vfio/by-path/pci-{NVME} does not lead to {NODE}" in words
    now = by_address(read_functions(server.host))
    assert describe(server.host, binding, {}, now)[0]["vfio_link"] is None
    server.link(f"/dev/vfio/by-path/pci-{NVME}", NODE)
    assert verified(server, binding, monkeypatch) == []
    assert describe(server.host, binding, {}, now)[0]["vfio_link"] == f"/dev/vfio/by-path/pci-{NVME}"
