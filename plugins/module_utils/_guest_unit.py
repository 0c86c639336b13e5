# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the systemd unit of a guest with shared descriptors says.

systemd opens the files of ``OpenFile=`` as root, in the unit's cgroup, follows symbolic links, and passes them as the
descriptors 3, 4, … in the order of the lines (no socket unit and no descriptor store comes before them). So the numbers
on QEMU's command line are known when the unit is written, and which vfioN a device has is looked up at each start.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import GuestDevice, parse_devices
from ansible_collections.iommufd.host.plugins.module_utils._guest_machine import ARCHITECTURES, guest_machine
from ansible_collections.iommufd.host.plugins.module_utils._memlock import parse_guests, parse_size
from ansible_collections.iommufd.host.plugins.module_utils._nodes import IOMMU, KVM
from ansible_collections.iommufd.host.plugins.module_utils._qemu_command import SANDBOX
from ansible_collections.iommufd.host.plugins.module_utils._qemu_devices import (
    FIRST_DESCRIPTOR,
    Descriptor,
    arguments,
    parse_objects,
)
from ansible_collections.iommufd.host.plugins.module_utils._systemd_unit import parse_class, parse_path
from ansible_collections.iommufd.host.plugins.module_utils._udev import cdev_link

Json = dict[str, t.Any]

PREFIX = "iommufd-guest-"

_PYTHON = "/usr/bin/python3"
# Presses the guest's power button and waits until QEMU has ended; systemd ends it where that takes too long.
_POWER_BUTTON = (
    "import json,socket,sys;s=socket.socket(socket.AF_UNIX);s.connect(sys.argv[1]);"
    "[s.sendall(json.dumps({'execute':c}).encode()) for c in ('qmp_capabilities','system_powerdown')];"
    "list(iter(lambda:s.recv(4096),b''))"
)

MIB = 1 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
_MACHINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*")
_KEYS = (
    "name", "devices", "memory", "cpus", "user", "group", "qemu", "machine", "cpu", "accelerator", "arguments",
    "device_allow", "enabled", "stop_timeout",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What guests have that do not say it.

    Attributes:
        user: who runs QEMU.
        group: that user's group; None: the primary one.
        qemu: path of QEMU; None: the distribution's for the architecture.
        machine: its type; None: what is usual for the architecture.
        accelerator: "kvm" or "tcg".
        architecture: the host's, as ``uname -m`` has it.
    """

    user: str | None = None
    group: str | None = None
    qemu: str | None = None
    machine: str | None = None
    accelerator: str = "kvm"
    architecture: str = "x86_64"


# -- systemd's languages -----------------------------------------------------------------------------------------------


def quote(word: str) -> str:
    """A word of ``ExecStart=`` that reaches the program as it is (systemd.service(5), "Command lines").

    Raises:
        OptionError: a control character, which has no place in a unit.
    """
    if re.search(r"[\x00-\x1f\x7f]", word):
        raise OptionError("arguments", word, "a text without control characters")
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return text if re.fullmatch(r"[A-Za-z0-9_/.,:=@+%-]+", text) else f'"{text}"'


def open_file(path: str, name: str) -> str:
    """An ``OpenFile=`` setting. A colon of the path would end it: systemd takes \\x3a there, and no other quoting."""
    return f"{path.replace('%', '%%').replace(':', chr(92) + 'x3a')}:{name}"


def device_unit(path: str) -> str:
    """The unit that is active while udev has a device of this name (systemd-escape --path)."""
    parts = []
    for character in path.strip("/"):
        if character == "/":
            parts.append("-")
        elif re.fullmatch(r"[A-Za-z0-9:_.]", character):
            parts.append(character)
        else:
            parts += [f"\\x{byte:02x}" for byte in character.encode()]
    return "".join(parts) + ".device"


# -- guests ------------------------------------------------------------------------------------------------------------


def units(option: str, guests: object, defaults: Defaults) -> list[Json]:
    """What the units of a host's guests say.

    The guests are read together because those of one user share its limit on pinned memory: iommufd compares what all
    processes of the user have pinned with the limit of the one that pins (see :mod:`_memlock`).

    Raises:
        OptionError: a guest that is malformed, a name or a device twice.
    """
    if not isinstance(guests, (list, tuple)):
        raise OptionError(option, guests, "a list of guests, each a dictionary with name, devices and memory")
    if defaults.architecture not in ARCHITECTURES:
        raise OptionError("architecture", defaults.architecture, ", ".join(ARCHITECTURES))
    found = [_guest(f"{option}[{index}]", guest, defaults) for index, guest in enumerate(guests)]
    owners: dict[str, Json] = {}
    for one in found:
        for key in (one["name"], *one["addresses"]):
            if key in owners:
                what = "a name" if key == one["name"] else "a device"
                raise OptionError(
                    one["option"], key, f"{what} that no other guest has", f"{owners[key]['option']} has it"
                )
            owners[key] = one
    for one in found:
        together = [f"{other['memory']}M" for other in found if other["user"] == one["user"]]
        amount = parse_guests(
            option, [{"memory": size, "count": together.count(size)} for size in sorted(set(together))]
        )
        one["memlock"], one["memlock_reason"] = amount.systemd, amount.reason
    for one in found:
        del one["option"]
    return found


def _guest(option: str, value: object, defaults: Defaults) -> Json:
    if not isinstance(value, dict):
        raise OptionError(option, value, "a dictionary with name, devices and memory")
    given: Json = {str(key): setting for key, setting in value.items() if setting is not None}
    for key in given:
        if key not in _KEYS:
            raise OptionError(f"{option}.{key}", given[key], f"the keys {', '.join(_KEYS)}", "there is no such key")
    name = _text(option, given, "name", None, _NAME, "a name of letters, digits, dots, underscores and dashes")
    user = _text(option, given, "user", defaults.user, _USER, "the name of an unprivileged user")
    if user == "root":
        raise OptionError(f"{option}.user", user, "the name of an unprivileged user", "QEMU needs no privilege here")
    group = given.get("group", defaults.group)
    if group is not None:
        group = _text(option, given, "group", defaults.group, _USER, "the name of a group")
    kind = guest_machine(defaults.architecture)
    usual = defaults.qemu or f"/usr/bin/qemu-system-{defaults.architecture}"
    qemu = _text(option, given, "qemu", usual, re.compile(r"(/[^/\x00-\x1f]+)+"), "the absolute path of QEMU")
    accelerator = given.get("accelerator", defaults.accelerator)
    if accelerator not in ("kvm", "tcg"):
        raise OptionError(f"{option}.accelerator", accelerator, "kvm, tcg")
    usual = defaults.machine or kind.plain_argument(accelerator)
    machine = _text(option, given, "machine", usual, _MACHINE, f"a machine type of QEMU, such as {kind.machine}")
    cpus = _number(option, given, "cpus", 1, 1, 4096)
    memory = parse_size(f"{option}.memory", given.get("memory"))
    if memory % MIB:
        raise OptionError(f"{option}.memory", given.get("memory"), "a whole number of MiB")
    devices = _devices(option, given.get("devices"))
    passed = arguments(devices, parse_objects("iommufd", None), "iommufd", FIRST_DESCRIPTOR)
    descriptors = list(passed.descriptors)
    words = [qemu, "-name", f"guest={name}", "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX]
    words += ["-machine", machine]
    if accelerator == "kvm" and not kind.passes_kvm:
        words += ["-accel", "kvm"]
    elif accelerator == "kvm":
        # As a descriptor, so that the user needs no membership of the group that owns /dev/kvm.
        number = descriptors[-1].number + 1
        descriptors.append(Descriptor(number, KVM, "kvm"))
        words += ["-add-fd", f"fd={number},set=1", "-accel", "kvm,device=/dev/fdset/1"]
    else:
        words += ["-accel", "tcg"]
    cpu = _text(option, given, "cpu", "host" if accelerator == "kvm" else "max", _MACHINE, "a CPU model of QEMU")
    words += ["-cpu", cpu, "-m", f"{memory // MIB}M", "-smp", str(cpus)]
    monitor = f"/run/{PREFIX}{name}/qmp.sock"
    words += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    words += [*passed.words, *_words(option, given.get("arguments", []))]
    links = [cdev_link(str(device.address)) for device in devices]
    nodes = [IOMMU, *links, *([KVM] if accelerator == "kvm" else [])]
    return {
        "option": option,
        "name": name,
        "unit": f"{PREFIX}{name}.service",
        "runtime_directory": f"{PREFIX}{name}",
        "user": user,
        "group": group,
        # Where QEMU opens /dev/kvm itself: the group that udev's own rules give it to.
        "supplementary_groups": ["kvm"] if accelerator == "kvm" and not kind.passes_kvm else [],
        "enabled": _truth(f"{option}.enabled", given.get("enabled", False)),
        "memory": memory // MIB,
        "addresses": [device.address for device in devices],
        "open_files": [open_file(str(one.path), one.name) for one in descriptors],
        "descriptors": [dataclasses.asdict(one) for one in descriptors],
        "device_allow": [
            f"{node} rw" for node in dict.fromkeys([*nodes, *_nodes(option, given.get("device_allow", []))])
        ],
        "device_units": [device_unit(link) for link in links],
        "arguments": words,
        "exec_start": [quote(word) for word in words],
        "exec_stop": [quote(word) for word in (_PYTHON, "-c", _POWER_BUTTON, monitor)],
        "stop_timeout": _number(option, given, "stop_timeout", 90, 1, 86400),
    }


def _devices(option: str, value: object) -> list[GuestDevice]:
    devices = parse_devices(f"{option}.devices", value)
    for device in devices:
        if device.kind != "vfio-pci":
            raise OptionError(
                f"{device.option}.kind", device.kind, "vfio-pci",
                "only the cdev of a PCI function has a stable name that systemd could open and pass",
            )  # fmt: skip
        if device.backend == "legacy":
            raise OptionError(
                f"{device.option}.backend", device.backend, "iommufd", "only descriptors for iommufd can be passed"
            )
    return devices


def _text(option: str, given: Json, key: str, default: str | None, pattern: re.Pattern[str], accepted: str) -> str:
    value = given.get(key, default)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise OptionError(f"{option}.{key}", value, accepted)
    return value


def _number(option: str, given: Json, key: str, default: int, least: int, most: int) -> int:
    value = given.get(key, default)
    if not str(value).isdecimal() or isinstance(value, bool) or not least <= int(value) <= most:
        raise OptionError(f"{option}.{key}", value, f"a whole number from {least} to {most}")
    return int(value)


def _truth(option: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise OptionError(option, value, "true or false")
    return value


def _words(option: str, value: object) -> list[str]:
    accepted = "a list of texts, each one argument of QEMU"
    if not isinstance(value, (list, tuple)):
        raise OptionError(f"{option}.arguments", value, accepted)
    for index, word in enumerate(value):
        if not isinstance(word, (str, int)) or isinstance(word, bool):
            raise OptionError(f"{option}.arguments[{index}]", word, accepted)
        if re.search(r"[\x00-\x1f\x7f]", str(word)):
            raise OptionError(f"{option}.arguments[{index}]", word, "a text without control characters")
    return [str(word) for word in value]


def _nodes(option: str, value: object) -> list[str]:
    if not isinstance(value, (list, tuple)):
        raise OptionError(f"{option}.device_allow", value, "a list of device nodes or classes, such as /dev/net/tun")
    found = []
    for index, node in enumerate(value):
        where = f"{option}.device_allow[{index}]"
        parse = parse_class if str(node).startswith(("char-", "block-")) else parse_path
        found.append(parse(where, str(node)))
    return found
