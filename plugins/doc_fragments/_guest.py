# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This doc fragment is private to the collection iommufd.host and can change at any time.

from __future__ import annotations

import textwrap

# Suboptions of host_plan's option verify beside those of guest_verify.
_DEVICES_AND_WHEN = r"""
devices:
  description: The devices to pass, as O(iommufd.host.guest_verify#module:devices).
  type: list
  elements: raw
  default: []
enabled:
  description: With V(false) no guest is booted.
  type: bool
  default: true
when:
  description:
    - V(always) boots a guest at each run.
    - V(changed) boots none where nothing is to be done and everything that a guest depends on is as it was when one was
      verified on this host.
  type: str
  choices: [always, changed]
  default: always
max_age:
  description: With O(verify.when=changed), after how many days a guest is booted all the same.
  type: int
  default: 7
"""


class ModuleDocFragment:
    # What a guest is verified with: options of guest_verify, and suboptions of host_plan.
    DOCUMENTATION = r"""
options:
  launcher:
    description:
      - Who opens the nodes and starts QEMU.
      - V(direct) is the module itself, which passes the descriptors.
      - V(systemd) is a transient unit with C(OpenFile) and C(DevicePolicy=closed), as
        P(iommufd.host.guest_units#filter) writes them. It needs systemd 253.
      - V(libvirt) is a transient domain. Descriptors for iommufd are passed by libvirt 12.1 and later.
      - With V(self) QEMU opens the nodes as O(user), whom the host has to let (the role C(iommufd.host.access) in mode
        C(group)).
    type: str
    choices: [direct, systemd, libvirt, self]
    default: direct
    version_added: 0.2.0
  started_by:
    description:
      - Who starts a QEMU that opens the nodes itself. V(libvirt) is the way of a libvirt before 12.1, with the
        devices on QEMU's command line.
      - Only with O(launcher=self).
    type: str
    choices: [module, libvirt]
    default: module
    version_added: 0.2.0
  backend:
    description:
      - How the devices reach the guest.
      - V(iommufd) is one descriptor of C(/dev/iommu) for all of them.
      - V(legacy) is the container C(/dev/vfio/vfio) and a node for each IOMMU group. Descriptors cannot be passed to
        it, so QEMU opens them; with V(direct) in a C(/dev/vfio) of its own.
      - V(auto) is V(iommufd) where kernel and QEMU map devices for each other, which is measured by trying, once for
        each boot and QEMU. Where they do not, it is V(iommufd) for a single PCI device when no hot-plug is expected,
        else V(legacy). The reason is in RV(iommufd.host.guest_verify#module:evidence.decision).
    type: str
    choices: [legacy, iommufd, auto]
    default: iommufd
  backends:
    description:
      - PCI address to V(legacy) or V(iommufd), for devices that shall be on another one than the guest. There is no
        mixture that was not asked for here.
    type: dict
    default: {}
    version_added: 0.2.0
  iommufds:
    description:
      - PCI address to the name of an iommufd object of QEMU, for devices that shall not be on the usual one,
        C(iommufd0). Each object has a descriptor of C(/dev/iommu) of its own.
    type: dict
    default: {}
    version_added: 0.2.0
  hot_plug:
    description:
      - Devices that are plugged in while the guest runs, one after the other, used there and taken out again. Selectors
        as in O(devices).
      - With V(direct) and V(systemd) the descriptor is passed over QEMU's monitor. Not with V(libvirt).
    type: list
    elements: raw
    default: []
    version_added: 0.2.0
  hot_plug_expected:
    description: Whether to choose the backend as for a guest into which devices may be plugged.
    type: bool
    default: false
    version_added: 0.2.0
  expendable:
    description:
      - PCI addresses of disks of which the last MiB may be written. It is read back, and its old content is lost.
    type: list
    elements: str
    default: []
    version_added: 0.2.0
  arp_target:
    description:
      - An address of IPv4 that each network device with a link asks for, three times, as a newcomer asks whether
        somebody has it. An answer proves that frames go both ways. Without it no frame is sent.
    type: str
    version_added: 0.2.0
  qemu:
    description:
      - The QEMU to use, as an absolute path.
      - Without it, the one that M(iommufd.host.qemu_install) made current, or else the distribution's, as it is found
        in the standard directories.
    type: path
  user:
    description: The user that QEMU runs as. It must not be root. libvirt has a user of its own for its guests.
    type: str
    default: nobody
  memory:
    description: Memory of the guest in MiB. All of it is pinned.
    type: int
    default: 256
  cpus:
    description: Processors of the guest.
    type: int
    default: 1
  memlock:
    description: Limit of memory that QEMU may lock, in MiB. Without it, what the guest takes; libvirt sets its own.
    type: int
    version_added: 0.2.0
  accelerator:
    description:
      - How the guest's processor is made.
      - V(auto) takes KVM where the processor offers it and C(/dev/kvm) works, and software (TCG) otherwise.
    type: str
    choices: [auto, kvm, tcg]
    default: auto
  timeout:
    description: Seconds from the start of QEMU to its end. It is killed then.
    type: int
    default: 600
  busybox:
    description: The busybox to put into the guest. Without it, the one in the standard directories.
    type: path
"""

    # All of the option verify but its description, since of an option with suboptions a fragment gives all or none.
    VERIFY: str = "options:\n  verify:\n    suboptions:\n" + textwrap.indent(
        _DEVICES_AND_WHEN + textwrap.dedent(DOCUMENTATION.partition("options:\n")[2]).replace("O(", "O(verify."),
        "      ",
    )
