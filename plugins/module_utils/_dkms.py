# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""iommufd and vfio with character devices for kernels that were built without them, as DKMS modules.

Debian builds its kernels without CONFIG_IOMMUFD. Everything iommufd needs of the kernel is exported, so it compiles as
a set of external modules against the stock headers, from the kernel's own sources as the distribution ships them
(package linux-source-X.Y). What lies here is only the frame around those sources: DKMS configuration, make files, a
header that turns the options on for these modules, and a wrapper for the one library function that the stock kernel
does not compile.

DKMS rebuilds the set for each new kernel. ``prepare.sh``, run before each build, takes the sources of the kernel's own
series (6.12 for 6.12.117) and takes them anew when the distribution's tarball has changed since, as it does in the
same upgrade that brings the kernel. Where only an older tarball of the same series is there, that is used: within a
stable series these directories change by fixes only, and a mismatch that matters does not compile. For a kernel of a
series without sources DKMS is told to skip it, so that a kernel upgrade never fails because of us.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._dkms_frame import (
    DKMS_TREE,
    FILES,
    KERNEL_PATHS,
    MODULES,
    NAME,
    SOURCE_TREE,
    TREE,
    VERSION,
)
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._files import OWN_MARK, own_header
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._kernel import (
    Config,
    ModuleIndex,
    installed_releases,
    modules_directory,
    read_config,
    release,
    version_key,
)
from ansible_collections.iommufd.host.plugins.module_utils._own_files import (
    OWN_DIRECTORY,
    remove_own,
    write_own,
    write_whole,
)
from ansible_collections.iommufd.host.plugins.module_utils._packages import (
    Change,
    InstallPackages,
    Package,
    PurgePackages,
    Removal,
    UnknownPackages,
    have_lists,
    missing,
    plan_removal,
    read_packages,
    require_apt,
    simulate_install,
)
from ansible_collections.iommufd.host.plugins.module_utils._persistence import find_generator, find_images, make_anew
from ansible_collections.iommufd.host.plugins.module_utils._plan import Action, Plan, RemoveFile, Step, WriteFile, run
from ansible_collections.iommufd.host.plugins.module_utils._tarball import NotSeekable, SortedTarball

PURPOSE = "iommufd_dkms"

# vfio character devices came with Linux 6.6; iommufd without them is no use to QEMU.
OLDEST = (6, 6)

# A release as Debian writes it: "6.12.117+deb13-amd64", "6.1.0-40-cloud-amd64", "7.2.13+deb14-rt-amd64".
_RELEASE = re.compile(r"^(\d+)\.(\d+)\.(\d+)\S*?(?:[+~]\S*?|-\d+)-([a-z][a-z0-9-]*)$")
_SERIES = re.compile(r"^(\d+)\.(\d+)")

_SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
_MOK_CERTIFICATE = f"{DKMS_TREE}/mok.pub"
_MOK_KEY = f"{DKMS_TREE}/mok.key"
# There where DKMS had no key before our first build, which made one.
_KEY_NOTE = f"{OWN_DIRECTORY}/dkms-key"


# -- what is there ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An installed kernel, as far as iommufd is concerned.

    Attributes:
        release: "6.12.117+deb13-amd64".
        series: "6.12".
        running: whether it runs now.
        newest: whether it is the newest installed, the one that boots next unless somebody chose otherwise.
        state: "native" (has iommufd of its own), "dkms" (has ours), "partial" (an interrupted installation of ours),
            "missing" (has none), "unsupported" (cannot have it, see ``reason``).
        headers: whether its headers are installed.
        reason: the state in words.
    """

    release: str
    series: str
    running: bool
    newest: bool
    state: str
    headers: bool
    reason: str

    @property
    def flavour(self) -> str | None:
        """Debian's flavour ("amd64", "cloud-amd64"); None for a kernel that is not Debian's."""
        match = _RELEASE.match(self.release)
        return match[4] if match else None

    @property
    def version(self) -> str | None:
        """Upstream's version ("6.12.117"), as far as the release tells it."""
        match = _RELEASE.match(self.release)
        return f"{match[1]}.{match[2]}.{match[3]}" if match else None

    @property
    def ours(self) -> bool:
        """Whether it needs our modules (has them or not)."""
        return self.state in ("dkms", "partial", "missing")

    def to_dict(self) -> dict[str, t.Any]:
        return {
            "release": self.release,
            "running": self.running,
            "newest": self.newest,
            "state": self.state,
            "reason": self.reason,
        }


def read_kernels(host: Host) -> list[Kernel]:
    """Every installed kernel, oldest first."""
    running = release(host)
    releases = sorted(installed_releases(host), key=version_key)
    return [_read_kernel(host, name, name == running, name == releases[-1]) for name in releases]


def _read_kernel(host: Host, name: str, running: bool, newest: bool) -> Kernel:
    match = _SERIES.match(name)
    series = match[0] if match else ""
    index = ModuleIndex(host, name)
    state, reason = _read_state(host, name, index, read_config(host, name))
    headers = host.is_dir(f"{modules_directory(host, name)}/build/include")
    return Kernel(name, series, running, newest, state, headers, reason)


def _read_state(host: Host, name: str, index: ModuleIndex, config: Config | None) -> tuple[str, str]:
    own = index.files.get("iommufd")
    if (
        (config is not None and config.has("IOMMUFD"))
        or (own or "").startswith("kernel/")
        or "iommufd" in index.builtin
    ):
        return "native", "it has iommufd of its own"
    active = [link for link in host.listdir(f"{DKMS_TREE}/{NAME}") if link.startswith(f"kernel-{name}-")]
    target = host.readlink(f"{DKMS_TREE}/{NAME}/{active[0]}") if active else None
    paths = [index.files.get(module.replace("-", "_"), "") for module in MODULES]
    in_place = all(path.startswith("updates/dkms/") and host.exists(f"{index.directory}/{path}") for path in paths)
    if target is not None and target.startswith(f"{VERSION}/") and in_place:
        return "dkms", "its iommufd was built by DKMS"
    if own is not None and not own.startswith("updates/dkms/"):
        return "native", f"somebody put iommufd there ({own})"
    match = _SERIES.match(name)
    if match is None or (int(match[1]), int(match[2])) < OLDEST:
        return (
            "unsupported",
            f"vfio character devices came with Linux {OLDEST[0]}.{OLDEST[1]}; a newer kernel is needed",
        )
    if config is None:
        return "unsupported", f"its configuration is not known (no /boot/config-{name})"
    for option in ("VFIO", "VFIO_PCI_CORE", "VFIO_PCI"):
        if config.get(option) == "y":
            return "unsupported", f"vfio is built into it (CONFIG_{option}=y), so it cannot be replaced"
    if active or _traces(host, name):
        return "partial", "an installation of iommufd by DKMS was interrupted or is out of date"
    return "missing", f"it was built without iommufd (CONFIG_IOMMUFD is not set in {config.source})"


def _traces(host: Host, name: str) -> bool:
    """Whether DKMS has begun to install ours into a kernel."""
    installed = host.listdir(f"{modules_directory(host, name)}/updates/dkms")
    return (
        any(file.partition(".ko")[0] in MODULES for file in installed)
        or bool(host.listdir(f"{DKMS_TREE}/{NAME}/original_module/{name}"))
        or any(host.is_dir(f"{DKMS_TREE}/{NAME}/{version}/{name}") for version in dkms_versions(host))
    )


def dkms_versions(host: Host) -> list[str]:
    """The versions of our package that DKMS knows."""
    known = []
    for name in host.listdir(f"{DKMS_TREE}/{NAME}"):
        path = f"{DKMS_TREE}/{NAME}/{name}"
        if name != "original_module" and not name.startswith("kernel-") and host.is_dir(path):
            known.append(name)
    return known


def trees(host: Host) -> list[str]:
    """Our DKMS source trees of any version, complete or not."""
    found = []
    for name in host.listdir(SOURCE_TREE):
        path = f"{SOURCE_TREE}/{name}"
        if re.fullmatch(rf"{NAME}-[0-9][^/]*", name) and host.is_dir(path):
            conf = host.read_text(f"{path}/dkms.conf")
            # A tree whose writing was interrupted may have no dkms.conf yet; the other files bear the mark as well.
            marks = [conf] if conf is not None else [host.read_text(f"{path}/{file}") for file in FILES]
            if any(OWN_MARK in (text or "") for text in marks) or not host.listdir(path):
                found.append(path)
    return found


@dataclasses.dataclass(frozen=True)
class SecureBoot:
    """Whether the kernel loads signed modules only, and whether the key that DKMS signs with is trusted.

    Attributes:
        enabled: None where the firmware is not UEFI or does not say.
        certificate: the certificate of DKMS's key, once there is one.
        enrolled: None where that cannot be told (no key yet, no mokutil).
    """

    enabled: bool | None
    certificate: str | None
    enrolled: bool | None

    @property
    def warning(self) -> str | None:
        """What a person must do for the modules to be loaded; None where nothing, as far as can be told."""
        if not self.enabled or self.enrolled:
            return None
        if self.certificate is None:
            return (
                "Secure Boot is on and there is no key that DKMS could sign the modules with (no openssl?); the "
                "kernel will refuse to load them."
            )
        known = "is not enrolled" if self.enrolled is False else "may not be enrolled (mokutil could not tell)"
        return (
            f"Secure Boot is on and the key that DKMS signs with, {self.certificate}, {known}. Until it is, the kernel "
            f"refuses to load the modules. On the host: mokutil --import {self.certificate} (it asks for a password of "
            "your choice), reboot, and at the console choose Enroll MOK and enter that password."
        )


def read_secure_boot(host: Host) -> SecureBoot:
    """State of Secure Boot, from the firmware's variable (four bytes of attributes, then the value)."""
    value = host.read_bytes(_SECURE_BOOT)
    enabled = value[4] == 1 if value is not None and len(value) == 5 else None
    certificate = _MOK_CERTIFICATE if host.exists(_MOK_CERTIFICATE) else None
    enrolled = None
    if enabled is not None and certificate is not None:
        output = host.ask(["mokutil", "--test-key", certificate])
        if output is not None:
            enrolled = "already enrolled" in output.stdout
    return SecureBoot(enabled, certificate, enrolled)


# -- plans -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Planned:
    """What is to be done, and what the module's result says of it."""

    plan: Plan
    kernels: list[Kernel]
    warnings: list[str] = dataclasses.field(default_factory=list)
    reboot_reasons: list[str] = dataclasses.field(default_factory=list)
    source: dict[str, t.Any] | None = None
    installs: list[str] = dataclasses.field(default_factory=list)
    purges: list[str] = dataclasses.field(default_factory=list)
    kept: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The user's wishes.

    Attributes:
        install_packages: whether packages may be installed.
        source: a kernel source tarball to use in place of the distribution's.
        check: whether this is check mode, in which package lists cannot be fetched.
        offline: whether the system does not run (an image in the making, entered by chroot): the newest kernel counts.
    """

    install_packages: bool = True
    source: str | None = None
    check: bool = False
    offline: bool = False


def plan_present(host: Host, wanted: Wanted) -> Planned:
    """What it takes for the running and the newest kernel to have iommufd.

    Raises:
        HostError: it cannot be had; nothing has been changed.
        OptionError: the tarball that the user named is not one.
    """
    kernels = read_kernels(host)
    planned = Planned(Plan(), kernels)
    running = next((kernel for kernel in kernels if (kernel.newest if wanted.offline else kernel.running)), None)
    if running is None and wanted.offline:
        raise HostError("No kernel is installed under /usr/lib/modules.")
    if running is None:
        raise HostError(
            f"The running kernel {release(host) or '(unknown)'} has no modules installed under /usr/lib/modules; it "
            "was probably replaced by an upgrade. Reboot into an installed kernel and run again."
        )
    if running.state == "unsupported":
        raise HostError(f"iommufd cannot be built for the running kernel {running.release}: {running.reason}.")
    targets = [kernel for kernel in kernels if kernel.ours and (kernel.running or kernel.newest or kernel.headers)]
    stale = [tree for tree in trees(host) if tree != TREE or not targets]
    if not targets:
        # Nothing needs us (any more: the user may have changed to a kernel that has iommufd of its own).
        if stale or dkms_versions(host):
            return plan_absent(host, kernels)
        return planned
    if all(kernel.state == "dkms" for kernel in targets):
        _warn_of_secure_boot(host, planned)
    _refuse_foreign_tree(host)
    _plan_packages(host, wanted, planned, targets)
    renew = bool(stale) or any(version != VERSION for version in dkms_versions(host))
    if renew:
        _plan_dkms_removal(host, planned.plan, stale, [kernel.release for kernel in kernels])
    _plan_tree(host, wanted, planned, targets)
    keys_were_there = host.exists(_MOK_KEY)
    if not keys_were_there and any(kernel.state != "dkms" or renew for kernel in targets):
        text = own_header() + "# DKMS had no signing key on this host before; it goes with the modules.\n"
        for step in write_own(host, _KEY_NOTE, text.encode(), 0o644):
            planned.plan.add(step)
    for kernel in targets:
        if kernel.state != "dkms" or renew:
            planned.plan.add(
                Action(
                    f"build and install iommufd and vfio for kernel {kernel.release} with DKMS",
                    f"/usr/lib/modules/{kernel.release}/updates/dkms",
                    "",
                    "".join(f"{name}\n" for name in sorted(MODULES)),
                    do=functools.partial(build, kernel.release),
                    take_back=functools.partial(_take_build_back, kernel.release, keys_were_there),
                )
            )
    for kernel in targets:
        if kernel.state != "dkms" or renew:
            _plan_initramfs(host, planned.plan, kernel.release)
    if not wanted.offline:
        _plan_unload(host, planned, running)
    return planned


def plan_absent(host: Host, kernels: list[Kernel] | None = None) -> Planned:
    """What it takes for the host to be as it was without us."""
    kernels = read_kernels(host) if kernels is None else kernels
    planned = Planned(Plan(), kernels)
    ours = trees(host)
    known = bool(dkms_versions(host)) or host.is_dir(f"{DKMS_TREE}/{NAME}/original_module")
    touched = [kernel.release for kernel in kernels if kernel.state == "dkms" or _traces(host, kernel.release)]
    if not ours and host.is_dir(TREE):
        _refuse_foreign_tree(host)
    if any(kernel.running and kernel.release in touched for kernel in kernels):
        _plan_unload_ours(host, planned)
    if ours or known or touched:
        _plan_dkms_removal(host, planned.plan, ours, [kernel.release for kernel in kernels])
        for release_ in touched:
            _plan_initramfs(host, planned.plan, release_)
    removal = plan_removal(host, PURPOSE, _named_packages(host, kernels))
    _plan_key(host, planned.plan, "dkms" in removal.purge)
    if removal.forget:
        _plan_purge(host, planned, removal)
    return planned


# vfio among the modules that a person wants in the initramfs.
_IN_INITRAMFS = re.compile(r"^[^#\n]*\bvfio", re.MULTILINE)


def _plan_initramfs(host: Host, plan: Plan, name: str) -> None:
    """Have a kernel's initramfs made anew where it holds vfio: the one in there is loaded first, and would stay."""
    paths = ["/etc/initramfs-tools/modules", "/etc/dracut.conf"]
    paths.extend(f"/etc/dracut.conf.d/{file}" for file in host.listdir("/etc/dracut.conf.d"))
    if not any(_IN_INITRAMFS.search(host.read_text(path) or "") for path in paths):
        return
    generator = find_generator(host)
    for image in find_images(host):
        if generator is not None and image.release == name:
            again = functools.partial(make_anew, host, generator, image)
            plan.add(Action(f"make {image.path} anew, which holds vfio", do=again))


def _refuse_foreign_tree(host: Host) -> None:
    conf = host.read_text(f"{TREE}/dkms.conf")
    if conf is not None and OWN_MARK not in conf:
        raise HostError(
            f"{TREE} is a DKMS source tree of somebody else (its dkms.conf does not bear our mark). "
            f"Remove it (dkms remove {NAME}/{VERSION} --all) and run again."
        )


def tarball(series: str) -> str:
    """Where the distribution puts the sources of a series."""
    return f"{SOURCE_TREE}/linux-source-{series}.tar.xz"


# -- packages --------------------------------------------------------------------------------------------------------


def _named_packages(host: Host, kernels: t.Iterable[Kernel]) -> set[str]:
    """Every package that may have been named when installing; what else the record has came as a dependency."""
    names = {"dkms", "xz-utils", "openssl", "mokutil", "linux-source"}
    for kernel in kernels:
        names |= {f"linux-source-{kernel.series}", f"linux-headers-{kernel.release}", f"linux-headers-{kernel.flavour}"}
    return names


def _plan_packages(host: Host, wanted: Wanted, planned: Planned, targets: t.Sequence[Kernel]) -> None:
    packages = read_packages(host)
    names, optional = _packages_for(host, wanted, packages, targets)
    needed = [*missing(packages, names), *missing(packages, optional)]
    if not needed:
        return
    if not wanted.install_packages:
        needed = missing(packages, names)
        if needed:
            raise HostError(
                f"Building iommufd for kernel {targets[-1].release} needs packages that are not installed: "
                f"{' '.join(needed)}. Install them, or set install_packages to true.",
                packages=needed,
            )
        return
    require_apt(host)
    explain = functools.partial(_explain_unknown, targets)
    change: Change | None = None
    refresh = not have_lists(host)
    if not refresh:
        try:
            change = simulate_install(host, needed)
        except UnknownPackages as error:
            if not set(error.names) - set(optional):
                needed = [name for name in needed if name not in error.names]
                change = simulate_install(host, needed) if needed else None
            elif wanted.check:
                raise explain(error) from error
            else:
                refresh = True  # the lists may be older than the kernel
    if not needed:
        return
    if change is not None and change.removed:
        raise HostError(
            f"Installing {' '.join(needed)} would remove {' '.join(change.removed)}; that is not done here."
        )
    if refresh and wanted.check:
        planned.warnings.append(
            "The package lists have not been fetched on this host, so it is not known yet whether "
            f"{', '.join(needed)} can be had."
        )
    planned.installs = sorted(change.new) if change is not None else list(needed)
    planned.plan.add(
        InstallPackages(
            f"install the packages {' '.join(needed)}",
            "packages",
            "",
            "".join(f"{name}\n" for name in planned.installs),
            names=needed,
            purpose=PURPOSE,
            refresh=refresh,
            optional=optional,
            explain=explain,
            change=change,
        )
    )


def _packages_for(
    host: Host, wanted: Wanted, packages: t.Mapping[str, Package], targets: t.Sequence[Kernel]
) -> tuple[list[str], list[str]]:
    """Packages without which nothing can be built, and those that only keep it working across upgrades."""
    names = ["dkms"]
    optional: list[str] = []
    for series in sorted({kernel.series for kernel in targets}):
        unpacked = host.exists(f"{TREE}/linux-{series}/SOURCE")
        if wanted.source is None and not host.exists(tarball(series)):
            (optional if unpacked else names).append(f"linux-source-{series}")
    for kernel in targets:
        if not kernel.headers:
            if kernel.flavour is None:
                raise HostError(
                    f"Kernel {kernel.release} is not one of Debian's and its headers are not installed; put them where "
                    f"/usr/lib/modules/{kernel.release}/build points to and run again."
                )
            names.append(f"linux-headers-{kernel.release}")
        image = packages.get(f"linux-image-{kernel.flavour}")
        if image is not None and image.installed and f"linux-headers-{kernel.flavour}" not in optional:
            optional.append(f"linux-headers-{kernel.flavour}")  # so that the next kernel comes with its headers
            if kernel.newest and image.version.startswith(f"{kernel.series}.") and "~bpo" not in image.version:
                optional.append("linux-source")  # and one of the next series with its sources; not so in backports
    if host.which("xz") is None:
        names.append("xz-utils")
    if read_secure_boot(host).enabled:
        names.extend(
            name for name, command in (("openssl", "openssl"), ("mokutil", "mokutil")) if not host.which(command)
        )
    return names, optional


def _explain_unknown(targets: t.Sequence[Kernel], error: UnknownPackages) -> HostError:
    """An error that says what a package that apt does not know means for iommufd."""
    for name in error.names:
        if name.startswith("linux-source-"):
            return HostError(
                f"Kernel {targets[-1].release} has no iommufd and there are no sources to build it from: the package "
                f"{name} is not available, and {tarball(targets[-1].series)} does not exist. Add the distribution's "
                "main section to the apt sources, or name a tarball of that kernel's source (option source)."
            )
        if name.startswith("linux-headers-"):
            return HostError(
                f"The headers of kernel {name[len('linux-headers-') :]} ({name}) are no longer in the distribution's "
                "archive, which keeps those of the newest kernel only. Upgrade the kernel (apt-get install "
                f"linux-image-{targets[-1].flavour}), reboot into it and run again."
            )
    return error


def _plan_key(host: Host, plan: Plan, with_dkms: bool) -> None:
    """Remove the signing key that our first build made, unless others need it by now, or the firmware trusts it."""
    note = remove_own(host, _KEY_NOTE)
    if (note or with_dkms) and not _others_in_dkms(host):
        secure_boot = read_secure_boot(host)
        if secure_boot.enabled is None or secure_boot.enrolled is False:
            for path in (_MOK_KEY, _MOK_CERTIFICATE):
                if host.exists(path):
                    plan.add(RemoveFile(f"remove {path}, made by DKMS", path, "a key\n", "", path=path))
    for step in note:
        plan.add(step)


def _plan_purge(host: Host, planned: Planned, removal: Removal) -> None:
    planned.purges = removal.purge
    planned.kept = removal.keep
    planned.plan.add(
        PurgePackages(
            f"purge the packages {' '.join(removal.purge)}" if removal.purge else "forget the packages that stay",
            "packages",
            "".join(f"{name}\n" for name in removal.purge),
            "",
            names=removal.purge,
            purpose=PURPOSE,
        )
    )


def _others_in_dkms(host: Host) -> list[str]:
    return [name for name in host.listdir(DKMS_TREE) if name != NAME and host.is_dir(f"{DKMS_TREE}/{name}")]


# -- the source tree -------------------------------------------------------------------------------------------------


def _plan_tree(host: Host, wanted: Wanted, planned: Planned, targets: t.Sequence[Kernel]) -> None:
    plan = planned.plan
    for name, content in FILES.items():
        for step in write_whole(host, f"{TREE}/{name}", content.encode(), 0o755 if name.endswith(".sh") else 0o644):
            plan.add(step)
    kernel = next((one for one in targets if one.running), targets[-1])
    if wanted.source is not None:
        version = source_version(host, wanted.source)
        series = ".".join(version.split(".")[:2])
        if series not in {one.series for one in targets}:
            accepted = " or ".join(sorted({f"one of Linux {one.series}" for one in targets}))
            raise OptionError("source", wanted.source, f"a kernel source tarball, {accepted}", f"it is Linux {version}")
        _plan_named_source(host, plan, series, wanted.source)
        planned.source = {"tarball": wanted.source, "version": version, "package": None}
    else:
        for name in host.listdir(TREE):
            if name.startswith("source-"):
                plan.add(RemoveFile(f"remove {TREE}/{name}", f"{TREE}/{name}", "", "", path=f"{TREE}/{name}"))
        version = _package_version(host, kernel.series)
        planned.source = {
            "tarball": tarball(kernel.series),
            "version": version or None,
            "package": f"linux-source-{kernel.series}",
        }
    for series in sorted({one.series for one in targets}):
        source = wanted.source if wanted.source is not None and series == _series(version) else tarball(series)
        building = any(one.series == series and one.state != "dkms" for one in targets)
        known = host.read_line(f"{TREE}/linux-{series}/SOURCE")
        # Sources that are merely older than the tarball are taken anew only when something is to be built.
        if known is None or (building and host.exists(source) and known != stamp(host, source)):
            plan.add(
                Action(
                    f"take iommufd and vfio of Linux {series} out of {source}",
                    f"{TREE}/linux-{series}",
                    "",
                    f"sources from {source}\n",
                    do=functools.partial(unpack, series, source),
                    take_back=functools.partial(shutil.rmtree, f"{TREE}/linux-{series}", True),
                )
            )
    for name in host.listdir(TREE):
        if re.fullmatch(r"\.linux-.*\.new", name):
            plan.add(
                Action(
                    f"remove {TREE}/{name}, left by an interrupted run",
                    do=functools.partial(shutil.rmtree, f"{TREE}/{name}", True),
                )
            )


def _package_version(host: Host, series: str) -> str:
    """Upstream's version of the installed source package; empty where there is none."""
    package = read_packages(host).get(f"linux-source-{series}")
    return package.version.partition("-")[0] if package is not None and package.installed else ""


def look_again(host: Host, planned: Planned) -> None:
    """Fill in what shows only once the plan has been applied: the packages that came, and the sources' version."""
    for step in planned.plan.steps:
        if isinstance(step, InstallPackages):
            planned.installs = sorted(step.added)
    planned.kernels = read_kernels(host)
    _warn_of_secure_boot(host, planned)
    kernel = next((one for one in planned.kernels if one.running), None)
    if planned.source is None or kernel is None:
        return
    if planned.source["package"] is not None:
        planned.source["version"] = _package_version(host, kernel.series) or None
    version = planned.source["version"]
    if version is not None and kernel.version is not None and version != kernel.version:
        planned.warnings.append(
            f"The sources are those of Linux {version}, the running kernel is {kernel.version}. Within a stable series "
            "that differs by fixes only; a difference that matters would not have compiled."
        )


def _warn_of_secure_boot(host: Host, planned: Planned) -> None:
    warning = read_secure_boot(host).warning
    built = any(kernel.state == "dkms" for kernel in planned.kernels)
    if warning is not None and built and warning not in planned.warnings:
        planned.warnings.append(warning)


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _plan_named_source(host: Host, plan: Plan, series: str, source: str) -> None:
    """Remember a tarball that the user named, for rebuilds on kernel upgrades."""
    path = f"{TREE}/source-{series}"
    before = host.read_text(path)
    if before != source + "\n":
        plan.add(
            WriteFile(f"write {path}", path, before or "", source + "\n", path=path, content=f"{source}\n".encode())
        )


def stamp(host: Host, path: str) -> str | None:
    """A tarball's path, size and time of change, as ``prepare.sh`` writes it; None where it is missing."""
    status = host.stat(path)
    return f"{path} {status.st_size} {int(status.st_mtime)}" if status is not None else None


def source_version(host: Host, path: str) -> str:
    """The version of the kernel in a source tarball ("6.12.117"), from its top Makefile.

    Raises:
        OptionError: the file is missing or not a kernel source tarball.
    """
    accepted = "the path of a kernel source tarball on the host"
    if not path.startswith("/") or not host.exists(path):
        raise OptionError("source", path, accepted, "there is no such file")
    try:
        text = SortedTarball(host.path(path)).extract(["Makefile"])["Makefile"].decode("utf-8", "replace")
    except (OSError, NotSeekable):
        output = host.ask(
            ["tar", "-xOf", path, "--occurrence=1", "--wildcards", "--no-wildcards-match-slash", "*/Makefile"], 600
        )
        text = output.stdout if output is not None else ""
    numbers = [re.search(rf"^{name} = (\d+)$", text, re.MULTILINE) for name in ("VERSION", "PATCHLEVEL", "SUBLEVEL")]
    if not all(numbers):
        raise OptionError("source", path, accepted, "its top directory has no Makefile of the kernel")
    return ".".join(match[1] for match in numbers if match)


def unpack(series: str, source: str) -> None:
    """Take what is needed out of a kernel source tarball, into the DKMS source tree, whole or not at all.

    Raises:
        HostError: it is missing or lacks what is needed.
    """
    host = Host()
    mark = stamp(host, source)
    if mark is None:
        raise HostError(
            f"the kernel's sources are not there ({source}); install linux-source-{series} or name a tarball "
            "(option source)"
        )
    new = f"{TREE}/.linux-{series}.new"
    shutil.rmtree(new, ignore_errors=True)
    try:
        files = SortedTarball(source).extract(KERNEL_PATHS)
    except NotSeekable:
        run(["sh", f"{TREE}/prepare.sh", "--unpack", series], 1800)
        return
    files["SOURCE"] = f"{mark}\n".encode()
    for name, content in files.items():
        path = f"{new}/{name}"
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
    os.sync()  # renamed only once it is on the disk
    shutil.rmtree(f"{TREE}/linux-{series}", ignore_errors=True)
    os.rename(new, f"{TREE}/linux-{series}")


# -- DKMS ------------------------------------------------------------------------------------------------------------


def build(name: str) -> None:
    """Build and install the modules for a kernel.

    Raises:
        HostError: it failed; quotes the compiler, ``details`` has the log's last lines as ``log``.
    """
    host = Host()
    if _traces(host, name):
        restore(name)
    if not host.is_dir(f"{modules_directory(host, name)}/build/include"):
        raise HostError(f"the headers of kernel {name} are not installed")
    try:
        run(["dkms", "install", "-m", NAME, "-v", VERSION, "-k", name], 3600)
    except HostError as error:
        log = host.read_text(f"{DKMS_TREE}/{NAME}/{VERSION}/build/make.log")
        if log is None:
            raise
        lines = [line for line in log.splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"\berror\b|Error \d|No such file|not found", line)] or lines
        raise HostError(f"the build failed: {' / '.join(telling[:3])}", log=lines[-40:]) from error


def _take_build_back(name: str, keys_were_there: bool) -> None:
    host = Host()
    if any(_traces(host, other) for other in installed_releases(host) if other != name):
        restore(name)  # the builds for other kernels stay: one of them may be the one that runs
    else:
        remove_builds([name])
    if not keys_were_there:
        for path in (_MOK_KEY, _MOK_CERTIFICATE):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def remove_builds(releases: t.Iterable[str]) -> None:
    """Take every build of ours out of DKMS and out of the kernels, the kernels' own modules back in place.

    Raises:
        HostError: something of it is still there afterwards.
    """
    host = Host()
    if host.which("dkms") is not None:
        for version in dkms_versions(host):
            with contextlib.suppress(HostError):  # what DKMS cannot take back (half-made, source gone) is done below
                run(["dkms", "remove", "-m", NAME, "-v", version, "--all"], 900)
    for name in releases:
        if _traces(host, name):
            restore(name)
    left = [
        f"{path}/{file}"
        for path, _directories, files in os.walk(f"{DKMS_TREE}/{NAME}/original_module")
        for file in files
        if ".ko" in file
    ]
    if left:
        raise HostError(f"modules of a kernel that DKMS had set aside are still there: {', '.join(left)}")
    shutil.rmtree(f"{DKMS_TREE}/{NAME}", ignore_errors=True)


def restore(name: str) -> None:
    """Give a kernel its own modules back after DKMS was interrupted while it replaced them with ours.

    DKMS moves a module that it replaces to ``original_module/RELEASE/ARCH`` and then notes beside it where it was
    (do_install in dkms). A power cut can leave the module without that note, or with an empty one; depmod's index,
    which DKMS makes anew only at the end, still tells then.

    Raises:
        HostError: a module is set aside and nothing tells where it was; it is left there.
    """
    index = ModuleIndex(Host(), name)
    directory = modules_directory(Host(), name)
    saved = f"{DKMS_TREE}/{NAME}/original_module/{name}"
    for path, _directories, files in os.walk(saved):
        for file in sorted(files):
            module = f"{path}/{file}"
            if ".ko" not in file or file.endswith(".origin"):
                continue
            origin = Host().read_line(f"{module}.origin")
            place = index.files.get(file.partition(".ko")[0].replace("-", "_"), "")
            if origin is None and place.startswith("kernel/"):
                origin = f"{directory}/{place}"
            if origin is None:
                raise HostError(
                    f"DKMS has set {module} aside and nothing tells where it was. Install the package of kernel {name} "
                    f"again (apt-get install --reinstall linux-image-{name}), remove {module} and run again"
                )
            if "/updates/dkms/" not in origin:
                os.makedirs(os.path.dirname(origin), 0o755, exist_ok=True)
                shutil.move(module, origin)
    shutil.rmtree(saved, ignore_errors=True)
    updates = f"{directory}/updates/dkms"
    for file in Host().listdir(updates):
        if file.partition(".ko")[0] in MODULES:
            os.unlink(f"{updates}/{file}")
    for empty in (updates, f"{directory}/updates", f"{DKMS_TREE}/{NAME}/original_module"):
        with contextlib.suppress(OSError):
            os.rmdir(empty)
    for link in Host().listdir(f"{DKMS_TREE}/{NAME}"):
        if link.startswith(f"kernel-{name}-"):
            os.unlink(f"{DKMS_TREE}/{NAME}/{link}")
    for version in dkms_versions(Host()):
        shutil.rmtree(f"{DKMS_TREE}/{NAME}/{version}/{name}", ignore_errors=True)
    run(["depmod", "-a", name], 300)


def _plan_dkms_removal(host: Host, plan: Plan, ours: t.Sequence[str], releases: t.Sequence[str]) -> None:
    """Take builds and source trees away."""
    if dkms_versions(host) or host.is_dir(f"{DKMS_TREE}/{NAME}") or any(_traces(host, name) for name in releases):
        plan.add(
            Action(
                "remove iommufd and vfio built by DKMS, and put the kernels' own modules back",
                f"{DKMS_TREE}/{NAME}",
                "".join(f"{version}\n" for version in dkms_versions(host)),
                "",
                do=functools.partial(remove_builds, list(releases)),
                take_back=_cannot_rebuild,
            )
        )
    for tree in ours:
        plan.add(RemoveTree(f"remove {tree}", tree, "a DKMS source tree\n", "", path=tree))


def _cannot_rebuild() -> None:
    raise HostError("they are built again by a run with state present")


@dataclasses.dataclass
class RemoveTree(Step):
    """Remove a directory of ours with everything in it; small enough to be kept in memory for :meth:`undo`."""

    path: str = ""

    def __post_init__(self) -> None:
        self._files: dict[str, tuple[bytes, int]] = {}

    def apply(self) -> None:
        for directory, _directories, files in os.walk(self.path):
            for name in files:
                path = os.path.join(directory, name)
                with open(path, "rb") as file:
                    self._files[path] = (file.read(), os.fstat(file.fileno()).st_mode & 0o7777)
        shutil.rmtree(self.path)

    def undo(self) -> None:
        for path, (content, mode) in self._files.items():
            os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
            os.chmod(path, mode)


# -- modules that are loaded -----------------------------------------------------------------------------------------

# In the order in which they can be unloaded.
_STACK = ("vfio_pci", "vfio_pci_core", "vfio_iommu_type1", "vfio", "iommufd")


def loaded_stack(host: Host) -> list[str]:
    """Which modules of iommufd and vfio are loaded, in the order in which they can be unloaded."""
    return [name for name in _STACK if host.exists(f"/sys/module/{name}/initstate")]


def stock_vfio_loaded(host: Host) -> bool:
    """Whether the loaded vfio is one without iommufd: the other one holds the module iommufd."""
    return host.exists("/sys/module/vfio/initstate") and not host.exists("/sys/module/iommufd/holders/vfio")


def stack_users(host: Host) -> list[str]:
    """What keeps the loaded modules from being unloaded, in words; empty when they can be."""
    users: list[str] = []
    for name in loaded_stack(host):
        holders = host.listdir(f"/sys/module/{name}/holders")
        foreign = [holder for holder in holders if holder not in _STACK]
        users.extend(f"module {holder} uses {name}" for holder in foreign)
        count = host.read_int(f"/sys/module/{name}/refcnt")
        if count is not None and count > len(holders):
            users.append(f"{name} is in use")
    bound = [entry for entry in host.listdir("/sys/bus/pci/drivers/vfio-pci") if re.match(r"[0-9a-f]{4,}:", entry)]
    users.extend(f"{address} is bound to vfio-pci" for address in bound)
    return users


def _plan_unload(host: Host, planned: Planned, running: Kernel) -> None:
    """See to it that the next load takes our vfio where the stock one is loaded."""
    if running.ours and stock_vfio_loaded(host):
        users = stack_users(host)
        if users:
            planned.reboot_reasons.append(
                f"the stock kernel's vfio is loaded and cannot be unloaded now ({'; '.join(users)}); the one with "
                "iommufd is used after a reboot"
            )
        else:
            names = loaded_stack(host)
            planned.plan.add(
                Action(
                    f"unload the stock kernel's {', '.join(names)}",
                    do=functools.partial(_unload, names),
                    take_back=functools.partial(_reload, names),
                )
            )
    if not running.newest and running.ours:
        newest = planned.kernels[-1]
        if newest.state == "unsupported":
            planned.warnings.append(
                f"The newest installed kernel {newest.release} will not have iommufd: {newest.reason}."
            )


def _plan_unload_ours(host: Host, planned: Planned) -> None:
    names = loaded_stack(host)
    if "iommufd" not in names:
        return
    users = stack_users(host)
    if users:
        planned.reboot_reasons.append(
            f"iommufd built by DKMS is loaded and cannot be unloaded now ({'; '.join(users)}); "
            "it is gone after a reboot"
        )
    else:
        planned.plan.add(
            Action(
                f"unload {', '.join(names)}",
                do=functools.partial(_unload, names),
                take_back=functools.partial(_reload, names),
            )
        )


def _unload(names: t.Sequence[str]) -> None:
    run(["rmmod", *names], 60)


def _reload(names: t.Sequence[str]) -> None:
    run(["modprobe", "-a", *reversed(names)], 60)
