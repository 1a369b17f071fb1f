"""Line charts as SVG that takes its colours from the page, so that they are right in the dark, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 14, 40
SMALL_WIDTH, SMALL_HEIGHT, SMALL_LEFT = 420, 270, 66
"""Of a chart that stands beside others or on a phone: its text stays legible there."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        name: in the legend.
        points: (x, y), x rising; one that is not finite is left out and the line broken there.
        stairs: whether the value holds until the next point.
        dots: whether each point is marked, with its figures as a tooltip.
        hollow: whether the marks are rings.
        titles: the marks' tooltips; (): their figures.
        bare: whether only the marks are drawn.
        bars: intervals (x, low, high), drawn upright.
        band: intervals (x, low, high), x rising, drawn as one shaded area.
        dashed: whether the line is.
        style: CSS class of its colour; "": that of its place among the lines.
        shift: pixels to the right, so that bars of several lines do not cover each other.
    """

    name: str
    points: Sequence[tuple[float, float]]
    stairs: bool = False
    dots: bool = False
    hollow: bool = False
    titles: Sequence[str] = ()
    bare: bool = False
    bars: Sequence[tuple[float, float, float]] = ()
    band: Sequence[tuple[float, float, float]] = ()
    dashed: bool = False
    style: str = ""
    shift: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The plane of a chart: its axes' ranges and where they lie in the drawing.

    Attributes:
        x, y: smallest and largest value; an axis is logarithmic where its ticks are given (all above 0).
        x_ticks, y_ticks: of a logarithmic axis.
        width, height: pixels with the margins.
        left, right: margins for labels.
        inset: between the grid's ends and the first and last x.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: Sequence[float] | None = None
    y_ticks: Sequence[float] | None = None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    inset: int = 0

    def place(self, x: float, y: float) -> tuple[float, float]:
        """A point's pixels; what lies outside is drawn on the border."""
        across = _share(x, self.x, self.x_ticks is not None)
        up = _share(y, self.y, self.y_ticks is not None)
        left = self.left + self.inset
        wide, high = self.width - self.right - self.inset - left, self.height - TOP - BOTTOM
        return left + across * wide, self.height - BOTTOM - up * high


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None,
    note: str = "",
) -> str:
    """A chart with its legend.

    Args:
        y_range: smallest and largest value; None: those of the lines and 0.
        x_ticks: all above 0; the x axis is then logarithmic between the first and the last.
        note: a sentence below the legend.
    """
    known = [point for line in lines for point in _finite(line.points)]
    xs, ys = [x for x, _ in known], [y for _, y in known]
    frame = small_frame(
        x=(x_ticks[0], x_ticks[-1]) if x_ticks else (0.0, max(xs, default=1.0) or 1.0),
        y=y_range or _padded(min(ys, default=0.0), max(ys, default=1.0)),
        x_ticks=x_ticks,
    )
    body = draw_axes(frame, x_label=x_label, y_label=y_label) + draw_lines(frame, lines)
    names = "".join(_key(line, f"s{i}") for i, line in enumerate(lines) if line.name)
    below = f"<div>{escape(note)}</div>" if note else ""
    label = f"{y_label} against {x_label}"
    return f"<figure>{chart(frame, body, label)}<figcaption>{names}{below}</figcaption></figure>"


def small_frame(
    *, x: tuple[float, float], y: tuple[float, float], x_ticks: Sequence[float] | None = None
) -> Frame:
    """The frame of a chart that stands beside others, with room for the y axis's label."""
    return Frame(x=x, y=y, x_ticks=x_ticks, width=SMALL_WIDTH, height=SMALL_HEIGHT, left=SMALL_LEFT)


def chart(frame: Frame, body: str, label: str) -> str:
    """An SVG element in the page's colours around what was drawn in a frame."""
    size = f'viewBox="0 0 {frame.width} {frame.height}"'
    return f'<svg class="chart" {size} role="img" aria-label="{escape(label)}">{body}</svg>'


def _key(line: Line, style: str) -> str:
    """A line's entry in the legend, drawn as the line is."""
    kind = " marks" if line.bare else " area" if line.band else " dashes" if line.dashed else ""
    return f'<span class="key{kind} {line.style or style}">{escape(line.name)}</span>'


def draw_axes(
    frame: Frame,
    *,
    x_label: str,
    y_label: str = "",
    y_name: Callable[[float], str] | None = None,
    x_marks: Sequence[tuple[float, str]] | None = None,
    y_whole: bool = False,
) -> str:
    """Grid, ticks and the axes' labels, to stand inside an SVG.

    Args:
        y_label: upright at the left; "": none.
        y_name: what is written at a tick.
        x_marks: what is written where along x, instead of the ticks; in two rows where one is too short.
        y_whole: whether y counts something, so that its ticks are whole.
    """
    name = y_name or number
    left, right, floor = frame.left, frame.width - frame.right, frame.height - BOTTOM
    parts = []
    for tick in frame.y_ticks or round_ticks(*frame.y, whole=y_whole):
        y = frame.place(frame.x[0], tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(name(tick))}</text>')
    if x_marks is None:
        x_marks = [(tick, number(tick)) for tick in frame.x_ticks or round_ticks(*frame.x)]
    placed = [(frame.place(at, frame.y[0])[0], text) for at, text in x_marks]
    tight = any(b - a < 4.2 * (len(s) + len(t)) + 6 for (a, s), (b, t) in pairwise(placed))
    for place, (x, text) in enumerate(placed):
        y = floor + (11 + 11 * (place % 2) if tight else 17)
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>')
    middle = (left + right) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{frame.height - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    if y_label:
        up = (TOP + floor) / 2
        parts.append(
            f'<text class="label" x="14" y="{up}" text-anchor="middle" transform="rotate(-90 14 {up})">'
            f"{escape(y_label)}</text>"
        )
    return "".join(parts)


def draw_lines(frame: Frame, lines: Sequence[Line]) -> str:
    """The lines, their intervals and marks, to stand inside an SVG; all marks lie over all lines."""
    bands = paths = marks = ""
    for place, line in enumerate(lines):
        style = line.style or f"s{place}"
        bands += _band(frame, line, style) if line.band else ""
        paths += "" if line.bare or not line.points else _path(frame, line, style)
        paths += "".join(_bar(frame, bar, line.shift, style) for bar in line.bars)
        # A line of one point would not be seen.
        alone = not line.bare and len(_finite(line.points)) == 1
        marks += _dots(frame, line, style) if line.dots or alone else ""
    return bands + paths + marks


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _path(frame: Frame, line: Line, style: str) -> str:
    path, broken = "", True
    for point in line.points:
        if not all(map(math.isfinite, point)):
            broken = True
            continue
        x, y = frame.place(*point)
        x += line.shift
        if line.stairs and not broken:
            path += f"H{x:.1f}V{y:.1f}"
        else:
            path += f"{'M' if broken else 'L'}{x:.1f} {y:.1f}"
        broken = False
    dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
    return f'<path class="line {style}"{dashes} d="{path}"/>'


def _band(frame: Frame, line: Line, style: str) -> str:
    tops = [frame.place(x, high) for x, _, high in line.band]
    floor = [frame.place(x, low) for x, low, _ in reversed(line.band)]
    outline = "L".join(f"{x:.1f} {y:.1f}" for x, y in (*tops, *floor))
    return f'<path class="band {style}" d="M{outline}Z"/>'


def _bar(frame: Frame, bar: tuple[float, float, float], shift: float, style: str) -> str:
    at, low, high = bar
    x, bottom = frame.place(at, low)
    top = frame.place(at, high)[1]
    x += shift
    path = f"M{x:.1f} {bottom:.1f}V{top:.1f}M{x - 3:.1f} {bottom:.1f}h6M{x - 3:.1f} {top:.1f}h6"
    return f'<path class="bar {style}" d="{path}"/>'


def _dots(frame: Frame, line: Line, style: str) -> str:
    drawn = ""
    kind = "dot hollow" if line.hollow else "dot"
    for i, (a, b) in enumerate(line.points):
        if not (math.isfinite(a) and math.isfinite(b)):
            continue
        x, y = frame.place(a, b)
        title = escape(line.titles[i] if line.titles else f"{line.name}: {number(b)} at {number(a)}")
        drawn += f'<circle class="{kind} {style}" cx="{x + line.shift:.1f}" cy="{y:.1f}" r="4">'
        drawn += f"<title>{title}</title></circle>"
    return drawn


def _share(value: float, ends: tuple[float, float], logarithmic: bool) -> float:
    low, high = ends
    if logarithmic:
        low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-9))
    return min(max((value - low) / (high - low or 1.0), 0.0), 1.0)


def _padded(low: float, high: float) -> tuple[float, float]:
    low = min(low, 0.0)
    return low, high + 0.05 * (high - low or 1.0)


def round_ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About five round numbers between two, 0 among them where it is; `whole`: only whole ones."""
    raw = (high - low) / 5 or 1.0
    raw = max(raw, 1.0) if whole else raw
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 and 5, or powers of ten) between two above 0, for a logarithmic axis.

    Where it spans too little for two of them, those of a linear axis.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**p for p in powers for m in steps]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) <= most:
            return ticks if len(ticks) >= 2 else [t for t in round_ticks(low, high) if t > 0]
    return ticks[:: math.ceil(len(ticks) / most)]


def number(value: float) -> str:
    """Three digits, or whole from 1000 on, or thousands as k from 10 000 on."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
