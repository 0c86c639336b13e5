# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import typing as t

import pytest
import yaml
from ansible.errors import AnsibleFilterError

from ansible_collections.iommufd.host.plugins.filter import ready as ready_file
from ansible_collections.iommufd.host.plugins.filter import select_devices as select_file
from ansible_collections.iommufd.host.plugins.filter import why_not as why_file
from ansible_collections.iommufd.host.plugins.filter.ready import ready
from ansible_collections.iommufd.host.plugins.filter.select_devices import select_devices
from ansible_collections.iommufd.host.plugins.filter.why_not import why_not
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._survey import survey
from ansible_collections.iommufd.host.plugins.plugin_utils._readiness import ESSENTIAL
from ansible_collections.iommufd.host.tests.unit.machine import Machine


def check(status: str, detail: str = "Found.", remedy: str | None = None, name: str = "memlock") -> dict[str, t.Any]:
    return {"id": name, "status": status, "detail": detail, "remedy": remedy}


GOOD = [check("ok", name=name) for name in ESSENTIAL]
FAILING = [*GOOD, check("fail", "No node.", "Load iommufd."), check("warn", "Old QEMU."), check("skip")]


@pytest.mark.parametrize(
    ("checks", "warnings", "answer"),
    [
        ([*GOOD, check("skip")], True, True),
        ([*GOOD, check("warn")], False, True),
        ([*GOOD, check("warn")], True, False),
        (FAILING, False, False),
        (GOOD[1:], False, False),
        ([check("skip")], False, False),
        ([], False, False),
    ],
)
def test_a_host_is_ready_when_nothing_is_in_the_way_and_all_that_is_essential_is_known(
    checks: list[t.Any], warnings: bool, answer: bool
) -> None:
    assert ready(checks, warnings) is answer
    assert (why_not({"checks": checks}, warnings) == []) is answer


def test_why_not_gives_what_was_found_and_the_remedy() -> None:
    assert why_not(FAILING) == ["No node. Load iommufd."]
    assert why_not(FAILING, warnings=True) == ["No node. Load iommufd.", "Old QEMU."]
    assert why_not([*GOOD[1:], check("skip", name=ESSENTIAL[0])]) == [f"{ESSENTIAL[0]} could not be told."]
    assert "Nothing is known" in why_not([check("skip")])[0]


@pytest.mark.parametrize("value", [None, "x", 3, {"devices": []}, [1], {"failed": True, "msg": "ssh timed out"}])
def test_what_is_no_survey_is_an_error(value: t.Any) -> None:
    with pytest.raises(AnsibleFilterError, match="ready takes what iommufd"):
        ready(value)
    if isinstance(value, dict) and "msg" in value:
        with pytest.raises(AnsibleFilterError, match="ssh timed out"):
            why_not(value)


def furnish(machine: Machine) -> None:
    """A machine on which the examples find something."""
    machine.pci("0000:01:00.0", "144d:a808", "010802", driver="nvme", numa_node=0, group=1)
    machine.disk("nvme0n1", "0000:01:00.0")
    machine.pci("0000:02:00.0", "144d:a808", "010802", driver="nvme", numa_node=0, group=2)
    machine.disk("nvme1n1", "0000:02:00.0")
    machine.mounts((machine.number("nvme1n1"), "/data", "ext4", "/dev/nvme1n1"))
    machine.pci("0000:03:00.0", driver="igb", numa_node=0, sriov_totalvfs=8, sriov_numvfs=0)
    machine.interface("ens3f0", "0000:03:00.0")
    machine.pci("0000:04:00.0", driver="e1000e", numa_node=0)
    machine.interface("eno1", "0000:04:00.0")


def test_devices_as_a_survey_gives_them(machine: Machine) -> None:
    furnish(machine)
    devices = survey(machine.host)["devices"]
    (nvme, _used) = select_devices(devices, {"class": "nvme"})
    assert nvme == devices[0]
    assert nvme["disks"] == [{"name": "nvme0n1", "serial": None}]
    assert select_devices(devices, {"class": "nvme"}, free=True) == [nvme]
    assert select_devices(devices, ["04:00.0", {"disk": "nvme0n1"}]) == [devices[0], devices[3]]
    with pytest.raises(AnsibleFilterError, match=r"^selectors\[0\]\.class: 'nvm' is not accepted"):
        select_devices(devices, [{"class": "nvm"}])
    with pytest.raises(AnsibleFilterError, match=r"^selectors: .*the nearest: 0000:01:00\.0"):
        select_devices(devices, {"disk": "nvme7n1"})
    with pytest.raises(AnsibleFilterError, match="takes the devices"):
        select_devices({"devices": devices}, "01:00.0")


def test_a_real_machine(vgpu_node: pathlib.Path) -> None:
    result = survey(Host(str(vgpu_node)))
    free = select_devices(result["devices"], [{"nic": "eno*"}, {"class": "nvme"}], free=True)
    assert [one["address"] for one in free] == ["0000:04:00.0", "0000:05:00.0"]
    virtual = select_devices(result["devices"], {"query": "sriov.physfn == '0000:08:00.0' && numa_node == `0`"})
    assert len(virtual) == 16


@pytest.mark.parametrize("file", [select_file, ready_file, why_file], ids=lambda file: file.__name__.split(".")[-1])
def test_the_examples_run(file: t.Any, machine: Machine, tmp_path: pathlib.Path) -> None:
    if file is ready_file:
        machine.pci("0000:01:00.0", driver="nvme")  # without a group, for the IOMMU is off
    else:
        furnish(machine)
    tasks = yaml.safe_load(file.EXAMPLES)
    assert list(tasks[0]) == ["name", "iommufd.host.iommufd_info", "register"]
    tasks[0]["iommufd.host.iommufd_info"] = {"root": str(machine.root)}
    play = {
        "hosts": "localhost",
        "gather_facts": False,
        "vars": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable},
        "tasks": tasks,
    }
    playbook = tmp_path / "examples.yml"
    playbook.write_text(json.dumps([play]))
    done = subprocess.run(["ansible-playbook", str(playbook)], capture_output=True, text=True, timeout=120, check=False)
    shown = [json.JSONDecoder().raw_decode(text)[0]["msg"] for text in done.stdout.split("=> ")[1:]]
    if file is ready_file:
        assert done.returncode == 2
        assert shown == ["\n".join(why_not(survey(machine.host)))]
        assert "firmware setup" in shown[0]
        return
    assert done.returncode == 0, done.stdout
    if file is select_file:
        assert shown[:2] == [["0000:01:00.0"], ["0000:03:00.0"]]
        assert [one["address"] for one in shown[2]] == ["0000:03:00.0"]
    else:
        assert shown == [why_not(survey(machine.host), warnings=True)]
