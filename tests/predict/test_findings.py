from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Grid, Scan, affine_from_itk, to_itk
from voxelscale.predict.findings import (
    components,
    find_lesions,
    lesions_of_mask,
    read_findings,
    write_findings,
)

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
