"""From outlines to voxels."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def inside(outline: ArrayLike, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Which pixel centres of a plane lie inside a closed outline.

    The crossing test of E. Haines, "Point in polygon strategies", Graphics Gems IV (1994), which is
    Matplotlib's, and so pylidc's, in the same order of axes: points on the outline fall on one side of
    it by the same rule.

    Args:
        outline: (n, 2) in pixels, along the plane's first and second axis; closed by itself.
        shape: pixels along both.
    """
    points = np.asarray(outline, np.float64)
    mask = np.zeros(shape, np.bool_)
    if len(points) < 3:
        return mask
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    first = max(0, int(np.floor(points[:, 0].min())))
    last = min(shape[0], int(np.ceil(points[:, 0].max())) + 1)
    x = np.arange(first, last)
    low, high = max(0, int(np.floor(y0.min()))), min(shape[1], int(np.ceil(y0.max())) + 1)
    for y in range(low, high):
        up = y1 >= y
        crossing = np.flatnonzero((y0 >= y) != up)
        a, b, c, d = x0[crossing, None], y0[crossing, None], x1[crossing, None], y1[crossing, None]
        beyond = ((d - y) * (a - c) >= (c - x) * (b - d)) == up[crossing, None]
        mask[first:last, y] = beyond.sum(axis=0) % 2 == 1
    return mask
