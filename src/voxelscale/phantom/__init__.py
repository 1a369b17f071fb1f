"""Synthetic chest CTs that are hard in the ways real ones are.

A case is a pure function of (seed, case): the same numbers on any machine, in any order. `dataset`
writes them as ordinary CT files, so that everything after takes the path of real scans; `insertion`
puts their nodules into real scans.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxelscale.config import PhantomConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.findings import components
from voxelscale.geometry import Grid, Scan
from voxelscale.phantom import anatomy
from voxelscale.phantom.canvas import Canvas, Field
from voxelscale.phantom.contours import open_library
from voxelscale.phantom.nodules import Nodule, draw_nodules, nodule_shares, with_outline
from voxelscale.phantom.vessels import Tree, grow
from voxelscale.randomness import generator

ANATOMY, VESSELS, LESIONS, NOISE = 0, 1, 2, 3
"""Streams of one case's random numbers."""

TERMINALS = 450
"""Twigs of one of a lung's two vessel trees; with the thinnest radius they make its root about 4.5 mm."""


@dataclass(frozen=True, eq=False)
class Phantom:
    """A scan with synthetic nodules, and the truth about it.

    Attributes:
        image: HU, (z, y, x); int16 where all of it is synthetic.
        label: 1 where at least half of a voxel is nodule, (z, y, x) uint8; one component a nodule.
        nodules: those that have at least one such voxel.
    """

    image: Scan
    label: Scan
    nodules: tuple[Nodule, ...]


def make_phantom(config: PhantomConfig, case: int) -> Phantom:
    """The phantom of this number, from 0 on; `config.cases` and `config.format` do not shape it."""
    random = generator(config.seed, case, ANATOMY)
    canvas = Canvas(_grid(config, random))
    chest = anatomy.draw_chest(random, config.size_mm)
    texture = _texture(random, canvas.grid, 9.0)
    body, cage = anatomy.body_depth(chest, canvas), anatomy.cage_depth(chest, canvas)
    lung = anatomy.lung_depth(chest, canvas, cage)
    anatomy.paint_table(canvas, chest)
    anatomy.paint_soft_tissue(chest, canvas, body, cage, texture)
    anatomy.paint_bones(chest, canvas, cage, body)
    trees = _paint_lungs(canvas, chest, lung, texture, generator(config.seed, case, VESSELS))

    lesions = generator(config.seed, case, LESIONS)
    count = int(lesions.integers(config.nodules[0], config.nodules[1], endpoint=True))
    label = np.zeros(canvas.grid.shape, np.uint8)
    drawn = draw_nodules(lesions, canvas, lung, trees, count, config.diameter_mm)
    if config.shapes:
        library = open_library(Path(config.shapes))
        drawn = [with_outline(nodule, library) for nodule in drawn]
    nodules = [nodule for nodule in drawn if _paint_nodule(canvas, lung, nodule, label, texture)]

    hu = _scan(canvas, body, config.noise_hu, generator(config.seed, case, NOISE))
    affine = canvas.grid.affine
    return Phantom(Scan(hu, affine), Scan(label, affine), tuple(nodules))


def _grid(config: PhantomConfig, random: np.random.Generator) -> Grid:
    """A scan's lattice: scanners and protocols differ a little in spacing, and all in origin."""
    dz, dy, dx = config.spacing
    in_plane = random.uniform(0.92, 1.08)
    step = np.array([dz * random.uniform(0.85, 1.15), dy * in_plane, dx * in_plane])
    shape = np.maximum(1, np.rint(np.asarray(config.size_mm) / step)).astype(int)
    affine = np.zeros((4, 4))
    affine[[2, 1, 0], [0, 1, 2]] = step
    affine[3, 3] = 1
    affine[:3, 3] = -(step * (shape - 1) / 2)[::-1]
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def _paint_lungs(
    canvas: Canvas, chest: anatomy.Chest, lung: Field, texture: Field, random: np.random.Generator
) -> list[Tree]:
    """Lung tissue, arteries, veins, bronchi; returns the vessel trees."""
    back = np.float32(35 / chest.cage[1]) * canvas.y  # blood sinks to the back
    fine = _texture(random, canvas.grid, 2.2)
    canvas.paint(canvas.share(lung), chest.lung + back + 14 * texture + 14 * fine)
    canvas.paint(canvas.share(_fissure(canvas, chest)) * (lung > 1), -730)
    trees, bronchi = [], []
    hila = anatomy.hila(chest)
    for side, hilum in hila.items():
        for _ in ("artery", "vein"):
            goals = _points_in(random, canvas, (lung > 2) & (side * canvas.x > 0), TERMINALS)
            trees.append(grow(random, hilum + random.normal(0, 4, 3), goals, thinnest=0.58))
        goals = _points_in(random, canvas, (lung > 12) & (side * canvas.x > 0), 24)
        bronchi.append(grow(random, hilum, goals, thinnest=1.1))
    inside = (lung > -3).astype(np.float32)
    canvas.paint(canvas.tubes([tube for tree in trees for tube in tree.tubes()]) * inside, chest.blood)
    lumens = [tube for tree in bronchi for tube in tree.tubes(1.2)] + anatomy.airways(chest, hila)
    walls = [(a, b, ra + 0.6 + 0.15 * ra, rb + 0.6 + 0.15 * rb) for a, b, ra, rb in lumens]
    canvas.paint(canvas.tubes(walls), 10)
    canvas.paint(canvas.tubes(lumens), -980)
    return trees


def _fissure(canvas: Canvas, chest: anatomy.Chest) -> Field:
    """Distance inward from the faces of the oblique fissures, a millimetre apart."""
    bow = 6 * np.sin(canvas.x / 30) + 0.0008 * canvas.x**2
    plane = (canvas.z + 0.05 * chest.height) * 0.62 - (canvas.y - 0.1 * chest.cage[1]) * 0.78 + bow
    return np.asarray(0.5 - np.abs(plane), np.float32)


def _points_in(
    random: np.random.Generator, canvas: Canvas, where: NDArray[np.bool_], count: int
) -> NDArray[np.float64]:
    flat = np.flatnonzero(where)
    if not len(flat):
        raise VoxelscaleError("config: phantom.size_mm is too small for lungs", "use at least 150 mm each")
    index = np.stack(np.unravel_index(random.choice(flat, count), where.shape), axis=1)
    return canvas.grid.index_to_mm(index + random.uniform(-0.5, 0.5, index.shape))


def _paint_nodule(
    canvas: Canvas, lung: Field, nodule: Nodule, label: NDArray[np.uint8], texture: Field
) -> bool:
    """Paint it and its mask; False (and nothing painted) where no voxel is half nodule."""
    box, whole, core = nodule_shares(canvas, lung, nodule)
    pieces = components(whole >= 0.5)
    if not pieces:
        return False
    # A spicule's tip that shows up again a slice further on is not a lesion of its own.
    voxels = tuple(max(pieces, key=len).T)
    halo = nodule.hu if nodule.kind == "ground-glass" else -560
    tissue = canvas.hu[box]
    if nodule.kind != "solid":
        # Vessels run on through ground glass: it only ever makes lung denser.
        glass = np.maximum(tissue, halo + 30 * texture[box])
        tissue += whole * (glass - tissue)
    tissue += core * (nodule.hu + 8 * texture[box] - tissue)
    label[box][voxels] = 1
    return True


def _texture(random: np.random.Generator, grid: Grid, size_mm: float) -> Field:
    """Smooth noise of unit variance whose grains are about this large."""
    from scipy import ndimage

    # On a coarse lattice: what is smooth needs few samples.
    step = np.maximum(1.0, size_mm / 2 / np.asarray(grid.spacing))
    coarse_shape = np.ceil(np.asarray(grid.shape) / step).astype(int) + 3
    coarse = random.standard_normal(coarse_shape, dtype=np.float32)
    coarse = ndimage.gaussian_filter(coarse, 1.0, mode="wrap")
    coarse /= coarse.std()
    fine = coarse
    for axis, n in enumerate(grid.shape):
        places = np.arange(n) / step[axis] + 0.5
        low = places.astype(int)
        shape = [1, 1, 1]
        shape[axis] = n
        share = (places - low).astype(np.float32).reshape(shape)
        fine = fine.take(low, axis) * (1 - share) + fine.take(low + 1, axis) * share
    return np.asarray(fine, np.float32)


def _scan(canvas: Canvas, body: Field, noise_hu: float, random: np.random.Generator) -> NDArray[np.int16]:
    """What a scanner makes of the tissue: its point spread, then its noise.

    The noise is white noise less its own blur: filtered back-projection's spectrum rises from zero and
    falls again at high frequencies (Riederer et al. 1978), so neighbours are correlated, and there is
    less of it where the patient is thin.
    """
    from scipy import ndimage

    _, dy, dx = canvas.grid.spacing
    hu = ndimage.gaussian_filter(canvas.hu, (0.35, 0.6 / dy, 0.6 / dx))
    white = random.standard_normal(hu.shape, dtype=np.float32)
    grain = ndimage.gaussian_filter(white, (0, 0.7, 0.7)) - ndimage.gaussian_filter(white, (0, 2.2, 2.2))
    grain *= np.float32(noise_hu) / grain.std()
    depth = np.clip(body / max(float(body.max()), 1.0), 0, 1)
    hu += grain * (0.45 + 0.55 * depth)
    radius2 = canvas.x**2 + canvas.y**2 + 0 * canvas.z
    field = max(abs(float(canvas.x[0, 0, 0])), abs(float(canvas.y[0, 0, 0])))
    hu[radius2 > field**2] = -1024
    counts: NDArray[np.int16] = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    return counts
