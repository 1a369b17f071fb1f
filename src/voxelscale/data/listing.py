"""Which image belongs to which mask: a CSV of paths, or a folder with ``images/`` and ``labels/``."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from voxelscale.errors import VoxelscaleError


@dataclass(frozen=True, kw_only=True)
class Source:
    """One case as it comes.

    Attributes:
        case: its name, unique, fit for a file name.
        patient: whose it is; cases of one patient stay on one side of a split.
        image: file or DICOM folder.
        label: mask file, or None where there is none.
    """

    case: str
    patient: str
    image: Path
    label: Path | None


def list_sources(data: Path) -> list[Source]:
    """The cases of a data set.

    Args:
        data: a CSV file with the columns ``image`` and ``label`` (paths from the CSV's folder) and
            optionally ``case`` and ``patient``; or a folder that holds ``dataset.csv``; or one with
            ``images/`` and ``labels/`` (or nnU-Net's and the Medical Segmentation Decathlon's
            ``imagesTr/`` and ``labelsTr/``) whose files have the same names.

    Raises:
        VoxelscaleError: it is none of these, or names a case twice.
    """
    if data.is_file():
        sources = _from_csv(data)
    elif (data / "dataset.csv").is_file():
        sources = _from_csv(data / "dataset.csv")
    else:
        sources = _from_folders(data)
    return _distinct(data, sources)


def _distinct(data: Path, sources: list[Source]) -> list[Source]:
    twice = [case for case, count in Counter(s.case for s in sources).items() if count > 1]
    if twice:
        raise VoxelscaleError(f"{data}: case {twice[0]} stands there twice", "give each a name of its own")
    return sources


def list_scans(path: Path) -> list[Source]:
    """The scans to be looked at, with or without masks.

    Args:
        path: a data set as `list_sources` takes it; one scan (a file, or a DICOM folder); or a folder
            of scans (files, and folders with DICOM).

    Raises:
        VoxelscaleError: there is no scan.
    """
    if path.suffix.lower() == ".csv" or (path / "dataset.csv").is_file():
        return list_sources(path)
    if any((path / images).is_dir() for images in ("images", "imagesTr")):
        try:
            return list_sources(path)
        except VoxelscaleError:
            path = next(path / images for images in ("images", "imagesTr") if (path / images).is_dir())
    if not path.is_dir() or _holds_dicom(path):
        return [_unlabelled(path)]
    scans = [entry for entry in _visible(path) if _is_scan(entry)]
    if not scans:
        hint = "name a scan, a DICOM folder, a folder of scans, or a CSV with the columns image,label"
        raise VoxelscaleError(f"{path}: no scan found there", hint)
    return _distinct(path, [_unlabelled(scan) for scan in scans])


def _unlabelled(path: Path) -> Source:
    name = safe_name(case_name(path.absolute()))
    return Source(case=name, patient=name, image=path, label=None)


def _is_scan(path: Path) -> bool:
    from voxelscale.formats import detect_format

    if path.is_dir():
        return _holds_dicom(path)
    try:
        detect_format(path)
    except VoxelscaleError:
        return False
    return True


def _holds_dicom(folder: Path) -> bool:
    from voxelscale.formats import detect_format

    for path in _visible(folder):
        if path.is_file():
            try:
                return detect_format(path) == "dicom"
            except VoxelscaleError:
                continue
    return False


def _from_csv(path: Path) -> list[Source]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise VoxelscaleError(f"{path}: not readable as CSV ({error})", "save it as UTF-8 CSV") from None
    if not rows or not {"image", "label"} <= set(rows[0]):
        hint = "its first line must name the columns image and label (case and patient are optional)"
        raise VoxelscaleError(f"{path}: no table of images and labels", hint)
    return [_source_of_row(path, number, row) for number, row in enumerate(rows, start=2)]


def _source_of_row(path: Path, number: int, row: dict[str, str | None]) -> Source:
    image_text = (row.get("image") or "").strip()
    label_text = (row.get("label") or "").strip()
    if not image_text:
        raise VoxelscaleError(f"{path}: line {number} names no image", "fill the column or drop the line")
    image = path.parent / image_text
    case = (row.get("case") or "").strip() or case_name(image)
    return Source(
        case=safe_name(case),
        patient=(row.get("patient") or "").strip() or case,
        image=image,
        label=path.parent / label_text if label_text else None,
    )


def _from_folders(data: Path) -> list[Source]:
    for images, labels in (("images", "labels"), ("imagesTr", "labelsTr")):
        if (data / images).is_dir() and (data / labels).is_dir():
            break
    else:
        hint = "name a CSV with the columns image,label or a folder with images/ and labels/"
        raise VoxelscaleError(f"{data}: no data set found there", hint)
    # nnU-Net numbers the channels of an image: case_0000.nii.gz belongs to label case.nii.gz.
    label_of = {case_name(path): path for path in _visible(data / labels)}
    sources = []
    for image in _visible(data / images):
        name = case_name(image)
        if name not in label_of and re.fullmatch(r".*_0000", name):
            name = name[:-5]
        if image.suffix.lower() not in (".raw", ".zraw"):
            label = label_of.get(name)
            sources.append(Source(case=safe_name(name), patient=name, image=image, label=label))
    if not sources:
        raise VoxelscaleError(f"{data / images}: empty", "put the scans there")
    return sources


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def case_name(path: Path) -> str:
    """A file's name without the extensions of scan formats; a folder's name as it is."""
    if path.is_dir():
        return path.name
    return re.sub(r"\.(nii\.gz|nii|mha|mhd|raw|nrrd|nhdr|dcm)$", "", path.name, flags=re.IGNORECASE)


def safe_name(name: str) -> str:
    """The name with every character that could mean something to a path replaced."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".") or "case"
