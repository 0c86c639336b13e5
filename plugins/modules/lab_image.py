#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_image
short_description: Build the disk image of disposable lab hosts
version_added: 0.1.0
description:
  - Builds a bootable disk image from a distribution's packages, or finds it in the cache.
  - The key of an image is a hash of all that goes into it, so that another package, size or version of the recipe
    is another image. Two builds of the same image wait for each other.
  - The image boots by the distribution's own boot loader, so that kernel arguments and reboots are real.
  - Runs on the machine that shall emulate the hosts, usually the controller. A user other than root needs subordinate
    ids (C(/etc/subuid)) and C(newuidmap).
author:
  - The iommufd.host authors (@iommufd)
requirements:
  - mmdebstrap, mkfs.ext4, qemu-img and qemu-system-x86_64 8.0 or later
  - for arm64, qemu-system-aarch64 and its firmware (C(qemu-efi-aarch64)) in place of qemu-system-x86_64
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.changes
options:
  distribution:
    description: The distribution to install.
    type: str
    choices: [trixie, bookworm, forky]
    default: trixie
  packages:
    description:
      - Packages to install beyond those that every lab host has.
      - With V(dracut) it makes the initramfs, and initramfs-tools is left out.
    type: list
    elements: str
    default: []
  size:
    description: Size of the disk, with the suffix V(M), V(G) or V(T). The file takes only what is used of it.
    type: str
    default: 8G
  kernel_arguments:
    description:
      - Arguments on the image's kernel command line, such as V(intel_iommu=off) for hosts on which turning on the IOMMU
        shall make a difference. Debian's kernel turns on an Intel IOMMU by itself.
    type: list
    elements: str
    default: []
  iommufd:
    description:
      - Have in the image already what M(iommufd.host.iommufd_dkms) would put on the hosts, built in seconds on this
        machine in place of minutes on an emulated processor. For hosts on which something else is to be tried.
    type: bool
    default: false
    version_added: 0.2.0
  architecture:
    description:
      - The processor of the hosts, by its name in Debian. Hosts for V(arm64) boot by UEFI and can have an SMMUv3.
      - An image for another processor than this machine's needs C(arch-test) and the emulator for single programs
        (C(qemu-user-binfmt)).
    type: str
    choices: [amd64, arm64]
    default: amd64
    version_added: 0.2.0
  mirror:
    description: Where to fetch packages from; without it mmdebstrap's own choice for the distribution.
    type: str
  check_valid_until:
    description:
      - Whether to refuse a package index that is past its date of expiry.
      - V(false) is for mirrors that lag behind.
    type: bool
    default: true
  cache_dir:
    description: Directory of the finished images.
    type: path
    default: ~/.cache/iommufd-host/images
seealso:
  - module: iommufd.host.lab_host
"""

EXAMPLES = r"""
- name: Have an image of Debian 13 with libvirt
  iommufd.host.lab_image:
    distribution: trixie
    packages:
      - libvirt-daemon-system
  delegate_to: localhost
  register: image
"""

RETURN = r"""
path:
  description: Path of the image. In check mode it may not exist yet.
  returned: success
  type: str
  sample: /root/.cache/iommufd-host/images/trixie-728e1d532c2adf19/disk.qcow2
key:
  description: Hash of all inputs of the build.
  returned: success
  type: str
  sample: 728e1d532c2adf19
seconds:
  description: How long the build took, V(0) where the image was in the cache.
  returned: success
  type: float
  sample: 87.9
"""

import os
import time
import typing as t
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils._ansible import Outcome, run_module
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._lab_image import build_image, image_path, parse_image
from ansible_collections.iommufd.host.plugins.module_utils._plan import Action, Plan


def work(module: AnsibleModule) -> Outcome:
    """Plan the build, where there is no such image yet."""
    params: dict[str, t.Any] = module.params
    spec = parse_image(
        params["distribution"],
        params["packages"],
        params["size"],
        params["mirror"],
        params["check_valid_until"],
        params["kernel_arguments"],
        params["iommufd"],
        params["architecture"],
    )
    cache = Path(os.path.abspath(params["cache_dir"]))
    path = image_path(spec, cache)
    result = {"path": str(path), "key": spec.key(), "seconds": 0.0}
    if path.is_file():
        return Outcome(result=result)
    built: dict[str, t.Any] = {}

    def build() -> None:
        started = time.monotonic()
        built["changed"] = build_image(spec, cache, Host())
        built["seconds"] = round(time.monotonic() - started, 1)

    step = Action(f"build image {path}", str(path), after=f"{spec.describe()}\n", do=build)
    return Outcome(plan=Plan([step]), result=result, after=lambda: built)


def main() -> None:
    run_module(
        AnsibleModule(
            argument_spec={
                "distribution": {"type": "str", "choices": ["trixie", "bookworm", "forky"], "default": "trixie"},
                "packages": {"type": "list", "elements": "str", "default": []},
                "size": {"type": "str", "default": "8G"},
                "kernel_arguments": {"type": "list", "elements": "str", "default": []},
                "iommufd": {"type": "bool", "default": False},
                "architecture": {"type": "str", "choices": ["amd64", "arm64"], "default": "amd64"},
                "mirror": {"type": "str"},
                "check_valid_until": {"type": "bool", "default": True},
                "cache_dir": {"type": "path", "default": "~/.cache/iommufd-host/images"},
            },
            supports_check_mode=True,
        ),
        work,
        lock=False,
    )


if __name__ == "__main__":
    main()
