"""One nodule through every kind of label, on straight, flipped and oblique lattices."""

from __future__ import annotations

import copy
import csv
from collections.abc import Sequence
from pathlib import Path

import highdicom as hd
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from highdicom.sr.coding import CodedConcept
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid
from tests.conftest import SHARED
from tests.formats.test_formats import write_series

from voxelscale.classes import Classes
from voxelscale.console import set_verbosity
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import read_scan
from voxelscale.geometry import Scan, affine_from_itk, to_itk
from voxelscale.labels import kind_of, read_labels

TURN = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])
LATTICES = {"straight": np.eye(3), "oblique": TURN, "flipped": np.diag([-1.0, 1.0, -1.0])}


def truth(turn: np.ndarray) -> Scan:
    """An ellipsoid with a hole."""
    affine = affine_from_itk((-120.5, 33.25, 900.0), (0.75, 0.75, 2.5), turn)
    z, y, x = np.indices((8, 24, 26))
    body = ((z - 4) / 2.5) ** 2 + ((y - 11) / 6) ** 2 + ((x - 14) / 8) ** 2 <= 1
    hole = (np.abs(y - 11) <= 1) & (np.abs(x - 14) <= 1) & (z == 4)
    return Scan((body & ~hole).astype(np.uint8), affine)


@pytest.fixture(params=LATTICES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Scan, Scan, Path]:
    """A DICOM series as it is read, the truth on its lattice, and the series' folder."""
    mask = truth(LATTICES[request.param])
    write_series(tmp_path / "ct", Scan(mask.array.astype(np.int16) * 100, mask.affine))
    image = read_scan(tmp_path / "ct")
    on_image = sitk.Resample(to_itk(mask), to_itk(image), sitk.Transform(), sitk.sitkNearestNeighbor)
    return image, Scan(sitk.GetArrayFromImage(on_image), image.affine), tmp_path


def slices(folder: Path) -> list[Dataset]:
    read = [pydicom.dcmread(path) for path in folder.iterdir()]
    for data in read:  # what highdicom copies into its object
        data.PatientName, data.PatientBirthDate, data.PatientSex = "", "", ""
        data.StudyDate = data.StudyTime = data.AccessionNumber = data.StudyID = ""
        data.ReferringPhysicianName = ""
    return sorted(read, key=lambda data: int(data.InstanceNumber))


def write_seg(path: Path, mask: Scan, image: Scan, ct: Path, kind: str) -> None:
    """By highdicom, on the slices as they are in their files."""
    sources = slices(ct)
    planes = [
        mask.array[round(float(image.grid.mm_to_index(np.asarray(s.ImagePositionPatient, float))[0]))]
        for s in sources
    ]
    lesion = CodedConcept("4147007", "SCT", "Mass")
    segment = hd.seg.SegmentDescription(
        segment_number=3,
        segment_label="lesion",
        segmented_property_category=CodedConcept("49755003", "SCT", "Morphologically abnormal structure"),
        segmented_property_type=lesion,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
    )
    segment.SegmentNumber = 1
    hd.seg.Segmentation(
        source_images=sources,
        pixel_array=np.stack(planes).astype(np.float32 if kind == "FRACTIONAL" else np.uint8),
        segmentation_type=kind,
        segment_descriptions=[segment],
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="test",
        manufacturer_model_name="test",
        software_versions="1",
        device_serial_number="1",
    ).save_as(path)


def write_rtstruct(path: Path, contours: dict[str, list[np.ndarray]]) -> None:
    """By pydicom; contours in mm by the name of their region."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = RTStructureSetStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = Dataset()
    data.file_meta, data.Modality = meta, "RTSTRUCT"
    data.SOPClassUID, data.SOPInstanceUID = RTStructureSetStorage, meta.MediaStorageSOPInstanceUID
    data.StructureSetROISequence, data.ROIContourSequence = [], []
    for number, (name, outlines) in enumerate(contours.items(), start=1):
        region, drawn = Dataset(), Dataset()
        region.ROINumber, region.ROIName = number, name
        drawn.ReferencedROINumber, drawn.ContourSequence = number, []
        for points in outlines:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
            contour.ContourData = [f"{v:.4f}" for v in points.ravel()]
            drawn.ContourSequence.append(contour)
        data.StructureSetROISequence.append(region)
        data.ROIContourSequence.append(drawn)
    pydicom.dcmwrite(path, data, enforce_file_format=True)


def boundaries(mask: Scan) -> list[np.ndarray]:
    """Outlines (mm) between the voxels' centres, holes included: the level line of one half."""
    import contourpy

    found = []
    for z, plane in enumerate(mask.array):
        padded = np.pad(plane.astype(float), 1)
        for line in contourpy.contour_generator(z=padded).lines(0.5):
            index = np.column_stack([np.full(len(line), z), line[:, 1] - 1, line[:, 0] - 1])
            found.append(mask.grid.index_to_mm(index))
    return found


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_a_segmentation_object(case: tuple[Scan, Scan, Path], kind: str) -> None:
    image, mask, folder = case
    write_seg(folder / "seg.dcm", mask, image, folder / "ct", kind)
    assert kind_of(folder / "seg.dcm") == "SEG"
    found = read_labels(folder / "seg.dcm", image)
    assert np.array_equal(found.mask.array, mask.array)
    assert found.findings == ()
    with pytest.raises(VoxelscaleError, match="no segment"):
        read_labels(folder / "seg.dcm", image, values=(7,))


def test_a_structure_set_with_a_hole(case: tuple[Scan, Scan, Path]) -> None:
    image, mask, folder = case
    box = np.array([[0, 0, 0], [0, 23, 0], [0, 23, 25], [0, 0, 25]])
    regions = {"BODY": [image.grid.index_to_mm(box)], "Nodule 1": boundaries(mask)}
    write_rtstruct(folder / "rt.dcm", regions)
    assert kind_of(folder / "rt.dcm") == "RTSTRUCT"
    assert np.array_equal(read_labels(folder / "rt.dcm", image).mask.array, mask.array)
    body = read_labels(folder / "rt.dcm", image, values=(1,)).mask.array
    assert body[0].sum() > 22 * 24
    assert not body[1:].any()
    write_rtstruct(folder / "rt.dcm", {"A": boundaries(mask), "B": boundaries(mask)})
    with pytest.raises(VoxelscaleError, match="which of its regions is the lesion"):
        read_labels(folder / "rt.dcm", image)


def test_contours_on_finer_slices_do_not_cancel(case: tuple[Scan, Scan, Path]) -> None:
    image, mask, folder = case
    outlines = boundaries(mask)
    step = image.grid.affine[:3, 0] * 0.3
    write_rtstruct(folder / "rt.dcm", {"GTV": [*outlines, *(o + step for o in outlines)]})
    assert np.array_equal(read_labels(folder / "rt.dcm", image).mask.array, mask.array)


@pytest.mark.parametrize(
    "name", ["Lungs-GTV", "Lung_R - IGTV", "Liver minus GTVp", "Liver_excl_lesion", "non-tumour"]
)
def test_what_is_left_of_an_organ_is_no_lesion(case: tuple[Scan, Scan, Path], name: str) -> None:
    """As AAPM TG-263 names it: the organ without the tumour."""
    image, mask, folder = case
    organ = Scan(np.ones_like(mask.array), mask.affine)
    organ.array[:, :1] = organ.array[:, -1:] = 0
    write_rtstruct(folder / "rt.dcm", {name: boundaries(organ), "GTV-1": boundaries(mask)})
    assert np.array_equal(read_labels(folder / "rt.dcm", image).mask.array, mask.array)
    write_rtstruct(folder / "rt.dcm", {name: boundaries(organ), "Heart": boundaries(mask)})
    with pytest.raises(VoxelscaleError, match="which of its regions is the lesion"):
        read_labels(folder / "rt.dcm", image)


@pytest.mark.parametrize(
    "name", ["GTV-1", "GTV-N_2", "RUL-nodule", "Lung-Tumor", "IGTV", "liver metastases"]
)
def test_what_lesions_are_called(case: tuple[Scan, Scan, Path], name: str) -> None:
    image, mask, folder = case
    write_rtstruct(folder / "rt.dcm", {"Heart": boundaries(mask)[:1], name: boundaries(mask)})
    assert np.array_equal(read_labels(folder / "rt.dcm", image).mask.array, mask.array)


def drawn_at(folder: Path, places: Sequence[float], x: Sequence[float]) -> np.ndarray:
    """The mask of circles at these slices and columns of a scan of 40 slices of 1 mm."""
    image = Scan(np.zeros((40, 24, 26), np.int16), affine_from_itk((0, 0, 0), (1, 1, 1), np.eye(3)))
    contours = [circle(at, 12) + np.array([z - 3, 0, 0]) for z, at in zip(places, x, strict=True)]
    write_rtstruct(folder / "rt.dcm", {"GTV": [image.grid.index_to_mm(c) for c in contours]})
    mask: np.ndarray = read_labels(folder / "rt.dcm", image).mask.array
    return mask


def test_contours_on_some_slices_are_one_lesion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On every third slice, or on slices 1.25 times as thick as the scan's: none is left out between."""
    area = int(drawn_at(tmp_path, [12], [12]).sum())
    assert capsys.readouterr().err == ""
    for places, slices, message in (
        ([10, 13, 16], range(9, 18), "every 3 slices (3 mm)"),
        ([8 + 1.25 * n for n in range(9)], range(8, 19), "every 1.2 slices (1.25 mm)"),
    ):
        mask = drawn_at(tmp_path, places, [12] * len(places))
        assert {z: int(mask[z].sum()) for z in np.flatnonzero(mask.any((1, 2)))} == dict.fromkeys(
            slices, area
        )
        assert f"GTV: drawn on {message}; the slices between are given" in capsys.readouterr().err
    # Two lesions side by side; and two above each other, each on a slice of its own.
    beside = drawn_at(tmp_path, [10, 10, 13, 13], [6, 19] * 2)
    assert np.flatnonzero(beside.any((1, 2))).tolist() == list(range(9, 15))
    assert beside.sum() == 12 * area
    assert "every 3 slices" in capsys.readouterr().err
    apart = drawn_at(tmp_path, [10, 22], [12, 12])
    assert np.flatnonzero(apart.any((1, 2))).tolist() == [10, 22]
    assert "(12 mm); the slices between are left empty" in capsys.readouterr().err


def test_contours_midway_between_slices_fill_each(tmp_path: Path) -> None:
    mask = drawn_at(tmp_path, [n + 0.5 for n in range(7, 16)], [12] * 9)
    assert np.flatnonzero(mask.any((1, 2))).tolist() == list(range(8, 17))


def circle(x: float, y: float, radius: float = 3.2, count: int = 40) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.column_stack([np.full(count, 3.0), y + radius * np.sin(angle), x + radius * np.cos(angle)])


def drawn_as(
    folder: Path, contours: dict[str, list[np.ndarray]], values: tuple[int, ...] | None = None
) -> np.ndarray:
    """The mask of contours in voxels (z, y, x) of a scan whose voxels are 1 mm wide."""
    image = Scan(np.zeros((8, 24, 26), np.int16), affine_from_itk((0, 0, 0), (1, 1, 1), np.eye(3)))
    in_mm = {name: [image.grid.index_to_mm(c) for c in each] for name, each in contours.items()}
    write_rtstruct(folder / "rt.dcm", in_mm)
    mask: np.ndarray = read_labels(folder / "rt.dcm", image, values=values).mask.array
    return mask


def test_contours_that_programs_write(tmp_path: Path) -> None:
    off = np.array([0.02, 0, 0])
    one, two, hole = circle(6, 8), circle(18, 8), circle(6, 8, 1.4)
    both = drawn_as(tmp_path, {"GTV": [one, two]})
    assert np.array_equal(drawn_as(tmp_path, {"GTV": [one, two + off]}), both), "rounded"
    assert np.array_equal(drawn_as(tmp_path, {"GTV": [one, two + 20 * off]}), both), "of another plane"
    assert np.array_equal(drawn_as(tmp_path, {"GTV": [one, one, two]}), both), "written twice"
    holed = drawn_as(tmp_path, {"GTV": [one, hole]})
    assert 0 < holed.sum() < drawn_as(tmp_path, {"GTV": [one]}).sum()
    assert np.array_equal(drawn_as(tmp_path, {"GTV": [one, hole + off]}), holed), "a rounded hole"
    for turn in (0, 3):  # the cut runs through centres of pixels, and beside them
        ring, inner = np.roll(one, turn, axis=0), np.roll(hole, turn, axis=0)
        keyhole = np.concatenate([ring, ring[:1], inner[:1], inner[::-1], ring[:1]])
        assert np.array_equal(drawn_as(tmp_path, {"GTV": [keyhole]}), holed), "a hole by a cut"


def test_points_and_what_lies_outside_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Scan(np.zeros((8, 24, 26), np.int16), affine_from_itk((0, 0, 0), (1, 1, 1), np.eye(3)))
    there, partly = circle(6, 8), circle(25, 8)
    alone = drawn_as(tmp_path, {"GTV": [there]})
    assert "warning" not in capsys.readouterr().err
    mask = drawn_as(tmp_path, {"GTV": [there, partly, there + np.array([30, 0, 0])]})
    assert np.array_equal(mask[:, :, :12], alone[:, :, :12])
    assert mask[:, :, 22:].any()
    assert "rt.dcm: 2 contours outside the scan" in capsys.readouterr().err
    data = pydicom.dcmread(tmp_path / "rt.dcm")
    data.ROIContourSequence[0].ContourSequence[1].ContourGeometricType = "POINT"
    del data.ROIContourSequence[0].ContourSequence[2]
    data.save_as(tmp_path / "rt.dcm")
    assert np.array_equal(read_labels(tmp_path / "rt.dcm", image).mask.array, alone)
    assert "contours that hold no area, left out: 1 POINT" in capsys.readouterr().err


def test_several_structure_sets(tmp_path: Path) -> None:
    image = Scan(np.zeros((8, 24, 26), np.int16), affine_from_itk((0, 0, 0), (1, 1, 1), np.eye(3)))
    files = [tmp_path / name for name in ("organs.dcm", "one.dcm", "two.dcm")]
    for file, (name, contour) in zip(
        files,
        {"Heart": circle(12, 12), "Nodule 1": circle(6, 8), "Nodule 2": circle(18, 8)}.items(),
        strict=True,
    ):
        write_rtstruct(file, {name: [image.grid.index_to_mm(contour)]})
    each = [read_labels(file, image).mask.array for file in files]
    assert np.array_equal(read_labels(files, image).mask.array, each[1] | each[2]), "the heart is none"
    assert np.array_equal(read_labels(files[1:], image).mask.array, each[1] | each[2])


@pytest.mark.parametrize("bits", [8, 16])
def test_a_label_map(case: tuple[Scan, Scan, Path], bits: int) -> None:
    """Segment 0 or its padding is the background; `values` chooses segments; colours change nothing."""
    image, mask, folder = case
    write_seg(folder / "seg.dcm", mask, image, folder / "ct", "LABELMAP")
    data = pydicom.dcmread(folder / "seg.dcm")
    pixels = data.pixel_array.astype(np.uint8 if bits == 8 else np.uint16)
    pixels[pixels > 0] = 7 if bits == 8 else 700
    pixels[0, 0, 0] = 9
    found = [pydicom.Dataset.from_json(data.SegmentSequence[-1].to_json()) for _ in range(3)]
    for segment, number in zip(found, (0, 7 if bits == 8 else 700, 9), strict=True):
        segment.SegmentNumber = number
    data.SegmentSequence = found
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit = bits - 1
    data.PixelData = pixels.tobytes()
    data.PhotometricInterpretation = "PALETTE COLOR"
    data.save_as(folder / "seg.dcm")
    chosen = read_labels(folder / "seg.dcm", image, values=(7, 700)).mask.array
    assert np.array_equal(chosen, mask.array)
    assert read_labels(folder / "seg.dcm", image).mask.array.sum() == mask.array.sum() + 1
    data.SegmentSequence = found[:2]
    data.save_as(folder / "seg.dcm")
    with pytest.raises(VoxelscaleError, match="segment 9, which it does not describe"):
        read_labels(folder / "seg.dcm", image)


def test_single_bits_in_big_endian_are_refused(case: tuple[Scan, Scan, Path]) -> None:
    """The order of bits in swapped words is not agreed upon, so that a mask could be read mirrored."""
    image, mask, folder = case
    write_seg(folder / "seg.dcm", mask, image, folder / "ct", "BINARY")
    data = pydicom.dcmread(folder / "seg.dcm")
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    pydicom.dcmwrite(folder / "big.dcm", data, implicit_vr=False, little_endian=False)
    with pytest.raises(VoxelscaleError, match="single bits in big endian"):
        read_labels(folder / "big.dcm", image)


@pytest.mark.filterwarnings("ignore")  # pydicom's, of what is cut
@pytest.mark.parametrize("kind", ["SEG", "RTSTRUCT"])
def test_what_is_cut_off_is_reported_or_was_not_needed(case: tuple[Scan, Scan, Path], kind: str) -> None:
    image, mask, folder = case
    path = folder / "label.dcm"
    if kind == "SEG":
        write_seg(path, mask, image, folder / "ct", "BINARY")
    else:
        write_rtstruct(path, {"Nodule": boundaries(mask)})
    whole, content = read_labels(path, image).mask.array, path.read_bytes()
    refused = 0
    for length in np.linspace(140, len(content) - 1, 60).astype(int):
        path.write_bytes(content[:length])
        try:
            assert np.array_equal(read_labels(path, image).mask.array, whole), length
        except VoxelscaleError as error:
            refused += "label.dcm" in error.message
    assert refused > 40


@pytest.mark.parametrize("extension", ["nii.gz", "mha", "nrrd"])
def test_a_mask_file_in_any_order_of_axes(case: tuple[Scan, Scan, Path], extension: str) -> None:
    image, mask, folder = case
    path = folder / f"mask.{extension}"
    if extension == "nii.gz":
        ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ mask.affine[:, [2, 1, 0, 3]]
        theirs = nibabel.Nifti1Image(mask.array.T, ras)
        nibabel.save(nibabel.as_closest_canonical(theirs), path)
    else:
        sitk.WriteImage(sitk.Flip(to_itk(mask), [True, False, True]), str(path))
    found = read_labels(path, image)
    assert np.array_equal(found.mask.array, mask.array)
    assert found.mask.grid.same_as(image.grid)


def test_what_lies_elsewhere_is_refused(case: tuple[Scan, Scan, Path]) -> None:
    image, mask, folder = case
    write_seg(folder / "seg.dcm", mask, image, folder / "ct", "BINARY")
    moved = image.affine.copy()
    moved[:3, 3] += 0.3
    with pytest.raises(VoxelscaleError, match="do not lie on the scan's voxels"):
        read_labels(folder / "seg.dcm", Scan(image.array, moved))
    write_rtstruct(folder / "rt.dcm", {"GTV": boundaries(mask)})
    far = image.affine.copy()
    far[2, 3] += 500
    with pytest.raises(VoxelscaleError, match="outside the scan"):
        read_labels(folder / "rt.dcm", Scan(image.array, far))


@pytest.mark.parametrize("turn", LATTICES)
def test_spheres(tmp_path: Path, turn: str) -> None:
    image = Scan(
        np.zeros((20, 40, 44), np.int16), affine_from_itk((3, 4, 5), (0.7, 0.8, 1.25), LATTICES[turn])
    )
    centre = image.grid.index_to_mm((10.3, 20.4, 21.2))
    tiny = image.grid.index_to_mm((4.4, 5.4, 6.4))
    write_table(
        tmp_path / "annotations.csv", [("1.2.3", *centre, 9.0), ("1.2.3", *tiny, 0.1), ("9", 0, 0, 0, 5)]
    )
    write_table(tmp_path / "annotations_excluded.csv", [("1.2.3", *centre, -1), ("9", 1, 2, 3, 4)])
    assert kind_of(tmp_path / "annotations.csv") == "spheres"
    labels = read_labels(tmp_path / "annotations.csv", image, series="1.2.3")
    places = image.grid.index_to_mm(np.moveaxis(np.indices(image.array.shape), 0, -1))
    ball = np.linalg.norm(places - centre, axis=-1) <= 4.5
    assert labels.mask.array.sum() == ball.sum() + 1
    assert np.array_equal(
        labels.mask.array > 0, ball | (np.indices(image.array.shape).T == (4, 5, 6)).all(-1).T
    )
    assert [f.kind for f in labels.findings] == ["nodule", "nodule", "excluded"]
    assert labels.findings[2].diameter_mm is None
    with pytest.raises(VoxelscaleError, match="not known"):
        read_labels(tmp_path / "annotations.csv", image)
    beyond = image.grid.index_to_mm((10.3, 20.4, 60.0))
    write_table(tmp_path / "annotations.csv", [("1.2.3", *centre, 9.0), ("1.2.3", *beyond, 9.0)])
    labels = read_labels(tmp_path / "annotations.csv", image, series="1.2.3")
    assert [f.kind for f in labels.findings] == ["nodule", "excluded"], "what is left out is no finding"


def write_table(path: Path, rows: list[tuple[object, ...]]) -> None:
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"), *rows])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real tables are not here")
def test_lunas_own_tables() -> None:
    table = SHARED / "luna16" / "annotations.csv"
    uid = "1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192"  # LIDC-IDRI-0001
    image = read_scan(SHARED / "lidc" / "LIDC-IDRI-0001" / "ct")
    labels = read_labels(table, image, series=uid)
    (nodule,) = (f for f in labels.findings if f.kind == "nodule")
    centre = image.grid.index_to_mm(np.argwhere(labels.mask.array).mean(axis=0))
    assert np.linalg.norm(centre - nodule.centre) < 0.5
    with table.with_name("annotations_excluded.csv").open() as handle:
        excluded = sum(line.startswith(uid) for line in handle)
    assert sum(f.kind == "excluded" for f in labels.findings) == excluded > 0


def test_segments_of_several_kinds_are_named(
    case: tuple[Scan, Scan, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    image, mask, folder = case
    write_seg(folder / "seg.dcm", mask, image, folder / "ct", "BINARY")
    read_labels(folder / "seg.dcm", image)
    assert "warning" not in capsys.readouterr().err
    data = pydicom.dcmread(folder / "seg.dcm")
    organ = copy.deepcopy(data.SegmentSequence[0])
    organ.SegmentNumber, organ.SegmentLabel = 2, "lung"
    organ.SegmentedPropertyTypeCodeSequence[0].CodeValue = "39607008"
    data.SegmentSequence.append(organ)
    data.save_as(folder / "seg.dcm")
    read_labels(folder / "seg.dcm", image)
    assert (
        "seg.dcm: all of its segments are taken as the lesion (1 lesion, 2 lung)" in capsys.readouterr().err
    )
    read_labels(folder / "seg.dcm", image, values=(1,))
    assert "warning" not in capsys.readouterr().err


def test_a_mask_without_the_wanted_values(tmp_path: Path) -> None:
    image, path = Scan(np.zeros((4, 6, 6), np.int16), np.diag([1.0, 1, 1, 1])), tmp_path / "mask.nii.gz"
    sitk.WriteImage(to_itk(Scan(np.ones((4, 6, 6), np.uint8), image.affine)), str(path))
    with pytest.raises(VoxelscaleError, match="no voxel of the values"):
        read_labels(path, image, values=(2,))
    assert not read_labels(path, image, values=(2,), allow_empty=True).mask.array.any()
    assert read_labels(path, image, values=(1,)).mask.array.all()


# ------------------------------------------------------------------ classes


ORGANS = (("Liver", "Liver", "10200004"), ("Mass 1", "Mass", "4147007"), ("Heart", "Heart", "80891009"))


def write_organs(path: Path, masks: list[np.ndarray], image: Scan, ct: Path, kind: str = "BINARY") -> None:
    """By highdicom: a segment each of `ORGANS`, which may overlap where `kind` is BINARY."""
    sources = slices(ct)
    order = [
        round(float(image.grid.mm_to_index(np.asarray(s.ImagePositionPatient, float))[0])) for s in sources
    ]
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=CodedConcept("123037004", "SCT", "Anatomical Structure"),
            segmented_property_type=CodedConcept(code, "SCT", meaning),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, (label, meaning, code) in enumerate(ORGANS[: len(masks)], start=1)
    ]
    hd.seg.Segmentation(
        source_images=sources,
        pixel_array=np.stack(masks, axis=-1)[order].astype(np.uint8),
        segmentation_type=kind,
        segment_descriptions=segments,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="test",
        manufacturer_model_name="test",
        software_versions="1",
        device_serial_number="1",
    ).save_as(path)


def boxes(shape: tuple[int, ...], overlap: bool) -> list[np.ndarray]:
    made = [np.zeros(shape, bool) for _ in ORGANS]
    made[0][1:6, 2:12, 3:13] = True
    made[1][2:5, (8 if overlap else 12) : 18, 3:13] = True
    made[2][3:7, 19:22, 15:20] = True
    return made


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_segments_by_name_are_classes(
    case: tuple[Scan, Scan, Path], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image, _, folder = case
    liver, lesion, heart = boxes(image.array.shape, overlap=kind == "BINARY")
    path = folder / "seg.dcm"
    write_organs(path, [liver, lesion, heart], image, folder / "ct", kind)
    capsys.readouterr()
    classes = Classes(names=("liver", "tumour"), values=(("LIVER",), ("mass",)))
    found = read_labels(path, image, classes=classes).mask.array
    assert found.dtype == np.int16
    assert np.array_equal(found, np.where(lesion, 2, liver))
    overlap = int((liver & lesion).sum())
    told = capsys.readouterr().err
    assert (f"classes overlap in {overlap} voxels" in told) == (overlap > 0)
    turned = Classes(names=("tumour", "liver"), values=(("Mass 1",), (1,)))
    assert np.array_equal(read_labels(path, image, classes=turned).mask.array, np.where(liver, 2, lesion))
    ignoring = Classes(names=("tumour",), values=((2,),), ignore=(3,))
    expected = np.where(lesion, 1, np.where(heart, -1, 0))
    assert np.array_equal(read_labels(path, image, classes=ignoring).mask.array, expected)
    both = Classes(names=("all", "tumour"), values=((1, 2), (2,)), regions=True, order=(1, 2))
    assert np.array_equal(read_labels(path, image, classes=both).mask.array, (liver | lesion) + 2 * lesion)
    only = Classes(names=("tumour",), values=(("Mass",),))
    alone = read_labels(path, image, classes=only).mask.array
    assert alone.dtype == np.uint8
    assert np.array_equal(alone, lesion)
    with pytest.raises(
        VoxelscaleError, match=r"no segment for spleen \(it holds .*1 Liver, 2 Mass 1 / Mass, 3"
    ):
        read_labels(path, image, classes=Classes(names=("spleen",), values=(("Spleen",),)))


def test_segments_of_different_kinds_are_still_one_lesion(
    case: tuple[Scan, Scan, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    image, _, folder = case
    masks = boxes(image.array.shape, overlap=True)
    write_organs(folder / "seg.dcm", masks, image, folder / "ct")
    capsys.readouterr()
    assert np.array_equal(
        read_labels(folder / "seg.dcm", image).mask.array, np.logical_or.reduce(masks).astype(np.uint8)
    )
    told = capsys.readouterr().err
    assert "all of its segments are taken as the lesion (1 Liver, 2 Mass 1, 3 Heart)" in told
    assert "reading.labels={name: [1], ...}" in told


def test_segments_of_several_objects(
    case: tuple[Scan, Scan, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    image, _, folder = case
    liver, lesion, heart = boxes(image.array.shape, overlap=True)
    write_organs(folder / "one.dcm", [liver], image, folder / "ct")
    write_organs(folder / "two.dcm", [heart, lesion], image, folder / "ct")
    capsys.readouterr()
    classes = Classes(names=("liver", "tumour"), values=((1,), (2,)))
    found = read_labels([folder / "one.dcm", folder / "two.dcm"], image, classes=classes).mask.array
    assert np.array_equal(found, np.where(lesion, 2, np.where(liver | heart, 1, 0)))
    assert f"classes overlap in {int((liver & lesion).sum())} voxels" in capsys.readouterr().err


def test_regions_of_interest_by_name_are_classes(
    case: tuple[Scan, Scan, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    image, mask, folder = case
    shape = image.array.shape
    liver, lesion, _ = (Scan(box.astype(np.uint8), image.affine) for box in boxes(shape, overlap=True))
    path = folder / "rt.dcm"
    write_rtstruct(path, {"Liver": boundaries(liver), "GTV-1": boundaries(lesion), "X": boundaries(mask)})
    classes = Classes(names=("liver", "tumour"), values=(("liver",), ("gtv-1",)))
    capsys.readouterr()
    found = read_labels(path, image, classes=classes).mask.array
    assert np.array_equal(found, np.where(lesion.array > 0, 2, liver.array))
    overlap = int((lesion.array & liver.array).sum())
    assert f"rt.dcm: classes overlap in {overlap} voxels: the later class" in capsys.readouterr().err
    nested = Classes(names=("all", "tumour"), values=((1, 2), (2,)), regions=True, order=(1, 2))
    expected = (liver.array | lesion.array) + 2 * lesion.array
    assert np.array_equal(read_labels(path, image, classes=nested).mask.array, expected)
    assert "overlap" not in capsys.readouterr().err
    with pytest.raises(VoxelscaleError, match=r"no region for heart \(it holds 1 Liver, 2 GTV-1, 3 X\)"):
        read_labels(path, image, classes=Classes(names=("heart",), values=(("heart",),)))
    some = Classes(names=("liver", "heart"), values=(("Liver",), ("Heart",)))
    set_verbosity(1)
    assert np.array_equal(read_labels(path, image, classes=some).mask.array, liver.array)
    assert "no region for heart" in capsys.readouterr().err


def test_readers_marks_are_one_class(tmp_path: Path) -> None:
    image = Scan(np.zeros((8, 24, 26), np.int16), affine_from_itk((0, 0, 0), (1, 1, 1), np.eye(3)))
    write_table(tmp_path / "a.csv", [("1.2", 5.0, 5.0, 4.0, 4.0)])
    classes = Classes(names=("a", "b"), values=((1,), (2,)))
    with pytest.raises(VoxelscaleError, match="one class of several"):
        read_labels(tmp_path / "a.csv", image, series="1.2", classes=classes)
    ignoring = Classes(names=("nodule",), values=((1,),), ignore=(2,))
    assert (
        read_labels(tmp_path / "a.csv", image, series="1.2", classes=ignoring).mask.array.dtype == np.int16
    )
