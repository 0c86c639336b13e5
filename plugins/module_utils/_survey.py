# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The survey of a host: everything that decides whether guests can have its devices over iommufd."""

from __future__ import annotations

import base64
import json
import os
import re
import typing as t
import zlib

from ansible_collections.iommufd.host.plugins.module_utils import _peer_to_peer
from ansible_collections.iommufd.host.plugins.module_utils._checks import run_checks
from ansible_collections.iommufd.host.plugins.module_utils._distribution import read_distribution
from ansible_collections.iommufd.host.plugins.module_utils._given_away import remembered
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import (
    GROUPS,
    Group,
    by_address,
    is_vfio_driver,
    read_groups,
    read_units,
    viable_with,
)
from ansible_collections.iommufd.host.plugins.module_utils._kernel import (
    ModuleIndex,
    Release,
    arguments,
    command_line,
    decisive_release,
    installed_releases,
    read_config,
)
from ansible_collections.iommufd.host.plugins.module_utils._libvirt import read_libvirt_facts
from ansible_collections.iommufd.host.plugins.module_utils._names import read_names
from ansible_collections.iommufd.host.plugins.module_utils._nodes import has_nodes, read_nodes
from ansible_collections.iommufd.host.plugins.module_utils._pci import DEVICES, Function, read_functions
from ansible_collections.iommufd.host.plugins.module_utils._qemu import DIRECTORIES, package_version, read_qemus
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

# One line of each is enough to know its chip, and the first hundreds have all there are.
_MOST_INTERRUPTS = 512

# The ACPI table that describes the IOMMU, by platform: Intel, AMD, Arm, virtio-iommu.
_TABLES = ("DMAR", "IVRS", "IORT", "VIOT")


def survey(host: Host) -> dict[str, t.Any]:
    """Survey a host in one pass. What a captured tree lacks is None; nothing is changed, nothing raised.

    Returns:
        A dict with ``live``, ``distribution``, ``kernel``, ``iommu``, ``nodes``, ``groups``, ``devices``, ``guests``,
        ``qemu``, ``qemu_package``, ``libvirt``, ``security``, ``memlock``, ``peer_to_peer`` and ``checks``, of plain
        types only.
    """
    functions = read_functions(host)
    uses, guests = survey_uses(host, functions)
    groups, known = read_groups(host, functions), by_address(functions)
    kernel = decisive_release(host)
    index = ModuleIndex(host, kernel.name)
    libvirt = read_libvirt_facts(host)
    has_sys = host.is_dir("/sys")
    result: dict[str, t.Any] = {
        "live": host.live,
        "distribution": read_distribution(host).to_dict(),
        "kernel": _kernel(host, kernel, index),
        "iommu": _iommu(host, functions, groups) if has_sys else None,
        "nodes": read_nodes(host).to_dict() if has_nodes(host) else None,
        "groups": [_group(group, known) for group in groups.values()] if has_sys else None,
        "devices": _devices(host, functions, uses, index) if functions or host.is_dir(DEVICES) else None,
        "guests": [guest.to_dict() for guest in guests] if _has_processes(host) else None,
        "qemu": [one.to_dict() for one in read_qemus(host)] if any(map(host.is_dir, DIRECTORIES)) else None,
        "qemu_package": package_version(host),
        "libvirt": libvirt.to_dict() if libvirt is not None else None,
        "security": read_security(host),
        "memlock": read_memlock(host),
        "peer_to_peer": [
            {key: one.get(key) for key in ("works", "detail", "qemu")}
            for one in _peer_to_peer.read_all(host)
            if one["kernel"] == kernel.name
        ],
    }
    result["checks"] = [check.to_dict() for check in run_checks(result)]
    return result


def pack(found: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """A survey as the controller of a fleet holds it: the checks, and all else as ``packed``, a tenth of its size."""
    rest = {name: value for name, value in found.items() if name != "checks"}
    return {
        "checks": found["checks"],
        "packed": base64.b64encode(zlib.compress(json.dumps(rest).encode())).decode(),
    }


def _has_processes(host: Host) -> bool:
    """Whether a tree shows processes: a report has some files of /proc, but not these."""
    return host.live or any(name.isdigit() for name in host.listdir("/proc"))


def _kernel(host: Host, kernel: Release, index: ModuleIndex) -> dict[str, t.Any]:
    config = read_config(host, index.kernel)
    line = command_line(host)
    vendor, virtualization, virtual_machine = _processor(host)
    known = index.kernel is not None and (bool(index.files) or index.loaded is not None)
    return {
        "release": kernel.name,
        "release_source": kernel.source,
        "installed": installed_releases(host),
        "architecture": _architecture(host, kernel.name),
        "cpu_vendor": vendor,
        "virtualization": virtualization,
        "virtual_machine": virtual_machine,
        "config": None
        if config is None
        else {"source": config.source, "options": {name: config.known(name) for name in _OPTIONS}},
        "command_line": line,
        "arguments": arguments(line) if line is not None else None,
        "modules": {name: index.state(name).to_dict() for name in _MODULES} if known else None,
        "vfio_cdev": cdev_supported(host),
    }


# e_machine in the header of an ELF file (elf.h), as `uname -m` says it.
_MACHINES = {3: "i686", 21: "ppc64le", 22: "s390x", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_MACHINES_OF_DEBIAN = {"amd64": "x86_64", "arm64": "aarch64", "ppc64el": "ppc64le"}


def _architecture(host: Host, release: str | None) -> str | None:
    """What `uname -m` says; of a captured tree what the release's name or a program in it says."""
    if host.live:
        return os.uname().machine
    suffix = re.split(r"[.-]", release or "")[-1]
    suffix = _MACHINES_OF_DEBIAN.get(suffix, suffix)
    if suffix in _MACHINES.values():
        return suffix
    for program in ("/usr/bin/env", "/bin/sh", "/usr/lib/systemd/systemd"):
        header = host.read_bytes(program, 20) or b""
        if header[:4] == b"\x7fELF" and len(header) == 20:
            return _MACHINES.get(int.from_bytes(header[18:20], "big" if header[5] == 2 else "little"))
    return None


def _processor(host: Host) -> tuple[str | None, str | None, bool | None]:
    """Vendor, the flag of hardware virtualization ("vmx", "svm", "" for none), and whether this is itself a virtual
    machine; None each where it is not known.

    The flag decides, not /dev/kvm: the node can be there and of no use.
    """
    # The first processor's paragraph is enough; on a large machine the whole file has megabytes.
    text = (host.read_text("/proc/cpuinfo", 16384) or "").partition("\n\n")[0]
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    if flags is None:
        return (vendor[1] if vendor else None), None, None
    found = [flag for flag in ("vmx", "svm") if flag in flags[1].split()]
    return (vendor[1] if vendor else None), (found[0] if found else ""), "hypervisor" in flags[1].split()


def _iommu(host: Host, functions: t.Sequence[Function], groups: t.Mapping[int, Group]) -> dict[str, t.Any]:
    tables = host.listdir("/sys/firmware/acpi/tables")
    unsafe = {}
    for module in ("vfio_iommu_type1", "iommufd"):
        value = host.read_line(f"/sys/module/{module}/parameters/allow_unsafe_interrupts")
        unsafe[module] = {"Y": True, "N": False, "1": True, "0": False}.get(value or "")
    return {
        # No group proves something only where functions, or the empty directory, were captured as well.
        "enabled": bool(groups) if groups or functions or host.is_dir(GROUPS) else None,
        "units": [{"name": unit.name, "kind": unit.kind} for unit in read_units(host)],
        "firmware": next((table for table in _TABLES if table in tables), None),
        "firmware_known": bool(tables),
        "interrupt_isolation": _interrupt_isolation(host),
        "unsafe_interrupts": unsafe,
    }


def _interrupt_isolation(host: Host) -> bool | None:
    """Whether a device's interrupts are kept to those that it was given, by the names of the interrupt chips.

    x86 writes "IR-" before the chips behind remapping (IR-PCI-MSI, IR-IO-APIC); Arm's ITS always translates. A tree
    without /proc/interrupts may have the chips' names one by one, or the kernel's log.
    """
    chips = host.read_text("/proc/interrupts", 1 << 20)
    if chips is None:
        numbers = host.listdir("/sys/kernel/irq")[:_MOST_INTERRUPTS]
        names = {host.read_line(f"/sys/kernel/irq/{number}/chip_name") for number in numbers}
        chips = " ".join(["", *sorted(filter(None, names))])
    if re.search(r"\s(IR-(PCI|IO-APIC|HPET)|ITS-)", chips):
        return True
    if re.search(r"\s(PCI-MSI|IO-APIC)", chips):
        return False
    for path in ("/var/log/dmesg", "/sos_commands/kernel/dmesg"):
        # drivers/iommu/intel/irq_remapping.c, drivers/iommu/amd/init.c
        if re.search(r"DMAR-IR: Enabled IRQ remapping|AMD-Vi: Interrupt remapping enabled", host.read_text(path) or ""):
            return True
    return None


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
