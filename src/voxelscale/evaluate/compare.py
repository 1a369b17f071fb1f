"""Two models on the same scans: by how much one is better, and whether that could be chance alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.config import ReadingConfig
from voxelscale.console import count, warn
from voxelscale.dataset import DataSet, Source
from voxelscale.evaluate.bootstrap import (
    MIN_SCANS,
    RESAMPLES,
    p_value,
    percentile_interval,
    resampled_means,
)
from voxelscale.evaluate.cases import each_case, none_usable, predicted_cases
from voxelscale.evaluate.evaluate import read_prediction
from voxelscale.evaluate.froc import OPERATING_POINTS, Matches, froc, match, pool, resampled
from voxelscale.evaluate.overlap import overlap
from voxelscale.evaluate.truth import truth_of
from voxelscale.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model on one scan.

    Attributes:
        dice: of the masks; None where both are empty.
        matches: findings held against lesions.
    """

    dice: float | None
    matches: Matches


NAN = float("nan")

Pair = tuple[Score, Score]
"""Both models on one scan."""


def compare_folders(
    first: Path,
    second: Path,
    data: DataSet,
    *,
    out: Path | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Hold two models' predictions against each other on the cases that both have.

    Args:
        first, second: what `voxelscale predict` wrote.
        data: the data set with the true masks.
        out: a JSON file to write the result to.
        resamples, seed: of the bootstrap over scans.

    Returns:
        plain values: `compare_scores`; ``failed``, the cases that could not be read; ``only_a`` and
        ``only_b``, names of cases that only one of them predicted; ``missing``, cases with truth that
        neither did.

    Raises:
        VoxelscaleError: there is no case that both predicted and that can be read.
    """
    both = [predicted_cases(folder, data) for folder in (first, second)]
    # Each folder may have a key of its own, by which its cases are called; scans are the same all the same.
    scans = [{(s.image, s.series): s for s in cases.predicted} for cases in both]
    shared = [scan for scan in scans[0] if scan in scans[1]]
    folders = {
        scans[0][scan].case: (first / scans[0][scan].case, second / scans[1][scan].case) for scan in shared
    }
    pairs, unreadable = each_case(
        "compare",
        [scans[0][scan] for scan in shared],
        lambda source: _score(source, folders[source.case], data.reading),
    )
    lost = {f.source.case: f for cases in reversed(both) for f in cases.failed}
    failed = [*lost.values(), *unreadable]
    if not pairs:
        what = f"{first} and {second}: no case of {data.path} with a mask that both predicted"
        raise none_usable(what, failed, "run voxelscale predict with both models on that data set first")
    only = [[s.case for scan, s in scans[at].items() if scan not in scans[1 - at]] for at in (0, 1)]
    for cases, alone in zip(both, only, strict=True):
        cases.tell()
        if alone:
            left = f"left out {count(len(alone), 'case')} that the other one lacks: {', '.join(alone)}"
            warn(f"{cases.predictions}: {left}")
    missing = [case for case in both[0].missing if case in both[1].missing]
    head = {"a": str(first), "b": str(second), "only_a": only[0], "only_b": only[1], "missing": missing}
    result = {**head, **compare_scores(pairs, resamples, seed)}
    if out is not None:
        kept = {**result, "failed": [failure.kept for failure in failed]}
        write_atomic(out, json.dumps(kept, indent=1))
    return {**result, "failed": [failure.told for failure in failed]}


def _score(source: Source, folders: tuple[Path, Path], reading: ReadingConfig) -> Pair:
    """Both predictions of a case held against its truth."""
    truth = truth_of(source, reading)
    lesions = truth.lesions
    scores = []
    for folder in folders:
        mask, findings = read_prediction(folder, source, truth.mask)
        counts = overlap(truth.mask.array, mask.array)
        dice = counts.dice if counts.truth or counts.prediction else None
        scores.append(Score(dice=dice, matches=match(lesions, findings, truth.ignored)))
    return scores[0], scores[1]


def compare_scores(pairs: Mapping[str, Pair], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """The paired comparison.

    Both models see the same `resamples` draws of scans, so that what makes a scan hard for both drops out.

    Args:
        pairs: both models' scores of each case.

    Returns:
        plain values: ``scans``, ``lesion_count``, ``resamples``, ``seed``; ``cases``, a table of the Dice;
        ``measures``: ``dice`` (mean), ``cpm`` and ``sensitivity_at_1_fp``, each with ``a``, ``b``,
        ``difference`` (a less b), its 95 % ``interval`` and the two-sided ``p``; ``dice`` with
        ``wilcoxon_p``, too. Without lesions CPM and sensitivity have None; so have intervals and p-values
        of fewer than `voxelscale.evaluate.bootstrap.MIN_SCANS` scans, or of fewer with a lesion.

    A scan where truth and prediction are empty has no Dice. Where that is so of one model only, the other
    one has a false finding: its Dice is 0, and in the signed ranks the difference is 1.
    """
    known = [pair for pair in pairs.values() if (pair[0].dice, pair[1].dice) != (None, None)]
    dices = (
        np.asarray([[NAN if s.dice is None else s.dice for s in pair] for pair in known]).reshape(-1, 2).T
    )
    matches = [[pair[model].matches for pair in pairs.values()] for model in (0, 1)]
    lesions = sum(len(m.hits) for m in matches[0])
    measures = {"dice": _dice_measure(dices, resamples, seed)}
    with_lesions = sum(bool(m.hits) for m in matches[0])
    samples = resampled([pool(m) for m in matches], resamples, seed)
    curves = [froc(m) for m in matches]
    at = OPERATING_POINTS.index(1.0)
    measures["cpm"] = _measure([curve.cpm for curve in curves], samples.mean(axis=2), with_lesions)
    measures["sensitivity_at_1_fp"] = _measure(
        [curve.sensitivity_at(1.0) for curve in curves], samples[:, :, at], with_lesions
    )
    if not lesions:
        measures["cpm"] = measures["sensitivity_at_1_fp"] = dict.fromkeys(measures["cpm"])
    return {
        "scans": len(pairs),
        "scans_with_lesions": with_lesions,
        "scans_with_dice": len(known),
        "lesion_count": lesions,
        "resamples": resamples,
        "seed": seed,
        "measures": measures,
        "cases": [{"case": case, "dice_a": a.dice, "dice_b": b.dice} for case, (a, b) in pairs.items()],
    }


def _dice_measure(dices: NDArray[np.float64], resamples: int, seed: int) -> dict[str, Any]:
    """The mean Dice of both.

    Args:
        dices: (2, scans); NaN where one of them has no Dice.
    """
    scans = dices.shape[1]
    there = ~np.isnan(dices)
    if not there.any(axis=1).all():
        return dict.fromkeys(("a", "b", "difference", "interval", "p", "wilcoxon_p"))
    sums, counts = (
        resampled_means(v, resamples, seed) for v in (np.nan_to_num(dices), there.astype(float))
    )
    with np.errstate(invalid="ignore"):
        measure = _measure(np.nanmean(dices, axis=1), sums / counts, scans)
    right = np.where(there, dices, 1.0)
    return {**measure, "wilcoxon_p": wilcoxon_p(right[0] - right[1]) if scans >= MIN_SCANS else None}


def _measure(
    values: Sequence[float] | NDArray[np.float64], samples: NDArray[np.float64], scans: int
) -> dict[str, Any]:
    """A figure of both models, and their difference.

    Args:
        values: (2,) of all scans.
        samples: (2, resamples).
        scans: how many have such a figure.
    """
    apart = samples[0] - samples[1]
    return {
        "a": float(values[0]),
        "b": float(values[1]),
        "difference": float(values[0] - values[1]),
        "interval": percentile_interval(apart, scans),
        "p": p_value(apart, scans),
    }


def wilcoxon_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the signed-rank test (Wilcoxon 1945) of the cases' differences; 1 where all are 0."""
    from scipy.stats import wilcoxon

    # Rounded: ranks must not depend on rounding errors.
    apart = np.round(differences, 12)
    apart = apart[apart != 0]
    return float(wilcoxon(apart).pvalue) if len(apart) else 1.0


NAMES = {"dice": "Dice", "cpm": "CPM", "sensitivity_at_1_fp": "sensitivity at 1 FP/scan"}


def text_table(result: Mapping[str, Any]) -> list[str]:
    """What `compare_folders` returned, in lines for a person."""
    lines = [
        f"A: {result['a']}",
        f"B: {result['b']}",
        f"{count(result['scans'], 'scan')}, {count(result['lesion_count'], 'lesion')}",
        "",
        f"{'':24}       A       B    A - B  95 % interval             p",
    ]
    for name, row in result["measures"].items():
        if row["difference"] is None:
            lines.append(f"{NAMES[name]:24}  {'no masks' if name == 'dice' else 'no lesions'}")
            continue
        shown = f"{NAMES[name]:24}  {row['a']:6.3f}  {row['b']:6.3f}  {row['difference']:+7.3f}  "
        if row["interval"] is None:
            lines.append(f"{shown}no interval, no p: {_too_few(result, name)}")
            continue
        low, high = row["interval"]
        lines.append(f"{shown}{low:+.3f} to {high:+.3f}      {row['p']:.3f}")
    p = result["measures"]["dice"]["wilcoxon_p"]
    shown = f"no p: {_too_few(result, 'dice')}" if p is None else f"p = {p:.3f}"
    lines.append(f"Dice by Wilcoxon's signed ranks: {shown}")
    return lines


def _too_few(result: Mapping[str, Any], name: str) -> str:
    """Why a measure has no interval."""
    if name == "dice":
        return f"{count(result['scans_with_dice'], 'scan')}, {MIN_SCANS} are needed"
    with_lesions = result["scans_with_lesions"]
    return f"{count(with_lesions, 'scan')} with a lesion, {MIN_SCANS} are needed"
