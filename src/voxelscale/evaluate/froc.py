"""Lesions found against false positives, by LUNA16's rules.

A mark hits a lesion when it lies nearer to the lesion's centre than the lesion's radius. Of several hits
on one lesion the most confident counts and the others are neither right nor wrong. Nor is a mark that
hits no lesion but an excluded finding. Every other mark is a false positive (Setio et al., "Validation,
comparison, and combination of algorithms for automatic detection of pulmonary nodules in CT: the LUNA16
challenge", 2017, and the challenge's own script). `docs/measures.md` explains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from voxelscale.evaluate.bootstrap import Units, drawn
from voxelscale.findings import Finding
from voxelscale.geometry import Scan

OPERATING_POINTS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per scan at which LUNA16 reads the sensitivity."""

LEAST_DIAMETER_MM = 3.0
"""A true mask's lesion counts as at least so large in `match`."""


@dataclass(frozen=True, kw_only=True)
class Matches:
    """One scan's marks held against its lesions.

    Attributes:
        hits: for each lesion the confidence of its best hit, NaN where it was missed.
        false_positives: confidences of marks that hit nothing.
        doubles: hits beyond the best one of each lesion.
        on_excluded: marks that hit no lesion but an excluded finding.
    """

    hits: tuple[float, ...]
    false_positives: tuple[float, ...]
    doubles: int = 0
    on_excluded: int = 0


@dataclass(frozen=True, kw_only=True)
class Froc:
    """The free-response operating characteristic.

    Attributes:
        fp_per_scan: (n,) rising, one point a threshold.
        sensitivity: (n,) share of all lesions found, in [0, 1], rising.
        thresholds: (n,) falling.
    """

    fp_per_scan: NDArray[np.float64]
    sensitivity: NDArray[np.float64]
    thresholds: NDArray[np.float64]

    def sensitivity_at(self, fp_per_scan: float) -> float:
        """The curve's height at so many false positives per scan.

        Where the curve steps up it is the top of the step; between points that marks of equal confidence
        set apart it is linear; beyond the last point it stays.
        """
        return float(np.interp(fp_per_scan, self.fp_per_scan, self.sensitivity))

    @property
    def cpm(self) -> float:
        """Mean sensitivity at the seven operating points; 0 where nothing was found."""
        return float(np.mean([self.sensitivity_at(point) for point in OPERATING_POINTS]))


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The marks of all scans that count, most confident first: what curves are summed from.

    Attributes:
        confidence: (n,) falling.
        found: (n,) whether the mark found a lesion; else it is a false positive.
        scan: (n,) number of its scan.
        ends: the last mark of each distinct confidence.
        lesions: (scans,) how many lesions each scan has.
    """

    confidence: NDArray[np.float64]
    found: NDArray[np.bool_]
    scan: NDArray[np.int64]
    ends: NDArray[np.int64]
    lesions: NDArray[np.int64]


class Placed(Protocol):
    """What has a place, LPS mm, and a diameter in mm."""

    @property
    def x(self) -> float:
        """To the patient's left."""

    @property
    def y(self) -> float:
        """To the patient's back."""

    @property
    def z(self) -> float:
        """To the patient's head."""

    @property
    def diameter_mm(self) -> float:
        """Of the sphere."""


def match(
    lesions: Sequence[Placed],
    findings: Sequence[Finding],
    excluded: Sequence[Placed] = (),
    uncounted: Scan | None = None,
) -> Matches:
    """Hold one scan's findings against the lesions of its true mask, all in LPS mm.

    A lesion of one or two voxels has a radius below the voxel's own size, within which no centroid can
    be located; its radius counts as at least that of a 3 mm nodule. LUNA16's tables have no such rule.

    Args:
        excluded: what is neither right nor wrong to find.
        uncounted: where nothing is right or wrong to find, voxels that are not 0.
    """
    marks = np.asarray([(f.x, f.y, f.z, f.probability) for f in findings]).reshape(-1, 4)
    return match_marks(marks, _spheres(lesions), _spheres(excluded), lies_in(marks[:, :3], uncounted))


def _spheres(findings: Sequence[Placed]) -> NDArray[np.float64]:
    return np.asarray([(f.x, f.y, f.z, max(f.diameter_mm, LEAST_DIAMETER_MM)) for f in findings])


def match_marks(
    marks: NDArray[np.float64],
    lesions: NDArray[np.float64],
    excluded: NDArray[np.float64],
    uncounted: NDArray[np.bool_] | None = None,
) -> Matches:
    """Hold one scan's marks against its lesions; a mark within two lesions finds both.

    Args:
        marks: (n, 4) x, y, z in mm and confidence; or empty, as the others.
        lesions: (m, 4) x, y, z and diameter in mm.
        excluded: (k, 4) in the same form, ignored in scoring.
        uncounted: (n,) marks that are ignored, too, where they hit nothing.
    """
    marks = marks.reshape(-1, 4)
    hit, ignored = _within(marks, lesions), _within(marks, excluded).any(axis=0)
    if uncounted is not None:
        ignored = ignored | uncounted
    best = np.where(hit, marks[:, 3], -np.inf).max(axis=1, initial=-np.inf)
    missed, free = ~hit.any(axis=1), ~hit.any(axis=0)
    return Matches(
        hits=tuple(np.where(missed, np.nan, best).tolist()),
        false_positives=tuple(marks[free & ~ignored, 3].tolist()),
        doubles=int(hit.sum() - (~missed).sum()),
        on_excluded=int((free & ignored).sum()),
    )


def inside_any(places: NDArray[np.float64], spheres: Sequence[Placed]) -> NDArray[np.bool_]:
    """(n,) which of the places (n, 3), LPS mm, lie within one of the spheres, by the rule of `match`."""
    return np.asarray(_within(places, _spheres(spheres)).any(axis=0))


def lies_in(places: NDArray[np.float64], mask: Scan | None) -> NDArray[np.bool_]:
    """(n,) which of the places (n, 3), LPS mm, lie in a voxel of the mask that is not 0; None: none."""
    inside = np.zeros(len(places), np.bool_)
    if mask is None or not len(places):
        return inside
    voxels = np.rint(mask.grid.mm_to_index(places)).astype(np.int64)
    there = ((voxels >= 0) & (voxels < mask.array.shape)).all(axis=1)
    inside[there] = mask.array[tuple(voxels[there].T)] != 0
    return inside


def _within(marks: NDArray[np.float64], spheres: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(spheres, marks) bool: which marks lie inside which spheres; on the surface is outside."""
    spheres = spheres.reshape(-1, 4)
    apart = spheres[:, None, :3] - marks[None, :, :3]
    with np.errstate(over="ignore"):  # absurdly far is infinitely far
        inside: NDArray[np.bool_] = np.square(apart).sum(axis=-1) < np.square(spheres[:, 3:] / 2)
    return inside


def pool(matches: Sequence[Matches]) -> Pool:
    """All scans' marks in one row."""
    hits = np.asarray([p for m in matches for p in m.hits], np.float64)
    wrong = np.asarray([p for m in matches for p in m.false_positives], np.float64)
    lesions = np.asarray([len(m.hits) for m in matches], np.int64)
    scans = np.arange(len(matches))
    of_hit = np.repeat(scans, lesions)[~np.isnan(hits)]
    of_wrong = np.repeat(scans, [len(m.false_positives) for m in matches])
    confidence = np.concatenate([hits[~np.isnan(hits)], wrong])
    order = np.argsort(-confidence, kind="stable")
    confidence = confidence[order]
    last = np.ones(len(confidence), np.bool_)
    last[:-1] = confidence[1:] != confidence[:-1]
    return Pool(
        confidence=confidence,
        found=(np.arange(len(confidence)) < len(of_hit))[order],
        scan=np.concatenate([of_hit, of_wrong])[order],
        ends=np.flatnonzero(last),
        lesions=lesions,
    )


def froc(matches: Sequence[Matches]) -> Froc:
    """The curve over all scans; a threshold at every distinct confidence, and one above all."""
    marks = pool(matches)
    fp_per_scan, sensitivity = _curve(marks, np.ones(len(matches), np.int64))
    return Froc(
        fp_per_scan=fp_per_scan,
        sensitivity=sensitivity,
        thresholds=np.concatenate([[np.inf], marks.confidence[marks.ends]]),
    )


def resampled(
    pools: Sequence[Pool], resamples: int, seed: int = 0, units: Units = None
) -> NDArray[np.float64]:
    """Sensitivities of bootstrap samples of scans (Efron 1979): as many as there are, with replacement.

    Args:
        pools: of the same scans in the same order; each sees the same samples, so that they can be
            compared in pairs.
        units: the patient of each scan, as of `voxelscale.evaluate.bootstrap.drawn`.

    Returns:
        (pools, resamples, 7) at `OPERATING_POINTS`; NaN where a sample holds no lesion.
    """
    scans = len(pools[0].lesions)
    read = np.full((len(pools), resamples, len(OPERATING_POINTS)), np.nan)
    for number, sample in enumerate(drawn(scans, resamples, seed, units)):
        times = np.bincount(sample, minlength=scans)
        for which, marks in enumerate(pools):
            if times @ marks.lesions:
                read[which, number] = np.interp(OPERATING_POINTS, *_curve(marks, times))
    return read


def _curve(marks: Pool, times: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False positives per scan and sensitivity at each threshold, scan s being there times[s] times."""
    weight = times[marks.scan]
    found = np.append(0, np.cumsum(weight * marks.found)[marks.ends])
    wrong = np.append(0, np.cumsum(weight * ~marks.found)[marks.ends])
    # The challenge has its counts from rates. The rounding on that way decides whether a step that lies
    # just on an operating point falls before or after it, and so must be the same here.
    total = max(int(wrong[-1]), 1)
    fp_per_scan = wrong / total * total / max(int(times.sum()), 1)
    return fp_per_scan, found / max(int(times @ marks.lesions), 1)
