"""Whose an object is: nothing is taken from, or given to, another patient or study."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voxelscale.archive.troubles import UntrueError
from voxelscale.console import count
from voxelscale.errors import VoxelscaleError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

UID = re.compile(r"[0-9.]{1,64}")
"""Scanners write leading zeros, against PS3.5, 9.1; but nothing else."""

ALLOWED_UNUSED = 2
"""Bytes of pixel data more than the pixels take: padding to an even length."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A series that an archive has.

    Attributes:
        study, series: their UIDs: for the archive only, never shown.
        modality: as the archive says it.
        instances: how many it has now.
        patient: PatientID; "": not said.
    """

    study: str = field(repr=False)
    series: str = field(repr=False)
    modality: str
    instances: int
    patient: str = field(default="", repr=False)


def text_of(dataset: Dataset, keyword: str) -> str:
    """An attribute as a text without padding; "" where it is missing or empty."""
    return str(dataset.get(keyword, "") or "").strip()


SCOUTS = 3
"""Localizers that a series of slices may begin with."""


def is_localizer(header: Dataset) -> bool:
    """Whether an image is there to plan others."""
    return any(str(word).upper() == "LOCALIZER" for word in header.get("ImageType") or [])


def first_slice(headers: Iterable[Dataset]) -> Dataset:
    """The first header of a series that is no localizer, which may lie before its slices.

    Of localizers alone it is one of them; no more headers are read than is needed.
    """
    header: Dataset | None = None
    for header in islice(headers, SCOUTS + 1):
        if not is_localizer(header):
            break
    assert header is not None  # noqa: S101 (a series has instances)
    return header


class Series:
    """Checks the instances of a series one after another.

    Args:
        entry: what was asked for.
        listed: SOPInstanceUIDs that the archive listed; None: it was not asked.
    """

    def __init__(self, entry: Entry, listed: Iterable[str] | None = None) -> None:
        self._entry = entry
        self._left = None if listed is None else set(listed)
        self._total = None if self._left is None else len(self._left)
        self._seen: dict[str, bytes] = {}
        self.patient: str | None = None

    def take(self, dataset: Dataset, content: bytes) -> bool:
        """Check one more instance; False: it came before, and is the same.

        Args:
            content: the file that would be written of it.

        Raises:
            UntrueError: it is of another series, study or patient, was not listed, is not whole, or has the
                SOPInstanceUID of another instance.
        """
        entry, number = self._entry, len(self._seen) + 1
        uid, patient = text_of(dataset, "SOPInstanceUID"), text_of(dataset, "PatientID")
        for keyword, wanted in (("StudyInstanceUID", entry.study), ("SeriesInstanceUID", entry.series)):
            if not text_of(dataset, keyword):
                raise UntrueError(f"instance {number} has no {keyword}", FIX)
            if text_of(dataset, keyword) != wanted:
                raise UntrueError(f"instance {number} has another {keyword} than was asked for", FIX)
        self.patient = patient if self.patient is None else self.patient
        if patient != self.patient or (entry.patient and patient != entry.patient):
            raise UntrueError(f"instance {number} is of another patient", FIX)
        digest = hashlib.sha256(content).digest()
        if uid in self._seen:
            if self._seen[uid] != digest:
                raise UntrueError("two different instances have one SOPInstanceUID", FIX)
            return False
        if not UID.fullmatch(uid):
            raise UntrueError(f"instance {number} has no usable SOPInstanceUID", FIX)
        if self._left is not None:
            if uid not in self._left:
                raise UntrueError(f"instance {number} is none that the archive lists", FIX)
            self._left.discard(uid)
        if problem := not_whole(dataset):
            raise UntrueError(f"instance {number} {problem}", FIX)
        self._seen[uid] = digest
        return True

    def finish(self) -> None:
        """Raise an UntrueError where instances are missing."""
        if not self._seen:
            raise UntrueError("the archive sent no instance", FIX)
        if self._left:
            what = f"{len(self._left)} of {count(self._total or 0, 'instance')} did not arrive"
            raise UntrueError(what, "is the connection cut off?")


TEXTS = ("LO", "LT", "PN", "SH", "ST", "UC", "UI", "UT")
"""Value representations in which a person could be named (PS3.15, E.1, lists most of their attributes)."""

SEPARATORS = r"[\\^=\[\],']+"
"""Between the values and the parts of an attribute, as pydicom writes them."""

SHORTEST = 3
"""Characters of a word that is taken out of messages."""

FIX = "check the series in the archive"


def not_whole(dataset: Dataset) -> str:
    """What is wrong with an image's pixels: missing or cut off; "" where nothing is."""
    element: Any = dataset.get_item("PixelData") if "PixelData" in dataset else None
    if element is None or element.value is None:
        return "has no pixel data"
    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is None:
        return "does not name its transfer syntax"
    if syntax.is_compressed and not syntax.is_deflated:
        return ""  # the fragments are read, and counted, when the scan is
    sizes = [dataset.get(k) for k in ("Rows", "Columns", "BitsAllocated")]
    frames = [dataset.get(k) or 1 for k in ("SamplesPerPixel", "NumberOfFrames")]
    try:
        wanted = sizes[0] * sizes[1] * int(frames[0]) * int(frames[1]) * sizes[2] // 8
    except (TypeError, ValueError):
        return "does not say how large it is"
    return "" if wanted <= len(element.value) <= wanted + ALLOWED_UNUSED else "is cut off"


def check_results(files: Sequence[Path], entry: Entry, patient: str) -> list[Dataset]:
    """The headers of results, after a check that they belong to the study and patient of their scan.

    Args:
        patient: PatientID of the instances that were fetched.

    Raises:
        VoxelscaleError: they do not, or cannot be read.
    """
    headers = []
    for number, path in enumerate(files, start=1):
        header = read_header(path)
        other = text_of(header, "PatientID") != patient
        if other or text_of(header, "StudyInstanceUID") != entry.study:
            whose = "patient" if other else "study"
            raise VoxelscaleError(f"result {number} is for another {whose}: it is not sent", "report this")
        if text_of(header, "SeriesInstanceUID") == entry.series:
            raise VoxelscaleError(f"result {number} would be part of the scan's own series", "report this")
        headers.append(header)
    return headers


def without_headers(text: str, files: Iterable[Path]) -> str:
    """A message without the texts and UIDs of these files' headers, which may name the patient."""
    for path in files:
        try:
            elements = list(read_header(path).iterall())
        except Exception:  # hostile bytes; what could be in the message is not known then
            return "it cannot be read"
        for element in elements:
            if element.VR in TEXTS and element.value:
                words = (word.strip() for word in re.split(SEPARATORS, str(element.value)))
                for word in (word for word in words if len(word) >= SHORTEST and word in text):
                    text = text.replace(word, "...")
    return text


def read_header(path: Path) -> Dataset:
    """A DICOM file's data set without its pixels.

    Raises:
        VoxelscaleError: it is none, or damaged.
    """
    from pydicom import dcmread

    try:
        return dcmread(path, stop_before_pixels=True)
    except Exception as error:  # whatever hostile bytes make pydicom raise; its text may quote them
        raise VoxelscaleError(f"{path}: not readable as DICOM ({type(error).__name__})", FIX) from None
