"""Several channels a case: numbered files, files of four axes, columns of a CSV; and their faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from tests.dataset.test_layouts import AFFINE, decathlon, image, mask, nnunet
from tests.formats.test_formats import write_series

from voxelscale.channels import ONE_CT, Channel
from voxelscale.config import ReadingConfig
from voxelscale.console import set_verbosity
from voxelscale.dataset import DataSet, Source
from voxelscale.dataset.reading import read_case, read_image, read_lattice, read_more
from voxelscale.dataset.stamps import source_stamp
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import read_scan, volumes_of, write_scan
from voxelscale.geometry import Scan

READING = ReadingConfig()
PETCT = (Channel(), Channel(name="PET", scheme="zscore"))


def rename(folder: Path, **content: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | content))


def pet(seed: int = 1, scale: float = 0.37) -> Scan:
    """A float image of another range, on coarser voxels that begin where the CT's do."""
    grid = image().grid.with_spacing((4.0, 2.0, 2.0))
    values = np.random.default_rng(seed).random(grid.shape).astype(np.float32) * scale
    return Scan(values, grid.affine)


def petct(folder: Path) -> Path:
    nnunet(folder, channels=2)
    rename(folder, channel_names={"1": "PET", "0": "CT"})
    for name in ("a", "b"):
        write_scan(pet(), folder / "imagesTr" / f"{name}_0001.nii.gz")
    return folder


def four_axes(path: Path, volumes: list[np.ndarray]) -> None:
    """By nibabel, (x, y, z, t) in RAS."""
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE[:, [2, 1, 0, 3]]
    nibabel.save(nibabel.Nifti1Image(np.stack([v.T for v in volumes], axis=-1), ras), path)


def test_numbered_files_of_nnunet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    petct(tmp_path)
    (tmp_path / "imagesTs").mkdir()
    for number in (0, 1):
        shutil.copy(
            tmp_path / "imagesTr" / f"a_000{number}.nii.gz", tmp_path / "imagesTs" / f"c_000{number}.nii.gz"
        )
    set_verbosity(1)
    data = DataSet(path=tmp_path)
    assert data.channels == PETCT
    assert "channels: CT (ct), PET (zscore)" in capsys.readouterr().err
    set_verbosity(2)
    for source in data.cases:
        assert source.channels == PETCT
        assert read_image(source, READING).array.dtype == np.int16
        (more,) = read_more(source, READING)
        assert more.array.dtype == np.float32
        assert np.array_equal(more.array, pet().array)
        assert more.grid.same_as(pet().grid)
        told = capsys.readouterr().err
        assert told.count(f"{source.case}: PET lies on another lattice (4 x 2 x 2 mm") == 1
        assert "warning" not in told
    set_verbosity(0)
    assert len(source_stamp(data.cases[0])) == 2
    assert [(scan.case, scan.more[0].name) for scan in DataSet(path=tmp_path).scans] == [
        ("a", "a_0001.nii.gz"),
        ("b", "b_0001.nii.gz"),
        ("c", "c_0001.nii.gz"),
    ]


def test_the_list_of_a_json_names_several_images(tmp_path: Path) -> None:
    petct(tmp_path)
    files = ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"]
    rename(tmp_path, dataset={"x": {"images": files, "label": "labelsTr/a.nii.gz"}})
    (source,) = DataSet(path=tmp_path).cases
    assert (source.case, source.image.name, source.more[0].name) == ("x", "a_0000.nii.gz", "a_0001.nii.gz")
    rename(tmp_path, dataset={"x": {"images": files[:1], "label": "labelsTr/a.nii.gz"}})
    with pytest.raises(VoxelscaleError, match=r"lacks the channel PET"):
        read_image(DataSet(path=tmp_path).cases[0], READING)


def test_one_channel_of_another_name_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nnunet(tmp_path)
    rename(tmp_path, channel_names={"0": "MRI"})
    set_verbosity(1)
    data = DataSet(path=tmp_path)
    assert data.channels == (Channel(name="MRI", scheme="zscore"),)
    assert "channels: MRI (zscore)\n" in capsys.readouterr().err
    renamed = DataSet(path=tmp_path, reading=ReadingConfig(channels=("CT",)))
    assert renamed.channels == ONE_CT
    assert "channels" not in capsys.readouterr().err
    assert DataSet(path=tmp_path, reading=ReadingConfig(channels=("noNorm",))).channels[0].scheme == "none"


def test_names_must_be_as_many(tmp_path: Path) -> None:
    petct(tmp_path)
    data = DataSet(path=tmp_path, reading=ReadingConfig(channels=("CT",)))
    with pytest.raises(VoxelscaleError, match=r"names 1 channels, but .*dataset.json has 2 \(CT, PET\)"):
        _ = data.cases


@pytest.mark.parametrize("names", [[], {"0": 1}, {"1": "CT"}, {"0": "CT", "2": "PET"}, "CT"])
def test_channels_that_are_not_understood(tmp_path: Path, names: object) -> None:
    nnunet(tmp_path)
    rename(tmp_path, channel_names=names)
    with pytest.raises(VoxelscaleError, match=r"dataset\.json: its channels are"):
        _ = DataSet(path=tmp_path).cases


def test_a_missing_and_a_superfluous_channel_are_their_cases_fault(tmp_path: Path) -> None:
    petct(tmp_path)
    shutil.copy(tmp_path / "imagesTr" / "a_0001.nii.gz", tmp_path / "imagesTr" / "a_0002.nii.gz")
    (tmp_path / "imagesTr" / "b_0000.nii.gz").unlink()
    odd, bare = DataSet(path=tmp_path).cases
    with pytest.raises(VoxelscaleError, match=r"a_0002.nii.gz is a channel beyond those .* \(CT, PET\)"):
        read_case(odd, READING)
    with pytest.raises(VoxelscaleError, match="lacks the channel CT") as caught:
        read_image(bare, READING)
    assert caught.value.hint == "add the file, or take the case out"


def test_a_file_of_four_axes(tmp_path: Path) -> None:
    decathlon(tmp_path)
    rng = np.random.default_rng(3)
    volumes = [rng.integers(0, 3000, image().array.shape).astype(np.uint16) for _ in range(3)]
    for name in ("imagesTr/lung_001", "imagesTr/lung_002", "imagesTs/lung_003"):
        four_axes(tmp_path / f"{name}.nii.gz", volumes)
    rename(tmp_path, modality={"0": "FLAIR", "1": "T1w", "2": "T2w"})
    data = DataSet(path=tmp_path)
    assert [channel.name for channel in data.channels] == ["FLAIR", "T1w", "T2w"]
    for source in [*data.cases, *data.scans]:
        assert source.volumes == 3
        first, rest = read_image(source, READING), read_more(source, READING)
        assert read_lattice(source, READING).same_as(image().grid, 1e-3)
        for scan, volume in zip([first, *rest], volumes, strict=True):
            assert np.array_equal(scan.array, volume)
            assert scan.grid.same_as(image().grid, 1e-3)
    read_case(data.cases[0], READING)
    four_axes(tmp_path / "imagesTr" / "lung_002.nii.gz", volumes[:2])
    with pytest.raises(VoxelscaleError, match="holds 2 channels, but 3 are named"):
        read_image(data.cases[1], READING)
    with pytest.raises(VoxelscaleError, match=r"4-D, 2 volumes") as caught:
        read_scan(data.cases[1].image)
    assert "reading.channels" in caught.value.hint
    assert volumes_of(data.cases[1].image) == 2
    scan = read_scan(data.cases[1].image, volume=1)
    assert np.array_equal(scan.array, volumes[1])
    with pytest.raises(VoxelscaleError, match="2 volumes, not 3"):
        read_scan(data.cases[1].image, volume=2)


def table(folder: Path, header: str, *rows: str) -> Path:
    for name in ("ct", "pet"):
        write_scan(image() if name == "ct" else pet(), folder / f"{name}.nii.gz")
    write_scan(mask(), folder / "mask.nii.gz")
    path = folder / "cases.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_columns_of_a_csv(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "case,image_CT,image_PET,label",
        "x,ct.nii.gz,pet.nii.gz,mask.nii.gz",
        "y,ct.nii.gz,,mask.nii.gz",
    )
    data = DataSet(path=path)
    assert data.channels == PETCT
    whole, lacking = data.cases
    assert (whole.image.name, [p.name for p in whole.more]) == ("ct.nii.gz", ["pet.nii.gz"])
    assert np.array_equal(read_more(whole, READING)[0].array, pet().array)
    with pytest.raises(VoxelscaleError, match=r"ct\.nii\.gz: lacks the channel PET"):
        read_case(lacking, READING)
    renamed = DataSet(path=path, reading=ReadingConfig(channels=("noNorm", "CT")))
    assert [channel.scheme for channel in renamed.channels] == ["none", "ct"]
    assert [scan.case for scan in data.scans] == ["x", "y"]
    turned = table(tmp_path, "label;image_PET;image_CT", "mask.nii.gz;pet.nii.gz;ct.nii.gz")
    assert [channel.name for channel in DataSet(path=turned).channels] == ["PET", "CT"]


def test_the_same_names_in_another_order(tmp_path: Path) -> None:
    """By name, as predict's hint has them written: the PET is not called CT."""
    asked = ReadingConfig(channels=("ct", "pet"))
    path = table(tmp_path, "image_PET,image_CT,label", "pet.nii.gz,ct.nii.gz,mask.nii.gz")
    data = DataSet(path=path, reading=asked)
    (source,) = data.cases
    assert [channel.scheme for channel in data.channels] == ["ct", "zscore"]
    assert (source.image.name, source.more[0].name) == ("ct.nii.gz", "pet.nii.gz")
    nnunet(tmp_path / "json", channels=2)
    rename(tmp_path / "json", channel_names={"0": "PET", "1": "CT"})
    with pytest.raises(VoxelscaleError, match=r"in another order than it does \(PET, CT\)"):
        _ = DataSet(path=tmp_path / "json", reading=asked).cases


def test_numbered_columns_need_names(tmp_path: Path) -> None:
    row = "pet.nii.gz,ct.nii.gz,mask.nii.gz"
    path = table(tmp_path, "image_0001,image_0000,label", row)
    with pytest.raises(VoxelscaleError, match="its channels have no names") as caught:
        _ = DataSet(path=path).cases
    assert "reading.channels=[CT, PET]" in caught.value.hint
    data = DataSet(path=path, reading=ReadingConfig(channels=("CT", "PET")))
    (source,) = data.cases
    assert (source.image.name, source.more[0].name) == ("ct.nii.gz", "pet.nii.gz")


def test_a_column_beside_the_image_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As before there were several channels: image_id and the like are no images."""
    path = table(tmp_path, "image,image_id,image_id,label", "ct.nii.gz,7,8,mask.nii.gz")
    (source,) = DataSet(path=path).cases
    assert (source.channels, source.more) == (ONE_CT, ())
    row = "ct.nii.gz,.,ct.nii.gz,mask.nii.gz"  # where the image lies is not one more
    assert DataSet(path=table(tmp_path, "image,image_dir,image_file_name,label", row)).cases
    assert "warning" not in capsys.readouterr().err
    path = table(tmp_path, "image,image_PET,label", "ct.nii.gz,pet.nii.gz,mask.nii.gz")
    assert DataSet(path=path).cases[0].channels == ONE_CT
    assert "its column image_PET names files and is not read" in capsys.readouterr().err
    path = table(tmp_path, "image_path,label", "ct.nii.gz,mask.nii.gz")
    assert DataSet(path=path).cases[0].channels == ONE_CT


def test_folders_of_numbered_images_need_names(tmp_path: Path) -> None:
    petct(tmp_path)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(VoxelscaleError, match="a second channel of a") as caught:
        _ = DataSet(path=tmp_path).cases
    assert "reading.channels=[CT, PET]" in caught.value.hint
    named = DataSet(path=tmp_path, reading=ReadingConfig(channels=("CT", "PET")))
    assert [(s.case, s.image.name, s.more[0].name) for s in named.cases] == [
        ("a", "a_0000.nii.gz", "a_0001.nii.gz"),
        ("b", "b_0000.nii.gz", "b_0001.nii.gz"),
    ]
    assert named.channels == PETCT


def test_loose_scans_of_several_channels(tmp_path: Path) -> None:
    petct(tmp_path / "data")
    inside = DataSet(path=tmp_path / "data" / "imagesTr").scans
    assert [(s.case, len(s.more), s.channels) for s in inside] == [("a", 1, PETCT), ("b", 1, PETCT)]
    (one,) = DataSet(path=tmp_path / "data" / "imagesTr" / "b_0000.nii.gz").scans
    assert (one.case, one.more[0].name) == ("b", "b_0001.nii.gz")
    shutil.copytree(tmp_path / "data" / "imagesTr", tmp_path / "bare")
    assert len(DataSet(path=tmp_path / "bare").scans) == 4, "nothing says that they are channels"
    asked = ReadingConfig(channels=("CT", "PET"))
    named = DataSet(path=tmp_path / "bare", reading=asked).scans
    assert [(s.case, len(s.more), s.channels) for s in named] == [("a", 1, PETCT), ("b", 1, PETCT)]


def pair(folder: Path, other: Scan) -> Source:
    write_scan(image(), folder / "ct.nii.gz")
    write_scan(other, folder / "pet.nii.gz")
    return Source(
        case="x", patient="x", image=folder / "ct.nii.gz", more=(folder / "pet.nii.gz",), channels=PETCT
    )


def moved(scan: Scan, z: float) -> Scan:
    affine = scan.affine.copy()
    affine[2, 3] += z
    return Scan(scan.array, affine)


def test_a_channel_that_lies_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VoxelscaleError, match=r"pet\.nii\.gz: does not overlap with ct\.nii\.gz"):
        read_more(pair(tmp_path, moved(pet(), 500)), READING)
    read_more(pair(tmp_path, moved(pet(), 12)), READING)
    # Half of the CT's 24 mm: its slices are 2 mm apart, 6 of 12 lie below the PET's first edge.
    assert "pet.nii.gz: covers 50.0 % of ct.nii.gz only" in capsys.readouterr().err
    read_more(pair(tmp_path, pet()), READING)
    assert capsys.readouterr().err == ""


def test_a_channel_of_another_patient(tmp_path: Path) -> None:
    for name, patient in (("ct", "P1"), ("pet", "P2")):
        write_series(tmp_path / name, image())
        for path in (tmp_path / name).iterdir():
            data = pydicom.dcmread(path)
            data.PatientID = patient
            data.save_as(path)
    write_scan(mask(), tmp_path / "mask.nii.gz")
    (tmp_path / "cases.csv").write_text("image_CT,image_PET,label\nct,pet,mask.nii.gz\n")
    (source,) = DataSet(path=tmp_path / "cases.csv").cases
    with pytest.raises(VoxelscaleError, match="of another patient than ct"):
        read_more(source, READING)
    for path in (tmp_path / "pet").iterdir():
        data = pydicom.dcmread(path)
        data.PatientID = "P1"
        data.save_as(path)
    (other,) = read_more(source, READING)
    assert np.array_equal(other.array, read_image(source, READING).array)


def test_a_missing_channel_file(tmp_path: Path) -> None:
    source = pair(tmp_path, pet())
    (tmp_path / "pet.nii.gz").unlink()
    with pytest.raises(VoxelscaleError, match=r"pet\.nii\.gz: no such file"):
        read_more(source, READING)
    assert "pet" not in source.without_paths(f"{tmp_path / 'pet.nii.gz'}: no such file")
