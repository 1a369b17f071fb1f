"""Data sets as they are delivered: what they are is recognised, and what belongs together is found."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid
from tests.conftest import SHARED
from tests.formats.test_formats import write_series
from tests.labels.test_kinds import write_table

from voxelscale.config import PrepareConfig, ReadingConfig
from voxelscale.dataset.listing import detect_layout, list_scans, list_sources
from voxelscale.dataset.names import Names
from voxelscale.dataset.reading import read_case, read_image
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, affine_from_itk
from voxelscale.store import open_store
from voxelscale.store.prepare import prepare

AFFINE = affine_from_itk((-20.0, -30.0, 100.0), (1.0, 1.0, 2.0), np.eye(3))


def image() -> Scan:
    values = np.random.default_rng(0).integers(-1000, 400, (12, 20, 24)).astype(np.int16)
    return Scan(values, AFFINE)


def mask(value: int = 1) -> Scan:
    values = np.zeros((12, 20, 24), np.uint8)
    values[4:7, 5:9, 6:11] = value
    return Scan(values, AFFINE)


def decathlon(folder: Path) -> None:
    for name in ("lung_001", "lung_002"):
        write_scan(image(), folder / "imagesTr" / f"{name}.nii.gz")
        write_scan(mask(), folder / "labelsTr" / f"{name}.nii.gz")
    write_scan(image(), folder / "imagesTs" / "lung_003.nii.gz")
    pairs = [
        {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"}
        for n in ("lung_001", "lung_002")
    ]
    content = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "cancer"}, "training": pairs}
    (folder / "dataset.json").write_text(json.dumps({**content, "test": ["./imagesTs/lung_003.nii.gz"]}))


def nnunet(folder: Path, channels: int = 1) -> None:
    for name in ("a", "b"):
        for channel in range(channels):
            write_scan(image(), folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
        write_scan(mask(2), folder / "labelsTr" / f"{name}.nii.gz")
    names = {str(c): "CT" for c in range(channels)}
    labels = {"background": 0, "lung": 1, "lesion": 2}
    content = {"channel_names": names, "labels": labels, "numTraining": 2, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))


def luna16(folder: Path) -> None:
    for uid, subset in (("1.2.1", "subset0"), ("1.2.2", "subset1")):
        (folder / subset).mkdir(parents=True, exist_ok=True)
        import SimpleITK as sitk

        from voxelscale.geometry import to_itk

        sitk.WriteImage(to_itk(image()), str(folder / subset / f"{uid}.mhd"))
    centre = image().grid.index_to_mm((5, 8, 9))
    write_table(folder / "annotations.csv", [("1.2.1", *centre, 6.0)])
    write_table(folder / "annotations_excluded.csv", [("1.2.2", *centre, 4.0), ("1.2.9", 0, 0, 0, 3)])


MADE = {"msd": decathlon, "nnunet": nnunet, "luna16": luna16}


@pytest.mark.parametrize("layout", MADE)
def test_a_layout_is_recognised_and_read(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from voxelscale.console import set_verbosity

    MADE[layout](tmp_path)
    assert detect_layout(tmp_path) == layout
    set_verbosity(1)
    found = list_sources(tmp_path)
    assert "layout: " in capsys.readouterr().err
    set_verbosity(0)
    assert len(found) == 2
    assert list_sources(tmp_path, layout) == found
    for source in found:
        scan, labels = read_case(source, ReadingConfig())
        assert scan.grid.same_as(image().grid, 1e-3)
        assert np.array_equal(scan.array, image().array)
        if layout != "luna16":
            assert np.array_equal(labels.mask.array > 0, mask().array > 0)


def test_tests_are_left_out_but_can_be_looked_at(tmp_path: Path) -> None:
    decathlon(tmp_path)
    assert [s.case for s in list_sources(tmp_path)] == ["lung_001", "lung_002"]
    assert "lung_003" in [s.case for s in list_scans(tmp_path)]


def test_a_named_label_that_is_not_there_is_an_error_of_its_case(tmp_path: Path) -> None:
    decathlon(tmp_path)
    (tmp_path / "labelsTr" / "lung_002.nii.gz").unlink()
    whole, without = list_sources(tmp_path)
    read_case(whole, ReadingConfig())
    with pytest.raises(VoxelscaleError, match=r"lung_002\.nii\.gz"):
        read_case(without, ReadingConfig(allow_empty=True))


@pytest.mark.parametrize("path", ["../outside.nii.gz", "/etc/passwd", "imagesTr/../../outside.nii.gz"])
def test_a_table_cannot_lead_out_of_its_folder(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "task"
    decathlon(folder)
    write_scan(image(), tmp_path / "outside.nii.gz")
    content = json.loads((folder / "dataset.json").read_text())
    content["training"][0]["image"] = path
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(VoxelscaleError, match=r"dataset\.json"):
        list_sources(folder)


def test_two_channels_are_files_of_one_case(tmp_path: Path) -> None:
    nnunet(tmp_path, channels=2)
    for source in list_sources(tmp_path):
        assert source.image.name == f"{source.case}_0000.nii.gz"
        assert [path.name for path in source.more] == [f"{source.case}_0001.nii.gz"]


def test_a_layout_that_it_is_not(tmp_path: Path) -> None:
    nnunet(tmp_path)
    with pytest.raises(VoxelscaleError):
        list_sources(tmp_path, "luna16")
    with pytest.raises(VoxelscaleError, match="no such layout"):
        list_sources(tmp_path, "luna")


def test_luna16_is_prepared_with_what_neither_counts_nor_hurts(tmp_path: Path) -> None:
    luna16(tmp_path / "luna")
    config = PrepareConfig(spacing=(2.0, 1.0, 1.0), split=(1, 0, 0), workers=1)
    outcome = prepare(list_sources(tmp_path / "luna"), tmp_path / "store", config)
    assert not outcome.failed, "a scan without a nodule is healthy, not broken"
    store = open_store(tmp_path / "store")
    volumes = {case.case: case.lesion_volumes_mm3 for case in store.cases}
    assert [len(v) for _, v in sorted(volumes.items())] == [1, 0]
    with (tmp_path / "store" / "findings.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["case"], row["kind"], float(row["diameter_mm"])) for row in rows] == [
        ("1.2.1", "nodule", 6.0),
        ("1.2.2", "excluded", 4.0),
    ]
    write_table(tmp_path / "luna" / "annotations_excluded.csv", [])
    prepare(list_sources(tmp_path / "luna"), tmp_path / "store", config)
    assert "excluded" not in (tmp_path / "store" / "findings.csv").read_text()


def test_excluded_findings_alone_say_that_a_scan_is_healthy(tmp_path: Path) -> None:
    """Whether the scan is named by its series or by its file, and where no other scan is there."""
    luna16(tmp_path / "luna")
    lines = [f"luna/{folder}.mhd,luna/annotations.csv" for folder in ("subset0/1.2.1", "subset1/1.2.2")]
    (tmp_path / "some.csv").write_text(f"image,label,case\n{lines[0]},a\n{lines[1]},b\n")
    (tmp_path / "one.csv").write_text(f"image,label,case\n{lines[1]},b\n")
    (tmp_path / "luna/subset0/1.2.1.mhd").rename(tmp_path / "luna/subset0/1.2.1.other")
    for data in (tmp_path / "one.csv", tmp_path / "luna"):
        (source,) = list_sources(data)
        assert [mark.kind for mark in read_case(source, ReadingConfig())[1].findings] == ["excluded"]
    (tmp_path / "luna/subset0/1.2.1.other").rename(tmp_path / "luna/subset0/1.2.1.mhd")
    both = [read_case(source, ReadingConfig())[1] for source in list_sources(tmp_path / "some.csv")]
    assert [[mark.kind for mark in labels.findings] for labels in both] == [["nodule"], ["excluded"]]


def patients(folder: Path) -> list[str]:
    """Three series of two patients in one heap of files; their UIDs."""
    uids = [generate_uid() for _ in range(3)]
    for number, uid in enumerate(uids):
        write_series(folder / "x", image(), uid=uid)
        for path in (folder / "x").iterdir():
            data = pydicom.dcmread(path)
            if data.SeriesInstanceUID == uid:
                data.PatientID = f"SECRET{min(number, 1)}"
                data.save_as(path)
    return uids


def test_series_in_one_folder_are_cases_of_their_patients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uids = patients(tmp_path / "tree")
    found = list_sources(tmp_path / "tree", "dicom", names=Names(folder=tmp_path / "key"))
    assert sorted(s.series for s in found) == sorted(uids)
    assert len({s.case for s in found}) == 3
    assert len({s.patient for s in found}) == 2
    assert not any("SECRET" in text for s in found for text in (s.case, s.patient))
    again = list_sources(tmp_path / "tree", "dicom", names=Names(folder=tmp_path / "key"))
    assert [s.case for s in again] == [s.case for s in found]
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another user"))
    others = list_sources(tmp_path / "tree", "dicom", names=Names(folder=tmp_path / "other"))
    assert {s.case for s in others}.isdisjoint(s.case for s in found)
    by_series = list_sources(tmp_path / "tree", "dicom", names=Names(how="series", folder=tmp_path / "key"))
    assert sorted(s.case for s in by_series) == sorted(uids)
    for source in found:
        assert read_image(source, ReadingConfig()).array.shape == image().array.shape


def test_the_split_is_the_same_under_any_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uids = patients(tmp_path / "tree")
    for path in list((tmp_path / "tree" / "x").iterdir()):
        if pydicom.dcmread(path).SeriesInstanceUID == uids[2]:
            path.unlink()
    config = PrepareConfig(spacing=(4.0, 2.0, 2.0), split=(1, 1, 0), workers=1)
    sides = []
    for key in range(4):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / f"user{key}"))
        names = Names(folder=tmp_path / f"key{key}")
        sources = list_sources(tmp_path / "tree", "dicom", names=names)
        done = prepare(sources, tmp_path / f"store{key}", config, ReadingConfig(allow_empty=True)).done
        series = {source.case: source.series for source in sources}
        sides.append({series[info.case]: info.split for info in done})
    assert all(side == sides[0] for side in sides)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real scans are not here")
def test_lidc_with_its_xml_beside_or_elsewhere(tmp_path: Path) -> None:
    assert detect_layout(SHARED / "lidc") == "lidc"
    found = list_sources(SHARED / "lidc", names=Names(how="file"))
    assert sorted(label.name for s in found for label in s.labels) == ["69.xml", "71.xml"]
    series = tmp_path / "scans" / "LIDC-IDRI-0001" / "study" / "series"
    shutil.copytree(SHARED / "lidc" / "LIDC-IDRI-0001" / "ct", series)
    (tmp_path / "xml" / "157").mkdir(parents=True)
    shutil.copy(SHARED / "lidc" / "LIDC-IDRI-0001" / "69.xml", tmp_path / "xml" / "157" / "158.xml")
    (apart,) = list_sources(tmp_path / "scans", annotations=tmp_path / "xml", names=Names(how="file"))
    assert apart.labels == (tmp_path / "xml" / "157" / "158.xml",)
    _, labels = read_case(apart, ReadingConfig())
    assert labels.findings[0].readers == 4
