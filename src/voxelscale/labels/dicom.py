"""What SEG and RTSTRUCT share: reading a DICOM object whose content nobody vouches for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from voxelscale.errors import VoxelscaleError
from voxelscale.formats.dicom.elements import DamagedError
from voxelscale.formats.dicom.header import DEFLATED, check_whole, inflated_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydicom.dataset import Dataset, FileDataset

LARGEST = 2**31
"""Bytes of an object at most."""

LARGEST_INFLATED = 2**28
"""Bytes of a deflated one, inflated: zeros shrink a thousandfold, so its own size says nothing."""


def read_dataset(path: Path, tags: Sequence[str] | None = None) -> FileDataset:
    """A DICOM object, or only these of its elements.

    Raises:
        VoxelscaleError: it cannot be read.
    """
    import pydicom

    if path.stat().st_size > LARGEST:
        raise VoxelscaleError(f"{path}: larger than {LARGEST >> 30} GiB", "is this the right file?")
    try:
        if pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") == DEFLATED:
            _check_inflated(path)
        # What is cut off pydicom reads as far as it goes: a structure set would lose contours.
        check_whole(path)
        return pydicom.dcmread(path, specific_tags=list(tags) if tags else None)
    except VoxelscaleError:
        raise
    except Exception as error:
        # pydicom may end a garbled file in any kind of error.
        reason = str(error) if isinstance(error, DamagedError) else type(error).__name__
        hint = "copy or export it again"
        raise VoxelscaleError(f"{path}: not readable as DICOM ({reason})", hint) from None


def _check_inflated(path: Path) -> None:
    """Raise a VoxelscaleError where pydicom, which inflates all at once, would need much memory for it."""
    if inflated_size(path, LARGEST_INFLATED + 1) > LARGEST_INFLATED:
        hint = "write it again without the deflated transfer syntax"
        raise VoxelscaleError(f"{path}: larger than {LARGEST_INFLATED >> 20} MiB when inflated", hint)


def check_series(path: Path, data: Dataset, series: str) -> None:
    """Raise a VoxelscaleError where an object says that it belongs to other series than the image's.

    Args:
        series: the image's SeriesInstanceUID; "": not known, and nothing is refused.
    """
    try:
        known = {str(uid) for uid in _series_of(data)}
    except Exception:  # as above
        hint = "copy or export it again"
        raise VoxelscaleError(f"{path}: what it refers to is not readable", hint) from None
    if series and known and series not in known:
        hint = "give each scan the object that refers to its SeriesInstanceUID"
        raise VoxelscaleError(f"{path}: belongs to another series", hint)


def _series_of(data: Dataset) -> list[str]:
    """SeriesInstanceUIDs that a SEG (PS3.3 C.12.1.1.11) or RTSTRUCT (C.8.8.5) refers to."""
    found = list(data.get("ReferencedSeriesSequence") or [])
    for frame in data.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            found += study.get("RTReferencedSeriesSequence") or []
    return [item.SeriesInstanceUID for item in found if item.get("SeriesInstanceUID")]
