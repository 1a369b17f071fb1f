from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelscale.errors import VoxelscaleError
from voxelscale.findings import (
    Finding,
    components,
    find_lesions,
    lesions_of_mask,
    read_findings,
    read_prediction,
    write_findings,
)
from voxelscale.findings.depth import lung_depth
from voxelscale.findings.regions import merge_near
from voxelscale.geometry import Grid, Scan, affine_from_itk, reorient, to_itk

TURN = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])
GRID = Grid((16, 18, 20), affine_from_itk((-50, 20, 300), (0.7, 0.9, 2.5), TURN))


def balls(seed: int = 0, count: int = 4) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A probability map of a few smooth bumps."""
    random = np.random.default_rng(seed)
    index = np.moveaxis(np.indices(GRID.shape), 0, -1)
    field = np.zeros(GRID.shape, np.float32)
    for _ in range(count):
        centre = random.uniform(0, GRID.shape)
        height = random.uniform(0.3, 1.0)
        field = np.maximum(field, height * np.exp(-((index - centre) ** 2).sum(-1) / random.uniform(4, 20)))
    return field.astype(np.float32)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_against_simpleitks_label_statistics(seed: int, count: int) -> None:
    mask = (balls(seed, count) >= 0.5).astype(np.uint8)
    ours = lesions_of_mask("case", mask, GRID)
    connected = sitk.ConnectedComponent(to_itk(Scan(mask, GRID.affine)), True)
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(connected)
    theirs = sorted((shape.GetPhysicalSize(n), shape.GetCentroid(n)) for n in shape.GetLabels())
    assert len(ours) == len(theirs)
    for a, (volume, centroid) in zip(sorted(ours, key=lambda f: (f.volume_mm3, f.x)), theirs, strict=True):
        assert a.volume_mm3 == pytest.approx(volume, rel=1e-6)
        assert a.diameter_mm == pytest.approx((6 * volume / np.pi) ** (1 / 3), rel=1e-6)
        if len({v for v, _ in theirs}) == len(theirs):
            assert (a.x, a.y, a.z) == pytest.approx(centroid, abs=1e-4)
        assert GRID.index_to_mm(a.index) == pytest.approx((a.x, a.y, a.z))


def test_axial_diameter_is_the_greatest_distance_in_a_slice() -> None:
    mask = np.zeros(GRID.shape, np.uint8)
    mask[3:12, 5, 6] = 1  # long along z only
    mask[7, 2:9, 6] = 1
    (lesion,) = lesions_of_mask("case", mask, GRID)
    assert lesion.axial_diameter_mm == pytest.approx(6 * 0.9 + 0.8)


def test_doubtful_findings_are_listed_but_not_in_the_mask() -> None:
    probability = np.zeros(GRID.shape, np.float32)
    probability[2:5, 2:5, 2:5] = 0.9
    probability[1, 2:5, 2:5] = 0.3  # rim of the first: no finding of its own
    probability[10:13, 10:13, 10:13] = 0.4
    probability[15, 15, 15] = 0.99  # a voxel of 1.6 mm3
    findings, mask = find_lesions(
        "case", probability, GRID, threshold=0.5, candidates=0.2, min_volume_mm3=10
    )
    assert [round(f.volume_mm3 / GRID.voxel_mm3) for f in findings] == [27, 27]
    assert findings[0].probability == pytest.approx(0.9, abs=1e-6)
    assert findings[1].probability == pytest.approx(0.4, abs=1e-6)
    assert np.array_equal(mask > 0, probability == np.float32(0.9))
    assert len(find_lesions("case", probability, GRID, threshold=0.5)[0]) == 2


def test_small_components_are_less_certain() -> None:
    probability = np.zeros(GRID.shape, np.float32)
    probability[4, 4, 4:6] = 0.9
    (finding,), _ = find_lesions("case", probability, GRID, threshold=0.5)
    count = int(np.ceil(14 / GRID.voxel_mm3))
    assert finding.probability == pytest.approx(2 * 0.9 / count, rel=1e-6)


def test_components_touch_at_corners() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    assert sorted(map(len, components(mask))) == [1, 2]
    assert components(np.zeros((3, 3, 3), bool)) == []


@pytest.mark.parametrize("axis", range(3))
def test_components_in_a_line_of_voxels(axis: int) -> None:
    shape, line = [4, 4, 4], [1, 2, 3]
    shape[axis] = 9
    mask = np.zeros(shape, bool)
    index: list[Any] = list(line)
    index[axis] = [1, 3, 4, 7]
    mask[tuple(index)] = True
    found = components(mask)
    assert [part[:, axis].tolist() for part in found] == [[1], [3, 4], [7]]
    others = [a for a in range(3) if a != axis]
    assert all((part[:, others] == [line[a] for a in others]).all() for part in found)


def test_tables(tmp_path: Path) -> None:
    findings, _ = find_lesions("case_1", balls(), GRID, threshold=0.3)
    write_findings(findings, tmp_path / "f.csv", tmp_path / "f.json")
    assert read_findings(tmp_path / "f.json") == findings
    with (tmp_path / "f.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == ["seriesuid", "coordX", "coordY", "coordZ", "probability"]
    assert [float(row["coordX"]) for row in rows] == pytest.approx([f.x for f in findings], abs=1e-3)
    (tmp_path / "f.json").write_text('[{"x": 1}]')
    with pytest.raises(VoxelscaleError, match="not a list of findings"):
        read_findings(tmp_path / "f.json")


OBLIQUE = Grid((26, 70, 90), affine_from_itk((-30, 40, 100), (0.6, 0.6, 1.5), TURN))


def ellipsoid(
    grid: Grid, half: tuple[float, float, float]
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Half axes along the grid's own x, y and z in mm, in its middle."""
    index = np.moveaxis(np.indices(grid.shape), 0, -1)
    away = grid.index_to_mm(index) - grid.index_to_mm((np.asarray(grid.shape) - 1) / 2)
    inside: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = ((away @ grid.direction / half) ** 2).sum(
        axis=-1
    ) <= 1
    return inside


def turned(scan: Scan, order: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> Scan:
    """The same voxels at the same places, the array's axes in another order and direction."""
    affine = scan.affine[:, [*order, 3]].copy()
    array = scan.array.transpose(order)
    for axis in range(3):
        if flips[axis]:
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
            array = np.flip(array, axis)
    return Scan(np.ascontiguousarray(array), affine)


@pytest.mark.parametrize("half", [(16.0, 9.0, 12.0), (7.0, 15.0, 6.0), (10.0, 4.0, 16.0)])
def test_diameters_of_an_ellipsoid(half: tuple[float, float, float]) -> None:
    """On an oblique grid, in an array whose first axis is not the axial one."""
    whole = Scan(ellipsoid(OBLIQUE, half), OBLIQUE.affine)
    scan = turned(whole, (2, 0, 1), (True, False, False))
    (lesion,) = lesions_of_mask("case", scan.array, scan.grid)
    long, short = 2 * max(half[:2]), 2 * min(half[:2])
    assert lesion.axial_ends is not None
    assert lesion.short_axis_ends is not None
    assert lesion.axial_diameter_mm == pytest.approx(long, abs=0.6)
    assert lesion.short_axis_mm == pytest.approx(short, abs=0.6)
    assert lesion.axial_slice in (12, 13)
    ends, across = np.asarray(lesion.axial_ends), np.asarray(lesion.short_axis_ends)
    assert np.linalg.norm(ends[1] - ends[0]) == pytest.approx(lesion.axial_diameter_mm)
    assert np.linalg.norm(across[1] - across[0]) == pytest.approx(lesion.short_axis_mm)
    assert (ends[1] - ends[0]) @ (across[1] - across[0]) == pytest.approx(0, abs=1e-6)
    # All four lie in the slice, and on the ellipsoid to a pixel or so.
    points = np.concatenate([ends, across])
    assert scan.grid.mm_to_index(points)[:, 1] == pytest.approx(float(lesion.axial_slice or 0))
    centre = OBLIQUE.index_to_mm((np.asarray(OBLIQUE.shape) - 1) / 2)
    size = np.linalg.norm((points - centre) @ OBLIQUE.direction / half, axis=1)
    assert np.abs(size - 1).max() * min(half[:2]) < 1.0


def test_the_short_axis_is_a_chord_of_the_slice_of_the_long_one() -> None:
    """Of an L it is not the whole width across the line from tip to tip."""
    grid = Grid((3, 30, 30), affine_from_itk((0, 0, 0), (1, 1, 1), np.eye(3)))
    mask = np.zeros(grid.shape, np.uint8)
    mask[1, 2:22, 2:5] = 1
    mask[1, 19:22, 2:22] = 1
    mask[2, 2:10, 4] = 1
    (lesion,) = lesions_of_mask("case", mask, grid)
    assert lesion.axial_slice == 1
    # From tip to tip. Across that both arms are 3 pixels thick; their corner is 19 / sqrt(2) away.
    assert lesion.axial_diameter_mm == pytest.approx(19 * 2**0.5 + 1)
    assert lesion.short_axis_mm == pytest.approx(4.5 / 2**0.5 + 1, abs=0.36)


def test_a_single_voxel_has_the_size_of_a_pixel() -> None:
    mask = np.zeros(GRID.shape, np.uint8)
    mask[3, 4, 5] = 1
    (lesion,) = lesions_of_mask("case", mask, GRID)
    assert (lesion.axial_diameter_mm, lesion.short_axis_mm) == pytest.approx((0.8, 0.8))
    assert lesion.axial_ends is not None
    assert np.mean(lesion.axial_ends, axis=0) == pytest.approx(GRID.index_to_mm((3, 4, 5)))


@settings(max_examples=25)
@given(
    st.integers(0, 10**6),
    st.permutations((0, 1, 2)),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_the_same_findings_whatever_the_arrays_axes(
    seed: int, order: list[int], flips: tuple[bool, bool, bool]
) -> None:
    plain = Scan(balls(seed, 6), GRID.affine)
    hu = Scan(np.random.default_rng(seed).normal(-300, 200, GRID.shape), GRID.affine)
    z, y, x = order
    told = []
    for scan, image in (
        (plain, hu),
        (turned(plain, (z, y, x), flips), turned(hu, (z, y, x), flips)),
    ):
        findings, mask = find_lesions(
            "case",
            scan.array,
            scan.grid,
            threshold=0.6,
            low=0.4,
            candidates=0.2,
            merge_mm=3.0,
            min_volume_mm3=10,
            image=image.array,
        )
        told.append((findings, reorient(Scan(mask, scan.affine)).array))
    assert np.array_equal(told[0][1], told[1][1])
    assert len(told[0][0]) == len(told[1][0])
    by_place = [sorted(findings, key=lambda f: (round(f.x, 4), round(f.y, 4))) for findings, _ in told]
    for a, b in zip(*by_place, strict=True):
        assert numbers(a) == pytest.approx(numbers(b), abs=1e-5)


def numbers(f: Finding) -> list[float | None]:
    assert f.axial_ends is not None
    assert f.short_axis_ends is not None
    ends = [v for point in (*f.axial_ends, *f.short_axis_ends) for v in point]
    scalars = [f.x, f.y, f.z, f.volume_mm3, f.axial_diameter_mm, f.short_axis_mm, f.probability]
    return [*scalars, *ends, f.mean_hu, f.std_hu, f.solid_fraction, f.score]


def test_two_thresholds() -> None:
    probability = np.zeros(GRID.shape, np.float32)
    probability[2, 2, 2:9] = [0.9, 0.6, 0.4, 0.4, 0.25, 0.4, 0.7]  # two peaks, a saddle below 0.3
    probability[8, 8, 2:7] = 0.4  # never reaches the threshold
    found = {}
    for low in (None, 0.5, 0.3, 0.2):
        findings, mask = find_lesions(
            "case", probability, GRID, threshold=0.65, low=low, candidates=0.35, min_volume_mm3=0
        )
        found[low] = (
            sorted(round(f.volume_mm3 / GRID.voxel_mm3) for f in findings),
            int(mask.sum()),
        )
    # Two of one voxel each; what is at or above 0.35 around them belongs to them, not to a doubtful one.
    assert found[None] == ([1, 1, 5], 2)
    assert found[0.5] == ([1, 2, 5], 3)
    assert found[0.3] == ([2, 4, 5], 6)
    assert found[0.2] == ([5, 7], 7)


def test_a_lesion_too_small_above_the_threshold_stays_a_doubtful_one() -> None:
    probability = np.zeros(GRID.shape, np.float32)
    probability[4:8, 4:8, 4:8] = 0.4
    probability[5, 5, 5] = 0.6
    (finding,), mask = find_lesions(
        "case", probability, GRID, threshold=0.5, candidates=0.2, min_volume_mm3=10
    )
    assert round(finding.volume_mm3 / GRID.voxel_mm3) == 64
    assert not mask.any()


def test_fragments_are_joined_from_surface_to_surface() -> None:
    probability = np.zeros((9, 9, 40), np.float32)
    grid = Grid((9, 9, 40), affine_from_itk((5, 6, 7), (0.7, 0.9, 2.5), TURN))
    probability[4, 4, [2, 5, 8]] = 0.9  # gaps of two voxels: 1.4 mm
    probability[4, 4, 12] = 0.9  # 2.1 mm
    probability[6, 4, 30] = probability[4, 6, 32] = 0.9  # a voxel apart along all axes: 2.75 mm
    probability[0, 0, [20, 22]] = 0.4  # doubtful ones, 0.7 mm

    def counts(merge_mm: float) -> list[int]:
        findings, mask = find_lesions(
            "case", probability, grid, threshold=0.5, candidates=0.2, merge_mm=merge_mm
        )
        assert mask.sum() == 6
        return sorted(round(f.volume_mm3 / grid.voxel_mm3) for f in findings)

    apart = float(np.linalg.norm([2.5, 0.9, 0.7]))
    assert counts(0) == [1] * 8
    assert counts(0.69) == [1] * 8
    assert counts(1.39) == [1] * 6 + [2]
    assert counts(1.4) == [1, 1, 1, 2, 3]
    assert counts(2.1) == [1, 1, 2, 4]
    assert counts(apart - 1e-3) == [1, 1, 2, 4]
    assert counts(apart) == [2, 2, 4]


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.02, 0.2), st.sampled_from([0.0, 0.7, 0.9, 1.5, 2.5, 3.0]))
def test_merging_against_all_pairs_of_voxels(seed: int, share: float, distance: float) -> None:
    mask = np.random.default_rng(seed).random((6, 7, 8)) < share
    grid = Grid(mask.shape, GRID.affine)
    ones = [voxel[None] for voxel in np.argwhere(mask)]
    ours = {frozenset(map(tuple, part.tolist())) for part in merge_near(ones, grid, distance)}
    assert ours == brute_groups(np.argwhere(mask), np.asarray(grid.spacing), distance)
    if distance == 0:
        assert ours == {frozenset(map(tuple, part.tolist())) for part in components(mask)}
    else:  # whole components, as they come in practice
        whole = {frozenset(map(tuple, p.tolist())) for p in merge_near(components(mask), grid, distance)}
        assert ours == whole


def brute_groups(
    voxels: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    spacing: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    distance: float,
) -> set[frozenset[tuple[int, ...]]]:
    """Voxels whose boxes' distance, gap by gap, is small enough, taken together until nothing changes."""
    groups = [{tuple(v)} for v in voxels.tolist()]
    for a, b in itertools.combinations(voxels.tolist(), 2):
        gaps = [max(0, abs(p - q) - 1) * s for p, q, s in zip(a, b, spacing, strict=True)]
        if np.hypot(np.hypot(*gaps[:2]), gaps[2]) <= distance + 1e-9:
            mine, other = (next(g for g in groups if tuple(v) in g) for v in (a, b))
            if mine is not other:
                mine |= other
                groups.remove(other)
    return {frozenset(group) for group in groups}


def test_density() -> None:
    probability = np.zeros(GRID.shape, np.float32)
    probability[2:4, 2:6, 2:6] = 0.9
    image = np.full(GRID.shape, -800, np.int16)
    image[2, 2:6, 2:6], image[3, 2:6, 2:6] = 40, -600
    image[3, 2:4, 2:6] = -300  # not above
    (finding,), _ = find_lesions("case", probability, GRID, threshold=0.5, image=image)
    values = np.array([40.0] * 16 + [-600.0] * 8 + [-300.0] * 8)
    assert finding.mean_hu == pytest.approx(values.mean())
    assert finding.std_hu == pytest.approx(values.std())
    assert finding.solid_fraction == 0.5
    (finding,), _ = find_lesions("case", probability, GRID, threshold=0.5)
    assert (finding.mean_hu, finding.std_hu, finding.solid_fraction) == (None, None, None)


def thorax() -> tuple[Scan, float]:
    """Two air-filled balls in a body; and their radius, mm."""
    shape, step, radius = (90, 110, 150), 2.0, 55.0
    mm = np.moveaxis(np.indices(shape), 0, -1) * step
    middle = (np.asarray(shape) - 1) / 2 * step
    hu = np.full(shape, -1000.0)
    body = (((mm - middle)[..., 1:] / (105.0, 145.0)) ** 2).sum(axis=-1) <= 1
    hu[body] = 40
    for side in (-65.0, 65.0):
        away = np.linalg.norm(mm - middle - (0, 0, side), axis=-1)
        hu[away <= radius] = -850
    return Scan(hu.astype(np.int16), affine_from_itk((0, 0, 0), (step, step, step), np.eye(3))), radius


def test_distance_to_the_pleura() -> None:
    image, radius = thorax()
    depth = lung_depth(image)
    assert depth is not None
    probability = np.zeros(image.array.shape, np.float32)
    # From the left lung's middle outwards, along y: 0, 30 mm, and across the border; and one in the fat.
    z, y, x = 45, 54, 107
    for middle in (y, y + 15, y + 27):
        probability[z - 1 : z + 2, middle - 1 : middle + 2, x - 1 : x + 2] = 0.9
    probability[2:5, 50:53, 70:73] = 0.9
    findings, _ = find_lesions("case", probability, image.grid, threshold=0.5, depth=depth)
    by_place = {round(f.index[1]): f.pleura_mm for f in findings}
    ball = (np.asarray(image.array.shape) - 1) / 2 * 2.0 + (0, 0, 65.0)
    for middle in (y, y + 15):
        cube = np.argwhere(np.ones((3, 3, 3))) + np.array([z - 1, middle - 1, x - 1])
        least = radius - np.linalg.norm(cube * 2.0 - ball, axis=1).max()
        assert by_place[middle] == pytest.approx(least, abs=2)
    assert by_place[y + 27] == 0
    assert by_place[51] is None
    assert lung_depth(Scan(np.full((20, 20, 20), 40, np.int16), image.affine)) is None


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 1), (3, 200, 2), (64, 64, 1)])
def test_no_scan_is_too_odd_to_look_for_lungs_in(shape: tuple[int, int, int]) -> None:
    for value in (-1000, -850, 40):
        assert lung_depth(Scan(np.full(shape, value, np.int16), GRID.affine)) is None


def test_findings_of_older_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "findings.json"
    findings, _ = find_lesions("case", balls(), GRID, threshold=0.3)
    write_findings(findings, tmp_path / "f.csv", path)
    rows = json.loads(path.read_text())["findings"]
    new = {"axial_ends", "axial_slice", "short_axis_mm", "short_axis_ends", "std_hu"}
    new |= {"solid_fraction", "pleura_mm", "score"}
    assert new < set(rows[0])
    old_names = [{"index" if k == "index_zyx" else k: v for k, v in row.items()} for row in rows]
    path.write_text(json.dumps([{k: v for k, v in row.items() if k not in new} for row in old_names]))
    for old, now in zip(read_findings(path), findings, strict=True):
        assert (old.index, old.volume_mm3, old.probability) == (now.index, now.volume_mm3, now.probability)
        assert (old.score, old.axial_ends, old.pleura_mm) == (None, None, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("", [1.5]),
        ("case", 3),
        ("case", "\ud800"),
        ("x", "3"),
        ("x", None),
        ("index_zyx", [1, 2]),
        ("axial_ends", [[1, 2, 3]]),
        ("probability", float("nan")),
    ],
)
def test_findings_that_are_none(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "findings.json"
    findings, _ = find_lesions("case", balls(), GRID, threshold=0.3)
    write_findings(findings, tmp_path / "f.csv", path)
    content = json.loads(path.read_text())
    content["findings"][0][field] = value
    path.write_text(json.dumps(content if field else value))
    with pytest.raises(VoxelscaleError, match="not a list of findings"):
        read_findings(path)


@pytest.mark.parametrize(
    "change",
    [{"format": 3}, {"warnings": "one"}, {"warnings": [1]}, {"findings": {"x": 1}}, {"format": None}],
)
def test_a_prediction_that_is_none(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "findings.json"
    write_findings([], tmp_path / "f.csv", path, {"warnings": ["a"], "case": "b"})
    assert read_prediction(path) == ([], {"format": 2, "warnings": ["a"], "case": "b"})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(VoxelscaleError, match="not a list of findings"):
        read_prediction(path)
