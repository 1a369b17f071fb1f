"""Predictions held against the truth: cases, lesions, FROC, intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.console import warn
from voxelscale.dataset import DataSet, Source
from voxelscale.evaluate.bootstrap import RESAMPLES, percentile_interval, resampled_means, units_of
from voxelscale.evaluate.cases import FINDINGS, MASK, each_case, predicted_cases
from voxelscale.evaluate.froc import OPERATING_POINTS, Froc, Matches, froc, match, pool, resampled
from voxelscale.evaluate.lesions import (
    IOU_THRESHOLDS,
    LesionOverlap,
    by_size,
    detection_figures,
    lesion_overlaps,
    match_by_iou,
    mean_or_none,
    pair_components,
)
from voxelscale.evaluate.nodules import TABLE, Nodule, by_trait, read_nodules
from voxelscale.evaluate.overlap import Overlap, overlap
from voxelscale.evaluate.per_class import OneClass, mean_dice
from voxelscale.evaluate.surface import TOLERANCES_MM, SurfaceScore, compare_surfaces
from voxelscale.evaluate.truth import Truth, findings_in, labels_in, truth_of
from voxelscale.files import write_atomic, write_csv
from voxelscale.findings import Finding, lesions_of_mask
from voxelscale.formats import check_same_place


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One case, scored.

    Attributes:
        case: its name.
        patient: whose it is; "": of nobody who has another case.
        overlap: counts of voxels.
        surface: how the masks' surfaces agree.
        lesions: the true ones.
        matches: findings held against them, by LUNA16's rule.
        lesion_overlaps: predicted components held against them.
        iou_matches: predicted components matched to them at each of `IOU_THRESHOLDS`.
        nodules: synthetic ones that were put into the scan.
        nodule_hits: confidence of the best finding on each, NaN where it was missed; each is matched by
            itself, also where two touch and are one component of the mask.
    """

    case: str
    patient: str = ""
    overlap: Overlap
    surface: SurfaceScore
    lesions: tuple[Finding, ...]
    matches: Matches
    lesion_overlaps: tuple[LesionOverlap, ...]
    iou_matches: tuple[Matches, ...]
    nodules: tuple[Nodule, ...] = ()
    nodule_hits: tuple[float, ...] = ()

    @property
    def whose(self) -> str:
        """The patient, or the case where it is nobody else's."""
        return self.patient or self.case

    @property
    def both_empty(self) -> bool:
        """A healthy scan in which nothing was found: it has no Dice, no surface and no distance."""
        return not self.overlap.truth and not self.overlap.prediction


def evaluate_classes(
    truth: Truth, prediction: NDArray[Any], findings: Sequence[Finding], nodules: Sequence[Nodule] = ()
) -> tuple[CaseResult, ...]:
    """Score one case, class by class in the order of the truth's.

    Args:
        prediction: stored labels on the truth's lattice.
        findings: of the same scan, LPS mm; those of the only class need not bear its name.
        nodules: synthetic ones in it.
    """
    return tuple(
        _score(truth, one, [f for f in findings if f.label in ("", one.name)], nodules)
        for one in truth.against(prediction)
    )


def _score(
    truth: Truth, one: OneClass, findings: Sequence[Finding], nodules: Sequence[Nodule]
) -> CaseResult:
    true, predicted, whole = one.truth, one.prediction, truth.mask.grid
    grid = whole.window(one.start, true.shape)
    flat = [axis for axis, voxels in enumerate(whole.shape) if voxels == 1]
    lesions = lesions_of_mask(truth.case, true, whole, one.start)
    left_out = truth.ignored, truth.uncounted
    paired = pair_components(true, predicted, grid, findings, *left_out)
    return CaseResult(
        case=truth.case,
        patient=truth.patient,
        overlap=overlap(true, predicted),
        surface=compare_surfaces(true, predicted, grid.spacing, flat if len(flat) < 3 else ()),
        lesions=tuple(lesions),
        matches=match(lesions, findings, *left_out),
        lesion_overlaps=tuple(lesion_overlaps(paired)),
        iou_matches=tuple(match_by_iou(paired, threshold) for threshold in IOU_THRESHOLDS),
        nodules=tuple(nodules),
        nodule_hits=match(nodules, findings).hits,
    )


def evaluate_folder(
    predictions: Path,
    data: DataSet,
    out: Path,
    *,
    missing_is_empty: bool = False,
    one_model: bool = True,
) -> dict[str, Any]:
    """Score every case of a data set that has a prediction; write ``evaluation.json`` and ``cases.csv``.

    Args:
        predictions: what `voxelscale predict` wrote: ``<case>/mask.nii.gz`` and ``findings.json``.
        data: the data set with the true masks; its ``nodules.csv`` counts, too, where it is synthetic.
        out: where the tables go.
        missing_is_empty: score a case without a prediction as if nothing had been found in it.
        one_model: warn where predictions are of several models.

    Returns:
        the content of ``evaluation.json``: `summarise`, or `summarise_classes` where there are several;
        ``failed``, and as ``coverage`` how many cases have truth, how many are scored, and the names of the
        others (`voxelscale.evaluate.cases.Cases`).

    Raises:
        VoxelscaleError: no case has both a mask and a prediction that can be read.
    """
    cases = predicted_cases(predictions, data, missing_is_empty=missing_is_empty)
    cases = cases if one_model else replace(cases, other_models=())
    # A table of nodules says nothing of other classes.
    single = all(source.classes.single for source in cases.predicted)
    nodules = read_nodules(data.path) if single else {}

    def score(source: Source) -> tuple[CaseResult, ...]:
        truth = truth_of(source, data.reading)
        labels, findings = np.zeros_like(truth.mask.array), list[Finding]()
        if not missing_is_empty or (predictions / source.case / MASK).is_file():
            labels, findings = read_prediction(predictions / source.case, source, truth)
        return evaluate_classes(truth, labels, findings, nodules.get(source.case, ()))

    results, unreadable = each_case("evaluate", cases.predicted, score)
    failed = [*cases.failed, *unreadable]
    if not results:
        raise cases.none_scored(failed)
    cases.warn()
    if nodules and not nodules.keys() & results.keys():
        warn(f"{data.path}: {TABLE} has no nodule of a scored case; no sensitivities by kind")
    names = next(s.classes.names for s in cases.predicted if s.case in results)
    by_class = dict(zip(names, zip(*results.values(), strict=True), strict=True))
    figures = summarise(*by_class.values()) if single else summarise_classes(by_class)
    summary = {**figures, "coverage": cases.coverage(len(results))}
    kept = {**summary, "failed": [failure.kept for failure in failed]}
    write_atomic(out / "evaluation.json", json.dumps(kept, indent=1))
    rows = summary["cases"]
    write_csv(out / "cases.csv", [rows[0].keys(), *(row.values() for row in rows)])
    return {**summary, "failed": [failure.for_terminal for failure in failed]}


def read_prediction(folder: Path, source: Source, truth: Truth) -> tuple[NDArray[Any], list[Finding]]:
    """The stored labels (z, y, x; LPS order) and the findings that were predicted for a case.

    Raises:
        VoxelscaleError: they cannot be read, do not lie on the truth, or are of other classes.
    """
    path = folder / MASK
    mask = labels_in(path, truth.classes)
    check_same_place(path, mask, source.labels[0] if source.labels else source.image, truth.mask)
    return mask.array, findings_in(folder / FINDINGS, truth.mask.grid, truth.classes)


def summarise_classes(results: Mapping[str, Sequence[CaseResult]]) -> dict[str, Any]:
    """What a report of several classes shows, as plain values.

    Args:
        results: of each class by name, of the same cases in the same order.

    Returns:
        ``classes``, for each by name what `summarise` says; ``mean_dice``, the mean over classes
        (`voxelscale.evaluate.per_class.mean_dice`); ``scans``; ``cases``, a row a case and class.
    """
    classes = {name: summarise(each) for name, each in results.items()}
    dices = [[row["dice"] for row in summary["cases"]] for summary in classes.values()]
    rows = zip(*(summary["cases"] for summary in classes.values()), strict=True)
    return {
        "classes": classes,
        "mean_dice": mean_dice(dices, [r.whose for r in next(iter(results.values()))]),
        "scans": len(next(iter(results.values()))),
        "cases": [
            {"case": row["case"], "class": name, **row}
            for of_case in rows
            for name, row in zip(classes, of_case, strict=True)
        ],
    }


def summarise(results: Sequence[CaseResult]) -> dict[str, Any]:
    """Everything a report shows, as plain values; `docs/measures.md` says how each is counted.

    ``cases`` and ``lesions`` are tables; ``healthy`` what was found in scans without a lesion; ``dice`` the
    mean, median and minimum over the cases where a mask has a voxel, with the 95 % interval of the mean;
    ``surface_dice`` alike, one row per tolerance; ``hd95_mm`` its mean and median over the cases where both
    masks have one; ``froc`` the curve, its seven points and their mean (CPM); ``operating_point`` the
    sensitivity and false positives per scan with every finding counted; ``sizes`` lesions by diameter;
    ``nodules`` synthetic ones by kind, margin and place; ``iou`` components matched by intersection over
    union. What has no value is None: all sensitivities where there is no lesion, and intervals of fewer
    than `voxelscale.evaluate.bootstrap.MIN_PATIENTS` patients, or of fewer with a lesion.
    """
    matches = [r.matches for r in results]
    outlined = [r for r in results if not r.both_empty]
    whose = [r.whose for r in outlined]
    pooled = sum((r.overlap for r in results), Overlap(truth=0, prediction=0, both=0))
    curve = froc(matches)
    return {
        "scans": len(results),
        "patients": len({r.whose for r in results}),
        "scans_with_lesions": sum(bool(r.lesions) for r in results),
        "patients_with_lesions": len({r.whose for r in results if r.lesions}),
        "lesion_count": sum(len(r.lesions) for r in results),
        "healthy": _healthy(results),
        "dice": spread([r.overlap.dice for r in outlined], whose),
        "dice_pooled": pooled.dice if outlined else None,
        "surface_dice": [
            {"tolerance_mm": tolerance, **spread([r.surface.dice[at] for r in outlined], whose)}
            for at, tolerance in enumerate(TOLERANCES_MM)
        ],
        "hd95_mm": _finite([r.surface.hd95_mm for r in outlined]),
        **_froc_figures(matches, curve, [r.whose for r in results]),
        **_lesion_tables(results, threshold_at_1_fp(curve)),
        "iou": [
            {"iou": threshold, **detection_figures([r.iou_matches[at] for r in results])}
            for at, threshold in enumerate(IOU_THRESHOLDS)
        ],
        "cases": [_case_row(result) for result in results],
        "lesions": [row for result in results for row in _lesion_rows(result)],
    }


def _healthy(results: Sequence[CaseResult]) -> dict[str, int]:
    """Scans without a lesion: how many, how many of them without a false positive, all false positives."""
    wrong = [len(r.matches.false_positives) for r in results if not r.lesions]
    return {"scans": len(wrong), "without_false_positives": wrong.count(0), "false_positives": sum(wrong)}


def _froc_figures(matches: Sequence[Matches], curve: Froc, whose: Sequence[str]) -> dict[str, Any]:
    """Sensitivities; without a lesion none is defined, only the number of false positives."""
    samples = resampled([pool(matches)], RESAMPLES, units=units_of(whose))[0]  # NaN without a lesion
    patients = len({patient for patient, m in zip(whose, matches, strict=True) if m.hits})
    points = [
        {
            "fp_per_scan": point,
            "sensitivity": curve.sensitivity_at(point) if patients else None,
            "interval": percentile_interval(samples[:, at], patients),
        }
        for at, point in enumerate(OPERATING_POINTS)
    ]
    at_1_fp = points[OPERATING_POINTS.index(1.0)]
    return {
        "sensitivity_at_1_fp": at_1_fp["sensitivity"],
        "sensitivity_at_1_fp_interval": at_1_fp["interval"],
        "froc": {
            "fp_per_scan": curve.fp_per_scan.tolist() if patients else [],
            "sensitivity": curve.sensitivity.tolist() if patients else [],
            "points": points,
            "cpm": curve.cpm if patients else None,
            "cpm_interval": percentile_interval(samples.mean(axis=1), patients),
        },
        "operating_point": {
            "threshold": float(curve.thresholds[-1]) if len(curve.thresholds) > 1 else None,
            "fp_per_scan": float(curve.fp_per_scan[-1]),
            "sensitivity": float(curve.sensitivity[-1]) if patients else None,
        },
    }


def spread(values: Sequence[float], whose: Sequence[str]) -> dict[str, Any]:
    """Mean, median and least of a figure of each case, and the 95 % interval of the mean."""
    if not values:
        return dict.fromkeys(("mean", "median", "least", "interval")) | {"cases": 0, "patients": 0}
    array: NDArray[np.float64] = np.asarray(values, np.float64)
    return {
        "mean": float(array.mean()),
        "median": float(np.median(array)),
        "least": float(array.min()),
        "interval": percentile_interval(resampled_means(array, units=units_of(whose)), len(set(whose))),
        "cases": len(array),
        "patients": len(set(whose)),
    }


def _finite(values: Sequence[float]) -> dict[str, Any]:
    known = [value for value in values if math.isfinite(value)]
    return {
        "mean": mean_or_none(known),
        "median": float(np.median(known)) if known else None,
        "cases": len(known),
        "one_mask_empty": len(values) - len(known),
    }


def threshold_at_1_fp(curve: Froc) -> float:
    """The least confidence from which on there is one false positive per scan at most."""
    return float(curve.thresholds[curve.fp_per_scan <= 1.0][-1])


def _lesion_tables(results: Sequence[CaseResult], threshold: float) -> dict[str, Any]:
    lesions = [lesion for r in results for lesion in r.lesions]
    hits = [hit for r in results for hit in r.matches.hits]
    overlaps = [found for r in results for found in r.lesion_overlaps]
    nodules = [nodule for r in results for nodule in r.nodules]
    return {
        "threshold_at_1_fp": threshold if math.isfinite(threshold) else None,
        "sizes": by_size(lesions, hits, overlaps, threshold),
        "nodules": by_trait(nodules, [hit for r in results for hit in r.nodule_hits], threshold),
    }


def _case_row(result: CaseResult) -> dict[str, Any]:
    surface = [None if result.both_empty else dice for dice in result.surface.dice]
    distance = result.surface.hd95_mm
    return {
        "case": result.case,
        "dice": None if result.both_empty else result.overlap.dice,
        "truth_voxels": result.overlap.truth,
        "predicted_voxels": result.overlap.prediction,
        "lesions": len(result.lesions),
        "detected": sum(not math.isnan(hit) for hit in result.matches.hits),
        "false_positives": len(result.matches.false_positives),
        "ignored": result.matches.on_excluded,
        **{f"surface_dice_{mm:g}mm": value for mm, value in zip(TOLERANCES_MM, surface, strict=True)},
        "hd95_mm": distance if math.isfinite(distance) and not result.both_empty else None,
    }


def _lesion_rows(result: CaseResult) -> list[dict[str, Any]]:
    return [
        {
            "case": result.case,
            "x": lesion.x,
            "y": lesion.y,
            "z": lesion.z,
            "diameter_mm": lesion.diameter_mm,
            "detected": not math.isnan(hit),
            "probability": 0.0 if math.isnan(hit) else hit,
            "dice": found.dice,
            "volume_error": found.volume_error,
        }
        for lesion, hit, found in zip(
            result.lesions, result.matches.hits, result.lesion_overlaps, strict=True
        )
    ]
