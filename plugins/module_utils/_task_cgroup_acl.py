# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the module cgroup_acl does: its options, read, planned, and looked at afterwards."""

from __future__ import annotations

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _libvirt_acl, _qemu_conf, _systemd_unit
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._outcome import Outcome
from ansible_collections.iommufd.host.plugins.module_utils._pci import parse_address
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan
from ansible_collections.iommufd.host.plugins.module_utils._udev import cdev_link

ARGUMENT_SPEC: dict[str, dict[str, t.Any]] = {
    "manager": {"type": "str", "choices": ["libvirt", "systemd"], "required": True},
    "devices": {"type": "list", "elements": "str"},
    "path": {"type": "path", "default": _libvirt_acl.DEFAULT_PATH},
    "restart": {"type": "bool", "default": True},
    "if_missing": {"type": "str", "choices": ["fail", "skip"], "default": "fail"},
    "if_passed": {"type": "str", "choices": ["merge", "skip"], "default": "merge"},
    "unit": {"type": "list", "elements": "str", "aliases": ["units"]},
    "policy": {"type": "str", "choices": ["auto", "closed", "strict"]},
    "open_file": {"type": "list", "elements": "str", "default": []},
    "limit_memlock": {"type": "str"},
    "exclusive": {"type": "bool", "default": False},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "pending": {"type": "bool", "default": False},
}


def parse_devices(params: t.Mapping[str, t.Any]) -> list[str]:
    """The devices as the manager takes them.

    Raises:
        OptionError: one that the manager would not take, or that would open more than a device.
    """
    given = params["devices"]
    if not given:
        raise OptionError("devices", given, "at least one device, such as /dev/iommu")
    devices: list[str] = []
    for index, value in enumerate(given):
        option = f"devices[{index}]"
        if "/" not in value and value[:1].isdigit():
            device = cdev_link(parse_address(option, value))
        elif params["manager"] == "systemd" and value.startswith(("char-", "block-")):
            device = _systemd_unit.parse_class(option, value)
        elif params["manager"] == "libvirt":
            device = _systemd_unit.parse_path(option, value, "a path below /dev without wildcards, or a PCI address")
        else:
            device = _systemd_unit.parse_path(option, value)
        if device not in devices:
            devices.append(device)
    return devices


def parse_open_file(specs: t.Sequence[str]) -> tuple[str, ...]:
    """``OpenFile=`` specifications: a path, a name for the descriptor, options.

    Raises:
        OptionError: not of that form.
    """
    accepted = "path[:name[:options]] as in OpenFile=, such as /dev/iommu:iommu or /dev/vfio/devices/vfio0:gpu"
    for index, spec in enumerate(specs):
        # A colon of a PCI address in a path would be taken for the separator: systemd wants it as \x3a, and refuses \:
        path, _colon, rest = spec.partition(":")
        _systemd_unit.parse_path(f"open_file[{index}]", path.replace("\\x3a", ":"), accepted)
        name, _colon, options = rest.partition(":")
        known = set(options.split(",") if options else ()) <= {"read-only", "append", "truncate", "graceful"}
        if not known or not all(character.isalnum() or character in "_-." for character in name):
            raise OptionError(f"open_file[{index}]", spec, accepted)
    return tuple(specs)


def work_libvirt(params: t.Mapping[str, t.Any], check_mode: bool, host: Host) -> Outcome:
    present = params["state"] == "present"
    devices = parse_devices(params) if present else []
    path = params["path"]
    state = _libvirt_acl.read_libvirt(host, path)
    warnings: list[str] = []
    skipped = ""
    if present and state.content is None and params["if_missing"] == "skip":
        skipped = f"{path} does not exist: libvirt's QEMU driver is not installed."
    elif present and state.passes_descriptors and params["if_passed"] == "skip":
        skipped = f"libvirt {state.version} opens the nodes itself and passes the descriptors."
    if skipped or not present:
        plan = _libvirt_acl.plan_absent(state, params["restart"])
    elif state.content is None and params["pending"] and check_mode:
        plan = Plan()
        warnings.append(f"{path} is not there yet; its device list is merged once libvirt is installed.")
    else:
        plan = _libvirt_acl.plan_present(state, devices, params["restart"])
    write = next((step for step in plan.steps if isinstance(step, _libvirt_acl.WriteConf)), None)
    content = state.content if write is None else write.content
    if content is not None and present and _qemu_conf.definitions(content) > 1:
        warnings.append(
            f"{path} sets cgroup_device_acl more than once; libvirt uses the first, which is the one edited."
        )

    def result(now: bytes | None) -> dict[str, t.Any]:
        listed = None if now is None else _qemu_conf.active_list(now)
        found = {
            "file": path,
            "effective": None if now is None else list(state.default) if listed is None else listed,
            "base": state.default_source,
            "added": [] if now is None else _qemu_conf.own_devices(now),
            "libvirt_version": state.version,
            "passes_descriptors": state.passes_descriptors,
        }
        return {**found, "skipped_reason": skipped} if skipped else found

    def after() -> dict[str, t.Any]:
        return result(host.read_bytes(path))

    return Outcome(plan, result(content), after, warnings)


def work_systemd(params: t.Mapping[str, t.Any], check_mode: bool, host: Host) -> Outcome:
    present = params["state"] == "present"
    names = params["unit"] or []
    units = [_systemd_unit.parse_unit(f"unit[{index}]", name) for index, name in enumerate(names)]
    warnings: list[str] = []
    if not present:
        states = [_systemd_unit.read_unit(host, unit) for unit in units or _systemd_unit.marked_drop_ins(host)]
        plan = _systemd_unit.plan_absent(states, host)
    else:
        if not units:
            raise OptionError("unit", names, "at least one unit, such as guest@.service")
        memlock = params["limit_memlock"]
        wanted = _systemd_unit.Wanted(
            tuple(parse_devices(params)),
            params["policy"],
            parse_open_file(params["open_file"]),
            None if memlock is None else _systemd_unit.check_size("limit_memlock", memlock),
        )
        for unit in units:
            _systemd_unit.check_support(host, unit, wanted)
        states = [_systemd_unit.read_unit(host, unit) for unit in units]
        marked = _systemd_unit.marked_drop_ins(host) if params["exclusive"] else []
        others = [_systemd_unit.read_unit(host, unit) for unit in marked if unit not in units]
        plan = _systemd_unit.plan_present(states, wanted, host, others)
        if plan.changed:
            for state in states:
                _systemd_unit.check_syntax(host, _systemd_unit.drop_in_text(state, wanted), state.unit)
        for state in states:
            if not state.loaded:
                warnings.append(f"{state.unit} does not exist on this host; its drop-in counts when the unit appears.")
    before = {state.unit: state for state in states}

    def result() -> dict[str, t.Any]:
        found = []
        for unit, was in before.items():
            now = _systemd_unit.effective_policy(host, unit)
            now["restart_required"] = _systemd_unit.restart_required(was, now)
            found.append(now)
        return {"units": found}

    return Outcome(plan, result() if check_mode else {}, result, warnings)


def work(params: t.Mapping[str, t.Any], check_mode: bool) -> Outcome:
    host = Host()
    return (
        work_libvirt(params, check_mode, host)
        if params["manager"] == "libvirt"
        else work_systemd(params, check_mode, host)
    )
