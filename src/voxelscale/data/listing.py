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
    twice = [case for case, count in Counter(s.case for s in sources).items() if count > 1]
    if twice:
        raise VoxelscaleError(f"{data}: case {twice[0]} stands there twice", "give each a name of its own")
    return sources


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
