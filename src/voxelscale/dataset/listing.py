"""What a data set holds: which scans, with which labels, of which patients; its layout is recognised.

`tables`: a CSV of paths, folders of images and labels. `challenges`: Medical Segmentation Decathlon,
nnU-Net, LUNA16. `trees`: LIDC-IDRI, and DICOM with SEG or RTSTRUCT. Nothing but headers is read here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from voxelscale.channels import ONE_CT, Channel
from voxelscale.config import ReadingConfig
from voxelscale.console import count, notice, warn
from voxelscale.dataset import challenges, tables, trees
from voxelscale.dataset import channels as channelled
from voxelscale.dataset.classes import remark, settled, values_of
from voxelscale.dataset.folds import Fold, check_folds, check_patients, folds_of
from voxelscale.dataset.names import Names
from voxelscale.dataset.source import (
    PICTURES,
    Found,
    Source,
    called_after,
    case_name,
    identity,
    possible_names,
    read_json,
    read_json_value,
    safe_name,
    visible,
    with_patients,
    without_pictures,
)
from voxelscale.errors import VoxelscaleError
from voxelscale.files import files_below

__all__ = ["LAYOUTS", "Source", "case_name", "detect_layout", "list_scans", "list_sources", "safe_name"]

LAYOUTS = {
    "csv": "CSV table",
    "folders": "folders of images and labels",
    "msd": "Medical Segmentation Decathlon",
    "nnunet": "nnU-Net",
    "lidc": "LIDC-IDRI",
    "luna16": "LUNA16",
    "dicom": "DICOM tree",
}
"""What can be asked for besides ``auto``, and how it is called."""

JSON = "dataset.json"

WARNING = "warning: "
"""How a remark begins that --quiet shows, too."""

IMAGE_FOLDERS = ("imagesTr", "imagesTs", "imagesVal")
"""Where nnU-Net's images lie, each named after its case and channel."""


def list_sources(
    data: Path,
    layout: str = "auto",
    annotations: Path | None = None,
    names: Names | None = None,
    reading: ReadingConfig | None = None,
) -> list[Source]:
    """The cases of a data set, in the order of its table or files; see `list_cases`."""
    return list(list_cases(data, layout, annotations, names, reading).sources)


def list_cases(
    data: Path,
    layout: str = "auto",
    annotations: Path | None = None,
    names: Names | None = None,
    reading: ReadingConfig | None = None,
) -> Found:
    """The cases of a data set, in the order of its table or files; its classes, channels and folds.

    Args:
        data: a CSV (``image``, ``label``, optionally ``case``, ``patient``, ``split`` and ``fold``; paths
            from its folder), a ``dataset.json``, or a folder in one of the `LAYOUTS`.
        layout: one of them, or ``auto``.
        annotations: where LIDC's XML, LUNA16's tables or DICOM's SEG and RTSTRUCT lie, if elsewhere.
        names: how cases are called; None: as `prepare` calls them by default.
        reading: what the user calls the classes and channels; None: as the data set calls them.

    Raises:
        VoxelscaleError: it is in none of the layouts, names a case twice, a table of it leads out of it, or
            its classes or channels contradict those of the user.
    """
    names, reading = names or Names(), reading or ReadingConfig()
    layout = _settled(data, layout, annotations)
    if not layout:
        raise _unknown(data)
    found = _read(data, layout, annotations, names, reading)
    if layout in ("lidc", "dicom"):
        _warn_of_other_files(data)
    sources = _distinct(data, _named(data, found.sources, names, layout))
    classes = settled(found.classes, reading)
    classed = remark(found.classes if values_of(reading) else classes, reading)
    _report(layout, sources, replace(found, remarks=(classed, *found.remarks)))
    called = {own.case: source.case for own, source in zip(found.sources, sources, strict=True)}
    sources = [replace(source, classes=classes) for source in sources]
    sides = {side: [s.case for s in sources if s.split == side] for side in ("train", "val", "test")}
    check_patients(f"{data}: its column split", sides, {s.case: s.patient for s in sources})
    return replace(found, sources=sources, classes=classes, called=called)


def given_folds(found: Found, data: Path, splits: str = "") -> tuple[Fold, ...]:
    """The folds that the user or the data set gives; () where neither does.

    Args:
        found: the data set's cases.
        data: its path, for messages.
        splits: the user's file, as `folds_of` takes it; "": the data set's own.

    Raises:
        VoxelscaleError: a fold names an unknown case, or has a case or a patient on both sides.
    """
    file = Path(splits).expanduser() if splits else None if found.folds else found.splits
    where, cases = str(file or f"{data}: its folds"), {source.case for source in found.sources}
    of_series = {source.series: source.case for source in found.sources if source.series}

    def called(name: str) -> str | None:
        known = (found.called.get(own, own) for own in possible_names(name))
        return next((case for case in known if case in cases), of_series.get(name))

    folds = (
        folds_of(where, read_json_value(file), called)
        if file
        else tuple(
            Fold(
                train=tuple(map(found.called.__getitem__, f.train)),
                val=tuple(map(found.called.__getitem__, f.val)),
            )
            for f in found.folds
        )
    )
    check_folds(where, folds, {source.case: source.patient for source in found.sources})
    lost = cases - {case for fold in folds for case in (*fold.train, *fold.val)}
    if folds and lost:
        notice(f"{where}: {count(len(lost), 'case')} in no fold")
    return folds


def list_scans(
    path: Path, layout: str = "auto", names: Names | None = None, reading: ReadingConfig | None = None
) -> list[Source]:
    """The scans to read, with or without labels.

    Args:
        path: a data set as `list_sources` takes it, its test scans included; one scan (a file, or a DICOM
            folder); or a folder of scans (files, and DICOM at any depth).
        reading: what the user calls the channels; None: as the data set calls them.

    Raises:
        VoxelscaleError: there is no scan.
    """
    names, reading = names or Names(), reading or ReadingConfig()
    layout = _settled(path, layout, None)
    if layout not in ("", "dicom"):
        found = _read(path, layout, None, names, reading, labelled=False)
        sources = [*found.sources, *found.tests]
        _report(layout, sources, replace(found, tests=()))
    else:
        images = next((path / i for i, _ in tables.PAIRS if (path / i).is_dir()), path)
        sources = _loose_scans(images, names, reading.channels)
    return _distinct(path, _named(path, sources, names, layout))


def detect_layout(data: Path, annotations: Path | None = None) -> str:
    """One of the `LAYOUTS`, or "" where it is none of them."""
    if data.is_file():
        is_json = data.suffix.lower() == ".json"
        return challenges.layout_of_json(data) if is_json else "csv" * (data.suffix.lower() == ".csv")
    if not data.is_dir():
        return ""
    if (data / "dataset.csv").is_file():
        return "csv"
    if (data / JSON).is_file() and (layout := challenges.layout_of_json(data / JSON)):
        return layout
    if challenges.luna16_table(data, annotations) and challenges.luna16_scans(data):
        return "luna16"
    if any(p.is_dir() and p.name.startswith("subset") for p in visible(data)) and challenges.luna16_scans(
        data
    ):
        return "luna16"
    if tables.find_pair(data):
        return "folders"
    if any((data / images).is_dir() for images, _ in tables.PAIRS) or not trees.holds_dicom(data):
        return ""
    return "lidc" if trees.lidc_tables(annotations or data) else "dicom"


def _settled(data: Path, layout: str, annotations: Path | None) -> str:
    if layout != "auto" and layout not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise VoxelscaleError(f"--layout {layout}: no such layout", f"use auto or one of {known}")
    if not data.exists():
        raise VoxelscaleError(f"{data}: no such file or folder", "check the path")
    if annotations is not None and not annotations.exists():
        raise VoxelscaleError(f"{annotations}: no such file or folder", "check --annotations")
    return detect_layout(data, annotations) if layout == "auto" else layout


def _read(
    data: Path,
    layout: str,
    annotations: Path | None,
    names: Names,
    reading: ReadingConfig,
    *,
    labelled: bool = True,
) -> Found:
    table = data if data.is_file() else data / ("dataset.csv" if layout == "csv" else JSON)
    folder, asked = data.parent if data.is_file() else data, reading.channels
    if layout == "csv":
        found = tables.from_csv(table, asked, labelled=labelled)
    elif layout == "folders":
        found = tables.from_folders(folder, asked)
    elif layout == "msd":
        found = challenges.from_decathlon(table, asked)
    elif layout == "nnunet":
        found = challenges.from_nnunet(table, asked)
    else:
        if layout == "luna16":
            found = challenges.from_luna16(folder, annotations)
        elif layout == "lidc":
            found = trees.from_lidc(folder, names, annotations)
        else:
            found = trees.from_dicom(folder, names, annotations)
        only = channelled.settled(data, ("CT",), asked)
        return found if only == ONE_CT else _all_of(found, only)
    found = channelled.with_colours(replace(found, sources=with_patients(found.sources, names)))
    if not labelled:
        return found
    sources, remarks = tables.with_spheres(found.sources)
    return replace(found, sources=sources, remarks=(*found.remarks, *remarks))


def _all_of(found: Found, channels: tuple[Channel, ...]) -> Found:
    sources = [replace(source, channels=channels) for source in found.sources]
    return replace(found, sources=sources, channels=channels)


def _loose_scans(path: Path, names: Names, asked: Sequence[str]) -> list[Source]:
    """A scan, or the scans of a folder at any depth: files by their names, DICOM series as in a tree."""
    if not path.is_dir():
        return _loose_file(path, names, asked)
    from voxelscale.formats import is_segmentation

    found = without_pictures([file for file in files_below(path) if _is_scan_file(file)])
    drawn = {file for file in found if is_segmentation(file)}
    if drawn:
        notice(f"{path}: {count(len(drawn), 'segmentation')} of 3D Slicer left out")
    files = _unlabelled([file for file in found if file not in drawn], path, asked)
    scans = [*files, *trees.scans_in(path, names)]
    if not scans:
        hint = "name a scan, a DICOM folder, a folder of scans, or a CSV with the columns image,label"
        raise VoxelscaleError(f"{path}: no scan found there", hint)
    return scans


def _loose_file(path: Path, names: Names, asked: Sequence[str]) -> list[Source]:
    patient, series = identity(path) or ("", "")
    if not series or names.how == "file":
        own = channelled.NUMBERED.fullmatch(case_name(path))
        if own is None or not (_numbers_channels(path.parent) or len(asked) > 1):
            return _unlabelled([path], path.parent, asked)
        # A file of one channel stands for all of its case.
        beside = channelled.by_case(p for p in visible(path.parent) if p.suffix == path.suffix)
        return _unlabelled(list(beside[own[1]].values()), path.parent, asked)
    case = safe_name(series) if names.how == "series" else names.case(series)
    return [Source(case=case, patient=names.patient(patient), image=path, series=series)]


def _warn_of_other_files(data: Path) -> None:
    """Say which files of other formats in a tree of DICOM are not read, as masks beside their series."""
    files_there = files_below(data) if data.is_dir() else ()
    others = [f for f in files_there if f.suffix.lower() not in PICTURES and _is_scan_file(f)]
    if others:
        files = f"{count(len(others), 'file')} in other formats, as {others[0].relative_to(data)},"
        warn(f"{data}: {files} not read; name scans and masks in a CSV with the columns image,label")


def _unlabelled(paths: Sequence[Path], folder: Path, asked: Sequence[str]) -> list[Source]:
    """Files by their names, which follow those of the folders below `folder` that they lie in."""
    cases: dict[tuple[str, ...], dict[int, Path]] = {}
    twice: list[tuple[tuple[str, ...], dict[int, Path]]] = []
    said: tuple[str, ...] = ()
    for path in paths:
        name, number = case_name(path.absolute()), 0
        own = channelled.NUMBERED.fullmatch(name)
        numbers = own is not None and _numbers_channels(path.parent)
        said = said or (_said_beside(path.parent) if numbers else ())
        if own is not None and (numbers or len(asked) > 1):
            name, number = own[1], int(own[2])
            if number and not (said or asked):
                raise VoxelscaleError(f"{path}: a second channel of {name}", channelled.TO_NAME)
        key = (*path.parent.relative_to(folder).parts, name)
        if path != cases.setdefault(key, {}).setdefault(number, path):
            twice.append((key, {number: path}))  # two files of one name, which `_distinct` tells
    channels = channelled.settled(folder, said, asked)
    every = [*cases.items(), *twice]
    named = called_after([("-".join(key), files[min(files)], ()) for key, files in every])
    sources = [
        channelled.placed(source, files, channels) for source, (_, files) in zip(named, every, strict=True)
    ]
    return list(channelled.with_colours(Found(sources=sources, channels=channels)).sources)


def _said_beside(folder: Path) -> tuple[str, ...]:
    """The channels that the ``dataset.json`` of a folder of images names."""
    table = folder.parent / JSON
    tree = read_json(table) if table.is_file() else {}
    return channelled.said_by(table, tree.get("channel_names", tree.get("modality", {})))


@lru_cache(maxsize=16)
def _numbers_channels(folder: Path) -> bool:
    """Whether a folder of images belongs to a data set of nnU-Net, or of labels without such numbers."""
    data = folder.parent
    if (data / JSON).is_file():
        return folder.name in IMAGE_FOLDERS and challenges.layout_of_json(data / JSON) == "nnunet"
    pair = tables.find_pair(data)
    return pair is not None and pair[0] == folder and tables.numbers_channels(*pair)


def _is_scan_file(path: Path) -> bool:
    """Whether it is a file of one of the formats that keep a scan in one file."""
    from voxelscale.formats import detect_format

    try:
        return path.is_file() and detect_format(path) != "dicom"
    except VoxelscaleError:
        return False


def _named(data: Path, sources: Sequence[Source], names: Names, layout: str) -> list[Source]:
    """The names as they are asked for, where a layout gives others of its own."""
    if layout in ("lidc", "dicom") or names.how in ("auto", "file"):
        return list(sources)
    if names.how == "series":
        without = [source.case for source in sources if not source.series]
        if without:
            hint = "use reading.names=file, or give DICOM"
            raise VoxelscaleError(f"{data}: {without[0]} has no series UID to be named by", hint)
        return [replace(source, case=safe_name(source.series)) for source in sources]
    done = ("case-", "patient-")
    return [
        replace(
            s,
            case=s.case if s.case.startswith(done[0]) and s.series else names.case(s.series or s.case),
            patient=s.patient if s.patient.startswith(done[1]) and s.series else names.patient(s.patient),
        )
        for s in sources
    ]


def _distinct(data: Path, sources: list[Source]) -> list[Source]:
    twice = [case for case, times in Counter(s.case for s in sources).items() if times > 1]
    if twice:
        files = ", ".join(source.image.name for source in sources if source.case == twice[0])
        hint = "give each a name of its own (the column case of a CSV), or remove one of them"
        raise VoxelscaleError(f"{data}: case {twice[0]} occurs twice: {files}", hint)
    return sources


def _report(layout: str, sources: Sequence[Source], found: Found) -> None:
    bare = sum(not source.labels and not source.fault for source in sources)
    parts = [f"layout: {LAYOUTS[layout]}, {count(len(sources), 'case')}"]
    parts += [f"{bare} without labels"] if bare else []
    several = sum(len(source.labels) > 1 for source in sources)
    parts += [f"{several} with several label files, which are merged"] if several else []
    parts += [f"{count(len(found.tests), 'test scan')} left out"] if found.tests else []
    notice(", ".join(parts))
    if any(source.image.suffix.lower() in PICTURES for source in sources):
        notice("pictures: a pixel counts as 1 mm, so every size in mm is in pixels")
    for line in (channelled.remark(found.channels), *found.remarks):
        if line:
            (warn if line.startswith(WARNING) else notice)(line.removeprefix(WARNING))


def _unknown(data: Path) -> VoxelscaleError:
    if data.is_dir() and (data / "cases").is_dir() and (data / JSON).is_file():
        hint = "name the folder of the scans; a store is what prepare writes"
        return VoxelscaleError(f"{data}: a store, not a data set", hint)
    hint = (
        "name a CSV with the columns image,label, a folder with images/ and labels/, one of DICOM series, "
        f"or one as {', '.join(list(LAYOUTS.values())[2:6])} have it"
    )
    return VoxelscaleError(f"{data}: no data set found there", hint)
