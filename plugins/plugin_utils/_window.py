# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Maintenance windows: the times of a week in which a host may be started."""

from __future__ import annotations

import datetime
import re
import typing as t
import zoneinfo

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_DAY = 24 * 60
_WEEK = 7 * _DAY

ACCEPTED = 'times such as "22:00-05:00", "Mon-Fri 22:00-05:00" or "Sat,Sun 00:00-24:00", several with "; " between them'

_SPAN = re.compile(r"(?:(?P<days>[A-Za-z]{3}(?:[-,][A-Za-z]{3})*) +)?(?P<from>\d\d:\d\d)-(?P<to>\d\d:\d\d)")


def parse(text: str) -> list[tuple[int, int]]:
    """The spans of a week, in minutes since Monday 00:00; the end may lie behind the week's.

    Raises:
        ValueError: it is none.
    """
    spans: list[tuple[int, int]] = []
    for part in filter(None, (one.strip() for one in re.split(r"; *|(?<=\d), +", text))):
        found = _SPAN.fullmatch(part)
        if found is None:
            raise ValueError(part)
        begin, end = _minutes(found["from"]), _minutes(found["to"])
        if begin in (_DAY, end):
            raise ValueError(part)
        length = (end - begin) % _DAY or _DAY
        spans += [(day * _DAY + begin, day * _DAY + begin + length) for day in _days(found["days"])]
    return spans


def is_open(text: str, moment: datetime.datetime) -> bool:
    """Whether a moment lies in a window; always in an empty one.

    Raises:
        ValueError: it is none.
    """
    spans = parse(text)
    minute = moment.weekday() * _DAY + moment.hour * 60 + moment.minute
    return not spans or any(begin <= at < end for begin, end in spans for at in (minute, minute + _WEEK))


def in_zone(moment: datetime.datetime, zone: str) -> datetime.datetime:
    """A moment in a time zone; an empty one is that of the controller.

    Raises:
        ValueError: there is no such zone.
    """
    if not zone:
        return moment.astimezone()
    try:
        return moment.astimezone(zoneinfo.ZoneInfo(zone))
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(zone) from None


def _minutes(text: str) -> int:
    hour, minute = (int(part) for part in text.split(":"))
    if minute > 59 or hour * 60 + minute > _DAY:
        raise ValueError(text)
    return hour * 60 + minute


def _days(text: str | None) -> t.Iterator[int]:
    if text is None:
        yield from range(7)
        return
    for part in text.split(","):
        first, _dash, last = part.partition("-")
        begin, end = _number(first), _number(last or first)
        yield from (day % 7 for day in range(begin, begin + (end - begin) % 7 + 1))


def _number(name: str) -> int:
    if name.capitalize() not in _DAYS:
        raise ValueError(name)
    return _DAYS.index(name.capitalize())
