# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import datetime

import pytest

from ansible_collections.iommufd.host.plugins.plugin_utils._window import in_zone, is_open

# 2026-11-23 is a Monday.
DAYS = {name: 23 + index for index, name in enumerate(("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"))}


def at(text: str) -> datetime.datetime:
    day, clock = text.split()
    hour, minute = clock.split(":")
    return datetime.datetime(2026, 11, DAYS[day], int(hour), int(minute), tzinfo=datetime.timezone.utc)


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("", ["Mon 00:00", "Sun 23:59"], []),
        ("22:00-05:00", ["Mon 22:00", "Tue 04:59", "Sun 23:00", "Mon 00:00"], ["Mon 21:59", "Tue 05:00"]),
        ("Mon-Fri 22:00-05:00", ["Fri 22:00", "Sat 04:59"], ["Sat 22:00", "Mon 04:00", "Sun 23:00"]),
        ("Sun 22:00-02:00", ["Sun 23:59", "Mon 01:59"], ["Mon 02:00", "Sat 23:00"]),
        ("Sat,Sun 00:00-24:00", ["Sat 00:00", "Sun 23:59"], ["Fri 23:59", "Mon 00:00"]),
        ("Fri-Mon 01:00-02:00", ["Fri 01:30", "Sun 01:30", "Mon 01:30"], ["Tue 01:30", "Thu 01:30"]),
        ("Mon 01:00-02:00; Tue 03:00-04:00", ["Mon 01:00", "Tue 03:00"], ["Mon 03:00", "Tue 01:00"]),
        ("Mon-Fri 22:00-05:00, Sat 00:00-24:00", ["Sat 12:00", "Mon 23:00"], ["Sun 12:00"]),
        ("mon 01:00-02:00", ["Mon 01:30"], ["Sun 01:30"]),
    ],
)
def test_windows(window: str, inside: list[str], outside: list[str]) -> None:
    assert [one for one in inside if not is_open(window, at(one))] == []
    assert [one for one in outside if is_open(window, at(one))] == []


@pytest.mark.parametrize(
    "window",
    ["soon", "22:00", "22:00-25:00", "22:60-23:00", "Mun 01:00-02:00", "01:00-01:00", "24:00-01:00", "1:00-2:00"],
)
def test_what_is_none_is_refused(window: str) -> None:
    with pytest.raises(ValueError):
        is_open(window, at("Mon 00:00"))


def test_a_day_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"^Mun$"):
        is_open("Mun 01:00-02:00", at("Mon 00:00"))


def test_the_zone_decides_which_day_it_is() -> None:
    moment = in_zone(at("Mon 23:30"), "Asia/Tokyo")
    assert is_open("Tue 08:00-09:00", moment)
    with pytest.raises(ValueError):
        in_zone(moment, "Nowhere/At")
