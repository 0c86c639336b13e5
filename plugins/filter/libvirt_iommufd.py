# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: libvirt_iommufd
author:
  - The iommufd.host authors (@iommufd)
version_added: 0.2.0
short_description: A domain of libvirt with its devices on iommufd, or why not
description:
  - Takes the XML of a domain and returns it with its host devices on iommufd, where P(iommufd.host.vfio_backend#filter)
    chooses that for them.
  - Only the places that say so are changed. All else, comments, indentation and elements that are not known here, stays
    byte for byte. Where nothing has to be changed, or must not be, RV(_value.xml) is what was given.
  - Why a device was or was not moved is in the result. A device that says C(iommufd='no') is left so.
  - Nothing is done on the host. RV(_value.xml) is for C(virsh define), and counts from the domain's next start.
positional: _input, survey
options:
  _input:
    description: The XML, as C(virsh dumpxml --inactive) prints it.
    type: str
    required: true
  survey:
    description: What M(iommufd.host.iommufd_info) returned for the host that is going to run the domain.
    type: dict
    required: true
  backend:
    description:
      - V(auto) leaves it to the policy. V(iommufd) moves the devices wherever that is possible, also where they lose
        peer-to-peer.
    type: str
    choices: [auto, iommufd]
    default: auto
  backends:
    description:
      - What is asked for single devices, by PCI address or UUID, V(iommufd) or V(legacy). A domain is only mixed by
        this.
    type: dict
    default: {}
  scope:
    description: Whether each device says it (libvirt 12.1) or the domain says it once (12.2).
    type: str
    choices: [device, domain]
    default: device
  hot_plug:
    description: Whether further devices may be plugged in while the domain runs.
    type: bool
    default: false
  peer_to_peer:
    description: See O(iommufd.host.vfio_backend#filter:peer_to_peer).
    type: raw
  version:
    description: The version of libvirt that is going to run the domain. Without it that of the survey.
    type: str
  qemu:
    description: See O(iommufd.host.vfio_backend#filter:qemu).
    type: str
seealso:
  - plugin: iommufd.host.vfio_backend
    plugin_type: filter
  - plugin: iommufd.host.libvirt_hostdev
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Survey this host
  iommufd.host.iommufd_info:
  register: survey

- name: Read a domain
  ansible.builtin.command: virsh dumpxml --inactive web1
  register: domain
  changed_when: false

- name: Show what would become of it
  ansible.builtin.debug:
    msg: "{{ moved.reason }}"
  vars:
    moved: "{{ domain.stdout | iommufd.host.libvirt_iommufd(survey) }}"
"""

RETURN = r"""
_value:
  description: The domain and what was decided.
  type: dict
  contains:
    xml:
      description: The XML, changed or as it was given.
      type: str
    changed:
      description: Whether it was changed.
      type: bool
    backend:
      description: What was chosen for the domain, V(iommufd) or V(legacy). Null for a domain without such devices.
      type: str
    reason:
      description: Why.
      type: str
    devices:
      description:
        - For each host device its C(name), C(kind) and C(element), the backend C(before) and afterwards (C(backend)),
          whether that C(changed), and the C(reason).
      type: list
      elements: dict
    mixed:
      description: Whether the devices are on different backends.
      type: bool
    warnings:
      description: What works otherwise than one might expect, or was not looked at.
      type: list
      elements: str
  sample:
    changed: false
    backend: legacy
    reason: libvirt 11.3.0 has no iommufd for host devices (12.1 and later have it)
    devices: []
    mixed: false
    warnings: []
    xml: <domain type='kvm'>...</domain>
"""

import dataclasses
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._backend import parse_facts
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._libvirt_acl import can_pass
from ansible_collections.iommufd.host.plugins.module_utils._libvirt_xml import convert, version_numbers
from ansible_collections.iommufd.host.plugins.plugin_utils._refusing import check_survey, refusing


def libvirt_iommufd(
    domain: t.Any,
    survey: t.Any,
    backend: str = "auto",
    backends: t.Any = None,
    scope: str = "device",
    hot_plug: bool = False,
    peer_to_peer: t.Any = None,
    version: str | None = None,
    qemu: str | None = None,
) -> dict[str, t.Any]:
    """A domain with its devices on iommufd, or why not, see DOCUMENTATION."""
    check_survey("libvirt_iommufd", survey)
    with refusing("libvirt_iommufd"):
        facts = parse_facts(survey, qemu, peer_to_peer)
        if version is not None:
            version_numbers("version", version)
            facts = dataclasses.replace(facts, libvirt=version, libvirt_passes=can_pass(version))
        if not isinstance(backends or {}, dict):
            raise OptionError("backends", backends, 'a dictionary such as {"0000:01:00.0": "iommufd"}')
        return convert("domain", domain, facts, backend, backends or {}, scope, hot_plug)


class FilterModule:
    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"libvirt_iommufd": libvirt_iommufd}
