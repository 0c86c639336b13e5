# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: libvirt_hostdev
author:
  - The iommufd.host authors (@iommufd)
version_added: 0.2.0
short_description: Host devices for a domain of libvirt
description:
  - Turns a list of devices into C(<hostdev>) elements for the C(<devices>) of a domain. A PF or a VF is named by its
    PCI address.
  - They have C(managed='no'), because the devices are bound by M(iommufd.host.vfio_bind) and stay so.
  - libvirt has iommufd for single devices since 12.1, for a whole domain since 12.2, and for PCI functions only.
positional: _input
options:
  _input:
    description:
      - The devices, see O(iommufd.host.vfio_backend#filter:devices). Keys that are about QEMU's command line do not
        matter here.
    type: list
    elements: raw
    required: true
    suboptions:
      backend:
        description: Its backend, where it is another one than O(backend).
        type: str
        choices: [legacy, iommufd, auto]
      guest_address:
        description:
          - The PCI address in the guest. Where several devices have functions of one slot, function 0 gets
            C(multifunction).
        type: str
  version:
    description: The version of libvirt, as in the survey. Required where a device is on iommufd.
    type: str
  backend:
    description: The backend of devices that do not name one.
    type: str
    choices: [legacy, iommufd]
    default: iommufd
  scope:
    description:
      - Who says that a device is on iommufd. V(device) is its own C(<driver>), V(domain) an C(<iommufd enabled='yes'/>)
        that the domain has beside C(<devices>).
    type: str
    choices: [device, domain]
    default: device
seealso:
  - plugin: iommufd.host.vfio_backend
    plugin_type: filter
  - plugin: iommufd.host.libvirt_iommufd
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Show two devices, the second one at a place of its own
  ansible.builtin.debug:
    msg: "{{ devices | iommufd.host.libvirt_hostdev('12.8.0') }}"
  vars:
    devices:
      - "0000:01:00.0"
      - address: "0000:03:10.2"
        guest_address: "0000:05:00.0"
"""

RETURN = r"""
_value:
  description: The elements, one beneath the other.
  type: str
  sample: |-
    <hostdev mode='subsystem' type='pci' managed='no'>
      <driver name='vfio' iommufd='yes'/>
      <source>
        <address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>
      </source>
    </hostdev>
"""

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import parse_devices
from ansible_collections.iommufd.host.plugins.module_utils._libvirt_xml import hostdevs
from ansible_collections.iommufd.host.plugins.plugin_utils._refusing import refusing


def libvirt_hostdev(devices: t.Any, version: t.Any = None, backend: str = "iommufd", scope: str = "device") -> str:
    """Host devices for a domain, see DOCUMENTATION."""
    with refusing("libvirt_hostdev"):
        return "\n".join(hostdevs(parse_devices("devices", devices), version, backend, scope))


class FilterModule:
    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"libvirt_hostdev": libvirt_hostdev}
