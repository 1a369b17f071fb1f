"""How deep in the lung a voxel lies."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from voxelscale.data.lungs import coarse_factors, lung_field
from voxelscale.geometry import Grid, Scan, reorient


def lung_depth(image: Scan) -> Scan | None:
    """Distance, mm, of each voxel in the lungs from their nearest border; 0 outside. None: no lungs found.

    It lies on a copy of about `COARSE_MM`, as the lungs are found on such a one: exact to about that. Where
    the scan ends within the lungs there is no border, and fissures are none either.

    Args:
        image: HU; axes in any order.
    """
    from scipy import ndimage

    image = reorient(image)
    lungs = lung_field(image)
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
    # Of the nearest voxel outside only the near face is the border.
    depth = ndimage.distance_transform_edt(inside, sampling=coarse.spacing) - min(coarse.spacing) / 2
    return Scan(np.maximum(depth, 0).astype(np.float32), affine)


def nearest_border(voxels: NDArray[np.int64], grid: Grid, depth: Scan) -> float | None:
    """Distance, mm, of a finding's surface from the lungs' border; 0: it reaches it; None: it is outside.

    Args:
        voxels: (n, 3) of `grid`.
        depth: of `lung_depth`.
    """
    index = np.rint(depth.grid.mm_to_index(grid.index_to_mm(voxels))).astype(np.int64)
    index = np.clip(index, 0, np.asarray(depth.array.shape) - 1)
    there = depth.array[tuple(index.T)]
    return float(there.min()) if there.any() else None
