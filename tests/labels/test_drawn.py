"""Labels of scans whose slices are tilted, uneven, missing or turned: drawn on the slices as they are.

The scan shows the label: what its reader interpolates linearly is the share of each voxel that the label
has, so the mask must be where that is one half or more.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence as Items
from tests.conftest import Command
from tests.formats.test_dicom import SPACING, along, segmentation, set_pixels, slices, text, write
from tests.labels.test_kinds import write_rtstruct

from voxelscale.config import ReadingConfig
from voxelscale.dataset.reading import read_case, read_truth
from voxelscale.dataset.source import Source
from voxelscale.geometry import Scan

FULL = 1000
"""HU of the label's pixels; all others are 0."""

AXIAL = np.array([[1.0, 0, 0], [0, 1, 0]])
PRONE = -AXIAL
SAGITTAL = np.array([[0.0, 1, 0], [0, 0, -1]])
CORONAL = np.array([[1.0, 0, 0], [0, 0, -1]])
FEET_FIRST = np.array([[-1.0, 0, 0], [0, 1, 0]])
LEANING = np.array([[1.0, 0, 0], [0, np.cos(0.3), np.sin(0.3)]])

EVEN = [2.0] * 9
UNEVEN = [2.0, 2.0, 2.0, 2.0, 3.1, 3.1, 2.0, 2.0, 2.0]
MISSING = [2.0, 2.0, 2.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def drawing() -> NDArray[np.uint8]:
    """A block of several slices, rows and columns, nowhere near symmetric."""
    mask = np.zeros((10, 24, 30), np.uint8)
    mask[3:6, 4:11, 6:16] = 1
    mask[4:6, 14:18, 5:9] = 1
    return mask


def places(steps: Sequence[float], axes: NDArray[Any], shift: float) -> NDArray[Any]:
    """Of slices that are shifted along their columns by `shift` mm each."""
    at = along(steps, axes)
    return np.asarray(at + np.arange(len(at))[:, None] * shift * axes[1])


SERIES = {
    "prone": (EVEN, PRONE, 0.0),
    "sagittal": (EVEN, SAGITTAL, 0.0),
    "coronal": (EVEN, CORONAL, 0.0),
    "feet first": (EVEN, FEET_FIRST, 0.0),
    "uneven": (UNEVEN, AXIAL, 0.0),
    "uneven and prone": (UNEVEN, PRONE, 0.0),
    "tilted": (EVEN, AXIAL, 0.53),
    "tilted, uneven": (UNEVEN, FEET_FIRST, -0.37),
    "leaning": (EVEN, LEANING, 0.61),
    "missing": (MISSING, AXIAL, 0.0),
    "missing, tilted": (MISSING, PRONE, 0.53),
}


def series(name: str, folder: Path) -> tuple[list[FileDataset], NDArray[Any]]:
    at = places(*SERIES[name])
    hu = drawing().astype(np.int16) * FULL
    files = slices(hu, at, SERIES[name][1], FrameOfReferenceUID="1.2.9", SeriesInstanceUID="1.2.3")
    write(files, folder / "ct")
    return files, at


def write_seg(path: Path, files: Sequence[FileDataset], *, placed: bool) -> None:
    """A frame a slice, upside down, with its position or only with the slice that it was derived from."""
    mask = drawing()[::-1]
    ds = segmentation("1.2.3")
    set_pixels(ds, mask.astype(np.uint16))
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, 1, 0
    ds.NumberOfFrames, ds.SegmentationType = len(mask), "BINARY"
    ds.PixelData = np.packbits(mask.ravel(), bitorder="little").tobytes()
    segment, shared, plane, measures, identity = (Dataset() for _ in range(5))
    segment.SegmentNumber = identity.ReferencedSegmentNumber = 1
    plane.ImageOrientationPatient, measures.PixelSpacing = files[0].ImageOrientationPatient, text(SPACING)
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Items([plane]), Items([measures])
    shared.SegmentIdentificationSequence = Items([identity])
    each = []
    for file in files[::-1]:
        frame, position, derived, source = (Dataset() for _ in range(4))
        if placed:
            position.ImagePositionPatient = file.ImagePositionPatient
            frame.PlanePositionSequence = Items([position])
        source.ReferencedSOPInstanceUID = file.SOPInstanceUID
        derived.SourceImageSequence = Items([source])
        frame.DerivationImageSequence = Items([derived])
        each.append(frame)
    ds.SegmentSequence, ds.SharedFunctionalGroupsSequence = Items([segment]), Items([shared])
    ds.PerFrameFunctionalGroupsSequence = Items(each)
    write([ds], path.parent, [path.name])


def outlines(grow: float) -> list[tuple[int, NDArray[Any]]]:
    """Slice and corners (row, column) of every block, `grow` pixels beyond the outermost centres."""
    found = []
    for number, plane in enumerate(drawing()):
        for rows, columns in ((slice(4, 11), slice(6, 16)), (slice(14, 18), slice(5, 9))):
            if plane[rows, columns].any():
                r, c = (
                    (rows.start - grow, rows.stop - 1 + grow),
                    (columns.start - grow, columns.stop - 1 + grow),
                )
                found.append((number, np.array([(r[0], c[0]), (r[0], c[1]), (r[1], c[1]), (r[1], c[0])])))
    return found


def write_contours(path: Path, at: NDArray[Any], axes: NDArray[Any]) -> None:
    contours = [
        at[number] + corners[:, :1] * SPACING[0] * axes[1] + corners[:, 1:] * SPACING[1] * axes[0]
        for number, corners in outlines(0.4)
    ]
    write_rtstruct(path, {"GTV": contours})


def write_xml(path: Path, at: NDArray[Any]) -> None:
    """The outline runs through the first pixels outside."""
    rois: dict[int, str] = {}
    for number, corners in outlines(1):
        points = "".join(
            f"<edgeMap><xCoord>{int(c)}</xCoord><yCoord>{int(r)}</yCoord></edgeMap>"
            for r, c in ring(corners)
        )
        head = f"<imageZposition>{at[number][2]:.4f}</imageZposition><inclusion>TRUE</inclusion>"
        block = int(corners[0][0] > 10)
        rois[block] = rois.get(block, "") + f"<roi>{head}{points}</roi>"
    nodules = "".join(
        f"<unblindedReadNodule><noduleID>1</noduleID>{roi}</unblindedReadNodule>" for roi in rois.values()
    )
    head = '<LidcReadMessage xmlns="http://www.nih.gov"><readingSession>'
    path.write_text(f"{head}{nodules}</readingSession></LidcReadMessage>")


def ring(corners: NDArray[Any]) -> list[tuple[float, float]]:
    (top, left), _, (bottom, right), _ = corners
    across, down = np.arange(left, right), np.arange(top, bottom)
    return [
        *((top, c) for c in across),
        *((r, right) for r in down),
        *((bottom, c) for c in across[::-1] + 1),
        *((r, left) for r in down[::-1] + 1),
    ]


def read(folder: Path, label: str) -> tuple[Scan, Scan]:
    source = Source(case="a", patient="a", image=folder / "ct", labels=(folder / label,), series="1.2.3")
    config = ReadingConfig(fill_gaps=1)
    image, labels = read_case(source, config)
    assert np.array_equal(read_truth(source, config).array, labels.mask.array)
    return image, labels.mask


def assert_where_the_scan_shows_it(image: Scan, mask: Scan) -> None:
    assert mask.grid.same_as(image.grid)
    shown = image.array.astype(float)
    clear = np.abs(shown - FULL / 2) > 2
    assert clear.mean() > 0.95
    assert mask.array.any()
    assert np.array_equal(mask.array[clear] > 0, shown[clear] > FULL / 2)


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("kind", ["placed", "derived", "contours", "lidc"])
def test_a_label_lies_where_the_scan_shows_it(name: str, kind: str, tmp_path: Path) -> None:
    files, at = series(name, tmp_path)
    axes = SERIES[name][1]
    if kind == "lidc":
        if name in ("sagittal", "coronal"):
            pytest.skip("LIDC's slices are axial")
        write_xml(tmp_path / "label", at)
    elif kind == "contours":
        write_contours(tmp_path / "label", at, axes)
    else:
        write_seg(tmp_path / "label", files, placed=kind == "placed")
    assert_where_the_scan_shows_it(*read(tmp_path, "label"))


@pytest.mark.parametrize("name", SERIES)
def test_classes_lie_where_the_scan_shows_them(name: str, tmp_path: Path) -> None:
    """The two blocks as two segments of one object."""
    files, _ = series(name, tmp_path)
    write_seg(tmp_path / "seg.dcm", files, placed=True)
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    blocks = [drawing()[::-1], drawing()[::-1]]
    blocks[0][:, 12:], blocks[1][:, :12] = 0, 0
    ds.PixelData = np.packbits(np.concatenate(blocks).ravel(), bitorder="little").tobytes()
    frames = [copy.deepcopy(frame) for _ in blocks for frame in ds.PerFrameFunctionalGroupsSequence]
    for number, frame in enumerate(frames):
        identity = Dataset()
        identity.ReferencedSegmentNumber = 1 + number // len(files)
        frame.SegmentIdentificationSequence = Items([identity])
    ds.PerFrameFunctionalGroupsSequence, ds.NumberOfFrames = Items(frames), len(frames)
    second = copy.deepcopy(ds.SegmentSequence[0])
    second.SegmentNumber = 2
    ds.SegmentSequence.append(second)
    ds.save_as(tmp_path / "seg.dcm")
    image, whole = read(tmp_path, "seg.dcm")
    assert_where_the_scan_shows_it(image, whole)
    source = Source(
        case="a", patient="a", image=tmp_path / "ct", labels=(tmp_path / "seg.dcm",), series="1.2.3"
    )
    reading = ReadingConfig(fill_gaps=1, labels={"left": 2, "right": 1})
    mask = read_case(source, reading)[1].mask.array
    assert np.array_equal(mask > 0, whole.array > 0)
    for number, value in ((1, 2), (2, 1)):
        alone = read_case(source, ReadingConfig(fill_gaps=1, labels=(number,)))[1].mask.array
        assert alone.any()
        assert np.array_equal(mask == value, alone > 0)


@pytest.mark.parametrize("name", ["uneven", "tilted"])
def test_a_mask_in_slices_keeps_its_classes(name: str, tmp_path: Path) -> None:
    """Between class 3 and nothing there is no class 1 or 2."""
    _, at = series(name, tmp_path)
    write(slices(drawing().astype(np.int16) * 3, at, RescaleIntercept="-1024"), tmp_path / "mask")
    image, mask = read(tmp_path, "mask")
    assert_where_the_scan_shows_it(image, mask)


def test_every_command_reads_a_tilted_scans_label(tmp_path: Path, voxelscale: Command) -> None:
    files, _ = series("tilted", tmp_path)
    write_seg(tmp_path / "seg.dcm", files, placed=True)
    (tmp_path / "set.csv").write_text("image,label\nct,seg.dcm\n")
    code, out, err = voxelscale("inspect", tmp_path / "set.csv", "--json")
    assert code == 0, err
    found = json.loads(out)
    _, mask = read(tmp_path, "seg.dcm")
    (case,) = found["cases"]
    assert sum(case["lesions_mm3"]) == pytest.approx(mask.array.sum() * mask.grid.voxel_mm3, rel=1e-3)
    assert not [problem for problem in found["problems"] if problem["severity"] == "error"]


def test_what_lies_only_partly_on_the_scan_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, at = series("prone", tmp_path)
    write_seg(tmp_path / "seg.dcm", files, placed=True)
    write_contours(tmp_path / "rt.dcm", at, PRONE)
    write_xml(tmp_path / "a.xml", at)
    for file in sorted((tmp_path / "ct").iterdir())[:5]:
        file.unlink()
    for name, said in (
        ("seg.dcm", "outside the scan"),
        ("rt.dcm", "outside the scan"),
        ("a.xml", "not in the scan"),
    ):
        image, mask = read(tmp_path, name)
        assert_where_the_scan_shows_it(image, mask)
        err = capsys.readouterr().err
        assert "warning: " in err
        assert name in err
        assert said in err
