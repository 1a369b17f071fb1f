"""NRRD: .nrrd, or .nhdr with its data file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from voxelscale.errors import VoxelscaleError
from voxelscale.formats._itk import check_data_file, read_image
from voxelscale.geometry import Scan


def matches(path: Path, head: bytes) -> bool:
    """Whether it begins with NRRD's magic."""
    return head.startswith(b"NRRD000")


def read(path: Path) -> Scan:
    """The scan of a file, in LPS whatever space it declares.

    Raises:
        VoxelscaleError: as `voxelscale.formats._itk.read_image`; or a spacing that is not above 0, or
            a missing data file.
    """
    fields = _header(path)
    if "spacings" in fields:
        steps = [_number(word) for word in fields["spacings"].split()]
        if any(step is not None and not step > 0 for step in steps):
            raise VoxelscaleError(f"{path}: a spacing of {fields['spacings']} mm", "write its header anew")
    for vector in re.findall(r"\(([^)]*)\)", fields.get("space directions", "")):
        steps = [_number(word) for word in vector.split(",")]
        if not np.linalg.norm([np.nan if s is None else s for s in steps]) > 0:
            raise VoxelscaleError(f"{path}: a voxel axis of ({vector})", "write its header anew")
    data = fields.get("data file", fields.get("datafile", ""))
    if data and "%" not in data and data != "LIST":
        check_data_file(path, data)
    return read_image(path, "NrrdImageIO")


def _header(path: Path) -> dict[str, str]:
    with path.open("rb") as handle:
        text = handle.read(65536).decode("latin-1")
    fields = {}
    for line in text.splitlines()[1:]:
        if not line.strip():
            break
        key, sign, value = line.partition(":")
        if sign and not line.startswith("#"):
            fields[key.strip().lower()] = value.lstrip("=").strip()
    return fields


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
