# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The devices of a guest as people write them down: a PCI address, a mediated device, a channel or crypto device.

The same list goes to the backend policy, to QEMU's command line and to libvirt's XML, so it is read in one place.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._pci import is_address, parse_address

#: What QEMU's vfio can drive: a PCI function, a mediated PCI device, and on s390x a subchannel and a crypto matrix.
KINDS = ("vfio-pci", "mdev", "vfio-ccw", "vfio-ap")
PCI_KINDS = ("vfio-pci", "mdev")
S390_KINDS = ("vfio-ccw", "vfio-ap")

BACKENDS = ("legacy", "iommufd")

MDEVS = "/sys/bus/mdev/devices"

_UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")
_KEYS = (
    "address", "uuid", "sysfsdev", "kind", "backend", "id", "iommufd", "fd", "properties", "guest_address",
)  # fmt: skip

_ACCEPTED = (
    'a PCI address such as "0000:02:00.0", the UUID of a mediated device, a device of a survey, or a dictionary with '
    "one of address, uuid and sysfsdev"
)


@dataclasses.dataclass(frozen=True)
class GuestDevice:
    """A device that a guest shall have.

    Attributes:
        option: where it was written, for messages ("devices[0]").
        kind: one of :data:`KINDS`.
        address: of a PCI function, as the kernel writes it.
        uuid: of a mediated device (those of s390x are ones, too).
        sysfsdev: its directory in sysfs; None for a PCI function.
        backend: what was asked for this very device; None: nothing, it goes with the guest.
        given: all keys as they were written.
    """

    option: str
    kind: str
    address: str | None = None
    uuid: str | None = None
    sysfsdev: str | None = None
    backend: str | None = None
    given: t.Mapping[str, t.Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """What to call it in messages and results."""
        return self.address or self.uuid or self.sysfsdev or self.option

    @property
    def is_pci(self) -> bool:
        """Whether the guest sees a PCI device, which has BARs that others could want to reach."""
        return self.kind in PCI_KINDS


def parse_devices(option: str, value: object, empty: bool = False) -> list[GuestDevice]:
    """Read a list of devices.

    Args:
        option: its name, for messages.
        value: what the user wrote.
        empty: whether a list without devices is accepted.

    Raises:
        OptionError: an entry that is no device, or one device twice.
    """
    if not isinstance(value, (list, tuple)) or not (value or empty):
        raise OptionError(option, value, f"a list of devices, each {_ACCEPTED}")
    found: list[GuestDevice] = []
    for index, entry in enumerate(value):
        device = _parse(f"{option}[{index}]", entry)
        twin = next((one for one in found if one.name == device.name), None)
        if twin is not None:
            raise OptionError(device.option, device.name, "each device once", f"{twin.option} is the same device")
        found.append(device)
    return found


def _parse(option: str, entry: object) -> GuestDevice:
    if isinstance(entry, str):
        given: dict[str, t.Any] = {"uuid" if _UUID.fullmatch(entry.strip()) else "address": entry}
    elif isinstance(entry, dict):
        given = {str(key): value for key, value in entry.items()}
    else:
        raise OptionError(option, entry, _ACCEPTED)
    if "vendor_id" not in given:  # a device of a survey says much more that does not matter here
        for key in given:
            if key not in _KEYS:
                raise OptionError(f"{option}.{key}", given[key], f"the keys {', '.join(_KEYS)}", "there is no such key")
    named = [key for key in ("address", "uuid", "sysfsdev") if given.get(key) is not None]
    if len(named) != 1:
        raise OptionError(option, entry, _ACCEPTED)
    device = _identify(option, given, named[0])
    backend = given.get("backend")
    if backend not in (None, "auto", *BACKENDS):
        raise OptionError(f"{option}.backend", backend, f"{', '.join(BACKENDS)}, or auto to go with the guest")
    return dataclasses.replace(device, backend=None if backend == "auto" else backend, given=given)


def _identify(option: str, given: t.Mapping[str, t.Any], key: str) -> GuestDevice:
    kind = given.get("kind")
    if kind is not None and kind not in KINDS:
        raise OptionError(f"{option}.kind", kind, ", ".join(KINDS))
    value = given[key]
    if key == "address":
        address = parse_address(option if set(given) <= {"address"} else f"{option}.address", value)
        if kind not in (None, "vfio-pci"):
            raise OptionError(f"{option}.kind", kind, "vfio-pci for a PCI address; any other kind has a uuid")
        return GuestDevice(option, "vfio-pci", address=address)
    if key == "uuid":
        if not isinstance(value, str) or not _UUID.fullmatch(value.strip()):
            raise OptionError(f"{option}.uuid", value, "the UUID of a mediated device, see /sys/bus/mdev/devices")
        uuid = value.strip().lower()
        return _mediated(option, kind or "mdev", uuid, f"{MDEVS}/{uuid}")
    if not isinstance(value, str) or not re.fullmatch(r"/sys(/[^/\x00-\x1f]+)+", value) or "/../" in f"{value}/":
        raise OptionError(f"{option}.sysfsdev", value, "the absolute path of a device below /sys")
    name = value.rpartition("/")[2]
    if is_address(name) and kind in (None, "vfio-pci"):
        return GuestDevice(option, "vfio-pci", address=name)
    if kind is None:
        raise OptionError(f"{option}.kind", None, f"{', '.join(KINDS)} beside sysfsdev", "the path does not tell")
    return _mediated(option, kind, name.lower() if _UUID.fullmatch(name) else None, value)


def _mediated(option: str, kind: str, uuid: str | None, path: str) -> GuestDevice:
    if kind == "vfio-pci":
        raise OptionError(f"{option}.kind", kind, "mdev, vfio-ccw or vfio-ap for a mediated device")
    return GuestDevice(option, kind, uuid=uuid, sysfsdev=path)
