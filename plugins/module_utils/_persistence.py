# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Devices that go to a guest's driver at boot, before any driver of the host sees them.

What is wanted stands in one readable file, ``/etc/iommufd-host/devices.conf``, a line for each PCI address. One small
shell script reads it and sets ``driver_override``, at three moments:

* in the initramfs before udev is started there (a rule of udev would come too late: loading ``nvme`` for the root disk
  probes every NVMe disk at once). A hook brings it into every image that is made from now on; into those that are there
  it is put in front, where that will do;
* in the real root before udev goes through the devices (``iommufd-host-devices.service``), for what the initramfs did
  not know, and to load the guest's driver;
* for each function that appears later (hot-plug, new VFs), by a udev rule; the host's driver may have taken it by then
  and has to give it back.

An image may know more than the real root: giving back ends with the images, and a power cut comes before that. Such a
function would have an override that nobody acts on, and no driver. So the initramfs notes what it has taken in a file
in /dev (of what it has mounted by then only that stays for the real root), and the service lets go what is not on the
list any more. For the same reason the list is the first to go, and the service and the script go after the images.

The kernel log has a line for each (``iommufd-host: 0000:02:00.0: driver_override vfio-pci``). The kernel argument
``iommufd_host=off`` turns all of it off for one boot.
"""

from __future__ import annotations

import bz2
import dataclasses
import functools
import gzip
import hashlib
import io
import lzma
import posixpath
import re
import subprocess
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._cpio import Archive
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._files import (
    capture,
    checkpoint,
    former_path,
    own_header,
    temporary_path,
    write_atomic,
)
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._names import Names, from_fields, to_fields
from ansible_collections.iommufd.host.plugins.module_utils._own_files import (
    OWN_DIRECTORY,
    disable_unit,
    enable_unit,
    forget_unit,
    refuse_without_systemd,
    remove_own,
    write_own,
)
from ansible_collections.iommufd.host.plugins.module_utils._pci import Function, address_key, is_address
from ansible_collections.iommufd.host.plugins.module_utils._plan import RemoveFile, Step, run

DIRECTORY = OWN_DIRECTORY
CONF = f"{DIRECTORY}/devices.conf"
SCRIPT = f"{DIRECTORY}/devices.sh"
UNIT_NAME = "iommufd-host-devices.service"
UNIT = f"/etc/systemd/system/{UNIT_NAME}"
UNIT_LINK = f"/etc/systemd/system/sysinit.target.wants/{UNIT_NAME}"
# Before 80-drivers.rules: programs run in the order of the rules, and that file loads the host's driver.
RULE = "/etc/udev/rules.d/10-iommufd-host-devices.rules"
HOOK = "/etc/initramfs-tools/hooks/iommufd-host"
DRACUT = "/etc/dracut.conf.d/90-iommufd-host.conf"
# In an image of initramfs-tools /init sources the files of this directory once /sys, /proc and /dev are mounted and
# before any script runs, udev's among them (initramfs-tools(7); the scripts themselves are in no dependable order).
IMAGE_CONF = "/conf/conf.d/iommufd-host"
# Written in the initramfs, read and removed in the real root.
TAKEN = "/dev/.iommufd-host-taken"

_IDENTITY = re.compile(r"[0-9a-f]{4}:[0-9a-f]{4}")
_DRIVER = re.compile(r"[A-Za-z0-9_-]{1,64}")

# A minute under emulation, seconds on hardware; a host with many firmware files and a slow disk takes longer.
_REBUILD_SECONDS = 1800.0


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of the file: a function and the driver it goes to at boot.

    Attributes:
        address: PCI address.
        driver: name of the vfio driver.
        identity: "vendor:device" in hexadecimal as lspci -n prints it. A card that is put in or taken out can move
            others to new addresses: a device of another kind at this address is left alone.
        names: what the host called it, for people and for selectors. Nothing at boot depends on it, so an image whose
            list differs only in this is not stale.
    """

    address: str
    driver: str
    identity: str
    names: Names = dataclasses.field(default=Names(), compare=False)

    @property
    def line(self) -> str:
        return " ".join([self.address, self.driver, self.identity, *to_fields(self.names)])


# -- the files -----------------------------------------------------------------------------------------------------

_CONF_HEAD = (
    own_header()
    + "# PCI functions that go to a driver for guests at boot, before a driver of the host takes them:\n"
    + "# address, driver, vendor:device. A device of another kind at the address is left alone. What follows is for\n"
    + "# people and for the collection: what the host called the device.\n"
    + "# Kernel argument iommufd_host=off: for that boot the host keeps them all.\n"
)

# Runs in the initramfs too, by busybox or klibc: nothing but what a POSIX shell has built in (and modprobe).
_SCRIPT = r"""#!/bin/sh
@MARK@
# Gives the PCI functions of devices.conf to the drivers named there.
#   devices.sh init         in the initramfs, before udev: sets driver_override, loads nothing
#   devices.sh boot         in the real root, before udev: loads the drivers and binds
#   devices.sh add ADDRESS  one function that has just appeared
# @DIGEST@

stage=${1:-boot}
only=${2:-}
conf=/etc/iommufd-host/devices.conf
taken=@TAKEN@
pci=/sys/bus/pci

# dracut's image runs the same stage as the real root.
image=
if [ "$stage" = init ] || [ -e /etc/initrd-release ]; then
    image=yes
fi

say() {
    echo "<$1>iommufd-host: $2" >/dev/kmsg
}

# Prints what on the host uses a function ($1): a network interface that is up, a block device that is mounted,
# swapped on or part of another.
use_of() {
    for net in "$pci/devices/$1"/net/* "$pci/devices/$1"/*/net/*; do
        if [ -r "$net/flags" ] && read -r flags <"$net/flags" && [ $((flags & 1)) = 1 ]; then
            echo "${net##*/} is up"
            return
        fi
    done
    for block in /sys/class/block/*; do
        below=$(cd -P "$block" 2>/dev/null && echo "$PWD")
        case $below in
        */"$1"/*) ;;
        *) continue ;;
        esac
        name=${block##*/}
        # The disk that NVMe multipath shows for the path nvme0c1n1 is nvme0n1.
        case $name in
        nvme*c*n*) name=${name%%c*}n${name##*n} ;;
        esac
        for part in "/sys/class/block/$name" "/sys/class/block/$name"p[0-9]*; do
            [ -r "$part/dev" ] || continue
            name=${part##*/}
            for holder in "$part"/holders/*; do
                if [ -e "$holder" ]; then
                    echo "$name is part of ${holder##*/}"
                    return
                fi
            done
            read -r number <"$part/dev"
            while read -r id parent where from to rest; do
                case " $where $rest " in
                " $number "* | *" /dev/$name "*)
                    echo "$name is mounted on $to"
                    return
                    ;;
                esac
            done </proc/self/mountinfo
            while read -r swap rest; do
                if [ "$swap" = "/dev/$name" ]; then
                    echo "$name is swap"
                    return
                fi
            done </proc/swaps
        done
    done 2>/dev/null
}

take() {
    device=$pci/devices/$1
    [ -e "$device" ] || return 0
    read -r vendor <"$device/vendor"
    read -r model <"$device/device"
    if [ "${vendor#0x}:${model#0x}" != "$3" ]; then
        say 4 "$1: is ${vendor#0x}:${model#0x}, not $3: left alone"
        return 0
    fi
    if [ -e "$device/driver" ] && ! [ -e "$pci/drivers/$2/$1" ]; then
        use=$(use_of "$1")
        if [ -n "$use" ]; then
            say 3 "$1: $use: left with the host"
            return 0
        fi
    fi
    read -r override <"$device/driver_override"
    if [ "$override" != "$2" ]; then
        echo "$2" >"$device/driver_override" || return 0
        say 6 "$1: driver_override $2"
    fi
    [ -z "$image" ] || echo "$1 $2" >>"$taken"
    if [ "$stage" != init ] && ! [ -e "$pci/drivers/$2" ]; then
        modprobe -q "$2"
    fi
    if ! [ -e "$pci/drivers/$2/$1" ] && [ -e "$device/driver" ]; then
        host=$(cd -P "$device/driver" && echo "${PWD##*/}")
        echo "$1" >"$device/driver/unbind"
        say 5 "$1: taken back from $host"
    fi
    if [ -e "$pci/drivers/$2" ]; then
        [ -e "$device/driver" ] || echo "$1" >"$pci/drivers_probe"
        [ -e "$pci/drivers/$2/$1" ] && say 6 "$1: bound to $2"
    elif [ "$stage" != init ]; then
        say 3 "$1: there is no driver $2"
    fi
}

# Lets go of what an older list in the initramfs has taken.
let_go() {
    device=$pci/devices/$1
    while read -r address rest; do
        [ "$address" != "$1" ] || return 0
    done <"$list"
    [ -e "$device" ] || return 0
    read -r override <"$device/driver_override"
    [ "$override" = "$2" ] || return 0
    echo >"$device/driver_override"
    [ -e "$pci/drivers/$2/$1" ] && echo "$1" >"$pci/drivers/$2/unbind"
    [ -e "$device/driver" ] || echo "$1" >"$pci/drivers_probe"
    say 5 "$1: the initramfs has an older list: back with the host"
}

if [ "$stage" = boot ] && [ -z "$image" ] && [ -r "$taken" ]; then
    list=$conf
    [ -r "$list" ] || list=/dev/null
    while read -r one driver; do
        let_go "$one" "$driver"
    done <"$taken"
    rm -f "$taken"
fi

[ -r "$conf" ] || exit 0
read -r arguments </proc/cmdline
case " $arguments " in
*" iommufd_host=off "*)
    say 4 "iommufd_host=off: all devices stay with the host"
    exit 0
    ;;
esac
while read -r address driver identity rest; do
    case $address in
    '' | '#'*) continue ;;
    esac
    if [ -z "$only" ] || [ "$only" = "$address" ]; then
        take "$address" "$driver" "$identity" </dev/null
    fi
done <"$conf"
exit 0
"""

_UNIT = (
    own_header()
    + f"""\
[Unit]
Description=Give PCI devices to the drivers of guests before drivers of the host take them
DefaultDependencies=no
ConditionPathExists=|{CONF}
ConditionPathExists=|{TAKEN}
# From here on udev's socket keeps what the kernel reports, so that nothing falls between this service and udev's rule.
After=systemd-udevd-kernel.socket
Before=systemd-udev-trigger.service sysinit.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh {SCRIPT} boot
TimeoutStartSec=90

[Install]
WantedBy=sysinit.target
"""
)

_RULE = (
    own_header()
    + f"""\
# Only what the kernel reports itself: `udevadm trigger` (SYNTH_UUID) must not take a device that was given back.
ACTION=="add", SUBSYSTEM=="pci", ENV{{SYNTH_UUID}}!="?*", TEST=="{CONF}", RUN+="/bin/sh {SCRIPT} add $kernel"
"""
)

_IMAGE_CONF = (
    own_header()
    + f"""\
if [ -r {SCRIPT} ]; then
    /bin/sh {SCRIPT} init
fi
"""
)

_HOOK = (
    "#!/bin/sh\n"
    + own_header()
    + f"""\
case ${{1:-}} in
prereqs)
    echo
    exit 0
    ;;
esac
[ -r {CONF} ] && [ -r {SCRIPT} ] || exit 0
mkdir -p "$DESTDIR{DIRECTORY}" "$DESTDIR/conf/conf.d"
cp -p {CONF} {SCRIPT} "$DESTDIR{DIRECTORY}/"
cat >"$DESTDIR{IMAGE_CONF}" <<'END'
{_IMAGE_CONF}END
"""
)

# The same service runs in dracut's image, where systemd and udev work as in the real root. An image that is made when
# there is nothing more to take has no use for it; dracut reads this as a shell script.
_DRACUT = (
    own_header()
    + f"""\
if [ -r {CONF} ]; then
    install_optional_items+=" {CONF} {SCRIPT} {UNIT} {UNIT_LINK} "
fi
"""
)


def script_content() -> bytes:
    """The script, with a digest of the files that bring it into an image: one that was made by older files is stale."""
    digest = hashlib.sha256((_HOOK + _DRACUT).encode()).hexdigest()[:16]
    text = _SCRIPT.replace("@MARK@\n", own_header()).replace("@TAKEN@", TAKEN)
    return text.replace("@DIGEST@", f"Boot files {digest}").encode()


def render(entries: t.Iterable[Entry]) -> bytes:
    """The file's content, in the order of addresses."""
    return (_CONF_HEAD + render_lines(entries)).encode()


def render_lines(entries: t.Iterable[Entry]) -> str:
    """A line for each entry, in the order of addresses."""
    return "".join(entry.line + "\n" for entry in sorted(entries, key=lambda entry: address_key(entry.address)))


def parse(text: str) -> dict[str, Entry]:
    """The entries of a file by address; lines that are none (comments, damage) are passed over, as the script does."""
    entries = {}
    for line in text.splitlines():
        fields = line.split()
        if (
            len(fields) >= 3
            and is_address(fields[0])
            and _DRIVER.fullmatch(fields[1])
            and _IDENTITY.fullmatch(fields[2])
        ):
            address, driver, identity = fields[:3]
            entries[address] = Entry(address, driver, identity, from_fields(fields[3:]))
    return entries


def identity_of(function: Function) -> str | None:
    """A function's vendor and device ("8086:10d3"); None where sysfs does not tell."""
    if function.vendor_id is None or function.device_id is None:
        return None
    return f"{function.vendor_id[2:]}:{function.device_id[2:]}"


def read_entries(host: Host) -> dict[str, Entry]:
    """What is kept across reboots now, by address; empty where nothing is."""
    return parse(host.read_text(CONF) or "")


# -- initramfs images ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Image:
    """The initramfs of an installed kernel."""

    path: str
    release: str


@dataclasses.dataclass(frozen=True)
class Generator:
    """A tool that makes initramfs images.

    Attributes:
        name: "initramfs-tools" or "dracut".
        files: files that bring the script into its images: path, content, mode. The last one tells that images may
            hold our files, so it is written first and removed last.
    """

    name: str
    files: tuple[tuple[str, bytes, int], ...]

    @property
    def marker(self) -> str:
        return self.files[-1][0]

    def argv(self, image: Image) -> list[str]:
        """The command that makes an image anew."""
        if self.name == "dracut":
            return ["dracut", "--force", image.path, image.release]
        return ["update-initramfs", "-u", "-k", image.release]


INITRAMFS_TOOLS = Generator("initramfs-tools", ((HOOK, _HOOK.encode(), 0o755),))
DRACUT_TOOL = Generator("dracut", ((DRACUT, _DRACUT.encode(), 0o644),))


def find_generator(host: Host) -> Generator | None:
    """The tool that makes the host's images; None where there is none that is known here."""
    if host.which("mkinitramfs") and host.which("update-initramfs"):
        return INITRAMFS_TOOLS
    if host.which("dracut"):
        return DRACUT_TOOL
    return None


def make_anew(host: Host, generator: Generator, image: Image) -> None:
    """Have an image made anew, and have the boot loader see it whole (:func:`checkpoint`).

    Raises:
        HostError: the tool failed.
    """
    run(generator.argv(image), _REBUILD_SECONDS, keep_locks=True)
    checkpoint(host.path(posixpath.dirname(image.path)))


def find_images(host: Host) -> list[Image]:
    """The images of installed kernels: initrd.img-RELEASE (Debian), initramfs-RELEASE.img (Fedora), initrd-RELEASE."""
    images = []
    installed = {name for base in ("/usr/lib/modules", "/lib/modules") for name in host.listdir(base)}
    for name in host.listdir("/boot"):
        match = re.fullmatch(r"initrd\.img-(.+)|initramfs-(.+)\.img|initrd-(.+)", name)
        release = next(filter(None, match.groups()), "") if match else ""
        if release in installed:
            images.append(Image(f"/boot/{name}", release))
    return images


_MAGIC = (
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x5d\x00\x00", "xz"),
    (b"BZh", "bzip2"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\x89LZO", "lzop"),
)


def read_image(host: Host, path: str, names: t.Collection[str]) -> dict[str, bytes] | None:
    """Files out of an initramfs image, without unpacking it.

    An image is a row of cpio archives (format "newc"), some plain (microcode), the main one compressed. Archives are
    sorted by name and ``/etc`` comes early, so that reading usually ends after a fraction of the image.

    Args:
        host: the host.
        path: the image.
        names: paths wanted ("/etc/…").

    Returns:
        Content by path, of those that are there; None where the image cannot be read.
    """
    found: dict[str, bytes] = {}
    wanted = {name.lstrip("/") for name in names}
    try:
        with open(host.path(path), "rb", buffering=0) as image:
            while len(found) < len(wanted):
                magic = _skip_padding(image)
                if magic[:6] in (b"070701", b"070702"):
                    _read_cpio(image, wanted, found)
                    continue
                kind = next((kind for start, kind in _MAGIC if magic.startswith(start)), None)
                if kind is None:
                    return {"/" + name: content for name, content in found.items()} if not magic else None
                _read_compressed(image, kind, wanted, found)
                break
    except (OSError, EOFError, ValueError, lzma.LZMAError):
        return None
    return {"/" + name: content for name, content in found.items()}


def _skip_padding(image: t.BinaryIO | io.RawIOBase) -> bytes:
    """Go past the zeros between archives; returns the first bytes after them without consuming them."""
    while True:
        block = image.read(4096) or b""
        rest = block.lstrip(b"\0")
        if rest or not block:
            image.seek(-len(rest), io.SEEK_CUR)
            if 0 < len(rest) < 6:
                rest = image.read(6) or b""
                image.seek(-len(rest), io.SEEK_CUR)
            return rest[:6]


def _read_compressed(image: t.Any, kind: str, wanted: t.Collection[str], found: dict[str, bytes]) -> None:
    opener: t.Any = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}.get(kind)
    if opener is not None:
        with opener(image, "rb") as stream:
            _read_cpio(stream, wanted, found)
        return
    # The tools that made the image are there to read it; Python has neither format before 3.14.
    with subprocess.Popen([kind, "-dcq"], stdin=image, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tool:  # pylint: disable=ansible-bad-function
        try:
            _read_cpio(tool.stdout, wanted, found)
        finally:
            tool.kill()


def _read_cpio(stream: t.Any, wanted: t.Collection[str], found: dict[str, bytes]) -> None:
    """Read one archive up to its end or up to the last file wanted.

    Header of 110 characters: magic, then 13 numbers of 8 hexadecimal digits; size is the 7th, length of the name with
    its NUL the 12th; name and content are padded to 4 bytes (Documentation/driver-api/early-userspace/buffer-format).
    """
    while len(found) < len(wanted):
        header = _exactly(stream, 110)
        if header[:6] not in (b"070701", b"070702"):
            raise ValueError("no cpio header")
        size = int(header[54:62], 16)
        length = int(header[94:102], 16)
        name = _exactly(stream, length + -(110 + length) % 4)[: length - 1].decode("utf-8", "replace")
        if name == "TRAILER!!!":
            return
        name = name[2:] if name.startswith("./") else name.lstrip("/")
        padded = size + -size % 4
        if name in wanted:
            found[name] = _exactly(stream, padded)[:size]
        else:
            _pass_over(stream, padded)


def _exactly(stream: t.Any, count: int) -> bytes:
    parts = []
    while count > 0:
        part = stream.read(min(count, 1 << 20))
        if not part:
            raise EOFError("image is cut short")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _pass_over(stream: t.Any, count: int) -> None:
    if isinstance(stream, io.FileIO):
        stream.seek(count, io.SEEK_CUR)
        return
    while count > 0:
        part = stream.read(min(count, 1 << 20))
        if not part:
            raise EOFError("image is cut short")
        count -= len(part)


def is_stale(host: Host, image: Image, entries: t.Mapping[str, Entry], needed: t.Callable[[str], bool]) -> bool:
    """Whether an image would do at boot something else than is wanted.

    It is enough that every entry *needed* is in it: a device that no driver of that kernel claims can wait for the real
    root. What it holds must be wanted, and its script be the present one.

    Args:
        host: the host.
        image: the image.
        entries: all entries that shall be kept.
        needed: whether a driver of that kernel claims a function (address); asked only for what the image lacks.
    """
    content = read_files(host, image.path) or {}
    held = parse(content.get(CONF, b"").decode("utf-8", "replace"))
    if any(entries.get(address) != entry for address, entry in held.items()):
        return True
    if any(needed(address) for address in entries if address not in held):
        return True
    return bool(held) and content.get(SCRIPT) != script_content()


def read_files(host: Host, path: str) -> dict[str, bytes] | None:
    """Our own files in an image; None where it cannot be read."""
    return read_image(host, path, (CONF, SCRIPT))


def _verify_image(host: Host, path: str, expect: bytes) -> None:
    files = read_files(host, path)
    if files is None:
        raise HostError(f"{path} cannot be read any more")
    if files.get(CONF, b"") != expect:
        raise HostError(f"{path} does not hold the present {CONF}")


# -- putting the files in front of an image ------------------------------------------------------------------------


def front(conf: bytes) -> bytes:
    """The archive that goes in front of an image, or nothing for an empty list.

    The kernel unpacks every archive of an image in its order, and looks for microcode in all plain ones at its start
    (init/initramfs.c, lib/earlycpio.c): this is how microcode itself is brought along.
    """
    if not conf:
        return b""
    archive = Archive()
    archive.file(IMAGE_CONF, _IMAGE_CONF.encode())
    archive.file(CONF, conf)
    archive.file(SCRIPT, script_content(), 0o755)
    return archive.close()


def front_length(start: bytes) -> int:
    """How many bytes at the start of an image are an archive of ours; 0 where there is none."""
    stream = io.BytesIO(start)
    names = set()
    try:
        while True:
            header = _exactly(stream, 110)
            if header[:6] != b"070701":
                return 0
            size = int(header[54:62], 16)
            length = int(header[94:102], 16)
            name = _exactly(stream, length + -(110 + length) % 4)[: length - 1].decode("utf-8", "replace")
            if name == "TRAILER!!!":
                break
            names.add("/" + name)
            _exactly(stream, size + -size % 4)
    except (EOFError, ValueError):
        return 0
    ours = {IMAGE_CONF, CONF, SCRIPT}
    parents = {one.rpartition("/")[0] for one in ours} | {"/etc", "/conf"}
    return stream.tell() + -stream.tell() % 512 if ours <= names <= ours | parents else 0


# More than a list of thousands of devices takes.
_FRONT_LIMIT = 1 << 20


@dataclasses.dataclass
class PutInFront(Step):
    """Put our files in front of an image, replace those that are there, or take them away; the rest stays as it is.

    Takes a moment where making the image anew takes a minute, and taking it back gives the very same image.

    Attributes:
        path: the image, as the host sees it.
        conf: content of the list; empty: take away.
    """

    path: str = ""
    conf: bytes = b""
    host: Host = dataclasses.field(default_factory=Host)

    def __post_init__(self) -> None:
        self._before: bytes | None = None

    def apply(self) -> None:
        self._exchange(front(self.conf))
        _verify_image(self.host, self.path, self.conf)

    def undo(self) -> None:
        if self._before is not None:
            self._exchange(self._before)

    def _exchange(self, new: bytes) -> None:
        """Put other bytes in front; those that were there at first are kept for :meth:`undo`."""
        state = capture(self.host.path(self.path))
        if state is None:
            raise HostError(f"{self.path} is no longer there")
        length = front_length(state.content[:_FRONT_LIMIT])
        old = state.content[:length]
        if self._before is None:  # before the change: a signal may come right behind it
            self._before = old
        if old != new:
            content = new + state.content[length:]
            write_atomic(self.host.path(self.path), dataclasses.replace(state, content=content), for_boot_loader=True)


def _front_is_enough(host: Host, generator: Generator | None, image: Image) -> bool:
    """Whether an image can do with our files in front, or must be made anew.

    Anew where a later stage takes a copy or a note of the image (a boot loader's hook, zipl), and where its main
    archive holds our files already, for that one is unpacked last.
    """
    if generator is not INITRAMFS_TOOLS or host.listdir("/etc/initramfs/post-update.d") or host.which("zipl"):
        return False
    files = read_files(host, image.path)
    if files is None:
        return False
    start = host.read_bytes(image.path, _FRONT_LIMIT) or b""
    return not files or front_length(start) > 0


@dataclasses.dataclass
class Rebuild(Step):
    """Make an initramfs image anew.

    Attributes:
        generator, image: what is made by what.
        files: the steps that changed what goes into it; taking this step back takes them back first.
        expect: what the image must hold afterwards.
    """

    generator: Generator = INITRAMFS_TOOLS
    image: Image = dataclasses.field(default_factory=lambda: Image("", ""))
    files: t.Sequence[Step] = ()
    expect: bytes = b""
    host: Host = dataclasses.field(default_factory=Host)

    def __post_init__(self) -> None:
        self._done = False

    def apply(self) -> None:
        before = self.host.stat(self.image.path)
        try:
            make_anew(self.host, self.generator, self.image)
        finally:
            after = self.host.stat(self.image.path)
            # Both tools put the finished image in place in one step: without that nothing needs taking back.
            self._done = (
                before is None
                or after is None
                or (before.st_ino, before.st_mtime_ns)
                != (
                    after.st_ino,
                    after.st_mtime_ns,
                )
            )
        _verify_image(self.host, self.image.path, self.expect)

    def undo(self) -> None:
        if not self._done:
            return
        for step in reversed(self.files):
            step.undo()
        make_anew(self.host, self.generator, self.image)


# -- the plan ------------------------------------------------------------------------------------------------------

Claims = t.Callable[[str, str], bool]


def plan_persistence(host: Host, wanted: t.Mapping[str, Entry], claims: Claims) -> list[Step]:
    """The steps after which exactly these entries are kept across reboots; none where that is so already.

    Args:
        host: the host as it is.
        wanted: the entries by address; empty: nothing is kept and nothing of ours stays.
        claims: whether a kernel (release) has a driver of the host for a function (address); when in doubt, it has.

    Raises:
        Refusal: a file at one of our paths is not ours.
        HostError: the host has no systemd, or no tool that is known here for its images.
    """
    generator = find_generator(host)
    images = find_images(host)
    steps = _plan_present(host, wanted, claims, generator, images) if wanted else _plan_absent(host, generator, images)
    return _leftovers(host, images) + steps


def _leftovers(host: Host, images: list[Image]) -> list[Step]:
    """Removal of what a run left behind that was killed while it wrote one of our files, or an image."""
    steps: list[Step] = []
    written = [temporary_path(path) for path in (HOOK, DRACUT, SCRIPT, RULE, UNIT, CONF)]
    written += [name(image.path) for image in images for name in (temporary_path, former_path)]
    for left in written:
        if host.exists(left):
            what = f"remove {left}, which a killed run left behind"
            steps.append(RemoveFile(what, left, "unfinished\n", path=host.path(left), prune=[host.path(DIRECTORY)]))
    return steps


def _plan_present(
    host: Host, wanted: t.Mapping[str, Entry], claims: Claims, generator: Generator | None, images: list[Image]
) -> list[Step]:
    refuse_without_systemd(host)
    conf = render(wanted.values())
    files: list[Step] = []
    marked = generator is not None and host.exists(generator.marker)
    if generator is not None:
        for path, content, mode in reversed(generator.files):
            files += write_own(host, path, content, mode)
    files += write_own(host, SCRIPT, script_content(), 0o755)
    files += write_own(host, RULE, _RULE.encode(), 0o644)
    files += write_own(host, UNIT, _UNIT.encode(), 0o644)
    if host.readlink(UNIT_LINK) is None:
        files.append(enable_unit(UNIT_NAME))
    files += write_own(host, CONF, conf, 0o644)
    stale = []
    for image in images:
        needed = functools.partial(claims, image.release)
        # Before our marker was there no image can hold our files.
        if is_stale(host, image, wanted, needed) if marked else any(map(needed, wanted)):
            stale.append(image)
    if stale and generator is None:
        raise HostError(
            "This host has initramfs images, but neither initramfs-tools nor dracut, so that host drivers in them "
            "could take the devices first: " + ", ".join(image.path for image in stale)
        )
    return files + _image_steps(host, generator, stale, files, conf)


def _plan_absent(host: Host, generator: Generator | None, images: list[Image]) -> list[Step]:
    first = remove_own(host, CONF)
    middle: list[Step] = []
    last: list[Step] = []
    if host.readlink(UNIT_LINK) is not None:
        last.append(disable_unit(UNIT_NAME))
    last += remove_own(host, RULE) + remove_own(host, UNIT) + remove_own(host, SCRIPT)
    for candidate in (INITRAMFS_TOOLS, DRACUT_TOOL):
        if not host.exists(candidate.marker):
            continue
        stale = [
            image for image in images if candidate is generator and is_stale(host, image, {}, lambda address: False)
        ]
        middle += _image_steps(host, generator, stale, first, b"")
        for path, _content, _mode in candidate.files:
            last += remove_own(host, path)
    if host.exists("/run/systemd/system") and any(step.subject == UNIT for step in last):
        last.append(forget_unit())
    return [*first, *middle, *last]


def _image_steps(
    host: Host, generator: Generator | None, stale: list[Image], files: t.Sequence[Step], expect: bytes
) -> list[Step]:
    if generator is None:
        return []
    steps: list[Step] = []
    for image in stale:
        texts = "without the present list of devices\n", "with the present list of devices\n"
        if not expect:
            texts = "with a list of devices\n", "without a list of devices\n"
        if _front_is_enough(host, generator, image):
            what = f"put the list of devices into {image.path}" if expect else f"take our files out of {image.path}"
            steps.append(PutInFront(what, image.path, *texts, path=image.path, conf=expect, host=host))
        else:
            what = f"make {image.path} anew"
            steps.append(
                Rebuild(
                    what, image.path, *texts, generator=generator, image=image, files=files, expect=expect, host=host
                )
            )
    return steps
