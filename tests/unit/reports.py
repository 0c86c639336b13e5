# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Reports for the tests of what renders them."""

from __future__ import annotations

import typing as t

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import Report, build_report
from ansible_collections.iommufd.host.plugins.plugin_utils._readiness import ESSENTIAL

# A busy machine is no reason to fail.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

TIME = "2026-11-22T11:20:00Z"

# What a hostile host might call things: markup, an end of the script, a terminal's escape, characters that XML has no
# place for, text turned around, half a character.
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "\"><img src=x onerror='alert(1)'>",
    "\x1b[2J\x1b]0;owned\x07",
    "nul\x00 bell\x07 del\x7f",
    "\u202egnihtemos",
    "\ud800 half",
    "]]>&amp;&#0;",
    "\u2028line\u2029paragraph\ufffe",
)


def check(name: str, status: str, detail: str = "", remedy: str | None = None) -> dict[str, t.Any]:
    return {"id": name, "status": status, "detail": detail, "remedy": remedy}


def good_checks() -> list[dict[str, t.Any]]:
    return [check(name, "ok", "Fine.") for name in ESSENTIAL]


def device(address: str = "0000:01:00.0", **values: t.Any) -> dict[str, t.Any]:
    usual = {
        "vendor_id": "0x10de",
        "device_id": "0x26b9",
        "class_id": "0x030200",
        "driver": "nvidia",
        "iommu_group": 7,
        "numa_node": 0,
        "sriov": None,
        "in_use": [],
    }
    return {"address": address, **usual, **values}


def report(**results: t.Any) -> Report:
    return build_report(results, TIME, "0.2.0")


def hostile_report() -> Report:
    """Every string that a host supplies, hostile."""
    results: dict[str, t.Any] = {}
    for text in HOSTILE:
        results[text] = {
            "checks": [check(text, "fail", text, text), check(f"a.{text}", text, text, text), *good_checks()],
            "devices": [
                device(
                    text, driver=text, vfio_device=text, reset_methods=[text], in_use=[{"kind": text, "detail": text}]
                )
            ],
            "groups": [{"number": text, "type": text, "others": [text], "vfio": [text], "blocking": [text]}],
            "distribution": {"name": text},
            "kernel": {"release": text, text: [text, {text: text}]},
            text: {text: [text]},
        }
        results[f"lost {text}"] = {"unreachable": True, "msg": text}
        results[f"failed {text}"] = {"failed": True, "msg": text, "module_stderr": text}
    return build_report(results, TIME, "0.2.0")


# Anything that JSON can hold, in the place of anything that a survey has.
_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(HOSTILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def _with_junk(*keys: str) -> st.SearchStrategy[dict[str, t.Any]]:
    return st.fixed_dictionaries({}, optional=dict.fromkeys(keys, _JUNK)) | st.fixed_dictionaries({})


_CHECK = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(ESSENTIAL) | _JUNK,
        "status": st.sampled_from(("ok", "warn", "fail", "skip")) | _JUNK,
        "detail": _JUNK,
        "remedy": _JUNK,
    },
)
_DEVICE = _with_junk(*device(), "vfio_device", "reset_methods")
_GROUP = _with_junk("number", "type", "devices", "others", "blocking", "vfio")
_SURVEY = st.fixed_dictionaries(
    {},
    optional={
        "checks": st.lists(_CHECK | _JUNK, max_size=4) | _JUNK,
        "devices": st.lists(_DEVICE | _JUNK, max_size=3) | _JUNK,
        "groups": st.lists(_GROUP | _JUNK, max_size=3) | _JUNK,
        "distribution": _JUNK,
        "kernel": _JUNK,
        "failed": _JUNK,
        "unreachable": _JUNK,
        "msg": _JUNK,
        "module_stderr": _JUNK,
    },
)
REPORTS = st.dictionaries(st.text(max_size=8) | st.sampled_from(HOSTILE), _SURVEY | _JUNK, max_size=3).map(
    lambda results: build_report(results, TIME, None)
)
