"""What a scaling study found: a table for the terminal, JSON, and one page with the figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from voxelscale import __version__
from voxelscale.console import aligned
from voxelscale.files import write_atomic
from voxelscale.pages.charts import duration, number
from voxelscale.pages.page import cards, notes, plain_table, wide, write_page
from voxelscale.scale.advice import CostedRow, Prices, advice, best, verdict
from voxelscale.scale.cost import UpdateTime
from voxelscale.scale.figure import scaling_figure

COLUMNS = (
    ("recipe", "recipe"),
    ("workers", "workers"),
    ("batch", "global batch"),
    ("updates", "updates"),
    ("lr", "learning rate"),
    ("dice", "Dice (95 % interval)"),
    ("relative", "Dice, % of 1 worker"),
    ("own", "% of its own 1 worker"),
    ("time", "time, s"),
    ("throughput", "throughput, x"),
    ("target", "time to target, x"),
    ("hours", "device hours"),
    ("busy", "devices busy, %"),
)

PRICED = {
    "workers": "workers",
    "nodes": "nodes",
    "time": "time of a training",
    "hours": "device hours",
    "price": "price",
    "kwh": "kWh",
    "dice": "Dice (95 % interval)",
    "relative": "Dice, % of 1 worker",
    "busy": "devices busy, %",
    "verdict": "one worker's Dice",
}
"""Columns of the page's first table."""


def table(findings: Sequence[CostedRow]) -> str:
    """Aligned text, a line a finding."""
    return aligned([[title for _, title in COLUMNS], *(list(_cells(f).values()) for f in findings)])


def write_results(
    findings: Sequence[CostedRow], facts: Mapping[str, Any], out: Path, target: float, prices: Prices
) -> None:
    """``scaling.json``, ``scaling.svg`` and ``scaling.html`` in `out`.

    Args:
        facts: what else ``scaling.json`` says; its ``notes`` are lines for the page.
        target: ``scale.target``, a share of one worker's Dice.
        prices: of a device.
    """
    rows = [
        {
            **asdict(f.row),
            "seconds": f.time.total,
            "samples_per_second": f.time.samples_per_second,
            "update_seconds": asdict(f.time.update),
            "validation_seconds": f.time.validation,
            "start_seconds": f.time.fixed,
            "scaling": asdict(f.scaling) if f.scaling else None,
            "device_hours": f.time.device_hours,
            "price": prices.price(f.time),
            "kwh": prices.kwh(f.time),
            "busy": f.time.busy,
            "verdict": verdict(f.row, target),
        }
        for f in findings
    ]
    advised = advice(findings, target, prices)
    write_atomic(out / "scaling.json", json.dumps({**facts, "advice": advised, "rows": rows}, indent=1))
    figure = scaling_figure(findings, target)
    write_atomic(out / "scaling.svg", figure)
    sections = [*_decision(findings, facts, target, prices), *_sections(findings, facts, figure)]
    write_page("Scaling study", sections, out / "scaling.html")


def _cells(finding: CostedRow) -> dict[str, str]:
    row, scaling = finding.row, finding.scaling
    own = _spread(row.seeds, row.dice_low, min(row.dice_high, 1.0), 1, 3)
    spread = _spread(row.seeds, row.relative_low, row.relative_high, 100, 1)
    diverged = f", {row.diverged} of {row.seeds} diverged" if row.diverged else ""
    target = scaling.target_speedup if scaling else None
    return {
        "recipe": row.recipe,
        "workers": str(row.workers),
        "batch": str(row.global_batch),
        "updates": str(row.updates),
        "lr": f"{row.learning_rate:.2g}",
        "dice": f"{row.dice:.3f}{own}{diverged}",
        "relative": f"{100 * row.relative:.1f}{spread}" if row.relative is not None else "-",
        "own": f"{100 * row.relative_own:.1f}" if row.relative_own is not None else "-",
        "time": f"{finding.time.total:.1f}",
        "throughput": f"{scaling.throughput_speedup:.1f}" if scaling else "-",
        "target": f"{target:.1f}" if target is not None else "-",
        "hours": number(finding.time.device_hours),
        "busy": f"{100 * finding.time.busy:.0f}",
    }


def _spread(seeds: int, low: float | None, high: float | None, scale: float, digits: int) -> str:
    """An interval over seeds; one seed has none, and no Dice is below 0, whatever Student's t says."""
    if seeds < 2 or low is None or high is None:
        return ""
    return f" ({scale * max(low, 0.0):.{digits}f} to {scale * high:.{digits}f})"


def _decision(
    findings: Sequence[CostedRow], facts: Mapping[str, Any], target: float, prices: Prices
) -> list[str]:
    """For a person who decides: the advice, what each number of workers costs, and how it is meant."""
    seeds = max((f.row.seeds for f in findings), default=0)
    lead = [
        facts.get("cluster", {}).get("title", "no cluster named"),
        f"{seeds} seeds" if seeds > 1 else "1 seed: no intervals",
        datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC"),
        f"voxelscale {__version__}",
    ]
    chosen = best(findings, target)
    lines = advice(findings, target, prices)
    columns, rows = _priced(findings, target, prices)
    machine = facts.get("machine", "")
    warning = [f"One worker's step was timed on {machine}. All times and costs follow from it."]
    return [
        f'<h1>Scaling study</h1><p class="lead">{escape(" · ".join(lead))}</p>',
        _cards(chosen) if chosen else "",
        notes("In short", lines, "var(--accent)"),
        notes("Whose times these are", warning if machine else []),
        "<h2>What a training costs</h2>",
        plain_table(columns, rows, "What a training costs"),
        f"<p>{escape(_meaning(target, prices))}</p>",
    ]


def _cards(chosen: CostedRow) -> str:
    cells, row = _cells(chosen), chosen.row
    share = f"{100 * row.relative:.1f} % of one worker's" if row.relative is not None else ""
    return cards(
        [
            ("Worth its price", f"{row.workers}", f"worker{'s' * (row.workers > 1)}, recipe {row.recipe}"),
            ("Time of a training", duration(chosen.time.total), "modelled"),
            ("Device hours", cells["hours"], f"devices busy for {cells['busy']} % of the time"),
            ("Dice", f"{row.dice:.3f}", share),
        ]
    )


def _priced(
    findings: Sequence[CostedRow], target: float, prices: Prices
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the first table; price and energy only where they are known."""
    unknown = {"price": prices.per_hour is None, "kwh": prices.watts is None}
    names = [name for name in PRICED if not unknown.get(name)]
    rows = []
    for finding in findings:
        price, kwh = prices.price(finding.time), prices.kwh(finding.time)
        cells = {
            **_cells(finding),
            "nodes": str(prices.nodes(finding.row.workers)),
            "time": duration(finding.time.total),
            "price": number(price or 0.0),
            "kwh": number(kwh or 0.0),
            "verdict": verdict(finding.row, target),
        }
        rows.append([escape(finding.row.recipe), *(escape(cells[name]) for name in names)])
    return ["recipe", *(PRICED[name] for name in names)], rows


def _meaning(target: float, prices: Prices) -> str:
    """What the columns of the first table mean."""
    words = [
        "Costs are those of one training; five folds cost five times as much.",
        "Device hours: all devices for the whole time, which is what is paid for.",
        "Devices busy: the share of that time in which they compute updates; the rest is start-up, "
        "waiting, communication and validation.",
        f"One worker's Dice is kept where the interval's lower end is at least {100 * target:.4g} % of it "
        "(scale.target); not certain: only the mean is, or there is one seed.",
        "Worth its price is the number of workers, among those that keep the Dice, with the least product "
        "of time and device hours: beyond it more workers cost more than they gain (Eager, Zahorjan and "
        "Lazowska 1989).",
    ]
    if prices.watts is not None:
        words.append(f"Energy: {number(prices.watts)} W a device, as if at full power for the whole time.")
    return " ".join(words)


def _sections(findings: Sequence[CostedRow], facts: Mapping[str, Any], figure: str) -> list[str]:
    workers = ", ".join(str(n) for n in sorted({f.row.workers for f in findings}))
    rows = [[escape(cell) for cell in _cells(f).values()] for f in findings]
    said = "".join(f"<li>{escape(str(note))}</li>" for note in facts.get("notes", ()))
    return [
        f"<figure>{wide(figure, 'Time and Dice against the number of workers', 'scroll')}</figure>",
        "<h2>Time and Dice</h2>",
        f"<p>The same samples for {workers} worker{'s' * (workers != '1')}; a recipe may add some.</p>",
        plain_table([title for _, title in COLUMNS], rows, "Time and Dice"),
        "<h2>Where an update's time goes, ms</h2>",
        plain_table(
            ["recipe", "workers", *_SPENT.values()],
            [_parts(f) for f in findings],
            "Where an update's time goes, ms",
        ),
        f"<h2>How the times were determined</h2><ul>{said}</ul>" if said else "",
    ]


_SPENT = {
    "compute": "compute",
    "straggling": "waiting for the slowest",
    "exposed": "exposed communication",
    "communication": "communication in all",
    "input_wait": "waiting for samples",
}


def _parts(finding: CostedRow) -> list[str]:
    update: UpdateTime = finding.time.update
    spent = [f"{1e3 * getattr(update, name):.2f}" for name in _SPENT]
    return [escape(finding.row.recipe), str(finding.row.workers), *spent]
