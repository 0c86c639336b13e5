# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What a module's function returns."""

from __future__ import annotations

import dataclasses
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan


@dataclasses.dataclass
class Outcome:
    """What is to be done, and what the module says.

    Attributes:
        plan: what is to be done; None for a module that only reads.
        result: the module's own return values, as they are before the plan is applied.
        after: called once the plan has been applied (or when there was nothing to do), not in check mode: verifies
            the host against what was promised and returns values that replace those in ``result``.
    """

    plan: Plan | None = None
    result: dict[str, t.Any] = dataclasses.field(default_factory=dict)
    after: t.Callable[[], dict[str, t.Any]] | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
