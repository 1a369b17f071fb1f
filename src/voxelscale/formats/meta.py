"""MetaImage: .mha, or .mhd with its .raw."""

from __future__ import annotations

import re
from pathlib import Path

from voxelscale.errors import VoxelscaleError
from voxelscale.formats._itk import check_data_file, read_image
from voxelscale.geometry import Scan


def matches(path: Path, head: bytes) -> bool:
    """Whether it begins with MetaIO's text header."""
    return re.match(rb"\s*(ObjectType\s*=\s*Image|Comment\s*=|NDims\s*=)", head) is not None


def read(path: Path) -> Scan:
    """The scan of a file.

    Raises:
        VoxelscaleError: as `voxelscale.formats._itk.read_image`; or a spacing that is not above 0, or
            a missing data file.
    """
    fields = _header(path)
    for key in ("ElementSpacing", "ElementSize"):
        steps = _numbers(fields.get(key, ""))
        if key in fields and (not steps or not all(step > 0 for step in steps)):
            raise VoxelscaleError(
                f"{path}: a spacing of {fields[key]} mm", f"write its header anew ({key})"
            )
    data = fields.get("ElementDataFile", "")
    if data and data.upper() not in ("LOCAL", "LIST") and "%" not in data:
        check_data_file(path, data)
    return read_image(path, "MetaImageIO")


def _header(path: Path) -> dict[str, str]:
    with path.open("rb") as handle:
        text = handle.read(65536).decode("latin-1")
    fields = {}
    for line in text.splitlines():
        key, sign, value = line.partition("=")
        if not sign:
            break
        fields[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            break
    return fields


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split()]
    except ValueError:
        return []
