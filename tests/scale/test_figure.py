"""What the scaling figure is handed, and what its SVG and its page say."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.pages import checked

from voxelscale.config import Config
from voxelscale.pages.charts import Line, Panel
from voxelscale.scale.advice import CostedRow, Prices
from voxelscale.scale.cost import TrainingTime, UpdateTime
from voxelscale.scale.figure import scaling_figure, scaling_panels
from voxelscale.scale.report import write_results
from voxelscale.scale.study import Row, Trial, TrialScore, summarise

COUNTS = (1, 2, 4, 8, 16, 32, 64)


def point(recipe: str = "linear", workers: int = 1, *, seconds: float = 1010.0) -> CostedRow:
    """One recipe at one number of workers, which loses a thousandth of its Dice with each."""
    relative = 1 - 0.001 * workers
    (row,) = study((recipe, workers, [0.8 * relative]))
    low, high = relative - 0.01, relative + 0.01
    row = replace(row, relative=relative, relative_low=low, relative_high=high)
    return replace(costed([row])[0], time=_time(workers, seconds, 0.0))


def _time(workers: int, seconds: float, start: float) -> TrainingTime:
    """A training that computes for so many seconds."""
    updates = max(1, 64 // workers)
    update = UpdateTime(
        compute=seconds / updates, straggling=0.0, communication=0.0, exposed=0.0, input_wait=0.0
    )
    return TrainingTime(
        workers=workers, stages=((64, updates),), update=update, validation=0.0, fixed=start
    )


FREE = Prices()
SVG = "{http://www.w3.org/2000/svg}"


def study(*rows: tuple[str, int, list[float]]) -> list[Row]:
    """Rows of a study from the Dice of each seed, by recipe and number of workers."""
    trials, outcomes = [], []
    for recipe, workers, dice in rows:
        for seed, value in enumerate(dice):
            trials.append(Trial(recipe=recipe, workers=workers, seed=seed, config=Config()))
            outcomes.append(TrialScore(dice=value, curve=((16, value),), diverged=math.isclose(value, 0.0)))
    return summarise(trials, outcomes, 0.9)


def costed(rows: list[Row], start: float = 0.0) -> list[CostedRow]:
    """Rows whose trainings take 64 s of arithmetic in all, and so many seconds to start."""
    return [
        CostedRow(row=row, time=_time(row.workers, 64 // row.workers, start), scaling=None) for row in rows
    ]


ROWS = [point(recipe, n, seconds=1000 / n + 10) for recipe in ("linear", "<LARS>") for n in COUNTS]


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def named(panel: Panel, name: str) -> Line:
    return next(line for line in panel.lines if line.name == name)


def test_it_is_whole_and_says_everything() -> None:
    time, dice = scaling_panels(ROWS, target=0.9)
    for recipe in ("linear", "<LARS>"):
        mine = [one for one in ROWS if one.row.recipe == recipe]
        assert named(time, recipe).points == [(one.row.workers, one.time.total) for one in mine]
        assert named(dice, recipe).points == [(one.row.workers, one.row.relative) for one in mine]
        assert len(named(dice, recipe).intervals) == len(mine)
    assert {x for line in time.lines if line.mark == "ring" for x, _ in line.points} == set(COUNTS)
    assert [y for _, y in named(dice, "target: 90 %").points] == [0.9, 0.9]
    assert {row.colour for row in (named(time, "linear"), named(time, "<LARS>"))} == {"s0", "s1"}


def test_the_file_stands_alone_in_light_and_dark() -> None:
    drawn = scaling_figure(ROWS, 0.99)
    said = texts(ElementTree.fromstring(drawn))
    for n in COUNTS:
        assert said.count(str(n)) == 2  # once a panel
    assert {"linear", "<LARS>", "100 %", "10 s", "20 min", "time modelled"} <= set(said)
    assert {"target: 99 %", "Time of a training", "Dice relative to 1 worker", "number of workers"} <= set(
        said
    )
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", drawn)
    assert "prefers-color-scheme:dark" in drawn
    assert not re.search(r"(fill|stroke): #", drawn), "every colour follows the scheme"
    assert drawn == scaling_figure(ROWS, 0.99)


def test_an_ideal_training_lies_on_the_ideal_line() -> None:
    time, _ = scaling_panels([point("a", n, seconds=640 / n) for n in COUNTS], 0.99)
    ideal, real = named(time, "ideal time").points, named(time, "a").points
    assert ideal == [real[0], real[-1]]


@pytest.mark.parametrize("rows", [[], ROWS[:1], [ROWS[6]]])
def test_few_rows_are_no_fault(rows: list[CostedRow]) -> None:
    drawn = scaling_figure(rows, 0.99)
    assert not re.search(r"\b(nan|inf)\b", drawn)
    assert "Time of a training" in texts(ElementTree.fromstring(drawn))


def written(
    rows: list[Row], out: Path, target: float = 0.9, prices: Prices = FREE
) -> tuple[ElementTree.Element, str]:
    """The SVG and the page of a study."""
    write_results(costed(rows), {"notes": ["<measured>"]}, out, target, prices)
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
    assert "time modelled" in said
    assert "1 seed: no intervals" in html
    assert "0.000, 1 of 1 diverged" in html


def test_one_training_that_failed_does_not_hide_the_others(tmp_path: Path) -> None:
    rows = study(("unchanged", 1, [0.5, 0.6]), ("unchanged", 2, [0.5, 0.5]), ("unchanged", 4, [0.0, 0.3]))
    root, html = written(rows, tmp_path)
    said = texts(root)
    assert {"Dice relative to 1 worker", "1", "2", "4", "target: 90 %", "100 %"} <= set(said)
    assert "1 of 2 diverged" in html
    shown = re.sub(r"<[^>]*>", " ", html)
    assert not re.search(r"\(-\d", shown), "no interval of a Dice goes below 0"
    assert {"ideal time", "target: 90 %"} <= set(said)


def test_the_whiskers_are_the_intervals_of_the_table(tmp_path: Path) -> None:
    """Seeds differ much and their ratios little: the interval is that of the ratios."""
    rows = study(("unchanged", 1, [0.4, 0.8]), ("unchanged", 2, [0.36, 0.72]))
    assert rows[1].relative_low == pytest.approx(0.9)
    assert rows[1].relative_high == pytest.approx(0.9)
    _, html = written(rows, tmp_path)
    assert "90.0 (90.0 to 90.0)" in html
    # Rounding may leave a hair of an interval.
    for _, low, high in named(scaling_panels(costed(rows), 0.9)[1], "unchanged").intervals:
        assert high - low == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95])
def test_the_target_line_is_the_configs(target: float, tmp_path: Path) -> None:
    root, _ = written(study(("a", 1, [0.8]), ("a", 2, [0.7])), tmp_path, target)
    assert f"target: {100 * target:g} %" in texts(root)


def test_one_number_of_workers_stands_alone_on_its_axis(tmp_path: Path) -> None:
    root, html = written(study(("a", 4, [0.8]), ("b", 4, [0.8])), tmp_path)
    said = texts(root)
    assert said.count("4") == 2
    assert "2" not in said
    assert "Dice (relative to 1 worker: no value)" in said
    assert "The same samples for 4 workers" in html


def test_numbers_of_workers_that_are_no_powers_of_two_are_named() -> None:
    rows = [point(workers=n) for n in (1, 3, 6)]
    said = texts(ElementTree.fromstring(scaling_figure(rows, 0.99)))
    assert [said.count(n) for n in ("1", "2", "3", "4", "6", "8")] == [2, 0, 2, 0, 2, 0]


def test_more_recipes_than_colours_stay_apart() -> None:
    for panel in scaling_panels([point(f"r{i}", n) for i in range(8) for n in (1, 2)], 0.99):
        looks = {(line.colour, line.dashed) for line in panel.lines if line.name.startswith("r")}
        assert len(looks) == 8


def test_a_name_is_never_a_formula() -> None:
    row = point("$\\frac$ & <script>")
    assert row.row.recipe in texts(ElementTree.fromstring(scaling_figure([row], 0.99)))
