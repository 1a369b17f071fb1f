"""Surface Dice and HD95: by hand, by the answers of others, and by brute force."""

from __future__ import annotations

import math
import time
from itertools import product

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_surface_dice
from numpy.typing import NDArray

from voxelscale.evaluate.surface import areas_of_codes, compare_surfaces, surface_of
from voxelscale.geometry import Triple

Mask = NDArray[np.bool_]

SPACINGS: list[Triple] = [(1.0, 1.0, 1.0), (3.0, 2.0, 1.0), (2.5, 0.7, 0.7), (0.5, 1.25, 2.0)]


def blob(seed: int, shape: tuple[int, int, int], smooth: float, level: float) -> Mask:
    noise = np.random.default_rng(seed).random(shape)
    mask: Mask = scipy.ndimage.gaussian_filter(noise, smooth) > level
    return mask


# The published tests of surface-distance: surface_distance_test.py of google-deepmind/surface-distance.


def test_two_voxels_2_mm_apart() -> None:
    truth, prediction = np.zeros((2, 128, 128, 128), bool)
    truth[50, 60, 70] = prediction[50, 60, 72] = True
    score = compare_surfaces(truth, prediction, (3.0, 2.0, 1.0))
    assert score.dice[0] == pytest.approx(0.5)
    assert score.hd95_mm == 2.0


def test_two_cubes_shifted_by_a_voxel() -> None:
    truth, prediction = np.zeros((2, 100, 100, 100), bool)
    truth[:50] = prediction[:51] = True
    score = compare_surfaces(truth, prediction, (2.0, 1.0, 1.0))
    assert score.dice[0] == pytest.approx(0.836, abs=5e-4)
    assert score.hd95_mm == 2.0


def test_empty_masks() -> None:
    one, none = np.zeros((2, 20, 20, 20), bool)
    one[5, 6, 7] = True
    for pair in ((one, none), (none, one)):
        score = compare_surfaces(*pair, (3.0, 2.0, 1.0))
        assert (score.dice, score.hd95_mm) == ((0.0, 0.0), math.inf)
    # Here surface-distance has no number. Two empty masks agree, as in their Dice.
    score = compare_surfaces(none, none, (3.0, 2.0, 1.0))
    assert (score.dice, score.hd95_mm) == ((1.0, 1.0), 0.0)


# Against MONAI, which has surface-distance's table of areas.


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("smooth", [0.0, 1.0, 4.0])
def test_the_contour_of_a_picture_is_monais(axis: int, smooth: float) -> None:
    """Of one slice only its contour counts: not the faces, which are where the masks overlap."""
    truth, prediction = (blob(seed, (1, 40, 50), smooth, 0.5)[0] for seed in (1, 2))
    spacing: Triple = (1.0, 2.0, 0.7) if axis == 0 else (2.0, 0.7, 1.0)
    planes = [np.expand_dims(mask, axis) for mask in (truth, prediction)]
    ours = compare_surfaces(planes[0], planes[1], spacing, flat=[axis]).dice
    for at, tolerance in enumerate((1.0, 2.0)):
        theirs = compute_surface_dice(
            *(torch.from_numpy(mask[None, None]) for mask in (prediction, truth)),
            class_thresholds=[tolerance + 1e-6],
            include_background=True,
            spacing=(2.0, 0.7),
            use_subvoxels=True,
        )
        assert ours[at] == pytest.approx(float(theirs), abs=1e-6)


def test_circles_7_pixels_apart() -> None:
    radius = np.hypot(*np.ogrid[-256:256, -256:256])[None]
    score = compare_surfaces(radius <= 200, radius <= 193, (1.0, 1.0, 1.0), flat=[0])
    assert score.dice == (0, 0)
    assert score.hd95_mm == pytest.approx(7, abs=0.75)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_surface_dice_is_monais(spacing: Triple, smooth: float) -> None:
    """Noise holds every one of the 256 ways in which a surface can cut a cell."""
    truth, prediction = (blob(seed, (12, 13, 14), smooth, 0.5) for seed in (1, 2))
    prediction[:, :, 6:] = False  # the area of what is left over is in the figures, too
    ours = compare_surfaces(truth, prediction, spacing).dice
    for at, tolerance in enumerate((1.0, 2.0)):
        theirs = compute_surface_dice(
            *(torch.from_numpy(mask[None, None]) for mask in (prediction, truth)),
            class_thresholds=[tolerance + 1e-6],
            include_background=True,
            spacing=spacing,
            use_subvoxels=True,
        )
        assert 0.3 < ours[at] < 0.9
        assert ours[at] == pytest.approx(float(theirs), abs=1e-6)


# By hand.


def test_areas_by_hand() -> None:
    areas = areas_of_codes((4.0, 2.0, 1.0))
    assert areas[0] == areas[255] == 0
    # The corner at (0, 0, 0): a triangle with its corners half the spacing away on each axis.
    sides = np.cross([-2, 1, 0], [-2, 0, 0.5])
    assert areas[1] == pytest.approx(np.linalg.norm(sides) / 2)
    assert areas[1 | 128] == pytest.approx(2 * areas[1])  # opposite corners are apart
    assert areas[0b00001111] == pytest.approx(2.0)  # one side along z: a plane
    assert areas[0b00110011] == pytest.approx(4.0)  # along y
    assert areas[0b01010101] == pytest.approx(8.0)  # along x
    assert areas == pytest.approx(areas[::-1])  # what is inside and what outside makes no difference


def test_a_boxs_surface() -> None:
    """Its faces, less the rounded edges: each takes away half a voxel on both sides, and gives a slope."""
    mask = np.zeros((12, 14, 16), bool)
    mask[2:10, 2:11, 2:13] = True  # 8 x 9 x 11 voxels, between whose centres lie 7 x 8 x 10
    surface = surface_of(mask, (1.0, 1.0, 1.0))
    faces, edges = 2 * (7 * 8 + 7 * 10 + 8 * 10), 4 * (7 + 8 + 10)
    assert surface.areas.sum() == pytest.approx(faces + edges * math.sqrt(0.5) + 8 * math.sqrt(3) / 8)
    assert surface.points.min(axis=0) == pytest.approx([1.5] * 3)
    assert surface.points.max(axis=0) == pytest.approx([9.5, 10.5, 12.5])


def test_a_mask_at_the_border_has_a_surface_there() -> None:
    mask = np.ones((5, 6, 7), bool)
    inside = surface_of(np.pad(mask, 3), (1.0, 1.0, 1.0))
    assert surface_of(mask, (1.0, 1.0, 1.0)).areas.sum() == pytest.approx(inside.areas.sum())


def test_a_tolerance_holds_however_the_spacing_is_rounded() -> None:
    truth = np.zeros((10, 10, 10), bool)
    truth[2:7, 2:7, 2:7] = True
    for spacing in (1.0, 1.0 + 1e-9, 1.0 - 1e-9):
        moved = compare_surfaces(truth, np.roll(truth, 1, axis=0), (spacing, spacing, spacing))
        assert moved.dice == (1.0, 1.0)
    assert compare_surfaces(truth, np.roll(truth, 1, axis=0), (1.01, 1.0, 1.0)).dice[0] < 1


def test_5_percent_of_the_area_may_lie_anywhere() -> None:
    truth = np.zeros((40, 40, 60), bool)
    truth[5:30, 5:30, 5:30] = True
    speck = truth.copy()
    speck[20, 20, 50] = True
    assert compare_surfaces(truth, speck, (1.0, 1.0, 1.0)).hd95_mm == 0.0
    speck[10:25, 10:25, 45:55] = True
    assert compare_surfaces(truth, speck, (1.0, 1.0, 1.0)).hd95_mm > 15


# Against a recount of every cell and every pair of cells.


def recount(mask: Mask, spacing: Triple) -> list[tuple[NDArray[np.float64], float]]:
    """Each cell that is cut, with its area."""
    table = areas_of_codes(spacing)
    padded = np.pad(mask, 1)
    cells = []
    for cell in product(*(range(n - 1) for n in padded.shape)):
        corners = product((0, 1), repeat=3)
        code = sum(int(padded[tuple(np.add(cell, c))]) << bit for bit, c in enumerate(corners))
        if 0 < code < 255:
            cells.append((np.asarray(cell) * spacing, float(table[code])))
    return cells


@given(
    st.integers(0, 2**20),
    st.tuples(*[st.integers(1, 5)] * 3),
    st.sampled_from(SPACINGS),
    st.floats(0.3, 0.9),
    st.floats(0.3, 0.9),
)
@settings(max_examples=40)
def test_against_every_pair_of_cells(
    seed: int, shape: tuple[int, int, int], spacing: Triple, first: float, second: float
) -> None:
    masks = [blob(seed, shape, 0.0, first), blob(seed + 1, shape, 0.0, second)]
    score = compare_surfaces(masks[0], masks[1], spacing)
    sides = [recount(mask, spacing) for mask in masks]
    if not sides[0] or not sides[1]:
        assert score.dice[0] == float(not sides[0] and not sides[1])
        return
    near, within, total = [], [0.0, 0.0], 0.0
    for cells, others in (sides, sides[::-1]):
        apart = [min(float(np.linalg.norm(point - other)) for other, _ in others) for point, _ in cells]
        areas = [area for _, area in cells]
        total += sum(areas)
        for at, tolerance in enumerate((1.0, 2.0)):
            pairs = zip(apart, areas, strict=True)
            within[at] += sum(area for distance, area in pairs if distance <= tolerance + 1e-6)
        reached = 0.0
        for distance, area in sorted(zip(apart, areas, strict=True)):
            reached += area
            if reached >= (0.95 - 1e-12) * sum(areas):
                near.append(distance)
                break
    assert score.dice == pytest.approx([value / total for value in within])
    assert score.hd95_mm == pytest.approx(max(near))


def test_a_chest_ct_with_small_lesions_takes_under_a_second() -> None:
    truth = np.zeros((300, 512, 512), np.uint8)
    for z, y, x in np.random.default_rng(0).integers(20, 280, (12, 3)):
        truth[z - 4 : z + 4, y - 6 : y + 6, x - 6 : x + 6] = 1
    prediction = np.roll(truth, 1, axis=2)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        compare_surfaces(truth, prediction, (1.0, 0.7, 0.7))
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1
