"""How deep in the lung a voxel lies."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from voxelscale.geometry import Grid, Scan, reorient
from voxelscale.lungs import Lungs, coarse_factors, lung_field


def lung_depth(image: Scan, lungs: Lungs | None = None) -> Scan | None:
    """Signed distance, mm, of each voxel from the lungs' border: above 0 inside, below 0 outside.

    It lies on a copy of about `COARSE_MM`, as the lungs are found on such a one: exact to about that. Where
    the scan ends within the lungs there is no border, and fissures are none either.

    Args:
        image: HU; axes in any order.
        lungs: what `lung_field` found in the image turned to LPS; None: it is computed here.

    Returns:
        None where no lungs were found, or nothing else.
    """
    from scipy import ndimage

    image = reorient(image)
    lungs = lungs or lung_field(image)
    if not lungs.ok:
        return None
    steps = coarse_factors(image)
    inside = lungs.mask[:: steps[0], :: steps[1], :: steps[2]]
    affine = image.affine.copy()
    affine[:3, 3] = image.grid.index_to_mm([(step - 1) / 2 for step in steps])
    affine[:3, :3] *= steps
    coarse = Scan(inside, affine)
    if inside.all():
        return None
    # Of the nearest voxel on the other side only the near face is the border.
    half = min(coarse.spacing) / 2
    depth = ndimage.distance_transform_edt(inside, sampling=coarse.spacing) - half
    away = ndimage.distance_transform_edt(~inside, sampling=coarse.spacing) - half
    return Scan(np.where(inside, np.maximum(depth, 0), -np.maximum(away, 0)).astype(np.float32), affine)


def nearest_border(voxels: NDArray[np.int64], grid: Grid, depth: Scan) -> float | None:
    """Distance, mm, of a finding's surface from the lungs' border; 0: it reaches it; None: it is outside.

    Args:
        voxels: (n, 3) of `grid`.
        depth: of `lung_depth`.
    """
    there = _depths(voxels, grid, depth)
    return max(0.0, float(there.min())) if (there > 0).any() else None


def outside_mm(voxels: NDArray[np.int64], grid: Grid, depth: Scan) -> float:
    """Distance, mm, of a finding's nearest voxel from the lungs; 0: some of it is inside."""
    return max(0.0, -float(_depths(voxels, grid, depth).max()))


def _depths(voxels: NDArray[np.int64], grid: Grid, depth: Scan) -> NDArray[np.float32]:
    index = np.rint(depth.grid.mm_to_index(grid.index_to_mm(voxels))).astype(np.int64)
    index = np.clip(index, 0, np.asarray(depth.array.shape) - 1)
    return np.asarray(depth.array[tuple(index.T)])
