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
    """The runs of voxels that are not 0, in the order of the array (z, y, x); none leaves its row."""
    bytes_of = np.ascontiguousarray(mask).reshape(len(mask), -1).view(np.uint8)
    planes = np.flatnonzero(bytes_of.max(axis=1, initial=0))
    if not len(planes):
        return np.zeros((0, 3), np.int32)
    first, last = int(planes[0]), int(planes[-1]) + 1
    _, high, wide = box_of(mask[first:last] != 0)
    box = (slice(first, last), high, wide)
    part = mask[box]
    rows = part.reshape(-1, part.shape[-1])
    padded = np.zeros((len(rows), rows.shape[1] + 2), np.int32)
    padded[:, 1:-1] = rows
    row, at = np.nonzero(np.diff(padded, axis=1))
    values = padded[row, at + 1]
    begin = np.flatnonzero(values)  # a change to 0 only ends a run, and every run is ended by a change
    z, y = np.divmod(row[begin], part.shape[1])
    places = (z + first, y + high.start, at[begin] + wide.start)
    start = np.ravel_multi_index(places, mask.shape)
    return np.stack([start, at[begin + 1] - at[begin], values[begin]], axis=1).astype(np.int32)


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
