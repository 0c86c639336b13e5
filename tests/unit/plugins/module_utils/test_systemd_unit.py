# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Drop-ins of systemd units: names, text, plan, and what is read back."""

from __future__ import annotations

import pathlib

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _systemd_unit as unit
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._files import own_header
from ansible_collections.iommufd.host.plugins.module_utils._host import Host

WANTED = unit.Wanted(("/dev/iommu", "char-vfio-dev"))
PATH = "/etc/systemd/system/guest@.service.d/50-iommufd-host.conf"


def state(text: str | None = None, name: str = "guest@.service", drop_ins: str = PATH, **shown: str) -> unit.UnitState:
    properties = {"LoadState": "loaded", "DropInPaths": drop_ins, "DevicePolicy": "auto", **shown}
    return unit.UnitState(name, None if text is None else text.encode(), properties)


@pytest.mark.parametrize(
    "name", ["a.service", "guest@.service", "guest@one.service", "machine.slice", r"machine-qemu\x2d1\x2da.scope"]
)
def test_units_that_are_accepted(name: str) -> None:
    assert unit.parse_unit("unit", name) == name


@pytest.mark.parametrize(
    "name", ["", "guest", "a.socket", "../a.service", "a b.service", "@.service", "a/b.slice", "x" * 250 + ".service"]
)
def test_units_that_are_not(name: str) -> None:
    with pytest.raises(OptionError, match=r"^unit: "):
        unit.parse_unit("unit", name)


@pytest.mark.parametrize("path", ["/dev/iommu", "/dev/vfio/devices/vfio0", "/dev/vfio/by-path/pci-0000:02:00.0"])
def test_paths_that_are_accepted(path: str) -> None:
    assert unit.parse_path("devices[0]", path) == path


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("dev/iommu", "relative"),
        ("/dev/vfio/*", "wildcards"),
        ("/dev/vfio/[0-9]", "wildcards"),
        ("/dev/../etc/shadow", "not accepted"),
        ("/etc/passwd", "not accepted"),
        ("/dev", "not accepted"),
        ("/dev/a b", "not accepted"),
        ('/dev/a"', "not accepted"),
        ("/dev/iommu\nDeviceAllow=/dev/mem", "not accepted"),
    ],
)
def test_paths_that_are_not(path: str, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        unit.parse_path("devices[0]", path)


def test_classes() -> None:
    assert unit.parse_class("devices[0]", "char-vfio-dev") == "char-vfio-dev"
    for value in ("char-misc", "char-*", "char-vfio dev"):
        with pytest.raises(OptionError):
            unit.parse_class("devices[0]", value)


@pytest.mark.parametrize(
    ("value", "good"), [("17G", True), ("infinity", True), ("lots", False), ("0", False), ("-1", False)]
)
def test_sizes(value: str, good: bool) -> None:
    if good:
        assert unit.check_size("limit_memlock", value) == value
    else:
        with pytest.raises(OptionError):
            unit.check_size("limit_memlock", value)


@pytest.mark.parametrize(("name", "section"), [("a.service", "Service"), ("a.slice", "Slice"), ("a.scope", "Scope")])
def test_text(name: str, section: str) -> None:
    text = unit.drop_in_text(state(name=name), unit.Wanted(("/dev/iommu",), None, ("/dev/iommu:iommu",), "1G"))
    assert text.startswith(own_header())
    assert f"\n[{section}]\nDevicePolicy=closed\nDeviceAllow=/dev/iommu rw\nOpenFile=/dev/iommu:iommu\n" in text
    assert text.endswith("LimitMEMLOCK=1G\n")
    assert "After=systemd-modules-load.service" in text


def test_a_strict_policy_of_the_unit_itself_stays_on_every_run() -> None:
    first = unit.drop_in_text(state(DevicePolicy="strict"), WANTED)
    assert "\nDevicePolicy=" not in first
    assert unit.drop_in_text(state(first, DevicePolicy="strict"), WANTED) == first
    assert "\nDevicePolicy=closed" in unit.drop_in_text(
        state(DevicePolicy="strict"), unit.Wanted(("/dev/kvm",), "closed")
    )


def test_plan(tmp_path: pathlib.Path) -> None:
    host = Host(str(tmp_path))
    text = unit.drop_in_text(state(), WANTED)
    plan = unit.plan_present([state(drop_ins="")], WANTED, host)
    assert plan.summary() == [
        f"write {PATH}",
        "have systemd read its units again and check the device policy of guest@.service",
    ]
    assert unit.plan_present([state(text, DevicePolicy="closed")], WANTED, host).summary() == []
    # A killed run wrote the file and did not reload.
    for stale in (state(text, drop_ins=""), state(text, NeedDaemonReload="yes")):
        assert len(unit.plan_present([stale], WANTED, host).steps) == 1
    # A unit that does not exist: the file is all there can be.
    assert unit.plan_present([state(text, drop_ins="", LoadState="not-found")], WANTED, host).summary() == []


def test_plan_absent(tmp_path: pathlib.Path) -> None:
    host = Host(str(tmp_path))
    text = unit.drop_in_text(state(), WANTED)
    assert unit.plan_absent([state(text)], host).summary() == [f"remove {PATH}", "have systemd read its units again"]
    assert unit.plan_absent([state(None, drop_ins="")], host).summary() == []
    assert unit.plan_absent([state(None)], host).summary() == ["have systemd read its units again"], "a killed run"


def test_a_unit_that_is_no_longer_named_loses_its_drop_in_in_the_same_call(tmp_path: pathlib.Path) -> None:
    host = Host(str(tmp_path))
    old = state(unit.drop_in_text(state(), WANTED), name="old.service")
    now = state(unit.drop_in_text(state(), WANTED), DevicePolicy="closed")
    assert unit.plan_present([now], WANTED, host, [old]).summary() == [
        "remove /etc/systemd/system/old.service.d/50-iommufd-host.conf",
        "have systemd read its units again and check the device policy of guest@.service",
    ]


def test_a_file_of_somebody_else_is_refused(tmp_path: pathlib.Path) -> None:
    for plan in (
        lambda s: unit.plan_present(s, WANTED, Host(str(tmp_path))),
        lambda s: unit.plan_absent(s, Host(str(tmp_path))),
    ):
        with pytest.raises(Refusal, match="was not written by this collection"):
            plan([state("[Service]\nDevicePolicy=auto\n")])


def test_what_is_read_back() -> None:
    good = {"DevicePolicy": "closed", "DeviceAllow": "char-vfio-dev rw\n/dev/iommu rwm"}
    assert unit.policy_problems(state("x", **good), WANTED) == []
    assert unit.policy_problems(state("x", drop_ins="", LoadState="not-found"), WANTED) == []
    assert unit.policy_problems(state("x", drop_ins="", **good), WANTED) == [
        f"systemd did not read {PATH} for guest@.service"
    ]
    later = state("x", drop_ins=f"{PATH} /etc/systemd/system/guest@.service.d/99-x.conf", DeviceAllow="/dev/iommu r")
    assert unit.policy_problems(later, WANTED) == [
        "guest@.service does not allow /dev/iommu, char-vfio-dev",
        "guest@.service has DevicePolicy=auto",
        "read after our drop-in: /etc/systemd/system/guest@.service.d/99-x.conf",
    ]


def test_units_with_a_drop_in_of_ours_are_found(tmp_path: pathlib.Path) -> None:
    for name, text in (("a.service", own_header()), ("b.service", "[Service]\n")):
        path = tmp_path / f"etc/systemd/system/{name}.d/{unit.DROP_IN}"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "etc/systemd/system/c.service.d").mkdir()
    assert unit.marked_drop_ins(Host(str(tmp_path))) == ["a.service"]


def test_a_template_is_asked_about_through_an_instance() -> None:
    assert unit.show_name("guest@.service") == "guest@iommufd-host.service"
    assert unit.show_name("guest@one.service") == "guest@one.service"


@pytest.mark.parametrize(
    ("before", "open_file", "memlock", "required"),
    [
        ({"LimitMEMLOCK": "8388608"}, [], "8388608", False),  # systemd 252, which has no OpenFile=
        ({"LimitMEMLOCK": "8388608", "OpenFile": ""}, [], "8388608", False),
        ({"LimitMEMLOCK": "8388608", "OpenFile": ""}, ["/dev/iommu:iommu:"], "8388608", True),
        ({"LimitMEMLOCK": "8388608", "OpenFile": ""}, [], "infinity", True),
    ],
)
def test_files_and_limit_count_from_the_next_start(
    before: dict[str, str], open_file: list[str], memlock: str, required: bool
) -> None:
    was = unit.UnitState("guest.service", None, before)
    now = {"active": True, "open_file": open_file, "memlock": memlock}
    assert unit.restart_required(was, now) is required
    assert unit.restart_required(was, {**now, "active": False}) is False
