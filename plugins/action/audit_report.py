# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Writes the report of an audit on the controller.

An action and no filters beside ``copy``: a fleet's surveys are some hundred megabytes, and templating would copy all of
them for each file. An action reads them where Ansible keeps them. Nothing runs on a host.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import tempfile
import time
import typing as t

import yaml
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ansible_collections.iommufd.host.plugins.plugin_utils._audit_junit import to_junit
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_page import to_page
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import Report, build_report, to_json
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_table import summary_line, to_table

_COLLECTION = pathlib.Path(__file__).parents[2]
_NO_TIME = '"generated": ""'


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
            _version(),
        )
        findings = "".join(to_json({**report, "generated": ""}))
        files: dict[str, t.Iterable[str]] = {
            "report.json": [findings.replace(_NO_TIME, f'"generated": {json.dumps(report["generated"])}', 1)],
            "junit.xml": [to_junit(report)],
            "index.html": to_page(report),
        }
        try:
            before = _findings(os.path.join(directory, "report.json"))
            changed = before != findings or not all(os.path.exists(os.path.join(directory, name)) for name in files)
            if not self._task.check_mode:
                os.makedirs(directory, exist_ok=True)
                for name, pieces in files.items():
                    _write(os.path.join(directory, name), pieces)
        except OSError as error:
            # Ansible would show the cause once more, in its own words.
            raise AnsibleActionFail(f"path: {directory!r} cannot be written: {error.strerror}.") from None
        table = to_table(report, options["table_hosts"])
        if self._task.diff:
            result["diff"] = {"before": _old_table(before, options["table_hosts"]), "after": "\n".join(table) + "\n"}
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


def _version() -> str | None:
    """The version of this collection: installed, or in its checkout."""
    try:
        return str(json.loads((_COLLECTION / "MANIFEST.json").read_text("utf-8"))["collection_info"]["version"])
    except (OSError, ValueError, KeyError):
        pass
    try:
        return str(yaml.safe_load((_COLLECTION / "galaxy.yml").read_text("utf-8"))["version"])
    except (OSError, yaml.YAMLError, KeyError):
        return None


def _findings(path: str) -> str | None:
    """A report as it lies there, without its time; None where there is none.

    The time of every run differs. Only what was found decides whether a report changed.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return re.sub(r'^"generated": "[^"]*"', _NO_TIME, file.read(), count=1, flags=re.MULTILINE)
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        return ""


def _old_table(findings: str | None, limit: int) -> str:
    """The table of an earlier report; empty where that cannot be read."""
    try:
        old: Report = json.loads(findings or "")
        return "\n".join(to_table(old, limit)) + "\n"
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def _write(path: str, pieces: t.Iterable[str]) -> None:
    """Write a file whole or not at all, with the mode that the umask leaves."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            for piece in pieces:
                file.write(piece)
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
