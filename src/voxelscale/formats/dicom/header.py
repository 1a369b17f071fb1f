"""What a volume needs of one DICOM file's header, and nothing else of it.

Elements are taken as they are in the file (see `elements`), neither converted nor validated: half of all
scanners break some rule of the standard in an attribute that does not matter here.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from typing import Any, BinaryIO

from voxelscale.formats.dicom.elements import (
    LONG_VR,
    UNDEFINED,
    DamagedError,
    Elements,
    read_elements,
)

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
DEFLATED, BIG_ENDIAN = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
NATIVE = (IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN)
DIRECTORY = "1.2.840.10008.1.3.10"
CT_IMAGES = tuple(f"1.2.840.10008.5.1.4.1.1.2{more}" for more in ("", ".1", ".2"))
"""CT, enhanced CT, and CT converted to enhanced."""

NOT_VOLUMES = {"SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTIMAGE", "SR", "KO", "PR", "REG", "DOC"}
"""Modalities of objects that lie beside scans; some of them have pixels, too."""

NOBODY = {
    *(
        "anonymous",
        "anonym",
        "anon",
        "anonymized",
        "anonymised",
        "deidentified",
        "deid",
        "removed",
        "hidden",
    ),
    *("unknown", "none", "null", "na", "nan", "noid", "noname", "patient", "patientid", "id", "test"),
}
"""What programs that anonymise, and scanners without a patient, write for a PatientID."""

FARTHEST_MM = 1e5
"""Nothing of a patient lies this far from a scanner's isocentre."""

MOST_ELEMENTS = 2**20
"""Functional groups of ten thousand frames are half as many; a header that holds more is a trap."""

LONGEST_SHOWN = 60
"""Characters of a wrong value that a message shows."""

INFLATED_HEADER = 2**22
"""So much of a deflated file is unpacked to find its header."""

IMAGE_TYPE, SOP_CLASS, SOP_UID, MODALITY = 0x00080008, 0x00080016, 0x00080018, 0x00080060
BODY_PART = 0x00180015
PATIENT, STUDY, SERIES, FRAMES = 0x00100020, 0x0020000D, 0x0020000E, 0x00280008
FRAME_OF_REFERENCE = 0x00200052
POSITION, ORIENTATION, SPACING, THICKNESS = 0x00200032, 0x00200037, 0x00280030, 0x00180050
SAMPLES, PHOTOMETRIC, ROWS, COLUMNS = 0x00280002, 0x00280004, 0x00280010, 0x00280011
ALLOCATED, STORED, HIGH, SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
PADDING, PADDING_LIMIT = 0x00280120, 0x00280121
INTERCEPT, SLOPE, LUT = 0x00281052, 0x00281053, 0x00283000
SHARED, PER_FRAME = 0x52009229, 0x52009230
POSITION_MACRO, ORIENTATION_MACRO, MEASURES_MACRO = 0x00209113, 0x00209116, 0x00289110
RESCALE_MACRO, CONTENT_MACRO, CT_TYPE_MACRO, FRAME_TYPE = 0x00289145, 0x00209111, 0x00189329, 0x00089007
RECONSTRUCTION_MACRO, XRAY_MACRO, CARDIAC_MACRO = 0x00189314, 0x00189325, 0x00189118
REFERENCED_SERIES, REFERENCED_FRAME, RT_STUDY, RT_SERIES = 0x00081115, 0x30060010, 0x30060012, 0x30060014

SEQUENCES = {
    *(SHARED, PER_FRAME, POSITION_MACRO, ORIENTATION_MACRO, MEASURES_MACRO, RESCALE_MACRO, CONTENT_MACRO),
    *(CT_TYPE_MACRO, REFERENCED_SERIES, REFERENCED_FRAME, RT_STUDY, RT_SERIES),
    *(RECONSTRUCTION_MACRO, XRAY_MACRO, CARDIAC_MACRO),
}

MARKS = {
    "AcquisitionNumber": ((0, 0x00200012), (CONTENT_MACRO, 0x00209156)),
    "ConvolutionKernel": ((0, 0x00181210), (RECONSTRUCTION_MACRO, 0x00181210)),
    "ImageType": ((0, IMAGE_TYPE), (CT_TYPE_MACRO, FRAME_TYPE)),
    "TemporalPositionIdentifier": ((0, 0x00200100),),
    "TemporalPositionIndex": ((CONTENT_MACRO, 0x00209128),),
    "NominalPercentageOfCardiacPhase": ((0, 0x00209241), (CARDIAC_MACRO, 0x00209241)),
    "TriggerTime": ((0, 0x00181060),),
    "KVP": ((0, 0x00180060), (XRAY_MACRO, 0x00180060)),
    "EchoTime": ((0, 0x00180081),),
    "FilterType": ((0, 0x00181160),),
    "SliceThickness": ((0, THICKNESS), (MEASURES_MACRO, THICKNESS)),
    "ReconstructionDiameter": ((0, 0x00181100), (RECONSTRUCTION_MACRO, 0x00181100)),
    "ContrastBolusAgent": ((0, 0x00180010),),
    "StackID": ((CONTENT_MACRO, 0x00209056),),
    "AcquisitionDateTime": ((0, 0x0008002A), (CONTENT_MACRO, 0x00189074)),
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

NAMES = {
    FRAMES: "NumberOfFrames",
    POSITION: "ImagePositionPatient",
    ORIENTATION: "ImageOrientationPatient",
    SPACING: "PixelSpacing",
    THICKNESS: "SliceThickness",
    SAMPLES: "SamplesPerPixel",
    ROWS: "Rows",
    COLUMNS: "Columns",
    ALLOCATED: "BitsAllocated",
    STORED: "BitsStored",
    HIGH: "HighBit",
    SIGNED: "PixelRepresentation",
    PADDING: "PixelPaddingValue",
    PADDING_LIMIT: "PixelPaddingRangeLimit",
    INTERCEPT: "RescaleIntercept",
    SLOPE: "RescaleSlope",
    LUT: "ModalityLUTSequence",
}
"""How the standard calls the numbers that are read."""

WANTED = {
    BODY_PART,
    *(IMAGE_TYPE, SOP_CLASS, SOP_UID, MODALITY, PATIENT, STUDY, SERIES, FRAMES, POSITION, ORIENTATION),
    *(SPACING, THICKNESS, SAMPLES, PHOTOMETRIC, ROWS, COLUMNS, ALLOCATED, STORED, HIGH, SIGNED, PADDING),
    *(FRAME_OF_REFERENCE, PADDING_LIMIT, INTERCEPT, SLOPE, LUT, FRAME_TYPE),
    *(tag for places in MARKS.values() for _, tag in places),
    *SEQUENCES,
}


class UnreadableError(Exception):
    """An attribute that an image needs has no readable value; the text names it."""


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
    samples: int
    allocated: int
    stored: int
    high: int
    signed: bool
    photometric: str


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


def is_dicom(head: bytes) -> bool:
    """Whether a file's first bytes are DICOM's preamble, or an element of group 2 or 8 without one."""
    return head[128:132] == b"DICM" or (head[:2] in (b"\x02\x00", b"\x08\x00") and head[3:4] == b"\x00")


def read_header(path: Path) -> Header | None:
    """The header of a DICOM file; None where it is no DICOM, or a DICOMDIR.

    Raises:
        DamagedError: it is cut short or garbled before its pixels.
    """
    try:
        with BufferedReader(FileIO(path)) as handle:
            size = os.fstat(handle.fileno()).st_size
            if not is_dicom(handle.read(132)):
                return None
            sop_class, syntax, start = _meta(handle, size)
            if sop_class == DIRECTORY:
                return None
            dataset, pixels = _dataset(handle, syntax, start, size)
        if not (SOP_CLASS in dataset.values or SERIES in dataset.values):
            raise DamagedError("it ends before it says what it is")
        return _header(path, dataset, pixels, syntax, start)
    except DamagedError:
        raise
    except Exception as error:
        # What a hostile header may say has no end, and none of it is worth a traceback.
        raise DamagedError(type(error).__name__) from None


def _meta(handle: BinaryIO, size: int) -> tuple[str, str, int]:
    """SOP class, transfer syntax, where the data set begins; group 2 is explicit little endian (PS3.10)."""
    handle.seek(128)
    place = 132 if handle.read(4) == b"DICM" else 0
    texts: dict[bytes, str] = {}
    for _ in range(MOST_ELEMENTS):
        handle.seek(place)
        element = handle.read(12)
        if element[:2] != b"\x02\x00" or len(element) < 8:
            break
        long = element[4:6] in LONG_VR
        length = struct.unpack("<I", element[8:12])[0] if long else struct.unpack("<H", element[6:8])[0]
        value = place + (12 if long else 8)
        place = value + length
        if place > size:
            raise DamagedError("it ends in its first group")
        if element[2:4] in (b"\x02\x00", b"\x10\x00"):
            handle.seek(value)
            texts[element[2:4]] = handle.read(min(length, 64)).strip(b"\0 ").decode("latin-1")
    else:
        raise DamagedError("a header without an end")
    explicit = element[4:6].isalpha() and element[4:6].isupper()
    guess = EXPLICIT if explicit else IMPLICIT
    return texts.get(b"\x02\x00", ""), texts.get(b"\x10\x00", "") or guess, place


def _dataset(
    handle: BinaryIO, syntax: str, start: int, size: int
) -> tuple[Elements, tuple[int, int] | None]:
    """The wanted elements; and offset and length of the pixels' value, if there are pixels."""
    if syntax == DEFLATED:
        handle = BytesIO(inflate(handle, start, INFLATED_HEADER))
        start, size = 0, INFLATED_HEADER
    little = syntax != BIG_ENDIAN
    return read_elements(
        handle, start, size, little=little, wanted=WANTED, nested=SEQUENCES, most=MOST_ELEMENTS
    )


def inflate(handle: BinaryIO, start: int, limit: int) -> bytes:
    """At most `limit` bytes of a deflated data set (PS3.5, A.5)."""
    return b"".join(_inflated(handle, start, limit))


def check_whole(path: Path) -> None:
    """Raise a DamagedError where a file's elements and items do not end where they say."""
    try:
        with FileIO(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            _, syntax, start = _meta(handle, size)
            if syntax != DEFLATED:
                read_elements(handle, start, size, little=syntax != BIG_ENDIAN, wanted=(), nested=())
    except struct.error as error:
        raise DamagedError(str(error)) from None


def inflated_size(path: Path, limit: int) -> int:
    """Bytes of a deflated file's data set once inflated, counted up to `limit`, with hardly any memory.

    Raises:
        DamagedError: its first group or its code is garbled.
    """
    try:
        with BufferedReader(FileIO(path)) as handle:
            _, _, start = _meta(handle, os.fstat(handle.fileno()).st_size)
            return sum(map(len, _inflated(handle, start, limit)))
    except (zlib.error, struct.error) as error:
        raise DamagedError(str(error)) from None


def _inflated(handle: BinaryIO, start: int, limit: int) -> Iterator[bytes]:
    handle.seek(start)
    engine, left = zlib.decompressobj(-zlib.MAX_WBITS), limit
    data = handle.read(1 << 16)
    while data and left > 0 and not engine.eof:
        part = engine.decompress(data, min(left, INFLATED_HEADER))
        left -= len(part)
        data = engine.unconsumed_tail or handle.read(1 << 16)
        yield part


def _header(
    path: Path, dataset: Elements, place: tuple[int, int] | None, syntax: str, start: int
) -> Header | None:
    modality, study, patient = (_text(dataset, tag) for tag in (MODALITY, STUDY, PATIENT))
    fault = ""
    frames: tuple[Frame, ...] = ()
    if place is None and _text(dataset, SOP_CLASS) in CT_IMAGES:
        raise DamagedError("it ends before its pixels")
    left_out = f"{modality or 'other'} object"
    try:
        if place is not None and not (left_out := _left_out(dataset, modality)):
            frames = _frames(dataset, _pixels(path, dataset, place, syntax, start))
            left_out, fault = _unplaced(dataset, frames)
    except UnreadableError as error:
        fault = str(error)
    return Header(
        path=path,
        patient=patient if is_identifier(patient) else study,
        study=study,
        series=_text(dataset, SERIES),
        modality=modality,
        refers_to=_refers_to(dataset),
        frames_of_reference=_frames_of_reference(dataset),
        frames=() if fault else frames,
        left_out=left_out,
        body_part=_text(dataset, BODY_PART),
        fault=fault,
    )


def _left_out(dataset: Elements, modality: str) -> str:
    """Why an object with pixels is no part of a volume; "" where it may be."""
    if modality in NOT_VOLUMES:
        return f"{modality} object"
    colour = _text(dataset, PHOTOMETRIC).startswith(("RGB", "YBR", "PALETTE"))
    if colour or _integer(dataset, SAMPLES, 1) != 1:
        return "colour image"
    return "localizer" if "LOCALIZER" in _text(dataset, IMAGE_TYPE).upper() else ""


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
    if _text(dataset, SOP_CLASS) not in CT_IMAGES:
        return what, ""
    where = _text(dataset, POSITION)
    return "", f"{what}: {label_of(POSITION)} is {repr(where) if where else 'missing'}"


def _pixels(path: Path, dataset: Elements, place: tuple[int, int], syntax: str, start: int) -> Pixels:
    stored = _integer(dataset, STORED)
    frames = _numbers(dataset, FRAMES, 1) or (1.0,)
    if frames[0] != int(frames[0]) or frames[0] < 0:
        raise _unreadable(dataset, FRAMES)
    made = Pixels(
        path=path,
        syntax=syntax,
        little=syntax != BIG_ENDIAN,
        offset=place[0],
        length=place[1],
        start=start if syntax == DEFLATED else 0,
        rows=_integer(dataset, ROWS),
        columns=_integer(dataset, COLUMNS),
        frames=int(frames[0]) or 1,
        samples=_integer(dataset, SAMPLES, 1),
        allocated=_integer(dataset, ALLOCATED),
        stored=stored,
        high=_integer(dataset, HIGH, stored - 1),
        signed=_integer(dataset, SIGNED) == 1,
        photometric=_text(dataset, PHOTOMETRIC),
    )
    size = made.rows * made.columns * made.frames * made.allocated // 8
    if syntax in NATIVE and made.length != UNDEFINED and made.length >= 2 * size > 0:
        what = f"its pixels are {made.length} bytes, but Rows, Columns and NumberOfFrames make {size}"
        raise UnreadableError(what)
    return made


def _frames(dataset: Elements, pixels: Pixels) -> tuple[Frame, ...]:
    """The file's slices; those that an enhanced CT calls localizers are not among them."""
    shared, each = _items(dataset, SHARED)[:1], _items(dataset, PER_FRAME)
    if not each:
        # Without functional groups nothing says where the frames of a film lie.
        return (_frame(dataset, [], pixels, 0, placed=pixels.frames == 1),)
    if len(each) < pixels.frames:
        raise DamagedError("it describes fewer frames than it claims")
    # Empty items beyond the last frame describe nothing.
    if described := sum(1 for item in each[pixels.frames :] if item.values):
        raise UnreadableError(
            f"{label_of(FRAMES)} is {pixels.frames}, but {pixels.frames + described} frames are described"
        )
    all_groups = [[item, *shared] for item in each[: pixels.frames]]
    return tuple(
        _frame(dataset, groups, pixels, index, placed=True)
        for index, groups in enumerate(all_groups)
        if "LOCALIZER" not in _text(_source(dataset, groups, CT_TYPE_MACRO, FRAME_TYPE), FRAME_TYPE).upper()
    )


def _frame(
    dataset: Elements, groups: Sequence[Elements], pixels: Pixels, index: int, *, placed: bool
) -> Frame:
    def numbers(macro: int, tag: int, count: int) -> tuple[float, ...] | None:
        return _numbers(_source(dataset, groups, macro, tag), tag, count)

    position = numbers(POSITION_MACRO, POSITION, 3) if placed else None
    if position is not None and max(map(abs, position)) > FARTHEST_MM:
        position = None
    slope, intercept = numbers(RESCALE_MACRO, SLOPE, 1), numbers(RESCALE_MACRO, INTERCEPT, 1)
    if slope is None and LUT in dataset.values:
        raise UnreadableError(f"{label_of(LUT)}: values given by a table, which cannot be read")
    for tag, scale in ((SLOPE, slope), (INTERCEPT, intercept)):
        source = _source(dataset, groups, RESCALE_MACRO, tag)
        # Type 1C: where one of them is there, both must have a value (PS3.3 C.11.1).
        if scale is None and tag in source.values:
            raise _unreadable(source, tag)
    if slope is not None and slope[0] == 0:
        raise UnreadableError(f"{label_of(SLOPE)} is 0: no value would be left")
    marks = {name: _mark(dataset, groups, places) for name, places in MARKS.items()}
    return Frame(
        pixels=pixels,
        index=index,
        position=position,
        orientation=numbers(ORIENTATION_MACRO, ORIENTATION, 6),
        spacing=numbers(MEASURES_MACRO, SPACING, 2),
        thickness=(numbers(MEASURES_MACRO, THICKNESS, 1) or (0.0,))[0],
        slope=slope[0] if slope else 1.0,
        intercept=intercept[0] if intercept else 0.0,
        scaled=intercept is not None or _text(dataset, SOP_CLASS) not in CT_IMAGES,
        padding=_padding(dataset, pixels.signed),
        sop_uid=_text(dataset, SOP_UID),
        frame_of_reference=_text(dataset, FRAME_OF_REFERENCE),
        marks=tuple((name, text) for name, text in marks.items() if text),
    )


def _mark(dataset: Elements, groups: Sequence[Elements], places: Sequence[tuple[int, int]]) -> str:
    for macro, tag in reversed(places):
        source = _source(dataset, groups, macro, tag)
        raw, code = _raw(source, tag), BINARY_MARKS.get(tag, "")
        if code and len(raw) == struct.calcsize(code):
            return f"{struct.unpack(('<' if source.little else '>') + code, raw)[0]:g}"
        if (text := _text(source, tag)) and text.isprintable():
            # 2 and 2.0 are one thickness.
            number = _number(text) if len(text) < LONGEST_NUMBER else math.nan
            return text if math.isnan(number) else f"{number:.15g}"
    return ""


def _padding(dataset: Elements, signed: bool) -> tuple[int, int] | None:
    value = _integer(dataset, PADDING, None, signed=signed)
    if value is None:
        return None
    limit = _integer(dataset, PADDING_LIMIT, value, signed=signed)
    return min(value, limit), max(value, limit)


def _refers_to(dataset: Elements) -> tuple[str, ...]:
    """The series that a segmentation or a set of structures belongs to."""
    uids = [_text(item, SERIES) for item in _filled(dataset, REFERENCED_SERIES)]
    for frame in _filled(dataset, REFERENCED_FRAME):
        for study in _items(frame, RT_STUDY):
            uids += [_text(item, SERIES) for item in _items(study, RT_SERIES)]
    return tuple(dict.fromkeys(uid for uid in uids if uid))


def _frames_of_reference(dataset: Elements) -> tuple[str, ...]:
    """The object's own, and those that a set of structures names."""
    uids = [_text(item, FRAME_OF_REFERENCE) for item in (dataset, *_filled(dataset, REFERENCED_FRAME))]
    return tuple(dict.fromkeys(uid for uid in uids if uid))


def _source(dataset: Elements, groups: Sequence[Elements], macro: int, tag: int) -> Elements:
    """The data set that holds `tag`: the frame's functional group, the shared one, or the file itself."""
    for group in groups:
        for item in _items(group, macro) if macro else []:
            if tag in item.values:
                return item
    return dataset


def _items(dataset: Elements, tag: int) -> list[Elements]:
    value = dataset.values.get(tag)
    return value if isinstance(value, list) else []


def _filled(dataset: Elements, tag: int) -> list[Elements]:
    """The items of a sequence that hold something: hostile files hold a hundred thousand empty ones."""
    return [item for item in _items(dataset, tag) if item.values]


def _raw(dataset: Elements, tag: int) -> bytes:
    value = dataset.values.get(tag)
    return value if isinstance(value, bytes) else b""


def _text(dataset: Elements, tag: int) -> str:
    return _raw(dataset, tag).strip(b"\0 ").decode("latin-1")


def label_of(tag: int) -> str:
    """An attribute as messages call it: ``RescaleIntercept (0028,1052)``."""
    return f"{NAMES[tag]} ({tag >> 16:04x},{tag & 0xFFFF:04x})"


def _unreadable(dataset: Elements, tag: int) -> UnreadableError:
    raw = _raw(dataset, tag)
    if not raw.strip(b"\0 "):
        return UnreadableError(f"{label_of(tag)} is {'empty' if tag in dataset.values else 'missing'}")
    text = _text(dataset, tag)
    shown = repr(text[:LONGEST_SHOWN]) if text.isprintable() else f"{len(raw)} bytes"
    return UnreadableError(f"{label_of(tag)} is {shown}, which cannot be read as a number")


def _numbers(dataset: Elements, tag: int, count: int) -> tuple[float, ...] | None:
    """The numbers of a decimal string; None where it is absent or empty.

    Raises:
        UnreadableError: there are more or fewer than `count`, or one is no finite number.
    """
    text = _text(dataset, tag)
    if not text:
        return None
    values = tuple(_number(word) for word in text.split("\\"))
    if len(values) != count or not all(map(math.isfinite, values)):
        raise _unreadable(dataset, tag)
    return values


def _number(word: str) -> float:
    """A number as text (PS3.5, 6.2: DS, IS), a decimal comma read as the point; NaN where it is none.

    A comma before just three digits may have been meant for thousands: 1,250 is no number.
    """
    word = word.strip(" \0")
    thousands = re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", word)
    if re.fullmatch(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?", word) and not thousands:
        return float(word.replace(",", "."))
    return math.nan


def _integer(dataset: Elements, tag: int, *default: Any, signed: bool = False) -> Any:
    """A binary whole number, or the default where it is absent.

    Raises:
        UnreadableError: it is there and no number, or absent without a default.
    """
    data = _raw(dataset, tag)
    if not data and default:
        return default[0]
    if len(data) not in (2, 4):
        raise _unreadable(dataset, tag)
    return int.from_bytes(data, "little" if dataset.little else "big", signed=signed)
