# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Virtual functions: how many each physical function (PF) has, who drives them, and what its driver lets them do.

VFs are made with the autoprobe of their PF off, whatever it shall be in the end: no driver of the host sees a VF before
its settings are made (a guest's VF: never), and when the write that makes them returns, nothing is probing any more.
The kernel heeds that for VFs without a driver override (pci_device_can_probe in drivers/pci/pci-driver.c).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._pci import (
    Function,
    is_address,
    parse_address,
)

NET = "/sys/class/net"

CMODES = ("runtime", "driverinit", "permanent")

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_NO_MAC = "00:00:00:00:00:00"
_ACCEPTED_MAC = "a unicast MAC address such as 02:00:00:00:00:01"
_PARAM = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PARAM_VALUE = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")

# Priority and VLAN ID of IEEE 802.1Q; 4095 is reserved.
_VLANS = range(4095)
_PRIORITIES = range(8)
_RATES = range(1 << 32)


@dataclasses.dataclass(frozen=True)
class VfSettings:
    """What a PF's driver is told about one VF. None: not told, or (as read) not reported by the driver.

    Attributes:
        mac: MAC address, in lower case; as read, zeros where none was given.
        vlan: VLAN that its traffic is put into; 0: none.
        qos: priority there.
        spoof_check: whether frames with another source address are dropped.
        trust: whether it may change what touches others (promiscuous mode, its MAC address).
        link_state: "auto" (that of the PF), "enable" or "disable".
        min_tx_rate, max_tx_rate: Mbit/s; 0: no limit.
    """

    mac: str | None = None
    vlan: int | None = None
    qos: int | None = None
    spoof_check: bool | None = None
    trust: bool | None = None
    link_state: str | None = None
    min_tx_rate: int | None = None
    max_tx_rate: int | None = None

    @property
    def given(self) -> dict[str, t.Any]:
        """What is told, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def differing(self, now: VfSettings) -> VfSettings:
        """What has to be told to a driver that reports ``now``."""
        different = {name: value for name, value in self.given.items() if getattr(now, name) != value}
        if "vlan" in different or "qos" in different:  # ip takes them together
            different.update(vlan=self.vlan if self.vlan is not None else now.vlan, qos=self.qos)
        return VfSettings(**different)

    def only(self, others: VfSettings) -> VfSettings:
        """Of this, what is given in others."""
        return VfSettings(**{name: getattr(self, name) for name in others.given})

    def words(self) -> list[str]:
        """As ``ip link set DEV vf N`` takes it."""
        found: list[str] = []
        for name, word in _WORDS.items():
            value = getattr(self, name)
            if value is not None:
                found += [word, value if isinstance(value, str) else _word(value)]
        return found

    @classmethod
    def parse(cls, words: t.Sequence[str]) -> VfSettings:
        """From such words; pairs that are none of ours are passed over."""
        names = {word: name for name, word in _WORDS.items()}
        found: dict[str, t.Any] = {}
        for word, value in zip(words[::2], words[1::2]):
            name = names.get(word)
            if name in ("mac", "link_state"):
                found[name] = value
            elif name in ("spoof_check", "trust"):
                found[name] = value == "on"
            elif name is not None and value.isdigit():
                found[name] = int(value)
        return cls(**found)


# ip takes qos as a word behind vlan. The kernel works on a request in this order, too (do_setvfinfo).
_WORDS = {
    "mac": "mac",
    "vlan": "vlan",
    "qos": "qos",
    "min_tx_rate": "min_tx_rate",
    "max_tx_rate": "max_tx_rate",
    "spoof_check": "spoofchk",
    "link_state": "state",
    "trust": "trust",
}


def _word(value: bool | int) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


@dataclasses.dataclass(frozen=True)
class Param:
    """A devlink parameter of a device.

    Attributes:
        value: as devlink prints it ("true", "smfs", "16").
        cmode: when it counts: "runtime" at once, "driverinit" after a reload, "permanent" after a power cycle.
        before: what it was before we set it, for the way back.
    """

    value: str
    cmode: str
    before: str | None = None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a PF shall be.

    Attributes:
        address: the PF.
        option: where that stands in the call ("pfs[0]").
        count: number of its VFs.
        autoprobe: whether drivers of the host take VFs that appear.
        settings: by index, of the VFs that are told something.
        params: devlink parameters by name.
    """

    address: str
    option: str
    count: int = 0
    autoprobe: bool = False
    settings: dict[int, VfSettings] = dataclasses.field(default_factory=dict)
    params: dict[str, Param] = dataclasses.field(default_factory=dict)


# -- options -------------------------------------------------------------------------------------------------------


def parse_request(
    host: Host,
    functions: t.Mapping[str, Function],
    pfs: t.Sequence[t.Mapping[str, t.Any]],
    present: bool,
    kept: t.Collection[str] = (),
) -> list[Wanted]:
    """The option ``pfs`` as it was given.

    Args:
        host: the host.
        functions: its PCI functions by address.
        pfs: the option, with None for what was not given.
        present: False: the PFs shall have no VFs.
        kept: addresses that may be gone when they shall have none.

    Raises:
        OptionError: something is malformed, contradicts itself or names what the host does not have.
    """
    found: list[Wanted] = []
    options: dict[str, str] = {}
    macs: dict[str, str] = {}
    for number, one in enumerate(pfs):
        option = f"pfs[{number}]"
        address = _parse_pf(host, functions, option, one, () if present else kept)
        if address in options:
            raise OptionError(option, address, "each PF once", f"{options[address]} is the same PF")
        options[address] = option
        if not present:
            found.append(Wanted(address, option))
            continue
        count = _parse_count(functions[address], option, one.get("vfs"))
        settings = _parse_settings(option, count, one.get("vf_settings") or (), macs)
        params = _parse_params(f"{option}.devlink_params", one.get("devlink_params") or {})
        found.append(Wanted(address, option, count, bool(one.get("autoprobe")), settings, params))
    return found


def _parse_pf(
    host: Host, functions: t.Mapping[str, Function], option: str, one: t.Mapping[str, t.Any], kept: t.Collection[str]
) -> str:
    nic, value = one.get("nic"), one.get("address")
    if (nic is None) == (value is None):
        raise OptionError(option, dict(one), "a dictionary with one of the keys address and nic")
    if nic is not None:
        address = _function_of(host, nic)
        if address is None:
            nics = [name for name in host.listdir(NET) if (_function_of(host, name) or "") in _capable(functions)]
            accepted = f"the interface of a PF; this host has: {', '.join(nics) or 'none'}"
            raise OptionError(f"{option}.nic", nic, accepted, "no PCI function has such an interface")
        option, value = f"{option}.nic", nic
    else:
        option = f"{option}.address"
        address = parse_address(option, value)
    function = functions.get(address)
    if function is None:
        if address in kept:
            return address
        pfs = ", ".join(_capable(functions)) or "none"
        raise OptionError(option, value, f"an address of a PF; this host has: {pfs}", "there is no such device")
    if function.sriov is None or not function.sriov.total_vfs:
        pfs = ", ".join(_capable(functions)) or "none"
        if function.sriov is not None and function.sriov.physfn is not None:
            why = f"it is a VF itself, of {function.sriov.physfn}"
        elif function.sriov is not None and function.sriov.total_vfs == 0:
            why = "its driver or its firmware allows no VFs (sriov_totalvfs is 0)"
        else:
            why = f"{address} offers no SR-IOV (the device cannot do it, or it is off in its firmware or in the BIOS)"
        raise OptionError(option, value, f"a PF; this host has: {pfs}", why)
    return address


def _function_of(host: Host, nic: object) -> str | None:
    """The address of the function behind an interface."""
    if not isinstance(nic, str) or not re.fullmatch(r"[^/\s]{1,15}", nic):
        return None
    name = os.path.basename(host.realpath(f"{NET}/{nic}/device") or "")
    return name if is_address(name) else None


def _capable(functions: t.Mapping[str, Function]) -> list[str]:
    return [address for address, function in functions.items() if function.sriov and function.sriov.total_vfs]


def _parse_count(function: Function, option: str, count: int | None) -> int:
    total = (function.sriov.total_vfs if function.sriov else None) or 0
    if count is None or not 0 <= count <= total:
        raise OptionError(f"{option}.vfs", count, f"a number from 0 to {total}, as many as {function.address} can have")
    return count


def _parse_settings(
    option: str, count: int, rows: t.Sequence[t.Mapping[str, t.Any]], macs: dict[str, str]
) -> dict[int, VfSettings]:
    """One for each VF that is told something: what is for all first, then what is for it alone.

    Args:
        option: the PF's option.
        count: number of its VFs.
        rows: its ``vf_settings``.
        macs: option by MAC address of all PFs so far; those of this PF are added.
    """
    found: dict[int, dict[str, t.Any]] = {}
    single: dict[int, str] = {}
    ordered = sorted(enumerate(rows), key=lambda pair: pair[1].get("index") is not None)
    for number, row in ordered:
        here = f"{option}.vf_settings[{number}]"
        index = row.get("index")
        if index is not None:
            accepted = f"the index of a VF, from 0 to {count - 1}" if count else "none, as vfs is 0"
            if not 0 <= index < count:
                raise OptionError(f"{here}.index", index, accepted)
            if index in single:
                raise OptionError(f"{here}.index", index, "each VF once", f"{single[index]} has it already")
            single[index] = here
        told = _parse_row(here, row)
        if "mac" in told:
            if index is None and count > 1:
                raise OptionError(
                    f"{here}.mac", told["mac"], "a MAC address together with index", "VFs cannot share it"
                )
            if told["mac"] in macs:
                raise OptionError(f"{here}.mac", told["mac"], "each MAC address once", f"{macs[told['mac']]} has it")
            macs[told["mac"]] = f"{here}.mac"
        for one in range(count) if index is None else (index,):
            found.setdefault(one, {}).update(told)
    for index, told in found.items():
        here = single.get(index, f"{option}.vf_settings")
        if told.get("qos") is not None and told.get("vlan") is None:
            raise OptionError(f"{here}.qos", told["qos"], "a priority together with vlan")
        if told.get("vlan") is not None:
            told.setdefault("qos", 0)
        if told.get("max_tx_rate") and (told.get("min_tx_rate") or 0) > told["max_tx_rate"]:
            raise OptionError(f"{here}.min_tx_rate", told["min_tx_rate"], f"up to max_tx_rate, {told['max_tx_rate']}")
    return {index: VfSettings(**told) for index, told in sorted(found.items()) if told}


def _parse_row(option: str, row: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    told = {name: row[name] for name in _WORDS if row.get(name) is not None}
    for name, numbers, accepted in (
        ("vlan", _VLANS, "a VLAN from 1 to 4094, or 0 for none"),
        ("qos", _PRIORITIES, "a priority from 0 to 7"),
        ("min_tx_rate", _RATES, "Mbit/s, or 0 for no guarantee"),
        ("max_tx_rate", _RATES, "Mbit/s, or 0 for no limit"),
    ):
        if name in told and told[name] not in numbers:
            raise OptionError(f"{option}.{name}", told[name], accepted)
    if "mac" in told:
        mac = str(told["mac"]).lower().replace("-", ":")
        if not _MAC.fullmatch(mac):
            raise OptionError(f"{option}.mac", told["mac"], _ACCEPTED_MAC)
        if int(mac[:2], 16) & 1:
            raise OptionError(f"{option}.mac", told["mac"], _ACCEPTED_MAC, "it is a multicast address")
        if mac == _NO_MAC:
            raise OptionError(f"{option}.mac", told["mac"], _ACCEPTED_MAC, "zeros are no address")
        told["mac"] = mac
    return told


def _parse_params(option: str, params: t.Mapping[str, t.Any]) -> dict[str, Param]:
    found = {}
    for name, value in params.items():
        here = f"{option}.{name}"
        cmode = "runtime"
        if isinstance(value, dict):
            if not {"value"} <= set(value) <= {"value", "cmode"}:
                raise OptionError(here, value, "a value, or a dictionary with value and cmode")
            cmode, value = value.get("cmode", cmode), value["value"]
        text = _param_text(value)
        if not _PARAM.fullmatch(name) or not _PARAM_VALUE.fullmatch(text):
            raise OptionError(here, value, "a number, true, false or a word")
        if cmode not in CMODES:
            raise OptionError(f"{here}.cmode", cmode, ", ".join(CMODES))
        found[name] = Param(text, cmode)
    return found


# -- what is there -------------------------------------------------------------------------------------------------


def interface_of(host: Host, address: str) -> str | None:
    """The PF's own network interface; None where it has none.

    In switchdev mode the representors of its VFs are beside it; they say so (phys_port_name "pf0vf3", "pf0sf88", with
    the number of a controller before it "c1pf0vf3": __devlink_port_phys_port_name_get in net/devlink).
    """
    directory = f"/sys/bus/pci/devices/{address}/net"
    for name in host.listdir(directory):
        port = host.read_line(f"{directory}/{name}/phys_port_name") or ""
        if not re.fullmatch(r"(c\d+)?(pf\d+)?[vs]f\d+", port):
            return name
    return None


def read_settings(host: Host, nic: str) -> dict[int, VfSettings] | None:
    """What the PF's driver reports about its VFs, by index; None where `ip` cannot be asked.

    Args:
        host: the host.
        nic: the PF's interface.
    """
    answer = host.ask(["ip", "-j", "-d", "link", "show", "dev", nic])
    if answer is None or not answer.ok:
        return None
    try:
        return {row["vf"]: _reported(row) for row in json.loads(answer.stdout)[0].get("vfinfo_list", [])}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _reported(row: t.Mapping[str, t.Any]) -> VfSettings:
    lists = row.get("vlan_list") or [{}]
    rate = row.get("rate") or {}
    mac = row.get("address", row.get("mac"))
    return VfSettings(
        mac=mac.lower() if isinstance(mac, str) else None,
        vlan=lists[0].get("vlan", 0),
        qos=lists[0].get("qos", 0),
        spoof_check=row.get("spoofchk"),
        trust=row.get("trust"),
        link_state=row.get("link_state"),
        min_tx_rate=rate.get("min_tx"),
        max_tx_rate=rate.get("max_tx"),
    )


def given_mac(settings: VfSettings | None) -> str | None:
    """The MAC address that a VF was given; None where it has to choose one itself."""
    return None if settings is None or settings.mac in (None, _NO_MAC) else settings.mac


def read_params(host: Host, address: str) -> dict[str, dict[str, str]]:
    """The devlink parameters of a device: value by cmode by name; empty where it has none, or there is no devlink."""
    handle = f"pci/{address}"
    answer = host.ask(["devlink", "-j", "dev", "param", "show", handle])
    if answer is None or not answer.ok:
        return {}
    try:
        rows = json.loads(answer.stdout)["param"][handle]
        return {
            row["name"]: {one["cmode"]: _param_text(one["value"]) for one in row["values"] if "value" in one}
            for row in rows
        }
    except (ValueError, LookupError, TypeError):
        return {}


def _param_text(value: object) -> str:
    """As devlink takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
