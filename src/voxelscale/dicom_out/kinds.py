"""What can be written of a prediction for a hospital, and what an earlier prediction left of it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from voxelscale.console import first_of, warn
from voxelscale.errors import VoxelscaleError
from voxelscale.predict.case import CASE_FACTS

KINDS = ("seg", "probability", "sr", "rtstruct")
"""DICOM objects of a case: a binary SEG, a fractional one, a report of measurements, contours."""

ALL_KINDS = (*KINDS, "page")
"""What can be written of a case: beside these a page of HTML."""

MOST_NAMED = 10
"""Files that a warning names at most."""


def kinds_of(text: str) -> tuple[str, ...]:
    """The kinds in a list with commas, in the order of `ALL_KINDS`.

    Raises:
        VoxelscaleError: one is unknown, or there is none.
    """
    asked = {word.strip().casefold() for word in text.split(",")} - {""}
    wrong = sorted(asked - set(ALL_KINDS))
    if wrong or not asked:
        what = f"{wrong[0] if wrong else repr(text)}: nothing that can be written"
        raise VoxelscaleError(what, f"name one or more of {', '.join(ALL_KINDS)}, as --dicom-out seg,sr")
    return tuple(kind for kind in ALL_KINDS if kind in asked)


def warn_of_earlier(predictions: Path, cases: Collection[str]) -> None:
    """Warn of DICOM files and pages beside a prediction that were written of the one before it."""
    old = []
    for case in cases:
        folder = predictions / case
        since = (folder / CASE_FACTS).stat().st_mtime_ns
        there = [folder / "page.html", *(f for kind in KINDS for f in folder.glob(f"{kind}*.dcm"))]
        old += [f"{case}/{f.name}" for f in there if f.is_file() and f.stat().st_mtime_ns < since]
    if old:
        what = f"{predictions}: files of earlier predictions: {first_of(old, MOST_NAMED)}"
        warn(f"{what}; write them again with voxelscale export-dicom")
