"""What every DICOM object of ours has: who made it, when, and UIDs that are derived from what it holds.

The same prediction gives the same bytes, so nothing here is random and nothing asks for the time. An
object's UID is a digest of its content, under the root 2.25 (PS3.5, B.2).
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from voxelscale import __version__

MANUFACTURER = "Voxelscale"
RESEARCH = "for research"
"""What every series' description begins with."""

PLACEHOLDER = "2.25.0"
"""UID of an object whose content is not complete."""

RANDOM_ROOT = "1.2.826.0.1.3680043.10.511.3."
"""What UIDs begin with that highdicom draws at random."""

IMPLEMENTATION = "VOXELSCALE"

LONGEST_TEXT = 64
"""Characters (PS3.5, 6.2: LO)."""

TIMES = {"InstanceCreationDate", "InstanceCreationTime", "TimezoneOffsetFromUTC", "ContributionDateTime"}
"""Optional attributes that say when a program ran."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What found the findings.

    Attributes:
        model: identity of the model's weights; "": the prediction does not say.
        version: of the package that predicted.
    """

    model: str
    version: str = __version__

    @property
    def serial_number(self) -> str:
        """What tells this model from others, as a device's serial number."""
        return self.model or "unknown"


def plain(text: str, most: int = LONGEST_TEXT) -> str:
    """A text that is one value of VR LO: a backslash would part it in two."""
    return "".join(c if c.isprintable() else " " for c in text).replace("\\", "/").strip()[:most]


def uid_of(*parts: object) -> str:
    """A UID that depends on these plain values alone."""
    return _uid(hashlib.sha256(json.dumps(parts).encode()).digest())


def _uid(digest: bytes) -> str:
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def finished(dataset: Any, kind: str) -> bytes:
    """An object as a file's bytes, under the UIDs that its content gives it.

    Args:
        dataset: with `PLACEHOLDER` for its own UID and its series', and file meta information; it gets
            the UIDs.
        kind: of the object, so that two kinds never share a series.
    """
    _without_times(dataset)
    _settle(dataset, kind)
    meta = dataset.file_meta
    meta.ImplementationClassUID = uid_of("implementation", IMPLEMENTATION)
    meta.ImplementationVersionName = IMPLEMENTATION
    _name(dataset, PLACEHOLDER, PLACEHOLDER)
    own = _uid(hashlib.sha256(_bytes(dataset)).digest())
    _name(dataset, own, uid_of("series", kind, own))
    return _bytes(dataset)


def _name(dataset: Any, own: str, series: str) -> None:
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = own
    dataset.SeriesInstanceUID = series


def _bytes(dataset: Any) -> bytes:
    import pydicom

    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def _without_times(dataset: Any) -> None:
    for element in list(dataset):
        if element.keyword in TIMES:
            del dataset[element.tag]
        elif element.VR == "SQ":
            for item in element.value:
                _without_times(item)


def _settle(dataset: Any, kind: str) -> None:
    """Put derived UIDs in the place of random ones, alike ones in the place of alike ones."""
    known: dict[str, str] = {}
    for element in elements_of(dataset):
        if element.VR == "UI" and str(element.value).startswith(RANDOM_ROOT):
            where = uid_of(kind, str(dataset.StudyInstanceUID), len(known))
            element.value = known.setdefault(str(element.value), where)


def elements_of(dataset: Any) -> Iterator[Any]:
    """Every element of a pydicom data set, those of its sequences' items among them."""
    for element in dataset:
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from elements_of(item)
