# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import dataclasses
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _judgement
from ansible_collections.iommufd.host.plugins.module_utils._evidence import PassedDevice, ProcessState
from ansible_collections.iommufd.host.plugins.module_utils._judgement import Expectation, Witnesses
from ansible_collections.iommufd.host.tests.unit.guest_words import GUEST, QEMU, report, words

OBJECT = "iommufd0"
FIRST, SECOND = "0000:01:00.0", "0000:02:00.0"

THREAD = {
    "Uid": "65534\t65534\t65534\t65534",
    "Gid": "65534\t65534\t65534\t65534",
    "Groups": "",
    "CapInh": "0000000000000000",
    "CapPrm": "0000000000000000",
    "CapEff": "0000000000000000",
    "CapBnd": "0000000000000000",
    "CapAmb": "0000000000000000",
    "NoNewPrivs": "1",
    "Seccomp": "2",
}


def device(number: int, **more: t.Any) -> PassedDevice:
    known = {
        0: {"vendor_id": "0x1b36", "device_id": "0x0010", "class_id": "0x010802", "drivers": ("nvme",)},
        1: {"vendor_id": "0x1234", "device_id": "0x11e8", "class_id": "0x00ff00", "drivers": ()},
    }[number]
    return PassedDevice(
        address=f"0000:0{number + 1}:00.0",
        slot=f"0000:00:0{number + 2}.0",
        node=f"/dev/vfio/devices/vfio{number}",
        number=(511, number),
        **{**known, **more},
    )


@pytest.fixture
def good() -> Witnesses:
    return Witnesses(
        expected=Expectation(objects={OBJECT: 2}, peak={OBJECT: 2}, user=("nobody", 65534, 65534)),
        devices=[device(0), device(1)],
        memory=256 << 20,
        process=ProcessState(
            iommu=[22],
            cdevs={23: (511, 0), 24: (511, 1)},
            legacy=[],
            threads=[dict(THREAD) for _number in range(4)],
            memlock=320 << 20,
            locked=256 << 20,
            pinned=256 << 20,
        ),
        numbers={OBJECT: 22, FIRST: 23, SECOND: 24},
        same={OBJECT: True, FIRST: True, SECOND: True},
        refusals={"/dev/iommu": "Permission denied", "/dev/vfio/devices/vfio0": "Permission denied"},
        qemu=words(QEMU),
        guest=report(GUEST),
        exit_status=0,
        returned={FIRST: "", SECOND: ""},
        changed={FIRST: "", SECOND: ""},
    )


def statuses(seen: Witnesses) -> dict[str, str]:
    return {item["id"]: item["status"] for item in _judgement.judge(seen)}


def failures(seen: Witnesses) -> list[str]:
    return [name for name, status in statuses(seen).items() if status == "fail"]


def test_everything_holds(good: Witnesses) -> None:
    assert set(statuses(good).values()) == {"ok"}


def changed(seen: Witnesses, **fields: t.Any) -> Witnesses:
    return dataclasses.replace(seen, **fields)


def with_process(seen: Witnesses, **fields: t.Any) -> Witnesses:
    assert seen.process is not None
    return dataclasses.replace(seen, process=dataclasses.replace(seen.process, **fields))


def with_thread(seen: Witnesses, **fields: str) -> Witnesses:
    """One thread of four is different: a promise about the process is one about every thread."""
    assert seen.process is not None
    threads = copy.deepcopy(seen.process.threads)
    threads[2].update(fields)
    return with_process(seen, threads=threads)


def said(old: bytes, new: bytes) -> dict[str, t.Any]:
    assert old in GUEST
    return {"guest": report(GUEST.replace(old, new))}


@pytest.mark.parametrize(
    ("spoil", "item"),
    [
        (lambda seen: with_process(seen, iommu=[22, 40]), "one_descriptor"),
        (lambda seen: changed(seen, same={**seen.same, OBJECT: False}), "same_open_file"),
        (lambda seen: changed(seen, qemu=words(QEMU.replace(b"owned=0 users=2", b"owned=1 users=2"))), "passed"),
        (lambda seen: changed(seen, qemu=words(QEMU.replace(b"connect fd=22", b"connect fd=40"))), "passed"),
        (lambda seen: changed(seen, qemu=words(QEMU.replace(b"users=2", b"users=1"))), "shared"),
        (lambda seen: with_process(seen, cdevs={23: (511, 0)}), "devices_passed"),
        (lambda seen: with_process(seen, cdevs={23: (511, 1), 24: (511, 0)}), "devices_passed"),
        (lambda seen: with_process(seen, cdevs={23: (511, 0), 24: (511, 1), 25: (511, 2)}), "devices_passed"),
        (lambda seen: changed(seen, same={**seen.same, SECOND: False}), "devices_passed"),
        (lambda seen: with_process(seen, cdevs={23: (511, 0), 24: (511, 1), 25: (511, 1)}), "devices_passed"),
        (lambda seen: with_process(seen, legacy=["/dev/vfio/12"]), "no_legacy"),
        (lambda seen: with_thread(seen, Uid="0 65534 65534 65534"), "user"),
        (lambda seen: with_thread(seen, Gid="0 0 0 0"), "user"),
        (lambda seen: with_thread(seen, Groups="104 "), "user"),
        (lambda seen: with_thread(seen, CapBnd="0000000000000400"), "no_capabilities"),
        (lambda seen: with_thread(seen, CapEff=""), "no_capabilities"),
        (lambda seen: with_thread(seen, NoNewPrivs="0"), "no_new_privileges"),
        (lambda seen: with_thread(seen, Seccomp="0"), "seccomp"),
        (lambda seen: changed(seen, refusals={"/dev/iommu": None}), "cannot_open"),
        (lambda seen: with_process(seen, locked=0), "accounting"),
        (lambda seen: changed(seen, **said(b"02.0 vendor 0x1b36", b"02.0 vendor 0x1b37")), "devices_seen"),
        (lambda seen: changed(seen, guest=report(b"0000:00:02.0 missing 1\nguest ready 1\n")), "devices_seen"),
        (lambda seen: changed(seen, **said(b"0000:00:02.0 driver nvme\n", b"")), "drivers"),
        (lambda seen: changed(seen, **said(b"dma_bytes 2097152", b"dma_bytes 65536")), "dma"),
        (lambda seen: changed(seen, **said(b"dma_bytes 2097152", b"dma_bytes")), "dma"),
        (lambda seen: changed(seen, **said(b"sha256_second ac93", b"sha256_second 0000")), "dma"),
        (lambda seen: changed(seen, **said(b"0000:00:02.0 disk nvme0n1\n", b"")), "dma"),
        (lambda seen: changed(seen, exit_status=1), "powered_off"),
        (lambda seen: changed(seen, exit_status=None), "powered_off"),
        (lambda seen: changed(seen, returned={"0000:01:00.0": "still held by process 7"}), "devices_returned"),
        (lambda seen: changed(seen, changed={FIRST: "its configuration space differs at 0x04"}), "devices_clean"),
        (lambda seen: changed(seen, process=None), "one_descriptor"),
    ],
)
def test_each_promise_broken_is_told(good: Witnesses, spoil: t.Callable[[Witnesses], Witnesses], item: str) -> None:
    assert failures(spoil(good)) == [item]


def test_no_threads_prove_nothing(good: Witnesses) -> None:
    assert failures(with_process(good, threads=[])) == ["user", "no_capabilities", "no_new_privileges", "seccomp"]


def test_what_cannot_be_seen_is_not_called_seen(good: Witnesses) -> None:
    blind = changed(good, same={}, qemu=words(b""))
    assert {name for name, status in statuses(blind).items() if status == "skip"} == {
        "same_open_file",
        "passed",
        "shared",
    }
    assert failures(blind) == []


def test_a_driver_that_wants_firmware_is_excused(good: Witnesses) -> None:
    seen = changed(
        good,
        devices=[device(0, class_id="0x020000", firmware=("a.bin",)), device(1)],
        **said(b"0000:00:02.0 driver nvme\n", b""),
    )
    assert statuses(seen)["drivers"] == "skip"


def test_a_module_that_was_refused_counts_only_where_a_driver_is_missing(good: Witnesses) -> None:
    refused = GUEST + b"guest refused nvme.ko insmod: can't insert: unknown symbol\n"
    assert failures(changed(good, guest=report(refused))) == []
    lacking = report(refused.replace(b"0000:00:02.0 driver nvme\n", b""))
    (item,) = [item for item in _judgement.judge(changed(good, guest=lacking)) if item["status"] == "fail"]
    assert "unknown symbol" in item["detail"]


def test_nothing_opened_is_not_called_returned(good: Witnesses) -> None:
    assert statuses(changed(good, returned={}))["devices_returned"] == "skip"


# -- other launchers and backends


def by_qemu(seen: Witnesses, **expected: t.Any) -> Witnesses:
    """The same guest with a QEMU that opened the nodes itself."""
    opened = dataclasses.replace(seen.expected, launcher="self", passed=False, accounting="user", **expected)
    own = words(QEMU.replace(b"owned=0", b"owned=1"))
    return changed(with_process(seen, locked=0), expected=opened, qemu=own, numbers={}, same={}, refusals={})


def test_a_qemu_that_opens_the_nodes(good: Witnesses) -> None:
    found = statuses(by_qemu(good))
    assert set(found.values()) == {"ok"}
    assert {"opened_by_qemu", "devices_held"} <= set(found)
    assert not {"same_open_file", "passed", "devices_passed", "cannot_open"} & set(found)


def test_a_qemu_that_was_to_open_the_nodes_and_did_not(good: Witnesses) -> None:
    assert failures(changed(by_qemu(good), qemu=words(QEMU))) == ["opened_by_qemu"]


def test_groups_that_were_expected(good: Witnesses) -> None:
    seen = by_qemu(good, groups=frozenset({104}))
    assert failures(with_thread(seen, Groups="104 65534")) == []
    assert failures(with_thread(seen, Groups="104 105")) == ["user"]


def legacy(seen: Witnesses) -> Witnesses:
    devices = [device(number, backend="legacy", object="", group=12 + number) for number in (0, 1)]
    held = ["/dev/vfio/vfio", "/dev/vfio/12", "/dev/vfio/13"]
    expected = dataclasses.replace(seen.expected, objects={}, peak={})
    seen = with_process(seen, iommu=[], cdevs={}, legacy=held, pinned=0)
    return changed(seen, devices=devices, expected=expected, qemu=words(b""), numbers={}, same={}, refusals={})


def test_the_legacy_container(good: Witnesses) -> None:
    found = statuses(legacy(good))
    assert set(found.values()) == {"ok"}
    assert {"descriptors", "legacy_held"} <= set(found)
    assert "shared" not in found


@pytest.mark.parametrize(
    ("fields", "item"),
    [
        ({"legacy": ["/dev/vfio/vfio", "/dev/vfio/12"]}, "legacy_held"),
        ({"legacy": ["/dev/vfio/vfio", "/dev/vfio/12", "/dev/vfio/13", "/dev/vfio/14"]}, "legacy_held"),
        ({"iommu": [7]}, "descriptors"),
        ({"locked": 0}, "accounting"),
    ],
)
def test_the_legacy_container_broken(good: Witnesses, fields: dict[str, t.Any], item: str) -> None:
    assert failures(with_process(legacy(good), **fields)) == [item]


def test_both_backends_in_one_guest_are_charged_twice(good: Witnesses) -> None:
    mixed = [device(0), device(1, backend="legacy", object="", group=13)]
    expected = dataclasses.replace(good.expected, objects={OBJECT: 1}, peak={OBJECT: 1})
    one = words(QEMU.replace(b"users=2", b"users=1"))
    seen = with_process(
        changed(good, devices=mixed, expected=expected, qemu=one),
        cdevs={23: (511, 0)}, legacy=["/dev/vfio/vfio", "/dev/vfio/13"], locked=512 << 20,
    )  # fmt: skip
    assert failures(seen) == []
    assert failures(with_process(seen, locked=256 << 20)) == ["accounting"]


def test_two_objects(good: Witnesses) -> None:
    two = words(QEMU.replace(b"connect fd=22 owned=0 users=2", b"connect fd=25 owned=0 users=1"))
    expected = dataclasses.replace(good.expected, objects={OBJECT: 1, "b": 1}, peak={OBJECT: 1, "b": 1})
    numbers = {**good.numbers, "b": 25}
    seen = changed(good, expected=expected, qemu=two, numbers=numbers, same={**good.same, "b": True})
    seen = with_process(seen, iommu=[22, 25], locked=512 << 20)
    assert failures(seen) == []
    assert statuses(seen)["descriptors"] == "ok"
    assert failures(changed(seen, qemu=words(QEMU))) == ["shared"]


def in_unit(seen: Witnesses, **fields: t.Any) -> Witnesses:
    nodes = ("/dev/iommu", "/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1")
    expected = dataclasses.replace(seen.expected, launcher="systemd", nodes=nodes, closed=True)
    allowed = {**dict.fromkeys(nodes, True), "/dev/mem": False}
    state = {"cgroup": "/system.slice/x.service", "enforced": True, "allowed": allowed, **fields}
    return with_process(changed(seen, expected=expected, same={}), **state)


def test_a_units_policy(good: Witnesses) -> None:
    assert failures(in_unit(good)) == []
    assert statuses(in_unit(good))["device_policy"] == "ok"
    assert statuses(in_unit(good, enforced=None, allowed={}))["device_policy"] == "skip"


@pytest.mark.parametrize(
    "fields",
    [
        {"enforced": False},
        {"allowed": {"/dev/iommu": False, "/dev/mem": False}},
        {"allowed": {"/dev/iommu": True, "/dev/mem": True}},
    ],
)
def test_a_units_policy_broken(good: Witnesses, fields: dict[str, t.Any]) -> None:
    assert failures(in_unit(good, **fields)) == ["device_policy"]


def test_libvirt_leaves_the_bounding_set_and_confines(good: Witnesses) -> None:
    expected = dataclasses.replace(
        good.expected, launcher="libvirt", user=None, accounting="any", confined=True, bounded=False
    )
    seen = with_process(
        changed(good, expected=expected, numbers={}, same={}, refusals={}), profile="libvirt-1 (enforce)"
    )
    seen = with_thread(seen, CapBnd="000001ffffffffff", Groups="104")
    assert failures(seen) == []
    assert failures(with_thread(seen, CapPrm="1", CapBnd="0")) == ["no_capabilities"]
    assert failures(with_thread(seen, Uid="0 0 0 0")) == ["user"]
    assert failures(with_process(seen, profile="unconfined")) == ["confined"]
    assert failures(with_process(seen, profile=None)) == ["confined"]


# -- what the devices did


def test_a_transfer_that_did_not_arrive(good: Witnesses) -> None:
    lost = GUEST + b"0000:00:03.0 transfer 0000:00:02.0 0x1 0x0\n"
    arrived = GUEST + b"0000:00:03.0 transfer 0000:00:02.0 0x1 0x1\n"
    works = words(QEMU.replace(b"(-14)", b"(0)").replace(b"PCI BAR?", b"").replace(b"peer-to-peer", b""))
    assert statuses(changed(good, guest=report(arrived)))["peer_to_peer"] == "ok"
    # QEMU had said so before.
    assert statuses(changed(good, guest=report(lost)))["peer_to_peer"] == "skip"
    assert failures(changed(good, guest=report(lost), qemu=works)) == ["peer_to_peer"]


def test_what_was_written_is_read_back(good: Witnesses) -> None:
    wrote = GUEST + b"0000:00:02.0 scratch_wrote aa\n0000:00:02.0 scratch_read aa\n0000:00:02.0 scratch_bytes 1048576\n"
    assert failures(changed(good, guest=report(wrote))) == []
    assert failures(changed(good, guest=report(wrote.replace(b"_read aa", b"_read ab")))) == ["dma"]
    assert failures(changed(good, guest=report(wrote.replace(b"_wrote aa", b"_wrote")))) == ["dma"]


@pytest.mark.parametrize(
    ("said", "link", "dma"),
    [
        (b"carrier 1", "ok", "ok"),
        (b"carrier 0", "skip", "ok"),
        (b"carrier 1\n0000:00:03.0 frames_sent 3\n0000:00:03.0 frames_received 3", "ok", "ok"),
        (b"carrier 1\n0000:00:03.0 frames_sent 3\n0000:00:03.0 frames_received 0", "ok", "fail"),
    ],
)
def test_network(good: Witnesses, said: bytes, link: str, dma: str) -> None:
    guest = GUEST + b"0000:00:03.0 interface eth0\n0000:00:03.0 " + said + b"\n"
    found = statuses(changed(good, guest=report(guest)))
    assert (found["link"], found["dma"]) == (link, dma)


def test_hot_plug(good: Witnesses) -> None:
    plugged = {"address": FIRST, "guest_address": "0000:01:00.0", "problem": "", "object_refused": True}
    seen = changed(good, plugged=[plugged])
    assert failures(seen) == []
    assert failures(changed(good, plugged=[{**plugged, "problem": "it did not appear"}])) == ["hot_plug"]
    assert failures(changed(good, plugged=[{**plugged, "object_refused": False}])) == ["object_in_use"]
