"""From probability maps to stored labels and findings, for any classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import Classes
from voxelscale.config import PredictConfig
from voxelscale.findings import Finding, find_in_class, find_lesions, ranked
from voxelscale.geometry import Grid
from voxelscale.predict.case import probability_file
from voxelscale.predict.maps import OnLattice, on_grid

MOST_LEAST, LEAST_LEAST = 0.025, 1 / 256
"""Smaller probabilities are not kept (`Maps`), whatever is asked for; larger ones always are."""


def least_kept(config: PredictConfig) -> float:
    """The minimum probability that maps of several classes keep.

    It is half the lowest threshold of findings: a voxel interpolated between two others has a part of each.
    """
    asked = min(config.candidates, config.threshold, config.low_threshold or 1.0) / 2
    return min(max(asked, LEAST_LEAST), MOST_LEAST)


def found_by(
    config: PredictConfig,
    case: str,
    classes: Classes,
    found: NDArray[np.float32] | Sequence[OnLattice],
    grid: Grid,
    **rules: Any,
) -> tuple[list[Finding], NDArray[Any]]:
    """Findings, most confident first, and the stored labels: `lesions_by` or `classes_by`.

    Args:
        found: probabilities of the only class on the grid, or maps of all classes.
        rules: ``image``, ``depth`` and ``keep`` of these.
    """
    if not isinstance(found, np.ndarray):
        return classes_by(config, case, classes, found, grid, **rules)
    return lesions_by(config, case, found, grid, classes.names[0], **rules)


def lesions_by(
    config: PredictConfig,
    case: str,
    probability: NDArray[np.float32],
    grid: Grid,
    name: str,
    **rules: Any,
) -> tuple[list[Finding], NDArray[np.uint8]]:
    """`find_lesions` with a config's thresholds, and its rules for the class of that name.

    Args:
        rules: ``image``, ``depth`` and ``keep`` of it.
    """
    return find_lesions(
        case,
        probability,
        grid,
        threshold=config.threshold,
        low=config.low_threshold,
        candidates=config.candidates,
        merge_mm=config.merge_mm,
        min_volume_mm3=max(config.min_volume_mm3, config.smallest_mm3.get(name, 0.0)),
        largest_only=name in config.largest_only,
        **rules,
    )


def classes_by(
    config: PredictConfig,
    case: str,
    classes: Classes,
    maps: Sequence[OnLattice],
    grid: Grid,
    **rules: Any,
) -> tuple[list[Finding], NDArray[np.int16]]:
    """Findings of all classes, most confident first, and the stored labels, on the scan's own voxels.

    The maps are interpolated linearly, class by class, each in the box that holds it.

    Of classes that exclude each other a voxel is of the most probable one, background included, and of the
    first of several that are equally probable. A class's findings are the components of this mask that
    have at least `predict.min_volume_mm3`; the mask keeps the smaller ones, too, but for those that
    `predict.smallest_mm3` and `predict.largest_only` name. Where `predict.candidates`
    is below `predict.threshold`, components of at least that probability that hold no voxel of the class's
    mask are findings as well; the thresholds mean nothing else here.

    Regions may overlap: each is what `find_lesions` finds by the thresholds, as one class would be.

    Args:
        maps: of each network.
        grid: of the scan.
        rules: ``image``, ``depth`` and ``keep`` of `find_lesions`; what `keep` leaves out is in no mask.
    """
    if classes.regions:
        return _regions(config, case, classes, maps, grid, rules)
    stored = _most_probable(maps, classes.outputs, grid)
    findings: list[Finding] = []
    for at, name in enumerate(classes.names, start=1):
        there = on_grid(maps, at, grid)
        if there is None:
            continue
        box, probability = there
        mask = stored[box] == at
        candidates = config.candidates if config.candidates < config.threshold else None
        if not mask.any() and (candidates is None or probability.max() < candidates):
            continue
        found, kept = find_in_class(
            case,
            name,
            probability,
            mask,
            [side.start for side in box],
            grid,
            candidates=candidates,
            merge_mm=config.merge_mm,
            min_volume_mm3=config.min_volume_mm3,
            smallest_mm3=config.smallest_mm3.get(name, 0.0),
            largest_only=name in config.largest_only,
            **rules,
        )
        findings += found
        stored[box][mask & ~kept] = 0
    return ranked(findings), stored


def kept_probabilities(
    classes: Classes, found: NDArray[np.float32] | Sequence[OnLattice], grid: Grid
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The file of each class's probabilities, and these, (z, y, x) in steps of 1/255.

    Args:
        found: probabilities of the only class on the grid, or maps of all classes.
    """
    for at, name in enumerate(classes.names):
        kept = np.zeros(grid.shape, np.uint8)
        if isinstance(found, np.ndarray):
            kept[:] = np.rint(found * 255)
        elif (there := on_grid(found, at if classes.regions else at + 1, grid)) is not None:
            kept[there[0]] = np.rint(there[1] * 255)
        yield probability_file(classes, name), kept


def _most_probable(maps: Sequence[OnLattice], outputs: int, grid: Grid) -> NDArray[np.int16]:
    """Where which output is the largest; 0, background, is the first."""
    stored = np.zeros(grid.shape, np.int16)
    best = np.zeros(grid.shape, np.float32)
    for at in range(outputs):
        there = on_grid(maps, at, grid)
        if there is not None:
            box, probability = there
            better = probability > best[box]
            stored[box][better] = at
            np.maximum(best[box], probability, out=best[box])
    return stored


def _regions(
    config: PredictConfig,
    case: str,
    classes: Classes,
    maps: Sequence[OnLattice],
    grid: Grid,
    rules: dict[str, Any],
) -> tuple[list[Finding], NDArray[np.int16]]:
    stored = np.zeros(grid.shape, np.int16)
    findings: list[Finding] = []
    for at, name in enumerate(classes.names):
        probability = np.zeros(grid.shape, np.float32)
        if (there := on_grid(maps, at, grid)) is not None:
            probability[there[0]] = there[1]
        found, mask = lesions_by(config, case, probability, grid, name, **rules)
        findings += [replace(finding, label=name) for finding in found]
        stored |= mask.astype(np.int16) << at
    return ranked(findings), stored
