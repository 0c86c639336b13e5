# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import struct
import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _guest_image
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._guest_image import GuestDevice, ModuleIndex
from ansible_collections.iommufd.host.plugins.module_utils._host import Host

RELEASE = "6.12.117+deb13-amd64"
NVME = "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02"
E1000E = "pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00"
EDU = "pci:v00001234d000011E8sv00001AF4sd00001100bc00scFFi00"
VGA = "pci:v000010DEd00001EB8sv000010DEsd000012A2bc03sc02i00"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    modules = tmp_path / "lib/modules" / RELEASE
    (modules / "kernel").mkdir(parents=True)
    (modules / "modules.alias").write_text(
        "# Aliases extracted from modules themselves.\n"
        "alias pci:v*d*sv*sd*bc01sc08i02* nvme\n"
        "alias pci:v00008086d000010D3sv*sd*bc*sc*i* e1000e\n"
        "alias vfio_pci:v00008086d000010D3sv*sd*bc*sc*i* some_vfio_pci\n"
        "alias pci:v00008086d000010D4sv*sd*bc*sc*i* other\n"
        "alias pci:v000010DEd*sv*sd*bc03sc*i* nouveau\n"
        "alias usb:v0BDAp8152d*dc*dsc*dp*ic*isc*ip*in* r8152\n"
    )
    (modules / "modules.dep").write_text(
        "kernel/nvme.ko.xz: kernel/nvme-core.ko.xz kernel/nvme-auth.ko\n"
        "kernel/nvme-core.ko.xz: kernel/nvme-auth.ko\n"
        "kernel/nvme-auth.ko:\n"
        "kernel/e1000e.ko.gz:\n"
        "kernel/nouveau.ko:\n"
        "kernel/other.ko:\n"
    )
    plain = b"\x7fELF module "
    (modules / "kernel/nvme.ko.xz").write_bytes(lzma.compress(plain + b"nvme"))
    (modules / "kernel/nvme-core.ko.xz").write_bytes(lzma.compress(plain + b"core"))
    (modules / "kernel/nvme-auth.ko").write_bytes(plain + b"auth")
    (modules / "kernel/e1000e.ko.gz").write_bytes(gzip.compress(plain + b"\0firmware=intel/e1000e.bin\0license=GPL\0"))
    (modules / "kernel/nouveau.ko").write_bytes(plain)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/busybox").write_bytes(b"static busybox")
    (tmp_path / "bin/busybox").chmod(0o755)
    return Host(str(tmp_path))


def archive_names(data: bytes) -> list[str]:
    names = []
    at = 0
    while True:
        size, name_size = int(data[at + 54 : at + 62], 16), int(data[at + 94 : at + 102], 16)
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        if name == "TRAILER!!!":
            return names
        names.append(name)
        at += 110 + name_size + (-(110 + name_size) % 4) + size + (-size % 4)


def archive_file(data: bytes, name: str) -> bytes:
    at = 0
    while True:
        size, name_size = int(data[at + 54 : at + 62], 16), int(data[at + 94 : at + 102], 16)
        found = data[at + 110 : at + 110 + name_size - 1].decode()
        start = at + 110 + name_size + (-(110 + name_size) % 4)
        if found == name:
            return data[start : start + size]
        assert found != "TRAILER!!!", f"{name} is not in the archive"
        at = start + size + (-size % 4)


# -- modules


@pytest.mark.parametrize(
    ("modalias", "drivers"),
    [(NVME, ["nvme"]), (E1000E, ["e1000e"]), (EDU, []), (VGA, ["nouveau"]), ("", []), ("usb:v0BDAp8152", [])],
)
def test_drivers(host: Host, modalias: str, drivers: list[str]) -> None:
    assert ModuleIndex(host, RELEASE).drivers(modalias) == drivers


def test_closure_loads_what_is_needed_first(host: Host) -> None:
    assert ModuleIndex(host, RELEASE).closure(["nvme", "e1000e"]) == ["nvme_auth", "nvme_core", "nvme", "e1000e"]


def test_modules_are_decompressed(host: Host) -> None:
    index = ModuleIndex(host, RELEASE)
    assert index.load("nvme").content == b"\x7fELF module nvme"
    assert index.load("nvme_auth").content == b"\x7fELF module auth"
    assert index.load("e1000e").firmware == ("intel/e1000e.bin",)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="no zstd to make the input with")
def test_zstd() -> None:
    plain = os.urandom(1000) * 50
    packed = subprocess.run(["zstd", "-q", "-c"], input=plain, stdout=subprocess.PIPE, check=True).stdout
    # From a pipe the frame does not say its size; from a file, as kernel builds do it, it does.
    with pytest.raises(HostError, match="how large"):
        _guest_image.decompress("m.ko.zst", packed)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="no zstd to make the input with")
def test_zstd_file(tmp_path: Path) -> None:
    plain = os.urandom(1000) * 50
    (tmp_path / "m.ko").write_bytes(plain)
    subprocess.run(["zstd", "-q", str(tmp_path / "m.ko")], check=True)
    packed = (tmp_path / "m.ko.zst").read_bytes()
    assert _guest_image.decompress("m.ko.zst", packed) == plain
    with pytest.raises(HostError, match="damaged"):
        _guest_image.decompress("m.ko.zst", packed[: len(packed) // 2])


@pytest.mark.parametrize(
    "damaged",
    [
        lzma.compress(b"x" * 1000)[:-30],
        gzip.compress(b"x" * 1000, mtime=0)[:-9],
        gzip.compress(b"x" * 1000, mtime=0)[:10] + b"\xff" * 20,
    ],
)
def test_damaged_modules(damaged: bytes) -> None:
    with pytest.raises(HostError, match=r"/lib/m\.ko"):
        _guest_image.decompress("/lib/m.ko", damaged)


def test_a_kernel_without_modules(host: Host) -> None:
    with pytest.raises(HostError, match=r"6\.99.*not installed"):
        ModuleIndex(host, "6.99")


# -- kernel


def image(release: str) -> bytes:
    data = bytearray(0x1000)
    data[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", data, 0x20E, 0x400)
    text = f"{release} (debian-kernel@lists.debian.org) #1 SMP".encode() + b"\0"
    data[0x600 : 0x600 + len(text)] = text
    return bytes(data)


def test_kernel_release() -> None:
    assert _guest_image.kernel_release(image(RELEASE), "x86_64") == RELEASE


@pytest.mark.parametrize("content", [b"", b"localhost\n", b"\x7fELF" + bytes(5000)])
def test_no_kernel_image(content: bytes) -> None:
    with pytest.raises(HostError, match="no kernel image"):
        _guest_image.kernel_release(content, "x86_64")


def arm64(release: str) -> bytes:
    data = bytearray(0x1000)
    data[0x38:0x3C] = b"ARM\x64"
    text = f"\0Linux version {release} (debian-kernel@lists.debian.org) #1 SMP".encode()
    data[0x600 : 0x600 + len(text)] = text
    return bytes(data)


def with_stub(payload: bytes) -> bytes:
    head = struct.pack("<4s4sII8s24s", b"MZ\0\0", b"zimg", 0x200, len(payload), b"", b"gzip")
    return head.ljust(0x200, b"\0") + payload + b"\0\0\0\0"


@pytest.mark.parametrize("packed", [bytes, gzip.compress, lambda plain: with_stub(gzip.compress(plain))])
def test_kernel_release_of_arm64(packed: t.Callable[[bytes], bytes]) -> None:
    assert _guest_image.kernel_release(packed(arm64(RELEASE)), "aarch64") == RELEASE


@pytest.mark.parametrize("content", [b"", image(RELEASE), b"\x1f\x8bdamaged", with_stub(b"\x1f\x8bdamaged")])
def test_no_kernel_image_of_arm64(content: bytes) -> None:
    with pytest.raises(HostError, match="no kernel image for arm64"):
        _guest_image.kernel_release(content, "aarch64")


@pytest.mark.parametrize("place", [f"boot/vmlinuz-{RELEASE}", f"usr/lib/modules/{RELEASE}/vmlinuz"])
def test_find_kernel(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_bytes(image(RELEASE))
    host = Host(str(tmp_path))
    assert _guest_image.find_kernel(host, RELEASE) == f"/{place}"
    with pytest.raises(HostError, match=r"6\.99"):
        _guest_image.find_kernel(host, "6.99")


# -- busybox


def test_libraries() -> None:
    listing = (
        "\tlinux-vdso.so.1 (0x00007f4a2683f000)\n"
        "\tlibresolv.so.2 => /lib/x86_64-linux-gnu/libresolv.so.2 (0x00007f4a2675f000)\n"
        "\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f4a2657d000)\n"
        "\tlibgone.so.1 => not found\n"
        "\t/lib64/ld-linux-x86-64.so.2 (0x00007f4a26841000)\n"
    )
    assert _guest_image.libraries(listing) == [
        "/lib/x86_64-linux-gnu/libresolv.so.2",
        "/lib/x86_64-linux-gnu/libc.so.6",
        "/lib64/ld-linux-x86-64.so.2",
    ]


def test_busybox_missing(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="apt install busybox-static"):
        _guest_image.find_busybox(Host(str(tmp_path)))


# -- archive


def test_archive_holds_what_the_devices_need_and_no_more(host: Host) -> None:
    devices = [
        GuestDevice("0000:00:02.0", "0x010802", NVME),
        GuestDevice("0000:00:03.0", "0x00ff00", EDU),
        GuestDevice("0000:00:04.0", "0x030200", VGA),
    ]
    made = _guest_image.build(host, ModuleIndex(host, RELEASE), "/bin/busybox", devices, "ttyS1", 1 << 20, 30)
    assert made.modules == ("nvme_auth", "nvme_core", "nvme")
    assert made.drivers == {"0000:00:02.0": ("nvme",), "0000:00:03.0": (), "0000:00:04.0": ()}
    names = archive_names(made.data)
    assert [name for name in names if name.endswith(".ko")] == [
        "guest/modules/nvme_auth.ko",
        "guest/modules/nvme_core.ko",
        "guest/modules/nvme.ko",
    ]
    assert {"init", "bin/sh", "bin/busybox", "proc", "sys", "dev"} <= set(names)
    assert archive_file(made.data, "guest/modules.list").decode().split() == [
        "nvme_auth.ko",
        "nvme_core.ko",
        "multipath=N",
        "nvme.ko",
    ]
    assert archive_file(made.data, "guest/devices") == (
        b"0000:00:02.0 disk\n0000:00:03.0 nothing\n0000:00:04.0 nothing\n"
    )
    assert archive_file(made.data, "guest/wants") == archive_file(made.data, "guest/devices")
    # Nothing is written and nothing sent unless it was asked for.
    assert archive_file(made.data, "guest/settings") == (
        b"report=ttyS1\nsettle=30\nread_blocks=16\nexpendable=''\narp_target=''\n"
    )
    assert archive_file(made.data, "guest/modules/nvme.ko") == b"\x7fELF module nvme"


def test_two_devices_of_one_driver_share_its_module(host: Host) -> None:
    devices = [GuestDevice("0000:00:02.0", "0x020000", E1000E), GuestDevice("0000:00:03.0", "0x020000", E1000E)]
    made = _guest_image.build(host, ModuleIndex(host, RELEASE), "/bin/busybox", devices, "ttyS1")
    assert made.modules == ("e1000e",)
    assert made.firmware == dict.fromkeys(("0000:00:02.0", "0000:00:03.0"), ("intel/e1000e.bin",))


def test_a_device_that_comes_later_has_its_driver_and_is_not_waited_for(host: Host) -> None:
    devices = [
        GuestDevice("0000:00:02.0", "0x00ff00", EDU),
        GuestDevice("0000:01:00.0", "0x010802", NVME, plugged=True, expendable=True),
    ]
    made = _guest_image.build(
        host, ModuleIndex(host, RELEASE), "/bin/busybox", devices, "ttyS1", arp_target="192.0.2.1"
    )
    assert made.modules == ("nvme_auth", "nvme_core", "nvme")
    assert archive_file(made.data, "guest/devices") == b"0000:00:02.0 nothing\n"
    assert archive_file(made.data, "guest/wants") == b"0000:00:02.0 nothing\n0000:01:00.0 disk\n"
    settings = archive_file(made.data, "guest/settings").decode().splitlines()
    assert settings[0] == "report=ttyS1"
    assert settings[3:] == ["expendable=' 0000:01:00.0 '", "arp_target='192.0.2.1'"]


def test_init_is_valid_shell() -> None:
    shell = ["busybox", "sh", "-n"] if shutil.which("busybox") else ["sh", "-n"]
    done = subprocess.run(shell, input=_guest_image.INIT.encode(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
