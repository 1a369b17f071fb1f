"""The slices that a scan came as: where results are put, and whose they are.

Of the source's header the patient and study modules go on, attribute by attribute from a list, and nothing
else: no private tags, no comments, no names of people or places but those of these modules.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property

import numpy as np

from voxelscale.config import ReadingConfig
from voxelscale.console import warn
from voxelscale.dataset.reading import read_slices
from voxelscale.dataset.source import Source
from voxelscale.dicom_out.objects import uid_of
from voxelscale.errors import VoxelscaleError
from voxelscale.formats.dicom import files_of, tags
from voxelscale.formats.dicom.elements import LONGEST_UID, DamagedError, DicomObject, read_object
from voxelscale.formats.dicom.header import INFLATED_HEADER
from voxelscale.geometry import Grid, Slices
from voxelscale.labels.dicom import free_text

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"

DATE, TIME = r"(\d{8})?", r"(\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?)?"
TEXT = r"[^\\]*"

PATIENT_AND_STUDY = {
    "PatientName": (0x00100010, TEXT),
    "PatientID": (0x00100020, TEXT),
    "IssuerOfPatientID": (0x00100021, TEXT),
    "PatientBirthDate": (0x00100030, DATE),
    "PatientSex": (0x00100040, r"[MFO]?"),
    "PatientAge": (0x00101010, r"(\d{3}[DWMY])?"),
    "PatientIdentityRemoved": (0x00120062, r"(YES|NO)?"),
    "DeidentificationMethod": (0x00120063, r".*"),
    "StudyInstanceUID": (tags.STUDY, r"[0-9.]{1,64}"),
    "StudyDate": (0x00080020, DATE),
    "StudyTime": (0x00080030, TIME),
    "ReferringPhysicianName": (0x00080090, TEXT),
    "StudyID": (0x00200010, TEXT),
    "AccessionNumber": (0x00080050, TEXT),
    "StudyDescription": (0x00081030, TEXT),
}
"""What goes on from the source: tag, and what its value must look like."""

REQUIRED = {
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate"),
    *("StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber"),
}
"""Attributes of type 1 or 2: there, if perhaps empty (PS3.3 C.7.1.1, C.7.2.1)."""

DATES = {"SeriesDate": (0x00080021, DATE), "AcquisitionDate": (0x00080022, DATE)}
"""What may say when the scan was made, where the study does not."""

LOSSY = {
    "LossyImageCompression": (0x00282110, r"(00|01)?"),
    "LossyImageCompressionRatio": (0x00282112, r"[0-9.\\]*"),
    "LossyImageCompressionMethod": (0x00282114, r"[A-Z0-9_ \\]*"),
}
"""Whether pixels were ever compressed with a loss: what is derived from them must say so (C.7.6.1)."""

NO_DATE, NO_TIME = "19000101", "000000"
"""Of a source without a date: an object must have one."""

NOT_DICOM = "give the DICOM series that it was converted from"

UID = re.compile(r"[0-9]+(\.[0-9]+)*")

WANTED = {
    *(tags.CHARACTER_SET, tags.SOP_CLASS, tags.SOP_UID, tags.MODALITY, tags.SERIES, tags.STUDY),
    *(tag for tag, _ in (*PATIENT_AND_STUDY.values(), *DATES.values(), *LOSSY.values())),
}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One slice of the source.

    Attributes:
        place: its number among the slices, from 0 along their normal.
        sop_class, sop_uid: of the file.
        number: of the frame in it, from 1; None: it holds one.
    """

    place: int
    sop_class: str
    sop_uid: str
    number: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Original:
    """A DICOM scan as it came.

    Attributes:
        case: its name.
        grid: the lattice that it is read on.
        slices: what it is made of.
        frames: those of them that there are: of a gap that was filled there is none.
        about: attributes of the patient and study modules, by keyword.
        series, modality: SeriesInstanceUID, and "CT", ...
        frame_of_reference: UID of the system of coordinates.
        date, time: of the study.
        lossy: attributes that say that its pixels were compressed with a loss, by keyword.
    """

    case: str
    grid: Grid
    slices: Slices
    frames: tuple[Frame, ...]
    about: Mapping[str, str] = field(repr=False)
    series: str
    modality: str
    frame_of_reference: str
    date: str
    time: str
    lossy: Mapping[str, str]

    @property
    def study(self) -> str:
        """StudyInstanceUID."""
        return self.about["StudyInstanceUID"]

    @cached_property
    def by_place(self) -> dict[int, Frame]:
        """The frames by the numbers of their slices."""
        return {frame.place: frame for frame in self.frames}

    @property
    def orientation(self) -> list[float]:
        """Directions of rows and columns, six cosines."""
        right, down = (v / np.linalg.norm(v) for v in (self.slices.right, self.slices.down))
        return [round(float(v), 9) + 0.0 for v in (*right, *down)]

    @property
    def spacing(self) -> tuple[float, float]:
        """Distance of rows, and of columns, mm."""
        _, rows, columns = self.slices.spacing
        return rows, columns


def is_dicom_scan(source: Source) -> bool:
    """Whether a case's image came as DICOM; what cannot be read is for its reader to report."""
    from voxelscale.formats import detect_format

    try:
        return detect_format(source.image) == "dicom"
    except (VoxelscaleError, OSError):
        return False


def read_original(source: Source, reading: ReadingConfig) -> Original:
    """The slices of a case and whose they are, from the headers alone.

    Raises:
        VoxelscaleError: it did not come as DICOM, cannot be read, or does not say what a result has to
            refer to; the message names the case, not its files.
    """
    if not is_dicom_scan(source):
        hint = "leave --dicom-out away for scans in other formats, or give the DICOM series"
        raise VoxelscaleError(
            f"{source.case}: did not come as DICOM: no patient and study to refer to", hint
        )
    try:
        grid, slices = read_slices(source, reading)
    except VoxelscaleError as error:
        message = source.without_paths(error.message)
        named = message if message.startswith(source.case) else f"{source.case}: {message}"
        raise VoxelscaleError(named, error.hint) from None
    assert slices is not None  # noqa: S101 - DICOM has slices
    found = _headers(source, {uid for uid, _ in slices.uids if uid})
    frames = tuple(_frames(source.case, slices, found))
    first = found[frames[0].sop_uid]
    about = _about(source.case, first)
    date = about["StudyDate"] or next(filter(None, (_value(first, *d) for d in DATES.values())), "")
    frame_of_reference = slices.frame_of_reference
    if not is_uid(frame_of_reference):
        frame_of_reference = uid_of("frame", first.data.text(tags.SERIES))
        warn(f"{source.case}: its slices name no frame of reference: one is made for the result")
    lossy = {keyword: _value(first, *what) for keyword, what in LOSSY.items()}
    return Original(
        case=source.case,
        grid=grid,
        slices=slices,
        frames=frames,
        about=about,
        series=first.data.text(tags.SERIES),
        modality=first.data.text(tags.MODALITY) or "OT",
        frame_of_reference=frame_of_reference,
        date=date or NO_DATE,
        time=(about["StudyTime"] or NO_TIME) if about["StudyDate"] else NO_TIME,
        lossy={keyword: value for keyword, value in lossy.items() if value},
    )


def _headers(source: Source, wanted: set[str]) -> dict[str, DicomObject]:
    """The header of each slice's file by its SOPInstanceUID."""
    found: dict[str, DicomObject] = {}
    for path in source.files or files_of(source.image):
        try:
            read = read_object(path, wanted=WANTED, inflated=INFLATED_HEADER) if path.is_file() else None
        except (DamagedError, OSError):
            continue  # it is no slice, or reading it has failed before
        if read is not None and (uid := read.data.text(tags.SOP_UID)) in wanted:
            found.setdefault(uid, read)
    return found


def _frames(case: str, slices: Slices, found: Mapping[str, DicomObject]) -> Iterator[Frame]:
    there = [(place, uid) for place, uid in enumerate(slices.uids) if uid != ("", 0)]
    names = [uid for _, uid in there]
    hint = "export the series again from the archive: results refer to its slices by these UIDs"
    if len(set(names)) < len(names):
        raise VoxelscaleError(f"{case}: two of its slices have one SOPInstanceUID", hint)
    whole = {uid for uid, number in names if number > 1}
    for place, (uid, number) in there:
        if not is_uid(uid) or uid not in found:
            raise VoxelscaleError(f"{case}: a slice without a valid SOPInstanceUID", hint)
        header = found[uid]
        several = uid in whole or _is_multiframe(header)
        named = (header.data.text(tags.SOP_CLASS), header.media_class, CT_IMAGE)
        sop_class = next(filter(is_uid, named))
        yield Frame(place=place, sop_class=sop_class, sop_uid=uid, number=number if several else None)


def _is_multiframe(header: DicomObject) -> bool:
    return header.data.text(tags.SOP_CLASS).startswith((f"{CT_IMAGE}.1", f"{CT_IMAGE}.2"))


def _about(case: str, header: DicomObject) -> dict[str, str]:
    """The patient and study modules; values that break the standard's rules are left empty."""
    about, broken = {}, []
    for keyword, (tag, rule) in PATIENT_AND_STUDY.items():
        text = _value(header, tag, rule)
        if not text and header.data.text(tag):
            broken.append(keyword)
        if text or keyword in REQUIRED:
            about[keyword] = text
    if not is_uid(about["StudyInstanceUID"]):
        hint = "export the series again from the archive: results belong to its study"
        raise VoxelscaleError(f"{case}: has no valid StudyInstanceUID", hint)
    if not is_uid(header.data.text(tags.SERIES)):
        hint = "export the series again from the archive: results refer to it"
        raise VoxelscaleError(f"{case}: has no valid SeriesInstanceUID", hint)
    if broken:
        # The values are the patient's: they are not shown.
        warn(f"{case}: not as DICOM prescribes, and left empty in the result: {', '.join(broken)}")
    return about


def is_uid(text: str) -> bool:
    """Whether it has a UID's form; leading zeros, which are forbidden, some programs write."""
    return len(text) <= LONGEST_UID and UID.fullmatch(text) is not None


def _value(header: DicomObject, tag: int, rule: str) -> str:
    """A text of the header, "" where it does not fit the rule."""
    with warnings.catch_warnings():  # which might quote the patient's data
        warnings.simplefilter("ignore")
        text = free_text(header, header.data, tag)
    text = "".join(c for c in text if c.isprintable()).strip()
    fits = re.fullmatch(rule, text) and (rule not in (DATE, TIME) or _is_moment(text, rule))
    return text if fits else ""


def _is_moment(text: str, rule: str) -> bool:
    """Whether a date or a time is one that there is: there is no 31st of June."""
    form = "%Y%m%d" if rule == DATE else "%H%M%S"[: len(text.split(".")[0])]
    try:
        return not text or bool(datetime.strptime(text.split(".")[0], form))
    except ValueError:
        return False
