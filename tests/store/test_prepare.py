from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import read_pair

from voxelscale.config import Config
from voxelscale.dataset.listing import Source, list_scans, list_sources
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, to_itk
from voxelscale.store import CaseInfo, Reader, Store, open_store
from voxelscale.store.prepare import assign_splits, prepare, prepare_case


def info(case: str, patient: str) -> CaseInfo:
    return CaseInfo(
        case=case,
        patient=patient,
        shape=(1, 1, 1),
        affine=tuple(tuple(row) for row in np.eye(4).tolist()),
        source_spacing=(1, 1, 1),
        lesion_volumes_mm3=(),
        intensities={},
        key="",
    )


def test_a_stored_case_is_the_resampled_scan(tiny: Config, scans: Path, store: Store) -> None:
    source = list_sources(scans)[0]
    assert source.labels
    image, label = read_pair(source.image, source.labels[0])
    stored = next(c for c in store.cases if c.case == source.case)
    hu, mask = store.read(source.case)
    reference = to_itk(Scan(np.zeros(stored.shape, np.float32), stored.grid.affine))
    float_image = to_itk(Scan(image.array.astype(np.float32), image.affine))
    theirs = sitk.Resample(float_image, reference, sitk.Transform(), sitk.sitkLinear, -1024.0)
    assert np.abs(sitk.GetArrayFromImage(theirs) - hu).max() <= 0.5 + 1e-3
    nearest = sitk.Resample(to_itk(label), reference, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    assert np.array_equal(sitk.GetArrayFromImage(nearest), mask)
    assert stored.grid.spacing == pytest.approx(tiny.prepare.spacing)


def test_lesions_are_indexed(store: Store) -> None:
    reader = Reader(store.path)
    for case in store.cases:
        _, mask = store.read(case.case)
        lesions = reader.lesions(case.case)
        assert len(lesions) == len(case.lesion_volumes_mm3)
        assert all(mask[tuple(lesion.T)].all() for lesion in lesions)
        voxel = float(np.prod(store.spacing))
        assert sum(case.lesion_volumes_mm3) == pytest.approx(np.count_nonzero(mask) * voxel, abs=0.1)


@given(st.tuples(*[st.integers(-30, 60)] * 3), st.tuples(*[st.integers(1, 40)] * 3))
def test_any_region_is_the_padded_scans(
    store: Store, start: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    case = store.cases[1].case
    hu, mask = store.read(case)
    region = Reader(store.path).region(case, start, shape)
    pad = [(100, 100)] * 3
    box = tuple(slice(100 + s, 100 + s + n) for s, n in zip(start, shape, strict=True))
    assert np.array_equal(region[0], np.pad(hu, pad, constant_values=-1024)[box])
    assert np.array_equal(region[1], np.pad(mask, pad)[box])


def test_fingerprint(store: Store) -> None:
    train = store.split("train")
    values = np.concatenate([hu[mask > 0] for hu, mask in (store.read(c.case) for c in train)]).astype(
        float
    )
    lesion_hu = store.fingerprint["lesion_hu"]
    assert lesion_hu["mean"] == pytest.approx(values.mean(), abs=0.01)
    assert lesion_hu["std"] == pytest.approx(values.std(), abs=0.01)
    low, high = lesion_hu["percentile_00_5"], lesion_hu["percentile_99_5"]
    assert low <= np.percentile(values, 0.5) < np.percentile(values, 99.5) <= high
    assert store.fingerprint["lesion_volume_mm3"]["count"] == sum(len(c.lesion_volumes_mm3) for c in train)
    assert store.fingerprint["cases"] == {"train": 3, "val": 1, "test": 1}
    assert sum(store.fingerprint["orientations"].values()) == 3


def test_running_again_keeps_what_is_unchanged(tiny: Config, scans: Path, tmp_path: Path) -> None:
    sources = list_sources(scans)[:2]
    assert prepare(sources, tmp_path, tiny.prepare).kept == 0
    first = json.loads((tmp_path / "dataset.json").read_text())
    again = prepare(sources, tmp_path, tiny.prepare)
    assert again.kept == 2
    assert json.loads((tmp_path / "dataset.json").read_text()) == first
    (tmp_path / "cases" / f"{sources[0].case}.b2nd").write_bytes(b"cut short")
    assert prepare(sources, tmp_path, tiny.prepare).kept == 1
    assert prepare(sources, tmp_path, replace(tiny.prepare, spacing=(6.0, 5.0, 5.0))).kept == 0
    assert open_store(tmp_path).spacing == (6.0, 5.0, 5.0)


def test_an_ended_preparation_with_other_settings_leaves_no_mixed_store(
    tiny: Config, scans: Path, tmp_path: Path
) -> None:
    sources, spacing = list_sources(scans)[:2], (6.0, 5.0, 5.0)
    prepare(sources, tmp_path, tiny.prepare)
    other = replace(tiny.prepare, spacing=spacing)
    prepare_case(sources[0], other, tmp_path, spacing)  # killed after the first
    with pytest.raises(VoxelscaleError, match="not there") as error:
        open_store(tmp_path)
    assert "give the same command again" in error.value.hint
    assert prepare(sources, tmp_path, other).kept == 1
    store = open_store(tmp_path)
    assert all(store.read(info.case)[0].shape == info.shape for info in store.cases)


def test_a_broken_case_does_not_stop_the_others(tiny: Config, scans: Path, tmp_path: Path) -> None:
    good = list_sources(scans)[:2]
    (tmp_path / "torn.nii.gz").write_bytes(good[0].image.read_bytes()[:2000])
    torn = replace(good[0], case="torn", patient="torn", image=tmp_path / "torn.nii.gz")
    swapped = replace(good[0], case="swapped", patient="swapped", labels=good[1].labels)
    lost = replace(good[0], case="lost", patient="lost", labels=())
    outcome = prepare([torn, *good, swapped, lost], tmp_path / "store", tiny.prepare)
    assert [c.case for c in outcome.done] == [s.case for s in good]
    failed = {case: message for case, message, _ in outcome.failed}
    assert set(failed) == {"torn", "swapped", "lost"}
    assert "cut short" in failed["torn"]
    assert "has no mask" in failed["lost"]
    with pytest.raises(VoxelscaleError, match="no case could be prepared"):
        prepare([torn], tmp_path / "none", tiny.prepare)


def test_the_median_spacing_is_taken(tiny: Config, scans: Path, tmp_path: Path) -> None:
    sources = list_sources(scans)[:3]
    outcome = prepare(sources, tmp_path, replace(tiny.prepare, spacing=None))
    spacings = np.asarray([c.source_spacing for c in outcome.done])
    assert open_store(tmp_path).spacing == pytest.approx(np.median(spacings, axis=0), abs=0.006)


@given(st.integers(1, 40), st.integers(0, 5), st.tuples(*[st.integers(0, 9)] * 3).filter(any))
def test_no_patient_is_on_two_sides(patients: int, seed: int, shares: tuple[int, int, int]) -> None:
    infos = [info(f"c{i}", f"p{i % patients}") for i in range(2 * patients)]
    dealt = assign_splits(infos, shares, seed)
    sides: dict[str, set[str]] = {}
    for case in dealt:
        sides.setdefault(case.patient, set()).add(case.split)
    assert all(len(side) == 1 for side in sides.values())
    counts = [sum(side == {name} for side in sides.values()) for name in ("train", "val", "test")]
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - patients * share / sum(shares)) <= 2
        assert count == 0 or share > 0
    assert assign_splits(list(infos), shares, seed) == dealt


def test_listings(scans: Path, tmp_path: Path) -> None:
    table = list_sources(scans)
    assert table == list_sources(scans / "dataset.csv")
    images, labels = tmp_path / "imagesTr", tmp_path / "labelsTr"
    images.mkdir()
    labels.mkdir()
    for source in table[:2]:
        assert source.labels
        (images / f"{source.case}_0000.nii.gz").symlink_to(source.image)
        (labels / f"{source.case}.nii.gz").symlink_to(source.labels[0])
    found = list_sources(tmp_path)
    assert [s.case for s in found] == [s.case for s in table[:2]]
    assert all(s.labels for s in found)
    assert [s.case for s in list_scans(images)] == [s.case for s in table[:2]]
    assert list_scans(table[0].image) == [
        Source(case=table[0].case, patient=table[0].case, image=table[0].image)
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("volume_no,remark\na,b\n", "line 1 names no column image: 'volume_no,remark'"),
        ("image,label\n", "names no image"),
        ("image,label\n,b\n", "line 2 names no image"),
        ("case,image,label\nx,a,b\nx,c,d\n", "case x occurs twice"),
    ],
)
def test_bad_tables(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "dataset.csv").write_text(content)
    with pytest.raises(VoxelscaleError, match=words):
        list_sources(tmp_path)


def test_names_that_mean_something_to_a_path_are_tamed(tmp_path: Path) -> None:
    with (tmp_path / "dataset.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([["case", "image", "label"], ["../../etc/x y", "a.nii", "b.nii"]])
    assert list_sources(tmp_path)[0].case == "_.._etc_x_y"


def test_an_empty_folder_holds_no_scans(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(VoxelscaleError, match="no scan found"):
        list_scans(tmp_path)


def test_a_folder_of_scans(tmp_path: Path) -> None:
    scan = Scan(np.zeros((4, 5, 6), np.int16), np.eye(4))
    for name in ("b.mha", "a.nii.gz"):
        write_scan(scan, tmp_path / name)
    (tmp_path / "readme.txt").write_text("no scan")
    assert [s.case for s in list_scans(tmp_path)] == ["a", "b"]


def test_a_store_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(VoxelscaleError, match="not there"):
        open_store(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format": 99}')
    with pytest.raises(VoxelscaleError, match="format 99"):
        open_store(tmp_path)
