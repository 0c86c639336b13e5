# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""RELAX NG by libxml2, whose shared library nearly every Linux has; there is no validator in Python's own library."""

from __future__ import annotations

import ctypes
import ctypes.util
import pathlib


class _Error(ctypes.Structure):
    """The beginning of struct xmlError."""

    _fields_ = [("domain", ctypes.c_int), ("code", ctypes.c_int), ("message", ctypes.c_char_p)]


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(_Error))


class Schema:
    """A schema.

    Args:
        path: its file; what it includes is found beside it.
    """

    def __init__(self, path: pathlib.Path) -> None:
        name = ctypes.util.find_library("xml2")
        if name is None:
            raise AssertionError("there is no libxml2 to validate with (Debian: libxml2, newer ones libxml2-16)")
        self._library = library = ctypes.CDLL(name)
        for function in (
            library.xmlRelaxNGNewParserCtxt, library.xmlRelaxNGParse, library.xmlRelaxNGNewValidCtxt,
            library.xmlReadMemory,
        ):  # fmt: skip
            function.restype = ctypes.c_void_p
        self._errors: list[str] = []
        self._handler = _Handler(lambda _data, error: self._errors.append((error[0].message or b"").decode().strip()))
        context = ctypes.c_void_p(library.xmlRelaxNGNewParserCtxt(str(path).encode()))
        library.xmlRelaxNGSetParserStructuredErrors(context, self._handler, None)
        schema = library.xmlRelaxNGParse(context)
        library.xmlRelaxNGFreeParserCtxt(context)
        assert schema, f"{path}: {self._errors}"
        self._schema = ctypes.c_void_p(schema)

    def errors(self, text: str) -> list[str]:
        """What is wrong with a document; empty where it is valid."""
        self._errors.clear()
        data = text.encode()
        # 32 and 64: XML_PARSE_NOERROR and XML_PARSE_NOWARNING, which would write to the terminal.
        document = self._library.xmlReadMemory(data, len(data), b"document.xml", None, 96)
        if not document:
            return ["not well-formed"]
        document = ctypes.c_void_p(document)
        context = ctypes.c_void_p(self._library.xmlRelaxNGNewValidCtxt(self._schema))
        self._library.xmlRelaxNGSetValidStructuredErrors(context, self._handler, None)
        status = self._library.xmlRelaxNGValidateDoc(context, document)
        self._library.xmlRelaxNGFreeValidCtxt(context)
        self._library.xmlFreeDoc(document)
        return list(self._errors) or ([f"status {status}"] if status else [])
