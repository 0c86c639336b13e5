# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import re
import shutil
import subprocess
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import parse_devices
from ansible_collections.iommufd.host.plugins.module_utils._qemu_devices import Arguments, arguments, parse_objects

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
TWO = ["0000:01:00.0", "0000:02:00.0"]


def build(
    devices: list[t.Any], backend: str = "iommufd", fd: t.Any = None, objects: t.Any = None, first: t.Any = None
) -> Arguments:
    return arguments(parse_devices("devices", devices), parse_objects("objects", objects, fd), backend, first)


def test_qemu_opens_the_nodes() -> None:
    assert build(TWO).words == (
        "-object", "iommufd,id=iommufd0",
        "-device", "vfio-pci,id=vfio0,host=0000:01:00.0,iommufd=iommufd0",
        "-device", "vfio-pci,id=vfio1,host=0000:02:00.0,iommufd=iommufd0",
    )  # fmt: skip
    assert build(TWO).descriptors == ()


def test_a_launcher_passes_the_descriptors() -> None:
    devices = [{"address": "0000:01:00.0", "fd": 23}, {"address": "0000:02:00.0", "fd": 24, "id": "gpu"}]
    assert build(devices, fd=22).words == (
        "-object", "iommufd,id=iommufd0,fd=22",
        "-device", "vfio-pci,id=vfio0,fd=23,iommufd=iommufd0",
        "-device", "vfio-pci,id=gpu,fd=24,iommufd=iommufd0",
    )  # fmt: skip


def test_every_device_has_an_id() -> None:
    for words in (build(TWO).words, build(TWO, first=3).words, build(TWO, "legacy").words):
        assert all(re.search(r",id=[a-z]", word) for word in words if word.startswith("vfio"))


def test_descriptors_are_numbered_in_the_order_in_which_they_are_opened() -> None:
    found = build([*TWO, {"address": "0000:03:00.0", "backend": "legacy"}], first=3)
    assert found.words == (
        "-object", "iommufd,id=iommufd0,fd=3",
        "-device", "vfio-pci,id=vfio0,fd=4,iommufd=iommufd0",
        "-device", "vfio-pci,id=vfio1,fd=5,iommufd=iommufd0",
        "-device", "vfio-pci,id=vfio2,host=0000:03:00.0",
    )  # fmt: skip
    assert [(one.number, one.path, one.name) for one in found.descriptors] == [
        (3, "/dev/iommu", "iommufd0"),
        (4, "/dev/vfio/by-path/pci-0000:01:00.0", "vfio0"),
        (5, "/dev/vfio/by-path/pci-0000:02:00.0", "vfio1"),
    ]


def test_legacy() -> None:
    assert build([*TWO, UUID], "legacy").words == (
        "-device", "vfio-pci,id=vfio0,host=0000:01:00.0",
        "-device", "vfio-pci,id=vfio1,host=0000:02:00.0",
        "-device", f"vfio-pci,id=vfio2,sysfsdev=/sys/bus/mdev/devices/{UUID}",
    )  # fmt: skip


def test_several_iommufd_objects_and_a_legacy_device_beside_them() -> None:
    devices = [
        "0000:01:00.0",
        {"address": "0000:02:00.0", "iommufd": "second"},
        {"address": "0000:03:00.0", "backend": "legacy"},
    ]
    assert build(devices, objects=["first", "second"]).words == (
        "-object", "iommufd,id=first",
        "-object", "iommufd,id=second",
        "-device", "vfio-pci,id=vfio0,host=0000:01:00.0,iommufd=first",
        "-device", "vfio-pci,id=vfio1,host=0000:02:00.0,iommufd=second",
        "-device", "vfio-pci,id=vfio2,host=0000:03:00.0",
    )  # fmt: skip
    passed = build(devices, objects=["first", "second"], first=10)
    assert [one.number for one in passed.descriptors] == [10, 11, 12, 13]
    by_hand = [{"address": "0000:01:00.0", "fd": 5}, UUID]
    assert build(by_hand[:1], objects=[{"id": "a", "fd": 4}, "b"]).words[:4] == (
        "-object", "iommufd,id=a,fd=4", "-object", "iommufd,id=b",
    )  # fmt: skip


def test_an_object_that_is_named_is_there_for_devices_to_come() -> None:
    assert build([{"address": "0000:01:00.0", "backend": "legacy"}], objects=["spare"]).words[:2] == (
        "-object", "iommufd,id=spare",
    )  # fmt: skip
    assert "-object" not in build(TWO, "legacy").words


@pytest.mark.parametrize("kind", ["vfio-ccw", "vfio-ap"])
def test_devices_of_s390x(kind: str) -> None:
    devices = [{"uuid": UUID, "kind": kind}]
    assert build(devices).words[-1] == f"{kind},id=vfio0,sysfsdev=/sys/bus/mdev/devices/{UUID},iommufd=iommufd0"
    assert build(devices, "legacy").words[-1] == f"{kind},id=vfio0,sysfsdev=/sys/bus/mdev/devices/{UUID}"
    path = {"sysfsdev": "/sys/devices/vfio_ap/matrix/a,b", "kind": kind}
    assert build([path]).words[-1] == f"{kind},id=vfio0,sysfsdev=/sys/devices/vfio_ap/matrix/a,,b,iommufd=iommufd0"
    # QEMU knows of these without being told that they are mediated, so it takes a descriptor.
    assert build([{**devices[0], "fd": 4}], fd=3).words[-1] == f"{kind},id=vfio0,fd=4,iommufd=iommufd0"


def test_a_mediated_device_is_opened_by_qemu() -> None:
    assert build([UUID]).words[-1] == f"vfio-pci,id=vfio0,sysfsdev=/sys/bus/mdev/devices/{UUID},iommufd=iommufd0"
    with pytest.raises(OptionError, match=r"^devices\[0\]\.fd: .*opens by its directory in sysfs"):
        build([UUID], first=3)
    with pytest.raises(OptionError, match=r"^devices\[0\]\.iommufd: 'iommufd0' .*an iommufd object without fd"):
        build([UUID], fd=3)
    beside = build(
        [{"address": "0000:01:00.0", "fd": 4}, {"uuid": UUID, "iommufd": "own"}], objects=[{"id": "a", "fd": 3}, "own"]
    )
    assert beside.words[-1].endswith(",iommufd=own")


def test_further_properties() -> None:
    device = {"address": "0000:01:00.0", "properties": {"bus": "rp1", "rombar": 0, "x-vga": True, "romfile": "a,b"}}
    assert build([device]).words[-1] == (
        "vfio-pci,id=vfio0,host=0000:01:00.0,iommufd=iommufd0,bus=rp1,rombar=0,x-vga=on,romfile=a,,b"
    )


@pytest.mark.parametrize(
    ("devices", "more", "option", "words"),
    [
        (TWO, {"backend": "auto"}, "backend: 'auto'", "vfio_backend"),
        (TWO, {"fd": "iommu"}, "iommufd_fd: 'iommu'", "QMP"),
        (TWO, {"fd": 2}, "iommufd_fd: 2", "3 or more"),
        (TWO, {"fd": True}, "iommufd_fd: True", "3 or more"),
        (TWO, {"fd": 3, "objects": ["a"]}, "iommufd_fd: 3", "nothing beside objects"),
        (TWO, {"objects": []}, r"objects: \[\]", "a list of names"),
        (TWO, {"objects": ["0a"]}, r"objects\[0\]\.id: '0a'", "begins with a letter"),
        (TWO, {"objects": ["a", "a"]}, r"objects\[1\]\.id: 'a'", "each name once"),
        (TWO, {"objects": [{"id": "a", "path": 1}]}, r"objects\[0\]: ", "id and fd"),
        (TWO, {"fd": 3}, r"devices\[0\]\.fd: None", "its object has one"),
        ([{"address": "01:00.0", "fd": 4}], {}, r"devices\[0\]\.fd: 4", "its object iommufd0 has none"),
        ([{"address": "01:00.0", "fd": 3}], {"fd": 3}, "fd: 3", "iommufd0 and vfio0 both have it"),
        ([{"address": "01:00.0", "fd": 4}], {"backend": "legacy"}, r"devices\[0\]\.fd: 4", "with iommufd only"),
        ([{"address": "01:00.0", "iommufd": "x"}], {}, r"devices\[0\]\.iommufd: 'x'", "iommufd0"),
        ([{"address": "01:00.0", "iommufd": "iommufd0", "backend": "legacy"}], {}, r"devices\[0\]\.iommufd", "legacy"),
        ([{"address": "01:00.0", "id": "a b"}], {}, r"devices\[0\]\.id: 'a b'", "letters"),
        ([{"address": "01:00.0", "id": "vfio1"}, "02:00.0"], {}, r"devices\[1\]\.id: 'vfio1'", r"devices[0] has it"),
        ([{"address": "01:00.0", "id": "iommufd0"}], {}, r"devices\[0\]\.id: 'iommufd0'", "iommufd object has it"),
        ([{"address": "01:00.0", "fd": 4}], {"fd": 3, "first": 3}, "first_fd: 3", "by hand"),
        ([{"address": "01:00.0", "fd": 4}], {"first": 3}, "first_fd: 3", "by hand"),
        (TWO, {"first": 0}, "first_fd: 0", "3 or more"),
        ([{"address": "01:00.0", "properties": ["a"]}], {}, r"devices\[0\]\.properties: ", "a dictionary"),
        ([{"address": "01:00.0", "properties": {"host": "x"}}], {}, r"devices\[0\]\.properties\.host: ", "another key"),
        ([{"address": "01:00.0", "properties": {"a=b,c": 1}}], {}, r"devices\[0\]\.properties\.a=b,c: ", "a property"),
        ([{"address": "01:00.0", "properties": {"a": []}}], {}, r"devices\[0\]\.properties\.a: ", "a truth value"),
    ],
)  # fmt: skip
def test_what_qemu_would_not_take(devices: list[t.Any], more: dict[str, t.Any], option: str, words: str) -> None:
    with pytest.raises(OptionError, match=f"^{option}") as error:
        build(devices, **more)
    assert words in error.value.message


def test_the_words_are_qemus() -> None:
    """The properties exist in a QEMU that is installed here; asked only, nothing is started."""
    binary = shutil.which("qemu-system-x86_64")
    if binary is None:
        pytest.skip("there is no qemu-system-x86_64 here")

    def offered(kind: str, name: str) -> set[str]:
        done = subprocess.run([binary, kind, name], capture_output=True, text=True, timeout=120, check=False)
        return set(re.findall(r"^\s*([\w-]+)=", done.stdout, re.MULTILINE))

    properties = offered("-device", "vfio-pci,help")
    if "iommufd" not in properties:
        pytest.skip("this QEMU has no iommufd")
    used = {word.partition("=")[0] for one in (build(TWO), build(TWO, first=3), build([UUID])) for arg in one.words
            if arg.startswith("vfio-pci,") for word in arg.split(",")[1:]}  # fmt: skip
    assert used == {"id", "host", "fd", "iommufd", "sysfsdev"}
    assert used - {"id"} <= properties
    assert "fd" in offered("-object", "iommufd,help")
