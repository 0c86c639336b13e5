# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The controller's part of qemu_build: shows how far the build is, waits for it, and fetches the archive.

The build does not depend on it. Where this plugin or its connection dies, the job goes on, and the next run of the
task finds it again by its key.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
import typing as t

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ansible_collections.iommufd.host.plugins.module_utils._files import sha256

Result = dict[str, t.Any]

# Seconds between two looks at the job; each is one short command.
_INTERVAL = 2.0

# What flock ends with where somebody else has the lock, and so the job lives.
_HELD = 42

# A connection may break and come back during a build of many minutes.
_PATIENCE = 10

# What the call that began the build says about it; the last one finds the archive and nothing to do.
_DONE = ("changed", "plan", "diff", "packages_installed")

display = Display()


class ActionModule(ActionBase):
    _supports_check_mode = True
    _supports_async = False

    # Where the build is, by the name that the user knows: several builders may have one address.
    _builder = "the builder"

    def run(self, tmp: str | None = None, task_vars: Result | None = None) -> Result:
        result: Result = super().run(tmp, task_vars)
        return self.build(result, task_vars)

    def build(self, result: Result, task_vars: Result | None) -> Result:
        """Have the module begin the build, follow it to its end, and fetch what it made."""
        self._builder = str(self._task.delegate_to or (task_vars or {}).get("inventory_hostname") or self._builder)
        arguments = dict(self._task.args)
        answer = self._call(arguments, task_vars)
        if answer.get("running") and self._wanted(arguments.get("wait", True)) and not answer.get("failed"):
            interval = arguments.get("progress")
            failure, seconds = self._follow(answer, 10 if interval is None else int(interval))
            if failure is not None:
                return {**result, **answer, "running": False, "failed": True, **failure}
            done: Result = {name: answer[name] for name in _DONE if name in answer}
            answer = {**self._call(arguments, task_vars), **done, "seconds": seconds}
        if arguments.get("fetch") and answer.get("artefact") and not answer.get("failed"):
            answer.update(self._fetch(answer, str(arguments["fetch"])))
        return {**result, **answer}

    def _call(self, arguments: Result, task_vars: Result | None) -> Result:
        answer: Result = self._execute_module(
            module_name="iommufd.host.qemu_build", module_args=arguments, task_vars=task_vars
        )
        return answer

    @staticmethod
    def _wanted(value: object) -> bool:
        return str(value).lower() not in ("false", "no", "0", "off", "n", "f")

    # -- the job ---------------------------------------------------------------------------------------------------

    def _follow(self, answer: Result, interval: int) -> tuple[Result | None, Result]:
        """Show a job until it ends; what it failed with, or None, and the seconds that its phases took."""
        lock, state_file = shlex.quote(answer["lock_file"]), shlex.quote(answer["state_file"])
        look = f"date +%s; flock -n -E {_HELD} {lock} true; echo $?; cat {state_file}"
        shown, phase, misses = 0.0, "", 0
        while True:
            try:
                said = self._low_level_execute_command(look, sudoable=True)
            except AnsibleConnectionFailure:
                if misses == _PATIENCE:
                    raise  # the job goes on; the next run of the task finds it
                display.display(f"  ... {self._builder}: not reached, tried again", color="bright gray")
                said = {}
            alive, state = self._parse(str(said.get("stdout", "")))
            if state is None:
                misses += 1
                if misses > _PATIENCE:
                    return {"msg": f"The build's state {answer['state_file']} cannot be read any more"}, {}
            else:
                misses = 0
                if not alive or (state.get("finished") and not state.get("error")):
                    return self._ended(answer, state)
                if interval and (state["phase"] != phase or time.monotonic() - shown >= interval):
                    shown, phase = time.monotonic(), state["phase"]
                    display.display(f"  ... {self._builder}: {describe(state)}", color="bright gray")
            time.sleep(_INTERVAL)

    @staticmethod
    def _parse(text: str) -> tuple[bool, Result | None]:
        lines = text.strip().splitlines()
        try:
            state = json.loads(lines[-1])
            state["now"] = float(lines[-3])  # by the builder's clock, as are the times of the state
            return int(lines[-2]) == _HELD, state if "phase" in state else None
        except (IndexError, ValueError, TypeError):
            return False, None

    def _ended(self, answer: Result, state: Result) -> tuple[Result | None, Result]:
        seconds = state.get("seconds", {})
        if not state.get("finished"):
            return {
                "msg": (
                    f"The build of {answer['key']} was killed in phase {state['phase']}. Nothing was installed; the "
                    f"next run begins anew. Its log: {answer['log_file']}"
                ),
                "log": [],
            }, seconds
        if state.get("error"):
            message = (
                f"{state['error']['message'].rstrip('.')}. The whole log is {answer['log_file']} on {self._builder}"
            )
            return {"msg": message, "log": state["error"]["log"], "phase": state["phase"]}, seconds
        return None, seconds

    # -- the archive -----------------------------------------------------------------------------------------------

    def _fetch(self, answer: Result, directory: str) -> Result:
        """Have the archive on the controller; it is fetched only where it is not there already."""
        if not re.fullmatch(r"[0-9a-f]{32}", str(answer["key"])):  # it names a file here, and comes from the builder
            raise AnsibleError(f"{self._builder} answered with {answer['key']!r}, which is no key of a build")
        directory = os.path.abspath(os.path.expanduser(directory))
        path = os.path.join(directory, f"{answer['key']}.tar.xz")
        if os.path.exists(path) and sha256(path) == answer["checksum"]:
            return {"local": path}
        if self._task.check_mode:
            return {"local": path, "changed": True}
        os.makedirs(directory, exist_ok=True)
        partial = f"{path}.{os.getpid()}.part"
        try:
            self._connection.fetch_file(answer["artefact"], partial)
            if sha256(partial) != answer["checksum"]:
                raise AnsibleError(f"{answer['artefact']} did not come whole from {self._builder}")
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.unlink(partial)
        return {"local": path, "changed": True}


def describe(state: Result) -> str:
    """How far a job is, in words ("compile 312 of 1293 (24 %), 1:02, about 3:15 left")."""
    now = max(state["now"], state["updated"])
    text = str(state["phase"])
    done, total = state.get("done", 0), state.get("total", 0)
    if total:
        text += f" {done} of {total} ({100 * done // total} %)"
    text += f", {clock(now - state['started'])}"
    in_phase = now - state.get("since", state["started"])
    if done and total and in_phase > 5:
        text += f", about {clock(in_phase * (total - done) / done)} left"
    return text


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds ("3:05")."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
