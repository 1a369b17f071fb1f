"""The scaling study as one figure: time against workers, and Dice relative to one worker.

Where no Dice relative to one worker exists (its Dice is 0, or it was not trained) the second panel shows
Dice itself.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

from voxelscale.pages.charts import SERIES, Line, Panel, draw, duration
from voxelscale.scale.advice import CostedRow
from voxelscale.scale.study import Row

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


def scaling_figure(findings: Sequence[CostedRow], target: float) -> str:
    """The panels of `scaling_panels` as an SVG file."""
    label = "Time of a training and its Dice against the number of workers"
    return draw(scaling_panels(findings, target), 954, 430, label, alone=True)


def scaling_panels(findings: Sequence[CostedRow], target: float) -> tuple[Panel, Panel]:
    """Time against workers, and Dice relative to one worker (Dice itself where there is no relative one).

    Times: rings are the model's, the broken line is the first recipe's fewest workers scaled ideally (1/N).
    Dice: with its intervals and the broken line of the target.

    Args:
        target: share of one worker's Dice.
    """
    points = sorted(findings, key=lambda finding: finding.row.workers)
    relative = not points or any(point.row.relative is not None for point in points)
    return _time_panel(points), (_relative_panel(points, target) if relative else _dice_panel(points))


def _time_panel(points: Sequence[CostedRow]) -> Panel:
    times = {name: [(p.row.workers, p.time.total) for p in mine] for name, mine in _recipes(points).items()}
    lines = [Line(name=name, points=own, **_look(place)) for place, (name, own) in enumerate(times.items())]
    for place, own in enumerate(times.values()):
        colour = _look(place)["colour"]
        lines.append(Line(name="", points=own, mark="ring", marks_only=True, colour=colour))
    if points:
        lines.append(Line(name="time modelled", mark="ring", marks_only=True, colour="soft"))
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


def _ideal(points: Sequence[CostedRow]) -> list[tuple[float, float]]:
    if not points:
        return []
    first = next(iter(_recipes(points).values()))[0]
    fewest, most = first.row.workers, points[-1].row.workers
    return [(n, first.time.total * fewest / n) for n in (fewest, most)]


def _relative_panel(points: Sequence[CostedRow], target: float) -> Panel:
    """Dice over that of one worker in per cent, 100 % and the target always in sight."""
    axis = _worker_axis(points)
    shown = [(p, p.row.relative, *_interval(p.row)) for p in points if p.row.relative is not None]
    lines = _recipe_lines(points, shown)
    aim = [(at, target) for at in axis["x_range"]]
    return Panel(
        title="Dice relative to 1 worker",
        lines=[*lines, Line(name=f"target: {_percent(target)}", points=aim, dashed=True, colour="soft")],
        y_range=_range([target, 1.0], shown),
        y_text=_percent,
        **axis,
    )


def _dice_panel(points: Sequence[CostedRow]) -> Panel:
    """Dice itself, from 0 on."""
    shown = [(p, p.row.dice, max(p.row.dice_low, 0.0), p.row.dice_high) for p in points]
    return Panel(
        title="Dice (relative to 1 worker: no value)",
        lines=_recipe_lines(points, shown),
        y_range=_range([0.0, 0.1], shown),
        **_worker_axis(points),
    )


Shown = tuple[CostedRow, float, float, float]
"""A point, its value on the axis, and the ends of its interval."""


def _recipe_lines(points: Sequence[CostedRow], shown: Sequence[Shown]) -> list[Line]:
    """A line for each recipe, side by side."""
    recipes = list(_recipes(points))
    lines = []
    for place, recipe in enumerate(recipes):
        mine = [one for one in shown if one[0].row.recipe == recipe]
        lines.append(
            Line(
                name=recipe,
                points=[(p.row.workers, value) for p, value, _, _ in mine],
                intervals=[(p.row.workers, low, high) for p, _, low, high in mine if high > low],
                mark="o",
                shift=SHIFT * (place - (len(recipes) - 1) / 2),
                **_look(place),
            )
        )
    return lines


def _recipes(points: Sequence[CostedRow]) -> dict[str, list[CostedRow]]:
    """Each recipe's points."""
    names = dict.fromkeys(point.row.recipe for point in points)
    return {name: [point for point in points if point.row.recipe == name] for name in names}


def _look(place: int) -> dict[str, Any]:
    """Once the colours are used up, they come again with dashed lines."""
    return {"colour": f"s{place % SERIES}", "dashed": place >= SERIES}


def _range(always: Sequence[float], shown: Sequence[Shown]) -> tuple[float, float]:
    """A little more than what is always in sight and all values with their intervals."""
    drawn = [*always, *(y for _, *ys in shown for y in ys)]
    low, high = min(drawn), max(drawn)
    pad = 0.06 * max(high - low, 0.01)
    return low - pad, high + pad


def _interval(row: Row) -> tuple[float, float]:
    """Where from and where to; no share of a Dice is below 0, whatever Student's t says."""
    if row.relative_low is None or row.relative_high is None:
        return (row.relative or 0.0,) * 2
    return max(row.relative_low, 0.0), row.relative_high


def _worker_axis(points: Sequence[CostedRow]) -> dict[str, Any]:
    """A tick for each number of workers; if there are many, for those far enough apart."""
    counts = sorted({float(point.row.workers) for point in points}) or [1.0]
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


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
