# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The plan of a whole host makes the very calls that the roles make: both are run, and their calls compared."""

from __future__ import annotations

import json
import pathlib
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _site
from ansible_collections.iommufd.host.plugins.module_utils._ansible import normalize
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.modules import host_plan
from ansible_collections.iommufd.host.tests.unit.fake import ANSWERS, Fleet

Json = dict[str, t.Any]

OLD_LIBVIRT = {"effective": ["/dev/null"], "libvirt_version": "11.3.0", "passes_descriptors": False}
NEW_LIBVIRT = {"effective": ["/dev/null"], "libvirt_version": "12.8.0", "passes_descriptors": True}
TWO = {
    "devices": [{"address": "0000:01:00.0", "to_driver": "vfio-pci"}, {"address": "0000:02:00.0", "to_driver": None}]
}

# Variables of the roles, and what modules answer.
CASES: dict[str, tuple[Json, Json]] = {
    "the defaults": ({}, {}),
    "own arguments": (
        {"kernel_iommu_args": ["intel_iommu=on"], "kernel_dkms": "never", "kernel_modules": ["vfio-pci"]},
        {"kernel_args": {"reboot_reasons": ["x"]}},
    ),
    "a build": (
        {"kernel_dkms_source": "/usr/src/linux.tar.xz", "kernel_install_packages": False},
        {"iommufd_dkms": {"changed": True, "reboot_reasons": ["y"]}},
    ),
    "an old libvirt": (
        {"devices_list": ["0000:01:00.0"], "access_legacy_groups": True, "access_memlock_guests": ["4G"]},
        {"cgroup_acl": OLD_LIBVIRT, "vfio_bind": TWO},
    ),
    "a new libvirt": ({"access_memlock_guests": ["4G"], "access_acl_users": ["qemu"]}, {"cgroup_acl": NEW_LIBVIRT}),
    "a group by hand": (
        {"access_mode": "group", "access_group": "gpu", "access_mode_bits": "0640", "access_libvirt": False},
        {"cgroup_acl": OLD_LIBVIRT},
    ),
    "libvirt demanded": (
        {
            "access_libvirt": True,
            "access_apparmor": "true",
            "access_mode": "group",
            "access_addresses": ["0000:09:00.0"],
        },
        {"cgroup_acl": OLD_LIBVIRT},
    ),
    "no profiles": ({"access_apparmor": False}, {"cgroup_acl": OLD_LIBVIRT}),
    "launchers": (
        {
            "access_launcher_units": ["guest@.service", "machine.slice"],
            "access_launcher_open_file": ["/dev/iommu:iommu"],
            "access_memlock_guests": [{"memory": "2G", "count": 2}],
            "access_memlock_users": ["@kvm"],
        },
        {},
    ),
    "launchers with a limit": (
        {
            "access_launcher_units": ["guest@.service"],
            "access_launcher_memlock": "17G",
            "access_memlock_guests": ["4G"],
        },
        {},
    ),
    "functions and all switches": (
        {
            "devices_vfs": [{"nic": "enp1s0", "vfs": 2}],
            "devices_list": [{"vfs_of": "enp1s0"}],
            "devices_persistent": False,
            "devices_force": True,
            "devices_include_group": True,
            "devices_driver": "auto",
            "devices_require_cdev": False,
            "kernel_iommu_passthrough": True,
        },
        {"sriov_vfs": {"changed": True}, "vfio_bind": TWO},
    ),
}


def comparable(module: str, options: Json) -> Json:
    """Options as the module itself takes them: complete, and of its types."""
    if module in _site.TASKS:
        return {"module": module, **normalize(module, _site.TASKS[module].ARGUMENT_SPEC, dict(options))}
    return {"module": module, "include_group": False, "state": "bound", "pending": False, **options}


def recording(answers: Json, calls: list[Json]) -> _site.Caller:
    def call(module: str, options: Json) -> Json:
        calls.append(comparable(module, options))
        return {"changed": False, "plan": [], **ANSWERS[module], **answers.get(module, {})}

    return call


def planned(answers: Json, wanted: Json) -> list[Json]:
    calls: list[Json] = []
    call = recording(answers, calls)
    kernel = _site.plan_kernel(call, wanted["kernel"])
    pending = kernel.changed or kernel.result["reboot_required"]
    _part, devices = _site.plan_devices(call, wanted["devices"], pending)
    bound = [one["address"] for one in devices if one["to_driver"]]
    access = _site.plan_access(call, wanted["access"], bound, pending)
    _site.probe_access(call, wanted["access"], access, with_devices=True)
    return calls


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Json, list[Json]]]:
    """For each case the options that the playbook gives to host_plan, and the calls of its roles."""
    fleet = Fleet(tmp_path_factory.mktemp("site"))
    for index, (variables, answers) in enumerate(CASES.values()):
        # In the state of one with something to do, so that every role is run.
        fleet.host(f"h{index}", {"answers": answers}, **variables)
    done = fleet.run("iommufd.host.site", "--check", "--forks", "2")
    assert done.returncode == 0, done.stdout
    assert "PLAY RECAP" in done.stdout
    asked = {name: fleet.calls(f"h{index}") for index, name in enumerate(CASES)}
    # Access is only tried outside check mode.
    return {name: (calls[0]["options"], calls[1:]) for name, calls in asked.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_plan_makes_the_calls_of_the_roles(name: str, runs: dict[str, tuple[Json, list[Json]]]) -> None:
    options, calls = runs[name]
    for_all = {"qemu": {}, "look_back": False, "survey": False}
    wanted = normalize("host_plan", host_plan.ARGUMENT_SPEC, {**for_all, **options})
    made = planned(CASES[name][1], wanted)
    of_roles = [
        comparable(call["module"], call["options"])
        for call in calls
        if call["module"] not in ("guest_verify", "host_record")
    ]
    assert [one for one in made if one["module"] != "access_probe"] == of_roles


def test_the_guest_is_asked_for_as_the_role_does(runs: dict[str, tuple[Json, list[Json]]]) -> None:
    options, calls = runs["an old libvirt"]
    wanted = normalize("host_plan", host_plan.ARGUMENT_SPEC, dict(options))["verify"]
    asked = next(call["options"] for call in calls if call["module"] == "guest_verify")
    assert wanted["devices"] == asked["devices"] == ["0000:01:00.0"]
    of_the_plan = ("enabled", "when", "max_age")
    for name in set(wanted) - set(of_the_plan):
        assert wanted[name] == asked.get(name), name


def test_the_probe_is_that_of_the_role(tmp_path: pathlib.Path) -> None:
    fleet = Fleet(tmp_path)
    variables = {
        "access_launcher_units": ["guest@.service"],
        "access_probe_memory": "4G",
        "devices_list": ["0000:01:00.0"],
    }
    answers = {"cgroup_acl": OLD_LIBVIRT, "vfio_bind": TWO}
    fleet.host("h0", {"answers": answers}, **variables, verify_enabled=False)
    done = fleet.run("iommufd.host.site")
    assert done.returncode == 0, done.stdout
    calls = fleet.calls("h0")
    wanted = normalize("host_plan", host_plan.ARGUMENT_SPEC, calls[0]["options"])
    assert [one for one in planned(answers, wanted) if one["module"] == "access_probe"] == [
        comparable(call["module"], call["options"]) for call in calls if call["module"] == "access_probe"
    ]


@pytest.mark.parametrize("answer", [OLD_LIBVIRT, NEW_LIBVIRT, ANSWERS["cgroup_acl"]])
def test_the_mode_is_decided_as_in_the_role(answer: Json, tmp_path: pathlib.Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.host("h0", {"answers": {"cgroup_acl": answer}})
    play = [
        {
            "hosts": "all",
            "gather_facts": False,
            "tasks": [
                {"ansible.builtin.include_role": {"name": "iommufd.host.access"}},
                {
                    "ansible.builtin.copy": {
                        "content": "{{ access_decision | to_json }}",
                        "dest": str(tmp_path / "seen"),
                    }
                },
            ],
        }
    ]
    (tmp_path / "play.json").write_text(json.dumps(play))
    done = fleet.run(str(tmp_path / "play.json"))
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "seen").read_text()) == _site.decide_mode("auto", answer)


def test_an_error_tells_the_role_that_would_have_met_it() -> None:
    with pytest.raises(HostError) as met, _site.blaming("devices"):
        raise HostError("no")
    assert met.value.details == {"role": "devices"}
