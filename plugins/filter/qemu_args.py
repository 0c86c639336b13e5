# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: qemu_args
author:
  - The iommufd.host authors (@iommufd)
version_added: 0.2.0
short_description: The arguments that give a guest of QEMU its devices
description:
  - Turns a list of devices into arguments of QEMU's command line, one by one and without any quoting.
  - Either QEMU opens the nodes, or a launcher passes all the descriptors, that of C(/dev/iommu) and one for each
    device. A mixture would need rights and descriptors, so it is an error within one iommufd object.
  - A device always has an C(id), without which a QEMU of 11.1 crashes on a passed descriptor.
positional: _input
options:
  _input:
    description: The devices, see O(iommufd.host.vfio_backend#filter:devices).
    type: list
    elements: raw
    required: true
    suboptions:
      id:
        description: Name of the device in QEMU. By default V(vfio0) and so on, by its place in the list.
        type: str
      backend:
        description: Its backend, where it is another one than O(backend).
        type: str
        choices: [legacy, iommufd, auto]
      iommufd:
        description: The iommufd object that it is on. By default the first.
        type: str
      fd:
        description: The descriptor of its cdev.
        type: int
      properties:
        description: Further properties of QEMU's device.
        type: dict
  backend:
    description: The backend of devices that do not name one, such as P(iommufd.host.vfio_backend#filter) chose it.
    type: str
    choices: [legacy, iommufd]
    default: iommufd
  iommufd_fd:
    description: The descriptor of C(/dev/iommu). Without it QEMU opens the node itself.
    type: int
  objects:
    description:
      - The iommufd objects, each a name or a dictionary with C(id) and C(fd). By default one, V(iommufd0), where a
        device is on iommufd.
    type: list
    elements: raw
  first_fd:
    description:
      - Number all descriptors from here on, first those of the iommufd objects, then those of the devices on them, in
        the order of the list. V(3) is what systemd's C(OpenFile) begins with.
    type: int
seealso:
  - plugin: iommufd.host.vfio_backend
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Show the arguments for a QEMU that opens the nodes itself
  ansible.builtin.debug:
    msg: "{{ ['0000:01:00.0', '0000:02:00.0'] | iommufd.host.qemu_args }}"

- name: Show those for a launcher that passes descriptors from number 3 on
  ansible.builtin.debug:
    msg: "{{ ['0000:01:00.0', '0000:02:00.0'] | iommufd.host.qemu_args(first_fd=3) | map('quote') | join(' ') }}"

- name: Show those for two address spaces, and a device on a port of its own
  ansible.builtin.debug:
    msg: "{{ devices | iommufd.host.qemu_args(objects=['iommufd0', 'iommufd1']) }}"
  vars:
    devices:
      - address: "0000:01:00.0"
        id: gpu
        properties: {bus: port1, rombar: 0}
      - address: "0000:02:00.0"
        iommufd: iommufd1
"""

RETURN = r"""
_value:
  description: The arguments.
  type: list
  elements: str
  sample:
    - -object
    - iommufd,id=iommufd0,fd=3
    - -device
    - vfio-pci,id=vfio0,fd=4,iommufd=iommufd0
"""

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import parse_devices
from ansible_collections.iommufd.host.plugins.module_utils._qemu_devices import arguments, parse_objects
from ansible_collections.iommufd.host.plugins.plugin_utils._refusing import refusing


def qemu_args(
    devices: t.Any,
    backend: str = "iommufd",
    iommufd_fd: t.Any = None,
    objects: t.Any = None,
    first_fd: t.Any = None,
) -> list[str]:
    """The arguments for a guest's devices, see DOCUMENTATION."""
    with refusing("qemu_args"):
        listed = parse_devices("devices", devices)
        known = parse_objects("objects", objects, iommufd_fd)
        return list(arguments(listed, known, backend, first_fd).words)


class FilterModule:
    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"qemu_args": qemu_args}
