# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What PCI functions are used for: every reason why taking one away from the host would hurt."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import re
import stat
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import is_vfio_driver
from ansible_collections.iommufd.host.plugins.module_utils._layers import chains
from ansible_collections.iommufd.host.plugins.module_utils._network import (
    DATAPATH,
    MOST_NAMESPACES,
    Network,
    ask_interfaces,
    other_namespaces,
)
from ansible_collections.iommufd.host.plugins.module_utils._pci import Function, is_address, read_functions
from ansible_collections.iommufd.host.plugins.module_utils._processes import Guest, read_guest, read_processes
from ansible_collections.iommufd.host.plugins.module_utils._storage import Storage

# Drivers for user space, which make no interface of a network card; vfio's are known by their name.
_WITHOUT_INTERFACE = ("uio_pci_generic", "igb_uio", "pci-stub")

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclasses.dataclass(frozen=True)
class Use:
    """One reason.

    Attributes:
        kind: mount, swap, lvm, raid, crypt, multipath, zfs, bcache, device-mapper, export (disks); address, route,
            bond, bridge, team, vlan, macvlan, macvtap, ipvlan, vxlan, vrf, ovs, upper, namespace, ssh (interfaces);
            console, open, guest, mdev, vfs.
        name: what uses it: a mount point, an interface, a volume, a process, a guest.
        detail: the chain from the function's own device up to there, in words
            ("sda > sda2 > md0 > vg-root is mounted on /").
    """

    kind: str
    name: str
    detail: str

    @property
    def vital(self) -> bool:
        """Whether not even force may take it away: the root disk and the interface that carries this connection."""
        return self.kind == "ssh" or (self.kind == "mount" and self.name in ("/", "/usr"))

    def to_dict(self) -> dict[str, t.Any]:
        return {"kind": self.kind, "name": self.name, "detail": self.detail}


def uses(host: Host, address: str) -> list[Use]:
    """All uses of one function; empty when it is free. For several, ask :func:`all_uses` once.

    Args:
        host: the host.
        address: as parse_address returns it.
    """
    return all_uses(host).get(address, [])


def all_uses(host: Host, functions: t.Sequence[Function] | None = None) -> dict[str, list[Use]]:
    """All uses of all functions by address, in one pass; a free function is not in it.

    Args:
        host: the host.
        functions: as read_functions returns them, where they have been read already.
    """
    return survey_uses(host, read_functions(host) if functions is None else functions)[0]


def survey_uses(host: Host, functions: t.Sequence[Function]) -> tuple[dict[str, list[Use]], list[Guest]]:
    """All uses as :func:`all_uses` returns them, and the running guests, from one look at the processes."""
    search = _Search(host, functions)
    return search.run(), search.guests


class _Search:
    def __init__(self, host: Host, functions: t.Sequence[Function]) -> None:
        self.host = host
        self.functions = {function.address: function for function in functions}
        self.groups: dict[int, list[Function]] = collections.defaultdict(list)
        for function in functions:
            if function.iommu_group is not None:
                self.groups[function.iommu_group].append(function)
        self.storage = Storage(host)
        self.found: dict[str, list[Use]] = collections.defaultdict(list)
        self.guests: list[Guest] = []

    def run(self) -> dict[str, list[Use]]:
        self._disks()
        self._interfaces()
        self._consoles()
        self._mediated()
        self._processes()
        self._virtual_functions()  # last: it looks at what was found for the VFs
        return dict(self.found)

    def _note(self, addresses: t.Iterable[str], use: Use) -> None:
        for address in addresses:
            if use not in self.found[address]:
                self.found[address].append(use)

    def _behind(self, path: str | None) -> list[str]:
        """The functions that a device in sysfs hangs on: the nearest one above it, and those above that which are no
        bridges (an NVMe disk behind a VMD hangs on the disk's own function and on the VMD)."""
        on_the_way = [part for part in (path or "").split("/") if is_address(part) and part in self.functions]
        return [
            address
            for address in on_the_way
            if address == on_the_way[-1] or not (self.functions[address].class_id or "0x06").startswith("0x06")
        ]

    # -- disks -----------------------------------------------------------------------------------------------------

    def _functions_of_block(self, name: str) -> list[str]:
        found: list[str] = []
        for root in sorted(self.storage.roots(name)):
            for path in self.storage.paths(root):
                found.extend(self._behind(path))
        return found

    def _disks(self) -> None:
        storage = self.storage
        for name in storage.devices:
            if storage.below.get(name):
                continue
            addresses = self._functions_of_block(name)
            if not addresses:
                continue
            for chain in chains(storage.above, name):
                labels = [storage.devices[one].label for one in chain]
                for use in storage.uses.get(chain[-1], ()):
                    self._note(addresses, Use(use.kind, use.name, f"{' > '.join(labels)} {use.words}"))

    # -- interfaces ------------------------------------------------------------------------------------------------

    def _interfaces(self) -> None:
        network = Network(self.host)
        seen: set[str] = set()
        for name, path in network.paths.items():
            addresses = self._behind(path)
            seen.update(addresses)
            if not addresses:
                continue
            for chain in chains(network.above, name):
                top, way = chain[-1], " > ".join(chain)
                if len(chain) > 1:
                    kind = network.kinds.get(top) or "upper"
                    layer = "Open vSwitch datapath" if top == DATAPATH else _LAYER.get(kind, "interface")
                    self._note(addresses, Use(kind, top, f"{way}: part of the {layer} {top}"))
                for one in network.addresses.get(top, ()):
                    self._note(addresses, Use("address", one, f"{way} has the address {one}"))
                routes = network.routes.get(top, [])
                for one in [route for route in routes if route.startswith("default")]:
                    self._note(addresses, Use("route", one, f"{way} carries the host's default route{one[7:]}"))
                others = [route for route in routes if not route.startswith("default")]
                if others:
                    listed = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
                    self._note(addresses, Use("route", others[0], f"{way} carries the route to {listed}"))
                if network.connection is not None and network.connection[0] == top:
                    peer = network.connection[1]
                    self._note(addresses, Use("ssh", peer, f"{way} carries this very ssh connection from {peer}"))

        self._hidden_interfaces(seen)

    def _hidden_interfaces(self, seen: t.Collection[str]) -> None:
        """Interfaces that were moved into another network namespace: sysfs shows those of its own only."""
        hidden = {
            function.address
            for function in self.functions.values()
            if (function.class_id or "").startswith("0x02")
            and function.driver not in (None, *_WITHOUT_INTERFACE)
            and not is_vfio_driver(function.driver or "")
            and function.address not in seen
        }
        namespaces = other_namespaces(self.host) if hidden else {}
        for path, whose in namespaces.items():
            for name, row in ask_interfaces(self.host, path).items():
                if row.get("parentdev") in hidden:
                    words = f"{name} belongs to {whose}"
                    self._note([row["parentdev"]], Use("namespace", name, words))
        if len(namespaces) >= MOST_NAMESPACES:
            words = f"its interface is not here, and may be in one of more than {MOST_NAMESPACES} network namespaces"
            for address in sorted(hidden.difference(self.found)):
                self._note([address], Use("namespace", "unknown", words))

    # -- displays and serial lines ---------------------------------------------------------------------------------

    def _consoles(self) -> None:
        for function in self.functions.values():
            if function.boot_vga and not (function.driver and is_vfio_driver(function.driver)):
                self._note([function.address], Use("console", "display", "it is the display that the firmware started"))
        buffers = {name: f"/sys/class/graphics/{name}/device" for name in self.host.listdir("/sys/class/graphics")}
        for function in self.functions.values():  # where the tree lacks the class
            for name in self.host.listdir(f"{function.path}/graphics") if "graphics" in function.entries else ():
                buffers.setdefault(name, f"{function.path}/graphics/{name}")
        for name, path in sorted(buffers.items()):
            if re.fullmatch(r"fb\d+", name):
                behind = self._behind(self.host.realpath(path))
                self._note(behind, Use("console", name, f"its frame buffer {name} is the text console"))
        for name in (self.host.read_line("/sys/class/tty/console/active") or "").split():
            if re.fullmatch(r"[\w.-]+", name):
                behind = self._behind(self.host.realpath(f"/sys/class/tty/{name}"))
                self._note(behind, Use("console", name, f"its serial line {name} is the kernel's console"))

    # -- mediated devices ------------------------------------------------------------------------------------------

    def _mediated(self) -> None:
        for name in self.host.listdir("/sys/bus/mdev/devices"):
            self._note_mediated(self._behind(self.host.realpath(f"/sys/bus/mdev/devices/{name}")), name)
        for function in self.functions.values():  # where the tree lacks the bus: their names are UUIDs
            for name in function.entries:
                if len(name) == 36 and _UUID.fullmatch(name):
                    self._note_mediated([function.address], name)

    def _note_mediated(self, addresses: t.Iterable[str], name: str) -> None:
        self._note(addresses, Use("mdev", name, f"the mediated device {name} stands on it"))

    # -- processes -------------------------------------------------------------------------------------------------

    def _processes(self) -> None:
        leads: dict[str, list[str]] = {}
        for process in read_processes(self.host):
            opened: dict[str, str] = {}
            for target, link in process.opened.items():
                if target not in leads:
                    leads[target] = self._behind_node(target, link)
                for address in leads[target]:
                    opened.setdefault(address, target)
            guest = read_guest(self.host, process, opened)
            if guest is not None:
                self.guests.append(guest)
            for address, target in opened.items():
                if guest is not None:
                    words = f"the running guest {guest.name} ({guest.program}, process {process.number})"
                    self._note([address], Use("guest", guest.name, f"{words} has {target} open"))
                else:
                    words = f"the process {process.command} ({process.number}) has {target} open"
                    self._note([address], Use("open", process.command, words))

    def _behind_node(self, target: str, link: str) -> list[str]:
        """The functions behind a file that a process has open."""
        if target.startswith("/sys/"):  # a BAR mapped by a user space driver
            return self._behind(os.path.dirname(target)) if re.search(r"/resource\d(_wc)?$", target) else []
        group = re.fullmatch(r"/dev/vfio/(?:noiommu-)?(\d+)", target)
        if group is not None:
            members = self.groups.get(int(group[1]), [])
            return [member.address for member in members if member.driver and is_vfio_driver(member.driver)]
        if target.startswith("/dev/vfio/devices/"):
            name = os.path.basename(target)
            return [function.address for function in self.functions.values() if function.vfio_name == name]
        card = re.fullmatch(r"/dev/nvidia(\d+)", target)
        if card is not None:
            return self._nvidia(card[1])
        if not self.host.live:
            return self._behind_name(target)
        status = self.host.stat(link)
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if status is not None else ""
        if status is not None and stat.S_ISBLK(status.st_mode):
            name = self.storage.by_number.get(number, "")
            return self._functions_of_block(name) if name else []
        if status is not None and stat.S_ISCHR(status.st_mode):
            return self._behind(self.host.realpath(f"/sys/dev/char/{number}"))
        return []

    def _behind_name(self, target: str) -> list[str]:
        """As :meth:`_behind_node`, by the name alone: in a captured tree a descriptor has no number to go by."""
        block = self.storage.resolve(target)
        if block is not None:
            return self._functions_of_block(block)
        name = os.path.basename(target)
        for kind in self._classes:
            path = self.host.realpath(f"/sys/class/{kind}/{name}")
            if path is not None:
                return self._behind(path)
        return []

    @functools.cached_property
    def _classes(self) -> list[str]:
        return [name for name in self.host.listdir("/sys/class") if name not in ("block", "net")]

    def _nvidia(self, minor: str) -> list[str]:
        """NVIDIA's own driver makes its nodes without sysfs; it says in procfs which is which."""
        for name in self.host.listdir("/proc/driver/nvidia/gpus"):
            text = self.host.read_text(f"/proc/driver/nvidia/gpus/{name}/information") or ""
            if re.search(rf"^Device Minor:\s*{minor}$", text, re.MULTILINE) and name in self.functions:
                return [name]
        return []

    # -- SR-IOV ----------------------------------------------------------------------------------------------------

    def _virtual_functions(self) -> None:
        for function in self.functions.values():
            parent = function.sriov.physfn if function.sriov else None
            if parent is None or parent not in self.functions:
                continue
            for use in list(self.found.get(function.address, ())):
                self._note([parent], Use("vfs", function.address, f"its VF {function.address} is in use: {use.detail}"))
            if function.driver and is_vfio_driver(function.driver) and function.address not in self.found:
                words = f"its VF {function.address} is kept for guests on {function.driver}"
                self._note([parent], Use("vfs", function.address, words))


_LAYER = {
    "bond": "bond",
    "bridge": "bridge",
    "team": "team",
    "vlan": "VLAN",
    "macvlan": "MACVLAN",
    "macvtap": "macvtap",
    "ipvlan": "IPVLAN",
    "vxlan": "VXLAN",
    "vrf": "VRF",
    "ovs": "Open vSwitch bridge",
}
