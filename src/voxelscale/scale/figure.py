"""The scaling study as one figure: time against workers, and Dice relative to one worker.

Where no Dice relative to one worker exists (its Dice is 0, or it was not trained) the second panel shows
Dice itself.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from voxelscale.pages.charts import SERIES, Line, Panel, draw, number

TARGET = 0.99
"""Share of one worker's Dice that a recipe should keep."""

SHIFT = 5.0
"""Points between the intervals of two recipes, so that they do not cover each other."""

MOST_TIMES = 9
"""Ticks on the axis of times."""

TIMES = [
    *(m * 10.0**p for p in range(-3, 1) for m in (1, 2, 5)),
    *(10.0, 20.0, 30.0),
    *(60.0 * m for m in (1, 2, 5, 10, 20, 30)),
    *(3600.0 * m for m in (1, 2, 5, 12)),
    *(86400.0 * m for m in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)),
]
"""Seconds at which the axis of times may have ticks."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One recipe at one number of workers.

    Attributes:
        dice_mean, dice_low, dice_high: over seeds, with its interval's ends.
        seconds: wall time of the training.
        relative: `dice_mean` over that of one worker; None where that is 0 or was not trained.
        relative_low, relative_high: its interval's ends; None: those of `dice_mean`, scaled as it is.
        measured: whether `seconds` was measured with so many real ranks; else it is the model's.
    """

    recipe: str
    workers: int
    dice_mean: float
    dice_low: float
    dice_high: float
    seconds: float
    relative: float | None
    relative_low: float | None = None
    relative_high: float | None = None
    measured: bool = False


def scaling_figure(points: Iterable[Point], *, target: float = TARGET) -> str:
    """The panels of `scaling_panels` as an SVG file."""
    label = "Time of a training and its Dice against the number of workers"
    return draw(scaling_panels(points, target=target), 954, 430, label, alone=True)


def scaling_panels(points: Iterable[Point], *, target: float = TARGET) -> tuple[Panel, Panel]:
    """Time against workers, and Dice relative to one worker (Dice itself where there is no relative one).

    Times: dots were measured, rings are the model's, the broken line is the first recipe's fewest workers
    scaled ideally (1/N). Dice: with its intervals and the broken line of the target.

    Args:
        target: share of one worker's Dice.
    """
    points = sorted(points, key=lambda point: point.workers)
    relative = not points or any(point.relative is not None for point in points)
    return _time_panel(points), (_relative_panel(points, target) if relative else _dice_panel(points))


def _time_panel(points: Sequence[Point]) -> Panel:
    lines = [
        Line(name=name, points=[(p.workers, p.seconds) for p in mine], **_look(place))
        for place, (name, mine) in enumerate(_recipes(points).items())
    ]
    for place, mine in enumerate(_recipes(points).values()):
        for measured, mark in ((True, "o"), (False, "ring")):
            times = [(p.workers, p.seconds) for p in mine if p.measured == measured]
            if times:
                colour = _look(place)["colour"]
                lines.append(Line(name="", points=times, mark=mark, marks_only=True, colour=colour))
    for measured, mark, name in ((True, "o", "time measured"), (False, "ring", "time modelled")):
        if any(p.measured == measured for p in points):
            lines.append(Line(name=name, mark=mark, marks_only=True, colour="soft"))
    lines.append(Line(name="ideal time", points=_ideal(points), dashed=True, colour="soft"))
    ticks = _round_times([y for line in lines for _, y in line.points])
    return Panel(
        title="Time of a training",
        lines=lines,
        y_ticks=ticks[:: -(-len(ticks) // MOST_TIMES)],
        y_range=(ticks[0] * 0.99, ticks[-1] * 1.01),
        y_log=True,
        y_text=duration,
        **_worker_axis(points),
    )


def _ideal(points: Sequence[Point]) -> list[tuple[float, float]]:
    if not points:
        return []
    first = next(iter(_recipes(points).values()))[0]
    return [(n, first.seconds * first.workers / n) for n in (first.workers, points[-1].workers)]


def _relative_panel(points: Sequence[Point], target: float) -> Panel:
    """Dice over that of one worker in per cent, 100 % and the target always in sight."""
    axis = _worker_axis(points)
    shown = [(p, p.relative, *_interval(p, p.relative)) for p in points if p.relative is not None]
    lines = _recipe_lines(points, shown)
    aim = [(at, target) for at in axis["x_range"]]
    return Panel(
        title="Dice relative to 1 worker",
        lines=[*lines, Line(name=f"target: {_percent(target)}", points=aim, dashed=True, colour="soft")],
        y_range=_range([target, 1.0], shown),
        y_text=_percent,
        **axis,
    )


def _dice_panel(points: Sequence[Point]) -> Panel:
    """Dice itself, from 0 on."""
    shown = [(p, p.dice_mean, max(p.dice_low, 0.0), p.dice_high) for p in points]
    return Panel(
        title="Dice (relative to 1 worker: no value)",
        lines=_recipe_lines(points, shown),
        y_range=_range([0.0, 0.1], shown),
        **_worker_axis(points),
    )


Shown = tuple[Point, float, float, float]
"""A point, its value on the axis, and the ends of its interval."""


def _recipe_lines(points: Sequence[Point], shown: Sequence[Shown]) -> list[Line]:
    """A line for each recipe, side by side."""
    recipes = list(_recipes(points))
    lines = []
    for place, recipe in enumerate(recipes):
        mine = [one for one in shown if one[0].recipe == recipe]
        lines.append(
            Line(
                name=recipe,
                points=[(p.workers, value) for p, value, _, _ in mine],
                intervals=[(p.workers, low, high) for p, _, low, high in mine if high > low],
                mark="o",
                shift=SHIFT * (place - (len(recipes) - 1) / 2),
                **_look(place),
            )
        )
    return lines


def _recipes(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Each recipe's points."""
    names = dict.fromkeys(point.recipe for point in points)
    return {name: [point for point in points if point.recipe == name] for name in names}


def _look(place: int) -> dict[str, Any]:
    """Once the colours are used up, they come again with dashed lines."""
    return {"colour": f"s{place % SERIES}", "dashed": place >= SERIES}


def _range(always: Sequence[float], shown: Sequence[Shown]) -> tuple[float, float]:
    """A little more than what is always in sight and all values with their intervals."""
    drawn = [*always, *(y for _, *ys in shown for y in ys)]
    low, high = min(drawn), max(drawn)
    pad = 0.06 * max(high - low, 0.01)
    return low - pad, high + pad


def _interval(point: Point, relative: float) -> tuple[float, float]:
    """Where from and where to; no share of a Dice is below 0, whatever Student's t says."""
    low, high = point.relative_low, point.relative_high
    if low is None or high is None:
        scale = relative / point.dice_mean if point.dice_mean else 0.0
        low, high = scale * point.dice_low, scale * point.dice_high
    return max(low, 0.0), high


def _worker_axis(points: Sequence[Point]) -> dict[str, Any]:
    """A tick for each number of workers; if there are many, for those far enough apart."""
    counts = sorted({float(point.workers) for point in points}) or [1.0]
    spread = counts[-1] / counts[0]
    margin = spread**0.03 if spread > 1 else 2.0
    apart = spread ** (1 / 12)
    ticks = counts[:1]
    for count in counts[1:]:
        if count >= apart * ticks[-1]:
            ticks.append(count)
    return {
        "x_label": "number of workers",
        "x_range": (counts[0] / margin, counts[-1] * margin),
        "x_ticks": ticks,
        "x_log": True,
    }


def _round_times(seconds: Sequence[float]) -> list[float]:
    """The `TIMES` that enclose all."""
    first = bisect_right(TIMES, min(seconds, default=1.0)) - 1
    return TIMES[max(first, 0) : bisect_left(TIMES, max(seconds, default=10.0)) + 1]


def duration(seconds: float) -> str:
    """A time as people say it: three digits in ms, s, min, h or d."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(1000 * seconds)} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
