# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The verification guest's kernel and its only file system, both taken from the host.

The guest is the host's own kernel with an archive of busybox, the driver modules that the passed devices need and
:data:`INIT`. The archive is not compressed: QEMU copies it into the guest in one piece, which is quicker than having
the guest unpack it.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import dataclasses
import fnmatch
import gzip
import io
import lzma
import posixpath
import re
import struct
import typing as t
import zlib

from ansible_collections.iommufd.host.plugins.module_utils._cpio import Archive
from ansible_collections.iommufd.host.plugins.module_utils._elf import interpreter
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host

# A kernel image or a module is tens of MiB at most; far beyond the limit of a configuration file.
_IMAGE_LIMIT = 256 * 1024 * 1024

#: What /init calls; `devmem` is used where it is there.
APPLETS = ("sh", "mount", "stty", "insmod", "cat", "dd", "sha256sum", "od", "ip", "sleep", "poweroff")
OPTIONAL_APPLETS = ("devmem", "arping")

#: Display controllers are not driven in the guest: their drivers need firmware and a user space that are not there,
#: and are hundreds of MiB large. Their configuration space and BARs are read instead.
_NOT_DRIVEN = ("0x03",)

# The guest's part of the protocol (see `_evidence.GuestReport`): lines `SUBJECT KEY VALUE` on the second serial port,
# the subject `guest` or the guest address of a device. It decides nothing, it only reports; the host judges.
# It forks as little as it can: in an emulated host every process costs tens of milliseconds.
INIT = r"""#!/bin/sh
# The verification guest of the Ansible collection iommufd.host.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
. /guest/settings
exec 3<>"/dev/$report"
stty raw -echo <&3
say() { echo "$*" >&3; }
uptime() { read -r up rest </proc/uptime; }
uptime; say "guest init $up"
read -r release </proc/sys/kernel/osrelease; say "guest kernel $release"
[ -e /proc/sys/net/ipv6/conf/default/disable_ipv6 ] && echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6

while read -r module options; do
    words=$(insmod "/guest/modules/$module" $options 2>&1) || say "guest refused $module $words"
done </guest/modules.list
uptime; say "guest loaded $up"

# on_device ADDRESS DIRECTORY: the entries of a class directory that sit on that PCI device, in `found`.
on_device() {
    found=
    for entry in "$2"/*; do
        case $(cd -P "$entry" 2>/dev/null && echo "$PWD") in */"$1"/*) found="$found ${entry##*/}" ;; esac
    done
}
driver_of() {
    driver=
    [ -e "/sys/bus/pci/devices/$1/driver" ] && cd -P "/sys/bus/pci/devices/$1/driver" && driver=${PWD##*/}
    cd /
}
# A driver may finish its probe after its module is loaded (nvme does); the disk appears later still.
settled() { # [ADDRESS]: this one, or all that are there
    while read -r one wants; do
        [ -n "$1" ] && [ "$1" != "$one" ] && continue
        [ -e "/sys/bus/pci/devices/$one" ] || continue
        case $wants in
            driver | disk) driver_of "$one"; [ -n "$driver" ] || return 1 ;;
        esac
        if [ "$wants" = disk ]; then
            on_device "$one" /sys/block; [ -n "$found" ] || return 1
            for disk in $found; do [ -e "/dev/$disk" ] || return 1; done
        fi
    done </guest/wants
}
uptime; limit=$((${up%.*} + settle))
until settled; do
    uptime; [ "${up%.*}" -ge "$limit" ] && { say "guest unsettled $settle"; break; }
    sleep 0.05
done
uptime; say "guest settled $up"

# Writes to the disk: only called where the user gave it up.
scratch() {
    amount=16; [ "$3" -lt $((amount * 128)) ] && amount=$(($3 / 128))
    where=$(($3 / 128 - amount))
    dd if=/dev/urandom of=/tmp/scratch bs=64k "count=$amount" 2>/dev/null
    sum=$(sha256sum </tmp/scratch); say "$1 scratch_wrote ${sum%% *}"
    dd if=/tmp/scratch "of=/dev/$2" bs=64k "seek=$where" oflag=direct 2>/dev/null
    sum=$(dd "if=/dev/$2" bs=64k "skip=$where" "count=$amount" iflag=direct 2>/dev/null | sha256sum)
    say "$1 scratch_read ${sum%% *}"; say "$1 scratch_bytes $((amount * 65536))"
}
disk() {
    read -r sectors <"/sys/block/$2/size"
    blocks=$((sectors / 128)); [ "$blocks" -gt "$read_blocks" ] && blocks=$read_blocks
    read -r _ _ before _ <"/sys/block/$2/stat"
    for pass in first second; do
        # Direct: each pass comes from the device, none from the page cache.
        sum=$(dd "if=/dev/$2" bs=64k "count=$blocks" iflag=direct 2>/dev/null | sha256sum)
        say "$1 sha256_$pass ${sum%% *}"
    done
    read -r _ _ after _ <"/sys/block/$2/stat"
    say "$1 disk $2"
    say "$1 disk_bytes $((sectors * 512))"
    say "$1 asked_bytes $((blocks * 131072))"
    say "$1 dma_bytes $(((after - before) * 512))"
    case $expendable in *" $1 "*) scratch "$1" "$2" "$sectors" ;; esac
}
network() {
    ip link set "$2" up 2>/dev/null
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        read -r carrier 2>/dev/null <"/sys/class/net/$2/carrier" && [ "$carrier" = 1 ] && break
        sleep 0.1
    done
    read -r mac <"/sys/class/net/$2/address"
    say "$1 interface $2"; say "$1 mac $mac"; say "$1 carrier ${carrier:-unknown}"
    [ -n "$arp_target" ] && [ "$carrier" = 1 ] || return
    # The question of a newcomer whether somebody has that address: it takes none, and an answer is a frame, too.
    arping -q -D -c 3 -w 3 -I "$2" "$arp_target" >/dev/null 2>&1
    read -r sent <"/sys/class/net/$2/statistics/tx_packets"
    read -r received <"/sys/class/net/$2/statistics/rx_packets"
    say "$1 frames_sent $sent"; say "$1 frames_received $received"
}
bare() {
    echo 1 2>/dev/null >"$2/enable"
    bar=0
    while read -r start end flags && [ $bar -lt 6 ]; do
        # IORESOURCE_MEM is 0x200; an unassigned BAR starts at 0.
        if [ $((flags & 0x200)) -ne 0 ] && [ $((start)) -ne 0 ]; then
            value=$(devmem "$start" 32 2>/dev/null) && say "$1 bar $bar $start $value"
            break
        fi
        bar=$((bar + 1))
    done <"$2/resource"
    case "$(cat "$2/vendor" "$2/device")" in *0x1234*0x11e8*) copiers="$copiers $1=$start" ;; esac
}

# QEMU's edu copies between an address and itself when told so, and shows what was last written to its register 4,
# inverted. One that reads another's register 0 and writes that to its register 4 has reached it in both directions.
copy() { # REGISTERS SOURCE TARGET COMMAND
    devmem $(($1 + 0x80)) 32 "$2"; devmem $(($1 + 0x88)) 32 "$3"
    devmem $(($1 + 0x90)) 32 4; devmem $(($1 + 0x98)) 32 "$4"
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        [ $(($(devmem $(($1 + 0x98)) 32) & 1)) -eq 0 ] && return
        sleep 0.05
    done
}
transfers() {
    for one in $copiers; do
        # Command register: memory and bus master.
        printf '\006' | dd "of=/sys/bus/pci/devices/${one%=*}/config" bs=1 seek=4 conv=notrunc 2>/dev/null
    done
    for one in $copiers; do
        for peer in $copiers; do
            [ "$one" = "$peer" ] && continue
            from=${peer#*=} to=$((${peer#*=} + 4))
            devmem $to 32 0xffffffff
            copy ${one#*=} $from 0x40000 1
            copy ${one#*=} 0x40000 $to 3
            value=$(devmem $from 32) || continue
            expected=$(printf 0x%08X $((~value & 0xffffffff)))
            say "${one%=*} transfer ${peer%=*} $expected $(devmem $to 32)"
        done
    done
}
report() { # ADDRESS
    address=$1 device=/sys/bus/pci/devices/$1
    if [ ! -e "$device" ]; then say "$address missing 1"; return; fi
    for key in vendor device subsystem_vendor subsystem_device class; do
        read -r value <"$device/$key"; say "$address $key $value"
    done
    bar=0
    while read -r start end flags && [ $bar -lt 6 ]; do
        [ $((flags & 0x200)) -ne 0 ] && [ $((start)) -ne 0 ] && say "$address memory $bar $start $end"
        bar=$((bar + 1))
    done <"$device/resource"
    say "$address config "$(od -An -v -tx4 -N256 "$device/config")
    driver_of "$address"
    if [ -z "$driver" ]; then bare "$address" "$device"; return; fi
    say "$address driver $driver"
    count=0; for one in "$device"/msi_irqs/*; do [ -e "$one" ] && count=$((count + 1)); done
    say "$address interrupts $count"
    on_device "$address" /sys/block
    for disk in $found; do disk "$address" "$disk"; break; done
    on_device "$address" /sys/class/net
    for interface in $found; do network "$address" "$interface"; break; done
    for controller in "$device"/nvme/nvme*; do
        [ -e "$controller/serial" ] || continue
        read -r value <"$controller/serial"; say "$address serial $value"
        read -r value <"$controller/model"; say "$address model $value"
    done
}
copiers=
while read -r address wants; do
    report "$address"
done </guest/devices
[ -n "$copiers" ] && transfers
uptime; say "guest ready $up"
# The devices stay in use until the host has looked at the process that holds them. Then it may plug others in.
while read -r word address <&3; do
    case $word in plug) ;; *) break ;; esac
    uptime; limit=$((${up%.*} + settle))
    until [ -e "/sys/bus/pci/devices/$address" ] && settled "$address"; do
        uptime; [ "${up%.*}" -ge "$limit" ] && break
        sleep 0.05
    done
    report "$address"
    uptime; say "$address reported $up"
done
poweroff -f
"""


@dataclasses.dataclass(frozen=True)
class GuestDevice:
    """A passed device as the guest will meet it.

    Attributes:
        slot: PCI address in the guest.
        class_id: class of the function ("0x010802").
        modalias: the kernel's name for what drivers match (``pci:v…``).
        plugged: it comes later, when the host says so.
        expendable: a part of it may be written, where it is a disk.
    """

    slot: str
    class_id: str
    modalias: str
    plugged: bool = False
    expendable: bool = False


@dataclasses.dataclass(frozen=True)
class GuestModule:
    """A driver module for the guest: its name, plain (not compressed) content, and firmware files it may ask for."""

    name: str
    content: bytes
    firmware: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Initramfs:
    """The archive, and what it lets one expect.

    Attributes:
        data: the cpio archive.
        modules: names of the modules in it, in the order of loading.
        drivers: guest address to the modules that match the device itself (their dependencies are not in it).
        firmware: guest address to firmware files that those modules may ask for; none is in the archive.
    """

    data: bytes
    modules: tuple[str, ...]
    drivers: dict[str, tuple[str, ...]]
    firmware: dict[str, tuple[str, ...]]


def wants(device: GuestDevice, driven: bool) -> str:
    """What the guest waits for before it reports a device: a disk, a driver, or nothing."""
    if device.class_id.startswith("0x0108") and driven:
        return "disk"
    return "driver" if driven else "nothing"


# -- the kernel --------------------------------------------------------------------------------------------------------


def find_kernel(host: Host, release: str) -> str:
    """The image of an installed kernel.

    Raises:
        HostError: there is none; names the places where it was looked for.
    """
    places = (f"/boot/vmlinuz-{release}", f"/usr/lib/modules/{release}/vmlinuz", f"/lib/modules/{release}/vmlinuz")
    for place in places:
        if host.exists(place):
            return place
    raise HostError(
        f"No image of the running kernel {release} (looked for {', '.join(places)}). "
        "Reboot into an installed kernel, or install the package of the running one again."
    )


def read_kernel(host: Host, path: str) -> bytes:
    """The content of a kernel image.

    Raises:
        HostError: missing, empty or not readable.
    """
    content = host.read_bytes(path, _IMAGE_LIMIT)
    if not content:
        raise HostError(f"The kernel image {path} cannot be read or is empty.")
    return content


def kernel_release(image: bytes, architecture: str) -> str:
    """The release that a kernel image names.

    For x86 in its header, by the boot protocol (Documentation/arch/x86/boot.rst): ``HdrS`` at 0x202, and at 0x20e the
    offset, less 0x200, of a text that begins with the release. For arm64 in the banner that the kernel prints.

    Args:
        image: its content.
        architecture: as ``uname -m`` has it.

    Raises:
        HostError: it is no kernel image for that processor.
    """
    if architecture == "aarch64":
        found = re.search(rb"Linux version (\S+) ", _plain_arm64(image))
        if found is None:
            raise HostError("The guest's kernel is no kernel image for arm64 (Image): take another one.")
        return found.group(1).decode("ascii", "replace")
    if len(image) < 0x210 or image[0x202:0x206] != b"HdrS":
        raise HostError("The guest's kernel is no kernel image of a PC (bzImage): take another one.")
    offset = 0x200 + struct.unpack_from("<H", image, 0x20E)[0]
    text = image[offset : offset + 256].split(b"\0")[0].decode("ascii", "replace")
    return text.split(" ")[0]


def _plain_arm64(image: bytes) -> bytes:
    """The kernel itself out of an arm64 image: as it is, compressed, or compressed with an EFI stub before it.

    The latter (drivers/firmware/efi/libstub/zboot-header.S) has ``zimg`` at 4, and offset and size of the compressed
    part at 8 and 12. Empty where it is none of these: the kernel itself has ``ARM\\x64`` at 0x38
    (Documentation/arch/arm64/booting.rst).
    """
    if image[4:8] == b"zimg" and len(image) > 0x40:
        offset, size = struct.unpack_from("<II", image, 8)
        image = image[offset : offset + size]
    with contextlib.suppress(HostError):
        image = decompress("the kernel", image)
    return image if image[0x38:0x3C] == b"ARM\x64" else b""


# -- busybox -----------------------------------------------------------------------------------------------------------


def find_busybox(host: Host, wanted: str = "") -> str:
    """The busybox to put into the guest.

    Args:
        host: where to look.
        wanted: its path; empty: look in the standard directories.

    Raises:
        HostError: missing, or it lacks an applet that the guest calls.
    """
    path = host.which(wanted or "busybox")
    if path is None:
        raise HostError(
            f"{wanted or 'busybox'} is not installed: the guest's programs come from it. "
            "On Debian and Ubuntu: apt install busybox-static."
        )
    said = host.ask([path, "--list"])
    if said is not None:
        lacking = [name for name in APPLETS if name not in said.stdout.split()]
        if lacking:
            raise HostError(
                f"{path} lacks what the guest calls: {', '.join(lacking)}. "
                "On Debian and Ubuntu: apt install busybox-static."
            )
    return path


def libraries(listing: str) -> list[str]:
    """The files that ``ldd`` names, each an absolute path; the kernel's own vdso has none."""
    found: list[str] = []
    for line in listing.splitlines():
        match = re.search(r"(?:^|=>)\s*(/\S+)", line)
        if match and match.group(1) not in found:
            found.append(match.group(1))
    return found


# -- modules -----------------------------------------------------------------------------------------------------------


class ModuleIndex:
    """The modules of one installed kernel, from the text files that depmod writes.

    Args:
        host: where they are.
        release: of the kernel.

    Raises:
        HostError: that kernel's modules are not installed.
    """

    def __init__(self, host: Host, release: str) -> None:
        self.host = host
        self.directory = f"/lib/modules/{release}"
        aliases = host.read_text(f"{self.directory}/modules.alias", _IMAGE_LIMIT)
        if aliases is None:
            raise HostError(
                f"The kernel {release} has no {self.directory}/modules.alias: its modules are not installed, "
                "or depmod has not been run for it."
            )
        self._aliases = aliases
        self._files: dict[str, str] = {}
        self._needs: dict[str, list[str]] = {}
        for line in (host.read_text(f"{self.directory}/modules.dep", _IMAGE_LIMIT) or "").splitlines():
            path, _colon, needed = line.partition(":")
            name = _module_name(path)
            self._files[name] = path
            # depmod lists the whole closure, nearest first: the last one has to be loaded first.
            self._needs[name] = [_module_name(item) for item in reversed(needed.split())]

    def drivers(self, modalias: str) -> list[str]:
        """The modules that claim a PCI device, vfio's own variant drivers left out; sorted."""
        match = re.match(r"pci:v[0-9A-F]{8}", modalias)
        if match is None:
            return []
        # A host has tens of thousands of aliases, and fnmatch compiles each: look at those of the vendor alone.
        starts = (f"alias {match.group(0)}", "alias pci:v*")
        found = set()
        for line in self._aliases.splitlines():
            if line.startswith(starts):
                _word, pattern, name = line.split()
                if fnmatch.fnmatchcase(modalias, pattern):
                    found.add(name.replace("-", "_"))
        return sorted(name for name in found if name in self._files)

    def closure(self, names: t.Iterable[str]) -> list[str]:
        """The modules and everything they need, in an order in which they can be loaded."""
        ordered: list[str] = []
        for name in names:
            for module in [*self._needs.get(name, []), name]:
                if module not in ordered:
                    ordered.append(module)
        return ordered

    def load(self, name: str) -> GuestModule:
        """Read a module.

        Raises:
            HostError: depmod does not know it, or it cannot be read or decompressed.
        """
        if name not in self._files:
            raise HostError(f"{self.directory}/modules.dep has no module {name}: run depmod.")
        path = posixpath.join(self.directory, self._files[name])
        content = self.host.read_bytes(path, _IMAGE_LIMIT)
        if content is None:
            raise HostError(f"The module {path} cannot be read: install the kernel's package again, or run depmod.")
        plain = decompress(path, content)
        firmware = sorted({match.decode("ascii", "replace") for match in re.findall(rb"\0firmware=([^\0]+)", plain)})
        return GuestModule(name, plain, tuple(firmware))


def _module_name(path: str) -> str:
    return posixpath.basename(path).partition(".")[0].replace("-", "_")


def decompress(path: str, content: bytes) -> bytes:
    """A module's plain content; distributions compress them with gzip, xz or zstd.

    Raises:
        HostError: damaged, or a compression for which the host has no library.
    """
    try:
        if content.startswith(b"\x1f\x8b"):
            return gzip.decompress(content)
        if content.startswith(b"\xfd7zXZ\0"):
            return lzma.decompress(content)
        if content.startswith(b"\x28\xb5\x2f\xfd"):
            return _unzstd(content)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise HostError(f"The module {path} cannot be decompressed: {error}.") from error
    return content


def _unzstd(content: bytes) -> bytes:
    # Python has zstd from 3.14 on only; a host whose modules are compressed with it has the library (kmod needs it).
    name = ctypes.util.find_library("zstd") or "libzstd.so.1"
    library = ctypes.CDLL(name)
    library.ZSTD_getFrameContentSize.restype = ctypes.c_ulonglong
    library.ZSTD_getFrameContentSize.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    library.ZSTD_isError.argtypes = [ctypes.c_size_t]
    size = library.ZSTD_getFrameContentSize(content, len(content))
    if size > _IMAGE_LIMIT:  # the two highest values mean "unknown" and "error"
        raise ValueError("the zstd frame does not say how large its content is")
    target = ctypes.create_string_buffer(size)
    written = library.ZSTD_decompress(target, size, content, len(content))
    if library.ZSTD_isError(written):
        raise ValueError("damaged zstd data")
    return target.raw[:written]


# -- the archive -------------------------------------------------------------------------------------------------------


def build(
    host: Host,
    index: ModuleIndex,
    busybox: str,
    devices: t.Sequence[GuestDevice],
    report: str,
    read_bytes: int = 1 << 20,
    settle: int = 30,
    arp_target: str = "",
) -> Initramfs:
    """The guest's file system.

    Args:
        host: where busybox and the modules come from.
        index: the modules of the kernel that the guest runs.
        busybox: path of busybox on the host.
        devices: what is passed, in the order in which the guest reports.
        report: the guest kernel's name of the serial port over which it does.
        read_bytes: how much of a disk is read, twice.
        settle: seconds that drivers may take to attach and disks to appear.
        arp_target: address of IPv4 that a network device with a link asks for; empty: none sends anything.

    Raises:
        HostError: busybox, one of its libraries or a module cannot be read.
    """
    archive = Archive()
    for directory in ("/dev", "/proc", "/sys", "/tmp"):
        archive.directory(directory)
    _add_busybox(host, archive, busybox)

    drivers = {
        device.slot: tuple([] if device.class_id.startswith(_NOT_DRIVEN) else index.drivers(device.modalias))
        for device in devices
    }
    modules = [index.load(name) for name in index.closure(name for names in drivers.values() for name in names)]
    # One path per namespace: with native multipath the disk would hang off a virtual subsystem, not off the device.
    options = {"nvme_core": "multipath=N"}
    for module in modules:
        archive.file(f"/guest/modules/{module.name}.ko", module.content)
    archive.file(
        "/guest/modules.list",
        "".join(f"{module.name}.ko {options.get(module.name, '')}\n" for module in modules).encode(),
    )
    for name, listed in (("devices", [one for one in devices if not one.plugged]), ("wants", devices)):
        lines = [f"{one.slot} {wants(one, bool(drivers[one.slot]))}\n" for one in listed]
        archive.file(f"/guest/{name}", "".join(lines).encode())
    expendable = "".join(f" {one.slot} " for one in devices if one.expendable)
    settings = {
        "report": report,
        "settle": settle,
        "read_blocks": max(1, read_bytes // 65536),
        "expendable": f"'{expendable}'",
        "arp_target": f"'{arp_target}'",
    }
    archive.file("/guest/settings", "".join(f"{name}={value}\n" for name, value in settings.items()).encode())
    archive.file("/init", INIT.encode(), 0o755)
    by_name = {module.name: module for module in modules}
    firmware = {
        slot: tuple(sorted({file for name in names for file in by_name[name].firmware}))
        for slot, names in drivers.items()
    }
    return Initramfs(archive.close(), tuple(module.name for module in modules), drivers, firmware)


def _add_busybox(host: Host, archive: Archive, busybox: str) -> None:
    content = host.read_bytes(busybox, _IMAGE_LIMIT)
    if not content:
        raise HostError(f"{busybox} cannot be read.")
    archive.file("/bin/busybox", content, 0o755)
    for name in (*APPLETS, *OPTIONAL_APPLETS):
        archive.link(f"/bin/{name}", "busybox")
    if interpreter(io.BytesIO(content)) is None:
        return
    said = host.ask(["ldd", busybox])
    needed = libraries(said.stdout) if said is not None and said.ok else []
    if not needed:
        raise HostError(
            f"{busybox} is dynamically linked and its libraries could not be found with ldd. "
            "On Debian and Ubuntu: apt install busybox-static."
        )
    for library in needed:
        data = host.read_bytes(library, _IMAGE_LIMIT)
        if data is None:
            raise HostError(f"{busybox} needs {library}, which cannot be read.")
        archive.file(library, data, 0o755)
