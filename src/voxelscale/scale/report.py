"""What a scaling study found: a table for the terminal, JSON, and one page with the figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from voxelscale import __version__
from voxelscale.files import write_atomic
from voxelscale.pages.page import plain_table, wide, write_page
from voxelscale.scale.cost import Scaling, TrainingTime, UpdateTime
from voxelscale.scale.figure import Point, scaling_figure
from voxelscale.scale.study import Row

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
)


@dataclass(frozen=True, kw_only=True)
class CostedRow:
    """A row of the study with what it costs.

    Attributes:
        row: Dice over seeds.
        time: of one training, modelled.
        scaling: three scalings against one worker of the same recipe; None where there is none.
    """

    row: Row
    time: TrainingTime
    scaling: Scaling | None


def table(findings: Sequence[CostedRow]) -> str:
    """Aligned text, a line a finding."""
    lines = [[title for _, title in COLUMNS], *(list(_cells(f).values()) for f in findings)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write_results(
    findings: Sequence[CostedRow], facts: Mapping[str, Any], out: Path, target: float
) -> None:
    """``scaling.json``, ``scaling.svg`` and ``scaling.html`` in `out`.

    Args:
        facts: what else ``scaling.json`` says; its ``notes`` are lines for the page.
        target: ``scale.target``, a share of one worker's Dice.
    """
    rows = [
        {
            **asdict(f.row),
            "seconds": f.time.total,
            "samples_per_second": f.time.samples_per_second,
            "update_seconds": asdict(f.time.update),
            "validation_seconds": f.time.validation,
            "scaling": asdict(f.scaling) if f.scaling else None,
        }
        for f in findings
    ]
    write_atomic(out / "scaling.json", json.dumps({**facts, "rows": rows}, indent=1))
    figure = scaling_figure([_point(f) for f in findings], target=target)
    write_atomic(out / "scaling.svg", figure)
    write_page("Scaling study", _sections(findings, facts, figure), out / "scaling.html")


def _point(finding: CostedRow) -> Point:
    row = finding.row
    return Point(
        recipe=row.recipe,
        workers=row.workers,
        dice_mean=row.dice,
        dice_low=row.dice_low,
        dice_high=row.dice_high,
        seconds=finding.time.total,
        relative=row.relative,
        relative_low=row.relative_low,
        relative_high=row.relative_high,
    )


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
    }


def _spread(seeds: int, low: float | None, high: float | None, scale: float, digits: int) -> str:
    """An interval over seeds; one seed has none, and no Dice is below 0, whatever Student's t says."""
    if seeds < 2 or low is None or high is None:
        return ""
    return f" ({scale * max(low, 0.0):.{digits}f} to {scale * high:.{digits}f})"


def _sections(findings: Sequence[CostedRow], facts: Mapping[str, Any], figure: str) -> list[str]:
    workers = ", ".join(str(n) for n in sorted({f.row.workers for f in findings}))
    seeds = max((f.row.seeds for f in findings), default=0)
    lead = [
        f"the same samples for {workers} worker{'s' * (workers != '1')}",
        f"{seeds} seeds" if seeds > 1 else "1 seed: no intervals",
        datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC"),
        f"voxelscale {__version__}",
    ]
    rows = [[escape(cell) for cell in _cells(f).values()] for f in findings]
    said = "".join(f"<li>{escape(str(note))}</li>" for note in facts.get("notes", ()))
    return [
        f'<h1>Scaling study</h1><p class="lead">{escape(" · ".join(lead))}</p>',
        f"<figure>{wide(figure, 'Time and Dice against the number of workers', 'scroll')}</figure>",
        "<h2>Time and Dice</h2>",
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
