# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""Disk images of lab hosts: built from a distribution's packages, cached under a hash of all that went in.

An image carries no name, no key and no address: those come at boot, from the emulator, so that any number of hosts
can start from one image. It boots by the distribution's own boot loader, and its kernel command line says nothing
about an IOMMU: turning that on is the work of the collection's roles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import struct
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.iommufd.host.plugins.module_utils import _lab_iommufd
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._lab_qemu import (
    accelerator,
    firmware_arguments,
    machine_arguments,
    require_emulator,
)
from ansible_collections.iommufd.host.plugins.module_utils._lab_run import logged, tail
from ansible_collections.iommufd.host.plugins.module_utils._lab_spec import ARCHITECTURES, Architecture, size_in_bytes
from ansible_collections.iommufd.host.plugins.module_utils._lock import host_lock

_BASE_PACKAGES = (
    "busybox-static",
    "ca-certificates",
    "dbus",
    "e2fsprogs",
    "initramfs-tools",
    "iproute2",
    "kmod",
    "less",
    "nano",
    "netbase",
    "openssh-server",
    "pciutils",
    "procps",
    "python3",
    # With it ansible.builtin.apt has nothing to install first.
    "python3-apt",
    "systemd",
    "systemd-sysv",
    "udev",
    "zstd",
)


@dataclass(frozen=True)
class Distribution:
    """What differs between distributions. ``sources`` replaces mmdebstrap's own list where it is not empty."""

    suite: str
    packages: tuple[str, ...] = _BASE_PACKAGES
    sources: tuple[str, ...] = ()


DISTRIBUTIONS: dict[str, Distribution] = {
    "trixie": Distribution("trixie"),
    "bookworm": Distribution("bookworm"),
    "forky": Distribution("forky"),
}

# The units that cost boot time, or that start work of their own in the middle of a test.
_MASKED = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "grub-common.service",
    "grub-initrd-fallback.service",
    "keyboard-setup.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "proc-sys-fs-binfmt_misc.automount",
    "run-lock.mount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-network-generator.service",
    "systemd-networkd-persistent-storage.service",
    "systemd-networkd-wait-online.service",
    "systemd-pcrphase.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-tpm2-setup-early.service",
    "systemd-tpm2-setup.service",
    "systemd-udev-load-credentials.service",
    "systemd-update-utmp.service",
    "tmp.mount",
)

# systemd's generators that find nothing in a lab host: each is a program run at every boot.
_MASKED_GENERATORS = (
    "systemd-bless-boot-generator",
    "systemd-cryptsetup-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-integritysetup-generator",
    "systemd-rc-local-generator",
    "systemd-ssh-generator",
    "systemd-tpm2-generator",
    "systemd-veritysetup-generator",
)

_IDENTITY_UNIT = """\
[Unit]
Description=Name and keys of this lab host, from its emulator
DefaultDependencies=no
RequiresMountsFor=/etc /root
After=systemd-remount-fs.service
Before=sysinit.target
ConditionPathIsDirectory=/run/credentials/@system

[Service]
Type=oneshot
ExecStart=/usr/local/libexec/lab-identity

[Install]
WantedBy=sysinit.target
"""

_IDENTITY_SCRIPT = """\
#!/bin/sh
# Writes the name and the keys that the emulator hands over (systemd's system credentials) where they belong.
set -eu
from=/run/credentials/@system
umask 077

put() {
    [ -s "$from/$1" ] || return 0
    cmp -s "$from/$1" "$2" || cat "$from/$1" >"$2"
}

mkdir -p /root/.ssh
put lab.authorized_keys /root/.ssh/authorized_keys
put lab.host_key /etc/ssh/ssh_host_ed25519_key
if [ -s "$from/lab.hostname" ]; then
    read -r name <"$from/lab.hostname"
    if [ "$name" != "$(cat /etc/hostname)" ]; then
        umask 022
        echo "$name" >/etc/hostname
        printf '127.0.0.1\\tlocalhost\\n127.0.1.1\\t%s\\n' "$name" >/etc/hosts
    fi
    echo "$name" >/proc/sys/kernel/hostname
fi
"""

_NETWORK = """\
# The card in slot 2 is the way in; all others are left alone. The emulator's network always hands out this address,
# so there is no reason to wait for DHCP.
[Match]
Path=pci-0000:00:02.0

[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
DNS=10.0.2.3
LinkLocalAddressing=no
IPv6AcceptRA=no
LLMNR=no
"""

_SSHD = """\
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
UseDNS no
"""

_GRUB = """\
# A lab host has a serial console and no one who could choose from a menu.
GRUB_TIMEOUT=0
GRUB_TERMINAL=serial
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
# On a busy machine the emulated timer may be late. With interrupt remapping the kernel would panic ("timer doesn't work
# through Interrupt-remapped IO-APIC"); as a guest of KVM it knows not to check.
GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX console=ttyS0,115200 no_timer_check"
"""

_GRUB_EFI = """\
# A lab host has a serial console, which is its firmware's, and no one who could choose from a menu.
GRUB_TIMEOUT=0
GRUB_TERMINAL=console
GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX console=ttyAMA0"
"""

_INITRAMFS = """\
# The initramfs is rebuilt, unpacked and searched on an emulated processor: the drivers come from hooks/lab.
MODULES=list
COMPRESS=zstd
COMPRESSLEVEL=1
"""

_INITRAMFS_HOOK = """\
#!/bin/sh
# What MODULES=most would put in for the devices that a lab host can have, at a tenth of the size. As there, udev loads
# the drivers when it meets the devices.
[ "$1" = prereqs ] && exit 0
. /usr/share/initramfs-tools/hook-functions
for module in ext4 virtio_pci virtio_blk virtio_net virtio_iommu nvme ahci sd_mod xhci_pci e1000 e1000e igb igbvf; do
    manual_add_modules "$module"
done
"""

# dracut's own answer to the same. Not made for one host: the image is built where there is no such machine.
_DRACUT = """\
# The initramfs is rebuilt, unpacked and searched on an emulated processor: only what a lab host can have.
hostonly="no"
compress="zstd -1"
drivers+=" ext4 virtio_pci virtio_blk virtio_net virtio_iommu nvme ahci sd_mod xhci_pci e1000 e1000e igb igbvf "
filesystems+=" ext4 "
early_microcode="no"
"""

_JOURNAL = """\
[Journal]
Storage=volatile
"""

_DPKG = """\
# Nobody reads manuals here, and unpacking them takes time.
path-exclude=/usr/share/man/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
force-unsafe-io
"""

_APT = """\
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
"""

_FSTAB = """\
LABEL=lab-root / ext4 errors=remount-ro 0 0
"""

# Runs as process 1 of the fresh disk, once: the distribution's own tools put the boot loader on it.
_GRUB_SCRIPT = """\
#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
finish() {
    # In a shell of its own: a script that is open when it is removed leaves work for the next boot's fsck.
    exec sh -c 'echo "LAB-BOOT-LOADER: $1"
        rm -f /lab-boot-loader
        sync
        mount -o remount,ro /
        echo o >/proc/sysrq-trigger
        while :; do sleep 1; done' - "$1"
}
exec >/dev/ttyS0 2>&1 </dev/null
mount -o remount,rw / || finish failed
grub-install --target=i386-pc /dev/vda && update-grub && finish done
finish failed
"""

# The same where firmware loads the boot loader: from the second partition, by the name that needs no entry of its own.
_GRUB_EFI_SCRIPT = _GRUB_SCRIPT.replace("/dev/ttyS0", "/dev/ttyAMA0").replace(
    "grub-install --target=i386-pc /dev/vda",
    "mkfs.vfat -n LAB-EFI /dev/vda2 && mkdir -p /boot/efi && mount /dev/vda2 /boot/efi &&\n"
    "    grub-install --target=arm64-efi --efi-directory=/boot/efi --removable --no-nvram && umount /boot/efi",
)

# path: (mode, text). They are in place before the packages come, so that they count from the first moment on.
_FILES: dict[str, tuple[int, str]] = {
    "etc/apt/apt.conf.d/90lab": (0o644, _APT),
    "etc/default/grub.d/00-lab.cfg": (0o644, _GRUB),
    "etc/dpkg/dpkg.cfg.d/lab": (0o644, _DPKG),
    "etc/fstab": (0o644, _FSTAB),
    "etc/ssh/sshd_config.d/lab.conf": (0o644, _SSHD),
    "etc/systemd/journald.conf.d/lab.conf": (0o644, _JOURNAL),
    "etc/systemd/network/10-lab.network": (0o644, _NETWORK),
    "etc/systemd/system/lab-identity.service": (0o644, _IDENTITY_UNIT),
    "usr/local/libexec/lab-identity": (0o755, _IDENTITY_SCRIPT),
    "lab-boot-loader": (0o755, _GRUB_SCRIPT),
}

_EFI_FILES: dict[str, tuple[int, str]] = {
    "etc/default/grub.d/00-lab.cfg": (0o644, _GRUB_EFI),
    "etc/fstab": (0o644, f"{_FSTAB}LABEL=LAB-EFI /boot/efi vfat umask=0077,nofail 0 0\n"),
    "lab-boot-loader": (0o755, _GRUB_EFI_SCRIPT),
}

_INITRAMFS_TOOLS_FILES: dict[str, tuple[int, str]] = {
    "etc/initramfs-tools/conf.d/lab": (0o644, _INITRAMFS),
    "etc/initramfs-tools/hooks/lab": (0o755, _INITRAMFS_HOOK),
}
_DRACUT_FILES: dict[str, tuple[int, str]] = {"etc/dracut.conf.d/50-lab.conf": (0o644, _DRACUT)}

# Runs with the root filesystem as $1 when all packages are in.
_CONFIGURE = """\
set -eu
root=$1
# Empty, not "uninitialized": each host gets an id of its own, without the first boot's run over all presets.
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root"/etc/ssh/ssh_host_*
echo lab >"$root/etc/hostname"
printf '127.0.0.1\\tlocalhost\\n127.0.1.1\\tlab\\n' >"$root/etc/hosts"
rm -f "$root/etc/resolv.conf"
echo 'nameserver 10.0.2.3' >"$root/etc/resolv.conf"
for unit in @MASKED@; do
    ln -sfn /dev/null "$root/etc/systemd/system/$unit"
done
mkdir -p "$root/etc/systemd/system-generators"
for generator in @GENERATORS@; do
    ln -sfn /dev/null "$root/etc/systemd/system-generators/$generator"
done
chroot "$root" systemctl --quiet enable systemd-networkd.service lab-identity.service ssh.service \\
    serial-getty@@CONSOLE@.service
# Not "quiet": the kernel's messages belong on the serial log.
sed -i 's|^GRUB_CMDLINE_LINUX_DEFAULT=.*|GRUB_CMDLINE_LINUX_DEFAULT="@ARGUMENTS@"|' "$root/etc/default/grub"
@DEBCONF@
# All caches are fresh: without this the first boot would make them once more (systemd-update-done.service).
touch -d '+1 day' "$root/etc/.updated" "$root/var/.updated"
"""


_DEBCONF = """\
echo 'grub-pc grub-pc/install_devices multiselect /dev/vda' | chroot "$root" debconf-set-selections
"""


@dataclass(frozen=True)
class ImageSpec:
    """Everything that decides on an image's content. ``size`` is in bytes; ``iommufd``: its kernel has it already."""

    distribution: str
    packages: tuple[str, ...] = ()
    size: int = 8 << 30
    mirror: str = ""
    check_valid_until: bool = True
    kernel_arguments: tuple[str, ...] = ()
    iommufd: bool = False
    architecture: str = "amd64"

    @property
    def processor(self) -> Architecture:
        """What differs by the hosts' processor."""
        return ARCHITECTURES[self.architecture]

    def inputs(self) -> dict[str, t.Any]:
        """All inputs of the build, as plain data: two images with the same inputs are interchangeable."""
        distribution = DISTRIBUTIONS[self.distribution]
        packages = {*distribution.packages, self.processor.package, *self.processor.packages, *self.packages}
        if self.dracut:
            packages.discard("initramfs-tools")
        return {
            "suite": distribution.suite,
            "packages": sorted(packages),
            "sources": [self.mirror] if self.mirror else list(distribution.sources),
            "check_valid_until": self.check_valid_until,
            "size": self.size,
            "files": {path: [oct(mode), text] for path, (mode, text) in sorted(self.files().items())},
            "configure": self.configure(),
            **({"iommufd": _lab_iommufd.key()} if self.iommufd else {}),
            **({"architecture": self.architecture} if self.architecture != "amd64" else {}),
        }

    @property
    def dracut(self) -> bool:
        """Whether dracut makes the initramfs: in Debian it and initramfs-tools exclude each other."""
        return "dracut" in self.packages

    @property
    def efi(self) -> bool:
        """Whether firmware loads the boot loader, from a partition of its own."""
        return self.architecture == "arm64"

    def files(self) -> dict[str, tuple[int, str]]:
        """The files that are in place before the packages come: mode and text by path."""
        found = {**_FILES, **(_DRACUT_FILES if self.dracut else _INITRAMFS_TOOLS_FILES)}
        return {**found, **_EFI_FILES} if self.efi else found

    def configure(self) -> str:
        """The script that puts the finishing touches to the root filesystem."""
        script = _CONFIGURE.replace("@MASKED@", " ".join(_MASKED))
        script = script.replace("@GENERATORS@", " ".join(_MASKED_GENERATORS))
        script = script.replace("@CONSOLE@", self.processor.console)
        script = script.replace("@DEBCONF@\n", "" if self.efi else _DEBCONF)
        return script.replace("@ARGUMENTS@", " ".join(self.kernel_arguments))

    def key(self) -> str:
        """Hash of all inputs."""
        text = json.dumps(self.inputs(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """The image in one line."""
        other = f" for {self.architecture}" if self.architecture != "amd64" else ""
        return f"{self.distribution}{other}, {len(self.inputs()['packages'])} packages asked for, {self.size >> 20} MiB"

    def name(self) -> str:
        """The image's directory in the cache."""
        return f"{self.distribution}-{self.key()}"


_ARGUMENT = re.compile(r"[A-Za-z0-9_.:=,+-]+")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(/[a-z0-9-]+)?")


def parse_image(
    distribution: str,
    packages: t.Sequence[str] = (),
    size: str = "8G",
    mirror: str | None = None,
    check_valid_until: bool = True,
    kernel_arguments: t.Sequence[str] = (),
    iommufd: bool = False,
    architecture: str = "amd64",
) -> ImageSpec:
    """Check an image's declaration.

    Raises:
        OptionError: names the option, the value and what is accepted.
    """
    if distribution not in DISTRIBUTIONS:
        raise OptionError("distribution", distribution, ", ".join(DISTRIBUTIONS))
    if architecture not in ARCHITECTURES:
        raise OptionError("architecture", architecture, ", ".join(ARCHITECTURES))
    for index, package in enumerate(packages):
        if not _PACKAGE.fullmatch(package):
            raise OptionError(f"packages[{index}]", package, "the name of a Debian package")
    for index, argument in enumerate(kernel_arguments):
        if not _ARGUMENT.fullmatch(argument):
            raise OptionError(f"kernel_arguments[{index}]", argument, "letters, digits and _.:=,+-")
    length = size_in_bytes(size, "size")
    if not 2 << 30 <= length <= 2 << 40:
        raise OptionError("size", size, "2G to 2T")
    if mirror and not re.fullmatch(r"[a-z+]+:[^\s'\"]+", mirror):
        raise OptionError("mirror", mirror, "the URI of a Debian mirror")
    return ImageSpec(
        distribution,
        tuple(sorted(set(packages))),
        length,
        mirror or "",
        check_valid_until,
        tuple(kernel_arguments),
        iommufd,
        architecture,
    )


def image_path(spec: ImageSpec, cache_dir: Path) -> Path:
    """Where the image is, or will be. What is there is complete."""
    return cache_dir / spec.name() / "disk.qcow2"


def build_image(spec: ImageSpec, cache_dir: Path, host: Host) -> bool:
    """Build the image, unless somebody else built it meanwhile; returns whether this call built it.

    A second build of the same image waits for the first. Where a build fails or is interrupted, nothing is left of it
    but its log, beside the images.

    Raises:
        HostError: a tool is missing, or failed; quotes its last lines.
    """
    _require_tools(host, spec.architecture)
    cache_dir.mkdir(parents=True, exist_ok=True)
    final = cache_dir / spec.name()
    log = cache_dir / f"{spec.name()}.log"
    with host_lock(timeout=_BUILD_TIMEOUT, path=str(cache_dir / f".{spec.name()}.lock")):
        if image_path(spec, cache_dir).is_file():
            return False
        work = cache_dir / f".{spec.name()}.building"
        # We hold the lock, so whoever left this is gone.
        _discard(work)
        work.mkdir()
        log.unlink(missing_ok=True)
        try:
            _build(spec, work, log, host)
            shutil.rmtree(final, ignore_errors=True)
            log.rename(work / "build.log")
            work.rename(final)
        except BaseException:
            with contextlib.suppress(HostError):  # what failed first is what the user has to hear of
                _discard(work)
            raise
    return True


_BUILD_TIMEOUT = 3600.0

_TOOLS = {"mmdebstrap": "mmdebstrap", "mkfs.ext4": "e2fsprogs", "qemu-img": "qemu-utils", "unshare": "util-linux"}


def _require_tools(host: Host, architecture: str) -> None:
    needed = dict(_TOOLS)
    machine = ARCHITECTURES[architecture].machine
    foreign = machine != platform.machine()
    if foreign:
        needed["arch-test"] = "arch-test"
    if os.geteuid() != 0:
        needed["newuidmap"] = "uidmap"
    missing = [package for tool, package in needed.items() if host.which(tool) is None]
    if missing:
        raise HostError(
            f"Tools are missing to build an image. On Debian and Ubuntu: apt install {' '.join(sorted(missing))}"
        )
    require_emulator(host, ARCHITECTURES[architecture].emulator, architecture)
    firmware_arguments(host, architecture)
    said = host.ask(["arch-test", architecture]) if foreign else None
    if foreign and (said is None or not said.ok):
        raise HostError(
            f"Programs for {machine} do not run on this machine, as installing packages of {architecture} needs. "
            "On Debian and Ubuntu: apt install qemu-user-binfmt, with /proc/sys/fs/binfmt_misc mounted"
        )


def _as_root() -> list[str]:
    """What a command is run through that makes files owned by others.

    In either case its mounts are its own, and are gone with it: removing the tree afterwards cannot reach through them.
    A user other than root is root in a user namespace, with the subordinate ids that the system gave to him.
    """
    if os.geteuid() == 0:
        return ["unshare", "--mount", "--"]
    return ["unshare", "--map-root-user", "--map-auto", "--mount", "--"]


def _discard(path: Path) -> None:
    if path.exists():
        logged([*_as_root(), "rm", "-rf", "--one-file-system", str(path)], "removing the build's directory", None, 600)


_PARTITION_START = 1 << 20


def _build(spec: ImageSpec, work: Path, log: Path, host: Host) -> None:
    rootfs = work / "rootfs"
    raw = work / "disk.raw"
    started = time.monotonic()

    _lab_iommufd.write_archive(str(work / "files.tar"), spec.files())
    (work / "configure").write_text(spec.configure(), encoding="ascii")
    inputs = spec.inputs()
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(inputs['packages'])}"]
    command.append(f"--architectures={spec.architecture}")
    if not spec.check_valid_until:
        command.append('--aptopt=Acquire::Check-Valid-Until "false"')
    command += [
        f"--essential-hook=tar-in {shlex.quote(str(work / 'files.tar'))} /",
        # Before the rest: afterwards the image's name server is the one that a lab host has.
        *(_iommufd_hooks(work / "iommufd.tar") if spec.iommufd else ()),
        f'--customize-hook=sh {shlex.quote(str(work / "configure"))} "$1"',
        inputs["suite"],
        str(rootfs),
        *inputs["sources"],
    ]
    logged([*_as_root(), *command], f"installing {spec.distribution}", log, _BUILD_TIMEOUT)

    length = _partition(raw, spec.size, spec.efi)
    filesystem = ["mkfs.ext4", "-q", "-L", "lab-root", "-m", "0", "-E", f"offset={_PARTITION_START},lazy_itable_init=1"]
    filesystem += ["-d", str(rootfs), str(raw), f"{length // 1024}k"]
    logged([*_as_root(), *filesystem], "making the file system", log, 600)
    kernel, initrd = _kernel(rootfs)
    shutil.copyfile(kernel, work / "vmlinuz")
    shutil.copyfile(initrd, work / "initrd.img")
    _discard(rootfs)

    _install_boot_loader(spec, work, raw, log, host)

    convert = ["qemu-img", "convert", "-O", "qcow2", str(raw), str(work / "disk.qcow2")]
    logged(convert, "converting the disk", log, 600)
    for leftover in ("disk.raw", "vmlinuz", "initrd.img", "files.tar", "iommufd.tar", "configure", "serial.log"):
        (work / leftover).unlink(missing_ok=True)
    record = {"inputs": inputs, "seconds": round(time.monotonic() - started, 1)}
    (work / "image.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _iommufd_hooks(payload: Path) -> list[str]:
    """What mmdebstrap does, when all packages are in, to have iommufd in the image."""
    _lab_iommufd.write_payload(str(payload))
    directory = _lab_iommufd.DIRECTORY
    return [
        f"--customize-hook=tar-in {shlex.quote(str(payload))} /",
        f'--customize-hook=chroot "$1" python3 /{directory}/install.py',
        f'--customize-hook=rm -rf "$1/{directory}"',
    ]


_EFI_SIZE = 64 << 20


def _partition(path: Path, size: int, efi: bool = False) -> int:
    """A sparse disk with an MBR partition table: one bootable Linux partition, from 1 MiB to the end, or to where the
    EFI system partition begins.

    Returns:
        the length of the Linux partition, in bytes.
    """
    length = size - _PARTITION_START - (_EFI_SIZE if efi else 0)

    def entry(flag: int, kind: int, start: int, length: int) -> bytes:
        # Boot flag, CHS (unused: all ones), type, CHS, first sector and number of sectors (little endian).
        chs = b"\xfe\xff\xff"
        return struct.pack("<B3sB3sII", flag, chs, kind, chs, start // 512, length // 512)

    entries = entry(0x80, 0x83, _PARTITION_START, length)
    if efi:
        entries += entry(0, 0xEF, _PARTITION_START + length, _EFI_SIZE)
    signature = hashlib.sha256(os.urandom(16)).digest()[:4]
    with open(path, "wb") as handle:
        handle.truncate(size)
        handle.seek(440)
        handle.write(signature + b"\0\0" + entries.ljust(64, b"\0") + b"\x55\xaa")
    return length


def _kernel(rootfs: Path) -> tuple[Path, Path]:
    kernels = sorted((rootfs / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise HostError("The distribution installed no kernel")
    kernel = kernels[-1]
    return kernel, rootfs / "boot" / kernel.name.replace("vmlinuz-", "initrd.img-")


def _install_boot_loader(spec: ImageSpec, work: Path, raw: Path, log: Path, host: Host) -> None:
    """Boot the disk once, with its own kernel given directly, and let it make itself bootable."""
    serial, console = work / "serial.log", spec.processor.console
    command = [
        *machine_arguments(spec.processor.emulator, accelerator(host, spec.architecture), 1024, 2, spec.architecture),
        *("-no-reboot", "-serial", f"file:{serial}"),
        *("-kernel", str(work / "vmlinuz"), "-initrd", str(work / "initrd.img")),
        *("-append", f"root=LABEL=lab-root rw console={console} quiet panic=-1 init=/lab-boot-loader"),
        *("-blockdev", f"driver=file,node-name=file,filename={raw},cache.no-flush=on,discard=unmap"),
        *("-blockdev", "driver=raw,node-name=disk,file=file,discard=unmap"),
        *("-device", "virtio-blk-pci,drive=disk", "-device", "virtio-rng-pci"),
    ]
    what = "installing the boot loader"
    try:
        logged(command, what, log, 900)
    except HostError as error:
        raise HostError(error.message, **error.details, console=tail(serial)) from error
    if "LAB-BOOT-LOADER: done" not in serial.read_text(encoding="utf-8", errors="replace"):
        raise HostError(f"{what} failed; the serial console's last lines are below", console=tail(serial))
