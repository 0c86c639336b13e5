# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a rollout is told is checked before any host is looked at."""

from __future__ import annotations

import typing as t
from unittest import mock

import pytest
from ansible.errors import AnsibleError

from ansible_collections.iommufd.host.plugins.action.rollout_report import ActionModule


def report(state: str, **policy: t.Any) -> dict[str, t.Any]:
    task = mock.MagicMock(
        args={"state": state, "hosts": [], "policy": policy}, async_val=0, check_mode=True, diff=False
    )
    action = ActionModule(task, mock.MagicMock(), mock.MagicMock(), None, None, None)
    result: dict[str, t.Any] = action.run(None, {"hostvars": {}})
    return result


def test_a_policy_is_accepted() -> None:
    assert report("checked", max_failures=2, window="Mon 01:00-02:00")["changed"] is False


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"max_failures": -1}, "rollout_max_failures: -1 is not accepted. Accepted: a number from 0."),
        ({"window": "Mun 01:00-02:00"}, "rollout_window: Mun is not accepted. Accepted: times such as"),
        ({"timezone": "Nowhere/At"}, "rollout_timezone: 'Nowhere/At' is not known here."),
    ],
)
def test_a_policy_that_is_none(policy: dict[str, t.Any], words: str) -> None:
    with pytest.raises(AnsibleError) as caught:
        report("checked", **policy)
    assert words in str(caught.value)


def test_a_report_needs_a_place() -> None:
    with pytest.raises(AnsibleError, match="path"):
        report("planned")
