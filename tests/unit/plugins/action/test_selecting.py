# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the controller does for modules that take selectors: the round trips, and what each is given."""

from __future__ import annotations

import typing as t
from unittest import mock

import pytest

from ansible_collections.iommufd.host.plugins.action import guest_verify, vfio_bind

SURVEY = {
    "devices": [
        {"address": "0000:01:00.0", "class_id": "0x010802", "numa_node": 0},
        {"address": "0000:02:00.0", "class_id": "0x010802", "numa_node": 1},
    ]
}


class Trips:
    """An action whose round trips are recorded instead of made."""

    def __init__(self, action: type, survey: dict[str, t.Any], **arguments: t.Any) -> None:
        self.made: list[tuple[str | None, t.Any]] = []
        self.survey = survey
        self.task = mock.MagicMock(args=arguments, async_val=0, check_mode=False, diff=False)
        self.action = action(self.task, mock.MagicMock(), mock.MagicMock(), None, None, None)
        self.action._execute_module = self.trip
        self.action._remove_tmp_path = lambda path: None

    def trip(self, module_name: str | None = None, module_args: t.Any = None, **rest: t.Any) -> dict[str, t.Any]:
        self.made.append((module_name, self.task.args if module_args is None else module_args))
        return self.survey if module_name else {"changed": False}

    def run(self) -> dict[str, t.Any]:
        result: dict[str, t.Any] = self.action.run(None, {})
        return result


@pytest.mark.parametrize("action", [vfio_bind.ActionModule, guest_verify.ActionModule])
def test_without_a_query_there_is_one_round_trip(action: type) -> None:
    trips = Trips(action, SURVEY, devices=[{"class": "nvme"}, "01:00.0"])
    assert trips.run()["changed"] is False
    assert trips.made == [(None, {"devices": [{"class": "nvme"}, "01:00.0"]})]


def test_a_query_costs_one_survey_and_becomes_addresses() -> None:
    given = [{"query": "numa_node == `1`"}]
    trips = Trips(vfio_bind.ActionModule, SURVEY, devices=given, force=True)
    trips.run()
    answered = [{"query": {"expression": "numa_node == `1`", "addresses": ["0000:02:00.0"]}}]
    assert trips.made == [("iommufd.host.iommufd_info", {}), (None, {"devices": answered, "force": True})]
    assert trips.task.args == {"devices": given, "force": True}


def test_a_mistake_is_told_without_any_round_trip() -> None:
    trips = Trips(vfio_bind.ActionModule, SURVEY, devices=[{"query": "numa_node =="}])
    result = trips.run()
    assert result["failed"] is True
    assert result["msg"].startswith("devices[0].query: ")
    assert trips.made == []


def test_a_survey_that_fails_is_the_result() -> None:
    trips = Trips(vfio_bind.ActionModule, {"failed": True, "msg": "no python"}, devices=[{"query": "driver"}])
    assert trips.run()["msg"] == "no python"
    assert len(trips.made) == 1
