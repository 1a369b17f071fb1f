"""What a case's predictions are held against: its lesions, and marks that are no lesions but ignored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from voxelscale.config import ReadingConfig
from voxelscale.dataset.reading import read_truth_labels
from voxelscale.dataset.source import Source
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.luna16 import UNKNOWN_DIAMETER_MM
from voxelscale.findings import Finding, lesions_of_mask, read_findings
from voxelscale.geometry import Grid, Scan

IGNORED = ("excluded", "small", "non-nodule")
"""Kinds of marks that LUNA16 excludes: what fewer than 3 readers accepted, nodules below 3 mm, non-nodules
(Setio et al. 2017, section 2.2). A finding on one of them is not a false positive."""


class Sphere(NamedTuple):
    """A place in the patient, LPS mm, with a diameter in mm."""

    x: float
    y: float
    z: float
    diameter_mm: float


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The truth about a case.

    Attributes:
        case: its name.
        mask: uint8 of 0 and 1, LPS order.
        ignored: marks of `IGNORED` kinds; those without a size count with LUNA16's 10 mm.
    """

    case: str
    mask: Scan
    ignored: tuple[Sphere, ...]

    @property
    def lesions(self) -> list[Finding]:
        """The mask's components; computed again each time."""
        return lesions_of_mask(self.case, self.mask.array, self.mask.grid)


def truth_of(source: Source, reading: ReadingConfig) -> Truth:
    """Read the truth about a case; a case without a label is healthy where ``reading.allow_empty`` says so.

    Raises:
        VoxelscaleError: as `voxelscale.dataset.reading.read_truth`.
    """
    labels = read_truth_labels(source, reading)
    marks = [mark for mark in labels.findings if mark.kind in IGNORED]
    spheres = tuple(Sphere(*mark.centre, mark.diameter_mm or UNKNOWN_DIAMETER_MM) for mark in marks)
    return Truth(case=source.case, mask=labels.mask, ignored=spheres)


def findings_in(path: Path, grid: Grid) -> list[Finding]:
    """The findings of a case's ``findings.json``.

    Args:
        grid: where the scan's voxels lie.

    Raises:
        VoxelscaleError: they cannot be read, a confidence is not within 0 and 1, or one lies outside the
            scan: its place is not in LPS mm, or it is of another scan.
    """
    findings = read_findings(path)
    wrong = next((f.probability for f in findings if not 0 <= f.probability <= 1), None)
    if wrong is not None:
        hint = "give confidences from 0 to 1, or run voxelscale predict again"
        raise VoxelscaleError(f"{path}: a confidence of {wrong:g}", hint)
    if findings:
        index = grid.mm_to_index([(f.x, f.y, f.z) for f in findings])
        outside = np.asarray(((index < -1) | (index > grid.shape)).any(axis=-1))  # a voxel for rounding
        for finding in (f for f, out in zip(findings, outside, strict=True) if out):
            place = f"({finding.x:.1f}, {finding.y:.1f}, {finding.z:.1f}) mm"
            raise VoxelscaleError(
                f"{path}: the finding at {place} lies outside the scan",
                "give places in LPS mm, or run voxelscale predict again",
            )
    return findings
