"""DICOM Segmentation objects (PS3.3 A.51), by each frame's own position."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.formats.dicom.header import FARTHEST_MM
from voxelscale.geometry import Scan
from voxelscale.labels.dicom import check_series, read_dataset

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

APART = 0.05
"""Of a voxel, that a frame's pixels may lie beside the image's: headers keep decimals."""

LARGEST = 2**33
"""Pixels of an object at most."""


def read(path: Path, image: Scan, values: tuple[int, ...] | None, series: str = "") -> Scan:
    """The segments as one mask; a fractional one from one half on.

    Args:
        values: segment numbers; None: all.
        series: the image's SeriesInstanceUID, where it is known.

    Raises:
        VoxelscaleError: it is damaged, of another series, does not lie on the image's voxels, or lacks
            such a segment.
    """
    data = read_dataset(path)
    check_series(path, data, series)
    try:
        described = _segments(data)
        count, frames = _frames(path, data)
        shared = _first(data, "SharedFunctionalGroupsSequence")
        groups = list(data.PerFrameFunctionalGroupsSequence)
        if len(groups) != count:
            raise ValueError(f"{len(groups)} descriptions of {count} frames")
        mask = np.zeros(image.array.shape, np.uint8)
        seen = set()
        for frame, group in zip(frames, groups, strict=True):
            number = int(_group(group, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            if number not in described:
                raise ValueError(f"a frame of segment {number}, which it does not describe")
            seen.add(number)
            if values is None or number in values:
                _place(path, frame, _corners(frame.shape, group, shared), image, mask)
    except VoxelscaleError:
        raise
    except Exception as error:  # elements are decoded when they are asked for, garbled ones in any error
        reason = str(error).partition("\n")[0][:120]  # decoders tell the fault of each of them
        raise VoxelscaleError(f"{path}: a damaged segmentation ({reason})", "export it again") from None
    if values is not None and not seen & set(values):
        held = ", ".join(map(str, sorted(seen)[:10])) or "none"
        raise VoxelscaleError(
            f"{path}: no segment {values} (it holds {held})", "choose other prepare.labels"
        )
    return Scan(mask, image.affine)


def _segments(data: Dataset) -> set[int]:
    """The numbers of the segments that it describes."""
    numbers = [int(segment.SegmentNumber) for segment in data.SegmentSequence]
    if len(set(numbers)) < len(numbers):
        raise ValueError("two segments of one number")
    return set(numbers)


def _frames(path: Path, data: Dataset) -> tuple[int, Iterator[NDArray[np.bool_]]]:
    """How many there are, and each (rows, columns), True where the segment is."""
    count, rows, columns = int(data.get("NumberOfFrames", 1)), int(data.Rows), int(data.Columns)
    if count * rows * columns > LARGEST:
        raise VoxelscaleError(f"{path}: {columns} x {rows} x {count} pixels", "is its header damaged?")
    least = 1.0
    if str(data.get("SegmentationType", "BINARY")) == "FRACTIONAL":
        least = 0.5 * int(data.MaximumFractionalValue)
    # One by one: as bytes, bits take eight times the memory, and all frames that of many scans.
    return count, (frame >= least for frame in _stored(data, count, rows, columns))


def _stored(data: Dataset, count: int, rows: int, columns: int) -> Iterator[NDArray[Any]]:
    from pydicom.pixels import iter_pixels

    syntax = data.file_meta.TransferSyntaxUID
    if int(data.BitsAllocated) != 1 or syntax.is_encapsulated or not syntax.is_little_endian:
        for frame in iter_pixels(data):
            yield frame.reshape(rows, columns)
        return
    # pydicom 3.0 does not iterate over frames that do not begin with a byte.
    size, code = rows * columns, np.frombuffer(data.PixelData, np.uint8)
    if 8 * len(code) < count * size:
        raise ValueError(f"pixels cut short: {len(code)} of {-(-count * size // 8)} bytes")
    for start in range(0, count * size, size):
        bits = np.unpackbits(code[start // 8 : -(-(start + size) // 8)], bitorder="little")
        yield bits[start % 8 : start % 8 + size].reshape(rows, columns)


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
    if corners.shape != (3, 3) or not (np.abs(corners) < FARTHEST_MM).all():
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
