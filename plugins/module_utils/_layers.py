# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What stands on what: disks and networks are made in layers."""

from __future__ import annotations

import collections
import typing as t


def chains(above: t.Mapping[str, t.Collection[str]], name: str) -> t.Iterator[list[str]]:
    """Everything that stands on one, with the way to it: ["sda"], ["sda", "sda2"], ["sda", "sda2", "md0"], …

    Args:
        above: each name to those of the next layer.
        name: where to begin.

    Yields:
        Each once, by the shortest way.
    """
    seen = {name}
    todo = collections.deque([[name]])
    while todo:
        chain = todo.popleft()
        yield chain
        for upper in sorted(above.get(chain[-1], ())):
            if upper not in seen:
                seen.add(upper)
                todo.append([*chain, upper])
