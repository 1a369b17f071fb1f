"""Confidence that means what it says: of findings at 0.7, seven in ten are to be lesions.

A rising map from a finding's score to the share of such findings that hit a lesion, fitted on scans that
the model was not trained on. `docs/measures.md` explains what is counted and how.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.config import ReadingConfig
from voxelscale.console import count, warn
from voxelscale.dataset import DataSet, Source
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.cases import FINDINGS, each_case, predicted_cases
from voxelscale.evaluate.froc import Matches, Placed, lies_in, match
from voxelscale.evaluate.truth import findings_in, truth_of
from voxelscale.files import write_atomic
from voxelscale.findings import Finding
from voxelscale.model.bundle import (
    Bundle,
    Calibration,
    bundle_path,
    one_class,
    read_bundle,
    write_bundle,
)
from voxelscale.predict.case import predicted_by
from voxelscale.predict.record import read_record
from voxelscale.tune.reliability import BINS, calibration_error, reliability, reliability_figure

LEAST_FINDINGS = 20
"""With fewer neither ten bins nor a curve are meaningful."""
FOLDS = 5
"""Of scans, for cross-validation; each needs one, so fewer scans are refused."""

MIN_OF_EACH = 10
"""Lesions found, and false findings; fewer are refused. A logistic curve has two parameters,
and 5 events for each are the fewest with which it can be fitted usefully (Vittinghoff and McCulloch,
American Journal of Epidemiology 165, 2007)."""

ENOUGH_OF_EACH = 100
"""With fewer a calibration curve cannot be assessed reliably (Collins, Ogundimu and Altman, Statistics in
Medicine 35, 2016): there is a warning."""

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ScoredFindings:
    """Findings held against the truth.

    Attributes:
        score: (n,) confidence before calibration, in [0, 1].
        hit: (n,) whether it is a lesion.
        scan: (n,) number of its scan.
    """

    score: Array
    hit: NDArray[np.bool_]
    scan: NDArray[np.int64]


def calibrate_run(
    run: Path,
    predictions: Path,
    data: DataSet,
) -> dict[str, Any]:
    """Calibrate a trained model on predictions of scans it was not trained on.

    The map goes into ``model.vxs``; beside it ``calibration.json`` and ``calibration.svg`` are written.

    Args:
        run: the run's folder, or a model.vxs.
        predictions: what `voxelscale predict` wrote with it: ``<case>/findings.json``.
        data: the data set with the true masks.

    Returns:
        the content of ``calibration.json``; and ``failed``, the cases that could not be read.

    Raises:
        VoxelscaleError: there is no model or no prediction, another model made one of them, the model is of
            several classes, or there are too few findings or scans to fit on.
    """
    model = bundle_path(run)
    bundle = read_bundle(model)
    one_class(bundle, model, "a calibration")
    cases = predicted_cases(predictions, data, needs=(FINDINGS,))
    _require_own(bundle, run, predictions, cases.predicted)
    read, unreadable = each_case(
        "calibrate",
        cases.predicted,
        lambda source: _read_case(source, predictions / source.case, data.reading),
    )
    failed = [*cases.failed, *unreadable]
    if not read:
        raise cases.none_scored(failed)
    held = list(read.values())
    try:
        known = score_findings([each[:2] for each in held], [each[2] for each in held])
        calibration, summary = calibrate(known)
    except ValueError as error:
        hint = "predict more scans that the model was not trained on, for example --split val"
        raise VoxelscaleError(f"{predictions}: {error}", hint) from None
    cases.warn()
    _warn_of_origin(bundle, run, predictions, list(read))
    _warn_of_few(summary)
    write_bundle(model, replace(bundle, calibration=calibration))
    # Beside the model, where others see it, stays nothing of paths.
    write_atomic(model.with_name("calibration.json"), json.dumps(summary, indent=1))
    write_atomic(model.with_name("calibration.svg"), reliability_figure(summary))
    return {**summary, "failed": [failure.for_terminal for failure in failed]}


def _warn_of_few(summary: Mapping[str, Any]) -> None:
    hits = summary["hits"]
    wrong = summary["findings"] - hits
    if min(hits, wrong) < ENOUGH_OF_EACH:
        warn(
            f"calibrated on {count(hits, 'lesion')} and {count(wrong, 'false finding')} of "
            f"{count(summary['scans'], 'scan')}: below {ENOUGH_OF_EACH} of each, the calibration is rough"
        )


def _require_own(bundle: Bundle, run: Path, predictions: Path, sources: Sequence[Source]) -> None:
    """Raise a VoxelscaleError where a prediction says that another model made it."""
    identity = bundle.identity
    for source in sources:
        if predicted_by(predictions / source.case) not in ("", identity):
            raise VoxelscaleError(
                f"{predictions / source.case}: predicted by another model than {run}",
                f"run voxelscale predict {run} on these scans, into a folder of its own",
            )


def _warn_of_origin(bundle: Bundle, run: Path, predictions: Path, cases: Sequence[str]) -> None:
    """Warn of predictions that do not say by which model, and of scans that the model was trained on."""
    unknown = [case for case in cases if not predicted_by(predictions / case)]
    if unknown:
        warn(
            f"{predictions}: {count(len(unknown), 'prediction')} without case.json, which says by which "
            f"model: calibrated as if {run} had made them"
        )
    record = read_record(predictions)
    stores = {str(one.trained.get("data")) for one in bundle.networks}
    splits = [split for data, split in record.splits.items() if data in stores] if record else []
    trained = [case for case in cases if any(split.get(case) == "train" for split in splits)]
    if trained:
        warn(
            f"{predictions}: the model was trained on {count(len(trained), 'scan')} of these, and is "
            "overconfident there; calibrate on scans that none of its networks was trained on"
        )


def _read_case(
    source: Source, prediction: Path, reading: ReadingConfig
) -> tuple[Sequence[Finding], Sequence[Finding], Sequence[Placed]]:
    """A case's lesions, its findings, and what is neither right nor wrong to find."""
    truth = truth_of(source, reading)
    findings = findings_in(prediction / FINDINGS, truth.mask.grid)
    places = np.asarray([(f.x, f.y, f.z) for f in findings]).reshape(-1, 3)
    ignored = lies_in(places, truth.uncounted)
    counted = [f for f, out in zip(findings, ignored, strict=True) if not out]
    return truth.lesions, counted, truth.ignored


def score_findings(
    cases: Sequence[tuple[Sequence[Finding], Sequence[Finding]]],
    excluded: Sequence[Sequence[Placed]] | None = None,
) -> ScoredFindings:
    """Which findings are lesions, by `voxelscale.evaluate.froc.match`.

    Of several hits on a lesion the most confident counts; the others are ignored, as for the FROC.

    Args:
        cases: of each scan the true lesions, and the findings.
        excluded: of each scan what is neither right nor wrong to find; None: nothing.
    """
    matched = []
    for scan, (lesions, findings) in enumerate(cases):
        scored = [f if f.score is None else replace(f, probability=f.score) for f in findings]
        matched.append(match(lesions, scored, excluded[scan] if excluded else ()))
    return scored_matches(matched)


def scored_matches(matched: Sequence[Matches]) -> ScoredFindings:
    """The findings of scans, of each of which they are already held against the truth."""
    rows: list[tuple[float, bool, int]] = []
    for scan, matches in enumerate(matched):
        rows += [(score, True, scan) for score in matches.hits if not np.isnan(score)]
        rows += [(score, False, scan) for score in matches.false_positives]
    score, hit, scan_of = zip(*rows, strict=True) if rows else ((), (), ())
    return ScoredFindings(
        score=np.asarray(score, np.float64),
        hit=np.asarray(hit, np.bool_),
        scan=np.asarray(scan_of, np.int64),
    )


def calibrate(known: ScoredFindings) -> tuple[Calibration, dict[str, Any]]:
    """The better of two maps by cross-validated log loss, and the figures with and without it.

    ``ece_before`` and ``ece_after`` are expected calibration errors, ``bins_before`` and ``bins_after`` the
    reliability; all that is "after" is of maps fitted without the scan they are applied to.

    Raises:
        ValueError: there are too few findings, hits, false findings or scans.
    """
    number, hits = len(known.hit), int(known.hit.sum())
    if number < LEAST_FINDINGS:
        raise ValueError(f"{number} findings are too few to calibrate on; {LEAST_FINDINGS} are needed")
    if hits in (0, number):
        raise ValueError(f"{'all' if hits else 'none'} of the {number} findings are lesions")
    if (scans := len(np.unique(known.scan))) < FOLDS:
        raise ValueError(f"all findings are of {count(scans, 'scan')}; {FOLDS} are needed")
    if min(hits, number - hits) < MIN_OF_EACH:
        what = f"{hits} of the findings are lesions, {number - hits} are not"
        raise ValueError(f"{what}; {MIN_OF_EACH} of each are needed")
    folded = {name: cross_validated(fit, known) for name, fit in FITS.items()}
    losses = {name: _log_loss(probability, known.hit) for name, probability in folded.items()}
    method = min(losses, key=lambda name: losses[name])
    calibration = FITS[method](known.score, known.hit)
    summary = {
        "method": method,
        "findings": number,
        "hits": hits,
        "scans": scans,
        "ece_before": calibration_error(known.score, known.hit),
        "ece_after": calibration_error(folded[method], known.hit),
        "log_loss": {"before": _log_loss(known.score, known.hit), **losses},
        "bins": BINS,
        "bins_before": reliability(known.score, known.hit),
        "bins_after": reliability(folded[method], known.hit),
        "scores": list(calibration.scores),
        "probabilities": list(calibration.probabilities),
    }
    return calibration, summary


def cross_validated(fit: Callable[[Array, NDArray[np.bool_]], Calibration], known: ScoredFindings) -> Array:
    """(n,) probabilities, each by a map fitted without any finding of its scan's fold."""
    scans, number = np.unique(known.scan, return_inverse=True)
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(scans))
    fold = (order % min(FOLDS, len(scans)))[number]
    probability = np.empty(len(known.score))
    for part in np.unique(fold):
        held = fold == part
        probability[held] = fit(known.score[~held], known.hit[~held])(known.score[held])
    return probability


def fit_platt(score: Array, hit: NDArray[np.bool_]) -> Calibration:
    """A logistic curve over the score's logit, rising (Platt, "Probabilistic outputs for support vector
    machines", 1999, with his targets that keep it from 0 and 1)."""
    from scipy.optimize import minimize
    from scipy.special import expit

    logit = _logit(score)
    hits, misses = int(hit.sum()), int((~hit).sum())
    target = np.where(hit, (hits + 1) / (hits + 2), 1 / (misses + 2))

    def loss(parameters: Array) -> tuple[float, Array]:
        there = parameters[0] * logit + parameters[1]
        off = expit(there) - target
        slope = np.array([(off * logit).mean(), off.mean()])
        return float((np.logaddexp(0, there) - target * there).mean()), slope

    bounds = [(1e-3, 50), (-50, 50)]  # a curve that falls is none
    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds)
    knots = np.linspace(-_FARTHEST, _FARTHEST, 553)
    scores = expit(knots)
    scores[[0, -1]] = 0, 1
    return _map(scores, expit(found.x[0] * knots + found.x[1]))


def fit_isotonic(score: Array, hit: NDArray[np.bool_]) -> Calibration:
    """The best of all maps that never fall, by pooling adjacent violators (Ayer et al., Annals of
    Mathematical Statistics 26, 1955); linear between its steps, and kept from 0 and 1 as Platt's."""
    from scipy.optimize import isotonic_regression

    scores, number, counts = np.unique(score, return_inverse=True, return_counts=True)
    share = np.bincount(number, weights=hit) / counts
    steps = isotonic_regression(share, weights=counts.astype(np.float64))
    least = 1 / (len(score) + 2)
    value = np.clip(steps.x, least, 1 - least)
    # Each step's first and last score; within it the value is one.
    corners = np.unique(np.concatenate([steps.blocks[:-1], steps.blocks[1:] - 1]))
    scores, value = scores[corners], value[corners]
    inside = (scores > 0) & (scores < 1)
    ends = value[0], value[-1]
    return _map(
        np.concatenate([[0.0], scores[inside], [1.0]]), np.concatenate([ends[:1], value[inside], ends[1:]])
    )


FITS: dict[str, Callable[[Array, NDArray[np.bool_]], Calibration]] = {
    "platt": fit_platt,
    "isotonic": fit_isotonic,
}
"""Of equal ones the first is taken."""

_FARTHEST = 27.6
"""Logit of a score of 1 - 1e-12."""


def _logit(score: Array) -> Array:
    kept = np.clip(score, 1e-12, 1 - 1e-12)
    logit: Array = np.log(kept) - np.log1p(-kept)
    return logit


def _map(scores: Array, probabilities: Array) -> Calibration:
    return Calibration(scores=tuple(scores.tolist()), probabilities=tuple(probabilities.tolist()))


def _log_loss(probability: Array, hit: NDArray[np.bool_]) -> float:
    """Mean negative logarithm of what was given to what came true."""
    right = np.where(hit, probability, 1 - probability)
    return float(-np.log(np.maximum(right, 1e-12)).mean())
