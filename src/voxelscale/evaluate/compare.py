"""Two models on the same scans: by how much one is better, and whether chance alone could do that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.config import PrepareConfig
from voxelscale.console import notice
from voxelscale.data.listing import Source, list_sources
from voxelscale.data.names import names_of
from voxelscale.data.reading import read_truth
from voxelscale.evaluate.bootstrap import RESAMPLES, interval, p_value, resampled_means
from voxelscale.evaluate.cases import each_case, none_usable
from voxelscale.evaluate.evaluate import read_prediction
from voxelscale.evaluate.froc import OPERATING_POINTS, Matches, froc, match, pool, resampled
from voxelscale.evaluate.overlap import overlap
from voxelscale.files import write_atomic
from voxelscale.predict.findings import lesions_of_mask


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model on one scan.

    Attributes:
        dice: of the masks.
        matches: findings held against lesions.
    """

    dice: float
    matches: Matches


Pair = tuple[Score, Score]
"""Both models on one scan."""


def compare_folders(
    first: Path,
    second: Path,
    data: Path,
    *,
    config: PrepareConfig | None = None,
    layout: str = "auto",
    annotations: Path | None = None,
    out: Path | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Hold two models' predictions against each other on the cases that both have.

    Args:
        first, second: what `voxelscale predict` wrote.
        data, config, layout, annotations: as of `voxelscale.evaluate.evaluate.evaluate_folder`.
        out: a JSON file to write the result to.
        resamples, seed: of the bootstrap over scans.

    Returns:
        plain values; ``failed`` are the cases that could not be read, and see `compare_scores`.

    Raises:
        VoxelscaleError: there is no case that both predicted and that can be read.
    """
    config = config or PrepareConfig()
    shared = _shared_cases(first, second, data, config, layout, annotations)
    folders = {source.case: both for source, both in shared}
    pairs, failed = each_case(
        "compare",
        [source for source, _ in shared],
        lambda source: _score(source, folders[source.case], config),
    )
    if not pairs:
        what = f"{first} and {second}: no case of {data} with a mask that both predicted"
        raise none_usable(what, failed, "run voxelscale predict with both models on that data set first")
    head = {"a": str(first), "b": str(second)}
    result = {**head, **compare_scores(pairs, resamples, seed)}
    if out is not None:
        kept = {**result, "failed": [failure.kept for failure in failed]}
        write_atomic(out, json.dumps(kept, indent=1))
    return {**result, "failed": [failure.told for failure in failed]}


def _shared_cases(
    first: Path, second: Path, data: Path, config: PrepareConfig, layout: str, annotations: Path | None
) -> list[tuple[Source, tuple[Path, Path]]]:
    """The cases with a mask that both predicted, with the folders of their predictions; others are told.

    Each folder may have a key of its own, by which its cases are called; scans are the same all the same.
    """
    found: list[dict[tuple[Path, str], tuple[Source, Path]]] = []
    for predictions in (first, second):
        listed = list_sources(data, layout, annotations, names_of(config, predictions))
        folders = [(source, predictions / source.case) for source in listed if source.labels]
        here = {(s.image, s.series): (s, f) for s, f in folders if (f / "mask.nii.gz").is_file()}
        found.append(here)
    for at, predictions in enumerate((first, second)):
        if alone := len(found[at].keys() - found[1 - at].keys()):
            notice(f"{predictions}: left out {alone} case{'s' * (alone != 1)} that the other one lacks")
    return [
        (source, (folder, found[1][scan][1]))
        for scan, (source, folder) in found[0].items()
        if scan in found[1]
    ]


def _score(source: Source, folders: tuple[Path, Path], config: PrepareConfig) -> Pair:
    """Both predictions of a case held against its truth."""
    truth = read_truth(source, config)
    lesions = lesions_of_mask(source.case, truth.array, truth.grid)
    scores = []
    for folder in folders:
        mask, findings = read_prediction(folder, source, truth)
        dice = overlap(truth.array, mask.array).dice
        scores.append(Score(dice=dice, matches=match(lesions, findings)))
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
        ``wilcoxon_p``, too. Without lesions CPM and sensitivity have None.
    """
    dices = np.asarray([[score.dice for score in pair] for pair in pairs.values()]).T
    matches = [[pair[model].matches for pair in pairs.values()] for model in (0, 1)]
    lesions = sum(len(m.hits) for m in matches[0])
    measures = {"dice": _measure(dices.mean(axis=1), resampled_means(dices, resamples, seed))}
    measures["dice"]["wilcoxon_p"] = wilcoxon_p(dices[0] - dices[1])
    samples = resampled([pool(m) for m in matches], resamples, seed)
    curves = [froc(m) for m in matches]
    at = OPERATING_POINTS.index(1.0)
    measures["cpm"] = _measure([curve.cpm for curve in curves], samples.mean(axis=2))
    measures["sensitivity_at_1_fp"] = _measure(
        [curve.sensitivity_at(1.0) for curve in curves], samples[:, :, at]
    )
    if not lesions:
        measures["cpm"] = measures["sensitivity_at_1_fp"] = dict.fromkeys(measures["cpm"])
    return {
        "scans": len(pairs),
        "lesion_count": lesions,
        "resamples": resamples,
        "seed": seed,
        "measures": measures,
        "cases": [{"case": case, "dice_a": a.dice, "dice_b": b.dice} for case, (a, b) in pairs.items()],
    }


def _measure(values: Sequence[float] | NDArray[np.float64], samples: NDArray[np.float64]) -> dict[str, Any]:
    """A figure of both models, and their difference.

    Args:
        values: (2,) of all scans.
        samples: (2, resamples).
    """
    apart = samples[0] - samples[1]
    return {
        "a": float(values[0]),
        "b": float(values[1]),
        "difference": float(values[0] - values[1]),
        "interval": interval(apart),
        "p": p_value(apart),
    }


def wilcoxon_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the signed-rank test (Wilcoxon 1945) of the cases' differences; 1 where all are 0."""
    from scipy.stats import wilcoxon

    # Rounded, as ranks tell apart what only rounding does.
    apart = np.round(differences, 12)
    apart = apart[apart != 0]
    return float(wilcoxon(apart).pvalue) if len(apart) else 1.0


NAMES = {"dice": "Dice", "cpm": "CPM", "sensitivity_at_1_fp": "sensitivity at 1 FP/scan"}


def text_table(result: Mapping[str, Any]) -> list[str]:
    """What `compare_folders` returned, in lines for a person."""
    lines = [
        f"A: {result['a']}",
        f"B: {result['b']}",
        f"{result['scans']} scans, {result['lesion_count']} lesions",
        "",
        f"{'':24}       A       B    A - B  95 % interval             p",
    ]
    for name, row in result["measures"].items():
        if row["difference"] is None:
            lines.append(f"{NAMES[name]:24}  no lesions")
            continue
        low, high = row["interval"]
        lines.append(
            f"{NAMES[name]:24}  {row['a']:6.3f}  {row['b']:6.3f}  {row['difference']:+7.3f}  "
            f"{low:+.3f} to {high:+.3f}      {row['p']:.3f}"
        )
    lines.append(f"Dice by Wilcoxon's signed ranks: p = {result['measures']['dice']['wilcoxon_p']:.3f}")
    return lines
