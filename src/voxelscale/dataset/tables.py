"""A CSV of paths, and folders of images and labels whose files have the same names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from voxelscale.console import count
from voxelscale.dataset.several import label_files, labels_named
from voxelscale.dataset.source import (
    Found,
    Source,
    called_after,
    case_name,
    is_path,
    safe_names,
    unlisted,
    visible,
)
from voxelscale.errors import VoxelscaleError
from voxelscale.tables import LONGEST_QUOTE, Table, read_table

PAIRS = (("images", "labels"), ("imagesTr", "labelsTr"), ("images", "masks"))
"""Names of the two folders; the second pair is nnU-Net's and the Medical Segmentation Decathlon's."""

CHANNEL = re.compile(r"(.+)_(\d{4})")
"""How nnU-Net numbers the channels of an image: case_0000.nii.gz is the first of case."""

TABLE_ENDINGS = (".csv", ".tsv", ".txt")
"""Files that may be tables of spheres."""

ONE_CHANNEL = "a CT has one: list the channel to take in a CSV with the columns image,label"


def from_csv(path: Path, *, labelled: bool = True) -> Found:
    """The rows of a CSV: ``image``, ``label`` and optionally ``case`` and ``patient``.

    Args:
        labelled: whether the column ``label`` must be there.
    """
    needed = ("image", "label") if labelled else ("image",)
    table = read_table(path, needed, ("label", "case", "patient", "seriesuid")[labelled:])
    sources = [_row(table, number, cells) for number, cells in table.rows()]
    if not sources:
        raise VoxelscaleError(f"{path}: names no image", "give each scan a line below the columns' names")
    # By default a case is its own patient.
    cases = safe_names([source.case for source in sources])
    named = [
        replace(source, case=case, patient=case if source.patient == source.case else source.patient)
        for source, case in zip(sources, cases, strict=True)
    ]
    return Found(sources=named)


def _row(table: Table, number: int, cells: list[str]) -> Source:
    path = table.path
    image_text, label_text, case_text, patient, series = (
        table.word(cells, column) for column in ("image", "label", "case", "patient", "seriesuid")
    )
    if not image_text:
        raise VoxelscaleError(f"{path}: line {number} names no image", "fill the column or drop the line")
    if not (is_path(image_text) and is_path(label_text)):
        raise VoxelscaleError(f"{path}: line {number} names no possible path", "correct the line")
    image = path.parent / _turned(path.parent, image_text)
    case = case_text or case_name(image)
    labels = labels_named(path.parent, _turned(path.parent, label_text))
    return Source(case=case, patient=patient or case, image=image, labels=labels, series=series)


def _turned(folder: Path, text: str) -> str:
    """What a table calls a path, with the separators of this system where it was written on Windows."""
    turned = text.replace("\\", "/")
    return turned if not (folder / text).exists() and (folder / turned).exists() else text


def find_pair(data: Path) -> tuple[Path, Path] | None:
    """The folders of images and of labels in a data set, in any case of letters, if both are there."""
    folders = (
        {path.name.casefold(): path for path in visible(data) if path.is_dir()} if data.is_dir() else {}
    )
    for pair in PAIRS:
        exact = (data / pair[0], data / pair[1])
        images, labels = (path if path.is_dir() else folders.get(path.name.casefold()) for path in exact)
        if images and labels:
            return images, labels
    return None


def numbers_channels(images: Path, labels: Path) -> bool:
    """Whether images are numbered by channel, as nnU-Net's are: case_0000 beside a label called case."""
    known = {_same(case_name(path)) for path in visible(labels)}
    names = [_same(case_name(path)) for path in visible(images)]
    channels = [CHANNEL.fullmatch(name) for name in names if name not in known]
    return any(channel and channel[1] in known for channel in channels)


def from_folders(data: Path) -> Found:
    """Images and labels of the same name in two folders."""
    pair = find_pair(data)
    if pair is None:
        raise VoxelscaleError(f"{data}: no folders of images and labels", "make images/ and labels/ there")
    from voxelscale.formats import without_data_files

    images, labels = pair
    numbered = numbers_channels(images, labels)
    labels_of: dict[str, list[Path]] = {}
    for label in without_data_files(visible(labels)):
        labels_of.setdefault(_same(case_name(label)), []).append(label)
    cases: list[tuple[str, Path, tuple[Path, ...]]] = []
    for image in without_data_files(visible(images)):
        name = case_name(image)
        channel = CHANNEL.fullmatch(name) if numbered and _same(name) not in labels_of else None
        if channel is not None:
            name = channel[1]
            if int(channel[2]):
                raise VoxelscaleError(f"{image}: a second channel of {name}", ONE_CHANNEL)
        cases.append((name, image, tuple(labels_of.get(_same(name), ()))))
    if not cases:
        raise VoxelscaleError(f"{images}: empty", "put the scans there")
    taken = [label for _, _, found in cases for label in found]
    lost = unlisted("labels", (one for found in labels_of.values() for one in found), taken)
    sources = [
        replace(
            source,
            labels=tuple(file for label in source.labels for file in label_files(label)),
            fault=_too_many(source.labels),
        )
        for source in called_after(cases)
    ]
    return Found(sources=sources, remarks=lost)


def _too_many(labels: Sequence[Path]) -> str:
    named = ", ".join(label.name for label in labels)
    return f"{len(labels)} labels have its name: {named}" if len(labels) > 1 else ""


def _same(name: str) -> str:
    """A name in the form in which an image's and its label's are compared."""
    return unicodedata.normalize("NFC", name).casefold()


def with_spheres(sources: Sequence[Source]) -> tuple[list[Source], tuple[str, ...]]:
    """The sources with the series that identifies them in their table of spheres, and remarks on them.

    A scan whose series is unknown is identified by its file's or its case's name.

    Raises:
        VoxelscaleError: a table is damaged, or none of its rows belongs to a scan of the data set.
    """
    from voxelscale.labels import kind_of
    from voxelscale.labels.spheres import by_series

    matched, remarks = list(sources), []
    files = dict.fromkeys(label for source in sources for label in source.labels)
    for table in files:
        if table.suffix.lower() not in TABLE_ENDINGS or not table.is_file() or kind_of(table) != "spheres":
            continue
        rows = by_series(table)
        places = [place for place, source in enumerate(sources) if table in source.labels]
        named: set[str] = set()
        for place in places:
            source = sources[place]
            keys = (source.series,) if source.series else (case_name(source.image), source.case)
            found = next((key for key in keys if key in rows), None)
            if found is not None:
                named.add(found)
                matched[place] = replace(source, series=found)
        if not named:
            raise _unrelated(table, rows, matched[places[0]])
        others = [uid for uid in rows if uid not in named]
        remarks.append(
            f"{table}: rows of {len(named)} of {count(len(places), 'scan')}; "
            f"{count(sum(len(rows[uid]) for uid in others), 'row')} of other scans"
        )
    return matched, tuple(remarks)


def _unrelated(table: Path, rows: Mapping[str, object], scan: Source) -> VoxelscaleError:
    """Nothing of a table fits: more likely a mistake than a data set of healthy scans."""
    first = next(iter(rows), None)
    meant = f"; it names {first[:LONGEST_QUOTE]}" if first else ""
    known = f", the first scan is {scan.series or case_name(scan.image)}"
    hint = "give the table of these scans; of healthy ones leave the label empty (reading.allow_empty=true)"
    return VoxelscaleError(f"{table}: no row belongs to a scan of the data set{meant}{known}", hint)
