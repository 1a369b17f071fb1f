"""What a volume needs of one DICOM file's header, and nothing else of it.

Elements are taken as they are in the file (see `elements`), neither converted nor validated: half of all
scanners break some rule of the standard in an attribute that does not matter here.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from typing import Any, BinaryIO

from voxelscale.formats.dicom.elements import (
    LONG_VR,
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
REFERENCED_SERIES, REFERENCED_FRAME, RT_STUDY, RT_SERIES = 0x00081115, 0x30060010, 0x30060012, 0x30060014

SEQUENCES = {
    *(SHARED, PER_FRAME, POSITION_MACRO, ORIENTATION_MACRO, MEASURES_MACRO, RESCALE_MACRO, CONTENT_MACRO),
    *(CT_TYPE_MACRO, REFERENCED_SERIES, REFERENCED_FRAME, RT_STUDY, RT_SERIES),
}

MARKS = {
    "AcquisitionNumber": (0, 0x00200012),
    "TemporalPositionIdentifier": (0, 0x00200100),
    "TemporalPositionIndex": (CONTENT_MACRO, 0x00209128),
    "ConvolutionKernel": (0, 0x00181210),
    "ImageType": (0, IMAGE_TYPE),
    "TriggerTime": (0, 0x00181060),
    "KVP": (0, 0x00180060),
}
"""Attributes in which slices at one place may differ: name, functional group (0: none) and tag."""

WANTED = {
    BODY_PART,
    *(IMAGE_TYPE, SOP_CLASS, SOP_UID, MODALITY, PATIENT, STUDY, SERIES, FRAMES, POSITION, ORIENTATION),
    *(SPACING, THICKNESS, SAMPLES, PHOTOMETRIC, ROWS, COLUMNS, ALLOCATED, STORED, HIGH, SIGNED, PADDING),
    *(FRAME_OF_REFERENCE, PADDING_LIMIT, INTERCEPT, SLOPE, LUT, FRAME_TYPE),
    *(tag for _, tag in MARKS.values()),
    *SEQUENCES,
}


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
    frames: tuple[Frame, ...] = ()
    left_out = ""
    if place is None and _text(dataset, SOP_CLASS) in CT_IMAGES:
        raise DamagedError("it ends before its pixels")
    if modality in NOT_VOLUMES or place is None:
        left_out = f"{modality or 'other'} object"
    else:
        pixels = _pixels(path, dataset, place, syntax, start)
        frames = _frames(dataset, pixels)
        if pixels.samples != 1 or pixels.photometric.startswith(("RGB", "YBR", "PALETTE")):
            left_out = "colour image"
        elif "LOCALIZER" in _text(dataset, IMAGE_TYPE).upper() or not frames:
            left_out = "localizer"
        elif any(frame.position is None or frame.orientation is None for frame in frames):
            left_out = "image without a position in the patient"
    return Header(
        path=path,
        patient=patient if is_identifier(patient) else study,
        study=study,
        series=_text(dataset, SERIES),
        modality=modality,
        refers_to=_refers_to(dataset),
        frames_of_reference=_frames_of_reference(dataset),
        frames=frames,
        left_out=left_out,
        body_part=_text(dataset, BODY_PART),
    )


def _pixels(path: Path, dataset: Elements, place: tuple[int, int], syntax: str, start: int) -> Pixels:
    allocated = _integer(dataset, ALLOCATED, 16)
    stored = _integer(dataset, STORED, allocated)
    frames = _text(dataset, FRAMES)
    return Pixels(
        path=path,
        syntax=syntax,
        little=syntax != BIG_ENDIAN,
        offset=place[0],
        length=place[1],
        start=start if syntax == DEFLATED else 0,
        rows=_integer(dataset, ROWS, 0),
        columns=_integer(dataset, COLUMNS, 0),
        frames=(int(frames) or 1) if frames.isdecimal() and len(frames) < 12 else 1,
        samples=_integer(dataset, SAMPLES, 1),
        allocated=allocated,
        stored=stored,
        high=_integer(dataset, HIGH, stored - 1),
        signed=_integer(dataset, SIGNED, 0) == 1,
        photometric=_text(dataset, PHOTOMETRIC),
    )


def _frames(dataset: Elements, pixels: Pixels) -> tuple[Frame, ...]:
    """The file's slices; those that an enhanced CT calls localizers are not among them."""
    shared, each = _items(dataset, SHARED)[:1], _items(dataset, PER_FRAME)
    if not each:
        # Without functional groups nothing says where the frames of a film lie.
        return (_frame(dataset, [], pixels, 0, placed=pixels.frames == 1),)
    if len(each) < pixels.frames:
        raise DamagedError("it describes fewer frames than it claims")
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
    if (slope is None or slope[0] == 0) and (SLOPE in dataset.values or LUT in dataset.values):
        raise DamagedError("its values have no scale")
    marks = {name: _text(_source(dataset, groups, macro, tag), tag) for name, (macro, tag) in MARKS.items()}
    return Frame(
        pixels=pixels,
        index=index,
        position=position,
        orientation=numbers(ORIENTATION_MACRO, ORIENTATION, 6),
        spacing=numbers(MEASURES_MACRO, SPACING, 2),
        thickness=(numbers(MEASURES_MACRO, THICKNESS, 1) or (0.0,))[0],
        slope=slope[0] if slope else 1.0,
        intercept=intercept[0] if intercept else 0.0,
        padding=_padding(dataset, pixels.signed),
        sop_uid=_text(dataset, SOP_UID),
        frame_of_reference=_text(dataset, FRAME_OF_REFERENCE),
        marks=tuple((name, text) for name, text in marks.items() if text),
    )


def _padding(dataset: Elements, signed: bool) -> tuple[int, int] | None:
    value = _integer(dataset, PADDING, None, signed)
    if value is None:
        return None
    limit = _integer(dataset, PADDING_LIMIT, value, signed)
    return min(value, limit), max(value, limit)


def _refers_to(dataset: Elements) -> tuple[str, ...]:
    """The series that a segmentation or a set of structures belongs to."""
    uids = [_text(item, SERIES) for item in _items(dataset, REFERENCED_SERIES)]
    for frame in _items(dataset, REFERENCED_FRAME):
        for study in _items(frame, RT_STUDY):
            uids += [_text(item, SERIES) for item in _items(study, RT_SERIES)]
    return tuple(dict.fromkeys(uid for uid in uids if uid))


def _frames_of_reference(dataset: Elements) -> tuple[str, ...]:
    """The object's own, and those that a set of structures names."""
    uids = [_text(item, FRAME_OF_REFERENCE) for item in (dataset, *_items(dataset, REFERENCED_FRAME))]
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


def _raw(dataset: Elements, tag: int) -> bytes:
    value = dataset.values.get(tag)
    return value if isinstance(value, bytes) else b""


def _text(dataset: Elements, tag: int) -> str:
    return _raw(dataset, tag).strip(b"\0 ").decode("latin-1")


def _numbers(dataset: Elements, tag: int, count: int) -> tuple[float, ...] | None:
    words = _text(dataset, tag).split("\\")
    try:
        values = tuple(float(word) for word in words[:count])
    except ValueError:
        return None
    return values if len(words) == count and all(map(math.isfinite, values)) else None


def _integer(dataset: Elements, tag: int, default: Any, signed: bool = False) -> Any:
    data = _raw(dataset, tag)
    if len(data) not in (2, 4):
        return default
    return int.from_bytes(data, "little" if dataset.little else "big", signed=signed)
