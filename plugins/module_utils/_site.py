# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The plan of a whole host: what every role of site.yml would do, told in one go.

The roles are lists of module calls. Here are the same calls, in the same order and with the same options, each only
planned (check mode). So a host counts as converged when, and only when, no role has anything to do on it by the very
planners that would do it: there is no record of an earlier run that could be out of date, and whatever has drifted is
seen. A unit test runs the roles themselves and compares their calls with these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import (
    _binding,
    _guest,
    _persistence,
    _qemu_install,
    _sriov_persistence,
    _sriov_plan,
    _task_access_probe,
    _task_apparmor_access,
    _task_cgroup_acl,
    _task_iommufd_dkms,
    _task_kernel_args,
    _task_kernel_modules,
    _task_memlock_limits,
    _task_udev_access,
)
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._given_away import read_memory
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._outcome import Outcome

Json = dict[str, t.Any]

# In the order in which site.yml comes to them.
ROLES = ("kernel", "qemu", "devices", "access", "verify")

TASKS: dict[str, t.Any] = {
    "access_probe": _task_access_probe,
    "apparmor_access": _task_apparmor_access,
    "cgroup_acl": _task_cgroup_acl,
    "iommufd_dkms": _task_iommufd_dkms,
    "kernel_args": _task_kernel_args,
    "kernel_modules": _task_kernel_modules,
    "memlock_limits": _task_memlock_limits,
    "udev_access": _task_udev_access,
}


class Caller(t.Protocol):
    """Plans one module call.

    Args:
        module: its name.
        options: those that are given; the others have their defaults.

    Returns:
        The module's result in check mode, with ``changed`` and ``plan``.
    """

    def __call__(self, module: str, options: Json) -> Json: ...


@dataclasses.dataclass
class Part:
    """What one role would do.

    Attributes:
        plan: its steps, one line each.
        result: what else the role's modules say.
    """

    plan: list[str] = dataclasses.field(default_factory=list)
    changed: bool = False
    result: Json = dataclasses.field(default_factory=dict)

    def add(self, result: Json) -> Json:
        self.changed = self.changed or bool(result["changed"])
        self.plan += result.get("plan") or []
        return result

    def to_dict(self) -> Json:
        return {"changed": self.changed, "plan": self.plan, **self.result}


class Planner:
    """Plans module calls on this host, and keeps their warnings.

    Args:
        normalize: makes complete, checked options of given ones, by a module's argument spec.
    """

    def __init__(self, normalize: t.Callable[[str, Json, Json], Json]) -> None:
        self.normalize = normalize
        self.warnings: list[str] = []

    def __call__(self, module: str, options: Json) -> Json:
        if module in TASKS:
            task = TASKS[module]
            outcome: Outcome = task.work(self.normalize(module, task.ARGUMENT_SPEC, options), True)
        else:
            outcome = {"sriov_vfs": _plan_vfs, "vfio_bind": _plan_binding, "guest_verify": _plan_guest}[module](options)
        self.warnings += [one for one in outcome.warnings if one not in self.warnings]
        plan = outcome.plan
        return {
            **outcome.result,
            "changed": plan is not None and plan.changed,
            "plan": plan.summary() if plan is not None else [],
        }


# -- the roles ---------------------------------------------------------------------------------------------------------


def plan_kernel(call: Caller, wanted: Json) -> Part:
    """The role kernel."""
    part = Part()
    dkms: Json = {"changed": False}
    if wanted["dkms"] == "auto":
        options = {"install_packages": wanted["install_packages"]}
        if wanted["dkms_source"]:
            options["source"] = wanted["dkms_source"]
        dkms = part.add(call("iommufd_dkms", options))
    auto = wanted["iommu_args"] == "auto"
    args = part.add(
        call(
            "kernel_args",
            {
                "args": [] if auto else wanted["iommu_args"],
                "iommu": "auto" if auto else "ignore",
                "passthrough": wanted["iommu_passthrough"],
            },
        )
    )
    part.add(call("kernel_modules", {"names": wanted["modules"], "pending": dkms["changed"]}))
    reasons = [*dkms.get("reboot_reasons", []), *args.get("reboot_reasons", [])]
    part.result = {"reboot_required": bool(reasons), "reboot_reasons": reasons}
    return part


def plan_devices(call: Caller, wanted: Json, pending: bool) -> tuple[Part, list[Json]]:
    """The role devices; and the devices as they would be.

    Args:
        call: plans a module call.
        wanted: the role's options.
        pending: the role kernel has something to do before it.
    """
    part = Part()
    made: Json = {"changed": False}
    common = {"persistent": wanted["persistent"], "force": wanted["force"]}
    if wanted["vfs"]:
        made = part.add(call("sriov_vfs", {"pfs": wanted["vfs"], **common}))
    bound = part.add(
        call(
            "vfio_bind",
            {
                "devices": wanted["list"],
                "include_group": wanted["include_group"],
                "driver": wanted["driver"],
                "require_cdev": wanted["require_cdev"],
                "pending": pending or made["changed"],
                **common,
            },
        )
    )
    return part, bound["devices"]


def decide_mode(mode: str, libvirt: Json | None) -> Json:
    """Who opens the nodes, and why.

    Args:
        mode: as the user wrote it.
        libvirt: what cgroup_acl says about libvirt; None where it was not asked.
    """
    if mode != "auto":
        return {"mode": mode, "reason": "access_mode says so"}
    if libvirt is None or libvirt.get("effective") is None:
        return {"mode": "launcher", "reason": "no libvirt here whose QEMU would have to open the nodes itself"}
    version = libvirt.get("libvirt_version")
    if libvirt.get("passes_descriptors"):
        return {"mode": "launcher", "reason": f"libvirt {version} opens the nodes and passes the descriptors"}
    return {
        "mode": "group",
        "reason": f"with libvirt {version or '(version unknown)'} QEMU opens the nodes itself; 12.1 and later could "
        "pass the descriptors",
    }


def plan_access(call: Caller, wanted: Json, bound: t.Sequence[str] | None, pending: bool) -> Part:
    """The role access, but for its probe.

    Args:
        call: plans a module call.
        wanted: the role's options.
        bound: addresses of the devices that the role devices gives away; None without that role.
        pending: the role kernel has something to do before it.
    """
    part = Part()
    with_libvirt = wanted["libvirt"] != "false"
    look = None
    if wanted["mode"] == "auto" and with_libvirt:
        asked = {"manager": "libvirt", "devices": wanted["devices"], "if_missing": "skip", "if_passed": "skip"}
        look = call("cgroup_acl", asked)
    decision = decide_mode(wanted["mode"], look)
    group = decision["mode"] == "group"
    legacy = ["groups"] if wanted["legacy_groups"] else []
    part.add(
        call(
            "udev_access",
            {
                "nodes": ["iommu", "cdevs", *legacy] if group else [],
                "group": wanted["group"],
                "mode": wanted["mode_bits"],
                "acl_users": wanted["acl_users"],
                "acl_groups": wanted["acl_groups"],
                "state": "present",
            },
        )
    )
    addresses = wanted["addresses"] if wanted["addresses"] is not None else list(bound or [])
    here = False
    if with_libvirt:
        merged = part.add(
            call(
                "cgroup_acl",
                {
                    "manager": "libvirt",
                    "devices": wanted["devices"] + addresses,
                    "if_missing": "fail" if wanted["libvirt"] == "true" else "skip",
                    "state": "present" if group else "absent",
                    "pending": pending,
                },
            )
        )
        here = merged.get("effective") is not None
    if wanted["apparmor"] != "false" and here:
        part.add(
            call(
                "apparmor_access",
                {
                    "nodes": ["iommu", "cdevs", *legacy],
                    "if_missing": "fail" if wanted["apparmor"] == "true" else "skip",
                    "state": "present" if group else "absent",
                },
            )
        )
    launchers: Json = {
        "manager": "systemd",
        "unit": wanted["launcher_units"],
        "exclusive": True,
        "devices": wanted["launcher_devices"],
        "open_file": wanted["launcher_open_file"],
        "state": "present" if wanted["launcher_units"] else "absent",
    }
    if wanted["launcher_memlock"] is not None:
        launchers["limit_memlock"] = wanted["launcher_memlock"]
    part.add(call("cgroup_acl", launchers))
    libvirt = group and here
    units = [unit for unit in wanted["launcher_units"] if unit.endswith(".service")]
    if wanted["launcher_memlock"] is not None:
        units = []
    any_place = bool(libvirt or units or wanted["memlock_users"])
    limits: Json = {
        "libvirt": libvirt,
        "units": units,
        "users": wanted["memlock_users"],
        "state": "present" if wanted["memlock_guests"] and any_place else "absent",
    }
    if wanted["memlock_guests"]:
        limits["guests"] = wanted["memlock_guests"]
    part.add(call("memlock_limits", limits))
    part.result = {"decision": decision, "libvirt": here, "addresses": addresses}
    return part


def probe_access(call: Caller, wanted: Json, part: Part, with_devices: bool) -> bool:
    """The probe at the end of the role access, as far as the role would make it; returns whether anything was tried.

    Raises:
        HostError: a gate that should be open is shut, or the other way round.
    """
    common: Json = {"mode": part.result["decision"]["mode"]}
    if with_devices:
        common["devices"] = part.result["addresses"]
    if wanted["probe_memory"] is not None:
        common["memory"] = wanted["probe_memory"]
    if part.result["libvirt"]:
        call("access_probe", {"manager": "libvirt", **common})
    if wanted["launcher_units"]:
        call("access_probe", {"manager": "systemd", "units": wanted["launcher_units"], **common})
    return bool(part.result["libvirt"] or wanted["launcher_units"])


# -- calls whose options need no argument spec of their own ------------------------------------------------------------


def _plan_vfs(options: Json) -> Outcome:
    request = _sriov_plan.Request(
        pfs=options["pfs"], persistent=options["persistent"], force=options["force"], pending=False
    )
    decision = _sriov_plan.decide(Host(), request)
    return Outcome(decision.plan, {}, warnings=decision.warnings)


def _plan_binding(options: Json) -> Outcome:
    host = Host()
    request = _binding.Request(**options)
    situation = _binding.read_situation(host)
    binding = _binding.decide(host, situation, request)
    return Outcome(
        binding.plan, {"devices": _binding.describe(host, binding, situation.uses)}, warnings=binding.warnings
    )


def _plan_guest(options: Json) -> Outcome:
    host = Host()
    request, missing = _guest.read_request(host, options, check_mode=True)
    ready = _guest.prepare(host, request)
    return Outcome(result={"would": ready.sentence()}, warnings=ready.check_mode_warnings(missing))


# -- what is there of an earlier run -----------------------------------------------------------------------------------


def there(host: Host, call: Caller) -> dict[str, list[str]]:
    """By role, of which of its parts the host bears anything: what their ``state: absent`` would take back."""

    def left(module: str, **options: t.Any) -> bool:
        return bool(call(module, {"state": "absent", **options})["changed"])

    parts = {
        "kernel": {
            "dkms": left("iommufd_dkms"),
            "args": left("kernel_args"),
            "modules": left("kernel_modules"),
        },
        "qemu": {"installed": bool(_qemu_install.read_installed(host, _qemu_install.DIRECTORY).keys)},
        "devices": {
            "boot": bool(_persistence.read_entries(host)),
            "given_away": bool(read_memory(host)),
            "vfs": bool(_sriov_persistence.read_kept(host)),
        },
        "access": {
            "nodes": left("udev_access"),
            "libvirt": left("cgroup_acl", manager="libvirt"),
            "apparmor": left("apparmor_access"),
            "launchers": left("cgroup_acl", manager="systemd"),
            "memlock": left("memlock_limits"),
        },
    }
    return {role: [name for name, found in some.items() if found] for role, some in parts.items()}


@contextlib.contextmanager
def blaming(role: str) -> t.Iterator[None]:
    """Gives an error the name of the role that would have met it."""
    try:
        yield
    except HostError as error:
        error.details.setdefault("role", role)
        raise
