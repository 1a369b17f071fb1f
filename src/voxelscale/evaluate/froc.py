"""Lesions found against false positives, by LUNA16's rules.

A finding hits a lesion when its centre lies within the lesion's radius of the lesion's centre. Of
several hits on one lesion the most confident counts and the others are neither right nor wrong.
Findings that hit nothing are false positives (Setio et al., "Validation, comparison, and combination
of algorithms for automatic detection of pulmonary nodules in CT: the LUNA16 challenge", 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxelscale.predict.findings import Finding

OPERATING_POINTS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per scan at which LUNA16 reads the sensitivity."""


@dataclass(frozen=True, kw_only=True)
class Matches:
    """One scan's findings held against its lesions.

    Attributes:
        hits: for each lesion the confidence of its best hit, NaN where it was missed.
        false_positives: confidences of findings that hit nothing.
    """

    hits: tuple[float, ...]
    false_positives: tuple[float, ...]


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
        """The greatest sensitivity reached with at most this many false positives per scan."""
        allowed = self.fp_per_scan <= fp_per_scan + 1e-12
        return float(self.sensitivity[allowed].max(initial=0.0))

    @property
    def cpm(self) -> float:
        """Mean sensitivity at the seven operating points; 0 where nothing was found."""
        return float(np.mean([self.sensitivity_at(point) for point in OPERATING_POINTS]))


def match(lesions: Sequence[Finding], findings: Sequence[Finding]) -> Matches:
    """Hold one scan's findings against its lesions, all in LPS mm.

    A lesion of one or two voxels has a radius below the voxel's own size, within which no centroid can
    be told apart; its radius counts as at least that of a 3 mm nodule.
    """
    best = [float("nan")] * len(lesions)
    false_positives = []
    centres = np.asarray([(lesion.x, lesion.y, lesion.z) for lesion in lesions]).reshape(-1, 3)
    radii = np.asarray([max(lesion.diameter_mm, 3.0) / 2 for lesion in lesions])
    for finding in findings:
        apart = np.linalg.norm(centres - (finding.x, finding.y, finding.z), axis=1)
        hit = np.flatnonzero(apart < radii)
        if not len(hit):
            false_positives.append(finding.probability)
        for number in hit:
            best[number] = float(np.fmax(best[number], finding.probability))
    return Matches(hits=tuple(best), false_positives=tuple(false_positives))


def froc(matches: Sequence[Matches]) -> Froc:
    """The curve over all scans; a threshold at every distinct confidence, and one above all."""
    hits = np.asarray([h for m in matches for h in m.hits], dtype=np.float64)
    wrong = np.asarray([p for m in matches for p in m.false_positives], dtype=np.float64)
    lesions, scans = len(hits), max(len(matches), 1)
    found = np.sort(hits[~np.isnan(hits)])
    wrong = np.sort(wrong)
    thresholds = np.concatenate([[np.inf], np.unique(np.concatenate([found, wrong]))[::-1]])
    above_found = len(found) - np.searchsorted(found, thresholds, side="left")
    above_wrong = len(wrong) - np.searchsorted(wrong, thresholds, side="left")
    return Froc(
        fp_per_scan=above_wrong / scans,
        sensitivity=above_found / lesions if lesions else np.zeros(len(thresholds)),
        thresholds=thresholds,
    )
