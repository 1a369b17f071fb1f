"""DICOM Segmentation objects (PS3.3 A.51), by each frame's own position."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Scan
from voxelscale.labels.dicom import read_dataset

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

APART = 0.05
"""Of a voxel, that a frame's pixels may lie beside the image's: headers keep decimals."""

LARGEST = 2**33
"""Pixels of an object at most."""


def read(path: Path, image: Scan, values: tuple[int, ...] | None) -> Scan:
    """The segments as one mask; a fractional one from one half on.

    Args:
        values: segment numbers; None: all.

    Raises:
        VoxelscaleError: it is damaged, does not lie on the image's voxels, or lacks such a segment.
    """
    data = read_dataset(path)
    try:
        frames = _frames(path, data)
        shared = _first(data, "SharedFunctionalGroupsSequence")
        groups = list(data.PerFrameFunctionalGroupsSequence)
        if len(groups) != len(frames):
            raise ValueError(f"{len(groups)} descriptions of {len(frames)} frames")
        mask = np.zeros(image.array.shape, np.uint8)
        seen = set()
        for frame, group in zip(frames, groups, strict=True):
            number = int(_group(group, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            seen.add(number)
            if values is None or number in values:
                _place(path, frame, _corners(frame.shape, group, shared), image, mask)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, NotImplementedError) as error:
        raise VoxelscaleError(f"{path}: a damaged segmentation ({error})", "export it again") from None
    if values is not None and not seen & set(values):
        held = ", ".join(map(str, sorted(seen)[:10])) or "none"
        raise VoxelscaleError(
            f"{path}: no segment {values} (it holds {held})", "choose other prepare.labels"
        )
    return Scan(mask, image.affine)


def _frames(path: Path, data: Dataset) -> NDArray[Any]:
    """(n, rows, columns), True where the segment is."""
    count, rows, columns = int(data.get("NumberOfFrames", 1)), int(data.Rows), int(data.Columns)
    if count * rows * columns > LARGEST:
        raise VoxelscaleError(f"{path}: {columns} x {rows} x {count} pixels", "is its header damaged?")
    pixels = np.asarray(data.pixel_array).reshape(count, rows, columns)
    if str(data.get("SegmentationType", "BINARY")) == "FRACTIONAL":
        return pixels >= 0.5 * int(data.MaximumFractionalValue)
    return pixels > 0


def _first(data: Dataset, name: str) -> Dataset | None:
    sequence = data.get(name)
    return sequence[0] if sequence else None


def _group(own: Dataset, shared: Dataset | None, name: str) -> Dataset:
    """A functional group: the frame's own, or that of all."""
    found = _first(own, name) or (_first(shared, name) if shared is not None else None)
    if found is None:
        raise ValueError(f"{name} is missing")
    return found


def _corners(shape: tuple[int, int], own: Dataset, shared: Dataset | None) -> NDArray[np.float64]:
    """LPS mm of pixel (0, 0), of the last of the first column, and of the last of the first row."""
    position = np.asarray(_group(own, shared, "PlanePositionSequence").ImagePositionPatient, float)
    turned = np.asarray(_group(own, shared, "PlaneOrientationSequence").ImageOrientationPatient, float)
    row_step, column_step = map(float, _group(own, shared, "PixelMeasuresSequence").PixelSpacing)
    down = turned[3:] * row_step * (shape[0] - 1)
    along = turned[:3] * column_step * (shape[1] - 1)
    corners = np.stack([position, position + down, position + along])
    if corners.shape != (3, 3) or not np.isfinite(corners).all():
        raise ValueError("a frame without a position")
    return corners


def _place(
    path: Path, frame: NDArray[np.bool_], corners: NDArray[np.float64], image: Scan, mask: NDArray[np.uint8]
) -> None:
    """Set the voxels under a frame's pixels."""
    if not frame.any():
        return
    start, down, along = image.grid.mm_to_index(corners)
    steps = [
        (end - start) / max(count - 1, 1) for end, count in zip((down, along), frame.shape, strict=True)
    ]
    whole = [np.rint(step).astype(int) for step in steps]
    reached = np.rint(start) + sum(w * (n - 1) for w, n in zip(whole, frame.shape, strict=True))
    truly = start + sum(s * (n - 1) for s, n in zip(steps, frame.shape, strict=True))
    unit = all(np.abs(w).sum() == 1 for w, n in zip(whole, frame.shape, strict=True) if n > 1)
    if not unit or max(np.abs(start - np.rint(start)).max(), np.abs(truly - reached).max()) > APART:
        hint = "export it on its scan's own slices, or check that the pair belongs together"
        raise VoxelscaleError(f"{path}: its frames do not lie on the scan's voxels", hint)
    rows, columns = np.nonzero(frame)
    index = np.rint(start).astype(int)[:, None] + whole[0][:, None] * rows + whole[1][:, None] * columns
    if (index < 0).any() or (index >= np.asarray(mask.shape)[:, None]).any():
        hint = "check that the pair belongs together"
        raise VoxelscaleError(f"{path}: a segment reaches beyond the scan", hint)
    mask[tuple(index)] = 1
