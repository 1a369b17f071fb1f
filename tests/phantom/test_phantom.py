from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from tests.conftest import read_pair

from voxelscale.config import Config, PhantomConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import read_label
from voxelscale.phantom import make_phantom
from voxelscale.phantom.dataset import write_phantoms
from voxelscale.phantom.vessels import grow


def test_a_phantom_is_a_pure_function_of_seed_and_case(tiny: Config) -> None:
    first = make_phantom(tiny.phantom, 3)
    for other in (1, 2):
        make_phantom(tiny.phantom, other)
    again = make_phantom(replace(tiny.phantom, cases=99, format="mha"), 3)
    assert np.array_equal(first.image.array, again.image.array)
    assert np.array_equal(first.label.array, again.label.array)
    for changed in (replace(tiny.phantom, seed=1), tiny.phantom):
        other_image = make_phantom(changed, 3 if changed.seed else 4).image.array
        assert other_image.shape != first.image.array.shape or not np.array_equal(
            other_image, first.image.array
        )


@pytest.fixture(scope="module")
def fine() -> PhantomConfig:
    return PhantomConfig(spacing=(2.5, 2.0, 2.0), nodules=(4, 4))


def test_tissues_have_the_hu_of_tissue(fine: PhantomConfig) -> None:
    image = make_phantom(fine, 0).image.array
    inner = image[image.shape[0] // 2]
    shares = {
        name: float(np.mean((inner >= low) & (inner < high)))
        for name, low, high in [
            ("air", -1024, -950),
            ("lung", -950, -600),
            ("fat", -150, -30),
            ("soft", 0, 120),
            ("bone", 250, 3072),
        ]
    }
    assert 0.2 < shares["air"] < 0.7
    assert 0.1 < shares["lung"] < 0.5
    assert shares["fat"] > 0.03
    assert shares["soft"] > 0.05
    assert 0.004 < shares["bone"] < 0.1


def test_nodules_lie_where_the_truth_says_and_are_as_large(fine: PhantomConfig) -> None:
    ratios = []
    for case in range(3):
        phantom = make_phantom(fine, case)
        labels, count = ndimage.label(phantom.label.array, np.ones((3, 3, 3)))
        assert count == len(phantom.nodules)
        for nodule in phantom.nodules:
            index = np.rint(phantom.label.grid.mm_to_index(nodule.centre)).astype(int)
            number = labels[tuple(index)]
            assert number > 0
            volume = np.count_nonzero(labels == number) * phantom.label.grid.voxel_mm3
            ratios.append((6 * volume / np.pi) ** (1 / 3) / nodule.diameter_mm)
    assert 0.8 < np.median(ratios) < 1.15


def test_vessels_look_like_nodules_in_cross_section(fine: PhantomConfig) -> None:
    """In an axial slice there are many more small dense discs in the lungs than nodules."""
    phantom = make_phantom(fine, 1)
    z = phantom.image.array.shape[0] // 2
    image, label = phantom.image.array[z], phantom.label.array[z]
    lung = ndimage.binary_fill_holes((image < -500) & (image > -1000))
    discs, count = ndimage.label((image > -400) & ndimage.binary_erosion(lung, iterations=4))
    areas = np.asarray(ndimage.sum(np.ones_like(label), discs, range(1, count + 1)))
    assert np.count_nonzero((areas >= 2) & (areas < 60)) > 10


def test_noise_is_correlated_and_as_strong_as_asked(fine: PhantomConfig) -> None:
    noisy = make_phantom(replace(fine, noise_hu=40.0), 2).image.array.astype(float)
    clean = make_phantom(replace(fine, noise_hu=0.0), 2).image.array.astype(float)
    noise = (noisy - clean)[:, 40:-40, 50:-50]
    noise = noise[noise.shape[0] // 2]
    assert 20 < noise.std() < 45
    neighbours = np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]
    assert 0.2 < neighbours < 0.9


def test_trees_follow_murrays_law() -> None:
    random = np.random.default_rng(0)
    tree = grow(random, np.zeros(3), random.uniform(-50, 50, (60, 3)), thinnest=0.5)
    for i in np.unique(tree.parents[tree.parents >= 0]):
        children = tree.radii[tree.parents == i] ** 3
        # A twig's end that was grown from is one twig more.
        assert tree.radii[i] ** 3 == pytest.approx(children.sum(), rel=1e-9)
    assert tree.radii.max() == tree.radii[0]
    assert (tree.parents[1:] < np.arange(1, len(tree.parents))).all()


def test_data_set_on_disk(tiny: Config, scans: Path) -> None:
    with (scans / "dataset.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [row["case"] for row in rows] == [f"phantom_{i:04d}" for i in range(5)]
    for number, row in enumerate(rows):
        image, label = read_pair(scans / row["image"], scans / row["label"])
        phantom = make_phantom(tiny.phantom, number)
        assert np.array_equal(image.array, phantom.image.array)
        assert np.array_equal(label.array, phantom.label.array)
        assert np.allclose(image.affine, phantom.image.affine, atol=1e-4)


def test_running_again_keeps_and_adds(tiny: Config, scans: Path, tmp_path: Path) -> None:
    config = replace(tiny.phantom, cases=1)
    write_phantoms(config, tmp_path, workers=1)
    image = tmp_path / "images" / "phantom_0000.nii.gz"
    before = image.stat().st_mtime_ns
    write_phantoms(replace(config, cases=2), tmp_path, workers=1)
    assert image.stat().st_mtime_ns == before
    assert read_label(tmp_path / "labels" / "phantom_0001.nii.gz").array.any()
    with pytest.raises(VoxelscaleError, match="another config"):
        write_phantoms(replace(config, seed=5), tmp_path)


def test_a_foreign_folder_is_left_alone(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(VoxelscaleError, match="other files"):
        write_phantoms(tiny.phantom, tmp_path)
