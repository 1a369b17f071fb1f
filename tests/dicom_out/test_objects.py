"""SEG, SR and RTSTRUCT, read back by others than us and by our own reader of labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from matplotlib.path import Path as Polygon
from numpy.typing import NDArray
from pydicom.uid import RLELossless
from scipy import ndimage
from tests.conftest import SHARED
from tests.dicom_out.conftest import Judge
from tests.dicom_out.made import MODEL, Ball, predict_by_hand, source_of
from tests.formats.test_dicom import enhanced, noise, slices, write
from tests.labels.test_drawn import SERIES, places

from voxelscale.classes import LESION, NODULE, Classes
from voxelscale.config import PredictConfig, ReadingConfig
from voxelscale.config.export import ExportConfig
from voxelscale.dataset import DataSet, Source
from voxelscale.dataset.reading import read_image
from voxelscale.dicom_out.export import export_case
from voxelscale.dicom_out.kinds import ALL_KINDS
from voxelscale.findings import lesions_of_mask, read_findings, write_findings
from voxelscale.formats import read_label, write_scan
from voxelscale.geometry import Scan
from voxelscale.labels import read_labels

DICOM = ("seg", "probability", "sr", "rtstruct")
FACTS = {"warnings": [], "merge_mm": 0.0, "model": MODEL}
BALLS: list[Ball] = [(0.45, 0.4, 0.3, 5.0), (0.5, 0.65, 0.7, 4.0)]
ORGANS = Classes(names=("liver", "nodule", "odd thing"), values=((5,), (7,), (9,)))
REGIONS = Classes(names=("whole", "core"), values=((1, 2), (2,)), regions=True, order=(1, 2))
REAL = {
    "lidc 1": (SHARED / "lidc" / "LIDC-IDRI-0001" / "ct", [(0.5, 0.4, 0.3, 8.0), (0.5, 0.6, 0.7, 6.0)]),
    "lidc 2": (SHARED / "lidc" / "LIDC-IDRI-0002" / "ct", [(0.4, 0.4, 0.3, 5.0)]),
    "thorax": (SHARED / "thorax_small" / "ct-64Dicom", [(0.5, 0.4, 0.3, 15.0), (0.5, 0.6, 0.7, 18.0)]),
}


class Case(NamedTuple):
    source: Source
    scan: Scan
    folder: Path
    files: dict[str, Path]
    mask: NDArray[Any]

    @property
    def findings(self) -> list[Any]:
        return read_findings(self.folder / "findings.json")


def exported(
    ct: Path,
    out: Path,
    balls: Sequence[Sequence[Ball]] = (BALLS,),
    classes: Classes = LESION,
    kinds: Sequence[str] = DICOM,
    options: ExportConfig | None = None,
    fill_gaps: int = 1,
    config: PredictConfig | None = None,
) -> Case:
    """A prediction by hand, and its export."""
    reading = ReadingConfig(fill_gaps=fill_gaps)
    source = source_of(ct, reading)
    folder = predict_by_hand(out, source, balls, classes, reading, probabilities=True, config=config)
    files = export_case(out, source, out, kinds, options)
    mask = read_label(folder / "mask.nii.gz").array
    scan = read_image(source, reading)
    return Case(source, scan, folder, {file.stem: file for file in files}, mask)


def ct_of(name: str, folder: Path) -> list[pydicom.FileDataset]:
    steps, axes, shift = SERIES[name]
    files = slices(
        noise(10, 24, 30) // 4,
        places(steps, axes, shift),
        axes,
        FrameOfReferenceUID="1.2.9",
        StudyDate="20240229",
        StudyTime="101112",
        StudyID="S1",
        AccessionNumber="A1",
        PatientBirthDate="19500101",
        PatientSex="F",
        PatientAge="074Y",
    )
    write(files, folder)
    return files


def as_labels(case: Case, kind: str, classes: Classes = LESION) -> NDArray[Any]:
    """What our own reader of labels makes of a file."""
    return read_labels(case.files[kind], case.scan, series=case.source.series, classes=classes).mask.array


def shell(mask: NDArray[Any]) -> NDArray[np.bool_]:
    """The voxels on either side of a mask's surface."""
    around = np.ones((3, 3, 3), bool)
    return np.asarray(ndimage.binary_dilation(mask, around) & ~ndimage.binary_erosion(mask, around))


@pytest.mark.parametrize("name", REAL)
def test_real_scans_are_read_back_by_others(name: str, tmp_path: Path, judge: Judge) -> None:
    ct, balls = REAL[name]
    if not ct.is_dir():
        pytest.skip("the real scans are not here")
    case = exported(ct, tmp_path, [balls], NODULE)
    for file in case.files.values():
        judge(file)
    numbers = by_highdicom(case, ct)
    assert np.array_equal(numbers > 0, case.mask > 0)
    assert len(np.unique(numbers)) == 1 + len(balls)
    for kind in ("seg", "rtstruct", "probability"):
        assert np.array_equal(as_labels(case, kind) > 0, case.mask > 0), kind
    first = pydicom.dcmread(next(ct.iterdir()), stop_before_pixels=True)
    for file in case.files.values():
        made = pydicom.dcmread(file)
        for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"):
            if keyword != "FrameOfReferenceUID" or "SR" not in made.Modality:
                assert made[keyword].value == first[keyword].value
        assert made.SeriesDescription.startswith("for research")
        assert not any(element.tag.is_private for element in made.iterall())


def by_highdicom(case: Case, ct: Path) -> NDArray[Any]:
    """Numbers of segments on the scan's own slices, found by the UIDs that highdicom gives for each."""
    seg = hd.seg.segread(case.files["seg"])
    assert case.scan.slices is not None
    uids = [uid for uid, _ in case.scan.slices.uids]
    known = {pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID for file in ct.iterdir()}
    assert set(uids) <= known
    stacked = seg.get_pixels_by_source_instance(uids, combine_segments=True, ignore_spatial_locations=True)
    return np.asarray(stacked)


@pytest.mark.parametrize("name", SERIES)
def test_however_the_slices_lie(name: str, tmp_path: Path, judge: Judge) -> None:
    files = ct_of(name, tmp_path / "ct")
    case = exported(tmp_path / "ct", tmp_path / "out")
    for file in case.files.values():
        judge(file)
    truth = case.mask > 0
    assert case.scan.slices is not None
    regular = case.scan.slices.regular and ("", 0) not in case.scan.slices.uids
    for kind in ("seg", "rtstruct", "probability"):
        got = as_labels(case, kind) > 0
        if regular:
            assert np.array_equal(got, truth), kind
        else:  # there and back through the resampling: at most the outermost voxels
            assert got.any()
            assert not ((got != truth) & ~shell(truth)).any(), kind
    seg = pydicom.dcmread(case.files["seg"])
    by_uid = {file.SOPInstanceUID: file for file in files}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert source.SpatialLocationsPreserved == "YES"
        where = by_uid[source.ReferencedSOPInstanceUID].ImagePositionPatient
        assert np.allclose(frame.PlanePositionSequence[0].ImagePositionPatient, where, atol=1e-4)
    shared = seg.SharedFunctionalGroupsSequence[0]
    turned = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    assert np.allclose(turned, files[0].ImageOrientationPatient, atol=1e-5)
    assert np.allclose(shared.PixelMeasuresSequence[0].PixelSpacing, files[0].PixelSpacing, atol=1e-6)


def frames_of(seg: pydicom.FileDataset) -> dict[tuple[int, str], NDArray[np.bool_]]:
    """Pixels by segment and slice."""
    pixels = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    found = {}
    for frame, values in zip(seg.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        found[number, source.ReferencedSOPInstanceUID] = values > 0
    return found


@pytest.mark.parametrize("name", ["sagittal", "tilted, uneven", "leaning"])
def test_contours_hold_the_segments_pixels(name: str, tmp_path: Path) -> None:
    """Both read by pydicom, filled by Matplotlib on the pixels that the slices' own headers describe."""
    files = {file.SOPInstanceUID: file for file in ct_of(name, tmp_path / "ct")}
    case = exported(tmp_path / "ct", tmp_path / "out", kinds=["seg", "rtstruct"])
    wanted = frames_of(pydicom.dcmread(case.files["seg"]))
    got: dict[tuple[int, str], NDArray[np.bool_]] = {}
    for region in pydicom.dcmread(case.files["rtstruct"]).ROIContourSequence:
        for contour in region.ContourSequence:
            uid = contour.ContourImageSequence[0].ReferencedSOPInstanceUID
            right, down = np.asarray(files[uid].ImageOrientationPatient, float).reshape(2, 3)
            away = np.asarray(contour.ContourData, float).reshape(-1, 3) - np.asarray(
                files[uid].ImagePositionPatient, float
            )
            assert np.abs(away @ np.cross(right, down)).max() < 1e-3
            rows, columns = (
                away @ axis / float(step)
                for axis, step in zip((down, right), files[uid].PixelSpacing, strict=True)
            )
            index = np.indices((24, 30)).reshape(2, -1).T
            filled = Polygon(np.column_stack([rows, columns])).contains_points(index).reshape(24, 30)
            key = (int(region.ReferencedROINumber), uid)
            got[key] = got.get(key, np.zeros((24, 30), bool)) ^ filled
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[key], wanted[key]) for key in got)


@pytest.mark.parametrize("name", ["feet first", "tilted"])
def test_frames_of_one_file_in_any_order(name: str, tmp_path: Path, judge: Judge) -> None:
    steps, axes, shift = SERIES[name]
    at = places(steps, axes, shift)
    order = np.random.default_rng(0).permutation(10).tolist()
    whole = enhanced(noise(10, 24, 30) // 4, at, axes, order)
    whole.FrameOfReferenceUID = "1.2.9"
    write([whole], tmp_path / "ct")
    case = exported(tmp_path / "ct", tmp_path / "out")
    for file in case.files.values():
        judge(file)
    assert np.array_equal(as_labels(case, "seg") > 0, case.mask > 0)
    for kind in ("seg", "probability"):
        seg = pydicom.dcmread(case.files[kind])
        assert [item.ReferencedSOPInstanceUID for item in seg.SourceImageSequence] == [whole.SOPInstanceUID]
        for frame in seg.PerFrameFunctionalGroupsSequence:
            (source,) = frame.DerivationImageSequence[0].SourceImageSequence
            assert source.ReferencedSOPInstanceUID == whole.SOPInstanceUID
            assert source.ReferencedSOPClassUID == whole.SOPClassUID
            wanted = at[order[source.ReferencedFrameNumber - 1]]
            assert np.allclose(frame.PlanePositionSequence[0].ImagePositionPatient, wanted, atol=1e-4)
    contours = pydicom.dcmread(case.files["rtstruct"]).ROIContourSequence[0].ContourSequence
    for contour in contours:
        (image,) = contour.ContourImageSequence
        wanted = at[order[image.ReferencedFrameNumber - 1]]
        normal = np.cross(*axes)
        points = np.asarray(contour.ContourData, float).reshape(-1, 3)
        assert np.allclose((points - wanted) @ normal, 0, atol=1e-3)


def test_a_compressed_series_among_others_of_the_study(tmp_path: Path, judge: Judge) -> None:
    files = ct_of("prone", tmp_path / "ct")
    for file in files:
        file.compress(RLELossless)
    write(files, tmp_path / "ct")
    steps, axes, shift = SERIES["prone"]
    others = slices(noise(10, 24, 30), places(steps, axes, shift), axes, FrameOfReferenceUID="1.2.9")
    for file in others:
        file.StudyInstanceUID, file.PatientID = files[0].StudyInstanceUID, files[0].PatientID
    write(others, tmp_path / "ct" / "other")
    both = DataSet(path=tmp_path / "ct").scans
    assert len(both) == 2
    for source in both:
        predict_by_hand(tmp_path / "out", source, [BALLS])
        made = export_case(tmp_path / "out", source, tmp_path / "out", ["seg", "sr", "rtstruct"])
        own = {f.SOPInstanceUID for f in (*files, *others) if f.SeriesInstanceUID == source.series}
        for file in made:
            judge(file)
            dataset = pydicom.dcmread(file)
            named = {
                str(element.value)
                for element in dataset.iterall()
                if element.keyword == "ReferencedSOPInstanceUID"
            }
            theirs = {f.SOPInstanceUID for f in (*files, *others)} - own
            assert named & own
            assert not named & theirs


@pytest.mark.parametrize("segments", ["finding", "class"])
def test_several_classes(segments: str, tmp_path: Path, judge: Judge) -> None:
    ct_of("coronal", tmp_path / "ct")
    balls: list[list[Ball]] = [[(0.3, 0.3, 0.3, 5.0)], BALLS[1:], [(0.7, 0.3, 0.8, 4.0)]]
    codes = {"Odd Thing": ["99LOCAL", "T-1", "Odd thing"]}
    options = ExportConfig(segments="class" if segments == "class" else "finding", codes=codes)
    case = exported(tmp_path / "ct", tmp_path / "out", balls, ORGANS, options=options)
    for file in case.files.values():
        judge(file)
    seg = hd.seg.segread(case.files["seg"])
    told = {
        d.segment_label.rstrip(" 0123456789"): (
            d.segmented_property_category.meaning,
            d.segmented_property_type,
        )
        for d in seg.SegmentSequence
    }
    assert {name: (category, kind.value) for name, (category, kind) in told.items()} == {
        "liver": ("Anatomical Structure", "10200004"),
        "nodule": ("Morphologically Abnormal Structure", "27925004"),
        "odd thing": ("Morphologically Abnormal Structure", "T-1"),
    }
    if segments == "class":
        classes = Classes(names=ORGANS.names, values=tuple((name,) for name in ORGANS.names))
        for kind in ("seg", "rtstruct"):
            got = as_labels(case, kind, classes)
            assert np.array_equal(got, ORGANS.of_written(case.mask)), kind


def test_small_parts_of_a_class_stay_with_it(tmp_path: Path, judge: Judge) -> None:
    ct_of("coronal", tmp_path / "ct")
    source = source_of(tmp_path / "ct")
    folder = predict_by_hand(tmp_path / "out", source, [BALLS[:1], BALLS[1:], []], ORGANS)
    mask = read_label(folder / "mask.nii.gz")
    mask.array[0, 0, :2] = mask.array[9, 23, 29] = 5
    write_scan(mask, folder / "mask.nii.gz")
    for path in export_case(tmp_path / "out", source, tmp_path / "out", ["seg", "sr", "rtstruct"]):
        judge(path)
    seg = hd.seg.segread(folder / "seg.dcm")
    names = [d.segment_label for d in seg.SegmentSequence]
    assert sorted(names) == ["liver 1", "liver, small parts", "nodule 2"]
    held = dict(zip(names, pixels_of(seg), strict=True))
    assert held["liver, small parts"] == 3
    assert held["liver 1"] + 3 == (mask.array == 5).sum()
    groups = hd.sr.srread(folder / "sr.dcm").content.get_volumetric_roi_measurement_groups()
    assert [group.tracking_identifier for group in groups] == ["liver 1", "nodule 2"]


@pytest.mark.parametrize("radii", [(6.0, 4.0), (3.0, 6.0)])
def test_regions_whose_mask_lost_a_combination(tmp_path: Path, radii: tuple[float, float]) -> None:
    """A core outside the whole is written as both: the whole has voxels more than its finding, or many
    times as many."""
    ct_of("prone", tmp_path / "ct")
    balls = [[(0.5, 0.5, 0.5, radii[0])], [(0.5, 0.5, 0.62, radii[1])]]
    case = exported(tmp_path / "ct", tmp_path / "out", balls, REGIONS, kinds=["seg", "sr"])
    seg = hd.seg.segread(case.files["seg"])
    names = sorted(d.segment_label.split()[0] for d in seg.SegmentSequence)
    assert names == ["core", "whole"]
    groups = hd.sr.srread(case.files["sr"]).content.get_volumetric_roi_measurement_groups()
    assert len(groups) == 2


def test_no_finding_is_too_small_for_the_slices(tmp_path: Path) -> None:
    """A voxel of a resampled scan may be less than half of any pixel."""
    ct_of("uneven", tmp_path / "ct")
    source = source_of(tmp_path / "ct")
    folder = predict_by_hand(tmp_path / "out", source, [BALLS])
    mask = read_label(folder / "mask.nii.gz")
    for level in range(len(mask.array)):
        lone = np.zeros_like(mask.array)
        lone[level, 7, 9] = 1
        write_scan(Scan(lone, mask.affine), folder / "mask.nii.gz")
        write_findings(lesions_of_mask(source.case, lone, mask.grid), *csv_and_json(folder), FACTS)
        (path,) = export_case(tmp_path / "out", source, tmp_path / "out", ["seg"])
        seg = pydicom.dcmread(path)
        (frame,) = seg.PerFrameFunctionalGroupsSequence
        assert np.argwhere(seg.pixel_array.reshape(24, 30)).tolist() == [[7, 9]]
        where = np.asarray(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        assert abs(where[2] - mask.grid.index_to_mm([level, 0, 0])[2]) <= 3.1 / 2 + 0.01


def csv_and_json(folder: Path) -> tuple[Path, Path]:
    return folder / "findings.csv", folder / "findings.json"


def test_a_loss_of_the_source_is_not_concealed(tmp_path: Path, judge: Judge) -> None:
    files = ct_of("prone", tmp_path / "ct")
    for file in files:
        file.LossyImageCompression, file.LossyImageCompressionRatio = "01", "12.5"
        file.LossyImageCompressionMethod = "ISO_10918_1"
    write(files, tmp_path / "ct")
    case = exported(tmp_path / "ct", tmp_path / "out", kinds=["seg"])
    judge(case.files["seg"])
    seg = pydicom.dcmread(case.files["seg"])
    assert seg.LossyImageCompression == "01"
    assert (seg.LossyImageCompressionRatio, seg.LossyImageCompressionMethod) == (12.5, "ISO_10918_1")


def test_classes_of_any_name(tmp_path: Path, judge: Judge) -> None:
    names = ("Tumör\\Ödem", "very long " * 12, "腫瘍")
    classes = Classes(names=names, values=((1,), (2,), (3,)))
    ct_of("prone", tmp_path / "ct")
    balls: list[list[Ball]] = [[(0.3, 0.3, 0.3, 5.0)], BALLS[1:], [(0.7, 0.3, 0.8, 4.0)]]
    case = exported(tmp_path / "ct", tmp_path / "out", balls, classes)
    for file in case.files.values():
        judge(file)
    for kind, sequence, name in (
        ("seg", "SegmentSequence", "SegmentLabel"),
        ("rtstruct", "StructureSetROISequence", "ROIName"),
    ):
        labels = {str(item[name].value) for item in pydicom.dcmread(case.files[kind])[sequence]}
        assert {label[:-2] for label in labels} == {"Tumör/Ödem", ("very long " * 12)[:62], "腫瘍"}
        assert all(len(label) <= 64 for label in labels)


def test_regions_overlap(tmp_path: Path, judge: Judge) -> None:
    ct_of("prone", tmp_path / "ct")
    balls = [[(0.5, 0.5, 0.5, 6.0)], [(0.5, 0.5, 0.5, 3.5)]]
    for segments in ("finding", "class"):
        options = ExportConfig(segments="class" if segments == "class" else "finding")
        case = exported(tmp_path / "ct", tmp_path / segments, balls, REGIONS, options=options)
        judge(case.files["seg"])
        seg = pydicom.dcmread(case.files["seg"])
        assert seg.SegmentsOverlap == "YES"
        stored = REGIONS.of_written(case.mask)
        sizes = [int(REGIONS.where(stored, at).sum()) for at in (0, 1)]
        pixels = seg.pixel_array
        of = [
            f.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            for f in seg.PerFrameFunctionalGroupsSequence
        ]
        held = sorted((int(pixels[np.asarray(of) == n].sum()) for n in (1, 2)), reverse=True)
        assert held == sizes


def test_probabilities_are_the_kept_ones(tmp_path: Path) -> None:
    ct_of("prone", tmp_path / "ct")
    case = exported(tmp_path / "ct", tmp_path / "out", options=ExportConfig(segments="class"))
    kept = read_label(case.folder / "probability.nii.gz").array
    image = sitk.ReadImage(str(case.files["probability"]))
    values = sitk.GetArrayFromImage(image)
    seg = pydicom.dcmread(case.files["probability"])
    assert (seg.SegmentationType, seg.SegmentationFractionalType) == ("FRACTIONAL", "PROBABILITY")
    assert seg.MaximumFractionalValue == 255
    index = np.argwhere(values > 0)
    points = [image.TransformIndexToPhysicalPoint(tuple(map(int, i[::-1]))) for i in index]
    there = np.rint(case.scan.grid.mm_to_index(points)).astype(int)
    assert len(index) == (kept > 0).sum()
    assert np.array_equal(values[tuple(index.T)], kept[tuple(there.T)])
    own = exported(tmp_path / "ct", tmp_path / "each")
    each = pydicom.dcmread(own.files["probability"]).pixel_array
    assert sorted(each[each > 0].tolist()) == sorted(kept[own.mask > 0].tolist())


def test_simpleitk_reads_a_class_as_it_lies(tmp_path: Path) -> None:
    ct_of("sagittal", tmp_path / "ct")
    case = exported(tmp_path / "ct", tmp_path / "out", options=ExportConfig(segments="class"))
    image = sitk.ReadImage(str(case.files["seg"]))
    index = np.argwhere(sitk.GetArrayFromImage(image) > 0)
    points = [image.TransformIndexToPhysicalPoint(tuple(map(int, i[::-1]))) for i in index]
    there = case.scan.grid.mm_to_index(points)
    assert np.abs(there - np.rint(there)).max() < 0.01
    got = np.zeros(case.mask.shape, bool)
    got[tuple(np.rint(there).astype(int).T)] = True
    assert np.array_equal(got, case.mask > 0)


@pytest.mark.parametrize("segments", ["finding", "class"])
@pytest.mark.parametrize("name", ["sagittal", "prone"])
def test_dcmqi_reads_the_same(name: str, segments: str, tmp_path: Path) -> None:
    """QIICR's own programs: voxels, places and segments of a SEG; tracking and measurements of an SR."""
    dcmqi = pytest.importorskip("dcmqi")
    ct_of(name, tmp_path / "ct")
    options = ExportConfig(segments="class" if segments == "class" else "finding")
    case = exported(tmp_path / "ct", tmp_path / "out", options=options)
    (tmp_path / "read").mkdir()
    words = [
        "--inputDICOM",
        str(case.files["seg"]),
        "--outputDirectory",
        str(tmp_path / "read"),
        "-t",
        "nrrd",
    ]
    assert dcmqi._program("segimage2itkimage", words) == 0
    count = len(pydicom.dcmread(case.files["seg"]).SegmentSequence)
    got = np.zeros(case.mask.shape, int)
    for number in range(1, count + 1):
        image = sitk.ReadImage(str(tmp_path / "read" / f"{number}.nrrd"))
        index = np.argwhere(sitk.GetArrayFromImage(image) > 0)
        points = [image.TransformIndexToPhysicalPoint(tuple(map(int, i[::-1]))) for i in index]
        there = case.scan.grid.mm_to_index(points)
        assert np.abs(there - np.rint(there)).max() < 0.01
        got[tuple(np.rint(there).astype(int).T)] += 1
    assert np.array_equal(got, (case.mask > 0).astype(int))
    words = ["--inputDICOM", str(case.files["sr"]), "--outputMetadata", str(tmp_path / "sr.json")]
    assert dcmqi._program("tid1500reader", words) == 0
    groups = json.loads((tmp_path / "sr.json").read_text())["Measurements"]
    findings = [f for f in case.findings if f.probability >= 0.5]
    assert len(groups) == len(findings)
    for group, finding in zip(groups, findings, strict=True):
        measured = {m["quantity"]["CodeMeaning"]: float(m["value"]) for m in group["measurementItems"]}
        assert measured["Volume"] == pytest.approx(finding.volume_mm3)
        assert measured["Long Axis"] == pytest.approx(finding.axial_diameter_mm)
        assert 1 <= group["ReferencedSegment"] <= count


@pytest.mark.parametrize("segments", ["finding", "class"])
def test_the_report_says_what_was_measured(segments: str, tmp_path: Path) -> None:
    ct_of("coronal", tmp_path / "ct")
    options = ExportConfig(segments="class" if segments == "class" else "finding")
    case = exported(tmp_path / "ct", tmp_path / "out", classes=NODULE, options=options)
    content = hd.sr.srread(case.files["sr"]).content
    groups = content.get_volumetric_roi_measurement_groups()
    findings = [f for f in case.findings if f.probability >= 0.5]
    assert len(groups) == len(findings) == len(BALLS)
    seg = pydicom.dcmread(case.files["seg"])
    for rank, (group, finding) in enumerate(zip(groups, findings, strict=True), start=1):
        assert group.tracking_identifier == f"nodule {rank}"
        assert group.finding_type.value == "27925004"
        assert [site.value.value for site in group.finding_sites] == ["39607008"]
        measures = {m.name.value: m for m in group.get_measurements()}
        wanted = {
            "118565006": finding.volume_mm3,
            "103339001": finding.axial_diameter_mm,
            "103340004": finding.short_axis_mm,
            "112031": finding.mean_hu,
            "111012": 100 * finding.probability,
        }
        assert {code: m.value for code, m in measures.items()} == pytest.approx(wanted, rel=1e-9)
        for code, ends in (("103339001", finding.axial_ends), ("103340004", finding.short_axis_ends)):
            (line,) = measures[code].referenced_coordinates
            assert np.allclose(line.value, ends, atol=1e-4)
            assert line.frame_of_reference_uid == "1.2.9"
            assert np.linalg.norm(np.diff(line.value, axis=0)) == pytest.approx(
                measures[code].value, abs=1e-3
            )
        shown = group.referenced_segment[0].ReferencedSOPSequence[0]
        assert shown.ReferencedSOPInstanceUID == seg.SOPInstanceUID
        segment = seg.SegmentSequence[shown.ReferencedSegmentNumber - 1]
        assert segment.SegmentNumber == shown.ReferencedSegmentNumber
        if segments == "finding":
            assert segment.TrackingUID == group.tracking_uid
    text = str(pydicom.dcmread(case.files["sr"]))
    assert "Voxelscale" in text
    assert MODEL in text
    assert "0.0.test" in text


def test_a_report_without_a_segmentation(tmp_path: Path, judge: Judge) -> None:
    ct_of("prone", tmp_path / "ct")
    case = exported(tmp_path / "ct", tmp_path / "out", kinds=["sr"])
    judge(case.files["sr"])
    content = hd.sr.srread(case.files["sr"]).content
    assert len(content.get_image_measurement_groups()) == len(BALLS)
    assert not content.get_volumetric_roi_measurement_groups()


def test_nothing_found(tmp_path: Path, judge: Judge) -> None:
    ct_of("prone", tmp_path / "ct")
    exported(tmp_path / "ct", tmp_path / "out")
    case = exported(tmp_path / "ct", tmp_path / "out", [[]], kinds=ALL_KINDS)
    assert set(case.files) == {"sr", "page"}
    assert not list(case.folder.glob("seg*")), "what an earlier prediction found is gone"
    judge(case.files["sr"])
    (group,) = hd.sr.srread(case.files["sr"]).content.get_image_measurement_groups()
    (said,) = group.get_qualitative_evaluations()
    assert (said.name.meaning, said.value.meaning) == ("Lesion", "Absent")
    assert "Nothing was found" in case.files["page"].read_text()


def test_merged_fragments_are_one_segment(tmp_path: Path) -> None:
    ct_of("prone", tmp_path / "ct")
    balls = [[(0.5, 0.5, 0.2, 3.0), (0.5, 0.5, 0.45, 3.0), (0.5, 0.1, 0.95, 2.5)]]
    config = PredictConfig(merge_mm=12.0)
    case = exported(tmp_path / "ct", tmp_path / "out", balls, config=config)
    sure = [f for f in case.findings if f.probability >= 0.5]
    seg = hd.seg.segread(case.files["seg"])
    volumes = [case.scan.grid.voxel_mm3 * n for n in pixels_of(seg)]
    assert volumes == pytest.approx([f.volume_mm3 for f in sure])
    assert len(sure) < 3


def pixels_of(seg: Any) -> list[int]:
    """Of each segment."""
    of = np.asarray(
        [
            f.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            for f in seg.PerFrameFunctionalGroupsSequence
        ]
    )
    pixels = seg.pixel_array.reshape(len(of), -1)
    return [int(pixels[of == n].sum()) for n in range(1, seg.number_of_segments + 1)]


def test_many_overlapping_segments_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voxelscale.dicom_out.seg.LARGEST", 1)
    ct_of("prone", tmp_path / "ct")
    balls = [[(0.5, 0.5, 0.5, 6.0)], [(0.5, 0.5, 0.5, 3.5)]]
    case = exported(tmp_path / "ct", tmp_path / "out", balls, REGIONS, kinds=["seg", "sr"])
    assert set(case.files) == {"seg_1", "seg_2", "sr"}
    groups = hd.sr.srread(case.files["sr"]).content.get_volumetric_roi_measurement_groups()
    shown = [group.referenced_segment[0].ReferencedSOPSequence[0] for group in groups]
    made = [pydicom.dcmread(case.files[name]) for name in ("seg_1", "seg_2")]
    assert [s.ReferencedSOPInstanceUID for s in shown] == [dataset.SOPInstanceUID for dataset in made]
    assert [s.ReferencedSegmentNumber for s in shown] == [1, 1]


def test_the_same_prediction_gives_the_same_bytes(tmp_path: Path) -> None:
    ct_of("tilted", tmp_path / "ct")
    case = exported(tmp_path / "ct", tmp_path / "out", kinds=ALL_KINDS)
    again = export_case(tmp_path / "out", case.source, tmp_path / "again", ALL_KINDS)
    assert {f.name: f.read_bytes() for f in again} == {f.name: f.read_bytes() for f in case.files.values()}
    uids = [pydicom.dcmread(case.files[kind]).SOPInstanceUID for kind in DICOM]
    series = [pydicom.dcmread(case.files[kind]).SeriesInstanceUID for kind in DICOM]
    assert len({*uids, *series}) == 2 * len(DICOM)
    assert all(uid.startswith("2.25.") and len(uid) <= 64 for uid in uids)
    for kind in DICOM:
        made = pydicom.dcmread(case.files[kind])
        dates = {str(e.value) for e in made.iterall() if e.VR == "DA" and e.value}
        assert dates <= {"20240229", "19500101"}, "of the study and of birth"
    findings = json.loads((case.folder / "findings.json").read_text())
    findings["findings"][0]["mean_hu"] += 1.0
    (case.folder / "findings.json").write_text(json.dumps(findings))
    other = export_case(tmp_path / "out", case.source, tmp_path / "again", ["seg", "sr"])
    assert [
        pydicom.dcmread(f).SOPInstanceUID == u for f, u in zip(other, (uids[0], uids[2]), strict=True)
    ] == [
        True,
        False,
    ]
