# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the benchmarks make of their figures: the table, bench.json and the plot of growth. Nothing is measured here."""

from __future__ import annotations

import json
import pathlib
import re
import sys
import typing as t
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

CHECKOUT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(CHECKOUT / "tests/bench"))

import bench
import plot

SVG = "{http://www.w3.org/2000/svg}"


def row(size: float | None = None, ours: bench.Figure = 2.0, other: bench.Figure = 1.0, **more: t.Any) -> bench.Row:
    grows = {"series": "walk", "size": size, "counts": "steps"} if size else {}
    return bench.Row("a walk", ours, other, "a run", 1.5, **{**grows, **more})


def series(*points: tuple[float, float, float], **more: t.Any) -> plot.Series:
    texts = {"name": "walk", "counts": "steps", "unit": "s", "against": "a run"}
    return plot.Series(**{**texts, **more}, points=tuple(plot.Point(*point) for point in points))


def draw(*panels: plot.Series) -> ET.Element:
    return ET.fromstring(plot.growth(panels))


def lines(picture: ET.Element) -> list[list[tuple[float, float]]]:
    """The places of each line: for each panel the other's, then ours."""
    found = []
    for line in picture.iter(f"{SVG}polyline"):
        x_y = [place.split(",") for place in line.attrib["points"].split()]
        found.append([(float(x), float(y)) for x, y in x_y])
    return found


def dotted(picture: ET.Element) -> tuple[tuple[float, float], tuple[float, float]]:
    """The ends of the line that is proportional to the size."""
    (line,) = picture.findall(f".//{SVG}g[@clip-path]/{SVG}line")
    x1, y1, x2, y2 = (float(line.attrib[name]) for name in ("x1", "y1", "x2", "y2"))
    return (x1, y1), (x2, y2)


def slope(places: t.Sequence[tuple[float, float]]) -> float:
    (x1, y1), (x2, y2) = places[0], places[-1]
    return (y1 - y2) / (x2 - x1)


def texts(picture: ET.Element) -> list[str]:
    return [text.text or "" for text in picture.iter(f"{SVG}text")]


def test_the_median_of_the_rounds_counts_and_all_are_kept() -> None:
    record = row(ours=(9.0, 3.0, 2.0), other=(1.0, 1.5, 70.0)).record()
    assert (record["ours"], record["other"], record["ratio"]) == (3.0, 1.5, 2.0)
    assert record["rounds"] == {"ours": [9.0, 3.0, 2.0], "other": [1.0, 1.5, 70.0]}
    assert row(ours=3.0, other=(1.0, 1.0)).record()["rounds"] == {"other": [1.0, 1.0]}


@pytest.mark.parametrize("more", [{"series": "walk"}, {"size": 3}, {"series": "walk", "size": 3}, {"counts": "steps"}])
def test_a_size_has_its_series_and_says_what_it_counts(more: dict[str, t.Any]) -> None:
    with pytest.raises(ValueError, match="a walk: a series, a size and what it counts belong together"):
        bench.Row("a walk", 2.0, 1.0, "a run", 1.5, **more)


def test_both_are_measured_in_turn() -> None:
    calls: list[str] = []
    ours, other = bench.alternate(lambda: calls.append("ours"), lambda: calls.append("other"), rounds=3)
    assert calls == ["ours", "other"] * 3
    assert len(ours) == len(other) == 3


def test_a_panel_has_the_rows_of_a_series_by_size() -> None:
    rows = [row(), row(100, 7.0, (2.0, 3.0, 9.0)), row(10), row(5, series="sleep")]
    (panel,) = bench.panels(rows)
    assert panel == series((10, 2.0, 1.0), (100, 7.0, 3.0))


def test_what_is_written(tmp_path: pathlib.Path) -> None:
    directory = tmp_path / "build"
    rows = [row(), row(10), row(100, (3.0, 4.0, 5.0))]
    assert bench.write(rows, directory) == ["bench.json", "bench.svg"]
    written = json.loads((directory / "bench.json").read_text())
    assert written == [json.loads(json.dumps(one.record())) for one in rows]
    assert [(one["series"], one["size"]) for one in written] == [("", None), ("walk", 10), ("walk", 100)]
    assert "walk [s]" in texts(ET.parse(directory / "bench.svg").getroot())

    # One size does not grow, and the picture of another run must not stay.
    assert bench.write(rows[:2], directory) == ["bench.json"]
    assert [path.name for path in directory.iterdir()] == ["bench.json"]


_MADE = """\
from bench import Row
def rows():
    for size in 10, 100:
        yield Row(f"walk of {size}", 2.0 * size, size, "a run", 1.5 if size == 100 else None,
                  series="walk", size=size, counts="steps")
"""


def test_a_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bench_made_up.py").write_text(_MADE)
    (tmp_path / "bench_idle.py").write_text("def rows():\n    return iter(())\n")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    assert bench.main(["idle"]) == 1
    assert "Nothing was measured" in capsys.readouterr().out
    assert not (tmp_path / "build").exists()

    assert bench.main(["made_up", "idle"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^walk of 10 +20 s +10 s +2\.00 +a run$", out, re.MULTILINE)
    assert re.search(r"^walk of 100 +200 s +100 s +2\.00 +1\.50 +a run  MISSED$", out, re.MULTILINE)
    assert out.endswith("Written to build/bench.json and build/bench.svg\n")
    assert lines(ET.parse(tmp_path / "build/bench.svg").getroot())

    assert bench.main(["nosuch"]) == 2
    assert "there are: idle, made_up" in capsys.readouterr().err


def test_what_is_proportional_is_on_the_dotted_line() -> None:
    picture = draw(series((10, 3.0, 1.0), (100, 30.0, 10.0), (1000, 300.0, 100.0)))
    other, ours = lines(picture)
    guide = dotted(picture)
    assert slope(ours) == pytest.approx(slope(guide), abs=0.01)
    assert slope(ours[:2]) == pytest.approx(slope(ours[1:]), abs=0.01)
    assert slope(other) == pytest.approx(slope(guide), abs=0.01)
    # It goes through our largest.
    assert slope([guide[0], ours[-1]]) == pytest.approx(slope(guide), abs=0.01)
    # Ours is three times the other: above it, and by as much everywhere.
    gaps = [below[1] - above[1] for below, above in zip(other, ours)]
    assert gaps[0] > 10
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.3)
    assert "log-log; dotted: proportional to size" in texts(picture)


def test_quadratic_growth_is_twice_as_steep() -> None:
    picture = draw(series((10, 1.0, 1.0), (100, 100.0, 10.0)))
    other, ours = lines(picture)
    assert slope(ours) == pytest.approx(2 * slope(other), abs=0.01)
    assert slope(dotted(picture)) == pytest.approx(slope(other), abs=0.01)


def test_little_growth_is_shown_from_zero() -> None:
    picture = draw(series((50, 80.0, 75.0), (500, 160.0, 75.0)))
    other, ours = lines(picture)
    assert slope(other) == 0
    bottom = plot.HEIGHT - plot.BOTTOM
    # Twice the figure is twice the height.
    assert (bottom - ours[1][1]) / (bottom - ours[0][1]) == pytest.approx(2, abs=0.01)
    assert dotted(picture)[0] == (plot.LEFT, bottom)
    assert "linear; dotted: proportional to size" in texts(picture)


_FIGURES = st.just(0.0) | st.floats(1e-9, 1e9)


@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), _FIGURES, _FIGURES),
        min_size=2,
        max_size=6,
        unique_by=lambda point: point[0],
    )
)
def test_all_of_a_panel_is_in_it_and_its_axes_have_figures(points: list[tuple[int, float, float]]) -> None:
    points.sort()
    panel = series(*points)
    picture = draw(panel)
    for line in lines(picture):
        for x, y in line:
            assert plot.LEFT <= x <= plot.WIDTH - plot.RIGHT
            assert plot.TOP <= y <= plot.HEIGHT - plot.BOTTOM
    _across, up = plot.axes(panel)
    assert 2 <= len(plot.ticks(up.low, up.high, up.logarithmic)) <= 12


def test_the_words_of_a_panel() -> None:
    picture = draw(series((64, 0.19, 0.1), (512, 0.9, 0.45), (4096, 6.75, 4.5)))
    words = texts(picture)
    assert words[:3] == ["walk [s]", "ours", "a run"]
    assert {"64", "512", "4,096", "ratio 1.90", "ratio 2.00", "ratio 1.50", "steps"} <= set(words)
    titles = [title.text for title in picture.iter(f"{SVG}title")]
    assert titles[0] == "Growth with size: walk"
    assert {"ours: 6.75 s with 4,096 steps", "a run: 0.1 s with 64 steps"} <= set(titles)


def _spans(picture: ET.Element) -> dict[str, list[tuple[float, float, str]]]:
    """Where each text begins and ends, by line; a letter is taken to be 0.6 of the height, which is more than most."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for text in picture.iter(f"{SVG}text"):
        wide = len(text.text or "") * 0.6 * float(text.attrib["font-size"])
        start = float(text.attrib["x"]) - {"start": 0, "middle": 0.5, "end": 1}[text.attrib["text-anchor"]] * wide
        found.setdefault(text.attrib["y"], []).append((start, start + wide, text.text or ""))
    return found


@pytest.mark.parametrize("most", [1.2, 40.0])
def test_texts_neither_touch_nor_leave_the_panel(most: float) -> None:
    picture = draw(
        series(
            (64, 1.0, 0.9),
            (512, 1.1, 1.0),
            (4096, most, 1.1),
            name="audit of a fleet, memory of the controller",
            counts="functions",
            unit="MiB",
            against="a script that lists and reads the same",
        )
    )
    for texts_of_line in _spans(picture).values():
        texts_of_line.sort()
        assert texts_of_line[0][0] >= 0
        assert texts_of_line[-1][1] <= plot.WIDTH
        for (_start, end, text), (start, _end, after) in zip(texts_of_line, texts_of_line[1:]):
            assert end < start, (text, after)


def test_sizes_that_are_close_do_not_touch() -> None:
    words = texts(draw(series((50, 1.0, 1.0), (51, 1.0, 1.0), (500, 1.0, 1.0))))
    assert "50" in words
    assert "500" in words
    assert "51" not in words


def test_panels_are_beside_each_other() -> None:
    one = series((1, 1.0, 1.0), (2, 2.0, 2.0))
    assert draw(one).attrib["viewBox"] == f"0 0 {plot.WIDTH} {plot.HEIGHT}"
    picture = draw(one, one, one)
    assert picture.attrib["viewBox"] == f"0 0 {2 * plot.WIDTH} {2 * plot.HEIGHT}"
    places = [group.attrib["transform"] for group in picture.findall(f"{SVG}g")]
    assert places == ["translate(0 0)", f"translate({plot.WIDTH} 0)", f"translate(0 {plot.HEIGHT})"]
    with pytest.raises(ValueError, match="no series"):
        plot.growth([])


def test_names_are_text() -> None:
    picture = draw(series((1, 1.0, 1.0), (2, 2.0, 2.0), name="a <b> & c", against="d < e"))
    assert {"a <b> & c [s]", "d < e"} <= set(texts(picture))


def _light(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", [plot.OURS, plot.OTHER, plot.INK])
@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_colours_can_be_read_on_light_and_dark(colour: str, page: str) -> None:
    dark, light = sorted((_light(colour), _light(page)))
    # As good on both as one colour can be: 4.35.
    assert (light + 0.05) / (dark + 0.05) >= 4
