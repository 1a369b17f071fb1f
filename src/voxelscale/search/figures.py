"""What a search found, as interactive figures.

Optuna draws parallel coordinates, slices, contour and Pareto front. History, learning curves and devices
are drawn here: Optuna's leave out trials that failed or diverged, and know no devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from voxelscale.pages.page import LIGHT
from voxelscale.pages.plots import text
from voxelscale.search.results import SearchResults, State, TrialResult
from voxelscale.search.study import as_shown, is_number, study_of
from voxelscale.search.text import (
    STATES,
    axis_label,
    duration,
    padded,
    score,
    value_range,
    value_text,
)
from voxelscale.search.timeline import busy_share, device_spans, period

if TYPE_CHECKING:
    from optuna import Study
    from plotly.graph_objects import Figure

COLOURS = {
    "done": LIGHT["s0"],
    "pruned": LIGHT["s3"],
    "running": LIGHT["s2"],
    "waiting": "#a9b4bf",
    "infeasible": "#8794a5",
    "diverged": LIGHT["s4"],
    "failed": LIGHT["s1"],
}
"""Of trials by state; each can be seen on a light and on a dark page."""

BEST = {"color": LIGHT["ink"], "width": 2.5}
"""Line of the best trial, or of the best so far."""

CURVE_POINTS = 40
"""Of a learning curve that are drawn at most, beside its end."""

UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))


def history(results: SearchResults) -> Figure:
    """Each trial's first objective against its number, by state, and the best so far.

    The scale is that of the done trials, so that progress is seen; trials worse than it, or without a
    value, are strokes at its worse end.
    """
    name, more = results.objectives[0], results.maximise[0]
    scores = {trial.number: score(results, trial) for trial in results.trials}
    finals = [trial.values[0] for trial in results.done]
    known = finals if len(finals) > 1 else [value for value in scores.values() if value is not None]
    low, high = padded(*value_range(known, more))
    figure = _figure("trial", axis_label(name), yaxis_range=(low, high))
    for state, trials in _by_state(results.trials).items():
        values = [scores[trial.number] for trial in trials]
        placed = [value is not None and low <= value <= high for value in values]
        said = [
            value_text(name, v) if v is not None else t.note for t, v in zip(trials, values, strict=True)
        ]
        figure.add_scatter(
            name=state,
            mode="markers",
            x=[trial.number for trial in trials],
            y=[v if ok else low if more else high for v, ok in zip(values, placed, strict=True)],
            hovertext=[_said(t, one or "no value") for t, one in zip(trials, said, strict=True)],
            hoverinfo="text",
            marker={
                "color": COLOURS[state],
                "size": 9,
                "symbol": [
                    ("circle" if state == "done" else "circle-open") if ok else "line-ns-open"
                    for ok in placed
                ],
            },
            cliponaxis=False,
        )
    if results.done:
        best = accumulate((trial.values[0] for trial in results.done), max if more else min)
        numbers = [trial.number for trial in results.done]
        line = {**BEST, "shape": "hv"}
        figure.add_scatter(name="best so far", mode="lines", x=numbers, y=list(best), line=line)
    return figure


def curves(results: SearchResults) -> Figure:
    """Validation Dice of the trials against samples, by state; rungs are a factor apart: logarithmic."""
    figure = _figure("samples (log)", "Dice", xaxis_type="log")
    best = results.best
    groups = _by_state(trial for trial in results.trials if trial.curve and trial is not best)
    named: list[tuple[str, Sequence[TrialResult], Mapping[str, object]]] = [
        (state, trials, {"color": COLOURS[state], "width": 1.3}) for state, trials in groups.items()
    ]
    if best and best.curve:
        named.append((f"best, trial {best.number}", [best], BEST))
    for name, trials, line in named:
        points: list[tuple[int | None, float | None, str]] = []
        for trial in trials:
            step = max(len(trial.curve) // CURVE_POINTS, 1)
            for samples, dice in [*trial.curve[:-1:step], trial.curve[-1]]:
                # A logarithmic axis has no 0.
                said = _said(trial, f"Dice {dice:.4f} after {samples:,} samples")
                points.append((max(samples, 1), dice, said))
            points.append((None, None, ""))  # ends the trial's line
        x, y, hover = zip(*points, strict=True)
        figure.add_scatter(
            name=name, x=x, y=y, hovertext=hover, hoverinfo="text", line=line, mode="lines+markers"
        )
    return figure


def importances(results: SearchResults) -> Figure:
    """Horizontal bars with their figures, the most important at the top."""
    figure = _figure("share of 100 %", "", yaxis_autorange="reversed")
    shares = [100 * share for share in results.importances.values()]
    figure.add_bar(
        orientation="h",
        x=shares,
        y=[text(key) for key in results.importances],
        text=[f"{share:.1f} %" for share in shares],
        textposition="outside",
        marker_color=COLOURS["done"],
        hoverinfo="x+y",
        cliponaxis=False,
    )
    figure.update_xaxes(range=(0, 1.25 * max(shares, default=1.0)))
    return figure


def parallel_coordinates(results: SearchResults, study: Study) -> Figure:
    """Optuna's: a line for each done trial over the first objective and the keys.

    Args:
        study: of `study_of`, as for the other figures that take one.
    """
    from optuna.visualization import plot_parallel_coordinate

    name = axis_label(results.objectives[0])
    figure = plot_parallel_coordinate(study, target_name=text(name))
    # Whole names, in two rows.
    keys = sorted(text(key).replace(".", ".<br>", 1) for key in _tried(results))
    return figure.update_layout(xaxis_ticktext=[text(name), *keys], xaxis_side="top")


def slices(results: SearchResults, study: Study) -> dict[str, Figure]:
    """Optuna's, of each key: the first objective against it, late trials dark.

    The best trial has a ring; pruned trials are strokes at the worse end.
    """
    from optuna.visualization import plot_slice

    name = text(axis_label(results.objectives[0]))
    low, high = padded(*value_range([trial.values[0] for trial in results.done], results.maximise[0]))
    marked = [
        (trial, low if results.maximise[0] else high, "line-ns-open")
        for trial in results.trials
        if trial.state == "pruned"
    ]
    marked += [(trial, trial.values[0], "circle-open") for trial in results.done if trial is results.best]
    figures = {}
    for key in _tried(results):
        figure = plot_slice(study, [text(key)], target_name=name)
        figure.update_traces(marker_showscale=False, marker_size=8)
        own = [mark for mark in marked if key in mark[0].params]
        number, shown = is_number(results, key), as_shown(results, key)
        x = [shown(trial.params[key]) for trial, _, _ in own]
        figure.add_scatter(
            x=x if number else [repr(value) for value in x],
            y=[at for _, at, _ in own],
            mode="markers",
            marker={
                "symbol": [symbol for _, _, symbol in own],
                "size": 13,
                "color": COLOURS["pruned"],
                "line_width": 2,
            },
            hovertext=[_said(trial, "") for trial, _, _ in own],
            hoverinfo="text",
            showlegend=False,
            cliponaxis=False,
        )
        figure.update_yaxes(range=(low, high))
        if not number:  # Optuna's ticks are in quotes
            choices = figure.layout.xaxis.categoryarray
            figure.update_xaxes(tickvals=choices, ticktext=[choice[1:-1] for choice in choices])
        figures[key] = figure
    return figures


def contour(results: SearchResults, study: Study) -> Figure | None:
    """Optuna's, of the two most important keys; None where too few trials had both."""
    from optuna.visualization import plot_contour

    keys = list(results.importances)[:2]
    both = [trial for trial in results.done if all(key in trial.params for key in keys)]
    kinds = [set(map(as_shown(results, key), (trial.params[key] for trial in both))) for key in keys]
    if len(keys) < 2 or any(len(values) < 2 for values in kinds):
        return None
    name = text(axis_label(results.objectives[0]))
    return plot_contour(study, [text(key) for key in keys], target_name=name)


def front(results: SearchResults) -> Figure:
    """Optuna's, of the first two objectives; a trial may be on the front for a third one only."""
    from optuna.visualization import plot_pareto_front

    up, across = results.objectives[:2]
    figure = plot_pareto_front(
        study_of(results, len(results.objectives)),
        targets=lambda trial: (trial.values[1], trial.values[0]),
        target_names=[text(axis_label(across)), text(axis_label(up))],
    )
    looks = (("beaten", "infeasible"), ("on the front", "done"))
    for trace, (name, state) in zip(figure.data, looks, strict=True):
        trace.update(
            name=name, showlegend=True, marker={"color": COLOURS[state], "size": 9, "showscale": False}
        )
    xs = [trial.values[1] for trial in results.done]
    if min(xs) > 0 and max(xs) / min(xs) > 20:
        figure.update_xaxes(type="log", title=f"{text(axis_label(across))} (log)")
    usual = value_range([trial.values[0] for trial in results.done], results.maximise[0])
    shown = [*usual, *(trial.values[0] for trial in results.front)]
    return figure.update_yaxes(range=padded(min(shown), max(shown)))


def devices(results: SearchResults, now: float) -> Figure:
    """A row for each device with its utilisation, its stretches of work coloured by their trial's state.

    Args:
        now: seconds since the epoch; running trials last until then.
    """
    begun, ended = period(results, now)
    size, unit = next(((s, u) for s, u in UNITS if ended - begun > 3 * s), (1.0, "seconds"))
    figure = _figure(f"{unit} since the start", "", barmode="overlay", yaxis_autorange="reversed")
    bars = [
        (f"{text(device)}  {100 * busy_share(own):.1f} %", a, b, trial)
        for device, own in device_spans(results, now).items()
        for a, b, trial in own
    ]
    for state in STATES:
        mine = [bar for bar in bars if bar[3].state == state]
        if mine:
            figure.add_bar(
                name=state,
                orientation="h",
                y=[row for row, *_ in mine],
                base=[(a - begun) / size for _, a, _, _ in mine],
                x=[(b - a) / size for _, a, b, _ in mine],
                hovertext=[_said(trial, duration(b - a)) for _, a, b, trial in mine],
                hoverinfo="text",
                marker_color=COLOURS[state],
            )
    rows = list(dict.fromkeys(row for row, *_ in bars))
    return figure.update_yaxes(categoryorder="array", categoryarray=rows)


def _figure(x: str, y: str, **layout: Any) -> Figure:
    from plotly.graph_objects import Figure

    return Figure(layout={"xaxis_title": text(x), "yaxis_title": text(y), **layout})


def _by_state(trials: Iterable[TrialResult]) -> dict[State, list[TrialResult]]:
    """The trials that have begun, in the order of legends."""
    begun = [trial for trial in trials if trial.state != "waiting"]
    groups = {state: [trial for trial in begun if trial.state == state] for state in STATES}
    return {state: group for state, group in groups.items() if group}


def _said(trial: TrialResult, fact: str) -> str:
    """What stands beside a trial's mark."""
    return text(f"trial {trial.number}, {trial.state}{': ' * bool(fact)}{fact}")


def _tried(results: SearchResults) -> list[str]:
    """The keys that a done trial had."""
    return [key for key in results.keys if any(key in trial.params for trial in results.done)]
