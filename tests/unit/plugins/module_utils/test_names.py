# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.iommufd.host.plugins.module_utils._given_away import (
    MEMORY,
    plan_memory,
    read_memory,
    remembered,
)
from ansible_collections.iommufd.host.plugins.module_utils._names import (
    Disk,
    Interface,
    Names,
    from_fields,
    read_names,
    to_fields,
)
from ansible_collections.iommufd.host.plugins.module_utils._pci import read_functions
from ansible_collections.iommufd.host.plugins.module_utils._persistence import Entry, parse, render
from ansible_collections.iommufd.host.tests.unit.machine import Machine

NVME = "0000:01:00.0"
NIC = "0000:03:00.0"


def names(machine: Machine) -> dict[str, Names]:
    return read_names(machine.host, read_functions(machine.host))


def test_an_interface_with_its_mac(machine: Machine) -> None:
    machine.pci(NIC, driver="virtio-pci")
    machine.file(f"{machine.interface('eth0', NIC)}/address", "52:54:00:AA:00:01\n")
    assert names(machine)[NIC] == Names("virtio-pci", (Interface("eth0", "52:54:00:aa:00:01"),))


def test_in_a_bond_the_mac_is_the_cards_own(machine: Machine) -> None:
    machine.pci(NIC, driver="igb")
    path = machine.interface("ens3f0", NIC)
    machine.file(f"{path}/address", "52:54:00:00:00:01\n")
    machine.file(f"{path}/bonding_slave/perm_hwaddr", "52:54:00:00:00:02\n")
    assert names(machine)[NIC].interfaces == (Interface("ens3f0", "52:54:00:00:00:02"),)


def test_the_representor_of_a_virtual_function_is_no_name_of_the_physical_one(machine: Machine) -> None:
    machine.pci(NIC, driver="mlx5_core")
    machine.file(f"{machine.interface('ens3f0np0', NIC)}/phys_port_name", "p0\n")
    machine.file(f"{machine.interface('ens3f0npf0vf0', NIC)}/phys_port_name", "pf0vf0\n")
    assert [one.name for one in names(machine)[NIC].interfaces] == ["ens3f0np0"]


@pytest.mark.parametrize(
    ("path", "content", "serial"),
    [
        ("device/serial", b"S6S2NS0TA17548X     \n", "S6S2NS0TA17548X"),
        ("serial", b"virtio-1", "virtio-1"),
        ("device/vpd_pg80", b"\0\x80\0\x08  WD-1 2trailing", "WD-1 2"),
        ("device/vpd_pg80", b"\0\x83\0\x04WD-1", None),
        ("device/vpd_pg80", b"\0", None),
        ("device/model", b"x", None),
    ],
)
def test_serial_numbers(machine: Machine, path: str, content: bytes, serial: str | None) -> None:
    machine.pci(NVME, driver="nvme")
    disk = machine.disk("sda", NVME)
    machine.partition("sda", "sda1")
    machine.file(f"{disk}/{path}", content)
    assert names(machine)[NVME].disks == (Disk("sda", serial),)


def test_a_disk_of_nvme_multipath_is_behind_each_of_its_controllers(machine: Machine) -> None:
    subsystem = "/sys/devices/virtual/nvme-subsystem/nvme-subsys0"
    machine.block("nvme0n1", f"{subsystem}/nvme0n1")
    for number, address in enumerate((NVME, "0000:02:00.0")):
        path = machine.pci(address, driver="nvme")
        machine.directory(f"{path}/nvme/nvme{number}")
        machine.link(f"{subsystem}/nvme{number}", f"{path}/nvme/nvme{number}")
    assert [one.disks for one in names(machine).values()] == [(Disk("nvme0n1"),)] * 2


def test_what_hangs_on_usb_is_no_name_of_the_controller(machine: Machine) -> None:
    path = machine.pci("0000:00:14.0", class_id="0c0330", driver="xhci_hcd")
    machine.block("sdb", f"{path}/usb1/1-2/1-2:1.0/host6/block/sdb")
    assert names(machine)["0000:00:14.0"] == Names("xhci_hcd")


def test_on_a_vfio_driver_a_device_has_no_names(machine: Machine) -> None:
    machine.pci(NIC, driver="vfio-pci")
    assert not names(machine)[NIC].given


def test_virtual_functions_know_their_number(machine: Machine) -> None:
    machine.virtual_function(NIC, "0000:03:10.0")
    machine.virtual_function(NIC, "0000:03:10.2")
    assert names(machine)["0000:03:10.2"].virtual == (NIC, 1)


TEXT = st.text(min_size=1, max_size=30)
NAMES = st.builds(
    Names,
    st.one_of(st.none(), TEXT),
    st.lists(st.builds(Interface, TEXT, st.one_of(st.none(), TEXT)), max_size=3).map(tuple),
    st.lists(st.builds(Disk, TEXT, st.one_of(st.none(), TEXT)), max_size=3).map(tuple),
    st.one_of(st.none(), st.tuples(st.just(NIC), st.integers(0, 255))),
)


@given(NAMES)
def test_names_survive_a_line_of_a_file(one: Names) -> None:
    entry = Entry(NIC, "vfio-pci", "8086:10d3", one)
    assert from_fields(to_fields(one)) == one
    assert entry.line.isascii()
    assert parse(render([entry]).decode())[NIC].names == one


@given(st.lists(st.text(max_size=20), max_size=4))
def test_fields_that_are_damaged_are_passed_over(fields: list[str]) -> None:
    assert from_fields([*fields, "host=igb"]).driver == "igb"


def test_a_line_for_people() -> None:
    one = Names("igb", (Interface("ens3f0", "52:54:00:00:00:02"),), (Disk("sda", "WD 1"),), (NIC, 2))
    assert Entry("0000:03:10.4", "vfio-pci", "8086:10ca", one).line == (
        "0000:03:10.4 vfio-pci 8086:10ca host=igb nic=ens3f0/52:54:00:00:00:02 disk=sda/WD%201 vf=0000:03:00.0/2"
    )


# -- memory --------------------------------------------------------------------------------------------------------


def test_names_alone_make_no_entry_differ() -> None:
    assert Entry(NIC, "vfio-pci", "8086:10d3", Names("igb")) == Entry(NIC, "vfio-pci", "8086:10d3")


def test_a_memory_counts_while_the_host_does_not_have_the_device(machine: Machine) -> None:
    entry = Entry(NIC, "vfio-pci", "8086:10d3", Names("e1000e", (Interface("eth0"),)))
    for step in plan_memory(machine.host, {NIC: entry}):
        step.apply()
    assert plan_memory(machine.host, {NIC: entry}) == []
    assert read_memory(machine.host) == {NIC: entry}
    path = machine.pci(NIC, driver="vfio-pci")

    def known() -> dict[str, Names]:
        return remembered(machine.host, read_functions(machine.host))

    assert known() == {NIC: entry.names}
    machine.file(f"{path}/device", "0x1521\n")
    assert known() == {}
    machine.file(f"{path}/device", "0x10d3\n")
    machine.at(f"{path}/driver").unlink()
    assert known() == {NIC: entry.names}
    machine.link(f"{path}/driver", "/sys/bus/pci/drivers/e1000e")
    assert known() == {}


def test_a_memory_of_nothing_leaves_nothing(machine: Machine) -> None:
    machine.directory("/run")
    for step in plan_memory(machine.host, {NIC: Entry(NIC, "vfio-pci", "8086:10d3")}):
        step.apply()
    (step,) = plan_memory(machine.host, {})
    step.apply()
    assert not machine.at(MEMORY).parent.exists()
    assert machine.at("/run").is_dir()
