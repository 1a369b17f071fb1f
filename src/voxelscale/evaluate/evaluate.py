"""Predictions held against the truth: cases, lesions, FROC, intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxelscale.config import PrepareConfig
from voxelscale.console import Progress
from voxelscale.data.listing import Source, list_sources
from voxelscale.data.names import names_of
from voxelscale.data.reading import read_truth
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.froc import OPERATING_POINTS, Matches, froc, match
from voxelscale.evaluate.overlap import Overlap, overlap
from voxelscale.files import write_atomic, write_csv
from voxelscale.formats import check_same_place, read_label
from voxelscale.geometry import Scan, reorient
from voxelscale.predict.findings import Finding, lesions_of_mask, read_findings

RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One case, scored.

    Attributes:
        case: its name.
        overlap: counts of voxels.
        lesions: the true ones.
        matches: findings held against them.
    """

    case: str
    overlap: Overlap
    lesions: tuple[Finding, ...]
    matches: Matches


def evaluate_case(case: str, truth: Scan, prediction: Scan, findings: Sequence[Finding]) -> CaseResult:
    """Score one case.

    Args:
        truth, prediction: masks on one lattice; not 0 is lesion.
        findings: of the same scan, LPS mm.
    """
    lesions = lesions_of_mask(case, truth.array, truth.grid)
    return CaseResult(
        case=case,
        overlap=overlap(truth.array, prediction.array),
        lesions=tuple(lesions),
        matches=match(lesions, findings),
    )


def evaluate_folder(
    predictions: Path,
    data: Path,
    out: Path,
    config: PrepareConfig | None = None,
    layout: str = "auto",
    annotations: Path | None = None,
) -> dict[str, Any]:
    """Score every case of a data set that has a prediction; write ``evaluation.json`` and ``cases.csv``.

    Args:
        predictions: what `voxelscale predict` wrote: ``<case>/mask.nii.gz`` and ``findings.json``.
        data: the data set, as `voxelscale.data.listing.list_sources` takes it.
        out: where the tables go.
        config: what in the labels is the lesion, and what cases are called after; None: the defaults.
        layout, annotations: as of `list_sources`.

    Returns:
        the content of ``evaluation.json``; see `summarise`.

    Raises:
        VoxelscaleError: no case has both a mask and a prediction that can be read.
    """
    config = config or PrepareConfig()
    listed = list_sources(data, layout, annotations, names_of(config, predictions))
    sources = [s for s in listed if s.label and (predictions / s.case / "mask.nii.gz").is_file()]
    results, failed = [], []
    with Progress("evaluate", len(sources)) as progress:
        for done, source in enumerate(sources, start=1):
            try:
                results.append(_read_and_score(source, predictions / source.case, config))
            except VoxelscaleError as error:
                failed.append({"case": source.case, "error": error.message, "hint": error.hint})
            progress.update(done, source.case)
    if not results:
        reason = f": {failed[0]['error']}" if failed else ""
        raise VoxelscaleError(
            f"{predictions}: no prediction of a case of {data} that has a mask{reason}",
            "run voxelscale predict on that data set first",
        )
    summary = {**summarise(results), "failed": failed}
    write_atomic(out / "evaluation.json", json.dumps(summary, indent=1))
    cases = summary["cases"]
    write_csv(out / "cases.csv", [cases[0].keys(), *(case.values() for case in cases)])
    return summary


def _read_and_score(source: Source, prediction: Path, config: PrepareConfig) -> CaseResult:
    truth, mask = read_truth(source, config), reorient(read_label(prediction / "mask.nii.gz"))
    check_same_place(prediction / "mask.nii.gz", mask, source.label or source.image, truth)
    return evaluate_case(source.case, truth, mask, read_findings(prediction / "findings.json"))


def summarise(results: Sequence[CaseResult]) -> dict[str, Any]:
    """Everything a report shows, as plain values.

    ``cases`` and ``lesions`` are tables; ``dice`` the mean, median and least over cases with the 95 %
    interval of the mean; ``froc`` the curve, its seven points and their mean (CPM);
    ``operating_point`` the sensitivity and false positives per scan with every finding counted.
    Intervals are by bootstrap over scans (Efron 1979), `RESAMPLES` of them.
    """
    dices = np.asarray([r.overlap.dice for r in results])
    matches = [r.matches for r in results]
    curve = froc(matches)
    pooled = sum((r.overlap for r in results), Overlap(truth=0, prediction=0, both=0))
    return {
        "scans": len(results),
        "lesion_count": sum(len(r.lesions) for r in results),
        "dice": {
            "mean": float(dices.mean()),
            "median": float(np.median(dices)),
            "least": float(dices.min()),
            "interval": _interval(lambda rows: float(dices[rows].mean()), len(results)),
        },
        "dice_pooled": pooled.dice,
        "sensitivity_at_1_fp": curve.sensitivity_at(1.0),
        "sensitivity_at_1_fp_interval": _interval(
            lambda rows: froc([matches[i] for i in rows]).sensitivity_at(1.0), len(results)
        ),
        "froc": {
            "fp_per_scan": curve.fp_per_scan.tolist(),
            "sensitivity": curve.sensitivity.tolist(),
            "points": [
                {"fp_per_scan": point, "sensitivity": curve.sensitivity_at(point)}
                for point in OPERATING_POINTS
            ],
            "cpm": curve.cpm,
        },
        "operating_point": {
            "threshold": float(curve.thresholds[-1]) if len(curve.thresholds) > 1 else None,
            "sensitivity": float(curve.sensitivity[-1]),
            "fp_per_scan": float(curve.fp_per_scan[-1]),
        },
        "cases": [_case_row(result) for result in results],
        "lesions": [row for result in results for row in _lesion_rows(result)],
    }


def _case_row(result: CaseResult) -> dict[str, Any]:
    return {
        "case": result.case,
        "dice": result.overlap.dice,
        "truth_voxels": result.overlap.truth,
        "predicted_voxels": result.overlap.prediction,
        "lesions": len(result.lesions),
        "detected": sum(not math.isnan(hit) for hit in result.matches.hits),
        "false_positives": len(result.matches.false_positives),
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
        }
        for lesion, hit in zip(result.lesions, result.matches.hits, strict=True)
    ]


def _interval(measure: Callable[[np.ndarray[Any, Any]], float], scans: int) -> list[float]:
    """95 % percentile interval of a measure of the scans with these numbers."""
    random = np.random.Generator(np.random.Philox(key=0))
    values = [measure(random.integers(0, scans, scans)) for _ in range(RESAMPLES)]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]
