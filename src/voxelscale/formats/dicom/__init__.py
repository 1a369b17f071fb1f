"""DICOM as it comes: folders nested at will, several patients and series, other objects among them.

`header` (with `elements`) reads what is needed of a file, `acquisitions` tells the scans of a series apart,
`stack` finds the lattice of a scan's slices, `voxels` (with `codec`) brings their values onto it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.console import count, first_and_more, notice, warn
from voxelscale.errors import VoxelscaleError
from voxelscale.files import files_below
from voxelscale.formats._voxels import Opened
from voxelscale.formats.dicom import tags
from voxelscale.formats.dicom.acquisitions import choose, separate, several
from voxelscale.formats.dicom.elements import DamagedError, is_dicom, label_of
from voxelscale.formats.dicom.header import (
    MARKS,
    Frame,
    Header,
    read_header,
)
from voxelscale.formats.dicom.stack import are_parallel, at_one_place, stack
from voxelscale.formats.dicom.voxels import check_claims, read_classes, read_voxels, slices_of

KEPT = {"SEG", "RTSTRUCT"}
"""Objects that `find_series` lists although they are no volumes, each file by itself."""

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
"""Of files that are meant to be DICOM whatever they hold."""

APPLE_DOUBLE = b"\0\x05\x16\x07"
"""How files begin that macOS leaves on other systems' disks, as ``._1.dcm`` beside ``1.dcm`` (RFC 1740)."""

MOST_SCOUTS = 3
"""A series of so many images that look different ways is one of localizers."""

LISTED = 4
"""So many series a message names."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """What belongs together in a study.

    Attributes:
        uid: SeriesInstanceUID.
        patient: PatientID, or StudyInstanceUID where there is none: for grouping only, never shown.
        study: StudyInstanceUID.
        modality: "CT", "SEG", "RTSTRUCT", ...
        files: of a volume in the order of its slices along their normal, else by name.
        doubtful: damaged and empty files beside them, which may be slices of it.
        refers_to: SeriesInstanceUIDs that a SEG or RTSTRUCT belongs to.
        frames_of_reference: UIDs of the systems of coordinates that its positions count in.
    """

    uid: str
    patient: str = field(repr=False)
    study: str
    modality: str
    files: tuple[Path, ...]
    doubtful: tuple[Path, ...] = ()
    refers_to: tuple[str, ...] = ()
    frames_of_reference: tuple[str, ...] = ()


def matches(path: Path, head: bytes) -> bool:
    """Whether a file's first bytes are DICOM's."""
    return is_dicom(head)


def find_series(folder: Path) -> list[Series]:
    """The volumes, SEG and RTSTRUCT in a folder, however deep, in the order of their first files.

    What else is there (localizers, reports, dose sheets, single images, damaged files) is left out and
    counted in a notice; files that are no DICOM are passed over.

    Raises:
        VoxelscaleError: there is no such folder.
    """
    if not folder.is_dir():
        raise VoxelscaleError(f"{folder}: no such folder", "check the path")
    headers, broken = _headers(_files_below(folder))
    left_out = Counter("damaged or empty file" for _ in broken)
    found = []
    for group in _groups(headers):
        first = group[0]
        if first.modality in KEPT:
            found += [_series([header]) for header in group]
            continue
        left_out.update(header.left_out for header in group if header.left_out)
        if volume := _volume(group, left_out):
            found.append(replace(_series(volume), doubtful=tuple(_doubtful(volume, broken))))
    _report(folder, left_out, ())
    return sorted(found, key=lambda series: min(series.files))


def open_scan(
    path: Path,
    series: str = "",
    fill_gaps: int = 0,
    files: Sequence[Path] = (),
    select: Sequence[str] = (),
) -> Opened:
    """A series as one scan in HU, slices in the order of their places in the patient.

    Doubled slices are dropped; a tilted gantry and uneven steps are resampled linearly onto an upright,
    even lattice; a notice says so. What belongs to the series and is left out is named in a warning.

    Args:
        path: a folder, searched to any depth; or one file of the series, whose folder is searched. Where
            the series holds several acquisitions, that file's is taken.
        series: SeriesInstanceUID; needed where a folder holds several.
        fill_gaps: how many slices in a row may be missing; they are interpolated linearly.
        files: those of the series (and the doubtful ones), where they are known: no others are opened.
        select: ``attribute=value`` of the acquisition or reconstruction to take, where the series holds
            several (see `acquisitions`).

    Raises:
        VoxelscaleError: there is no such series or more than one, it holds several acquisitions and none is
            chosen, slices are missing, contradict each other, are damaged, or have a header that cannot be
            read.
    """
    if not files:
        files = list(_files_below(path) if path.is_dir() else _files_beside(path))
    elif gone := [file for file in files if not (file.is_file() or file.is_symlink())]:
        # What is missing at an end of the scan nobody would miss.
        raise VoxelscaleError(f"{gone[0]}: no such file, and is a slice", "was it moved? Start again")
    headers, broken = _headers(files)
    if broken and not headers:
        raise _damaged(broken[0])
    left_out = Counter("damaged or empty file" for _ in broken)
    group = _chosen(path, headers, series, left_out)
    for file in _doubtful(group, broken):
        raise _damaged(file)
    frames, notes = _with_orientations([frame for header in group for frame in header.frames])
    check_claims([frame.pixels for frame in frames])
    ct = group[0].modality in ("CT", "")
    frames, doubled = _one_scan(path, frames, select, ct)
    if len(frames) < 2:
        raise VoxelscaleError(f"{path}: 2-D: a single slice", "give the folder with the whole series")
    plan = stack(path, frames, fill_gaps)
    lost = [header for header in headers if header.left_out and _key(header) == _key(group[0])]

    def load() -> NDArray[Any]:
        array = read_voxels(plan, ct=ct)
        _warn_of(path, frames, lost)
        # A file is asked for by name: what lies beside it is not news.
        _report(path, left_out if path.is_dir() else Counter(), (*notes, *doubled, *plan.notes))
        return array

    def load_classes() -> NDArray[Any]:
        return read_classes(plan)

    return Opened(grid=plan.grid, load=load, slices=plan.slices, load_classes=load_classes)


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that `open_scan` looks at: of a folder all, of a slice those beside it, of a SEG itself."""
    files = _files_below(path) if path.is_dir() else _files_beside(path)
    if path.is_file() and any(header.modality in KEPT for header in _headers([path])[0]):
        files = iter((path,))
    return tuple(file for file in files if file.is_file())


def scan_header(path: Path) -> Header | None:
    """A header of the series that a folder is read as, or of a file; None where there is none.

    Localizers, reports and other objects may lie before its slices. Where a folder holds several series,
    which cannot be read without choosing one, it is one of them; where none, of the first object there.
    """
    if not path.is_dir():
        headers, _ = _headers([path])
        return headers[0] if headers else None
    groups: dict[tuple[str, str, str], list[Header]] = {}
    for file in _files_below(path):
        for header in _headers([file])[0]:
            group = groups.setdefault(_key(header), [])
            group.append(header)
            # A scan for certain: the other hundreds of its headers are not needed.
            if header.modality not in KEPT and len(_images(group)) > MOST_SCOUTS:
                return _images(group)[0]
    volumes = (_volume(g, Counter()) for g in groups.values() if g[0].modality not in KEPT)
    # Whose a folder without a scan is must be known, too: its name may be the patient's.
    others = (header for group in groups.values() for header in group)
    return next((volume[0] for volume in volumes if volume), None) or next(others, None)


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file, hidden ones too: some archives name files by a dot and a number."""
    return files_below(folder, hidden=True, unreadable=_unreadable)


def _unreadable(error: OSError) -> None:
    warn(f"{error.filename}: cannot be read ({error.strerror}); what lies there is left out")


def _files_beside(path: Path) -> Iterator[Path]:
    yield from sorted(path.parent.iterdir())


def _headers(files: Iterable[Path]) -> tuple[list[Header], list[Path]]:
    """What is DICOM among the files, and what may be meant to be but is damaged or empty."""
    headers, broken = [], []
    for file in files:
        try:
            # A pipe would be waited for.
            header = read_header(file) if file.is_file() else None
        except DamagedError:
            broken.append(file)
            continue
        if header is not None:
            headers.append(header)
        elif _is_lost(file):
            broken.append(file)
    return headers, broken


def _is_lost(file: Path) -> bool:
    """Whether a file that is no DICOM by its content may have been: empty, a link that leads nowhere, or
    only its name says so."""
    if not file.exists():
        return file.is_symlink()
    if not file.is_file():
        return False
    if file.name.startswith("._"):
        with file.open("rb") as handle:
            if handle.read(4) == APPLE_DOUBLE:
                return False
    return file.stat().st_size == 0 or file.suffix.lower() in DICOM_SUFFIXES


def _doubtful(group: Sequence[Header], broken: Sequence[Path]) -> Iterator[Path]:
    """The damaged files among the slices, which are of them, as far as anyone can tell; at an end none
    would be missed."""
    folders = {header.path.parent for header in group}
    names = {header.path.suffix for header in group}
    for file in broken:
        there = file.stat().st_size if file.exists() else 0
        if file.parent in folders and (file.suffix in names or there > 0):
            yield file


def _damaged(file: Path) -> VoxelscaleError:
    hint = "copy or export it again, or remove it if it is no slice of this series"
    if not file.exists():
        return VoxelscaleError(f"{file}: a link that leads nowhere, and may be a slice", hint)
    return VoxelscaleError(f"{file}: damaged or empty, and may be a slice", hint)


def thickness_of(path: Path) -> float | None:
    """SliceThickness in mm of the scan that a folder is read as, or of a file; None: it does not say.

    For labels that go by it; where the slices lie is another matter (see `stack`).
    """
    header = scan_header(path)
    frame = next(iter(header.frames), None) if header is not None else None
    return frame.thickness if frame is not None and frame.thickness > 0 else None


def _key(header: Header) -> tuple[str, str, str]:
    return header.patient, header.study, header.series


def subject_of(path: Path) -> tuple[str, str]:
    """Modality and BodyPartExamined of a DICOM file, or of a folder's first image; "" where not said."""
    for file in _files_below(path) if path.is_dir() else (path,):
        headers, _ = _headers([file])
        for header in headers:
            if not header.left_out:
                return header.modality, header.body_part.upper()
    return "", ""


def _groups(headers: Iterable[Header]) -> list[list[Header]]:
    groups: dict[tuple[str, str, str], list[Header]] = {}
    for header in headers:
        groups.setdefault(_key(header), []).append(header)
    return list(groups.values())


def _images(group: Iterable[Header]) -> list[Header]:
    """The files of a series that may be its slices, those with a fault too."""
    return [header for header in group if not header.left_out]


def _volume(group: Sequence[Header], left_out: Counter[str]) -> list[Header]:
    """The files of a series that make up a volume, if they do; else they are counted."""
    kept = _images(group)
    frames = [frame for header in kept for frame in header.frames]
    faulty = any(header.fault for header in kept)
    if len(frames) == 1 and not faulty:
        left_out["single image"] += 1
        return []
    known = [frame for frame in frames if frame.orientation is not None]
    if 1 < len(frames) <= MOST_SCOUTS and not faulty and known and not are_parallel(known):
        left_out["localizer"] += len(kept)
        return []
    return kept


def _with_orientations(frames: list[Frame]) -> tuple[list[Frame], list[str]]:
    """The slices, those without an orientation with that of the others; and what is to be reported.

    Raises:
        VoxelscaleError: none has one, or the others' differ.
    """
    known = [frame for frame in frames if frame.orientation is not None]
    bare = [frame.pixels.path for frame in frames if frame.orientation is None]
    if not bare:
        return frames, []
    if not known or not are_parallel(known):
        why = "no slice of the series has one" if not known else "those of the other slices differ"
        what = f"{bare[0]}: {label_of(tags.ORIENTATION)} is missing, and {why}"
        raise VoxelscaleError(what, "export the series again, or give each part a folder of its own")
    filled = [f if f.orientation else replace(f, orientation=known[0].orientation) for f in frames]
    return filled, [f"{len(bare)} of {len(frames)} slices have no orientation: that of the others taken"]


def _one_scan(
    path: Path, frames: list[Frame], select: Sequence[str], ct: bool
) -> tuple[list[Frame], list[str]]:
    """The slices of the one scan that is meant, one a place; and what is to be reported.

    Raises:
        VoxelscaleError: the series holds several and none is chosen, or slices at one place differ.
    """
    parts = separate(frames)
    notes = []
    if len(parts) > 1 and (part := choose(path, parts, select, None if path.is_dir() else path)):
        frames, notes, parts = (
            list(part.frames),
            [f"one of {len(parts)} in the series taken: {part}"],
            [part],
        )
    kept, contradiction = _without_doubles(frames, ct)
    # Copies of the whole series may differ in a time; then nothing is left of them.
    if len(parts) > 1 and (contradiction or len(separate(kept)) > 1):
        raise several(path, parts, f"{contradiction}: " if contradiction else "")
    if contradiction:
        hint = "two reconstructions or time points in one series: give each a folder of its own"
        raise VoxelscaleError(f"{path}: {contradiction}", hint)
    doubled = len(frames) - len(kept)
    return kept, [*notes, *([f"{count(doubled, 'doubled slice')} dropped"] if doubled else [])]


def _warn_of(path: Path, frames: Sequence[Frame], lost: Sequence[Header]) -> None:
    """Say what a reader of the result must know: slices left out, values that may be no HU."""
    for why in dict.fromkeys(header.left_out for header in lost):
        names = [header.path.name for header in lost if header.left_out == why]
        warn(f"{path}: of this series left out: {first_and_more(names, LISTED)} ({why})")
    bare = [frame for frame in frames if not frame.scaled]
    if bare:
        which = f"{len(bare)} of {len(frames)} slices have" if len(bare) < len(frames) else "it has"
        what = f"{which} no {label_of(tags.INTERCEPT)}, which a CT must have"
        warn(f"{path}: {what}: stored values taken as HU")


def _series(group: Sequence[Header]) -> Series:
    first = group[0]
    files = [header.path for header in group]
    known = [f for header in group for f in header.frames if f.orientation is not None]
    if first.modality not in KEPT and known and all(header.frames for header in group):
        right, down = np.asarray(known[0].orientation).reshape(2, 3)
        normal = np.cross(right, down)
        heights = [min(float(normal @ np.asarray(f.position)) for f in header.frames) for header in group]
        files = [files[i] for i in np.argsort(heights, kind="stable")]
    return Series(
        uid=first.series,
        patient=first.patient,
        study=first.study,
        modality=first.modality,
        files=tuple(files),
        frames_of_reference=first.frames_of_reference,
        refers_to=tuple(dict.fromkeys(uid for header in group for uid in header.refers_to)),
    )


def _chosen(path: Path, headers: Sequence[Header], series: str, left_out: Counter[str]) -> list[Header]:
    """The files of the one series that is meant."""
    groups = _groups(headers)
    if not path.is_dir():
        groups = [g for g in groups if path.name in {header.path.name for header in g}]
        if not groups:
            hint = "copy it again, or give the folder that holds the slices"
            raise VoxelscaleError(f"{path}: not a readable DICOM image", hint)
        series = series or groups[0][0].series
    if series and not any(g[0].series == series for g in groups):
        known = ", ".join(sorted({g[0].series for g in groups})[:LISTED])
        raise VoxelscaleError(f"{path}: no series {series} there", f"it holds {known}" if known else "")
    groups = [g for g in groups if not series or g[0].series == series]
    volumes = [volume for g in groups if (volume := _volume(g, left_out))]
    if len(volumes) == 1:
        volume = volumes[0]
        _check_faults(volume)
        # What is left out of the series itself is named in a warning.
        left_out.update(h.left_out for h in headers if h.left_out and _key(h) != _key(volume[0]))
        return volume
    if volumes:
        raise _several(path, volumes)
    raise _none(path, [header for g in groups for header in g])


def _check_faults(group: Sequence[Header]) -> None:
    faulty = [header for header in group if header.fault]
    if faulty:
        first = faulty[0]
        more = f" (and {len(faulty) - 1} more files of this series)" if len(faulty) > 1 else ""
        hint = "export the series again, or correct the attribute with a DICOM editor"
        raise VoxelscaleError(f"{first.path}: {first.fault}{more}", hint)


def _several(path: Path, volumes: Sequence[Sequence[Header]]) -> VoxelscaleError:
    each = [
        f"{v[0].series} ({v[0].modality or 'unknown'}, {sum(len(h.frames) for h in v)} slices)"
        for v in volumes
    ]
    hint = "choose one by its UID (series), or name one of its files, or give it a folder of its own"
    listed = first_and_more(each, LISTED)
    return VoxelscaleError(f"{path}: {len(volumes)} series in one folder: {listed}", hint)


def _none(path: Path, headers: Sequence[Header]) -> VoxelscaleError:
    reasons = {header.left_out for header in headers}
    if not headers:
        hint = "give the folder that holds the slices"
        return VoxelscaleError(f"{path}: no DICOM series in this folder", hint)
    if "" in reasons:
        frames = [frame for header in headers if not header.left_out for frame in header.frames]
        if len(frames) == 1:
            return VoxelscaleError(f"{path}: 2-D: a single slice", "give the folder with the whole series")
        return VoxelscaleError(f"{path}: only localizers there", "give the folder that holds the slices")
    hint = "give the folder that holds the slices of a CT"
    return VoxelscaleError(f"{path}: no volume there, but: {', '.join(sorted(reasons))}", hint)


def _without_doubles(frames: list[Frame], ct: bool) -> tuple[list[Frame], str]:
    """One slice a place, where slices at one place are the same; else how two of them differ."""
    kept = []
    for group in at_one_place(frames):
        first = group[0]
        kept.append(first)
        for other in group[1:]:
            if first.index == other.index and os.path.samefile(first.pixels.path, other.pixels.path):
                continue
            if not np.allclose(first.position or 0, other.position or 0, atol=0.01):
                return kept, f"two slices at one height, beside each other: {_both(first, other)}"
            (_, picture), (_, another) = slices_of([first, other], ct=ct)
            if not np.array_equal(picture, another):
                return kept, f"two slices at one place with different pixels: {_both(first, other)}"
    return kept, ""


def _both(first: Frame, other: Frame) -> str:
    """Two slices as messages call them, and what their headers say differently."""
    names = " and ".join(dict.fromkeys(f"{f.pixels.path.name}" for f in (first, other)))
    if first.pixels.path == other.pixels.path:
        names += f", frames {first.index + 1} and {other.index + 1}"
    elif first.sop_uid and first.sop_uid == other.sop_uid:
        names += ", with one SOPInstanceUID"
    ones, others = dict(first.marks), dict(other.marks)
    differ = [name for name in MARKS if ones.get(name) != others.get(name)]
    return f"{names} (they differ in {', '.join(differ)})" if differ else names


def _report(path: Path, left_out: Counter[str], notes: Sequence[str]) -> None:
    counts = [count(n, what) for what, n in sorted(left_out.items())]
    parts = [*([f"left out: {', '.join(counts)}"] if counts else []), *notes]
    if parts:
        notice(f"{path}: {'; '.join(parts)}")
