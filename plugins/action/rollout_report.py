# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tells where a rollout is and whether it goes on, and writes its report on the controller.

An action, since the hosts' surveys are large and need not be templated; nothing runs on a host. Each call looks at what
the play has noted of every host, so that nothing is kept anywhere else.
"""

from __future__ import annotations

import datetime
import json
import os
import time
import typing as t

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ansible_collections.iommufd.host.plugins.plugin_utils import _rollout, _window
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_page import to_page
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import build_report
from ansible_collections.iommufd.host.plugins.plugin_utils._reports import collection_version, write_file
from ansible_collections.iommufd.host.plugins.plugin_utils._rollout_page import to_lead


class ActionModule(ActionBase):
    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        _validation, options = self.validate_argument_spec(
            {
                "state": {"type": "str", "choices": ["checked", "planned", "wave", "ended"], "required": True},
                "path": {"type": "path"},
                "hosts": {"type": "list", "elements": "str", "required": True},
                "batch": {"type": "list", "elements": "str", "default": []},
                "policy": {
                    "type": "dict",
                    "required": True,
                    "options": {
                        "require": {"type": "str", "choices": ["all", "possible"], "default": "all"},
                        "on_failure": {"type": "str", "choices": ["stop", "continue"], "default": "stop"},
                        "max_failures": {"type": "int", "default": 0},
                        "window": {"type": "str", "default": ""},
                        "timezone": {"type": "str", "default": ""},
                    },
                },
            },
            required_if=[("state", one, ["path"]) for one in ("planned", "wave", "ended")],
        )
        policy, state = options["policy"], options["state"]
        if policy["max_failures"] < 0:
            raise AnsibleActionFail(
                f"rollout_max_failures: {policy['max_failures']} is not accepted. Accepted: a number from 0."
            )
        now = time.time()
        opened = _open(policy, now)
        if state == "checked":
            result.update(changed=False, open=opened)
            return result
        hostvars = (task_vars or {})["hostvars"]
        # raw_get does not template: what a module returned is data, and there is a lot of it.
        hosts = {name: hostvars.raw_get(name) for name in options["hosts"]}
        began = min((found["began"] for one in hosts.values() if "began" in (found := _noted(one))), default=now)
        report = _rollout.build_rollout(
            hosts, state, policy, began, now, collection_version(), options["batch"] if opened else ()
        )
        stop = _rollout.stops(report) if state == "wave" else None
        if stop:  # the hosts of this wave are not begun
            report = _rollout.build_rollout(hosts, state, policy, began, now, collection_version())
        directory = os.path.abspath(options["path"])
        if not self._task.check_mode:
            _write_all(directory, report, hosts)
        result.update(
            changed=False,
            began=began,
            hosts=options["hosts"],
            msg=_words(report, stop, opened, options["batch"]),
            obstacles=_rollout.obstacles(report),
            open=opened,
            path=directory,
            stop=stop is not None,
            summary=report["summary"],
            table=_rollout.to_table(report),
            verdicts=_rollout.verdicts(report),
            wave=report["wave"],
            window=policy["window"],
        )
        return result


def _noted(host: t.Mapping[str, t.Any]) -> t.Mapping[str, t.Any]:
    found = host.get("rollout_now")
    return found if isinstance(found, dict) else {}


def _open(policy: t.Mapping[str, t.Any], now: float) -> bool:
    try:
        moment = _window.in_zone(datetime.datetime.fromtimestamp(now, datetime.timezone.utc), policy["timezone"])
    except ValueError:
        raise AnsibleActionFail(f"rollout_timezone: {policy['timezone']!r} is not known here.") from None
    try:
        return _window.is_open(policy["window"], moment)
    except ValueError as error:
        raise AnsibleActionFail(f"rollout_window: {error} is not accepted. Accepted: {_window.ACCEPTED}.") from None


def _words(report: dict[str, t.Any], stop: str | None, opened: bool, batch: t.Sequence[str]) -> str:
    if report["state"] != "wave":
        return _rollout.summary_line(report)
    if stop:
        return f"No further wave starts: {stop}. {_rollout.summary_line(report)}"
    if not opened:
        return f"It is not the time for {', '.join(batch)} (rollout_window: {report['policy']['window']})."
    named = ", ".join(batch[:8]) + (f" and {len(batch) - 8} more" if len(batch) > 8 else "")
    return f"wave {report['wave']}: {named}. So far {_rollout.summary_line(report)}"


def _write_all(directory: str, report: dict[str, t.Any], hosts: t.Mapping[str, t.Mapping[str, t.Any]]) -> None:
    surveys: dict[str, object] = {}
    for name, host in hosts.items():
        # As it is afterwards; of a host that was not changed as it was found.
        surveys[name] = _rollout.survey_of(host, "after") or _rollout.survey_of(host, "before") or _reason(host)
    audit = build_report(surveys, report["generated"], report["collection_version"])
    try:
        os.makedirs(directory, exist_ok=True)
        write_file(os.path.join(directory, "report.json"), [json.dumps(report, indent=1), "\n"])
        write_file(os.path.join(directory, "junit.xml"), [_rollout.to_junit(report)])
        page = to_page(audit, "IOMMUFD rollout", to_lead(report), "Made by the rollout playbook.")
        write_file(os.path.join(directory, "index.html"), page)
    except OSError as error:
        # Ansible would show the cause once more, in its own words.
        raise AnsibleActionFail(f"path: {directory!r} cannot be written: {error.strerror}.") from None


def _reason(host: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    plan = _rollout.first_plan(host)
    return {key: plan[key] for key in ("unreachable", "failed", "msg") if key in plan}
