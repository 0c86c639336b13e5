# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _lab_image, _lab_iommufd
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._lab_image import (
    DISTRIBUTIONS,
    ImageSpec,
    image_path,
    parse_image,
)


def test_the_key_is_the_same_for_the_same_image() -> None:
    assert (
        parse_image("trixie", ["git", "gcc"], "8G").key() == parse_image("trixie", ["gcc", "git", "gcc"], "8192M").key()
    )


@pytest.mark.parametrize(
    "other",
    [
        parse_image("bookworm"),
        parse_image("trixie", ["git"]),
        parse_image("trixie", size="9G"),
        parse_image("trixie", mirror="http://mirror.example/debian"),
        parse_image("trixie", check_valid_until=False),
        parse_image("trixie", kernel_arguments=["intel_iommu=off"]),
        parse_image("trixie", iommufd=True),
        parse_image("trixie", architecture="arm64"),
    ],
)
def test_the_key_covers_every_input(other: ImageSpec) -> None:
    assert other.key() != parse_image("trixie").key()


def test_a_package_that_is_there_anyway_makes_no_other_image() -> None:
    assert parse_image("trixie", ["openssh-server"]).key() == parse_image("trixie").key()


def test_an_image_for_arm64_has_its_kernel_its_boot_loader_and_its_console() -> None:
    spec = parse_image("trixie", architecture="arm64")
    packages, files = spec.inputs()["packages"], spec.files()
    assert {"linux-image-arm64", "grub-efi-arm64", "qemu-system-arm"} <= set(packages)
    assert not {"linux-image-amd64", "grub-pc", "qemu-system-x86"} & set(packages)
    assert "grub-install --target=arm64-efi" in files["lab-boot-loader"][1]
    assert "grub-pc" not in spec.configure()
    assert (
        not [text for _mode, text in files.values() if "ttyS0" in text] and "serial-getty@ttyAMA0" in spec.configure()
    )


def test_an_image_with_dracut_has_no_initramfs_tools() -> None:
    inputs = parse_image("trixie", ["dracut"]).inputs()
    assert "dracut" in inputs["packages"]
    assert "initramfs-tools" not in inputs["packages"]
    assert "etc/dracut.conf.d/50-lab.conf" in inputs["files"]
    assert not [path for path in inputs["files"] if "initramfs-tools" in path]
    assert "initramfs-tools" in parse_image("trixie").inputs()["packages"]


def test_the_path_has_the_key(tmp_path: Path) -> None:
    spec = parse_image("trixie")
    assert image_path(spec, tmp_path) == tmp_path / f"trixie-{spec.key()}" / "disk.qcow2"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"distribution": "sarge"}, "distribution: 'sarge' .*trixie"),
        ({"packages": ["git", "rm -rf"]}, r"packages\[1\]: 'rm -rf'"),
        ({"packages": ["--no-x"]}, r"packages\[0\]: '--no-x'"),
        ({"kernel_arguments": ['a" b']}, r"kernel_arguments\[0\]"),
        ({"size": "1G"}, "size: '1G' .*2G to 2T"),
        ({"size": "big"}, "size: 'big' .*64M"),
        ({"mirror": "file:/x y"}, "mirror: 'file:/x y'"),
    ],
)
def test_what_cannot_be_accepted_is_named(options: dict[str, t.Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        parse_image(**{"distribution": "trixie", **options})


def test_the_image_leaves_the_iommu_to_the_collections_roles() -> None:
    for distribution in DISTRIBUTIONS:
        assert "iommu=" not in str(parse_image(distribution).inputs())
    assert 'DEFAULT="intel_iommu=off"' in parse_image("trixie", kernel_arguments=["intel_iommu=off"]).configure()


def test_the_configuration_script_is_complete() -> None:
    script = parse_image("trixie").configure()
    assert "@" not in script.replace("getty@", "").replace("modprobe@", "")
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def test_the_shell_scripts_in_the_image_parse() -> None:
    scripts = [text for mode, text in parse_image("trixie").files().values() if mode == 0o755]
    assert len(scripts) == 3
    for text in scripts:
        subprocess.run(["sh", "-n"], input=text, text=True, check=True)


@pytest.mark.skipif(shutil.which("sfdisk") is None, reason="no sfdisk")
def test_the_partition_table_is_one_to_others_too(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    _lab_image._partition(disk, 2 << 30)
    said = subprocess.run(["sfdisk", "--dump", disk], capture_output=True, text=True, check=True).stdout
    assert "start=        2048, size=     4192256, type=83, bootable" in said


def test_the_partition_table(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    _lab_image._partition(disk, 2 << 30)
    sector = disk.read_bytes()[:512]
    assert sector[510:] == b"\x55\xaa"
    entry = sector[446:462]
    assert (entry[0], entry[4]) == (0x80, 0x83)
    assert int.from_bytes(entry[8:12], "little") * 512 == 1 << 20
    assert (int.from_bytes(entry[8:12], "little") + int.from_bytes(entry[12:16], "little")) * 512 == 2 << 30
    assert sector[462:510] == bytes(48)


def test_the_code_that_builds_iommufd_in_an_image_needs_nothing_but_python(tmp_path: Path) -> None:
    payload = tmp_path / "payload.tar"
    _lab_iommufd.write_payload(str(payload))
    with tarfile.open(payload) as archive:
        # Not every 3.9 knows the filter, and later ones ask for it.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    top = tmp_path / _lab_iommufd.DIRECTORY
    check = (
        f"import sys; sys.path.insert(0, {str(top)!r})\n"
        "from ansible_collections.iommufd.host.plugins.module_utils import _dkms\n"
        "print(_dkms.__file__, 'ansible' in sys.modules)"
    )
    # Isolated: nothing of this environment is found.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        str(top / "ansible_collections/iommufd/host/plugins/module_utils/_dkms.py"),
        "False",
    ]
