# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""site.yml on hosts whose modules only write down that they were called: which round trips there are, and when."""

from __future__ import annotations

import pathlib
import typing as t

import pytest

from ansible_collections.iommufd.host.tests.unit.fake import Fleet, plan_answer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, t.Any]]]:
    """The calls on hosts in several states, of one run."""
    fleet = Fleet(tmp_path_factory.mktemp("site"))
    states = {
        "converged": plan_answer(),
        "unneeded": plan_answer(needed=False),
        "unrecorded": plan_answer(recorded=False),
        "kernel": plan_answer("kernel"),
        "devices": plan_answer("devices"),
        "access": plan_answer("access"),
    }
    for name, plan in states.items():
        fleet.host(name, {"answers": {"host_plan": plan}})
    fleet.host("refused", {"fail": {"host_plan": "0000:01:00.0 is in use: nvme0n1 is mounted on /"}})
    done = fleet.run("iommufd.host.site", "--forks", "2")
    assert done.returncode == 2
    assert "0000:01:00.0 is in use" in done.stdout
    assert "no guest booted (verify_when: changed): as before" in done.stdout
    return {name: fleet.calls(name) for name in [*states, "refused"]}


def names(calls: list[dict[str, t.Any]]) -> list[str]:
    return [call["module"] for call in calls]


def test_a_converged_host_costs_its_plan_and_a_guest(runs: dict[str, list[dict[str, t.Any]]]) -> None:
    assert names(runs["converged"]) == ["host_plan", "guest_verify"]


def test_or_its_plan_alone(runs: dict[str, list[dict[str, t.Any]]]) -> None:
    assert names(runs["unneeded"]) == ["host_plan"]


def test_what_was_asked_for_is_noted_once(runs: dict[str, list[dict[str, t.Any]]]) -> None:
    assert names(runs["unrecorded"]) == ["host_plan", "guest_verify", "host_record"]
    assert runs["unrecorded"][-1]["options"]["wanted"] == plan_answer()["wanted"]


def test_nothing_is_called_twice_on_a_host_with_everything_to_do(runs: dict[str, list[dict[str, t.Any]]]) -> None:
    made = names(runs["kernel"])
    assert made[:4] == ["host_plan", "iommufd_dkms", "kernel_args", "kernel_modules"]
    assert made[4] == "vfio_bind"
    assert made[-2:] == ["memlock_limits", "guest_verify"]


def test_roles_before_the_first_that_has_something_to_do_are_not_run(
    runs: dict[str, list[dict[str, t.Any]]],
) -> None:
    assert names(runs["devices"])[:2] == ["host_plan", "vfio_bind"]
    assert "udev_access" in names(runs["devices"])
    assert names(runs["access"])[1] == "cgroup_acl"
    assert not {"vfio_bind", "kernel_args"} & set(names(runs["access"]))


def test_the_access_knows_the_devices_where_their_role_is_not_run(runs: dict[str, list[dict[str, t.Any]]]) -> None:
    lists = [one["options"] for one in runs["access"] if one["module"] == "cgroup_acl"]
    libvirt = [options["devices"] for options in lists if options["manager"] == "libvirt"]
    assert libvirt[-1] == ["/dev/iommu", "0000:01:00.0"]


def test_what_is_refused_is_refused_untouched(runs: dict[str, list[dict[str, t.Any]]]) -> None:
    assert names(runs["refused"]) == ["host_plan"]


REASON = "the IOMMU is off in the running kernel"


def waits_for_a_reboot(**kernel: t.Any) -> dict[str, t.Any]:
    """A host on which the kernel role has made everything ready, and only a reboot helps."""
    plan = plan_answer("kernel")
    plan["roles"]["kernel"].update(reboot_required=True, reboot_reasons=[REASON], **kernel)
    answer = {"changed": True, "reboot_required": True, "reboot_reasons": [REASON]}
    return {"answers": {"host_plan": plan, "kernel_args": answer}}


def test_where_a_reboot_is_due_and_not_allowed_it_stops_and_says_why(tmp_path: pathlib.Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.host("first", waits_for_a_reboot())
    # Started again without the reboot: the role has nothing to do any more, and the reason is still there.
    fleet.host("again", waits_for_a_reboot(changed=False, plan=[]))
    done = fleet.run("iommufd.host.site", "--forks", "2", kernel_reboot=False)
    assert done.returncode == 2
    for name in ("first", "again"):
        assert fleet.called(name) == ["host_plan", "iommufd_dkms", "kernel_args", "kernel_modules"]
        assert f"{name} needs a reboot before it can go on: {REASON}. Set kernel_reboot: true" in done.stdout
    assert "TASK [iommufd.host.kernel : Reboot]" not in done.stdout
    # Rebooted meanwhile, it goes on to the guest.
    fleet.host("first", {"answers": {"host_plan": plan_answer("devices")}})
    done = fleet.run("iommufd.host.site", "--limit", "first", kernel_reboot=False)
    assert done.returncode == 0, done.stdout
    assert fleet.called("first")[:2] == ["host_plan", "vfio_bind"]


def test_where_a_reboot_is_due_and_allowed_it_is_tried(tmp_path: pathlib.Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.host("h0", waits_for_a_reboot())
    done = fleet.run("iommufd.host.site", kernel_reboot=True)
    # Ansible's own module for it, which refuses where it would end the controller.
    assert "TASK [iommufd.host.kernel : Reboot]" in done.stdout
    assert "would reboot the control node" in done.stdout
    assert done.returncode == 2
    assert fleet.called("h0") == ["host_plan", "iommufd_dkms", "kernel_args", "kernel_modules"]


def test_tags_run_the_roles_they_name(tmp_path: pathlib.Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.host("h0", {})
    assert fleet.run("iommufd.host.site", "--tags", "devices").returncode == 0
    assert fleet.called("h0") == ["vfio_bind"]


def test_the_access_alone_asks_which_devices_the_selectors_mean(tmp_path: pathlib.Path) -> None:
    fleet = Fleet(tmp_path)
    bound = {"devices": [{"address": "0000:05:00.0", "to_driver": "vfio-pci"}]}
    fleet.host("selects", {"answers": {"vfio_bind": bound}}, devices_list=[{"class": "nvme"}])
    fleet.host("says", {}, devices_list=["0000:01:00.0"])
    done = fleet.run("iommufd.host.site", "--tags", "access")
    assert done.returncode == 0, done.stdout
    asked = {host: fleet.calls(host) for host in fleet.hosts}
    assert (asked["selects"][0]["module"], asked["selects"][0]["check"]) == ("vfio_bind", True)
    assert "vfio_bind" not in [one["module"] for one in asked["says"]]
    for host, address in (("selects", "0000:05:00.0"), ("says", "0000:01:00.0")):
        lists = [one["options"]["devices"] for one in asked[host] if one["options"].get("manager") == "libvirt"]
        assert lists[-1] == ["/dev/iommu", address]


def test_switches_from_the_command_line_and_from_surveys_are_strings(tmp_path: pathlib.Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.host("h0", {"answers": {"host_plan": plan_answer("kernel")}})
    done = fleet.run("iommufd.host.site", "-e", "kernel_reboot=false", "-e", "verify_enabled=false")
    assert done.returncode == 0, done.stdout
    assert "guest_verify" not in fleet.called("h0")


def test_the_user_who_names_addresses_is_heard(tmp_path: pathlib.Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.host("theirs", {"answers": {"host_plan": plan_answer()}}, access_addresses=["0000:09:00.0"])
    fleet.host("ours", {"answers": {"host_plan": plan_answer()}}, devices_list=["0000:01:00.0"])
    assert fleet.run("iommufd.host.site").returncode == 0
    assert fleet.calls("theirs")[0]["options"]["access"]["addresses"] == ["0000:09:00.0"]
    assert "addresses" not in fleet.calls("ours")[0]["options"]["access"]
