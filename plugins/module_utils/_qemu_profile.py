# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What a QEMU is to be made of, as arguments of its ``configure`` and device files, for whatever tree it is.

Two kinds of trees can decide about iommufd, and this speaks one language over both:

- QEMU since 9.0 has a Kconfig symbol ``IOMMUFD`` (``backends/Kconfig``). It depends on VFIO, has no default, and is
  implied by the machines Q35, ARM_VIRT and S390_CCW_VIRTIO. A device file (``configs/devices/<target>/NAME.mak``)
  sets or clears it.
- A tree with the first version of the patches for iommufd has a meson option ``iommufd`` instead, which its configure
  takes as ``--enable-iommufd`` and ``--disable-iommufd``, and which its summary names ("iommufd support: YES").
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._qemu_source import Traits

#: Increase it whenever the same request would make another binary.
RECIPE = 3

#: Where a build believes to be installed. QEMU finds its data relative to its binary, wherever that lies.
PREFIX = "/opt/iommufd-host/qemu/current"

#: Where firmware of the distribution lies; looked at after the artefact's own.
FIRMWARE_PATH = "/usr/share/qemu:/usr/share/seabios:/usr/lib/ipxe/qemu"

#: The name of our device file in the tree.
DEVICE_FILE = "iommufd-host"

SINCE = "QEMU has iommufd since 9.0"

# Per target, the machine that passthrough is made for.
_MACHINES = {"x86_64": "Q35", "aarch64": "ARM_VIRT", "s390x": "S390_CCW_VIRTIO"}

# What a guest with passed devices has beside them. A port for hotplug; disks, network, memory and console by virtio;
# a keyboard that firmware knows. PXB would drag in CXL, which does not link without a hundred other devices.
_PASSTHROUGH = (
    "VFIO_PCI",
    "VIRTIO_PCI",
    "VIRTIO_BLK",
    "VIRTIO_NET",
    "VIRTIO_SCSI",
    "VIRTIO_SERIAL",
    "VIRTIO_BALLOON",
    "VIRTIO_RNG",
    "VIRTIO_MEM",
    "VHOST_USER_FS",
)
_PASSTHROUGH_OF = {
    "x86_64": ("PCIE_PORT", "VTD", "SERIAL_ISA", "USB_XHCI_PCI"),
    "aarch64": ("PCIE_PORT", "USB_XHCI_PCI"),
    "s390x": ("VIRTIO_CCW",),
}

# Features that the profile turns on; whatever else there is stays off.
_PASSTHROUGH_FEATURES = ("seccomp", "vhost-net", "vhost-user", "malloc-trim", "membarrier")

# Debian's package that a feature of configure needs.
_FEATURE_PACKAGES = {
    "bpf": "libbpf-dev",
    "bzip2": "libbz2-dev",
    "cap-ng": "libcap-ng-dev",
    "curl": "libcurl4-gnutls-dev",
    "gcrypt": "libgcrypt20-dev",
    "gnutls": "libgnutls28-dev",
    "libiscsi": "libiscsi-dev",
    "libssh": "libssh-dev",
    "libusb": "libusb-1.0-0-dev",
    "linux-aio": "libaio-dev",
    "linux-io-uring": "liburing-dev",
    "lzo": "liblzo2-dev",
    "nettle": "nettle-dev",
    "numa": "libnuma-dev",
    "pixman": "libpixman-1-dev",
    "png": "libpng-dev",
    "rbd": "librbd-dev",
    "sdl": "libsdl2-dev",
    "seccomp": "libseccomp-dev",
    "slirp": "libslirp-dev",
    "snappy": "libsnappy-dev",
    "spice": "libspice-server-dev",
    "usb-redir": "libusbredirparser-dev",
    "vnc-jpeg": "libjpeg-dev",
    "vnc-sasl": "libsasl2-dev",
    "vte": "libvte-2.91-dev",
    "zstd": "libzstd-dev",
}

_BASE_PACKAGES = (
    "build-essential",
    "ninja-build",
    "pkg-config",
    "python3-venv",
    "libglib2.0-dev",
    "zlib1g-dev",
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        iommufd: "auto", "enabled" or "disabled".
        profile: "passthrough" (small, everything else off), "default" (what QEMU's configure chooses by itself) or
            "distribution" (what the distribution's source package chooses).
        targets: architectures to emulate ("x86_64").
        features: names of configure's features ("slirp"), on or off, beside the profile.
        devices: names of Kconfig symbols without CONFIG_ ("PVPANIC_PCI"), on or off, beside the profile.
        patches: paths of patches on the builder, in order.
    """

    iommufd: str = "auto"
    profile: str = "passthrough"
    targets: tuple[str, ...] = ("x86_64",)
    features: t.Mapping[str, bool] = dataclasses.field(default_factory=dict)
    devices: t.Mapping[str, bool] = dataclasses.field(default_factory=dict)
    patches: tuple[str, ...] = ()

    def decides(self) -> dict[str, t.Any]:
        """All of it that decides the result, for the key; patches are known by their content instead."""
        return {
            "iommufd": self.iommufd,
            "profile": self.profile,
            "targets": list(self.targets),
            "features": dict(sorted(self.features.items())),
            "devices": dict(sorted(self.devices.items())),
        }


def parse_request(parameters: t.Mapping[str, t.Any]) -> Request:
    """The module's options.

    Raises:
        OptionError: a name is none that configure or Kconfig could have.
    """
    targets = tuple(dict.fromkeys(parameters["targets"]))
    for number, target in enumerate(targets):
        if not re.fullmatch(r"[a-z][a-z0-9_]+", target):
            raise OptionError(f"targets[{number}]", target, "an architecture such as x86_64 or aarch64")
    if not targets:
        raise OptionError("targets", [], "at least one architecture")
    return Request(
        iommufd=parameters["iommufd"],
        profile=parameters["profile"],
        targets=targets,
        features=_switches("features", parameters["features"], r"[a-z][a-z0-9-]*", "a feature of configure, as slirp"),
        devices=_switches("devices", parameters["devices"], r"[A-Z][A-Z0-9_]*", "a Kconfig symbol, as PVPANIC_PCI"),
        patches=tuple(parameters["patches"]),
    )


def _switches(option: str, given: t.Mapping[str, t.Any], pattern: str, accepted: str) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for name, value in given.items():
        bare = re.sub(r"^CONFIG_", "", str(name)) if option == "devices" else str(name)
        if not re.fullmatch(pattern, bare):
            raise OptionError(option, name, accepted)
        if not isinstance(value, bool) and str(value).lower() not in ("true", "false", "yes", "no", "y", "n"):
            raise OptionError(f"{option}.{name}", value, "true or false")
        if bare.lower() == "iommufd":
            raise OptionError(option, name, "anything but iommufd", "the option iommufd decides about it")
        found[bare] = value if isinstance(value, bool) else str(value).lower() in ("true", "yes", "y")
    return found


def mechanism(traits: Traits) -> str | None:
    """By what a tree decides about iommufd: "option", "kconfig", or None where it has none."""
    return "option" if traits.option else "kconfig" if traits.kconfig else None


def require_possible(request: Request, system: str, traits: Traits | None) -> None:
    """Refuse what cannot be, before anything is compiled.

    Args:
        request: what was asked for.
        system: the kernel's name ("Linux").
        traits: of the tree; None while it is not known.

    Raises:
        HostError: iommufd is to be enabled and cannot be.
        OptionError: the profile has nothing for one of the targets.
    """
    if request.iommufd == "enabled":
        if system != "Linux":
            raise HostError(f"iommufd is supported only on Linux, and this builder runs {system}")
        if traits is not None and mechanism(traits) is None:
            raise HostError(
                f"iommufd: enabled was asked for, and QEMU {traits.version} has no iommufd. {SINCE}. "
                "Nothing was compiled"
            )
        for target in request.targets:
            if target not in _MACHINES:
                raise HostError(
                    f"iommufd: enabled was asked for, and the target {target} cannot have it. The targets with a "
                    f"machine for it are {', '.join(_MACHINES)}. Nothing was compiled"
                )
    for number, target in enumerate(request.targets):
        if request.profile == "passthrough" and target not in _MACHINES:
            accepted = f"with profile passthrough one of {', '.join(_MACHINES)}"
            raise OptionError(f"targets[{number}]", target, accepted)


def wants_iommufd(request: Request, traits: Traits) -> bool | None:
    """Whether the binaries must have iommufd (True), must not (False), or either will do (None)."""
    if request.iommufd == "auto":
        return True if request.profile == "passthrough" and mechanism(traits) is not None else None
    return request.iommufd == "enabled"


def configure_arguments(request: Request, traits: Traits, machine: str) -> list[str]:
    """The arguments of QEMU's configure.

    Args:
        request: what is wanted.
        traits: of the tree.
        machine: the builder's architecture, for which KVM works.
    """
    found = [
        f"--prefix={PREFIX}",
        f"--firmwarepath={PREFIX}/share/qemu:{FIRMWARE_PATH}",
        f"--target-list={','.join(f'{target}-softmmu' for target in request.targets)}",
        "--disable-download",
        "--disable-werror",
        "--disable-docs",
        "--disable-user",
        "--enable-strip",
        "--disable-install-blobs",
    ]
    if request.profile == "passthrough":
        found += ["--without-default-features", "--without-default-devices", "--enable-system"]
        # Debug information takes a sixth of the compiler's time, and the binary is stripped in the end.
        found += ["--disable-tools", "--disable-guest-agent", "--disable-debug-info"]
        native = machine in request.targets
        foreign = any(target != machine for target in request.targets)
        found += [f"--{'enable' if native else 'disable'}-kvm", f"--{'enable' if foreign else 'disable'}-tcg"]
        found += [f"--enable-{name}" for name in _PASSTHROUGH_FEATURES if name not in request.features]
        found.append("--enable-fdt=system")
    if mechanism(traits) == "option" and request.iommufd != "auto":
        found.append(f"--{'enable' if request.iommufd == 'enabled' else 'disable'}-iommufd")
    found += [f"--with-devices-{name}={DEVICE_FILE}" for name in sorted(_device_lines(request, traits))]
    found += [f"--{'enable' if on else 'disable'}-{name}" for name, on in sorted(request.features.items())]
    return found


def distribution_arguments(named: str, request: Request) -> list[str]:
    """The arguments of configure among what a distribution's source package names, less what was asked for otherwise.

    Args:
        named: its words ("--enable-gtk --enable-vte").
        request: what is wanted.
    """
    found = []
    for word in named.split():
        switch = re.fullmatch(r"--(?:enable|disable)-([a-z0-9-]+)", word)
        if (switch and switch[1] not in request.features) or re.fullmatch(r"--audio-drv-list=[a-z,]*", word):
            found.append(word)
    return found


def device_files(request: Request, traits: Traits) -> dict[str, str]:
    """Device files to be written into the tree before it is configured: content by path."""
    return {
        f"configs/devices/{target}-softmmu/{DEVICE_FILE}.mak": "".join(f"{line}\n" for line in lines)
        for target, lines in _device_lines(request, traits).items()
    }


def _device_lines(request: Request, traits: Traits) -> dict[str, list[str]]:
    """Lines of the device file per target; none where the tree's own file will do."""
    by_kconfig = mechanism(traits) == "kconfig"
    found: dict[str, list[str]] = {}
    for target in request.targets:
        symbols: dict[str, bool] = {}
        lines: list[str] = []
        if request.profile == "passthrough":
            symbols.update({_MACHINES[target]: True})
            symbols.update(dict.fromkeys((*_PASSTHROUGH, *_PASSTHROUGH_OF[target]), True))
        elif (by_kconfig and request.iommufd != "auto") or request.devices:
            lines.append("include default.mak")
        symbols.update(request.devices)
        if by_kconfig and wants_iommufd(request, traits) is not None and (request.profile == "passthrough" or lines):
            symbols["IOMMUFD"] = bool(wants_iommufd(request, traits))
        lines += [f"CONFIG_{name}={'y' if on else 'n'}" for name, on in symbols.items()]
        if lines:
            found[target] = lines
    return found


# Where a small QEMU does not link because a file of stubs lacks a function: the file, the header that declares it, its
# name, and what it is without CXL. In 10.2 the tables of ACPI ask for CXL's windows; 10.0 does not know of that.
_STUBS = (
    (
        "hw/cxl/cxl-host-stubs.c",
        "include/hw/cxl/cxl_host.h",
        "cxl_fmws_get_all_sorted",
        "\nGSList *cxl_fmws_get_all_sorted(void)\n{\n    return NULL;\n}\n",
    ),
)


def missing_stubs(request: Request, read: t.Callable[[str], str]) -> dict[str, str]:
    """What has to be appended to files of a tree for a small QEMU to link: text by path.

    Args:
        request: what is wanted.
        read: content of a file of the tree; empty where there is none.
    """
    if request.profile != "passthrough" or request.devices.get("CXL"):
        return {}
    return {
        path: code
        for path, header, name, code in _STUBS
        if f"{name}(" in read(header) and read(path) and f"{name}(" not in read(path)
    }


def features_on(request: Request) -> list[str]:
    """Features that a build of this request turns on by name."""
    names = list(_PASSTHROUGH_FEATURES) if request.profile == "passthrough" else []
    return [*[name for name in names if request.features.get(name, True)],
            *[name for name, on in request.features.items() if on and name not in names]]  # fmt: skip


def packages(request: Request, traits: Traits) -> list[str]:
    """Debian's packages that a build needs, the versioned meson (``Traits.meson``) left out."""
    found = list(_BASE_PACKAGES)
    if request.profile == "passthrough":
        found.append("libfdt-dev")
    else:
        found += ["libfdt-dev", "libpixman-1-dev"]
    found += [_FEATURE_PACKAGES[name] for name in features_on(request) if name in _FEATURE_PACKAGES]
    for target in request.targets:
        found += _FIRMWARE_PACKAGES.get(target, ())
    return list(dict.fromkeys(found))


def all_packages() -> set[str]:
    """Every package that :func:`packages` may name, and those that only some trees need."""
    found = {*_BASE_PACKAGES, *_FEATURE_PACKAGES.values(), "libfdt-dev", "libpixman-1-dev", "meson", "python3-pycotap"}
    return found.union(["dpkg-dev", "patch"], *_FIRMWARE_PACKAGES.values())


# -- firmware ----------------------------------------------------------------------------------------------------------

_FIRMWARE_PACKAGES: dict[str, tuple[str, ...]] = {"x86_64": ("seabios", "qemu-system-data", "ipxe-qemu")}

# Per target: what a machine does not start without, and what some devices load.
_FIRMWARE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "x86_64": (
        ("bios-256k.bin", "linuxboot_dma.bin", "kvmvapic.bin", "efi-virtio.rom"),
        ("multiboot_dma.bin", "pvh.bin", "vgabios-stdvga.bin", "vgabios-virtio.bin", "vgabios-ramfb.bin"),
    ),
    "aarch64": ((), ("efi-virtio.rom",)),
    "s390x": ((), ("s390-ccw.img",)),
}


def firmware(request: Request) -> tuple[list[str], list[str]]:
    """Names of the firmware files that the artefact must and may carry."""
    must: list[str] = []
    may: list[str] = []
    for target in request.targets:
        first, second = _FIRMWARE.get(target, ((), ()))
        must += first
        may += second
    return list(dict.fromkeys(must)), [name for name in dict.fromkeys(may) if name not in must]


# -- what configure and the build say ----------------------------------------------------------------------------------


def summary(configured: str, device_settings: t.Mapping[str, str]) -> dict[str, t.Any]:
    """What the tree says that it was configured to.

    Args:
        configured: configure's output.
        device_settings: content of ``<target>-softmmu-config-devices.mak`` by target.

    Returns:
        ``text`` ("iommufd support: YES") and ``targets`` (whether each is to have it, by target).
    """
    said = re.search(r"^\s*iommufd support\s*:\s*(\w+)", configured, re.MULTILINE | re.IGNORECASE)
    by_target = {
        target: re.search(r"^CONFIG_IOMMUFD=y$", text, re.MULTILINE) is not None
        if said is None
        else said[1].upper() == "YES"
        for target, text in device_settings.items()
    }
    return {"text": f"iommufd support: {'YES' if any(by_target.values()) else 'NO'}", "targets": by_target}


_PROGRESS = re.compile(r"^\[(\d+)/(\d+)\] ")
_TELLING = re.compile(
    r"\b(fatal )?error: |\bERROR:|: undefined reference to|No space left on device|"
    r"Killed signal|internal compiler error|: not found$|^ninja: error:|Permission denied|Cannot allocate memory|"
    r"cannot find -l|Hunk #\d+ FAILED|^patch: ",
    re.IGNORECASE,
)


def progress(line: str) -> tuple[int, int] | None:
    """Steps done and steps in all, of a line of ninja's."""
    match = _PROGRESS.match(line)
    return (int(match[1]), int(match[2])) if match else None


def first_error(lines: t.Sequence[str], context: int = 6) -> list[str]:
    """The first real error in the output of a build, with the lines behind it that explain it.

    What follows the first one is mostly its consequence, and ninja ends with the outputs of other jobs.
    """
    start = next((number for number, line in enumerate(lines) if line.startswith("FAILED: ")), 0)
    for number in range(start, len(lines)):
        if _TELLING.search(lines[number]) and not lines[number].startswith("FAILED: "):
            return _until_next_step(lines[number : number + context])
    if start or any(line.startswith("FAILED: ") for line in lines[:1]):
        return _until_next_step(lines[start : start + context])
    return list(lines[-context:])


def _until_next_step(lines: t.Sequence[str]) -> list[str]:
    found = list(lines[:1])
    for line in lines[1:]:
        if progress(line) is not None or line.startswith(("FAILED: ", "ninja: ")):
            break
        found.append(line)
    return found
