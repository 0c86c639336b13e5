#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qemu_install
short_description: Put a QEMU that qemu_build made on a host
version_added: 0.2.0
author:
  - The iommufd.host authors (@iommufd)
description:
  - Unpacks the archive beside the builds that are there, checks every file against the archive's manifest, sees that
    no library is missing and that the binaries say of themselves what they said on the builder, and only then makes
    it the current one, in one step.
  - The archive is sent only to hosts that do not have this build yet.
  - Guests that run keep the QEMU that they were started with. The build before stays for a way back, which O(key) is.
    Older ones go, but none that a process runs.
  - The current QEMU is C(/opt/iommufd-host/qemu/current/bin/qemu-system-x86_64), for libvirt's C(<emulator>) too.
    M(iommufd.host.guest_verify) and M(iommufd.host.iommufd_info) find it there. Where AppArmor confines libvirt, a rule
    in C(abstractions/libvirt-qemu.d) lets its guests run it, and one in C(local/usr.sbin.libvirtd) its daemon, which
    asks every emulator what it can do.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.changes
attributes:
  action:
    description: Has a corresponding action plugin, which sends the archive to the host.
    support: full
options:
  state:
    description:
      - V(present) makes the build of O(src) or O(key) the current one.
      - V(absent) removes every build. It is refused while a process runs one.
    type: str
    choices: [present, absent]
    default: present
  src:
    description:
      - Path of the archive on the controller, RV(iommufd.host.qemu_build#module:local).
      - O(src) or O(key) is required with O(state=present).
    type: path
  remote_src:
    description: The archive is on the host already.
    type: bool
    default: false
  key:
    description:
      - Key of a build that is on the host, to switch to it, as a rollback does to RV(previous).
      - With O(src), the archive must be of this build. In check mode it need not be on the controller yet then.
    type: str
  keep:
    description: How many builds stay beside the current one.
    type: int
    default: 1
requirements:
  - the libraries that the build was linked with, which a QEMU of the same distribution needs, too
seealso:
  - module: iommufd.host.qemu_build
"""

EXAMPLES = r"""
- name: Roll a build out
  iommufd.host.qemu_install:
    src: "{{ build.local }}"
  register: qemu

- name: Back to the build before
  iommufd.host.qemu_install:
    key: "{{ qemu.previous }}"

- name: As it was
  iommufd.host.qemu_install:
    state: absent
"""

RETURN = r"""
key:
  description: Key of the current build. Null with O(state=absent).
  returned: success
  type: str
  sample: 3a8ad7b9efc5c7ac2a1d1f8a91e97f4b
previous:
  description: Key of the build before it, which is still there, or null.
  returned: success
  type: str
installed:
  description: Keys of all builds on the host.
  returned: success
  type: list
  elements: str
emulators:
  description: Paths of the current QEMU by target. They stay the same when another build becomes current.
  returned: success
  type: dict
  sample: {x86_64: /opt/iommufd-host/qemu/current/bin/qemu-system-x86_64}
version:
  description: QEMU's version.
  returned: success
  type: str
  sample: 10.0.13
binaries:
  description: What the binaries say themselves.
  returned: success
  type: dict
  sample: {x86_64: {iommufd: true, passing: true, version: 10.0.13}}
in_use:
  description: Ids of the processes that run a build, by its key.
  returned: success
  type: dict
  sample: {}
needs_archive:
  description: Whether the archive has to be there to go on. The action plugin sends it then.
  returned: success
  type: bool
  sample: false
plan:
  description: The steps, in order.
  returned: success
  type: list
  elements: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_apparmor, _qemu_artefact, _qemu_install
from ansible_collections.iommufd.host.plugins.module_utils._ansible import Outcome, run_module
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan

ARGUMENT_SPEC: dict[str, dict[str, t.Any]] = {
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "src": {"type": "path"},
    "remote_src": {"type": "bool", "default": False},
    "key": {"type": "str", "no_log": False},
    "keep": {"type": "int", "default": 1},
}


def work(module: AnsibleModule) -> Outcome:
    host = Host()
    installed = _qemu_install.read_installed(host, _qemu_install.DIRECTORY)
    if module.params["state"] == "absent":
        plan = _qemu_install.plan_absent(host, installed)
        return Outcome(plan, _result(host, installed), after=lambda: _result(host))
    wanted = _wanted(module)
    plan = _qemu_install.plan_present(host, installed, wanted)
    here = _qemu_install.whole(host, installed, wanted.key)
    warnings = _qemu_apparmor.missing_rules(host, _qemu_install.DIRECTORY)
    if not here and not wanted.archive:
        # Nothing is done yet: the action plugin calls again, with the archive.
        outcome = Outcome(plan if module.check_mode else Plan(), _result(host, installed))
        outcome.result["needs_archive"] = True
        return outcome
    return Outcome(plan, _result(host, installed), after=lambda: _verified(host, wanted.key), warnings=warnings)


def _wanted(module: AnsibleModule) -> _qemu_install.Wanted:
    parameters = module.params
    if parameters["keep"] < 0:
        raise OptionError("keep", parameters["keep"], "0 or more")
    archive = parameters["src"] or ""
    if archive and not parameters["remote_src"]:
        raise OptionError("src", archive, "an archive on the host with remote_src: true, where no action plugin runs")
    key = parameters["key"] or _qemu_artefact.read_manifest(archive)["key"]
    if not _qemu_install.KEY.fullmatch(key):
        raise OptionError("key", key, "the key of a build, 32 hexadecimal digits")
    return _qemu_install.Wanted(key, archive, parameters["keep"])


def _verified(host: Host, key: str) -> dict[str, t.Any]:
    installed = _qemu_install.read_installed(host, _qemu_install.DIRECTORY)
    if installed.current != key:
        raise HostError(f"QEMU {key} is not the current one afterwards: {installed.current}")
    return _result(host, installed)


def _result(host: Host, installed: _qemu_install.Installed | None = None) -> dict[str, t.Any]:
    if installed is None:
        installed = _qemu_install.read_installed(host, _qemu_install.DIRECTORY)
    manifest = _qemu_install.read_manifest(host, installed, installed.current) if installed.current else None
    binaries: dict[str, t.Any] = manifest["binaries"] if manifest is not None else {}
    return {
        "key": installed.current,
        "previous": installed.previous,
        "installed": list(installed.keys),
        "emulators": {target: f"{installed.directory}/current/bin/qemu-system-{target}" for target in binaries},
        "version": manifest["version"] if manifest is not None else None,
        "binaries": binaries,
        "in_use": {key: list(processes) for key, processes in installed.users.items()},
        "needs_archive": False,
    }


def main() -> None:
    run_module(
        AnsibleModule(
            argument_spec=ARGUMENT_SPEC,
            supports_check_mode=True,
            required_if=[("state", "present", ["src", "key"], True)],
        ),
        work,
    )


if __name__ == "__main__":
    main()
