"""Data sets that a ``dataset.json`` describes, and LUNA16.

Medical Segmentation Decathlon: http://medicaldecathlon.com. nnU-Net's raw folders, version 2 and the older
one: its documentation/dataset_format.md. LUNA16: https://luna16.grand-challenge.org/Data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from voxelscale.dataset.source import (
    Found,
    Source,
    called_after,
    case_name,
    is_path,
    read_json,
    safe_name,
    unlisted,
    visible,
)
from voxelscale.dataset.tables import CHANNEL, ONE_CHANNEL, with_spheres
from voxelscale.errors import VoxelscaleError
from voxelscale.files import files_below

TABLE = "annotations.csv"
TABLE_PLACES = ("", "CSVFILES", "evaluationScript/annotations")
"""Where LUNA16's table lies, as its archives unpack."""

MOST_NAMED = 20
"""Classes that a message names at most."""


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
        return "nnunet" if any(CHANNEL.fullmatch(name) for name in names) else "msd"
    # The older nnU-Net lists the Decathlon's names, but its files bear the channel's number.
    name = case_name(first[0][0])
    return "nnunet" if name not in names and f"{name}_0000" in names else "msd"


def from_decathlon(path: Path) -> Found:
    """The cases of a Medical Segmentation Decathlon's ``dataset.json``."""
    tree = read_json(path)
    channel = _one_channel(path, tree.get("modality", {}))
    values, remarks = _classes(path, tree)
    listed = list(dict.fromkeys(_listed(path, tree)))  # the same pair twice is one case
    sources = called_after([(case_name(image), image, (label,)) for image, label in listed], values)
    if not sources:
        raise VoxelscaleError(f"{path}: lists no training cases", "copy it again")
    entries = [e.get("image") if isinstance(e, Mapping) else e for e in _list(path, tree, "test")]
    tests = called_after([(case_name(image), image, ()) for e in entries for image in [_inside(path, e)]])
    images, labels = path.parent / "imagesTr", path.parent / "labelsTr"
    remarks += unlisted("images", _files_in(images), [image for image, _ in listed])
    remarks += unlisted("labels", _files_in(labels), [label for _, label in listed])
    return Found(sources=sources, tests=tests, remarks=(*channel, *remarks))


def from_nnunet(path: Path) -> Found:
    """The cases of a raw data set of nnU-Net: by the ``dataset`` of its JSON, or else by its folders."""
    tree, data = read_json(path), path.parent
    channel = _one_channel(path, tree.get("channel_names", tree.get("modality", {})))
    values, remarks = _classes(path, tree)
    if "dataset" in tree:
        sources = _named_cases(path, tree["dataset"], values)
    else:
        ending = _ending(path, tree)
        labels = {case_name(p): p for p in _ending_with(data / "labelsTr", ending)}
        images = _first_channels(data / "imagesTr", ending)
        cases = [(name, image, (labels[name],) if name in labels else ()) for name, image in images]
        sources = called_after(cases, values)
        remarks += unlisted("labels", labels.values(), [one for _, _, held in cases for one in held])
    if not sources:
        raise VoxelscaleError(
            f"{path}: no training cases beside it", "put them into imagesTr/ and labelsTr/"
        )
    wanted = tree.get("numTraining")
    if isinstance(wanted, int) and wanted != len(sources):
        remarks = (*remarks, f"warning: {path} says {wanted} training cases, {len(sources)} are there")
    tests = called_after([(n, i, ()) for n, i in _first_channels(data / "imagesTs", _ending(path, tree))])
    return Found(sources=sources, tests=tests, remarks=(*channel, *remarks))


def _named_cases(path: Path, cases: Any, values: tuple[int, ...] | None) -> list[Source]:
    if not isinstance(cases, Mapping) or not all(isinstance(case, Mapping) for case in cases.values()):
        raise VoxelscaleError(f"{path}: 'dataset' is no table of cases", "see nnU-Net's dataset_format.md")
    sources = []
    for name, case in cases.items():
        images = case.get("images")
        if not isinstance(images, list) or len(images) != 1:
            count = len(images) if isinstance(images, list) else 0
            raise VoxelscaleError(f"{path}: case {safe_name(name)} has {count} images", ONE_CHANNEL)
        sources.append((name, _inside(path, images[0]), (_inside(path, case.get("label")),)))
    return called_after(sources, values)


def _first_channels(folder: Path, ending: str) -> list[tuple[str, Path]]:
    """Case and image of every file ``<case>_0000<ending>``; a second channel is refused."""
    found = []
    for path in _ending_with(folder, ending):
        channel = CHANNEL.fullmatch(
            path.name[: len(path.name) - len(ending)] if ending else case_name(path)
        )
        if channel is None:
            continue
        if int(channel[2]):
            raise VoxelscaleError(f"{path}: a second channel of {channel[1]}", ONE_CHANNEL)
        found.append((channel[1], path))
    return found


def _files_in(folder: Path) -> list[Path]:
    return visible(folder) if folder.is_dir() else []


def _ending_with(folder: Path, ending: str) -> list[Path]:
    return [p for p in visible(folder) if p.name.endswith(ending)] if folder.is_dir() else []


def _ending(path: Path, tree: Mapping[str, Any]) -> str:
    ending = tree.get("file_ending", "")
    if not isinstance(ending, str):
        raise VoxelscaleError(f"{path}: file_ending is no text", 'write it as ".nii.gz"')
    return ending


def _one_channel(path: Path, channels: Any) -> tuple[str, ...]:
    """Refuse more than one channel; a remark where the one is no CT."""
    if not isinstance(channels, Mapping):
        raise VoxelscaleError(f"{path}: its channels are no table", 'write them as {"0": "CT"}')
    names = [str(name)[:40] for name in channels.values()]
    if len(names) > 1:
        raise VoxelscaleError(f"{path}: {len(names)} channels ({', '.join(names[:6])})", ONE_CHANNEL)
    if names and "CT" not in names[0].upper():
        return (f"warning: its channel is {names[0]}, not CT; values are taken for HU",)
    return ()


def _classes(path: Path, tree: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """The mask values that are the lesion by default, and a remark that names them all.

    The Decathlon writes ``{"1": "cancer"}``, nnU-Net 2 ``{"cancer": 1}`` or, for regions that overlap,
    ``{"whole": [1, 2]}``; what it calls ``ignore`` is no class.
    """
    labels = tree.get("labels", {})
    if not isinstance(labels, Mapping):
        raise VoxelscaleError(f"{path}: 'labels' is no table", 'write it as {"background": 0, "cancer": 1}')
    ignored: set[int] = set()
    named: dict[str, tuple[int, ...]] = {}
    for key, value in labels.items():
        name, numbers = (value, key) if isinstance(value, str) else (key, value)
        try:
            group = tuple(int(n) for n in (numbers if isinstance(numbers, list) else [numbers]))
        except (TypeError, ValueError, OverflowError):
            hint = "a class needs a whole number, a region a list of them"
            raise VoxelscaleError(f"{path}: label {str(name)[:40]!r} has no number", hint) from None
        if name == "ignore":
            ignored.update(group)
        elif any(group):
            named[str(name)[:40]] = group
    every = sorted({n for group in named.values() for n in group} - {0} - ignored)
    remark = ""
    if len(named) > 1:
        each = [f"{name} [{','.join(map(str, group))}]" for name, group in named.items()]
        remark = f"classes: {', '.join(each[:MOST_NAMED])}; choose with reading.labels, else all are lesion"
    return tuple(every) if ignored else None, (remark,) if remark else ()


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
    subsets = [p for p in visible(data) if p.is_dir() and re.fullmatch(r"subset\d+", p.name)]
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

    A scan that the table does not name has no nodule of 3 mm that three readers agree upon.
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
    if table is None:
        missing = f"warning: {TABLE} is not there; name its folder with --annotations"
        return Found(sources=sources, remarks=(missing,))
    sources, remarks = with_spheres(sources)
    return Found(sources=[replace(source, surveyed=True) for source in sources], remarks=remarks)
