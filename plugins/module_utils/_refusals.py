# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What speaks against a call."""

from __future__ import annotations

import dataclasses
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import Refusal
from ansible_collections.iommufd.host.plugins.module_utils._pci import LOCK_SECONDS, Function
from ansible_collections.iommufd.host.plugins.module_utils._usage import Use


@dataclasses.dataclass
class Refusals:
    """What speaks against a call, collected so that all of it is said at once."""

    found: list[dict[str, t.Any]] = dataclasses.field(default_factory=list)

    def add(self, reason: str, address: str | None = None, uses: t.Sequence[Use] = ()) -> None:
        if all(one["reason"] != reason for one in self.found):
            self.found.append({"address": address, "reason": reason, "uses": [use.to_dict() for use in uses]})

    def speak(self, hint: str) -> None:
        if not self.found:
            return
        reasons = " ".join(one["reason"][0].upper() + one["reason"][1:] + "." for one in self.found)
        raise Refusal(f"Refused, and nothing has been changed. {reasons}{hint}", refusals=self.found)


def refuse_locked(refusals: Refusals, function: Function) -> bool:
    """Add that nobody can move a function, or change the number of its VFs, now; returns whether that is so."""
    if function.locked:
        refusals.add(
            f"the kernel has been holding the lock of {function.address} for more than {LOCK_SECONDS:g} s: a driver is "
            f"taking or leaving it and does not come to an end (it has {function.driver or 'no driver'} now)",
            function.address,
        )
    return function.locked
