# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The limit on pinned memory: how it is derived, and where it is planned to go."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _libvirt_acl, _memlock, _systemd_unit
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import RemoveFile
from ansible_collections.iommufd.host.plugins.module_utils._systemd_unit import UnitState
from ansible_collections.iommufd.host.tests.unit.machine import Machine

GIB = 1 << 30
AMOUNT = _memlock.Amount(5 * GIB, "why")
DROP_IN = "/etc/systemd/system/libvirtd.service.d/50-iommufd-host-memlock.conf"


def test_the_amount_covers_all_guests_and_says_how() -> None:
    amount = _memlock.parse_guests("guests", [{"memory": "8G", "count": 2}, "512M"])
    assert amount.size == 2 * 9 * GIB + GIB + (512 << 20)
    assert amount.reason == "2 x (8 GiB + 1 GiB) + 1 x (512 MiB + 1 GiB) = 19.5 GiB"
    assert amount.systemd == str(amount.size)


@pytest.mark.parametrize(
    ("entry", "option"),
    [
        ("lots", r"guests\[0\]"),
        (4.5, r"guests\[0\]"),
        (True, r"guests\[0\]"),
        ("0G", r"guests\[0\]"),
        ({"count": 2}, r"guests\[0\]"),
        ({"memory": "4G", "cpus": 2}, r"guests\[0\]"),
        ({"memory": "4X"}, r"guests\[0\]\.memory"),
        ({"memory": "4G", "count": 0}, r"guests\[0\]\.count"),
        ({"memory": "4G", "count": "many"}, r"guests\[0\]\.count"),
    ],
)
def test_guests_that_are_refused(entry: t.Any, option: str) -> None:
    with pytest.raises(OptionError, match=f"^{option}: "):
        _memlock.parse_guests("guests", [entry])


def test_limits() -> None:
    assert _memlock.parse_limit("limit", "17G").size == 17 * GIB
    assert _memlock.parse_limit("limit", "infinity").systemd == "infinity"
    with pytest.raises(OptionError, match="or infinity"):
        _memlock.parse_limit("limit", "much")


@pytest.mark.parametrize("value", ["*", "a b", "", "@", "kvm\n* - memlock unlimited"])
def test_users_that_are_refused(value: str) -> None:
    with pytest.raises(OptionError):
        _memlock.parse_user("users[0]", value)


def service(
    base: int | None = 64 << 20,
    live: int | None = 64 << 20,
    content: bytes | None = None,
    unit: str = "libvirtd.service",
) -> _memlock.Service:
    path = f"/etc/systemd/system/{unit}.d/50-iommufd-host-memlock.conf"
    shown = {"LoadState": "loaded", "DropInPaths": path if content else ""}
    state = UnitState(unit, content, shown, _memlock.DROP_IN)
    return _memlock.Service(state, base, 1 if live != -1 else None, live)


def summary(one: _memlock.Service, amount: _memlock.Amount | None = AMOUNT, units: t.Sequence[str] = ()) -> list[str]:
    state = _memlock.State({one.state.unit: one}, None)
    return _memlock.plan(state, amount, units or [one.state.unit], [], True, Host()).summary()


def test_a_daemon_that_runs_is_restarted_and_checked() -> None:
    assert summary(service()) == [
        f"write {DROP_IN}",
        "have systemd read its units again",
        "restart libvirtd.service (guests keep running)",
        "check the limit of libvirtd.service",
    ]


def test_nothing_to_do_where_file_and_process_agree() -> None:
    assert summary(service(live=5 * GIB, content=_memlock.drop_in_text(AMOUNT).encode())) == []


def test_a_daemon_that_a_killed_run_left_with_its_old_limit_is_restarted() -> None:
    assert summary(service(content=_memlock.drop_in_text(AMOUNT).encode())) == [
        "restart libvirtd.service (guests keep running)",
        "check the limit of libvirtd.service",
    ]


@pytest.mark.parametrize("base", [None, 5 * GIB, 6 * GIB])
def test_a_service_with_enough_of_its_own_is_left_alone(base: int | None) -> None:
    assert summary(service(base=base, live=base)) == []


def test_another_service_is_not_restarted() -> None:
    plan = summary(service(unit="guest.service"))
    assert plan == [
        "write /etc/systemd/system/guest.service.d/50-iommufd-host-memlock.conf",
        "have systemd read its units again",
    ]


def test_a_service_that_is_no_longer_named_gets_its_own_limit_back() -> None:
    ours = service(live=5 * GIB, content=_memlock.drop_in_text(AMOUNT).encode())
    state = _memlock.State({"libvirtd.service": ours}, None)
    assert _memlock.plan(state, None, [], [], True, Host()).summary() == [
        f"remove {DROP_IN}",
        "have systemd read its units again",
        "restart libvirtd.service (guests keep running)",
    ]


def test_a_daemon_that_lost_its_limit_gets_it_back_when_a_later_step_fails(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def run(argv: t.Sequence[str], *_more: t.Any) -> str:
        said.append(" ".join(argv))
        if "virtqemud.service" in argv:
            raise HostError("it does not come back")
        return ""

    for module in (_libvirt_acl, _memlock, _systemd_unit):
        monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(_libvirt_acl, "_is_active", lambda _unit: True)
    content = _memlock.drop_in_text(AMOUNT).encode()
    names = ("libvirtd.service", "virtqemud.service")
    services = {name: service(live=5 * GIB, content=content, unit=name) for name in names}
    plan = _memlock.plan(_memlock.State(services, None), None, [], [], True, Host())
    for step in plan.steps:
        if isinstance(step, RemoveFile):
            machine.file(step.path, content)
            step.path, step.prune = str(machine.at(step.path)), ()
    with pytest.raises(HostError, match="does not come back"):
        plan.apply()
    assert all(machine.at(one.state.path).read_bytes() == content for one in services.values())
    restarted = said.index("systemctl try-restart -- libvirtd.service")
    assert "systemctl restart -- libvirtd.service" in said[restarted:]


@pytest.mark.parametrize(
    ("lines", "base"),
    [
        ("LimitMEMLOCK=64M\n", 64 << 20),
        ("LimitMEMLOCK=64M:infinity\n", 64 << 20),
        ("LimitMEMLOCK = infinity:infinity\n", None),
        ("LimitMEMLOCK=64M\nLimitMEMLOCK=\n", -1),
        ("", -1),
    ],
)
def test_of_two_limits_of_a_unit_the_soft_one_counts(machine: Machine, lines: str, base: int | None) -> None:
    machine.file("/lib/systemd/system/guest.service", f"[Service]\n{lines}")
    state = UnitState("guest.service", None, {"FragmentPath": "/lib/systemd/system/guest.service"}, _memlock.DROP_IN)
    assert _memlock._base(machine.host, state) == base


def test_users_get_a_file_of_their_own() -> None:
    plan = _memlock.plan(_memlock.State({}, None), AMOUNT, [], ["@kvm", "alice"], True, Host())
    assert plan.diff()[0]["after"].endswith("@kvm - memlock 5242880\nalice - memlock 5242880\n")
    again = _memlock.State({}, _memlock.limits_text(AMOUNT, ["@kvm", "alice"]).encode())
    assert not _memlock.plan(again, AMOUNT, [], ["@kvm", "alice"], True, Host()).changed
    assert _memlock.plan(again, None, [], [], True, Host()).summary() == [f"remove {_memlock.LIMITS}"]


def test_files_of_somebody_else() -> None:
    with pytest.raises(Refusal):
        _memlock.plan(_memlock.State({}, b"* - memlock 1\n"), AMOUNT, [], ["alice"], True, Host())
    assert not _memlock.plan(_memlock.State({}, b"* - memlock 1\n"), None, [], [], True, Host()).changed
    with pytest.raises(Refusal):
        summary(service(content=b"[Service]\n"))


def test_the_limit_of_a_process(machine: Machine) -> None:
    machine.file("/proc/7/limits", "Max locked memory         8388608              unlimited            bytes\n")
    machine.file("/proc/8/limits", "Max locked memory         unlimited            unlimited            bytes\n")
    assert [_memlock.process_limit(machine.host, number) for number in (7, 8, 9)] == [8388608, None, -1]
