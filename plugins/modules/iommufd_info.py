#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: iommufd_info
short_description: Survey a host for passing PCI devices through with iommufd
version_added: 0.1.0
author:
  - The iommufd.host authors (@iommufd)
description:
  - Reads everything that decides whether guests can have PCI devices of a host over C(/dev/iommu), and changes nothing.
  - >-
    Tells for each device what the host itself uses it for, through every layer (partitions, RAID, LVM, encryption,
    ZFS, images; bonds, bridges, VLANs), which processes and guests have it open, and which checks a host fails, with a
    remedy for its distribution.
  - With O(root), a captured tree (an unpacked report, an image, another container's view) is surveyed like a live host.
    What it lacks is null, and a check that cannot be decided without it is V(skip).
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.reads
options:
  root:
    description:
      - Directory that is the host's C(/).
      - Beneath any other than V(/) only files are read. Programs are not asked, so what only they could tell (whether a
        QEMU has iommufd, for example) is null.
    type: path
    default: /
  packed:
    description:
      - Return all but the checks as one compressed string, RV(packed). A controller that holds the surveys of a fleet
        needs a small part of the memory for them so. M(iommufd.host.audit_report) takes either form.
    type: bool
    default: false
    version_added: 0.2.0
seealso:
  - module: iommufd.host.vfio_bind
  - module: iommufd.host.guest_verify
"""

EXAMPLES = r"""
- name: Survey this host
  iommufd.host.iommufd_info:
  register: survey

- name: Show what keeps it from being ready
  ansible.builtin.debug:
    msg: "{{ survey | iommufd.host.why_not }}"

- name: Show the disks that the host itself does not use
  ansible.builtin.debug:
    msg: "{{ survey.devices | iommufd.host.select_devices({'class': 'nvme'}, free=true) | map(attribute='address') }}"

- name: Survey a captured tree
  iommufd.host.iommufd_info:
    root: /srv/reports/node7
  register: captured
"""

RETURN = r"""
packed:
  description:
    - All other values but the checks, as JSON, compressed by zlib, in Base64. Only C(checks) is there beside it.
  returned: with O(packed=true)
  type: str
  sample: eJyrVsrJLEtVslIoKSpNrQUAJFYFBw==
live:
  description: Whether the running host was surveyed, and not a captured tree.
  returned: success
  type: bool
  sample: true
distribution:
  description: The distribution, by C(/etc/os-release).
  returned: success
  type: dict
  sample:
    id: debian
    version_id: "13"
    codename: trixie
    name: Debian GNU/Linux 13 (trixie)
    family: debian
kernel:
  description:
    - The running kernel, its configuration (null where it is not kept), command line and the modules that matter.
  returned: success
  type: dict
  contains:
    release:
      description: The release that the rest is about.
      type: str
    release_source:
      description:
        - V(running) where the tree says which kernel runs.
        - Else, of those installed, the one that would start (V(boot)) or the newest (V(newest)).
      type: str
    config:
      description:
        - The file that it was read from (C(source)), and the C(options), each V(y), V(m), V(n) or its value; null where
          a truncated file does not tell.
      type: dict
    modules:
      description:
        - The modules by name. The C(state) of each is V(loaded), V(builtin), V(available), V(missing), or V(unknown) in
          a tree without an index of modules. C(dkms) tells whether its file lies beside the kernel's own.
      type: dict
    virtual_machine:
      description: Whether the host is itself a virtual machine; null where it is not known.
      type: bool
    virtualization:
      description: V(vmx), V(svm) or empty, by the processor's flags; null where they are not known.
      type: str
    vfio_cdev:
      description: Whether the vfio that is loaded makes character devices; null while none is loaded.
      type: bool
  sample:
    release: 6.12.117+deb13-amd64
    release_source: running
    installed: [6.12.117+deb13-amd64]
    architecture: x86_64
    cpu_vendor: AuthenticAMD
    virtualization: svm
    virtual_machine: true
    config:
      source: /boot/config-6.12.117+deb13-amd64
      options: {IOMMUFD: n, VFIO_DEVICE_CDEV: n, VFIO_GROUP: y, VFIO_PCI: m}
    command_line: BOOT_IMAGE=/boot/vmlinuz-6.12.117+deb13-amd64 root=UUID=4e1f ro console=ttyS0
    arguments: [BOOT_IMAGE=/boot/vmlinuz-6.12.117+deb13-amd64, root=UUID=4e1f, ro, console=ttyS0]
    modules:
      iommufd:
        name: iommufd
        state: loaded
        path: /usr/lib/modules/6.12.117+deb13-amd64/updates/dkms/iommufd.ko.xz
        dkms: true
    vfio_cdev: true
iommu:
  description:
    - The hardware IOMMUs, and the ACPI table that describes them (V(DMAR), V(IVRS), V(IORT), V(VIOT)).
  returned: success
  type: dict
  contains:
    enabled:
      description: Whether there are IOMMU groups; null where the tree shows neither groups nor functions.
      type: bool
    units:
      description:
        - The IOMMUs that the kernel uses. The kind is V(VT-d), V(AMD-Vi), V(SMMUv3), V(SMMU), V(virtio-iommu),
          V(RISC-V IOMMU) or the driver's name.
      type: list
      elements: dict
    interrupt_isolation:
      description: Whether interrupts of devices are remapped; null where it cannot be told.
      type: bool
  sample:
    enabled: true
    units: [{name: dmar0, kind: VT-d}]
    firmware: DMAR
    firmware_known: true
    interrupt_isolation: true
    unsafe_interrupts: {vfio_iommu_type1: false, iommufd: false}
nodes:
  description:
    - The device nodes with owner, group, mode, number, links to them, SELinux label and what an access list grants to
      others; null where missing. C(expected) is the number that the kernel's device has.
  returned: success
  type: dict
  sample:
    iommu:
      path: /dev/iommu
      owner: root
      group: root
      mode: "0660"
      device: "10:124"
      expected: "10:124"
      links: []
      label: null
      acl: false
      acl_entries: []
    kvm: null
    container: null
    cdevs: []
    groups: []
groups:
  description:
    - The IOMMU groups with their members.
    - RV(groups[].blocking) lists those on a driver of the host, RV(groups[].vfio) those on a vfio driver.
      A group can only be given away as a whole.
  returned: success
  type: list
  elements: dict
  contains:
    blocking:
      description: Addresses of members on a driver of the host.
      type: list
      elements: str
    vfio:
      description: Addresses of members on a vfio driver.
      type: list
      elements: str
  sample:
    - number: 13
      type: DMA-FQ
      devices: ["0000:01:00.0"]
      others: []
      reserved_regions: [{start: "0xfee00000", end: "0xfeefffff", kind: msi}]
      blocking: ["0000:01:00.0"]
      vfio: []
devices:
  description:
    - Every PCI function.
    - RV(devices[].in_use) lists every use, and is empty for a device that is free.
    - RV(devices[].vfio_drivers) lists the vfio drivers for it, the most specific one first, by C(modules.alias).
  returned: success
  type: list
  elements: dict
  contains:
    in_use:
      description: What the host uses it for.
      type: list
      elements: dict
      contains:
        kind:
          description:
            - Disks, V(mount), V(swap), V(lvm), V(raid), V(crypt), V(multipath), V(zfs), V(bcache), V(device-mapper),
              V(export).
            - Interfaces, V(address), V(route), V(bond), V(bridge), V(team), V(vlan), V(macvlan), V(macvtap), V(ipvlan),
              V(vxlan), V(vrf), V(ovs), V(upper) for any other layer, V(namespace), V(ssh).
            - Other, V(console), V(open), V(guest), V(mdev), V(vfs).
          type: str
        name:
          description: What uses it, a mount point, a volume, an interface, a process, a guest.
          type: str
        detail:
          description: The chain from the device up to there, in words.
          type: str
    iommu_group:
      description: Number of its group; null with the IOMMU off.
      type: int
    numa_node:
      description: Null where the platform does not say.
      type: int
    vfio_device:
      description: Its character device, while it is bound to a vfio driver that makes them.
      type: str
    sriov:
      description: The VFs of a PF, or the PF of a VF; null for what is neither.
      type: dict
    reset_methods:
      description: Those that the kernel would try, in their order; null where it does not say.
      type: list
      elements: str
    bars:
      description: The memory and I/O regions that it uses, with their sizes in bytes.
      type: list
      elements: dict
    interfaces:
      description: Its network interfaces, each with C(name) and C(mac), the address that the card came with.
      type: list
      elements: dict
    disks:
      description: Its disks, each with C(name) and C(serial). A disk on USB is not listed.
      type: list
      elements: dict
    remembered:
      description:
        - For a device that M(iommufd.host.vfio_bind) has given to a guest's driver, the C(driver), C(interfaces) and
          C(disks) that it had with the host; null for all others.
      type: dict
    vfio_drivers:
      description: Names of vfio drivers.
      type: list
      elements: str
  sample:
    - address: "0000:00:03.0"
      vendor_id: "0x1af4"
      device_id: "0x1042"
      subsystem_vendor_id: "0x1af4"
      subsystem_device_id: "0x0002"
      class_id: "0x010000"
      revision: "0x01"
      driver: virtio-pci
      driver_override: null
      iommu_group: 2
      numa_node: null
      vfio_device: null
      sriov: null
      boot_vga: null
      reset_methods: [pm]
      bars: [{index: 1, kind: memory, size: 4096, prefetchable: false, wide: false}]
      interfaces: []
      disks: [{name: vda, serial: null}]
      remembered: null
      vfio_drivers: [vfio_pci]
      in_use:
        - kind: mount
          name: /
          detail: vda > vda2 is mounted on /, the host's root filesystem
guests:
  description:
    - The running guests with the nodes and devices that they have open, the user that they run as and their limit on
      locked memory in bytes (null for unlimited). What other users have open only root sees.
  returned: success
  type: list
  elements: dict
  sample:
    - name: vm1
      process: 1234
      program: qemu-system-x86_64
      user: 64055
      locked_limit: null
      nodes: [/dev/iommu, /dev/kvm, /dev/vfio/devices/vfio0]
      devices: ["0000:01:00.0"]
qemu:
  description: The QEMU system emulators, each asked itself whether it has iommufd and takes passed descriptors.
  returned: success
  type: list
  elements: dict
  sample:
    - path: /usr/bin/qemu-system-x86_64
      target: /usr/bin/qemu-system-x86_64
      version: 10.0.13
      build: Debian 1:10.0.13+ds-0+deb13u1
      iommufd: true
      passing: true
      modified: 1757080993
      size: 28686560
      problem: null
qemu_package:
  description: The version of the distribution's QEMU by its package database, which a captured tree has as well.
  returned: success
  type: str
  sample: 10.0.13+ds-0+deb13u1
libvirt:
  description:
    - libvirt, and the C(cgroup_device_acl) in force. Null where it is not installed.
    - C(can_pass_iommufd) tells whether it opens C(/dev/iommu) itself. A libvirt that runs is asked
      (C(capability_source) is V(domcapabilities)), of any other the V(version) decides.
    - C(user) and C(group) are those that C(qemu.conf) sets for guests.
  returned: success
  type: dict
  sample:
    version: 11.3.0-3
    can_pass_iommufd: false
    capability_source: version
    user: null
    group: null
    units: [libvirtd.service, libvirtd.socket]
    config: /etc/libvirt/qemu.conf
    device_acl: [/dev/null, /dev/full, /dev/zero, /dev/random, /dev/urandom, /dev/ptmx, /dev/kvm, /dev/userfaultfd]
    device_acl_source: default
security:
  description: AppArmor and SELinux; null where they are not known.
  returned: success
  type: dict
  sample:
    apparmor: {enabled: true, libvirt_allows_iommu: false}
    selinux: null
memlock:
  description:
    - Limits on locked memory in KiB, null for unlimited. Those in C(/etc/security) have a user, C(@group) or C(*) as
      domain; those of systemd the type V(unit) or V(default).
  returned: success
  type: list
  elements: dict
  sample: [{domain: "@kvm", type: "-", kib: null, file: /etc/security/limits.d/kvm.conf}]
peer_to_peer:
  description:
    - What M(iommufd.host.guest_verify) saw since the last boot of whether a guest's devices reach each other over
      iommufd, for each QEMU. Empty where it was not measured.
  returned: success
  type: list
  elements: dict
  sample: [{works: true, detail: 3 BARs were mapped and none was refused, qemu: 11.1.2}]
checks:
  description:
    - The readiness checks in the order in which one would mend what they find. The ids are stable.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description: Its name.
      type: str
    status:
      description:
        - V(fail) keeps guests from using iommufd, V(warn) does not; V(skip) cannot be told or does not apply.
      type: str
    detail:
      description: What was found.
      type: str
    remedy:
      description: What to do about it on this distribution; null where there is nothing to do.
      type: str
  sample:
    - id: node.iommu
      status: fail
      detail: "/dev/iommu is not there: the module iommufd makes it, and nothing has loaded that."
      remedy: "Run `modprobe iommufd`, and write `iommufd` to /etc/modules-load.d/iommufd.conf for the next boot."
"""

import os

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils._ansible import Outcome, run_module
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._survey import pack, survey


def work(module: AnsibleModule) -> Outcome:
    root = module.params["root"]
    if not os.path.isdir(root):
        raise OptionError("root", root, "a directory that exists")
    found = survey(Host(root))
    return Outcome(result=pack(found) if module.params["packed"] else found)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "default": "/"},
            "packed": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    run_module(module, work, lock=False)


if __name__ == "__main__":
    main()
