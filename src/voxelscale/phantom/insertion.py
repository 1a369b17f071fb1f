"""Nodules put into real scans: the truth about them is known exactly, all around them is real.

A copy of a scan is a pure function of (seed, case's name, copy). Every voxel beyond the nodules keeps
its value, and within them the scan keeps its noise: what is added is the difference that the tissue
makes, shared out where a voxel is nodule only in part.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.config import PhantomConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.findings import components
from voxelscale.geometry import Grid, Scan
from voxelscale.lungs import Lungs, lung_field
from voxelscale.phantom import Phantom
from voxelscale.phantom.canvas import Field, Point
from voxelscale.phantom.contours import open_library
from voxelscale.phantom.cuts import Cuts, with_cut
from voxelscale.phantom.nodules import (
    PLACE_SHARES,
    PLACES,
    Nodule,
    directions,
    draw_nodule,
    outline,
    with_outline,
)
from voxelscale.randomness import generator

NODULES, GRAIN = 0, 1
"""Streams of one copy's random numbers."""

FINE_MM = 0.5
"""A voxel is cut into parts of at most this size to see how much of it is nodule."""
BLUR_MM = 0.6
"""Standard deviation of a scanner's point spread within a slice; that of soft to standard kernels."""
FADE_MM = 1.4
"""Over this width a real nodule's HU pass into the scan's; outlines of readers are no sharper."""
VESSEL_HU = 100.0
"""By which the scan must be denser than a real nodule's voxel to show through it."""
COARSE_MM = 2.0
"""Depths within the lungs are only needed to choose places, on voxels of about this size."""
AERATED_HU = -400.0
"""What is below is lung; separates parts near the lung's border from the chest wall."""
DENSE_HU = -500.0
"""What is above, deep in a lung, is a vessel or another thing to lean on."""
WALL_MM = 5.0
"""The lungs' mask is this exact: deeper than this all of it is lung, vessels included."""
MOST_DENSE = {"free": 0.1, "vessel": 0.35, "pleura": 0.35}
"""Share of a nodule that may have been dense before, by its place."""
TRIES = 300
"""Maximum number of places that are tried for one nodule."""
MORE_TRIES = 8
"""Nodules of other sizes that are tried if none of the requested ones fits."""


@dataclass(frozen=True, eq=False)
class _Chest:
    """What is needed to find places: the scan as it was, and how deep in the lungs a coarse voxel is."""

    hu: NDArray[Any]
    lesion: NDArray[np.bool_]
    grid: Grid
    lungs: Lungs
    coarse: Grid
    depth: Field


def copy_with_nodules(
    case: str,
    image: Scan,
    lesion: Scan,
    config: PhantomConfig,
    copy: int,
    cuts: Cuts | None = None,
) -> Phantom:
    """A scan with `config.nodules` nodules more in its lungs, clear of each other and of its lesions.

    Args:
        case: the scan's name, which chooses the random numbers together with `config.seed` and `copy`.
        image: HU, axes running nearly as in LPS (`voxelscale.geometry.reorient`).
        lesion: its own lesions on the same grid, not 0 where there is one.
        config: number, diameters, outlines, seed; the rest of it does not matter here.
        copy: from 1 on; 0 is the scan as it is.
        cuts: real nodules to put in instead of synthetic ones (`config.crops`).

    Returns:
        the image on the scan's own grid, of its own dtype; 1 in the label where at least half of a voxel is
        nodule, or was a lesion before; the nodules that were put in.

    Raises:
        VoxelscaleError: no lungs are found in it, or no nodule fits into them.
    """
    array, mask = image.array.copy(), (lesion.array != 0).astype(np.uint8)
    done: list[Nodule] = []
    if copy:
        key = int.from_bytes(hashlib.sha256(case.encode()).digest()[:7], "big") ^ config.seed
        random, grain = generator(key, copy, NODULES), generator(key, copy, GRAIN)
        chest = _look_at(case, image, mask != 0)
        count = int(random.integers(config.nodules[0], config.nodules[1], endpoint=True))
        for tried in range(count + MORE_TRIES):
            # Fewer nodules than requested may fit, but a copy without any is an error.
            if tried < count or (count and not done):
                nodule = _insert_one(random, grain, chest, config, cuts, done, array, mask)
                done += [nodule] if nodule is not None else []
        if count and not done:
            hint = "smaller ones may fit: phantom.diameter_mm"
            raise VoxelscaleError(f"{case}: no place for a nodule in its lungs", hint)
    return Phantom(Scan(array, image.affine), Scan(mask, image.affine), tuple(done))


def _look_at(case: str, image: Scan, lesion: NDArray[np.bool_]) -> _Chest:
    from scipy import ndimage

    lungs = lung_field(image)
    if not lungs.ok:
        raise VoxelscaleError(f"{case}: no lungs found ({lungs.problem})", "give scans of whole chests")
    factors = [max(1, round(COARSE_MM / s)) for s in image.spacing]
    coarse = lungs.mask[tuple(slice(k // 2, None, k) for k in factors)]
    affine = image.affine.copy()
    affine[:3, 3] = image.grid.index_to_mm([k // 2 for k in factors])
    affine[:3, :3] = affine[:3, :3] * factors
    z, y, x = coarse.shape
    grid = Grid((z, y, x), affine)
    # A nodule that the scan's border would cut is none whose size is known.
    depth = ndimage.distance_transform_edt(np.pad(coarse, 1), grid.spacing)[1:-1, 1:-1, 1:-1]
    return _Chest(image.array, lesion, image.grid, lungs, grid, depth.astype(np.float32))


def _insert_one(
    random: np.random.Generator,
    grain: np.random.Generator,
    chest: _Chest,
    config: PhantomConfig,
    cuts: Cuts | None,
    others: list[Nodule],
    array: NDArray[Any],
    mask: NDArray[np.uint8],
) -> Nodule | None:
    """Draw a nodule, find a place, change image and mask there; None where there is no place."""
    low, high = np.log(config.diameter_mm)
    diameter = float(np.exp(random.uniform(low, high)))
    wanted = str(random.choice(PLACES, p=PLACE_SHARES))
    # As in a phantom: a place near the surface or a vessel may not exist for a size.
    for place in dict.fromkeys((wanted, "free")):
        nodule = draw_nodule(random, np.zeros(3), diameter, place)
        if config.shapes:
            nodule = with_outline(nodule, open_library(Path(config.shapes)))
        if cuts is not None:
            nodule = with_cut(nodule, cuts)
        size = nodule.diameter_mm
        for centre in _centres(random, chest, size / 2, nodule.place):
            if min((_gap(centre, size, other) for other in others), default=np.inf) < 6:
                continue
            placed = nodule.at(centre)
            part = _part_of(chest, placed) if _promises(chest, placed) else None
            if part is not None:
                _paint(grain, chest, placed, part, array)
                mask[part.box][part.mask] = 1
                return placed
    return None


def _gap(centre: Point, diameter: float, other: Nodule) -> float:
    return float(np.linalg.norm(centre - other.centre)) - diameter / 2 - other.diameter_mm / 2


def _centres(random: np.random.Generator, chest: _Chest, radius: float, place: str) -> NDArray[np.float64]:
    """Up to `TRIES` centres (x, y, z) in mm for which `place` may hold."""
    depth = chest.depth
    if place == "pleura":
        where = (depth > 0.2 * radius) & (depth < max(0.75 * radius, 0.2 * radius + COARSE_MM))
    else:
        where = depth > radius + (3 if place == "free" else 1)
    flat = np.flatnonzero(where)
    if not len(flat):
        return np.zeros((0, 3))
    if place == "vessel":
        return _beside_vessels(random, chest, flat, radius)
    index = np.stack(np.unravel_index(random.choice(flat, TRIES), where.shape), axis=1)
    return chest.coarse.index_to_mm(index + random.uniform(-0.5, 0.5, index.shape))


def _beside_vessels(
    random: np.random.Generator, chest: _Chest, flat: NDArray[np.int64], radius: float
) -> NDArray[np.float64]:
    """Points at 0.8 radii from something dense that is smaller than the nodule."""
    index = np.stack(np.unravel_index(random.choice(flat, 20 * TRIES), chest.depth.shape), axis=1)
    points = chest.coarse.index_to_mm(index)
    voxels = np.rint(chest.grid.mm_to_index(points)).astype(int)
    dense = chest.hu[tuple(voxels.T)] > DENSE_HU
    points = points[dense & ~chest.lesion[tuple(voxels.T)]][:TRIES]
    beside: NDArray[np.float64] = points + 0.8 * radius * directions(random, len(points))
    return beside


def _promises(chest: _Chest, nodule: Nodule) -> bool:
    """A quick check of points within the nodule's sphere, before the whole of it is computed."""
    rays = directions(np.random.default_rng(0), 96) * np.linspace(0.2, 1, 96)[:, None] ** (1 / 3)
    points = nodule.centre + rays * nodule.diameter_mm / 2
    voxels = np.rint(chest.grid.mm_to_index(points)).astype(int)
    if (voxels < 0).any() or (voxels >= chest.grid.shape).any():
        return False
    places = tuple(voxels.T)
    # Noise makes some of it look dense; what is at the pleura lies partly in the wall.
    most = 0.6 if nodule.place == "pleura" else MOST_DENSE[nodule.place] + 0.1
    return not chest.lesion[places].any() and float(np.mean(chest.hu[places] > DENSE_HU)) < most


@dataclass(frozen=True, eq=False)
class _Part:
    """A nodule on the scan's voxels.

    Attributes:
        box: the voxels around it.
        whole, core: the share of each voxel in [0, 1] that is nodule, and that is solid core; of a real
            nodule the share of its own HU.
        mask: those that count as nodule.
        hu: the HU of a real nodule.
    """

    box: tuple[slice, slice, slice]
    whole: Field
    core: Field
    mask: tuple[NDArray[np.int64], ...]
    hu: Field | None = None


def _part_of(chest: _Chest, nodule: Nodule) -> _Part | None:
    """The nodule at its place; None where that does not do: outside the scan, on a lesion, in a vessel."""
    box = _box(chest.grid, nodule)
    if box is None:
        return None
    whole, core, hu = _shares(chest.grid, nodule, box)
    if _is_cut(chest.grid, box, whole):
        return None
    calm = _calm(chest.hu[box])
    lung = _lung_depth(chest, box, calm)
    # At the pleura the nodule flattens against the chest wall.
    free = np.clip(0.5 + (lung + 0.5) / np.float32(np.mean(chest.grid.spacing)), 0, 1)
    cut = whole * free
    if nodule.place != "pleura" and cut.sum() < 0.98 * whole.sum():
        return None
    if cut.sum() < 0.5 * whole.sum() or _crowded(chest, box, cut, calm, nodule):
        return None
    pieces = components(cut >= 0.5)
    if not pieces:
        return None
    # A spicule's tip that shows up again a slice further on is not a lesion of its own.
    largest = max(pieces, key=len)
    return _Part(box, cut, core * free, tuple(largest.T), hu)


def _box(grid: Grid, nodule: Nodule) -> tuple[slice, slice, slice] | None:
    """The voxels within reach of a nodule, with a margin for the blur; None where its centre is outside."""
    reach = nodule.reach_mm + 4 * BLUR_MM
    # Along a skew axis a ball reaches farther than its radius over the spacing.
    steps = reach * np.linalg.norm(np.linalg.inv(grid.affine[:3, :3]), axis=1)
    centre = grid.mm_to_index(nodule.centre)
    first, last = np.floor(centre - steps).astype(int), np.ceil(centre + steps).astype(int) + 1
    if (centre < 0).any() or (centre > np.asarray(grid.shape) - 1).any():
        return None
    first, last = np.maximum(first, 0), np.minimum(last, grid.shape)
    z, y, x = (slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
    return z, y, x


def _is_cut(grid: Grid, box: tuple[slice, slice, slice], whole: Field) -> bool:
    """Whether the scan ends within the nodule."""
    return any(
        (axis.start == 0 and whole.take(0, number).any())
        or (axis.stop == n and whole.take(-1, number).any())
        for number, (axis, n) in enumerate(zip(box, grid.shape, strict=True))
    )


def _shares(
    grid: Grid, nodule: Nodule, box: tuple[slice, slice, slice]
) -> tuple[Field, Field, Field | None]:
    """The share of each voxel of a box that is nodule, and that is solid: means over its finer parts.

    Of a real nodule the second is the share of its own HU, which fades over its surface; the third is these
    HU.
    """
    starts, shape = [axis.start for axis in box], tuple(axis.stop - axis.start for axis in box)
    window = grid.window(starts, shape)
    parts = [max(1, int(np.ceil(s / FINE_MM))) for s in grid.spacing]
    edge = np.float32(np.prod([s / n for s, n in zip(grid.spacing, parts, strict=True)]) ** (1 / 3))
    index = np.moveaxis(np.indices(shape), 0, -1)
    middle = (window.index_to_mm(index) - nodule.centre).astype(np.float32)
    inner = np.float32((0.2 + 0.2 * nodule.shape[0, 3]) * nodule.diameter_mm / 2)
    whole, core = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    posed = nodule.posed if nodule.posed is not None and nodule.posed.shape.hu is not None else None
    hu = np.zeros(shape, np.float32) if posed is not None else None
    for part in np.ndindex(*parts):
        shift = (np.asarray(part) + 0.5) / parts - 0.5
        x, y, z = np.moveaxis(middle + (grid.affine[:3, :3] @ shift).astype(np.float32), -1, 0)
        depth = outline(nodule, (x, y, z))
        whole += np.clip(0.5 + depth / edge, 0, 1)
        if hu is not None and posed is not None:
            core += np.clip(0.5 + depth / np.float32(FADE_MM), 0, 1)
            hu += posed.hu((x, y, z))
        elif nodule.kind == "part-solid":
            core += np.clip(0.5 + (depth - inner) / edge, 0, 1)
    count = np.float32(np.prod(parts))
    if nodule.kind == "solid" and hu is None:
        core = whole
    whole, core = np.asarray(whole / count, np.float32), np.asarray(core / count, np.float32)
    return whole, core, None if hu is None else np.asarray(hu / count, np.float32)


def _lung_depth(chest: _Chest, box: tuple[slice, slice, slice], calm: Field) -> Field:
    """Signed distance inward from the lung's surface in a box, mm: what is aerated, and all deep in it."""
    from scipy import ndimage

    mask, spacing = chest.lungs.mask[box], chest.grid.spacing
    deep = ndimage.distance_transform_edt(mask, spacing) > WALL_MM
    inside = mask & ((calm < AERATED_HU) | deep)
    depth = ndimage.distance_transform_edt(inside, spacing) - ndimage.distance_transform_edt(
        ~inside, spacing
    )
    return np.asarray(depth, np.float32)


def _crowded(
    chest: _Chest, box: tuple[slice, slice, slice], whole: Field, calm: Field, nodule: Nodule
) -> bool:
    """Whether a lesion lies there or next to it, or so much dense tissue that it would be invisible."""
    from scipy import ndimage

    near = ndimage.binary_dilation(whole > 0, iterations=2)
    if (chest.lesion[box] & near).any():
        return True
    dense = float((whole * (calm > DENSE_HU)).sum() / whole.sum())
    return dense > MOST_DENSE[nodule.place]


def _calm(hu: NDArray[Any]) -> Field:
    """The scan without its noise, edges kept: bilateral filter in slices (Tomasi and Manduchi 1998)."""
    values = hu.astype(np.float32)
    padded = np.pad(values, ((0, 0), (2, 2), (2, 2)), mode="edge")
    total, weights = np.zeros_like(values), np.zeros_like(values)
    rows, columns = values.shape[1:]
    for dy in range(5):
        for dx in range(5):
            other = padded[:, dy : dy + rows, dx : dx + columns]
            apart2 = (dy - 2) ** 2 + (dx - 2) ** 2
            # Noise in lungs is far below 150 HU, a vessel's edge far above.
            weight = np.exp(-apart2 / np.float32(4.5) - ((other - values) / np.float32(150)) ** 2 / 2)
            total += weight * other
            weights += weight
    return total / weights


def _paint(
    random: np.random.Generator, chest: _Chest, nodule: Nodule, part: _Part, array: NDArray[Any]
) -> None:
    """Make the tissue of a nodule's voxels as dense as it is; it never makes anything less dense."""
    from scipy import ndimage

    spacing = chest.grid.spacing
    before = array[part.box]
    calm = _calm(before)
    if part.hu is not None:
        # A vessel that is denser than the nodule runs on through it.
        added = part.core * np.where(calm > part.hu + VESSEL_HU, 0, part.hu - before)
        array[part.box] = _as_stored(before + added, array.dtype)
        return
    grain = ndimage.gaussian_filter(
        random.standard_normal(before.shape, dtype=np.float32), [2 / s for s in spacing]
    )
    grain /= max(float(grain.std()), 1e-6)
    # Along the slices' axis the mean over a voxel is the scanner's slice profile already.
    blur = (0.0, BLUR_MM / spacing[1], BLUR_MM / spacing[2])
    added = np.zeros(before.shape, np.float32)
    if nodule.kind != "solid":
        glass = (nodule.hu if nodule.kind == "ground-glass" else -560) + 30 * grain
        added = ndimage.gaussian_filter(part.whole, blur) * np.maximum(glass - calm, 0)
    if nodule.kind != "ground-glass":
        solid = nodule.hu + 8 * grain
        added += ndimage.gaussian_filter(part.core, blur) * np.maximum(solid - calm - added, 0)
    array[part.box] = _as_stored(before + added, array.dtype)


def _as_stored(hu: Field, dtype: np.dtype[Any]) -> NDArray[Any]:
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        hu = np.clip(np.rint(hu), limits.min, limits.max)
    return hu.astype(dtype)
