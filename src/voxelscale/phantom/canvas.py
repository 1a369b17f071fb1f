"""A volume in mm to paint on, with edges that share out a voxel between two tissues."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxelscale.geometry import Grid

Field = NDArray[np.float32]
Point = NDArray[np.float64]


class Canvas:
    """HU on a grid whose axes run along the patient's.

    Attributes:
        grid: where the voxels lie.
        z, y, x: positions in mm along each axis, shaped to broadcast against a volume.
        edge: mm over which an edge passes from one tissue to the other: a voxel's mean extent.
        hu: (z, y, x) float32; air at first.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        z, y, x = (
            (grid.origin[2 - axis] + grid.spacing[axis] * np.arange(n)).astype(np.float32)
            for axis, n in enumerate(grid.shape)
        )
        self.z, self.y, self.x = z[:, None, None], y[None, :, None], x[None, None, :]
        self.edge = float(np.prod(grid.spacing) ** (1 / 3))
        self.hu = np.full(grid.shape, -1000, np.float32)

    def share(self, depth: Field) -> Field:
        """The part of each voxel that is inside, from the signed distance to the surface (mm, + inside)."""
        share: Field = np.clip(0.5 + depth / np.float32(self.edge), 0, 1)
        return share

    def paint(self, share: Field, hu: ArrayLike) -> None:
        """Put a tissue where it is."""
        self.hu += share * (np.asarray(hu, np.float32) - self.hu)

    def box(self, low: Point, high: Point) -> tuple[slice, slice, slice]:
        """The voxels between two corners ``(x, y, z)`` in mm, and one more on each side."""
        first = np.floor(self.grid.mm_to_index(low)).astype(int) - 1
        last = np.ceil(self.grid.mm_to_index(high)).astype(int) + 2
        z, y, x = (
            slice(min(max(a, 0), n), max(min(b, n), 0))
            for a, b, n in zip(first, last, self.grid.shape, strict=True)
        )
        return z, y, x

    def offsets(self, box: tuple[slice, slice, slice], centre: Point) -> tuple[Field, Field, Field]:
        """x, y and z in mm from a point, for the voxels of a box, to broadcast."""
        z, y, x = box
        cx, cy, cz = (np.float32(c) for c in centre)
        return self.x[:, :, x] - cx, self.y[:, y] - cy, self.z[z] - cz

    def tubes(self, segments: Iterable[tuple[Point, Point, float, float]]) -> Field:
        """The part of each voxel inside tubes from a to b ``(x, y, z)`` with radii ra and rb, mm."""
        total = np.zeros(self.grid.shape, np.float32)
        for a, b, ra, rb in segments:
            reach = max(ra, rb) + self.edge
            box = self.box(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
            dx, dy, dz = self.offsets(box, a)
            ux, uy, uz = (np.float32(v) for v in b - a)
            length2 = float(ux * ux + uy * uy + uz * uz) or 1.0
            t = np.clip((dx * ux + dy * uy + dz * uz) / np.float32(length2), 0, 1)
            apart = np.sqrt((dx - t * ux) ** 2 + (dy - t * uy) ** 2 + (dz - t * uz) ** 2)
            depth = np.float32(ra) + t * np.float32(rb - ra) - apart
            np.maximum(total[box], self.share(depth), out=total[box])
        return total
