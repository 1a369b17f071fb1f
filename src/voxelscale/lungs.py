"""Where the lungs lie: by threshold and morphology on a coarse copy of the scan, and a check of the result.

The order of steps is the classical one (Hu et al., "Automatic lung segmentation for accurate quantitation
of volumetric X-ray CT images", 2001): threshold, air outside and airways away, close over vessels and
nodules at the pleura. Nothing is learnt, and a scan in which it fails is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxelscale.geometry import IntTriple, Scan, Triple

COARSE_MM = 2.5
"""Aimed at; a lung's border is no finer than this, which is enough to bound a search."""
DENSEST_HU = -400.0
"""Between lung (-900 to -500) and soft tissue (0 to 60)."""
GAS_HU = -940.0
"""Gas without tissue (outside, trachea, bowel) has about -1000; a healthy lung's mean is above -900."""
NARROW_MM2, WIDE_MM, COMPACT, LONG_MM = (40.0, 900.0), 45.0, 0.4, 30.0
"""An airway: its sections' areas, their edges at most, their share of their box at least; its length at
least. An adult's trachea is 13 to 27 mm wide (Breatnach et al., AJR 1984) and about 110 mm long."""
CLOSING_MM = 12.0
"""Radius of the closing: what bulges into a lung by less, or is thinner than twice it, is taken in."""
MARGIN_MM = 10.0
"""By which the box is larger than the mask."""
BODY_MARGIN_MM = 5.0
"""Air around the patient that still counts as `body_field`."""
LEAST_ML, MOST_ML = 800.0, 12_000.0
"""Both lungs of an adult or an older child, from full expiration to large and inflated."""
LEAST_SECTION_MM2 = 4000.0
"""Largest axial section at least, where the scan ends within the lungs and its volume says little."""
CROP_MM, LEAST_CROP_SHARE = 120.0, 0.05
"""A scan that is smaller along every axis is a crop: it cannot show lungs, only lung tissue, which is this
share of it at least."""
MOST_BORDER = 0.3
"""Share of the outline that may be the scan's border; a scan cropped to the lungs has less."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lungs:
    """Both lungs with what lies within them.

    Attributes:
        mask: bool (z, y, x) on the scan's grid; empty where `ok` is false.
        box: first voxel and shape (z, y, x); the whole scan where `ok` is false.
        volume_ml: of what was found, also where it was then rejected.
        ok: whether it can be lungs.
        problem: why not, or "".
    """

    mask: NDArray[np.bool_]
    box: tuple[IntTriple, IntTriple]
    volume_ml: float
    ok: bool
    problem: str

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box, as an array is indexed."""
        return tuple(slice(begin, begin + n) for begin, n in zip(*self.box, strict=True))


def lung_field(scan: Scan) -> Lungs:
    """The lungs in a chest CT, whole or cropped; 512 x 512 x 300 voxels took 0.9 s of one core.

    Of a crop smaller than `CROP_MM` along every axis it is the lung tissue.

    Tumours wider than the closing that grow out of a lung are only partly in it: the mask bounds where to
    search, it does not measure lungs.

    Args:
        scan: HU, axes running nearly as in LPS (`voxelscale.geometry.reorient`).
    """
    shape = scan.array.shape
    factors = coarse_factors(scan)
    coarse = _block_means(scan.array, factors)
    z, y, x = (s * k for s, k in zip(scan.spacing, factors, strict=True))
    spacing = (z, y, x)
    air = coarse < DENSEST_HU
    inner = air & ~_outside(coarse, air)
    crop = bool((np.asarray(shape) * scan.spacing < CROP_MM).all())
    most = 1.0 if crop else MOST_BORDER
    found = _lung_parts(coarse, inner & ~_airway(coarse, inner, spacing), spacing, most)
    mask = np.zeros_like(air)
    for part in found:
        mask |= _closed(part, spacing)
    volume = float(np.count_nonzero(mask)) * z * y * x / 1000
    if crop:
        problem = "" if mask.mean() >= LEAST_CROP_SHARE else "no aerated lung found"
    else:
        problem = _problem(mask, coarse, spacing, volume)
    if problem:
        return no_lungs(shape, problem, volume)
    fine = _blown_up(mask, factors, shape)
    return Lungs(mask=fine, box=_box(mask, factors, scan), volume_ml=volume, ok=True, problem="")


def no_lungs(shape: IntTriple, problem: str, volume: float = 0.0) -> Lungs:
    """Of a scan in which no lungs are searched for, or none were found."""
    box = ((0, 0, 0), shape)
    return Lungs(mask=np.zeros(shape, bool), box=box, volume_ml=volume, ok=False, problem=problem)


def body_field(scan: Scan) -> NDArray[np.bool_]:
    """Everything but the air around the patient, and `BODY_MARGIN_MM` of it; bool (z, y, x).

    Args:
        scan: HU, axes running nearly as in LPS.
    """
    from scipy import ndimage

    shape = scan.array.shape
    factors = coarse_factors(scan)
    coarse = _block_means(scan.array, factors)
    inside = ~_outside(coarse, coarse < DENSEST_HU)
    reach = [round(BODY_MARGIN_MM / (s * k)) for s, k in zip(scan.spacing, factors, strict=True)]
    for axis, blocks in enumerate(reach):
        # The largest of each neighbourhood, axis by axis: a box grown round every block.
        inside = ndimage.maximum_filter1d(inside, 2 * blocks + 1, axis=axis)
    return _blown_up(inside, factors, shape)


def coarse_factors(scan: Scan) -> list[int]:
    """Voxels along (z, y, x) that together are about `COARSE_MM` long."""
    return [
        max(1, min(n, round(COARSE_MM / s))) for n, s in zip(scan.array.shape, scan.spacing, strict=True)
    ]


def _block_means(array: NDArray[np.generic], factors: list[int]) -> NDArray[np.float32]:
    """Means of blocks of `factors` voxels, HU cut to [-1024, 3071]; the last block may be incomplete."""
    counts = [-(-n // k) for n, k in zip(array.shape, factors, strict=True)]
    planes = []
    for first in range(0, array.shape[0], factors[0]):
        slab = np.clip(array[first : first + factors[0]].mean(axis=0, dtype=np.float32), -1024, 3071)
        missing = [(0, c * k - n) for c, k, n in zip(counts[1:], factors[1:], slab.shape, strict=True)]
        slab = np.pad(slab, missing, mode="edge")
        planes.append(slab.reshape(counts[1], factors[1], counts[2], factors[2]).mean(axis=(1, 3)))
    return np.stack(planes).astype(np.float32, copy=False)


def _outside(hu: NDArray[np.float32], air: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Air around the body: in each axial slice what touches its border and is gas through and through.

    Lungs that a cropped scan cuts off touch the border, too, but hold tissue.
    """
    labels, count = _label_slices(air)
    edge = np.zeros(count + 1, bool)
    for face in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        edge[face] = True
    edge[0] = False
    outside: NDArray[np.bool_] = (edge & (_means(hu, labels, count) < GAS_HU))[labels]
    return outside


def _airway(hu: NDArray[np.float32], inner: NDArray[np.bool_], spacing: Triple) -> NDArray[np.bool_]:
    """Trachea and main bronchi: narrow, compact sections of gas that continue over several centimetres."""
    from scipy import ndimage

    def edges(box: tuple[slice, ...]) -> list[float]:
        return [(side.stop - side.start) * step for side, step in zip(box, spacing, strict=True)]

    sections, count = _label_slices(inner & (hu < GAS_HU))
    areas = np.bincount(sections.ravel(), minlength=count + 1) * spacing[1] * spacing[2]
    narrow = (areas > NARROW_MM2[0]) & (areas < NARROW_MM2[1])
    narrow[0] = False
    for number, box in enumerate(ndimage.find_objects(sections), start=1):
        if narrow[number]:
            _, height, width = edges(box)
            compact = areas[number] > COMPACT * height * width
            narrow[number] = max(height, width) < WIDE_MM and compact
    tubes, _ = ndimage.label(narrow[sections])
    boxes = enumerate(ndimage.find_objects(tubes), start=1)
    long = [number for number, box in boxes if edges(box)[0] >= LONG_MM]
    if not long:
        return np.zeros_like(inner)
    airway: NDArray[np.bool_] = np.isin(tubes, long)
    # The wall's blurred side, too.
    return _dilated(airway, 1.5 * max(spacing[1:]), spacing) & inner


def _lung_parts(
    hu: NDArray[np.float32], inner: NDArray[np.bool_], spacing: Triple, most_border: float
) -> list[NDArray[np.bool_]]:
    """The large pieces that are aerated tissue, not gas, as masks."""
    from scipy import ndimage

    labels, count = ndimage.label(inner)
    if not count:
        return []
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    parts: list[NDArray[np.bool_]] = []
    for number in np.argsort(-sizes)[: min(count, 12)]:
        part = labels == number
        if parts and sizes[number] < 0.1 * np.count_nonzero(parts[0]):
            break
        core = ndimage.binary_erosion(part)
        # A blanket, or air blurred by a table, is no gas by its mean, but lies along the border.
        if core.any() and np.median(hu[core]) > GAS_HU and _border_share(part) <= most_border:
            parts.append(part)
    return parts


def _closed(part: NDArray[np.bool_], spacing: Triple) -> NDArray[np.bool_]:
    """A part after a closing by a ball of `CLOSING_MM`, its holes filled.

    Both halves by distances: dilated is what lies within the radius of the part, and of that the erosion
    keeps what lies farther than the radius from what is outside.
    """
    from scipy import ndimage

    pad = [int(np.ceil(CLOSING_MM / s)) + 1 for s in spacing]
    box = ndimage.find_objects(part.astype(np.int8))[0]
    cut = np.pad(part[box], [(p, p) for p in pad])
    dilated = _dilated(cut, CLOSING_MM, spacing)
    eroded = ndimage.distance_transform_edt(dilated, sampling=spacing) > CLOSING_MM
    inside = tuple(slice(p, -p) for p in pad)
    closed = np.zeros_like(part)
    closed[box] = ndimage.binary_fill_holes(cut | eroded)[inside]
    return closed


def _dilated(mask: NDArray[np.bool_], radius: float, spacing: Triple) -> NDArray[np.bool_]:
    """By a ball of a radius in mm."""
    from scipy import ndimage

    dilated: NDArray[np.bool_] = ndimage.distance_transform_edt(~mask, sampling=spacing) <= radius
    return dilated


def _problem(mask: NDArray[np.bool_], hu: NDArray[np.float32], spacing: Triple, volume: float) -> str:
    """Why it cannot be the lungs, or ""."""
    if not mask.any():
        return "no aerated lung found"
    size = np.asarray(mask.shape) * spacing
    extent = [np.ptp(np.flatnonzero(mask.any(axis=others))) + 1 for others in ((1, 2), (0, 2), (0, 1))]
    cut_off = bool(mask[0].any() or mask[-1].any())
    section = float(mask.sum(axis=(1, 2)).max()) * spacing[1] * spacing[2]
    if volume > MOST_ML or (volume < LEAST_ML and not (cut_off and section >= LEAST_SECTION_MM2)):
        return f"a volume of {volume:.0f} ml"
    # Of a scan that ends in the lungs the height says nothing.
    edges = np.asarray(extent[cut_off:]) * spacing[cut_off:]
    if edges.max() > 4 * edges.min():
        return f"a shape {edges.max() / edges.min():.1f} times as long as wide"
    if (border := _border_share(mask)) > MOST_BORDER:
        return f"{100 * border:.0f} % of its outline is the scan's border"
    tissue = hu > -200
    if not tissue.any():
        return "no soft tissue around it"
    middle = float(np.average(np.arange(mask.shape[2]), weights=tissue.sum(axis=(0, 1))))
    columns = mask.sum(axis=(0, 1))
    sides = sorted((int(columns[: round(middle)].sum()), int(columns[round(middle) :].sum())))
    if sides[0] < 0.08 * sides[1]:
        return "only one side of the body"
    centre = np.argwhere(mask.any(axis=0)).mean(axis=0) * spacing[1:]
    if (np.abs(centre - size[1:] / 2) > 0.3 * size[1:]).any():
        return "it lies at the scan's edge"
    return ""


def _border_share(mask: NDArray[np.bool_]) -> float:
    """How much of the axial sections' outline is cut off by the scan's own border."""
    faces = (mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1])
    padded = np.pad(mask, [(0, 0), (1, 1), (1, 1)])
    kept = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    outline = np.count_nonzero(mask & ~kept)
    return sum(int(np.count_nonzero(face)) for face in faces) / max(1, int(outline))


def _label_slices(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """4-connected components of every axial slice, numbered from 1 over all of them."""
    from scipy import ndimage

    flat = np.zeros((3, 3, 3), bool)
    flat[1] = ndimage.generate_binary_structure(2, 1)
    labels, count = ndimage.label(mask, flat)
    return labels, int(count)


def _means(hu: NDArray[np.float32], labels: NDArray[np.int32], count: int) -> NDArray[np.float64]:
    flat = labels.ravel()
    sums = np.bincount(flat, weights=hu.ravel(), minlength=count + 1)
    return np.asarray(sums / np.maximum(1, np.bincount(flat, minlength=count + 1)))


def _blown_up(mask: NDArray[np.bool_], factors: list[int], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    for axis in (2, 1, 0):
        mask = mask.repeat(factors[axis], axis=axis) if factors[axis] > 1 else mask
    z, y, x = shape
    return np.ascontiguousarray(mask[:z, :y, :x])


def _box(mask: NDArray[np.bool_], factors: list[int], scan: Scan) -> tuple[IntTriple, IntTriple]:
    """The mask's box in the scan's voxels with its margin, within the scan."""
    starts, sizes = [], []
    for axis, (factor, step, n) in enumerate(zip(factors, scan.spacing, scan.array.shape, strict=True)):
        there = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = int(np.ceil(MARGIN_MM / step))
        low = max(0, int(there[0]) * factor - margin)
        high = min(n, (int(there[-1]) + 1) * factor + margin)
        starts.append(low)
        sizes.append(high - low)
    return (starts[0], starts[1], starts[2]), (sizes[0], sizes[1], sizes[2])
