# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Two records of ours on the host, neither of which says what the host is like.

``applied.json`` is what the roles were last asked for, when all of them had been carried out: what a rollout that fails
goes back to. Beside it stands what a guest was verified with, which saves booting the same guest again. ``before.json``
is there only while a host is being changed by a rollout, see :mod:`_snapshot`.

They are read as hints and checked against the host: without them, or with wrong ones, a run does more, not less.
"""

from __future__ import annotations

import contextlib
import json
import os
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._files import OWN_MARK
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import RemoveFile, Step, WriteFile

Json = dict[str, t.Any]

DIRECTORY = "/var/lib/iommufd-host"
APPLIED = f"{DIRECTORY}/applied.json"
BEFORE = f"{DIRECTORY}/before.json"

FORMAT = 1

# A record of a rollout holds the digests of some ten thousand files.
_LIMIT = 64 << 20

# Options of roles that leave no trace on a host: how it is tried, and how long that may take.
_PASSING = {"access": ("probe", "probe_memory"), "verify": ("timeout",)}


def read_record(host: Host, path: str) -> Json:
    """A record; empty where there is none that can be understood."""
    content = host.read_bytes(path, _LIMIT)
    with contextlib.suppress(ValueError):
        found = json.loads(content or b"null")
        if isinstance(found, dict) and found.get("format") == FORMAT and found.get("by") == OWN_MARK:
            return found
    return {}


def covers(noted: Json | None, wanted: Json) -> bool:
    """Whether a host was asked for this already.

    Args:
        noted: the options of each role in the record; None where there is none.
        wanted: those of now, of the roles that count.
    """
    return noted is not None and all(
        _lasting(role, options) == _lasting(role, noted.get(role)) for role, options in wanted.items()
    )


def _lasting(role: str, options: Json | None) -> Json | None:
    return options and {name: value for name, value in options.items() if name not in _PASSING.get(role, ())}


def write_record(host: Host, path: str, record: Json) -> list[Step]:
    """The step that writes a record; none where it is there as it shall be."""
    whole = {"format": FORMAT, "by": OWN_MARK, **record}
    content = (json.dumps(whole, indent=1, sort_keys=True) + "\n").encode()
    if host.read_bytes(path, _LIMIT) == content:
        return []
    # No diff: the wishes are the user's own variables, and a record of a host is long.
    return [WriteFile(f"write {path}", path=host.path(path), content=content, mode=0o600, enforce_mode=True)]


def remove_record(host: Host, path: str) -> list[Step]:
    """The step that removes a record, and its directory with the last one; none where there is none."""
    if host.stat(path, follow=False) is None:
        return []
    real = host.path(path)
    return [RemoveFile(f"remove {path}", path=real, prune=[os.path.dirname(real)])]
