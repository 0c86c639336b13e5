# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""A guest's devices as arguments of QEMU's command line.

Either QEMU opens the nodes itself, or a launcher does and passes the descriptors, all of them: an iommufd object with
``fd=`` and every device on it. On the command line QEMU takes descriptors by number only.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import BACKENDS, GuestDevice
from ansible_collections.iommufd.host.plugins.module_utils._nodes import IOMMU
from ansible_collections.iommufd.host.plugins.module_utils._udev import cdev_link

DEFAULT_OBJECT = "iommufd0"

# qemu/util/id.c: id_wellformed()
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_ACCEPTED_ID = "a name that begins with a letter, of letters, digits, dots, underscores and dashes"
_PROPERTY = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
# What the other keys of a device say.
_OWN_PROPERTIES = ("driver", "id", "host", "sysfsdev", "fd", "iommufd")

# 0 to 2 are standard input, output and error.
FIRST_DESCRIPTOR = 3


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """A descriptor that QEMU is to inherit.

    Attributes:
        number: the one that the command line names.
        path: what it is; None where it is not known (a device that has no stable name).
        name: of the object or device in QEMU.
    """

    number: int
    path: str | None
    name: str


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments, and the descriptors that they name, in their order."""

    words: tuple[str, ...]
    descriptors: tuple[Descriptor, ...] = ()


@dataclasses.dataclass(frozen=True)
class Object:
    """An iommufd object of QEMU: an I/O address space of its own. ``fd``: of /dev/iommu; None: QEMU opens it."""

    id: str
    fd: int | None = None
    listed: bool = True


def parse_objects(option: str, value: object, fd: object = None) -> list[Object]:
    """The iommufd objects of a guest.

    Args:
        option: its name, for messages.
        value: None, or a list of ids or dictionaries with ``id`` and ``fd``.
        fd: descriptor of the one object that there is where ``value`` is None.

    Raises:
        OptionError: malformed, or an id or descriptor twice.
    """
    if value is None:
        return [Object(DEFAULT_OBJECT, None if fd is None else _fd("iommufd_fd", fd), listed=False)]
    if fd is not None:
        raise OptionError("iommufd_fd", fd, f"nothing beside {option}, whose entries have a fd of their own")
    accepted = "a list of names of iommufd objects, or of dictionaries with id and fd"
    if not isinstance(value, (list, tuple)) or not value:
        raise OptionError(option, value, accepted)
    found: list[Object] = []
    for index, entry in enumerate(value):
        where = f"{option}[{index}]"
        given = {"id": entry} if isinstance(entry, str) else entry
        if not isinstance(given, dict) or set(given) - {"id", "fd"} or "id" not in given:
            raise OptionError(where, entry, accepted)
        name = _id(f"{where}.id", given["id"])
        if any(one.id == name for one in found):
            raise OptionError(f"{where}.id", name, "each name once")
        found.append(Object(name, None if given.get("fd") is None else _fd(f"{where}.fd", given["fd"])))
    return found


def _id(option: str, value: object) -> str:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise OptionError(option, value, _ACCEPTED_ID)
    return value


def _fd(option: str, value: object) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(number, int) or isinstance(number, bool) or number < FIRST_DESCRIPTOR:
        raise OptionError(
            option, value, f"the number of an open descriptor, {FIRST_DESCRIPTOR} or more",
            "names of descriptors are for QMP (getfd) only" if isinstance(value, str) else "",
        )  # fmt: skip
    return number


def arguments(
    devices: t.Sequence[GuestDevice],
    objects: t.Sequence[Object],
    backend: str = "iommufd",
    first_fd: int | None = None,
) -> Arguments:
    """The arguments that give a guest its devices.

    Args:
        devices: in their order; each may say its ``backend``, ``id``, ``iommufd`` (the object), ``fd`` and
            ``properties``.
        objects: the iommufd objects; a device that names none is on the first.
        backend: of the devices that do not say it.
        first_fd: number all descriptors from here on: the objects in use first, then the devices on them.

    Raises:
        OptionError: something that QEMU does not take, or that cannot work.
    """
    if backend not in BACKENDS:
        raise OptionError("backend", backend, ", ".join(BACKENDS), "auto is decided before, by the filter vfio_backend")
    known = {one.id: one for one in objects}
    names: dict[str, str] = dict.fromkeys(known, "iommufd object")
    plain: list[tuple[GuestDevice, str, Object | None]] = []
    for number, device in enumerate(devices):
        name = _id(f"{device.option}.id", device.given.get("id") or f"vfio{number}")
        if name in names:
            raise OptionError(f"{device.option}.id", name, "a name that nothing else has", f"{names[name]} has it")
        names[name] = device.option
        plain.append((device, name, _object_of(device, device.backend or backend, objects, known)))
    used = [one for one in objects if one.listed or any(on is one for _device, _name, on in plain)]
    if first_fd is not None:
        used, plain = _numbered(used, plain, _fd("first_fd", first_fd))
        known = {one.id: one for one in used}
    words: list[str] = []
    descriptors: list[Descriptor] = []
    for one in used:
        words += ["-object", _join("iommufd", {"id": one.id, "fd": one.fd})]
        if one.fd is not None:
            descriptors.append(Descriptor(one.fd, IOMMU, one.id))
    for device, name, on in plain:
        word, descriptor = _device(device, name, on)
        words += ["-device", word]
        descriptors += [] if descriptor is None else [descriptor]
    for index, one_fd in enumerate(descriptors):
        twin = next((other for other in descriptors[:index] if other.number == one_fd.number), None)
        if twin is not None:
            raise OptionError(
                "fd", one_fd.number, "each descriptor once", f"{twin.name} and {one_fd.name} both have it"
            )
    return Arguments(tuple(words), tuple(descriptors))


def _object_of(
    device: GuestDevice, backend: str, objects: t.Sequence[Object], known: t.Mapping[str, Object]
) -> Object | None:
    """The iommufd object that a device is on; None with the legacy container."""
    named = device.given.get("iommufd")
    if backend == "legacy":
        for key in ("fd", "iommufd"):
            if device.given.get(key) is not None:
                raise OptionError(
                    f"{device.option}.{key}", device.given[key], "nothing, or backend: iommufd",
                    "QEMU takes it with iommufd only" if key == "fd" else "the backend of this device is legacy",
                )  # fmt: skip
        return None
    if named is None:
        return objects[0]
    if named not in known:
        raise OptionError(f"{device.option}.iommufd", named, f"one of the iommufd objects ({', '.join(known)})")
    return known[named]


def _numbered(
    objects: t.Sequence[Object], devices: t.Sequence[tuple[GuestDevice, str, Object | None]], first: int
) -> tuple[list[Object], list[tuple[GuestDevice, str, Object | None]]]:
    number = first
    renamed: dict[str, Object] = {}
    for one in objects:
        if one.fd is not None:
            raise OptionError("first_fd", first, "nothing beside descriptors that are numbered by hand")
        renamed[one.id] = dataclasses.replace(one, fd=number)
        number += 1
    found: list[tuple[GuestDevice, str, Object | None]] = []
    for device, name, on in devices:
        if on is None:
            found.append((device, name, None))
            continue
        if device.given.get("fd") is not None:
            raise OptionError("first_fd", first, "nothing beside descriptors that are numbered by hand")
        found.append((dataclasses.replace(device, given={**device.given, "fd": number}), name, renamed[on.id]))
        number += 1
    return list(renamed.values()), found


def _device(device: GuestDevice, name: str, on: Object | None) -> tuple[str, Descriptor | None]:
    given = device.given.get("fd")
    fd = None if given is None else _fd(f"{device.option}.fd", given)
    if on is not None and (on.fd is None) != (fd is None):
        if device.kind == "mdev":
            raise OptionError(
                f"{device.option}.iommufd", on.id, "an iommufd object without fd, which QEMU opens itself",
                "a mediated device is opened by QEMU, by its directory in sysfs",
            )  # fmt: skip
        reason = "its object has one" if fd is None else f"its object {on.id} has none"
        accepted = "a descriptor for the iommufd object and for every device on it, or for none of them"
        raise OptionError(f"{device.option}.fd", given, accepted, reason)
    if fd is not None and device.kind == "mdev":
        raise OptionError(
            f"{device.option}.fd", given, "nothing for a mediated device, which QEMU opens by its directory in sysfs",
            "QEMU cannot tell from a descriptor that the device is a mediated one",
        )  # fmt: skip
    model = "vfio-pci" if device.kind == "mdev" else device.kind
    properties: dict[str, t.Any] = {"id": name}
    if fd is None:
        properties["host" if device.address else "sysfsdev"] = device.address or device.sysfsdev
    else:
        properties["fd"] = fd
    if on is not None:
        properties["iommufd"] = on.id
    properties.update(_properties(device))
    path = cdev_link(device.address) if device.address else None
    return _join(model, properties), None if fd is None else Descriptor(fd, path, name)


def _properties(device: GuestDevice) -> dict[str, t.Any]:
    value = device.given.get("properties") or {}
    option = f"{device.option}.properties"
    if not isinstance(value, dict):
        raise OptionError(option, value, "a dictionary of further properties, such as {bus: rp1, rombar: 0}")
    for key, setting in value.items():
        if not isinstance(key, str) or not _PROPERTY.fullmatch(key) or key in _OWN_PROPERTIES:
            own = f"another key of the device says {key}" if key in _OWN_PROPERTIES else ""
            raise OptionError(f"{option}.{key}", setting, "a property of QEMU's device", own)
        if not isinstance(setting, (str, int, float, bool)):
            raise OptionError(f"{option}.{key}", setting, "a text, a number or a truth value")
    return dict(value)


def _join(head: str, properties: t.Mapping[str, t.Any]) -> str:
    """QEMU's list of properties; a comma in a value is written twice."""
    words = [head]
    for key, value in properties.items():
        if value is not None:
            text = ("on" if value else "off") if isinstance(value, bool) else str(value)
            words.append(f"{key}={text.replace(',', ',,')}")
    return ",".join(words)
