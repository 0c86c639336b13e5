#!/usr/bin/python
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: host_plan
short_description: Tell in one call what all roles would do on a host
version_added: 0.2.0
description:
  - Makes the plan of every role of C(site.yml) on the host, in one round trip, and changes nothing.
  - The modules' own planners make it, each with the options that its role would give it. A host on which none of them
    has anything to do has converged. No record of an earlier run decides that, so whatever has drifted is seen.
  - What a role would refuse (a device in use, a misspelt group, a missing package) is refused here with the same words,
    while the host is untouched.
  - Where nothing is to be done, the access is tried as the role C(iommufd.host.access) tries it at its end.
extends_documentation_fragment:
  - iommufd.host._attributes
  - iommufd.host._attributes.actiongroup
  - iommufd.host._attributes.reads
  - iommufd.host._attributes.selecting
  - iommufd.host._guest.verify
options:
  kernel:
    description: Options of the role C(iommufd.host.kernel) without their prefix. Without them that role is left out.
    type: dict
    suboptions:
      iommu_args:
        description: C(kernel_iommu_args).
        type: raw
        default: auto
      iommu_passthrough:
        description: C(kernel_iommu_passthrough).
        type: bool
        default: false
      dkms:
        description: C(kernel_dkms).
        type: str
        choices: [auto, never]
        default: auto
      dkms_source:
        description: C(kernel_dkms_source).
        type: str
        default: ""
      install_packages:
        description: C(kernel_install_packages).
        type: bool
        default: true
      modules:
        description: C(kernel_modules).
        type: list
        elements: str
        default: [iommufd, vfio-pci]
  qemu:
    description:
      - Options of the role C(iommufd.host.qemu) without their prefix, as they are. Its plan needs the builder and is
        not made here. With a C(source) the QEMU that is on the host is not judged.
    type: dict
    default: {}
  devices:
    description: Options of the role C(iommufd.host.devices) without their prefix. Without them that role is left out.
    type: dict
    suboptions:
      list:
        description: C(devices_list).
        type: list
        elements: raw
        default: []
      vfs:
        description: C(devices_vfs).
        type: list
        elements: dict
        default: []
      persistent:
        description: C(devices_persistent).
        type: bool
        default: true
      force:
        description: C(devices_force).
        type: bool
        default: false
      include_group:
        description: C(devices_include_group).
        type: bool
        default: false
      driver:
        description: C(devices_driver).
        type: str
        default: vfio-pci
      require_cdev:
        description: C(devices_require_cdev).
        type: bool
        default: true
  access:
    description: Options of the role C(iommufd.host.access) without their prefix. Without them that role is left out.
    type: dict
    suboptions:
      mode:
        description: C(access_mode).
        type: str
        choices: [auto, launcher, group]
        default: auto
      group:
        description: C(access_group).
        type: str
        default: kvm
      mode_bits:
        description: C(access_mode_bits).
        type: str
        default: "0660"
      legacy_groups:
        description: C(access_legacy_groups).
        type: bool
        default: false
      acl_users:
        description: C(access_acl_users).
        type: list
        elements: str
        default: []
      acl_groups:
        description: C(access_acl_groups).
        type: list
        elements: str
        default: []
      libvirt:
        description: C(access_libvirt).
        type: str
        choices: [auto, "true", "false"]
        default: auto
      devices:
        description: C(access_devices).
        type: list
        elements: str
        default: [/dev/iommu]
      addresses:
        description: C(access_addresses). Without it, those of the devices in O(devices).
        type: list
        elements: str
      apparmor:
        description: C(access_apparmor).
        type: str
        choices: [auto, "true", "false"]
        default: auto
      launcher_units:
        description: C(access_launcher_units).
        type: list
        elements: str
        default: []
      launcher_devices:
        description: C(access_launcher_devices).
        type: list
        elements: str
        default: [/dev/kvm, /dev/iommu, char-vfio-dev]
      launcher_open_file:
        description: C(access_launcher_open_file).
        type: list
        elements: str
        default: []
      launcher_memlock:
        description: C(access_launcher_memlock).
        type: str
      memlock_guests:
        description: C(access_memlock_guests).
        type: list
        elements: raw
        default: []
      memlock_users:
        description: C(access_memlock_users).
        type: list
        elements: str
        default: []
      probe:
        description: C(access_probe).
        type: bool
        default: true
      probe_memory:
        description: C(access_probe_memory).
        type: str
  verify:
    description: Options of the role C(iommufd.host.verify) without their prefix. Without them that role is left out.
    type: dict
  roles:
    description:
      - Plan these roles alone. What is asked of the others counts for nothing, but that the role C(iommufd.host.access)
        takes the devices from O(devices).
    type: list
    elements: str
    choices: [kernel, qemu, devices, access, verify]
    default: [kernel, qemu, devices, access, verify]
  look_back:
    description:
      - Tell as well what an earlier run has left on the host, role by role, and what the roles were asked for then.
      - A rollout needs it to put a host back.
    type: bool
    default: false
  survey:
    description:
      - Return the survey of M(iommufd.host.iommufd_info) as well, so that it needs no round trip of its own. It comes
        as with O(iommufd.host.iommufd_info#module:packed=true).
    type: bool
    default: false
seealso:
  - module: iommufd.host.host_record
  - module: iommufd.host.iommufd_info
author:
  - The iommufd.host authors (@iommufd)
"""

EXAMPLES = r"""
- name: See what would be done for two devices
  iommufd.host.host_plan:
    kernel: {}
    devices:
      list: ["0000:01:00.0", "0000:03:00.0"]
    access: {}
  register: plan

- name: Show it
  ansible.builtin.debug:
    msg: "{{ plan.roles | dict2items | map(attribute='value.plan') | flatten }}"
"""

RETURN = r"""
converged:
  description: Whether none of the roles has anything to do.
  returned: success
  type: bool
  sample: true
recorded:
  description:
    - Whether M(iommufd.host.host_record) has noted these options of the planned roles.
    - How a host is tried, and how long that may take, does not count.
  returned: success
  type: bool
  sample: true
devices:
  description:
    - The devices of O(devices) as they would be, as M(iommufd.host.vfio_bind) returns them.
    - Null where neither the role C(iommufd.host.devices) nor C(iommufd.host.access) is planned.
  returned: success
  type: list
  elements: dict
  sample: [{address: "0000:01:00.0", from_driver: nvme, to_driver: vfio-pci}]
roles:
  description:
    - For each role that was asked about, C(changed) and C(plan), the steps as one line each.
    - C(kernel) has C(reboot_required) and C(reboot_reasons), C(access) the
      C(decision) about the mode and whether the gates were tried (C(probed)), and C(verify) whether a guest has to be
      booted (C(needed)), why or why not (C(reason)), and what would be done (C(would)).
  returned: success
  type: dict
  sample:
    kernel: {changed: false, plan: [], reboot_required: false, reboot_reasons: []}
    devices: {changed: false, plan: []}
    access:
      changed: false
      plan: []
      decision: {mode: launcher, reason: no libvirt here whose QEMU would have to open the nodes itself}
      probed: false
    verify: {changed: false, plan: [], needed: true, reason: "verify_when: always", would: null}
planned:
  description: Those of O(roles) that were asked about.
  returned: success
  type: list
  elements: str
  sample: [kernel, qemu, devices, access, verify]
wanted:
  description: The options, complete, as M(iommufd.host.host_record) takes them.
  returned: success
  type: dict
  sample: {}
back:
  description:
    - With O(look_back=true), what is on the host of an earlier run.
    - C(there) has of each role the parts that the host bears anything of, C(applied) what the roles were asked for then
      (null where that is not known), C(qemu) the key of the QEMU in use, and C(unfinished) whether a rollout has not
      finished with this host.
  returned: with O(look_back=true)
  type: dict
  sample:
    there: {kernel: [dkms], qemu: [], devices: [], access: []}
    applied: null
    qemu: null
    unfinished: false
role:
  description: The role that would have failed.
  returned: on failure
  type: str
  sample: devices
survey:
  description: What M(iommufd.host.iommufd_info) returns, packed.
  returned: with O(survey=true), also on failure
  type: dict
  sample: {checks: [], packed: eJyrVsrJLEtVslIoKSpNrQUAJFYFBw==}
"""

import time
import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iommufd.host.plugins.module_utils import _fingerprint, _qemu_install, _records, _site
from ansible_collections.iommufd.host.plugins.module_utils._ansible import Outcome, normalize, run_module
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._given_away import find_devices
from ansible_collections.iommufd.host.plugins.module_utils._guest import GUEST_OPTIONS
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._survey import pack, survey
from ansible_collections.iommufd.host.plugins.module_utils._vfio import settle

Json = dict[str, t.Any]


def _option(kind: str, default: object = None, **more: t.Any) -> Json:
    return {"type": kind, **({} if default is None else {"default": default}), **more}


ARGUMENT_SPEC: dict[str, Json] = {
    "kernel": {
        "type": "dict",
        "options": {
            "iommu_args": _option("raw", "auto"),
            "iommu_passthrough": _option("bool", False),
            "dkms": _option("str", "auto", choices=["auto", "never"]),
            "dkms_source": _option("str", ""),
            "install_packages": _option("bool", True),
            "modules": _option("list", ["iommufd", "vfio-pci"], elements="str"),
        },
    },
    "qemu": _option("dict", {}),
    "devices": {
        "type": "dict",
        "options": {
            "list": _option("list", [], elements="raw"),
            "vfs": _option("list", [], elements="dict"),
            "persistent": _option("bool", True),
            "force": _option("bool", False),
            "include_group": _option("bool", False),
            "driver": _option("str", "vfio-pci"),
            "require_cdev": _option("bool", True),
        },
    },
    "access": {
        "type": "dict",
        "options": {
            "mode": _option("str", "auto", choices=["auto", "launcher", "group"]),
            "group": _option("str", "kvm"),
            "mode_bits": _option("str", "0660"),
            "legacy_groups": _option("bool", False),
            "acl_users": _option("list", [], elements="str"),
            "acl_groups": _option("list", [], elements="str"),
            "libvirt": _option("str", "auto", choices=["auto", "true", "false"]),
            "devices": _option("list", ["/dev/iommu"], elements="str"),
            "addresses": _option("list", elements="str"),
            "apparmor": _option("str", "auto", choices=["auto", "true", "false"]),
            "launcher_units": _option("list", [], elements="str"),
            "launcher_devices": _option("list", ["/dev/kvm", "/dev/iommu", "char-vfio-dev"], elements="str"),
            "launcher_open_file": _option("list", [], elements="str"),
            "launcher_memlock": _option("str"),
            "memlock_guests": _option("list", [], elements="raw"),
            "memlock_users": _option("list", [], elements="str"),
            "probe": _option("bool", True),
            "probe_memory": _option("str"),
        },
    },
    "verify": {
        "type": "dict",
        "options": {
            "devices": _option("list", [], elements="raw"),
            "enabled": _option("bool", True),
            "when": _option("str", "always", choices=["always", "changed"]),
            "max_age": _option("int", 7),
            **GUEST_OPTIONS,
        },
    },
    "roles": _option("list", list(_site.ROLES), elements="str", choices=list(_site.ROLES)),
    "look_back": _option("bool", False),
    "survey": _option("bool", False),
}


def work(module: AnsibleModule) -> Outcome:
    params = module.params
    host = Host()
    settle(host)
    seen = {"survey": pack(survey(host))} if params["survey"] else {}
    planner = _site.Planner(normalize)
    try:
        result = _plan(host, planner, params)
    except HostError as error:
        error.details.update(seen)
        raise
    return Outcome(result={**result, **seen}, warnings=planner.warnings)


def _plan(host: Host, planner: _site.Planner, params: Json) -> Json:
    wanted = {role: params[role] for role in _site.ROLES}
    planned = [role for role in _site.ROLES if role in params["roles"] and wanted[role] is not None]
    if wanted["verify"] is not None:  # when to verify is no property of the host
        wanted["verify"] = {name: value for name, value in wanted["verify"].items() if name not in ("when", "max_age")}
    record = _records.read_record(host, _records.APPLIED)
    back = _look_back(host, planner, record) if params["look_back"] else {}
    roles: dict[str, _site.Part] = {}
    with _site.blaming("kernel"):
        if "kernel" in planned:
            roles["kernel"] = _site.plan_kernel(planner, wanted["kernel"])
    kernel = roles.get("kernel", _site.Part())
    pending = kernel.changed or bool(kernel.result.get("reboot_required"))
    devices: list[Json] | None = None
    with _site.blaming("devices"):
        # The access is for the devices, also where the role that binds them is not asked about.
        if wanted["devices"] is not None and not {"devices", "access"}.isdisjoint(planned):
            part, devices = _site.plan_devices(planner, wanted["devices"], pending)
            if "devices" in planned:
                roles["devices"] = part
    with _site.blaming("access"):
        if "access" in planned:
            given = None if devices is None else [one["address"] for one in devices if one["to_driver"]]
            roles["access"] = _site.plan_access(planner, wanted["access"], given, pending)
    converged = not pending and not any(part.changed for part in roles.values())
    with _site.blaming("access"):
        if "access" in planned:
            tried = converged and wanted["access"]["probe"]
            probed = tried and _site.probe_access(planner, wanted["access"], roles["access"], devices is not None)
            roles["access"].result["probed"] = probed
    with _site.blaming("verify"):
        if "verify" in planned and wanted["verify"]["enabled"]:
            changed = "devices" in roles and roles["devices"].changed
            roles["verify"] = _plan_guest(host, planner, params, record, converged, pending or changed)
    return {
        "converged": converged,
        "recorded": _records.covers(record.get("wanted"), {role: wanted[role] for role in planned}),
        "devices": devices,
        "roles": {role: part.to_dict() for role, part in roles.items()},
        "planned": planned,
        "wanted": wanted,
        **back,
    }


def _plan_guest(
    host: Host, planner: _site.Planner, params: Json, record: Json, converged: bool, pending: bool
) -> _site.Part:
    options = params["verify"]
    needed, reason = True, "something is to be changed before it"
    if converged:
        needed, reason = judge_guest(host, options, record.get("verified"), time.time())
    would = None
    if needed:
        asked = {**options, "pending": pending, "qemu_pending": bool(params["qemu"].get("source"))}
        would = planner("guest_verify", asked)["would"]
    return _site.Part(result={"needed": needed, "reason": reason, "would": would})


def judge_guest(host: Host, options: Json, verified: Json | None, now: float) -> tuple[bool, str]:
    """Whether a guest has to be booted on a host that has converged, and why or why not."""
    if options["when"] == "always":
        return True, "verify_when: always"
    if not verified:
        return True, "no guest has been verified on this host so far"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(verified["at"]))
    addresses = [one.address for one in find_devices(host, "verify.devices", options["devices"]).chosen]
    others = _fingerprint.differences(verified["parts"], _fingerprint.read_parts(host, options, addresses))
    if others:
        return True, f"since a guest was verified at {when}: {'; '.join(others)}"
    # A clock that was set back must not keep a verification young.
    if not 0 <= now - verified["at"] <= options["max_age"] * 86400:
        return True, f"a guest was verified at {when}, longer ago than verify_max_age: {options['max_age']} days"
    return False, (
        f"a guest was verified at {when}, and since then neither devices, drivers, groups, kernel, QEMU nor its "
        "libraries have changed, and the host was not rebooted"
    )


def _look_back(host: Host, planner: _site.Planner, record: Json) -> Json:
    return {
        "back": {
            "there": _site.there(host, planner),
            "applied": record.get("wanted"),
            "qemu": _qemu_install.read_installed(host, _qemu_install.DIRECTORY).current,
            "unfinished": host.exists(_records.BEFORE),
        }
    }


def main() -> None:
    # No lock: nothing is changed.
    run_module(AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True), work, lock=False)


if __name__ == "__main__":
    main()
