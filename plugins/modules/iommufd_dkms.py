#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: iommufd_dkms
short_description: Give a kernel that was built without iommufd the modules for it
version_added: 0.1.0
author:
  - The iommufd.host authors (@iommufd)
description:
  - Debian builds its kernels without C(CONFIG_IOMMUFD). This module compiles C(iommufd) and the C(vfio) modules, which
    must match it, from the kernel's own sources (package C(linux-source-X.Y)) against the stock headers, and has DKMS
    install them beside the stock kernel. A kernel that has iommufd of its own is left alone.
  - DKMS builds them again for each new kernel, in the kernel's own installation. The sources are taken anew from the
    distribution's tarball when that has changed, which the same upgrade usually brings. Where the tarball is of
    another point release of the same series, it is used all the same. Within a stable series these directories
    change by fixes only, and a difference that matters does not compile. A kernel of a series without sources is
    skipped, so that it can be installed. DKMS says so then, and its log names the package; run this module again.
  - Run with Linux 6.12 (trixie), 7.2 (forky) and 7.3 (trixie-backports).
  - Where the kernel follows the distribution's own series (package C(linux-image-FLAVOUR), not from backports), the
    package C(linux-source) is installed too, so that a kernel of the next series comes with its sources.
  - An initramfs that is configured to hold C(vfio) is made anew, for the C(vfio) in there is the one that stays loaded.
  - What is missing for the build is installed, without recommended packages, and remembered in
    C(/etc/iommufd-host/packages). With O(state=absent) exactly that is purged.
  - A build that fails leaves nothing behind. An interrupted run is completed, or taken back, by the next one.
  - With Secure Boot, DKMS signs the modules with the machine's own key. That key must be enrolled once by a person at
    the console; RV(secure_boot) says whether it is, and a warning says what to do where it is not.
  - The rebuilt vfio does not fit stock modules that embed its structures, C(kvmgt) (virtual Intel GPUs) on Debian. The
    kernel refuses to load that one, by its symbol versions.
options:
  state:
    description:
      - With V(present) the running kernel, the newest installed one, and every other one whose headers are installed
        have iommufd.
      - With V(absent) the modules, the DKMS package with its sources, and the packages that came with them are gone,
        and the kernels have their own vfio modules back.
    type: str
    choices: [present, absent]
    default: present
  install_packages:
    description:
      - Install what is missing for the build. C(dkms), the kernel's headers and sources, with what they need in turn.
      - With V(false), missing packages are an error that names them.
    type: bool
    default: true
  source:
    description:
      - A kernel source tarball on the host, of the running kernel's series. It must have the kernel's tree in one top
        directory, and a compression that C(tar) knows.
      - By default that of the distribution, C(/usr/src/linux-source-X.Y.tar.xz).
    type: path
requirements:
  - Debian or a derivative with Linux 6.6 or later.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.changes
seealso:
  - module: iommufd.host.kernel_modules
    description: Loads the modules, now and at every boot.
"""

EXAMPLES = r"""
- name: Have iommufd on a stock Debian kernel
  iommufd.host.iommufd_dkms:

- name: With packages that are there already
  iommufd.host.iommufd_dkms:
    install_packages: false

- name: As it was
  iommufd.host.iommufd_dkms:
    state: absent
"""

RETURN = r"""
needed:
  description: Whether the running kernel needs the modules, that is, has no iommufd of its own.
  returned: success
  type: bool
  sample: true
reason:
  description: Why, or why not.
  returned: success
  type: str
  sample: its iommufd was built by DKMS
kernels:
  description: Every installed kernel, oldest first. In check mode as they are before.
  returned: success
  type: list
  elements: dict
  contains:
    release:
      description: As C(uname -r) says it.
      type: str
    running:
      description: Whether it runs now.
      type: bool
    newest:
      description: Whether it is the newest, the one that usually boots next.
      type: bool
    state:
      description: V(native) (iommufd of its own), V(dkms), V(partial) (interrupted), V(missing) or V(unsupported).
      type: str
    reason:
      description: The state in words.
      type: str
  sample:
    - newest: true
      reason: its iommufd was built by DKMS
      release: 6.12.117+deb13-amd64
      running: true
      state: dkms
source:
  description: Where the sources for the running kernel come from. Null where nothing needs building.
  returned: success
  type: dict
  sample: {package: linux-source-6.12, tarball: /usr/src/linux-source-6.12.tar.xz, version: 6.12.117}
packages_installed:
  description: Packages that were (in check mode, would be) installed. Before the package lists have been fetched, only
    those that are named, without what they need in turn.
  returned: success
  type: list
  elements: str
  sample: [dkms, linux-headers-6.12.117+deb13-amd64, linux-source-6.12]
packages_purged:
  description: Packages that were (in check mode, would be) purged.
  returned: success
  type: list
  elements: str
  sample: []
packages_kept:
  description: Packages that came with the modules and stay with O(state=absent), with the reason.
  returned: success
  type: dict
  sample: {make: build-essential needs it}
secure_boot:
  description: Whether the kernel loads signed modules only, and whether the key that DKMS signs with is trusted.
  returned: success
  type: dict
  contains:
    enabled:
      description: Null on a machine without UEFI.
      type: bool
    certificate:
      description: Certificate of DKMS's key. It is enrolled with C(mokutil --import) and a reboot.
      type: str
    enrolled:
      description: Null where that cannot be told.
      type: bool
  sample: {certificate: /var/lib/dkms/mok.pub, enabled: null, enrolled: null}
reboot_required:
  description: Whether the host must be rebooted for this to take effect.
  returned: success
  type: bool
  sample: false
reboot_reasons:
  description: Why.
  returned: success
  type: list
  elements: str
  sample: []
log:
  description: The last lines of the build's log.
  returned: when the build failed
  type: list
  elements: str
plan:
  description: The steps, in order.
  returned: success
  type: list
  elements: str
  sample:
    - build and install iommufd and vfio for kernel 6.12.117+deb13-amd64 with DKMS
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _task_iommufd_dkms as task
from ansible_collections.iommufd.host.plugins.module_utils._ansible import run_task


def main() -> None:
    run_task(AnsibleModule(argument_spec=task.ARGUMENT_SPEC, supports_check_mode=True), task.work)


if __name__ == "__main__":
    main()
