"""The figures of configurations on the same cases, and the rule that chooses among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxelscale.evaluate.bootstrap import RESAMPLES, p_value, percentile_interval
from voxelscale.evaluate.compare import holm
from voxelscale.evaluate.froc import OPERATING_POINTS, froc, pool, resampled
from voxelscale.evaluate.per_class import mean_over_classes, resampled_mean_over_classes
from voxelscale.experiments.best.unseen import Scored

Metric = Literal["dice", "cpm"]
METRICS = {"dice": "mean Dice", "cpm": "CPM"}

SIGNIFICANT = 0.05
"""An average takes the place of a single configuration where chance would make it as much better less often
than so."""


def rule(metric: Metric) -> str:
    """By what one is chosen, for people."""
    return (
        f"the single configuration with the highest {METRICS[metric]}; an average of two instead if its "
        f"{METRICS[metric]} is higher with p < {SIGNIFICANT} (paired bootstrap over patients, corrected by "
        "Holm for the number of averages), and of several such averages the highest"
    )


def dices_of(scores: Scored) -> NDArray[np.float64]:
    """The Dice of each `Score`, in the same shape; NaN where there is none."""
    flat = [np.nan if score.dice is None else score.dice for score in scores.ravel()]
    return np.asarray(flat, np.float64).reshape(scores.shape)


def figure(scores: Scored, metric: Metric) -> float | None:
    """The metric of a configuration.

    Args:
        scores: (classes, cases).

    Returns:
        None where it has no value: no mask has a voxel, or there is no lesion.
    """
    if metric == "dice":
        return mean_over_classes(dices_of(scores))
    known = [froc(matches).cpm for matches in _matches(scores)]
    return float(np.mean(known)) if known else None


def _matches(scores: Scored) -> list[list[Any]]:
    """Of each class with a lesion, the matches of each case."""
    each = [[score.matches for score in row] for row in scores]
    return [row for row in each if any(matches.hits for matches in row)]


def samples_of(scores: Scored, patients: NDArray[np.int64], seed: int) -> dict[str, NDArray[np.float64]]:
    """Dice, CPM and sensitivity at one false positive per scan on bootstrap samples of patients.

    Args:
        scores: (configurations, classes, cases).

    Returns:
        each (configurations, resamples); NaN where a sample has no such figure.
    """
    dices = resampled_mean_over_classes(dices_of(scores), RESAMPLES, seed, patients)
    points = []
    for at in range(scores.shape[1]):
        pools = [pool([score.matches for score in row]) for row in scores[:, at]]
        if pools[0].lesions.any():
            points.append(resampled(pools, RESAMPLES, seed, patients))
    nothing = np.full((len(scores), RESAMPLES, len(OPERATING_POINTS)), np.nan)
    curves = np.ma.masked_invalid(points).mean(axis=0).filled(np.nan) if points else nothing
    return {
        "dice": dices,
        "cpm": curves.mean(axis=-1),
        "sensitivity_at_1_fp": curves[..., OPERATING_POINTS.index(1.0)],
    }


def patients_with(scores: Scored, patients: NDArray[np.int64], metric: str) -> int:
    """How many patients have anything to say about a metric: a Dice, or else a lesion.

    Args:
        scores: (classes, cases).
    """
    if metric == "dice":
        there = ~np.isnan(dices_of(scores)).all(axis=0)
    else:
        there = np.asarray([any(score.matches.hits for score in case) for case in scores.T], np.bool_)
    return len(np.unique(patients[there]))


def compared(
    scores: Scored, averages: Sequence[bool], patients: NDArray[np.int64], metric: Metric, seed: int
) -> list[dict[str, Any]]:
    """The figures of each configuration, and its difference to the best single one.

    Args:
        scores: (configurations, classes, cases).
        averages: which of them are averages.

    Returns:
        rows with ``average``; ``dice``, ``cpm``, ``sensitivity_at_1_fp`` with an ``_interval``
        each; ``classes``, the Dice and CPM of each; ``difference`` in `metric` to the best single
        configuration, its ``interval``, ``p``, and for averages ``p_holm``.
    """
    samples = samples_of(scores, patients, seed)
    units = {key: patients_with(scores[0], patients, key) for key in samples}
    rows = [{"average": average, **_row(own)} for own, average in zip(scores, averages, strict=True)]
    for at, row in enumerate(rows):
        for key, drawn in samples.items():
            row[f"{key}_interval"] = percentile_interval(drawn[at], units[key])
    singles = [at for at, row in enumerate(rows) if not row["average"]]
    reference = max(singles, key=lambda at: or_least(rows[at][metric]))
    for at, row in enumerate(rows):
        known = None not in (row[metric], rows[reference][metric])
        apart = samples[metric][at] - samples[metric][reference]
        row["difference"] = row[metric] - rows[reference][metric] if known else None
        row["interval"] = percentile_interval(apart, units[metric]) if known and at != reference else None
        row["p"] = p_value(apart, units[metric]) if known and at != reference else None
    means = [row for row in rows if row["average"]]
    for row, p in zip(means, holm([row["p"] for row in means]), strict=True):
        row["p_holm"] = p
    return rows


def _row(scores: Scored) -> dict[str, Any]:
    curves = [froc(matches) for matches in _matches(scores)]
    classes = []
    for row in scores:
        lesions = _matches(row[None])
        dice = mean_over_classes(dices_of(row[None]))
        classes.append({"dice": dice, "cpm": froc(lesions[0]).cpm if lesions else None})
    return {
        "dice": figure(scores, "dice"),
        "cpm": figure(scores, "cpm"),
        "sensitivity_at_1_fp": float(np.mean([c.sensitivity_at(1.0) for c in curves])) if curves else None,
        "classes": classes,
    }


def or_least(value: float | None) -> float:
    """A value, or less than all where there is none."""
    return -1.0 if value is None else value


def choose(rows: Sequence[Mapping[str, Any]], metric: Metric) -> int:
    """The number of the configuration that `rule` chooses.

    Args:
        rows: of `compared`.
    """
    singles = [at for at, row in enumerate(rows) if not row["average"]]
    better = [at for at, row in enumerate(rows) if row["average"] and _is_better(row)]
    return max(better or singles, key=lambda at: or_least(rows[at][metric]))


def _is_better(row: Mapping[str, Any]) -> bool:
    p = row["p_holm"]
    return p is not None and bool(p < SIGNIFICANT and row["difference"] > 0)
