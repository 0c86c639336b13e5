#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: kernel_modules
short_description: Load iommufd and vfio-pci, now and at every boot
version_added: 0.1.0
author:
  - The iommufd.host authors (@iommufd-host)
description:
  - Nothing loads C(iommufd) by itself, not even opening C(/dev/iommu). This module loads it and C(vfio-pci), has
    C(systemd-modules-load) do so at every boot, and verifies that C(/dev/iommu) is there.
  - At boot the modules are loaded at the same time as udev goes through the devices, not before. That does not decide
    which driver a device gets; its driver override does, see M(iommufd.host.vfio_bind).
  - A module that is built into the kernel needs no loading and is left out.
  - Entries of C(vfio_virqfd), which no kernel since 6.2 has, are made comments where no installed kernel has it, in
    C(/etc/modules), C(/etc/modules-load.d), C(/etc/initramfs-tools/modules), and the configuration of dracut and
    mkinitcpio. The latter two report an error for it with each initramfs that they make. O(state=absent) puts the
    entries back.
options:
  names:
    description:
      - The modules, in the order in which they are to be loaded.
      - The list is complete. A module that an earlier list named is not loaded at the next boot.
    type: list
    elements: str
    default: [iommufd, vfio-pci]
  state:
    description:
      - With V(absent), the modules are not loaded at boot any more. Those that the file had listed are unloaded, unless
        they are in use or another file has them loaded; RV(staying) has those with the reason.
    type: str
    choices: [present, absent]
    default: present
  pending:
    description:
      - An earlier task of the same play is going to build or install the modules.
      - Only honoured in check mode, where a missing module is then a warning.
    type: bool
    default: false
requirements:
  - systemd
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.changes
seealso:
  - module: iommufd.host.iommufd_dkms
    description: Builds the modules for kernels that lack them.
"""

EXAMPLES = r"""
- name: Load iommufd and vfio-pci now and at every boot
  iommufd.host.kernel_modules:

- name: As it was
  iommufd.host.kernel_modules:
    state: absent
"""

RETURN = r"""
file:
  description: The file that has the modules loaded at boot.
  returned: success
  type: str
  sample: /etc/modules-load.d/iommufd-host.conf
modules:
  description: The modules with their state, V(loaded), V(builtin), V(available) or V(missing).
  returned: success
  type: list
  elements: dict
  sample:
    - dkms: true
      name: iommufd
      path: /usr/lib/modules/6.12.117+deb13-amd64/updates/dkms/iommufd.ko.xz
      state: loaded
nodes:
  description: Device nodes that the modules brought.
  returned: success
  type: list
  elements: str
  sample: [/dev/iommu]
staying:
  description: Modules that O(state=absent) leaves loaded, with the reason.
  returned: success
  type: dict
  sample: {vfio-pci: "0000:01:00.0 is bound to it"}
plan:
  description: The steps, in order.
  returned: success
  type: list
  elements: str
  sample:
    - write /etc/modules-load.d/iommufd-host.conf
    - load iommufd, vfio-pci
"""

import functools
import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _modules_load
from ansible_collections.iommufd.host.plugins.module_utils._ansible import Outcome, run_module
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._kernel import ModuleIndex
from ansible_collections.iommufd.host.plugins.module_utils._plan import wait_until

ARGUMENT_SPEC: dict[str, dict[str, t.Any]] = {
    "names": {"type": "list", "elements": "str", "default": ["iommufd", "vfio-pci"]},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "pending": {"type": "bool", "default": False},
}

# devtmpfs makes a node at once; udev may still be giving it its owner.
_NODE_TIMEOUT = 10.0


def work(module: AnsibleModule) -> Outcome:
    host = Host()
    names: list[str] = module.params["names"]
    _modules_load.check_names("names", names)
    present = module.params["state"] == "present"
    if present:
        pending = module.params["pending"] and module.check_mode
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


def main() -> None:
    run_module(AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True), work)


if __name__ == "__main__":
    main()
