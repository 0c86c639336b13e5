# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The controller's part of qemu_install: sends the archive, and only to a host that says that it lacks it."""

from __future__ import annotations

import os
import typing as t

from ansible.errors import AnsibleActionFail
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._qemu_artefact import read_manifest

Result = dict[str, t.Any]


class ActionModule(ActionBase):
    TRANSFERS_FILES = True
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: Result | None = None) -> Result:
        result: Result = super().run(tmp, task_vars)
        return self.install(result, task_vars)

    def install(self, result: Result, task_vars: Result | None) -> Result:
        """Ask the host what it has, and send the archive only where it is lacking."""
        arguments = dict(self._task.args)
        source = arguments.get("src")
        given = boolean(arguments.get("remote_src", False), strict=False) or arguments.get("state") == "absent"
        if source is None or given:
            answer = self._call(arguments, task_vars)
            if answer.get("needs_archive"):
                answer.update(
                    failed=True, msg=f"QEMU {arguments.get('key')} is not on this host; name its archive (src)"
                )
            return {**result, **answer}
        if self._task.check_mode and arguments.get("key") and not os.path.exists(os.path.expanduser(str(source))):
            # The archive is only about to be fetched to here, and by its key the host can tell what it would do.
            return {**result, **self._call({**arguments, "src": None}, task_vars)}
        try:
            path = self._find_needle("files", str(source))
            key = read_manifest(path)["key"]
        except HostError as error:
            raise AnsibleActionFail(error.message) from error
        if arguments.get("key") not in (None, key):
            raise AnsibleActionFail(f"{path} holds QEMU {key}, and the key {arguments['key']} was asked for")
        arguments.update(src=None, key=key)
        answer = self._call(arguments, task_vars)
        if answer.get("needs_archive") and not self._task.check_mode and not answer.get("failed"):
            remote = self._connection._shell.join_path(self._connection._shell.tmpdir, "qemu.tar.xz")
            self._transfer_file(path, remote)
            self._fixup_perms2((self._connection._shell.tmpdir, remote))
            arguments.update(src=remote, remote_src=True)
            answer = self._call(arguments, task_vars)
            self._remove_tmp_path(self._connection._shell.tmpdir)
        return {**result, **answer}

    def _call(self, arguments: Result, task_vars: Result | None) -> Result:
        given = {name: value for name, value in arguments.items() if value is not None}
        answer: Result = self._execute_module(
            module_name="iommufd.host.qemu_install", module_args=given, task_vars=task_vars
        )
        return answer
