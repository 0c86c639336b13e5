# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Growth with size as a small SVG: a panel for each series, with our figures and those they are compared with.

There is no background, and every colour can be read on a light and on a dark one; the two lines differ in dash and
mark, too. A straight line is told from a bent one in a panel of either kind:

- both axes logarithmic, where a figure grows threefold or more: what is proportional to the size has the slope of the
  dotted line;
- both linear and from zero, else: what is proportional to the size is on the dotted line, what is constant is level.
"""

from __future__ import annotations

import dataclasses
import math
import typing as t
from xml.sax.saxutils import escape

OURS, OTHER, INK = "#2a7de1", "#c2660a", "#787878"

WIDTH, HEIGHT = 480, 330
# The place of the panel's axes, and what is around it.
LEFT, RIGHT, TOP, BOTTOM = 64, 28, 58, 64
COLUMNS = 2
# From here on a figure is shown on logarithmic axes.
MANIFOLD = 3.0

_GUIDE = 'stroke-dasharray="2 3" stroke-width="1.5"'


@dataclasses.dataclass(frozen=True)
class Point:
    """One size of a series, with both figures."""

    size: float
    ours: float
    other: float


@dataclasses.dataclass(frozen=True)
class Series:
    """One panel.

    Attributes:
        name: its title.
        counts: what the size is a number of.
        unit: of the figures.
        against: what our figures are compared with.
        points: sorted by size, two or more.
    """

    name: str
    counts: str
    unit: str
    against: str
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class Axis:
    """From values to places; ``start`` and ``end`` may be in either order."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round values from ``low`` to ``high``; on a logarithmic axis powers of ten, and what is between them if few."""
    if not logarithmic:
        step = 10.0 ** math.floor(math.log10(high - low))
        step = next(step * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if (high - low) / (step * part) <= 6)
        return [step * number for number in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
        every = [step * 10.0**power for power in powers for step in steps]
        found = [value for value in every if low <= value <= high]
        if len(found) >= 3:
            break
    return found[:: math.ceil(len(found) / 8)]


def axes(series: Series) -> tuple[Axis, Axis]:
    """The axis of sizes and that of figures."""
    figures = [value for point in series.points for value in (point.ours, point.other)]
    sizes = [point.size for point in series.points]
    bottom, right, top = HEIGHT - BOTTOM, WIDTH - RIGHT, TOP
    if min(*figures, *sizes) > 0 and max(figures) >= MANIFOLD * min(figures):
        side, above = (sizes[-1] / sizes[0]) ** 0.06, (max(figures) / min(figures)) ** 0.1
        across = Axis(sizes[0] / side, sizes[-1] * side, LEFT, right, True)
        return across, Axis(min(figures) / above, max(figures) * above, bottom, top, True)
    return Axis(0, sizes[-1] * 1.06, LEFT, right, False), Axis(0, (max(figures) or 1) * 1.1, bottom, top, False)


def number(value: float) -> str:
    """As a person writes it: three digits, thousands apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str = "middle", size: int = 12, colour: str = INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )


def _rule(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{INK}" {style}/>'


def _mark(x: float, y: float, ours: bool, says: str) -> str:
    title = f"<title>{escape(says)}</title>"
    if ours:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{OURS}">{title}</circle>'
    # Its inside takes the pointer, too, although one sees through it.
    style = f'fill="none" stroke="{OTHER}" stroke-width="2" pointer-events="all"'
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {style}>{title}</rect>'


def _line(across: Axis, up: Axis, points: t.Sequence[tuple[float, float]], ours: bool) -> str:
    places = " ".join(f"{across.place(size):.1f},{up.place(figure):.1f}" for size, figure in points)
    style = f'stroke="{OURS}"' if ours else f'stroke="{OTHER}" stroke-dasharray="7 4"'
    return f'<polyline points="{places}" fill="none" stroke-width="2" {style}/>'


def _panel(series: Series, clip: str) -> list[str]:
    across, up = axes(series)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        _text(LEFT, 20, f"{series.name} [{series.unit}]", "start", 14),
        # The legend.
        _mark(LEFT + 5, 38, True, "ours"),
        _text(LEFT + 16, 42, "ours", "start", 12, OURS),
        _mark(LEFT + 61, 38, False, series.against),
        _text(LEFT + 72, 42, series.against, "start", 12, OTHER),
    ]
    for value in ticks(up.low, up.high, up.logarithmic):
        y = up.place(value)
        parts += [
            _rule(LEFT, y, right, y, 'stroke-opacity="0.3"'),
            _text(LEFT - 7, y + 4, number(value), "end"),
        ]
    parts.append(_rule(LEFT, bottom, right, bottom, 'stroke-width="1"'))

    # What is proportional to the size, through our figure at the largest one, which start-up weighs on least.
    last = series.points[-1]
    first = across.low or 0.0
    ends = [(size, last.ours * size / last.size) for size in (first, across.high)]
    (x1, y1), (x2, y2) = ((across.place(size), _beyond(up, figure)) for size, figure in ends)
    parts.append(f'<g clip-path="url(#{clip})">{_rule(x1, y1, x2, y2, _GUIDE)}</g>')

    free = -math.inf
    for point in series.points:
        x = across.place(point.size)
        parts.append(_rule(x, bottom, x, bottom + 5, 'stroke-width="1"'))
        # What would touch its neighbour is left out.
        if x - free >= 66:
            free = x
            parts.append(_text(x, bottom + 19, number(point.size)))
            if point.other:
                parts.append(_text(x, bottom + 35, f"ratio {point.ours / point.other:.2f}", colour=OURS))
    scale = "log-log" if up.logarithmic else "linear"
    parts.append(_text(LEFT, bottom + 54, series.counts, "start", 11))
    parts.append(_text(right, bottom + 54, f"{scale}; dotted: proportional to size", "end", 11))

    # Ours last, so that it is on top.
    for ours in (False, True):
        figures = [(point.size, point.ours if ours else point.other) for point in series.points]
        parts.append(_line(across, up, figures, ours))
        who = "ours" if ours else series.against
        for size, figure in figures:
            says = f"{who}: {number(figure)} {series.unit} with {number(size)} {series.counts}"
            parts.append(_mark(across.place(size), up.place(figure), ours, says))
    return parts


def _beyond(axis: Axis, value: float) -> float:
    return axis.place(value) if value > 0 or not axis.logarithmic else axis.start


def growth(panels: t.Sequence[Series]) -> str:
    """The picture of some series, two beside each other."""
    if not panels:
        raise ValueError("there is no series to draw")
    columns = min(COLUMNS, len(panels))
    width, height = columns * WIDTH, math.ceil(len(panels) / columns) * HEIGHT
    names = "; ".join(series.name for series in panels)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="system-ui, Inter, DejaVu Sans, sans-serif" role="img">',
        f"<title>{escape(f'Growth with size: {names}')}</title>",
    ]
    for index, series in enumerate(panels):
        clip = f"panel{index}"
        place = f"translate({index % columns * WIDTH} {index // columns * HEIGHT})"
        inside = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
        lines += [
            f'<clipPath id="{clip}"><rect {inside}/></clipPath>',
            f'<g transform="{place}">',
            *_panel(series, clip),
            "</g>",
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"
