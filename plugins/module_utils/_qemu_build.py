# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Builds of QEMU on a builder: one job per key, apart from the module call that started it.

A job holds the lock of its directory from before it is started until its last process is gone. So a second call for
the same key sees that it runs and waits for it, a call after the connection broke finds it again, and a job that was
killed is seen to be dead and is begun anew.

The builder's directory::

    downloads/               sources as they were fetched
    artefacts/KEY.tar.xz     finished builds, and KEY.log
    work/KEY/                a build: lock, state.json, log, and while it runs source, build, stage
    ccache/                  where ccache is installed
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import re
import resource
import shutil
import signal
import sys
import time
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_artefact, _qemu_profile, _qemu_source
from ansible_collections.iommufd.host.plugins.module_utils._distribution import read_distribution
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._files import sha256
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._packages import missing, read_packages, simulate_build_dep
from ansible_collections.iommufd.host.plugins.module_utils._plan import reason, wait_until
from ansible_collections.iommufd.host.plugins.module_utils._qemu import Qemu, question
from ansible_collections.iommufd.host.plugins.module_utils._qemu_profile import Request
from ansible_collections.iommufd.host.plugins.module_utils._qemu_sandbox import (
    Limits,
    Sandbox,
    end_processes,
    make_sandbox,
)
from ansible_collections.iommufd.host.plugins.module_utils._qemu_source import Fetched, Traits

PHASES = ("unpack", "configure", "compile", "install", "check", "pack")

_LICENCES = ("COPYING", "COPYING.LIB", "LICENSE")

Json = dict[str, t.Any]


# -- the key -----------------------------------------------------------------------------------------------------------


def compiler(host: Host) -> str:
    """The C compiler by its first line ("gcc (Debian 14.2.0-19) 14.2.0"); empty where there is none."""
    answer = host.ask(["cc", "--version"])
    return answer.stdout.partition("\n")[0].strip() if answer is not None and answer.ok else ""


def decides(host: Host, request: Request, digest: str) -> Json:
    """Everything that decides the result of a build.

    Raises:
        HostError: a patch is not there.
    """
    distribution = read_distribution(host)
    patches = []
    for path in request.patches:
        try:
            patches.append(sha256(path))
        except OSError as error:
            raise HostError(f"the patch {path} cannot be read: {error.strerror}") from error
    must, may = _qemu_profile.firmware(request)
    return {
        "recipe": _qemu_profile.RECIPE,
        "format": _qemu_artefact.FORMAT,
        "source": digest,
        "patches": patches,
        "request": request.decides(),
        "compiler": compiler(host),
        "firmware": {name: sha256(path) for name in (*must, *may) if (path := find_firmware(host, name))},
        "builder": {
            "system": platform.system(),
            "machine": os.uname().machine,
            "distribution": distribution.id or "",
            "version": distribution.version_id or distribution.codename or "",
        },
    }


def find_firmware(host: Host, name: str) -> str:
    """Path of a firmware file of the distribution; empty where it is missing."""
    paths = [f"{directory}/{name}" for directory in _qemu_profile.FIRMWARE_PATH.split(":")]
    return next((path for path in paths if host.exists(path)), "")


# -- packages ----------------------------------------------------------------------------------------------------------

PURPOSE = "qemu_build"


def needed_packages(host: Host, request: Request, fetched: Fetched, traits: Traits) -> list[str]:
    """Debian's packages that a build needs and that are not installed, with a version where only one will do.

    Raises:
        HostError: apt has no meson that the tree accepts.
    """
    installed = read_packages(host)
    wanted = _qemu_profile.packages(request, traits)
    if fetched.dsc:
        wanted.append("dpkg-dev")
    if request.patches:
        wanted.append("patch")
    found = missing(installed, wanted)
    if traits.meson and not traits.wheels:
        meson = installed.get("meson")
        if meson is None or not meson.installed or not _at_least(host, meson.version, traits.meson):
            found.append(_versioned(host, "meson", traits.meson))
        if traits.pycotap:
            found += missing(installed, ["python3-pycotap"])
    if request.profile == "distribution" and fetched.dsc:
        bare = {name.partition("=")[0] for name in found}
        found += [name for name in simulate_build_dep(host, fetched.dsc).new if name not in bare]
    return found


def _at_least(host: Host, version: str, minimum: str) -> bool:
    answer = host.ask(["dpkg", "--compare-versions", version, "ge", minimum])
    return answer is not None and answer.ok


def _versioned(host: Host, package: str, minimum: str) -> str:
    """A package as apt is to be asked for it: by its name where the candidate is new enough, else with the oldest
    version that is (one of backports, which apt takes only when named)."""
    answer = host.ask(["apt-cache", "madison", package])
    versions = [line.split("|")[1].strip() for line in (answer.stdout if answer else "").splitlines() if "|" in line]
    if not versions:  # the lists were never fetched; the installation fetches them and asks again
        return package
    fitting = [version for version in versions if _at_least(host, version, minimum)]
    if not fitting:
        raise HostError(
            f"the source needs {package} {minimum} or later and brings none along; apt on the builder has "
            f"{', '.join(dict.fromkeys(versions))}. Backports of the distribution may have it, and QEMU's own release "
            "tarballs bring it along"
        )
    return f"{package}={fitting[-1]}"


# -- jobs --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Builder:
    """A builder's directory."""

    directory: str

    @property
    def downloads(self) -> str:
        return f"{self.directory}/downloads"

    def artefact(self, key: str) -> str:
        return f"{self.directory}/artefacts/{key}.tar.xz"

    def artefact_log(self, key: str) -> str:
        return f"{self.directory}/artefacts/{key}.log"

    def work(self, key: str) -> str:
        return f"{self.directory}/work/{key}"

    def state_file(self, key: str) -> str:
        return f"{self.work(key)}/state.json"

    def log(self, key: str) -> str:
        return f"{self.work(key)}/log"

    @property
    def places(self) -> list[str]:
        """All that builds make in the directory."""
        return [f"{self.directory}/{name}" for name in ("downloads", "artefacts", "work", "ccache")]

    def make(self) -> None:
        for path in (self.directory, self.downloads, f"{self.directory}/artefacts", f"{self.directory}/work"):
            os.makedirs(path, 0o755, exist_ok=True)

    def finished(self) -> list[str]:
        """Keys of finished builds, the latest first."""
        names = [name[: -len(".tar.xz")] for name in Host().listdir(f"{self.directory}/artefacts")
                 if re.fullmatch(r"[0-9a-f]{32}\.tar\.xz", name)]  # fmt: skip
        return sorted(names, key=lambda key: os.path.getmtime(self.artefact(key)), reverse=True)

    def running(self) -> list[str]:
        """Keys of builds under way."""
        return [key for key in Host().listdir(f"{self.directory}/work") if is_running(self, key)]


def read_state(builder: Builder, key: str) -> Json | None:
    """The state of a job as it last wrote it; None where there is none."""
    text = Host().read_text(builder.state_file(key))
    try:
        state = json.loads(text) if text else None
    except ValueError:
        return None
    return state if isinstance(state, dict) else None


def is_running(builder: Builder, key: str) -> bool:
    """Whether somebody holds the lock of a job."""
    try:
        descriptor = os.open(f"{builder.work(key)}/lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@dataclasses.dataclass(frozen=True)
class Job:
    """A build to be done.

    Attributes:
        builder: where.
        key: of the result.
        decides: what the key was made of.
        request: what is wanted.
        fetched: the source on the builder.
        source: the source for people.
        traits: of the tree.
        limits: what the build may take.
        keep: how many finished builds stay.
    """

    builder: Builder
    key: str
    decides: t.Mapping[str, t.Any]
    request: Request
    fetched: Fetched
    source: str
    traits: Traits
    limits: Limits
    keep: int


def start(job: Job) -> bool:
    """Start a build that goes on when this process ends; nothing happens where it runs already.

    Returns:
        Whether it was started here.

    Raises:
        HostError: processes of an earlier build of the same key do not end.
    """
    work = job.builder.work(job.key)
    job.builder.make()
    os.makedirs(work, 0o755, exist_ok=True)
    descriptor = os.open(f"{work}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def taken() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    if not wait_until(taken, 0.5):  # longer than somebody who only looks holds it
        os.close(descriptor)
        return False
    try:
        _clear(job.builder, job.key)
        _write_state(job, _begun())
        sys.stdout.flush()
        sys.stderr.flush()
        if os.fork() == 0:
            _detach(job, descriptor)
    finally:
        os.close(descriptor)  # the job has the lock by its own copy
    return True


def _detach(job: Job, lock: int) -> t.NoReturn:
    """The job's process: apart from its parent in every respect, and it never returns into the parent's code."""
    status = 1
    try:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        output = os.open(job.builder.log(job.key), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # Whatever else the parent had open (pipes of a connection, above all) would keep the caller waiting.
        keep = {0, 1, 2, lock}
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in keep:
                with contextlib.suppress(OSError):
                    os.close(int(name))
        status = 0 if carry_out(job) else 1
    finally:
        os._exit(status)


def _stop(number: int, frame: object) -> t.NoReturn:
    raise KeyboardInterrupt(f"signal {number}")


def _clear(builder: Builder, key: str) -> None:
    """Take away what an earlier job left that was killed, its processes first."""
    state = read_state(builder, key)
    if state is not None and isinstance(state.get("uid"), int):
        # Not whatever runs by that number: since then systemd may have given it to a service (DynamicUser=).
        end_processes(state["uid"], builder.work(key))
    for name in Host().listdir(builder.work(key)):
        if name != "lock":
            _remove(f"{builder.work(key)}/{name}")


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _write_state(job: Job, state: t.Mapping[str, t.Any]) -> None:
    path = job.builder.state_file(job.key)
    text = json.dumps({**state, "key": job.key, "pid": os.getpid(), "updated": time.time()})
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(text + "\n")
        os.fchmod(file.fileno(), 0o644)
    os.replace(f"{path}.new", path)


def _begun() -> Json:
    return {"phase": "start", "started": time.time(), "finished": False, "error": None, "seconds": {}}


class _Failed(HostError):
    """A command of the build failed; ``details`` has ``log``."""


def carry_out(job: Job) -> bool:
    """Do all phases of a build, with the state written beside; True where the artefact is there in the end."""
    try:
        run = _Run(job)
    except HostError as error:
        _write_state(job, {**_begun(), "finished": True, "error": {"message": error.message, "log": []}})
        return False
    try:
        run.build()
        run.state.update(finished=True, error=None)
        run.save()  # the archive is there; nobody needs to wait until its trees are removed
    except BaseException as error:
        message = reason(error) if not isinstance(error, KeyboardInterrupt) else f"it was ended by a {error}"
        if isinstance(error, OSError):
            message = f"phase {run.state['phase']} failed in {run.work}: {message}"
        details = error.details if isinstance(error, HostError) else {}
        run.log(f"*** {message}")
        run.state.update(finished=True, error={"message": message, "log": details.get("log") or run.lines[-5:]})
    finally:
        with contextlib.suppress(Exception):
            end_processes(run.sandbox.uid)
        for name in ("source", "build", "stage", "home", "tmp", "parts"):
            with contextlib.suppress(OSError):
                _remove(f"{job.builder.work(job.key)}/{name}")
        # Full disk or not: what was removed above makes room for these few bytes.
        with contextlib.suppress(OSError):
            run.save()
    return run.state["error"] is None


class _Run:
    """One build, phase by phase."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.work = job.builder.work(job.key)
        self.source = f"{self.work}/source"
        self.tree = f"{self.work}/build"
        self.stage = f"{self.work}/stage"
        self.lines: list[str] = []
        self.state: Json = _begun()
        self._saved = 0.0
        self.sandbox = self._make_sandbox()
        self.state["uid"] = self.sandbox.uid

    def _make_sandbox(self) -> Sandbox:
        environment = {
            "SOURCE_DATE_EPOCH": str(self.job.traits.date),
            "NINJA_STATUS": "[%f/%t] ",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if Host().which("ccache") is not None:
            environment.update(
                CCACHE_DIR=f"{self.job.builder.directory}/ccache", CCACHE_BASEDIR=self.work, CCACHE_NOHASHDIR="1"
            )
        return make_sandbox(Host(), self.work, self.job.limits, environment)

    # -- words -----------------------------------------------------------------------------------------------------

    def log(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk is reported by what it makes fail
            os.write(1, f"{line}\n".encode())
        self.lines.append(line)
        if len(self.lines) > 4000:
            del self.lines[:2000]

    def save(self) -> None:
        self._saved = time.monotonic()
        # Of the commands that have ended; what else the machine has to do does not change it.
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.state["processor"] = round(used.ru_utime + used.ru_stime, 2)
        _write_state(self.job, self.state)

    def phase(self, name: str) -> None:
        now = time.time()
        if self.state["phase"] in PHASES:
            self.state["seconds"][self.state["phase"]] = round(now - self.state["since"], 1)
        self.state.update(phase=name, since=now, done=0, total=0)
        self.lines = []
        self.log(f"=== {name}")
        self.save()

    def _line(self, line: str) -> None:
        self.log(line)
        steps = _qemu_profile.progress(line)
        if steps is not None:
            self.state["done"], self.state["total"] = steps
            if time.monotonic() - self._saved >= 0.5:
                self.save()

    def command(self, what: str, argv: t.Sequence[str], cwd: str) -> None:
        """Run one command of the build in the sandbox.

        Raises:
            _Failed: it failed; the message has the first real error.
        """
        self.log(f"$ {' '.join(argv)}")
        status = self.sandbox.run(argv, cwd, self._line)
        if status != 0:
            lines = [line.replace(f"{self.source}/", "") for line in self.lines]
            telling = _qemu_profile.first_error(lines)
            how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
            raise _Failed(f"{what} {how}: {telling[0].strip() if telling else 'it said nothing'}", log=telling)

    # -- phases ----------------------------------------------------------------------------------------------------

    def build(self) -> None:
        # In the log alone: the archive of the same source is the same, whichever way that came.
        self.log(f"QEMU {self.job.traits.version} from {self.job.source}")
        self._prepare()
        self.phase("unpack")
        self._unpack()
        self.phase("configure")
        summary = self._configure()
        self.phase("compile")
        self._compile()
        self.phase("install")
        self._install()
        self.phase("check")
        binaries = self._check(summary)
        self.phase("pack")
        self._pack(summary, binaries)
        self.phase("clean up")

    def _prepare(self) -> None:
        uid = self.sandbox.uid
        for name in ("home", "tmp", "build", "stage"):
            path = f"{self.work}/{name}"
            os.mkdir(path, 0o700)
            os.chown(path, uid, uid)
        cache = self.sandbox.environment.get("CCACHE_DIR")
        if cache:
            os.makedirs(cache, 0o755, exist_ok=True)
            # By descriptors: the build that had the cache before may still run, and put a link in place of a directory.
            for _directory, directories, files, descriptor in os.fwalk(cache):
                for name in [".", *directories, *files]:
                    with contextlib.suppress(FileNotFoundError):  # that build cleans up in it
                        os.chown(name, uid, uid, dir_fd=descriptor, follow_symlinks=False)
        if self.sandbox.network:
            self.log("This machine does not let a build be kept off the network.")

    def _unpack(self) -> None:
        fetched, uid = self.job.fetched, self.sandbox.uid
        if fetched.tree:
            _qemu_source.copy_tree(fetched.tree, self.source, uid)
        elif fetched.dsc:
            # The build's user reads copies: the originals may lie where it has no business.
            parts = f"{self.work}/parts"
            os.mkdir(parts, 0o755)
            for path in [fetched.dsc, *_qemu_source.dsc_files(fetched.dsc)]:
                shutil.copyfile(path, f"{parts}/{os.path.basename(path)}")
                os.chmod(f"{parts}/{os.path.basename(path)}", 0o644)
            dsc = f"{parts}/{os.path.basename(fetched.dsc)}"
            os.mkdir(f"{self.work}/tmp/unpack", 0o755)
            os.chown(f"{self.work}/tmp/unpack", uid, uid)
            unpacked = f"{self.work}/tmp/unpack/source"
            self.command(
                "unpacking the source package", ["dpkg-source", "--no-check", "-x", dsc, unpacked], f"{self.work}/tmp"
            )
            os.rename(unpacked, self.source)
        else:
            _qemu_source.unpack(fetched.tarballs[0], self.source, uid)
        for path in self.job.request.patches:
            copy = f"{self.work}/tmp/{os.path.basename(path)}"
            shutil.copyfile(path, copy)
            os.chmod(copy, 0o644)
            self.command(f"patch {path}", ["patch", "-p1", "--forward", "--fuzz=0", "--input", copy], self.source)
        for name, content in _qemu_profile.device_files(self.job.request, self.job.traits).items():
            self._require_directory(name)
            with open(f"{self.source}/{name}", "x", encoding="utf-8") as file:
                file.write(content)
            os.chmod(f"{self.source}/{name}", 0o644)
        stubs = _qemu_profile.missing_stubs(self.job.request, lambda name: _read_inside(f"{self.source}/{name}"))
        for name, content in stubs.items():
            self._require_directory(name)
            self.log(f"{name} lacks what a QEMU with few devices needs to link; it is added")
            with open(f"{self.source}/{name}", "a", encoding="utf-8") as file:
                file.write(content)

    def _require_directory(self, name: str) -> None:
        """A file of the tree may be written by root only where the tree has no link on its way."""
        path = f"{self.source}/{name}"
        if os.path.realpath(os.path.dirname(path)) != os.path.dirname(os.path.realpath(self.source) + "/" + name):
            raise HostError(f"the source has no directory {os.path.dirname(name)}, as every QEMU since 5.0 has")

    def _configure(self) -> Json:
        request, traits = self.job.request, self.job.traits
        arguments = _qemu_profile.configure_arguments(request, traits, os.uname().machine)
        if request.profile == "distribution":
            arguments += self._distribution_arguments()
        # Nothing of the place of a build stays in its result. Meson, and ccache for what is beneath its base directory,
        # name files relative to the build's tree: the same file is to have one name, whoever compiles it.
        relative = os.path.relpath(self.source, self.tree)
        places = (self.work, self.source, relative)
        flags = " ".join(f"-ffile-prefix-map={place}=." for place in places)
        arguments += ["--python=/usr/bin/python3", f"--extra-cflags={flags}"]
        if "CCACHE_DIR" in self.sandbox.environment:
            arguments.append("--cc=ccache cc")
        self.command("configure", [f"{self.source}/configure", *arguments], self.tree)
        settings = {}
        for target in request.targets:
            path = f"{self.tree}/{target}-softmmu-config-devices.mak"
            settings[target] = _read_inside(path)
        summary = _qemu_profile.summary("\n".join(self.lines), settings)
        self.log(summary["text"])
        wanted = _qemu_profile.wants_iommufd(request, traits)
        different = [target for target, has in summary["targets"].items() if wanted is not None and has != wanted]
        if different:
            raise HostError(
                f"iommufd: {request.iommufd} was asked for, and configure says {summary['text']!r} "
                f"(targets {', '.join(different)}). Nothing was compiled"
            )
        return summary

    def _distribution_arguments(self) -> list[str]:
        """What Debian's source package names for this architecture in the comments of debian/control."""
        script = f"{self.source}/debian/extract-config-opts"
        if not os.path.exists(script):
            raise HostError("profile distribution needs the distribution's source package: there is no debian/ in it")
        machine = Host().ask(["dpkg", "--print-architecture"])
        name = f"linux-{machine.stdout.strip()}" if machine is not None else ""
        answer = self.sandbox.ask(["sh", script, name, f"{self.source}/debian/control"], 60)
        named = _qemu_profile.distribution_arguments(answer.stdout if answer is not None else "", self.job.request)
        if answer is None or not answer.ok or not named:
            raise HostError("the source package's debian/control names no features of its own")
        return named

    def _compile(self) -> None:
        # A small QEMU's other programs and its tests would take a third of the time.
        small = self.job.request.profile == "passthrough"
        targets = [f"qemu-system-{target}" for target in self.job.request.targets] if small else []
        self.command("the build", ["ninja", "-j", str(self.job.limits.jobs), *targets], self.tree)

    def _install(self) -> None:
        root = f"{self.stage}{_qemu_profile.PREFIX}"
        if self.job.request.profile == "passthrough":
            for target in self.job.request.targets:
                binary = f"qemu-system-{target}"
                argv = ["install", "-D", "-s", "-m", "0755", f"{self.tree}/{binary}", f"{root}/bin/{binary}"]
                self.command("the installation", argv, self.tree)
        else:
            self.sandbox = dataclasses.replace(
                self.sandbox, environment={**self.sandbox.environment, "DESTDIR": self.stage}
            )
            self.command("the installation", ["ninja", "install"], self.tree)

    def _check(self, summary: Json) -> Json:
        """Ask the binaries themselves."""
        found: Json = {}
        wanted = _qemu_profile.wants_iommufd(self.job.request, self.job.traits)
        for target in self.job.request.targets:
            path = f"{self.stage}{_qemu_profile.PREFIX}/bin/qemu-system-{target}"
            if not os.path.isfile(path) or os.path.islink(path):
                raise HostError(f"the build made no qemu-system-{target}")
            answer = question(Qemu(path, path), lambda argv: self.sandbox.ask(argv, 60))
            if answer.problem or not answer.version:
                raise HostError(f"qemu-system-{target} does not run: {answer.problem}")
            found[target] = {"version": answer.version, "iommufd": answer.iommufd, "passing": answer.passing}
            self.log(f"qemu-system-{target} {answer.version}: iommufd {'yes' if answer.iommufd else 'no'}")
            if answer.iommufd != summary["targets"][target] or (wanted is not None and answer.iommufd != wanted):
                raise HostError(
                    f"iommufd: {self.job.request.iommufd} was asked for, configure says {summary['text']!r}, and "
                    f"qemu-system-{target} says that it {'has' if answer.iommufd else 'does not have'} it "
                    "(-object help, -device vfio-pci,help). Nothing was installed"
                )
        return found

    def _pack(self, summary: Json, binaries: Json) -> None:
        end_processes(self.sandbox.uid)  # from here on nobody else writes in the tree
        root = f"{self.stage}{_qemu_profile.PREFIX}"
        _require_no_link(self.stage, root)
        self._add_firmware(root)
        licences = self._add_licences(root)
        manifest = {
            "format": _qemu_artefact.FORMAT,
            "key": self.job.key,
            "decides": dict(self.job.decides),
            "version": self.job.traits.version,
            "summary": summary["text"],
            "binaries": binaries,
            "libraries": _libraries(self.sandbox, root, list(binaries)),
            "licences": licences,
            "files": _qemu_artefact.list_files(root),
        }
        _qemu_artefact.pack(root, manifest, self.job.builder.artefact(self.job.key), self.job.traits.date)
        with contextlib.suppress(OSError):
            shutil.copyfile(self.job.builder.log(self.job.key), self.job.builder.artefact_log(self.job.key))
        for key in self.job.builder.finished()[self.job.keep :]:
            for path in (self.job.builder.artefact(key), self.job.builder.artefact_log(key)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def _add_firmware(self, root: str) -> None:
        must, may = _qemu_profile.firmware(self.job.request)
        for name in (*must, *may):
            inside = f"{self.source}/pc-bios/{name}"
            own = (
                os.path.isfile(inside) and os.path.realpath(inside) == f"{os.path.realpath(self.source)}/pc-bios/{name}"
            )
            path = inside if own else find_firmware(Host(), name)
            if path:
                _add(path, root, f"share/qemu/{name}")
            elif name in must:
                raise HostError(
                    f"the firmware {name} is neither in the source nor in {_qemu_profile.FIRMWARE_PATH} on the builder"
                )

    def _add_licences(self, root: str) -> list[str]:
        found = []
        for name in _LICENCES:
            path = f"{self.source}/{name}"
            if os.path.isfile(path) and not os.path.islink(path):
                _add(path, root, f"share/doc/qemu/{name}")
                found.append(f"share/doc/qemu/{name}")
        return found


def _require_no_link(top: str, path: str) -> None:
    """What a build installed belongs to its user, who may have put a link where root is about to read and write."""
    if os.path.realpath(path) != os.path.realpath(top) + path[len(top) :]:
        raise HostError(f"the build installed a link on the way to {path}")


def _add(source: str, root: str, name: str) -> None:
    """Add a file to what a build installed; a file or link of that name is replaced, not written to."""
    path = f"{root}/{name}"
    _require_no_link(root, os.path.dirname(path))
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    shutil.copyfile(source, path)
    os.chmod(path, 0o644)


def _read_inside(path: str) -> str:
    """A file that the build wrote; never what a link of it names. Empty where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return ""
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
        return file.read(1 << 20)


def _libraries(sandbox: Sandbox, root: str, targets: t.Sequence[str]) -> dict[str, list[str]]:
    """The shared libraries that each binary names, by target."""
    found: dict[str, list[str]] = {}
    for target in targets:
        answer = sandbox.ask(["objdump", "-p", f"{root}/bin/qemu-system-{target}"], 120)
        text = answer.stdout if answer is not None else ""
        found[target] = sorted(re.findall(r"^\s*NEEDED\s+(\S+)$", text, re.MULTILINE))
    return found
