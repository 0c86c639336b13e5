# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A headless Chromium, spoken to over its DevTools protocol: https://chromedevtools.github.io/devtools-protocol/

Over a pair of pipes, so there is no port to collide and nothing to install beside the browser.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time
import types
import typing as t

_FLAGS = (
    "--headless",
    "--no-sandbox",  # tests run as root too; the page is our own, and has no network
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class BrowserError(Exception):
    """The browser ended, did not answer, or says that a command or a script failed."""


def _pipe() -> list[int]:
    """A pipe whose ends have two digits, so that neither is in the way of the browser's 3 and 4."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved


class Browser:
    """One page in a browser with a profile of its own; a context manager.

    Attributes:
        problems: console errors and warnings, exceptions and policy violations, since the last :meth:`open`.
        requests: addresses that the page asked for, its own included, since the last :meth:`open`.
    """

    def __init__(self, binary: str = "chromium", timeout: float = 120.0) -> None:
        self.timeout = timeout
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._answers: dict[int, dict[str, t.Any]] = {}
        self._events: list[str] = []
        self._count = 0
        self._session: str | None = None
        self._unread = b""
        self._profile = tempfile.mkdtemp(prefix="page-")
        theirs_in, self._out = _pipe()
        self._in, theirs_out = _pipe()
        flags = (*_FLAGS, f"--user-data-dir={self._profile}")
        # The browser reads its commands from descriptor 3 and answers on 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}', binary, *flags, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def __enter__(self) -> Browser:
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)
        shutil.rmtree(self._profile, ignore_errors=True)

    # -- the protocol ----------------------------------------------------------------------------------------------

    def send(self, method: str, **parameters: t.Any) -> dict[str, t.Any]:
        """Give a command and return its result."""
        self._count += 1
        number = self._count
        message: dict[str, t.Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        self._until(lambda: number in self._answers, method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        return t.cast("dict[str, t.Any]", answer["result"])

    def _until(self, done: t.Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.timeout
        while not done():
            ready, _w, _x = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise BrowserError(f"{what}: no answer within {self.timeout:.0f} s")
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise BrowserError(f"{what}: the browser ended")
            *whole, self._unread = (self._unread + piece).split(b"\0")
            for one in whole:
                self._take(json.loads(one))

    def _take(self, message: dict[str, t.Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        method, parameters = message["method"], message["params"]
        self._events.append(method)
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(one.get("value")) for one in parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    # -- what tests want -------------------------------------------------------------------------------------------

    def open(self, path: pathlib.Path, fragment: str = "") -> float:
        """Open a file, and return the seconds until it had loaded, was no longer busy, and had been painted."""
        self._load("about:blank")
        self.problems.clear()
        self.requests.clear()
        started = time.perf_counter()
        self._load(path.resolve().as_uri() + fragment)
        self.run(
            "new Promise(done => { const look = () => document.querySelector('main[aria-busy]')"
            " ? setTimeout(look, 5) : requestAnimationFrame(() => requestAnimationFrame(done)); look() })"
        )
        return time.perf_counter() - started

    def _load(self, url: str) -> None:
        self._events.clear()
        self.send("Page.navigate", url=url)
        self._until(lambda: "Page.loadEventFired" in self._events, f"loading {url}")

    def run(self, script: str) -> t.Any:
        """The value of an expression; a promise is awaited."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def type(self, text: str) -> None:
        """Type text into what has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key: its name ("Enter"), its virtual key code (13), and the text that it makes, if any."""
        common = {"key": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def scheme(self, name: str) -> None:
        """Prefer "light" or "dark"."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def size(self, width: int, height: int, scale: float = 1) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def screenshot(self, path: pathlib.Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
