"""What a case's predictions are held against: its lesions, and marks that are no lesions but ignored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import IGNORED as IGNORED_LABEL
from voxelscale.classes import LESION, Classes, UnknownValues
from voxelscale.config import ReadingConfig
from voxelscale.console import first_and_more
from voxelscale.dataset.reading import read_truth_labels
from voxelscale.dataset.source import Source
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.luna16 import UNKNOWN_DIAMETER_MM
from voxelscale.evaluate.per_class import OneClass, each_class
from voxelscale.findings import Finding, lesions_of_mask, read_findings
from voxelscale.formats import read_label
from voxelscale.geometry import Grid, Scan, reorient

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
        mask: stored labels of `classes`, LPS order; uint8 of 0 and 1 where they are plain.
        ignored: marks of `IGNORED` kinds; those without a size count with LUNA16's 10 mm.
        classes: what the labels distinguish.
        uncounted: bool on the mask's lattice, voxels whose label is to be ignored; None: there are none.
        patient: whose it is; "": of nobody who has another case.
    """

    case: str
    mask: Scan
    ignored: tuple[Sphere, ...]
    classes: Classes = LESION
    uncounted: Scan | None = None
    patient: str = ""

    def against(self, prediction: NDArray[Any]) -> Iterator[OneClass]:
        """Truth and prediction of one class after the other, without the voxels that do not count.

        Args:
            prediction: stored labels on the mask's lattice.
        """
        uncounted = None if self.uncounted is None else self.uncounted.array
        return each_class(self.classes, self.mask.array, prediction, uncounted)

    @property
    def lesions(self) -> list[Finding]:
        """The components of the only class; computed again each time.

        Raises:
            VoxelscaleError: there are several.
        """
        if not self.classes.single:
            what = f"several classes ({first_and_more(self.classes.names)}), where one is needed"
            raise VoxelscaleError(f"{self.case}: {what}", "name the values of one class in reading.labels")
        return lesions_of_mask(self.case, self.mask.array, self.mask.grid)


def truth_of(source: Source, reading: ReadingConfig) -> Truth:
    """Read the truth about a case; a case without a label is healthy where ``reading.allow_empty`` says so.

    Raises:
        VoxelscaleError: as `voxelscale.dataset.reading.read_truth`.
    """
    labels = read_truth_labels(source, reading)
    marks = [mark for mark in labels.findings if mark.kind in IGNORED]
    spheres = tuple(Sphere(*mark.centre, mark.diameter_mm or UNKNOWN_DIAMETER_MM) for mark in marks)
    there = labels.mask.array == IGNORED_LABEL if source.classes.ignore else None
    return Truth(
        case=source.case,
        mask=labels.mask,
        ignored=spheres,
        classes=source.classes,
        uncounted=Scan(there, labels.mask.affine) if there is not None and there.any() else None,
        patient=source.patient,
    )


def findings_in(path: Path, grid: Grid, classes: Classes = LESION) -> list[Finding]:
    """The findings of a case's ``findings.json``.

    Args:
        grid: where the scan's voxels lie.
        classes: those that findings may have; of the only class they need not bear the name.

    Raises:
        VoxelscaleError: they cannot be read, a confidence is not within 0 and 1, one is of no such class,
            or one lies outside the scan: its place is not in LPS mm, or it is of another scan.
    """
    findings = read_findings(path)
    _check_classes(path, findings, classes)
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


def _check_classes(path: Path, findings: Sequence[Finding], classes: Classes) -> None:
    known = {*classes.names, ""} if classes.single else set(classes.names)
    strange = next((f.label for f in findings if f.label not in known), None)
    if strange is None:
        return
    what = f'a finding of the class "{strange}"' if strange else "a finding that names no class"
    raise VoxelscaleError(
        f"{path}: {what}; the data set has {first_and_more(classes.names)}",
        "predict with a model of these classes, or name the model's in reading.labels",
    )


def labels_in(path: Path, classes: Classes) -> Scan:
    """Stored labels of a predicted mask (LPS order).

    Raises:
        VoxelscaleError: it cannot be read, or has values that no class has.
    """
    mask = reorient(read_label(path))
    try:
        return Scan(classes.of_written(mask.array), mask.affine)
    except UnknownValues as error:
        known = first_and_more([str(value) for value in classes.written_values])
        raise VoxelscaleError(
            f"{path}: {error}; predicted masks of {first_and_more(classes.names)} have {known}",
            "predict with a model of these classes, or name the model's in reading.labels",
        ) from None
