#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vfio_bind
short_description: Give PCI devices to vfio for guests, or back to the host
version_added: 0.1.0
description:
  - Binds PCI functions to C(vfio-pci) or a variant of it, now and at every boot before a driver of the host takes them,
    and gives them back.
  - All devices of a call and their whole IOMMU groups are planned before any is touched. If any part is unsafe or
    impossible, the call is refused as a whole, with every reason, and nothing is changed. If a device fails while it is
    being moved, all go back to the drivers they had, in reverse order.
  - Only C(driver_override) and C(drivers_probe) are used, never C(new_id) or C(ids=). Of two identical cards only the
    one that is named moves.
  - What is kept across reboots stands in C(/etc/iommufd-host/devices.conf), a line for each device. A small shell
    script reads it in the initramfs (initramfs-tools, dracut) before udev starts, in the real root before udev goes
    through the devices, and when a device appears later. The kernel log shows each device that it hands over. A device
    of another kind at the address is left alone, and a device that the host uses by then as well.
  - The kernel argument C(iommufd_host=off) leaves all devices with the host for one boot.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.changes
  - iommufd.host._attributes.selecting
options:
  devices:
    description:
      - The devices, a list of selectors. Devices that none of them names are left as they are.
      - A selector is a PCI address such as V(0000:02:00.0) or V(02:00.0), also with globs (V(0000:03:00.*)), or a
        dictionary whose keys must all match.
      - A device that the selectors find more than once is taken once. A selector that matches nothing is an error that
        shows the nearest devices.
      - Bridges stay with the host. Only an address without globs names one at all.
      - Put addresses, numbers in hexadecimal, MACs and serial numbers in quotes. Without them YAML may read numbers.
      - While a device is with a guest, its driver, interface and disk of the host are gone. The module remembers them
        with the device, so that a second run finds it by the same name. Where the host has given the name to another
        device since, as it does with C(eth0), C(sda) and C(nvme0n1), that is an error, and nothing is taken. MACs,
        serial numbers and addresses do not have this problem.
      - With O(state=unbound), selectors that are no address without globs concern only devices that are on a vfio
        driver or kept by this module, and may match none.
    type: list
    elements: raw
    required: true
    suboptions:
      address:
        description: PCI address, also with globs (C(*), C(?), C([0-3])). Without a domain, domain 0000 is meant.
        type: str
      id:
        description: Vendor and device as C(lspci -n) prints them, such as V(10de:2236). V(10de:*) for a vendor.
        type: str
      vendor_id:
        description: Vendor in hexadecimal, such as V(10de) or V(0x10de).
        type: str
      device_id:
        description: Device in hexadecimal.
        type: str
      subsystem_id:
        description: Vendor and device of the subsystem, like O(devices[].id).
        type: str
      subsystem_vendor_id:
        description: Vendor of the subsystem in hexadecimal.
        type: str
      subsystem_device_id:
        description: Device of the subsystem in hexadecimal.
        type: str
      class:
        description:
          - What kind of device it is. V(gpu) is the same as V(display).
        type: str
        choices:
          - storage
          - scsi
          - ide
          - raid
          - sata
          - sas
          - nvme
          - network
          - ethernet
          - infiniband
          - display
          - gpu
          - vga
          - "3d"
          - multimedia
          - audio
          - memory
          - cxl
          - communication
          - system
          - processor
          - serial-bus
          - firewire
          - usb
          - wireless
          - encryption
          - signal
          - accelerator
      class_id:
        description: The first 2, 4 or all 6 hexadecimal digits of the class code, such as V(0302).
        type: str
      driver:
        description: The driver that it is bound to, or that it had when it was given to a guest.
        type: str
      numa_node:
        description: The NUMA node that it is on.
        type: int
      iommu_group:
        description: Number of its IOMMU group. It may be another one with the next kernel.
        type: int
      nic:
        description: Name of its network interface, also with globs.
        type: str
      mac:
        description: MAC address of its network interface, the one that the card came with.
        type: str
      disk:
        description: Name of its disk, such as V(nvme0n1) or V(/dev/sda), also with globs. Disks on USB have none.
        type: str
      serial:
        description: Serial number of its disk.
        type: str
      vfs_of:
        description:
          - A physical function, by address, by the name of its interface, or by a dictionary of these keys. Its virtual
            functions are meant.
          - In check mode with O(pending=true) they may be about to be created.
        type: raw
      vf:
        description: Only the virtual functions with these numbers, such as V(3), V(0-3) or a list.
        type: raw
      query:
        description:
          - A JMESPath expression about one device as M(iommufd.host.iommufd_info) returns it, see
            RV(iommufd.host.iommufd_info#module:devices). The device is meant where the result is true.
          - The controller evaluates it, after one survey of the host, and needs C(jmespath).
          - It sees the device as it is. What it asks must also hold once the device is bound, or the second run does
            not find it. C((remembered || @).driver) is the driver that the host has or had for it.
        type: str
      excluded:
        description:
          - With V(true) the devices that this selector matches are taken out of what all others match, also as
            companions (O(include_group)).
        type: bool
        default: false
  state:
    description:
      - V(bound) gives the devices to O(driver).
      - V(unbound) gives them back to the driver that the host has for them. When none is left that is kept across
        reboots, everything that made it so is removed as well.
    type: str
    choices: [bound, unbound]
    default: bound
  persistent:
    description:
      - Whether devices that are V(bound) are so after a reboot, too. With V(false) they go back to the host then.
      - Needs systemd, and initramfs-tools or dracut where the host has an initramfs. Images are changed only when what
        they hold is not what is wanted; with dracut, and where a boot loader keeps copies of them, that takes a while.
    type: bool
    default: true
  force:
    description:
      - Take devices although they are in use.
      - Applies only to devices whose address is written out in O(devices), without globs, not to what other selectors
        find and not to companions. Never applies to the disk of the root filesystem or the interface that carries the
        connection to the host.
    type: bool
    default: false
  include_group:
    description:
      - Take the other devices of the same IOMMU groups along. Without it, a device whose group also holds a device on a
        driver of the host is refused. Bridges stay with the host in any case.
    type: bool
    default: false
  driver:
    description:
      - The vfio driver. V(auto) chooses the most specific one that the kernel offers for the device, for example
        C(mlx5_vfio_pci), and C(vfio-pci) where there is none.
    type: str
    default: vfio-pci
  require_cdev:
    description:
      - Whether each device must have a character device (C(/dev/vfio/devices/vfioN)), as iommufd needs it. With
        V(false) a kernel that offers only legacy groups will do.
    type: bool
    default: true
  timeout:
    description:
      - Seconds that a driver may take to let a device go. When it does not, the device is reported and not waited for.
    type: int
    default: 30
  pending:
    description:
      - An earlier task of the same play is going to turn the IOMMU on, or to install modules or packages, and check
        mode only planned that. Then plan what can be planned instead of refusing.
      - Only honoured in check mode.
    type: bool
    default: false
author:
  - The iommufd.host authors (@iommufd)
"""

EXAMPLES = r"""
- name: Give a disk and a network card to guests
  iommufd.host.vfio_bind:
    devices:
      - "0000:02:00.0"
      - address: "0000:03:00.0"

- name: Give away all NVMe disks near processor 1, except one
  iommufd.host.vfio_bind:
    devices:
      - class: nvme
        numa_node: 1
      - serial: S6S2NS0TA17548X
        excluded: true

- name: Give the first four virtual functions of an interface to guests
  iommufd.host.vfio_bind:
    devices:
      - vfs_of: ens3f0
        vf: "0-3"

- name: Of two identical cards, the one with this MAC
  iommufd.host.vfio_bind:
    devices:
      - mac: "52:54:00:12:34:56"

- name: Whatever can have at least 32 virtual functions
  iommufd.host.vfio_bind:
    devices:
      - query: sriov.total_vfs >= `32`

- name: Take a card with all that shares its IOMMU group, with the driver made for it
  iommufd.host.vfio_bind:
    devices: ["0000:41:00.0"]
    include_group: true
    driver: auto

- name: Until the next reboot only
  iommufd.host.vfio_bind:
    devices: ["0000:02:00.0"]
    persistent: false

- name: Give everything back
  iommufd.host.vfio_bind:
    devices: ["0000:02:00.0", "0000:03:00.0"]
    state: unbound
"""

RETURN = r"""
devices:
  description: The devices of the call, companions included, as they are afterwards (in check mode, as they would be).
  returned: success
  type: list
  elements: dict
  sample:
    - address: "0000:01:00.0"
      vendor_id: "0x1b36"
      device_id: "0x0010"
      class_id: "0x010802"
      driver: vfio-pci
      driver_override: vfio-pci
      from_driver: nvme
      to_driver: vfio-pci
      reason: named by devices[0]
      persistent: true
      iommu_group: 13
      numa_node: null
      vfio_device: /dev/vfio/devices/vfio1
      vfio_link: /dev/vfio/by-path/pci-0000:01:00.0
      in_use: []
      remembered:
        driver: nvme
        interfaces: []
        disks: [{name: nvme1n1, serial: S6S2NS0TA17548X}]
  contains:
    address:
      description: PCI address.
      type: str
    driver:
      description: Driver that it is bound to.
      type: str
    from_driver:
      description: Driver that it had before.
      type: str
    to_driver:
      description: Driver that it has now.
      type: str
    reason:
      description: Why it is part of the call, with the selector that found it first.
      type: str
    remembered:
      description: What the host calls it, or called it before it gave it away; null with O(state=unbound).
      type: dict
    persistent:
      description: Whether it goes to the vfio driver at every boot.
      type: bool
    iommu_group:
      description: Number of its IOMMU group.
      type: int
    numa_node:
      description: NUMA node; null where the platform does not say.
      type: int
    vfio_device:
      description: Its character device. The number can be another one after the next boot.
      type: str
    vfio_link:
      description:
        - The stable name of its character device, ready for a command line.
        - Null where M(iommufd.host.udev_access) has not set up such names.
      type: str
      version_added: 0.2.0
    in_use:
      description: What uses it, each with C(kind), C(name) and C(detail).
      type: list
      elements: dict
plan:
  description: What was done, or would be done, one line for each step.
  returned: success
  type: list
  elements: str
  sample:
    - load vfio-pci
    - bind 0000:01:00.0 to vfio-pci (it has nvme; named by devices[0])
    - write /etc/initramfs-tools/hooks/iommufd-host
    - write /etc/iommufd-host/devices.sh
    - write /etc/udev/rules.d/10-iommufd-host-devices.rules
    - write /etc/systemd/system/iommufd-host-devices.service
    - enable iommufd-host-devices.service
    - write /etc/iommufd-host/devices.conf
    - put the list of devices into /boot/initrd.img-6.12.117+deb13-amd64
reboot_required:
  description: Always false; the devices are moved at once.
  returned: success
  type: bool
  sample: false
refusals:
  description: Why the call was refused, each with C(address), C(reason) and C(uses).
  returned: when refused
  type: list
  elements: dict
  sample:
    - address: "0000:02:00.0"
      reason: "0000:02:00.0 is in use: nvme0n1 is mounted on /mnt"
      uses:
        - kind: mount
          name: /mnt
          detail: nvme0n1 is mounted on /mnt
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils._ansible import Outcome, run_module
from ansible_collections.iommufd.host.plugins.module_utils._binding import (
    Request,
    decide,
    describe,
    read_situation,
    verify,
)
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import by_address
from ansible_collections.iommufd.host.plugins.module_utils._pci import read_functions
from ansible_collections.iommufd.host.plugins.module_utils._usage import all_uses
from ansible_collections.iommufd.host.plugins.module_utils._vfio import nodes_are_udevs, settle


def work(module: AnsibleModule) -> Outcome:
    options = module.params
    if options["timeout"] < 1:
        raise OptionError("timeout", options["timeout"], "a number of seconds from 1")
    host = Host()
    settle(host)
    request = Request(
        devices=options["devices"],
        bound=options["state"] == "bound",
        persistent=options["persistent"],
        force=options["force"],
        include_group=options["include_group"],
        driver=options["driver"],
        require_cdev=options["require_cdev"],
        timeout=float(options["timeout"]),
        pending=options["pending"] and module.check_mode,
    )
    situation = read_situation(host)
    binding = decide(host, situation, request)

    def after() -> dict[str, t.Any]:
        now, uses = situation.functions, situation.uses
        if binding.plan.changed:
            # Names and permissions of new nodes, and the host's drivers, are udev's work. The next task may rely on it.
            if not request.bound or nodes_are_udevs(host):
                settle(host)
            moved = [move.address for move in binding.moves]
            others = {} if not request.bound else {key: one for key, one in now.items() if key not in moved}
            now = {**others, **by_address(read_functions(host, moved if request.bound else None))}
            uses = all_uses(host, list(now.values()))
        verify(host, request, binding, now)
        return {"devices": describe(host, binding, uses, now)}

    result = {"devices": describe(host, binding, situation.uses), "reboot_required": False}
    return Outcome(binding.plan, result, after, binding.warnings)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "devices": {"type": "list", "elements": "raw", "required": True},
            "state": {"type": "str", "choices": ["bound", "unbound"], "default": "bound"},
            "persistent": {"type": "bool", "default": True},
            "force": {"type": "bool", "default": False},
            "include_group": {"type": "bool", "default": False},
            "driver": {"type": "str", "default": "vfio-pci"},
            "require_cdev": {"type": "bool", "default": True},
            "timeout": {"type": "int", "default": 30},
            "pending": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    run_module(module, work)


if __name__ == "__main__":
    main()
