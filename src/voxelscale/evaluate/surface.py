"""How well two masks' surfaces agree: surface Dice and the 95th percentile of their distances.

A surface is made of elements, one in each cell of 2 x 2 x 2 neighbouring voxels that is neither wholly
inside nor wholly outside, placed at the cell's centre and weighed by its area, as in Nikolov et al., "Deep
learning to achieve clinically applicable segmentation of head and neck anatomy for radiotherapy", 2018
(arXiv 1809.04430) and the authors' library surface-distance. `docs/measures.md` explains it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.geometry import Triple

TOLERANCES_MM = (1.0, 2.0)
"""Distances at which the surface Dice is read."""

_ROUNDING_MM = 1e-6
"""A spacing of 1 mm may be 1.0000000001 in a header: it still counts as 1 mm."""

_CORNERS = np.asarray(list(product((0, 1), repeat=3)))
"""(8, 3) voxels of a cell; bit k of a cell's code says whether voxel k is inside."""

_NEXT = np.abs(_CORNERS[:, None] - _CORNERS[None]).sum(axis=-1) == 1
"""(8, 8) which of them share an edge of the cell."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """The surface of a mask.

    Attributes:
        points: (n, 3) centres of its cells, mm along (z, y, x).
        areas: (n,) mm2.
    """

    points: NDArray[np.float64]
    areas: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SurfaceScore:
    """Two surfaces compared.

    Attributes:
        dice: at each of `TOLERANCES_MM` the share of both surfaces' areas that lies no farther than this
            from the other one; 1 where both masks are empty, 0 where one is.
        hd95_mm: the distance within which 95 % of the area of either surface lies from the other one; 0
            where both masks are empty, infinite where one is.
    """

    dice: tuple[float, ...]
    hd95_mm: float


def compare_surfaces(
    truth: NDArray[Any], prediction: NDArray[Any], spacing: Triple, flat: Sequence[int] = ()
) -> SurfaceScore:
    """Compare two masks' surfaces; whatever is not 0 is inside.

    Where a mask reaches the scan's border its surface goes along it.

    Args:
        truth, prediction: (z, y, x) of one shape.
        spacing: mm along (z, y, x); the axes are taken as perpendicular.
        flat: axes along which the scan has one voxel, as a picture along z: a mask has no surface across
            them, only the contour around it.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"masks of {truth.shape} and {prediction.shape} are not on the same grid")
    a, b = (surface_of(mask, spacing, flat) for mask in (truth, prediction))
    if not len(a.areas) or not len(b.areas):
        same = len(a.areas) == len(b.areas)
        return SurfaceScore(dice=(float(same),) * len(TOLERANCES_MM), hd95_mm=0.0 if same else math.inf)
    apart = _distances(a.points, b.points), _distances(b.points, a.points)
    areas = a.areas, b.areas
    both = np.concatenate(apart), np.concatenate(areas)
    return SurfaceScore(
        dice=tuple(_share_within(*both, tolerance) for tolerance in TOLERANCES_MM),
        hd95_mm=max(_percentile(*side, 0.95) for side in zip(apart, areas, strict=True)),
    )


def surface_of(mask: NDArray[Any], spacing: Triple, flat: Sequence[int] = ()) -> Surface:
    """The surface elements of a mask (z, y, x); not 0 is inside. Time and memory go with its voxels.

    Args:
        flat: as of `compare_surfaces`.
    """
    for axis in flat:
        mask = np.repeat(mask, 2, axis)  # between the two there is the contour and nothing else
    inside = np.unravel_index(np.flatnonzero(mask != 0), mask.shape)
    # Cell (z, y, x) has the voxels from (z - 1, y - 1, x - 1) to (z, y, x), so there is one cell more than
    # voxels along each axis. A voxel is corner k of the cell that lies 1 - k from it along each axis, which
    # in the flat array of cells is steps[k] beyond the voxel's own place.
    shape = tuple(n + 1 for n in mask.shape)
    voxels = np.ravel_multi_index(inside, shape)
    steps = [int(np.ravel_multi_index(tuple(1 - corner), shape)) for corner in _CORNERS]
    codes = np.zeros(math.prod(shape), np.uint8)
    for bit, step in enumerate(steps):
        codes[voxels + step] |= 1 << bit
    cells, found = [], []
    for step in steps:
        code = codes[voxels + step]
        cut = (code != 0) & (code != 255)
        cells.append(voxels[cut] + step)
        found.append(code[cut])
        codes[voxels + step] = 0  # so that each cell is taken once
    index = np.stack(np.unravel_index(np.concatenate(cells), shape), axis=-1)
    there = (index[:, list(flat)] == 1).all(axis=1)
    points = np.asarray((index[there] - 0.5) * np.asarray(spacing), np.float64)
    return Surface(points=points, areas=areas_of_codes(spacing)[np.concatenate(found)[there]])


def areas_of_codes(spacing: Triple) -> NDArray[np.float64]:
    """(256,) area in mm2 of the surface within a cell of each code."""
    z, y, x = spacing
    per_axis = np.asarray([y * x, z * x, z * y])
    return np.asarray([np.linalg.norm(facets * per_axis, axis=1).sum() for facets in _facets()])


@functools.cache
def _facets() -> tuple[NDArray[np.float64], ...]:
    """Of each code the facets of the surface in a cell of 1 x 1 x 1: (n, 3) areas seen along each axis.

    The surface cuts the cell's edges in their middle and separates the corners that are in the minority,
    each group that edges connect by itself: marching cubes (Lorensen and Cline 1987) where no diagonal
    connects.
    """
    facets = []
    for code in range(256):
        inside = [corner for corner in range(8) if code >> corner & 1]
        few = inside if len(inside) <= 4 else [corner for corner in range(8) if corner not in inside]
        facets.append(
            np.concatenate([np.empty((0, 3)), *(_facets_around(group) for group in _groups(few))])
        )
    return tuple(facets)


def _groups(corners: Sequence[int]) -> list[list[int]]:
    """The corners, those connected by edges together."""
    left, groups = list(corners), []
    while left:
        group = [left.pop()]
        for corner in group:  # grows while it is walked
            near = [other for other in left if _NEXT[corner, other]]
            group += near
            left = [other for other in left if other not in near]
        groups.append(group)
    return groups


def _facets_around(group: Sequence[int]) -> NDArray[np.float64]:
    """The facets between connected corners, four at most, and all others."""
    from scipy.spatial import ConvexHull

    middle = [corner for corner in group if _NEXT[corner, group].sum() == 2]
    if len(group) == 4 and len(middle) == 2:
        # A chain along all three axes is cut by a hexagon that is not flat. As surface-distance folds it:
        # two triangles in one diagonal plane, one more on either side, at the middle edge's axis.
        axes = np.eye(3)
        along = int(np.flatnonzero(_CORNERS[middle[0]] != _CORNERS[middle[1]])[0])
        sides = [(axes[along] + axes[other]) / 4 for other in range(3) if other != along]
        return np.asarray([[0.5, 0.5, 0.5], *sides])
    cuts = [
        (_CORNERS[corner] + _CORNERS[other]) / 2
        for corner in group
        for other in range(8)
        if _NEXT[corner, other] and other not in group
    ]
    # Around all other groups the surface is what of their convex hull is not on the cell's own faces.
    points = np.concatenate([_CORNERS[group], cuts])
    triangles = points[ConvexHull(points).simplices]
    flat = (triangles == triangles[:, :1]).all(axis=1) & np.isin(triangles[:, 0], (0, 1))
    triangles = triangles[~flat.any(axis=1)]
    sides_of = triangles[:, 1:] - triangles[:, :1]
    return np.abs(np.cross(sides_of[:, 0], sides_of[:, 1])) / 2


def _distances(points: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) mm from each point to the nearest of the others.

    A tree, as its time goes with the surfaces; a distance map's goes with all the lung between lesions.
    """
    from scipy.spatial import KDTree

    found: NDArray[np.float64] = KDTree(others).query(points)[0]
    return found


def _share_within(apart: NDArray[np.float64], areas: NDArray[np.float64], tolerance: float) -> float:
    return float(areas[apart <= tolerance + _ROUNDING_MM].sum() / areas.sum())


def _percentile(apart: NDArray[np.float64], areas: NDArray[np.float64], share: float) -> float:
    """The smallest of the distances within which this share of the area lies."""
    order = np.lexsort((areas, apart))
    reached = np.cumsum(areas[order]) / areas.sum()
    at = int(np.searchsorted(reached, share - 1e-12))  # which rounding shall not decide
    return float(apart[order[at]])
