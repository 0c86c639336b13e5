# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The survey of a host as the controller keeps it for a fleet: compressed, and unpacked when it is looked at.

As a dict a survey takes some hundred KiB, and Ansible's own marks on each string double that; packed it takes ten.
"""

from __future__ import annotations

import base64
import functools
import json
import typing as t
import zlib

# Bytes. A host that answers with little must not fill the controller's memory.
_LIMIT = 64 << 20


class PackedSurvey(t.Mapping[str, t.Any]):
    """A survey that :mod:`iommufd_info` packed, to be read like any other.

    Args:
        packed: its text.

    Raises:
        ValueError: it is not one.
    """

    def __init__(self, packed: str) -> None:
        self._packed = str(packed)
        _unpack(self._packed)

    def __getitem__(self, key: str) -> t.Any:
        return _unpack(self._packed)[key]

    def __iter__(self) -> t.Iterator[str]:
        return iter(_unpack(self._packed))

    def __len__(self) -> int:
        return len(_unpack(self._packed))


# Reports go from host to host, and look at each more than once.
@functools.lru_cache(maxsize=2)
def _unpack(packed: str) -> dict[str, t.Any]:
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(base64.b64decode(packed, validate=True), _LIMIT)
        if not unpacker.eof:
            raise ValueError("cut off, or too large")
        found = json.loads(text)
    except (zlib.error, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(found, dict):
        raise ValueError("no survey")
    return found
