# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the benchmarks beside this file, print one table, and write build/bench.json and build/bench.svg.

A benchmark is a file ``bench_NAME.py`` with a function ``rows()`` that yields :class:`Row`. Ours and what it is
compared with are measured in the same run, so a ratio holds on any machine; a time alone does not. How that is done is
in README.md beside this file.

    python tests/bench/bench.py [NAME...]
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import statistics
import sys
import time
import typing as t

HERE = pathlib.Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent

sys.path.insert(0, str(HERE))

import plot

# A figure, or those of all rounds, of which the median counts.
Figure = t.Union[float, t.Sequence[float]]


def _median(figure: Figure) -> float:
    return figure if isinstance(figure, (int, float)) else statistics.median(figure)


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what is measured, with its size.
        ours: our figure, in ``unit``.
        other: the figure it is compared with.
        against: what that other thing is.
        goal: the highest ratio ``ours / other`` that is good enough; none, where the row only stands beside others.
        unit: of both figures.
        series: what grows: rows of one series differ in their size alone, and are a panel of the plot.
        size: how large it is here, for a row of a series.
        counts: what the size is a number of.
    """

    name: str
    ours: Figure
    other: Figure
    against: str
    goal: float | None
    unit: str = "s"
    series: str = ""
    size: float | None = None
    counts: str = ""

    def __post_init__(self) -> None:
        if bool(self.series) is not bool(self.size) or bool(self.series) is not bool(self.counts):
            raise ValueError(f"{self.name}: a series, a size and what it counts belong together")

    @property
    def figures(self) -> tuple[float, float]:
        return _median(self.ours), _median(self.other)

    @property
    def ratio(self) -> float:
        ours, other = self.figures
        return ours / other

    def record(self) -> dict[str, t.Any]:
        """All that is known of it, for build/bench.json."""
        rounds = {
            name: list(figure)
            for name, figure in (("ours", self.ours), ("other", self.other))
            if not isinstance(figure, (int, float))
        }
        ours, other = self.figures
        return {**dataclasses.asdict(self), "ours": ours, "other": other, "ratio": self.ratio, "rounds": rounds}


def alternate(
    ours: t.Callable[[], object], other: t.Callable[[], object], rounds: int = 5
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of all rounds of both, run in turn, so that a busy moment of the machine hits both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for _round in range(rounds):
        for seconds, call in zip(times, (ours, other)):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return tuple(times[0]), tuple(times[1])


def _table(rows: t.Sequence[Row]) -> str:
    lines = [("", "ours", "other", "ratio", "goal", "against")]
    for row in rows:
        missed = row.goal is not None and row.ratio > row.goal
        goal = "" if row.goal is None else f"{row.goal:.2f}"
        ours, other = (f"{figure:.3g} {row.unit}" for figure in row.figures)
        lines.append((row.name, ours, other, f"{row.ratio:.2f}", goal, row.against + ("  MISSED" if missed else "")))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def panels(rows: t.Iterable[Row]) -> list[plot.Series]:
    """The series of some rows that have more than one size."""
    named: dict[str, list[Row]] = {}
    for row in rows:
        if row.series:
            named.setdefault(row.series, []).append(row)
    made = []
    for name, found in named.items():
        found.sort(key=lambda row: row.size or 0)
        if len({row.size for row in found}) > 1:
            points = tuple(plot.Point(row.size or 0, *row.figures) for row in found)
            made.append(plot.Series(name, found[0].counts, found[0].unit, found[0].against, points))
    return made


def write(rows: t.Sequence[Row], directory: pathlib.Path) -> list[str]:
    """Write bench.json, and bench.svg if something has more than one size; returns their names."""
    directory.mkdir(exist_ok=True)
    (directory / "bench.json").write_text(json.dumps([row.record() for row in rows], indent=2) + "\n")
    picture = directory / "bench.svg"
    grown = panels(rows)
    if not grown:
        picture.unlink(missing_ok=True)  # it would be that of another run
        return ["bench.json"]
    picture.write_text(plot.growth(grown))
    return ["bench.json", "bench.svg"]


def main(names: t.Sequence[str]) -> int:
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    for name in names:
        if name not in known:
            print(f"There is no benchmark {name!r}; there are: {', '.join(known)}", file=sys.stderr)
            return 2
    sys.modules["bench"] = sys.modules[__name__]  # the benchmarks import Row from here, not from a second copy
    rows: list[Row] = []
    for name in names or known:
        print(f"... {name}", flush=True)
        for row in importlib.import_module(f"bench_{name}").rows():
            rows.append(row)
            print(f"    {row.name}: {row.ratio:.2f}", flush=True)
            # At once: the next may fail after an hour.
            written = write(rows, CHECKOUT / "build")
    if not rows:
        print("\nNothing was measured")
        return 1
    print(f"\n{_table(rows)}\n\nWritten to {' and '.join(f'build/{name}' for name in written)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
