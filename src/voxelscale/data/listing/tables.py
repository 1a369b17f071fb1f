"""A CSV of paths, and folders of images and labels whose files have the same names."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from voxelscale.data.listing.several import label_files, labels_named
from voxelscale.data.listing.source import Found, Source, case_name, is_path, read_table, safe_name, visible
from voxelscale.errors import VoxelscaleError

PAIRS = (("images", "labels"), ("imagesTr", "labelsTr"))
"""Names of the two folders; the second pair is nnU-Net's and the Medical Segmentation Decathlon's."""

CHANNEL = re.compile(r"(.+)_(\d{4})")
"""How nnU-Net numbers the channels of an image: case_0000.nii.gz is the first of case."""

ONE_CHANNEL = "a CT has one: list the channel to take in a CSV with the columns image,label"


def from_csv(path: Path, *, labelled: bool = True) -> Found:
    """The rows of a CSV: ``image``, ``label`` and optionally ``case`` and ``patient``.

    Args:
        labelled: whether the column ``label`` must be there.
    """
    try:
        text = read_table(path).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise VoxelscaleError(f"{path}: not readable as CSV ({error})", "save it as UTF-8 CSV") from None
    needed = {"image", "label"} if labelled else {"image"}
    if not rows or not needed <= set(rows[0]):
        hint = "its first line must name the columns image and label (case and patient are optional)"
        raise VoxelscaleError(f"{path}: no table of images and labels", hint)
    return Found(sources=[_row(path, number, row) for number, row in enumerate(rows, start=2)])


def _row(path: Path, number: int, row: dict[str, str | None]) -> Source:
    image_text, label_text, case_text, patient = (
        (row.get(column) or "").strip() for column in ("image", "label", "case", "patient")
    )
    if not image_text:
        raise VoxelscaleError(f"{path}: line {number} names no image", "fill the column or drop the line")
    if not (is_path(image_text) and is_path(label_text)):
        raise VoxelscaleError(f"{path}: line {number} names no possible path", "mend the line")
    image = path.parent / image_text
    case = safe_name(case_text or case_name(image))
    labels = labels_named(path.parent, label_text)
    return Source(case=case, patient=patient or case, image=image, labels=labels)


def find_pair(data: Path) -> tuple[Path, Path] | None:
    """The folders of images and of labels in a data set, if both are there."""
    pairs = ((data / images, data / labels) for images, labels in PAIRS)
    return next(((i, m) for i, m in pairs if i.is_dir() and m.is_dir()), None)


def from_folders(data: Path) -> Found:
    """Images and labels of the same name in two folders."""
    pair = find_pair(data)
    if pair is None:
        raise VoxelscaleError(f"{data}: no folders of images and labels", "make images/ and labels/ there")
    from voxelscale.formats import without_data_files

    images, labels = pair
    labels_of: dict[str, list[Path]] = {}
    for label in without_data_files(visible(labels)):
        labels_of.setdefault(case_name(label), []).append(label)
    sources = []
    for image in without_data_files(visible(images)):
        name = case_name(image)
        channel = None if name in labels_of else CHANNEL.fullmatch(name)
        if channel is not None:
            name = channel[1]
            if int(channel[2]) and name in labels_of:
                raise VoxelscaleError(f"{image}: a second channel of {name}", ONE_CHANNEL)
        case, found = safe_name(name), tuple(labels_of.get(name, ()))
        fault = f"{len(found)} labels: {', '.join(label.name for label in found)}" if len(found) > 1 else ""
        files = tuple(file for label in found for file in label_files(label))
        sources.append(Source(case=case, patient=case, image=image, labels=files, fault=fault))
    if not sources:
        raise VoxelscaleError(f"{images}: empty", "put the scans there")
    return Found(sources=sources)
