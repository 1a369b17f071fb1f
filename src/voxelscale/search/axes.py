"""What values of the searched keys went with what results: parallel coordinates and slices."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from voxelscale.pages.charts import Frame, draw_axes, log_ticks, round_ticks
from voxelscale.search.figures import (
    WIDE,
    axis_label,
    figure,
    padded,
    param_text,
    svg,
    tick_text,
    value_range,
    value_text,
)
from voxelscale.search.results import SearchResults, TrialResult, Value

SHADES = 6
"""Colours from the worst to the best value."""

HIGH, LOW = 46, 14
"""Pixels above an axis, for the key's name, and below it."""

UNSET = 0.13
"""Share of an axis, at its foot, for trials in which the key is not active."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One quantity's scale.

    Attributes:
        key: its name.
        low, high: its ends; of a categorical half a place beyond the first and last choice.
        log: whether it is logarithmic.
        marks: what is written where.
        choices: of a categorical, evenly spaced; () for numbers.
        unset: what trials without a value are called; "": there are none.
    """

    key: str
    low: float
    high: float
    log: bool
    marks: Sequence[tuple[float, str]]
    choices: tuple[Value, ...] = ()
    unset: str = ""

    def at(self, value: Value) -> float:
        """A value as a number on the scale."""
        if self.choices:
            return float(next(i for i, choice in enumerate(self.choices) if _same(choice, value)))
        return float(value)  # type: ignore[arg-type]

    def share(self, at: float) -> float:
        """How far a number is from the low to the high end, in 0 to 1."""
        low, high = self.low, self.high
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return min(max((at - low) / (high - low), 0.0), 1.0)


@dataclass(frozen=True, kw_only=True)
class Shading:
    """Which colour a value of the first objective has: shade 0 at `worst`, the last at `best`."""

    worst: float
    best: float

    def of(self, value: float) -> int:
        """The shade's number."""
        share = (value - self.worst) / (self.best - self.worst) if self.best != self.worst else 1.0
        return min(max(int(SHADES * share), 0), SHADES - 1)


def axis_of(results: SearchResults, key: str) -> Axis:
    """The scale of a searched key: all values that trials had of it lie on it."""
    values = [trial.params[key] for trial in results.trials if key in trial.params]
    unset = "not set" if any(key not in trial.params for trial in _drawn(results)) else ""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if values and len(numbers) == len(values):
        return _numbers_axis(key, numbers, key in results.log, unset)
    choices = tuple(sorted(_distinct(values), key=_rank))
    marks = [(float(i), _choice_text(choice)) for i, choice in enumerate(choices)]
    high = max(len(choices), 1) - 0.5
    return Axis(key=key, low=-0.5, high=high, log=False, marks=marks, choices=choices, unset=unset)


def _numbers_axis(key: str, numbers: Sequence[float], log: bool, unset: str) -> Axis:
    whole = all(isinstance(value, int) for value in numbers)
    low, high = float(min(numbers)), float(max(numbers))
    log = log and low > 0
    if low == high and log:
        low, high = low / 2, high * 2
    elif low == high:
        pad = 1.0 if whole else 0.1 * abs(low) or 1.0
        low, high = low - pad, high + pad
    ticks = log_ticks(low, high, 4) if log else round_ticks(low, high, whole=whole)
    marks = [(t, tick_text("", t)) for t in ticks if t == round(t) or not whole]
    return Axis(key=key, low=low, high=high, log=log, marks=marks, unset=unset)


def shading_of(results: SearchResults) -> Shading:
    """The colours of the done trials."""
    worst, best = value_range([trial.values[0] for trial in results.done], results.maximise[0])
    return Shading(worst=worst, best=best)


def parallel_coordinates(results: SearchResults) -> str:
    """A line for each trial over an axis for each key; the last axis is the first objective, better up."""
    shading, name, best = shading_of(results), results.objectives[0], results.best
    axes = [*(axis_of(results, key) for key in results.keys), _objective_axis(results)]
    layout = _Layout(axes=axes)
    shown = _drawn(results)
    shades = {t.number: shading.of(t.values[0]) if t.state == "done" else -1 for t in shown}
    drawn = ""
    for trial in sorted(shown, key=lambda trial: (trial is best, shades[trial.number])):
        done, shade = trial.state == "done", shades[trial.number]
        style = "is-best" if trial is best else f"shade{shade}" if done else "ghost"
        said = value_text(name, trial.values[0]) if done else "pruned"
        drawn += f'<path class="strand {style}" d="{layout.path(trial)}">'
        drawn += f"<title>{escape(f'trial {trial.number}: {said}')}</title></path>"
    title = "Parallel coordinates"
    picture = svg(layout.width, layout.height, drawn + layout.axes_drawn(), title, wide=True)
    return figure(title, picture, colour_scale(results, "pruned"))


def colour_scale(results: SearchResults, pruned: str) -> str:
    """The shades with their figures, the best's and the pruned's, as HTML.

    Args:
        pruned: what the pruned ones' colour stands for.
    """
    shading, name, best = shading_of(results), results.objectives[0], results.best
    keys = f'<span class="key is-best">best, trial {best.number}</span>' if best else ""
    keys += f'<span class="key ghost">{escape(pruned)}</span>' if _any_pruned(results) else ""
    if shading.worst == shading.best:
        return keys
    step = (shading.best - shading.worst) / SHADES
    edges = [shading.worst + i * step for i in range(SHADES + 1)]
    boxes = "".join(f'<i class="shade{i}"></i>' for i in range(SHADES))
    low, middle, high = (value_text(name, edges[i]) for i in (0, SHADES // 2, SHADES))
    sign = 1.0 if results.maximise[0] else -1.0
    beyond = any(sign * trial.values[0] < sign * shading.worst for trial in results.done)
    figures = f"<b>{low}{' or worse' if beyond else ''}</b><b>{middle}</b><b>{high}</b>"
    scale = f'<span class="boxes">{boxes}</span><span class="ends">{figures}</span>'
    return f'<span class="scale">{scale}</span>{keys}'


def slices(results: SearchResults) -> str:
    """A small figure for each key: its value against the first objective, colours as in `parallel`."""
    drawn = "".join(_slice(results, axis_of(results, key)) for key in results.keys)
    beyond = colour_scale(results, "pruned, as strokes")
    legend = f"{beyond}<span>strokes at the edge: worse than the axis shows, or pruned</span>"
    return f'<div class="slices">{drawn}</div><p class="caption">{legend}</p>'


def _slice(results: SearchResults, axis: Axis) -> str:
    shading, best, name = shading_of(results), results.best, results.objectives[0]
    low, high = padded(shading.worst, shading.best)
    frame = Frame(
        x=(axis.low, axis.high),
        y=(low, high),
        x_ticks=(axis.low, axis.high) if axis.log else None,
        width=340,
        height=210,
        left=62,
        inset=8,
    )
    worse, stroke = (frame.y[0], "v-7") if results.maximise[0] else (frame.y[1], "v7")
    paths: dict[str, str] = {}
    for trial in _drawn(results):
        if axis.key not in trial.params:
            continue
        # Strokes of no length with round ends are dots at a fifth of a circle element's size.
        done = trial.state == "done"
        dot = done and low <= trial.values[0] <= high
        shade = f"shade{shading.of(trial.values[0])}" if done else "ghost"
        style = f"{'dots' if dot else 'stroke'} {shade}"
        x, y = frame.place(_across(axis, trial), trial.values[0] if dot else worse)
        paths[style] = paths.get(style, "") + f"M{x:.1f} {y:.1f}" + ("h0" if dot else stroke)
    dots = "".join(f'<path class="{style}" d="{paths[style]}"/>' for style in sorted(paths, reverse=True))
    if best is not None and axis.key in best.params:
        x, y = frame.place(_across(axis, best), best.values[0])
        dots += f'<circle class="ring is-best" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>best</title></circle>'
    x_label = f"{axis.key}{' (log)' if axis.log else ''}"
    ground = draw_axes(
        frame,
        x_label=x_label,
        y_label=axis_label(name),
        y_name=lambda v: tick_text(name, v),
        x_marks=axis.marks,
    )
    title = f"{axis_label(name)} against {x_label}"
    return f"<figure>{svg(frame.width, frame.height, ground + dots, title)}</figure>"


def _objective_axis(results: SearchResults) -> Axis:
    name, shading = results.objectives[0], shading_of(results)
    ends = (shading.worst, shading.best)
    if ends[0] == ends[1]:
        ends = padded(*ends)
    marks = [(t, tick_text(name, t)) for t in round_ticks(*sorted(ends))]
    unset = "pruned" if _any_pruned(results) else ""
    return Axis(key=axis_label(name), low=ends[0], high=ends[1], log=False, marks=marks, unset=unset)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where the axes of parallel coordinates stand."""

    axes: Sequence[Axis]
    height: int = 360

    @property
    def step(self) -> float:
        """Pixels between axes: names and marks of neighbours do not touch."""
        parts = [part for axis in self.axes for part in _name_rows(axis)]
        parts += [text for axis in self.axes for _, text in axis.marks]
        need = max(6.8 * len(part) for part in parts) + 20
        return max(need, (WIDE - 2 * self.left) / max(len(self.axes) - 1, 1))

    @property
    def left(self) -> int:
        return 70

    @property
    def width(self) -> int:
        return round(2 * self.left + self.step * (len(self.axes) - 1))

    def y(self, axis: Axis, at: float | None) -> float:
        foot = UNSET if axis.unset else 0.0
        share = 0.0 if at is None else foot + (1 - foot) * axis.share(at)
        return self.height - LOW - share * (self.height - HIGH - LOW)

    def path(self, trial: TrialResult) -> str:
        """A trial's line."""
        ats = [
            axis.at(trial.params[axis.key]) if axis.key in trial.params else None for axis in self.axes[:-1]
        ]
        ats.append(trial.values[0] if trial.state == "done" else None)
        points = [
            f"{self.left + place * self.step:.0f} {self.y(axis, at):.1f}"
            for place, (axis, at) in enumerate(zip(self.axes, ats, strict=True))
        ]
        return "M" + "L".join(points)

    def axes_drawn(self) -> str:
        """The axes with names and marks, which lie over the lines."""
        drawn = ""
        for place, axis in enumerate(self.axes):
            x = self.left + place * self.step
            drawn += f'<path class="axis" d="M{x:.0f} {HIGH}V{self.height - LOW}"/>'
            section, name = _name_rows(axis)
            drawn += f'<text x="{x:.0f}" y="14" text-anchor="middle">{escape(section)}</text>'
            drawn += f'<text class="ink" x="{x:.0f}" y="30" text-anchor="middle">{escape(name)}</text>'
            marks = [(self.y(axis, at), text) for at, text in axis.marks]
            marks += [(self.y(axis, None), axis.unset)] if axis.unset else []
            for y, text in marks:
                drawn += f'<text class="mark" x="{x + 7:.0f}" y="{y + 4:.1f}">{escape(text)}</text>'
        return drawn


def _name_rows(axis: Axis) -> tuple[str, str]:
    section, dot, name = axis.key.rpartition(".")
    return section + dot + (" (log)" if axis.log else ""), name


def _across(axis: Axis, trial: TrialResult) -> float:
    """Where a trial stands; those of one choice side by side, each always at its own place."""
    apart = 0.36 * ((0.618 * trial.number + 0.5) % 1 - 0.5) if axis.choices else 0.0
    return axis.at(trial.params[axis.key]) + apart


def _drawn(results: SearchResults) -> list[TrialResult]:
    return [trial for trial in results.trials if trial.state in ("done", "pruned")]


def _any_pruned(results: SearchResults) -> bool:
    return any(trial.state == "pruned" for trial in results.trials)


def _choice_text(value: Value) -> str:
    """[32, 32, 32] as 32×32×32."""
    items = _as_list(value)
    return "×".join(param_text(item) for item in items) if items else param_text(value)


def _as_list(value: Value) -> list[Value] | None:
    if not isinstance(value, str) or not value.startswith("["):
        return None
    try:
        items = json.loads(value)
    except ValueError:
        return None
    return items if isinstance(items, list) else None


def _same(a: Value, b: Value) -> bool:
    """True is no 1."""
    return type(a) is type(b) and a == b


def _distinct(values: Sequence[Value]) -> list[Value]:
    return list({(type(value), value): value for value in values}.values())


def _rank(value: Value) -> tuple[str, list[float], str]:
    """Numbers and lists of numbers by size, the rest by text."""
    items = _as_list(value) or [value]
    if all(isinstance(item, int | float) for item in items):
        return "", [float(item) for item in items if isinstance(item, int | float)], ""
    return "text", [], str(value)
