# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The controller's part of host_plan: selectors with a query, in two of its options."""

from __future__ import annotations

import typing as t

from ansible.plugins.action.normal import ActionModule as NormalAction

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.plugin_utils._query import answer_queries, has_query

_PLACES = (("devices", "list"), ("verify", "devices"))


class ActionModule(NormalAction):
    """Runs the module; where a selector has a query, surveys the host before and evaluates it here.

    Without a query this is what runs every module: one round trip.
    """

    def run(self, tmp: t.Any = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        given = self._task.args
        asked = {place: selectors for place in _PLACES if has_query(selectors := self._selectors(*place))}
        if not asked:
            return dict(super().run(tmp, task_vars))
        answered = dict(given)
        try:
            # Once without devices: a mistake in a selector is told before the host is asked anything.
            for (role, option), selectors in asked.items():
                answer_queries(f"{role}.{option}", selectors, [])
            survey = self._execute_module("iommufd.host.iommufd_info", module_args={}, task_vars=task_vars)
            if survey.get("failed") or survey.get("unreachable"):
                return dict(survey)
            for (role, option), selectors in asked.items():
                found = answer_queries(f"{role}.{option}", selectors, survey.get("devices") or [])
                answered[role] = {**answered[role], option: found}
        except HostError as error:
            return {"failed": True, "msg": error.message, **error.details}
        # Put back afterwards: a task that is tried again shall ask the host again.
        self._task.args = answered
        try:
            result = dict(super().run(tmp, task_vars))
        finally:
            self._task.args = given
        # What is recorded shall be what the user wrote.
        for (role, option), selectors in asked.items():
            if isinstance(result.get("wanted"), dict):
                result["wanted"][role][option] = selectors
        return result

    def _selectors(self, role: str, option: str) -> t.Any:
        options = self._task.args.get(role)
        return options.get(option) if isinstance(options, dict) else None
