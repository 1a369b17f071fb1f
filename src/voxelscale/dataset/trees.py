"""Trees of DICOM files: CT series with the SEG, RTSTRUCT or LIDC XML that belong to them."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from voxelscale.classes import NODULE
from voxelscale.dataset.names import Names
from voxelscale.dataset.several import distinct
from voxelscale.dataset.source import Found, Source, safe_name
from voxelscale.errors import VoxelscaleError
from voxelscale.files import files_below

if TYPE_CHECKING:
    from voxelscale.formats.dicom import Series

OBJECTS = ("SEG", "RTSTRUCT")
"""What labels are kept in; of both for one scan, the first is taken."""

UNCLEAR = "{} names no series, and may belong to this one or to another of its study"

IMAGES = ("CT", "", "OT")
"""Modalities that are taken for CT: converters write "other", or nothing."""

XML_HEAD = 2**16
"""Bytes of an XML in which its series must be named; in LIDC's it is in the first two thousand."""

_SERIES = re.compile(rb"<SeriesInstanceU[iI][dD]>\s*([0-9.]{1,64})\s*</")


def holds_dicom(folder: Path) -> bool:
    """Whether there is a DICOM file in the folder, however deep."""
    from voxelscale.formats.dicom.elements import is_dicom

    return any(is_dicom(_head(file, 132)) for file in files_below(folder))


def lidc_tables(folder: Path) -> list[Path]:
    """The XML files of LIDC's readers in a folder, however deep."""
    files = (file for file in files_below(folder) if file.suffix.lower() == ".xml")
    return [file for file in files if b"LidcReadMessage" in _head(file, XML_HEAD)]


def from_lidc(data: Path, names: Names, annotations: Path | None = None) -> Found:
    """LIDC-IDRI: CT series, and the XML that names the series, wherever it lies."""
    by_series: dict[str, list[Path]] = defaultdict(list)
    unnamed = 0
    for path in lidc_tables(annotations or data):
        found = _SERIES.search(_head(path, XML_HEAD))
        if found is None:
            unnamed += 1
        else:
            by_series[found[1].decode()].append(path)
    series = _series(data)
    labels = {uid: distinct(files) for uid, files in by_series.items()}
    # Which of several readers' or versions is right, cannot be known from the files.
    several = {uid: files for uid, files in labels.items() if len(files) > 1}
    faults = {uid: f"{len(files)} XML files belong to this series" for uid, files in several.items()}
    images = _images(data, series)
    sources = _cases(data, images, labels, faults, names)
    known = {s.uid for s in series}
    lost = sum(uid not in known for uid in by_series)
    remarks = [*nameless(images), *([f"{lost} XML files of series that are not there"] if lost else [])]
    remarks += [f"warning: {unnamed} XML files name no series"] if unnamed else []
    return Found(sources=sources, remarks=tuple(remarks), classes=NODULE)


def from_dicom(data: Path, names: Names, annotations: Path | None = None) -> Found:
    """CT series of any patients, each with the SEG, or else the RTSTRUCT, that refer to it.

    What names no series belongs to the one of its study and frame of reference.
    """
    series = _series(data)
    images = _images(data, series)
    objects = [s for s in (_series(annotations) if annotations else series) if s.modality in OBJECTS]
    labels: dict[str, dict[str, list[Path]]] = {modality: defaultdict(list) for modality in OBJECTS}
    known = {s.uid for s in images}
    unclear: dict[str, list[Path]] = defaultdict(list)
    lost, strays, placed = 0, [], 0
    for other in objects:
        uids = other.refers_to or _uids_of_same_place(other, images)
        placed += not other.refers_to and len(uids) == 1
        if not known & set(uids):
            lost += 1
            strays += [other.files[0]] if any(s.study == other.study for s in images) else []
        for uid in uids:
            if other.refers_to or len(uids) == 1:
                labels[other.modality][uid] += other.files
            else:
                unclear[uid] += other.files
    both = sorted(set(labels["SEG"]) & set(labels["RTSTRUCT"]))
    taken = {uid: distinct(files) for uid, files in {**labels["RTSTRUCT"], **labels["SEG"]}.items()}
    faults = {uid: UNCLEAR.format(files[0]) for uid, files in unclear.items()}
    sources = _cases(data, images, taken, faults, names)
    remarks = nameless(images)
    remarks += [f"{lost} SEG or RTSTRUCT of scans that are not there or are no CT"] if lost else []
    if strays:
        why = "refers to a series that is not there or is no CT, though others of its study are"
        more = f" (and {len(strays) - 1} more)" if len(strays) > 1 else ""
        remarks.append(f"warning: {strays[0]}{more}: {why}")
    remarks += [f"{placed} SEG or RTSTRUCT that name no series: by frame of reference"] if placed else []
    remarks += [f"{len(both)} scans have SEG and RTSTRUCT: SEG taken"] if both else []
    return Found(sources=sources, remarks=tuple(remarks))


def _uids_of_same_place(other: Series, images: Sequence[Series]) -> tuple[str, ...]:
    """The series that a SEG or RTSTRUCT without a reference may belong to.

    Those of its study and frame of reference; of several, those whose slices it names.
    """
    frames = set(other.frames_of_reference)
    near = [
        s for s in images if s.study == other.study and (not frames or frames & {*s.frames_of_reference})
    ]
    if len(near) > 1:
        from voxelscale.formats.dicom.header import read_header
        from voxelscale.labels.dicom import referenced_slices

        named = referenced_slices(other.files[0])
        slices = {
            s.uid: {frame.sop_uid for f in s.files if (h := read_header(f)) for frame in h.frames}
            for s in near
        }
        near = [s for s in near if slices[s.uid] & named] or near
    return tuple(s.uid for s in near)


def scans_in(data: Path, names: Names) -> list[Source]:
    """The CT series of a folder, without labels; none where it holds no DICOM."""
    if not holds_dicom(data):
        return []
    return _cases(data, _images(data, _series(data)), {}, {}, names)


def _series(folder: Path) -> list[Series]:
    from voxelscale.formats.dicom import find_series

    return find_series(folder)


def _images(data: Path, series: Sequence[Series]) -> list[Series]:
    images = [s for s in series if s.modality in IMAGES]
    if not images:
        others = Counter(s.modality for s in series)
        held = ", ".join(f"{n} {name}" for name, n in sorted(others.items())) or "none that can be used"
        raise VoxelscaleError(
            f"{data}: no CT series there ({held})", "give the folder that holds the slices"
        )
    return images


def _cases(
    data: Path,
    images: Sequence[Series],
    labels: Mapping[str, tuple[Path, ...]],
    faults: Mapping[str, str],
    names: Names,
) -> list[Source]:
    """The series as cases, with the label files and what makes them unfit, by their UIDs."""
    folders = [_folder(series) for series in images]
    shared = Counter(folders)
    sources = []
    for series, folder in zip(images, folders, strict=True):
        fault = faults.get(series.uid, "")
        sources.append(
            Source(
                case=_name(data, folder, series, shared[folder] > 1, names),
                patient=names.patient(series.patient),
                image=folder,
                labels=() if fault else labels.get(series.uid, ()),
                series=series.uid,
                files=(*series.files, *series.doubtful),
                fault=fault,
            )
        )
    return sources


def nameless(images: Sequence[Series]) -> list[str]:
    """A warning where no PatientID says whose several studies are."""
    studies = {series.study for series in images if series.patient == series.study}
    if len(studies) < 2:
        return []
    return [
        f"warning: {len(studies)} studies have no PatientID that tells patients apart (it is empty or a "
        "word such as ANONYMOUS): each study counts as a patient, so that scans of one person may be in "
        "training and validation; a CSV with a column patient says better"
    ]


def _folder(series: Series) -> Path:
    """The folder that holds all files of a series."""
    return Path(os.path.commonpath([file.parent for file in series.files]))


def _name(data: Path, folder: Path, series: Series, shared: bool, names: Names) -> str:
    """What a case is called; its folder's name serves only where the folder is its own."""
    if names.how == "series":
        return safe_name(series.uid)
    hashed = names.case(series.uid)
    if names.how != "file":
        return hashed
    inside = "-".join(folder.relative_to(data).parts) or folder.absolute().name
    return safe_name(f"{inside}-{hashed[5:11]}" if shared else inside)


def _head(path: Path, count: int) -> bytes:
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as handle:
            return handle.read(count)
    except OSError:
        return b""
