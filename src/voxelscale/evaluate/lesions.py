"""Lesion by lesion: how well each one is outlined, by size, and which components match which.

Components are 26-connected. `docs/measures.md` explains the rules and their sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.evaluate.froc import Matches, Placed, inside_any, lies_in, pool
from voxelscale.findings import Finding, components
from voxelscale.geometry import Grid, Scan, sphere_diameter

SIZE_BINS_MM = ((0.0, 6.0), (6.0, 8.0), (8.0, 15.0), (15.0, 30.0), (30.0, math.inf))
"""Diameters at which guidelines change what is done: 6 and 8 mm (Fleischner Society, MacMahon et al. 2017),
6, 8 and 15 mm (Lung-RADS v2022, solid nodules at baseline); above 30 mm it is a mass (Hansell 2008)."""

IOU_THRESHOLDS = (0.1, 0.5)
"""As nnDetection reports them (Baumgartner et al. 2021), there of boxes."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """One scan's true and predicted components.

    Attributes:
        truth: (m,) voxels of each true one, in the order of `lesions_of_mask`.
        prediction: (n,) voxels of each predicted one.
        shared: (m, n) voxels that both have.
        confidence: (n,) of the predicted ones.
        ignored: (n,) whether a predicted one that matches no true one is no false positive.
    """

    truth: NDArray[np.int64]
    prediction: NDArray[np.int64]
    shared: NDArray[np.int64]
    confidence: NDArray[np.float64]
    ignored: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class LesionOverlap:
    """A true lesion and the predicted components that share a voxel with it.

    Attributes:
        truth, prediction, both: voxels of the lesion, of those components together, and of both.
    """

    truth: int
    prediction: int
    both: int

    @property
    def dice(self) -> float:
        """2|A∩B| / (|A| + |B|); 0 where no component shares a voxel."""
        return 2 * self.both / (self.truth + self.prediction)

    @property
    def volume_error(self) -> float | None:
        """Predicted less true volume, as a share of the true one; None where nothing was predicted."""
        return (self.prediction - self.truth) / self.truth if self.prediction else None


def pair_components(
    truth: NDArray[Any],
    prediction: NDArray[Any],
    grid: Grid,
    findings: Sequence[Finding],
    excluded: Sequence[Placed] = (),
    uncounted: Scan | None = None,
) -> Components:
    """Both masks' components and what they share.

    Args:
        truth, prediction: (z, y, x) on `grid`; above 0 is lesion.
        findings: of the prediction. A component is as confident as the finding whose centre lies nearest to
            its own, within the radius of either; where there is none, 0.
        excluded: what is neither right nor wrong to find; a component whose centre lies in it is ignored.
        uncounted: voxels (not 0) where nothing is; a component whose centre lies in one is ignored, too.
    """
    true, predicted = components(truth > 0), components(prediction > 0)
    number = np.zeros(truth.shape, np.int32)
    for at, voxels in enumerate(predicted, start=1):
        number[tuple(voxels.T)] = at
    count = len(predicted) + 1
    shared = [np.bincount(number[tuple(voxels.T)], minlength=count)[1:] for voxels in true]
    return Components(
        truth=np.asarray([len(voxels) for voxels in true], np.int64),
        prediction=np.asarray([len(voxels) for voxels in predicted], np.int64),
        shared=np.asarray(shared, np.int64).reshape(len(true), len(predicted)),
        confidence=_confidences(predicted, grid, findings),
        ignored=_ignored(predicted, grid, excluded, uncounted),
    )


def _ignored(
    predicted: Sequence[NDArray[np.int64]],
    grid: Grid,
    excluded: Sequence[Placed],
    uncounted: Scan | None,
) -> NDArray[np.bool_]:
    if not predicted or not (excluded or uncounted is not None):
        return np.zeros(len(predicted), np.bool_)
    centres = grid.index_to_mm([voxels.mean(axis=0) for voxels in predicted])
    return inside_any(centres, excluded) | lies_in(centres, uncounted)


def _confidences(
    predicted: Sequence[NDArray[np.int64]], grid: Grid, findings: Sequence[Finding]
) -> NDArray[np.float64]:
    if not findings or not predicted:
        return np.zeros(len(predicted))
    places = np.asarray([(f.x, f.y, f.z) for f in findings])
    # A finding may be several fragments, around whose common centre they lie; and files round positions, so
    # that half a voxel's diagonal is always within reach.
    reaches = np.asarray([max(f.diameter_mm, f.axial_diameter_mm) / 2 for f in findings])
    reaches = np.maximum(reaches, float(np.linalg.norm(grid.spacing)) / 2)
    confidence = []
    for voxels in predicted:
        apart = np.linalg.norm(places - grid.index_to_mm(voxels.mean(axis=0)), axis=1)
        radius = sphere_diameter(len(voxels) * grid.voxel_mm3) / 2
        within = np.where(apart <= np.maximum(reaches, radius), apart, np.inf)
        nearest = int(within.argmin())
        confidence.append(findings[nearest].probability if np.isfinite(within[nearest]) else 0.0)
    return np.asarray(confidence, np.float64)


def lesion_overlaps(found: Components) -> list[LesionOverlap]:
    """Each true lesion held against all predicted components that share a voxel with it."""
    touching = found.shared > 0
    return [
        LesionOverlap(truth=int(size), prediction=int(found.prediction[touches].sum()), both=int(row.sum()))
        for size, touches, row in zip(found.truth, touching, found.shared, strict=True)
    ]


def match_by_iou(found: Components, threshold: float) -> Matches:
    """Predicted components held against true ones, one to one, by intersection over union.

    The most confident chooses first, among equals the earlier one, and takes the true component with which
    its IoU is largest, of those that are still free and reach `threshold` (as COCO and nnDetection do).
    """
    union = found.truth[:, None] + found.prediction[None] - found.shared
    iou = found.shared / np.maximum(union, 1)
    hits = np.full(len(found.truth), np.nan)
    wrong = []
    for column in np.argsort(-found.confidence, kind="stable"):
        of_free = np.where(np.isnan(hits), iou[:, column], -1.0)
        if of_free.max(initial=-1.0) >= threshold:
            hits[int(of_free.argmax())] = found.confidence[column]
        elif not found.ignored[column]:
            wrong.append(float(found.confidence[column]))
    return Matches(hits=tuple(hits.tolist()), false_positives=tuple(wrong))


def detection_figures(matches: Sequence[Matches]) -> dict[str, Any]:
    """Sensitivity, precision and average precision of all scans' components; None where there are none."""
    found = sum(not math.isnan(hit) for m in matches for hit in m.hits)
    lesions = sum(len(m.hits) for m in matches)
    marks = found + sum(len(m.false_positives) for m in matches)
    return {
        "sensitivity": found / lesions if lesions else None,
        "precision": found / marks if marks else None,
        "average_precision": average_precision(matches),
        "true_positives": found,
        "false_positives": marks - found,
    }


def average_precision(matches: Sequence[Matches]) -> float | None:
    """Mean of the precision at 101 sensitivities from 0 to 1, as COCO has it; None without lesions.

    At each sensitivity it is the best precision at this or a higher one, 0 where none is reached. Marks of
    equal confidence come in together, so that the order of scans decides nothing.
    """
    marks = pool(matches)
    lesions = int(marks.lesions.sum())
    if not lesions:
        return None
    right = np.cumsum(marks.found)[marks.ends]
    precision = right / (marks.ends + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    first = np.searchsorted(100 * right, np.arange(101) * lesions)  # in whole numbers, which do not round
    return float(np.append(best, 0.0)[first].mean())


def by_size(
    lesions: Sequence[Finding],
    hits: Sequence[float],
    overlaps: Sequence[LesionOverlap],
    threshold: float,
) -> list[dict[str, Any]]:
    """A row for each of `SIZE_BINS_MM`; means are None where nothing is in them.

    Args:
        lesions, hits, overlaps: of all scans, in the same order; `hits` as in `Matches`.
        threshold: the confidence from which on there is one false positive per scan at most.
    """
    sizes = np.asarray([lesion.diameter_mm for lesion in lesions])
    rows = []
    for low, high in SIZE_BINS_MM:
        inside = np.flatnonzero((sizes >= low) & (sizes < high)).tolist()
        errors = [overlaps[i].volume_error for i in inside]
        known = [error for error in errors if error is not None]
        rows.append(
            {
                "from_mm": low,
                "below_mm": high if math.isfinite(high) else None,
                **sensitivity_figures([hits[i] for i in inside], threshold),
                "segmented": len(known),
                "dice": mean_or_none([overlaps[i].dice for i in inside]),
                "volume_error": mean_or_none(known),
                "absolute_volume_error": mean_or_none([abs(error) for error in known]),
            }
        )
    return rows


def sensitivity_figures(hits: Sequence[float], threshold: float) -> dict[str, Any]:
    """How many lesions, how many found, and which share at one false positive per scan; NaN is missed."""
    return {
        "lesions": len(hits),
        "detected": sum(not math.isnan(hit) for hit in hits),
        "sensitivity": mean_or_none([not math.isnan(hit) for hit in hits]),
        "sensitivity_at_1_fp": mean_or_none([hit >= threshold for hit in hits]),
    }


def mean_or_none(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return float(np.mean(values)) if len(values) else None
