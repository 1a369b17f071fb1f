from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from tests.conftest import read_pair

from voxelscale.errors import VoxelscaleError
from voxelscale.formats import detect_format, read_label, read_scan, write_scan
from voxelscale.geometry import Scan, affine_from_itk, to_itk

TURN = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])
AFFINE = affine_from_itk((-120.5, 33.25, 900.0), (0.7, 0.8, 2.5), TURN)


def volume() -> Scan:
    values = np.random.default_rng(0).integers(-1024, 2000, (6, 9, 11)).astype(np.int16)
    return Scan(values, AFFINE)


def mask() -> Scan:
    values = np.zeros((6, 9, 11), np.uint8)
    values[2:4, 3:6, 4:8] = 1
    return Scan(values, AFFINE)


def write_series(folder: Path, scan: Scan, drop: int | None = None, uid: str | None = None) -> None:
    """A CT series as a scanner writes it: unsigned pixels, a slope and an intercept."""
    folder.mkdir(parents=True, exist_ok=True)
    uid, frame, grid = uid or generate_uid(), generate_uid(), scan.grid
    for z, pixels in enumerate(scan.array):
        if z == drop:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        name = folder / f"{uid[-6:]}_{len(scan.array) - z:03d}.dcm"  # names against the order of positions
        ds = FileDataset(str(name), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.Modality, ds.SeriesInstanceUID, ds.StudyInstanceUID = "CT", uid, frame
        ds.FrameOfReferenceUID, ds.PatientID, ds.InstanceNumber = frame, "P", z + 1
        ds.ImagePositionPatient = [round(float(v), 6) for v in grid.index_to_mm((z, 0, 0))]
        ds.ImageOrientationPatient = [round(float(v), 8) for v in grid.direction[:, :2].T.ravel()]
        ds.PixelSpacing, ds.SliceThickness = [grid.spacing[1], grid.spacing[2]], grid.spacing[0]
        ds.Rows, ds.Columns = pixels.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleIntercept, ds.RescaleSlope = -1024, 1
        ds.PixelData = (pixels.astype(np.int32) + 1024).astype("<u2").tobytes()
        pydicom.dcmwrite(name, ds, enforce_file_format=True)


@pytest.mark.parametrize("extension", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_written_and_read_again(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"scan{extension}"
    write_scan(volume(), path)
    again = read_scan(path)
    assert again.array.dtype == np.int16
    assert np.array_equal(again.array, volume().array)
    assert np.allclose(again.affine, AFFINE, atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file stays


@pytest.mark.parametrize("extension", [".nii.gz", ".mha", ".mhd", ".nrrd"])
def test_format_is_found_by_content(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"scan{extension}"
    sitk.WriteImage(to_itk(volume()), str(path))
    known = {".nii.gz": "nifti", ".mha": "metaimage", ".mhd": "metaimage", ".nrrd": "nrrd"}[extension]
    assert detect_format(path) == known
    if extension != ".mhd":
        renamed = tmp_path / "scan.dat"
        shutil.copy(path, renamed)
        assert detect_format(renamed) == known
        assert np.array_equal(read_scan(renamed).array, volume().array)


def test_nifti_is_nibabels(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    write_scan(volume(), path)
    theirs = nibabel.load(path)
    assert np.array_equal(np.asarray(theirs.dataobj).T, volume().array)
    ras_of_lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    ours = ras_of_lps @ volume().affine[:, [2, 1, 0, 3]]  # nibabel indexes x, y, z
    assert np.allclose(theirs.affine, ours, atol=1e-4)


def test_dicom_series(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", volume())
    scan = read_scan(tmp_path / "ct")
    assert np.array_equal(scan.array, volume().array)
    assert np.allclose(scan.affine, AFFINE, atol=1e-3)
    one_file = next((tmp_path / "ct").iterdir())
    assert np.array_equal(read_scan(one_file).array, volume().array)


def test_pair_with_flipped_axes_is_the_same_place(tmp_path: Path) -> None:
    write_scan(volume(), tmp_path / "image.nii.gz")
    flipped = sitk.Flip(to_itk(mask()), [True, False, True])
    sitk.WriteImage(flipped, str(tmp_path / "label.nii.gz"))
    scan, label = read_pair(tmp_path / "image.nii.gz", tmp_path / "label.nii.gz")
    assert np.array_equal(label.array, mask().array)
    assert scan.grid.same_as(label.grid, 0.01)


def truncated_nifti(folder: Path) -> Path:
    write_scan(volume(), folder / "whole.nii")
    path = folder / "scan.nii"
    path.write_bytes((folder / "whole.nii").read_bytes()[:700])
    return path


def truncated_gzip(folder: Path) -> Path:
    write_scan(volume(), folder / "whole.nii.gz")
    path = folder / "scan.nii.gz"
    path.write_bytes((folder / "whole.nii.gz").read_bytes()[:900])
    return path


def truncated_nrrd(folder: Path) -> Path:
    write_scan(volume(), folder / "whole.nrrd")
    path = folder / "scan.nrrd"
    path.write_bytes((folder / "whole.nrrd").read_bytes()[:-200])
    return path


def truncated_meta(folder: Path) -> Path:
    sitk.WriteImage(to_itk(volume()), str(folder / "whole.mha"))
    path = folder / "scan.mha"
    path.write_bytes((folder / "whole.mha").read_bytes()[:-200])
    return path


def missing_raw(folder: Path) -> Path:
    path = folder / "scan.mhd"
    sitk.WriteImage(to_itk(volume()), str(path))
    (folder / "scan.raw").unlink()
    return path


def text(folder: Path) -> Path:
    path = folder / "scan.nii.gz"
    path.write_text("not an image")
    return path


def empty(folder: Path) -> Path:
    path = folder / "scan.mha"
    path.touch()
    return path


def missing(folder: Path) -> Path:
    return folder / "nowhere.nii"


def with_nan(folder: Path) -> Path:
    path = folder / "scan.nii.gz"
    values = volume().array.astype(np.float32)
    values[1, 2, 3] = np.nan
    write_scan(Scan(values, AFFINE), path)
    return path


def flat(folder: Path) -> Path:
    path = folder / "slice.nii.gz"
    sitk.WriteImage(to_itk(volume())[:, :, 0], str(path))
    return path


def film(folder: Path) -> Path:
    path = folder / "film.nii.gz"
    sitk.WriteImage(sitk.JoinSeries([to_itk(volume())] * 3), str(path))
    return path


def colour(folder: Path) -> Path:
    path = folder / "colour.nii.gz"
    sitk.WriteImage(sitk.Compose([to_itk(volume())] * 3), str(path))
    return path


def negative_spacing(folder: Path) -> Path:
    write_scan(volume(), folder / "whole.mha")
    path = folder / "scan.mha"
    data = (folder / "whole.mha").read_bytes()
    assert b"ElementSpacing = " in data
    path.write_bytes(data.replace(b"ElementSpacing = ", b"ElementSpacing = -"))
    return path


def centimetres(folder: Path) -> Path:
    write_scan(volume(), folder / "whole.mha")
    path = folder / "scan.mha"
    data = (folder / "whole.mha").read_bytes()
    path.write_bytes(data.replace(b"ElementSpacing = ", b"DistanceUnits = cm\nElementSpacing = "))
    return path


def zero_nifti_spacing(folder: Path) -> Path:
    write_scan(volume(), folder / "whole.nii")
    path = folder / "scan.nii"
    data = bytearray((folder / "whole.nii").read_bytes())
    data[80:84] = np.float32(0).tobytes()  # pixdim[1]
    path.write_bytes(data)
    return path


def two_series(folder: Path) -> Path:
    write_series(folder / "ct", volume())
    write_series(folder / "ct", volume())
    return folder / "ct"


def missing_slice(folder: Path) -> Path:
    write_series(folder / "ct", volume(), drop=2)
    return folder / "ct"


def single_slice(folder: Path) -> Path:
    write_series(folder / "ct", Scan(volume().array[:1], AFFINE))
    return folder / "ct"


def empty_folder(folder: Path) -> Path:
    (folder / "ct").mkdir()
    return folder / "ct"


def cut_dicom(folder: Path) -> Path:
    write_series(folder / "ct", volume())
    victim = sorted((folder / "ct").iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:-60])
    return folder / "ct"


BAD: list[tuple[Callable[[Path], Path], str]] = [
    (truncated_nifti, "cut short or damaged"),
    (truncated_gzip, "cut short or damaged"),
    (truncated_nrrd, "cut short or damaged"),
    (truncated_meta, "cut short or damaged"),
    (missing_raw, "scan.raw"),
    (text, "not a scan in a known format"),
    (empty, "empty"),
    (missing, "no such file"),
    (with_nan, "1 voxels are NaN"),
    (flat, "2-D"),
    (film, "3 volumes"),
    (colour, "3 values a voxel"),
    (negative_spacing, "spacing"),
    (centimetres, "its lengths are 'cm'"),
    (zero_nifti_spacing, "spacing"),
    (two_series, "2 series"),
    (missing_slice, "mm apart"),
    (single_slice, "single slice"),
    (empty_folder, "no DICOM series"),
    (cut_dicom, "cut short or damaged"),
]


@pytest.mark.parametrize(("make", "words"), BAD, ids=[make.__name__ for make, _ in BAD])
def test_bad_scans_are_reported_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Callable[[Path], Path], words: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(VoxelscaleError) as caught:
        read_scan(path)
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert path.name in caught.value.message
    assert caught.value.hint
    assert capfd.readouterr() == ("", "")  # the C libraries below stay silent


def moved(scan: Scan) -> Scan:
    affine = scan.affine.copy()
    affine[0, 3] += 4
    return Scan(scan.array, affine)


PAIRS = {
    "shorter": (Scan(mask().array[:-1], AFFINE), "voxels, but"),
    "moved": (moved(mask()), "4.00 mm away"),
    "empty": (Scan(np.zeros_like(mask().array), AFFINE), "empty mask"),
    "negative": (Scan(volume().array, AFFINE), "negative values"),
    "fractions": (Scan(mask().array * np.float32(0.3), AFFINE), "fractions"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_masks_that_do_not_fit(tmp_path: Path, name: str) -> None:
    label, words = PAIRS[name]
    write_scan(volume(), tmp_path / "image.nii.gz")
    write_scan(label, tmp_path / "label.nii.gz")
    with pytest.raises(VoxelscaleError) as caught:
        read_pair(tmp_path / "image.nii.gz", tmp_path / "label.nii.gz")
    assert words in caught.value.message
    assert "label.nii.gz" in caught.value.message


def test_chosen_label_values(tmp_path: Path) -> None:
    write_scan(volume(), tmp_path / "image.nii.gz")
    write_scan(Scan(mask().array * 7, AFFINE), tmp_path / "label.nii.gz")
    _, label = read_pair(tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", values=(7,))
    assert np.array_equal(label.array, mask().array)
    with pytest.raises(VoxelscaleError, match="it holds 0, 7"):
        read_pair(tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", values=(3,))


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    write_scan(volume(), tmp_path / "whole.nii")
    header = bytearray((tmp_path / "whole.nii").read_bytes()[:352])
    header[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(bytes(header) + b"\0" * 10_000_000))
    with pytest.raises(VoxelscaleError, match="30000 x 30000 x 30000"):
        read_scan(path)


def test_labels_of_many_classes_stay_whole(tmp_path: Path) -> None:
    write_scan(Scan(mask().array * np.int32(700), AFFINE), tmp_path / "label.nii.gz")
    assert set(np.unique(read_label(tmp_path / "label.nii.gz").array)) == {0, 700}
