"""Label values as stored labels, and several labels of one scan as one (`voxelscale.classes`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import IGNORED, Classes, UnknownValues
from voxelscale.console import count, first_and_more, first_of, warn
from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Scan

MOST_SHOWN = 10
"""Values that a message names at most."""


def kind_of_stored(classes: Classes) -> type[np.uint8] | type[np.int16]:
    """The type of an array of stored labels."""
    return np.uint8 if classes.plain else np.int16


def stored_in(path: Path, mask: Scan, values: tuple[int, ...] | None, classes: Classes) -> Scan:
    """The stored labels of a mask.

    Args:
        path: of the mask, for messages.
        values: of the lesion, every other one being background; None: as the classes say.

    Raises:
        VoxelscaleError: it holds a value that no class has.
    """
    if values is not None:
        return Scan(np.isin(mask.array, values).astype(np.uint8), mask.affine)
    try:
        return Scan(classes.stored(mask.array), mask.affine)
    except UnknownValues as error:
        shown = first_and_more([str(value) for value in error.values], MOST_SHOWN)
        what = f"holds the value{'s' * (len(error.values) > 1)} {shown}, which no class has"
        raise VoxelscaleError(f"{path}: {what}", _to_name(classes, error.values)) from None


def touching_values(
    mask: NDArray[Any], values: tuple[int, ...] | None, classes: Classes
) -> tuple[int, ...]:
    """Values that touch each other though all above 0 are the one class: an organ and its tumour, say.

    Lesions that are merely numbered hardly ever touch.

    Args:
        mask: (z, y, x), whole numbers.
        values: of the lesion, where they are chosen.
    """
    if values is not None or classes.values != ((),):
        return ()
    for axis in range(3):  # where nothing is needs no look
        there = np.flatnonzero((mask > 0).any(axis=tuple({0, 1, 2} - {axis})))
        if not len(there):
            return ()
        mask = mask.take(range(there[0], there[-1] + 1), axis)
    mask = np.where(np.isin(mask, [*classes.ignore, *classes.background]), 0, mask)
    found: set[int] = set()
    for axis in range(3):
        ahead = np.moveaxis(mask, axis, 0)
        one, other = ahead[:-1], ahead[1:]
        differ = (one > 0) & (other > 0) & (one != other)
        found |= {int(v) for v in np.unique(np.concatenate([one[differ], other[differ]]))}
    return tuple(sorted(found))


def _to_name(classes: Classes, values: Sequence[int]) -> str:
    """How to say what values are."""
    named = first_of(
        [
            f"{name}: [{', '.join(map(str, group))}]"
            for name, group in zip(classes.names, classes.values, strict=False)
        ],
        3,
    )
    rest = f"[{', '.join(map(str, values[:MOST_SHOWN]))}]"
    return f"name it in dataset.json, or say so: reading.labels={{{named}, background: {rest}}}"


def labels_by_number(names: Mapping[int, Sequence[str]], classes: Classes) -> dict[int, int]:
    """The stored label of each segment or region of interest that is of a class, or ignored, by its number.

    Args:
        names: what each is called, by its number; capitals do not count.
    """
    labels: dict[int, int] = {}
    for number, called in names.items():
        keys = {number, *(name.strip().casefold() for name in called if name.strip())}
        of = [
            at
            for at, group in enumerate(classes.values)
            if not group or keys & {v.casefold() if isinstance(v, str) else v for v in group}
        ]
        if of:
            labels[number] = sum(1 << at for at in of) if classes.regions else of[-1] + 1
        elif number in classes.ignore:
            labels[number] = IGNORED
    return labels


def union(masks: Sequence[NDArray[Any]], classes: Classes) -> tuple[NDArray[Any], int]:
    """Several arrays of stored labels as one, and in how many voxels a later one replaced another class.

    Regions may overlap: there a voxel belongs to all that any array says. The first array is changed.
    """
    made, replaced = masks[0], 0
    for mask in masks[1:]:
        differ = (made != 0) & (mask != 0) & (made != mask)
        if classes.regions:
            both = differ & (made != IGNORED) & (mask != IGNORED)
            made[both] |= mask[both]
            differ &= ~both
        replaced += int(np.count_nonzero(differ))
        new = (mask != 0) & (differ | (made == 0))
        made[new] = mask[new]
    return made, replaced


def warn_of_replaced(what: object, replaced: int) -> None:
    """Say in how many voxels classes overlap.

    Args:
        what: the file or the files.
    """
    if replaced:
        warn(f"{what}: classes overlap in {count(replaced, 'voxel')}: the later class is taken there")
