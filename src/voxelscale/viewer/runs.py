"""Masks as runs: (n, 3) int32 of start, length and value, of voxels in the order of the array.

A mask of a whole scan is 100 MB and more, its runs some 100 kB: they are what browser and server exchange.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.findings.regions import box_of

Runs = NDArray[np.int32]


def runs_of(mask: NDArray[Any]) -> Runs:
    """The runs of voxels that are not 0, in the order of the array (z, y, x)."""
    box = box_of(mask != 0)
    part = mask[box]
    if not part.size:
        return np.zeros((0, 3), np.int32)
    rows = part.reshape(-1, part.shape[-1])
    padded = np.zeros((len(rows), rows.shape[1] + 2), np.int32)
    padded[:, 1:-1] = rows
    row, at = np.nonzero(np.diff(padded, axis=1))
    values = padded[row, at + 1]
    first = np.flatnonzero(values)  # a change to 0 only ends a run, and every run is ended by a change
    z, y = np.divmod(row[first], part.shape[1])
    places = (z + box[0].start, y + box[1].start, at[first] + box[2].start)
    start = np.ravel_multi_index(places, mask.shape)
    return np.stack([start, at[first + 1] - at[first], values[first]], axis=1).astype(np.int32)


def filled(runs: NDArray[Any], size: int) -> NDArray[np.int32]:
    """The voxels (size,) of runs.

    Raises:
        ValueError: they are no runs, lie beyond the end or overlap.
    """
    runs = np.asarray(runs, np.int64).reshape(-1, 3)
    start, length, value = runs.T
    ends = start + length
    if len(runs) and (
        start.min() < 0 or length.min() < 1 or ends.max() > size or (start[1:] < ends[:-1]).any()
    ):
        raise ValueError("no runs of this mask")
    out = np.zeros(size, np.int32)
    out[np.repeat(start - np.cumsum(length) + length, length) + np.arange(int(length.sum()))] = np.repeat(
        value, length
    )
    return out
