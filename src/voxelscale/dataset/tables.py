"""A CSV of paths, and folders of images and labels whose files have the same names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from voxelscale.channels import Channel
from voxelscale.console import count
from voxelscale.dataset import channels as channelled
from voxelscale.dataset.channels import TO_NAME
from voxelscale.dataset.classes import shown
from voxelscale.dataset.folds import Fold, by_number
from voxelscale.dataset.several import label_files, labels_named, named_in
from voxelscale.dataset.source import (
    Found,
    Source,
    called_after,
    case_name,
    is_path,
    safe_names,
    unlisted,
    visible,
    without_pictures,
)
from voxelscale.errors import VoxelscaleError
from voxelscale.tables import LONGEST_QUOTE, Table, columns_of, means, read_table

PAIRS = (("images", "labels"), ("imagesTr", "labelsTr"), ("images", "masks"))
"""Names of the two folders; the second pair is nnU-Net's and the Medical Segmentation Decathlon's."""

TABLE_ENDINGS = (".csv", ".tsv", ".txt")
"""Files that may be tables of spheres."""

IMAGE_OF = re.compile(r"image[ _-](.+)", re.IGNORECASE)
"""Columns of several channels are called image_CT, image_PET, ..."""

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"} | {
    "test": "test",
    "testing": "test",
}
"""What a column ``split`` says."""


def from_csv(path: Path, asked: Sequence[str] = (), *, labelled: bool = True) -> Found:
    """The rows of a CSV: ``image``, ``label`` and optionally ``case``, ``patient``, ``split`` and ``fold``.

    Several channels are columns ``image_<name>`` each.

    Args:
        asked: the user's names of the channels.
        labelled: whether the column ``label`` must be there, and split and fold count.
    """
    images, said = _image_columns(path, asked)
    channels = channelled.settled(path, said, asked)
    needed = (*images, "label") if labelled else images
    optional = ("label", "case", "patient", "seriesuid")[labelled:] + ("split", "fold") * labelled
    names = [name for name in columns_of(path) if IMAGE_OF.fullmatch(name) and not means(name, "image")]
    beside = [name for name in names if name not in images and sum(means(n, name) for n in names) == 1]
    table = read_table(path, needed, (*optional, *beside))
    rows = list(table.rows())
    sources = [_row(table, number, cells, images, channels) for number, cells in rows]
    if not sources:
        raise VoxelscaleError(f"{path}: names no image", "give each scan a line below the columns' names")
    # By default a case is its own patient.
    cases = safe_names([source.case for source in sources])
    named = [
        replace(source, case=case, patient=case if source.patient == source.case else source.patient)
        for source, case in zip(sources, cases, strict=True)
    ]
    remarks = tuple(
        f"warning: {path}: its column {name} names files and is not read: call all channels so, as image_CT"
        for name in beside
        if any(_is_another(table, cells, name, s) for (_, cells), s in zip(rows, sources, strict=True))
    )
    return Found(sources=named, channels=channels, folds=_folds(table, rows, named), remarks=remarks)


def _is_another(table: Table, cells: list[str], column: str, source: Source) -> bool:
    """Whether a cell names what is there, but is neither the case's image nor a folder that it lies in."""
    text, image = table.word(cells, column), source.image.absolute()
    path = named_in(table.path.parent, text) if text and is_path(text) else None
    return (
        path is not None
        and path.exists()
        and path.resolve() not in {p.resolve() for p in (image, *image.parents)}
    )


def _image_columns(path: Path, asked: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns of images, and what they call the channels; the one ``image`` calls none."""
    names = columns_of(path)
    found = {name: match[1] for name in names if (match := IMAGE_OF.fullmatch(name))}
    if not found or any(means(name, "image") for name in names):
        return ("image",), ()
    if all(re.fullmatch(r"\d{1,4}", said) for said in found.values()):
        columns = tuple(sorted(found, key=lambda name: int(found[name])))
        if not asked:
            raise VoxelscaleError(f"{path}: its channels have no names ({', '.join(columns)})", TO_NAME)
        return columns, tuple(found[name] for name in columns)
    called = {name: shown(said) for name, said in found.items()}
    if channelled.turned(tuple(called.values()), asked):
        order = [name.casefold() for name in asked]
        called = dict(sorted(called.items(), key=lambda column: order.index(column[1].casefold())))
    return tuple(called), tuple(called.values())


def _row(
    table: Table, number: int, cells: list[str], images: Sequence[str], channels: Sequence[Channel]
) -> Source:
    path = table.path
    texts = [table.word(cells, column) for column in images]
    label_text, case_text, patient, series, split = (
        table.word(cells, column) for column in ("label", "case", "patient", "seriesuid", "split")
    )
    if not any(texts):
        raise VoxelscaleError(f"{path}: line {number} names no image", "fill the column or drop the line")
    if not all(map(is_path, (*texts, label_text))):
        raise VoxelscaleError(f"{path}: line {number} names no possible path", "correct the line")
    if "split" in table.places and split.lower() not in SPLITS:
        what = f"line {number}: split is {split[:LONGEST_QUOTE]!r}"
        raise VoxelscaleError(f"{path}: {what}", "write train, val or test, or call the column otherwise")
    files = {at: named_in(path.parent, text) for at, text in enumerate(texts) if text}
    image = files[min(files)]
    numbered = channelled.NUMBERED.fullmatch(case_name(image)) if len(images) > 1 else None
    case = case_text or (numbered[1] if numbered else case_name(image))
    labels = labels_named(path.parent, label_text)
    source = Source(
        case=case,
        patient=patient or case,
        image=image,
        labels=labels,
        series=series,
        split=SPLITS.get(split.lower(), ""),
    )
    return channelled.placed(source, files, channels)


def _folds(
    table: Table, rows: Sequence[tuple[int, list[str]]], sources: Sequence[Source]
) -> tuple[Fold, ...]:
    """The folds of a column ``fold``: where each case validates; without a number, and of test, in none."""
    numbers = {}
    for (line, cells), source in zip(rows, sources, strict=True):
        text = table.word(cells, "fold")
        if text and not re.fullmatch(r"\d{1,3}", text):
            hint = "write a whole number, or nothing where a case is in no fold"
            raise VoxelscaleError(f"{table.path}: line {line}: fold is {text[:LONGEST_QUOTE]!r}", hint)
        if text and source.split != "test":
            numbers[source.case] = int(text)
    if len(set(numbers.values())) == 1:
        raise VoxelscaleError(
            f"{table.path}: its column fold has one number only", "name at least two folds"
        )
    return by_number(numbers)


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
    numbered = [channelled.NUMBERED.fullmatch(name) for name in names if name not in known]
    return any(one and one[1] in known for one in numbered)


def from_folders(data: Path, asked: Sequence[str] = ()) -> Found:
    """Images and labels of the same name in two folders.

    Args:
        asked: the user's names of the channels, without which none but the first is taken.
    """
    pair = find_pair(data)
    if pair is None:
        raise VoxelscaleError(f"{data}: no folders of images and labels", "make images/ and labels/ there")
    from voxelscale.formats import without_data_files

    images, labels = pair
    numbered = numbers_channels(images, labels)
    channels = channelled.settled(images, (), asked)
    labels_of: dict[str, list[Path]] = {}
    for label in without_pictures(without_data_files(visible(labels))):
        labels_of.setdefault(_same(case_name(label)), []).append(label)
    cases: list[tuple[str, dict[int, Path], tuple[Path, ...]]] = []
    of_case: dict[str, dict[int, Path]] = {}
    for image in without_pictures(without_data_files(visible(images))):
        name, number = case_name(image), 0
        own = channelled.NUMBERED.fullmatch(name)
        if own is not None and numbered and _same(name) not in labels_of:
            name, number = own[1], int(own[2])
            if number and not channels:
                raise VoxelscaleError(f"{image}: a second channel of {name}", TO_NAME)
        files = of_case.get(name, {})
        if number not in files and files:
            files[number] = image
            continue
        of_case[name] = {number: image}
        cases.append((name, of_case[name], tuple(labels_of.get(_same(name), ()))))
    if not cases:
        raise VoxelscaleError(f"{images}: empty", "put the scans there")
    taken = [label for _, _, found in cases for label in found]
    lost = unlisted("labels", (one for found in labels_of.values() for one in found), taken)
    named = called_after([(name, files[min(files)], found) for name, files, found in cases])
    sources = []
    for source, (_, files, _) in zip(named, cases, strict=True):
        held = tuple(file for label in source.labels for file in label_files(label))
        known = replace(source, labels=held, fault=_too_many(source.labels))
        sources.append(channelled.placed(known, files, channels))
    return Found(sources=sources, remarks=lost, channels=channels)


def _too_many(labels: Sequence[Path]) -> str:
    named = ", ".join(label.name for label in labels)
    return f"{len(labels)} labels have its name: {named}" if len(labels) > 1 else ""


def _same(name: str) -> str:
    """A name in the form in which an image's and its label's are compared."""
    return unicodedata.normalize("NFC", name).casefold()


def with_spheres(sources: Sequence[Source]) -> tuple[list[Source], tuple[str, ...]]:
    """The sources with the series that identifies them in their table of spheres, and remarks on them.

    A scan whose series is unknown is identified by its file's or its case's name, in the table itself or in
    that of the excluded findings beside it: of most healthy scans only the latter has rows.

    Raises:
        VoxelscaleError: a table is damaged, or neither it nor that beside it names a scan of the data set.
    """
    from voxelscale.labels import kind_of
    from voxelscale.labels.spheres import EXCLUDED, by_series

    matched, remarks = list(sources), []
    files = dict.fromkeys(label for source in sources for label in source.labels)
    for table in files:
        if table.suffix.lower() not in TABLE_ENDINGS or not table.is_file() or kind_of(table) != "spheres":
            continue
        rows, beside = by_series(table), table.with_name(EXCLUDED)
        known = rows.keys() | (by_series(beside).keys() if beside.is_file() else ())
        places = [place for place, source in enumerate(sources) if table in source.labels]
        named: set[str] = set()
        for place in places:
            source = sources[place]
            keys = (source.series,) if source.series else (case_name(source.image), source.case)
            found = next((key for key in keys if key in known), None)
            if found is not None:
                named.add(found)
                matched[place] = replace(source, series=found)
        if not named:
            raise _unrelated(table, rows, matched[places[0]])
        others = [uid for uid in rows if uid not in named]
        remarks.append(
            f"{table}: rows of {len(named & rows.keys())} of {count(len(places), 'scan')}; "
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
