# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What QEMU and the verification guest said on a lab host, and readers that have heard it."""

from __future__ import annotations

from ansible_collections.iommufd.host.plugins.module_utils._evidence import GuestReport, QemuWords

# Said by QEMU 10.0 on Linux 6.12 with two devices on one descriptor.
QEMU = b"""\
iommufd_backend_connect fd=22 owned=0 users=1
iommufd_cdev_connect_and_bind  [iommufd=22] Successfully bound device VFIO_FD23 (fd=23): output devid=1
iommufd_backend_map_dma  iommufd=22 ioas=2 iova=0x100000 size=0xff00000 addr=0x7f25a8100000 readonly=0 (0)
iommufd_backend_connect fd=22 owned=0 users=2
iommufd_cdev_connect_and_bind  [iommufd=22] Successfully bound device VFIO_FD24 (fd=24): output devid=2
qemu-system-x86_64: warning: IOMMU_IOAS_MAP failed: Bad address, PCI BAR?
qemu-system-x86_64: warning: IOMMU_IOAS_MAP failed: Bad address, PCI BAR?
iommufd_backend_map_dma  iommufd=22 ioas=2 iova=0xfeb40000 size=0x2000 addr=0x7f4f44ae4000 readonly=0 (-14)
qemu-system-x86_64: VFIO_FD23: PCI peer-to-peer transactions on BARs are not supported.
"""

# Said by the guest, one nvme and one edu.
GUEST = b"""\
guest init 7.75
guest kernel 6.12.117+deb13-amd64
guest loaded 8.10
guest settled 8.30
0000:00:02.0 vendor 0x1b36
0000:00:02.0 device 0x0010
0000:00:02.0 class 0x010802
0000:00:02.0 memory 0 0x00000000feb40000 0x00000000feb43fff
0000:00:02.0 driver nvme
0000:00:02.0 sha256_first ac93db71
0000:00:02.0 sha256_second ac93db71
0000:00:02.0 disk nvme0n1
0000:00:02.0 disk_bytes 67108864
0000:00:02.0 asked_bytes 2097152
0000:00:02.0 dma_bytes 2097152
0000:00:02.0 model QEMU NVMe Ctrl
0000:00:03.0 vendor 0x1234
0000:00:03.0 device 0x11e8
0000:00:03.0 class 0x00ff00
0000:00:03.0 memory 0 0x00000000fea00000 0x00000000feafffff
0000:00:03.0 config  11e81234 00100103
0000:00:03.0 bar 0 0x00000000fea00000 0x010000ED
guest ready 8.90
"""


def report(text: bytes) -> GuestReport:
    found = GuestReport()
    found.feed(text)
    return found


def words(text: bytes) -> QemuWords:
    found = QemuWords()
    found.feed(text)
    found.close()
    return found
