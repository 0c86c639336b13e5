# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the actions that write reports on the controller have in common."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
import typing as t

import yaml

_COLLECTION = pathlib.Path(__file__).parents[2]


def collection_version() -> str | None:
    """The version of this collection: installed, or in its checkout."""
    try:
        return str(json.loads((_COLLECTION / "MANIFEST.json").read_text("utf-8"))["collection_info"]["version"])
    except (OSError, ValueError, KeyError):
        pass
    try:
        return str(yaml.safe_load((_COLLECTION / "galaxy.yml").read_text("utf-8"))["version"])
    except (OSError, yaml.YAMLError, KeyError):
        return None


def write_file(path: str, pieces: t.Iterable[str]) -> None:
    """Write a file whole or not at all, with the mode that the umask leaves."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            for piece in pieces:
                file.write(piece)
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
