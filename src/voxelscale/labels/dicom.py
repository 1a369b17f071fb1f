"""What SEG and RTSTRUCT share: reading a DICOM object whose content nobody vouches for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from voxelscale.console import notice, warn
from voxelscale.errors import VoxelscaleError
from voxelscale.formats.dicom import tags
from voxelscale.formats.dicom.elements import (
    BEFORE_PIXELS,
    DamagedError,
    DicomObject,
    Elements,
    inflated_size,
    read_object,
)
from voxelscale.formats.dicom.header import frames_of_reference, refers_to
from voxelscale.labels.stored import labels_by_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from voxelscale.classes import Classes
    from voxelscale.geometry import Scan

LARGEST = 2**31
"""Bytes of an object at most."""

LARGEST_INFLATED = 2**28
"""Bytes of a deflated one, inflated: zeros shrink a thousandfold, so its own size says nothing."""


def read_label_object(path: Path, last: int = BEFORE_PIXELS) -> DicomObject:
    """What is read of a SEG or RTSTRUCT, and of its pixels where they lie.

    Args:
        last: tag after which nothing is read.

    Raises:
        VoxelscaleError: it cannot be read.
    """
    if path.stat().st_size > LARGEST:
        raise VoxelscaleError(f"{path}: larger than {LARGEST >> 30} GiB", "is this the right file?")
    try:
        if inflated_size(path, LARGEST_INFLATED + 1) > LARGEST_INFLATED:
            hint = "write it again without the deflated transfer syntax"
            raise VoxelscaleError(f"{path}: larger than {LARGEST_INFLATED >> 20} MiB when inflated", hint)
        wanted, nested = tags.OF_LABELS, tags.SEQUENCES_OF_LABELS
        found = read_object(path, wanted=wanted, nested=nested, inflated=LARGEST_INFLATED, last=last)
    except DamagedError as error:
        hint = "copy or export it again"
        raise VoxelscaleError(f"{path}: not readable as DICOM ({error})", hint) from None
    if found is None:
        raise VoxelscaleError(f"{path}: no DICOM object", "is this the right file?")
    return found


def modality_of(path: Path) -> str:
    """What kind of object a DICOM file is: "SEG", "RTSTRUCT", "CT", ...

    Raises:
        VoxelscaleError: it cannot be read.
    """
    return read_label_object(path, last=tags.MODALITY).data.text(tags.MODALITY)


def free_text(found: DicomObject, item: Elements, tag: int) -> str:
    """A text of a person, which may be in any alphabet, decoded by the object's character set."""
    sets = found.data.text(tags.CHARACTER_SET)
    if not sets:
        return item.text(tag)
    from pydicom.charset import convert_encodings, decode_bytes
    from pydicom.valuerep import TEXT_VR_DELIMS

    return str(decode_bytes(item.raw(tag), convert_encodings(sets.split("\\")), TEXT_VR_DELIMS)).strip(
        " \0"
    )


def check_series(found: DicomObject, series: str, image: Scan) -> None:
    """Raise a VoxelscaleError where an object says that it belongs to something else than the image.

    Args:
        series: the image's SeriesInstanceUID; "": not known, and no series is refused.
        image: its frame of reference counts where the object names no series.
    """
    path, known, frames = found.path, refers_to(found.data), frames_of_reference(found.data)
    if series and known and series not in known:
        hint = "give each scan the object that refers to its SeriesInstanceUID"
        raise VoxelscaleError(f"{path}: belongs to another series", hint)
    frame = image.slices.frame_of_reference if image.slices else ""
    if frame and frames and frame not in frames:
        what = f"{path}: drawn in another frame of reference than the scan's"
        if not known:
            raise VoxelscaleError(what, "check that the pair belongs together")
        warn(f"{what}, though it names the scan's series: its positions are taken as they are")


def referenced_slices(path: Path) -> set[str]:
    """SOPInstanceUIDs that an object names anywhere.

    Raises:
        VoxelscaleError: it cannot be read.
    """
    return set(_references(read_label_object(path).data))


def _references(data: Elements) -> Iterator[str]:
    for tag, value in data.values.items():
        if tag == tags.SOP_REFERENCE:
            yield data.text(tag)
        elif isinstance(value, list):
            for item in value:
                yield from _references(item)


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


def check_names(held: Mapping[Path, Mapping[int, Sequence[str]]], noun: str, classes: Classes) -> None:
    """As `check_values`, of classes by name; a lacking class is reported where segments are left over.

    Args:
        held: what the segments or regions of each object are called, by their numbers.
    """
    for path, names in held.items():
        labels = labels_by_number(names, classes)
        shown = [
            f"{number} {' / '.join(dict.fromkeys(filter(None, called)))}".strip()
            for number, called in names.items()
        ]
        lacks = [
            name
            for at, name in enumerate(classes.names)
            if not any(
                label > 0 and (label >> at & 1 if classes.regions else label == at + 1)
                for label in labels.values()
            )
        ]
        what = f"{path}: no {noun} for {', '.join(lacks)} (it holds {', '.join(shown[:10]) or 'none'})"
        if not any(labels_by_number(other, classes) for other in held.values()):
            raise VoxelscaleError(what, "choose other reading.labels")
        if lacks and len(labels) < len(names):
            notice(what)
