# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: heartbeat
type: aggregate
short_description: Says what a long task is waiting for
version_added: 0.1.0
description:
  - Prints a line at regular intervals while a task runs, naming the hosts that are still at work and the seconds
    since they began. A build or a boot is no silent minute that way.
  - Works beside every stdout callback.
author:
  - The iommufd.host authors (@iommufd)
requirements:
  - enable it in configuration, V(callbacks_enabled=iommufd.host.heartbeat)
options:
  interval:
    description: Seconds between two lines.
    type: int
    default: 20
    env:
      - name: IOMMUFD_HEARTBEAT_INTERVAL
    ini:
      - section: callback_heartbeat
        key: interval
"""

EXAMPLES = r"""
# ansible.cfg
# [defaults]
# callbacks_enabled = iommufd.host.heartbeat
"""

import threading
import time
import typing as t

from ansible.plugins.callback import CallbackBase


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "iommufd.host.heartbeat"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args: t.Any, **kwargs: t.Any) -> None:
        super().__init__(*args, **kwargs)
        self._task = ""
        self._running: dict[str, float] = {}
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    # -- what runs -------------------------------------------------------------------------------------------------

    def v2_runner_on_start(self, host: t.Any, task: t.Any) -> None:
        with self._guard:
            self._task = task.get_name().strip()
            self._running[host.get_name()] = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    def _done(self, result: t.Any) -> None:
        with self._guard:
            self._running.pop(result.host.get_name(), None)

    def v2_runner_on_ok(self, result: t.Any) -> None:
        self._done(result)

    def v2_runner_on_failed(self, result: t.Any, ignore_errors: bool = False) -> None:
        self._done(result)

    def v2_runner_on_skipped(self, result: t.Any) -> None:
        self._done(result)

    def v2_runner_on_unreachable(self, result: t.Any) -> None:
        self._done(result)

    def v2_playbook_on_stats(self, stats: t.Any) -> None:
        self._ended.set()

    # -- the line --------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        interval = max(1, int(self.get_option("interval")))
        while not self._ended.wait(interval):
            line = self._line(interval)
            if line:
                self._display.display(line, color="bright gray")

    def _line(self, interval: int) -> str:
        now = time.monotonic()
        with self._guard:
            late = {host: now - since for host, since in self._running.items() if now - since >= interval * 0.9}
            task = self._task
        if not late:
            return ""
        names = ", ".join(sorted(late)[:5]) + (f" and {len(late) - 5} more" if len(late) > 5 else "")
        return f"  ... {max(late.values()):.0f} s: {task} ({names})"
