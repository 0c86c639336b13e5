# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: vfio_backend
author:
  - The iommufd.host authors (@iommufd)
version_added: 0.2.0
short_description: Which backend the devices of a guest get, iommufd or legacy, and why
description:
  - Decides from the survey of a host. The reason is in the result, always.
  - With V(auto), iommufd is chosen where it maps the devices of a guest for each other (peer-to-peer), which is
    measured and not derived from versions; without that only for a guest with at most one PCI device and no hot-plug
    expected, since the legacy container would map them. In all other cases, and where something is not known, it is
    legacy.
  - All devices of a guest get the same backend, except those that say themselves which one they want.
  - What is impossible on the host is an error when it is asked for. Mediated devices cannot be passed as descriptors,
    spapr (POWER) has no iommufd for vfio.
positional: _input, devices
options:
  _input:
    description: What M(iommufd.host.iommufd_info) returned.
    type: dict
    required: true
  devices:
    description:
      - The devices of the guest. Each is a PCI address, the UUID of a mediated device, a device of the survey, or a
        dictionary.
    type: list
    elements: raw
    required: true
    suboptions:
      address:
        description: PCI address.
        type: str
      uuid:
        description: UUID of a mediated device.
        type: str
      sysfsdev:
        description: Directory in sysfs of a mediated device that has another name.
        type: str
      kind:
        description: V(mdev) is a mediated PCI device, V(vfio-ccw) and V(vfio-ap) are those of s390x.
        type: str
        choices: [vfio-pci, mdev, vfio-ccw, vfio-ap]
      backend:
        description: The backend of this very device. A guest is only mixed where this asks for it.
        type: str
        choices: [legacy, iommufd, auto]
  backend:
    description: What is asked for.
    type: str
    choices: [legacy, iommufd, auto]
    default: auto
  launcher:
    description:
      - Who opens the nodes. V(direct) is M(iommufd.host.guest_verify) or another process that passes descriptors,
        V(systemd) a unit with C(OpenFile), V(libvirt) a C(<hostdev>), V(self) QEMU.
    type: str
    choices: [direct, systemd, libvirt, self]
    default: direct
  hot_plug:
    description: Whether further devices may be plugged in while the guest runs.
    type: bool
    default: false
  peer_to_peer:
    description:
      - What a measurement said, C(evidence) of M(iommufd.host.guest_verify), its C(peer_to_peer), or a truth value.
      - A measurement that names another kernel or QEMU than the survey counts as none.
    type: raw
  qemu:
    description: Path of the QEMU that is going to run the guest. Without it the best one of the survey.
    type: str
  machine:
    description: Machine type of the guest, such as V(q35) or V(pseries).
    type: str
seealso:
  - plugin: iommufd.host.qemu_args
    plugin_type: filter
  - plugin: iommufd.host.libvirt_hostdev
    plugin_type: filter
  - module: iommufd.host.iommufd_info
"""

EXAMPLES = r"""
- name: Survey this host
  iommufd.host.iommufd_info:
  register: survey

- name: Choose for a guest with two devices
  ansible.builtin.set_fact:
    choice: "{{ survey | iommufd.host.vfio_backend(['0000:01:00.0', '0000:02:00.0'], launcher='self') }}"

- name: Show what was chosen and why
  ansible.builtin.debug:
    msg: "{{ choice.backend }}, for {{ choice.reason }}"
"""

RETURN = r"""
_value:
  description: The decision.
  type: dict
  contains:
    backend:
      description: The backend of all devices that did not ask for one, V(legacy) or V(iommufd).
      type: str
    reason:
      description: Why, as a clause.
      type: str
    mixed:
      description: Whether the devices are on different backends.
      type: bool
    opened_by:
      description: Who opens the nodes, V(launcher) or V(qemu).
      type: str
    devices:
      description:
        - For each device its C(name), C(kind), C(backend), C(reason) and C(opened_by), and whether it C(asked) for it.
      type: list
      elements: dict
    warnings:
      description: What works otherwise than one might expect.
      type: list
      elements: str
  sample:
    backend: legacy
    reason: >-
      the guest has 2 PCI devices, and peer-to-peer does not work over iommufd here (PCI peer-to-peer transactions on
      BARs are not supported)
    mixed: false
    opened_by: qemu
    devices: []
    warnings: []
"""

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._backend import decide, parse_facts
from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import parse_devices
from ansible_collections.iommufd.host.plugins.plugin_utils._refusing import check_survey, refusing


def vfio_backend(
    survey: t.Any,
    devices: t.Any,
    backend: str = "auto",
    launcher: str = "direct",
    hot_plug: bool = False,
    peer_to_peer: t.Any = None,
    qemu: str | None = None,
    machine: str | None = None,
) -> dict[str, t.Any]:
    """Which backend a guest's devices get, see DOCUMENTATION."""
    check_survey("vfio_backend", survey)
    with refusing("vfio_backend"):
        facts = parse_facts(survey, qemu, peer_to_peer)
        return decide(facts, parse_devices("devices", devices), backend, launcher, hot_plug, machine).to_dict()


class FilterModule:
    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"vfio_backend": vfio_backend}
