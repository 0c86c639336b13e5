# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._pci import (
    Function,
    address_key,
    is_address,
    list_addresses,
    locked_functions,
    parse_address,
    read_function,
    read_functions,
)
from ansible_collections.iommufd.host.tests.unit.machine import Machine


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("0000:02:00.0", "0000:02:00.0"),
        ("02:00.0", "0000:02:00.0"),
        ("0000:0A:1F.7", "0000:0a:1f.7"),
        (" 10000:e1:00.0 ", "10000:e1:00.0"),
        ("00010000:E1:00.0", "10000:e1:00.0"),
    ],
)
def test_parse_address(written: str, address: str) -> None:
    assert parse_address("devices[0]", written) == address
    assert is_address(address)


@pytest.mark.parametrize(
    "written",
    ["", "02:00", "0000:02:20.0", "0000:02:00.8", "0000:02:00.0\n0", "x000:02:00.0", "123456789:02:00.0", None, 7],
)
def test_parse_address_refuses(written: object) -> None:
    with pytest.raises(OptionError, match=r"devices\[0\]: .* is not accepted.*0000:02:00.0"):
        parse_address("devices[0]", written)


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 255), st.integers(0, 31), st.integers(0, 7))
def test_every_address_survives(domain: int, bus: int, slot: int, function: int) -> None:
    address = f"{domain:04x}:{bus:02x}:{slot:02x}.{function}"
    assert parse_address("address", address.upper()) == address
    assert is_address(address)
    assert address_key(address) == (domain, bus, slot, function)


def test_order_is_by_number(machine: Machine) -> None:
    for address in ("10000:01:00.0", "0000:0a:00.0", "ffff:00:00.0", "0000:09:00.0"):
        machine.pci(address)
    machine.directory("/sys/bus/pci/devices/junk")
    assert list_addresses(machine.host) == ["0000:09:00.0", "0000:0a:00.0", "ffff:00:00.0", "10000:01:00.0"]


def test_a_function_in_full(machine: Machine) -> None:
    machine.pci("0000:00:02.0", class_id="060400", driver="pcieport", group=1)
    path = machine.pci(
        "0000:02:00.0",
        "10de:25b6",
        "030200",
        driver="vfio-pci",
        group=14,
        below="0000:00:02.0",
        driver_override="vfio-pci",
        numa_node=1,
        reset_method="flr bus",
        boot_vga=0,
        resource="0x0000000092000000 0x0000000092ffffff 0x0000000000040200\n"
        "0x0000023000000000 0x00000233ffffffff 0x000000000014220c\n"
        "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
        "0x0000000000002000 0x000000000000207f 0x0000000000040101",
    )
    machine.cdev("0000:02:00.0", 3, "511:3")
    function = read_function(machine.host, "0000:02:00.0")
    assert function is not None
    assert function.to_dict() == {
        "address": "0000:02:00.0",
        "vendor_id": "0x10de",
        "device_id": "0x25b6",
        "subsystem_vendor_id": "0x1af4",
        "subsystem_device_id": "0x1100",
        "class_id": "0x030200",
        "revision": "0x01",
        "driver": "vfio-pci",
        "driver_override": "vfio-pci",
        "iommu_group": 14,
        "numa_node": 1,
        "vfio_device": "/dev/vfio/devices/vfio3",
        "sriov": None,
        "boot_vga": False,
        "reset_methods": ["flr", "bus"],
        "bars": [
            {"index": 0, "kind": "memory", "size": 1 << 24, "prefetchable": False, "wide": False},
            {"index": 1, "kind": "memory", "size": 1 << 34, "prefetchable": True, "wide": True},
            {"index": 3, "kind": "io", "size": 128, "prefetchable": False, "wide": False},
        ],
    }
    assert function.path == path
    assert function.above == ["0000:00:02.0"]
    assert not function.is_bridge


def test_a_directory_without_a_number_is_no_character_device(machine: Machine) -> None:
    machine.pci("0000:02:00.0", driver="vfio-pci", group=1)
    machine.cdev("0000:02:00.0", 0)
    function = read_function(machine.host, "0000:02:00.0")
    assert function is not None
    assert function.vfio_device is None


def test_sriov(machine: Machine) -> None:
    physical = machine.pci("0000:01:00.0", sriov_totalvfs=7, sriov_numvfs=2)
    for index, address in enumerate(["0000:01:10.0", "0000:01:10.2"]):
        path = machine.pci(address, "8086:10ca")
        machine.link(f"{path}/physfn", physical)
        machine.link(f"{physical}/virtfn{index}", path)
    functions = {function.address: function.sriov for function in read_functions(machine.host)}
    assert functions["0000:01:00.0"] is not None
    assert functions["0000:01:00.0"].to_dict() == {
        "total_vfs": 7,
        "num_vfs": 2,
        "physfn": None,
        "vfs": ["0000:01:10.0", "0000:01:10.2"],
    }
    assert functions["0000:01:10.2"] is not None
    assert functions["0000:01:10.2"].physfn == "0000:01:00.0"


def test_numbers_come_from_modalias_where_attributes_are_missing(machine: Machine) -> None:
    path = machine.pci("0000:02:00.0", "10de:25b6", "030200")
    for name in ("vendor", "device", "subsystem_vendor", "subsystem_device", "class"):
        machine.at(f"{path}/{name}").unlink()
    function = read_function(machine.host, "0000:02:00.0")
    assert function is not None
    assert (function.vendor_id, function.device_id, function.class_id) == ("0x10de", "0x25b6", "0x030200")
    assert (function.subsystem_vendor_id, function.subsystem_device_id) == ("0x1af4", "0x1100")


def test_no_such_function(machine: Machine) -> None:
    assert read_function(machine.host, "0000:02:00.0") is None
    assert read_functions(machine.host) == []


@pytest.mark.skipif(shutil.which("lspci") is None, reason="lspci is not installed")
@pytest.mark.parametrize("name", ["vgpu_node", "iommu_off"])
def test_a_real_machine_as_lspci_sees_it(name: str, request: pytest.FixtureRequest) -> None:
    root: pathlib.Path = request.getfixturevalue(name)
    command = ["lspci", "-A", "linux-sysfs", "-O", f"sysfs.path={root}/sys/bus/pci", "-D", "-vmmnk"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    expected = {}
    for paragraph in said.strip().split("\n\n"):
        rows = dict(line.split(":\t", 1) for line in paragraph.splitlines())
        expected[rows["Slot"]] = {
            "vendor_id": "0x" + rows["Vendor"],
            "device_id": "0x" + rows["Device"],
            "subsystem": ("0x" + rows["SVendor"], "0x" + rows["SDevice"]) if "SVendor" in rows else None,
            "class": "0x" + rows["Class"] + rows.get("ProgIf", "00"),
            "revision": "0x" + rows.get("Rev", "00"),
            "driver": rows.get("Driver"),
            "numa_node": int(rows["NUMANode"]) if "NUMANode" in rows else None,
            "iommu_group": int(rows["IOMMUGroup"]) if "IOMMUGroup" in rows else None,
        }
    found = {
        one.address: {
            "vendor_id": one.vendor_id,
            "device_id": one.device_id,
            # A bridge has no such register, and sysfs then has zeros.
            "subsystem": None
            if one.subsystem_vendor_id == "0x0000"
            else (one.subsystem_vendor_id, one.subsystem_device_id),
            "class": one.class_id,
            "revision": one.revision,
            "driver": one.driver,
            "numa_node": one.numa_node,
            "iommu_group": one.iommu_group,
        }
        for one in read_functions(Host(str(root)))
    }
    assert len(found) == {"vgpu_node": 226, "iommu_off": 208}[name]
    assert found == expected


def test_the_virtual_functions_of_a_real_machine(vgpu_node: pathlib.Path) -> None:
    functions = read_functions(Host(str(vgpu_node)))
    virtual = [one for one in functions if one.sriov is not None and one.sriov.physfn is not None]
    parents = {one.sriov.physfn for one in virtual if one.sriov is not None}
    assert len(virtual) == 16
    assert len(parents) == 1
    physical = next(one for one in functions if one.address in parents)
    assert physical.vendor_id == "0x10de"
    assert physical.sriov is not None
    assert physical.sriov.num_vfs == 16
    assert physical.sriov.vfs == [one.address for one in virtual]


@pytest.mark.skipif(shutil.which("lspci") is None, reason="lspci is not installed")
def test_the_counts_of_virtual_functions_as_lspci_sees_them(vgpu_node: pathlib.Path) -> None:
    """lspci decodes them from the configuration space, not from the attributes."""
    command = ["lspci", "-A", "linux-sysfs", "-O", f"sysfs.path={vgpu_node}/sys/bus/pci", "-D", "-vvv"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    expected = {}
    for paragraph in said.strip().split("\n\n"):
        counts = re.search(r"Total VFs: (\d+), Number of VFs: (\d+)", paragraph)
        if counts is not None:
            expected[paragraph.split()[0]] = (int(counts[1]), int(counts[2]))
    found = {
        one.address: (one.sriov.total_vfs or 0, one.sriov.num_vfs)
        for one in read_functions(Host(str(vgpu_node)))
        if one.sriov is not None and one.sriov.physfn is None
    }
    assert expected
    assert {address: now for address, (_most, now) in found.items()} == {
        address: now for address, (_most, now) in expected.items()
    }
    # A driver may offer fewer than the hardware could have (ixgbe keeps one of 64 for the PF).
    assert all(found[address][0] in (most, most - 1) for address, (most, _now) in expected.items())


def test_an_unknown_class_is_no_bridge() -> None:
    assert not Function("0000:00:00.0").is_bridge
    assert Function("0000:00:00.0", class_id="0x060400").is_bridge


@pytest.mark.parametrize("attribute", ["driver_override", "sriov_numvfs"])
def test_whichever_attribute_blocks_tells_that_a_function_is_locked(machine: Machine, attribute: str) -> None:
    # A FIFO without a writer blocks whoever opens it, as does the kernel while it holds the device's lock.
    addresses = ["0000:01:00.0", "0000:02:00.0", "0000:03:00.0"]
    for number, address in enumerate(addresses):
        machine.pci(address, "8086:10c9", "020000", driver="igb", group=number)
    machine.file(f"{machine.paths[addresses[2]]}/sriov_numvfs", "0\n")
    path = machine.at(f"{machine.paths[addresses[1]]}/{attribute}")
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert locked_functions(machine.host, addresses, 0.3) == {addresses[1]}
