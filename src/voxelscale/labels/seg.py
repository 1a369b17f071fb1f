"""DICOM Segmentation objects (PS3.3 A.51), by each frame's own position.

Binary and fractional objects have a frame a segment and slice; label maps (Supplement 243) have a frame a
slice, whose values are the segments' numbers.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import LESION, Classes
from voxelscale.console import warn
from voxelscale.errors import VoxelscaleError
from voxelscale.formats.dicom import tags
from voxelscale.formats.dicom.elements import DicomObject, Elements, label_of
from voxelscale.formats.dicom.header import FARTHEST_MM, NATIVE, pixels_of
from voxelscale.formats.dicom.voxels import stored
from voxelscale.geometry import Scan, Slices
from voxelscale.labels.dicom import check_names, check_series, check_values, free_text, read_label_object
from voxelscale.labels.drawn import Lattice, labels_on_scan, lattices_of, lay, warn_outside
from voxelscale.labels.stored import kind_of_stored, labels_by_number, union, warn_of_replaced

APART = 0.05
"""Of a voxel, that a frame's pixels may lie beside the image's: headers keep decimals."""

LARGEST = 2**33
"""Pixels of an object at most."""

BACKGROUND = "125040"
"""The DICOM code of what is no segment (PS3.16, Background)."""


class _ElsewhereError(VoxelscaleError):
    """Frames that do not lie on the pixels of a lattice."""


def read(
    paths: Sequence[Path],
    image: Scan,
    values: tuple[int, ...] | None,
    series: str = "",
    classes: Classes = LESION,
) -> Scan:
    """The segments of one or several objects as one mask of stored labels; fractional ones from a half on.

    Where segments of two classes overlap, the later class is taken, with a warning; regions may overlap.

    Args:
        image: the scan; where it was resampled, the frames may lie on its slices or on its voxels.
        values: segment numbers of the lesion, the same for every object; None: as the classes say.
        series: the image's SeriesInstanceUID, where it is known.
        classes: by the numbers of segments, or by their labels or the meaning of their types; of one class
            without values all segments.

    Raises:
        VoxelscaleError: one is damaged, of another series, or does not lie on the image's voxels; or none
            has such a segment.
    """
    if values is not None:
        classes = Classes(values=(values,))
    masks, held, named = [], {}, {}
    replaced = 0
    for path in paths:
        found = read_label_object(path)
        check_series(found, series, image)
        try:
            segments = _segments(found)
            named[path] = {number: segment.names for number, segment in segments.items()}
            labels = labels_by_number(named[path], classes)
            mask, held[path], over = _on_scan(found, image, labels, classes)
        except ValueError as error:
            raise VoxelscaleError(f"{path}: a damaged segmentation ({error})", "export it again") from None
        masks.append(mask)
        replaced += over
        if classes.values == ((),):
            _warn_of_kinds(path, segments)
    if all(isinstance(value, int) for group in classes.values for value in group):
        check_values(held, "segment", values if values is not None else classes.numbers or None)
    else:
        check_names(named, "segment", classes)
    made, over = union(masks, classes)
    warn_of_replaced(", ".join(map(str, paths)), replaced + over)
    return Scan(made, image.affine)


def _on_scan(
    found: DicomObject, image: Scan, labels: Mapping[int, int], classes: Classes
) -> tuple[NDArray[Any], set[int], int]:
    """The chosen segments of an object on the scan's voxels; the numbers of all of its segments; and in
    how many voxels classes overlap.

    Args:
        labels: the stored label of each chosen segment, by its number.
    """
    *others, lattice = lattices_of(image)
    for other in others:
        try:
            mask, seen, replaced = _drawn(found, other, labels, classes)
        except _ElsewhereError:
            continue
        return labels_on_scan(found.path, mask, other, image, classes), seen, replaced
    mask, seen, replaced = _drawn(found, lattice, labels, classes)
    return labels_on_scan(found.path, mask, lattice, image, classes), seen, replaced


def _drawn(
    found: DicomObject, lattice: Lattice, labels: Mapping[int, int], classes: Classes
) -> tuple[NDArray[Any], set[int], int]:
    """As `_on_scan`, on what the frames were drawn on."""
    mask = np.zeros(lattice.shape, kind_of_stored(classes))
    seen, pixels, outside, replaced = set[int](), 0, 0, 0
    shared = found.data.items(tags.SHARED)[:1]
    for own, numbers, parts in _frames(found, shared, labels):
        seen |= numbers
        for number, frame in parts:
            if frame.any():
                corners = _corners(found.path, frame.shape, [own, *shared], lattice)
                index, left_out = _places(found.path, frame, corners, mask.shape)
                replaced += lay(mask, index, labels[number], classes)
                outside += left_out
                pixels += int(np.count_nonzero(frame))
    if outside and outside == pixels:
        hint = "check that the pair belongs together"
        raise VoxelscaleError(f"{found.path}: it lies outside the scan", hint)
    warn_outside(found.path, outside, "pixel")
    return mask, seen, replaced


class _Segment(NamedTuple):
    """A segment's label and the meaning of its type's code; the code itself, "" where it is not said."""

    names: tuple[str, ...]
    kind: str


def _segments(found: DicomObject) -> dict[int, _Segment]:
    """The segments by their numbers.

    Raises:
        ValueError: two segments have one number.
    """
    segments: dict[int, _Segment] = {}
    for item in found.data.items(tags.SEGMENTS):
        number, kinds = item.integer(tags.SEGMENT_NUMBER), item.items(tags.SEGMENT_TYPE)
        if number in segments:
            raise ValueError("two segments of one number")
        names = [free_text(found, item, tags.SEGMENT_LABEL)]
        names += [free_text(found, kind, tags.CODE_MEANING) for kind in kinds]
        kind = kinds[0].text(tags.CODE_VALUE) if kinds else ""
        segments[number] = _Segment(tuple(names), kind)
    return segments


def _warn_of_kinds(path: Path, segments: Mapping[int, _Segment]) -> None:
    """Warn where segments of different kinds, such as an organ and a lesion, are all taken as lesions."""
    kinds = {number: s.kind for number, s in segments.items() if s.kind not in ("", BACKGROUND)}
    if len(set(kinds.values())) > 1:
        held = ", ".join(f"{number} {s.names[0]}".strip() for number, s in segments.items())
        first = next(iter(kinds))
        warn(
            f"{path}: all of its segments are taken as the lesion ({held}); choose with "
            f"reading.labels=[{first}], or make classes: reading.labels={{name: [{first}], ...}}"
        )


def _frames(
    found: DicomObject, shared: Sequence[Elements], wanted: Container[int]
) -> Iterator[tuple[Elements, set[int], list[tuple[int, NDArray[np.bool_]]]]]:
    """Each frame's functional groups, the segments in it, and where each wanted one of them is."""
    data, pixels = found.data, pixels_of(found)
    count, rows, columns = pixels.frames, pixels.rows, pixels.columns
    if count * rows * columns > LARGEST:
        raise VoxelscaleError(
            f"{found.path}: {columns} x {rows} x {count} pixels", "is its header damaged?"
        )
    if not rows or not columns or pixels.allocated not in (1, 8, 16, 32):
        raise ValueError(f"{columns} x {rows} pixels of {pixels.allocated} bits")
    if pixels.allocated == 1 and not pixels.little:
        raise ValueError("single bits in big endian words")
    if pixels.syntax in NATIVE and pixels.length < pixels.bytes:
        raise ValueError(f"pixels cut short: {pixels.length} of {pixels.bytes} bytes")
    groups = data.items(tags.PER_FRAME)
    if len(groups) != count:
        raise ValueError(f"{len(groups)} descriptions of {count} frames")
    segments, how = _segments(found), data.text(tags.SEGMENTATION_TYPE) or "BINARY"
    backgrounds = set()
    if how == "LABELMAP":  # the values that are no segment: its padding, else 0, and what is called so
        named = (number for number, segment in segments.items() if segment.kind == BACKGROUND)
        backgrounds = {data.integer(tags.PADDING, 0), *named}
    least = 0.5 * data.integer(tags.GREATEST_FRACTION) if how == "FRACTIONAL" else 1.0
    # One by one: as bytes, bits take eight times the memory, and all frames that of many scans.
    for own, frame in zip(groups, stored(pixels, range(count)), strict=True):
        if how == "LABELMAP":
            numbers = {int(value) for value in np.unique(frame)} - backgrounds
            parts = [(number, frame == number) for number in sorted(numbers) if number in wanted]
        else:
            number = _group([own, *shared], tags.SEGMENT_OF_FRAME).integer(tags.SEGMENT_REFERENCE)
            numbers = {number}
            parts = [(number, frame >= least)] if number in wanted else []
        if numbers - segments.keys():
            strange = min(numbers - segments.keys())
            raise ValueError(f"a frame of segment {strange}, which it does not describe")
        yield own, numbers, parts


def _group(groups: Sequence[Elements], tag: int) -> Elements:
    """A functional group: the frame's own, or that of all."""
    for group in groups:
        for item in group.items(tag):
            return item
    raise ValueError(f"{label_of(tag)} is missing")


def _corners(
    path: Path, shape: tuple[int, ...], groups: Sequence[Elements], lattice: Lattice
) -> NDArray[np.float64]:
    """Indices of pixel (0, 0), of the last of the first column, and of the last of the first row."""
    if not any(group.items(tags.POSITION_MACRO) for group in groups):
        return _corners_of_source(path, shape, groups[0], lattice)
    position, turned, steps = (
        np.asarray(_group(groups, macro).numbers(tag, count) or [np.nan] * count)
        for macro, tag, count in (
            (tags.POSITION_MACRO, tags.POSITION, 3),
            (tags.ORIENTATION_MACRO, tags.ORIENTATION, 6),
            (tags.MEASURES_MACRO, tags.SPACING, 2),
        )
    )
    down = turned[3:] * steps[0] * (shape[0] - 1)
    along = turned[:3] * steps[1] * (shape[1] - 1)
    corners = np.stack([position, position + down, position + along])
    if not (np.abs(corners) < FARTHEST_MM).all():
        raise ValueError("a frame without a position")
    return lattice.mm_to_index(corners)


def _corners_of_source(
    path: Path, shape: tuple[int, ...], own: Elements, lattice: Lattice
) -> NDArray[np.float64]:
    """As `_corners`, of a frame that says only from which slice it was derived (PS3.3 C.7.6.16.2.6)."""
    sources = {
        (source.text(tags.SOP_REFERENCE), source.whole(tags.FRAME_REFERENCE, 1))
        for derived in own.items(tags.DERIVATION)
        for source in derived.items(tags.SOURCE)
    }
    known = lattice.uids if isinstance(lattice, Slices) else ()
    found = [number for number, uid in enumerate(known) if uid in sources]
    if len(sources) != 1 or not found or shape != lattice.shape[1:]:
        hint = "export it with the positions of its frames"
        what = "its frames have no position, and do not name one of the scan's slices each"
        raise _ElsewhereError(f"{path}: {what}", hint)
    (number,) = found
    return np.array([[number, 0, 0], [number, shape[0] - 1, 0], [number, 0, shape[1] - 1]], np.float64)


def _places(
    path: Path, frame: NDArray[np.bool_], corners: NDArray[np.float64], shape: tuple[int, ...]
) -> tuple[tuple[NDArray[np.int_], ...], int]:
    """The voxels under a frame's pixels, as an index, and how many pixels lie outside."""
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
    inside = ((index >= 0) & (index < np.asarray(shape)[:, None])).all(axis=0)
    return tuple(index[:, inside]), int(np.count_nonzero(~inside))
