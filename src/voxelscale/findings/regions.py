"""Which voxels are one finding: components, two thresholds, fragments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from voxelscale.geometry import Grid

Voxels = NDArray[np.int64]
"""(n, 3) voxels as (z, y, x)."""

TOLERANCE_MM = 1e-6
"""Distances are sums of rounded spacings: what is meant to be 1.4 mm may come as a little more."""


def components(mask: NDArray[np.bool_], least: float = 0.0) -> list[Voxels]:
    """Voxels (n, 3) as (z, y, x) of each 26-connected component of at least `least` voxels."""
    import cc3d

    around = box_of(mask)
    part = mask[around]
    if sorted(part.shape)[:2] == [1, 1]:
        # In a line of voxels cc3d 4.1 expects too few components, and raises a RuntimeError.
        part = np.pad(part, (0, 1))
    labels, count = cc3d.connected_components(part, connectivity=26, return_N=True)
    if not count:
        return []
    facts = cc3d.statistics(labels, no_slice_conversion=True)
    start = np.asarray([axis.start for axis in around])
    found = []
    for number in 1 + np.flatnonzero(facts["voxel_counts"][1:] >= least):
        low, high = facts["bounding_boxes"][number].reshape(3, 2).astype(np.int64).T
        z, y, x = map(slice, low, high + 1)
        found.append(np.argwhere(labels[z, y, x] == number) + low + start)
    return found


def box_of(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The smallest box that holds all of a mask; of an empty one a box of no voxels."""
    # Axis by axis, on what is left: lesions fill little of a scan.
    box = [slice(0, n) for n in mask.shape]
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        there = np.flatnonzero(mask[tuple(box)].any(axis=others))
        box[axis] = slice(int(there[0]), int(there[-1]) + 1) if len(there) else slice(0, 0)
    return box[0], box[1], box[2]


def sure_regions(
    probability: NDArray[np.floating],
    grid: Grid,
    *,
    threshold: float,
    low: float,
    merge_mm: float,
    least: float,
) -> list[Voxels]:
    """The components at or above `low` that reach `threshold`, fragments joined, of at least `least`."""
    parts = [
        voxels
        for voxels in components(probability >= low, least if merge_mm <= 0 else 0)
        if low == threshold or probability[tuple(voxels.T)].max() >= threshold
    ]
    return _joined(parts, grid, merge_mm, least)


def masked_regions(mask: NDArray[np.bool_], grid: Grid, *, merge_mm: float, least: float) -> list[Voxels]:
    """The components of a mask, fragments joined, of at least `least` voxels."""
    return _joined(components(mask, 0 if merge_mm > 0 else least), grid, merge_mm, least)


def doubtful_regions(
    probability: NDArray[np.floating],
    taken: NDArray[np.uint8] | NDArray[np.bool_],
    grid: Grid,
    *,
    candidates: float,
    merge_mm: float,
    least: float,
) -> list[Voxels]:
    """The components at or above `candidates` without a voxel of `taken`, joined among themselves."""
    parts = [
        voxels
        for voxels in components(probability >= candidates, least if merge_mm <= 0 else 0)
        if not taken[tuple(voxels.T)].any()
    ]
    return _joined(parts, grid, merge_mm, least)


def _joined(parts: list[Voxels], grid: Grid, merge_mm: float, least: float) -> list[Voxels]:
    # Merged first: a fragment beside a lesion is part of it, however small.
    whole = merge_near(parts, grid, merge_mm) if merge_mm > 0 else parts
    return [voxels for voxels in whole if len(voxels) >= least]


def merge_near(parts: Sequence[Voxels], grid: Grid, distance_mm: float) -> list[Voxels]:
    """Parts whose surfaces lie within a distance of each other become one, from part to part.

    The surface is that of the voxels as boxes: voxels that touch, be it at a corner, are 0 mm apart.

    Args:
        parts: disjoint, none empty.
        grid: where their voxels lie; its axes at right angles, in any direction.
        distance_mm: at most so far.
    """
    spacing = np.asarray(grid.spacing)
    reach = distance_mm + TOLERANCE_MM
    low = np.asarray([part.min(axis=0) for part in parts]).reshape(-1, 3)
    high = np.asarray([part.max(axis=0) for part in parts]).reshape(-1, 3)
    group = np.arange(len(parts))
    for a in range(len(parts)):
        between = np.maximum(np.maximum(low - high[a], low[a] - high) - 1, 0) * spacing
        near = np.flatnonzero(np.linalg.norm(between, axis=1) <= reach)
        for b in near[near > a].tolist():
            if group[a] != group[b] and _within(parts[a], parts[b], spacing, reach):
                group[group == group[b]] = group[a]
    firsts = dict.fromkeys(group.tolist())
    return [np.concatenate([parts[i] for i in np.flatnonzero(group == first).tolist()]) for first in firsts]


def _within(a: Voxels, b: Voxels, spacing: NDArray[np.float64], reach: float) -> bool:
    """Whether two sets of boxes come within `reach` mm of each other.

    Between boxes whose centres are d steps apart along an axis there are max(0, |d| - 1) steps of space:
    the distance of one centre from the nearest of the 27 around the other. So the distance of the surfaces
    is that of b's centres from a grown by a voxel all around.
    """
    from scipy import ndimage

    margin = np.floor(reach / spacing).astype(np.int64) + 1
    start = np.maximum(a.min(axis=0), b.min(axis=0)) - margin
    stop = np.minimum(a.max(axis=0), b.max(axis=0)) + margin + 1
    near_a, near_b = (part[((part >= start) & (part < stop)).all(axis=1)] - start for part in (a, b))
    if not (len(near_a) and len(near_b)):
        return False
    grown = np.zeros(stop - start, bool)
    grown[tuple(near_a.T)] = True
    grown = ndimage.binary_dilation(grown, np.ones((3, 3, 3), bool))
    apart = ndimage.distance_transform_edt(~grown, sampling=spacing)
    return bool(apart[tuple(near_b.T)].min() <= reach)
