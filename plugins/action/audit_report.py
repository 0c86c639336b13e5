# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Writes the report of an audit on the controller.

An action and no filters beside ``copy``: a fleet's surveys are some hundred megabytes, and templating would copy all of
them for each file. An action reads them where Ansible keeps them. Nothing runs on a host.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import typing as t

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ansible_collections.iommufd.host.plugins.plugin_utils._audit_junit import to_junit
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_page import to_page
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import Report, build_report, to_json
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_table import summary_line, to_table
from ansible_collections.iommufd.host.plugins.plugin_utils._reports import collection_version, write_file

_NO_TIME = b'"generated": ""'


class ActionModule(ActionBase):
    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        _validation, options = self.validate_argument_spec(
            {
                "path": {"type": "path", "required": True},
                "hosts": {"type": "list", "elements": "str", "required": True},
                "variable": {"type": "str", "default": "audit_survey"},
                "table_hosts": {"type": "int", "default": 40},
            }
        )
        directory = os.path.abspath(options["path"])
        report = build_report(
            _results((task_vars or {})["hostvars"], options["hosts"], options["variable"]),
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            collection_version(),
        )
        findings = _digest(piece.encode() for piece in to_json({**report, "generated": ""}))
        files: dict[str, t.Iterable[str]] = {
            "report.json": to_json(report),
            "junit.xml": [to_junit(report)],
            "index.html": to_page(report),
        }
        try:
            before = _findings(os.path.join(directory, "report.json"))
            old = _old_table(os.path.join(directory, "report.json"), options["table_hosts"]) if self._task.diff else ""
            changed = before != findings or not all(os.path.exists(os.path.join(directory, name)) for name in files)
            if not self._task.check_mode:
                os.makedirs(directory, exist_ok=True)
                for name, pieces in files.items():
                    write_file(os.path.join(directory, name), pieces)
        except OSError as error:
            # Ansible would show the cause once more, in its own words.
            raise AnsibleActionFail(f"path: {directory!r} cannot be written: {error.strerror}.") from None
        table = to_table(report, options["table_hosts"])
        if self._task.diff:
            result["diff"] = {"before": old, "after": "\n".join(table) + "\n"}
        result.update(
            changed=changed,
            path=directory,
            files=[os.path.join(directory, name) for name in files],
            summary=report["summary"],
            not_ready=[name for name, host in report["hosts"].items() if host["status"] != "ready"],
            table=table,
            msg=summary_line(report),
        )
        return result


def _results(hostvars: t.Any, hosts: t.Sequence[str], variable: str) -> dict[str, object]:
    # raw_get does not template: what a module returned is data, and there is a lot of it.
    return {name: hostvars.raw_get(name).get(variable) for name in hosts}


def _findings(path: str) -> str | None:
    """The digest of a report as it lies there, without its time; None where there is none.

    The time of every run differs. Only what was found decides whether a report changed.
    """
    try:
        with open(path, "rb") as file:
            return _digest(re.sub(rb'^"generated": "[^"]*"', _NO_TIME, line) for line in file)
    except FileNotFoundError:
        return None


def _digest(pieces: t.Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _old_table(path: str, limit: int) -> str:
    """The table of an earlier report; empty where that cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            old: Report = json.load(file)
        return "\n".join(to_table(old, limit)) + "\n"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
