# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The errors that end a module, each one sentence for a person plus data for a machine."""

from __future__ import annotations

import typing as t


class HostError(Exception):
    """Something on the host prevents what was asked for.

    Args:
        message: one clear sentence or two; names the thing, the reason and, where there is one, the remedy.
        details: data for the module's result, beside ``msg`` (for example ``refusals`` or ``log``).
    """

    def __init__(self, message: str, **details: t.Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class Refusal(HostError):
    """What was asked for is possible but unsafe; nothing has been changed."""


class OptionError(HostError):
    """A module option has a value that cannot be accepted.

    Args:
        option: the option's name as the user wrote it, with the index for a list (``devices[1].address``).
        value: the value that was given.
        accepted: what would be accepted, in words ("a PCI address such as 0000:02:00.0").
        reason: why the value is not acceptable, where that is not obvious.
    """

    def __init__(self, option: str, value: object, accepted: str, reason: str = "") -> None:
        because = f": {reason}" if reason else ""
        super().__init__(f"{option}: {value!r} is not accepted{because}. Accepted: {accepted}.", option=option)
        self.option = option
        self.value = value
