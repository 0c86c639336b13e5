# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: guest_units
author:
  - The iommufd.host authors (@iommufd)
version_added: 0.2.0
short_description: What the systemd units of guests with shared descriptors say
description:
  - Works out, for the role C(iommufd.host.guest_unit) and for templates of your own, the settings of a unit for each
    guest, what systemd opens and in which order, QEMU's command line with the numbers of these descriptors, the device
    list of the cgroup, and the limit on pinned memory.
  - The guests of a host are given together, because those of one user share its limit on pinned memory.
positional: _input
options:
  _input:
    description: The guests, see the role's C(guest_unit_guests).
    type: list
    elements: dict
    required: true
  user:
    description: The user of guests that do not name one.
    type: str
  group:
    description: The group of guests that do not name one.
    type: str
  qemu:
    description: Path of QEMU, of guests that do not name it. Without it the distribution's for O(architecture).
    type: str
  machine:
    description: Machine type of guests that do not name one. Without it C(q35), with O(architecture=aarch64) C(virt).
    type: str
  accelerator:
    description: How the processors of guests are made that do not say it.
    type: str
    choices: [kvm, tcg]
    default: kvm
  architecture:
    description:
      - The host's processor, as C(uname -m) has it.
      - With V(aarch64) QEMU opens C(/dev/kvm) itself, so that the unit is in group C(kvm).
    type: str
    choices: [x86_64, aarch64]
    default: x86_64
    version_added: 0.2.0
seealso:
  - plugin: iommufd.host.qemu_args
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Show what systemd opens for a guest, and the command line
  ansible.builtin.debug:
    msg:
      - "{{ units[0].open_files }}"
      - "{{ units[0].exec_start | join(' ') }}"
  vars:
    units: "{{ guests | iommufd.host.guest_units(user='guests') }}"
    guests:
      - name: web1
        memory: 4G
        devices: ["0000:01:00.0", "0000:02:00.0"]
"""

RETURN = r"""
_value:
  description: For each guest a dictionary.
  type: list
  elements: dict
  contains:
    name:
      description: Of the guest.
      type: str
    unit:
      description: Of the unit.
      type: str
    user:
      description: Whom QEMU runs as.
      type: str
    supplementary_groups:
      description: Further groups of the unit.
      type: list
      elements: str
    open_files:
      description: Values of C(OpenFile), in their order.
      type: list
      elements: str
    descriptors:
      description: The same with C(number), C(path) and C(name).
      type: list
      elements: dict
    device_allow:
      description: Values of C(DeviceAllow).
      type: list
      elements: str
    device_units:
      description: The units of the devices' stable names, to wait for.
      type: list
      elements: str
    memlock:
      description: Value of C(LimitMEMLOCK).
      type: str
    memlock_reason:
      description: How it came about.
      type: str
    arguments:
      description: QEMU's command line.
      type: list
      elements: str
    exec_start:
      description: The same, each word quoted for C(ExecStart).
      type: list
      elements: str
    exec_stop:
      description: The words of C(ExecStop), which presses the guest's power button.
      type: list
      elements: str
  sample: []
"""

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._guest_unit import Defaults, units
from ansible_collections.iommufd.host.plugins.plugin_utils._refusing import refusing


def guest_units(
    guests: t.Any,
    user: str | None = None,
    group: str | None = None,
    qemu: str | None = None,
    machine: str | None = None,
    accelerator: str = Defaults.accelerator,
    architecture: str = Defaults.architecture,
) -> list[dict[str, t.Any]]:
    """What the units of guests say, see DOCUMENTATION."""
    with refusing("guest_units"):
        return units("guests", guests, Defaults(user, group, qemu, machine, accelerator, architecture))


class FilterModule:
    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"guest_units": guest_units}
