# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""rollout.yml on hosts whose modules only write down that they were called: waves, gates, the way back, the report."""

from __future__ import annotations

import json
import pathlib
import subprocess
import typing as t

import pytest

from ansible_collections.iommufd.host.tests.unit.fake import Fleet, plan_answer

Json = dict[str, t.Any]

AFTER = plan_answer()


def to_do(**more: t.Any) -> Json:
    """A host with everything to do, which has converged once its guest was verified."""
    return {"answers": {"host_plan": plan_answer("kernel", recorded=False)}, "after": AFTER, **more}


class Rollout:
    """A run and what it left."""

    def __init__(self, fleet: Fleet, *options: str, **variables: t.Any) -> None:
        self.directory = fleet.root / "report"
        variables = {"rollout_dir": str(self.directory), "rollout_reconnect": 5, **variables}
        self.done: subprocess.CompletedProcess[str] = fleet.run(
            "iommufd.host.rollout", "--forks", "2", *options, **variables
        )
        self.made = {name: fleet.calls(name) for name in fleet.hosts}
        self.calls = {name: [call["module"] for call in made] for name, made in self.made.items()}

    @property
    def report(self) -> Json:
        found: Json = json.loads((self.directory / "report.json").read_text())
        return found

    def statuses(self) -> dict[str, str]:
        return {name: row["status"] for name, row in self.report["hosts"].items()}


@pytest.fixture
def fleet(tmp_path: pathlib.Path) -> Fleet:
    return Fleet(tmp_path)


def test_tags_roll_the_roles_they_name_out(fleet: Fleet) -> None:
    fleet.host("a", to_do())
    run = Rollout(fleet, "--tags", "devices,access")
    assert run.done.returncode == 0, run.done.stdout
    options = [(call["module"], call["options"]) for call in run.made["a"]]
    assert [asked["roles"] for module, asked in options if module == "host_plan"] == [["devices", "access"]] * 3
    assert {"vfio_bind", "udev_access"} <= set(run.calls["a"])
    assert not {"kernel_args", "iommufd_dkms", "guest_verify"} & set(run.calls["a"])
    assert next(asked["touched"] for module, asked in options if module == "host_snapshot") == ["devices", "access"]
    assert next(asked["roles"] for module, asked in options if module == "host_record") == ["devices", "access"]


def test_tags_that_are_left_out_leave_their_roles_out(fleet: Fleet) -> None:
    fleet.host("a", to_do())
    run = Rollout(fleet, "--skip-tags", "verify")
    assert run.made["a"][0]["options"]["roles"] == ["kernel", "qemu", "devices", "access"]
    assert "guest_verify" not in run.calls["a"]


def test_tags_of_somebody_else_roll_nothing_out(fleet: Fleet) -> None:
    fleet.host("a", to_do())
    run = Rollout(fleet, "--tags", "monitoring")
    assert run.done.returncode == 0
    assert run.calls == {"a": []}
    assert "name none of the roles kernel, qemu, devices, access, verify" in run.done.stdout
    assert not run.directory.exists()


def test_waves_hooks_and_a_second_run(fleet: Fleet, tmp_path: pathlib.Path) -> None:
    hooks = {}
    for name in ("drain", "post", "failed"):
        hook = [{"ansible.builtin.shell": f"echo {name} {{{{ inventory_hostname }}}} >>{tmp_path}/hooks"}]
        (tmp_path / f"{name}.yml").write_text(json.dumps(hook))
        hooks[f"rollout_{name}"] = str(tmp_path / f"{name}.yml")
    fleet.host("done", {"answers": {"host_plan": AFTER}})
    for name in ("a", "b", "c"):
        fleet.host(name, to_do())
    first = Rollout(fleet, rollout_waves=[1, "100%"], **hooks)
    assert first.done.returncode == 0, first.done.stdout
    assert first.statuses() == {"done": "converged", "a": "done", "b": "done", "c": "done"}
    assert [first.report["hosts"][name]["wave"] for name in ("done", "a", "b", "c")] == [None, 1, 2, 2]
    assert first.calls["done"] == ["host_plan"]
    assert first.calls["a"][:3] == ["host_plan", "host_plan", "host_snapshot"]
    assert first.calls["a"][-4:] == ["guest_verify", "host_record", "host_plan", "host_snapshot"]
    said = (tmp_path / "hooks").read_text().splitlines()
    # Hosts of one wave go side by side.
    assert said[:2] == ["drain a", "post a"]
    assert sorted(said[2:]) == ["drain b", "drain c", "post b", "post c"]
    row = first.report["hosts"]["a"]
    assert (row["before"]["failing"], row["verified"], row["cause"]) == (["kernel.iommufd"], True, None)
    assert row["plan"]["kernel"] == ["do kernel"]
    assert "wave 2: b, c" in first.done.stdout
    assert "4 hosts: 1 converged, 3 done" in first.done.stdout
    second = Rollout(fleet, **hooks)
    assert second.done.returncode == 0
    assert set(map(tuple, second.calls.values())) == {("host_plan",)}
    assert set(second.statuses().values()) == {"converged"}


def test_waves_follow_the_inventory_whichever_host_answers_first(fleet: Fleet) -> None:
    fleet.host("slow", to_do(slow=3))
    fleet.host("quick", to_do())
    run = Rollout(fleet, rollout_waves=[1])
    assert [run.report["hosts"][name]["wave"] for name in ("slow", "quick")] == [1, 2]


def test_a_host_that_fails_is_put_back_and_no_wave_starts_after_it(fleet: Fleet, tmp_path: pathlib.Path) -> None:
    (tmp_path / "failed.yml").write_text(
        json.dumps(
            [{"ansible.builtin.copy": {"content": "{{ rollout_outcome.cause }}", "dest": str(tmp_path / "hook")}}]
        )
    )
    moved = {"data": {"back": plan_answer("kernel")["back"], "moved": ["0000:01:00.0"]}}
    record = {**moved, "touched": ["kernel", "devices", "access"]}
    for name in ("a", "b", "c"):
        answers = {"host_plan": plan_answer("kernel", recorded=False), "host_snapshot": record}
        fleet.host(name, to_do(answers=answers, fail={"guest_verify": "the guest did not boot"} if name == "b" else {}))
    first = Rollout(fleet, rollout_waves=[1], rollout_failed=str(tmp_path / "failed.yml"))
    assert first.done.returncode == 2
    assert first.statuses() == {"a": "done", "b": "failed", "c": "not_started"}
    assert first.calls["c"] == ["host_plan"]
    assert (tmp_path / "hook").read_text() == "the guest did not boot"
    row = first.report["hosts"]["b"]
    assert row["cause"] == "the guest did not boot"
    assert row["put_back"]["complete"]
    assert "No further wave starts: 1 host has failed (b)" in first.done.stdout
    # In reverse order, then compared, and all notes are gone, since there were none before.
    back = first.calls["b"][first.calls["b"].index("guest_verify") + 1 :]
    assert [one for one in back if one in ("udev_access", "vfio_bind", "kernel_args")] == [
        "udev_access", "vfio_bind", "kernel_args",
    ]  # fmt: skip
    assert back[-2:] == ["host_snapshot", "host_record"]
    # The cause is gone: the run goes on where it ended.
    for name in ("b", "c"):
        fleet.host(name, to_do())
    second = Rollout(fleet)
    assert second.done.returncode == 0, second.done.stdout
    assert second.statuses() == {"a": "converged", "b": "done", "c": "done"}


def test_with_continue_the_others_go_on(fleet: Fleet) -> None:
    for name in ("a", "b"):
        fleet.host(name, to_do(fail={"vfio_bind": "no"} if name == "a" else {}))
    run = Rollout(fleet, rollout_waves=[1], rollout_on_failure="continue")
    assert run.done.returncode == 2
    assert run.statuses() == {"a": "failed", "b": "done"}
    junit = (run.directory / "junit.xml").read_text()
    assert 'tests="2" failures="0" errors="1" skipped="0"' in junit


def test_a_host_that_is_lost_on_the_way_is_told(fleet: Fleet, tmp_path: pathlib.Path) -> None:
    # What a network that is cut looks like to Ansible: from here on nothing answers.
    away = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}
    lose = [{"ansible.builtin.set_fact": away, "when": "inventory_hostname == 'a'"}]
    (tmp_path / "lose.yml").write_text(json.dumps(lose))
    for name in ("a", "b", "c"):
        fleet.host(name, to_do())
    drain = str(tmp_path / "lose.yml")
    run = Rollout(fleet, rollout_waves=[2, 1], rollout_drain=drain)
    assert run.done.returncode != 0
    assert run.statuses() == {"a": "lost", "b": "done", "c": "not_started"}
    # Where that takes the whole wave along, Ansible ends the run; the report was written before.
    fleet.host("a", to_do())
    alone = Rollout(fleet, rollout_waves=[1], rollout_drain=drain)
    assert alone.done.returncode != 0
    assert (alone.report["state"], alone.statuses()["a"]) == ("wave", "at_work")
    assert alone.calls["c"] == ["host_plan"]
    # Back again.
    assert Rollout(fleet).statuses() == {"a": "done", "b": "converged", "c": "done"}


def test_nothing_starts_where_one_plan_is_impossible(fleet: Fleet) -> None:
    fleet.host("a", to_do())
    fleet.host("b", {"fail": {"host_plan": "0000:01:00.0 is in use: nvme0n1 is mounted on /"}})
    fleet.host("c", to_do(), ansible_connection="ssh", ansible_host="127.0.0.1", ansible_port=1)
    run = Rollout(fleet)
    assert run.done.returncode == 2
    assert run.calls["a"] == ["host_plan"]
    assert run.statuses() == {"a": "not_started", "b": "impossible", "c": "unreachable"}
    assert "b: 0000:01:00.0 is in use: nvme0n1 is mounted on /." in run.done.stdout
    left_out = Rollout(fleet, rollout_require="possible")
    assert left_out.statuses() == {"a": "done", "b": "impossible", "c": "unreachable"}
    assert left_out.done.returncode != 0


def test_what_differs_after_the_way_back_is_said(fleet: Fleet) -> None:
    data = {"back": plan_answer("kernel")["back"], "moved": []}
    left = {"differences": ["file /etc/x: absent => there"], "touched": ["access"], "data": data}
    fleet.host(
        "a", to_do(answers={"host_plan": plan_answer("access"), "host_snapshot": left}, fail={"udev_access": "no"})
    )
    run = Rollout(fleet)
    row = run.report["hosts"]["a"]
    assert row["put_back"]["complete"] is False
    # The first try to take the access back fails as well, with the same fault.
    assert "could not be put back" in row["words"]
    fleet.host(
        "a", to_do(answers={"host_plan": plan_answer("access"), "host_snapshot": left}, fail={"guest_verify": "no"})
    )
    row = Rollout(fleet).report["hosts"]["a"]
    assert row["put_back"]["differences"] == ["file /etc/x: absent => there"]
    assert "put back, but 1 things differ from what they were" in row["words"]


def test_of_a_kernel_that_nobody_noted_what_the_run_added_is_taken_back(fleet: Fleet) -> None:
    there = {"kernel": ["dkms"], "qemu": [], "devices": [], "access": ["nodes"]}
    data = {"back": {"there": there, "applied": None, "qemu": None}, "moved": []}
    record = {"data": data, "touched": ["kernel", "devices", "access"], "differences": ["node /dev/iommu: a => b"]}
    answers = {"host_plan": plan_answer("kernel"), "host_snapshot": record}
    fleet.host("a", to_do(answers=answers, fail={"guest_verify": "no"}))
    run = Rollout(fleet)
    back = run.made["a"][run.calls["a"].index("guest_verify") + 1 :]
    taken = [call["module"] for call in back if call["options"].get("state") == "absent"]
    assert {"kernel_modules", "kernel_args"} <= set(taken)
    assert not {"iommufd_dkms", "udev_access"} & set(taken)
    row = run.report["hosts"]["a"]
    assert row["put_back"]["unknown"] == ["kernel", "access"]
    assert "what kernel, access was asked for before is not known" in row["words"]


def test_roles_that_were_there_before_are_run_with_what_they_were_asked_for(fleet: Fleet) -> None:
    was = {
        "kernel": {"iommu_args": "auto", "iommu_passthrough": False, "dkms": "never", "dkms_source": "",
                   "install_packages": True, "modules": ["vfio-pci"]},
        "devices": {"list": ["0000:09:00.0"], "vfs": [], "persistent": True, "force": False, "include_group": False,
                    "driver": "vfio-pci", "require_cdev": True},
        "access": {"mode": "group", "group": "gpu", "mode_bits": "0640", "legacy_groups": False, "acl_users": [],
                   "acl_groups": [], "libvirt": "auto", "devices": ["/dev/iommu"], "addresses": None,
                   "apparmor": "auto", "launcher_units": [], "launcher_devices": [], "launcher_open_file": [],
                   "launcher_memlock": None, "memlock_guests": [], "memlock_users": [], "probe": True},
    }  # fmt: skip
    there = {"kernel": ["args"], "qemu": [], "devices": ["boot"], "access": ["nodes"]}
    data = {"back": {"there": there, "applied": was, "qemu": None}, "moved": ["0000:01:00.0"]}
    record = {"touched": ["devices", "access"], "data": data, "differences": []}
    answers = {"host_plan": plan_answer("devices"), "host_snapshot": record}
    fleet.host("a", to_do(answers=answers, fail={"guest_verify": "no"}), devices_list=["0000:01:00.0"])
    variables = {"rollout_dir": str(fleet.root / "report")}
    fleet.run("iommufd.host.rollout", **variables)
    calls = fleet.calls("a")
    back = calls[[call["module"] for call in calls].index("guest_verify") + 1 :]
    bound = [call["options"] for call in back if call["module"] == "vfio_bind"]
    assert [(one["state"], one["devices"]) for one in bound] == [
        ("unbound", ["0000:01:00.0"]),
        ("bound", ["0000:09:00.0"]),
    ]
    access = [call["options"] for call in back if call["module"] == "udev_access"]
    assert [(one["state"], one["group"], one["mode"]) for one in access] == [("present", "gpu", "0640")]
    assert "kernel_args" not in [call["module"] for call in back]
    # What it was asked for before is what its next failure goes back to.
    assert [call["options"] for call in back if call["module"] == "host_record"] == [{"wanted": was}]
    assert back[-1]["options"] == {"state": "absent"}


def test_check_mode_plans_the_fleet_and_touches_nothing(fleet: Fleet, tmp_path: pathlib.Path) -> None:
    (tmp_path / "drain.yml").write_text(json.dumps([{"ansible.builtin.fail": {"msg": "drained"}}]))
    for name in ("a", "b"):
        fleet.host(name, to_do())
    fleet.run(
        "iommufd.host.rollout",
        "--check",
        rollout_dir=str(fleet.root / "report"),
        rollout_drain=str(tmp_path / "drain.yml"),
    )
    calls = fleet.calls("a") + fleet.calls("b")
    assert all(call["check"] for call in calls)
    assert {"kernel_args", "vfio_bind"} <= {call["module"] for call in calls}
    assert "host_snapshot" not in {call["module"] for call in calls}
    assert not (fleet.root / "report").exists()


def test_outside_its_window_nothing_is_begun_and_nothing_is_wrong(fleet: Fleet) -> None:
    fleet.host("a", to_do())
    # A minute that is not now, whenever this runs.
    run = Rollout(fleet, rollout_window="Mon 03:00-03:01", rollout_timezone="UTC")
    if run.statuses()["a"] == "done":
        pytest.skip("it is Monday, 03:00 UTC")
    assert run.done.returncode == 0
    assert run.statuses() == {"a": "waiting"}
    assert run.calls["a"] == ["host_plan"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("rollout_window", "sometime"), ("rollout_timezone", "Nowhere/At"), ("rollout_on_failure", "cry")],
)
def test_a_wrong_policy_is_told_at_once(name: str, value: str, fleet: Fleet) -> None:
    fleet.host("a", to_do())
    run = Rollout(fleet, **{name: value})
    assert run.done.returncode == 2
    assert value in run.done.stdout
    assert run.calls["a"] == []
