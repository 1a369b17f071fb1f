"""Where voxels lie in the patient.

One convention, everywhere: arrays are indexed ``(z, y, x)``; positions are millimetres in DICOM's
patient frame, LPS (x to the patient's left, y to the posterior, z to the head), in the order
``(x, y, z)``; an affine is the 4 x 4 matrix that takes a homogeneous voxel index ``(z, y, x, 1)`` to
a homogeneous position ``(x, y, z, 1)``. Voxel indices name voxel centres (DICOM PS3.3 C.7.6.2.1.1,
and ITK).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import SimpleITK as sitk

Triple = tuple[float, float, float]
IntTriple = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Grid:
    """A lattice of voxels in the patient, without values.

    Attributes:
        shape: number of voxels along ``(z, y, x)``.
        affine: (4, 4) float64, voxel index ``(z, y, x, 1)`` to LPS mm ``(x, y, z, 1)``.
    """

    shape: IntTriple
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError(f"an affine is a finite 4 x 4 matrix, not {self.affine!r}")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise ValueError("the affine is singular: two voxel axes are parallel or a spacing is 0")
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    @property
    def spacing(self) -> Triple:
        """Distance between voxel centres along ``(z, y, x)``, in mm."""
        z, y, x = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return float(z), float(y), float(x)

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel, in mm3."""
        return abs(float(np.linalg.det(self.affine[:3, :3])))

    @property
    def origin(self) -> Triple:
        """Centre of voxel ``(0, 0, 0)``, ``(x, y, z)`` in LPS mm."""
        x, y, z = self.affine[:3, 3]
        return float(x), float(y), float(z)

    @property
    def direction(self) -> NDArray[np.float64]:
        """(3, 3) unit columns: where the x, y and z index axes point, as ITK's direction matrix."""
        columns: NDArray[np.float64] = (self.affine[:3, :3] / np.asarray(self.spacing))[:, ::-1]
        return columns

    def index_to_mm(self, index: ArrayLike) -> NDArray[np.float64]:
        """Positions (..., 3) as LPS mm ``(x, y, z)`` of voxel indices (..., 3) ``(z, y, x)``."""
        points: NDArray[np.float64] = (
            np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]
        )
        return points

    def mm_to_index(self, points: ArrayLike) -> NDArray[np.float64]:
        """Fractional voxel indices (..., 3) ``(z, y, x)`` of LPS mm positions (..., 3) ``(x, y, z)``."""
        offset = np.asarray(points, dtype=np.float64) - self.affine[:3, 3]
        index = np.linalg.solve(self.affine[:3, :3], offset[..., None])[..., 0]
        return np.asarray(index, dtype=np.float64)

    def same_as(self, other: Grid, tolerance: float = 1e-3) -> bool:
        """Whether both have one shape and all corners within `tolerance` mm of each other."""
        if self.shape != other.shape:
            return False
        corners = np.indices((2, 2, 2)).reshape(3, -1).T * (np.asarray(self.shape) - 1)
        apart = np.abs(self.index_to_mm(corners) - other.index_to_mm(corners)).max()
        return bool(apart <= tolerance)

    def with_spacing(self, spacing: Sequence[float]) -> Grid:
        """The grid that covers the same box with voxels of `spacing` ``(z, y, x)`` mm.

        Voxel edges, not centres, stay where they are, so that the volume covered is the same up to
        half a voxel at the far end.
        """
        old, new = np.asarray(self.spacing), np.asarray(spacing, dtype=np.float64)
        shape = np.maximum(1, np.round(np.asarray(self.shape) * old / new)).astype(int)
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, :3] / old * new
        first_centre = (new / old - 1) / 2
        affine[:3, 3] = self.index_to_mm(first_centre)
        return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)

    def window(self, start: Sequence[int], shape: Sequence[int]) -> Grid:
        """The sub-lattice of `shape` whose voxel (0, 0, 0) is this grid's voxel `start` (may be < 0)."""
        affine = self.affine.copy()
        affine[:3, 3] = self.index_to_mm(start)
        return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


@dataclass(frozen=True, kw_only=True, eq=False)
class Slices:
    """The slices that a scan was made of, as they were acquired: perhaps tilted or unevenly spaced.

    Labels are drawn on these. Indexed like a lattice, ``(slice, row, column)``; between two slices, and
    beyond the outermost ones, everything runs in a straight line.

    Attributes:
        shape: number of slices, rows and columns.
        positions: (n, 3) LPS mm of the centre of each slice's first pixel, ascending along the normal.
        down, right: (3,) LPS mm from one row to the next, and from one column to the next.
        levels: (n,) where on the z axis of the scan's lattice each slice lies, in voxels, ascending.
        shifts: (n, 2) where on the lattice's y and x axes each slice's first pixel lies, in voxels.
        uids: each slice's SOPInstanceUID and number of its frame, from 1; ("", 0): the slice is missing,
            and the scan's values there are interpolated.
        frame_of_reference: the UID of the system of coordinates of the positions; "": unknown.
    """

    shape: IntTriple
    positions: NDArray[np.float64]
    down: NDArray[np.float64]
    right: NDArray[np.float64]
    levels: NDArray[np.float64]
    shifts: NDArray[np.float64]
    uids: tuple[tuple[str, int], ...]
    frame_of_reference: str = ""

    @property
    def heights(self) -> NDArray[np.float64]:
        """(n,) mm of the slices along their normal."""
        normal = np.cross(self.right, self.down)
        heights: NDArray[np.float64] = self.positions @ (normal / np.linalg.norm(normal))
        return heights

    @property
    def spacing(self) -> Triple:
        """Usual distance of the slices, distance of rows, and of columns, in mm."""
        step = np.median(np.diff(self.heights))
        return float(step), float(np.linalg.norm(self.down)), float(np.linalg.norm(self.right))

    @property
    def regular(self) -> bool:
        """Whether the slices are the lattice's own planes."""
        return bool(not self.shifts.any() and np.array_equal(self.levels, np.arange(self.shape[0])))

    def index_to_mm(self, index: ArrayLike) -> NDArray[np.float64]:
        """Positions (..., 3) as LPS mm ``(x, y, z)`` of indices (..., 3) ``(slice, row, column)``."""
        index = np.asarray(index, dtype=np.float64)
        points: NDArray[np.float64] = self._first(index[..., 0])
        return points + index[..., 1:2] * self.down + index[..., 2:3] * self.right

    def mm_to_index(self, points: ArrayLike) -> NDArray[np.float64]:
        """Fractional indices (..., 3) ``(slice, row, column)`` of LPS mm positions (..., 3)."""
        points, heights = np.asarray(points, dtype=np.float64), self.heights
        normal = np.cross(self.right, self.down)
        height = points @ (normal / np.linalg.norm(normal))
        below = np.clip(np.searchsorted(heights, height) - 1, 0, len(heights) - 2)
        number = below + (height - heights[below]) / (heights[below + 1] - heights[below])
        beside = points - self._first(number)
        row, column = (beside @ step / (step @ step) for step in (self.down, self.right))
        return np.stack([number, row, column], axis=-1)

    def _first(self, number: NDArray[np.float64]) -> NDArray[np.float64]:
        """LPS mm (..., 3) of the first pixel of a slice, also between two or beyond."""
        below = np.clip(np.floor(number).astype(int), 0, len(self.positions) - 2)
        step = self.positions[below + 1] - self.positions[below]
        first: NDArray[np.float64] = self.positions[below] + (number - below)[..., None] * step
        return first


@dataclass(frozen=True, eq=False)
class Scan:
    """Voxel values and where they lie.

    Attributes:
        array: ``(z, y, x)``; HU for CT, class numbers for a mask.
        affine: (4, 4) float64, voxel index ``(z, y, x, 1)`` to LPS mm ``(x, y, z, 1)``.
        slices: what it was made of, as read from DICOM; None once it is turned or resampled.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    slices: Slices | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.array.ndim != 3:
            raise ValueError(f"a scan has three axes (z, y, x), not {self.array.ndim}")
        object.__setattr__(self, "affine", self.grid.affine)

    @property
    def grid(self) -> Grid:
        """The lattice without the values."""
        z, y, x = self.array.shape
        return Grid((z, y, x), self.affine)

    @property
    def spacing(self) -> Triple:
        """Distance between voxel centres along ``(z, y, x)``, in mm."""
        return self.grid.spacing


def sphere_diameter(volume: float) -> float:
    """Diameter, mm, of the sphere of a volume in mm3."""
    return float((6 * volume / np.pi) ** (1 / 3))


def equivalent_diameter(volume: float, shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Diameter, mm, of the sphere of a lesion's volume; in a scan of one slice, such as a picture, of the
    circle of its area.

    Args:
        volume: mm3.
        shape, spacing: the scan's voxels, and mm, (z, y, x).
    """
    flat = [step for n, step in zip(shape, spacing, strict=True) if n == 1]
    if len(flat) == 1:
        return 2 * float((volume / flat[0] / np.pi) ** 0.5)
    return sphere_diameter(volume)


def affine_from_itk(
    origin: Sequence[float], spacing: Sequence[float], direction: ArrayLike
) -> NDArray[np.float64]:
    """The affine of ITK's origin ``(x, y, z)``, spacing ``(x, y, z)`` and 3 x 3 direction."""
    columns = np.asarray(direction, dtype=np.float64).reshape(3, 3) * np.asarray(spacing)
    affine = np.eye(4)
    affine[:3, :3] = columns[:, ::-1]
    affine[:3, 3] = origin
    return affine


def to_itk(scan: Scan) -> sitk.Image:
    """The scan as a SimpleITK image (a copy)."""
    import SimpleITK as sitk

    array = scan.array.astype(np.uint8) if scan.array.dtype == np.bool_ else scan.array
    image = sitk.GetImageFromArray(array)
    grid = scan.grid
    image.SetSpacing(grid.spacing[::-1])
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction.ravel().tolist())
    return image


SAME_MM = 1e-3
"""Lattices whose corners lie this near each other are one: interpolating between them would only cost."""


def resample(
    scan: Scan,
    grid: Grid,
    interpolation: Literal["linear", "nearest"] = "linear",
    fill: float = 0,
    as_float: bool = False,
) -> Scan:
    """The scan's values at the voxels of `grid`, by SimpleITK; `fill` where the scan has none.

    The result has the scan's dtype, or is float32 with `as_float`. Positions up to half a voxel outside
    the outermost voxel centres, but inside the volume the voxels cover, take the nearest voxel's value: a
    resampled scan has no false rim.
    """
    import SimpleITK as sitk

    dtype = np.dtype(np.float32) if as_float else scan.array.dtype
    if scan.grid.same_as(grid, SAME_MM):
        return Scan(scan.array.astype(dtype), grid.affine)
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(grid.shape[::-1])
    resampler.SetOutputSpacing(grid.spacing[::-1])
    resampler.SetOutputOrigin(grid.origin)
    resampler.SetOutputDirection(grid.direction.ravel().tolist())
    resampler.SetInterpolator(sitk.sitkLinear if interpolation == "linear" else sitk.sitkNearestNeighbor)
    resampler.SetDefaultPixelValue(float(fill))
    if as_float:
        resampler.SetOutputPixelType(sitk.sitkFloat32)
    array = sitk.GetArrayFromImage(resampler.Execute(to_itk(scan)))
    return Scan(array.astype(dtype, copy=False), grid.affine)


def reorient(scan: Scan) -> Scan:
    """The same voxels, with axes permuted and flipped so that each runs as nearly as can be in LPS.

    Nothing is interpolated: an oblique scan stays oblique, every value stays at its position.
    """
    order, flipped, grid = as_lps(scan.grid)
    return Scan(np.ascontiguousarray(np.flip(scan.array.transpose(order), tuple(flipped))), grid.affine)


SAME_COSINE = 1e-3
"""Direction cosines this near each other are equal: decimal text and float32 round them by less."""


def as_lps(grid: Grid) -> tuple[list[int], list[int], Grid]:
    """How `reorient` turns a lattice: the order of its axes, which are then flipped, and the lattice.

    The largest cosines decide which array axis becomes which patient axis. Equal ones (an axis at 45
    degrees) are decided by the signs of the others. Only directions in the patient count, never the order
    of the axes in the array: a scan and its mask end in one order, however each of them was written.
    """
    columns = grid.direction[:, ::-1]  # rows x, y, z; columns: array axes
    turns = []
    for axes in permutations(range(3)):  # the array axes that become x, y, z
        signs = [_sign(columns[:, axis], world) for world, axis in enumerate(axes)]
        turned = columns[:, axes] * signs
        keys = [*sorted(turned.diagonal(), reverse=True), *turned.ravel()]
        turns.append((axes, signs, keys))
    for key in range(len(turns[0][2])):
        best = max(keys[key] for _, _, keys in turns)
        turns = [turn for turn in turns if turn[2][key] >= best - SAME_COSINE]
    axes, signs, _ = turns[0]
    order = list(axes[::-1])
    affine = grid.affine[:, [*order, 3]].copy()
    z, y, x = (grid.shape[axis] for axis in order)
    flipped = [axis for axis, world in enumerate((2, 1, 0)) if signs[world] < 0]
    for axis in flipped:
        affine[:3, 3] += affine[:3, axis] * ((z, y, x)[axis] - 1)
        affine[:3, axis] *= -1
    return order, flipped, Grid((z, y, x), affine)


def _sign(direction: NDArray[np.float64], world: int) -> int:
    """1 or -1: which way round a unit vector runs along a patient axis, or, at right angles, another."""
    along = next(direction[w] for w in (world, 0, 1, 2) if abs(direction[w]) > SAME_COSINE)
    return 1 if along > 0 else -1


def crop_or_pad(scan: Scan, start: Sequence[int], shape: Sequence[int], fill: float = 0) -> Scan:
    """The window of `shape` that begins at voxel `start` ``(z, y, x)``; `fill` beyond the scan."""
    window = scan.grid.window(start, shape)
    array = np.full(window.shape, fill, dtype=scan.array.dtype)
    low = np.maximum(start, 0)
    high = np.minimum(np.asarray(start) + np.asarray(window.shape), scan.array.shape)
    if (high > low).all():
        inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        target = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, np.asarray(start), strict=True))
        array[target] = scan.array[inside]
    return Scan(array, window.affine)
