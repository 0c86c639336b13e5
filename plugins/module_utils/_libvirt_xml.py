# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Host devices in libvirt's domain XML: written anew, or moved to iommufd in a domain that is there.

A domain is changed in its text, at the places that the parser names: a few bytes are put in, and every other byte, with
comments, indentation, quotes and what we know nothing of, stays as it is.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t
from xml.parsers import expat

from ansible_collections.iommufd.host.plugins.module_utils._backend import Decision, Facts, decide
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import (
    BACKENDS,
    S390_KINDS,
    GuestDevice,
    parse_devices,
)
from ansible_collections.iommufd.host.plugins.module_utils._pci import parse_address

Json = dict[str, t.Any]

#: Where a domain can say it: in the driver of each device, or once for all of its devices.
SCOPES = {"device": (12, 1), "domain": (12, 2)}

_MODELS = {"mdev": "vfio-pci", "vfio-ccw": "vfio-ccw", "vfio-ap": "vfio-ap"}


def version_numbers(option: str, version: object) -> tuple[int, int]:
    """Major and minor of libvirt's version ("12.8.0", also with a distribution's suffix).

    Raises:
        OptionError: it is none.
    """
    match = re.match(r"(?:\d+:)?(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if match is None:
        raise OptionError(option, version, 'the version of libvirt, such as "12.8.0" (`virsh version`)')
    return int(match[1]), int(match[2])


# -- new elements ------------------------------------------------------------------------------------------------------


def hostdevs(
    devices: t.Sequence[GuestDevice],
    version: object,
    backend: str = "iommufd",
    scope: str = "device",
    rom: bool = True,
) -> list[str]:
    """A ``<hostdev>`` for each device.

    Args:
        devices: each may say its ``backend`` and ``guest_address``.
        version: of libvirt; only needed where a device is on iommufd.
        backend: of the devices that do not say it. Mediated devices have none in libvirt's XML.
        scope: "device", or "domain": the domain has ``<iommufd enabled='yes'/>``, so only devices that are not on
            iommufd have to say something.
        rom: whether the guest's firmware sees the devices' option ROMs.

    Raises:
        OptionError: something that this libvirt does not have.
    """
    if backend not in BACKENDS:
        raise OptionError("backend", backend, ", ".join(BACKENDS), "auto is decided before, by the filter vfio_backend")
    _check_scope(scope)
    chosen = [device.backend or (backend if device.kind == "vfio-pci" else "legacy") for device in devices]
    for device, one in zip(devices, chosen):
        if one == "iommufd" and device.kind != "vfio-pci":
            raise OptionError(
                f"{device.option}.backend", one, "legacy", f"libvirt's XML has no iommufd for {device.kind} devices"
            )
    if "iommufd" in chosen or (scope == "domain" and devices):
        _check_version("version", version, scope)
    slots = _guest_slots(devices)
    return [_hostdev(device, one, scope, slots, rom) for device, one in zip(devices, chosen)]


def _check_scope(scope: str) -> None:
    if scope not in SCOPES:
        raise OptionError("scope", scope, ", ".join(SCOPES))


def _check_version(option: str, version: object, scope: str) -> None:
    if version_numbers(option, version) < SCOPES[scope]:
        since = "{}.{}".format(*SCOPES[scope])
        also = "; 12.1 has it for each device (scope device)" if scope == "domain" else ""
        what = {"device": "for single devices", "domain": "for a whole domain"}[scope]
        raise OptionError(
            option, version, f"libvirt {since} or later, or backend: legacy", f"it has no iommufd {what}{also}"
        )


def _guest_slots(devices: t.Sequence[GuestDevice]) -> dict[str, list[str]]:
    """Guest slot ("0000:05:00") to the options of the devices that are in it."""
    slots: dict[str, list[str]] = {}
    taken: dict[str, str] = {}
    for device in devices:
        given = device.given.get("guest_address")
        if given is None:
            continue
        option = f"{device.option}.guest_address"
        if device.kind in S390_KINDS:
            raise OptionError(option, given, f"nothing for a {device.kind} device, which is no PCI device")
        address = parse_address(option, given)
        if address in taken:
            raise OptionError(option, given, "an address that nothing else has", f"{taken[address]} has it")
        taken[address] = device.option
        slots.setdefault(address[:-2], []).append(device.option)
    return slots


def _hostdev(device: GuestDevice, backend: str, scope: str, slots: t.Mapping[str, t.Sequence[str]], rom: bool) -> str:
    if device.kind == "vfio-pci":
        said = {("iommufd", "device"): " iommufd='yes'", ("legacy", "domain"): " iommufd='no'"}.get(
            (backend, scope), ""
        )
        lines = [
            "<hostdev mode='subsystem' type='pci' managed='no'>",
            f"  <driver name='vfio'{said}/>",
            "  <source>",
            f"    <address {_pci_attributes(str(device.address))}/>",
            "  </source>",
            *([] if rom else ["  <rom enabled='no'/>"]),
        ]
    else:
        if device.uuid is None:
            raise OptionError(f"{device.option}.sysfsdev", device.sysfsdev, "a device with a UUID, which libvirt takes")
        lines = [
            f"<hostdev mode='subsystem' type='mdev' managed='no' model='{_MODELS[device.kind]}'>",
            "  <source>",
            f"    <address uuid='{device.uuid}'/>",
            "  </source>",
        ]
    if device.given.get("guest_address") is not None:
        address = parse_address(f"{device.option}.guest_address", device.given["guest_address"])
        several = address.endswith(".0") and len(slots[address[:-2]]) > 1
        more = " multifunction='on'" if several else ""
        lines.append(f"  <address type='pci' {_pci_attributes(address)}{more}/>")
    return "\n".join([*lines, "</hostdev>"])


def _pci_attributes(address: str) -> str:
    domain, bus, rest = address.split(":")
    slot, function = rest.split(".")
    return f"domain='0x{domain}' bus='0x{bus}' slot='0x{slot}' function='0x{function}'"


# -- the text of a domain ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Element:
    """An element and its places in the text, in bytes.

    Attributes:
        start, after: of its start tag ("<" and behind ">").
        empty: it is "<name/>".
        path: names from the root to here.
    """

    name: str
    attributes: dict[str, str]
    start: int
    after: int
    empty: bool
    path: tuple[str, ...]
    children: list[Element] = dataclasses.field(default_factory=list)

    def child(self, name: str) -> Element | None:
        return next((one for one in self.children if one.name == name), None)


def parse_domain(option: str, text: object) -> tuple[bytes, Element]:
    """The bytes of a domain's XML and its elements.

    Raises:
        OptionError: no well-formed XML, none of a domain, or one with a document type, which libvirt never writes.
    """
    accepted = "the XML of a domain, as `virsh dumpxml --inactive` prints it"
    if not isinstance(text, str):
        raise OptionError(option, text, accepted)
    data = text.encode()
    parser = expat.ParserCreate("utf-8")
    root: list[Element] = []
    stack: list[Element] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        begin = parser.CurrentByteIndex
        after = _tag_end(data, begin)
        path = (*(stack[-1].path if stack else ()), name)
        element = Element(name, attributes, begin, after, data[after - 2 : after - 1] == b"/", path)
        (stack[-1].children if stack else root).append(element)
        stack.append(element)

    def doctype(*_words: object) -> None:
        raise OptionError(option, _excerpt(text), accepted, "it has a document type")

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _name: stack.pop()
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise OptionError(option, _excerpt(text), accepted, str(error)) from None
    if root[0].name != "domain":
        raise OptionError(option, _excerpt(text), accepted, f"the outermost element is {root[0].name}")
    return data, root[0]


def _excerpt(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tag_end(data: bytes, start: int) -> int:
    """The place behind the ">" of the start tag that begins there; one in an attribute's value does not end it."""
    match = re.compile(rb"<[^\s/>\"']+(?:\"[^\"]*\"|'[^']*'|[^>\"'])*>").match(data, start)
    if match is None:
        raise AssertionError(f"no tag at byte {start}")
    return match.end()


@dataclasses.dataclass(frozen=True)
class Splice:
    """Bytes from ``start`` to ``end`` to be replaced."""

    start: int
    end: int
    text: bytes


def splice(data: bytes, edits: t.Sequence[Splice]) -> bytes:
    """The text with all edits done; what no edit names stays byte for byte."""
    parts, at = [], 0
    for edit in sorted(edits, key=lambda one: one.start):
        parts += [data[at : edit.start], edit.text]
        at = edit.end
    return b"".join([*parts, data[at:]])


def set_attribute(data: bytes, element: Element, name: str, value: str) -> Splice:
    """Give an element's start tag an attribute, or that another value."""
    tag = data[element.start : element.after]
    match = re.search(rb"(\s%s\s*=\s*)(\"[^\"]*\"|'[^']*')" % name.encode(), tag)
    if match is not None and name in element.attributes:
        quote = match[2][:1]
        start = element.start + match.start(2)
        return Splice(start, start + len(match[2]), quote + value.encode() + quote)
    quotes = re.findall(rb"=\s*([\"'])", tag)
    quote = quotes[-1] if quotes else b"'"
    # Behind the last attribute: what stands before the end of the tag stays there.
    end = element.start + len(tag[: -2 if element.empty else -1].rstrip())
    return Splice(end, end, b" " + name.encode() + b"=" + quote + value.encode() + quote)


def insert_before(data: bytes, element: Element, text: str) -> Splice:
    """Put an element before another one, in the same indentation."""
    white = re.search(rb"\n[ \t]*\Z", data[: element.start])
    return Splice(element.start, element.start, text.encode() + (white[0] if white is not None else b""))


# -- moving a domain ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class HostDevice:
    """A host device of a domain.

    Attributes:
        element: its ``<hostdev>`` or ``<interface>``.
        device: what it is.
        now: the backend that it has now.
        problem: why it cannot be moved, whatever the policy says.
    """

    element: Element
    device: GuestDevice
    now: str
    problem: str = ""

    @property
    def driver(self) -> Element | None:
        return self.element.child("driver")


def host_devices(root: Element, backends: t.Mapping[str, str]) -> list[HostDevice]:
    """The host devices of a domain that vfio drives.

    Args:
        root: the domain.
        backends: what is asked for single devices, by name.

    Raises:
        OptionError: a device without the address that it needs, or one named in ``backends`` that is not there.
    """
    switch = root.child("iommufd")
    everywhere = switch is not None and switch.attributes.get("enabled") == "yes"
    found: list[HostDevice] = []
    for element in (one for devices in root.children if devices.name == "devices" for one in devices.children):
        entry = _entry(element, f"domain.devices[{len(found)}]")
        if entry is None:
            continue
        device = parse_devices("domain.devices", [entry])[0]
        driver = element.child("driver")
        attributes = driver.attributes if driver is not None else {}
        said = attributes.get("iommufd")
        on_iommufd = device.kind == "vfio-pci" and (said == "yes" or (said is None and everywhere))
        asked = backends.get(device.name) or ("legacy" if said == "no" else None)
        one = HostDevice(element, dataclasses.replace(device, backend=asked), "iommufd" if on_iommufd else "legacy")
        if attributes.get("name", "vfio") != "vfio":
            one.problem = f"its driver is {attributes['name']}, not vfio"
            one.device = dataclasses.replace(one.device, backend="legacy")
        found.append(one)
    names = [one.device.name for one in found]
    for name, backend in backends.items():
        if name not in names:
            raise OptionError("backends", name, f"a device of the domain ({', '.join(names) or 'it has none'})")
        if backend not in BACKENDS:
            raise OptionError(f"backends[{name}]", backend, ", ".join(BACKENDS))
    return [
        dataclasses.replace(one, device=dataclasses.replace(one.device, option=f"domain.devices[{index}]"))
        for index, one in enumerate(found)
    ]


def _entry(element: Element, option: str) -> Json | None:
    """A device as :func:`parse_devices` takes it; None for what is no device of vfio."""
    attributes = element.attributes
    is_hostdev = element.name == "hostdev" and attributes.get("mode", "subsystem") == "subsystem"
    kind = attributes.get("type")
    pci = (is_hostdev and kind == "pci") or (element.name == "interface" and kind == "hostdev")
    if not pci and not (is_hostdev and kind == "mdev"):
        return None
    source = element.child("source")
    address = source.child("address") if source is not None else None
    where = address.attributes if address is not None else {}
    if pci:
        if where.get("type", "pci") != "pci":
            return None  # an interface on a USB device
        try:
            numbers = [int(where.get(key, "0"), 0) for key in ("domain", "bus", "slot", "function")]
        except ValueError:
            numbers = [-1]
        if address is None or min(numbers) < 0 or numbers[1] > 255 or numbers[2] > 31 or numbers[3] > 7:
            raise OptionError(option, where, f"a <source> with the PCI address in the <{element.name}>")
        return {"address": "{:04x}:{:02x}:{:02x}.{:x}".format(*numbers)}
    models = {model: one for one, model in _MODELS.items()}
    model = attributes.get("model", "")
    if "uuid" not in where or model not in models:
        raise OptionError(option, where or attributes, "a model and a <source> with the UUID of the mediated device")
    return {"uuid": where["uuid"], "kind": models[model]}


def convert(
    option: str,
    text: object,
    facts: Facts,
    request: str = "auto",
    backends: t.Mapping[str, str] | None = None,
    scope: str = "device",
    hot_plug: bool = False,
) -> Json:
    """The same domain with its devices on iommufd, or why not.

    Args:
        option: name of the XML, for messages.
        text: the XML.
        facts: what is known of the host; its ``libvirt`` is the version that is going to read the domain.
        request: "iommufd" or "auto", for the devices that are not in ``backends``.
        backends: what is asked for single devices, by PCI address or UUID.
        scope: see :data:`SCOPES`.
        hot_plug: whether further devices may be plugged in.

    Returns:
        ``xml``, ``changed``, ``backend`` and ``reason`` for the domain, ``devices``, each with its own, ``mixed``
        and ``warnings``.

    Raises:
        OptionError: what was given is malformed.
    """
    if request not in ("iommufd", "auto"):
        raise OptionError("backend", request, "iommufd, auto", "this only ever moves devices to iommufd")
    _check_scope(scope)
    data, root = parse_domain(option, text)
    found = host_devices(root, {_plain(name): value for name, value in (backends or {}).items()})
    extra, warnings = _others(root)
    machine = _machine(root)
    facts = _facts_of(root, facts)
    same = {"xml": data.decode(), "changed": False, "mixed": False, "warnings": warnings}
    if root.attributes.get("type") not in ("kvm", "qemu"):
        kind = root.attributes.get("type")
        return {**same, "backend": None, "reason": f"it is a domain of type {kind}, not of QEMU", "devices": []}
    if not found:
        return {**same, "backend": None, "reason": "it has no host device that vfio drives", "devices": []}
    try:
        decision = decide(facts, [one.device for one in found], request, "libvirt", hot_plug, machine, extra)
        if any(choice.backend == "iommufd" for choice in decision.choices):
            _check_version("libvirt", facts.libvirt, scope)
    except OptionError as error:
        rows = [_row(one, one.now, one.problem or _words(error)) for one in found]
        backend = "legacy" if any(one.now == "legacy" for one in found) else "iommufd"
        return {**same, "backend": backend, "reason": _words(error), "devices": rows}
    rows, edits = _edits(data, root, found, decision, scope)
    after = splice(data, edits)
    if edits:
        parse_domain(option, after.decode())  # what we write is well-formed, or nobody sees it
    return {
        "xml": after.decode(),
        "changed": bool(edits),
        "backend": decision.backend,
        "reason": decision.reason,
        "devices": rows,
        "mixed": len({row["backend"] for row in rows}) > 1,
        "warnings": [*warnings, *decision.warnings],
    }


def _words(error: OptionError) -> str:
    """What an error says, without our options, which nobody set here."""
    return re.sub(r"^[\w.\[\]]+: (.*?) is not accepted: (.*)\. Accepted: .*$", r"\2", error.message, flags=re.DOTALL)


def _plain(name: str) -> str:
    """A device's name as we write it."""
    try:
        return parse_address("backends", name)
    except OptionError:
        return name.lower()


def _machine(root: Element) -> str | None:
    system = root.child("os")
    kind = system.child("type") if system is not None else None
    return kind.attributes.get("machine") if kind is not None else None


def _facts_of(root: Element, facts: Facts) -> Facts:
    """The facts, with the domain's architecture where the host's is not known."""
    system = root.child("os")
    kind = system.child("type") if system is not None else None
    architecture = kind.attributes.get("arch") if kind is not None else None
    return dataclasses.replace(facts, architecture=facts.architecture or architecture)


def _others(root: Element) -> tuple[int, list[str]]:
    """Devices of vfio that the domain has from elsewhere: how many for certain, and words about all of them."""
    count, warnings = 0, []
    for element in root.children:
        if element.name.rpartition(":")[2] == "commandline":
            values = [one.attributes.get("value", "") for one in element.children]
            here = sum("vfio-pci" in value for value in values)
            if here:
                count += here
                warnings.append(f"{here} vfio devices in <{element.name}> stay as they are.")
    for devices in root.children:
        for one in devices.children if devices.name == "devices" else []:
            if one.name == "interface" and one.attributes.get("type") == "network":
                source = one.child("source")
                network = (source.attributes if source is not None else {}).get("network", "?")
                warnings.append(
                    f"An interface is from the network {network}. If that hands out virtual functions, it is the "
                    "network's XML that says how."
                )
    return count, list(dict.fromkeys(warnings))


def _row(one: HostDevice, backend: str, reason: str) -> Json:
    return {
        "name": one.device.name,
        "kind": one.device.kind,
        "element": one.element.name,
        "before": one.now,
        "backend": backend,
        "changed": backend != one.now,
        "reason": reason,
    }


def _edits(
    data: bytes, root: Element, found: t.Sequence[HostDevice], decision: Decision, scope: str
) -> tuple[list[Json], list[Splice]]:
    """What becomes of each device, and where the text changes for it. What is on iommufd already stays there."""
    moves = [one.now == "legacy" and choice.backend == "iommufd" for one, choice in zip(found, decision.choices)]
    switched = scope == "domain" and any(moves)
    rows: list[Json] = []
    edits: list[Splice] = []
    for one, choice, moved in zip(found, decision.choices, moves):
        said = one.driver.attributes.get("iommufd") if one.driver is not None else None
        backend = "iommufd" if moved else one.now
        reason = one.problem or choice.reason
        if one.now == "iommufd":
            reason = "it is on iommufd already"
            if choice.backend == "legacy":
                reason += f" and was left so, though legacy would be the choice: {choice.reason}"
        rows.append(_row(one, backend, reason))
        if moved and (not switched or said == "no"):
            edits.append(_say(data, one, "yes"))
        elif switched and not moved and one.now == "legacy" and one.device.kind == "vfio-pci" and said is None:
            edits.append(_say(data, one, "no"))
    if switched:
        switch = root.child("iommufd")
        place = next(child for child in root.children if child.name == "devices")
        if switch is None:
            edits.append(insert_before(data, place, "<iommufd enabled='yes'/>"))
        elif switch.attributes.get("enabled") != "yes":
            edits.append(set_attribute(data, switch, "enabled", "yes"))
    return rows, edits


def _say(data: bytes, one: HostDevice, value: str) -> Splice:
    """Have the driver of a device say whether it is on iommufd."""
    if one.driver is not None:
        return set_attribute(data, one.driver, "iommufd", value)
    return insert_before(data, one.element.children[0], f"<driver name='vfio' iommufd='{value}'/>")
