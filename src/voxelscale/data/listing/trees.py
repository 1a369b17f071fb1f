"""Trees of DICOM files: CT series with the SEG, RTSTRUCT or LIDC XML that belong to them."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from voxelscale.data.listing.source import Found, Source, safe_name
from voxelscale.data.names import Names
from voxelscale.errors import VoxelscaleError
from voxelscale.files import files_below

if TYPE_CHECKING:
    from voxelscale.formats.dicom import Series

IMAGES = ("CT", "", "OT")
"""Modalities that are taken for CT: converters write "other", or nothing."""

XML_HEAD = 2**16
"""Bytes of an XML in which its series must be named; in LIDC's it stands in the first two thousand."""

_SERIES = re.compile(rb"<SeriesInstanceU[iI][dD]>\s*([0-9.]{1,64})\s*</")


def holds_dicom(folder: Path) -> bool:
    """Whether there is a DICOM file in the folder, however deep."""
    from voxelscale.formats.dicom.header import is_dicom

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
    sources = _cases(data, _images(data, series), by_series, "XML", names)
    known = {s.uid for s in series}
    lost = sum(uid not in known for uid in by_series)
    remarks = [f"{lost} XML files of series that are not there"] if lost else []
    remarks += [f"warning: {unnamed} XML files name no series"] if unnamed else []
    return Found(sources=sources, remarks=tuple(remarks))


def from_dicom(data: Path, names: Names, annotations: Path | None = None) -> Found:
    """CT series of any patients, each with the one SEG, or else RTSTRUCT, that refers to it."""
    series = _series(data)
    objects = _series(annotations) if annotations is not None else series
    by_series: dict[str, list[Path]] = defaultdict(list)
    structures: dict[str, list[Path]] = defaultdict(list)
    for other in objects:
        for uid in other.refers_to:
            (by_series if other.modality == "SEG" else structures)[uid] += other.files
    both = sorted(set(by_series) & set(structures))
    known = {s.uid for s in series}
    lost = sum(
        not known & set(other.refers_to) for other in objects if other.modality in ("SEG", "RTSTRUCT")
    )
    sources = _cases(data, _images(data, series), {**structures, **by_series}, "segmentation", names)
    remarks = [f"{lost} SEG or RTSTRUCT series of scans that are not there"] if lost else []
    remarks += [f"{len(both)} scans have SEG and RTSTRUCT: SEG taken"] if both else []
    return Found(sources=sources, remarks=tuple(remarks))


def scans_in(data: Path, names: Names) -> list[Source]:
    """The CT series of a folder, without labels; none where it holds no DICOM."""
    if not holds_dicom(data):
        return []
    return _cases(data, _images(data, _series(data)), {}, "", names)


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
    data: Path, images: Sequence[Series], labels: dict[str, list[Path]], what: str, names: Names
) -> list[Source]:
    folders = [_folder(series) for series in images]
    shared = Counter(folders)
    sources = []
    for series, folder in zip(images, folders, strict=True):
        found = labels.get(series.uid, [])
        # Which of several readers' or versions is right, nobody can know from the files.
        fault = f"{len(found)} {what} files belong to this series" if len(found) > 1 else ""
        sources.append(
            Source(
                case=_name(data, folder, series, shared[folder] > 1, names),
                patient=names.patient(series.patient),
                image=folder,
                labels=tuple(found) if len(found) == 1 else (),
                series=series.uid,
                files=(*series.files, *series.doubtful),
                fault=fault,
            )
        )
    return sources


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
