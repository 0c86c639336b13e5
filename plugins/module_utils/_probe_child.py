# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The process that tries to open nodes as somebody else: run by :mod:`_probe`, from this file's source.

It is given to a Python of its own, inside another cgroup, and so imports nothing but the standard library. Each trial
is a fork that takes on user, groups and AppArmor profile for good, opens each node, closes it, and tells the kernel's
answer.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import typing as t

# linux/mman.h: count the pages as locked now, bring them into memory when they are touched, which nobody does here.
_MLOCK_ONFAULT = 1
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def run_trials(trials: t.Sequence[t.Mapping[str, t.Any]]) -> list[dict[str, t.Any]]:
    """Run each trial in a process of its own.

    Args:
        trials: dictionaries with ``uid``, ``gid``, ``groups``, ``profile`` (of AppArmor, or null), ``paths`` to open
            for reading and writing, and ``pin`` (bytes to lock, or null).

    Returns:
        For each trial ``opened`` (path -> errno, 0 for success), ``pinned`` (errno or null) and ``error``: what kept it
        from being made, or null.
    """
    return [_run(trial) for trial in trials]


def _run(trial: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(reader)
            answer = json.dumps(_attempt(trial))
            os.write(writer, answer.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read()
    os.waitpid(process, 0)
    found: dict[str, t.Any] = {"opened": {}, "pinned": None, "error": "the trial ended without an answer"}
    return {**found, **json.loads(text)} if text else found


def _attempt(trial: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    step = "become the user"
    try:
        os.setgroups(trial["groups"])
        os.setresgid(trial["gid"], trial["gid"], trial["gid"])
        os.setresuid(trial["uid"], trial["uid"], trial["uid"])
        if trial["profile"]:
            step = f"take on the AppArmor profile {trial['profile']}"
            _change_profile(trial["profile"])
        step = "try"
        opened = {path: _open(path) for path in trial["paths"]}
        return {"opened": opened, "pinned": _pin(trial["pin"]) if trial["pin"] else None, "error": None}
    except (OSError, ValueError) as error:
        return {"error": f"could not {step}: {error}"}


def _open(path: str) -> int:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY))
    except OSError as error:
        return error.errno or 0
    return 0


def _change_profile(name: str) -> None:
    """As libapparmor's aa_change_profile(2): this process alone, from now on."""
    for path in ("/proc/self/attr/apparmor/current", "/proc/self/attr/current"):
        if os.path.exists(path):
            with open(path, "w", encoding="ascii") as file:
                file.write(f"changeprofile {name}")
            return
    raise ValueError("the kernel has no AppArmor")


def _pin(size: int) -> int:
    """Have so many bytes counted against RLIMIT_MEMLOCK, without using any memory; returns errno, 0 for success."""
    libc = ctypes.CDLL(None, use_errno=True)
    area = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    first = ctypes.c_char.from_buffer(area)
    address = ctypes.addressof(first)
    status = libc.mlock2(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(_MLOCK_ONFAULT))
    number = ctypes.get_errno() if status else 0
    del first
    area.close()
    return number
