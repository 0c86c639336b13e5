# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: select_devices
author:
  - The iommufd.host authors (@iommufd)
version_added: 0.2.0
short_description: The devices of a survey that selectors name
description:
  - Takes the devices that M(iommufd.host.iommufd_info) returned and returns those that the selectors mean, each once,
    in the order of their addresses.
  - Selectors are the same here and in the option O(iommufd.host.vfio_bind#module:devices), where they are described.
  - A selector that is malformed or matches nothing is an error that names the nearest devices.
positional: _input, selectors
options:
  _input:
    description: RV(iommufd.host.iommufd_info#module:devices).
    type: list
    elements: dict
    required: true
  selectors:
    description: One selector or a list of them, see O(iommufd.host.vfio_bind#module:devices).
    type: raw
    required: true
  free:
    description: Leave out devices that the host or a guest uses.
    type: bool
    default: false
seealso:
  - module: iommufd.host.vfio_bind
  - module: iommufd.host.iommufd_info
"""

EXAMPLES = r"""
- name: Survey this host
  iommufd.host.iommufd_info:
  register: survey

- name: Show the NVMe disks that nobody uses
  ansible.builtin.debug:
    msg: "{{ survey.devices | iommufd.host.select_devices({'class': 'nvme'}, free=true) | map(attribute='address') }}"

- name: Show all network functions near processor 0, except the one that the host needs
  ansible.builtin.debug:
    msg: "{{ survey.devices | iommufd.host.select_devices(wanted) | map(attribute='address') }}"
  vars:
    wanted:
      - class: network
        numa_node: 0
      - nic: eno1
        excluded: true

- name: Show what a JMESPath expression finds
  ansible.builtin.debug:
    msg: "{{ survey.devices | iommufd.host.select_devices({'query': 'sriov.total_vfs >= `8`'}) }}"
"""

RETURN = r"""
_value:
  description: The devices, as they were given.
  type: list
  elements: dict
"""

import typing as t

from ansible.errors import AnsibleFilterError

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._pci import address_key
from ansible_collections.iommufd.host.plugins.module_utils._selectors import choose, parse_selectors
from ansible_collections.iommufd.host.plugins.plugin_utils._query import compile_query


def select_devices(devices: t.Any, selectors: t.Any, free: bool = False) -> list[dict[str, t.Any]]:
    """The devices that selectors mean, see DOCUMENTATION."""
    if not isinstance(devices, list) or not all(
        isinstance(one, dict) and isinstance(one.get("address"), str) for one in devices
    ):
        raise AnsibleFilterError("select_devices takes the devices that iommufd.host.iommufd_info returned")
    try:
        choice = choose(parse_selectors("selectors", selectors, compile_query), devices)
    except HostError as error:
        raise AnsibleFilterError(error.message) from error
    found = [dict(one.device) for one in choice.chosen if not (free and one.device.get("in_use"))]
    return sorted(found, key=lambda device: address_key(device["address"]))


class FilterModule:
    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"select_devices": select_devices}
