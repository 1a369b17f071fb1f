"""Stores of several channels and classes; and what a training draws from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from tests.regions import write_regions

from voxelscale.channels import channel_of
from voxelscale.classes import Classes
from voxelscale.config import AugmentConfig, DataConfig, PrepareConfig, ReadingConfig
from voxelscale.dataset import DataSet
from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Scan
from voxelscale.samples.batch import make_batch, normalisations
from voxelscale.samples.patches import PatchSource
from voxelscale.samples.transforms.affine import reaching, warp_labels
from voxelscale.store import Store, open_store
from voxelscale.store.fingerprint import in_fold, open_fold
from voxelscale.store.lesions import resample_labels
from voxelscale.store.prepare import prepare

CPU = torch.device("cpu")
ORGANS = Classes(names=("liver", "spleen"), values=((1,), (2,)), ignore=(9,))
PATCH = (12, 12, 12)
NO_AUGMENTATION = AugmentConfig(enabled=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_regions(tmp_path_factory.mktemp("regions") / "data")


@pytest.fixture(scope="module")
def regions(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("regions_store")
    listed = DataSet(path=data)
    prepare(listed.cases, out, PrepareConfig(workers=1), folds=listed.folds)
    return open_store(out)


def read(path: Path) -> np.ndarray:
    return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


def test_channels_and_labels_are_the_files(regions: Store, data: Path) -> None:
    assert regions.classes.names == ("whole", "core", "enhancing")
    assert [(c.name, c.scheme) for c in regions.channels] == [("T1", "zscore"), ("FLAIR", "zscore")]
    info = regions.cases[0]
    channels, labels = regions.read_channels(info.case)
    values = read(data / "labelsTr" / f"{info.case}.nii.gz")
    assert np.array_equal(labels, np.array([0, 1, 3, 7, -1])[values])
    one = read(data / "imagesTr" / f"{info.case}_0000.nii.gz")
    kept = info.channels[0]
    assert np.abs(channels[0] * kept.scale + kept.offset - one).max() <= np.ptp(one) / 2**15
    # The second channel lies a quarter of a voxel further along every axis.
    two = read(data / "imagesTr" / f"{info.case}_0001.nii.gz")
    moved = ndimage.shift(two, 0.25, order=1, mode="nearest")
    kept = info.channels[1]
    inner = (slice(1, -1),) * 3
    assert np.abs((channels[1] * kept.scale + kept.offset - moved)[inner]).max() <= 0.01 * np.ptp(two)


def test_lesions_are_each_regions_components(regions: Store) -> None:
    for info in regions.cases:
        _, labels = regions.read_channels(info.case)
        for at in range(3):
            _, count = ndimage.label(regions.classes.where(labels, at), np.ones((3, 3, 3)))
            assert info.lesion_classes.count(at) == count
        volumes = sum(
            v for v, at in zip(info.lesion_volumes_mm3, info.lesion_classes, strict=True) if at == 2
        )
        assert volumes == pytest.approx(int((labels & 4 > 0)[labels > 0].sum()))


def test_the_folds_are_the_data_sets(regions: Store, data: Path) -> None:
    assert len(regions.folds) == 4
    own = {info.case: info.split for info in regions.cases}
    assert own == {info.case: info.split for info in in_fold(regions, 0).cases}
    one = open_fold(regions.path, 1)
    assert [info.case for info in one.split("val")] == ["case_001", "case_005"]
    assert one.fingerprint["digest"] != regions.fingerprint["digest"]
    with pytest.raises(VoxelscaleError, match=r"data\.fold is 4, but the store has folds 0 to 3"):
        open_fold(regions.path, 4)


def test_samples_are_normalised_by_their_own_case(regions: Store) -> None:
    data = DataConfig(patch_size=(20, 28, 28), foreground=0.0)
    patches = PatchSource(regions, data, NO_AUGMENTATION, seed=0)
    for index in range(4):
        sample = patches[index]
        image, target = make_batch([sample], data.patch_size, normalisations(regions), CPU)
        assert image.shape == (1, 2, 20, 28, 28)
        assert image.mean((0, 2, 3, 4)).abs().max() < 1e-3
        assert (image.std((0, 2, 3, 4)) - 1).abs().max() < 1e-3
        _, labels = regions.read_channels(sample.case)
        assert np.array_equal(target[0, 0].numpy(), labels)


def test_classes_are_drawn_equally_often(regions: Store) -> None:
    patches = PatchSource(
        regions, DataConfig(patch_size=(1, 1, 1), foreground=1.0), NO_AUGMENTATION, seed=0
    )
    drawn = np.array([patches[index].region[-1].item() for index in range(600)])
    # A third is drawn from each: of the core's voxels most are not enhancing, of the whole's not core.
    assert (drawn > 0).all()
    assert (drawn & 4 > 0).mean() > 1 / 3
    assert 0.1 < (drawn == 1).mean() < 1 / 3


def test_beyond_the_scan_is_its_minimum_and_background(regions: Store) -> None:
    data = DataConfig(patch_size=(40, 40, 40), foreground=0.0)
    patches = PatchSource(regions, data, NO_AUGMENTATION, seed=0)
    sample = patches[0]
    channels, _ = regions.read_channels(sample.case)
    assert sample.region[:, 0, 0, 0].tolist() == [channels[0].min(), channels[1].min(), 0]


def test_augmented_noise_differs_between_channels(regions: Store) -> None:
    config = AugmentConfig(p_affine=0, p_blur=0, p_gamma=0, p_brightness=0, p_low_resolution=0, p_noise=1)
    patches = PatchSource(regions, DataConfig(patch_size=PATCH), replace(config, flip=False), seed=0)
    plain = PatchSource(regions, DataConfig(patch_size=PATCH), NO_AUGMENTATION, seed=0)
    noisy, clean = (make_batch([p[0]], PATCH, normalisations(regions), CPU)[0][0] for p in (patches, plain))
    noise = (noisy - clean).flatten(1)
    assert noise.std(1).min() > 0
    assert torch.corrcoef(noise)[0, 1].abs() < 0.1


def test_turned_labels_go_to_the_largest_share() -> None:
    random = np.random.default_rng(0)
    coarse = random.integers(0, 4, (4, 4, 4)) - 1  # ignored, background, and two classes
    region = np.kron(coarse, np.ones((5, 5, 5))).astype(np.int16)
    angle = 0.4
    matrix = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    out = torch.zeros((12, 12, 12))
    warp_labels(torch.from_numpy(region), reaching(region, matrix, (12, 12, 12)), matrix, out)
    offset = (np.array(region.shape) - 1) / 2 - matrix @ ((np.array(out.shape) - 1) / 2)
    shares = np.stack(
        [
            ndimage.affine_transform((region == value).astype(float), matrix, offset, (12, 12, 12), order=1)
            for value in (0, -1, 1, 2)
        ]
    )
    best = np.array([0, -1, 1, 2])[shares.argmax(0)]
    clear = np.sort(shares, axis=0)[-1] - np.sort(shares, axis=0)[-2] > 1e-4
    assert clear.mean() > 0.9
    assert np.array_equal(out.numpy()[clear], best[clear])


def test_small_ones_of_each_class_are_reported_or_kept() -> None:
    array = np.zeros((12, 12, 12), np.int16)
    array[2:8, 2:8, 2:8], array[9, 9, 9], array[0, 0, 0] = 1, 2, -1
    labels = Scan(array, np.eye(4))
    grid = labels.grid.with_spacing((3, 3, 3))
    lost = resample_labels(labels, grid, ORGANS)
    assert [one["centre"] for one in lost.lost] == ([[9, 9, 9]] if 2 not in lost.array else [])
    kept = resample_labels(labels, grid, ORGANS, keep_small=True)
    assert sorted(kept.classes) == [0, 1]
    for flat, at in zip(kept.lesions, kept.classes, strict=True):
        assert (kept.array.flat[flat] == at + 1).all()
    assert -1 in np.unique(resample_labels(labels, labels.grid, ORGANS).array)


def test_k_folds_by_patient(data: Path, tmp_path: Path) -> None:
    listed = DataSet(path=data)
    prepare(listed.cases, tmp_path, PrepareConfig(workers=1, folds=3, split=(0.75, 0, 0.25)))
    store = open_store(tmp_path)
    tested = {info.case for info in store.split("test")}
    assert len(tested) == 2
    validated = [case for fold in store.folds for case in fold.val]
    assert sorted(validated) == sorted(info.case for info in store.cases if info.case not in tested)
    for fold in range(3):
        assert {info.case for info in in_fold(store, fold).split("test")} == tested


@pytest.mark.parametrize(("first", "second"), [("CT", "PET"), ("PET", "CT")])
def test_a_channel_that_the_data_set_names_otherwise_is_kept_anew(
    first: str, second: str, data: Path, tmp_path: Path
) -> None:
    source = DataSet(path=data).cases[0]
    for name in (first, second):
        one = replace(source, channels=(channel_of(name),), more=())
        assert prepare([one], tmp_path, PrepareConfig(workers=1, plan=False)).kept == 0
    store = open_store(tmp_path)
    assert [channel.name for channel in store.channels] == [second]
    assert bool(store.cases[0].channels) == (second == "PET")
    assert store.fills


def test_one_class_of_many_is_binary(data: Path, tmp_path: Path) -> None:
    reading = ReadingConfig(labels=(3,), channels=("CT", "PET"))
    listed = DataSet(path=data, reading=reading)
    prepare(listed.cases[:2], tmp_path, PrepareConfig(workers=1, normalisation=("ct", "none")), reading)
    store = open_store(tmp_path)
    assert store.classes.single
    _, labels = store.read(store.cases[0].case)
    assert np.array_equal(labels == 1, read(data / "labelsTr" / f"{store.cases[0].case}.nii.gz") == 3)
    assert store.fingerprint["channel_hu"][0]["mean"] == store.fingerprint["lesion_hu"]["mean"]
    assert store.fingerprint["channel_hu"][1] is None


def test_a_wrong_number_of_normalisations(data: Path, tmp_path: Path) -> None:
    with pytest.raises(VoxelscaleError, match=r"prepare\.normalisation has 1 entries"):
        prepare(DataSet(path=data).cases, tmp_path, PrepareConfig(normalisation=("ct",)))
