"""The scaling study as one figure: time against workers, and Dice relative to one worker.

Where no Dice relative to one worker exists (its Dice is 0, or it was not trained) the second panel shows
Dice itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from voxelscale.pages.charts import Frame, Line, draw_axes, draw_lines, number

TARGET = 0.99
"""Share of one worker's Dice that a recipe should keep."""

PANEL, GAP, HEAD, HEIGHT = 470, 14, 34, 330
COLOURS = 6

STYLE = """
svg.scaling { color-scheme: light dark; background: var(--card); --card: #fff; --ink: #1b2330;
  --soft: #5d6b7e; --rule: #e1e6ec; --s0: #0b7a75; --s1: #d1495b; --s2: #5b6ee1; --s3: #b7791f;
  --s4: #8a4fbf; --s5: #4f6472; }
@media (prefers-color-scheme: dark) { svg.scaling { --card: #18202a; --ink: #e7edf4; --soft: #93a2b5;
  --rule: #2a3542; --s0: #3fc1b8; --s1: #ff7b89; --s2: #94a3ff; --s3: #f0b95b; --s4: #cf9dff;
  --s5: #a9bccb; } }
.scaling text { fill: var(--soft); font: 12.5px system-ui, "Segoe UI", Roboto, sans-serif; }
.scaling .title { fill: var(--ink); font-size: 15px; font-weight: 600; }
.scaling .name { fill: var(--ink); }
.scaling .grid { stroke: var(--rule); }
.scaling .line { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round; }
.scaling .bar { fill: none; stroke: var(--c); stroke-width: 1.4; opacity: .75; }
.scaling .dot { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
.scaling .hollow { fill: var(--card); stroke: var(--c); stroke-width: 2; }
.scaling .rule { --c: var(--soft); } .scaling .line.rule { stroke-width: 1.4; }
"""

_TIMES = [
    *(m * 10.0**p for p in range(-3, 1) for m in (1, 2, 5)),
    *(10.0, 20.0, 30.0),
    *(60.0 * m for m in (1, 2, 5, 10, 20, 30)),
    *(3600.0 * m for m in (1, 2, 5, 12)),
    *(86400.0 * m for m in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)),
]


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


def as_points(rows: Iterable[Point | Mapping[str, Any]]) -> list[Point]:
    """Rows of a table as points, by number of workers; keys that a point does not have are left out."""
    names = set(Point.__dataclass_fields__)
    points = [
        row if isinstance(row, Point) else Point(**{k: v for k, v in row.items() if k in names})
        for row in rows
    ]
    return sorted(points, key=lambda point: point.workers)


def scaling_figure(rows: Iterable[Point | Mapping[str, Any]], *, target: float = TARGET) -> str:
    """Both panels as one SVG that needs nothing else and follows light and dark.

    Left: time against workers, both logarithmic; filled marks were measured, rings are the model's,
    the broken line is the first recipe's fewest workers scaled ideally (1/N). Right: Dice relative to
    one worker with its interval, and the broken line of the target; Dice itself without a target where
    there is no relative one.

    Args:
        target: share of one worker's Dice.
    """
    points = as_points(rows)
    recipes = list(dict.fromkeys(point.recipe for point in points))
    relative = not points or any(point.relative is not None for point in points)
    legend, rows_used = _legend(
        recipes,
        any(p.measured for p in points),
        not all(p.measured for p in points),
        f"ideal time; target: {_percent(target)} of the Dice" if relative else "ideal time",
    )
    if relative:
        right, title = _relative_panel(points, recipes, target), "Dice relative to 1 worker"
    else:
        right, title = _dice_panel(points, recipes), "Dice (relative to 1 worker: no value)"
    width, height = 2 * PANEL + GAP, HEAD + HEIGHT + 22 * rows_used + 8
    label = "Time of a training and its Dice against the number of workers"
    return (
        f'<svg class="scaling" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{label}"><style>{STYLE}{_classes()}</style>'
        f'<text class="title" x="14" y="24">Time of a training</text>'
        f'<text class="title" x="{PANEL + GAP + 14}" y="24">{title}</text>'
        f'<g transform="translate(0 {HEAD})">{_time_panel(points, recipes)}</g>'
        f'<g transform="translate({PANEL + GAP} {HEAD})">{right}</g>'
        f'<g transform="translate(0 {HEAD + HEIGHT})">{legend}</g></svg>'
    )


def _time_panel(points: Sequence[Point], recipes: Sequence[str]) -> str:
    ends, ticks = _worker_axis(points)
    lines: list[Line] = []
    if points:
        first = next(p for p in points if p.recipe == recipes[0])
        ideal = [(n, first.seconds * first.workers / n) for n in (first.workers, points[-1].workers)]
        lines.append(Line(name="ideal", points=ideal, dashed=True, style="rule"))
    for place, recipe in enumerate(recipes):
        mine = [p for p in points if p.recipe == recipe]
        style = f"s{place % COLOURS}"
        times = [(p.workers, p.seconds) for p in mine]
        lines.append(Line(name=recipe, points=times, dashed=place >= COLOURS, style=style))
        for measured in (False, True):
            some = [(p.workers, p.seconds) for p in mine if p.measured == measured]
            lines.append(Line(name=recipe, points=some, dots=True, hollow=not measured, style=style))
    y_ticks = _time_ticks([y for line in lines for _, y in line.points])
    frame = Frame(
        x=ends,
        y=(y_ticks[0], y_ticks[-1]),
        x_ticks=ticks,
        y_ticks=y_ticks,
        width=PANEL,
        height=HEIGHT,
        left=64,
        right=20,
        inset=8,
    )
    return draw_axes(frame, x_label="workers", y_name=_duration) + draw_lines(frame, lines)


def _relative_panel(points: Sequence[Point], recipes: Sequence[str], target: float) -> str:
    """Dice over that of one worker in per cent, 100 % and the target always in sight."""
    lines = _recipe_lines([p for p in points if p.relative is not None], recipes)
    frame = _right_frame(points, len(recipes), [target, 1.0, *_heights(lines)])
    aim = Line(name="target", points=[(x, target) for x in frame.x], dashed=True, style="rule")
    y = frame.place(frame.x[1], target)[1]
    name = f'<text x="{PANEL - 44}" y="{y + 4:.1f}">{_percent(target)}</text>'
    return draw_axes(frame, x_label="workers", y_name=_percent) + name + draw_lines(frame, [aim, *lines])


def _dice_panel(points: Sequence[Point], recipes: Sequence[str]) -> str:
    """Dice itself, from 0 on."""
    own = [
        replace(p, relative=p.dice_mean, relative_low=p.dice_low, relative_high=p.dice_high) for p in points
    ]
    lines = _recipe_lines(own, recipes)
    frame = _right_frame(points, len(recipes), [0.0, 0.1, *_heights(lines)])
    return draw_axes(frame, x_label="workers") + draw_lines(frame, lines)


def _recipe_lines(points: Sequence[Point], recipes: Sequence[str]) -> list[Line]:
    """A line for each recipe, side by side, so that their intervals do not cover each other."""
    lines = []
    for place, recipe in enumerate(recipes):
        mine = [p for p in points if p.recipe == recipe]
        lines.append(
            Line(
                name=recipe,
                points=[(p.workers, p.relative) for p in mine if p.relative is not None],
                bars=[bar for p in mine if (bar := _interval(p))[2] > bar[1]],
                dots=True,
                dashed=place >= COLOURS,
                style=f"s{place % COLOURS}",
                shift=5.0 * (place - (len(recipes) - 1) / 2),
            )
        )
    return lines


def _heights(lines: Sequence[Line]) -> list[float]:
    return [y for line in lines for _, *ys in (*line.points, *line.bars) for y in ys]


def _right_frame(points: Sequence[Point], recipes: int, drawn: Sequence[float]) -> Frame:
    ends, ticks = _worker_axis(points)
    low, high = min(drawn), max(drawn)
    pad = 0.06 * max(high - low, 0.01)
    return Frame(
        x=ends,
        y=(low - pad, high + pad),
        x_ticks=ticks,
        width=PANEL,
        height=HEIGHT,
        left=60,
        right=52,
        inset=round(2.5 * recipes) + 6,
    )


def _interval(point: Point) -> tuple[float, float, float]:
    """Where and from where to where; no share of a Dice is below 0, whatever Student's t says."""
    low, high = point.relative_low, point.relative_high
    if low is None or high is None:
        scale = (point.relative or 0.0) / point.dice_mean if point.dice_mean else 0.0
        low, high = scale * point.dice_low, scale * point.dice_high
    return point.workers, max(low, 0.0), high


def _legend(recipes: Sequence[str], measured: bool, modelled: bool, broken_line: str) -> tuple[str, int]:
    """What the marks mean, in as many rows as it takes; and how many those are."""
    entries = []
    for place, recipe in enumerate(recipes):
        style = f"s{place % COLOURS}"
        dashes = ' stroke-dasharray="5 4"' if place >= COLOURS else ""
        line = (
            f'<path class="line {style}"{dashes} d="M0 0h20"/><circle class="dot {style}" cx="10" r="4"/>'
        )
        entries.append((line, recipe))
    if measured:
        entries.append(('<circle class="dot rule" cx="10" r="4"/>', "time measured"))
    if modelled:
        entries.append(('<circle class="hollow rule" cx="10" r="4"/>', "time modelled"))
    broken = '<path class="line rule" stroke-dasharray="5 4" d="M0 0h20"/>'
    entries.append((broken, broken_line))
    drawn, x, row = "", 20.0, 0
    for mark, name in entries:
        wide = 28 + 7.0 * len(name) + 22
        if x > 20 and x + wide > 2 * PANEL + GAP:
            x, row = 20.0, row + 1
        drawn += f'<g transform="translate({x:.0f} {14 + 22 * row})">{mark}'
        drawn += f'<text class="name" x="28" y="4">{escape(name)}</text></g>'
        x += wide
    return drawn, row + 1


def _classes() -> str:
    return " ".join(f".scaling .s{i} {{ --c: var(--s{i}); }}" for i in range(COLOURS))


def _worker_axis(points: Sequence[Point]) -> tuple[tuple[float, float], list[float]]:
    """Both ends, and a tick for each number of workers; if there are many, for those far enough apart."""
    counts = sorted({float(point.workers) for point in points}) or [1.0]
    if len(counts) == 1:
        return (counts[0] / 2, counts[0] * 2), counts
    apart = (counts[-1] / counts[0]) ** (1 / 12)
    ticks = counts[:1]
    for count in counts[1:]:
        if count >= apart * ticks[-1]:
            ticks.append(count)
    return (counts[0], counts[-1]), ticks


def _time_ticks(seconds: Sequence[float]) -> list[float]:
    """Round times that enclose all; every second or third where there would be more than nine."""
    low, high = min(seconds, default=1.0), max(seconds, default=10.0)
    first = max((i for i, t in enumerate(_TIMES) if t <= low), default=0)
    last = min((i for i, t in enumerate(_TIMES) if t >= high), default=len(_TIMES) - 1)
    last = max(last, first + 1)
    step = math.ceil((last - first) / 8)
    last = min(first + step * math.ceil((last - first) / step), len(_TIMES) - 1)
    return [*_TIMES[first:last:step], _TIMES[last]]


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(1000 * seconds)} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
