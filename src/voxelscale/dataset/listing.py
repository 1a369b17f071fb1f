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

from voxelscale.console import count, notice, warn
from voxelscale.dataset import challenges, tables, trees
from voxelscale.dataset.names import Names
from voxelscale.dataset.source import (
    Found,
    Source,
    called_after,
    case_name,
    identity,
    safe_name,
    visible,
    with_patients,
)
from voxelscale.dataset.tables import CHANNEL
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
    data: Path, layout: str = "auto", annotations: Path | None = None, names: Names | None = None
) -> list[Source]:
    """The cases of a data set, in the order of its table or files.

    Args:
        data: a CSV (``image``, ``label``, optionally ``case`` and ``patient``; paths from its folder), a
            ``dataset.json``, or a folder in one of the `LAYOUTS`.
        layout: one of them, or ``auto``.
        annotations: where LIDC's XML, LUNA16's tables or DICOM's SEG and RTSTRUCT lie, if elsewhere.
        names: how cases are called; None: as `prepare` calls them by default.

    Raises:
        VoxelscaleError: it is in none of the layouts, names a case twice, or a table of it leads out of it.
    """
    names = names or Names()
    layout = _settled(data, layout, annotations)
    if not layout:
        raise _unknown(data)
    found = _read(data, layout, annotations, names)
    if layout in ("lidc", "dicom"):
        _warn_of_other_files(data)
    sources = _distinct(data, _named(data, found.sources, names, layout))
    _tell(layout, sources, found)
    return sources


def list_scans(path: Path, layout: str = "auto", names: Names | None = None) -> list[Source]:
    """The scans to read, with or without labels.

    Args:
        path: a data set as `list_sources` takes it, its test scans included; one scan (a file, or a DICOM
            folder); or a folder of scans (files, and DICOM at any depth).

    Raises:
        VoxelscaleError: there is no scan.
    """
    names = names or Names()
    layout = _settled(path, layout, None)
    if layout not in ("", "dicom"):
        found = _read(path, layout, None, names, labelled=False)
        sources = [*found.sources, *found.tests]
        _tell(layout, sources, replace(found, tests=()))
    else:
        images = next((path / i for i, _ in tables.PAIRS if (path / i).is_dir()), path)
        sources = _loose_scans(images, names)
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
    data: Path, layout: str, annotations: Path | None, names: Names, *, labelled: bool = True
) -> Found:
    table = data if data.is_file() else data / ("dataset.csv" if layout == "csv" else JSON)
    folder = data.parent if data.is_file() else data
    if layout == "csv":
        found = tables.from_csv(table, labelled=labelled)
    elif layout == "folders":
        found = tables.from_folders(folder)
    elif layout == "msd":
        found = challenges.from_decathlon(table)
    elif layout == "nnunet":
        found = challenges.from_nnunet(table)
    elif layout == "luna16":
        return challenges.from_luna16(folder, annotations)
    elif layout == "lidc":
        return trees.from_lidc(folder, names, annotations)
    else:
        return trees.from_dicom(folder, names, annotations)
    found = replace(found, sources=with_patients(found.sources, names))
    if not labelled:
        return found
    sources, remarks = tables.with_spheres(found.sources)
    return replace(found, sources=sources, remarks=(*found.remarks, *remarks))


def _loose_scans(path: Path, names: Names) -> list[Source]:
    """A scan, or the scans of a folder at any depth: files by their names, DICOM series as in a tree."""
    if not path.is_dir():
        return [_loose_file(path, names)]
    from voxelscale.formats import is_segmentation

    found = [file for file in files_below(path) if _is_scan_file(file)]
    drawn = {file for file in found if is_segmentation(file)}
    if drawn:
        notice(f"{path}: {count(len(drawn), 'segmentation')} of 3D Slicer left out")
    files = _unlabelled([file for file in found if file not in drawn], path)
    scans = [*files, *trees.scans_in(path, names)]
    if not scans:
        hint = "name a scan, a DICOM folder, a folder of scans, or a CSV with the columns image,label"
        raise VoxelscaleError(f"{path}: no scan found there", hint)
    return scans


def _loose_file(path: Path, names: Names) -> Source:
    patient, series = identity(path) or ("", "")
    if not series or names.how == "file":
        return _unlabelled([path], path.parent)[0]
    case = safe_name(series) if names.how == "series" else names.case(series)
    return Source(case=case, patient=names.patient(patient), image=path, series=series)


def _warn_of_other_files(data: Path) -> None:
    """Say which files of other formats in a tree of DICOM are not read, as masks beside their series."""
    others = [file for file in files_below(data) if _is_scan_file(file)] if data.is_dir() else []
    if others:
        files = f"{count(len(others), 'file')} in other formats, as {others[0].relative_to(data)},"
        warn(f"{data}: {files} not read; name scans and masks in a CSV with the columns image,label")


def _unlabelled(paths: Sequence[Path], folder: Path) -> list[Source]:
    """Files by their names, which follow those of the folders below `folder` that they lie in."""
    names = [(*path.parent.relative_to(folder).parts, _scan_name(path.absolute())) for path in paths]
    return called_after([("-".join(name), path, ()) for name, path in zip(names, paths, strict=True)])


def _scan_name(path: Path) -> str:
    """What a loose file is called: without the channel's number where its data set numbers channels."""
    name = case_name(path)
    channel = CHANNEL.fullmatch(name)
    if channel is None or not _numbers_channels(path.parent):
        return name
    if int(channel[2]):
        raise VoxelscaleError(f"{path}: a second channel of {channel[1]}", tables.ONE_CHANNEL)
    return channel[1]


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


def _tell(layout: str, sources: Sequence[Source], found: Found) -> None:
    bare = sum(not source.labels and not source.fault for source in sources)
    parts = [f"layout: {LAYOUTS[layout]}, {len(sources)} case{'s' * (len(sources) != 1)}"]
    parts += [f"{bare} without labels"] if bare else []
    several = sum(len(source.labels) > 1 for source in sources)
    parts += [f"{several} with several label files, which are merged"] if several else []
    parts += (
        [f"{len(found.tests)} test scan{'s' * (len(found.tests) != 1)} left out"] if found.tests else []
    )
    notice(", ".join(parts))
    for remark in found.remarks:
        (warn if remark.startswith(WARNING) else notice)(remark.removeprefix(WARNING))


def _unknown(data: Path) -> VoxelscaleError:
    if data.is_dir() and (data / "cases").is_dir() and (data / JSON).is_file():
        hint = "name the folder of the scans; a store is what prepare writes"
        return VoxelscaleError(f"{data}: a store, not a data set", hint)
    hint = (
        "name a CSV with the columns image,label, a folder with images/ and labels/, one of DICOM series, "
        f"or one as {', '.join(list(LAYOUTS.values())[2:6])} have it"
    )
    return VoxelscaleError(f"{data}: no data set found there", hint)
