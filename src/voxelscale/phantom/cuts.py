"""Real nodules cut from scans or crops with masks: their voxels, HU and texture, to be put elsewhere.

A cut is turned about the scan's long axis and mirrored only: slices keep being slices, as the texture of a
real nodule is that of the scanner's slices, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxelscale.config import ReadingConfig
from voxelscale.dataset import DataSet, Source
from voxelscale.dataset.reading import read_case
from voxelscale.dataset.stamps import label_stamp, source_stamp
from voxelscale.errors import VoxelscaleError
from voxelscale.files import digest_of
from voxelscale.findings import components
from voxelscale.geometry import Scan, sphere_diameter
from voxelscale.phantom.contours import Posed, Shape, level_of
from voxelscale.phantom.nodules import Nodule

LEAST_MM = 3.0
"""Equivalent diameter of a lesion that is cut out; the voxels of a smaller one are mostly surroundings."""
MARGIN_MM = 4.0
"""What is kept around it."""
FINEST_MM, COARSEST_MM = 0.5, 1.0
"""Between these lies the step of a cut's lattice."""
ZOOM = 1.25
"""By which a nodule is made larger or smaller at most: its texture is to stay that of a scanner."""
WALL_HU, WALL_MM, WALL_SHARE = -400.0, (1.0, 3.0), 0.35
"""A nodule with so much denser than this at this distance around it lies at the pleura."""
GLASS_HU, SOLID_HU = -450.0, -150.0
"""Median of ground glass at most, and of a solid nodule at least; what is between is part-solid."""


@dataclass(frozen=True, eq=False)
class Cut:
    """A nodule as it was in its scan.

    Attributes:
        shape: its mask as a solid, with the HU around and in it (`Shape.hu`).
        kind, hu: by the median of what lies in its mask.
        pleura: whether it lay at a wall.
    """

    shape: Shape
    kind: str
    hu: float
    pleura: bool


@dataclass(frozen=True, eq=False)
class Cuts:
    """The nodules of a data set, by size.

    Attributes:
        digest: of the files that they are cut from.
        sources: the case of each.
        numbers: which of its case's lesions it is.
        sizes: (n,) equivalent diameters, mm.
        reading: how the cases are read.
    """

    digest: str
    sources: tuple[Source, ...]
    numbers: tuple[int, ...]
    sizes: NDArray[np.float64]
    reading: ReadingConfig


@lru_cache(maxsize=2)
def open_cuts(path: Path, reading: ReadingConfig) -> Cuts:
    """The index of a data set's nodules; reads every mask once.

    Raises:
        VoxelscaleError: no such data set, an unfit case, or no nodule of `LEAST_MM` in any.
    """
    cases = [source for source in DataSet(path=path, reading=reading).cases if source.labels]
    found = [
        (source, number, diameter)
        for source in cases
        for number, (_, diameter) in enumerate(_lesions(read_case(source, reading, empty=True)[1].mask))
        if diameter >= LEAST_MM
    ]
    if not found:
        hint = "give phantom.crops a data set with masks of nodules"
        raise VoxelscaleError(f"{path}: no lesion of at least {LEAST_MM:g} mm to cut out", hint)
    sources, numbers, sizes = zip(*found, strict=True)
    digest = digest_of([[source_stamp(source), label_stamp(source)] for source in cases])
    return Cuts(digest, sources, numbers, np.asarray(sizes, np.float64), reading)


def with_cut(nodule: Nodule, cuts: Cuts) -> Nodule:
    """The same nodule with the voxels of a real one of about its size, turned by its own numbers.

    Its diameter becomes the real one's, larger or smaller by at most `ZOOM`; a nodule that lay at a wall
    is put at the pleura, any other is not.
    """
    off = np.abs(np.log(cuts.sizes / nodule.diameter_mm))
    near = np.flatnonzero(off <= max(np.log(ZOOM), float(off.min()) + 1e-9))
    row = int(near[int(nodule.shape[23, 3] * len(near))])
    cut = cut_of(cuts.sources[row], cuts.numbers[row], cuts.reading)
    scale = float(np.clip(nodule.diameter_mm / cut.shape.diameter_mm, 1 / ZOOM, ZOOM))
    free = "vessel" if nodule.place == "pleura" else nodule.place
    return replace(
        nodule,
        diameter_mm=scale * cut.shape.diameter_mm,
        kind=cut.kind,
        margin="real",
        place="pleura" if cut.pleura else free,
        hu=cut.hu,
        posed=_pose(cut.shape, scale, nodule.shape[22]),
    )


@lru_cache(maxsize=256)
def cut_of(source: Source, number: int, reading: ReadingConfig) -> Cut:
    """One of a case's lesions, in the order of `findings.components`, with what is around it."""
    image, labels = read_case(source, reading, empty=True)
    voxels, _ = _lesions(labels.mask)[number]
    spacing = np.asarray(image.spacing)
    margin = np.ceil(MARGIN_MM / spacing).astype(int)
    low = np.maximum(voxels.min(axis=0) - margin, 0)
    high = np.minimum(voxels.max(axis=0) + margin + 1, image.array.shape)
    mask = np.zeros(high - low, np.bool_)
    mask[tuple((voxels - low).T)] = True
    hu = image.array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].astype(np.float32)
    return cut_from(hu, mask, spacing, f"{source.case}:{number + 1}")


def cut_from(hu: NDArray[np.float32], mask: NDArray[np.bool_], spacing: ArrayLike, name: str) -> Cut:
    """A nodule on a lattice of equal steps.

    Args:
        hu, mask: (z, y, x), the nodule and what is around it; where the crop ends at the nodule, as many
            do along z, the nodule ends there, too.
        spacing: mm (z, y, x).
        name: for the table of nodules.
    """
    from scipy import ndimage

    steps = np.asarray(spacing, np.float64)
    step = float(np.clip(steps.min(), FINEST_MM, COARSEST_MM))
    wide = np.pad(mask, 2)
    edt = ndimage.distance_transform_edt
    half = np.float32(steps.min() / 2)
    depth = np.where(wide, edt(wide, steps) - half, half - edt(~wide, steps)).astype(np.float32)
    counts = [max(2, round(n * s / step)) for n, s in zip(wide.shape, steps, strict=True)]
    index = np.meshgrid(
        *[np.linspace(-0.5, n - 0.5, k) for n, k in zip(wide.shape, counts, strict=True)], indexing="ij"
    )
    depth = ndimage.map_coordinates(depth, index, order=1, mode="nearest")
    # Distances between coarse slices do not enclose the mask's volume by themselves.
    volume = float(np.count_nonzero(mask)) * float(np.prod(steps))
    depth -= np.float32(level_of(depth, volume / step**3))
    inside = depth > 0
    centre = np.argwhere(inside).mean(axis=0)
    reach = step * (float(np.linalg.norm(np.argwhere(inside) - centre, axis=1).max()) + 1)
    values = ndimage.map_coordinates(np.pad(hu, 2, mode="edge"), index, order=1, mode="nearest")
    shape = Shape(depth, step, centre, sphere_diameter(volume), reach, name, values)
    median = float(np.median(hu[mask]))
    kind = "ground-glass" if median < GLASS_HU else "part-solid" if median < SOLID_HU else "solid"
    outside = edt(~mask, steps)
    shell = (outside > WALL_MM[0]) & (outside <= WALL_MM[1])
    wall = float(np.mean(hu[shell] > WALL_HU)) if shell.any() else 0.0
    return Cut(shape, kind, median, wall > WALL_SHARE)


def _lesions(mask: Scan) -> list[tuple[NDArray[np.int64], float]]:
    """The voxels and the equivalent diameter (mm) of each lesion of a mask."""
    voxel = mask.grid.voxel_mm3
    return [(v, sphere_diameter(len(v) * voxel)) for v in components(mask.array > 0)]


def _pose(shape: Shape, scale: float, draws: NDArray[np.float64]) -> Posed:
    """Turned about z, mirrored or not along z and x."""
    angle = 2 * np.pi * draws[0]
    up, side = (1 if draw < 0.5 else -1 for draw in draws[1:3])
    sine, cosine = np.sin(angle), np.cos(angle)
    turn = np.array([[0, 0, up], [sine, cosine, 0], [side * cosine, -side * sine, 0]], np.float64)
    return Posed(shape, turn / (scale * shape.step), scale)
