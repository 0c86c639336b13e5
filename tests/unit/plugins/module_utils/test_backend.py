# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The backend policy: what is chosen from which facts, and that the reason is always there."""

from __future__ import annotations

import dataclasses
import itertools
import typing as t

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.iommufd.host.plugins.module_utils._backend import (
    LAUNCHERS,
    REQUESTS,
    Decision,
    Facts,
    PeerToPeer,
    decide,
    parse_facts,
    parse_measurement,
)
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import GuestDevice, parse_devices
from ansible_collections.iommufd.host.plugins.module_utils._survey import survey
from ansible_collections.iommufd.host.tests.unit.machine import Machine

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
ONE = ["0000:01:00.0"]
TWO = ["0000:01:00.0", "0000:02:00.0"]

# forky: Linux 7.2, QEMU 11.1, libvirt 12.8. trixie: 6.12, 10.0, 11.3.
FORKY = Facts(
    architecture="x86_64", kernel="7.2.13", iommufd=True, cdev=True, groups=True, qemu="/usr/bin/qemu (11.1.3)",
    qemu_iommufd=True, qemu_passing=True, libvirt="12.8.0", libvirt_passes=True,
    peer_to_peer=PeerToPeer(True, "4 BARs were mapped and none was refused"),
)  # fmt: skip
TRIXIE = dataclasses.replace(
    FORKY, kernel="6.12.95", libvirt="11.3.0", libvirt_passes=False,
    peer_to_peer=PeerToPeer(False, "PCI peer-to-peer transactions on BARs are not supported"),
)  # fmt: skip
UNMEASURED = dataclasses.replace(FORKY, peer_to_peer=PeerToPeer())


def choose(
    facts: Facts, devices: list[t.Any], request: str = "auto", launcher: str = "self", **more: t.Any
) -> Decision:
    return decide(facts, parse_devices("devices", devices), request, launcher, **more)


@pytest.mark.parametrize(
    ("facts", "devices", "hot_plug", "backend", "words"),
    [
        (FORKY, ONE, False, "iommufd", "maps devices for each other here (4 BARs were mapped"),
        (FORKY, TWO, False, "iommufd", "maps devices for each other"),
        (FORKY, TWO, True, "iommufd", "maps devices for each other"),
        (TRIXIE, ONE, False, "iommufd", "a single PCI device and no hot-plug is expected"),
        (TRIXIE, ONE, True, "legacy", "further devices may be plugged in, and peer-to-peer does not work"),
        (TRIXIE, TWO, False, "legacy", "the guest has 2 PCI devices, and peer-to-peer does not work over iommufd here"),
        (UNMEASURED, TWO, False, "legacy", "is not known to work over iommufd here (it was not measured on this host)"),
        (UNMEASURED, ONE, False, "iommufd", "a single PCI device"),
        # A mediated PCI device has BARs, too.
        (TRIXIE, [*ONE, UUID], False, "legacy", "the guest has 2 PCI devices"),
    ],
)
def test_auto_by_peer_to_peer(facts: Facts, devices: list[t.Any], hot_plug: bool, backend: str, words: str) -> None:
    decision = choose(facts, devices, hot_plug=hot_plug)
    assert decision.backend == backend
    assert words in decision.reason
    assert {choice.backend for choice in decision.choices} == {backend}
    assert not decision.mixed


def test_the_two_distributions_differ_and_say_why() -> None:
    """The same guest on trixie and on forky, as the field has it."""
    old, new = choose(TRIXIE, TWO), choose(FORKY, TWO)
    assert (old.backend, new.backend) == ("legacy", "iommufd")
    assert "PCI peer-to-peer transactions on BARs are not supported" in old.reason
    assert "were mapped" in new.reason


@pytest.mark.parametrize("kind", ["vfio-ccw", "vfio-ap"])
def test_devices_of_s390x_have_no_peers(kind: str) -> None:
    facts = dataclasses.replace(TRIXIE, architecture="s390x")
    devices = [{"uuid": UUID, "kind": kind}, {"uuid": UUID.replace("1001", "1002"), "kind": kind}]
    decision = choose(facts, devices)
    assert decision.backend == "iommufd"
    assert "no PCI device" in decision.reason
    assert choose(facts, devices, launcher="direct").backend == "iommufd"
    assert choose(facts, devices, hot_plug=True).backend == "legacy"
    with pytest.raises(OptionError, match=r"^devices\[0\]\.kind: .*the host is x86_64, not s390x"):
        choose(TRIXIE, devices)


@pytest.mark.parametrize(
    ("change", "launcher", "words"),
    [
        ({"architecture": "ppc64le"}, "self", "spapr"),
        ({"architecture": "ppc64"}, "direct", "spapr"),
        ({"iommufd": False, "details": {"iommufd": "The kernel is built without it"}}, "self", "is built without it"),
        ({"iommufd": False}, "self", "the kernel 7.2.13 has no iommufd"),
        ({"cdev": False}, "self", "no character devices"),
        ({"qemu_iommufd": False}, "self", "/usr/bin/qemu (11.1.3) has no iommufd"),
        ({"qemu_passing": False}, "direct", "takes no descriptors"),
        ({"qemu_passing": False}, "systemd", "takes no descriptors"),
        ({"libvirt": "11.3.0", "libvirt_passes": False}, "libvirt", "libvirt 11.3.0 has no iommufd"),
    ],
)
def test_where_it_is_impossible_auto_is_legacy_and_asking_is_an_error(
    change: dict[str, t.Any], launcher: str, words: str
) -> None:
    facts = dataclasses.replace(FORKY, **change)
    decision = choose(facts, ONE, launcher=launcher)
    assert (decision.backend, words in decision.reason) == ("legacy", True)
    with pytest.raises(OptionError) as error:
        choose(facts, ONE, "iommufd", launcher)
    assert error.value.message.startswith("backend: 'iommufd' is not accepted: ")
    assert words in error.value.message
    assert error.value.message.endswith("Accepted: legacy or auto on this host.")
    none = dataclasses.replace(facts, groups=False)
    with pytest.raises(OptionError, match=r"^backend: 'auto' .*CONFIG_VFIO_GROUP.*Accepted: nothing on this host"):
        choose(none, ONE, launcher=launcher)


def test_a_pseries_guest_has_no_iommufd_on_any_host() -> None:
    assert "spapr" in choose(FORKY, ONE, machine="pseries-10.0").reason
    assert choose(FORKY, ONE, machine="q35").backend == "iommufd"


@pytest.mark.parametrize("launcher", ["direct", "systemd"])
def test_a_mediated_device_is_not_passed(launcher: str) -> None:
    decision = choose(FORKY, [UUID], launcher=launcher)
    assert decision.backend == "legacy"
    assert "mediated device" in decision.reason
    assert choose(FORKY, [UUID], launcher="self").backend == "iommufd"
    with pytest.raises(OptionError, match=f"^backend: 'iommufd' .*{UUID} is a mediated device"):
        choose(FORKY, [*ONE, UUID], "iommufd", launcher)


def test_libvirt_has_iommufd_for_pci_functions_only() -> None:
    assert choose(FORKY, TWO, launcher="libvirt").backend == "iommufd"
    decision = choose(FORKY, [*ONE, UUID], launcher="libvirt")
    assert decision.backend == "legacy", "one backend for all, as long as nobody asks for a mix"
    assert "libvirt's XML has no iommufd" in decision.reason


@pytest.mark.parametrize(
    ("change", "launcher", "words"),
    [
        ({"iommufd": None}, "self", "whether the kernel has iommufd"),
        ({"cdev": None}, "self", "whether vfio makes character devices"),
        ({"qemu_iommufd": None, "qemu_passing": None}, "direct", "whether QEMU has iommufd, whether QEMU takes passed"),
        ({"libvirt": None, "libvirt_passes": None}, "libvirt", "whether libvirt has iommufd"),
    ],
)
def test_what_is_not_known_is_not_chosen_but_may_be_asked_for(
    change: dict[str, t.Any], launcher: str, words: str
) -> None:
    facts = dataclasses.replace(FORKY, **change)
    decision = choose(facts, ONE, launcher=launcher)
    assert decision.backend == "legacy"
    assert f"it is not known {words}" in decision.reason
    asked = choose(facts, ONE, "iommufd", launcher)
    assert asked.backend == "iommufd"
    assert any(words in warning for warning in asked.warnings)


def test_a_kernel_without_groups() -> None:
    facts = dataclasses.replace(TRIXIE, groups=False)
    decision = choose(facts, TWO)
    assert decision.backend == "iommufd"
    assert "CONFIG_VFIO_GROUP" in decision.reason
    assert "legacy would be the choice: the guest has 2 PCI devices" in decision.reason
    assert any("Peer-to-peer" in warning for warning in decision.warnings)
    with pytest.raises(OptionError, match=r"^backend: 'legacy' .*Accepted: iommufd or auto"):
        choose(facts, ONE, "legacy")


def test_a_mix_only_where_a_device_asks_for_it() -> None:
    devices = [{"address": "0000:01:00.0", "backend": "legacy"}, "0000:02:00.0"]
    decision = choose(FORKY, devices, "iommufd", "direct")
    assert decision.backend == "iommufd"
    assert [(one.backend, one.asked) for one in decision.choices] == [("legacy", True), ("iommufd", False)]
    assert decision.mixed
    assert any("different backends" in warning for warning in decision.warnings)
    found = decision.to_dict()["devices"]
    assert [one["opened_by"] for one in found] == ["qemu", "launcher"]
    assert found[0]["reason"] == "devices[0].backend asks for legacy"
    mixed = choose(FORKY, [{"address": "0000:01:00.0", "backend": "iommufd"}, UUID], launcher="direct")
    assert [one.backend for one in mixed.choices] == ["iommufd", "legacy"]
    with pytest.raises(OptionError, match=r"^devices\[1\]\.backend: 'iommufd' .*mediated device"):
        choose(FORKY, [*ONE, {"uuid": UUID, "backend": "iommufd"}], launcher="systemd")
    with pytest.raises(OptionError, match=r"^devices\[0\]\.backend: 'legacy' "):
        choose(dataclasses.replace(FORKY, groups=False), devices)


def test_all_devices_ask_for_the_same() -> None:
    decision = choose(FORKY, [{"address": "0000:01:00.0", "backend": "legacy"}])
    assert (decision.backend, decision.reason, decision.mixed) == ("legacy", "every device asks for it", False)


def test_what_is_asked_for_against_the_policy_is_done_and_said() -> None:
    decision = choose(TRIXIE, TWO, "iommufd")
    assert decision.backend == "iommufd"
    assert any("Peer-to-peer between the guest's devices does not work" in one for one in decision.warnings)
    assert not choose(FORKY, TWO, "iommufd").warnings
    legacy = choose(FORKY, TWO, "legacy", "systemd")
    assert legacy.to_dict()["opened_by"] == "qemu"
    assert any("no passing of descriptors" in one for one in legacy.warnings)


def test_further_devices_from_elsewhere_count() -> None:
    assert choose(TRIXIE, ONE, others=1).backend == "legacy"


@pytest.mark.parametrize(
    ("request_", "launcher", "option"), [("vfio", "self", "backend"), ("auto", "qemu", "launcher")]
)
def test_what_is_not_accepted(request_: str, launcher: str, option: str) -> None:
    with pytest.raises(OptionError, match=f"^{option}: .*Accepted: (legacy|direct), "):
        choose(FORKY, ONE, request_, launcher)


KNOWN = st.sampled_from([True, False, None])


@st.composite
def _facts(draw: t.Any) -> Facts:
    return Facts(
        architecture=draw(st.sampled_from(["x86_64", "aarch64", "ppc64le", "s390x", None])),
        iommufd=draw(KNOWN), cdev=draw(KNOWN), groups=draw(KNOWN), qemu_iommufd=draw(KNOWN), qemu_passing=draw(KNOWN),
        libvirt_passes=draw(KNOWN), peer_to_peer=PeerToPeer(draw(KNOWN)),
    )  # fmt: skip


@st.composite
def _devices(draw: t.Any) -> list[GuestDevice]:
    entries = []
    for number in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["vfio-pci", "mdev", "vfio-ccw", "vfio-ap"]))
        name = {"address": f"0000:0{number}:00.0"} if kind == "vfio-pci" else {"uuid": UUID[:-1] + str(number)}
        entries.append({**name, "kind": kind, "backend": draw(st.sampled_from(["auto", "auto", "legacy", "iommufd"]))})
    return parse_devices("devices", entries)


@settings(max_examples=400, deadline=None)
@given(
    _facts(), _devices(), st.sampled_from(REQUESTS), st.sampled_from(LAUNCHERS), st.booleans(),
    st.sampled_from([None, "q35", "pseries"]),
)  # fmt: skip
def test_whatever_is_known(
    facts: Facts, devices: list[GuestDevice], request_: str, launcher: str, hot_plug: bool, machine: str | None
) -> None:
    """What holds for every decision: a reason, no silent mix, nothing impossible, and errors that name an option."""
    try:
        decision = decide(facts, devices, request_, launcher, hot_plug, machine)
    except OptionError as error:
        assert "is not accepted" in error.message
        assert "Accepted: " in error.message
        return
    assert decision.reason
    assert [choice.device for choice in decision.choices] == devices
    if request_ != "auto":
        assert all(choice.backend == request_ for choice in decision.choices if not choice.asked)
    assert len({choice.backend for choice in decision.choices if not choice.asked}) <= 1
    for choice in decision.choices:
        assert choice.reason
        assert choice.asked is (choice.device.backend is not None)
        if choice.backend == "legacy":
            assert facts.groups is not False
            continue
        assert False not in (facts.iommufd, facts.cdev, facts.qemu_iommufd)
        assert facts.architecture != "ppc64le"
        assert machine != "pseries"
        if launcher in ("direct", "systemd"):
            assert facts.qemu_passing is not False
            assert choice.device.kind != "mdev"
        if launcher == "libvirt":
            assert facts.libvirt_passes is not False
            assert choice.device.kind == "vfio-pci"
        several = sum(device.is_pci for device in devices) > 1 or hot_plug
        if request_ == "auto" and not choice.asked and several and facts.groups is not False:
            assert facts.peer_to_peer.works
        if several and facts.peer_to_peer.works is not True:
            assert any("Peer-to-peer" in warning for warning in decision.warnings)


# -- where facts come from ---------------------------------------------------------------------------------------------


def found(**more: t.Any) -> dict[str, t.Any]:
    """A survey, as far as it matters."""
    checks = {"kernel.iommufd": "ok", "kernel.cdev": "ok", "qemu.iommufd": "ok", **more.pop("statuses", {})}
    return {
        "kernel": {"architecture": "x86_64", "release": "7.2.13", "config": None, **more.pop("kernel", {})},
        "qemu": [
            {"path": "/usr/bin/a", "target": "/usr/bin/a", "version": "10.0.2", "iommufd": False, "passing": False},
            {"path": "/usr/bin/b", "target": "/opt/b", "version": "11.1.3", "iommufd": True, "passing": True},
            {"path": "/usr/bin/c", "target": "/usr/bin/c", "version": None, "iommufd": None, "passing": None},
        ],
        "libvirt": {"version": "12.8.0-1", "can_pass_iommufd": True},
        "checks": [{"id": name, "status": status, "detail": f"Seen of {name}."} for name, status in checks.items()],
        **more,
    }


def test_what_the_survey_knows_of_peer_to_peer_counts_for_its_qemu() -> None:
    measured = {"works": True, "detail": "2 BARs were mapped", "qemu": "11.1.3"}
    assert parse_facts(found(peer_to_peer=[measured])).peer_to_peer.works is True
    assert parse_facts(found(peer_to_peer=[measured]), measured=False).peer_to_peer.works is False
    assert parse_facts(found(peer_to_peer=[{**measured, "qemu": "10.0.2"}])).peer_to_peer.works is None


def test_facts_of_a_survey() -> None:
    facts = parse_facts(found())
    assert (facts.architecture, facts.kernel, facts.iommufd, facts.cdev) == ("x86_64", "7.2.13", True, True)
    assert (facts.qemu, facts.qemu_iommufd, facts.qemu_passing) == ("/usr/bin/b (11.1.3)", True, True)
    assert (facts.libvirt, facts.libvirt_passes, facts.groups) == ("12.8.0-1", True, None)
    chosen = parse_facts(found(), "/usr/bin/a")
    assert (chosen.qemu, chosen.qemu_iommufd) == ("/usr/bin/a (10.0.2)", False)
    assert parse_facts(found(), "/opt/b").qemu_passing is True
    with pytest.raises(OptionError, match=r"^qemu: '/x' .*Accepted: a QEMU of the survey \(/usr/bin/a, /usr/bin/b"):
        parse_facts(found(), "/x")


def test_facts_that_a_survey_does_not_have() -> None:
    facts = parse_facts(
        found(
            statuses={"kernel.iommufd": "skip", "kernel.cdev": "skip", "qemu.iommufd": "skip"}, qemu=None, libvirt=None
        )
    )
    known = (facts.iommufd, facts.cdev, facts.qemu_iommufd, facts.qemu_passing, facts.libvirt_passes, facts.groups)
    assert known == (None,) * 6


def test_a_check_says_it_better() -> None:
    facts = parse_facts(found(statuses={"kernel.iommufd": "fail", "qemu.iommufd": "fail"}, qemu=[]))
    assert choose(facts, ONE).reason == "Seen of kernel.iommufd"
    assert "Seen of qemu.iommufd" in "; ".join(facts.details.values())
    assert parse_facts(found(statuses={"kernel.iommufd": "warn"})).iommufd is True, "it is there and not loaded"


@pytest.mark.parametrize(
    ("cdev", "group", "groups"), [("y", "n", False), ("y", "y", True), ("n", "n", True), (None, None, True)]
)
def test_groups_by_the_configuration(cdev: str | None, group: str | None, groups: bool) -> None:
    """Before character devices there was no option to leave the groups out, so it is not in the configuration."""
    config = {"source": "/boot/config", "options": {"VFIO_DEVICE_CDEV": cdev, "VFIO_GROUP": group}}
    assert parse_facts(found(kernel={"config": config})).groups is groups


def test_a_real_survey(machine: Machine) -> None:
    machine.pci("0000:01:00.0", driver="vfio-pci", group=1)
    facts = parse_facts(survey(machine.host))
    assert facts.peer_to_peer.works is None
    assert choose(facts, ONE).reason


EVIDENCE = {
    "kernel": "7.2.13",
    "qemu": {"path": "/usr/bin/b", "version": "11.1.3", "words": []},
    "peer_to_peer": {"works": True, "mapped": 4, "refused": 0, "detail": "4 BARs were mapped and none was refused"},
}


def test_a_measurement() -> None:
    assert parse_facts(found(), measured=EVIDENCE).peer_to_peer == PeerToPeer(
        True, "4 BARs were mapped and none was refused"
    )
    assert parse_measurement("x", {"works": False}).works is False
    assert parse_measurement("x", True).works is True
    assert parse_measurement("x", None).works is None
    open_ = parse_measurement("x", {"works": None, "detail": "no BAR was seen to be mapped"})
    assert (open_.works, open_.detail) == (None, "the measurement left it open: no BAR was seen to be mapped")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": "6.12.95"}, "Linux 6.12.95, and this is Linux 7.2.13"),
        ({"qemu": {"version": "10.0.2"}}, "QEMU 10.0.2"),
    ],
)
def test_a_measurement_of_another_kernel_or_qemu_counts_as_none(change: dict[str, t.Any], words: str) -> None:
    peers = parse_facts(found(), measured={**EVIDENCE, **change}).peer_to_peer
    assert peers.works is None
    assert words in peers.detail


@pytest.mark.parametrize("value", ["yes", 1, [], {}, {"works": "yes"}, {"peer_to_peer": None}])
def test_what_is_no_measurement(value: t.Any) -> None:
    with pytest.raises(OptionError, match=r"^peer_to_peer: .*Accepted: true, false, null"):
        parse_measurement("peer_to_peer", value)


def test_every_request_and_launcher_is_decided() -> None:
    for request_, launcher in itertools.product(REQUESTS, LAUNCHERS):
        assert choose(FORKY, ONE, request_, launcher).reason
