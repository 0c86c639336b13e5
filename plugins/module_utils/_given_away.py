# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the host called the functions that it has given away.

Two files remember it, in the same form: that of the devices kept across reboots, and one in /run for this boot. The
latter is written before a function is moved, so that a run that ends in between finds its device again.
"""

from __future__ import annotations

import dataclasses
import os
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._files import own_header
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import is_vfio_driver
from ansible_collections.iommufd.host.plugins.module_utils._names import Names, read_names
from ansible_collections.iommufd.host.plugins.module_utils._pci import Function, Sriov, read_functions
from ansible_collections.iommufd.host.plugins.module_utils._persistence import (
    Entry,
    identity_of,
    parse,
    read_entries,
    render_lines,
)
from ansible_collections.iommufd.host.plugins.module_utils._plan import RemoveFile, Step, WriteFile
from ansible_collections.iommufd.host.plugins.module_utils._selectors import (
    Choice,
    choose,
    parse_selectors,
    view,
)

MEMORY = "/run/iommufd-host/devices.conf"

_HEAD = own_header() + "# What the host called devices that were given to guests, until the next boot.\n"


def read_memory(host: Host) -> dict[str, Entry]:
    """What is remembered for this boot, by address."""
    return parse(host.read_text(MEMORY) or "")


def remembered(host: Host, functions: t.Iterable[Function]) -> dict[str, Names]:
    """What the host called those functions that it does not have any more, by address.

    A memory counts only while the function is on a vfio driver or on none, and is of the kind that was remembered: a
    card that is put in or taken out can move others to new addresses.
    """
    found: dict[str, Names] = {}
    # /run last: it is written first.
    entries = {**read_entries(host), **read_memory(host)}
    for function in functions if entries else ():
        entry = entries.get(function.address)
        away = function.driver is None or is_vfio_driver(function.driver)
        if entry is not None and away and entry.names.given and entry.identity == identity_of(function):
            found[function.address] = entry.names
    return found


def find_devices(host: Host, option: str, value: object, pending: bool = False) -> Choice:
    """The devices of a host that the selectors in an option mean.

    Args:
        host: the host.
        option: the option's name, for messages.
        value: its value.
        pending: VFs may be about to be created.

    Raises:
        OptionError: a selector is malformed, or names what the host does not have.
    """
    selectors = parse_selectors(option, value)
    functions = read_functions(host)
    names, memory = read_names(host, functions), remembered(host, functions)
    views = [view(one, names.get(one.address), memory.get(one.address)) for one in functions]
    return choose(selectors, views, pending)


def plan_memory(host: Host, wanted: t.Mapping[str, Entry]) -> list[Step]:
    """The step after which exactly this is remembered for this boot; none where that is so already."""
    before = host.read_bytes(MEMORY)
    after = (_HEAD + render_lines(wanted.values())).encode() if wanted else None
    if before == after:
        return []
    had = (before or b"").decode("utf-8", "replace")
    path = host.path(MEMORY)
    if after is None:
        return [RemoveFile(f"remove {MEMORY}", MEMORY, had, path=path, prune=[os.path.dirname(path)])]
    summary = f"remember in {MEMORY} what the host calls the devices"
    return [WriteFile(summary, MEMORY, had, after.decode(), path=path, content=after)]


def merge(now: Names | None, before: Names | None) -> Names:
    """What to remember of a function: what the host calls it now, else what it called it before."""
    now = now or Names()
    if now.given or before is None:
        return now
    return dataclasses.replace(before, virtual=now.virtual or before.virtual)


def view_of_gone(entry: Entry) -> dict[str, t.Any]:
    """A device that is remembered but no longer there, as far as it is known; ``vf`` is its number as a VF."""
    vendor, model = (f"0x{part}" for part in entry.identity.split(":"))
    function = Function(entry.address, vendor_id=vendor, device_id=model)
    number = None
    if entry.names.virtual is not None:
        physfn, number = entry.names.virtual
        function.sriov = Sriov(physfn=physfn)
    return {**view(function, None, entry.names), "vf": number}
