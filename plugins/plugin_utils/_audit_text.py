# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Text and values that hosts supplied, made safe to show. A host that is audited may be hostile or just broken."""

from __future__ import annotations

import typing as t
import unicodedata


def printable(value: object) -> str:
    """A value as text that a terminal, a web page and an XML document can all carry.

    Line ends and tabs stay; every kind of space becomes a plain one; what has no shape of its own becomes U+FFFD:
    control characters (they drive terminals and are illegal in XML), bidirectional overrides (they turn text around),
    lone surrogates (they cannot be encoded).
    """
    text = value if isinstance(value, str) else str(value)
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable() or character in "\n\t":
        return character
    return " " if unicodedata.category(character) == "Zs" else "\N{REPLACEMENT CHARACTER}"


def one_line(value: object) -> str:
    """A value as printable text without line ends."""
    return " ".join(printable(value).split())


def mapping(value: object) -> t.Mapping[str, t.Any]:
    """The value where it is a mapping, else an empty one: a survey may lack any of its parts."""
    return t.cast("t.Mapping[str, t.Any]", value) if isinstance(value, t.Mapping) else {}


def rows(value: object) -> list[t.Mapping[str, t.Any]]:
    """The mappings of a list; what is no list, or no mapping in it, is left out."""
    return [one for one in value if isinstance(one, t.Mapping)] if isinstance(value, (list, tuple)) else []
