"""Class by class: where each is in truth and prediction, and means over classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import Classes
from voxelscale.evaluate.bootstrap import RESAMPLES, Units, percentile_interval, resampled_means, units_of

Box = tuple[slice, slice, slice]


@dataclass(frozen=True, kw_only=True, eq=False)
class OneClass:
    """A class in one case.

    Attributes:
        name: the class's.
        start: the first voxel (z, y, x) of the smallest box that holds it in truth and prediction; the box
            is one voxel where it is in neither.
        truth, prediction: bool, within the box.
    """

    name: str
    start: tuple[int, int, int]
    truth: NDArray[np.bool_]
    prediction: NDArray[np.bool_]


def each_class(
    classes: Classes,
    truth: NDArray[Any],
    prediction: NDArray[Any],
    uncounted: NDArray[np.bool_] | None = None,
) -> Iterator[OneClass]:
    """One class after the other, so that one mask is in memory at a time.

    Args:
        truth, prediction: stored labels (z, y, x) of one shape.
        uncounted: voxels of which nothing counts: what is predicted there is taken away.
    """
    if uncounted is not None:
        prediction = np.where(uncounted, 0, prediction)
    boxes = _boxes(classes, truth, prediction)
    for at, (name, box) in enumerate(zip(classes.names, boxes, strict=True)):
        yield OneClass(
            name=name,
            start=(box[0].start, box[1].start, box[2].start),
            truth=classes.where(truth[box], at),
            prediction=classes.where(prediction[box], at),
        )


def _boxes(classes: Classes, truth: NDArray[Any], prediction: NDArray[Any]) -> Iterator[Box]:
    from scipy.ndimage import find_objects

    if truth.shape != prediction.shape:
        raise ValueError(f"labels of {truth.shape} and {prediction.shape} are not on the same grid")
    both = (truth, prediction)
    if classes.regions:  # which overlap
        found = [
            [
                find_objects(classes.where(labels, at).view(np.uint8), 1)[0]
                for at in range(len(classes.names))
            ]
            for labels in both
        ]
    else:  # all classes in one pass: a whole scan is not searched a hundred times
        found = [find_objects(labels, max_label=len(classes.names)) for labels in both]
    for pair in zip(*found, strict=True):
        yield _around([box for box in pair if box is not None])


def _around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all; one voxel where there is none."""
    if not boxes:
        return slice(0, 1), slice(0, 1), slice(0, 1)
    z, y, x = (
        slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True)
    )
    return z, y, x


def mean_over_classes(dices: NDArray[np.float64]) -> float | None:
    """Mean over classes of each class's mean over cases; what has no Dice (NaN) is left out.

    Args:
        dices: (classes, cases).

    Returns:
        None where no class has a Dice in any case.
    """
    means = [float(row[~np.isnan(row)].mean()) for row in dices if not np.isnan(row).all()]
    return float(np.mean(means)) if means else None


def resampled_mean_over_classes(
    dices: NDArray[np.float64], resamples: int = RESAMPLES, seed: int = 0, units: Units = None
) -> NDArray[np.float64]:
    """`mean_over_classes` of bootstrap samples of patients.

    Args:
        dices: (..., classes, cases); NaN where a case has no Dice.
        units: the patient of each case, as of `voxelscale.evaluate.bootstrap.drawn`.

    Returns:
        (..., resamples); NaN where a sample has no Dice.
    """
    there = ~np.isnan(dices)
    sums, counts = (
        resampled_means(values, resamples, seed, units)
        for values in (np.nan_to_num(dices), there.astype(np.float64))
    )
    of_class = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    classes = (counts > 0).sum(axis=-2)
    total = of_class.sum(axis=-2)
    means = np.full(total.shape, np.nan)
    np.divide(total, classes, out=means, where=classes > 0)
    return means


def mean_dice(dices: Sequence[Sequence[float | None]], whose: Sequence[str]) -> dict[str, Any]:
    """The mean Dice over classes, as plain values.

    Args:
        dices: of each class, of each case; None where neither mask has a voxel.
        whose: the patient of each case.

    Returns:
        ``mean``, its 95 % ``interval`` by bootstrap over patients, and of how many ``classes``, ``cases``
        and ``patients`` it is; those without a Dice do not count.
    """
    table = np.asarray([[np.nan if d is None else d for d in row] for row in dices], np.float64)
    there = ~np.isnan(table).all(axis=0)
    known, own = table[:, there], list(np.asarray([*whose])[there])
    patients = len(set(own))
    return {
        "mean": mean_over_classes(table),
        "interval": percentile_interval(resampled_mean_over_classes(known, units=units_of(own)), patients)
        if own
        else None,
        "classes": int((~np.isnan(table)).any(axis=1).sum()),
        "cases": len(own),
        "patients": patients,
    }
