"""What the scaling figure shows, read back from its SVG."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from voxelscale.report.charts import BOTTOM, TOP, Frame, Line, draw_axes, draw_lines
from voxelscale.scale.figure import Point, as_points, scaling_figure, write_figure

COUNTS = (1, 2, 4, 8, 16, 32, 64)
ROWS = [
    Point(
        recipe=recipe,
        workers=n,
        dice_mean=0.8 * (1 - 0.001 * n),
        dice_low=0.8 * (1 - 0.001 * n) - 0.01,
        dice_high=0.8 * (1 - 0.001 * n) + 0.01,
        seconds=1000 / n + 10,
        relative=1 - 0.001 * n,
        measured=n <= 2,
    )
    for recipe in ("linear", "<LARS>")
    for n in COUNTS
]
SVG = "{http://www.w3.org/2000/svg}"


def parsed(rows: list[Point]) -> ElementTree.Element:
    return ElementTree.fromstring(scaling_figure(rows))


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def dots(root: ElementTree.Element, kind: str) -> int:
    return sum(kind in (c.get("class") or "").split() and len(c) > 0 for c in root.iter(f"{SVG}circle"))


def test_it_is_whole_and_says_everything() -> None:
    root = parsed(ROWS)
    said = texts(root)
    for n in COUNTS:
        assert said.count(str(n)) == 2  # once a panel
    assert {"linear", "<LARS>", "99 %", "100 %", "10 s", "20 min", "time measured", "time modelled"} <= set(
        said
    )
    # Every row is a mark in either panel; those that were not measured are rings in the left one.
    assert dots(root, "dot") == 2 * len(ROWS)
    assert dots(root, "hollow") == sum(not row.measured for row in ROWS)
    assert sum((p.get("class") or "").startswith("bar") for p in root.iter(f"{SVG}path")) == len(ROWS)
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", scaling_figure(ROWS))


def test_an_ideal_training_lies_on_the_ideal_line() -> None:
    rows = [
        Point(recipe="a", workers=n, dice_mean=1, dice_low=1, dice_high=1, seconds=640 / n, relative=1)
        for n in COUNTS
    ]
    paths = [p.get("d") or "" for p in parsed(rows).iter(f"{SVG}path") if "line" in (p.get("class") or "")]
    ideal, real = (re.findall(r"[-\d.]+", path) for path in paths[:2])
    assert ideal == [*real[:2], *real[-2:]]


def test_logarithmic_places_by_hand() -> None:
    frame = Frame(x=(1, 64), y=(1, 100), x_ticks=[1, 8, 64], y_ticks=[1, 10, 100], width=500, inset=10)
    left, right = 48 + 10, 500 - 16 - 10
    assert frame.place(1, 1) == pytest.approx((left, 300 - BOTTOM))
    assert frame.place(8, 10) == pytest.approx(((left + right) / 2, (300 - BOTTOM + TOP) / 2))
    assert frame.place(64, 100) == pytest.approx((right, TOP))
    assert frame.place(1000, 0.001) == pytest.approx((right, 300 - BOTTOM))
    linear = Frame(x=(0, 2), y=(0.9, 1.0))
    assert linear.place(1, 0.95) == pytest.approx((48 + (560 - 64) / 2, (300 - BOTTOM + TOP) / 2))


def test_intervals_are_drawn_where_they_are() -> None:
    frame = Frame(x=(0, 2), y=(0, 1))
    drawn = draw_lines(frame, [Line(name="a", points=[(1, 0.5)], bars=[(1, 0.25, 0.75)], shift=3)])
    x, bottom = frame.place(1, 0.25)
    top = frame.place(1, 0.75)[1]
    assert f"M{x + 3:.1f} {bottom:.1f}V{top:.1f}" in drawn
    assert "<b>" not in draw_axes(frame, x_label="<b>")


@pytest.mark.parametrize("rows", [[], ROWS[:1], [ROWS[6]]])
def test_few_rows_are_no_fault(rows: list[Point]) -> None:
    root = parsed(rows)
    for path in root.iter(f"{SVG}path"):
        numbers = [float(n) for n in re.findall(r"-?[\d.]+|nan|inf", path.get("d") or "")]
        assert all(map(math.isfinite, numbers))


def test_rows_may_be_dictionaries() -> None:
    row = {**ROWS[3].__dict__, "anything": "else"}
    assert as_points([row, ROWS[0]]) == [ROWS[0], ROWS[3]]


def test_files(tmp_path: Path) -> None:
    write_figure(ROWS, tmp_path / "scaling.svg")
    ElementTree.parse(tmp_path / "scaling.svg")
    write_figure(ROWS, tmp_path / "scaling.html")
    page = (tmp_path / "scaling.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert scaling_figure(ROWS) in page
