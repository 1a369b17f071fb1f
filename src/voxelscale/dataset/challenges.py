"""Data sets that a ``dataset.json`` describes, and LUNA16.

Medical Segmentation Decathlon: http://medicaldecathlon.com. nnU-Net's raw folders, version 2 and the older
one: its documentation/dataset_format.md. LUNA16: https://luna16.grand-challenge.org/Data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from voxelscale.channels import ONE_CT, Channel
from voxelscale.classes import NODULE
from voxelscale.dataset import channels as channelled
from voxelscale.dataset.classes import of_json
from voxelscale.dataset.folds import Fold, by_number
from voxelscale.dataset.source import (
    Found,
    Source,
    called_after,
    case_name,
    is_path,
    read_json,
    safe_name,
    splits_beside,
    unlisted,
    visible,
)
from voxelscale.dataset.tables import with_spheres
from voxelscale.errors import VoxelscaleError
from voxelscale.files import files_below

SUBSET = re.compile(r"subset(\d{1,3})")
"""LUNA16's ten parts, which are the folds of its cross-validation."""

TABLE = "annotations.csv"
TABLE_PLACES = ("", "CSVFILES", "evaluationScript/annotations")
"""Where LUNA16's table lies, as its archives unpack."""


def layout_of_json(path: Path) -> str:
    """``msd`` or ``nnunet``, by what a ``dataset.json`` says and which files are there; "": neither."""
    tree = read_json(path)
    if "channel_names" in tree or "file_ending" in tree:
        return "nnunet"
    if not isinstance(tree.get("training"), list) and "numTraining" not in tree:
        return ""
    images = path.parent / "imagesTr"
    names = [case_name(image) for image in visible(images)] if images.is_dir() else []
    first = _listed(path, tree)[:1]
    if not first:
        return "nnunet" if any(channelled.NUMBERED.fullmatch(name) for name in names) else "msd"
    # The older nnU-Net lists the Decathlon's names, but its files bear the channel's number.
    name = case_name(first[0][0])
    return "nnunet" if name not in names and f"{name}_0000" in names else "msd"


def from_decathlon(path: Path, asked: Sequence[str] = ()) -> Found:
    """The cases of a Medical Segmentation Decathlon's ``dataset.json``.

    Args:
        asked: the user's names of its channels.
    """
    tree = read_json(path)
    channels = channelled.settled(path, channelled.said_by(path, tree.get("modality", {})), asked)
    listed = list(dict.fromkeys(_listed(path, tree)))  # the same pair twice is one case
    named = called_after([(case_name(image), image, (label,)) for image, label in listed])
    # Of several channels each file holds all, along its fourth axis: reading it says whether it does.
    volumes = max(len(channels), 1)
    sources = [replace(source, channels=channels or ONE_CT, volumes=volumes) for source in named]
    if not sources:
        raise VoxelscaleError(f"{path}: lists no training cases", "copy it again")
    entries = [e.get("image") if isinstance(e, Mapping) else e for e in _list(path, tree, "test")]
    tests = called_after([(case_name(image), image, ()) for e in entries for image in [_inside(path, e)]])
    images, labels = path.parent / "imagesTr", path.parent / "labelsTr"
    remarks = unlisted("images", _files_in(images), [image for image, _ in listed])
    remarks += unlisted("labels", _files_in(labels), [label for _, label in listed])
    return Found(
        sources=sources,
        tests=[replace(test, channels=channels or ONE_CT, volumes=volumes) for test in tests],
        remarks=remarks,
        classes=of_json(path, tree),
        channels=channels,
        splits=splits_beside(path),
    )


def from_nnunet(path: Path, asked: Sequence[str] = ()) -> Found:
    """The cases of a raw data set of nnU-Net: by the ``dataset`` of its JSON, or else by its folders.

    Args:
        asked: the user's names of its channels.
    """
    tree, data = read_json(path), path.parent
    said = channelled.said_by(path, tree.get("channel_names", tree.get("modality", {})))
    channels = channelled.settled(path, said, asked)
    ending = _ending(path, tree)
    remarks: tuple[str, ...] = ()
    if "dataset" in tree:
        cases = _named_cases(path, tree["dataset"])
    else:
        labels = {case_name(p): p for p in _files_in(data / "labelsTr", ending)}
        images = channelled.by_case(_files_in(data / "imagesTr", ending), ending)
        cases = [(name, files, (labels[name],) if name in labels else ()) for name, files in images.items()]
        remarks = unlisted("labels", labels.values(), [one for _, _, held in cases for one in held])
    sources = _of_channels(cases, channels)
    if not sources:
        raise VoxelscaleError(
            f"{path}: no training cases beside it", "put them into imagesTr/ and labelsTr/"
        )
    wanted = tree.get("numTraining")
    if isinstance(wanted, int) and wanted != len(sources):
        remarks = (*remarks, f"warning: {path} says {wanted} training cases, {len(sources)} are there")
    tested = channelled.by_case(_files_in(data / "imagesTs", ending), ending)
    return Found(
        sources=sources,
        tests=_of_channels([(name, files, ()) for name, files in tested.items()], channels),
        remarks=remarks,
        classes=of_json(path, tree),
        channels=channels,
        splits=splits_beside(path),
    )


Case = tuple[str, Mapping[int, Path], tuple[Path, ...]]
"""Its name, the files of its channels by their numbers, and its labels."""


def _of_channels(cases: Sequence[Case], channels: Sequence[Channel]) -> list[Source]:
    sources = called_after([(name, files[min(files)], labels) for name, files, labels in cases])
    return [
        channelled.placed(source, files, channels)
        for source, (_, files, _) in zip(sources, cases, strict=True)
    ]


def _named_cases(path: Path, cases: Any) -> list[Case]:
    if not isinstance(cases, Mapping) or not all(isinstance(case, Mapping) for case in cases.values()):
        raise VoxelscaleError(f"{path}: 'dataset' is no table of cases", "see nnU-Net's dataset_format.md")
    found: list[Case] = []
    for name, case in cases.items():
        images = case.get("images")
        if not isinstance(images, list) or not 0 < len(images) <= channelled.MOST_CHANNELS:
            raise VoxelscaleError(f"{path}: case {safe_name(name)} has no list of images", "copy it again")
        files = {number: _inside(path, image) for number, image in enumerate(images)}
        found.append((name, files, (_inside(path, case.get("label")),)))
    return found


def _files_in(folder: Path, ending: str = "") -> list[Path]:
    return [p for p in visible(folder) if p.name.endswith(ending)] if folder.is_dir() else []


def _ending(path: Path, tree: Mapping[str, Any]) -> str:
    ending = tree.get("file_ending", "")
    if not isinstance(ending, str):
        raise VoxelscaleError(f"{path}: file_ending is no text", 'write it as ".nii.gz"')
    return ending


def _listed(path: Path, tree: Mapping[str, Any]) -> list[tuple[Path, Path]]:
    pairs = []
    for entry in _list(path, tree, "training"):
        if not isinstance(entry, Mapping):
            raise VoxelscaleError(f"{path}: a training case without image and label", "copy it again")
        pairs.append((_inside(path, entry.get("image")), _inside(path, entry.get("label"))))
    return pairs


def _list(path: Path, tree: Mapping[str, Any], key: str) -> list[Any]:
    entries = tree.get(key) or []
    if not isinstance(entries, list):
        raise VoxelscaleError(f"{path}: {key!r} is no list", "copy it again")
    return entries


def _inside(path: Path, text: Any) -> Path:
    """A path that a data set's own table names; one that is outside the data set is refused."""
    if not isinstance(text, str) or not text.strip() or not is_path(text):
        raise VoxelscaleError(f"{path}: an image or label without a path", "copy it again")
    # Backslashes and drives lead out on Windows only, but the same table must be as safe there.
    away = PurePosixPath(text).is_absolute() or PureWindowsPath(text).anchor
    if away or ".." in PureWindowsPath(text).parts:
        hint = "name its files relative to its own folder, or list them in a CSV of your own"
        raise VoxelscaleError(f"{path}: {text[:100]!r} is outside the data set", hint)
    return path.parent / text


def luna16_scans(data: Path) -> list[Path]:
    """LUNA16's scans: in ``subset0/`` to ``subset9/``, else in the folder itself, named by their series."""
    subsets = [p for p in visible(data) if p.is_dir() and SUBSET.fullmatch(p.name)]
    files = (file for subset in subsets for file in files_below(subset)) if subsets else visible(data)
    return [file for file in files if file.suffix.lower() in (".mhd", ".mha")]


def luna16_table(data: Path, annotations: Path | None = None) -> Path | None:
    """Where LUNA16's table of nodules lies: in the data set, or in (or at) `annotations`."""
    if annotations is not None and annotations.is_file():
        return annotations
    places = [(annotations or data) / place / TABLE for place in TABLE_PLACES]
    return next((path for path in places if path.is_file()), None)


def from_luna16(data: Path, annotations: Path | None = None) -> Found:
    """LUNA16: every scan with the table of nodules, of which a reader takes the rows of its series.

    A scan that the table does not name has no nodule of 3 mm that three readers agree upon. Scans in
    ``subset0/`` to ``subset9/`` are in the folds of their numbers: the challenge's ten, or as many as are
    there, if more than one is.
    """
    table = luna16_table(data, annotations)
    scans = luna16_scans(data)
    if not scans:
        raise VoxelscaleError(f"{data}: no .mhd in it or in its subset folders", "unpack subset0.zip there")
    sources = [
        Source(
            case=safe_name(name), patient=name, image=scan, labels=(table,) if table else (), series=name
        )
        for scan in scans
        for name in [case_name(scan)]
    ]
    folds = _subsets(data, sources)
    if table is None:
        missing = f"warning: {TABLE} is not there; name its folder with --annotations"
        return Found(sources=sources, remarks=(missing,), classes=NODULE, folds=folds)
    sources, remarks = with_spheres(sources)
    surveyed = [replace(source, surveyed=True) for source in sources]
    return Found(sources=surveyed, remarks=remarks, classes=NODULE, folds=folds)


def _subsets(data: Path, sources: Sequence[Source]) -> tuple[Fold, ...]:
    """A fold of each subset folder; () where there is only one, or none."""
    parts = {source.case: SUBSET.fullmatch(source.image.relative_to(data).parts[0]) for source in sources}
    numbers = {case: int(part[1]) for case, part in parts.items() if part}
    return by_number(numbers) if len(set(numbers.values())) > 1 else ()
