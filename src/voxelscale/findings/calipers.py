"""Diameters in the axial slice, as a reader sets the calipers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxelscale.geometry import Grid, Triple

Ends = tuple[Triple, Triple]
"""Both end points of a diameter, (x, y, z) in LPS mm."""

Points = NDArray[np.float64]
"""(n, 3) positions in LPS mm."""

TIE_MM = 1e-6
"""Diameters that differ by less are equally long, and the end points decide."""


@dataclass(frozen=True, kw_only=True)
class Diameters:
    """The longest diameter in any axial slice, and the longest across it in that slice.

    Attributes:
        long_mm, short_mm: from voxel centre to voxel centre, plus a pixel.
        long_ends, short_ends: as far apart, half a pixel beyond the outermost centres.
        slice_index: of the slice, from 0 along `axial_axis`.
    """

    long_mm: float
    long_ends: Ends
    short_mm: float
    short_ends: Ends
    slice_index: int


def axial_axis(grid: Grid) -> int:
    """The array axis that runs most nearly from foot to head; its slices are the axial ones."""
    return int(np.argmax(np.abs(grid.affine[2, :3]) / np.asarray(grid.spacing)))


def axial_diameters(voxels: NDArray[np.int64], grid: Grid) -> Diameters:
    """Measure a finding of voxels (n, 3); the same whatever the order and direction of the array's axes."""
    axis = axial_axis(grid)
    rows, columns = (a for a in range(3) if a != axis)
    pixel = (grid.spacing[rows] + grid.spacing[columns]) / 2
    voxels = voxels[np.argsort(voxels[:, axis], kind="stable")]
    slices = np.split(voxels, np.flatnonzero(np.diff(voxels[:, axis])) + 1)
    best, first, second = _longest(slices, grid, (rows, columns))
    chosen = next(s for s in slices if s[0, axis] == best)
    along = _direction(first, second, grid, (rows, columns))
    normal = np.cross(grid.affine[:3, rows], grid.affine[:3, columns])
    across = np.cross(normal / np.linalg.norm(normal), along)
    middle = (first + second) / 2
    length = float(np.linalg.norm(second - first)) + pixel
    low, high = _chord(grid.index_to_mm(chosen) - middle, along, across, pixel)
    return Diameters(
        long_mm=length,
        long_ends=_ends(middle - along * length / 2, middle + along * length / 2),
        short_mm=float(np.linalg.norm(high - low)),
        short_ends=_ends(middle + low, middle + high),
        slice_index=int(best),
    )


def _longest(
    slices: list[NDArray[np.int64]], grid: Grid, plane: tuple[int, int]
) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """The slice's number and the two voxel centres, of all slices, that are farthest apart.

    No two voxels of a slice are farther apart than its bounding box's diagonal. So slices are searched in
    the order of their diagonals, until the next diagonal is shorter than the longest distance found.
    """
    from scipy.spatial.distance import cdist

    (axis,) = {0, 1, 2} - set(plane)
    spacing = np.asarray(grid.spacing)
    diagonals = [float(np.linalg.norm(np.ptp(s, axis=0) * spacing)) for s in slices]
    greatest = -np.inf
    tied: list[tuple[int, NDArray[np.float64], NDArray[np.float64]]] = []
    for number in np.argsort([-diagonal for diagonal in diagonals], kind="stable"):
        if diagonals[number] < greatest - TIE_MM:
            break
        points = grid.index_to_mm(_row_ends(slices[number], plane))
        apart = cdist(points, points)
        if apart.max() < greatest - TIE_MM:
            continue
        if apart.max() > greatest + TIE_MM:
            tied = []
        greatest = max(greatest, float(apart.max()))
        for i, j in np.argwhere(np.triu(apart >= apart.max() - TIE_MM)):
            a, b = sorted((points[i], points[j]), key=_place)
            tied.append((int(slices[number][0, axis]), a, b))
    # Among equals the place in the patient decides, not the order of the array.
    return min(tied, key=lambda pair: (_place(pair[1]), _place(pair[2])))


def _place(point: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(np.round(point, 4).tolist())


def _row_ends(points: NDArray[np.int64], plane: tuple[int, int]) -> NDArray[np.int64]:
    """The voxels of a slice that can be ends of its maximum distance: each row's first and last."""
    rows, columns = plane
    points = points[np.lexsort((points[:, columns], points[:, rows]))]
    new_row = np.flatnonzero(np.diff(points[:, rows])) + 1
    ends = np.concatenate([[0], new_row, new_row - 1, [len(points) - 1]])
    extreme: NDArray[np.int64] = points[np.unique(ends)]
    return extreme


def _direction(
    first: NDArray[np.float64], second: NDArray[np.float64], grid: Grid, plane: tuple[int, int]
) -> NDArray[np.float64]:
    """From the first to the second; along the pixels' row that is nearest to x where they are one."""
    step = second - first
    if not np.linalg.norm(step) > TIE_MM:
        columns = [grid.affine[:3, a] / grid.spacing[a] for a in plane]
        step = max(columns, key=lambda column: abs(column[0]))
        step = step if step[0] >= 0 else -step
    along: NDArray[np.float64] = step / np.linalg.norm(step)
    return along


def _chord(
    points: Points, along: NDArray[np.float64], across: NDArray[np.float64], pixel: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends of the longest chord across a diameter, relative to its middle.

    A chord joins two pixels that lie within a strip across the diameter, a pixel wide.

    Args:
        points: pixel centres relative to the middle.
        along, across: unit vectors.
    """
    # Rounded, so that what is equal is so however the array runs.
    t, s = np.round(points @ along, 6), np.round(points @ across, 6)
    found = []
    for shift in (0.0, 0.5):
        # The nudge keeps what lies just on a strip's edge on one side of it.
        strip = np.floor(t / pixel + shift + 1e-5)
        for number in np.unique(strip):
            inside = np.flatnonzero(strip == number)
            inside = inside[np.lexsort((t[inside], np.abs(t[inside])))]
            low, high = inside[np.argmin(s[inside])], inside[np.argmax(s[inside])]
            place = (t[low] + t[high]) / 2
            found.append((float(s[high] - s[low]), float(place), float(s[low]), float(s[high])))
    greatest = max(extent for extent, *_ in found)
    _, place, low_s, high_s = min(
        (f for f in found if f[0] >= greatest - TIE_MM), key=lambda f: (round(abs(f[1]), 4), f[1])
    )
    base = place * along
    return base + (low_s - pixel / 2) * across, base + (high_s + pixel / 2) * across


def _ends(a: NDArray[np.float64], b: NDArray[np.float64]) -> Ends:
    first, second = sorted((a, b), key=_place)
    return _triple(first), _triple(second)


def _triple(point: NDArray[np.float64]) -> Triple:
    x, y, z = (float(v) for v in point)
    return x, y, z
