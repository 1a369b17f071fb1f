"""What a search has found: text for the terminal, and one page with everything in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from voxelscale import __version__
from voxelscale.console import aligned, count
from voxelscale.pages.page import cards, plain_table, sortable_table, write_page
from voxelscale.pages.plots import plot, scripts
from voxelscale.search import figures
from voxelscale.search.results import SearchResults, TrialResult, Value
from voxelscale.search.study import study_of
from voxelscale.search.text import STATES, axis_label, duration, label, param_text, score, value_text
from voxelscale.search.timeline import device_spans, period, utilisation

STYLE = """
.pair, .slices { display: grid; gap: 14px; }
.pair { grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); }
.slices { grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); }
.caption { color: var(--soft); font-size: 13px; } .key { display: inline-block; margin-right: 16px; }
.strip { display: flex; height: 12px; border-radius: 6px; overflow: hidden; margin: 18px 0 6px;
  background: var(--rule); }
.strip i { background: var(--c); }
.stack { display: grid; gap: 14px; grid-template-columns: minmax(0, 1fr); }
.sortable :is(th, td):nth-child(2) { text-align: left; }
.note { display: inline-block; white-space: normal; text-align: left; min-width: 260px; }
:is(.state, .key)::before { content: ""; display: inline-block; width: 9px; height: 9px;
  border-radius: 5px; margin-right: 7px; background: var(--c); }
"""

ROW = 26
"""Pixels of a row of bars."""

LAST = "-1e300"
"""What a missing value sorts as."""


def write_report(results: SearchResults, out: Path, now: float) -> None:
    """Write one self-contained HTML page.

    Args:
        results: what has been found so far.
        out: the page.
        now: seconds since the epoch; running trials count until then.

    Raises:
        VoxelscaleError: the file cannot be written.
    """
    best = results.best
    sections = [
        f"<style>{STYLE}{''.join(f'.is-{s} {{ --c: {c}; }}' for s, c in figures.COLOURS.items())}</style>",
        _head(results, now),
        _cards(results, now),
        _states(results),
        "<h2>Best parameters</h2>" + _best(results),
        "<h2>History</h2>" + _history(results),
        "<h2>Keys</h2>" + _keys(results),
        "<h2>Devices</h2>" + _devices(results, now),
        "<h2>Pareto front</h2>" + _front(results) if len(results.objectives) > 1 else "",
        "<h2>Trials</h2>" + (_trials(results, now) if results.trials else _none("No trial yet.")),
        "<footer>Pruned and running trials have the Dice of their last validation. Utilisation: the share "
        "of a device's time, from its first to its last moment of work, in which a trial had it.</footer>",
    ]
    title = f"Search {results.name}" + (f": best {_first(results, best)}" if best else "")
    write_page(title, sections, out, scripts())


def status_table(results: SearchResults, now: float) -> str:
    """Aligned text: counts, utilisation and the best so far; running trials; the best five.

    Args:
        now: seconds since the epoch; running trials count until then.
    """
    counts = Counter(trial.state for trial in results.trials)
    shown = [
        f"{counts[state]} {state}" for state in STATES if counts[state] or state in ("done", "running")
    ]
    best = f"best {_first(results, results.best)}" if results.best else "no best yet"
    parts = [f"{', '.join(shown)} of {results.target}", f"devices {_percent(results, now)} busy", best]
    tables = [f"{results.name}: {'; '.join(parts)}"]
    running = [trial for trial in results.trials if trial.state == "running"]
    if running:
        head = ["running", "worker", "last Dice", "samples", "minutes"]
        tables.append(aligned([head, *(_running(trial, now) for trial in running)]))
    if results.done:
        head = ["best", *(label(name) for name in results.objectives), *_short_names(results.keys)]
        tables.append(aligned([head, *(_good(results, trial) for trial in _ranked(results)[:5])]))
    return "\n\n".join(tables)


def _running(trial: TrialResult, now: float) -> list[str]:
    worker = trial.stretches[-1].worker if trial.stretches else "-"
    dice, samples = (f"{trial.curve[-1][1]:.4f}", f"{trial.curve[-1][0]:,}") if trial.curve else ("-", "-")
    return [str(trial.number), worker, dice, samples, f"{_seconds(trial, now) / 60:.1f}"]


def _good(results: SearchResults, trial: TrialResult) -> list[str]:
    params = [_param(trial.params, key) for key in results.keys]
    return [str(trial.number), *_values(results, trial), *params]


def _short_names(keys: Sequence[str]) -> list[str]:
    """Of ``optim.lr`` only ``lr``, where no other key ends so: a terminal is narrow."""
    ends = [key.rpartition(".")[2] for key in keys]
    counts = Counter([*ends, "name"])  # of what, only the section says
    return [end if counts[end] == 1 else key for end, key in zip(ends, keys, strict=True)]


def _head(results: SearchResults, now: float) -> str:
    at = datetime.fromtimestamp(now, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [count(len(results.keys), "key"), f"sampler {results.sampler}", f"pruner {results.pruner}"]
    parts += [at, f"voxelscale {__version__}"]
    return f'<h1>Search {escape(results.name)}</h1><p class="lead">{escape(" · ".join(parts))}</p>'


def _cards(results: SearchResults, now: float) -> str:
    begun, ended = period(results, now)
    spans, best = device_spans(results, now), results.best
    hours = sum(e - b for own in spans.values() for b, e, _ in own) / 3600
    over = sum(trial.state not in ("waiting", "running") for trial in results.trials)
    none = "–"
    first = results.objectives[0]
    facts = [
        (
            f"Best {label(first)}",
            value_text(first, best.values[0]) if best else none,
            f"trial {best.number}" if best else "no trial is done yet",
        ),
        ("Trials that have ended", str(over), f"of {results.target} wanted"),
        ("Device utilisation", _percent(results, now), count(len(spans), "device")),
        ("Since the start", duration(ended - begun) if spans else none, f"{hours:.3g} device hours"),
    ]
    return cards(facts)


def _states(results: SearchResults) -> str:
    """Number of trials in each state, as a bar and in figures."""
    counts = Counter(trial.state for trial in results.trials)
    whole = max(results.target, len(results.trials), 1)
    bar = "".join(
        f'<i class="is-{state}" style="width:{100 * counts[state] / whole:.2f}%"></i>'
        for state in STATES
        if counts[state]
    )
    names = "".join(f'<span class="key is-{state}">{counts[state]} {state}</span>' for state in STATES)
    return f'<div class="strip">{bar}</div><div class="caption">{names}</div>'


def _best(results: SearchResults) -> str:
    best = results.best
    if best is None:
        return _none("No trial is done yet.")
    default = next((trial for trial in results.trials if trial.number == 0), None)
    rows = [
        (label(name), mine, own)
        for name, mine, own in zip(
            results.objectives, _values(results, best), _values(results, default), strict=True
        )
    ]
    for key in results.keys:
        rows.append((key, _param(best.params, key), _param(default.params, key) if default else "–"))
    cells = [
        [escape(name), f"<b>{escape(mine)}</b>" if mine != own else escape(mine), escape(own)]
        for name, mine, own in rows
    ]
    table = plain_table(["", f"best, trial {best.number}", "default, trial 0"], cells, "Best parameters")
    return f"{table}<pre>voxelscale train store/ run/ --config best.yaml</pre>"


def _history(results: SearchResults) -> str:
    if all(trial.state == "waiting" for trial in results.trials):
        return _none("No trial yet.")
    title = f"Trials by {axis_label(results.objectives[0])}"
    strokes = "Strokes at the edge: worse than the scale, or without a value. A double click shows all."
    drawn = plot(figures.history(results), title, escape(strokes))
    if any(trial.curve for trial in results.trials):
        drawn += plot(figures.curves(results), "Learning curves: validation Dice")
    return f'<div class="pair">{drawn}</div>'


def _keys(results: SearchResults) -> str:
    if not results.done or not results.keys:
        return _none("No trial is done yet." if results.keys else "No key is searched.")
    study = study_of(results)
    drawn = _importances(results)
    drawn += plot(
        figures.parallel_coordinates(results, study),
        "Parallel coordinates",
        "A line for each done trial. None: the key is not active in it.",
        width=110 * (len(results.keys) + 1),
    )
    if found := figures.contour(results, study):
        drawn += plot(
            found, "The two most important keys", "Between the trials the colours are interpolated."
        )
    objective = axis_label(results.objectives[0])
    slices = "".join(
        plot(figure, f"{objective} against {key}", height=240)
        for key, figure in figures.slices(results, study).items()
    )
    said = "The ring is the best trial, strokes at the edge are pruned ones; colours by trial number."
    return f'<div class="stack">{drawn}<div class="slices">{slices}</div>{_none(said)}</div>'


def _importances(results: SearchResults) -> str:
    if not results.importances:
        return _none("Too few trials for importances.")
    method = (
        f"How much each key decides which trials are among the best by {label(results.objectives[0])}, as "
        "shares of 100 %. Method: PED-ANOVA (Watanabe, Bansal, Hutter, IJCAI 2023)."
    )
    height = 70 + ROW * len(results.importances)
    return plot(figures.importances(results), "Importance of each key", escape(method), height=height)


def _devices(results: SearchResults, now: float) -> str:
    spans = device_spans(results, now)
    if not spans:
        return _none("No work yet.")
    title = f"When which device worked: {_percent(results, now)} of the time overall"
    return plot(figures.devices(results, now), title, height=110 + ROW * len(spans))


def _front(results: SearchResults) -> str:
    if not results.done:
        return _none("No trial is done yet.")
    names = [label(name) for name in results.objectives]
    rows = []
    on_front = results.front
    for trial in (trial for trial in _ranked(results) if any(trial is other for other in on_front)):
        cells = [str(trial.number), *_values(results, trial)]
        cells += [_param(trial.params, key) for key in results.keys]
        rows.append([escape(cell) for cell in cells])
    table = plain_table(["trial", *names, *results.keys], rows, "Trials on the front", "wide tall")
    title = " against ".join(axis_label(name) for name in results.objectives[:2])
    drawn = plot(figures.front(results), f"Trials by {title}")
    return f'<div class="stack">{drawn}{table}</div>'


def _trials(results: SearchResults, now: float) -> str:
    """All trials; the page's script sorts them by the column that is clicked."""
    names = [label(name) for name in results.objectives]
    columns = ["trial", "state", *names, "samples", *results.keys, "seconds", "note"]
    rows = [_cells(results, trial, now) for trial in results.trials]
    return sortable_table(columns, rows, "All trials", "wide tall")


def _cells(results: SearchResults, trial: TrialResult, now: float) -> list[tuple[str, str]]:
    """Each column's HTML, and what it is sorted by: the first as text, all others as numbers."""
    cells = [
        (str(trial.number), f"{trial.number:06d}"),
        (f'<span class="state is-{trial.state}">{trial.state}</span>', str(STATES.index(trial.state))),
    ]
    value = score(results, trial)
    for place, name in enumerate(results.objectives):
        own = trial.values[place] if trial.values else value if place == 0 else None
        cells.append(("–", LAST) if own is None else (escape(value_text(name, own)), f"{own:g}"))
    samples = trial.curve[-1][0] if trial.curve else 0
    cells.append((f"{samples:,}", str(samples)))
    for key in results.keys:
        known = trial.params.get(key)
        by = f"{known:g}" if isinstance(known, int | float) else LAST
        cells.append((escape(_param(trial.params, key)), by))
    seconds = f"{_seconds(trial, now):.0f}"
    note = f'<span class="note">{escape(trial.note)}</span>' if trial.note else ""
    return [*cells, (seconds, seconds), (note, str(len(trial.note)))]


def _none(text: str) -> str:
    return f'<p class="caption">{escape(text)}</p>'


def _param(params: Mapping[str, Value], key: str) -> str:
    return param_text(params[key]) if key in params else "–"


def _values(results: SearchResults, trial: TrialResult | None) -> list[str]:
    values = trial.values if trial else ()
    names = results.objectives
    return [value_text(n, v) for n, v in zip(names, values, strict=True)] if values else ["–"] * len(names)


def _first(results: SearchResults, trial: TrialResult) -> str:
    """A trial's first objective with its name and the trial's number."""
    name = results.objectives[0]
    return f"{label(name)} {value_text(name, trial.values[0])} (trial {trial.number})"


def _ranked(results: SearchResults) -> list[TrialResult]:
    sign = -1.0 if results.maximise[0] else 1.0
    return sorted(results.done, key=lambda trial: sign * trial.values[0])


def _seconds(trial: TrialResult, now: float) -> float:
    """Wall time of all its stretches."""
    return sum(max((now if s.ended is None else s.ended) - s.begun, 0.0) for s in trial.stretches)


def _percent(results: SearchResults, now: float) -> str:
    return f"{100 * utilisation(results, now):.1f} %"
