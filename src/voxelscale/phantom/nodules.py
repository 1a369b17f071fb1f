"""Nodules: kinds, margins and places after the Fleischner Society's terms (Hansell et al. 2008)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from voxelscale.phantom.canvas import Canvas, Field, Point
from voxelscale.phantom.contours import Library, Posed, choose, pose, read_outlines, shape_of
from voxelscale.phantom.vessels import Tree

KINDS = ("solid", "part-solid", "ground-glass")
KIND_SHARES = (0.7, 0.15, 0.15)
MARGINS = ("smooth", "lobulated", "spiculated")
MARGIN_SHARES = (0.4, 0.35, 0.25)
PLACES = ("free", "vessel", "pleura")
PLACE_SHARES = (0.45, 0.3, 0.25)


@dataclass(frozen=True, kw_only=True)
class Nodule:
    """One nodule.

    Attributes:
        centre: (x, y, z), LPS mm.
        diameter_mm: of the sphere of its volume, before the lung's surface cuts it; lobes and spicules make
            the volume somewhat smaller than that.
        kind, margin, place: one of `KINDS`, `MARGINS` (or ``contour``), `PLACES`.
        hu: of its solid part, or of the ground glass where it has none.
        shape: its outline's own random numbers.
        posed: a reader's outline, of which `centre` is the centroid, instead of a drawn one.
    """

    centre: Point
    diameter_mm: float
    kind: str
    margin: str
    place: str
    hu: float
    shape: NDArray[np.float64]
    posed: Posed | None = None

    @property
    def reach_mm(self) -> float:
        """No point of it is farther from its centre, mm."""
        drawn = 1.1 * self.diameter_mm
        return drawn if self.posed is None else max(drawn, self.posed.scale * self.posed.shape.reach_mm)

    def at(self, centre: Point) -> Nodule:
        """The same nodule elsewhere."""
        return replace(self, centre=np.asarray(centre, np.float64))


def draw_nodules(
    random: np.random.Generator,
    canvas: Canvas,
    lung: Field,
    trees: Sequence[Tree],
    count: int,
    diameters: tuple[float, float],
) -> list[Nodule]:
    """`count` nodules that do not touch; fewer if they do not fit into the lungs."""
    nodules: list[Nodule] = []
    for _ in range(count):
        low, high = np.log(diameters)
        diameter = float(np.exp(random.uniform(low, high)))
        place = str(random.choice(PLACES, p=PLACE_SHARES))
        # A place near the surface or a vessel may not exist for a size; a free one nearly always.
        for where in (place, "free"):
            centre = _find_place(random, canvas, lung, trees, diameter / 2, where, nodules)
            if centre is not None:
                nodules.append(draw_nodule(random, centre, diameter, where))
                break
    return nodules


def draw_nodule(random: np.random.Generator, centre: Point, diameter: float, place: str) -> Nodule:
    """A nodule of this size and place: its kind, margin, density and outline."""
    # Below 5 mm lobes and spicules are invisible, and ground glass is below what CT shows.
    small = diameter < 5
    kind = "solid" if small else str(random.choice(KINDS, p=KIND_SHARES))
    margin = "smooth" if small else str(random.choice(MARGINS, p=MARGIN_SHARES))
    if kind == "ground-glass":
        hu = random.uniform(-680, -450)
    else:
        hu = random.uniform(150, 400) if random.random() < 0.1 else random.uniform(10, 70)
    return Nodule(
        centre=centre,
        diameter_mm=diameter,
        kind=kind,
        margin=margin,
        place=place,
        hu=float(hu),
        shape=random.random((24, 4)),
    )


def _find_place(
    random: np.random.Generator,
    canvas: Canvas,
    lung: Field,
    trees: Sequence[Tree],
    radius: float,
    place: str,
    others: Sequence[Nodule],
) -> Point | None:
    """A centre for which `place` holds and that keeps clear of the other nodules."""
    if place == "vessel":
        # Vessels thinner than the nodule, or it would hide in them.
        candidates = np.concatenate(
            [t.points[(t.radii > 0.6) & (t.radii < max(0.8 * radius, 0.8))] for t in trees]
        )
        candidates = candidates + radius * 0.8 * directions(random, len(candidates))
        depths = _depth_at(canvas, lung, candidates)
        candidates = candidates[depths > radius + 1]
    else:
        low, high = (0.2 * radius, 0.75 * radius) if place == "pleura" else (radius + 3, np.inf)
        flat = random.integers(0, lung.size, 20_000)
        flat = flat[(lung.ravel()[flat] > low) & (lung.ravel()[flat] < high)]
        candidates = canvas.grid.index_to_mm(np.stack(np.unravel_index(flat, lung.shape), axis=1))
    random.shuffle(candidates)
    for centre in candidates[:200]:
        gaps = [np.linalg.norm(centre - o.centre) - radius - o.diameter_mm / 2 for o in others]
        if min(gaps, default=np.inf) > 6:
            return np.asarray(centre, np.float64)
    return None


def nodule_shares(
    canvas: Canvas, lung: Field, nodule: Nodule
) -> tuple[tuple[slice, slice, slice], Field, Field]:
    """The box of a nodule, and in it the part of each voxel that is nodule, and that is solid core."""
    reach = nodule.reach_mm + 4
    box = canvas.box(nodule.centre - reach, nodule.centre + reach)
    offsets = canvas.offsets(box, nodule.centre)
    depth = outline(nodule, offsets)
    # At the pleura the nodule flattens against the chest wall.
    whole = canvas.share(np.minimum(depth, lung[box] + 0.5))
    if nodule.kind == "part-solid":
        core = canvas.share(depth - (0.2 + 0.2 * nodule.shape[0, 3]) * nodule.diameter_mm / 2) * whole
    else:
        core = whole if nodule.kind == "solid" else np.zeros_like(whole)
    return box, whole, core


def with_outline(nodule: Nodule, library: Library) -> Nodule:
    """The same nodule with a reader's outline of about its size, chosen and turned by its own numbers."""
    row = choose(library, nodule.diameter_mm, nodule.shape[23, 3])
    shape = shape_of(read_outlines(library, row))
    posed = pose(shape, nodule.diameter_mm, nodule.shape[22])
    return replace(nodule, margin="contour", posed=posed)


def outline(nodule: Nodule, offsets: tuple[Field, Field, Field]) -> Field:
    """Distance inward from the surface (mm) at x, y and z in mm from the centre.

    A reader's outline, or an ellipsoid, with lobes or spicules where it has them.
    """
    if nodule.posed is not None:
        return nodule.posed.depth(offsets)
    radius, draws = nodule.diameter_mm / 2, nodule.shape
    stretch = 0.85 + 0.3 * draws[0, :3]
    stretch /= np.cbrt(stretch.prod())
    body = radius * {"smooth": 1.0, "lobulated": 0.86, "spiculated": 0.95}[nodule.margin]
    dx, dy, dz = (o / np.float32(s) for o, s in zip(offsets, stretch, strict=True))
    depth = body - np.sqrt(dx**2 + dy**2 + dz**2)
    if nodule.margin == "lobulated":
        for lobe in draws[1 : 4 + int(4 * draws[0, 3])]:
            cx, cy, cz = 0.62 * radius * _direction(lobe)
            size = radius * (0.45 + 0.2 * lobe[2])
            depth = np.maximum(depth, size - np.sqrt((dx - cx) ** 2 + (dy - cy) ** 2 + (dz - cz) ** 2))
    if nodule.margin == "spiculated":
        for spike in draws[1 : 9 + int(10 * draws[0, 3])]:
            ux, uy, uz = _direction(spike)
            along = dx * ux + dy * uy + dz * uz
            away = np.sqrt(np.clip(dx**2 + dy**2 + dz**2 - along**2, 0, None))
            length = radius * (1.35 + 0.75 * spike[2])
            thick = (0.5 + 0.05 * radius) * np.clip(1.6 - along / length, 0, 1)
            depth = np.maximum(depth, np.minimum(thick - away, np.minimum(along, length - along)))
    return np.asarray(depth, np.float32)


def _direction(draw: NDArray[np.float64]) -> Point:
    z, angle = 2 * draw[0] - 1, 2 * np.pi * draw[1]
    r = np.sqrt(1 - z * z)
    return np.array([r * np.cos(angle), r * np.sin(angle), z])


def directions(random: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Unit vectors (count, 3), all directions equally likely."""
    vectors = random.normal(size=(count, 3))
    unit: NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _depth_at(canvas: Canvas, lung: Field, points: NDArray[np.float64]) -> Field:
    index = np.rint(canvas.grid.mm_to_index(points)).astype(int)
    index = np.clip(index, 0, np.asarray(lung.shape) - 1)
    depths: Field = lung[tuple(index.T)]
    return depths
