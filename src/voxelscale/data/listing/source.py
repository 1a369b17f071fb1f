"""A case as it comes, and what its name is made of."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from voxelscale.data.names import Names
from voxelscale.errors import VoxelscaleError
from voxelscale.files import files_below

LARGEST_TABLE = 2**26
"""Bytes of a CSV or JSON that says what a data set holds; a line a case, so some 100,000 of them."""

LONGEST_PATH = 2048
"""Characters of a path in a table; systems allow 4,096 with the folder that it counts from."""

LONGEST_NAME = 120
"""Characters of a case's name; file systems allow 255 bytes with everything that is added."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One case as it comes.

    Attributes:
        case: its name, unique, fit for a file name.
        patient: whose it is; cases of one patient stay on one side of a split. Of DICOM a keyed hash.
        image: file or DICOM folder.
        labels: the files that say where the lesions are (masks, DICOM SEG or RTSTRUCT, LIDC's XML, a CSV
            of spheres); empty where there are none.
        series: SeriesInstanceUID, where it is known.
        files: those of the image, where it is a series among others, and damaged ones that may be its.
        values: mask values that are the lesion, where the data set says so; None: every value above 0.
        fault: why the case cannot be used, where that is known before it is read.
    """

    case: str
    patient: str
    image: Path
    labels: tuple[Path, ...] = ()
    series: str = ""
    files: tuple[Path, ...] = field(default=(), repr=False)
    values: tuple[int, ...] | None = None
    fault: str = ""

    @property
    def label_names(self) -> str:
        """The label files, for a message."""
        return ", ".join(map(str, self.labels))

    def without_paths(self, message: str) -> str:
        """A message with the case's name for its files, which may be called after the patient."""
        paths = [self.image, *self.labels]
        for named in sorted((str(name) for p in paths for name in (p, p.name)), key=len, reverse=True):
            message = message.replace(named, self.case)
        return message


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a layout's reader found.

    Attributes:
        sources: the cases that are meant for training.
        tests: scans that the data set keeps apart, without labels.
        remarks: what a person should know, one line each.
    """

    sources: Sequence[Source]
    tests: Sequence[Source] = ()
    remarks: tuple[str, ...] = ()


def case_name(path: Path) -> str:
    """A file's name without the extensions of scan formats; a folder's name as it is."""
    if path.is_dir():
        return path.name
    ends = r"nii|mha|mhd|z?raw|hdr|img|(seg\.)?(nrrd|nhdr)|dcm"
    return re.sub(rf"\.({ends})(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def is_path(text: str) -> bool:
    """Whether a file can be called so: what systems refuse must not reach them from a table."""
    try:
        parts = os.fsencode(text).split(b"/")
    except UnicodeEncodeError:
        return False
    return "\0" not in text and len(text) <= LONGEST_PATH and max(map(len, parts)) <= 255


def safe_name(name: str) -> str:
    """The name with every character that could mean something to a path replaced, and not too long."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".") or "case"
    if len(safe) <= LONGEST_NAME:
        return safe
    return f"{safe[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, hidden entries aside, by name."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        hint = "check the path and its permissions"
        raise VoxelscaleError(f"{folder}: cannot be read ({error.strerror})", hint) from None


def read_table(path: Path) -> bytes:
    """The bytes of a CSV or JSON file.

    Raises:
        VoxelscaleError: it cannot be read, or is beyond `LARGEST_TABLE`.
    """
    try:
        if not path.is_file():  # a pipe might never end
            raise VoxelscaleError(f"{path}: no such file", "check the path")
        with path.open("rb") as handle:
            content = handle.read(LARGEST_TABLE + 1)
    except OSError as error:
        raise VoxelscaleError(
            f"{path}: cannot be read ({error.strerror})", "check its permissions"
        ) from None
    if len(content) > LARGEST_TABLE:
        raise VoxelscaleError(f"{path}: larger than {LARGEST_TABLE >> 20} MiB", "is this the right file?")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        VoxelscaleError: it cannot be read, or is no such JSON.
    """
    try:
        content = json.loads(read_table(path))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise VoxelscaleError(f"{path}: not readable as JSON ({reason})", "copy it again") from None
    if not isinstance(content, dict):
        raise VoxelscaleError(f"{path}: holds no JSON object", "copy it again")
    return content


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
        known.append(replace(source, patient=names.patient(whose), series=series))
    return known


def identity(path: Path) -> tuple[str, str] | None:
    """Patient and SeriesInstanceUID of a DICOM file, or of the first one in a folder; None: no DICOM."""
    from voxelscale.formats.dicom.elements import DamagedError
    from voxelscale.formats.dicom.header import read_header

    for file in files_below(path) if path.is_dir() else (path,):
        try:
            header = read_header(file) if file.is_file() else None
        except (DamagedError, OSError):
            continue
        if header is not None:
            return header.patient, header.series
        if not path.is_dir():
            return None
    return None
