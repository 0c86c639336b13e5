#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qemu_build
short_description: Build a QEMU with iommufd once, as one archive for any number of hosts
version_added: 0.2.0
author:
  - The iommufd.host authors (@iommufd)
description:
  - Builds QEMU from sources that are checked first, as an unprivileged user without network and within limits, and asks
    the finished binary whether it has iommufd. A binary that is not what was asked for is an error.
  - It finds out by what the tree decides about iommufd, Kconfig (QEMU 9.0 and later) or an option C(iommufd) of its
    C(configure) (trees with the first version of the patches), and uses that.
  - Everything that decides the result makes a key. The same key is never built twice on a builder, and two builds of
    the same key give the same archive to the last bit.
  - The build is a job of its own on the builder. While it runs, its phase, its steps and the time it still needs are
    shown, over ssh and from several builders at once. Where the connection or the controller is lost the job goes
    on, and the next run finds it again. A second run for the same key waits for the first one.
  - Packages that the build needs are installed and remembered in C(/etc/iommufd-host/packages). They stay for the next
    build; O(state=absent) purges them.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.changes
attributes:
  action:
    description: Has a corresponding action plugin, which shows the progress and fetches the archive.
    support: full
  check_mode:
    details:
      - In check mode nothing is fetched. A source that is not on the builder yet is then not known any closer.
options:
  state:
    description:
      - With V(present) there is an archive of the QEMU asked for.
      - With V(absent) everything that the module left on the builder is gone, the packages of the build included.
    type: str
    choices: [present, absent]
    default: present
  source:
    description:
      - Where the sources come from, exactly one of O(source.url), O(source.path), O(source.git) and O(source.package).
      - Required with O(state=present).
    type: dict
    suboptions:
      url:
        description:
          - URL of a release tarball, or of a Debian source package's C(.dsc) with its files beside it.
          - Needs O(source.checksum).
        type: str
      path:
        description: Path on the builder of a tarball, a C(.dsc), or a directory with a source tree.
        type: path
      checksum:
        description: SHA-256 of the tarball or C(.dsc).
        type: str
      signature:
        description: URL, or path on the builder, of a detached OpenPGP signature of the tarball.
        type: str
      keyring:
        description: Path on the builder of a keyring. The tarball or C(.dsc) must be signed by one of its keys.
        type: path
      git:
        description: URL, or path on the builder, of a git repository. Subprojects have to be part of the commit.
        type: str
      commit:
        description: The full id of the commit.
        type: str
      package:
        description: Name of a distribution source package, V(qemu) on Debian. apt checks its signatures.
        type: str
      version:
        description: Its version, such as V(1:10.0.2+ds-2).
        type: str
      suite:
        description: The suite to take it from, such as V(trixie). By default those that the builder's apt names.
        type: str
  iommufd:
    description:
      - V(enabled) fails before anything is compiled where the source has no iommufd, or the target or system cannot
        have it.
      - V(disabled) makes a QEMU without it.
      - V(auto) has it where the tree and the profile do.
    type: str
    choices: [auto, enabled, disabled]
    default: auto
  profile:
    description:
      - V(passthrough) is a small QEMU for guests with passed devices, KVM, VFIO, iommufd, virtio, and little else. It
        builds in a fraction of the time.
      - V(default) is what QEMU's C(configure) chooses by itself with the libraries that it finds.
      - V(distribution) is what the distribution's source package chooses. It needs such a source.
    type: str
    choices: [passthrough, default, distribution]
    default: passthrough
  targets:
    description: Architectures to emulate. With O(profile=passthrough), C(x86_64), C(aarch64) or C(s390x).
    type: list
    elements: str
    default: [x86_64]
  features:
    description: Features of QEMU's C(configure) to turn on or off beside the profile, such as C(slirp=true).
    type: dict
    default: {}
  devices:
    description: Devices by their Kconfig symbols to turn on or off beside the profile, such as C(PVPANIC_PCI=true).
    type: dict
    default: {}
  patches:
    description: Paths on the builder of patches to apply with C(patch -p1), in order.
    type: list
    elements: path
    default: []
  jobs:
    description: Commands to run side by side. By default as many as the builder has processors.
    type: int
  memory:
    description:
      - The most memory in MiB that the build may take. Where systemd runs, that is of the whole build, else of
        each of its processes.
      - By default three quarters of what the builder has.
    type: int
  directory:
    description:
      - The builder's directory for downloads, builds and finished archives.
      - With O(state=absent) other files in it stay.
    type: path
    default: /var/cache/iommufd-host/qemu
  keep:
    description: How many finished archives stay on the builder.
    type: int
    default: 3
  install_packages:
    description: Install what is missing for the build. With V(false), missing packages are an error that names them.
    type: bool
    default: true
  fetch:
    description: Directory on the controller that the finished archive is fetched to, as C(KEY.tar.xz).
    type: path
  wait:
    description:
      - Wait for the build to end. With V(false) the task ends once the build runs; RV(running) says whether it does.
    type: bool
    default: true
  progress:
    description: Seconds between two lines of progress; V(0) shows none.
    type: int
    default: 10
requirements:
  - Debian or a derivative on the builder, unless all that the build needs is installed there
seealso:
  - module: iommufd.host.qemu_install
"""

EXAMPLES = r"""
- name: Build Debian 13's QEMU for passthrough
  iommufd.host.qemu_build:
    source:
      package: qemu
      version: 1:10.0.13+ds-0+deb13u1
      suite: trixie
    iommufd: enabled
    fetch: ~/.cache/iommufd-host/qemu
  delegate_to: builder.example.com
  run_once: true
  register: build

- name: Have it on every host
  iommufd.host.qemu_install:
    src: "{{ build.local }}"

- name: A QEMU with user-mode network from a release tarball
  iommufd.host.qemu_build:
    source:
      url: https://download.qemu.org/qemu-10.0.13.tar.xz
      checksum: "{{ qemu_sha256 }}"
    features:
      slirp: true
"""

RETURN = r"""
key:
  description: Key of the build. Null in check mode where the source is not known yet.
  returned: success
  type: str
  sample: 3a8ad7b9efc5c7ac2a1d1f8a91e97f4b
running:
  description: Whether the build still runs, with O(wait=false).
  returned: success
  type: bool
  sample: false
artefact:
  description: Path of the finished archive on the builder. Null as long as there is none.
  returned: success
  type: str
  sample: /var/cache/iommufd-host/qemu/artefacts/3a8ad7b9efc5c7ac2a1d1f8a91e97f4b.tar.xz
checksum:
  description: SHA-256 of the archive.
  returned: success
  type: str
size:
  description: Size of the archive in bytes.
  returned: success
  type: int
  sample: 3211264
local:
  description: Path of the archive on the controller.
  returned: with O(fetch), when the build is finished
  type: str
version:
  description: QEMU's version, by its source.
  returned: success
  type: str
  sample: 10.0.13
summary:
  description: What the tree says that it was configured to.
  returned: success
  type: str
  sample: "iommufd support: YES"
binaries:
  description: What each finished binary says itself (C(-version), C(-object help), C(-device vfio-pci,help)).
  returned: success
  type: dict
  sample: {x86_64: {iommufd: true, passing: true, version: 10.0.13}}
packages_installed:
  description: Packages that were (in check mode, would be) installed for the build.
  returned: success
  type: list
  elements: str
  sample: [libglib2.0-dev, meson]
packages_purged:
  description: Packages that were (in check mode, would be) purged.
  returned: with O(state=absent)
  type: list
  elements: str
  sample: [meson]
packages_kept:
  description: Packages that came for a build and stay, with the reason.
  returned: with O(state=absent)
  type: dict
  sample: {libglib2.0-dev: libgtk-3-dev needs it}
log:
  description: The first real error, when the build failed; the path of the whole log is in the message.
  returned: when the build failed
  type: list
  elements: str
log_file:
  description: Path of the whole log on the builder.
  returned: success
  type: str
seconds:
  description: Seconds that each phase took.
  returned: when it was built by this task
  type: dict
  sample: {check: 0.4, compile: 171.2, configure: 20.1, install: 0.3, pack: 5.0, unpack: 12.1}
plan:
  description: The steps, in order.
  returned: success
  type: list
  elements: str
  sample: [build QEMU 10.0.13 as 3a8ad7b9efc5c7ac2a1d1f8a91e97f4b]
state_file:
  description: Path of the file in which the job writes how far it is.
  returned: while it runs
  type: str
lock_file:
  description: Path of the file that is locked as long as the job lives.
  returned: while it runs
  type: str
"""

import contextlib
import functools
import os
import platform
import shutil
import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import (
    _packages,
    _qemu_artefact,
    _qemu_build,
    _qemu_profile,
    _qemu_source,
)
from ansible_collections.iommufd.host.plugins.module_utils._ansible import Outcome, run_module
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._files import sha256
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import Action, Command, Plan, stays_removed
from ansible_collections.iommufd.host.plugins.module_utils._qemu_sandbox import Limits

ARGUMENT_SPEC: dict[str, dict[str, t.Any]] = {
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "source": {
        "type": "dict",
        "options": {
            "url": {"type": "str"},
            "path": {"type": "path"},
            "checksum": {"type": "str"},
            "signature": {"type": "str"},
            "keyring": {"type": "path", "no_log": False},
            "git": {"type": "str"},
            "commit": {"type": "str"},
            "package": {"type": "str"},
            "version": {"type": "str"},
            "suite": {"type": "str"},
        },
    },
    "iommufd": {"type": "str", "choices": ["auto", "enabled", "disabled"], "default": "auto"},
    "profile": {"type": "str", "choices": ["passthrough", "default", "distribution"], "default": "passthrough"},
    "targets": {"type": "list", "elements": "str", "default": ["x86_64"]},
    "features": {"type": "dict", "default": {}},
    "devices": {"type": "dict", "default": {}},
    "patches": {"type": "list", "elements": "path", "default": []},
    "jobs": {"type": "int"},
    "memory": {"type": "int"},
    "directory": {"type": "path", "default": "/var/cache/iommufd-host/qemu"},
    "keep": {"type": "int", "default": 3},
    "install_packages": {"type": "bool", "default": True},
    "fetch": {"type": "path"},
    "wait": {"type": "bool", "default": True},
    "progress": {"type": "int", "default": 10},
}


class _Work:
    """One call: what is wanted, and what is known of it so far."""

    def __init__(self, module: AnsibleModule) -> None:
        parameters = module.params
        self.host = Host()
        self.check_mode: bool = module.check_mode
        self.install_packages: bool = parameters["install_packages"]
        self.builder = _qemu_build.Builder(parameters["directory"].rstrip("/"))
        self.request = _qemu_profile.parse_request(parameters)
        self.source = _qemu_source.parse_source(parameters["source"])
        self.limits = _limits(self.host, parameters["jobs"], parameters["memory"])
        self.keep: int = parameters["keep"]
        if self.keep < 1:
            raise OptionError("keep", self.keep, "1 or more")
        self.packages: list[str] = []

    def plan(self) -> Outcome:
        """What has to be done for the archive to be there, or nothing."""
        _qemu_profile.require_possible(self.request, platform.system(), None)
        digest = _qemu_source.known_digest(self.source, self.builder.downloads)
        key = self._key(digest) if digest is not None else None
        if key is not None and os.path.exists(self.builder.artefact(key)):
            return Outcome(Plan(), self._finished(key))
        if key is not None and _qemu_build.is_running(self.builder, key):
            wait = Action(f"wait for the build of {key} that is under way")
            return Outcome(Plan([wait]), self._unfinished(key), after=lambda: self._unfinished(key))
        return self._plan_build(key)

    def _key(self, digest: str) -> str:
        return _qemu_artefact.key_of(_qemu_build.decides(self.host, self.request, digest))

    def _plan_build(self, key: str | None) -> Outcome:
        plan = Plan()
        result = self._unfinished(key)
        fetched = _qemu_source.present(self.source, self.builder.downloads)
        if fetched is None or self.source.keyring:
            if self.check_mode:
                what = f"fetch {self.source.describe()} and build QEMU from it"
                plan.add(Action(what, self.builder.artefact(key or "KEY"), "", f"{what}\n"))
                return Outcome(plan, result)
            # Before the plan: only the tree itself says what it needs, and whether it can have iommufd.
            self.builder.make()
            fetched = _qemu_source.fetch(self.source, self.builder.downloads)
        traits = _qemu_source.examine(fetched)
        _qemu_profile.require_possible(self.request, platform.system(), traits)
        result["version"] = traits.version
        self.packages = result["packages_installed"] = self._plan_packages(plan, fetched, traits)
        plan.add(
            Action(
                f"build QEMU {traits.version} from {self.source.describe()}",
                self.builder.artefact(key or "KEY"),
                "",
                f"QEMU {traits.version}, profile {self.request.profile}, iommufd {self.request.iommufd}\n",
                do=functools.partial(self._start, fetched, traits),
            )
        )
        return Outcome(plan, result, after=lambda: self._started(fetched, traits))

    def _plan_packages(self, plan: Plan, fetched: _qemu_source.Fetched, traits: _qemu_source.Traits) -> list[str]:
        if not self.host.exists("/var/lib/dpkg/status"):
            return []  # configure says what it misses
        names = _qemu_build.needed_packages(self.host, self.request, fetched, traits)
        if names and not self.install_packages:
            raise HostError(f"The build needs packages that are not installed: {', '.join(names)}", packages=names)
        if names:
            plan.add(
                _packages.InstallPackages(
                    f"install {', '.join(names)}",
                    "packages",
                    "",
                    "".join(f"{name}\n" for name in names),
                    names=names,
                    purpose=_qemu_build.PURPOSE,
                    refresh=not _packages.have_lists(self.host),
                )
            )
            # What only this source asks for is not known any more when it is to be purged. apt, for which everything
            # that is named is wanted for good, has to know that it is not.
            passing = [name for name in names if name.partition("=")[0] not in _qemu_profile.all_packages()]
            if passing:
                plan.add(
                    Command(
                        f"have apt take {len(passing)} of them for dependencies", argv=["apt-mark", "auto", *passing]
                    )
                )
        return names

    def _start(self, fetched: _qemu_source.Fetched, traits: _qemu_source.Traits) -> None:
        # The compiler may have come with the packages only now.
        decides = _qemu_build.decides(self.host, self.request, fetched.digest)
        key = _qemu_artefact.key_of(decides)
        if not os.path.exists(self.builder.artefact(key)):
            _qemu_build.start(
                _qemu_build.Job(
                    self.builder,
                    key,
                    decides,
                    self.request,
                    fetched,
                    self.source.describe(),
                    traits,
                    self.limits,
                    self.keep,
                )
            )

    def _started(self, fetched: _qemu_source.Fetched, traits: _qemu_source.Traits) -> dict[str, t.Any]:
        key = self._key(fetched.digest)
        if os.path.exists(self.builder.artefact(key)):
            return self._finished(key)
        return {**self._unfinished(key), "version": traits.version, "packages_installed": self.packages}

    # -- results ---------------------------------------------------------------------------------------------------

    def _unfinished(self, key: str | None) -> dict[str, t.Any]:
        return {
            "key": key,
            "running": key is not None and not self.check_mode,
            "artefact": None,
            "checksum": None,
            "size": None,
            "version": None,
            "summary": None,
            "binaries": {},
            "packages_installed": [],
            "log_file": self.builder.log(key) if key is not None else None,
            "state_file": self.builder.state_file(key) if key is not None else None,
            "lock_file": f"{self.builder.work(key)}/lock" if key is not None else None,
        }

    def _finished(self, key: str) -> dict[str, t.Any]:
        path = self.builder.artefact(key)
        manifest = _qemu_artefact.read_manifest(path)
        return {
            "key": key,
            "running": False,
            "artefact": path,
            "checksum": sha256(path),
            "size": os.path.getsize(path),
            "version": manifest["version"],
            "summary": manifest["summary"],
            "binaries": manifest["binaries"],
            "packages_installed": self.packages,
            "log_file": self.builder.artefact_log(key),
        }


def _limits(host: Host, jobs: int | None, memory: int | None) -> Limits:
    if jobs is not None and jobs < 1:
        raise OptionError("jobs", jobs, "1 or more")
    if memory is not None and memory < 512:
        raise OptionError("memory", memory, "512 MiB or more")
    total = next(
        (int(line.split()[1]) for line in (host.read_text("/proc/meminfo") or "").splitlines() if "MemTotal" in line),
        4 << 20,
    )
    return Limits(jobs or len(os.sched_getaffinity(0)), memory << 20 if memory else total * 768)


def _plan_absent(host: Host, builder: _qemu_build.Builder) -> Outcome:
    if builder.running():
        raise HostError(
            f"A build is under way on this builder ({', '.join(builder.running())}). Wait for it; nothing was removed"
        )
    plan = Plan()
    if any(host.exists(path) for path in builder.places):
        keys = "".join(f"{key}\n" for key in builder.finished())
        plan.add(
            Action(
                f"remove what lies in {builder.directory}",
                builder.directory,
                keys or "downloads\n",
                "",
                do=functools.partial(_remove, builder),
                take_back=stays_removed,
            )
        )
    removal = _packages.plan_removal(host, _qemu_build.PURPOSE, _qemu_profile.all_packages())
    if removal.forget:
        plan.add(
            _packages.PurgePackages(
                f"purge {', '.join(removal.purge) or 'no package'}",
                "packages",
                "".join(f"{name}\n" for name in removal.purge),
                "",
                names=removal.purge,
                purpose=_qemu_build.PURPOSE,
            )
        )
    result = {"key": None, "running": False, "packages_purged": removal.purge, "packages_kept": removal.keep}
    return Outcome(plan, result)


def _remove(builder: _qemu_build.Builder) -> None:
    for path in builder.places:
        if os.path.lexists(path):
            shutil.rmtree(path)
    parent = os.path.dirname(builder.directory)
    with contextlib.suppress(OSError):  # something of others', or something else of ours, lies there
        os.rmdir(builder.directory)
        if os.path.basename(parent) == "iommufd-host":  # made with it
            os.rmdir(parent)


def work(module: AnsibleModule) -> Outcome:
    directory = module.params["directory"].rstrip("/")
    if not directory.startswith("/") or directory.count("/") < 2:
        raise OptionError("directory", module.params["directory"], "an absolute path of at least two parts")
    if module.params["state"] == "absent":
        return _plan_absent(Host(), _qemu_build.Builder(directory))
    return _Work(module).plan()


def main() -> None:
    run_module(
        AnsibleModule(
            argument_spec=ARGUMENT_SPEC,
            supports_check_mode=True,
            required_if=[("state", "present", ["source"])],
        ),
        work,
    )


if __name__ == "__main__":
    main()
