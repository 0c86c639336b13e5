# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The collection with modules that only write down how they were called, for tests of roles and playbooks.

Roles, playbooks and filters are the real ones. Each host of such a run is a directory, which is its remote_tmp too:
that is how a module knows on which host it runs. ``state.json`` there says what modules answer (``answers``) and where
they fail (``fail``), ``calls.jsonl`` has the calls.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._survey import pack

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]

# What a play registers and looks at. A test puts what it is about in place of these.
ANSWERS: dict[str, t.Any] = {
    "access_probe": {"ok": True},
    "apparmor_access": {},
    "cgroup_acl": {"effective": None, "libvirt_version": None, "passes_descriptors": None},
    "guest_verify": {
        "verified": True,
        "evidence": {
            "launcher": "direct",
            "backend": "iommufd",
            "descriptors": {"iommu": 1},
            "seconds": {"total": 9.5},
            "devices": [{"address": "0000:01:00.0"}],
            "qemu": {"version": "10.0.13"},
            "accelerator": "kvm",
            "process": {"user": "nobody"},
            "kernel": "6.12.117",
        },
    },
    "host_plan": {},
    "host_record": {},
    "host_snapshot": {"differences": [], "data": {}, "touched": [], "earlier": False},
    "iommufd_dkms": {"reboot_reasons": []},
    "iommufd_info": {"checks": []},
    "kernel_args": {"reboot_reasons": [], "reboot_required": False},
    "kernel_modules": {},
    "memlock_limits": {},
    "qemu_build": {"artefact": None, "local": ""},
    "qemu_install": {"emulators": {}},
    "sriov_vfs": {"pfs": []},
    "udev_access": {},
    "vfio_bind": {"devices": []},
}


def plan_answer(
    first: str | None = None, recorded: bool = True, needed: bool = True, **more: t.Any
) -> dict[str, t.Any]:
    """What host_plan answers on a host on which this role is the first with something to do; None: it has converged."""
    roles = ["kernel", "devices", "access"]
    changed = roles[roles.index(first) :] if first else []
    parts: dict[str, t.Any] = {
        role: {"changed": role in changed, "plan": [f"do {role}"] * (role in changed)} for role in roles
    }
    parts["kernel"].update(reboot_required=False, reboot_reasons=[])
    device = {"address": "0000:01:00.0", "from_driver": "nvme" if changed else "vfio-pci", "to_driver": "vfio-pci"}
    parts["access"].update(decision={"mode": "launcher", "reason": "so"}, probed=False)
    parts["verify"] = {"changed": False, "plan": [], "needed": needed, "reason": "as before", "would": None}
    wanted = {"kernel": {}, "qemu": {}, "devices": {"list": ["0000:01:00.0"], "vfs": []}, "access": {}, "verify": {}}
    there = dict.fromkeys(("kernel", "qemu", "devices", "access"), ["args"] if first is None else [])
    return {
        "converged": first is None,
        "recorded": recorded,
        "devices": [device],
        "roles": parts,
        "planned": list(wanted),
        "wanted": wanted,
        "back": {"there": there, "applied": None, "qemu": None, "unfinished": False},
        "survey": pack({"checks": [{"id": "kernel.iommufd", "status": "fail" if changed else "ok"}]}),
        **more,
    }


_MODULE = """#!/usr/bin/python
# WANT_JSON
import json, os, sys, time
with open(sys.argv[1]) as file:
    arguments = json.load(file)
options = {key: value for key, value in arguments.items() if not key.startswith("_ansible_")}
here = os.path.abspath(__file__).split("/ansible-tmp-")[0]
check = arguments.get("_ansible_check_mode", False)
with open(here + "/calls.jsonl", "a") as file:
    file.write(json.dumps({"module": NAME, "options": options, "check": check}) + "\\n")
with open(here + "/state.json") as file:
    state = json.load(file)
time.sleep(state.get("slow", 0))
answer = {"changed": False, **ANSWER, **state.get("answers", {}).get(NAME, {})}
# As with a real host: what was asked for is there at the end of a run.
if NAME == "host_plan" and state.get("provisioned"):
    answer.update(state["provisioned"])
if NAME == "host_plan" and "roles" in answer:
    answer["planned"] = options.get("roles", answer["planned"])
    answer["roles"] = {role: part for role, part in answer["roles"].items() if role in answer["planned"]}
if NAME in state.get("fail", {}) and not (check and NAME != "host_plan"):
    answer = {"failed": True, "msg": state["fail"][NAME], "changed": False}
elif NAME == "host_record" and options.get("wanted") and not check and "after" in state:
    state["provisioned"] = state["after"]
    with open(here + "/state.json", "w") as file:
        json.dump(state, file)
print(json.dumps(answer))
"""


class Fleet:
    """Hosts of a run.

    Args:
        root: an empty directory.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        collection = root / "collections/ansible_collections/iommufd/host"
        modules = collection / "plugins/modules"
        modules.mkdir(parents=True)
        for name in ("roles", "playbooks", "meta", "galaxy.yml"):
            (collection / name).symlink_to(CHECKOUT / name)
        for name in ("filter", "module_utils", "plugin_utils", "doc_fragments"):
            (collection / "plugins" / name).symlink_to(CHECKOUT / "plugins" / name)
        for name, answer in ANSWERS.items():
            text = _MODULE.replace("NAME", repr(name)).replace("ANSWER", repr(answer))
            (modules / f"{name}.py").write_text(text)
        actions = collection / "plugins/action"
        actions.mkdir()
        for name in ("audit_report", "rollout_report"):
            if (CHECKOUT / f"plugins/action/{name}.py").exists():
                (actions / f"{name}.py").symlink_to(CHECKOUT / f"plugins/action/{name}.py")
                (modules / f"{name}.py").symlink_to(CHECKOUT / f"plugins/modules/{name}.py")
        self.hosts: dict[str, pathlib.Path] = {}
        self.variables: dict[str, dict[str, t.Any]] = {}

    def host(self, name: str, state: dict[str, t.Any] | None = None, **variables: t.Any) -> pathlib.Path:
        """Add a host, or give it another state."""
        place = self.root / "hosts" / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "state.json").write_text(json.dumps(state or {}))
        self.hosts[name] = place
        self.variables.setdefault(name, {}).update(variables)
        return place

    def calls(self, name: str) -> list[dict[str, t.Any]]:
        """What was called on a host since the last time this was asked."""
        path = self.hosts[name] / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return [json.loads(line) for line in lines]

    def called(self, name: str, check: bool | None = None) -> list[str]:
        """The same, by name only."""
        return [call["module"] for call in self.calls(name) if check is None or call["check"] == check]

    def run(self, playbook: str, *options: str, **variables: t.Any) -> subprocess.CompletedProcess[str]:
        """Run a playbook, of the collection or of a test."""
        inventory = {
            "all": {
                "hosts": {
                    name: {
                        "ansible_connection": "local",
                        "ansible_python_interpreter": sys.executable,
                        "ansible_remote_tmp": str(place),
                        **self.variables[name],
                    }
                    for name, place in self.hosts.items()
                }
            }
        }
        hosts = self.root / "hosts.json"
        hosts.write_text(json.dumps(inventory))
        environment = {
            **{key: value for key, value in os.environ.items() if key != "ANSIBLE_CONFIG"},
            "ANSIBLE_COLLECTIONS_PATH": str(self.root / "collections"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_HOME": str(self.root / "home"),
            "ANSIBLE_LOCAL_TEMP": str(self.root / "tmp"),
            "ANSIBLE_PIPELINING": "0",
        }
        command = ["ansible-playbook", "-i", str(hosts), playbook, "-e", json.dumps(variables), *options]
        return subprocess.run(
            command,
            env=environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
