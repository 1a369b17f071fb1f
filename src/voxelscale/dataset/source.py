"""A case of a data set before it is read, and what its name is made of."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from voxelscale.channels import ONE_CT, Channel
from voxelscale.classes import LESION, Classes
from voxelscale.console import count, first_of
from voxelscale.dataset.folds import Fold
from voxelscale.dataset.names import Names
from voxelscale.errors import VoxelscaleError
from voxelscale.tables import content_of

LARGEST_JSON = 2**26
"""Bytes of a JSON that says what a data set holds; a line a case, so some 100,000 of them."""

LONGEST_PATH = 2048
"""Characters of a path in a table; systems allow 4,096 with the folder that it counts from."""

LONGEST_NAME = 120
"""Bytes of a case's name; file systems allow 255 with everything that is added."""

RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}
"""Names that Windows keeps for devices, whatever their extension."""


MOST_NAMED = 10
"""Files that a message names at most."""

SPLITS = "splits_final.json"
"""nnU-Net's folds."""

PICTURES = (".png", ".tif", ".tiff")
"""Names of pictures end so."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One case before it is read.

    Attributes:
        case: its name, unique, fit for a file name.
        patient: whose it is; cases of one patient stay on one side of a split. Of DICOM a keyed hash.
        image: file or DICOM folder.
        labels: the files that say where the lesions are (masks, DICOM SEG or RTSTRUCT, LIDC's XML, a CSV
            of spheres); empty where there are none.
        series: SeriesInstanceUID, where it is known.
        files: those of the image, where it is a series among others, and damaged ones that may be its.
        more: those of the second channel on, in their order.
        volumes: how many channels `image` itself holds, along a fourth axis or as colours; then there
            is no `more`.
        channels: what they are.
        classes: what its labels distinguish.
        fault: why the case cannot be used, where that is known before it is read.
        remedy: how to fix that, if not by keeping one of several files.
        surveyed: whether the table of spheres speaks of every scan, so that one without a row is healthy.
        split: train, val or test, where its table says so.
    """

    case: str
    patient: str
    image: Path
    labels: tuple[Path, ...] = ()
    series: str = ""
    files: tuple[Path, ...] = field(default=(), repr=False)
    more: tuple[Path, ...] = ()
    volumes: int = 1
    channels: tuple[Channel, ...] = ONE_CT
    classes: Classes = LESION
    fault: str = ""
    remedy: str = ""
    surveyed: bool = False
    split: str = ""

    @property
    def label_names(self) -> str:
        """The label files, for a message."""
        return ", ".join(map(str, self.labels))

    def without_paths(self, message: str) -> str:
        """A message with the case's name for its files, which may be named after the patient."""
        paths = [self.image, *self.more, *self.labels]
        for named in sorted((str(name) for p in paths for name in (p, p.name)), key=len, reverse=True):
            message = message.replace(named, self.case)
        return message


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a layout's reader found.

    Attributes:
        sources: the cases that are meant for training.
        tests: the data set's own test scans, without labels.
        remarks: what a person should know, one line each.
        classes: what the labels distinguish.
        channels: of every image.
        folds: of a table that has a column for them, by the names of `called`.
        splits: a file of folds that lies beside the data set's own table.
        called: what each case is called, by the name that the layout gives it.
    """

    sources: Sequence[Source]
    tests: Sequence[Source] = ()
    remarks: tuple[str, ...] = ()
    classes: Classes = LESION
    channels: tuple[Channel, ...] = ONE_CT
    folds: tuple[Fold, ...] = ()
    splits: Path | None = None
    called: Mapping[str, str] = field(default_factory=dict)


def case_name(path: Path) -> str:
    """A file's name without the extensions of scan formats; a folder's name as it is."""
    if path.is_dir():
        return path.name
    ends = r"nii|mha|mhd|z?raw|hdr|img|(seg\.)?(nrrd|nhdr)|dcm|png|tiff?"
    return re.sub(rf"\.({ends})(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def is_path(text: str) -> bool:
    """Whether a file can be called so: what systems refuse must not reach them from a table."""
    try:
        parts = os.fsencode(text).split(b"/")
    except UnicodeEncodeError:
        return False
    return "\0" not in text and len(text) <= LONGEST_PATH and max(map(len, parts)) <= 255


def safe_name(name: str) -> str:
    """The name as a file may be called on any system: letters and digits of any script stay (NFC).

    What could mean something to a path or a terminal becomes "_"; it is at most `LONGEST_NAME` bytes long.
    """
    composed = unicodedata.normalize("NFC", name)
    kept = "".join(c if c in "._-" or unicodedata.category(c)[0] in "LMN" else "_" for c in composed)
    safe = kept.lstrip(".").rstrip(".") or "case"
    if safe.split(".")[0].upper() in RESERVED:
        safe = f"_{safe}"
    if len(safe.encode()) <= LONGEST_NAME:
        return safe
    cut = safe.encode()[: LONGEST_NAME - 9].decode(errors="ignore")
    return f"{cut}-{_digest(name)[:8]}"


def safe_names(names: Sequence[str]) -> list[str]:
    """`safe_name` of each; where different names become one, all but a name that is safe get a suffix.

    A name that occurs twice is left so: it is unknown which is which.
    """
    safe = [safe_name(name) for name in names]
    different = Counter(one for one, _ in set(zip(safe, names, strict=True)))
    crowded = {one for one, times in different.items() if times > 1}
    return [
        f"{one}-{_digest(name)[:6]}" if one in crowded and one != name else one
        for one, name in zip(safe, names, strict=True)
    ]


def called_after(cases: Sequence[tuple[str, Path, tuple[Path, ...]]]) -> list[Source]:
    """A source of each name, image and labels, its own patient."""
    safe = safe_names([name for name, _, _ in cases])
    return [
        Source(case=case, patient=case, image=image, labels=labels)
        for case, (_, image, labels) in zip(safe, cases, strict=True)
    ]


def unlisted(what: str, there: Iterable[Path], listed: Iterable[Path]) -> tuple[str, ...]:
    """A warning that names files which belong to no case."""
    known = {path.resolve() for path in listed}
    lost = [path.name for path in there if path.resolve() not in known]
    named = first_of(lost, MOST_NAMED)
    return (f"warning: {count(len(lost), what[:-1])} of no listed case: {named}",) if lost else ()


def possible_names(name: str) -> tuple[str, ...]:
    """What `safe_names` may call a case."""
    safe = safe_name(name)
    return name, safe, f"{safe}-{_digest(name)[:6]}"


def without_pictures(paths: Sequence[Path]) -> list[Path]:
    """Scans without the pictures among them, which are previews; pictures alone are scans themselves."""
    scans = [path for path in paths if path.suffix.lower() not in PICTURES]
    return scans or list(paths)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, hidden entries aside, by name."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        hint = "check the path and its permissions"
        raise VoxelscaleError(f"{folder}: cannot be read ({error.strerror})", hint) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        VoxelscaleError: it cannot be read, or is no such JSON.
    """
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise VoxelscaleError(f"{path}: holds no JSON object", "copy it again")
    return content


def read_json_value(path: Path) -> Any:
    """A JSON file that holds anything.

    Raises:
        VoxelscaleError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(content_of(path, LARGEST_JSON))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise VoxelscaleError(f"{path}: not readable as JSON ({reason})", "copy it again") from None


def splits_beside(path: Path) -> Path | None:
    """nnU-Net's file of folds beside a ``dataset.json``, if it is there."""
    splits = path.with_name(SPLITS)
    return splits if splits.is_file() else None


def with_patients(sources: Sequence[Source], names: Names) -> list[Source]:
    """Sources of tables and folders with what the headers of DICOM images say: whose they are.

    Where one image of the data set is DICOM all patients are hashed, so that two cases of one patient
    still agree.
    """
    headers = [identity(source.image) for source in sources]
    if not any(headers):
        return list(sources)
    known = []
    for source, header in zip(sources, headers, strict=True):
        patient, series = header or ("", "")
        said = source.patient != source.case
        whose = source.patient if said or not patient else patient
        known.append(replace(source, patient=names.patient(whose), series=series or source.series))
    return known


def identity(path: Path) -> tuple[str, str] | None:
    """Patient and SeriesInstanceUID of a DICOM file, or of the scan in a folder; None: no DICOM."""
    from voxelscale.formats.dicom import scan_header

    header = scan_header(path)
    return (header.patient, header.series) if header is not None else None
