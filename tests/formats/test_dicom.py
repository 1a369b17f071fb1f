"""DICOM as it comes, on files written by pydicom and SimpleITK, and on pydicom's own test files."""

from __future__ import annotations

import shutil
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    SegmentationStorage,
    generate_uid,
)

from voxelscale.config import ReadingConfig
from voxelscale.console import set_verbosity
from voxelscale.dataset.listing import list_scans
from voxelscale.dataset.reading import read_image
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import dicom, read_scan
from voxelscale.formats.dicom import find_series, header, open_scan, thickness_of
from voxelscale.formats.dicom.elements import LONG_VR
from voxelscale.geometry import Scan
from voxelscale.labels import read_labels

SECRET = "Jane^Doe-7731"
SPACING = (2.0, 1.5)  # between rows, between columns
AXIAL = np.eye(3)[:2]
PLACE = np.array([-30.0, 12.0, -140.0])


def read(path: Path, series: str = "", fill_gaps: int = 0, files: Sequence[Path] = ()) -> Scan:
    """Header and voxels; what only HU are checked for is left out."""
    opened = open_scan(path, series, fill_gaps, files)
    return Scan(opened.load(), opened.grid.affine)


def turned(degrees: tuple[float, float, float]) -> NDArray[Any]:
    """Directions of rows and columns, turned about x, y and z."""
    a, b, c = np.radians(degrees)
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return np.asarray((z @ y @ x)[:, :2].T)


def noise(count: int, rows: int = 9, columns: int = 7, seed: int = 0) -> NDArray[np.int16]:
    values = np.random.default_rng(seed).integers(-1000, 2000, (count, rows, columns))
    return values.astype(np.int16)


def new_file(sop_class: str, modality: str, **attributes: Any) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = sop_class, meta.MediaStorageSOPInstanceUID, modality
    ds.PatientName = ds.PatientID = SECRET
    for name, value in attributes.items():
        setattr(ds, name, value)
    return ds


def set_pixels(ds: Dataset, stored: NDArray[Any]) -> None:
    """16 bits a voxel, signed or not as the array is."""
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    ds["PixelData"].VR = "OW"


def text(values: NDArray[Any] | Sequence[float]) -> list[str]:
    """As scanners write: decimal text of at most 16 characters."""
    return [f"{v:.9f}"[:16] for v in np.asarray(values, dtype=float).ravel()]


def slices(
    hu: NDArray[Any], places: NDArray[Any], axes: NDArray[Any] = AXIAL, **attributes: Any
) -> list[FileDataset]:
    """A CT series: one file a slice, at `places` (n, 3) in mm; unsigned with an intercept."""
    fixed = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid(), **attributes}
    made = []
    for number, (values, place) in enumerate(zip(hu, places, strict=True), start=1):
        ds = new_file(CTImageStorage, "CT", InstanceNumber=number)
        ds.ImagePositionPatient, ds.ImageOrientationPatient = text(place), text(axes)
        ds.PixelSpacing, ds.SliceThickness = text(SPACING), "2"
        ds.RescaleSlope, ds.RescaleIntercept = "1", "-1024"
        set_pixels(ds, (values.astype(np.int32) + 1024).astype(np.uint16))
        for name, value in fixed.items():
            setattr(ds, name, value)
        made.append(ds)
    return made


def along(
    steps: Sequence[float] | NDArray[Any], axes: NDArray[Any] = AXIAL, start: NDArray[Any] = PLACE
) -> NDArray[Any]:
    """Places of slices `steps` apart along the normal."""
    heights = np.concatenate([[0.0], np.cumsum(steps)])
    return np.asarray(start + heights[:, None] * np.cross(axes[0], axes[1]))


def write(files: Sequence[Dataset], folder: Path, names: Sequence[str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, ds in enumerate(files):
        pydicom.dcmwrite(
            folder / (names[number] if names else f"{number:03d}"), ds, enforce_file_format=True
        )
    return folder


def itk(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def fails(path: Path, *words: str, **arguments: Any) -> VoxelscaleError:
    with pytest.raises(VoxelscaleError) as caught:
        read(path, **arguments)
    message = caught.value.message + " " + caught.value.hint
    for word in words:
        assert word in message, message
    assert "\n" not in message
    assert "Doe" not in message
    assert caught.value.hint
    return caught.value


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Within it no more than so many bytes are allocated at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    set_verbosity(1)
    return lambda: capsys.readouterr().err


# ---- one point, however it was scanned

POINT = np.array([7.3, -11.9, -101.6])
SIGMA = 7.0


def blob(places: NDArray[Any], axes: NDArray[Any], rows: int = 44, columns: int = 56) -> NDArray[np.int16]:
    """HU of a smooth ball about `POINT` in air, seen by slices at `places`."""
    y, x = np.mgrid[:rows, :columns]
    inside = x[..., None] * SPACING[1] * axes[0] + y[..., None] * SPACING[0] * axes[1]
    away = ((places[:, None, None] + inside - POINT) ** 2).sum(-1)
    return np.asarray(np.rint(3000 * np.exp(-away / (2 * SIGMA**2)) - 1024), dtype=np.int16)


def around(axes: NDArray[Any], steps: Sequence[float] | NDArray[Any], lean: float = 0.0) -> NDArray[Any]:
    """Places of slices about `POINT`; `lean`: mm along the columns a mm of height."""
    normal = np.cross(axes[0], axes[1])
    corner = POINT - axes[0] * 41.1 - axes[1] * 43.7 - normal * (np.sum(steps) / 2 + 0.4)
    places = along(steps, axes, corner)
    heights = (places - places[0]) @ normal
    return np.asarray(places + (heights - heights.mean())[:, None] * lean * axes[1])


def enhanced(
    hu: NDArray[Any], places: NDArray[Any], axes: NDArray[Any], order: Sequence[int]
) -> FileDataset:
    """An enhanced CT: position and scale of each frame, the rest shared; frames in any order."""
    ds = new_file(EnhancedCTImageStorage, "CT", StudyInstanceUID=generate_uid())
    ds.SeriesInstanceUID, ds.NumberOfFrames = generate_uid(), len(hu)
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = text(SPACING), "2"
    plane.ImageOrientationPatient = text(axes)
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Items([measures]), Items([plane])
    ds.SharedFunctionalGroupsSequence = Items([shared])
    each, stored = [], []
    for place in order:
        position, scale, frame = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = text(places[place])
        # Frame by frame another intercept, as if each had been scaled to its own range.
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = "1", str(-1024 - place), "HU"
        frame.PlanePositionSequence = Items([position])
        frame.PixelValueTransformationSequence = Items([scale])
        each.append(frame)
        stored.append(hu[place].astype(np.int32) + 1024 + place)
    ds.PerFrameFunctionalGroupsSequence = Items(each)
    set_pixels(ds, np.asarray(stored).astype(np.uint16))
    return ds


OBLIQUE = turned((11.0, -17.0, 23.0))
SAGITTAL = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0]])
EVEN, UNEVEN = [2.5] * 33, np.random.default_rng(3).uniform(1.6, 2.6, 40)
SCANNED: dict[str, tuple[NDArray[Any], Any, float]] = {
    "axial": (AXIAL, EVEN, 0.0),
    "feet first": (np.array([[-1.0, 0, 0], [0, 1, 0]]), EVEN, 0.0),
    "oblique": (OBLIQUE, EVEN, 0.0),
    "sagittal": (SAGITTAL, EVEN, 0.0),
    "tilted gantry": (turned((19.0, 0.0, 0.0)), EVEN, np.tan(np.radians(19.0))),
    "tilted the other way": (AXIAL, EVEN, -0.3),
    "variable spacing": (AXIAL, UNEVEN, 0.0),
    "tilted and variable": (OBLIQUE, UNEVEN, 0.2),
    "thick above": (AXIAL, [1.25] * 14 + [2.5] * 27, 0.0),
}


def centroid(scan: Scan) -> NDArray[Any]:
    weights = scan.array.astype(np.float64) + 1024
    index = np.array(
        [(weights.sum(tuple({0, 1, 2} - {a})) * np.arange(n)).sum() for a, n in enumerate(weights.shape)]
    )
    return scan.grid.index_to_mm(index / weights.sum())


# The enhanced CT shares one SliceThickness, so it cannot say that slices grow thicker by design.
EACH = [(how, many) for many in (False, True) for how in SCANNED if not (many and how == "thick above")]


@pytest.mark.parametrize(("how", "many"), EACH)
def test_a_point_is_where_it_is(tmp_path: Path, how: str, many: bool) -> None:
    axes, steps, lean = SCANNED[how]
    places = around(axes, steps, lean)
    hu = blob(places, axes)
    if many:
        order = np.random.default_rng(1).permutation(len(hu)).tolist()
        write([enhanced(hu, places, axes, order)], tmp_path / "ct")
    else:
        files = slices(hu, places, axes)
        if how == "thick above":
            for ds, thick in zip(files, [1.25] * 15 + [2.5] * 27, strict=True):
                ds.SliceThickness = str(thick)
        write(files[::-1], tmp_path / "ct")
    scan = read_scan(tmp_path / "ct")
    assert np.linalg.norm(centroid(scan) - POINT) < 0.01
    columns = scan.affine[:3, :3] / scan.spacing
    assert np.allclose(columns.T @ columns, np.eye(3), atol=1e-6)  # upright, whatever came in
    if lean == 0 and how not in ("variable spacing", "thick above"):
        assert np.array_equal(scan.array, hu)  # nothing was resampled
    assert scan.array.dtype == np.int16


@pytest.mark.parametrize("how", ["axial", "feet first", "oblique", "sagittal"])
def test_a_regular_series_is_simpleitks(tmp_path: Path, how: str) -> None:
    axes, _, _ = SCANNED[how]
    write(slices(noise(6), along([2.5] * 5, axes), axes), tmp_path / "ct")
    scan, theirs = read_scan(tmp_path / "ct"), itk(tmp_path / "ct")
    assert np.array_equal(scan.array, sitk.GetArrayFromImage(theirs))
    for index in np.indices((2, 2, 2)).reshape(3, -1).T * (5, 8, 6):
        there = theirs.TransformIndexToPhysicalPoint([int(i) for i in index[::-1]])
        assert scan.grid.index_to_mm(index) == pytest.approx(there, abs=1e-4)


# ---- what lies in a folder


def small_series(seed: int = 0, **attributes: Any) -> list[FileDataset]:
    return slices(noise(4, seed=seed), along([2.0] * 3), **attributes)


def segmentation(of: str) -> FileDataset:
    ds = new_file(SegmentationStorage, "SEG", SeriesInstanceUID=generate_uid(), StudyInstanceUID="1.2.3")
    item = Dataset()
    item.SeriesInstanceUID = of
    ds.ReferencedSeriesSequence = Items([item])
    set_pixels(ds, np.zeros((2, 4, 4), np.uint16))
    ds.NumberOfFrames = 2
    return ds


def structures(of: str) -> FileDataset:
    ds = pydicom.dcmread(get_testdata_file("rtstruct.dcm"), force=True)
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    series = (
        ds.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0].RTReferencedSeriesSequence
    )
    series[0].SeriesInstanceUID = of
    return ds


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, list[str]]:
    """Two patients, two CTs of one, and all that lies between them; the CTs' UIDs."""
    folder = tmp_path / "archive"
    first, second = small_series(1, StudyInstanceUID="1.2.3"), small_series(2, StudyInstanceUID="1.2.3")
    third = small_series(3, PatientID="Other")
    uids = [files[0].SeriesInstanceUID for files in (first, second, third)]
    scout = slices(noise(2), along([2.0]), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    for ds in scout[:1]:
        ds.SeriesInstanceUID = uids[0]  # a scout within the series itself
    mixed = [*first, *second, *scout, segmentation(uids[0]), structures(uids[1])]
    shuffled = np.random.default_rng(0).permutation(len(mixed))
    write([mixed[i] for i in shuffled], folder / "A", [f"x{i:x}" for i in range(len(mixed))])
    write(third, folder / "B" / "deep" / "deeper", ["IM1.jpg", "2", "III", "four.txt"])
    for name in ("test-SR.dcm", "rtdose.dcm", "SC_rgb_small_odd.dcm", "dicomdirtests/DICOMDIR"):
        shutil.copy(get_testdata_file(Path(name).name), folder / "B" / Path(name).name)
    (folder / "notes.txt").write_text("not an image")
    (folder / "B" / "empty.dcm").touch()
    (folder / "B" / "cut.dcm").write_bytes((folder / "A" / "x0").read_bytes()[:200])
    (folder / "B" / "loop").symlink_to(folder)
    return folder, uids


def test_an_archive_is_sorted(archive: tuple[Path, list[str]], told: Callable[[], str]) -> None:
    folder, uids = archive
    found = find_series(folder)
    assert sorted((s.modality, len(s.files)) for s in found) == [
        ("CT", 4),
        ("CT", 4),
        ("CT", 4),
        ("RTSTRUCT", 1),
        ("SEG", 1),
    ]
    of = {s.uid: s for s in found}
    assert {of[uid].patient for uid in uids[:2]} == {SECRET}
    assert SECRET not in repr(found)
    assert of[uids[2]].patient == "Other"
    assert {s.modality: s.refers_to for s in found if s.refers_to} == {
        "SEG": (uids[0],),
        "RTSTRUCT": (uids[1],),
    }
    for uid in uids:
        heights = [float(pydicom.dcmread(f).ImagePositionPatient[2]) for f in of[uid].files]
        assert heights == sorted(heights)
    line = told()
    assert line.count("\n") == 1
    for words in (
        "2 localizers",
        "1 SR object",
        "1 RTDOSE object",
        "1 colour image",
        "2 damaged or empty files",
    ):
        assert words in line
    assert "Doe" not in line


def test_one_of_several_series(archive: tuple[Path, list[str]], told: Callable[[], str]) -> None:
    folder, uids = archive
    fails(folder, "3 series in one folder", *uids, "(CT, 4 slices)", "choose one")
    fails(folder, "no series 1.2.9", series="1.2.9")
    for seed, uid in enumerate(uids, start=1):
        assert np.array_equal(read_scan(folder, uid).array, noise(4, seed=seed))
    assert "Doe" not in told()
    of = {s.uid: s for s in find_series(folder)}
    one = of[uids[1]].files[2]
    assert np.array_equal(read(one).array, noise(4, seed=2))
    assert np.array_equal(read(folder / "B" / "deep").array, noise(4, seed=3))


def test_the_series_of_a_flat_folder_are_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each header once for the listing and once for its own series, however many there are."""
    for seed in range(5):
        write(small_series(seed), tmp_path / "flat", [f"{seed}-{i}" for i in range(4)])
    opened: dict[Path, int] = {}

    def counted(path: Path) -> header.Header | None:
        opened[path] = opened.get(path, 0) + 1
        return header.read_header(path)

    monkeypatch.setattr(dicom, "read_header", counted)
    sources = list_scans(tmp_path / "flat")
    seeds = [int(source.files[0].name[0]) for source in sources]
    assert sorted(seeds) == list(range(5))
    for seed, source in zip(seeds, sources, strict=True):
        assert np.array_equal(read_image(source, ReadingConfig()).array, noise(4, seed=seed))
    assert len(opened) == 20
    assert max(opened.values()) <= 2


def test_a_listed_slice_that_is_damaged_or_gone_is_reported(tmp_path: Path) -> None:
    """The end slice, which would not be missed: by whole series as by what the listing knows of them."""
    folder = write(small_series(1), tmp_path / "flat", [f"a{i}" for i in range(4)])
    write(small_series(2), folder, [f"b{i}" for i in range(4)])
    whole = list_scans(folder)
    victim = folder / "a3"
    content = victim.read_bytes()
    victim.write_bytes(content[:300])
    for source in list_scans(folder):
        with pytest.raises(VoxelscaleError, match="a3: damaged or empty, and may be a slice"):
            read_image(source, ReadingConfig())
    victim.unlink()
    first, second = sorted(whole, key=lambda source: source.files[0].name)
    with pytest.raises(VoxelscaleError, match="a3: no such file, and is a slice"):
        read_image(first, ReadingConfig())
    assert np.array_equal(read_image(second, ReadingConfig()).array, noise(4, seed=2))


def test_the_thickness_of_slices_is_what_they_say(archive: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, uids = archive
    of = {s.uid: s for s in find_series(folder)}
    assert thickness_of(of[uids[2]].files[1]) == 2.0
    assert thickness_of(folder / "B" / "deep") == 2.0
    assert thickness_of(write(small_series(SliceThickness=None), tmp_path / "ct")) is None
    assert thickness_of(folder / "notes.txt") is None


def test_a_folder_without_a_volume(tmp_path: Path) -> None:
    for name in ("test-SR.dcm", "rtdose.dcm"):
        shutil.copy(get_testdata_file(name), tmp_path)
    fails(tmp_path, "no volume there, but: RTDOSE object, SR object")
    scouts = slices(noise(1), along([])) + slices(noise(1), along([]), SAGITTAL)
    for ds in scouts:
        ds.SeriesInstanceUID, ds.StudyInstanceUID = "1.2.3", "1.2.4"  # not even called localizers
    fails(write(scouts, tmp_path / "scouts"), "only localizers")
    assert find_series(tmp_path / "scouts") == []


def test_pydicoms_own_folder() -> None:
    folder = Path(get_testdata_file("DICOMDIR")).parent
    volumes = [s for s in find_series(folder / "98892001") if s.modality == "CT"]
    assert [[f.name for f in s.files] for s in volumes] == [["3353", "3023", "2693", "2392", "2062"]]
    scan = read_scan(folder / "98892001")
    assert np.array_equal(scan.array, sitk.GetArrayFromImage(itk(folder / "98892001" / "CT5N")))
    fails(folder / "77654033" / "CT2", "161 slices missing", "z = -99.48 and 103.02 mm", "202.500 mm apart")


# ---- doubles, gaps, steps, tilt


def test_doubled_slices_are_dropped(tmp_path: Path, told: Callable[[], str]) -> None:
    files = small_series()
    write(files, tmp_path / "ct")
    write(files[:2], tmp_path / "ct" / "again")  # the same files
    files[3].SOPInstanceUID = files[3].file_meta.MediaStorageSOPInstanceUID = generate_uid()
    write(files[3:], tmp_path / "ct" / "sent twice")  # the same pixels under another UID
    assert np.array_equal(read(tmp_path / "ct").array, noise(4))
    assert "3 doubled slices dropped" in told()


def test_two_reconstructions_in_one_series_contradict(tmp_path: Path) -> None:
    uid = generate_uid()
    soft = small_series(0, SeriesInstanceUID=uid, StudyInstanceUID="1.2", ConvolutionKernel="B30f")
    sharp = small_series(1, SeriesInstanceUID=uid, StudyInstanceUID="1.2", ConvolutionKernel="B70f")
    folder = write([*soft, *sharp], tmp_path / "ct")
    fails(folder, "at one place with different pixels: 000 and 004", "they differ in ConvolutionKernel")


def test_missing_slices(tmp_path: Path, told: Callable[[], str]) -> None:
    hu, places = noise(12), along([2.0] * 11)
    kept = [i for i in range(12) if i not in (4, 8)]
    folder = write(slices(hu[kept], places[kept]), tmp_path / "ct")
    words = "2 slices missing: 1 between z = -134.00 and -130.00 mm, 1 between z = -126.00 and -122.00 mm"
    fails(folder, words, "reading.fill_gaps=1")
    scan = read(folder, fill_gaps=1)
    assert "2 missing slices interpolated" in told()
    assert np.array_equal(scan.array[kept], hu[kept])
    middle = (hu[3].astype(float) + hu[5]) / 2
    assert np.abs(scan.array[4] - middle).max() <= 0.5
    assert scan.grid.index_to_mm((11, 0, 0)) == pytest.approx(places[-1], abs=1e-6)
    fewer = write(slices(hu[[0, 1, 2, 5, 6, 7, 8]], places[[0, 1, 2, 5, 6, 7, 8]]), tmp_path / "fewer")
    fails(fewer, "2 slices missing: 2 between", "fill_gaps=2", fill_gaps=1)
    assert read(fewer, fill_gaps=2).array.shape == (9, 9, 7)


def test_uneven_steps_are_reported(tmp_path: Path, told: Callable[[], str]) -> None:
    steps = np.array([1.0, 1.4, 1.0, 1.3, 1.0, 1.0, 1.5])
    hu = noise(8)
    folder = write(slices(hu, along(steps)), tmp_path / "ct")
    scan = read(folder)
    assert "slices 1.000 to 1.500 mm apart, resampled to 1.000 mm" in told()
    heights = np.concatenate([[0], np.cumsum(steps)])
    for level, values in enumerate(scan.array):  # against numpy's interpolation, voxel by voxel
        for y, x in ((0, 0), (4, 3), (8, 6)):
            assert abs(values[y, x] - np.interp(level * 1.0, heights, hu[:, y, x].astype(float))) <= 0.51


def test_slow_drift_is_not_taken_for_even(tmp_path: Path) -> None:
    """Each step is within a twentieth of a millimetre of the next, their sum is not."""
    steps = np.linspace(1.0, 1.4, 30)
    places = along(steps)
    scan = read(write(slices(noise(31, 2, 2), places), tmp_path / "ct"))
    last = scan.grid.index_to_mm((scan.array.shape[0] - 1, 0, 0))
    assert abs(last[2] - places[-1][2]) <= scan.spacing[0] / 2 + 1e-6
    assert scan.spacing[0] < 1.1


def test_positions_rounded_to_a_tenth_are_even(tmp_path: Path, told: Callable[[], str]) -> None:
    places = np.round(along([0.625] * 19), 1)
    scan = read(write(slices(noise(20), places), tmp_path / "ct"))
    assert np.array_equal(scan.array, noise(20))
    assert told() == ""


def test_a_tilted_gantry_is_reported(tmp_path: Path, told: Callable[[], str]) -> None:
    places = along([2.0] * 7)
    places[:, 1] += np.tan(np.radians(12.0)) * (places[:, 2] - places[0, 2])
    hu = noise(8)
    hu[...] = 50
    scan = read(write(slices(hu, places), tmp_path / "ct"))
    assert "gantry tilt of 12.0 degrees" in told()
    assert scan.array.shape == (8, 9 + 2, 7)
    assert set(np.unique(scan.array)) == {-1024, 50}  # no rim between the slice and the air about it
    assert (scan.array == 50).sum(axis=1).min() == 9


def test_a_slice_far_beside_the_others_is_refused(tmp_path: Path) -> None:
    places = along([2.0] * 7)
    places[4, 1] += 9000
    with pytest.raises(VoxelscaleError, match="shifted by up to 9000 mm"):
        read(write(slices(noise(8), places), tmp_path / "ct"))


def test_slices_that_do_not_fit(tmp_path: Path) -> None:
    hu, places = noise(4), along([2.0] * 3)

    def spoilt(name: str, change: Callable[[list[FileDataset]], None]) -> Path:
        files = slices(hu, places)
        change(files)
        return write(files, tmp_path / name)

    def turn(files: list[FileDataset]) -> None:
        files[2].ImageOrientationPatient = text(turned((0, 0, 3)))

    def crop(files: list[FileDataset]) -> None:
        set_pixels(files[1], np.zeros((5, 7), np.uint16))

    def widen(files: list[FileDataset]) -> None:
        files[1].PixelSpacing = ["2.5", "2"]

    def skew(files: list[FileDataset]) -> None:
        for ds in files:
            ds.ImageOrientationPatient = [1, 0, 0, 0.5, 0.5, 0]

    def aside(files: list[FileDataset]) -> None:
        files[1].ImagePositionPatient = text(places[0] + (5, 0, 0))

    fails(spoilt("turned", turn), "turned against each other")
    fails(spoilt("cropped", crop), "different sizes (7 x 5 and 7 x 9)")
    fails(spoilt("widened", widen), "different pixel sizes")
    fails(spoilt("skewed", skew), "not at right angles")
    fails(spoilt("aside", aside), "beside each other")


# ---- values


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless]
)
def test_transfer_syntaxes_of_pydicom(tmp_path: Path, syntax: str) -> None:
    files = small_series()
    for ds in files:
        if syntax == RLELossless:
            ds.compress(RLELossless)
        ds.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    folder = tmp_path / "ct"
    folder.mkdir()
    for number, ds in enumerate(files):
        little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
        encoding = {"little_endian": little, "implicit_vr": implicit, "force_encoding": True}
        pydicom.dcmwrite(folder / str(number), ds, **encoding)
    assert np.array_equal(read_scan(folder).array, noise(4))


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000", "JPEGLS"])
@pytest.mark.parametrize("kind", [np.int16, np.uint16])
def test_transfer_syntaxes_of_simpleitk(tmp_path: Path, compressor: str, kind: type) -> None:
    values = np.abs(noise(3, 16, 20)).astype(kind) if kind is np.uint16 else noise(3, 16, 20)
    writer = sitk.ImageFileWriter()
    writer.SetUseCompression(True)
    writer.SetCompressor(compressor)
    writer.SetKeepOriginalImageUID(True)
    for number, plane in enumerate(values):
        image = sitk.GetImageFromArray(plane[None])
        image.SetOrigin((0, 0, 3.0 * number))
        for key, value in {"0008|0060": "CT", "0020|000e": "1.2.3.4", "0020|000d": "1.2.3"}.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(tmp_path / f"{number}.dcm"))
        writer.Execute(image)
    ds = pydicom.dcmread(tmp_path / "0.dcm")
    assert ds.file_meta.TransferSyntaxUID.is_compressed
    assert np.array_equal(read_scan(tmp_path).array, values)


MR = [
    *("MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_expb.dcm", "MR_small_implicit.dcm"),
    *("MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_padded.dcm"),
]


@pytest.mark.parametrize("name", MR)
def test_pydicoms_files_of_one_picture(tmp_path: Path, name: str) -> None:
    """pydicom ships one MR slice in many transfer syntaxes; two of it make a volume."""
    for number in range(2):
        ds = pydicom.dcmread(get_testdata_file(name))
        ds.ImagePositionPatient = ["0", "0", str(5 * number)]
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.save_as(tmp_path / str(number))
    expected = pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array
    scan = read_scan(tmp_path)
    assert np.array_equal(scan.array[0], expected)
    assert np.array_equal(scan.array[1], expected)


def test_a_compressed_film_with_frames_in_any_order(tmp_path: Path) -> None:
    hu, places = noise(6), along([2.5] * 5, OBLIQUE)
    ds = enhanced(hu, places, OBLIQUE, [3, 1, 5, 0, 4, 2])
    ds.compress(RLELossless)
    scan = read_scan(write([ds], tmp_path / "ct") / "000")
    assert np.array_equal(scan.array, hu)
    assert scan.grid.index_to_mm((5, 0, 0)) == pytest.approx(places[5], abs=1e-5)


def test_each_slice_has_its_own_scale(tmp_path: Path) -> None:
    files = small_series()
    stored = [np.frombuffer(ds.PixelData, "<u2").reshape(9, 7) for ds in files]
    scales = [(1.0, -1024.0), (2.0, -1000.0), (0.5, -1024.5), (1.0, -30000.0)]
    for ds, (slope, intercept) in zip(files, scales, strict=True):
        ds.RescaleSlope, ds.RescaleIntercept = str(slope), str(intercept)
    scan = read_scan(write(files, tmp_path / "ct"))
    expected = np.stack([s * k + c for s, (k, c) in zip(stored, scales, strict=True)])
    assert scan.array.dtype == np.float32
    assert np.array_equal(scan.array, expected)


@pytest.mark.parametrize("signed", [False, True])
def test_bits_beyond_the_stored_ones_are_not_values(tmp_path: Path, signed: bool) -> None:
    files = small_series()
    hu = np.clip(noise(4), -1024, 1023)
    for ds, values in zip(files, hu, strict=True):
        twelve = values.astype(np.int32) + (0 if signed else 1024)
        set_pixels(ds, ((twelve & 0xFFF) | 0x5000).astype(np.uint16))  # an old overlay in the top bits
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, int(signed)
        ds.RescaleIntercept = "0" if signed else "-1024"
    assert np.array_equal(read_scan(write(files, tmp_path / "ct")).array, hu)


def test_padding_is_air(tmp_path: Path) -> None:
    files = small_series()
    for ds in files:
        stored = np.frombuffer(ds.PixelData, "<u2").astype(np.int16).reshape(9, 7).copy()
        stored[:2] = -2000
        set_pixels(ds, stored)
        # As LIDC's: signed pixels, and the padding's sign lost on the way.
        ds.add_new("PixelPaddingValue", "US", 65536 - 2000)
    scan = read_scan(write(files, tmp_path / "ct"))
    assert (scan.array[:, :2] == -1024).all()
    assert np.array_equal(scan.array[:, 2:], noise(4)[:, 2:])


def test_padding_that_tissue_has_too_is_air_only_at_the_edge(tmp_path: Path) -> None:
    files = small_series()
    for ds in files:
        stored = np.full((9, 7), 40, np.int16)
        stored[:, :2] = stored[4, 4] = 0
        set_pixels(ds, stored)
        ds.RescaleIntercept = "0"
        ds.add_new("PixelPaddingValue", "SS", 0)
    scan = read_scan(write(files, tmp_path / "ct"))
    assert (scan.array[:, :, :2] == -1024).all()
    assert (scan.array[:, 4, 4] == 0).all()


# ---- files that lie


def test_absurd_claims_cost_nothing(tmp_path: Path) -> None:
    def claims(name: str, **attributes: Any) -> Path:
        files = small_series()
        for ds in files:
            for key, value in attributes.items():
                setattr(ds, key, value)
        return write(files, tmp_path / name)

    film = enhanced(noise(4), along([2.0] * 3), AXIAL, [0, 1, 2, 3])
    film.NumberOfFrames = 10**9
    coded = small_series()
    for ds in coded:
        ds.compress(RLELossless)
        ds.Rows = ds.Columns = 16000
    with at_most(2**26):
        fails(claims("rows", Rows=65535, Columns=65535), "cut short or damaged")
        fails(claims("rows within bounds", Rows=9000, Columns=9000), "cut short or damaged")
        fails(write([film], tmp_path / "film"), "damaged")
        fails(write(coded, tmp_path / "coded"), "claims 1024000000 voxels")
        fails(claims("position", ImagePositionPatient=["1e300", "0", "0"]), "without a position")
        fails(claims("bits", BitsAllocated=12), "bits a voxel")


def test_a_picture_of_another_size_is_refused(tmp_path: Path) -> None:
    """A decoder takes memory by what the code claims, not by what the header says."""
    for number in range(2):
        ds = pydicom.dcmread(get_testdata_file("MR_small_jpeg_ls_lossless.dcm"))
        code = bytearray(ds.PixelData)
        place = code.index(b"\xff\xf7")
        code[place + 5 : place + 9] = b"\xff\xff\xff\xff"
        ds.PixelData, ds.SOPInstanceUID = bytes(code), generate_uid()
        ds.ImagePositionPatient = ["0", "0", str(5 * number)]
        ds.save_as(tmp_path / str(number))
    fails(tmp_path, "a picture of 65535 x 65535 voxels")


def test_a_deflated_bomb_is_not_unpacked(tmp_path: Path) -> None:
    files = small_series()
    for ds in files:
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    folder = write(files, tmp_path / "ct")
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    private = b"\x09\x00\x10\x10OB\x00\x00" + (200_000_000).to_bytes(4, "little")
    code = engine.compress(private) + engine.compress(b"\0" * 200_000_000) + engine.flush()
    whole = (folder / "000").read_bytes()
    start = 132 + 12 + int.from_bytes(whole[140:144], "little")
    (folder / "bomb").write_bytes(whole[:start] + code)
    with at_most(10**8):
        fails(folder, "bomb: damaged")


def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    """Explicit little endian, with a length of four bytes."""
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr + b"\0\0"
    return head + struct.pack("<I", len(value) if length is None else length) + value


def with_element(whole: bytes, tag: int, code: bytes) -> bytes:
    """A file with an element put where it belongs by its tag."""
    place = 132
    while place < len(whole):
        group, number = struct.unpack("<HH", whole[place : place + 4])
        if group > 2 and group << 16 | number > tag:
            break
        long = whole[place + 4 : place + 6] in LONG_VR
        (length,) = struct.unpack_from("<I" if long else "<H", whole, place + (8 if long else 6))
        place += length + (12 if long else 8)
    return whole[:place] + code + whole[place:]


ITEM, ITEM_END, SEQUENCE_END = (
    b"\xfe\xff\x00\xe0",
    b"\xfe\xff\x0d\xe0" + bytes(4),
    b"\xfe\xff\xdd\xe0" + bytes(4),
)
ENDLESS = 0xFFFFFFFF
PRIVATE, REFERENCED, PER_FRAME = 0x00091010, 0x00081115, 0x52009230
MANY = {
    "unknown": (PRIVATE, ITEM + bytes(4), True),
    "known": (REFERENCED, ITEM + bytes(4), True),
    "of known length": (PER_FRAME, ITEM + bytes(4), False),
    "items without a length": (PRIVATE, ITEM + b"\xff" * 4 + ITEM_END, True),
}


@pytest.mark.parametrize("name", MANY)
def test_twenty_thousand_empty_items_cost_little(tmp_path: Path, name: str) -> None:
    tag, item, endless = MANY[name]
    items = item * 20_000
    code = element(tag, b"SQ", items + SEQUENCE_END, ENDLESS) if endless else element(tag, b"SQ", items)
    hu = noise(6)
    folder = write(slices(hu, along([2.0] * 5)), tmp_path / "ct")
    for path in folder.iterdir():
        path.write_bytes(with_element(path.read_bytes(), tag, code))
    with counted_calls() as calls:
        scan = read(folder)
    # A few around each read; pydicom takes about a hundred an item.
    assert len(calls) < 20 * 20_000 * len(hu)
    assert np.array_equal(scan.array, hu)


@contextmanager
def counted_calls() -> Iterator[list[str]]:
    """The calls of functions within, Python's and C's: what a work costs, whatever the machine."""
    calls: list[str] = []
    sys.setprofile(lambda _frame, event, _of: calls.append(event) if event.endswith("call") else None)
    try:
        yield calls
    finally:
        sys.setprofile(None)


DEEP = 50
WRONG_SEQUENCES = {
    "deeper than any": element(PRIVATE, b"SQ", ITEM + b"\xff" * 4, ENDLESS) * DEEP
    + (ITEM_END + SEQUENCE_END) * DEEP,
    "an item beyond it": element(REFERENCED, b"SQ", ITEM + struct.pack("<I", 64) + bytes(8)),
    "an element beyond its item": element(
        REFERENCED, b"SQ", ITEM + struct.pack("<I", 12) + element(PRIVATE, b"OB", b"", 64)
    ),
    "no items": element(REFERENCED, b"SQ", bytes(16)),
    "without an end": element(PRIVATE, b"SQ", ITEM + bytes(4), ENDLESS),
}


@pytest.mark.parametrize("name", WRONG_SEQUENCES)
def test_wrong_sequences_are_reported(tmp_path: Path, name: str) -> None:
    folder = write(small_series(), tmp_path / "ct")
    victim, code = folder / "001", WRONG_SEQUENCES[name]
    tag = REFERENCED if code.startswith(b"\x08\x00") else PRIVATE
    victim.write_bytes(with_element(victim.read_bytes(), tag, code))
    fails(folder, "001: damaged")


def test_a_sequence_that_a_program_did_not_know_is_read(tmp_path: Path) -> None:
    """Functional groups as UN, which are implicit in an explicit file (PS3.5, 6.2.2)."""
    hu, places = noise(4), along([2.0] * 3)
    film = enhanced(hu, places, AXIAL, [2, 0, 3, 1])
    implicit = tmp_path / "implicit"
    film.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    pydicom.dcmwrite(implicit, film, implicit_vr=True, little_endian=True, force_encoding=True)
    code = pydicom.dcmread(implicit).get_item(PER_FRAME).value
    film.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    del film[PER_FRAME]
    path = write([film], tmp_path / "ct") / "000"
    path.write_bytes(with_element(path.read_bytes(), PER_FRAME, element(PER_FRAME, b"UN", code)))
    assert np.array_equal(read(path).array, hu)


@pytest.mark.filterwarnings("ignore:Expected explicit VR")
def test_headers_are_as_pydicom_reads_them() -> None:
    """The files that pydicom ships for its own tests, in all encodings, and not all of them sound.

    A third of them have no pixels or no SOP class, and are none of ours.
    """
    compared = 0
    for path in sorted(Path(get_testdata_file("DICOMDIR")).parents[1].rglob("*")):
        try:
            found, theirs = header.read_header(path), pydicom.dcmread(path, stop_before_pixels=True)
            rows, place = theirs.get("Rows", 0), theirs.get("ImagePositionPatient")
        except Exception:
            continue  # what either refuses cannot be compared
        if found is None:
            continue
        compared += 1
        assert found.series == str(theirs.get("SeriesInstanceUID", "")), path
        assert found.modality == str(theirs.get("Modality", "")), path
        for frame in found.frames[:1]:
            assert frame.pixels.rows == rows, path
            if place and frame.pixels.frames == 1:
                assert frame.position == tuple(map(float, place)), path
    assert compared > 90


BOMB = 300_000_000
"""Bytes; more than may be inflated of a label."""


@pytest.mark.parametrize("modality", ["SEG", "RTSTRUCT", "CT"])
def test_a_deflated_bomb_among_labels_is_not_unpacked(tmp_path: Path, modality: str) -> None:
    ds = small_series()[0]
    ds.Modality, ds.file_meta.TransferSyntaxUID = modality, DeflatedExplicitVRLittleEndian
    path = write([ds], tmp_path, ["label"]) / "label"
    whole = path.read_bytes()
    start = 132 + 12 + int.from_bytes(whole[140:144], "little")
    inflated = zlib.decompress(whole[start:], -zlib.MAX_WBITS)
    engine = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    code = engine.compress(inflated + element(0x7FE10010, b"OB", b"", BOMB))
    code += b"".join(engine.compress(bytes(10**7)) for _ in range(BOMB // 10**7)) + engine.flush()
    path.write_bytes(whole[:start] + code)
    image = Scan(noise(4), np.eye(4)[[2, 1, 0, 3]])
    with at_most(10**8), pytest.raises(VoxelscaleError, match="label: larger than 256 MiB when inflated"):
        read_labels(path, image)
    path.write_bytes(whole[:start] + b"\xff" + whole[start:])
    with pytest.raises(VoxelscaleError, match="label: not readable as DICOM"):
        read_labels(path, image)


def binary(mask: NDArray[Any], uid: str = "1.2.3") -> FileDataset:
    """A SEG of one segment in frames, bit by bit, on voxels of 1 mm from the origin."""
    ds = segmentation(uid)
    set_pixels(ds, mask.astype(np.uint16))
    ds.NumberOfFrames, ds.SegmentationType = len(mask), "BINARY"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, 1, 0
    code = np.packbits(mask.astype(bool).ravel(), bitorder="little").tobytes()
    ds.PixelData = code + b"\0" * (len(code) % 2)
    segment, shared, plane, measures, identity = (Dataset() for _ in range(5))
    segment.SegmentNumber = identity.ReferencedSegmentNumber = 1
    plane.ImageOrientationPatient, measures.PixelSpacing = text(AXIAL), ["1", "1"]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Items([plane]), Items([measures])
    shared.SegmentIdentificationSequence = Items([identity])
    each = []
    for z in range(len(mask)):
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = text([0.0, 0.0, z])
        frame.PlanePositionSequence = Items([position])
        each.append(frame)
    ds.SegmentSequence, ds.SharedFunctionalGroupsSequence = Items([segment]), Items([shared])
    ds.PerFrameFunctionalGroupsSequence = Items(each)
    return ds


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_frames_of_bits_need_not_begin_with_a_byte(tmp_path: Path, syntax: str) -> None:
    mask = np.random.default_rng(0).random((5, 9, 7)) > 0.6
    ds = binary(mask)
    ds.file_meta.TransferSyntaxUID = syntax
    path = write([ds], tmp_path, ["label"]) / "label"
    image = Scan(np.zeros(mask.shape, np.int16), np.eye(4)[[2, 1, 0, 3]])
    assert np.array_equal(read_labels(path, image).mask.array, mask)
    ds.PixelData = ds.PixelData[:-4]
    with pytest.raises(VoxelscaleError, match="label: a damaged segmentation"):
        read_labels(write([ds], tmp_path, ["label"]) / "label", image)


def test_a_segmentation_is_unpacked_frame_by_frame(tmp_path: Path) -> None:
    """A small file may hold many frames, and each of their bits becomes a byte."""
    mask = np.zeros((100, 512, 512), np.bool_)
    mask[40:50, 100:120, 100:140] = True
    ds = binary(mask)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = write([ds], tmp_path, ["label"]) / "label"
    assert path.stat().st_size < mask.size / 1000
    image = Scan(np.zeros(mask.shape, np.int16), np.eye(4)[[2, 1, 0, 3]])
    with at_most(2 * mask.size):
        read = read_labels(path, image).mask.array
    assert np.array_equal(read, mask)


def test_a_header_without_an_end_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(small_series(), tmp_path / "ct")
    (folder / "zeros").write_bytes((folder / "000").read_bytes()[:400] + bytes(80_000))
    monkeypatch.setattr(header, "MOST_ELEMENTS", 2000)
    assert len(find_series(folder)[0].files) == 4
    fails(folder, "zeros: damaged")


@pytest.mark.parametrize("coded", [False, True])
def test_cut_pixels_are_reported(tmp_path: Path, coded: bool) -> None:
    files = small_series()
    for ds in files:
        if coded:
            ds.compress(RLELossless)
    folder = write(files, tmp_path / "ct")
    victim = folder / "002"
    victim.write_bytes(victim.read_bytes()[:-60])
    error = fails(folder, "cut short or damaged")
    assert str(victim) in error.message


@pytest.mark.parametrize("left", [0, 150, 420, -9 * 7 * 2 - 12])
def test_a_damaged_end_slice_is_not_passed_over(tmp_path: Path, left: int) -> None:
    """Nothing would be missing between the others."""
    folder = write(small_series(), tmp_path / "ct")
    victim = folder / "003"
    victim.write_bytes(victim.read_bytes()[:left])
    error = fails(folder, "damaged or empty")
    assert str(victim) in error.message
    victim.rename(folder / "elsewhere.txt")
    (folder / "elsewhere.txt").write_bytes(b"")
    assert read(folder).array.shape == (3, 9, 7)


@pytest.mark.parametrize("how", ["link that leads nowhere", "damaged"])
def test_a_lost_end_slice_is_not_passed_over(tmp_path: Path, how: str) -> None:
    """A slice that a versioned archive did not fetch, or an error page under a slice's name."""
    folder = write(small_series(), tmp_path / "ct", [f"{i}.dcm" for i in range(4)])
    victim = folder / "3.dcm"
    victim.unlink()
    if how == "damaged":
        victim.write_text("<html>404</html>")
    else:
        victim.symlink_to(tmp_path / "annex" / "3.dcm")
    assert str(victim) in fails(folder, how).message
    with pytest.raises(VoxelscaleError, match=how):
        read_image(list_scans(folder)[0], ReadingConfig())


def test_what_macos_leaves_beside_the_slices_is_no_slice(tmp_path: Path) -> None:
    folder = write(small_series(), tmp_path / "ct", [f"{i}.dcm" for i in range(4)])
    whole = read(folder).array
    for i in range(4):
        (folder / f"._{i}.dcm").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X" + bytes(200))
    assert np.array_equal(read(folder).array, whole)
    assert np.array_equal(read_image(list_scans(folder)[0], ReadingConfig()).array, whole)
    (folder / "._0.dcm").write_bytes(b"")
    fails(folder, "damaged or empty")


def test_an_unknown_code_names_its_syntax(tmp_path: Path) -> None:
    files = small_series()
    for ds in files:
        ds.compress(RLELossless)
        ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"  # HTJ2K
    fails(write(files, tmp_path / "ct"), "1.2.840.10008.1.2.4.201", "decompress")


@settings(max_examples=25)
@given(data=st.data())
def test_any_order_any_names_any_doubles(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    count = data.draw(st.integers(3, 6))
    order = data.draw(st.permutations(range(count)))
    again = data.draw(st.lists(st.sampled_from(range(count)), max_size=3))
    axes = turned(tuple(data.draw(st.integers(-80, 80)) for _ in range(3)))  # type: ignore[arg-type]
    step = data.draw(st.floats(0.3, 8.0))
    places = along([step] * (count - 1), axes)
    files = slices(noise(count, 3, 4), places, axes)
    chosen = [files[i] for i in [*order, *again]]
    folder = write(chosen, tmp_path_factory.mktemp("any") / "ct")
    scan = read(folder)
    assert np.array_equal(scan.array, noise(count, 3, 4))
    assert scan.grid.index_to_mm((count - 1, 0, 0)) == pytest.approx(places[-1], abs=1e-4)


def in_memory(ds: Dataset) -> bytes:
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


WHOLE = [in_memory(ds) for ds in small_series()]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(0, 3000))
def test_garbled_files_are_reported_or_read(
    tmp_path_factory: pytest.TempPathFactory, seed: int, length: int
) -> None:
    """Bytes changed at random, or the end cut off: a scan or one line, nothing else."""
    generator = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("garbled")
    for number, whole in enumerate(WHOLE):
        (folder / str(number)).write_bytes(whole)
    victim = folder / "1"
    data = bytearray(WHOLE[1])
    for place in generator.integers(132, len(data) - 150, 12):
        data[place] = generator.integers(256)
    victim.write_bytes(data[: max(140, len(data) - length)] if length < len(data) else data)
    caught = None
    try:
        read(folder)
    except VoxelscaleError as error:
        caught = error
    assert caught is None or not ("\n" in caught.message or "Doe" in caught.message)


# ---- series that are not one scan, and numbers that cannot be read


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RescaleSlope", b"1 1", "RescaleSlope (0028,1053) is '1 1'"),
        ("RescaleSlope", b"0 ", "RescaleSlope (0028,1053) is 0"),
        ("RescaleIntercept", b"-1,024", "RescaleIntercept (0028,1052) is '-1,024'"),
        ("PixelSpacing", b"1.5 ", "PixelSpacing (0028,0030) is '1.5'"),
        ("ImagePositionPatient", b"1\\2 ", r"ImagePositionPatient (0020,0032) is '1\\2'"),
        ("ImagePositionPatient", b"", "ImagePositionPatient (0020,0032) is missing"),
        ("ImageOrientationPatient", b"1\\0\\0\\0\\x ", "ImageOrientationPatient (0020,0037)"),
        ("SliceThickness", b"thin", "SliceThickness (0018,0050) is 'thin'"),
        ("NumberOfFrames", b"1.5 ", "NumberOfFrames (0028,0008) is '1.5'"),
        ("Rows", b"", "Rows (0028,0010) is empty"),
        ("BitsStored", b"", "BitsStored (0028,0101) is empty"),
        ("PixelRepresentation", None, "PixelRepresentation (0028,0103) is missing"),
    ],
)
@pytest.mark.parametrize("where", ["end", "all"])
def test_a_number_that_cannot_be_read_names_its_attribute(
    tmp_path: Path, name: str, value: bytes | None, words: str, where: str
) -> None:
    files = small_series()
    for ds in files if where == "all" else files[3:]:
        tag = pydicom.tag.Tag(name)
        if tag in ds:
            del ds[tag]
        if value is not None:
            vr = "US" if name in ("Rows", "BitsStored") else "DS"
            raw = pydicom.dataelem.RawDataElement(tag, vr, len(value), value, 0, False, True)
            ds._dict[tag] = raw
    folder = write(files, tmp_path / "ct")
    error = fails(folder, words)
    assert str(folder / ("003" if where == "end" else "000")) in error.message
    with pytest.raises(VoxelscaleError) as caught:  # the listing neither loses the slice nor the case
        read_image(list_scans(folder)[0], ReadingConfig())
    assert words in caught.value.message


def test_equal_uids_do_not_make_two_pictures_one(tmp_path: Path) -> None:
    files, others = small_series(0), small_series(1)
    for ds, other in zip(files, others, strict=True):
        for name in ("SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID"):
            setattr(other, name, getattr(ds, name))
        other.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    fails(write([*files, *others[2:3]], tmp_path / "ct"), "different pixels", "with one SOPInstanceUID")


def half_way(**attributes: Sequence[Any]) -> list[FileDataset]:
    """Two stacks of 2 mm, the second 1 mm above the first, with two values of each attribute."""
    uids = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid()}
    files = []
    for number in range(2):
        start = PLACE + np.array([0, 0, 1.0 * number])
        own = {name: values[number] for name, values in attributes.items()}
        files += slices(noise(6, seed=number), along([2.0] * 5, start=start), **uids, **own)
    return files


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("AcquisitionNumber", (1, 2)),
        ("ConvolutionKernel", ("B30f", "B70f")),
        ("ImageType", (["ORIGINAL", "PRIMARY", "AXIAL", "M"], ["ORIGINAL", "PRIMARY", "AXIAL", "IO"])),
        ("TemporalPositionIdentifier", (1, 2)),
        ("KVP", ("80", "140")),
        ("SliceThickness", ("2", "3")),
        ("ReconstructionDiameter", ("200", "350")),
        ("FilterType", ("BODY", "FLAT")),
        ("ContrastBolusAgent", ("", "Iomeron")),
        ("ContentTime", ("101010", "101140")),
    ],
)
def test_two_stacks_half_way_are_two_scans(tmp_path: Path, name: str, values: Sequence[Any]) -> None:
    folder = write(half_way(**{name: values}), tmp_path / "ct")
    fails(folder, "2 acquisitions or reconstructions", name, "as 006")
    for number in range(2):
        assert np.array_equal(read(folder / f"{6 * number + 2:03d}").array, noise(6, seed=number))


def test_two_stacks_that_only_their_numbers_tell_apart(tmp_path: Path) -> None:
    files = half_way()
    for number, ds in enumerate(files):
        ds.InstanceNumber = number + 1
    folder = write(files, tmp_path / "ct")
    fails(folder, "InstanceNumber 1 to 6 (6 slices, as 000); InstanceNumber 7 to 12")
    assert np.array_equal(read(folder / "008").array, noise(6, seed=1))


def test_one_scan_of_several_acquisitions_is_one(tmp_path: Path) -> None:
    """Stations that abut, passes that fill each other's gaps, times and numbers of each slice its own."""
    hu, places = noise(12), along([2.0] * 11)
    shuffled = np.random.default_rng(1).permutation(12)
    numbers: dict[str, Callable[[int], int]] = {
        "stations": lambda i: i // 4,
        "passes": lambda i: i % 2,
        "each": lambda i: i,
        "shuffled": lambda i: int(shuffled[i]),
    }
    for name, number in numbers.items():
        files = slices(hu, places)
        for i, ds in enumerate(files):
            ds.AcquisitionNumber = ds.InstanceNumber = int(number(i)) + 1
            ds.AcquisitionTime = ds.ContentTime = f"1010{int(number(i)):02d}"
        assert np.array_equal(read(write(files, tmp_path / name)).array, hu), name


def test_copies_under_another_time_are_one_scan(tmp_path: Path, told: Callable[[], str]) -> None:
    uids = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid()}
    folder = write(small_series(0, **uids, ContentTime="101010"), tmp_path / "ct")
    write(small_series(0, **uids, ContentTime="101112"), folder / "again")
    assert np.array_equal(read(folder).array, noise(4))
    assert "4 doubled slices dropped" in told()


def test_what_is_left_out_of_a_series_is_named(tmp_path: Path, told: Callable[[], str]) -> None:
    files = small_series()
    scout = slices(noise(1), along([]), SAGITTAL, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])[0]
    scout.SeriesInstanceUID, scout.StudyInstanceUID = files[0].SeriesInstanceUID, files[0].StudyInstanceUID
    for ds in files:
        del ds["RescaleIntercept"], ds["RescaleSlope"]
    set_verbosity(0)
    folder = write([*files, scout], tmp_path / "ct")
    read(folder)
    line = told()
    assert "of this series left out: 004 (localizer)" in line
    assert "no RescaleIntercept (0028,1052), which a CT must have" in line


def test_slices_far_apart_are_no_volume(tmp_path: Path) -> None:
    def far(steps: list[float]) -> Path:
        return write(slices(noise(len(steps) + 1), along(steps)), tmp_path / str(len(steps)))

    fails(far([62.0, 94.0]), "its 3 slices are 62.000 to 94.000 mm apart: no volume")
    fails(far([62.0]), "its 2 slices are 62.000 mm apart", fill_gaps=200)
    gap = far([2.0, 2.0, 202.0, 2.0, 2.0])
    error = fails(gap, "100 slices missing", "never filled", fill_gaps=161)
    assert "fill_gaps" not in error.hint
    assert read(far([20.0] * 3)).spacing[0] == pytest.approx(20)
