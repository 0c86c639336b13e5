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
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import tarfile
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.iommufd.host.plugins.module_utils._lab_qemu import (
    LabError,
    accelerator,
    emulator_version,
    machine_arguments,
    size_in_bytes,
)

Progress = t.Callable[[str], None]

_BASE_PACKAGES = (
    "busybox-static",
    "ca-certificates",
    "dbus",
    "grub-pc",
    "initramfs-tools",
    "iproute2",
    "kmod",
    "less",
    "linux-image-amd64",
    "nano",
    "netbase",
    "openssh-server",
    "pciutils",
    "procps",
    "python3",
    # With it ansible.builtin.apt has nothing to install first.
    "python3-apt",
    "qemu-system-x86",
    "systemd",
    "systemd-sysv",
    "udev",
    "zstd",
)


@dataclass(frozen=True)
class Distribution:
    """What differs between distributions. ``sources`` replaces mmdebstrap's own list where it is not empty."""

    suite: str
    packages: t.Tuple[str, ...] = _BASE_PACKAGES
    sources: t.Tuple[str, ...] = ()


DISTRIBUTIONS: t.Dict[str, Distribution] = {
    "trixie": Distribution("trixie"),
    "bookworm": Distribution("bookworm"),
    "forky": Distribution("forky"),
}

#: The units that cost boot time, or that start work of their own in the middle of a test.
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

#: systemd's generators that find nothing in a lab host: each is a program run at every boot.
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
GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX console=ttyS0,115200"
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
for module in ext4 virtio_pci virtio_blk virtio_net nvme ahci sd_mod xhci_pci e1000 e1000e igb igbvf; do
    manual_add_modules "$module"
done
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

#: Runs as process 1 of the fresh disk, once: the distribution's own tools put the boot loader on it.
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

#: path: (mode, text). They are in place before the packages come, so that they count from the first moment on.
_FILES: t.Dict[str, t.Tuple[int, str]] = {
    "etc/apt/apt.conf.d/90lab": (0o644, _APT),
    "etc/default/grub.d/00-lab.cfg": (0o644, _GRUB),
    "etc/dpkg/dpkg.cfg.d/lab": (0o644, _DPKG),
    "etc/fstab": (0o644, _FSTAB),
    "etc/initramfs-tools/conf.d/lab": (0o644, _INITRAMFS),
    "etc/initramfs-tools/hooks/lab": (0o755, _INITRAMFS_HOOK),
    "etc/ssh/sshd_config.d/lab.conf": (0o644, _SSHD),
    "etc/systemd/journald.conf.d/lab.conf": (0o644, _JOURNAL),
    "etc/systemd/network/10-lab.network": (0o644, _NETWORK),
    "etc/systemd/system/lab-identity.service": (0o644, _IDENTITY_UNIT),
    "usr/local/libexec/lab-identity": (0o755, _IDENTITY_SCRIPT),
    "lab-boot-loader": (0o755, _GRUB_SCRIPT),
}

#: Runs with the root filesystem as $1 when all packages are in.
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
    serial-getty@ttyS0.service
# Not "quiet": the kernel's messages belong on the serial log.
sed -i 's|^GRUB_CMDLINE_LINUX_DEFAULT=.*|GRUB_CMDLINE_LINUX_DEFAULT="@ARGUMENTS@"|' "$root/etc/default/grub"
echo 'grub-pc grub-pc/install_devices multiselect /dev/vda' | chroot "$root" debconf-set-selections
# All caches are fresh: without this the first boot would make them once more (systemd-update-done.service).
touch -d '+1 day' "$root/etc/.updated" "$root/var/.updated"
"""


@dataclass(frozen=True)
class ImageSpec:
    """Everything that decides on an image's content. ``size`` is in bytes."""

    distribution: str
    packages: t.Tuple[str, ...] = ()
    size: int = 8 << 30
    mirror: str = ""
    check_valid_until: bool = True
    kernel_arguments: t.Tuple[str, ...] = ()

    def inputs(self) -> t.Dict[str, t.Any]:
        """All inputs of the build, as plain data: two images with the same inputs are interchangeable."""
        distribution = DISTRIBUTIONS[self.distribution]
        return {
            "suite": distribution.suite,
            "packages": sorted({*distribution.packages, *self.packages}),
            "sources": [self.mirror] if self.mirror else list(distribution.sources),
            "check_valid_until": self.check_valid_until,
            "size": self.size,
            "files": {path: [oct(mode), text] for path, (mode, text) in sorted(_FILES.items())},
            "configure": self.configure(),
        }

    def configure(self) -> str:
        """The script that puts the finishing touches to the root filesystem."""
        script = _CONFIGURE.replace("@MASKED@", " ".join(_MASKED))
        script = script.replace("@GENERATORS@", " ".join(_MASKED_GENERATORS))
        return script.replace("@ARGUMENTS@", " ".join(self.kernel_arguments))

    def key(self) -> str:
        """Hash of all inputs."""
        text = json.dumps(self.inputs(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def name(self) -> str:
        """The image's directory in the cache."""
        return f"{self.distribution}-{self.key()}"


_ARGUMENT = re.compile(r"[A-Za-z0-9_.:=,+-]+")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(/[a-z0-9-]+)?")


def parse_image(
    distribution: str,
    packages: t.Sequence[str] = (),
    size: str = "8G",
    mirror: t.Optional[str] = None,
    check_valid_until: bool = True,
    kernel_arguments: t.Sequence[str] = (),
) -> ImageSpec:
    """Check an image's declaration; raises LabError naming the option, the value and what is accepted."""
    if distribution not in DISTRIBUTIONS:
        raise LabError(f"distribution: {distribution!r} is unknown; accepted are {', '.join(DISTRIBUTIONS)}")
    for package in packages:
        if not _PACKAGE.fullmatch(package):
            raise LabError(f"packages: {package!r} is not the name of a Debian package")
    for argument in kernel_arguments:
        if not _ARGUMENT.fullmatch(argument):
            raise LabError(f"kernel_arguments: {argument!r} is not accepted; letters, digits and _.:=,+- are")
    bytes_ = size_in_bytes(size, "size")
    if bytes_ < 2 << 30:
        raise LabError(f"size: {size!r} is too small for a host; accepted are 2G and more")
    return ImageSpec(
        distribution,
        tuple(sorted(set(packages))),
        bytes_,
        mirror or "",
        check_valid_until,
        tuple(kernel_arguments),
    )


def find_image(spec: ImageSpec, cache_dir: Path) -> t.Optional[Path]:
    """The finished image in the cache, None where there is none. What is under the final name is complete."""
    path = cache_dir / spec.name() / "disk.qcow2"
    return path if path.is_file() else None


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> t.Iterator[None]:
    with open(path, "w", encoding="ascii") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another build of the same image is under way: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build_image(spec: ImageSpec, cache_dir: Path, progress: Progress) -> t.Tuple[Path, bool]:
    """Build the image, or find it where somebody else built it meanwhile.

    Returns its path, and whether this call built it. Raises LabError with the last lines of the failing tool; then
    nothing is left in the cache but the build's log.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    name = spec.name()
    with _locked(cache_dir / f".{name}.lock", progress):
        found = find_image(spec, cache_dir)
        if found is not None:
            return found, False
        _require_tools()
        work = cache_dir / f".{name}.building"
        # We hold the lock, so whoever left this is gone.
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            _build(spec, work, progress)
            shutil.rmtree(cache_dir / name, ignore_errors=True)
            os.rename(work, cache_dir / name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return cache_dir / name / "disk.qcow2", True


_TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "qemu-img": "qemu-utils",
}


def _search_path() -> str:
    """The mkfs of Debian is in sbin, which is not on every user's path."""
    return os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"


def _require_tools() -> None:
    missing = [package for tool, package in _TOOLS.items() if shutil.which(tool, path=_search_path()) is None]
    if missing:
        raise LabError(f"tools are missing to build an image; on Debian and Ubuntu: apt install {' '.join(missing)}")
    emulator_version()
    if os.geteuid() != 0:
        raise LabError("building an image needs root (file ownership inside it): use become, or sudo")


def _run(command: t.Sequence[str], what: str, log: Path, timeout: t.Optional[float] = None) -> None:
    environment = dict(os.environ, PATH=_search_path(), LC_ALL="C.UTF-8", DEBIAN_FRONTEND="noninteractive")
    with open(log, "a", encoding="utf-8") as handle:
        handle.write(f"$ {' '.join(command)}\n")
        handle.flush()
        try:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                env=environment,
                check=False,
                timeout=timeout,
            ).returncode
        except subprocess.TimeoutExpired:
            raise LabError(f"{what} did not end within {timeout:.0f} s:\n{tail(log)}") from None
    if status != 0:
        raise LabError(f"{what} failed (status {status}):\n{tail(log)}")


def tail(path: Path, lines: int = 25) -> str:
    """The last lines of a log without control characters; empty where there is no log."""
    try:
        with open(path, "rb") as handle:
            handle.seek(0, os.SEEK_END)
            handle.seek(max(0, handle.tell() - 200 * lines - 4096))
            text = handle.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(clean(text).splitlines()[-lines:])


def clean(text: str) -> str:
    """Terminal text without escape sequences and control characters, and without blank lines."""
    text = re.sub(r"\x1b(\[[0-9;?=]*[ -/]*[@-~]|[@-Z\\-_]|\][^\x07]*\x07)", "", text)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\n", text)
    return "\n".join(line.rstrip() for line in text.split("\n") if line.strip())


_PARTITION_START = 1 << 20


def _build(spec: ImageSpec, work: Path, progress: Progress) -> None:
    log = work / "build.log"
    rootfs = work / "rootfs"
    raw = work / "disk.raw"
    started = time.monotonic()

    progress(f"installing {spec.distribution} with mmdebstrap")
    _write_files(work / "files.tar")
    (work / "configure").write_text(spec.configure(), encoding="ascii")
    inputs = spec.inputs()
    command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(inputs['packages'])}"]
    if not spec.check_valid_until:
        command.append('--aptopt=Acquire::Check-Valid-Until "false"')
    command += [
        f"--essential-hook=tar-in '{work}/files.tar' /",
        f"--customize-hook=sh '{work}/configure' \"$1\"",
        inputs["suite"],
        str(rootfs),
        *inputs["sources"],
    ]
    try:
        _run(command, "mmdebstrap", log)

        progress("writing the root filesystem to a disk image")
        _partition(raw, spec.size)
        kilobytes = (spec.size - _PARTITION_START) // 1024
        _run(
            [
                *("mkfs.ext4", "-q", "-L", "lab-root", "-m", "0", "-E", f"offset={_PARTITION_START},lazy_itable_init=1"),
                *("-d", str(rootfs), str(raw), f"{kilobytes}k"),
            ],
            "mkfs.ext4",
            log,
        )
        kernel, initrd = _kernel(rootfs)
        shutil.copy(kernel, work / "vmlinuz")
        shutil.copy(initrd, work / "initrd.img")
    finally:
        shutil.rmtree(rootfs, ignore_errors=True)

    progress("installing the boot loader in a first boot of the disk")
    _install_boot_loader(work, raw, log)

    progress("converting the disk image")
    _run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(work / "disk.qcow2")], "qemu-img convert", log)
    for leftover in ("disk.raw", "vmlinuz", "initrd.img", "files.tar", "configure"):
        (work / leftover).unlink()
    record = {"inputs": inputs, "seconds": round(time.monotonic() - started, 1)}
    (work / "image.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_files(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name, (mode, text) in sorted(_FILES.items()):
            data = text.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entry.mode = mode
            archive.addfile(entry, io.BytesIO(data))


def _partition(path: Path, size: int) -> None:
    """A sparse disk with an MBR partition table of one bootable Linux partition, from 1 MiB to the end."""
    start, length = _PARTITION_START // 512, (size - _PARTITION_START) // 512
    # Boot flag, CHS (unused: all ones), type 0x83 Linux, CHS, first sector and number of sectors (little endian).
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", start, length)
    signature = hashlib.sha256(os.urandom(16)).digest()[:4]
    with open(path, "wb") as handle:
        handle.truncate(size)
        handle.seek(440)
        handle.write(signature + b"\0\0" + entry + bytes(48) + b"\x55\xaa")


def _kernel(rootfs: Path) -> t.Tuple[Path, Path]:
    kernels = sorted((rootfs / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise LabError("the distribution installed no kernel")
    kernel = kernels[-1]
    return kernel, rootfs / "boot" / kernel.name.replace("vmlinuz-", "initrd.img-")


def _install_boot_loader(work: Path, raw: Path, log: Path) -> None:
    serial = work / "serial.log"
    command = [
        *machine_arguments(accelerator(), 1024, 2),
        *("-no-reboot", "-serial", f"file:{serial}"),
        *("-kernel", str(work / "vmlinuz"), "-initrd", str(work / "initrd.img")),
        *("-append", "root=LABEL=lab-root rw console=ttyS0 quiet panic=-1 init=/lab-boot-loader"),
        *("-drive", f"if=virtio,file={raw},format=raw,cache=unsafe,discard=unmap"),
        *("-device", "virtio-rng-pci"),
    ]
    _run(command, "the first boot", log, timeout=600)
    if "LAB-BOOT-LOADER: done" not in serial.read_text(encoding="utf-8", errors="replace"):
        raise LabError(f"the boot loader could not be installed; the last lines of the serial console:\n{tail(serial)}")
