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
  - The iommufd.host authors (@iommufd)
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

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _task_kernel_modules as task
from ansible_collections.iommufd.host.plugins.module_utils._ansible import run_task


def main() -> None:
    run_task(AnsibleModule(argument_spec=task.ARGUMENT_SPEC, supports_check_mode=True), task.work)


if __name__ == "__main__":
    main()
