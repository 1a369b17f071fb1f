from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from voxelscale.geometry import (
    Grid,
    Scan,
    affine_from_itk,
    crop_or_pad,
    reorient,
    resample,
    to_itk,
)

number = st.floats(-1, 1, allow_nan=False)
shapes = st.tuples(*[st.integers(2, 9)] * 3)


def rotation(w: float, x: float, y: float, z: float) -> NDArray[np.float64]:
    """The rotation matrix of a quaternion, normalised; the identity for a quaternion of zeros."""
    q = np.array([w, x, y, z])
    length = float(np.linalg.norm(q))
    w, x, y, z = q / length if length > 1e-3 else np.array([1.0, 0, 0, 0])
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Any lattice a scanner could make: oblique, anisotropic, also left-handed."""
    turn = rotation(*(draw(number) for _ in range(4)))
    if draw(st.booleans()):
        turn[:, 0] *= -1
    spacing = [draw(st.floats(0.2, 8)) for _ in range(3)]
    origin = [draw(st.floats(-500, 500)) for _ in range(3)]
    return Grid(draw(shapes), affine_from_itk(origin, spacing, turn))


def noise(grid: Grid) -> Scan:
    values = np.random.default_rng(1).integers(-1000, 1000, grid.shape).astype(np.float32)
    return Scan(values, grid.affine)


@given(grids(), st.lists(st.tuples(*[st.floats(-50, 600)] * 3), min_size=1, max_size=5))
def test_index_to_mm_and_back(grid: Grid, points: list[tuple[float, float, float]]) -> None:
    back = grid.mm_to_index(grid.index_to_mm(points))
    # In mm: an error of an index counts by the voxel's extent.
    assert np.abs((back - points) * np.asarray(grid.spacing)).max() < 1e-6


@given(grids())
def test_positions_are_simpleitks(grid: Grid) -> None:
    image = to_itk(noise(grid))
    for z, y, x in np.ndindex(2, 2, 2):
        theirs = image.TransformIndexToPhysicalPoint((x, y, z))
        assert np.allclose(grid.index_to_mm((z, y, x)), theirs, atol=1e-6)
    again = affine_from_itk(image.GetOrigin(), image.GetSpacing(), image.GetDirection())
    assert np.allclose(again, grid.affine, atol=1e-6)
    assert image.GetSize() == grid.shape[::-1]


@given(grids())
def test_spacing_direction_and_volume(grid: Grid) -> None:
    assert np.allclose(grid.direction @ grid.direction.T, np.eye(3), atol=1e-9)
    assert grid.voxel_mm3 == pytest.approx(np.prod(grid.spacing))


@given(grids())
def test_reorienting_moves_no_value(grid: Grid) -> None:
    scan = noise(grid)
    turned = reorient(scan)
    columns = turned.grid.direction
    assert (np.diag(columns) > 0).all() or np.abs(columns).max() < 0.75
    for index in np.ndindex(grid.shape):
        place = turned.grid.mm_to_index(grid.index_to_mm(index))
        assert np.allclose(place, np.rint(place), atol=1e-6)
        assert turned.array[tuple(np.rint(place).astype(int))] == scan.array[index]


TIES = [
    rotation(np.cos(np.pi / 8), *(np.sin(np.pi / 8) * np.eye(3)[axis])) for axis in range(3)
]  # 45 degrees about each axis
DIAGONAL = (
    np.array([[2.0, -1, 2], [2, 2, -1], [-1, 2, 2]]) / 3
)  # each axis equally near two of the patient's
TURNS = [np.eye(3), *TIES, DIAGONAL, TIES[0] @ TIES[2], TIES[2] @ TIES[1]]


@given(
    st.one_of(st.sampled_from(TURNS), st.tuples(*[number] * 4).map(lambda q: rotation(*q))),
    st.permutations(range(3)),
    st.sets(st.integers(0, 2)),
    st.integers(0, 2**32 - 1),
)
def test_a_scan_and_its_mask_are_turned_alike(
    turn: NDArray[np.float64], order: list[int], flips: set[int], seed: int
) -> None:
    """However their axes are stored, and whatever text and float32 round; turning again does nothing."""
    scan = noise(Grid((3, 4, 5), affine_from_itk((1, 2, 3), (0.7, 0.8, 2.5), turn)))
    affine = scan.affine[:, [*order, 3]].copy()
    for axis in flips:
        affine[:3, 3] += affine[:3, axis] * (scan.array.shape[order[axis]] - 1)
        affine[:3, axis] *= -1
    rounded = affine + np.random.default_rng(seed).uniform(-1e-6, 1e-6, (4, 4)) * [[1], [1], [1], [0]]
    stored = Scan(np.flip(scan.array.transpose(order), tuple(flips)), rounded)
    one, other = reorient(scan), reorient(stored)
    assert np.array_equal(one.array, other.array)
    assert one.grid.same_as(other.grid)
    again = reorient(other)
    assert np.array_equal(again.array, other.array)
    assert np.array_equal(again.affine, other.affine)


@given(grids(), st.tuples(*[st.integers(-4, 6)] * 3), shapes)
def test_cropping_and_padding_keep_positions(
    grid: Grid, start: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    scan = noise(grid)
    window = crop_or_pad(scan, start, shape, fill=-1024)
    assert window.array.shape == shape
    for index in np.ndindex(shape):
        source = tuple(np.asarray(start) + index)
        inside = all(0 <= i < n for i, n in zip(source, grid.shape, strict=True))
        assert window.array[index] == (scan.array[source] if inside else -1024)
        assert np.allclose(window.grid.index_to_mm(index), grid.index_to_mm(source), atol=1e-6)


@given(grids(), st.tuples(*[st.floats(0.3, 4)] * 3))
def test_new_spacing_covers_the_same_box(grid: Grid, spacing: tuple[float, float, float]) -> None:
    new = grid.with_spacing(spacing)
    first = -0.5 * np.ones(3)
    assert np.allclose(new.index_to_mm(first), grid.index_to_mm(first), atol=1e-6)
    far_old = grid.index_to_mm(np.asarray(grid.shape) - 0.5)
    far_new = new.index_to_mm(np.asarray(new.shape) - 0.5)
    # Where one voxel is larger than the whole box there is still one.
    slack = np.maximum(np.asarray(spacing) / 2, np.asarray(spacing) - np.asarray(grid.shape) * grid.spacing)
    assert np.linalg.norm(far_old - far_new) <= np.linalg.norm(slack) + 1e-6


@given(grids(), st.sampled_from(["linear", "nearest"]))
def test_resampling_is_simpleitks(grid: Grid, how: str) -> None:
    scan = noise(grid)
    target = grid.with_spacing([s * 0.7 for s in grid.spacing])
    ours = resample(scan, target, "linear" if how == "linear" else "nearest", fill=-5)
    reference = to_itk(Scan(np.zeros(target.shape, np.float32), target.affine))
    kind = sitk.sitkLinear if how == "linear" else sitk.sitkNearestNeighbor
    theirs = sitk.Resample(to_itk(scan), reference, sitk.Transform(), kind, -5.0)
    assert np.allclose(ours.array, sitk.GetArrayFromImage(theirs), atol=1e-3)


def test_linear_resampling_reproduces_a_linear_field() -> None:
    grid = Grid((12, 14, 16), affine_from_itk((3, -7, 11), (0.7, 0.8, 2.5), rotation(0.9, 0.2, 0.3, 0.1)))
    points = grid.index_to_mm(np.moveaxis(np.indices(grid.shape), 0, -1))
    field = (points @ [1.0, -2.0, 0.5] + 3).astype(np.float32)
    target = grid.window((2, 2, 2), (6, 6, 6)).with_spacing((1.9, 0.5, 0.6))
    ours = resample(Scan(field, grid.affine), target)
    wanted = target.index_to_mm(np.moveaxis(np.indices(target.shape), 0, -1)) @ [1.0, -2.0, 0.5] + 3
    assert np.allclose(ours.array, wanted, atol=1e-2)


def test_a_singular_affine_is_refused() -> None:
    with pytest.raises(ValueError, match="singular"):
        Grid((2, 2, 2), np.diag([1.0, 0.0, 1.0, 1.0]))


def test_a_flipped_image_keeps_its_direction() -> None:
    image = sitk.Flip(sitk.Image([4, 5, 6], sitk.sitkInt16), [True, False, False])
    affine = affine_from_itk(image.GetOrigin(), image.GetSpacing(), image.GetDirection())
    assert to_itk(Scan(sitk.GetArrayFromImage(image), affine)).GetDirection() == image.GetDirection()
