# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The survey of a host: everything that decides whether guests can have its devices over iommufd."""

from __future__ import annotations

import os
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._checks import run_checks
from ansible_collections.iommufd.host.plugins.module_utils._distribution import read_distribution
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import (
    Group,
    by_address,
    is_vfio_driver,
    read_groups,
    read_units,
    viable_with,
)
from ansible_collections.iommufd.host.plugins.module_utils._kernel import (
    ModuleIndex,
    arguments,
    command_line,
    installed_releases,
    read_config,
)
from ansible_collections.iommufd.host.plugins.module_utils._libvirt import read_libvirt_facts
from ansible_collections.iommufd.host.plugins.module_utils._memory import remembered
from ansible_collections.iommufd.host.plugins.module_utils._names import read_names
from ansible_collections.iommufd.host.plugins.module_utils._nodes import read_nodes
from ansible_collections.iommufd.host.plugins.module_utils._pci import DEVICES, Function, read_functions
from ansible_collections.iommufd.host.plugins.module_utils._qemu import DIRECTORIES, read_qemus
from ansible_collections.iommufd.host.plugins.module_utils._security import read_memlock, read_security
from ansible_collections.iommufd.host.plugins.module_utils._selectors import view
from ansible_collections.iommufd.host.plugins.module_utils._usage import Use, survey_uses
from ansible_collections.iommufd.host.plugins.module_utils._vfio import cdev_supported

# The options of the kernel that decide something here.
_OPTIONS = (
    "IOMMUFD",
    "IOMMUFD_VFIO_CONTAINER",
    "VFIO",
    "VFIO_DEVICE_CDEV",
    "VFIO_GROUP",
    "VFIO_CONTAINER",
    "VFIO_IOMMU_TYPE1",
    "VFIO_NOIOMMU",
    "VFIO_PCI",
    "VFIO_PCI_DMABUF",
    "INTEL_IOMMU",
    "INTEL_IOMMU_DEFAULT_ON",
    "INTEL_IOMMU_DEFAULT_ON_INTGPU_OFF",
    "AMD_IOMMU",
    "ARM_SMMU_V3",
    "VIRTIO_IOMMU",
    "IRQ_REMAP",
    "IOMMU_DEFAULT_PASSTHROUGH",
    "KVM",
    "PCI_IOV",
    "MODULE_SIG_FORCE",
)

_MODULES = (
    "iommufd",
    "vfio",
    "vfio_iommu_type1",
    "vfio_pci_core",
    "vfio_pci",
    "kvm",
    "kvm_intel",
    "kvm_amd",
)

# The ACPI table that describes the IOMMU, by platform: Intel, AMD, Arm, virtio-iommu.
_TABLES = ("DMAR", "IVRS", "IORT", "VIOT")


def survey(host: Host) -> dict[str, t.Any]:
    """Survey a host in one pass. What a captured tree lacks is None; nothing is changed, nothing raised.

    Returns:
        A dict with ``distribution``, ``kernel``, ``iommu``, ``nodes``, ``groups``, ``devices``, ``guests``, ``qemu``,
        ``libvirt``, ``security``, ``memlock`` and ``checks``, of plain types only.
    """
    functions = read_functions(host)
    uses, guests = survey_uses(host, functions)
    groups, known = read_groups(host), by_address(functions)
    index = ModuleIndex(host)
    libvirt = read_libvirt_facts(host)
    has_sys = host.is_dir("/sys")
    result: dict[str, t.Any] = {
        "distribution": read_distribution(host).to_dict(),
        "kernel": _kernel(host, index),
        "iommu": _iommu(host) if has_sys else None,
        "nodes": read_nodes(host).to_dict() if host.is_dir("/dev") else None,
        "groups": [_group(group, known) for group in groups.values()] if has_sys else None,
        "devices": _devices(host, functions, uses, index) if host.is_dir(DEVICES) else None,
        "guests": [guest.to_dict() for guest in guests] if host.is_dir("/proc") else None,
        "qemu": [one.to_dict() for one in read_qemus(host)] if any(map(host.is_dir, DIRECTORIES)) else None,
        "libvirt": libvirt.to_dict() if libvirt is not None else None,
        "security": read_security(host),
        "memlock": read_memlock(host),
    }
    result["checks"] = [check.to_dict() for check in run_checks(result)]
    return result


def _kernel(host: Host, index: ModuleIndex) -> dict[str, t.Any]:
    config = read_config(host, index.kernel)
    line = command_line(host)
    vendor, virtualization = _processor(host)
    known = index.kernel is not None and (bool(index.files) or index.loaded is not None)
    return {
        "release": index.kernel,
        "installed": installed_releases(host),
        "architecture": os.uname().machine if host.live else None,
        "cpu_vendor": vendor,
        "virtualization": virtualization,
        "config": None
        if config is None
        else {"source": config.source, "options": {name: config.get(name) for name in _OPTIONS}},
        "command_line": line,
        "arguments": arguments(line) if line is not None else None,
        "modules": {name: index.state(name).to_dict() for name in _MODULES} if known else None,
        "vfio_cdev": cdev_supported(host),
    }


def _processor(host: Host) -> tuple[str | None, str | None]:
    """Vendor, and the flag of hardware virtualization: "vmx", "svm", "" for none, None where it is not known.

    The flag decides, not /dev/kvm: the node can be there and of no use.
    """
    # The first processor's paragraph is enough; on a large machine the whole file has megabytes.
    text = (host.read_text("/proc/cpuinfo", 16384) or "").partition("\n\n")[0]
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    if flags is None:
        return (vendor[1] if vendor else None), None
    found = [flag for flag in ("vmx", "svm") if flag in flags[1].split()]
    return (vendor[1] if vendor else None), (found[0] if found else "")


def _iommu(host: Host) -> dict[str, t.Any]:
    tables = host.listdir("/sys/firmware/acpi/tables")
    unsafe = {}
    for module in ("vfio_iommu_type1", "iommufd"):
        value = host.read_line(f"/sys/module/{module}/parameters/allow_unsafe_interrupts")
        unsafe[module] = {"Y": True, "N": False, "1": True, "0": False}.get(value or "")
    return {
        "enabled": bool(host.listdir("/sys/kernel/iommu_groups")),
        "units": [{"name": unit.name, "kind": unit.kind} for unit in read_units(host)],
        "firmware": next((table for table in _TABLES if table in tables), None),
        "firmware_known": bool(tables),
        "interrupt_isolation": _interrupt_isolation(host.read_text("/proc/interrupts", 1 << 20)),
        "unsafe_interrupts": unsafe,
    }


def _interrupt_isolation(text: str | None) -> bool | None:
    """Whether a device's interrupts are kept to those that it was given, by the names of the interrupt chips.

    x86 writes "IR-" before the chips behind remapping (IR-PCI-MSI, IR-IO-APIC); Arm's ITS always translates.
    """
    if text is None:
        return None
    if re.search(r"\s(IR-(PCI|IO-APIC|HPET)|ITS-)", text):
        return True
    return False if re.search(r"\s(PCI-MSI|IO-APIC)", text) else None


def _group(group: Group, functions: t.Mapping[str, Function]) -> dict[str, t.Any]:
    members = [functions[address] for address in group.members if address in functions]
    return {
        "number": group.number,
        "type": group.type,
        "devices": group.members,
        "others": group.others,
        "reserved_regions": None if group.regions is None else [region.to_dict() for region in group.regions],
        "blocking": [function.address for function in viable_with(group, functions)],
        "vfio": [function.address for function in members if function.driver and is_vfio_driver(function.driver)],
    }


def _devices(
    host: Host, functions: t.Sequence[Function], uses: t.Mapping[str, t.Sequence[Use]], index: ModuleIndex
) -> list[dict[str, t.Any]]:
    names, memory = read_names(host, functions), remembered(host, functions)
    devices = []
    for function in functions:
        device = view(function, names.get(function.address), memory.get(function.address))
        device["vfio_drivers"] = index.vfio_drivers_for(function.modalias) if function.modalias else []
        device["in_use"] = [use.to_dict() for use in uses.get(function.address, ())]
        devices.append(device)
    return devices
