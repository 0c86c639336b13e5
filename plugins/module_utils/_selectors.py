# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Selectors: the one language in which users name devices, in modules, roles and filters.

A selector is a string (a PCI address, with globs) or a dictionary whose keys must all match. Selectors work on devices
as ``iommufd_info`` returns them (:func:`view` makes one of what was read from a host), so that a filter on the
controller and a module on the host give the same answer.

A device that is *addressed*, by its address without globs, is meant whatever it is. All other selectors are wide: they
never match bridges, and force does not apply to what they find.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._names import Names
from ansible_collections.iommufd.host.plugins.module_utils._pci import (
    ACCEPTED_ADDRESS,
    Function,
    address_key,
    parse_address,
)

Device = t.Mapping[str, t.Any]

# Evaluates a JMESPath expression: compiled by calling it with the option's name and the expression, then asked of each
# device. Only the controller has one; hosts need no jmespath.
Query = t.Callable[[str, str], t.Callable[[Device], bool]]

# Names for prefixes of the PCI class code, in the words of lspci (pci.ids, section "C").
CLASSES = {
    "storage": "01",
    "scsi": "0100",
    "ide": "0101",
    "raid": "0104",
    "sata": "0106",
    "sas": "0107",
    "nvme": "0108",
    "network": "02",
    "ethernet": "0200",
    "infiniband": "0207",
    "display": "03",
    "gpu": "03",
    "vga": "0300",
    "3d": "0302",
    "multimedia": "04",
    "audio": "0403",
    "memory": "05",
    "cxl": "0502",
    "communication": "07",
    "system": "08",
    "processor": "0b",
    "serial-bus": "0c",
    "firewire": "0c00",
    "usb": "0c03",
    "wireless": "0d",
    "encryption": "10",
    "signal": "11",
    "accelerator": "12",
}
_BRIDGES = "0x06"

ACCEPTED_SELECTOR = (
    "a PCI address such as 0000:02:00.0 or 0000:02:00.*, or a dictionary of selector keys (address, id, vendor_id, "
    "device_id, subsystem_id, subsystem_vendor_id, subsystem_device_id, class, class_id, driver, numa_node, "
    "iommu_group, nic, mac, disk, serial, vfs_of with vf, query, excluded)"
)
_QUOTES = "YAML read it as a number; put it in quotes"
# Longest glob that makes sense; also bounds the work of matching.
_LONGEST = 128
_NEAREST = 3


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One key of a selector.

    Attributes:
        words: key and value for people ("class nvme").
        matches: whether a device has it.
        nearness: how much a device that has it not is like one that has, from 0 (not at all) to 1; for messages.
        bearer: for a name that the host gives and may give again (nic, disk): whether a device has it now, not only in
            memory, and the MAC or serial number that it has it with. None for any other key, and for globs.
    """

    words: str
    matches: t.Callable[[Device], bool]
    nearness: t.Callable[[Device], float]
    bearer: t.Callable[[Device], tuple[bool, str | None]] | None = None


@dataclasses.dataclass(frozen=True)
class VirtualFunctions:
    """The keys vfs_of and vf.

    Attributes:
        parents: selects the physical functions.
        numbers: of the VFs wanted; None for all.
    """

    parents: Selector
    numbers: frozenset[int] | None = None


@dataclasses.dataclass(frozen=True)
class Selector:
    """A selector that was understood.

    Attributes:
        option: where it stands ("devices[1]").
        value: as it was written.
        criteria: all must match.
        virtual: its vfs_of, which must match as well.
        excluded: whether its devices are taken out of the result.
        address: of a selector that addresses one device.
        by_name: whether it uses what a device loses with the host's driver (driver, nic, mac, disk, serial, query).
    """

    option: str
    value: t.Any
    criteria: tuple[Criterion, ...]
    virtual: VirtualFunctions | None = None
    excluded: bool = False
    address: str | None = None
    by_name: bool = False


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A device that selectors found.

    Attributes:
        device: as it was given.
        reason: which selector found it first, in words.
        addressed: whether one of them gives its address without globs.
    """

    device: Device
    reason: str
    addressed: bool

    @property
    def address(self) -> str:
        return str(self.device["address"])


@dataclasses.dataclass
class Choice:
    """The result of a list of selectors.

    Attributes:
        chosen: each device once, in the order of selectors, those of one selector in the order of addresses.
        excluded: addresses that were taken out, or would have been.
        missing: sentences about devices that are not there yet or any more, where that is allowed.
    """

    chosen: list[Chosen]
    excluded: set[str]
    missing: list[str]


# -- devices -------------------------------------------------------------------------------------------------------


def view(function: Function, names: Names | None, remembered: Names | None) -> dict[str, t.Any]:
    """A device as selectors see it and ``iommufd_info`` returns it, without ``in_use`` and ``vfio_drivers``.

    Args:
        function: as read from the host.
        names: what the host calls it now.
        remembered: what the host called it before it was given away.
    """
    device = function.to_dict()
    named = (names or Names()).to_dict()
    device["interfaces"], device["disks"] = named["interfaces"], named["disks"]
    device["remembered"] = remembered.to_dict() if remembered is not None else None
    return device


def describe(device: Device) -> str:
    """A device in a few words for a message ("0000:03:00.1 (ethernet, 8086:1521, igb, ens3f1)")."""
    words = [class_name(device) or "class unknown"]
    vendor, model = device.get("vendor_id"), device.get("device_id")
    if vendor and model:
        words.append(f"{vendor[2:]}:{model[2:]}")
    if device.get("driver"):
        words.append(str(device["driver"]))
    words += sorted(_names(device, "interfaces", "name") | _names(device, "disks", "name"))
    return f"{device['address']} ({', '.join(words)})"


def class_name(device: Device) -> str | None:
    """The most specific name for a device's class, else its number; None where it is unknown."""
    code = str(device.get("class_id") or "")[2:]
    named = [(len(prefix), name) for name, prefix in CLASSES.items() if code and code.startswith(prefix)]
    if named:
        longest = max(length for length, _name in named)
        return next(name for length, name in named if length == longest)
    if code.startswith(_BRIDGES[2:]):
        return "bridge"
    return f"class {code}" if code else None


def _is_bridge(device: Device) -> bool:
    return str(device.get("class_id") or "").startswith(_BRIDGES)


def _names(device: Device, key: str, part: str) -> set[str]:
    """Names, MACs or serial numbers of a device's interfaces or disks, remembered ones included."""
    found = list(device.get(key) or ())
    if device.get("remembered"):
        found += device["remembered"].get(key) or ()
    return {str(one[part]) for one in found if one.get(part)}


# -- reading selectors ---------------------------------------------------------------------------------------------


def parse_selectors(option: str, value: object, query: Query | None = None) -> list[Selector]:
    """The selectors in an option's value, a list or a single selector.

    Args:
        option: the option's name, for messages.
        value: what the user wrote.
        query: what evaluates the key query; None on a host, where only the controller's answer is taken.

    Raises:
        OptionError: one is malformed; names it ("devices[2].class"), its value, and what is accepted.
    """
    if isinstance(value, (list, tuple)):
        return [_parse(f"{option}[{number}]", one, query) for number, one in enumerate(value)]
    return [_parse(option, value, query)]


def _parse(option: str, value: object, query: Query | None) -> Selector:
    if isinstance(value, dict):
        return _parse_dict(option, value, query)
    if isinstance(value, str):
        criterion, address = _address(option, value)
        return Selector(option, value, (criterion,), address=address)
    raise OptionError(option, value, ACCEPTED_SELECTOR, _QUOTES if _is_number(value) else "")


def _parse_dict(option: str, value: dict[t.Any, t.Any], query: Query | None) -> Selector:
    unknown = [str(key) for key in value if not isinstance(key, str) or key not in _KEYS]
    if unknown:
        close = difflib.get_close_matches(unknown[0], _KEYS, 1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise OptionError(option, value, ACCEPTED_SELECTOR, f"{unknown[0]!r} is no key of a selector{hint}")
    excluded = value.get("excluded", False)
    if not isinstance(excluded, bool):
        raise OptionError(f"{option}.excluded", excluded, "true or false")
    if "vf" in value and "vfs_of" not in value:
        raise OptionError(f"{option}.vf", value["vf"], "numbers of VFs beside vfs_of, which names their PF")
    if not set(value) - {"excluded"}:
        raise OptionError(option, value, ACCEPTED_SELECTOR, "it has no key that selects anything")
    criteria: list[Criterion] = []
    address = None
    virtual = None
    for key, given in value.items():
        where = f"{option}.{key}"
        if key == "address":
            criterion, address = _address(where, given)
            criteria.append(criterion)
        elif key == "query":
            criteria.append(_query(where, given, query))
        elif key == "vfs_of":
            numbers = _numbers(f"{option}.vf", value["vf"]) if "vf" in value else None
            virtual = VirtualFunctions(_parents(where, given), numbers)
        elif key in _SIMPLE:
            criteria.append(_SIMPLE[key](where, key, given))
    if isinstance(value.get("query"), dict):  # as it was written, for messages
        value = {**value, "query": value["query"]["expression"]}
    by_name = not set(value).isdisjoint(_BY_NAME)
    return Selector(option, value, tuple(criteria), virtual, excluded, address, by_name)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(option: str, value: object, accepted: str) -> str:
    """A value that must be text.

    Raises:
        OptionError: it is not. YAML makes numbers of 0x10de, of 0302 and even of 03:00.0.
    """
    if not isinstance(value, str) or not value.strip():
        raise OptionError(option, value, accepted, _QUOTES if _is_number(value) else "")
    if len(value) > _LONGEST:
        raise OptionError(option, value[:40] + "…", accepted, f"it is longer than {_LONGEST} characters")
    return value.strip()


_GLOB = re.compile(r"[*?\[]")


def _matcher(option: str, pattern: str) -> t.Callable[[str], bool]:
    """Whether a text is the pattern, or matches it where it is a glob.

    Raises:
        OptionError: the glob is malformed (a range that runs backwards).
    """
    if not _GLOB.search(pattern):
        return lambda text: text == pattern
    try:
        compiled = re.compile(fnmatch.translate(pattern))
    except re.error as error:  # before Python 3.11, of a range that runs backwards
        raise OptionError(option, pattern, "a glob with *, ? and ranges such as [0-3]", str(error)) from None
    return lambda text: compiled.match(text) is not None


def _address(option: str, value: object) -> tuple[Criterion, str | None]:
    """The criterion of an address; and the address itself where it holds no globs."""
    accepted = f"{ACCEPTED_ADDRESS}, or one with globs such as 0000:02:00.*"
    text = _text(option, value, accepted).lower()
    if not _GLOB.search(text):
        try:
            address = parse_address(option, text)
        except OptionError:
            raise OptionError(option, value, accepted) from None
        return Criterion(address, lambda device: device["address"] == address, _near_address(address)), address
    if not re.fullmatch(r"[0-9a-f:.*?\[\]!-]+", text):
        raise OptionError(option, value, accepted)
    # "03:00.*" and "03:*" lack the domain; "0000:*" and "*" do not.
    first, colon, rest = text.partition(":")
    if colon and ":" not in rest and not re.fullmatch(r"[0-9a-f]{4,8}", first):
        text = f"0000:{text}"
    matches = _matcher(option, text)
    plain = re.sub(r"[*?\[\]!-]", "", text)
    return Criterion(text, lambda device: matches(device["address"]), _near_address(plain)), None


def _near_address(address: str) -> t.Callable[[Device], float]:
    bus = address[: address.rfind(":") + 1] or address

    def near(device: Device) -> float:
        likeness = difflib.SequenceMatcher(None, address, device["address"]).ratio()
        return 0.6 + 0.4 * likeness if device["address"].startswith(bus) else 0.6 * likeness

    return near


def _hex(option: str, value: object, accepted: str) -> str:
    match = re.fullmatch(r"(?:0x)?([0-9a-f]{1,4})", _text(option, value, accepted).lower())
    if match is None:
        raise OptionError(option, value, accepted)
    return f"0x{int(match[1], 16):04x}"


def _number_of_kind(option: str, key: str, value: object) -> Criterion:
    number = _hex(option, value, 'a hexadecimal number in quotes, such as "10de" or "0x10de"')
    near = _near_text(number[2:], lambda device: {str(device.get(key) or "")[2:]})
    return Criterion(f"{key} {number}", lambda device: device.get(key) == number, near)


def _kind(option: str, key: str, value: object) -> Criterion:
    """vendor:device, as `lspci -n` prints it, or with an asterisk for all devices of a vendor."""
    accepted = 'vendor and device in hexadecimal, such as "10de:2236"'
    vendor, colon, model = _text(option, value, accepted).partition(":")
    if not colon:
        raise OptionError(option, value, accepted)
    try:
        vendor = _hex(option, vendor, accepted)
        model = "*" if model.strip() == "*" else _hex(option, model, accepted)
    except OptionError:
        raise OptionError(option, value, accepted) from None
    prefix = "" if key == "id" else "subsystem_"

    def matches(device: Device) -> bool:
        found = device.get(f"{prefix}device_id")
        return device.get(f"{prefix}vendor_id") == vendor and (found == model or (model == "*" and found is not None))

    def near(device: Device) -> float:
        same = device.get(f"{prefix}vendor_id") == vendor
        likeness = difflib.SequenceMatcher(None, model, str(device.get(f"{prefix}device_id") or "")).ratio()
        return 0.6 + 0.3 * likeness if same else 0.0

    return Criterion(f"{key} {vendor[2:]}:{model.replace('0x', '')}", matches, near)


def _class(option: str, key: str, value: object) -> Criterion:
    names = ", ".join(CLASSES)
    accepted = f"one of {names}; a class code goes into class_id"
    name = _text(option, value, accepted).lower()
    if name not in CLASSES:
        raise OptionError(option, value, accepted)
    return _class_criterion(f"class {name}", CLASSES[name])


def _class_id(option: str, key: str, value: object) -> Criterion:
    accepted = 'the first 2, 4 or all 6 hexadecimal digits of a class code in quotes, such as "0302" or "0x030200"'
    match = re.fullmatch(r"(?:0x)?((?:[0-9a-f]{2}){1,3})", _text(option, value, accepted).lower())
    if match is None:
        raise OptionError(option, value, accepted)
    return _class_criterion(f"class_id {match[1]}", match[1])


def _class_criterion(words: str, prefix: str) -> Criterion:
    def near(device: Device) -> float:
        return 0.5 if str(device.get("class_id") or "").startswith(f"0x{prefix[:2]}") else 0.0

    return Criterion(words, lambda device: str(device.get("class_id") or "").startswith(f"0x{prefix}"), near)


def _driver(option: str, key: str, value: object) -> Criterion:
    name = _text(option, value, "the name of a driver, such as nvme")
    plain = name.replace("-", "_")

    def drivers(device: Device) -> set[str]:
        found = [device.get("driver"), (device.get("remembered") or {}).get("driver")]
        return {str(one).replace("-", "_") for one in found if one}

    return Criterion(f"driver {name}", lambda device: plain in drivers(device), _near_text(plain, drivers))


def _count(option: str, key: str, value: object) -> Criterion:
    number = value
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value) and value.isascii():
        number = int(value)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise OptionError(option, value, "a number from 0")

    def near(device: Device) -> float:
        has = device.get(key)
        return 1 / (2 + abs(has - number)) if isinstance(has, int) else 0.0

    return Criterion(f"{key} {number}", lambda device: device.get(key) == number, near)


def _named(option: str, key: str, value: object) -> Criterion:
    """nic and disk: names that the host gives."""
    listing, constant, accepted = {
        "nic": ("interfaces", "mac", "the name of a network interface, such as ens3f0 or ens3f*"),
        "disk": ("disks", "serial", "the name of a disk, such as nvme0n1 or nvme*"),
    }[key]
    name = _text(option, value, accepted)
    if key == "disk" and name.startswith("/dev/"):
        name = name[len("/dev/") :]
    matches = _matcher(option, name)
    fixed = not _GLOB.search(name)

    def found(device: Device) -> set[str]:
        return _names(device, listing, "name")

    def bearer(device: Device) -> tuple[bool, str | None]:
        now = [one for one in device.get(listing) or () if one.get("name") == name]
        before = [one for one in (device.get("remembered") or {}).get(listing) or () if one.get("name") == name]
        return bool(now), (now or before)[0].get(constant)

    return Criterion(
        f"{key} {name}",
        lambda device: any(map(matches, found(device))),
        _near_text(name, found),
        bearer if fixed else None,
    )


def _mac(option: str, key: str, value: object) -> Criterion:
    accepted = 'a MAC address in quotes, such as "52:54:00:12:34:56"'
    mac = _text(option, value, accepted).lower().replace("-", ":")
    if not re.fullmatch(r"([0-9a-f]{2}:){5,31}[0-9a-f]{2}", mac):
        raise OptionError(option, value, accepted)

    def found(device: Device) -> set[str]:
        return _names(device, "interfaces", "mac")

    return Criterion(f"mac {mac}", lambda device: mac in found(device), _near_text(mac, found))


def _serial(option: str, key: str, value: object) -> Criterion:
    serial = _text(option, value, "the serial number of a disk, in quotes")

    def found(device: Device) -> set[str]:
        return _names(device, "disks", "serial")

    return Criterion(f"serial {serial}", lambda device: serial in found(device), _near_text(serial, found))


def _near_text(text: str, names: t.Callable[[Device], set[str]]) -> t.Callable[[Device], float]:
    def near(device: Device) -> float:
        likeness = [difflib.SequenceMatcher(None, text, name).ratio() for name in names(device)]
        return max(likeness, default=0.0)

    return near


def _query(option: str, value: object, query: Query | None) -> Criterion:
    if query is None:
        # The controller has asked its own survey, see plugin_utils/_query.py.
        if isinstance(value, dict) and set(value) == {"expression", "addresses"}:
            expression, addresses = value["expression"], value["addresses"]
            if isinstance(expression, str) and isinstance(addresses, list):
                known = {str(one) for one in addresses}
                return Criterion(f"query {expression}", lambda device: device["address"] in known, lambda device: 0.0)
        raise OptionError(
            option, value, "a JMESPath expression in a task; on the host itself nothing evaluates one, name addresses"
        )
    accepted = "a JMESPath expression about one device, such as class_id == '0x010802' && numa_node == `0`"
    if not isinstance(value, str) or not value.strip():
        raise OptionError(option, value, accepted)
    return Criterion(f"query {value.strip()}", query(option, value), lambda device: 0.0)


def _parents(option: str, value: object) -> Selector:
    accepted = "a PF: its address, its interface, or a dictionary of selector keys without vfs_of, query and excluded"
    if isinstance(value, dict):
        extra = set(value) & {"vfs_of", "vf", "query", "excluded"}
        if extra:
            raise OptionError(option, value, accepted)
        return _parse_dict(option, value, None)
    text = _text(option, value, accepted)
    # The kernel lets no interface have a colon in its name (dev_valid_name in net/core/dev.c).
    if ":" in text:
        return _parse(option, text, None)
    return dataclasses.replace(_parse_dict(option, {"nic": text}, None), value=value)


def _numbers(option: str, value: object) -> frozenset[int]:
    """Numbers of VFs: 3, "0-3,6", or a list of such."""
    accepted = 'numbers of VFs from 0, such as 3, "0-3" or [0, 2, "4-6"]'
    found: set[int] = set()
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= 0xFFFF:
            found.add(one)
            continue
        for part in one.split(",") if isinstance(one, str) else [""]:
            match = re.fullmatch(r"\s*([0-9]{1,5})(?:\s*-\s*([0-9]{1,5}))?\s*", part, re.ASCII)
            first, last = (int(match[1]), int(match[2] or match[1])) if match is not None else (1, 0)
            if not first <= last <= 0xFFFF:
                raise OptionError(option, value, accepted)
            found.update(range(first, last + 1))
    if not found:
        raise OptionError(option, value, accepted)
    return frozenset(found)


_SIMPLE: dict[str, t.Callable[[str, str, object], Criterion]] = {
    "id": _kind,
    "vendor_id": _number_of_kind,
    "device_id": _number_of_kind,
    "subsystem_id": _kind,
    "subsystem_vendor_id": _number_of_kind,
    "subsystem_device_id": _number_of_kind,
    "class": _class,
    "class_id": _class_id,
    "driver": _driver,
    "numa_node": _count,
    "iommu_group": _count,
    "nic": _named,
    "mac": _mac,
    "disk": _named,
    "serial": _serial,
}
_KEYS = ("address", *_SIMPLE, "vfs_of", "vf", "query", "excluded")
_BY_NAME = ("driver", "nic", "mac", "disk", "serial", "query")


# -- finding devices -----------------------------------------------------------------------------------------------


def choose(
    selectors: t.Sequence[Selector], devices: t.Sequence[Device], pending: bool = False, lenient: bool = False
) -> Choice:
    """The devices that selectors mean.

    Args:
        selectors: as :func:`parse_selectors` returns them; those marked as excluded apply to the others' result,
            wherever they stand.
        devices: all devices of the host.
        pending: VFs of vfs_of may be about to be created.
        lenient: a selector that describes devices may match none (they are to be given back, and are not there).

    Raises:
        OptionError: a selector matches nothing, with the nearest devices; or a name means two devices.
    """
    ordered = sorted(devices, key=lambda device: address_key(device["address"]))
    found: dict[str, Chosen] = {}
    excluded: set[str] = set()
    missing: list[str] = []
    if selectors and all(selector.excluded for selector in selectors):
        raise OptionError(selectors[0].option, selectors[0].value, "beside it, a selector without excluded")
    for selector in selectors:
        matched = _find(selector, ordered, pending, lenient, missing)
        if selector.excluded:
            excluded.update(device["address"] for device in matched)
            continue
        for device in matched:
            before = found.get(device["address"])
            addressed = selector.address is not None or (before is not None and before.addressed)
            reason = before.reason if before is not None else _reason(selector, device)
            found[device["address"]] = Chosen(device, reason, addressed)
    return Choice([one for address, one in found.items() if address not in excluded], excluded, missing)


def _find(
    selector: Selector, devices: t.Sequence[Device], pending: bool, lenient: bool, missing: list[str]
) -> list[Device]:
    candidates = [device for device in devices if selector.address is not None or not _is_bridge(device)]
    if selector.virtual is not None:
        candidates = _virtual(selector, selector.virtual, devices, pending or lenient, missing)
        if not candidates and (pending or lenient):
            return []
    matched = [device for device in candidates if all(one.matches(device) for one in selector.criteria)]
    if matched:
        for criterion in selector.criteria:
            _refuse_ambiguous(selector, criterion, matched)
        return matched
    # What means one very device has a typo; what describes devices may well describe none that is left.
    very = selector.address is not None or any(one.bearer is not None for one in selector.criteria)
    if lenient and not very:
        return []
    raise _nothing(selector, devices, candidates)


def _refuse_ambiguous(selector: Selector, criterion: Criterion, matched: t.Sequence[Device]) -> None:
    """A name that was a given-away device's, and that the host has given to another one since.

    The kernel numbers disks and some interfaces as they come: once the first is gone, the next boot calls the second
    by its name. Whoever runs the same play again means the first, and must not lose the second. One disk behind two
    functions (a dual-ported NVMe disk) is no such case.
    """
    if criterion.bearer is None or len(matched) < 2:
        return
    bearers = [(device, *criterion.bearer(device)) for device in matched]
    constants = {constant for _device, _now, constant in bearers}
    before = [device for device, now, _constant in bearers if not now]
    if before and (len(constants) > 1 or None in constants):
        other = next((device for device, now, _constant in bearers if now), before[-1])
        raise OptionError(
            selector.option,
            selector.value,
            "what does not change, such as an address, a mac or a serial",
            f"{criterion.words} was {describe(before[0])}, which is given away, and then {describe(other)}",
        )


def _virtual(
    selector: Selector, virtual: VirtualFunctions, devices: t.Sequence[Device], may_lack: bool, missing: list[str]
) -> list[Device]:
    """The VFs of vfs_of, in the order of addresses."""
    where = virtual.parents
    known = {device["address"]: device for device in devices}
    capable = [device for device in devices if (device.get("sriov") or {}).get("total_vfs") is not None]
    parents = [one for one in _find(where, devices, False, False, missing) if one in capable]
    if not parents:
        listed = ", ".join(describe(one) for one in capable[:_NEAREST]) or "none, no device here has SR-IOV"
        raise OptionError(
            where.option, where.value, f"a physical function; here: {listed}", "it names no device with SR-IOV"
        )
    found = []
    for parent in parents:
        own = parent["sriov"]
        numbered = {number: known[vf] for number, vf in enumerate(own.get("vfs") or ()) if vf in known}
        # A VF that is gone is known by what is remembered of it.
        for device in devices:
            number = device.get("vf")
            if number is not None and device["sriov"]["physfn"] == parent["address"]:
                numbered.setdefault(number, device)
        wanted = sorted(numbered if virtual.numbers is None else virtual.numbers)
        lacking = [number for number in wanted if number not in numbered]
        found += [numbered[number] for number in wanted if number in numbered]
        if not lacking and wanted:
            continue
        has = f"{parent['address']} has {len(numbered) or 'no'} virtual functions now and can have {own['total_vfs']}"
        if may_lack:
            missing.append(f"{selector.option}: {has}; those that are not there are left out.")
        else:
            numbers = f", not all of numbers {', '.join(map(str, lacking[:8]))}" if lacking and numbered else ""
            raise OptionError(selector.option, selector.value, "VFs that are there; create them first", has + numbers)
    return sorted(found, key=lambda device: address_key(device["address"]))


def _reason(selector: Selector, device: Device) -> str:
    if selector.address is not None:
        return f"named by {selector.option}"
    parent = (device.get("sriov") or {}).get("physfn")
    words = [one.words for one in selector.criteria]
    if selector.virtual is not None:
        words.insert(0, f"a VF of {parent}")
    return f"{', '.join(words)}, {selector.option}"


def _nothing(selector: Selector, devices: t.Sequence[Device], candidates: t.Sequence[Device]) -> OptionError:
    """The error for a selector that matches nothing, with the devices that come nearest."""
    if selector.address is not None and not any(device["address"] == selector.address for device in devices):
        why = "there is no such device"
    elif len(selector.criteria) > 1 or selector.virtual is not None:
        counts = ", ".join(f"{one.words}: {sum(map(one.matches, candidates))}" for one in selector.criteria)
        of = "VFs" if selector.virtual is not None else "devices"
        why = f"none of the {len(candidates)} {of} has all of it ({counts})"
    elif any(all(one.matches(device) for one in selector.criteria) for device in devices):
        why = "it matches nothing but bridges, which stay with the host"
    else:
        why = f"it matches none of the {len(candidates)} devices"

    def score(device: Device) -> float:
        return sum(1.0 if one.matches(device) else one.nearness(device) for one in selector.criteria)

    ranked = sorted(candidates, key=lambda device: (-score(device), address_key(device["address"])))
    nearest = "; ".join(describe(device) for device in ranked[:_NEAREST] if score(device) > 0)
    hint = f"the nearest: {nearest}" if nearest else "none is like it" if devices else "it has no PCI devices"
    return OptionError(selector.option, selector.value, f"what names devices of this host; {hint}", why)
