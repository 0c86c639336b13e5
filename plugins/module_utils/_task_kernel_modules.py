# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the module kernel_modules does: its options, read, planned, and looked at afterwards."""

from __future__ import annotations

import functools
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _modules_load
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._kernel import ModuleIndex
from ansible_collections.iommufd.host.plugins.module_utils._outcome import Outcome
from ansible_collections.iommufd.host.plugins.module_utils._plan import wait_until

ARGUMENT_SPEC: dict[str, dict[str, t.Any]] = {
    "names": {"type": "list", "elements": "str", "default": ["iommufd", "vfio-pci"]},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "pending": {"type": "bool", "default": False},
}

# devtmpfs makes a node at once; udev may still be giving it its owner.
_NODE_TIMEOUT = 10.0


def work(params: t.Mapping[str, t.Any], check_mode: bool) -> Outcome:
    host = Host()
    names: list[str] = params["names"]
    _modules_load.check_names("names", names)
    present = params["state"] == "present"
    if present:
        pending = params["pending"] and check_mode
        planned = _modules_load.plan_present(host, names, pending)
    else:
        planned = _modules_load.plan_absent(host)
    return Outcome(
        plan=planned.plan,
        result=_result(host, names, planned),
        after=lambda: _verify(host, names, planned, present),
        warnings=planned.warnings,
    )


def _result(host: Host, names: list[str], planned: _modules_load.Planned) -> dict[str, t.Any]:
    index = ModuleIndex(host)
    return {
        "file": _modules_load.PATH,
        "modules": [index.state(name).to_dict() for name in names],
        "nodes": [node for node in (_modules_load.node_of(host, name) for name in names) if node is not None],
        "staying": planned.staying,
    }


def _verify(host: Host, names: list[str], planned: _modules_load.Planned, present: bool) -> dict[str, t.Any]:
    if present:
        for name in names:
            if not wait_until(functools.partial(_has_node, host, name), _NODE_TIMEOUT):
                raise HostError(
                    f"{name} is loaded, but {_modules_load.NODES[_modules_load.canonical(name)]} did not appear within "
                    f"{_NODE_TIMEOUT:.0f} s. In a container the node must be passed in from outside; elsewhere the "
                    "kernel log has the reason (dmesg)."
                )
    return _result(host, names, planned)


def _has_node(host: Host, name: str) -> bool:
    """Whether a module's device node is there; true for a module that brings none."""
    return _modules_load.canonical(name) not in _modules_load.NODES or _modules_load.node_of(host, name) is not None
