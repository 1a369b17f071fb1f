"""What SEG and RTSTRUCT share: reading a DICOM object whose content nobody vouches for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from voxelscale.console import notice, warn
from voxelscale.errors import VoxelscaleError
from voxelscale.formats.dicom.elements import DamagedError
from voxelscale.formats.dicom.header import DEFLATED, check_whole, inflated_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydicom.dataset import Dataset, FileDataset

    from voxelscale.geometry import Scan

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


def check_series(path: Path, data: Dataset, series: str, image: Scan) -> None:
    """Raise a VoxelscaleError where an object says that it belongs to something else than the image.

    Args:
        series: the image's SeriesInstanceUID; "": not known, and no series is refused.
        image: its frame of reference counts where the object names no series.
    """
    try:
        known = {str(uid) for uid in _series_of(data)}
        frames = {str(uid) for uid in _frames_of_reference(data)}
    except Exception:  # as above
        hint = "copy or export it again"
        raise VoxelscaleError(f"{path}: what it refers to is not readable", hint) from None
    if series and known and series not in known:
        hint = "give each scan the object that refers to its SeriesInstanceUID"
        raise VoxelscaleError(f"{path}: belongs to another series", hint)
    frame = image.slices.frame_of_reference if image.slices else ""
    if frame and frames and frame not in frames:
        what = f"{path}: drawn in another frame of reference than the scan's"
        if not known:
            raise VoxelscaleError(what, "check that the pair belongs together")
        warn(f"{what}, though it names the scan's series: its positions are taken as they are")


def _series_of(data: Dataset) -> list[str]:
    """SeriesInstanceUIDs that a SEG (PS3.3 C.12.1.1.11) or RTSTRUCT (C.8.8.5) refers to."""
    found = list(data.get("ReferencedSeriesSequence") or [])
    for frame in data.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            found += study.get("RTReferencedSeriesSequence") or []
    return [item.SeriesInstanceUID for item in found if item.get("SeriesInstanceUID")]


def referenced_slices(path: Path) -> set[str]:
    """SOPInstanceUIDs that an object names anywhere.

    Raises:
        VoxelscaleError: it cannot be read.
    """
    try:
        elements = read_dataset(path).iterall()
        return {str(element.value) for element in elements if element.keyword == "ReferencedSOPInstanceUID"}
    except VoxelscaleError:
        raise
    except Exception:  # as above
        hint = "copy or export it again"
        raise VoxelscaleError(f"{path}: what it refers to is not readable", hint) from None


def _frames_of_reference(data: Dataset) -> list[str]:
    items = [data, *(data.get("ReferencedFrameOfReferenceSequence") or [])]
    return [item.FrameOfReferenceUID for item in items if item.get("FrameOfReferenceUID")]


def check_values(held: Mapping[Path, set[int]], noun: str, values: tuple[int, ...] | None) -> None:
    """Raise a VoxelscaleError where none of the objects has what is asked for; name those without.

    Args:
        held: the numbers of the segments or regions of each object.
        noun: what they are called.
        values: those that are asked for; None: all.
    """
    without = [path for path, numbers in held.items() if values is not None and not numbers & set(values)]
    for path in without if len(without) < len(held) else without[:1]:
        found = ", ".join(map(str, sorted(held[path])[:10])) or "none"
        what = f"{path}: no {noun} {values} (it holds {found})"
        if len(without) == len(held):
            raise VoxelscaleError(what, "choose other reading.labels")
        notice(f"{what}, left out")
