# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Readiness checks: what stands between a host and a guest on iommufd, each with a remedy a person can follow.

Every check is a pure function of the survey (:mod:`_survey`): it can run wherever the survey's data is, also on the
controller. The ids are stable; others match on them.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

OK = "ok"
WARN = "warn"
FAIL = "fail"
SKIP = "skip"

# What Debian's own kernels are called: 6.12.95+deb13-amd64, 6.1.0-25-cloud-amd64, 6.12.30+bpo-686-pae.
_DEBIAN_KERNEL = re.compile(r"-(amd64|arm64|arm64-16k|686|686-pae|armmp|armmp-lpae|powerpc64le|riscv64|loong64|s390x)$")

Survey = t.Mapping[str, t.Any]


@dataclasses.dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        id: stable and dotted ("iommu.enabled").
        status: ok, warn (works, but not as it should), fail (no guest on iommufd until mended), skip (cannot be told,
            or does not apply).
        detail: what was found, in one or two sentences.
        remedy: what to do about it on this distribution; None where there is nothing to do.
    """

    id: str
    status: str
    detail: str
    remedy: str | None = None

    def to_dict(self) -> dict[str, t.Any]:
        return dataclasses.asdict(self)


def run_checks(survey: Survey) -> list[Check]:
    """All checks, in the order in which a person would mend what they find."""
    return [
        _iommu_enabled(survey),
        _interrupt_remapping(survey),
        _kernel_iommufd(survey),
        _kernel_cdev(survey),
        _kernel_arguments(survey),
        _node_iommu(survey),
        _node_permissions(survey),
        _device_cdev(survey),
        _group_viable(survey),
        _kvm(survey),
        _qemu_iommufd(survey),
        _qemu_peer_to_peer(survey),
        _libvirt_iommufd(survey),
        _libvirt_acl(survey),
        _apparmor(survey),
        _selinux(survey),
        _memlock(survey),
    ]


# -- words of the distributions ----------------------------------------------------------------------------------------


def _family(survey: Survey) -> str:
    return str((survey.get("distribution") or {}).get("family") or "other")


def add_argument(family: str, argument: str) -> str:
    """How a kernel argument is added on a distribution, in words."""
    if family == "debian":
        return f"add {argument} to GRUB_CMDLINE_LINUX in /etc/default/grub, run `update-grub` and reboot"
    if family == "redhat":
        return f"run `grubby --update-kernel=ALL --args={argument}` and reboot"
    if family == "suse":
        return (
            f"add {argument} to GRUB_CMDLINE_LINUX in /etc/default/grub, run "
            "`grub2-mkconfig -o /boot/grub2/grub.cfg` and reboot"
        )
    if family == "arch":
        return (
            f"add {argument} to the kernel command line of the boot loader (GRUB: /etc/default/grub, then "
            "`grub-mkconfig -o /boot/grub/grub.cfg`) and reboot"
        )
    return f"add {argument} to the kernel command line in the boot loader's configuration and reboot"


# Some have one for each kind of processor.
_QEMU_PACKAGE = {
    "debian": "`apt install qemu-system-{processor}` (Debian 13 or bookworm-backports; Ubuntu 24.10 and later)",
    "redhat": "`dnf install qemu-kvm`",
    "suse": "`zypper install qemu-{processor}`",
    "arch": "`pacman -S qemu-base`",
}


# -- the checks --------------------------------------------------------------------------------------------------------


def _iommu_enabled(survey: Survey) -> Check:
    name = "iommu.enabled"
    iommu, kernel = survey.get("iommu"), survey.get("kernel") or {}
    if iommu is None:
        return Check(name, SKIP, "The tree has no /sys, so the IOMMU cannot be seen.")
    groups = survey.get("groups") or []
    kinds = sorted({unit["kind"] for unit in iommu.get("units") or []})
    if groups:
        return Check(name, OK, f"The IOMMU is on: {len(groups)} groups{', ' + ' and '.join(kinds) if kinds else ''}.")
    if iommu.get("enabled") is None:
        return Check(name, SKIP, "The tree shows neither IOMMU groups nor PCI functions, so it cannot be told.")
    arguments = kernel.get("arguments") or []
    off = [one for one in arguments if _TURNED_OFF.fullmatch(one)]
    if off:
        remedy = f"Remove {' and '.join(off)} from the kernel command line, and reboot."
        return Check(name, FAIL, f"The IOMMU is off: the kernel was started with {' and '.join(off)}.", remedy)
    table = iommu.get("firmware")
    if table in _UNIT_OPTIONS:
        unit, option, why = _UNIT_OPTIONS[table]
        if ((kernel.get("config") or {}).get("options") or {}).get(option) == "n":
            return Check(
                name,
                FAIL,
                f"The IOMMU is off: the firmware describes {unit} (ACPI table {table}), but the kernel "
                f"{_release(kernel)} was built without CONFIG_{option}.",
                "Run a kernel of the distribution, or one that was built with that option.",
            )
    if table == "DMAR":
        remedy = add_argument(_family(survey), "intel_iommu=on")
        return Check(
            name,
            FAIL,
            "The IOMMU is off: the firmware describes Intel VT-d (ACPI table DMAR), but the kernel made no groups.",
            f"{remedy[0].upper()}{remedy[1:]}. The role iommufd.host.kernel does it.",
        )
    if table is not None:
        return Check(
            name,
            FAIL,
            f"The IOMMU is off, though the firmware describes {unit} (ACPI table {table}).",
            f"{why} The kernel log has the reason: `dmesg | grep -iE 'iommu|amd-vi|smmu|iort|viot'`.",
        )
    if kernel.get("virtual_machine"):
        return Check(
            name,
            FAIL,
            "The IOMMU is off: this host is itself a virtual machine, and has been given none.",
            "Give the virtual machine an IOMMU that remaps interrupts: with libvirt <iommu model='intel'><driver "
            "intremap='on'/></iommu> and <ioapic driver='qemu'/> on a q35 machine, with QEMU -device "
            "intel-iommu,intremap=on and -machine kernel-irqchip=split. Then "
            f"{add_argument(_family(survey), 'intel_iommu=on')}.",
        )
    remedy = "Turn on the IOMMU in the firmware setup (Intel: VT-d; AMD: IOMMU or AMD-Vi; Arm: SMMU)"
    intel = _intel(survey)
    if intel:
        argument = add_argument(_family(survey), "intel_iommu=on")
        remedy = f"Turn on VT-d in the firmware setup, and {argument}: many kernels leave it off without that argument"
    elif intel is None:
        remedy += f"; with an Intel processor also {add_argument(_family(survey), 'intel_iommu=on')}"
    seen = "and the firmware describes none" if iommu.get("firmware_known") else "and the kernel made no groups"
    return Check(name, FAIL, f"The IOMMU is off, {seen}. Without it no device can be given to a guest.", f"{remedy}.")


# "intel_iommu=off", and the same among several values ("intel_iommu=sm_on,off").
_TURNED_OFF = re.compile(r"(?:iommu|intel_iommu|amd_iommu)=(?:[^,]+,)*off(?:,.*)?")

# What the firmware describes, by its ACPI table: its name, the kernel option of its driver, and what to look at.
_UNIT_OPTIONS = {
    "DMAR": ("Intel VT-d", "INTEL_IOMMU", ""),
    "IVRS": (
        "AMD-Vi",
        "AMD_IOMMU",
        "The kernel turns AMD-Vi on by itself, unless the firmware's table is broken: update the firmware.",
    ),
    "IORT": (
        "its interrupt and memory controllers",
        "ARM_SMMU_V3",
        "Turn on the SMMU in the firmware setup, if it is not among them.",
    ),
    "VIOT": (
        "a virtio-iommu",
        "VIRTIO_IOMMU",
        "Its driver must be there before those of the devices: put virtio_iommu (and virtio_pci) into the initramfs.",
    ),
}


def _intel(survey: Survey) -> bool | None:
    """Whether the processor is Intel's, by its own word or else by the maker of the host bridge; None: not known."""
    vendor = (survey.get("kernel") or {}).get("cpu_vendor")
    if vendor is not None:
        return bool(vendor == "GenuineIntel")
    devices = survey.get("devices") or []
    bridges = {one["vendor_id"] for one in devices if (one.get("class_id") or "").startswith("0x0600")}
    return "0x8086" in bridges if bridges else None


def _interrupt_remapping(survey: Survey) -> Check:
    name = "iommu.interrupt_remapping"
    iommu = survey.get("iommu") or {}
    isolated = iommu.get("interrupt_isolation")
    unsafe = sorted(module for module, value in (iommu.get("unsafe_interrupts") or {}).items() if value)
    if unsafe:
        return Check(
            name,
            FAIL if isolated is False else WARN,
            f"allow_unsafe_interrupts is set for {' and '.join(unsafe)}: a guest with a device could raise any "
            "interrupt on this host.",
            "Remove allow_unsafe_interrupts from the kernel command line and /etc/modprobe.d; turn on interrupt "
            "remapping (x2APIC) in the firmware instead.",
        )
    if not survey.get("groups"):
        return Check(name, SKIP, "The IOMMU is off, so there is no interrupt remapping to look for.")
    if isolated:
        return Check(
            name, OK, "Interrupts of devices are isolated (remapped by the IOMMU or the interrupt controller)."
        )
    if isolated is None:
        return Check(name, SKIP, "/proc/interrupts does not tell whether interrupts are remapped.")
    return Check(
        name,
        FAIL,
        "Interrupts are not remapped, so a guest could raise any interrupt on this host; the kernel refuses to give it "
        "a device (EPERM).",
        "Turn on interrupt remapping in the firmware (VT-d or AMD-Vi with x2APIC), and remove intremap=off and "
        "nointremap from the kernel command line. A virtio-iommu on x86 cannot remap interrupts.",
    )


def _release(kernel: t.Mapping[str, t.Any]) -> str:
    """The kernel that a check speaks of, with a word on how it was found where it may not be the one that ran."""
    beside = {"boot": " (which the boot loader would start)", "newest": " (the newest that is installed)"}
    return f"{kernel.get('release') or 'here'}{beside.get(kernel.get('release_source') or '', '')}"


def _module(survey: Survey, name: str) -> t.Mapping[str, t.Any]:
    modules = (survey.get("kernel") or {}).get("modules") or {}
    return t.cast("t.Mapping[str, t.Any]", modules.get(name) or {})


def _option(survey: Survey, name: str) -> str | None:
    """A kernel option: "y", "m" or "n", or None where the configuration is not known."""
    config = (survey.get("kernel") or {}).get("config")
    return None if config is None else t.cast("str | None", config["options"].get(name, "n"))


def _kernel_iommufd(survey: Survey) -> Check:
    name = "kernel.iommufd"
    kernel = survey.get("kernel") or {}
    release, option = kernel.get("release"), _option(survey, "IOMMUFD")
    kernel_words = _release(kernel)
    module = _module(survey, "iommufd")
    state, beside = module.get("state"), " (a module beside the kernel's own, such as DKMS builds)"
    node = (survey.get("nodes") or {}).get("iommu")
    if state in ("loaded", "builtin") or option == "y":
        return Check(
            name,
            OK,
            f"iommufd is {'loaded' if state == 'loaded' else 'built in'}{beside if module.get('dkms') else ''}.",
        )
    if node is not None and node["expected"] is not None:  # sysfs knows the device, so the node is no left-over
        return Check(name, OK, "iommufd is there: /dev/iommu exists.")
    if state == "available":
        return Check(
            name,
            WARN,
            f"The kernel {kernel_words} has the module iommufd{beside if module.get('dkms') else ''}, but it is not "
            "loaded; opening /dev/iommu never loads it.",
            "Run `modprobe iommufd`, and write `iommufd` to /etc/modules-load.d/iommufd.conf for the next boot.",
        )
    if option == "n":
        return Check(name, FAIL, *_without_iommufd(survey, str(release)))
    if option == "m" and kernel.get("modules") is not None and state != "unknown":
        return Check(
            name,
            FAIL,
            f"The kernel {kernel_words} was built with iommufd as a module, but the module is not installed.",
            {
                "debian": f"Install the rest of its modules (on Ubuntu `apt install linux-modules-{release}`).",
                "redhat": f"`dnf install kernel-modules-{release}`, or kernel-modules-extra-{release}.",
            }.get(_family(survey), "Reinstall the kernel's package, its modules included."),
        )
    if option == "m":
        return Check(
            name,
            SKIP,
            f"The kernel {kernel_words} has iommufd as a module; the tree does not tell whether it is there.",
        )
    numbers = _release_numbers(release)
    if numbers is not None and numbers < _IOMMUFD_SINCE and not _backports(survey):
        return Check(
            name,
            FAIL,
            f"The kernel {kernel_words} is older than iommufd, which came with Linux 6.2.",
            _newer_kernel(survey),
        )
    return Check(name, SKIP, "Neither the kernel's configuration nor its modules are in reach, so it cannot be told.")


# Linux 6.2 brought iommufd, 6.6 the character devices of vfio.
_IOMMUFD_SINCE = (6, 2)
_CDEV_SINCE = (6, 6)


def _backports(survey: Survey) -> bool:
    """Whether a kernel's number proves nothing: RHEL 9 brought iommufd to 5.14, SLE 15 SP6 has a 6.4 of its own."""
    return _family(survey) in ("redhat", "suse")


def _release_numbers(release: object) -> tuple[int, int] | None:
    parts = str(release or "").split(".")
    if len(parts) < 2 or not parts[0].isdecimal():
        return None
    minor = "".join(letter for letter in parts[1] if letter.isdecimal())
    return (int(parts[0]), int(minor)) if minor else None


def _without_iommufd(survey: Survey, release: str) -> tuple[str, str]:
    distribution = survey.get("distribution") or {}
    numbers = _release_numbers(release)
    if numbers is not None and numbers < _IOMMUFD_SINCE and not _backports(survey):
        return f"The kernel {release} is older than iommufd, which came with Linux 6.2.", _newer_kernel(survey)
    if distribution.get("id") == "debian" and _DEBIAN_KERNEL.search(release):
        return (
            f"Debian builds its kernels without iommufd (`# CONFIG_IOMMUFD is not set` in {release}), so /dev/iommu "
            "cannot appear, whatever is loaded or configured. That is how the kernel was built, not a fault of this "
            "host; vfio itself is there, in its older form only.",
            "Have iommufd built as a module for this kernel: the role iommufd.host.kernel does it through DKMS, from "
            "Debian's own packages linux-source and linux-headers, and again at each kernel upgrade. Or run a kernel "
            "that was built with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV.",
        )
    return f"The kernel {release} was built without iommufd (CONFIG_IOMMUFD is not set).", _newer_kernel(survey)


def _newer_kernel(survey: Survey) -> str:
    return {
        "debian": "Install a kernel of 6.6 or later: on Debian from backports, with iommufd through the role "
        "iommufd.host.kernel; on Ubuntu linux-generic of 24.04, or the hwe kernel.",
        "redhat": "Update the kernel with `dnf upgrade kernel` and reboot: RHEL 9.4 and later and Fedora have iommufd.",
        "suse": "Update with `zypper update kernel-default` and reboot (Tumbleweed, or SLE 15 SP6 and later).",
        "arch": "Update with `pacman -Syu linux` and reboot.",
    }.get(_family(survey), "Run a kernel of 6.6 or later with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV.")


def _kernel_cdev(survey: Survey) -> Check:
    name = "kernel.cdev"
    kernel = survey.get("kernel") or {}
    option, live = _option(survey, "VFIO_DEVICE_CDEV"), kernel.get("vfio_cdev")
    vfio, iommufd = _module(survey, "vfio"), _module(survey, "iommufd")
    if live:
        return Check(name, OK, "vfio makes character devices (vfio-dev is registered).")
    if live is None and vfio.get("dkms") and iommufd.get("dkms"):
        return Check(name, OK, "The vfio modules beside the kernel's own, built together with iommufd, bring them.")
    if option == "y" and live is None:
        return Check(name, OK, "The kernel was built with vfio character devices.")
    if live is False and (option == "y" or vfio.get("dkms")):
        return Check(
            name,
            FAIL,
            "The vfio that is loaded makes no character devices, though the installed one does: it was loaded earlier.",
            "Reboot; or unbind the devices and run `modprobe -r vfio_pci vfio_iommu_type1 vfio && modprobe vfio-pci`.",
        )
    if option is None and live is None:
        return Check(name, SKIP, "Neither the kernel's configuration nor a loaded vfio is in reach.")
    numbers = _release_numbers(kernel.get("release"))
    if numbers is not None and numbers < _CDEV_SINCE and not _backports(survey):
        return Check(
            name, FAIL, "vfio has no character devices in this kernel: they came with Linux 6.6.", _newer_kernel(survey)
        )
    return Check(
        name,
        FAIL,
        "vfio makes no character devices (/dev/vfio/devices/…), and iommufd takes nothing else: "
        "CONFIG_VFIO_DEVICE_CDEV is not set.",
        _without_iommufd(survey, str(kernel.get("release")))[1],
    )


def _kernel_arguments(survey: Survey) -> Check:
    name = "kernel.arguments"
    kernel = survey.get("kernel") or {}
    if kernel.get("command_line") is None:
        return Check(name, SKIP, "The kernel's command line is not in reach.")
    found = {}
    for one in kernel.get("arguments") or []:
        key = one.partition("=")[0].replace("-", "_")
        if key == "vfio_pci.ids":
            found[one] = "takes every device of that kind, also an identical one that the host needs"
        elif (key == "iommu" and one.partition("=")[2] in ("pt", "soft")) or key == "iommu.passthrough":
            found[one] = (
                "leaves the host's own devices without protection by the IOMMU, and is not needed to pass others on"
            )
        elif key == "amd_iommu" and one.endswith("=on"):
            found[one] = "has no effect: the kernel knows no such value"
        elif key == "pcie_acs_override":
            found[one] = "splits IOMMU groups that the hardware does not keep apart"
    if not found:
        return Check(name, OK, "Nothing on the kernel's command line is in the way.")
    words = "; ".join(f"{one} {why}" for one, why in found.items())
    return Check(
        name,
        WARN,
        f"On the kernel's command line: {words}.",
        f"Remove {' and '.join(found)} unless you want just that.",
    )


def _node_iommu(survey: Survey) -> Check:
    name = "node.iommu"
    nodes = survey.get("nodes")
    if nodes is None:
        return Check(name, SKIP, "The tree has no /dev.")
    node = nodes.get("iommu")
    if node is None:
        if _kernel_iommufd(survey).status == FAIL:
            return Check(name, FAIL, "/dev/iommu is not there, for the kernel has no iommufd.", "See kernel.iommufd.")
        return Check(
            name,
            FAIL,
            "/dev/iommu is not there: the module iommufd makes it, and nothing has loaded that.",
            "Run `modprobe iommufd`, and write `iommufd` to /etc/modules-load.d/iommufd.conf for the next boot.",
        )
    if node["expected"] is not None and node["device"] is not None and node["expected"] != node["device"]:
        return Check(
            name,
            FAIL,
            f"/dev/iommu is stale: it has the number {node['device']}, but the kernel's device has {node['expected']}.",
            "Remove it and let udev make it again: `rm /dev/iommu && udevadm trigger -c add /sys/class/misc/iommu`.",
        )
    return Check(name, OK, f"/dev/iommu is there ({node['owner']}:{node['group']} {node['mode']}).")


def _node_permissions(survey: Survey) -> Check:
    name = "node.permissions"
    nodes = survey.get("nodes")
    if nodes is None:
        return Check(name, SKIP, "The tree has no /dev.")
    ours = [node for node in [nodes.get("iommu"), *nodes["cdevs"], *nodes["groups"]] if node is not None]
    if not ours:
        return Check(name, SKIP, "There is neither /dev/iommu nor a vfio node yet.")
    world = [node for node in ours if int(node["mode"], 8) & 0o007]
    if world:
        listed = ", ".join(f"{node['path']} ({node['mode']})" for node in world)
        return Check(
            name,
            FAIL,
            f"Every user of this host may open {listed}.",
            "Find the rule with `grep -rn 0666 /etc/udev/rules.d /usr/lib/udev/rules.d`, take it out, and run "
            "`udevadm control --reload && udevadm trigger` for the node. The role iommufd.host.access sets it right.",
        )
    owners = sorted({f"{node['owner']}:{node['group']} {node['mode']}" for node in ours})
    lists = sorted({entry for node in ours for entry in node.get("acl_entries") or []})
    beside = f", and by access lists {', '.join(lists)}" if lists else ""
    return Check(name, OK, f"Only their owners may open the nodes: {', '.join(owners)}{beside}.")


def _device_cdev(survey: Survey) -> Check:
    name = "device.cdev"
    bound = [device for device in survey.get("devices") or [] if "vfio" in (device["driver"] or "")]
    if not bound:
        return Check(name, SKIP, "No device is bound to a vfio driver.")
    without = [device["address"] for device in bound if device["vfio_device"] is None]
    if without:
        return Check(
            name,
            FAIL,
            f"Bound to a vfio driver, but without a character device: {', '.join(without)}.",
            "See kernel.cdev; afterwards bind them again.",
        )
    return Check(name, OK, f"{len(bound)} devices are bound to a vfio driver, each with its character device.")


def _group_viable(survey: Survey) -> Check:
    name = "group.viable"
    taken = [group for group in survey.get("groups") or [] if group["vfio"] and group["blocking"]]
    if not taken:
        if not any(group["vfio"] for group in survey.get("groups") or []):
            return Check(name, SKIP, "No device is bound to a vfio driver.")
        return Check(name, OK, "No host driver is left in a group that has a device on a vfio driver.")
    words = "; ".join(
        f"group {group['number']}: {', '.join(group['vfio'])} on vfio, {', '.join(group['blocking'])} on a host driver"
        for group in taken
    )
    return Check(
        name,
        FAIL,
        f"A group can only be given away as a whole. {words}.",
        "Bind the others as well (vfio_bind with include_group), or put the device into another slot.",
    )


def _kvm(survey: Survey) -> Check:
    name = "kvm"
    kernel, nodes = survey.get("kernel") or {}, survey.get("nodes")
    flag = kernel.get("virtualization")
    node = (nodes or {}).get("kvm")
    if flag is None and node is None:
        if nodes is not None and kernel.get("architecture") not in (None, "x86_64", "i686"):
            return Check(
                name,
                WARN,
                "/dev/kvm is not there. Guests will be emulated, about ten times slower.",
                "Look for the reason with `dmesg | grep -i kvm`: on Arm the firmware must start the kernel at EL2.",
            )
        return Check(name, SKIP, "The processor's flags are not in reach.")
    if flag is None or (flag and node is not None):
        return (
            Check(name, OK, f"KVM can be used{f' ({flag})' if flag else ''}.")
            if node
            else Check(name, SKIP, "No /dev.")
        )
    if not flag:
        there = " /dev/kvm is there all the same, but without that flag it is of no use." if node else ""
        return Check(
            name,
            WARN,
            f"The processor offers no hardware virtualization (no vmx or svm among its flags).{there} Guests will be "
            "emulated, about ten times slower.",
            "Turn on VT-x or SVM in the firmware setup; in a virtual machine, nested virtualization.",
        )
    if nodes is None:
        return Check(name, SKIP, "The tree has no /dev.")
    module = "kvm_intel" if flag == "vmx" else "kvm_amd"
    return Check(name, WARN, "/dev/kvm is not there, though the processor could.", f"Run `modprobe {module}`.")


def _qemu_iommufd(survey: Survey) -> Check:
    name = "qemu.iommufd"
    binaries = survey.get("qemu")
    package = _QEMU_PACKAGE.get(_family(survey), "the distribution's package of QEMU")
    architecture = (survey.get("kernel") or {}).get("architecture")
    package = package.format(processor="arm" if architecture == "aarch64" else "x86")
    remedy = f"Install QEMU 9.0 or later: {package}; or build one with the role iommufd.host.qemu."
    if binaries is None:
        return Check(name, SKIP, "The tree has no directory for programs.")
    if not binaries:
        return Check(name, FAIL, "There is no QEMU.", remedy)
    asked = [one for one in binaries if one["iommufd"] is not None]
    able = [one for one in asked if one["iommufd"]]
    if able:
        listed = ", ".join(f"{one['path']} {one['version']}" for one in able)
        if any(one["passing"] for one in able):
            return Check(name, OK, f"With iommufd, and takes a passed descriptor: {listed}.")
        return Check(name, WARN, f"With iommufd, but takes no descriptor from a launcher: {listed}.", remedy)
    if not asked:
        problems = "; ".join(f"{one['path']}: {one['problem']}" for one in binaries if one["problem"])
        if problems:
            return Check(name, FAIL, f"No QEMU answered: {problems}.", remedy)
        if survey.get("live"):  # then none was worth asking
            return Check(name, FAIL, "There is no QEMU for this host's own architecture.", remedy)
        installed = survey.get("qemu_package")
        numbers = _release_numbers(installed)
        if numbers is not None and numbers < (9, 0) and not _backports(survey):
            return Check(name, FAIL, f"QEMU {installed} is older than its iommufd, which came with 9.0.", remedy)
        return Check(name, SKIP, f"{', '.join(one['path'] for one in binaries)} can only be asked on the running host.")
    listed = ", ".join(f"{one['path']} {one['version']}" for one in asked)
    return Check(name, FAIL, f"Built without iommufd: {listed}.", remedy)


def _qemu_peer_to_peer(survey: Survey) -> Check:
    name = "qemu.peer_to_peer"
    measured = survey.get("peer_to_peer") or []
    if not measured:
        return Check(
            name,
            SKIP,
            "Whether devices of a guest reach each other over iommufd was not measured since the last boot; "
            "iommufd.host.guest_verify tries it.",
        )
    lacking = [one for one in measured if not one["works"]]
    if lacking:
        listed = "; ".join(f"QEMU {one['qemu']}: {one['detail']}" for one in lacking)
        return Check(
            name,
            WARN,
            f"Devices of a guest do not reach each other over iommufd ({listed}).",
            "A guest of several devices that do so keeps the legacy container (backend auto). Linux 6.19 with QEMU "
            "11.0 was the first where they do over iommufd.",
        )
    versions = ", ".join(str(one["qemu"]) for one in measured)
    return Check(name, OK, f"Devices of a guest reach each other over iommufd (QEMU {versions}).")


def _libvirt_iommufd(survey: Survey) -> Check:
    name = "libvirt.iommufd"
    libvirt = survey.get("libvirt")
    if libvirt is None:
        return Check(name, SKIP, "No libvirt was found.")
    if libvirt["can_pass_iommufd"] is None:
        return Check(name, SKIP, "The version of libvirt is not known.")
    if libvirt["can_pass_iommufd"]:
        return Check(name, OK, f"libvirt {libvirt['version']} opens /dev/iommu itself and passes the descriptor.")
    if libvirt.get("capability_source") == "domcapabilities":
        return Check(
            name,
            WARN,
            f"libvirt {libvirt['version']} does not offer iommufd for host devices (`virsh domcapabilities`), with the "
            "QEMU that it found.",
            "Update libvirt to 12.1 or later, and see qemu.iommufd; or use the access mode `group` (role "
            "iommufd.host.access).",
        )
    return Check(
        name,
        WARN,
        f"libvirt {libvirt['version']} cannot pass iommufd descriptors (12.1 and later can), so QEMU has to open the "
        "nodes itself.",
        "Use the access mode `group` (role iommufd.host.access), or update libvirt to 12.1 or later.",
    )


def _needs_own_access(survey: Survey) -> bool:
    """Whether libvirt is there and leaves opening the nodes to QEMU."""
    libvirt = survey.get("libvirt")
    return libvirt is not None and libvirt["can_pass_iommufd"] is False


def _libvirt_acl(survey: Survey) -> Check:
    name = "libvirt.acl"
    libvirt = survey.get("libvirt")
    if libvirt is None:
        return Check(name, SKIP, "No libvirt was found.")
    if not _needs_own_access(survey):
        return Check(name, SKIP, "libvirt opens the nodes itself, so its device list does not matter.")
    acl = libvirt["device_acl"]
    if acl is None:
        return Check(name, WARN, f"The device list is not known: {libvirt['device_acl_source'] or 'no qemu.conf'}.")
    if "/dev/iommu" in acl:
        return Check(name, OK, "/dev/iommu is in libvirt's cgroup_device_acl.")
    return Check(
        name,
        WARN,
        "/dev/iommu is not in libvirt's cgroup_device_acl, so the cgroup of a guest forbids QEMU to open it, whatever "
        "its owner and mode are.",
        "Let the module cgroup_acl add it to /etc/libvirt/qemu.conf: the setting replaces the built-in list, so it "
        "must be merged, not just set.",
    )


def _apparmor(survey: Survey) -> Check:
    name = "security.apparmor"
    apparmor = (survey.get("security") or {}).get("apparmor")
    if apparmor is None or not apparmor["enabled"]:
        known = apparmor is not None and apparmor["enabled"] is False
        return Check(name, SKIP, "AppArmor is not in use." if known else "The tree does not tell of AppArmor.")
    if not _needs_own_access(survey) or apparmor["libvirt_allows_iommu"] is None:
        return Check(name, SKIP, "No guest of libvirt has to open /dev/iommu under AppArmor.")
    if apparmor["libvirt_allows_iommu"]:
        return Check(name, OK, "AppArmor's profile for guests of libvirt allows /dev/iommu.")
    return Check(
        name,
        WARN,
        "AppArmor's profile for guests of libvirt does not list /dev/iommu.",
        "Let the module apparmor_access add the rules; a guest has them from its next start.",
    )


def _selinux(survey: Survey) -> Check:
    name = "security.selinux"
    selinux = (survey.get("security") or {}).get("selinux")
    if selinux is None or selinux["mode"] == "disabled":
        return Check(name, SKIP, "SELinux is not in use.")
    if not _needs_own_access(survey):
        return Check(name, SKIP, "No guest of libvirt has to open /dev/iommu under SELinux.")
    if selinux["mode"] != "enforcing":
        return Check(name, OK, "SELinux only logs what it would forbid (permissive).")
    patterns = {pattern: kind for pattern, kind in selinux["contexts"].items() if pattern.startswith("/dev/iommu")}
    if not patterns:
        return Check(
            name,
            WARN,
            "The SELinux policy gives /dev/iommu no type of its own, so a guest of libvirt may not open it.",
            "Use the access mode `launcher` with libvirt 12.1 or later, or a newer selinux-policy.",
        )
    wanted = next(iter(patterns.values()))
    node = (survey.get("nodes") or {}).get("iommu")
    label = None if node is None else node["label"]
    if label is not None and f":{wanted}:" not in f"{label}:":
        return Check(
            name,
            WARN,
            f"/dev/iommu has the label {label}, and the policy says {wanted}.",
            "`restorecon -v /dev/iommu`",
        )
    return Check(name, OK, f"The SELinux policy gives /dev/iommu the type {wanted}.")


def _memlock(survey: Survey) -> Check:
    name = "memlock"
    known, nodes = survey.get("memlock"), survey.get("nodes")
    if known is None:
        return Check(name, SKIP, "The tree has no /etc/security.")
    if nodes is None:
        return Check(name, SKIP, "The tree has no /dev, so nobody can be named who would need a limit.")
    limits = [one for one in known if one.get("type") not in ("unit", "default")]
    node = nodes.get("iommu")
    words = ", ".join(f"{one['domain']} {_size(one['kib'])} ({one['file']})" for one in limits)
    if node is None or node["group"] == "root" or not int(node["mode"], 8) & 0o020:
        return Check(
            name,
            OK,
            "Whoever launches a guest as root also sets its limit on locked memory"
            f"{f'; set for users: {words}' if words else ''}.",
        )
    group = node["group"]
    raised = [
        one for one in limits if one["domain"] in ("*", f"@{group}") and (one["kib"] is None or one["kib"] >= 1 << 20)
    ]
    if raised:
        return Check(name, OK, f"Members of {group} may lock memory for a guest: {words}.")
    return Check(
        name,
        WARN,
        f"Members of {group} may open /dev/iommu, but lock only {words or '8 MiB (the default)'} of memory; a guest "
        "locks all of its own, and QEMU then fails with ENOMEM.",
        f"Write `@{group} - memlock unlimited`, or the guests' memory in KiB, to /etc/security/limits.d/; for a "
        "systemd unit set LimitMEMLOCK=.",
    )


def _size(kib: int | None) -> str:
    return "unlimited" if kib is None else f"{kib} KiB"
