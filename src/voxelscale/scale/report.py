"""What a scaling study found: a table for the terminal, JSON, and one page with the figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from voxelscale.files import write_atomic
from voxelscale.scale.cost import Scaling, TrainingTime, UpdateTime
from voxelscale.scale.figure import Point, scaling_figure
from voxelscale.scale.study import Row

COLUMNS = (
    ("recipe", "recipe"),
    ("workers", "workers"),
    ("batch", "global batch"),
    ("updates", "updates"),
    ("lr", "learning rate"),
    ("dice", "Dice (95 %)"),
    ("relative", "Dice, % of 1 worker"),
    ("own", "% of its own 1 worker"),
    ("time", "time, s"),
    ("throughput", "throughput, x"),
    ("target", "time to target, x"),
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A row of the study with what it costs.

    Attributes:
        row: Dice over seeds.
        time: of one training, modelled.
        scaling: three scalings against one worker of the same recipe; None where there is none.
    """

    row: Row
    time: TrainingTime
    scaling: Scaling | None


def table(findings: Sequence[Finding]) -> str:
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


def write_results(findings: Sequence[Finding], facts: Mapping[str, Any], out: Path) -> None:
    """``scaling.json``, ``scaling.svg`` and ``scaling.html`` in `out`."""
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
    figure = scaling_figure([_point(f) for f in findings if f.row.relative_own or f.row.relative])
    write_atomic(out / "scaling.svg", figure)
    write_atomic(out / "scaling.html", _page(findings, facts, figure))


def _point(finding: Finding) -> Point:
    row = finding.row
    return Point(
        recipe=row.recipe,
        workers=row.workers,
        dice_mean=row.dice,
        dice_low=row.dice_low,
        dice_high=row.dice_high,
        seconds=finding.time.total,
        relative=row.relative or 0.0,
    )


def _cells(finding: Finding) -> dict[str, str]:
    row, scaling = finding.row, finding.scaling
    low, high = row.relative_low, row.relative_high
    spread = f" ({100 * low:.1f} to {100 * high:.1f})" if low is not None and high is not None else ""
    target = scaling.target_speedup if scaling else None
    return {
        "recipe": row.recipe,
        "workers": str(row.workers),
        "batch": str(row.global_batch),
        "updates": str(row.updates),
        "lr": f"{row.learning_rate:.2g}",
        "dice": f"{row.dice:.3f} ({row.dice_low:.3f} to {row.dice_high:.3f})",
        "relative": f"{100 * row.relative:.1f}{spread}" if row.relative is not None else "-",
        "own": f"{100 * row.relative_own:.1f}" if row.relative_own is not None else "-",
        "time": f"{finding.time.total:.1f}",
        "throughput": f"{scaling.throughput_speedup:.1f}" if scaling else "-",
        "target": f"{target:.1f}" if target is not None else "-",
    }


def _page(findings: Sequence[Finding], facts: Mapping[str, Any], figure: str) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for _, title in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(f).values()) + "</tr>"
        for f in findings
    )
    parts = "".join(f"<tr>{_parts(f)}</tr>" for f in findings)
    spent = "".join(f"<th>{name}</th>" for name in ("recipe", "workers", *_SPENT.values()))
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in facts.get("notes", ()))
    content = (
        "<h1>Scaling study</h1><p class='lead'>The same samples, dealt out to 1 to "
        f"{max(f.row.workers for f in findings)} workers</p>"
        f"<figure>{figure}</figure><h2>Time and Dice</h2>"
        f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"
        "<h2>Where an update's time goes, ms</h2>"
        f"<div class='wide'><table><tr>{spent}</tr>{parts}</table></div>"
        f"<h2>How it was told</h2><ul>{notes}</ul>"
    )
    page = (resources.files("voxelscale") / "report" / "page.html").read_text(encoding="utf-8")
    return Template(page).safe_substitute(title="Scaling study", body=content)


_SPENT = {
    "compute": "compute",
    "straggling": "waiting for the slowest",
    "exposed": "communication not hidden",
    "communication": "communication in all",
    "input_wait": "waiting for samples",
}


def _parts(finding: Finding) -> str:
    update: UpdateTime = finding.time.update
    cells = [finding.row.recipe, str(finding.row.workers)]
    cells += [f"{1e3 * getattr(update, name):.2f}" for name in _SPENT]
    return "".join(f"<td>{escape(cell)}</td>" for cell in cells)
