# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the benchmarks beside this file, print one table, and write build/bench.json.

A benchmark is a file ``bench_NAME.py`` with a function ``rows()`` that yields :class:`Row`. Ours and what it is
compared with are measured in the same run, so a ratio holds on any machine; a time alone does not.

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


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what is measured, with its size.
        ours: our figure, in ``unit``.
        other: the figure it is compared with.
        against: what that other thing is.
        goal: the highest ratio ``ours / other`` that is good enough.
        unit: of both figures.
    """

    name: str
    ours: float
    other: float
    against: str
    goal: float
    unit: str = "s"

    @property
    def ratio(self) -> float:
        return self.ours / self.other


def alternate(ours: t.Callable[[], object], other: t.Callable[[], object], rounds: int = 5) -> tuple[float, float]:
    """Median seconds of both, run in turn, so that a busy moment of the machine hits both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for _round in range(rounds):
        for seconds, call in zip(times, (ours, other)):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def _table(rows: t.Sequence[Row]) -> str:
    lines = [("", "ours", "other", "ratio", "goal", "against")]
    for row in rows:
        verdict = "" if row.ratio <= row.goal else "  MISSED"
        figures = (f"{row.ours:.3g} {row.unit}", f"{row.other:.3g} {row.unit}", f"{row.ratio:.2f}", f"{row.goal:.2f}")
        lines.append((row.name, *figures, row.against + verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


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
    target = CHECKOUT / "build" / "bench.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps([{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows], indent=2) + "\n")
    print(f"\n{_table(rows)}\n\nWritten to build/bench.json")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    raise SystemExit(main(sys.argv[1:]))
