"""Line charts as SVG that takes its colours from the page, so that they are right in the dark, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 14, 40


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        name: in the legend.
        points: (x, y), x rising.
        stairs: whether the value holds until the next point.
        dots: whether each point is marked, with its figures as a tooltip.
    """

    name: str
    points: Sequence[tuple[float, float]]
    stairs: bool = False
    dots: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None,
) -> str:
    """A chart; with `x_ticks` (all above 0) its x axis is logarithmic between the first and the last."""
    ys = [y for line in lines for _, y in line.points]
    xs = [x for line in lines for x, _ in line.points]
    low, high = y_range or _padded(min(ys, default=0.0), max(ys, default=1.0))
    if x_ticks:
        first, last = math.log(x_ticks[0]), math.log(x_ticks[-1])
    else:
        first, last = 0.0, max(xs, default=1.0) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        along = math.log(max(x, 1e-9)) if x_ticks else x
        share = min(max((along - first) / (last - first or 1.0), 0.0), 1.0)
        height = min(max((y - low) / (high - low), 0.0), 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">'
    ]
    for tick in _ticks(low, high):
        y = place(1.0, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks or _ticks(first, last):
        x = place(tick, low)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_number(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for number, line in enumerate(lines):
        parts.append(_draw(line, number, [place(x, y) for x, y in line.points]))
    parts.append("</svg>")
    names = "".join(f'<span class="key s{i}">{escape(line.name)}</span>' for i, line in enumerate(lines))
    return f"<figure>{''.join(parts)}<figcaption>{names}</figcaption></figure>"


def _draw(line: Line, number: int, places: Sequence[tuple[float, float]]) -> str:
    path = ""
    for i, (x, y) in enumerate(places):
        if i and line.stairs:
            path += f"H{x:.1f}V{y:.1f}"
        else:
            path += f"{'L' if i else 'M'}{x:.1f} {y:.1f}"
    drawn = f'<path class="line s{number}" d="{path}"/>'
    if line.dots:
        for (x, y), (a, b) in zip(places, line.points, strict=True):
            title = f"{escape(line.name)}: {_number(b)} at {_number(a)}"
            drawn += f'<circle class="dot s{number}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
            drawn += f"<title>{title}</title></circle>"
    return drawn


def _padded(low: float, high: float) -> tuple[float, float]:
    low = min(low, 0.0)
    return low, high + 0.05 * (high - low or 1.0)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two."""
    raw = (high - low) / 5 or 1.0
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
