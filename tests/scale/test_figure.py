"""What the scaling figure shows, read back from its SVG."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.pages import checked

from voxelscale.config import Config
from voxelscale.pages.charts import BOTTOM, TOP, Frame, Line, draw_axes, draw_lines
from voxelscale.scale.cost import TrainingTime, UpdateTime
from voxelscale.scale.figure import Point, as_points, scaling_figure
from voxelscale.scale.report import CostedRow, write_results
from voxelscale.scale.study import Row, Trial, TrialScore, summarise

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


def study(*rows: tuple[str, int, list[float]]) -> list[Row]:
    """Rows of a study from the Dice of each seed, by recipe and number of workers."""
    trials, outcomes = [], []
    for recipe, workers, dice in rows:
        for seed, value in enumerate(dice):
            trials.append(Trial(recipe=recipe, workers=workers, seed=seed, config=Config()))
            outcomes.append(TrialScore(dice=value, curve=((16, value),), diverged=math.isclose(value, 0.0)))
    return summarise(trials, outcomes, 0.9)


def written(rows: list[Row], out: Path, target: float = 0.9) -> tuple[ElementTree.Element, str]:
    """The SVG and the page of a study whose trainings take 64 s in all."""
    update = UpdateTime(compute=1.0, straggling=0.0, communication=0.0, exposed=0.0, input_wait=0.0)
    findings = [
        CostedRow(
            row=row,
            time=TrainingTime(
                workers=row.workers,
                updates=64 // row.workers,
                update=update,
                validation=0.0,
                fixed=0.0,
                samples=64,
            ),
            scaling=None,
        )
        for row in rows
    ]
    write_results(findings, {"notes": ["<measured>"]}, out, target)
    html = (out / "scaling.html").read_text(encoding="utf-8")
    checked(html)
    assert "&lt;measured&gt;" in html
    return ElementTree.parse(out / "scaling.svg").getroot(), html


def test_a_study_whose_dice_is_0_is_drawn_with_all_its_workers(tmp_path: Path) -> None:
    rows = study(("unchanged", 1, [0.0]), ("unchanged", 2, [0.0]), ("unchanged", 4, [0.0]))
    assert [row.samples_to_target for row in rows] == [None, None, None]  # 0 is no target
    root, html = written(rows, tmp_path)
    said = texts(root)
    assert [said.count(n) for n in ("1", "2", "4")] == [2, 2, 2]
    assert "Dice (relative to 1 worker: no value)" in said
    assert not any(text.startswith("-") for text in said)
    assert dots(root, "hollow") == 3
    assert dots(root, "dot") == 6
    assert "1 seed: no intervals" in html
    assert "0.000, 1 of 1 diverged" in html


def test_one_training_that_failed_does_not_hide_the_others(tmp_path: Path) -> None:
    rows = study(("unchanged", 1, [0.5, 0.6]), ("unchanged", 2, [0.5, 0.5]), ("unchanged", 4, [0.0, 0.3]))
    root, html = written(rows, tmp_path)
    said = texts(root)
    assert {"Dice relative to 1 worker", "1", "2", "4", "90 %", "100 %"} <= set(said)
    assert "1 of 2 diverged" in html
    assert not re.search(r"\(-\d", html), "no interval of a Dice goes below 0"
    assert "ideal time; target: 90 % of the Dice" in said


def test_the_whiskers_are_the_intervals_of_the_table(tmp_path: Path) -> None:
    """Seeds differ much and their ratios little: the interval is that of the ratios."""
    rows = study(("unchanged", 1, [0.4, 0.8]), ("unchanged", 2, [0.36, 0.72]))
    assert rows[1].relative_low == pytest.approx(0.9)
    assert rows[1].relative_high == pytest.approx(0.9)
    root, html = written(rows, tmp_path)
    assert "90.0 (90.0 to 90.0)" in html
    bars = [p for p in root.iter(f"{SVG}path") if (p.get("class") or "").startswith("bar")]
    assert len(bars) <= 1  # rounding may leave a hair of one


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95])
def test_the_target_line_is_the_configs(target: float, tmp_path: Path) -> None:
    root, _ = written(study(("a", 1, [0.8]), ("a", 2, [0.7])), tmp_path, target)
    assert f"ideal time; target: {100 * target:g} % of the Dice" in texts(root)


def test_one_number_of_workers_stands_alone_on_its_axis(tmp_path: Path) -> None:
    root, html = written(study(("a", 4, [0.8]), ("b", 4, [0.8])), tmp_path)
    said = texts(root)
    assert said.count("4") == 2
    assert "2" not in said
    assert "Dice (relative to 1 worker: no value)" in said
    assert "the same samples for 4 workers" in html


def test_numbers_of_workers_that_are_no_powers_of_two_are_named() -> None:
    rows = [Point(**{**ROWS[0].__dict__, "workers": n}) for n in (1, 3, 6)]
    said = texts(parsed(rows))
    assert [said.count(n) for n in ("1", "2", "3", "4", "6", "8")] == [2, 0, 2, 0, 2, 0]


def test_more_recipes_than_colours_stay_apart() -> None:
    rows = [
        Point(**{**ROWS[0].__dict__, "recipe": f"r{i}", "workers": n}) for i in range(8) for n in (1, 2)
    ]
    looks = {
        (p.get("class"), p.get("stroke-dasharray"))
        for p in parsed(rows).iter(f"{SVG}path")
        if (p.get("class") or "").startswith("line s")
    }
    assert len(looks) == 8
