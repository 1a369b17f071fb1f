"""The values of a stack's slices: stored numbers to HU, slice by slice, onto the stack's lattice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from voxelscale.channels import AIR_HU
from voxelscale.errors import VoxelscaleError
from voxelscale.formats._voxels import MOST_VOXELS
from voxelscale.formats.dicom import codec
from voxelscale.formats.dicom.codec import COPY
from voxelscale.formats.dicom.elements import UNDEFINED, inflate
from voxelscale.formats.dicom.header import NATIVE, Frame, Pixels
from voxelscale.formats.dicom.stack import Stack
from voxelscale.geometry import Slices

HALF = np.float32(0.5 - 1e-4)
"""Share of a voxel from which on a mask has it; rounding must not lose what is just half full."""

MOST_CLASSES = 1000
"""In a mask; an image has more values."""

BODY_HU = (-900, 3071)
"""A padding value that means one of these HU may well be tissue, too."""


def read_voxels(stack: Stack, *, ct: bool) -> NDArray[Any]:
    """The stack's values on its lattice (z, y, x): int16 where nothing is lost by it, else float32.

    Args:
        ct: whether the values are HU: padding, and what no slice covers, becomes air (-1024), else 0.

    Raises:
        VoxelscaleError: a file's pixels are cut short, damaged, or coded in a way that cannot be read.
    """
    fill = AIR_HU if ct else 0
    planes = np.empty((len(stack.frames), *stack.grid.shape[1:]), np.int16)
    for place, values in slices_of(stack.frames, ct=ct):
        if stack.shifts.any():
            values = _shifted(values, stack.shifts[place], stack.grid.shape[1:], fill)
        if values.dtype != np.int16 and planes.dtype == np.int16:
            planes = planes.astype(np.float32)
        planes[place] = values
    return _levelled(planes, stack.levels, stack.grid.shape[0])


def read_classes(stack: Stack) -> NDArray[Any]:
    """As `read_voxels`, of a mask: what is resampled keeps its class numbers, which are never mixed.

    Raises:
        VoxelscaleError: as `read_voxels`.
    """
    slices = stack.slices
    if slices.regular and ("", 0) not in slices.uids:
        return read_voxels(stack, ct=False)
    slots = [number for number, uid in enumerate(slices.uids) if uid != ("", 0)]
    planes = np.zeros(slices.shape, np.float32)
    for place, values in slices_of(stack.frames, ct=False):
        planes[slots[place]] = values
    classes = np.unique(planes[planes != 0])
    if len(classes) > MOST_CLASSES:  # an image
        return read_voxels(stack, ct=False)
    result = np.zeros(stack.grid.shape, np.float32)
    for value in classes:
        result[onto_lattice(planes == value, slices, stack.grid.shape) > 0] = value
    return result


def slices_of(frames: Sequence[Frame], *, ct: bool) -> Iterator[tuple[int, NDArray[Any]]]:
    """The place in `frames` and the values (y, x) of each slice, file by file; int16 or float32.

    Raises:
        VoxelscaleError: as `read_voxels`.
    """
    places: dict[Path, list[int]] = {}
    for place, frame in enumerate(frames):
        places.setdefault(frame.pixels.path, []).append(place)
    for of_file in places.values():
        pixels = frames[of_file[0]].pixels
        wanted = [frames[place].index for place in of_file]
        for place, raw in zip(of_file, stored(pixels, wanted), strict=True):
            yield place, _values(frames[place], raw, ct)


def check_claims(files: Iterable[Pixels]) -> None:
    """Raise a VoxelscaleError unless the files can hold the voxels that they claim; no memory is taken."""
    coded: dict[Path, Pixels] = {}
    for pixels in {pixels.path: pixels for pixels in files}.values():
        path, size = pixels.path, pixels.path.stat().st_size
        bits = pixels.allocated
        if bits not in (8, 16, 32) or not 1 <= pixels.stored <= pixels.high + 1 <= bits:
            shown = f"{pixels.stored} of {bits} bits"
            raise VoxelscaleError(f"{path}: {shown} a voxel, which no CT has", "export the series again")
        if pixels.syntax not in NATIVE or pixels.start:
            coded[path] = pixels
        elif (
            pixels.length == UNDEFINED
            or pixels.length < pixels.bytes
            or size < pixels.offset + pixels.bytes
        ):
            raise _cut_short(pixels, size)
    voxels = sum(p.rows * p.columns * p.frames for p in coded.values())
    size = sum(path.stat().st_size for path in coded)
    if voxels > MOST_VOXELS or (voxels > 2**26 and voxels > 1000 * size):
        what = f"claims {voxels} voxels from {size} bytes of code"
        raise VoxelscaleError(f"{min(coded)}: {what}", COPY)


def _cut_short(pixels: Pixels, there: int) -> VoxelscaleError:
    have = max(0, min(there - pixels.offset, pixels.length))
    what = f"its pixels are cut short or damaged ({have} of {pixels.bytes} bytes)"
    return VoxelscaleError(f"{pixels.path}: {what}", COPY)


def stored(pixels: Pixels, wanted: Iterable[int]) -> Iterator[NDArray[Any]]:
    """The stored numbers (y, x) of some frames of a file, each read when it is asked for.

    Raises:
        VoxelscaleError: as `read_voxels`.
    """
    path = pixels.path
    try:
        with path.open("rb") as handle:
            if pixels.syntax in NATIVE:
                yield from _native(pixels, wanted, handle)
            else:
                yield from codec.decoded(pixels, wanted, handle)
    except OSError as error:
        raise VoxelscaleError(f"{path}: cannot be read ({error.strerror})", COPY) from None


def _native(pixels: Pixels, wanted: Iterable[int], handle: BinaryIO) -> Iterator[NDArray[Any]]:
    if pixels.start:
        data = inflate(handle, pixels.start, pixels.offset + pixels.bytes)
        if len(data) < pixels.offset + pixels.bytes:
            raise _cut_short(pixels, len(data))
        handle = BytesIO(data)
    code = f"{'<' if pixels.little else '>'}{'i' if pixels.signed else 'u'}{max(1, pixels.allocated // 8)}"
    bits = pixels.rows * pixels.columns * pixels.allocated
    for index in wanted:
        # Frames of single bits need not begin with a byte.
        first, before = divmod(index * bits, 8)
        handle.seek(pixels.offset + first)
        raw = np.frombuffer(handle.read(-(-(before + bits) // 8)), code)
        if pixels.allocated == 1:
            raw = np.unpackbits(raw.view(np.uint8), bitorder="little")[before : before + bits]
        raw = raw.reshape(pixels.rows, pixels.columns)
        yield raw if raw.dtype.isnative else raw.astype(raw.dtype.newbyteorder("="))


def _values(frame: Frame, raw: NDArray[Any], ct: bool) -> NDArray[Any]:
    """HU (y, x) of stored numbers: int16 where they are whole and fit, else float32."""
    pixels = frame.pixels
    if pixels.stored < pixels.allocated:
        # Bits beyond the stored ones may hold anything, such as old overlays.
        above = pixels.allocated - 1 - pixels.high
        raw = (raw << above) >> (pixels.allocated - pixels.stored)
    values = _scaled(raw, frame.slope, frame.intercept)
    if ct and frame.padding:
        padded = _padded(frame, frame.padding, raw)
        if padded.any():
            values = np.where(padded, values.dtype.type(AIR_HU), values)
    return values


def _scaled(raw: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    least, most = (slope * float(v) + intercept for v in (raw.min(), raw.max()))
    low, high = min(least, most), max(least, most)
    whole = slope == int(slope) and intercept == int(intercept)
    if low < -32768 or high > 32767 or not whole:
        exact = raw.astype(np.float64) * slope + intercept
        if low < -32768 or high > 32767 or not np.array_equal(exact, np.rint(exact)):
            return exact.astype(np.float32)
        return exact.astype(np.int16)
    # Whole and within int16 at both ends, arithmetic modulo 2**16 is exact, and the fastest.
    short = raw.astype(np.int16)
    factor, offset = (np.int64(int(v)).astype(np.int16) for v in (slope, intercept))
    if factor != 1:
        short *= factor
    if offset:
        short += offset
    return short


def _padded(frame: Frame, padding: tuple[int, int], raw: NDArray[Any]) -> NDArray[np.bool_]:
    """The voxels that are no measurement (PS3.3 C.7.5.1.1.2)."""
    least, most = padding
    padded = np.asarray((raw >= least) & (raw <= most))
    meant = sorted(v * frame.slope + frame.intercept for v in (least, most))
    if meant[0] > BODY_HU[1] or meant[1] < BODY_HU[0] or not padded.any():
        return padded
    # Some scanners declare a value that tissue has, too: padding is what hangs together with the edge.
    from scipy import ndimage

    parts, _ = ndimage.label(padded)
    edge = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    return np.asarray(padded & np.isin(parts, edge[edge > 0]))


def _shifted(
    values: NDArray[Any], shift: NDArray[np.float64], shape: tuple[int, ...], fill: float
) -> NDArray[Any]:
    """A slice (y, x) whose first voxel lies at `shift` of a plane of `shape`, interpolated linearly."""
    result = values.astype(np.float32)
    outside = []
    for axis in (0, 1):
        size = values.shape[axis]
        place = np.arange(shape[axis]) - shift[axis]
        # Half a voxel beyond the outermost centres is still the slice's own: no false rim.
        outside.append((place < -0.5) | (place > size - 0.5))
        place = np.clip(place, 0, size - 1)
        low = np.minimum(place.astype(np.int64), max(size - 2, 0))
        weight = (place - low).astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
        here, there = np.take(result, low, axis), np.take(result, np.minimum(low + 1, size - 1), axis)
        result = here + weight * (there - here)
    result[outside[0]] = fill
    result[:, outside[1]] = fill
    return _as_it_was(result, values.dtype)


def _levelled(planes: NDArray[Any], levels: NDArray[np.float64], count: int) -> NDArray[Any]:
    """The planes (z, y, x), which lie at `levels`, at 0, 1, ..., count - 1; linearly between two."""
    if np.array_equal(levels, np.arange(count)):
        return planes
    result = np.empty((count, *planes.shape[1:]), planes.dtype)
    for level in range(count):
        above, weight = _neighbours(levels, level)
        if weight in (0, 1):
            result[level] = planes[above - 1 + int(weight)]
            continue
        low, high = planes[above - 1].astype(np.float32), planes[above].astype(np.float32)
        result[level] = _as_it_was(low + np.float32(weight) * (high - low), planes.dtype)
    return result


def _neighbours(levels: NDArray[np.float64], level: int) -> tuple[int, float]:
    """The slice above a level of the lattice, and its weight against the one below it."""
    above = int(np.clip(np.searchsorted(levels, level), 1, len(levels) - 1))
    step = levels[above] - levels[above - 1]
    weight = float(np.clip((level - levels[above - 1]) / step, 0, 1))
    return above, 0.0 if weight < 1e-3 else 1.0 if weight > 1 - 1e-3 else weight


def onto_lattice(mask: NDArray[Any], slices: Slices, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A mask that was drawn on a scan's slices, brought to its lattice by the plan of its values.

    What is at least half full is set, so that outlines stay where they are. A missing slice on which
    something was drawn counts; any other is interpolated, as the scan is.

    Args:
        mask: (slice, row, column), above 0 where the label is.
        shape: of the lattice (z, y, x).
    """
    planes = np.asarray(mask > 0)
    full: NDArray[np.bool_] = np.asarray(planes.any(axis=(1, 2)))
    known = np.flatnonzero(full | np.array([uid != ("", 0) for uid in slices.uids]))
    if slices.regular and len(known) == len(planes):
        return planes.astype(np.uint8)
    result = np.zeros(shape, np.uint8)

    @lru_cache(maxsize=2)
    def occupied(number: int) -> NDArray[np.float32]:
        plane = planes[number].astype(np.float32)
        return _shifted(plane, slices.shifts[number], shape[1:], 0) if slices.shifts.any() else plane

    levels = slices.levels[known]
    for level in range(shape[0]):
        above, weight = _neighbours(levels, level)
        parts = ((known[above - 1], 1 - weight), (known[above], weight))
        shares = [part * occupied(int(number)) for number, part in parts if part and full[number]]
        if shares:
            result[level] = np.add.reduce(shares) >= HALF
    return result


def _as_it_was(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    # Half a HU is far below a CT's noise; int16 scans stay int16.
    return np.rint(values).astype(np.int16) if dtype == np.int16 else values
