# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Names for PCI classes, and for the vendors that hypervisors are full of.

Not the whole of pci.ids: a report shall not differ by what happens to be installed where it is made.
"""

from __future__ import annotations

# Class codes: PCI Code and ID Assignment Specification, Appendix D of the PCI Local Bus Specification.
_BASE = {
    "00": "Unclassified",
    "01": "Storage controller",
    "02": "Network controller",
    "03": "Display controller",
    "04": "Multimedia",
    "05": "Memory controller",
    "06": "Bridge",
    "07": "Communication controller",
    "08": "System peripheral",
    "09": "Input device",
    "0a": "Docking station",
    "0b": "Processor",
    "0c": "Serial bus controller",
    "0d": "Wireless controller",
    "0e": "Intelligent controller",
    "0f": "Satellite controller",
    "10": "Encryption controller",
    "11": "Signal processing",
    "12": "Processing accelerator",
    "13": "Instrumentation",
    "40": "Coprocessor",
    "ff": "Other",
}

_SUB = {
    "0100": "SCSI storage",
    "0101": "IDE controller",
    "0104": "RAID controller",
    "0106": "SATA controller",
    "0107": "SAS controller",
    "0108": "NVMe storage",
    "0200": "Ethernet",
    "0207": "InfiniBand",
    "0208": "Fabric",
    "0300": "VGA display",
    "0302": "3D controller",
    "0401": "Audio",
    "0403": "Audio",
    "0502": "CXL memory",
    "0600": "Host bridge",
    "0601": "ISA bridge",
    "0604": "PCI bridge",
    "0700": "Serial port",
    "0780": "Communication controller",
    "0806": "IOMMU",
    "0c03": "USB controller",
    "0c05": "SMBus",
    "0c06": "InfiniBand",
    "1000": "Network encryption",
    "1101": "Performance counters",
}

# Vendor ids: the PCI-SIG's member list.
_VENDORS = {
    "1000": "Broadcom LSI",
    "1002": "AMD",
    "1013": "Cirrus Logic",
    "1014": "IBM",
    "1022": "AMD",
    "102b": "Matrox",
    "103c": "HP",
    "1077": "QLogic",
    "10de": "NVIDIA",
    "10df": "Emulex",
    "10ec": "Realtek",
    "10ee": "Xilinx",
    "1137": "Cisco",
    "1179": "Toshiba",
    "11f8": "Microchip",
    "1234": "QEMU",
    "1344": "Micron",
    "1425": "Chelsio",
    "144d": "Samsung",
    "14e4": "Broadcom",
    "15ad": "VMware",
    "15b3": "NVIDIA Mellanox",
    "15b7": "SanDisk",
    "1657": "Brocade",
    "177d": "Cavium",
    "17cb": "Qualcomm",
    "1912": "Renesas",
    "1924": "Solarflare",
    "19e5": "Huawei",
    "1a03": "ASPEED",
    "1af4": "Red Hat",
    "1b21": "ASMedia",
    "1b36": "Red Hat",
    "1b4b": "Marvell",
    "1bb1": "Seagate",
    "1c5c": "SK hynix",
    "1d0f": "Amazon",
    "1d6a": "Aquantia",
    "1dd8": "AMD Pensando",
    "1e0f": "KIOXIA",
    "8086": "Intel",
    "9005": "Adaptec",
}


def class_name(code: str) -> str | None:
    """The name of a class code as six hexadecimal digits ("020000"); None for one that is not known."""
    return _SUB.get(code[:4]) or _BASE.get(code[:2])


def vendor_name(vendor: str) -> str | None:
    """The name of a vendor id as four hexadecimal digits ("10de"); None for one that is not in the list."""
    return _VENDORS.get(vendor)
