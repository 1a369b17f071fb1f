"""How a channel of any kind of image is kept as int16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.channels import AIR_HU, Channel

MOST = 32767
"""Values are mapped to -32767 to 32767: 65,534 steps, which keeps 15 bits of their range, and nearly 16."""

LEAST_SCALE = 1e-30
"""Smaller steps than float32 divides by are no signal."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How a case's channel was kept: the stored value is (value - offset) / scale, rounded.

    Attributes:
        scale, offset: 1 and 0 of CT, and of whole numbers that fit int16.
        mean, std: of the voxels that are not exactly 0, or of all if there are none, in the file's unit.
        low, high: minimum and maximum of all voxels.
    """

    scale: float = 1.0
    offset: float = 0.0
    mean: float
    std: float
    low: float
    high: float

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Kept:
        """What `dataclasses.asdict` made.

        Raises:
            ValueError, TypeError, KeyError: it is nothing of the kind.
        """
        numbers = {field.name: float(tree[field.name]) for field in fields(cls)}
        kept = cls(**numbers)
        if not np.isfinite(list(numbers.values())).all() or kept.scale <= 0 or kept.std < 0:
            raise ValueError(f"no channel's values: {numbers}")
        return kept


def keep(values: NDArray[Any], channel: Channel) -> tuple[NDArray[np.int16], Kept]:
    """A channel as it is stored.

    CT is rounded to whole HU, at least `AIR_HU`. Of other channels whole numbers that fit int16 stay as
    they are; anything else is mapped from the case's range.

    Args:
        values: (z, y, x) of any number type, finite.
    """
    low, high = float(values.min()), float(values.max())
    scale, offset = 1.0, 0.0
    if channel.scheme != "ct" and not _is_whole(values, low, high):
        # Halves first: the range of float64's largest numbers would overflow.
        scale = max(high / (2 * MOST) - low / (2 * MOST), LEAST_SCALE)
        offset = high / 2 + low / 2
    stored = np.empty(values.shape, np.int16)
    for plane, given in zip(stored, values, strict=True):  # the whole would be copied several times
        if channel.scheme == "ct":
            # Padding outside the scanner's circle comes as -2048 or -3024: air, too.
            plane[:] = np.clip(np.rint(given), AIR_HU, MOST)
        elif (scale, offset) == (1.0, 0.0):
            plane[:] = given
        else:
            plane[:] = np.clip(np.rint((given.astype(np.float64) - offset) / scale), -MOST, MOST)
    if channel.scheme == "ct":
        low, high = float(stored.min()), float(stored.max())
    mean, std = _moments(stored if (scale, offset) == (1.0, 0.0) else values)
    return stored, Kept(scale=scale, offset=offset, mean=mean, std=std, low=low, high=high)


def fill_of(channel: Channel, kept: Kept | None) -> int:
    """The stored value beyond a scan's borders: air of CT, else the case's minimum.

    Args:
        kept: not needed of CT.

    Raises:
        ValueError: it is needed and not there.
    """
    if channel.scheme == "ct":
        return AIR_HU
    if kept is None:
        raise ValueError(f"no range of values for the channel {channel.name}")
    return round((kept.low - kept.offset) / kept.scale)


def _is_whole(values: NDArray[Any], low: float, high: float) -> bool:
    if not -MOST - 1 <= low <= high <= MOST:
        return False
    whole = np.issubdtype(values.dtype, np.integer) or values.dtype == np.bool_
    return whole or all(np.array_equal(plane, np.rint(plane)) for plane in values)


def _moments(values: NDArray[Any]) -> tuple[float, float]:
    """Mean and standard deviation over what is not exactly 0, or over all if there is nothing else."""
    count, total = 0, 0.0
    first = next((float(plane[plane != 0][0]) for plane in values if plane.any()), None)
    if first is None:
        return 0.0, 0.0
    for plane in values:
        there = plane[plane != 0].astype(np.float64) - first
        count, total = count + there.size, total + float(there.sum())
    mean, squares = total / count, 0.0
    for plane in values:
        there = plane[plane != 0].astype(np.float64) - first - mean
        squares += float(there @ there)
    return first + mean, float(np.sqrt(squares / count))
