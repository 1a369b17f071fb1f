"""What labels were drawn on, and the way from there to the scan's voxels.

Labels speak of the pixels of the slices as they were acquired. Where the scan was resampled (gantry tilt,
uneven steps, missing slices), they are read on those slices and brought to its lattice by the same plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import IGNORED, Classes
from voxelscale.console import count, warn
from voxelscale.formats.dicom.voxels import onto_lattice
from voxelscale.geometry import Grid, Scan, Slices

Lattice = Grid | Slices
"""Both are indexed (slice, row, column), and know the way to mm and back."""

MOST_PARTS = 1000
"""Parts of a label that are followed one by one through the resampling."""


def lattice_of(image: Scan) -> Lattice:
    """The slices that a scan was made of, where they are known, else its voxels."""
    return image.slices or image.grid


def lattices_of(image: Scan) -> list[Lattice]:
    """What a label may have been drawn on: the slices, else the lattice that they were resampled to."""
    lattice = lattice_of(image)
    resampled = isinstance(lattice, Slices) and not lattice.regular
    return [lattice, image.grid] if resampled else [lattice]


def on_scan(path: Path, drawn: NDArray[np.uint8], lattice: Lattice, image: Scan) -> Scan:
    """A mask (above 0: the label) that was drawn on one of the `lattices_of` a scan, on its voxels."""
    if not isinstance(lattice, Slices):
        return Scan(drawn, image.affine)
    z, y, x = image.array.shape
    mask = onto_lattice(drawn, lattice, (z, y, x))
    lost = 0 if lattice.regular else _lost(drawn, lattice, mask)
    if lost:
        what = "is smaller than half a voxel of the resampled scan and is lost"
        warn(f"{path}: {count(lost, 'part')} of the label {what}")
    return Scan(mask, image.affine)


def labels_on_scan(
    path: Path, drawn: NDArray[Any], lattice: Lattice, image: Scan, classes: Classes
) -> NDArray[Any]:
    """`on_scan` of an array of stored labels, class by class, where it was drawn on slices."""
    if not isinstance(lattice, Slices):
        return drawn
    made = np.zeros(image.array.shape, drawn.dtype)
    present = {int(value) for value in np.unique(drawn)} - {0}
    parts = [(IGNORED, drawn == IGNORED)] if IGNORED in present else []
    for at in range(len(classes.names)):
        label = 1 << at if classes.regions else at + 1
        if any(value > 0 and (value & label if classes.regions else value == label) for value in present):
            parts.append((label, classes.where(drawn, at)))
    for label, where in parts:
        lay(made, on_scan(path, where.astype(np.uint8), lattice, image).array > 0, label, classes)
    return made


def lay(made: NDArray[Any], where: Any, label: int, classes: Classes) -> int:
    """Set a stored label at some voxels; in how many of them another class was or is.

    Of classes that overlap there the last in their order is kept, of regions all are; ignored is only what
    no class has.

    Args:
        made: stored labels, changed in place.
        where: index of the voxels.
    """
    old = made[where]
    if label == IGNORED:
        made[where] = np.where(old == 0, IGNORED, old)
        return 0
    if classes.regions:
        made[where] = np.maximum(old, 0) | label
        return 0
    made[where] = np.maximum(old, label)
    return int(np.count_nonzero((old > 0) & (old != label)))


def _lost(drawn: NDArray[np.uint8], slices: Slices, mask: NDArray[np.uint8]) -> int:
    """How many parts of a label have no voxel left near their place."""
    from scipy import ndimage

    parts, _ = ndimage.label(drawn, np.ones((3, 3, 3)))
    lost = 0
    for number, box in enumerate(ndimage.find_objects(parts)[:MOST_PARTS], start=1):
        index = np.argwhere(parts[box] == number) + [side.start for side in box]
        place = np.column_stack([slices.levels[index[:, 0]], index[:, 1:] + slices.shifts[index[:, 0]]])
        low, high = np.floor(place.min(axis=0)).astype(int), np.ceil(place.max(axis=0)).astype(int) + 1
        lost += not mask[tuple(slice(max(0, a), b) for a, b in zip(low, high, strict=True))].any()
    return lost


def warn_outside(path: Path, outside: int, what: str) -> None:
    """Say that a part of a label does not lie on the scan.

    Args:
        what: is counted, as "contour".
    """
    if outside:
        hint = "the scan is only a part of the one it was drawn on, or the pair does not belong together"
        warn(f"{path}: {count(outside, what)} outside the scan, left out: {hint}")
