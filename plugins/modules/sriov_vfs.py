#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: sriov_vfs
short_description: Make the virtual functions of SR-IOV devices, now and at every boot
version_added: 0.2.0
description:
  - Sets how many virtual functions (VFs) each physical function (PF) has, and what each VF may do, now and at every
    boot before guests start.
  - All PFs of a call are planned before any is touched. If any part is unsafe or impossible, the call is refused as a
    whole, with every reason, and nothing is changed. If a step fails, numbers, settings and autoprobe go back to what
    they were.
  - The kernel changes the number of VFs by way of zero, which removes all VFs that the PF has. The plan lists them. It
    is refused while one of them is in use or bound for guests, see O(force).
  - New VFs appear with autoprobe off, get their settings, and only then may drivers of the host take them, with
    O(pfs[].autoprobe). A VF that M(iommufd.host.vfio_bind) keeps for guests goes there directly, and no driver of the
    host ever sees it. When the module ends, nothing is probing any more, so that M(iommufd.host.vfio_bind) can follow
    at once.
  - What is kept across reboots stands in C(/etc/iommufd-host/sriov.conf). A small shell script makes the VFs at boot
    before C(sysinit.target), and again when the PF's driver is reloaded. The kernel log shows it.
  - The kernel argument C(iommufd_host=off) turns that off for one boot.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.changes
options:
  pfs:
    description:
      - The PFs. Those that are not named are left as they are.
    type: list
    elements: dict
    required: true
    suboptions:
      address:
        description:
          - PCI address of the PF, such as V(0000:02:00.0). Either this or O(pfs[].nic).
        type: str
      nic:
        description:
          - Name of the PF's network interface.
        type: str
      vfs:
        description:
          - How many VFs it shall have. V(0) is the same as O(state=absent) for this PF.
          - Required with O(state=present).
        type: int
      autoprobe:
        description:
          - Whether drivers of the host take its VFs as they appear. The default leaves VFs without a driver until they
            are bound for guests. Set it for VFs that the host itself, or containers, shall use.
          - VFs that are there already keep the driver that they have.
        type: bool
        default: false
      vf_settings:
        description:
          - What the PF's driver is told about its VFs, through the PF's network interface.
          - An entry with O(pfs[].vf_settings[].index) is for one VF, one without is for all. For one and the same
            setting the entry of the one VF wins.
          - What is not named is left as it is. With new VFs that is the driver's own default.
          - A setting that the driver does not have, or does not report back, is an error.
        type: list
        elements: dict
        default: []
        suboptions:
          index:
            description: Number of the VF, from 0.
            type: int
          mac:
            description: Its MAC address. It must be a unicast address, and each VF needs its own.
            type: str
          vlan:
            description: VLAN that its traffic is put into, from V(1) to V(4094); V(0) for none.
            type: int
          qos:
            description: Priority there, from V(0) to V(7). V(0) where only O(pfs[].vf_settings[].vlan) is given.
            type: int
          trust:
            description: Whether the VF may do what touches others, such as promiscuous mode or another MAC address.
            type: bool
          spoof_check:
            description: Whether frames with another source address are dropped.
            type: bool
          link_state:
            description: The link that the VF sees. V(auto) is that of the PF.
            type: str
            choices: [auto, enable, disable]
          min_tx_rate:
            description: Guaranteed rate in Mbit/s; V(0) for none.
            type: int
          max_tx_rate:
            description: Highest rate in Mbit/s; V(0) for no limit.
            type: int
      devlink_params:
        description:
          - Parameters of the PF as C(devlink dev param) has them, set before its VFs are made. Which there are depends
            on the driver.
          - Each is a value, or a dictionary with C(value) and C(cmode) (V(runtime), V(driverinit) or V(permanent);
            V(runtime) where it is not given). The module does not reload drivers for those that ask for it.
          - With O(persistent=true) a parameter that is no longer named goes back to what it was.
        type: dict
        default: {}
  state:
    description:
      - V(present) gives each PF the VFs that it shall have.
      - V(absent) removes the VFs of the PFs. When no PF is left whose VFs are made at boot, everything that did it is
        removed as well. Only O(pfs[].address) or O(pfs[].nic) is needed then.
    type: str
    choices: [present, absent]
    default: present
  persistent:
    description:
      - Whether the VFs are there after a reboot, too. With V(false) the PFs of the call have none then.
      - Needs systemd.
    type: bool
    default: true
  force:
    description:
      - Remove VFs to change their number although they are bound for guests or used by the host itself.
      - Never applies to a VF that a guest or another program has open, or that carries the connection to the host.
    type: bool
    default: false
  timeout:
    description:
      - Seconds that a PF may take to make or remove its VFs. When it does not, it is reported and not waited for.
    type: int
    default: 60
  pending:
    description:
      - An earlier task of the same play is going to give VFs back to the host, and check mode only planned that. Then
        VFs that are bound for guests do not count as used.
      - Only honoured in check mode.
    type: bool
    default: false
seealso:
  - module: iommufd.host.vfio_bind
notes:
  - Some drivers take the link of the PF down for a moment when the number changes.
  - With most drivers the interface of the PF must be up for its VFs to have a link. That is the business of the host's
    network configuration; this module leaves it alone.
author:
  - The iommufd.host authors (@iommufd)
"""

EXAMPLES = r"""
- name: Seven VFs for guests on each of two cards
  iommufd.host.sriov_vfs:
    pfs:
      - address: "0000:01:00.0"
        vfs: 7
        vf_settings:
          - {vlan: 100, spoof_check: true}
          - {index: 0, mac: "02:00:00:00:01:00", trust: true}
      - address: "0000:02:00.0"
        vfs: 7

- name: Four VFs for the host itself, until the next reboot
  iommufd.host.sriov_vfs:
    pfs:
      - {nic: enp1s0, vfs: 4, autoprobe: true}
    persistent: false

- name: No VFs any more
  iommufd.host.sriov_vfs:
    pfs:
      - address: "0000:01:00.0"
      - address: "0000:02:00.0"
    state: absent
"""

RETURN = r"""
pfs:
  description: The PFs of the call with their VFs, as they are afterwards (in check mode, as they would be).
  returned: success
  type: list
  elements: dict
  sample:
    - address: "0000:01:00.0"
      nic: enp1s0
      driver: igb
      numa_node: null
      total_vfs: 7
      num_vfs: 1
      autoprobe: false
      persistent: true
      vfs:
        - index: 0
          address: "0000:01:10.0"
          driver: null
          iommu_group: 24
          numa_node: null
          mac: "02:00:00:00:01:00"
          vlan: 100
          qos: 0
          trust: true
          spoof_check: true
          link_state: auto
          min_tx_rate: 0
          max_tx_rate: 0
  contains:
    address:
      description: PCI address.
      type: str
    nic:
      description: Its network interface; null where it has none.
      type: str
    driver:
      description: Its driver.
      type: str
    numa_node:
      description: NUMA node; null where the platform does not say.
      type: int
    total_vfs:
      description: How many VFs it can have.
      type: int
    num_vfs:
      description: How many it has.
      type: int
    autoprobe:
      description: Whether drivers of the host take VFs that appear.
      type: bool
    persistent:
      description: Whether its VFs are made at every boot.
      type: bool
    vfs:
      description:
        - Its VFs, with the settings that its driver reports.
        - In check mode, what only the kernel can say about VFs to come is null.
      type: list
      elements: dict
plan:
  description: What was done, or would be done, one line for each step.
  returned: success
  type: list
  elements: str
  sample:
    - make 1 VFs of 0000:01:00.0 (0000:01:10.0)
    - "tell enp1s0 about VFs of 0000:01:00.0: VF 0 mac 02:00:00:00:01:00 vlan 100 qos 0 spoofchk on trust on"
    - write /etc/iommufd-host/sriov.sh
    - write /etc/udev/rules.d/11-iommufd-host-sriov.rules
    - write /etc/systemd/system/iommufd-host-sriov.service
    - enable iommufd-host-sriov.service
    - write /etc/iommufd-host/sriov.conf
refusals:
  description: Why the call was refused, each with C(address), C(reason) and C(uses).
  returned: when refused
  type: list
  elements: dict
  sample:
    - address: "0000:01:00.0"
      reason: >-
        the number of VFs of 0000:01:00.0 cannot be changed from 1 to 2: that removes all it has (0000:01:10.0), and
        some are in use: 0000:01:10.0 is kept for guests on vfio-pci
      uses:
        - kind: vfio
          name: vfio-pci
          detail: 0000:01:10.0 is kept for guests on vfio-pci
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils._ansible import Outcome, run_module
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._sriov_plan import (
    Request,
    decide,
    describe,
    describe_planned,
    verify,
)
from ansible_collections.iommufd.host.plugins.module_utils._vfio import settle


def work(module: AnsibleModule) -> Outcome:
    options = module.params
    if options["timeout"] < 1:
        raise OptionError("timeout", options["timeout"], "a number of seconds from 1")
    host = Host()
    settle(host)
    request = Request(
        pfs=options["pfs"],
        present=options["state"] == "present",
        persistent=options["persistent"],
        force=options["force"],
        timeout=float(options["timeout"]),
        pending=options["pending"] and module.check_mode,
    )
    decision = decide(host, request)

    def after() -> dict[str, t.Any]:
        settle(host)
        return {"pfs": describe(decision, verify(host, decision))}

    return Outcome(decision.plan, {"pfs": describe_planned(decision)}, after, decision.warnings)


def main() -> None:
    settings = {
        "index": {"type": "int"},
        "mac": {"type": "str"},
        "vlan": {"type": "int"},
        "qos": {"type": "int"},
        "trust": {"type": "bool"},
        "spoof_check": {"type": "bool"},
        "link_state": {"type": "str", "choices": ["auto", "enable", "disable"]},
        "min_tx_rate": {"type": "int"},
        "max_tx_rate": {"type": "int"},
    }
    pf = {
        "address": {"type": "str"},
        "nic": {"type": "str"},
        "vfs": {"type": "int"},
        "autoprobe": {"type": "bool", "default": False},
        "vf_settings": {"type": "list", "elements": "dict", "options": settings, "default": []},
        "devlink_params": {"type": "dict", "default": {}},
    }
    module = AnsibleModule(
        argument_spec={
            "pfs": {"type": "list", "elements": "dict", "options": pf, "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "persistent": {"type": "bool", "default": True},
            "force": {"type": "bool", "default": False},
            "timeout": {"type": "int", "default": 60},
            "pending": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    run_module(module, work)


if __name__ == "__main__":
    main()
