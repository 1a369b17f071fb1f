"""Which voxels are which finding, on the slices that the scan came as."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import Classes
from voxelscale.console import count, warn
from voxelscale.dicom_out.codes import Concept
from voxelscale.dicom_out.objects import LONGEST_TEXT, plain, uid_of
from voxelscale.dicom_out.original import Original
from voxelscale.findings import Finding
from voxelscale.findings.regions import Voxels, box_of, masked_regions
from voxelscale.geometry import Grid, IntTriple, Slices

SAME_INDEX, SAME_VOLUME = 1e-3, 1e-6
"""How far, in voxels and as a share, a component may be from the finding that it is: both were computed
from the same voxels, and written with all digits."""

LIKE = 2.0
"""Volumes of a region's component and of its finding differ by at most this factor."""

HALF = 0.5 - 1e-6
STEPS = 255
"""Of a probability: as many as a byte holds."""

Box = tuple[slice, slice, slice]


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """A finding, a class, or what a class has beside its findings.

    Attributes:
        number: from 1.
        name: what people call it.
        class_name: its class.
        concept: its class in codes.
        tracking: a UID by which the same finding is known in all objects.
        rank: of the finding among all of the case, from 1; None: it is none.
        finding: what was measured; None: it is none.
        start: its box's first (slice, row, column).
        values: (slice, row, column) in the box: bool, or float32 probabilities.
    """

    number: int
    name: str
    class_name: str
    concept: Concept
    tracking: str
    rank: int | None
    finding: Finding | None
    start: IntTriple
    values: NDArray[Any]

    @property
    def box(self) -> Box:
        """Where it lies among the slices."""
        z, y, x = (slice(s, s + n) for s, n in zip(self.start, self.values.shape, strict=True))
        return z, y, x

    def planes(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """The number of each slice that it is on, and its values there (rows and columns of the box)."""
        for place, plane in enumerate(self.values, start=self.start[0]):
            if plane.any():
                yield place, plane


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Voxels of the scan that are to be one segment.

    Attributes:
        at: the class's number, from 0.
        voxels: (n, 3) of the scan.
        rank: of the finding among all, from 1; None: none, or a whole class.
    """

    at: int
    voxels: Voxels
    rank: int | None


def parts_of(
    stored: NDArray[Any], classes: Classes, findings: Sequence[Finding], grid: Grid, merge_mm: float
) -> list[Part]:
    """The voxels of each finding that the mask has, in the order of the findings; then of each class what
    is no finding: components below ``predict.min_volume_mm3``.

    Of regions the mask holds one value a voxel, so that a component may have voxels more or less than the
    finding that was measured: there the one of about its size is it, or else the one around its centre.

    Args:
        stored: labels (z, y, x).
        findings: most confident first; those below the threshold are not in the mask and give no part.
        merge_mm: ``predict.merge_mm`` in force.

    Raises:
        ValueError: the mask of the only class holds what is no finding.
    """
    found: list[Part] = []
    rest: list[Part] = []
    for at, (name, where) in enumerate(classes.each(stored)):
        free = {rank: f for rank, f in enumerate(findings, start=1) if classes.single or f.label == name}
        left = masked_regions(where, grid, merge_mm=merge_mm, least=0) if where.any() else []
        for is_it in (_is_exactly, _is_about, _holds_centre) if classes.regions else (_is_exactly,):
            others = []
            for voxels in left:
                rank = next((rank for rank, f in free.items() if is_it(voxels, f, grid)), None)
                if rank is None:
                    others.append(voxels)
                else:
                    del free[rank]
                    found.append(Part(at=at, voxels=voxels, rank=rank))
            left = others
        if left and classes.single:
            raise ValueError("its mask holds what is none of its findings")
        if left:
            rest.append(Part(at=at, voxels=np.concatenate(left), rank=None))
    return [*sorted(found, key=lambda part: part.rank or 0), *rest]


def _is_exactly(voxels: Voxels, finding: Finding, grid: Grid) -> bool:
    volume = len(voxels) * grid.voxel_mm3
    near = np.abs(voxels.mean(axis=0) - finding.index).max() <= SAME_INDEX
    return bool(near and abs(volume - finding.volume_mm3) <= SAME_VOLUME * volume)


def _is_about(voxels: Voxels, finding: Finding, grid: Grid) -> bool:
    centre = grid.index_to_mm(voxels.mean(axis=0))
    apart = np.linalg.norm(centre - (finding.x, finding.y, finding.z))
    ratio = len(voxels) * grid.voxel_mm3 / max(finding.volume_mm3, 1e-9)
    return bool(apart <= finding.diameter_mm / 2 and 1 / LIKE <= ratio <= LIKE)


def _holds_centre(voxels: Voxels, finding: Finding, grid: Grid) -> bool:
    apart = np.linalg.norm(grid.index_to_mm(voxels) - (finding.x, finding.y, finding.z), axis=1)
    return bool(apart.min() <= max(grid.spacing))


def whole_classes(stored: NDArray[Any], classes: Classes) -> list[Part]:
    """All of each class that is there."""
    each = ((at, np.argwhere(where)) for at, (_, where) in enumerate(classes.each(stored)))
    return [Part(at=at, voxels=voxels, rank=None) for at, voxels in each if len(voxels)]


def on_slices(
    parts: Sequence[Part],
    original: Original,
    classes: Classes,
    concepts: Mapping[str, Concept],
    findings: Sequence[Finding],
    *,
    per_finding: bool,
    model: str,
) -> list[Segment]:
    """The parts on the slices that the scan came as, numbered from 1 in their order.

    Where the scan was resampled (gantry tilt, uneven steps), a pixel belongs to a part whose share of it,
    interpolated linearly, is a half at least; a part that would have none left has the nearest pixels. What
    lies on a slice that is missing in the source is left out, with a warning.
    """
    segments: list[Segment] = []
    lost = 0
    for part in parts:
        start, drawn = _drawn(part.voxels, original)
        name, there = classes.names[part.at], _there(start, len(drawn), original)
        lost += int(np.count_nonzero(drawn[~there]))
        start, mask = _cropped(start, drawn & there[:, None, None])
        if not mask.any():
            what = "finding" if part.rank else "class"
            warn(f"{original.case}: a {what} lies on missing slices only, and is in no SEG or RTSTRUCT")
            continue
        finding = findings[part.rank - 1] if part.rank else None
        label = _label(name, part.rank, rest=per_finding)
        centre = original.grid.index_to_mm(part.voxels.mean(axis=0)) if part.rank else None
        segments.append(
            Segment(
                number=len(segments) + 1,
                name=label,
                class_name=name,
                concept=concepts[name],
                tracking=_tracking(original, model, name, label, centre),
                rank=part.rank,
                finding=finding,
                start=start,
                values=mask,
            )
        )
    if lost:
        warn(f"{original.case}: {count(lost, 'pixel')} on missing slices are in no SEG or RTSTRUCT")
    return segments


def _there(start: IntTriple, number: int, original: Original) -> NDArray[np.bool_]:
    """Which of so many slices the source has."""
    return np.asarray([start[0] + n in original.by_place for n in range(number)], np.bool_)


def _tracking(
    original: Original, model: str, name: str, label: str, centre: NDArray[np.float64] | None
) -> str:
    place = None if centre is None else [round(float(v), 2) for v in centre]
    return uid_of("tracking", original.series, original.case, model, name, label, place)


def _label(name: str, rank: int | None, *, rest: bool) -> str:
    """What a segment is called: the class and the finding's number, as in the list of findings."""
    more = f" {rank}" if rank else ", small parts" if rest else ""
    return plain(name, LONGEST_TEXT - len(more)) + more


def _drawn(voxels: Voxels, original: Original) -> tuple[IntTriple, NDArray[np.bool_]]:
    """Voxels of the scan on its slices: the box's first (slice, row, column), and the mask in it."""
    low, high = voxels.min(axis=0), voxels.max(axis=0) + 1
    box = np.zeros(high - low, np.float32)
    box[tuple((voxels - low).T)] = 1
    start, values = box_on_slices(box, low, original.slices)
    mask = values >= HALF
    if not mask.any():  # thinner than half a step between slices
        return _nearest(voxels, original)
    return start, mask


def box_on_slices(
    box: NDArray[np.float32], low: Sequence[int] | NDArray[np.int64], slices: Slices
) -> tuple[IntTriple, NDArray[np.float32]]:
    """Values in a box of the scan's lattice, 0 beyond it, on the slices: the first (slice, row, column)
    and the values there.

    Args:
        low: the box's first voxel.
    """
    first = int(low[0]), int(low[1]), int(low[2])
    if slices.regular:
        return first, box
    from scipy import ndimage

    top = np.asarray(first) + box.shape
    places = np.flatnonzero((slices.levels > first[0] - 1) & (slices.levels < top[0]))
    _, rows, columns = slices.shape
    if not len(places):
        return first, np.zeros((0, *box.shape[1:]), np.float32)
    shifts = slices.shifts[places]
    begin = np.maximum(np.floor(np.asarray(first[1:]) - shifts.max(axis=0)).astype(int) - 1, 0)
    end = np.minimum(np.ceil(top[1:] - shifts.min(axis=0)).astype(int) + 1, (rows, columns))
    out = np.zeros((len(places), *np.maximum(end - begin, 0)), np.float32)
    axes = (np.arange(a, b, dtype=np.float64) for a, b in zip(begin, end, strict=True))
    row, column = np.meshgrid(*axes, indexing="ij")
    padded = np.pad(box, 1)  # beyond the box it falls off to 0, as it does between voxels
    for at, place in enumerate(places):
        y, x = (axis + slices.shifts[place, i] for i, axis in enumerate((row, column)))
        z = np.full_like(y, slices.levels[place])
        index = [a - f + 1 for a, f in zip((z, y, x), first, strict=True)]
        out[at] = ndimage.map_coordinates(padded, index, order=1, mode="constant", cval=0.0)
    return (int(places[0]), int(begin[0]), int(begin[1])), out


def _nearest(voxels: Voxels, original: Original) -> tuple[IntTriple, NDArray[np.bool_]]:
    """The pixels of the source's slices that are nearest to voxels of the scan."""
    slices = original.slices
    there = np.asarray([frame.place for frame in original.frames])
    place = there[np.abs(slices.levels[there][:, None] - voxels[:, 0]).argmin(axis=0)]
    pixel = np.rint(voxels[:, 1:] - slices.shifts[place]).astype(int)
    inside = ((pixel >= 0) & (pixel < slices.shape[1:])).all(axis=1)
    index = np.column_stack([place, pixel])[inside]
    if not len(index):
        return (0, 0, 0), np.zeros((0, 0, 0), np.bool_)
    low = index.min(axis=0)
    mask = np.zeros(index.max(axis=0) - low + 1, np.bool_)
    mask[tuple((index - low).T)] = True
    return (int(low[0]), int(low[1]), int(low[2])), mask


def _cropped(start: IntTriple, values: NDArray[Any]) -> tuple[IntTriple, NDArray[Any]]:
    box = box_of(values > 0)
    z, y, x = (s + side.start for s, side in zip(start, box, strict=True))
    return (z, y, x), values[box]


def with_probabilities(
    segments: Sequence[Segment], maps: Mapping[str, NDArray[np.uint8]], original: Original
) -> list[Segment]:
    """Findings with the probabilities (float32, 0 to 1) of their own pixels in the place of masks.

    Args:
        maps: of each class on the scan's lattice, in steps of 1/255.
    """
    drawn = {name: _map(values, original) for name, values in maps.items()}
    made: list[Segment] = []
    for segment in segments:
        first, values = drawn[segment.class_name]
        own = np.zeros(segment.values.shape, np.float32)
        low = np.maximum(first, segment.start)
        high = np.maximum(np.minimum(np.add(first, values.shape), np.add(segment.start, own.shape)), low)
        inside, target = (
            tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
            for origin in (first, segment.start)
        )
        own[target] = values[inside]
        own *= segment.values
        if own.any():
            made.append(replace(segment, number=len(made) + 1, values=own))
    return made


def class_maps(
    maps: Mapping[str, NDArray[np.uint8]],
    original: Original,
    concepts: Mapping[str, Concept],
    model: str,
) -> list[Segment]:
    """The whole map of each class, also where the mask has nothing; arguments as above."""
    made: list[Segment] = []
    for name, values in maps.items():
        start, drawn = _map(values, original)
        if drawn.any():
            made.append(
                Segment(
                    number=len(made) + 1,
                    name=_label(name, None, rest=False),
                    class_name=name,
                    concept=concepts[name],
                    tracking=_tracking(original, model, name, name, None),
                    rank=None,
                    finding=None,
                    start=start,
                    values=drawn,
                )
            )
    return made


def _map(values: NDArray[np.uint8], original: Original) -> tuple[IntTriple, NDArray[np.float32]]:
    """Probabilities on the source's slices, in steps of 1/255."""
    box = box_of(values > 0)
    low = [side.start for side in box]
    start, drawn = box_on_slices(values[box].astype(np.float32), low, original.slices)
    drawn = np.asarray(np.rint(drawn) / STEPS, np.float32)
    drawn[~_there(start, len(drawn), original)] = 0
    return _cropped(start, drawn)
