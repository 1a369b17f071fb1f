from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from tests.conftest import SHARED
from voxelscale.config import Config
from voxelscale.dataset.listing import list_sources
from voxelscale.formats import read_scan
from voxelscale.geometry import Scan, reorient
from voxelscale.lungs import lung_field
from voxelscale.samples.patches import PatchSource
from voxelscale.store import open_store
from voxelscale.store.prepare import prepare

real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real scans are not here")


def load(name: str) -> Scan:
    return reorient(read_scan(SHARED / name))


@real
def test_lobes_of_another_model_agree() -> None:
    """30 slices of a thorax; its lobes (10 to 14) are TotalSegmentator's."""
    found = lung_field(load("totalsegmentator/example_ct_sm.nii.gz"))
    lobes = load("totalsegmentator/example_seg.nii.gz").array
    theirs = (lobes >= 10) & (lobes <= 14)
    assert found.ok
    assert 2 * (theirs & found.mask).sum() / (theirs.sum() + found.mask.sum()) >= 0.9


@real
def test_a_tumour_lies_inside() -> None:
    found = lung_field(load("lung_tumour/lung1_image.nrrd"))
    tumour = load("lung_tumour/lung1_label.nrrd").array > 0
    assert found.ok
    assert tumour.any()
    assert found.mask[tumour].all()


@real
def test_two_formats_of_one_scan_agree() -> None:
    one, other = (lung_field(load(f"thorax_small/{name}")) for name in ("ct-64.nrrd", "ct-64Dicom"))
    assert one.ok
    assert other.ok
    assert one.box == other.box
    assert np.array_equal(one.mask, other.mask)


@real
def test_an_abdomen_is_refused() -> None:
    scan = load("totalsegmentator/example_ct_dicom")
    found = lung_field(scan)
    assert not found.ok
    assert found.problem
    assert found.box == ((0, 0, 0), scan.array.shape)
    assert not found.mask.any()


def test_a_phantoms_lungs_hold_its_lesions(scans: Path) -> None:
    for source in list_sources(scans):
        assert source.labels
        scan, label = reorient(read_scan(source.image)), reorient(read_scan(source.labels[0])).array > 0
        found = lung_field(scan)
        assert found.ok, found.problem
        # Large ones that grow out of the lung lie in the mask in part, in the box as a whole.
        lesions, count = ndimage.label(label, np.ones((3, 3, 3)))
        assert all(found.mask[lesions == number].any() for number in range(1, count + 1))
        (z, y, x), (d, h, w) = found.box
        assert label[z : z + d, y : y + h, x : x + w].sum() == label.sum()
        half = label.shape[2] // 2
        left, right = found.mask[:, :, :half].sum(), found.mask[:, :, half:].sum()
        assert min(left, right) > 0.3 * max(left, right)
        assert found.mask[z : z + d, y : y + h, x : x + w].sum() == found.mask.sum()


@pytest.mark.parametrize("kind", ["noise", "air", "water"])
def test_what_is_no_chest_is_refused(kind: str) -> None:
    shape = (40, 60, 60)
    random = np.random.default_rng(0)
    array = {
        "noise": random.integers(-1000, 400, shape),
        "air": np.full(shape, -1000),
        "water": np.zeros(shape),
    }[kind].astype(np.int16)
    found = lung_field(Scan(array, np.asarray(np.eye(4)[[2, 1, 0, 3]] * [[5], [5], [5], [1]])))
    assert not found.ok
    assert found.problem
    assert found.box == ((0, 0, 0), shape)


def test_a_cropped_scan(tiny: Config, scans: Path) -> None:
    source = list_sources(scans)[0]
    scan = reorient(read_scan(source.image))
    middle = scan.array.shape[0] // 2
    found = lung_field(Scan(scan.array[middle - 5 : middle + 5], scan.affine))
    assert found.ok, found.problem
    whole = lung_field(scan).mask[middle - 5 : middle + 5]
    assert 2 * (whole & found.mask).sum() / (whole.sum() + found.mask.sum()) > 0.9


def test_background_patches_are_drawn_around_the_lungs(tiny: Config, scans: Path, tmp_path: Path) -> None:
    prepare(list_sources(scans)[:2], tmp_path, replace(tiny.prepare, lungs=True, split=(1.0, 0.0, 0.0)))
    store = open_store(tmp_path)
    boxes = {info.case: info.lungs for info in store.cases}
    data = replace(tiny.data, patch_size=(1, 1, 1), foreground=0.0)
    source = PatchSource(store, data, tiny.augment, seed=0)
    for index in range(40):
        sample = source[index]
        box = boxes[sample.case]
        assert box is not None
        margin = (np.asarray(sample.region.shape[1:]) - 1) // 2
        at = np.asarray(sample.start) + margin
        assert (at >= box[0]).all()
        assert (at < np.add(box[0], box[1])).all()
