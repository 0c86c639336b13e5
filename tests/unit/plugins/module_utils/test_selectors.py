# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pathlib
import typing as t

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.iommufd.host.plugins.module_utils import _selectors
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._given_away import find_devices
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._selectors import (
    CLASSES,
    Choice,
    choose,
    class_name,
    describe,
    parse_selectors,
)

Device = dict[str, t.Any]


def device(address: str, identity: str = "8086:10d3", class_id: str = "020000", **values: t.Any) -> Device:
    vendor, model = identity.split(":")
    return {
        "address": address,
        "vendor_id": f"0x{vendor}",
        "device_id": f"0x{model}",
        "subsystem_vendor_id": "0x1af4",
        "subsystem_device_id": "0x1100",
        "class_id": f"0x{class_id}",
        "driver": None,
        "iommu_group": None,
        "numa_node": None,
        "sriov": None,
        "interfaces": [],
        "disks": [],
        "remembered": None,
        **values,
    }


def nic(name: str, mac: str = "52:54:00:00:00:01") -> dict[str, t.Any]:
    return {"interfaces": [{"name": name, "mac": mac}]}


def disk(name: str, serial: str | None = None) -> dict[str, t.Any]:
    return {"disks": [{"name": name, "serial": serial}]}


BRIDGE = device("0000:00:01.0", "8086:0001", "060400", driver="pcieport", numa_node=0, iommu_group=1)
NVME = device(
    "0000:01:00.0", "144d:a808", "010802", driver="nvme", numa_node=0, iommu_group=12, **disk("nvme0n1", "S1")
)
NVME2 = device(
    "0000:02:00.0", "144d:a808", "010802", driver="nvme", numa_node=1, iommu_group=13, **disk("nvme1n1", "S 2")
)
PF = device(
    "0000:03:00.0",
    "8086:10c9",
    driver="igb",
    numa_node=1,
    sriov={"total_vfs": 7, "num_vfs": 3, "physfn": None, "vfs": ["0000:03:10.0", "0000:03:10.2", "0000:03:10.4"]},
    **nic("ens3f0", "52:54:00:aa:bb:cc"),
)
PF2 = device("0000:03:00.1", "8086:10c9", driver="igb", numa_node=1, **nic("ens3f1", "52:54:00:aa:bb:cd"))
VFS = [
    device(
        f"0000:03:10.{function}",
        "8086:10ca",
        driver="igbvf",
        sriov={"total_vfs": None, "num_vfs": None, "physfn": "0000:03:00.0", "vfs": []},
    )
    for function in (0, 2, 4)
]
GPU = device("0000:41:00.0", "10de:2236", "030200", numa_node=1, iommu_group=40)
FAR = device("10000:01:00.0", "8086:0b60", "010802", driver="nvme")
HOST = [BRIDGE, NVME, NVME2, PF, PF2, *VFS, GPU, FAR]


def chosen(*selectors: t.Any, devices: t.Sequence[Device] = HOST, **options: t.Any) -> Choice:
    return choose(parse_selectors("devices", list(selectors)), devices, **options)


def found(*selectors: t.Any, devices: t.Sequence[Device] = HOST, **options: t.Any) -> list[str]:
    return [one.address for one in chosen(*selectors, devices=devices, **options).chosen]


def error(*selectors: t.Any, devices: t.Sequence[Device] = HOST, **options: t.Any) -> OptionError:
    with pytest.raises(OptionError) as caught:
        chosen(*selectors, devices=devices, **options)
    return caught.value


# -- the language --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "addresses"),
    [
        ("0000:01:00.0", ["01:00.0"]),
        ("01:00.0", ["01:00.0"]),
        ("0000:03:00.*", ["03:00.0", "03:00.1"]),
        ("03:00.*", ["03:00.0", "03:00.1"]),
        ("03:*", ["03:00.0", "03:00.1", "03:10.0", "03:10.2", "03:10.4"]),
        ("*:01:00.0", ["01:00.0", "10000:01:00.0"]),
        ("0?:00.0", ["01:00.0", "02:00.0", "03:00.0"]),
        ("0000:03:10.[0-3]", ["03:10.0", "03:10.2"]),
        ({"address": "0000:0[12]:*"}, ["01:00.0", "02:00.0"]),
        ({"id": "144d:a808"}, ["01:00.0", "02:00.0"]),
        ({"id": "0x144D:0xA808"}, ["01:00.0", "02:00.0"]),
        ({"id": "8086:*", "class": "nvme"}, ["10000:01:00.0"]),
        ({"vendor_id": "0x10de"}, ["41:00.0"]),
        ({"vendor_id": "10DE", "device_id": "2236"}, ["41:00.0"]),
        ({"subsystem_id": "1af4:1100", "class": "gpu"}, ["41:00.0"]),
        ({"subsystem_vendor_id": "1af4", "subsystem_device_id": "1100", "class": "3d"}, ["41:00.0"]),
        ({"class": "nvme"}, ["01:00.0", "02:00.0", "10000:01:00.0"]),
        ({"class": "Display"}, ["41:00.0"]),
        ({"class_id": "0x0302"}, ["41:00.0"]),
        ({"class_id": "030200"}, ["41:00.0"]),
        ({"driver": "igb"}, ["03:00.0", "03:00.1"]),
        ({"class": "nvme", "numa_node": 1}, ["02:00.0"]),
        ({"iommu_group": "40"}, ["41:00.0"]),
        ({"nic": "ens3f1"}, ["03:00.1"]),
        ({"nic": "ens3f*"}, ["03:00.0", "03:00.1"]),
        ({"mac": "52:54:00:AA:BB:CC"}, ["03:00.0"]),
        ({"mac": "52-54-00-aa-bb-cd"}, ["03:00.1"]),
        ({"disk": "nvme0n1"}, ["01:00.0"]),
        ({"disk": "/dev/nvme1n1"}, ["02:00.0"]),
        ({"serial": "S 2"}, ["02:00.0"]),
        ({"vfs_of": "0000:03:00.0"}, ["03:10.0", "03:10.2", "03:10.4"]),
        ({"vfs_of": "ens3f0"}, ["03:10.0", "03:10.2", "03:10.4"]),
        ({"vfs_of": {"mac": "52:54:00:aa:bb:cc"}, "vf": [0, 2]}, ["03:10.0", "03:10.4"]),
        ({"vfs_of": "03:00.0", "vf": "1-2"}, ["03:10.2", "03:10.4"]),
        ({"vfs_of": "03:00.0", "vf": 1}, ["03:10.2"]),
        ({"vfs_of": "03:00.*", "driver": "igbvf"}, ["03:10.0", "03:10.2", "03:10.4"]),
    ],
)
def test_what_a_selector_finds(selector: t.Any, addresses: list[str]) -> None:
    assert found(selector) == [one if one.count(":") == 2 else f"0000:{one}" for one in addresses]


@pytest.mark.parametrize(
    ("selector", "option", "words"),
    [
        ("zz", "devices[0]", "a PCI address such as"),
        ("0000:zz:*", "devices[0]", "a PCI address such as"),
        (180.0, "devices[0]", "put it in quotes"),
        (None, "devices[0]", "a dictionary of selector keys"),
        ({}, "devices[0]", "no key that selects"),
        ({"excluded": True}, "devices[0]", "no key that selects"),
        ({"adress": "01:00.0"}, "devices[0]", "did you mean address?"),
        ({7: 1}, "devices[0]", "'7' is no key"),
        ({"address": 3}, "devices[0].address", "put it in quotes"),
        ({"vendor_id": 4318}, "devices[0].vendor_id", "put it in quotes"),
        ({"vendor_id": "nvidia"}, "devices[0].vendor_id", "a hexadecimal number"),
        ({"id": "10de"}, "devices[0].id", "vendor and device in hexadecimal"),
        ({"id": "10de:22360"}, "devices[0].id", "vendor and device in hexadecimal"),
        ({"class": "netwrok"}, "devices[0].class", "one of storage, scsi"),
        ({"class": "0302"}, "devices[0].class", "goes into class_id"),
        ({"class_id": "302"}, "devices[0].class_id", "2, 4 or all 6"),
        ({"class_id": 194}, "devices[0].class_id", "put it in quotes"),
        ({"driver": ""}, "devices[0].driver", "the name of a driver"),
        ({"driver": ["nvme"]}, "devices[0].driver", "the name of a driver"),
        ({"numa_node": -1}, "devices[0].numa_node", "a number from 0"),
        ({"numa_node": True}, "devices[0].numa_node", "a number from 0"),
        ({"iommu_group": "all"}, "devices[0].iommu_group", "a number from 0"),
        ({"mac": "52:54"}, "devices[0].mac", "a MAC address"),
        ({"nic": "e" * 200}, "devices[0].nic", "longer than"),
        ({"excluded": "yes", "class": "nvme"}, "devices[0].excluded", "true or false"),
        ({"vf": 1, "class": "network"}, "devices[0].vf", "vfs_of"),
        ({"vfs_of": "03:00.0", "vf": "3-1"}, "devices[0].vf", "numbers of VFs"),
        ({"vfs_of": "03:00.0", "vf": []}, "devices[0].vf", "numbers of VFs"),
        ({"vfs_of": "03:00.0", "vf": [True]}, "devices[0].vf", "numbers of VFs"),
        ({"vfs_of": {"vfs_of": "03:00.0"}}, "devices[0].vfs_of", "without vfs_of"),
        ({"vfs_of": {"query": "x"}}, "devices[0].vfs_of", "without vfs_of"),
        ({"query": "x"}, "devices[0].query", "on the host itself nothing evaluates one"),
        ({"query": {"expression": "x"}}, "devices[0].query", "on the host itself nothing evaluates one"),
    ],
)
def test_a_malformed_selector_is_named_with_what_is_accepted(selector: t.Any, option: str, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_selectors("devices", [selector])
    assert caught.value.option == option
    assert caught.value.message.startswith(f"{option}: ")
    assert words in caught.value.message


def test_a_single_selector_needs_no_list() -> None:
    assert [one.option for one in parse_selectors("selectors", {"class": "nvme"})] == ["selectors"]


KEYS = [*_selectors._KEYS]
PIECES = st.sampled_from(
    [
        "0000:",
        "03:00.0",
        "*",
        "?",
        "[",
        "]",
        "[!",
        "[9-0]",
        "-",
        "10de",
        ":",
        "0x",
        "nvme",
        "ens3f0",
        "/dev/",
        "0-3",
        ",",
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(PIECES, max_size=8).map("".join),
    st.sampled_from([*CLASSES, "52:54:00:aa:bb:cc", "S1", "0302"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.sampled_from(KEYS), SCALARS), inner, max_size=3)
    ),
    max_leaves=6,
)
WRITTEN = st.one_of(VALUES, st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4))


@given(st.lists(WRITTEN, max_size=3), st.booleans(), st.booleans())
def test_whatever_is_written_gives_devices_or_an_option_error(
    selectors: list[t.Any], pending: bool, lenient: bool
) -> None:
    try:
        addresses = found(*selectors, pending=pending, lenient=lenient)
    except OptionError as caught:
        assert caught.option.startswith("devices[")
    else:
        assert len(set(addresses)) == len(addresses)
        assert set(addresses) <= {one["address"] for one in HOST}


@given(st.sampled_from(HOST))
def test_every_device_is_found_by_its_own_words(one: Device) -> None:
    if one is BRIDGE:
        return
    words = {
        "id": f"{one['vendor_id']}:{one['device_id']}",
        "class_id": one["class_id"],
        **{key: one[key] for key in ("address", "driver", "numa_node", "iommu_group") if one[key] is not None},
    }
    assert found(words) == [one["address"]]


# -- lists of selectors --------------------------------------------------------------------------------------------


def test_each_device_once_in_the_order_of_selectors_and_addresses() -> None:
    choice = chosen({"class": "gpu"}, "02:00.0", {"class": "nvme"})
    assert [(one.address, one.reason, one.addressed) for one in choice.chosen] == [
        ("0000:41:00.0", "class gpu, devices[0]", False),
        ("0000:02:00.0", "named by devices[1]", True),
        ("0000:01:00.0", "class nvme, devices[2]", False),
        ("10000:01:00.0", "class nvme, devices[2]", False),
    ]


def test_the_reason_names_the_physical_function() -> None:
    choice = chosen("41:00.0", {"vfs_of": "ens3f0", "vf": 0})
    assert choice.chosen[1].reason == "a VF of 0000:03:00.0, devices[1]"


def test_an_address_written_out_later_counts_as_written_out() -> None:
    (nvme, *_others) = chosen({"class": "nvme"}, "01:00.0").chosen
    assert (nvme.addressed, nvme.reason) == (True, "class nvme, devices[0]")


@pytest.mark.parametrize("first", [True, False])
def test_what_is_excluded_is_taken_out_wherever_it_stands(first: bool) -> None:
    without = {"disk": "nvme0n1", "excluded": True}
    selectors = [without, {"class": "nvme"}] if first else [{"class": "nvme"}, without]
    assert found(*selectors) == ["0000:02:00.0", "10000:01:00.0"]
    assert chosen(*selectors).excluded == {"0000:01:00.0"}


def test_an_exclusion_goes_before_an_address() -> None:
    assert found("01:00.0", {"class": "nvme", "numa_node": 0, "excluded": True}) == []


def test_an_exclusion_that_matches_nothing_may_be_a_typo() -> None:
    assert "nvme0n1" in error({"class": "nvme"}, {"disk": "nvme0", "excluded": True}).message


def test_exclusions_alone_select_nothing() -> None:
    assert "without excluded" in error({"class": "nvme", "excluded": True}).message


# -- bridges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["00:01.*", {"class_id": "0604"}, {"driver": "pcieport"}])
def test_a_bridge_is_found_by_its_address_only(selector: t.Any) -> None:
    assert "it matches nothing but bridges" in error(selector).message
    assert found("00:01.0") == ["0000:00:01.0"]
    assert "0000:00:01.0" not in found("*")


# -- nothing found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "nearest"),
    [
        ("0000:03:00.7", "0000:03:00.1 (ethernet, 8086:10c9, igb, ens3f1)"),
        ("0000:42:00.*", "0000:41:00.0 (3d, 10de:2236)"),
        ({"id": "10de:2237"}, "0000:41:00.0 (3d"),
        ({"class": "sata"}, "0000:01:00.0 (nvme, 144d:a808, nvme, nvme0n1)"),
        ({"nic": "ens3f2"}, "ens3f1"),
        ({"mac": "52:54:00:aa:bb:ce"}, "ens3f0"),
        ({"disk": "nvme2n1"}, "nvme1n1"),
        ({"serial": "S 3"}, "0000:02:00.0"),
        ({"driver": "nvm"}, "0000:01:00.0"),
        ({"iommu_group": 41}, "0000:41:00.0"),
    ],
)
def test_a_selector_that_matches_nothing_shows_the_nearest(selector: t.Any, nearest: str) -> None:
    caught = error("01:00.0", selector)
    assert caught.option.startswith("devices[1]")
    assert nearest in caught.message.partition("the nearest: ")[2]
    assert "pcieport" not in caught.message
    assert caught.message.count("; ") <= 3


def test_what_each_key_finds_alone_is_said() -> None:
    assert (
        "none of the 9 devices has all of it (class gpu: 1, numa_node 0: 1)"
        in error({"class": "gpu", "numa_node": 0}).message
    )


def test_a_bridge_is_offered_to_who_gives_an_address() -> None:
    assert "0000:00:01.0 (bridge, 8086:0001, pcieport)" in error("00:02.0").message


def test_a_host_without_devices() -> None:
    assert "it has no PCI devices" in error("01:00.0", devices=[]).message


# -- virtual functions ---------------------------------------------------------------------------------------------


def test_a_device_without_sriov_has_no_virtual_functions() -> None:
    caught = error({"vfs_of": "41:00.0"})
    assert caught.option == "devices[0].vfs_of"
    assert "it names no device with SR-IOV" in caught.message
    assert "0000:03:00.0" in caught.message


def test_virtual_functions_that_are_not_there() -> None:
    assert (
        "has 3 virtual functions now and can have 7, not all of numbers 5"
        in error({"vfs_of": "ens3f0", "vf": [0, 5]}).message
    )
    empty = {**PF, "sriov": {**PF["sriov"], "num_vfs": 0, "vfs": []}}
    assert "has no virtual functions now and can have 7" in error({"vfs_of": "ens3f0"}, devices=[empty]).message


def test_virtual_functions_that_are_about_to_be_created() -> None:
    choice = chosen({"vfs_of": "ens3f0", "vf": [0, 5]}, pending=True)
    assert [one.address for one in choice.chosen] == ["0000:03:10.0"]
    assert choice.missing == [
        "devices[0]: 0000:03:00.0 has 3 virtual functions now and can have 7; those that are not there are left out."
    ]


def test_a_physical_function_must_be_there_in_any_case() -> None:
    assert error({"vfs_of": "ens9"}, pending=True, lenient=True).option == "devices[0].vfs_of"


# -- names that a device loses -------------------------------------------------------------------------------------


def given_away(one: Device) -> Device:
    """The device after vfio_bind: on vfio, and remembered."""
    kept = {"driver": one["driver"], "interfaces": one["interfaces"], "disks": one["disks"]}
    return {**one, "driver": "vfio-pci", "interfaces": [], "disks": [], "remembered": kept}


@pytest.mark.parametrize(
    "selector",
    [
        {"nic": "ens3f0"},
        {"nic": "ens3f?"},
        {"mac": "52:54:00:aa:bb:cc"},
        {"disk": "nvme1n1"},
        {"serial": "S 2"},
        {"driver": "nvme"},
        {"class": "nvme", "driver": "nvme"},
    ],
)
def test_the_second_run_finds_what_the_first_one_took(selector: t.Any) -> None:
    first = found(selector)
    after = [given_away(one) if one["address"] in first else one for one in HOST]
    assert found(selector, devices=after) == first


@pytest.mark.parametrize(("key", "name"), [("disk", "nvme0n1"), ("nic", "eth0")])
def test_a_name_that_the_host_has_given_to_another_device_takes_neither(key: str, name: str) -> None:
    give = disk if key == "disk" else nic
    first, second = device("0000:05:00.0", **give(name, "52:54:00:00:00:05")), device("0000:06:00.0", **give(name, "6"))
    caught = error({key: name}, devices=[given_away(first), second])
    assert f"{key} {name} was 0000:05:00.0" in caught.message
    assert "then 0000:06:00.0" in caught.message
    assert "then 0000:06:00.0" in error({key: name}, devices=[given_away(first), given_away(second)]).message
    # Globs mean whatever has such a name, and another key can tell which one is meant.
    assert len(found({key: name[:-1] + "*"}, devices=[given_away(first), second])) == 2
    assert found({key: name, "address": "06:00.*"}, devices=[given_away(first), second]) == ["0000:06:00.0"]


def test_a_disk_behind_two_functions_is_one_disk() -> None:
    first, second = (device(f"0000:0{bus}:00.0", **disk("nvme0n1", "S1")) for bus in (5, 6))
    both = ["0000:05:00.0", "0000:06:00.0"]
    assert found({"disk": "nvme0n1"}, devices=[first, second]) == both
    assert found({"disk": "nvme0n1"}, devices=[given_away(first), second]) == both


# -- giving back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", [{"class": "sata"}, "0000:42:*", {"driver": "tg3"}, {"nic": "wlan*"}])
def test_to_be_given_back_a_description_may_match_nothing(selector: t.Any) -> None:
    assert found(selector, lenient=True) == []


@pytest.mark.parametrize("selector", ["0000:42:00.0", {"nic": "ens9"}, {"disk": "sdz"}])
def test_to_be_given_back_a_name_must_exist(selector: t.Any) -> None:
    error(selector, lenient=True)


# -- classes -------------------------------------------------------------------------------------------------------


def test_the_most_specific_class_is_named() -> None:
    assert [class_name(one) for one in (NVME, GPU, PF, BRIDGE)] == ["nvme", "3d", "ethernet", "bridge"]
    assert class_name(device("0000:01:00.0", class_id="ff0000")) == "class ff0000"
    assert describe({"address": "0000:01:00.0"}) == "0000:01:00.0 (class unknown)"


# -- a real machine ------------------------------------------------------------------------------------------------


def on(root: pathlib.Path, *selectors: t.Any) -> list[str]:
    return [one.address for one in find_devices(Host(str(root)), "devices", list(selectors)).chosen]


def test_the_virtual_gpus_of_a_real_machine(vgpu_node: pathlib.Path) -> None:
    virtual = on(vgpu_node, {"vfs_of": "08:00.0"})
    assert len(virtual) == 16
    assert (virtual[0], virtual[-1]) == ("0000:08:00.4", "0000:08:02.3")
    assert on(vgpu_node, {"id": "10de:25b6"}) == ["0000:08:00.0", *virtual]
    assert on(vgpu_node, {"class": "3d"}) == on(vgpu_node, {"vendor_id": "10de"}) == ["0000:08:00.0", *virtual]
    assert on(vgpu_node, {"class": "gpu"}) == ["0000:01:00.1", "0000:08:00.0", *virtual]
    assert on(vgpu_node, {"vfs_of": {"id": "10de:25b6", "address": "08:00.0"}, "vf": "0,15"}) == [
        virtual[0],
        virtual[-1],
    ]
    assert on(vgpu_node, "08:00.[4-7]") == virtual[:4]
    assert on(vgpu_node, {"class": "gpu"}, {"vendor_id": "10de", "excluded": True}) == ["0000:01:00.1"]


def test_the_names_of_a_real_machine(vgpu_node: pathlib.Path) -> None:
    assert on(vgpu_node, {"nic": "eno*"}) == ["0000:04:00.0", "0000:04:00.1"]
    assert on(vgpu_node, {"mac": "5c:b9:01:89:c6:e5"}) == ["0000:04:00.1"]
    assert on(vgpu_node, {"disk": "sda"}) == ["0000:03:00.0"]
    assert on(vgpu_node, {"serial": "S6S2NS0TA17548X"}) == on(vgpu_node, {"class": "nvme"}) == ["0000:05:00.0"]
    assert on(vgpu_node, {"driver": "ixgbe", "numa_node": 0}) == ["0000:04:00.0", "0000:04:00.1"]
    second = on(vgpu_node, {"numa_node": 1})
    assert second and all(address.startswith(("0000:8", "0000:f")) for address in second)
    with pytest.raises(OptionError, match=r"the nearest: 0000:04:00\.\d .*eno49"):
        on(vgpu_node, {"nic": "eno48"})
