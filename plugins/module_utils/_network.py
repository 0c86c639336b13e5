# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Network interfaces: how they stand on each other, and which carry addresses, routes or this very connection."""

from __future__ import annotations

import collections
import functools
import ipaddress
import json
import os
import re
import sys
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._openvswitch import bridges

NET = "/sys/class/net"

# The interface that stands for the datapath of Open vSwitch in the kernel; each of its ports has it as master.
DATAPATH = "ovs-system"

# So many other namespaces are looked into: each takes a process, and a host of containers can have thousands.
MOST_NAMESPACES = 64

# include/uapi/linux/ipv6_route.h: entries of the local table, which every address brings along.
_RTF_LOCAL = 0x80000000
_RTF_ANYCAST = 0x00100000
_RTF_REJECT = 0x0200
_RTF_UP = 0x1

_KINDS = ("vlan", "macvlan", "macvtap", "ipvlan", "vxlan", "bond", "bridge", "team", "vrf")

_Address = t.Union[ipaddress.IPv4Address, ipaddress.IPv6Address]


class Network:
    """All network interfaces that this namespace of the host shows, read once.

    Args:
        host: the host.

    Attributes:
        paths: the real directory in sysfs of each interface.
        kinds: bond, bridge, team, vlan, macvlan, macvtap, ipvlan, vxlan, ovs or vrf; "" for one without layers below.
        above: those that stand on each.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.paths: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self.above: dict[str, set[str]] = collections.defaultdict(set)
        self._read()

    def _read(self) -> None:
        names = self.host.listdir(NET)
        for name in names:
            path = self.host.realpath(f"{NET}/{name}")
            if path is not None and self.host.is_dir(path):
                self.paths[name] = path
        for name, path in self.paths.items():
            entries = self.host.listdir(path)
            self.kinds[name] = self._kind(name, path, entries)
            for entry in entries:
                # Every layer links both ways; a captured tree may have only some of the links.
                if entry.startswith("upper_"):
                    self._stack(name, entry[len("upper_") :])
                elif entry.startswith("lower_"):
                    self._stack(entry[len("lower_") :], name)
                elif entry == "master":
                    self._stack(name, self.host.link_name(f"{path}/master"))
                elif entry == "brif":
                    for port in self.host.listdir(f"{path}/brif"):
                        self._stack(port, name)
                elif entry == "bonding":
                    for slave in (self.host.read_line(f"{path}/bonding/slaves") or "").split():
                        self._stack(slave, name)
        for row in self._text("vlan/config").splitlines():
            upper, _number, lower = ([word.strip() for word in row.split("|")] + ["", ""])[:3]
            self._stack(lower, upper)
        for bridge, ports in bridges(self.host).items():
            if bridge in self.paths:
                self.kinds[bridge] = "ovs"
            for port in ports:
                self._stack(port, bridge)

    def _stack(self, lower: str, upper: str | None) -> None:
        if upper is not None and upper != lower and upper in self.paths and lower in self.paths:
            self.above[lower].add(upper)

    def _kind(self, name: str, path: str, entries: t.Collection[str]) -> str:
        for entry, kind in (("bonding", "bond"), ("bridge", "bridge"), ("macvtap", "macvtap")):
            if entry in entries:
                return kind
        if name == DATAPATH:
            return "ovs"
        told = self._told.get(name, {}).get("linkinfo", {}).get("info_kind")
        if told in _KINDS:
            return str(told)
        if "device" in entries:
            return ""
        match = re.search(r"^DEVTYPE=(\w+)$", self.host.read_text(f"{path}/uevent", 4096) or "", re.MULTILINE)
        kind = match[1] if match is not None else ""
        if kind in _KINDS:
            return kind
        if self.host.exists(f"/proc/net/vlan/{name}"):
            return "vlan"
        # The team driver leaves no mark in sysfs, but its daemon a file.
        lower = any(entry.startswith("lower_") for entry in entries)
        return "team" if self.host.exists(f"/run/teamd/{name}.pid") or (lower and "team" in name) else ""

    # -- addresses -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def addresses(self) -> dict[str, list[str]]:
        """The addresses of each interface; without those that every interface that is up gives itself (fe80::)."""
        found: dict[str, list[str]] = collections.defaultdict(list)
        asked = [pair for name, row in self._told.items() for pair in _addresses(name, row)]
        for name, address in asked or self._written_addresses():
            if not (address.version == 6 and address.is_link_local) and not address.is_loopback:
                found[name].append(str(address))
        return dict(found)

    @functools.cached_property
    def _told(self) -> dict[str, dict[str, t.Any]]:
        """What `ip` says, which knows the kind of every interface and the interface of every address; empty on a
        captured tree or without it."""
        return ask_interfaces(self.host)

    def _written_addresses(self) -> t.Iterator[tuple[str, _Address]]:
        """From procfs: if_inet6 names the interface; fib_trie does not, so the directly connected networks do."""
        for row in self._rows("if_inet6"):
            if len(row) == 6 and re.fullmatch("[0-9a-f]{32}", row[0]):
                yield row[5], ipaddress.IPv6Address(int(row[0], 16))
        connected = [(network, name) for name, network, gateway in self._routes4 if gateway == 0 and network.prefixlen]
        connected.sort(key=lambda pair: -pair[0].prefixlen)
        text = self._text("fib_trie")
        for one in sorted(set(re.findall(r"\|-- ([0-9.]+)\n\s+/32 host LOCAL", text))):
            try:
                address = ipaddress.IPv4Address(one)
            except ValueError:
                continue
            name = next((name for network, name in connected if address in network), None)
            if name is not None:
                yield name, address

    # -- routes ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def routes(self) -> dict[str, list[str]]:
        """The destinations reached through each interface ("default", "10.0.0.0/8"); "default" first."""
        found: dict[str, list[str]] = collections.defaultdict(list)
        for name, network4, _gateway in self._routes4:
            if not network4.is_link_local:
                found[name].append("default" if network4.prefixlen == 0 else str(network4))
        for name, network6 in self._routes6:
            found[name].append("default (IPv6)" if network6.prefixlen == 0 else str(network6))
        return {
            name: sorted(set(all_), key=lambda one: (not one.startswith("default"), one))
            for name, all_ in found.items()
        }

    @functools.cached_property
    def _routes4(self) -> list[tuple[str, ipaddress.IPv4Network, int]]:
        """proc/net/route: interface, network, gateway; the numbers are in the byte order of the machine."""
        order: t.Literal["little", "big"] = sys.byteorder if self.host.live else "little"
        found = []
        for row in self._rows("route"):
            if len(row) < 8 or not all(re.fullmatch("[0-9A-Fa-f]{8}", row[index]) for index in (1, 2, 7)):
                continue
            target, gateway, mask = (int.from_bytes(bytes.fromhex(row[index]), order) for index in (1, 2, 7))
            if re.fullmatch("[0-9A-Fa-f]{4}", row[3]) and not int(row[3], 16) & _RTF_UP:
                continue
            try:
                network = ipaddress.IPv4Network((target, bin(mask).count("1")), strict=False)
            except ValueError:
                continue
            found.append((row[0], network, gateway))
        return found

    @functools.cached_property
    def _routes6(self) -> list[tuple[str, ipaddress.IPv6Network]]:
        """proc/net/ipv6_route: interface and network, without what every interface that is up has."""
        found = []
        for row in self._rows("ipv6_route"):
            if len(row) != 10 or not re.fullmatch("[0-9a-f]{32}", row[0]) or not re.fullmatch("[0-9a-f]{8}", row[8]):
                continue
            if not re.fullmatch("[0-9a-f]{2}", row[1]) or int(row[1], 16) > 128 or row[9] == "lo":
                continue
            if int(row[8], 16) & (_RTF_LOCAL | _RTF_ANYCAST | _RTF_REJECT):
                continue
            network = ipaddress.IPv6Network((int(row[0], 16), int(row[1], 16)), strict=False)
            if not network.is_link_local and not network.is_multicast:
                found.append((row[9], network))
        return found

    def _text(self, name: str) -> str:
        # /proc/net is a link to self/net, and a captured tree need not have both ends of it.
        texts = (self.host.read_text(f"/proc/{where}/{name}") for where in ("net", "self/net", "1/net"))
        return next(filter(None, texts), "")

    def _rows(self, name: str) -> list[list[str]]:
        return [line.split() for line in self._text(name).splitlines()]

    # -- this connection -------------------------------------------------------------------------------------------

    @functools.cached_property
    def connection(self) -> tuple[str, str] | None:
        """The interface that carries the ssh connection this very run came by, and its peer; None without one."""
        words = (_ssh_connection(self.host) or "").split()
        if len(words) != 4:
            return None
        peer, _port, own, _own_port = words
        if "%" in own:  # link-local: the zone is the interface
            return own.partition("%")[2], peer
        # With our own address: rules may send what comes from it another way than the rest (ip-rule(8)).
        answer = self.host.ask(["ip", "-j", "route", "get", peer.partition("%")[0], "from", own])
        name = None
        if answer is not None and answer.ok:
            try:
                name = json.loads(answer.stdout)[0].get("dev")
            except (ValueError, LookupError, AttributeError):
                name = None
        if name is None or name == "lo":
            name = next((one for one, addresses in self.addresses.items() if own in addresses), None)
        return (name, peer) if isinstance(name, str) else None


def ask_interfaces(host: Host, namespace: str | None = None) -> dict[str, dict[str, t.Any]]:
    """The interfaces of a network namespace as ``ip -json -details address`` has them, by name.

    Args:
        host: the host; empty for a captured tree, or where there is no such program.
        namespace: path of another namespace (/proc/PID/ns/net); entering it for this takes root.
    """
    enter = ["nsenter", f"--net={namespace}"] if namespace is not None else []
    answer = host.ask([*enter, "ip", "-j", "-d", "address", "show"])
    try:
        rows = json.loads(answer.stdout) if answer is not None and answer.ok else []
        return {row["ifname"]: row for row in rows}
    except (ValueError, KeyError, TypeError):
        return {}


def _addresses(name: str, row: t.Mapping[str, t.Any]) -> t.Iterator[tuple[str, _Address]]:
    for info in row.get("addr_info") or []:
        try:
            yield name, ipaddress.ip_address(info["local"])
        except (ValueError, KeyError, TypeError):
            continue


def other_namespaces(host: Host, most: int = MOST_NAMESPACES) -> dict[str, str]:
    """The other network namespaces of the live host: a path to each, and whose it is in words.

    Args:
        host: the host.
        most: how many at most; where there are so many, there may be more.
    """
    if not host.live:
        return {}
    own = host.stat("/proc/self/ns/net")
    seen = {own.st_ino} if own is not None else set()
    found: dict[str, str] = {}
    named = {f"/run/netns/{name}": f"the network namespace {name}" for name in host.listdir("/run/netns")}
    processes = {
        f"/proc/{process}/ns/net": f"the network namespace of process {process}"
        for process in host.listdir("/proc")
        if process.isdigit()
    }
    for path, words in {**named, **processes}.items():
        status = host.stat(path)
        if status is not None and status.st_ino not in seen and len(found) < most:
            seen.add(status.st_ino)
            found[path] = words
    return found


def _ssh_connection(host: Host) -> str | None:
    """SSH_CONNECTION of this process or, as sudo and su drop it, of the nearest ancestor that has it."""
    if not host.live:
        return None
    if "SSH_CONNECTION" in os.environ:
        return os.environ["SSH_CONNECTION"]
    process = os.getppid()
    while process > 1:
        for entry in (host.read_bytes(f"/proc/{process}/environ") or b"").split(b"\0"):
            if entry.startswith(b"SSH_CONNECTION="):
                return entry.partition(b"=")[2].decode("ascii", "replace")
        status = re.search(r"^PPid:\s*(\d+)$", host.read_text(f"/proc/{process}/status") or "", re.MULTILINE)
        process = int(status[1]) if status is not None else 0
    return None
