"""What a search found, as SVG figures: values, learning curves, importances, the front."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape

from voxelscale.pages.charts import Frame, Line, draw_axes, draw_lines, log_ticks, round_ticks
from voxelscale.pages.page import wide as scrolled
from voxelscale.search.results import SearchResults, State, TrialResult, Value

STATES: tuple[State, ...] = ("done", "pruned", "running", "waiting", "infeasible", "diverged", "failed")
"""In the order of legends."""

LABELS = {"dice": "Dice", "time": "time", "parameters": "parameters"}
WIDE = 1100
"""Pixels of a figure as wide as the page."""

CURVE_POINTS = 40
"""Of a learning curve that are drawn at most, its end among them."""

ROW = 22
"""Pixels of a row of bars."""

Dots = list[tuple[float, float, str]]
"""Places and tooltips."""


def value_text(objective: str, value: float) -> str:
    """An objective's value for people: Dice to four places, times with a unit, 1.23M parameters."""
    if objective == "dice":
        return f"{value:.4f}"
    if objective == "time":
        return duration(value)
    for letter, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"


def tick_text(objective: str, value: float) -> str:
    """An objective's value on an axis; times in s."""
    return value_text("", value) if abs(value) >= 10_000 else plain_number(value)


def plain_number(value: float) -> str:
    """At most four digits, small ones as 1e-5."""
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def param_text(value: Value) -> str:
    """A searched key's value as it would stand in YAML, floats with four digits."""
    if isinstance(value, float):
        return plain_number(value)
    return value if isinstance(value, str) else json.dumps(value)


def duration(seconds: float) -> str:
    """Seconds for people, in a unit that leaves two to four digits."""
    for unit, size, least in (("d", 86400.0, 2.0), ("h", 3600.0, 2.0), ("min", 60.0, 2.0)):
        if seconds >= least * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def label(objective: str) -> str:
    """An objective's name for people."""
    return LABELS.get(objective, objective)


def axis_label(objective: str) -> str:
    """An objective's name with its unit."""
    return "time, s" if objective == "time" else label(objective)


def score(results: SearchResults, trial: TrialResult) -> float | None:
    """The first objective; the last validation's Dice where a trial has not ended with one."""
    if trial.values:
        value = trial.values[0]
    elif trial.curve and results.objectives[0] == "dice":
        value = trial.curve[-1][1]
    else:
        return None
    return value if math.isfinite(value) else None


def value_range(values: Sequence[float], more: bool) -> tuple[float, float]:
    """The worst and the best value that a scale should show.

    A few hopeless trials would squeeze all others into a line: what is more than three times as far
    from the best as the median lies beyond the scale.

    Args:
        more: whether more is better.
    """
    sign = 1.0 if more else -1.0
    goods = sorted(sign * value for value in values)
    if not goods:
        return 0.0, 1.0
    best, middle = goods[-1], goods[len(goods) // 2]
    worst = max(goods[0], best - 3 * (best - middle)) if best > middle else goods[0]
    return sign * worst, sign * best


def history(results: SearchResults) -> str:
    """Each trial's first objective against its number, by state, and the best so far.

    The scale is that of the done trials, so that progress is seen; trials beyond it are strokes.
    """
    name, more = results.objectives[0], results.maximise[0]
    scores = [(trial, score(results, trial)) for trial in results.trials if trial.state != "waiting"]
    known = [value for _, value in scores if value is not None]
    finals = [trial.values[0] for trial in results.done]
    low, high = padded(*value_range(finals if len(finals) > 1 else known, more))
    last = max((trial.number for trial, _ in scores), default=1)
    frame = Frame(x=(0.0, max(last, 1)), y=(low, high), inset=8)
    dots, strokes = dict[str, Dots](), ""
    for trial, value in scores:
        said = value_text(name, value) if value is not None else trial.note or "no value"
        title = f"trial {trial.number}, {trial.state}: {said}"
        if value is not None and low <= value <= high:
            dots.setdefault(trial.state, []).append((trial.number, value, title))
        else:
            strokes += _stroke(frame, trial, title, up=more)
    best = _best_so_far(results, last)
    lines = [Line(name="best so far", points=best, stairs=True, style="is-best")] if best else []
    lines += [_dots(state, dots[state]) for state in STATES if state in dots]
    whole = [(t, f"{t:g}") for t in round_ticks(*frame.x, whole=True)]
    axes = draw_axes(frame, x_label="trial", y_name=lambda y: tick_text(name, y), x_marks=whole)
    caption = legend([state for state in STATES if any(trial.state == state for trial, _ in scores)])
    caption += _key("is-best", "best so far") if best else ""
    caption += f"<span>strokes: {'worse, or ' * bool(known)}without a value</span>" if strokes else ""
    title = f"Trials by {axis_label(name)}"
    drawn = svg(frame.width, frame.height, axes + strokes + draw_lines(frame, lines), title)
    return figure(title, drawn, caption)


def curves(results: SearchResults) -> str:
    """Validation Dice of the trials against samples; the ends are marked by state."""
    shown = [trial for trial in results.trials if trial.curve]
    points = {t.number: _thinned([p for p in t.curve if p[0] > 0] or t.curve) for t in shown}
    dice = [y for curve in points.values() for _, y in curve]
    frame = _samples_frame([x for curve in points.values() for x, _ in curve], dice)
    best = results.best
    ordered = sorted(shown, key=lambda t: (t is best, t.state == "done", t.state == "running"))
    lines, ends = [], dict[str, Dots]()
    for trial in ordered:
        style = "is-best" if trial is best else f"faint is-{trial.state}"
        lines.append(Line(name="", points=points[trial.number], style=style))
        samples, value = trial.curve[-1]
        title = f"trial {trial.number}, {trial.state}: Dice {value:.4f} after {samples:,} samples"
        ends.setdefault("best" if trial is best else trial.state, []).append((samples, value, title))
    marks = [_dots(state, ends[state]) for state in (*STATES, "best") if state in ends]
    log = frame.x_ticks is not None
    ticks = frame.x_ticks or round_ticks(*frame.x, whole=True)
    marks_x = [(t, plain_number(t) if t < 10_000 else f"{t / 1000:g}k") for t in ticks]
    x_label = f"samples{' (log)' if log else ''}"
    axes = draw_axes(frame, x_label=x_label, y_name=plain_number, x_marks=marks_x)
    caption = legend([state for state in STATES if state in ends])
    caption += _key("is-best", f"best, trial {best.number}") if best and best.curve else ""
    title = "Learning curves: validation Dice"
    return figure(
        title, svg(frame.width, frame.height, axes + draw_lines(frame, lines + marks), title), caption
    )


def importances(results: SearchResults) -> str:
    """Horizontal bars with their figures."""
    shares = results.importances
    left = 24 + 7 * min(max((len(key) for key in shares), default=0), 40)
    width, most = WIDE, max(shares.values(), default=0.0) or 1.0
    body = ""
    for row, (key, share) in enumerate(shares.items()):
        y = ROW * row + 4
        wide = (width - left - 64) * max(share, 0.0) / most
        body += f'<text class="ink" x="{left - 10}" y="{y + 13}" text-anchor="end">{escape(key)}</text>'
        body += (
            f'<rect class="is-done fill" x="{left}" y="{y}" width="{wide:.1f}" height="{ROW - 6}" rx="3"/>'
        )
        body += f'<text x="{left + wide + 8:.1f}" y="{y + 13}">{100 * share:.1f} %</text>'
    title = "Importance of each key"
    method = (
        f"How much each key decides which trials are among the best by {label(results.objectives[0])}, as "
        "shares of 100 %. Method: PED-ANOVA (Watanabe, Bansal, Hutter, IJCAI 2023)."
    )
    return figure(title, svg(width, ROW * len(shares) + 8, body, title, wide=True), escape(method))


def front(results: SearchResults) -> str:
    """The first objective against the second, and the front of those two as stairs.

    A trial that is on the front only for a third objective is marked and lies off the stairs.
    """
    (across, up), on_front = (results.objectives[1], results.objectives[0]), results.front
    xs = [trial.values[1] for trial in results.done]
    log = min(xs) > 0 and max(xs) / min(xs) > 20
    x = _log_padded(min(xs), max(xs)) if log else padded(*_front_range(results, 1))
    y = padded(*_front_range(results, 0))
    ticks = log_ticks(*x) if log else None
    frame = Frame(x=x, y=y, x_ticks=ticks, width=WIDE, height=340, inset=4)
    rest, chosen = Dots(), Dots()
    for trial in results.done:
        values = zip(results.objectives, trial.values, strict=True)
        said = ", ".join(f"{label(name)} {value_text(name, value)}" for name, value in values)
        dots = chosen if any(trial is other for other in on_front) else rest
        dots.append((trial.values[1], trial.values[0], f"trial {trial.number}: {said}"))
    stairs = _stairs(results, frame)
    lines = [
        Line(name="", points=stairs, stairs=True, style="is-best"),
        _dots("rest", rest),
        _dots("done", chosen),
    ]
    marks = [(t, tick_text(across, t)) for t in frame.x_ticks or round_ticks(*x)]
    x_label = f"{axis_label(across)}{' (log)' if log else ''}"
    axes = draw_axes(frame, x_label=x_label, y_name=lambda v: tick_text(up, v), x_marks=marks)
    title = f"Trials by {axis_label(up)}, against {axis_label(across)}"
    caption = _key("is-done", "on the front") + _key("is-rest", "beaten") + _key("is-best", "front")
    drawn = svg(frame.width, frame.height, axes + draw_lines(frame, lines), title, wide=True)
    return figure(title, drawn, caption)


def svg(width: int, height: int, body: str, name: str, *, wide: bool = False) -> str:
    """An SVG element in the page's colours; `wide`: rather scrolled than shrunk until it cannot be read."""
    style = f' style="min-width:{round(0.85 * width)}px"' if wide else ""
    size = f'viewBox="0 0 {width} {height}"{style}'
    drawn = f'<svg class="chart" {size} role="img" aria-label="{escape(name)}">{body}</svg>'
    return scrolled(drawn, name, "scroll") if wide else drawn


def figure(title: str, drawn: str, caption: str = "") -> str:
    """A drawing with its title and its caption, which is HTML."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{drawn}{below}</figure>"


def legend(states: Iterable[str]) -> str:
    """The states' names with their colours, as HTML."""
    return "".join(_key(f"is-{state}", state) for state in states)


def _key(style: str, name: str) -> str:
    return f'<span class="key {style}">{escape(name)}</span>'


def _dots(state: str, dots: Dots) -> Line:
    """Marks only; rings for trials that have not come to their end."""
    return Line(
        name=state,
        points=[(x, y) for x, y, _ in dots],
        titles=[title for _, _, title in dots],
        dots=True,
        hollow=state not in ("done", "best", "rest"),
        bare=True,
        style=f"is-{state}",
    )


def _stroke(frame: Frame, trial: TrialResult, title: str, up: bool) -> str:
    """At the foot where up is better, else at the top."""
    x, y = frame.place(trial.number, frame.y[0 if up else 1])
    path = f'<path class="stroke is-{trial.state}" d="M{x:.1f} {y:.1f}v{-9 if up else 9}">'
    return f"{path}<title>{escape(title)}</title></path>"


def _best_so_far(results: SearchResults, last: int) -> list[tuple[float, float]]:
    sign = 1.0 if results.maximise[0] else -1.0
    points: list[tuple[float, float]] = []
    for trial in sorted(results.done, key=lambda trial: trial.number):
        if not points or sign * trial.values[0] > sign * points[-1][1]:
            points.append((trial.number, trial.values[0]))
    return [*points, (last, points[-1][1])] if points else []


def _front_range(results: SearchResults, place: int) -> tuple[float, float]:
    """An objective's ends: a hopeless trial may lie beyond, but none of the front."""
    usual = value_range([trial.values[place] for trial in results.done], results.maximise[place])
    shown = [*usual, *(trial.values[place] for trial in results.front)]
    return min(shown), max(shown)


def _stairs(results: SearchResults, frame: Frame) -> list[tuple[float, float]]:
    """The border of what the done trials beat in the first two objectives, from best to worst x."""
    up, across = (1.0 if more else -1.0 for more in results.maximise[:2])
    places = [(t.values[1], t.values[0]) for t in results.done]
    points: list[tuple[float, float]] = []
    for x, y in sorted(places, key=lambda place: (-across * place[0], -up * place[1])):
        if not points or up * y > up * points[-1][1]:
            points.append((x, y))
    worst = (0, 1) if across > 0 else (1, 0)
    foot = (points[0][0], frame.y[0] if up > 0 else frame.y[1])
    return [foot, *points, (frame.x[worst[0]], points[-1][1])]


def _samples_frame(samples: Sequence[int], dice: Sequence[float]) -> Frame:
    """Rungs are a factor apart: on a logarithmic axis they are at even distances."""
    low, high = min(samples, default=0), max(samples, default=1)
    y = padded(min(dice, default=0.0), max(dice, default=1.0))
    if low > 0 and high >= 8 * low:
        return Frame(x=(low, high), y=y, x_ticks=log_ticks(low, high), inset=8)
    return Frame(x=(0.0, max(high, 1)), y=y, inset=8)


def _thinned(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    step = -(-len(curve) // CURVE_POINTS)
    return [*curve[: -1 : max(step, 1)], curve[-1]]


def padded(a: float, b: float) -> tuple[float, float]:
    """A range with room at both ends; no Dice, time or count is below 0, nor is its axis."""
    low, high = min(a, b), max(a, b)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return max(low - pad, 0.0) if low >= 0 else low - pad, high + pad


def _log_padded(low: float, high: float) -> tuple[float, float]:
    pad = (high / low) ** 0.04
    return low / pad, high * pad
