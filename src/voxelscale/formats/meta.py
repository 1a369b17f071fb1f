"""MetaImage: .mha, or .mhd with its .raw.

Source: the MetaIO documentation (https://itk.org/Wiki/MetaIO/Documentation). Positions are LPS mm, as
ITK writes and reads them; ``AnatomicalOrientation`` says in letters what the matrix says in numbers, and
is not looked at, as ITK does not.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.formats._voxels import (
    LONGEST_HEADER,
    MOST_SKIPPED,
    TO_REWRITE,
    Layout,
    Opened,
    check_affine,
    check_header,
    data_files,
    numbers,
    read_voxels,
    whole_numbers,
)
from voxelscale.geometry import Grid, affine_from_itk

TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",  # MetaIO's, whatever the machine's is
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
SYNONYMS = {
    "Position": "Offset",
    "Origin": "Offset",
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}


def matches(path: Path, head: bytes) -> bool:
    """Whether it begins with MetaIO's text header."""
    return re.match(rb"\s*(ObjectType\s*=\s*Image|Comment\s*=|NDims\s*=)", head) is not None


def open_scan(path: Path) -> Opened:
    """The scan of a file.

    Raises:
        VoxelscaleError: its header is not one of a scan, or its voxels cannot be read; see also
            `voxelscale.formats._voxels`.
    """
    with path.open("rb") as handle:
        head = handle.read(LONGEST_HEADER)
    fields, start = _fields(path, head)
    (dims,) = whole_numbers(path, "NDims", fields.get("NDims", ""), 1)
    if not 1 <= dims <= 10:  # as MetaIO has it
        raise VoxelscaleError(f"{path}: claims {dims} dimensions", TO_REWRITE)
    size = whole_numbers(path, "DimSize", fields.get("DimSize", ""), dims)
    (channels,) = whole_numbers(
        path, "ElementNumberOfChannels", fields.get("ElementNumberOfChannels", "1"), 1
    )
    check_header(path, size, channels)
    affine = _affine(path, fields, dims)
    x, y, z = size[:3]
    check_affine(path, (z, y, x), affine)
    layout = _layout(path, fields, (z, y, x), head, start)
    return Opened(
        grid=Grid((z, y, x), affine),
        load=lambda: read_voxels(path, layout),
        files=tuple(dict.fromkeys((path, *layout.files))),
    )


def _fields(path: Path, head: bytes) -> tuple[dict[str, str], int]:
    """What the header says under MetaIO's first name of each key, and where it ends.

    Raises:
        VoxelscaleError: something is said twice, or the header has no end.
    """
    fields: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in fields:
        end = head.find(b"\n", start)
        line = head[start : end if end >= 0 else len(head)].decode("latin-1")
        key, sign, value = (part.strip() for part in line.partition("="))
        if end < 0 and not (sign and key == "ElementDataFile"):
            raise VoxelscaleError(f"{path}: its header has no end (ElementDataFile)", TO_REWRITE)
        start = end + 1 if end >= 0 else len(head)
        if not sign:
            if key:
                raise VoxelscaleError(f"{path}: a header line without '=': {key[:60]!r}", TO_REWRITE)
            continue
        name = SYNONYMS.get(key, key)
        if fields.setdefault(name, value) != value and name != "Comment":
            raise VoxelscaleError(f"{path}: says {name[:60]!r} twice, differently", TO_REWRITE)
    return fields, start


def _affine(path: Path, fields: dict[str, str], dims: int) -> NDArray[np.float64]:
    key = "ElementSpacing" if "ElementSpacing" in fields else "ElementSize"
    spacing = numbers(path, key, fields.get(key, ""), dims)[:3]
    if not min(spacing) > 0:
        raise VoxelscaleError(f"{path}: a spacing of {fields[key][:60]} mm", f"{TO_REWRITE} ({key})")
    if (unit := fields.get("DistanceUnits", "mm")).lower() not in ("mm", "?", ""):
        raise VoxelscaleError(f"{path}: its lengths are {unit[:60]!r}", f"{TO_REWRITE}, in mm")
    offset = numbers(path, "Offset", fields.get("Offset", "0 " * dims), dims)[:3]
    turn = np.eye(dims)
    if "TransformMatrix" in fields:
        # The file holds the matrix column by column: each axis's direction in turn.
        given = numbers(path, "TransformMatrix", fields["TransformMatrix"], dims * dims)
        turn = np.reshape(given, (dims, dims)).T
    if np.isfinite(turn).all():
        lengths = np.linalg.norm(turn[:3, :3], axis=0)
        if np.abs(lengths - 1).max() > 1e-3:
            raise VoxelscaleError(f"{path}: its TransformMatrix is no rotation", TO_REWRITE)
    return affine_from_itk(offset, spacing, turn[:3, :3])


def _layout(
    path: Path, fields: dict[str, str], shape: tuple[int, int, int], head: bytes, start: int
) -> Layout:
    kind = fields.get("ElementType", "")
    if kind not in TYPES:
        hint = "give a scan of one whole or real number a voxel"
        raise VoxelscaleError(f"{path}: an unknown type of voxels ({kind[:60]!r})", hint)
    _check_intensities(path, fields)
    packed = _truth(path, fields, "CompressedData", "False")
    binary = _truth(path, fields, "BinaryData", "True")
    (skipped,) = whole_numbers(path, "HeaderSize", fields.get("HeaderSize", "0"), 1)
    if not -1 <= skipped <= MOST_SKIPPED:
        raise VoxelscaleError(f"{path}: a HeaderSize of {skipped}", TO_REWRITE)
    data = fields["ElementDataFile"]
    local = data.upper() == "LOCAL"
    return Layout(
        files=(path,) if local else data_files(path, data, head[start:], shape[0]),
        encoding="deflate" if packed else "raw" if binary else "text",
        offset=start if local else skipped,
        dtype=np.dtype(
            (">" if _truth(path, fields, "BinaryDataByteOrderMSB", "False") else "<") + TYPES[kind]
        ),
        shape=shape,
    )


def _check_intensities(path: Path, fields: dict[str, Any]) -> None:
    # ITK reads past these without a word; whose HU would they be?
    for key, none in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
        (value,) = numbers(path, key, fields.get(key, str(none)), 1)
        if not math.isclose(value, none):
            hint = "write it anew with its values in HU"
            raise VoxelscaleError(f"{path}: its values are to be rescaled ({key} = {value:g})", hint)


def _truth(path: Path, fields: dict[str, str], key: str, default: str) -> bool:
    word = fields.get(key, default)
    if word.lower() not in ("true", "false", "1", "0"):
        raise VoxelscaleError(f"{path}: its {key} is {word[:60]!r}", TO_REWRITE)
    return word.lower() in ("true", "1")
