from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from tests.conftest import Command
from tests.phantom.test_insertion import LUNG_HU, healthy, made_up_chest

from voxelscale.config import PhantomConfig, ReadingConfig, load
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import read_scan, write_scan
from voxelscale.geometry import Scan
from voxelscale.phantom.cuts import cut_from, open_cuts
from voxelscale.phantom.insertion import copy_with_nodules

SPACING = (1.25, 0.7, 0.7)


def crop(radius_mm: float, centre_hu: float, edge_hu: float, wall: bool = False) -> tuple[Scan, Scan]:
    """A ball in lung whose HU fall from its centre to its edge, at a wall or not."""
    shape = (24, 44, 44)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1] * SPACING
    z, y, x = (
        (index - n // 2) * step for index, n, step in zip(np.indices(shape), shape, SPACING, strict=True)
    )
    away = np.sqrt(z**2 + y**2 + x**2) / radius_mm
    hu = np.where(away < 1, centre_hu + (edge_hu - centre_hu) * away, LUNG_HU)
    if wall:
        hu[(x > 0.1 * radius_mm) & (away >= 1)] = 40
    return Scan(np.rint(hu).astype(np.int16), affine), Scan((away < 1).astype(np.uint8), affine)


def crops(folder: Path, *pairs: tuple[Scan, Scan]) -> Path:
    for number, (image, label) in enumerate(pairs):
        for kind, scan in (("images", image), ("labels", label)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            write_scan(scan, folder / kind / f"nodule{number}.nii.gz")
    return folder


def test_a_nodule_keeps_its_size_and_its_own_hu_where_it_is_put(tmp_path: Path) -> None:
    library = open_cuts(crops(tmp_path / "crops", crop(5.0, 100, -200)), ReadingConfig())
    assert library.sizes == pytest.approx([10.0], rel=0.03)
    scan = made_up_chest()
    config = PhantomConfig(nodules=(2, 2), diameter_mm=(10.0, 10.0), crops="crops")
    made = copy_with_nodules("chest", scan, healthy(scan), config, 1, library)
    pieces, count = ndimage.label(made.label.array, np.ones((3, 3, 3)))
    assert count == len(made.nodules) >= 1
    for nodule in made.nodules:
        own = pieces == pieces[tuple(np.rint(scan.grid.mm_to_index(nodule.centre)).astype(int))]
        volume = float(np.count_nonzero(own)) * scan.grid.voxel_mm3
        assert volume == pytest.approx(np.pi / 6 * 10**3, rel=0.15)
        hu = made.image.array[own]
        # From 100 in the middle to -200 at the edge, as it was cut out; a synthetic nodule has one density.
        assert -50 < hu.max() <= 100
        inner = ndimage.distance_transform_edt(own, scan.spacing)
        assert made.image.array[inner > 3.5].mean() > made.image.array[own & (inner < 2.5)].mean() + 60
        assert nodule.margin == "real"
        assert nodule.place != "pleura"
    far = ndimage.distance_transform_edt(made.label.array == 0, scan.spacing) > 3
    assert (made.image.array == scan.array)[far].all()


def test_kind_and_place_are_those_of_the_crop() -> None:
    for centre_hu, edge_hu, wall, kind in (
        (-600, -600, False, "ground-glass"),
        (0, -500, False, "part-solid"),
        (40, 40, True, "solid"),
    ):
        image, label = crop(6.0, centre_hu, edge_hu, wall)
        cut = cut_from(image.array.astype(np.float32), label.array > 0, SPACING, "a nodule")
        assert (cut.kind, cut.pleura) == (kind, wall)
        assert cut.shape.diameter_mm == pytest.approx(12, rel=0.03)


def test_a_crop_that_ends_at_the_nodule_along_z_is_as_large_as_its_mask() -> None:
    image, label = crop(6.0, 40, 40)
    there = np.flatnonzero(label.array.any(axis=(1, 2)))
    slices = slice(int(there[0]), int(there[-1]) + 1)
    mask = label.array[slices] > 0
    cut = cut_from(image.array[slices].astype(np.float32), mask, SPACING, "a nodule")
    volume = np.count_nonzero(cut.shape.depth > 0) * cut.shape.step**3
    assert volume == pytest.approx(np.count_nonzero(mask) * float(np.prod(SPACING)), rel=0.02)


def test_command_puts_real_nodules_into_a_small_crop(voxelscale: Command, tmp_path: Path) -> None:
    donors = crops(tmp_path / "crops", crop(3.0, 60, 0))
    background = Scan(np.full((60, 60, 60), -850, np.int16), np.diag([1.0, 1, 1, 1])[:, [2, 1, 0, 3]])
    background.array[:, :, 50:] = 40  # a chest wall: 51 mm show no whole lungs
    write_scan(background, tmp_path / "cube.nii.gz")
    options = ["--into", str(tmp_path / "cube.nii.gz"), "--crops", str(donors)]
    out = tmp_path / "out"
    code, _, err = voxelscale("phantom", out, *options, "--set", "phantom.nodules=[1,1]")
    assert code == 0, err
    (row,) = csv.DictReader((out / "nodules.csv").open())
    assert (row["kind"], row["shape"]) == ("solid", "nodule0:1")
    assert read_scan(out / "labels" / "cube_with01.nii.gz").array.any()
    code, _, err = voxelscale("phantom", out, *options[:3], tmp_path / "nothing")
    assert code == 2
    assert "nothing" in err
    code, _, err = voxelscale("phantom", tmp_path / "other", "--crops", donors)
    assert code == 2
    assert "--into" in err


def test_a_data_set_without_nodules_is_an_error(tmp_path: Path) -> None:
    image, label = crop(1.0, 40, 40)
    with pytest.raises(VoxelscaleError, match="no lesion of at least 3 mm"):
        open_cuts(crops(tmp_path / "crops", (image, label)), ReadingConfig())


def test_shapes_and_crops_exclude_each_other() -> None:
    with pytest.raises(VoxelscaleError, match=r"phantom\.crops"):
        load(None, ("phantom.shapes=a", "phantom.crops=b"))
