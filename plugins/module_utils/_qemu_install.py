# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Builds of QEMU on a host: several side by side, one of them current.

The directory::

    versions/KEY/    an unpacked archive with its manifest
    current          link to the one in use; replaced in one step
    previous         link to the one before it

A guest that runs keeps its own: it was started from ``versions/KEY``, which stays as long as any process runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_apparmor, _qemu_artefact
from ansible_collections.iommufd.host.plugins.module_utils._elf import interpreter
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import Action, Plan, stays_removed
from ansible_collections.iommufd.host.plugins.module_utils._qemu import read_qemu

DIRECTORY = "/opt/iommufd-host/qemu"

KEY = re.compile(r"[0-9a-f]{32}")

Json = dict[str, t.Any]


@dataclasses.dataclass(frozen=True)
class Installed:
    """What is on a host.

    Attributes:
        directory: of all builds.
        keys: builds that are unpacked, by name.
        current: key of the one in use, or None.
        previous: key of the one before it, or None.
        rest: names of what an interrupted run left.
        users: processes by the key of the build that they run.
    """

    directory: str
    keys: tuple[str, ...]
    current: str | None
    previous: str | None
    rest: tuple[str, ...]
    users: t.Mapping[str, tuple[int, ...]]

    def place(self, key: str) -> str:
        return f"{self.directory}/versions/{key}"


def read_installed(host: Host, directory: str) -> Installed:
    """The builds on a host and who runs them."""
    names = host.listdir(f"{directory}/versions")
    links = {name: host.readlink(f"{directory}/{name}") or "" for name in ("current", "previous")}
    found = {name: target.rpartition("/")[2] for name, target in links.items()}
    keys = tuple(name for name in names if KEY.fullmatch(name))
    return Installed(
        directory=directory,
        keys=keys,
        current=found["current"] if found["current"] in keys else None,
        previous=found["previous"] if found["previous"] in keys else None,
        rest=tuple(name for name in names if re.fullmatch(r"\.[0-9a-f]{32}\.new(\.old)?", name)),
        users=_users(host, directory),
    )


def _users(host: Host, directory: str) -> dict[str, tuple[int, ...]]:
    versions = f"{host.realpath(directory) or directory}/versions/"
    found: dict[str, list[int]] = {}
    for name in host.listdir("/proc"):
        if name.isdigit():
            program = host.readlink(f"/proc/{name}/exe") or ""
            if program.startswith(versions):
                found.setdefault(program[len(versions) :].partition("/")[0], []).append(int(name))
    return {key: tuple(sorted(processes)) for key, processes in found.items()}


def read_manifest(host: Host, installed: Installed, key: str) -> Json | None:
    """The manifest of a build on the host; None where there is none that can be read."""
    text = host.read_text(f"{installed.place(key)}/{_qemu_artefact.MANIFEST}")
    try:
        return _qemu_artefact.check_manifest(installed.place(key), json.loads(text or "null"))
    except (HostError, ValueError):
        return None


def whole(host: Host, installed: Installed, key: str) -> bool:
    """Whether a build is there with every file as it was built."""
    manifest = read_manifest(host, installed, key) if key in installed.keys else None
    return manifest is not None and _qemu_artefact.verify(host.path(installed.place(key)), manifest) is None


# -- planning ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What shall be current.

    Attributes:
        key: of the build.
        archive: path of its archive on the host; empty where it need not be unpacked, or is not here yet.
        keep: how many builds stay beside the current one.
    """

    key: str
    archive: str = ""
    keep: int = 1


def plan_present(host: Host, installed: Installed, wanted: Wanted) -> Plan:
    """What makes a build the current one."""
    plan = Plan()
    _plan_rest(plan, installed)
    if not whole(host, installed, wanted.key):
        plan.add(
            Action(
                f"unpack QEMU {wanted.key} and check it",
                installed.place(wanted.key),
                "",
                f"QEMU {wanted.key}\n",
                do=functools.partial(_unpack, installed, wanted),
                take_back=functools.partial(_take_unpacked_back, installed, wanted.key),
            )
        )
    if installed.current != wanted.key:
        before = f"{installed.current}\n" if installed.current else ""
        plan.add(
            Action(
                f"make QEMU {wanted.key} the current one",
                f"{installed.directory}/current",
                before,
                f"{wanted.key}\n",
                do=functools.partial(_switch, installed, wanted.key),
                take_back=functools.partial(_switch_back, installed),
            )
        )
    _qemu_apparmor.plan_rules(host, plan, installed.directory)
    for key in to_prune(installed, wanted):
        plan.add(
            Action(
                f"remove QEMU {key}, which is an old one",
                installed.place(key),
                f"QEMU {key}\n",
                "",
                do=functools.partial(shutil.rmtree, installed.place(key)),
                take_back=stays_removed,
            )
        )
    return plan


def to_prune(installed: Installed, wanted: Wanted) -> list[str]:
    """Old builds that go: the oldest beyond the count, but none that a process runs, nor the one to roll back to."""
    previous = installed.previous if installed.current == wanted.key else installed.current
    others = [key for key in installed.keys if key not in (wanted.key, previous)]
    others.sort(key=lambda key: os.stat(installed.place(key)).st_mtime, reverse=True)
    room = max(0, wanted.keep - (1 if previous else 0))
    return sorted(key for key in others[room:] if key not in installed.users)


def _plan_rest(plan: Plan, installed: Installed) -> None:
    for name in installed.rest:
        path = f"{installed.directory}/versions/{name}"
        plan.add(Action(f"remove {path}, left by an interrupted run", do=functools.partial(shutil.rmtree, path)))


def plan_absent(host: Host, installed: Installed) -> Plan:
    """What takes every build away.

    Raises:
        Refusal: a process runs one.
    """
    if installed.users:
        named = ", ".join(str(process) for processes in installed.users.values() for process in processes)
        raise Refusal(
            f"QEMU beneath {installed.directory} is in use by process {named}. End those guests first; nothing was "
            "removed"
        )
    plan = Plan()
    _qemu_apparmor.plan_no_rules(host, plan)
    if host.exists(f"{installed.directory}/versions") or host.readlink(f"{installed.directory}/current"):
        plan.add(
            Action(
                f"remove {installed.directory}",
                installed.directory,
                "".join(f"{key}\n" for key in installed.keys),
                "",
                do=functools.partial(_remove_all, installed.directory),
                take_back=stays_removed,
            )
        )
    return plan


# -- steps -------------------------------------------------------------------------------------------------------------


def _unpack(installed: Installed, wanted: Wanted) -> None:
    """Unpack beside the others, and give it its name only once everything about it was found right."""
    if not wanted.archive:
        raise HostError(f"QEMU {wanted.key} is not on this host, and no archive was given (option src)")
    new = f"{installed.directory}/versions/.{wanted.key}.new"
    # Whatever the caller's umask is: users other than root start QEMU from here.
    for path in _parents(f"{installed.directory}/versions"):
        if not os.path.isdir(path):
            os.mkdir(path)
            os.chmod(path, 0o755)
    shutil.rmtree(new, ignore_errors=True)
    try:
        manifest = _qemu_artefact.unpack(wanted.archive, new)
        os.chmod(new, 0o755)
        if manifest["key"] != wanted.key:
            raise HostError(f"the archive holds QEMU {manifest['key']}, and {wanted.key} was asked for")
        check(new, manifest)
        os.sync()  # renamed only once it is on the disk
        if os.path.lexists(installed.place(wanted.key)):  # a damaged one
            os.rename(installed.place(wanted.key), f"{new}.old")
        os.rename(new, installed.place(wanted.key))
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(f"{new}.old", ignore_errors=True)


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:number]) for number in range(2, len(parts) + 1)]


def _take_unpacked_back(installed: Installed, key: str) -> None:
    if key not in installed.keys:
        shutil.rmtree(installed.place(key), ignore_errors=True)
        for path in (f"{installed.directory}/versions", installed.directory, os.path.dirname(installed.directory)):
            with contextlib.suppress(OSError):
                os.rmdir(path)


def check(place: str, manifest: Json) -> None:
    """See that a build runs on this host and is what its manifest says.

    Raises:
        HostError: it was made for another architecture, libraries are missing, or a binary says something else.
    """
    machine = manifest["decides"]["builder"]["machine"]
    if machine != os.uname().machine:
        raise HostError(f"it was built for {machine}, and this host is {os.uname().machine}")
    for target, said in sorted(manifest["binaries"].items()):
        binary = f"{place}/bin/qemu-system-{target}"
        lacking = missing_libraries(Host(), binary)
        if lacking:
            raise HostError(
                f"this host lacks what qemu-system-{target} needs to run: {', '.join(lacking)}. Install the packages "
                "that have them; a QEMU of the distribution needs most of them, too"
            )
        found = read_qemu(Host(), binary)
        if found.problem or found.version != said["version"] or found.iommufd != said["iommufd"]:
            what = found.problem or f"version {found.version}, iommufd {found.iommufd}"
            raise HostError(f"qemu-system-{target} answers otherwise here than on the builder: {what}")


def missing_libraries(host: Host, binary: str) -> list[str]:
    """What the dynamic loader misses for a binary: libraries, and versions of symbols in those that are there.

    The loader is only asked to list (ld.so(8), ``--list``); nothing of the binary runs.
    """
    with open(binary, "rb") as file:
        loader = interpreter(file)
    if loader is None:
        return []
    if not host.exists(loader):
        return [f"the loader {loader}"]
    answer = host.ask([loader, "--list", binary], 60)
    if answer is None:
        return [f"an answer of the loader {loader}"]
    text = answer.stdout + answer.stderr
    found = re.findall(r"^\s*(\S+) => not found", text, re.MULTILINE)
    found += re.findall(r"(\S+): cannot open shared object file", text)
    found += [f"{version} in {library}" for library, version in
              re.findall(r"(\S+): version [`']([^']+)' not found", text)]  # fmt: skip
    if not found and not answer.ok:
        found = [(text.strip().splitlines() or ["the loader said nothing"])[-1]]
    return list(dict.fromkeys(name.rstrip(":") for name in found))


def _switch(installed: Installed, key: str) -> None:
    if installed.current is not None and installed.current != key:
        _link(installed, "previous", installed.current)
    _link(installed, "current", key)


def _switch_back(installed: Installed) -> None:
    for name, key in (("current", installed.current), ("previous", installed.previous)):
        if key is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{installed.directory}/{name}")
        else:
            _link(installed, name, key)


def _link(installed: Installed, name: str, key: str) -> None:
    """Replace a link in one step."""
    temporary = f"{installed.directory}/.{name}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(f"versions/{key}", temporary)
    os.replace(temporary, f"{installed.directory}/{name}")


def _remove_all(directory: str) -> None:
    for name in ("current", "previous", ".current.new", ".previous.new"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{directory}/{name}")
    if os.path.lexists(f"{directory}/versions"):  # else somebody removed the builds by hand
        shutil.rmtree(f"{directory}/versions")
    for path in (directory, os.path.dirname(directory)):
        with contextlib.suppress(OSError):  # others of our files may lie there
            os.rmdir(path)
