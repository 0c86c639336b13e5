# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The adapter between the collection's core and Ansible, the only file of the core that imports Ansible.

A module is: an argument spec, its documentation, and a function that reads, plans and returns. :func:`run_module`
does the rest: errors become ``fail_json``, signals undo, plans are shown or applied.
"""

from __future__ import annotations

import signal
import types
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._lock import host_lock
from ansible_collections.iommufd.host.plugins.module_utils._outcome import Outcome

# The modules import it from here, beside what runs them.
__all__ = ["Outcome", "Task", "Work", "normalize", "open_location", "run_module", "run_task"]

# What ends a module; SIGINT is Ctrl-C at a controller that is the host itself.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

Work = t.Callable[[AnsibleModule], Outcome]
Task = t.Callable[[t.Mapping[str, t.Any], bool], Outcome]


def open_location(url: str, timeout: float) -> t.Any:
    """Open a URL for reading, as it is, by way of the proxies and certificates that Ansible uses.

    Raises:
        OSError: it cannot be had; most often a ``urllib.error.URLError``.
    """
    # Not above: few modules need it, and each would first read it and all that it brings along (http, email, ssl).
    from ansible.module_utils.urls import open_url

    return open_url(url, timeout=timeout, decompress=False)


def normalize(module: str, spec: dict[str, dict[str, t.Any]], options: dict[str, t.Any]) -> dict[str, t.Any]:
    """Options of a module that is called from within another one, checked and complete as Ansible would make them.

    Raises:
        HostError: they are not acceptable.
    """
    checked = ArgumentSpecValidator(spec).validate(options)
    if checked.error_messages:
        raise HostError(f"{module}: {'; '.join(checked.error_messages)}")
    found: dict[str, t.Any] = checked.validated_parameters
    return found


def run_module(module: AnsibleModule, work: Work, lock: bool = True) -> None:
    """Run a module's function and exit: the call does not return.

    Args:
        module: the Ansible module.
        work: reads the host and plans; must not change anything itself.
        lock: take the host's lock while planning and applying (never in check mode).
    """
    for number in _SIGNALS:
        signal.signal(number, _interrupted)
    try:
        if lock and not module.check_mode:
            with host_lock():
                result = _carry_out(module, work)
        else:
            result = _carry_out(module, work)
    except HostError as error:
        module.fail_json(msg=error.message, **error.details)
    module.exit_json(**result)


def run_task(module: AnsibleModule, task: Task, lock: bool = True) -> None:
    """Run what needs no more of a module than its options and whether this is check mode."""
    run_module(module, lambda running: task(running.params, running.check_mode), lock)


def _interrupted(number: int, frame: types.FrameType | None) -> t.NoReturn:
    # Once only, for what follows is the way back. At the end of a session systemd sends SIGTERM and SIGHUP at once
    # (SendSIGHUP= in systemd.kill(5)), and so does sudo. No SIG_IGN: the commands that take back would inherit it.
    for one in _SIGNALS:
        signal.signal(one, _noted)
    raise KeyboardInterrupt(f"signal {number}")


def _noted(number: int, frame: types.FrameType | None) -> None:
    """We are on our way out already."""


def _carry_out(module: AnsibleModule, work: Work) -> dict[str, t.Any]:
    outcome = work(module)
    result = dict(outcome.result)
    result["changed"] = False
    if outcome.plan is not None:
        result["changed"] = outcome.plan.changed
        result["plan"] = outcome.plan.summary()
        if module._diff:
            result["diff"] = outcome.plan.diff()
    if not module.check_mode:
        if outcome.plan is not None:
            outcome.plan.apply()
        if outcome.after is not None:
            result.update(outcome.after())
    for warning in outcome.warnings:
        module.warn(warning)
    return result
