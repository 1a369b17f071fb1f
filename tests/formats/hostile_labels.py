"""DICOM labels that lie: each is a change of a valid SEG or RTSTRUCT beside its scan."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import UID, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid
from tests.formats.test_formats import write_series
from tests.labels.test_kinds import LATTICES, boundaries, truth, write_rtstruct, write_seg

from voxelscale.formats import read_scan
from voxelscale.geometry import Scan

Change = Callable[[FileDataset], None]
CONTOUR_DATA = Tag(0x3006, 0x0050)


def write_scan_and_labels(folder: Path) -> int:
    """``ct/``, ``seg.dcm`` and ``rt.dcm``; how many voxels the lesion has."""
    lesion = truth(LATTICES["straight"])
    uid = generate_uid()
    write_series(folder / "ct", Scan(lesion.array.astype(np.int16) * 100, lesion.affine), uid=uid)
    write_seg(folder / "seg.dcm", lesion, read_scan(folder / "ct"), folder / "ct", "BINARY")
    write_rtstruct(folder / "rt.dcm", {"GTV": boundaries(lesion)})
    changed(folder / "rt.dcm", lambda data: refer_to(data, uid))
    return int(lesion.array.sum())


def make(name: str, valid: Path, folder: Path) -> Path:
    """The label of this name beside a copy of its scan."""
    kind, change = {**SEGMENTATIONS, **STRUCTURES}[name]
    folder.mkdir(exist_ok=True)
    shutil.copytree(valid / "ct", folder / "ct", dirs_exist_ok=True)
    path = Path(shutil.copy(valid / kind, folder / f"{name}.dcm"))
    changed(path, change)
    return path


def changed(path: Path, change: Change) -> None:
    """Rewrite a file, elements as long as implicit VR allows."""
    data = pydicom.dcmread(path)
    change(data)
    if not data.file_meta.TransferSyntaxUID.is_compressed:
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    data.save_as(path)


def raw(dataset: Dataset, tag: int, vr: str, value: bytes) -> None:
    """An element whose bytes no writer would write."""
    value += b" " * (len(value) % 2)
    dataset._dict[Tag(tag)] = RawDataElement(Tag(tag), vr, len(value), value, 0, True, True)


def refer_to(data: Dataset, uid: str) -> None:
    """Let a set of structures belong to a series."""
    frame, study, series = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = uid
    study.RTReferencedSeriesSequence = [series]
    frame.RTReferencedStudySequence = [study]
    data.ReferencedFrameOfReferenceSequence = [frame]


# ---------------------------------------------------------------- SEG


def _set(**values: object) -> Change:
    def change(data: FileDataset) -> None:
        for name, value in values.items():
            if value is None:
                delattr(data, name)
            else:
                setattr(data, name, value)

    return change


def _frames(count: bytes) -> Change:
    return lambda data: raw(data, 0x00280008, "IS", count)


def _groups(edit: Callable[[Dataset], None]) -> Change:
    """Change every frame's functional groups."""

    def change(data: FileDataset) -> None:
        for group in data.PerFrameFunctionalGroupsSequence:
            edit(group)

    return change


def _number(value: int) -> Change:
    def edit(group: Dataset) -> None:
        group.SegmentIdentificationSequence = [Dataset()]
        group.SegmentIdentificationSequence[0].ReferencedSegmentNumber = value

    return _groups(edit)


def _position(text: bytes) -> Change:
    return _groups(lambda group: raw(group.PlanePositionSequence[0], 0x00200032, "DS", text))


def _spacing(text: bytes) -> Change:
    def change(data: FileDataset) -> None:
        measures = data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        raw(measures, 0x00280030, "DS", text)

    return change


def _coded(syntax: str, fragment: bytes) -> Change:
    def change(data: FileDataset) -> None:
        data.file_meta.TransferSyntaxUID = UID(syntax)
        data.PixelData = encapsulate([fragment] * int(data.NumberOfFrames), has_bot=False)
        data["PixelData"].is_undefined_length = True
        data["PixelData"].VR = "OB"

    return change


def _another_series(data: FileDataset) -> None:
    data.ReferencedSeriesSequence[0].SeriesInstanceUID = generate_uid()


def _segment_twice(data: FileDataset) -> None:
    data.SegmentSequence = [data.SegmentSequence[0], data.SegmentSequence[0]]


SEGMENTATIONS: dict[str, tuple[str, Change]] = {
    f"seg-{name}": ("seg.dcm", change)
    for name, change in {
        "frames-more": _frames(b"90"),
        "frames-fewer": _frames(b"1"),
        "frames-none": _frames(b"0"),
        "frames-negative": _frames(b"-3"),
        "frames-2e31": _frames(b"2147483647"),
        "frames-just-below-the-limit": _frames(b"13000000"),
        "frames-word": _frames(b"many"),
        "groups-fewer": lambda data: data.PerFrameFunctionalGroupsSequence.pop(),
        "groups-none": _set(PerFrameFunctionalGroupsSequence=None),
        "rows-65535": _set(Rows=65535, Columns=65535),
        "rows-zero": _set(Rows=0),
        "number-undescribed": _number(7),
        "number-zero": _number(0),
        "number-65535": _number(65535),
        "segments-none": _set(SegmentSequence=None),
        "segment-twice": _segment_twice,
        "another-series": _another_series,
        "position-nan": _position(b"nan\\0\\0"),
        "position-inf": _position(b"0\\0\\-inf"),
        "position-1e300": _position(b"1e300\\0\\0"),
        "position-two": _position(b"1\\0"),
        "spacing-zero": _spacing(b"0\\0"),
        "spacing-1e300": _spacing(b"1e300\\1e300"),
        "pixels-none": _set(PixelData=None),
        "pixels-short": _set(PixelData=b"\0\0"),
        "garbage-jpeg-2000": _coded(JPEG2000Lossless, b"\xff\x4f\xff\x51" + b"\xa5" * 100),
        "garbage-rle": _coded(RLELossless, b"\x01" + b"\0" * 63 + b"\x81\0" * 50),
        "fractional-without-maximum": _set(SegmentationType="FRACTIONAL"),
    }.items()
}

# ---------------------------------------------------------------- RTSTRUCT


def _contours(text: Callable[[str], str]) -> Change:
    """Change the text of every contour's coordinates."""

    def change(data: FileDataset) -> None:
        for contour in data.ROIContourSequence[0].ContourSequence:
            words = "\\".join(map(str, contour.ContourData))
            raw(contour, CONTOUR_DATA, "DS", text(words).encode())

    return change


def _first(word: str) -> Change:
    return _contours(lambda text: "\\".join([word, *text.split("\\")[1:]]))


def _zigzag(count: int) -> Change:
    """An outline that crosses every row `count` times."""

    def text(words: str) -> str:
        z = words.split("\\")[2]
        ends = (f"-120.5\\33.25\\{z}", f"-101.75\\50.5\\{z}")
        return "\\".join([ends[number % 2] for number in range(count)])

    return _contours(text)


def _many_contours(data: FileDataset) -> None:
    contours = data.ROIContourSequence[0].ContourSequence
    contours[0].ContourData = contours[0].ContourData[:-1]
    data.ROIContourSequence[0].ContourSequence = [contours[0]] * 3000


def _many_long(data: FileDataset) -> None:
    """As many points as a contour may have, again and again."""
    _zigzag(60_000)(data)
    data.ROIContourSequence[0].ContourSequence = [data.ROIContourSequence[0].ContourSequence[0]] * 33


STRUCTURES: dict[str, tuple[str, Change]] = {
    f"rt-{name}": ("rt.dcm", change)
    for name, change in {
        "point-nan": _first("nan"),
        "point-inf": _first("-inf"),
        "point-1e300": _first("1e300"),
        "point-1e9": _first("1e9"),
        "point-word": _first("left"),
        "all-1e300": _contours(lambda text: "\\".join(["1e300"] * len(text.split("\\")))),
        "empty": _contours(lambda text: ""),
        "no-contours": lambda data: setattr(data.ROIContourSequence[0], "ContourSequence", []),
        "no-regions": _set(ROIContourSequence=None),
        "odd": _contours(lambda text: text.rpartition("\\")[0]),
        "one-number": _contours(lambda text: "1"),
        "many-odd": _many_contours,
        "a-million-points": _zigzag(1_000_000),
        "two-million-points-in-all": _many_long,
        "region-number-word": lambda data: raw(data.ROIContourSequence[0], 0x30060084, "IS", b"first"),
        "another-series": lambda data: refer_to(data, generate_uid()),
    }.items()
}
