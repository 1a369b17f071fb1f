"""What a search has found: text for the terminal, and one page with everything in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from voxelscale import __version__
from voxelscale.console import count
from voxelscale.pages.page import cards, plain_table, sortable_table, write_page
from voxelscale.search import axes, figures
from voxelscale.search.figures import STATES, duration, label, param_text, score, value_text
from voxelscale.search.results import SearchResults, TrialResult, Value, utilisation
from voxelscale.search.timeline import device_spans, period, timeline

STYLE = """
.look { position: absolute; }
:root { --done: #0b7a75; --pruned: #b7791f; --running: #5b6ee1; --waiting: #c3ccd6; --infeasible: #8794a5;
  --diverged: #8a4fbf; --failed: #d1495b; --ghost: #d3dae2; --q0: #d3b548; --q1: #94b866; --q2: #4fa784;
  --q3: #2a8a94; --q4: #2a6792; --q5: #2a3c80; }
@media (prefers-color-scheme: dark) { :root { --done: #3fc1b8; --pruned: #f0b95b; --running: #94a3ff;
  --waiting: #3a4756; --infeasible: #6b7a8d; --diverged: #cf9dff; --failed: #ff7b89; --ghost: #33404f;
  --q0: #3d549c; --q1: #2f7fae; --q2: #2aa0a0; --q3: #52bd8a; --q4: #a5d66f; --q5: #f7e67e; } }
.is-done { --c: var(--done); } .is-pruned { --c: var(--pruned); } .is-running { --c: var(--running); }
.is-waiting { --c: var(--waiting); } .is-infeasible { --c: var(--infeasible); }
.is-diverged { --c: var(--diverged); } .is-failed { --c: var(--failed); } .is-best { --c: var(--ink); }
.is-rest { --c: var(--infeasible); } .ghost { --c: var(--ghost); } .shade0 { --c: var(--q0); }
.shade1 { --c: var(--q1); } .shade2 { --c: var(--q2); } .shade3 { --c: var(--q3); }
.shade4 { --c: var(--q4); } .shade5 { --c: var(--q5); }
figure h3 { margin: 2px 0 8px; font-size: 14px; font-weight: 600; }
.hollow { fill: var(--card); stroke: var(--c); stroke-width: 1.8; } .fill { fill: var(--c); }
.faint { stroke-width: 1.3; opacity: .6; } .stroke { stroke: var(--c); stroke-width: 2.5; }
svg.chart text.ink { fill: var(--ink); } .axis { stroke: var(--soft); stroke-width: 1.2; fill: none; }
svg.chart .mark { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.strand { fill: none; stroke: var(--c); stroke-width: 1.6; opacity: .85; }
.strand.ghost { stroke-width: 1; opacity: .5; }
.strand.is-best { stroke-width: 3.2; opacity: 1; } .strand:hover { stroke-width: 5; opacity: 1; }
.dots { stroke: var(--c); stroke-width: 7; stroke-linecap: round; } .stroke.ghost { stroke-width: 1.5; }
.ring { fill: none; stroke: var(--c); stroke-width: 2; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); gap: 14px; }
.slices { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 14px; }
.caption { color: var(--soft); font-size: 13px; } .key { display: inline-block; }
.scale { display: inline-block; width: 300px; margin-right: 20px; vertical-align: middle; }
.scale .boxes, .scale .ends { display: flex; } .scale .ends { justify-content: space-between; }
.scale i { flex: 1; height: 8px; background: var(--c); } .scale b { font-weight: 400; }
.strip { display: flex; height: 12px; border-radius: 6px; overflow: hidden; margin: 18px 0 6px;
  background: var(--rule); }
.strip i { background: var(--c); }
.stack { display: grid; gap: 14px; grid-template-columns: minmax(0, 1fr); }
.sortable :is(th, td):nth-child(2) { text-align: left; }
.note { display: inline-block; white-space: normal; text-align: left; min-width: 260px; }
.state::before { content: ""; display: inline-block; width: 9px; height: 9px;
  border-radius: 5px; margin-right: 7px; background: var(--c); }
"""

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
        f'<svg class="look" width="0" height="0" aria-hidden="true"><style>{STYLE}</style></svg>',
        _head(results, now),
        _cards(results, now),
        _states(results),
        "<h2>Best parameters</h2>" + _best(results),
        "<h2>History</h2>" + _history(results),
        "<h2>Keys</h2>" + _keys(results),
        "<h2>Devices</h2>"
        + (timeline(results, now) if device_spans(results, now) else _none("No work yet.")),
        "<h2>Pareto front</h2>" + _front(results) if len(results.objectives) > 1 else "",
        "<h2>Trials</h2>" + (_trials(results, now) if results.trials else _none("No trial yet.")),
        "<footer>Pruned and running trials have the Dice of their last validation. Utilisation: the share "
        "of a device's time, from its first to its last moment of work, in which a trial had it.</footer>",
    ]
    title = f"Search {results.name}" + (f": best {_first(results, best)}" if best else "")
    write_page(title, sections, out)


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
        tables.append(_aligned([head, *(_running(trial, now) for trial in running)]))
    if results.done:
        head = ["best", *(label(name) for name in results.objectives), *_short_names(results.keys)]
        tables.append(_aligned([head, *(_good(results, trial) for trial in _ranked(results)[:5])]))
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


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


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
    drawn = figures.history(results) if any(t.state != "waiting" for t in results.trials) else ""
    drawn += figures.curves(results) if any(trial.curve for trial in results.trials) else ""
    return f'<div class="pair">{drawn}</div>' if drawn else _none("No trial yet.")


def _keys(results: SearchResults) -> str:
    if not results.done or not results.keys:
        return _none("No trial is done yet." if results.keys else "No key is searched.")
    shares = (
        figures.importances(results) if results.importances else _none("Too few trials for importances.")
    )
    return f'<div class="stack">{shares}{axes.parallel_coordinates(results)}{axes.slices(results)}</div>'


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
    return f'<div class="stack">{figures.front(results)}{table}</div>'


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
