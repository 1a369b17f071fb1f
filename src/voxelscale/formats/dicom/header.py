"""What a volume needs of one DICOM file's header, and nothing else of it."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from voxelscale.formats.dicom import tags
from voxelscale.formats.dicom.elements import (
    BIG_ENDIAN,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    UNDEFINED,
    DamagedError,
    DicomObject,
    Elements,
    UnreadableError,
    label_of,
    number,
    read_object,
)

NATIVE = (IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN)
DIRECTORY = "1.2.840.10008.1.3.10"
CT_IMAGES = tuple(f"1.2.840.10008.5.1.4.1.1.2{more}" for more in ("", ".1", ".2"))
"""CT, enhanced CT, and CT converted to enhanced."""

NOT_VOLUMES = {"SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTIMAGE", "SR", "KO", "PR", "REG", "DOC"}
"""Modalities of objects that lie beside scans; some of them have pixels, too."""

NOBODY = {
    *("anonymous", "anonym", "anon", "anonymized", "anonymised", "deidentified", "deid", "removed"),
    *("hidden", "unknown", "none", "null", "na", "nan", "noid", "noname"),
    *("patient", "patientid", "id", "test"),
}
"""What programs that anonymise, and scanners without a patient, write for a PatientID."""

FARTHEST_MM = 1e5
"""Nothing of a patient lies this far from a scanner's isocentre."""

MOST_ELEMENTS = 2**20
"""Functional groups of ten thousand frames are half as many; a header that holds more is a trap."""

INFLATED_HEADER = 2**22
"""So much of a deflated file is unpacked to find its header."""

MARKS = {
    "AcquisitionNumber": ((0, 0x00200012), (tags.CONTENT_MACRO, 0x00209156)),
    "ConvolutionKernel": ((0, 0x00181210), (tags.RECONSTRUCTION_MACRO, 0x00181210)),
    "ImageType": ((0, tags.IMAGE_TYPE), (tags.CT_TYPE_MACRO, tags.FRAME_TYPE)),
    "TemporalPositionIdentifier": ((0, 0x00200100),),
    "TemporalPositionIndex": ((tags.CONTENT_MACRO, 0x00209128),),
    "NominalPercentageOfCardiacPhase": ((0, 0x00209241), (tags.CARDIAC_MACRO, 0x00209241)),
    "TriggerTime": ((0, 0x00181060),),
    "KVP": ((0, 0x00180060), (tags.XRAY_MACRO, 0x00180060)),
    "EchoTime": ((0, 0x00180081),),
    "FilterType": ((0, 0x00181160),),
    "SliceThickness": ((0, tags.THICKNESS), (tags.MEASURES_MACRO, tags.THICKNESS)),
    "ReconstructionDiameter": ((0, 0x00181100), (tags.RECONSTRUCTION_MACRO, 0x00181100)),
    "ContrastBolusAgent": ((0, 0x00180010),),
    "StackID": ((tags.CONTENT_MACRO, 0x00209056),),
    "AcquisitionDateTime": ((0, 0x0008002A), (tags.CONTENT_MACRO, 0x00189074)),
    "AcquisitionTime": ((0, 0x00080032),),
    "ContentTime": ((0, 0x00080033),),
    "InstanceNumber": ((0, 0x00200013),),
}
"""Attributes in which the slices of two acquisitions or reconstructions may differ, the most telling first:
name, and where it stands (functional group, 0: none; tag) in a file of one slice and in one of many."""

BINARY_MARKS = {0x00209156: "H", 0x00209128: "I", 0x00209241: "d"}
"""Those of them that are kept as binary numbers."""

LONGEST_NUMBER = 16
"""Characters of a decimal string (PS3.5, 6.2)."""

WANTED = tags.OF_ANY | {tag for places in MARKS.values() for _, tag in places}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pixels:
    """Where a file's pixels lie and how they are stored (PS3.3 C.7.6.3).

    Attributes:
        syntax: the transfer syntax's UID.
        offset, length: of the pixel data's value, bytes; the length may be `UNDEFINED`. In a deflated
            file both count after inflating.
        start: where the deflated part begins in the file; 0 where it is not deflated.
    """

    path: Path
    syntax: str
    little: bool
    offset: int
    length: int
    start: int
    rows: int
    columns: int
    frames: int
    allocated: int
    stored: int
    high: int
    signed: bool

    @property
    def bytes(self) -> int:
        """Bytes of all frames, uncompressed; frames of single bits do not begin with a byte each."""
        return -(-self.rows * self.columns * self.frames * self.allocated // 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """A slice: one file, or one frame of a file with many.

    Attributes:
        index: of the frame in its file, from 0.
        position: LPS mm (x, y, z) of the first voxel's centre.
        orientation: directions of rows and columns, LPS, six cosines.
        spacing: between rows, between columns, mm.
        scaled: whether the file says how its values become HU, or need not (only CT images must).
        padding: least and greatest stored value that is no measurement.
        marks: the attributes of `MARKS` that it has.
    """

    pixels: Pixels
    index: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    thickness: float
    slope: float
    intercept: float
    scaled: bool
    padding: tuple[int, int] | None
    sop_uid: str
    frame_of_reference: str
    marks: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """A file's place in the study, and its slices.

    Attributes:
        frames_of_reference: the systems of coordinates that its positions count in, by their UIDs.
        patient: PatientID, or StudyInstanceUID where that tells nobody apart (`is_identifier`).
        left_out: why it is no part of a volume ("localizer", "SR object", ...); empty if it may be.
        fault: what makes an image that belongs to a volume unusable; it names the attribute. Then there are
            no frames.
    """

    path: Path
    patient: str = field(repr=False)
    study: str
    series: str
    modality: str
    refers_to: tuple[str, ...]
    frames_of_reference: tuple[str, ...]
    frames: tuple[Frame, ...]
    left_out: str
    body_part: str = ""
    fault: str = ""


def is_identifier(patient: str) -> bool:
    """Whether a PatientID may tell patients apart: not where it is empty, zeros, or a word for nobody."""
    plain = "".join(filter(str.isalnum, patient.casefold()))
    return plain.strip("0x") != "" and plain not in NOBODY


def read_header(path: Path) -> Header | None:
    """The header of a DICOM file; None where it is no DICOM, or a DICOMDIR.

    Raises:
        DamagedError: it is cut short or garbled before its pixels.
    """
    try:
        found = read_object(
            path, wanted=WANTED, nested=tags.SEQUENCES_OF_ANY, inflated=INFLATED_HEADER, most=MOST_ELEMENTS
        )
        if found is None or found.media_class == DIRECTORY:
            return None
        if not (tags.SOP_CLASS in found.data.values or tags.SERIES in found.data.values):
            raise DamagedError("it ends before it says what it is")
        return _header(found)
    except DamagedError:
        raise
    except Exception as error:
        # What a hostile header may say has no end, and none of it is worth a traceback.
        raise DamagedError(type(error).__name__) from None


def _header(found: DicomObject) -> Header:
    dataset = found.data
    modality, study, patient = (dataset.text(tag) for tag in (tags.MODALITY, tags.STUDY, tags.PATIENT))
    fault = ""
    frames: tuple[Frame, ...] = ()
    if found.pixels is None and dataset.text(tags.SOP_CLASS) in CT_IMAGES:
        raise DamagedError("it ends before its pixels")
    left_out = f"{modality or 'other'} object"
    try:
        if found.pixels is not None and not (left_out := _left_out(dataset, modality)):
            frames = _frames(dataset, pixels_of(found))
            left_out, fault = _unplaced(dataset, frames)
    except UnreadableError as error:
        fault = str(error)
    return Header(
        path=found.path,
        patient=patient if is_identifier(patient) else study,
        study=study,
        series=dataset.text(tags.SERIES),
        modality=modality,
        refers_to=refers_to(dataset),
        frames_of_reference=frames_of_reference(dataset),
        frames=() if fault else frames,
        left_out=left_out,
        body_part=dataset.text(tags.BODY_PART),
        fault=fault,
    )


def _left_out(dataset: Elements, modality: str) -> str:
    """Why an object with pixels is no part of a volume; "" where it may be."""
    if modality in NOT_VOLUMES:
        return f"{modality} object"
    colour = dataset.text(tags.PHOTOMETRIC).startswith(("RGB", "YBR", "PALETTE"))
    if colour or dataset.integer(tags.SAMPLES, 1) != 1:
        return "colour image"
    return "localizer" if "LOCALIZER" in dataset.text(tags.IMAGE_TYPE).upper() else ""


def _unplaced(dataset: Elements, frames: Sequence[Frame]) -> tuple[str, str]:
    """Why an image without a place is left out, or what its fault is; ("", "") where it has one.

    A CT image must have one. Others may be pictures of a screen that are kept beside the slices. Slices
    without an orientation may take their neighbours' (see `with_orientations`).
    """
    if not frames:
        return "localizer", ""
    if all(frame.position is not None for frame in frames):
        return "", ""
    what = "image without a position in the patient"
    if dataset.text(tags.SOP_CLASS) not in CT_IMAGES:
        return what, ""
    where = dataset.text(tags.POSITION)
    return "", f"{what}: {label_of(tags.POSITION)} is {repr(where) if where else 'missing'}"


def pixels_of(found: DicomObject) -> Pixels:
    """Where an object's pixels lie and how they are stored.

    Raises:
        UnreadableError: it has none or does not say how, or they are twice as many as it says.
    """
    data = found.data
    if found.pixels is None:
        raise UnreadableError("it has no pixels")
    offset, length = found.pixels
    stored, frames = data.integer(tags.STORED), data.whole(tags.FRAMES, 1)
    if frames < 0:
        raise data.unreadable(tags.FRAMES)
    made = Pixels(
        path=found.path,
        syntax=found.syntax,
        little=data.little,
        offset=offset,
        length=length,
        start=found.deflated_from,
        rows=data.integer(tags.ROWS),
        columns=data.integer(tags.COLUMNS),
        frames=frames or 1,
        allocated=data.integer(tags.ALLOCATED),
        stored=stored,
        high=data.integer(tags.HIGH, stored - 1),
        signed=data.integer(tags.SIGNED) == 1,
    )
    twice = length >= 2 * made.bytes > 0 and length > made.bytes + 1  # one byte may be padding
    if made.syntax in NATIVE and length != UNDEFINED and twice:
        what = f"its pixels are {length} bytes, but Rows, Columns and NumberOfFrames make {made.bytes}"
        raise UnreadableError(what)
    return made


def _frames(dataset: Elements, pixels: Pixels) -> tuple[Frame, ...]:
    """The file's slices; those that an enhanced CT calls localizers are not among them."""
    shared, each = dataset.items(tags.SHARED)[:1], dataset.items(tags.PER_FRAME)
    if not each:
        # Without functional groups nothing says where the frames of a film lie.
        return (_frame(dataset, [], pixels, 0, placed=pixels.frames == 1),)
    if len(each) < pixels.frames:
        raise DamagedError("it describes fewer frames than it claims")
    # Empty items beyond the last frame describe nothing.
    if described := sum(1 for item in each[pixels.frames :] if item.values):
        what = f"{pixels.frames + described} frames are described"
        raise UnreadableError(f"{label_of(tags.FRAMES)} is {pixels.frames}, but {what}")
    all_groups = [[item, *shared] for item in each[: pixels.frames]]
    return tuple(
        _frame(dataset, groups, pixels, index, placed=True)
        for index, groups in enumerate(all_groups)
        if "LOCALIZER"
        not in _source(dataset, groups, tags.CT_TYPE_MACRO, tags.FRAME_TYPE).text(tags.FRAME_TYPE).upper()
    )


def _frame(
    dataset: Elements, groups: Sequence[Elements], pixels: Pixels, index: int, *, placed: bool
) -> Frame:
    def numbers(macro: int, tag: int, count: int) -> tuple[float, ...] | None:
        return _source(dataset, groups, macro, tag).numbers(tag, count)

    position = numbers(tags.POSITION_MACRO, tags.POSITION, 3) if placed else None
    if position is not None and max(map(abs, position)) > FARTHEST_MM:
        position = None
    slope, intercept = (
        numbers(tags.RESCALE_MACRO, tags.SLOPE, 1),
        numbers(tags.RESCALE_MACRO, tags.INTERCEPT, 1),
    )
    if slope is None and tags.LUT in dataset.values:
        raise UnreadableError(f"{label_of(tags.LUT)}: values given by a table, which cannot be read")
    for tag, scale in ((tags.SLOPE, slope), (tags.INTERCEPT, intercept)):
        source = _source(dataset, groups, tags.RESCALE_MACRO, tag)
        # Type 1C: where one of them is there, both must have a value (PS3.3 C.11.1).
        if scale is None and tag in source.values:
            raise source.unreadable(tag)
    if slope is not None and slope[0] == 0:
        raise UnreadableError(f"{label_of(tags.SLOPE)} is 0: no value would be left")
    marks = {name: _mark(dataset, groups, places) for name, places in MARKS.items()}
    return Frame(
        pixels=pixels,
        index=index,
        position=position,
        orientation=numbers(tags.ORIENTATION_MACRO, tags.ORIENTATION, 6),
        spacing=numbers(tags.MEASURES_MACRO, tags.SPACING, 2),
        thickness=(numbers(tags.MEASURES_MACRO, tags.THICKNESS, 1) or (0.0,))[0],
        slope=slope[0] if slope else 1.0,
        intercept=intercept[0] if intercept else 0.0,
        scaled=intercept is not None or dataset.text(tags.SOP_CLASS) not in CT_IMAGES,
        padding=_padding(dataset, pixels.signed),
        sop_uid=dataset.text(tags.SOP_UID),
        frame_of_reference=dataset.text(tags.FRAME_OF_REFERENCE),
        marks=tuple((name, text) for name, text in marks.items() if text),
    )


def _mark(dataset: Elements, groups: Sequence[Elements], places: Sequence[tuple[int, int]]) -> str:
    for macro, tag in reversed(places):
        source = _source(dataset, groups, macro, tag)
        raw, code = source.raw(tag), BINARY_MARKS.get(tag, "")
        if code and len(raw) == struct.calcsize(code):
            return f"{struct.unpack(('<' if source.little else '>') + code, raw)[0]:g}"
        if (text := source.text(tag)) and text.isprintable():
            # 2 and 2.0 are one thickness.
            value = number(text) if len(text) < LONGEST_NUMBER else math.nan
            return text if math.isnan(value) else f"{value:.15g}"
    return ""


def _padding(dataset: Elements, signed: bool) -> tuple[int, int] | None:
    if not dataset.raw(tags.PADDING):
        return None
    value = dataset.integer(tags.PADDING, signed=signed)
    limit = dataset.integer(tags.PADDING_LIMIT, value, signed=signed)
    return min(value, limit), max(value, limit)


def refers_to(dataset: Elements) -> tuple[str, ...]:
    """The series that a segmentation or a set of structures belongs to."""
    uids = [item.text(tags.SERIES) for item in dataset.filled(tags.REFERENCED_SERIES)]
    for frame in dataset.filled(tags.REFERENCED_FRAME):
        for study in frame.items(tags.RT_STUDY):
            uids += [item.text(tags.SERIES) for item in study.items(tags.RT_SERIES)]
    return tuple(dict.fromkeys(uid for uid in uids if uid))


def frames_of_reference(dataset: Elements) -> tuple[str, ...]:
    """The object's own, and those that a set of structures names."""
    uids = [
        item.text(tags.FRAME_OF_REFERENCE) for item in (dataset, *dataset.filled(tags.REFERENCED_FRAME))
    ]
    return tuple(dict.fromkeys(uid for uid in uids if uid))


def _source(dataset: Elements, groups: Sequence[Elements], macro: int, tag: int) -> Elements:
    """The data set that holds `tag`: the frame's functional group, the shared one, or the file itself."""
    for group in groups:
        for item in group.items(macro) if macro else []:
            if tag in item.values:
                return item
    return dataset
