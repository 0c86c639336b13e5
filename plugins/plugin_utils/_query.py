# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The key ``query`` of selectors: JMESPath, which only the controller has."""

from __future__ import annotations

import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._selectors import Device, parse_selectors

try:
    import jmespath
    import jmespath.exceptions
except ImportError:
    jmespath = None

_ACCEPTED = "a JMESPath expression about one device, such as class_id == '0x010802' && numa_node == `0`"


def compile_query(option: str, expression: str) -> t.Callable[[Device], bool]:
    """What tells whether a device matches an expression: it does when the result is true in JMESPath's sense.

    Args:
        option: the option's name, for messages.
        expression: in JMESPath.

    Raises:
        OptionError: the expression is malformed; the function returned raises it where it cannot be evaluated.
        HostError: the controller has no jmespath.
    """
    if jmespath is None:
        raise HostError(f"{option} needs the Python library jmespath on the controller.")
    try:
        compiled = jmespath.compile(expression)
    except jmespath.exceptions.JMESPathError as error:
        raise OptionError(option, expression, _ACCEPTED, _words(error)) from None

    def matches(device: Device) -> bool:
        try:
            result = compiled.search(device)
        except jmespath.exceptions.JMESPathError as error:
            hint = "null where a device has no such thing; write driver && starts_with(driver, 'x')"
            raise OptionError(
                option, expression, f"{_ACCEPTED} ({hint})", f"{device['address']}: {_words(error)}"
            ) from None
        # JMESPath: false, null, and whatever is empty are false; 0 is not.
        return not (result is None or result is False or (hasattr(result, "__len__") and len(result) == 0))

    return matches


def _words(error: Exception) -> str:
    """The first line of what jmespath says; it draws a picture of the place below."""
    return str(error).partition("\n")[0].rstrip(":")


def has_query(selectors: object) -> bool:
    """Whether a list of selectors holds a query that is still to be evaluated."""
    return isinstance(selectors, list) and any(isinstance(one, dict) and "query" in one for one in selectors)


def answer_queries(option: str, selectors: t.Sequence[t.Any], devices: t.Sequence[Device]) -> list[t.Any]:
    """Selectors whose queries are replaced by the addresses that match them, as a module on the host takes them.

    Raises:
        OptionError: a selector is malformed, or its query cannot be evaluated.
    """
    parse_selectors(option, list(selectors), compile_query)
    answered = []
    for number, selector in enumerate(selectors):
        if isinstance(selector, dict) and "query" in selector:
            matches = compile_query(f"{option}[{number}].query", selector["query"])
            found = [device["address"] for device in devices if matches(device)]
            selector = {**selector, "query": {"expression": selector["query"], "addresses": found}}
        answered.append(selector)
    return answered
