"""Two models on the same scans: by how much one is better, and whether that could be chance alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.config import ReadingConfig
from voxelscale.console import count, warn
from voxelscale.dataset import DataSet, Source
from voxelscale.evaluate.bootstrap import MIN_PATIENTS, RESAMPLES, p_value, percentile_interval, units_of
from voxelscale.evaluate.cases import each_case, none_usable, predicted_cases
from voxelscale.evaluate.evaluate import read_prediction
from voxelscale.evaluate.froc import OPERATING_POINTS, Matches, froc, match, pool, resampled
from voxelscale.evaluate.overlap import overlap
from voxelscale.evaluate.per_class import mean_over_classes, resampled_mean_over_classes
from voxelscale.evaluate.truth import Truth, truth_of
from voxelscale.files import write_atomic
from voxelscale.findings import Finding, lesions_of_mask


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model on one scan.

    Attributes:
        dice: of the masks; None where both are empty.
        matches: findings held against lesions.
        patient: whose it is; "": of nobody who has another scan.
    """

    dice: float | None
    matches: Matches
    patient: str = ""


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
        resamples, seed: of the bootstrap over patients.

    Returns:
        plain values: `compare_scores`, or `compare_classes` where there are several; ``failed``, the cases
        that could not be read; ``only_a`` and ``only_b``, names of cases that only one of them predicted;
        ``missing``, cases with truth that neither did.

    Raises:
        VoxelscaleError: there is no case that both predicted and that can be read.
    """
    both = [predicted_cases(folder, data) for folder in (first, second)]
    # Each folder may have a key of its own, by which its cases are called; scans are the same all the same.
    scans = [_by_scan(cases.predicted) for cases in both]
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
        cases.warn()
        if alone:
            left = f"left out {count(len(alone), 'case')} that the other one lacks: {', '.join(alone)}"
            warn(f"{cases.predictions}: {left}")
    missing = [case for case in both[0].missing if case in both[1].missing]
    head = {"a": str(first), "b": str(second), "only_a": only[0], "only_b": only[1], "missing": missing}
    names = next(scans[0][scan].classes.names for scan in shared if scans[0][scan].case in pairs)
    by_class = {name: {case: each[at] for case, each in pairs.items()} for at, name in enumerate(names)}
    figures = (
        compare_scores(by_class[names[0]], resamples, seed)
        if len(names) == 1
        else compare_classes(by_class, resamples, seed)
    )
    result = {**head, **figures}
    if out is not None:
        kept = {**result, "failed": [failure.kept for failure in failed]}
        write_atomic(out, json.dumps(kept, indent=1))
    return {**result, "failed": [failure.for_terminal for failure in failed]}


def _by_scan(sources: Sequence[Source]) -> dict[Hashable, Source]:
    """Each source by its files, and by its number among those of the same ones under several names."""
    times = Counter[Hashable]()
    found: dict[Hashable, Source] = {}
    for source in sources:
        files = source.image, source.series, source.labels
        found[files, times[files]] = source
        times[files] += 1
    return found


def _score(source: Source, folders: tuple[Path, Path], reading: ReadingConfig) -> list[Pair]:
    """Both predictions of a case held against its truth, of each class."""
    truth = truth_of(source, reading)
    first, second = (scores_of(truth, *read_prediction(folder, source, truth)) for folder in folders)
    return list(zip(first, second, strict=True))


def scores_of(truth: Truth, prediction: NDArray[Any], findings: Sequence[Finding]) -> list[Score]:
    """A prediction of a case held against its truth, of each class.

    Args:
        prediction: stored labels on the truth's lattice.
        findings: of the same scan, LPS mm.
    """
    scores = []
    for one in truth.against(prediction):
        counts = overlap(one.truth, one.prediction)
        dice = counts.dice if counts.truth or counts.prediction else None
        lesions = lesions_of_mask(truth.case, one.truth, truth.mask.grid, one.start)
        own = [f for f in findings if f.label in ("", one.name)]
        matches = match(lesions, own, truth.ignored, truth.uncounted)
        scores.append(Score(dice=dice, matches=matches, patient=truth.patient))
    return scores


def compare_scores(pairs: Mapping[str, Pair], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """The paired comparison.

    Both models see the same `resamples` draws of patients: what makes a scan hard for both drops out.

    Args:
        pairs: both models' scores of each case.

    Returns:
        plain values: ``scans``; of scans and of patients ``_with_lesions`` and ``_with_dice``;
        ``lesion_count``, ``resamples``, ``seed``; ``cases``, a table of the Dice;
        ``measures``: ``dice`` (mean), ``cpm`` and ``sensitivity_at_1_fp``, each with ``a``, ``b``,
        ``difference`` (a less b), its 95 % ``interval`` and the two-sided ``p``; ``dice`` with
        ``wilcoxon_p``, too. Without lesions CPM and sensitivity have None; so have intervals and p-values
        of fewer than `voxelscale.evaluate.bootstrap.MIN_PATIENTS` patients, or of fewer with a lesion.

    A scan where truth and prediction are empty has no Dice. Where that is so of one model only, the other
    one has a false finding: its Dice is 0, and in the signed ranks the difference is 1.
    """
    whose = _whose(pairs)
    known = {case: pair for case, pair in pairs.items() if (pair[0].dice, pair[1].dice) != (None, None)}
    dices, theirs = _dices(list(known.values())), _whose(known)
    matches = [[pair[model].matches for pair in pairs.values()] for model in (0, 1)]
    lesions = sum(len(m.hits) for m in matches[0])
    measures = {"dice": _dice_measure(dices[:, None], theirs, resamples, seed)}
    with_lesions = len({patient for patient, m in zip(whose, matches[0], strict=True) if m.hits})
    samples = resampled([pool(m) for m in matches], resamples, seed, units_of(whose))
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
        "scans_with_lesions": sum(bool(m.hits) for m in matches[0]),
        "scans_with_dice": len(known),
        "patients_with_lesions": with_lesions,
        "patients_with_dice": len(set(theirs)),
        "lesion_count": lesions,
        "resamples": resamples,
        "seed": seed,
        "measures": measures,
        "cases": [{"case": case, "dice_a": a.dice, "dice_b": b.dice} for case, (a, b) in pairs.items()],
    }


def _whose(pairs: Mapping[str, Pair]) -> list[str]:
    """The patient of each case, or the case where it is nobody else's."""
    return [pair[0].patient or case for case, pair in pairs.items()]


def _dices(pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """(2, scans) of both models; NaN where there is none."""
    return (
        np.asarray([[NAN if s.dice is None else s.dice for s in pair] for pair in pairs]).reshape(-1, 2).T
    )


def compare_classes(
    pairs: Mapping[str, Mapping[str, Pair]], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """The paired comparison of several classes.

    Args:
        pairs: of each class by name, both models' scores of each case; the cases are the same.

    Returns:
        plain values: ``classes``, for each by name what `compare_scores` says, with ``p_holm`` beside each
        ``p`` and ``wilcoxon_p_holm``: corrected over the classes (`holm`); ``mean_dice``, the measure of
        the mean Dice over classes; ``scans``, ``scans_with_dice``, ``patients_with_dice``, ``resamples``,
        ``seed``.
    """
    classes = {name: compare_scores(own, resamples, seed) for name, own in pairs.items()}
    for measure in NAMES:
        for p in ("p", "wilcoxon_p") if measure == "dice" else ("p",):
            rows = [own["measures"][measure] for own in classes.values()]
            for row, corrected in zip(rows, holm([row[p] for row in rows]), strict=True):
                row[f"{p}_holm"] = corrected
    dices = np.stack([_dices(list(own.values())) for own in pairs.values()], axis=1)
    there = ~np.isnan(dices).all(axis=(0, 1))
    whose = list(np.asarray(_whose(next(iter(pairs.values()))))[there])
    return {
        "classes": classes,
        "mean_dice": _dice_measure(dices[..., there], whose, resamples, seed),
        "scans": dices.shape[-1],
        "scans_with_dice": int(there.sum()),
        "patients_with_dice": len(set(whose)),
        "resamples": resamples,
        "seed": seed,
    }


def _dice_measure(
    dices: NDArray[np.float64], whose: Sequence[str], resamples: int, seed: int
) -> dict[str, Any]:
    """The mean Dice of both, of several classes the mean over these.

    Args:
        dices: (2, classes, scans); NaN where there is no Dice.
        whose: the patient of each scan.
    """
    first, second = (mean_over_classes(own) for own in dices)
    if first is None or second is None:
        return dict.fromkeys(("a", "b", "difference", "interval", "p", "wilcoxon_p"))
    units, patients = units_of(whose), len(set(whose))
    samples = resampled_mean_over_classes(dices, resamples, seed, units)
    measure = _measure((first, second), samples, patients)
    # Who finds nothing where nothing is is right.
    either = ~np.isnan(dices).all(axis=0)
    right = np.where(either, np.where(np.isnan(dices), 1.0, dices), 0.0).sum(axis=1) / either.sum(axis=0)
    apart = right[0] - right[1]
    if units is not None:  # the ranks are of patients: scans of one are not independent
        apart = np.bincount(units, apart) / np.bincount(units)
    return {**measure, "wilcoxon_p": wilcoxon_p(apart) if patients >= MIN_PATIENTS else None}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    known = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, at) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        corrected[at] = least
    return corrected


def _measure(
    values: Sequence[float] | NDArray[np.float64], samples: NDArray[np.float64], patients: int
) -> dict[str, Any]:
    """A figure of both models, and their difference.

    Args:
        values: (2,) of all scans.
        samples: (2, resamples).
        patients: how many have such a figure.
    """
    apart = samples[0] - samples[1]
    return {
        "a": float(values[0]),
        "b": float(values[1]),
        "difference": float(values[0] - values[1]),
        "interval": percentile_interval(apart, patients),
        "p": p_value(apart, patients),
    }


def wilcoxon_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the signed-rank test of differences (Wilcoxon 1945); 1 where all are 0."""
    from scipy.stats import wilcoxon

    # Rounded: ranks must not depend on rounding errors.
    apart = np.round(differences, 12)
    apart = apart[apart != 0]
    return float(wilcoxon(apart).pvalue) if len(apart) else 1.0


NAMES = {"dice": "Dice", "cpm": "CPM", "sensitivity_at_1_fp": "sensitivity at 1 FP/scan"}


def text_table(result: Mapping[str, Any]) -> list[str]:
    """What `compare_folders` returned, in lines for a person."""
    lines = [f"A: {result['a']}", f"B: {result['b']}"]
    if "classes" in result:
        return [*lines, *_text_classes(result)]
    lines += [
        f"{count(result['scans'], 'scan')}, {count(result['lesion_count'], 'lesion')}",
        "",
        TABLE_HEAD,
    ]
    return [*lines, *_text_measures(result)]


TABLE_HEAD = f"{'':24}       A       B    A - B  95 % interval             p"


def _text_classes(result: Mapping[str, Any]) -> list[str]:
    """Of each class its measures, then the mean."""
    lines = [count(result["scans"], "scan")]
    for name, own in result["classes"].items():
        heading = f"class {name}: {count(own['lesion_count'], 'lesion')}"
        lines += ["", heading, TABLE_HEAD, *_text_measures(own, "_holm")]
    number = len(result["classes"])
    return [
        *lines,
        "",
        TABLE_HEAD,
        _text_row(f"mean Dice, {number} classes", result["mean_dice"], _too_few(result, "dice")),
        _text_wilcoxon("mean Dice", result["mean_dice"]["wilcoxon_p"], _too_few(result, "dice")),
        f"p of the single classes are corrected for {number} classes (Holm), each measure by itself",
    ]


def _text_measures(result: Mapping[str, Any], corrected: str = "") -> list[str]:
    """The rows of one class.

    Args:
        corrected: what the names of the p-values end in.
    """
    measures = result["measures"]
    lines = [
        _text_row(
            NAMES[name],
            row,
            _too_few(result, name),
            "no masks" if name == "dice" else "no lesions",
            corrected,
        )
        for name, row in measures.items()
    ]
    p = measures["dice"][f"wilcoxon_p{corrected}"]
    return [*lines, _text_wilcoxon("Dice", p, _too_few(result, "dice"))]


def _text_row(
    name: str, row: Mapping[str, Any], too_few: str, without: str = "no masks", corrected: str = ""
) -> str:
    if row["difference"] is None:
        return f"{name:24}  {without}"
    shown = f"{name:24}  {row['a']:6.3f}  {row['b']:6.3f}  {row['difference']:+7.3f}  "
    if row["interval"] is None:
        return f"{shown}no interval, no p: {too_few}"
    low, high = row["interval"]
    return f"{shown}{low:+.3f} to {high:+.3f}      {row[f'p{corrected}']:.3f}"


def _text_wilcoxon(name: str, p: float | None, too_few: str) -> str:
    shown = f"no p: {too_few}" if p is None else f"p = {p:.3f}"
    return f"{name} by Wilcoxon's signed ranks: {shown}"


def _too_few(result: Mapping[str, Any], name: str) -> str:
    """Why a measure has no interval."""
    if name == "dice":
        return f"{count(result['patients_with_dice'], 'patient')}, {MIN_PATIENTS} are needed"
    return f"{count(result['patients_with_lesions'], 'patient')} with a lesion, {MIN_PATIENTS} are needed"
