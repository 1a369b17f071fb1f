"""DICOM Segmentation objects (PS3.3 A.51), by each frame's own position.

Binary and fractional objects have a frame a segment and slice; label maps (Supplement 243) have a frame a
slice, whose values are the segments' numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.console import warn
from voxelscale.errors import VoxelscaleError
from voxelscale.formats.dicom.header import FARTHEST_MM
from voxelscale.geometry import Scan, Slices
from voxelscale.labels.dicom import check_series, check_values, read_dataset
from voxelscale.labels.drawn import Lattice, lattices_of, on_scan, warn_outside

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

APART = 0.05
"""Of a voxel, that a frame's pixels may lie beside the image's: headers keep decimals."""

LARGEST = 2**33
"""Pixels of an object at most."""

BACKGROUND = "125040"
"""The DICOM code of what is no segment (PS3.16, Background)."""


class _ElsewhereError(VoxelscaleError):
    """Frames that do not lie on the pixels of a lattice."""


def read(paths: Sequence[Path], image: Scan, values: tuple[int, ...] | None, series: str = "") -> Scan:
    """The segments of one or several objects as one mask; a fractional one from one half on.

    Args:
        image: the scan; where it was resampled, the frames may lie on its slices or on its voxels.
        values: segment numbers, the same for every object; None: all.
        series: the image's SeriesInstanceUID, where it is known.

    Raises:
        VoxelscaleError: one is damaged, of another series, or does not lie on the image's voxels; or none
            has such a segment.
    """
    masks, held = [], {}
    for path in paths:
        data = read_dataset(path)
        check_series(path, data, series, image)
        try:
            mask, held[path] = _on_scan(path, data, image, values)
        except VoxelscaleError:
            raise
        except Exception as error:  # elements are decoded when they are asked for, garbled in any error
            reason = str(error).partition("\n")[0][:120]  # decoders tell the fault of each of them
            raise VoxelscaleError(f"{path}: a damaged segmentation ({reason})", "export it again") from None
        masks.append(mask)
        if values is None:
            _warn_of_kinds(path, data)
    check_values(held, "segment", values)
    for mask in masks[1:]:
        masks[0] |= mask
    return Scan(masks[0], image.affine)


def _on_scan(
    path: Path, data: Dataset, image: Scan, values: tuple[int, ...] | None
) -> tuple[NDArray[np.uint8], set[int]]:
    """The chosen segments of an object on the scan's voxels, and the numbers of all of its segments."""
    *others, last = lattices_of(image)
    for lattice in others:
        try:
            mask, seen = _drawn(path, data, lattice, values)
        except _ElsewhereError:
            continue
        return on_scan(path, mask, lattice, image).array, seen
    mask, seen = _drawn(path, data, last, values)
    return on_scan(path, mask, last, image).array, seen


def _drawn(
    path: Path, data: Dataset, lattice: Lattice, values: tuple[int, ...] | None
) -> tuple[NDArray[np.uint8], set[int]]:
    """As `_on_scan`, on what the frames were drawn on."""
    mask, seen, pixels, outside = np.zeros(lattice.shape, np.uint8), set(), 0, 0
    shared = _first(data, "SharedFunctionalGroupsSequence")
    for group, numbers, frame in _frames(path, data, shared, values):
        seen |= numbers
        if frame is not None and frame.any():
            left_out = _place(
                path, frame, _corners(path, frame.shape, group, shared, lattice), lattice, mask
            )
            pixels, outside = pixels + int(np.count_nonzero(frame)), outside + left_out
    if outside and outside == pixels:
        hint = "check that the pair belongs together"
        raise VoxelscaleError(f"{path}: it lies outside the scan", hint)
    warn_outside(path, outside, "pixel")
    return mask, seen


def _segments(data: Dataset) -> set[int]:
    """The numbers of the segments that it describes."""
    numbers = [int(segment.SegmentNumber) for segment in data.SegmentSequence]
    if len(set(numbers)) < len(numbers):
        raise ValueError("two segments of one number")
    return set(numbers)


def _warn_of_kinds(path: Path, data: Dataset) -> None:
    """Warn where segments of different kinds, such as an organ and a lesion, are all taken as lesions."""
    types = [(s, _first(s, "SegmentedPropertyTypeCodeSequence")) for s in data.SegmentSequence]
    kinds = {int(s.SegmentNumber): str(kind.get("CodeValue", "")) for s, kind in types if kind is not None}
    kinds = {number: kind for number, kind in kinds.items() if kind != BACKGROUND}
    if len(set(kinds.values())) > 1:
        held = ", ".join(f"{s.SegmentNumber} {s.get('SegmentLabel', '')}".strip() for s, _ in types)
        warn(f"{path}: all of its segments are taken as the lesion ({held}); choose with reading.labels")


def _backgrounds(data: Dataset) -> set[int]:
    """The values of a label map that are no segment: its padding, else 0, and what is called so."""
    found = {int(data.get("PixelPaddingValue", 0))}
    for segment in data.SegmentSequence:
        kind = _first(segment, "SegmentedPropertyTypeCodeSequence")
        if kind is not None and str(kind.get("CodeValue", "")) == BACKGROUND:
            found.add(int(segment.SegmentNumber))
    return found


def _frames(
    path: Path, data: Dataset, shared: Dataset | None, values: tuple[int, ...] | None
) -> Iterator[tuple[Dataset, set[int], NDArray[np.bool_] | None]]:
    """Each frame's functional groups, the segments in it, and where the chosen ones are (None: nowhere)."""
    count, rows, columns = int(data.get("NumberOfFrames", 1)), int(data.Rows), int(data.Columns)
    if count * rows * columns > LARGEST:
        raise VoxelscaleError(f"{path}: {columns} x {rows} x {count} pixels", "is its header damaged?")
    groups = list(data.PerFrameFunctionalGroupsSequence)
    if len(groups) != count:
        raise ValueError(f"{len(groups)} descriptions of {count} frames")
    described, kind = _segments(data), str(data.get("SegmentationType", "BINARY"))
    backgrounds = _backgrounds(data) if kind == "LABELMAP" else set()
    least = 0.5 * int(data.MaximumFractionalValue) if kind == "FRACTIONAL" else 1.0
    # One by one: as bytes, bits take eight times the memory, and all frames that of many scans.
    for group, frame in zip(groups, _stored(data, count, rows, columns), strict=True):
        if kind == "LABELMAP":
            numbers = {int(value) for value in np.unique(frame)} - backgrounds
            chosen = numbers if values is None else numbers & set(values)
            where = np.isin(frame, sorted(chosen)) if chosen else None
        else:
            number = int(_group(group, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            numbers = {number}
            where = frame >= least if values is None or number in values else None
        if numbers - described:
            raise ValueError(f"a frame of segment {min(numbers - described)}, which it does not describe")
        yield group, numbers, where


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


def _corners(
    path: Path, shape: tuple[int, int], own: Dataset, shared: Dataset | None, lattice: Lattice
) -> NDArray[np.float64]:
    """Indices of pixel (0, 0), of the last of the first column, and of the last of the first row."""
    if not any(_first(group, "PlanePositionSequence") for group in (own, shared) if group is not None):
        return _corners_of_source(path, shape, own, lattice)
    position = np.asarray(_group(own, shared, "PlanePositionSequence").ImagePositionPatient, float)
    turned = np.asarray(_group(own, shared, "PlaneOrientationSequence").ImageOrientationPatient, float)
    row_step, column_step = map(float, _group(own, shared, "PixelMeasuresSequence").PixelSpacing)
    down = turned[3:] * row_step * (shape[0] - 1)
    along = turned[:3] * column_step * (shape[1] - 1)
    corners = np.stack([position, position + down, position + along])
    if corners.shape != (3, 3) or not (np.abs(corners) < FARTHEST_MM).all():
        raise ValueError("a frame without a position")
    return lattice.mm_to_index(corners)


def _corners_of_source(
    path: Path, shape: tuple[int, int], own: Dataset, lattice: Lattice
) -> NDArray[np.float64]:
    """As `_corners`, of a frame that says only from which slice it was derived (PS3.3 C.7.6.16.2.6)."""
    sources = {
        (str(source.ReferencedSOPInstanceUID), int(source.get("ReferencedFrameNumber") or 1))
        for derived in own.get("DerivationImageSequence") or []
        for source in derived.get("SourceImageSequence") or []
    }
    known = lattice.uids if isinstance(lattice, Slices) else ()
    found = [number for number, uid in enumerate(known) if uid in sources]
    if len(sources) != 1 or not found or shape != lattice.shape[1:]:
        hint = "export it with the positions of its frames"
        what = "its frames have no position, and do not name one of the scan's slices each"
        raise _ElsewhereError(f"{path}: {what}", hint)
    (number,) = found
    return np.array([[number, 0, 0], [number, shape[0] - 1, 0], [number, 0, shape[1] - 1]], np.float64)


def _place(
    path: Path,
    frame: NDArray[np.bool_],
    corners: NDArray[np.float64],
    lattice: Lattice,
    mask: NDArray[np.uint8],
) -> int:
    """Set the voxels under a frame's pixels; how many of them lie outside."""
    start, down, along = corners
    steps = [
        (end - start) / max(count - 1, 1) for end, count in zip((down, along), frame.shape, strict=True)
    ]
    whole = [np.rint(step).astype(int) for step in steps]
    reached = np.rint(start) + sum(w * (n - 1) for w, n in zip(whole, frame.shape, strict=True))
    truly = start + sum(s * (n - 1) for s, n in zip(steps, frame.shape, strict=True))
    unit = all(np.abs(w).sum() == 1 for w, n in zip(whole, frame.shape, strict=True) if n > 1)
    if not unit or max(np.abs(start - np.rint(start)).max(), np.abs(truly - reached).max()) > APART:
        hint = "export it on its scan's own slices, or check that the pair belongs together"
        raise _ElsewhereError(f"{path}: its frames do not lie on the scan's voxels", hint)
    rows, columns = np.nonzero(frame)
    index = np.rint(start).astype(int)[:, None] + whole[0][:, None] * rows + whole[1][:, None] * columns
    inside = ((index >= 0) & (index < np.asarray(mask.shape)[:, None])).all(axis=0)
    mask[tuple(index[:, inside])] = 1
    return int(np.count_nonzero(~inside))
