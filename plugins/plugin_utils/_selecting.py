# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The controller's part of modules that take selectors."""

from __future__ import annotations

import typing as t

from ansible.plugins.action.normal import ActionModule

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.plugin_utils._query import answer_queries, has_query


class SelectingAction(ActionModule):
    """Runs a module; where a selector has a query, surveys the host before and evaluates it here.

    Without a query this is what runs every module: one round trip.

    Attributes:
        options: the module's options that take selectors.
    """

    options: tuple[str, ...] = ("devices",)

    def run(self, tmp: t.Any = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        given = self._task.args
        asking = [option for option in self.options if has_query(given.get(option))]
        if not asking:
            return dict(super().run(tmp, task_vars))
        try:
            # Once without devices: a mistake in a selector is told before the host is asked anything.
            for option in asking:
                answer_queries(option, given[option], [])
            survey = self._execute_module("iommufd.host.iommufd_info", module_args={}, task_vars=task_vars)
            if survey.get("failed") or survey.get("unreachable"):
                return dict(survey)
            devices = survey.get("devices") or []
            answered = {option: answer_queries(option, given[option], devices) for option in asking}
        except HostError as error:
            return {"failed": True, "msg": error.message, **error.details}
        # Put back afterwards: a task that is tried again shall ask the host again.
        self._task.args = {**given, **answered}
        try:
            return dict(super().run(tmp, task_vars))
        finally:
            self._task.args = given
