"""Which cases a report shows: the best, the median and the worst, and the largest mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from voxelscale.config import ReadingConfig
from voxelscale.dataset import Source
from voxelscale.evaluate.text import text_value
from voxelscale.report.cases import read_scans, view_command
from voxelscale.report.overlays import Place
from voxelscale.report.tables import WRONG, Listed

Shown = tuple[str, str, Place | None, str]
"""A picture's title, its case, where to look, and what else is to be said."""


def pictures(
    shown: Iterable[Shown], predictions: Path, sources: dict[str, Source], reading: ReadingConfig
) -> Iterator[str]:
    """Slices with outlines of each, HTML."""
    for title, case, place, note in shown:
        scans = read_scans(case, sources, predictions, reading)
        if scans is not None:
            yield scans.block(title, f"{case}{note}", place, view_command(case))


def chosen(cases: Sequence[Mapping[str, Any]], figure: str = "Dice") -> Iterator[Shown]:
    """The best, the median and the worst case.

    Args:
        cases: with ``case`` and ``dice``; a case without one counts as right.
        figure: what ``dice`` is called.
    """
    ordered = sorted(cases, key=lambda row: -_dice_of(row))
    names = {0: "Best", len(ordered) // 2: "Median", len(ordered) - 1: "Worst"}
    if len(ordered) <= 2:
        names = {0: "Best", len(ordered) - 1: "Worst"} if len(ordered) == 2 else {0: "Only"}
    for number, name in sorted(names.items()):
        row = ordered[number]
        yield f"{name} case: {figure} {text_value(row['dice'])}", row["case"], None, ""


def mistakes(lesions: Sequence[Mapping[str, Any]], listed: Sequence[Listed]) -> Iterator[Shown]:
    """The largest missed lesion, and the most confident false positive.

    Args:
        lesions: of ``evaluation.json``, those of several classes with their ``class``.
        listed: all findings.
    """
    missed = [one for one in lesions if not one["detected"]]
    if missed:
        one = max(missed, key=lambda lesion: lesion["diameter_mm"])
        place = Place(centre=(one["x"], one["y"], one["z"]), diameter_mm=one["diameter_mm"])
        title = f"Largest missed lesion: {one['diameter_mm']:.1f} mm"
        yield f"{title}{_of(one.get('class'))}", one["case"], place, _at(place)
    wrong = [finding for finding, hit in listed if hit == WRONG]
    if wrong:
        first = max(wrong, key=lambda finding: finding.probability)
        place = Place(centre=(first.x, first.y, first.z), diameter_mm=first.diameter_mm)
        title = f"Most confident false positive: {first.probability:.3f}"
        note = f"{_at(place)}, diameter {first.diameter_mm:.1f} mm"
        yield f"{title}{_of(first.label)}", first.case, place, note


def _of(name: str | None) -> str:
    return f", {name}" if name else ""


def _at(place: Place) -> str:
    x, y, z = place.centre
    return f", at ({x:.1f}, {y:.1f}, {z:.1f}) mm"


def _dice_of(row: Mapping[str, Any]) -> float:
    """For the order: a healthy scan in which nothing was found has none, and is right."""
    return 1.0 if row["dice"] is None else float(row["dice"])
