"""Lesions of a mask, and what becomes of them when the mask is resampled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.geometry import SAME_MM, Grid, Scan, resample, sphere_diameter


@dataclass(frozen=True, kw_only=True, eq=False)
class Resampled:
    """A mask on another lattice.

    Attributes:
        array: uint8, 0 or 1, (z, y, x).
        lesions: flat (C-order) voxel indices of each 26-connected component of `array`, largest first.
        lost: of each lesion of which no voxel was left before one was kept: ``volume_mm3``,
            ``diameter_mm`` (of the sphere of the same volume), ``centre`` (LPS mm, x, y, z).
        merged: how many lesions share a component with another one.
        cut: how many lie in several components.
    """

    array: NDArray[np.uint8]
    lesions: list[NDArray[np.int64]]
    lost: tuple[dict[str, Any], ...] = ()
    merged: int = 0
    cut: int = 0


def resample_mask(mask: Scan, grid: Grid, keep_small: bool = False) -> Resampled:
    """A mask of 0 and 1 at the voxels of `grid`, by nearest neighbour, so that it stays a mask.

    Args:
        keep_small: whether a lesion that falls between the voxels keeps one: the one it fills most of.
    """
    if mask.grid.same_as(grid, SAME_MM):
        array = mask.array.astype(np.uint8)
        return Resampled(array=array, lesions=lesion_voxels(array))
    before = lesion_voxels(mask.array)
    numbers = np.zeros(mask.array.shape, np.min_scalar_type(len(before)))
    for number, flat in enumerate(before, start=1):
        numbers.flat[flat] = number
    after = resample(Scan(numbers, mask.affine), grid, "nearest").array
    array = (after > 0).astype(np.uint8)
    gone = sorted(set(range(1, len(before) + 1)) - set(np.unique(after).tolist()))
    places = {n: np.stack(np.unravel_index(before[n - 1], numbers.shape), axis=1) for n in gone}
    for number in gone if keep_small else ():
        place = _fullest(mask.grid.index_to_mm(places[number]), grid)
        array[place], after[place] = 1, after[place] or number
    lesions = lesion_voxels(array)
    owners = [set(after.flat[flat].tolist()) for flat in lesions]
    parts = Counter(number for owner in owners for number in owner)
    return Resampled(
        array=array,
        lesions=lesions,
        lost=tuple(_facts(mask.grid, places[number]) for number in gone),
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
        "diameter_mm": round(sphere_diameter(volume), 2),
        "centre": [round(float(v), 2) for v in grid.index_to_mm(voxels).mean(axis=0)],
    }


def lesion_voxels(mask: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """Flat (C-order) voxel indices of each 26-connected component, largest first."""
    import cc3d

    components = cc3d.connected_components(np.ascontiguousarray(mask), connectivity=26)
    flat = np.flatnonzero(components)
    owner = components.ravel()[flat]
    order = np.argsort(owner, kind="stable")
    cuts = np.flatnonzero(np.diff(owner[order])) + 1
    groups = [np.sort(group) for group in np.split(flat[order], cuts) if len(group)]
    return sorted(groups, key=lambda group: (-len(group), int(group[0])))
