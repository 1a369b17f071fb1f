"""Lesions of a label map, and what becomes of them when it is resampled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import IGNORED, LESION, Classes
from voxelscale.geometry import SAME_MM, Grid, Scan, equivalent_diameter, resample


@dataclass(frozen=True, kw_only=True, eq=False)
class Resampled:
    """Labels on another lattice.

    Attributes:
        array: stored labels (`voxelscale.classes.Classes`), (z, y, x); uint8 where they are plain.
        lesions: flat (C-order) voxel indices of each class's 26-connected components in `array`, largest
            first.
        classes: the number of each lesion's class, from 0.
        lost: of each lesion of which no voxel was left before one was kept: ``volume_mm3``,
            ``diameter_mm`` (of the sphere of the same volume), ``centre`` (LPS mm, x, y, z).
        merged: how many lesions share a component with another one of their class.
        cut: how many lie in several components.
    """

    array: NDArray[Any]
    lesions: list[NDArray[np.int64]]
    classes: list[int]
    lost: tuple[dict[str, Any], ...] = ()
    merged: int = 0
    cut: int = 0


def resample_labels(
    labels: Scan, grid: Grid, classes: Classes = LESION, *, keep_small: bool = False
) -> Resampled:
    """Stored labels at the voxels of `grid`, by nearest neighbour, so that none are mixed.

    Args:
        keep_small: whether a lesion that falls between the voxels keeps one: the one it fills most of.
    """
    same = labels.grid.same_as(grid, SAME_MM)
    array = (labels if same else resample(labels, grid, "nearest")).array.copy()
    if classes.regions:
        # Regions overlap: each has components of its own.
        parts = [
            _resampled(
                Scan(classes.where(labels.array, at).astype(np.uint8), labels.affine), grid, keep_small
            )
            for at in range(len(classes.names))
        ]
        for at, part in enumerate(parts):
            grown = (part.array > 0) & ~classes.where(array, at)
            array[grown] = np.maximum(array[grown], 0) | 1 << at
        return _joined(array, parts)
    found = _resampled(labels, grid, keep_small)
    if classes.plain:
        return found
    # What is ignored is no lesion, and gives way where one was kept.
    array = np.where((array == IGNORED) & (found.array == 0), IGNORED, found.array).astype(np.int16)
    values = [int(found.array.flat[flat[0]]) - 1 for flat in found.lesions]
    return replace(found, array=array, classes=values)


def _joined(array: NDArray[Any], parts: list[Resampled]) -> Resampled:
    """The lesions of all regions, largest first."""
    lesions = [(flat, at) for at, part in enumerate(parts) for flat in part.lesions]
    lesions.sort(key=lambda one: (-len(one[0]), one[1], int(one[0][0])))
    return Resampled(
        array=array,
        lesions=[flat for flat, _ in lesions],
        classes=[at for _, at in lesions],
        lost=tuple(one for part in parts for one in part.lost),
        merged=sum(part.merged for part in parts),
        cut=sum(part.cut for part in parts),
    )


def _resampled(labels: Scan, grid: Grid, keep_small: bool) -> Resampled:
    """The same of labels of which 0 is none and each other one is a class; what is below 0 is left out."""
    dtype = labels.array.dtype
    if labels.grid.same_as(grid, SAME_MM):
        array = np.maximum(labels.array, 0).astype(dtype)
        lesions = lesion_voxels(array)
        return Resampled(array=array, lesions=lesions, classes=[0] * len(lesions))
    before = lesion_voxels(labels.array)
    numbers = np.zeros(labels.array.shape, np.min_scalar_type(len(before)))
    label_of = np.zeros(len(before) + 1, dtype)
    for number, flat in enumerate(before, start=1):
        numbers.flat[flat], label_of[number] = number, labels.array.flat[flat[0]]
    after = resample(Scan(numbers, labels.affine), grid, "nearest").array
    gone = sorted(set(range(1, len(before) + 1)) - set(np.unique(after).tolist()))
    places = {n: np.stack(np.unravel_index(before[n - 1], numbers.shape), axis=1) for n in gone}
    for number in gone if keep_small else ():
        place = _fullest(labels.grid.index_to_mm(places[number]), grid)
        if label_of[after[place]] != label_of[number]:  # another's of its class is as good
            after[place] = number
    array = label_of[after]
    lesions = lesion_voxels(array)
    owners = [set(after.flat[flat].tolist()) for flat in lesions]
    parts = Counter(number for owner in owners for number in owner)
    return Resampled(
        array=array,
        lesions=lesions,
        classes=[0] * len(lesions),
        lost=tuple(_facts(labels.grid, places[number]) for number in gone),
        merged=sum(len(owner) for owner in owners if len(owner) > 1),
        cut=sum(count > 1 for count in parts.values()),
    )


def _fullest(points: NDArray[np.float64], grid: Grid) -> tuple[int, ...]:
    """The voxel of a lattice in which most of the points lie."""
    inside = np.clip(np.rint(grid.mm_to_index(points)), 0, np.asarray(grid.shape) - 1).astype(np.int64)
    voxels, counts = np.unique(inside, axis=0, return_counts=True)
    return tuple(voxels[np.argmax(counts)].tolist())


def _facts(grid: Grid, voxels: NDArray[np.int64]) -> dict[str, Any]:
    volume = len(voxels) * grid.voxel_mm3
    return {
        "volume_mm3": round(volume, 3),
        "diameter_mm": round(equivalent_diameter(volume, grid.shape, grid.spacing), 2),
        "centre": [round(float(v), 2) for v in grid.index_to_mm(voxels).mean(axis=0)],
    }


def lesion_voxels(labels: NDArray[Any]) -> list[NDArray[np.int64]]:
    """Flat (C-order) indices of each 26-connected component of equal labels above 0, largest first."""
    import cc3d

    components = cc3d.connected_components(np.ascontiguousarray(np.maximum(labels, 0)), connectivity=26)
    flat = np.flatnonzero(components)
    owner = components.ravel()[flat]
    order = np.argsort(owner, kind="stable")
    cuts = np.flatnonzero(np.diff(owner[order])) + 1
    groups = [np.sort(group) for group in np.split(flat[order], cuts) if len(group)]
    return sorted(groups, key=lambda group: (-len(group), int(group[0])))
