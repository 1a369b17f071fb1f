"""NRRD: .nrrd, or .nhdr with its data file; and 3D Slicer's segmentations (.seg.nrrd).

Sources: the definition of the NRRD file format (https://teem.sourceforge.net/nrrd/format.html); 3D
Slicer's manual, Segmentations, "Segmentation file format (.seg.nrrd)".
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
    Encoding,
    Layout,
    Opened,
    Segments,
    check_affine,
    check_header,
    data_files,
    is_list,
    numbers,
    read_voxels,
    whole_numbers,
)
from voxelscale.geometry import Grid

_CALLED = {
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}
TYPES = {name: kind for kind, names in _CALLED.items() for name in names.split(", ")}
ENCODINGS: dict[str, Encoding] = {
    "raw": "raw",
    "gzip": "deflate",
    "gz": "deflate",
    "bzip2": "bzip2",
    "bz2": "bzip2",
    "ascii": "text",
    "text": "text",
    "txt": "text",
    "hex": "hex",
}
TO_LPS = {
    "left-posterior-superior": (1, 1, 1),
    "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
}
SYNONYMS = {
    "datafile": "data file",
    "lineskip": "line skip",
    "byteskip": "byte skip",
    "centers": "centerings",
}

MOST_LINES = 100


def matches(path: Path, head: bytes) -> bool:
    """Whether it begins with NRRD's magic."""
    return head.startswith(b"NRRD000")


def open_scan(path: Path) -> Opened:
    """The scan of a file, in LPS whichever anatomical space it declares.

    Raises:
        VoxelscaleError: its header is not one of a scan or does not say how it lies in the patient, or
            its voxels cannot be read; see also `voxelscale.formats._voxels`.
    """
    with path.open("rb") as handle:
        head = handle.read(LONGEST_HEADER)
    fields, rest = _fields(path, head)
    (dims,) = whole_numbers(path, "dimension", fields.get("dimension", ""), 1)
    if not 1 <= dims <= 16:  # as the reference implementation has it
        raise VoxelscaleError(f"{path}: claims {dims} dimensions", TO_REWRITE)
    size = whole_numbers(path, "sizes", fields.get("sizes", ""), dims)
    directions = _directions(path, fields, dims)
    space = [n for n, direction in zip(size, directions, strict=True) if direction is not None]
    components = math.prod(n for n, direction in zip(size, directions, strict=True) if direction is None)
    segments = _segments(path, head, components)
    check_header(path, space, 1 if segments else components)
    x, y, z = space[:3]
    affine = _affine(path, fields, [d for d in directions if d is not None][:3])
    check_affine(path, (z, y, x), affine)
    # C order: the first axis of the header is the fastest.
    layout = _layout(path, fields, tuple(reversed(size)) if segments else (z, y, x), head, rest)
    grid, files = Grid((z, y, x), affine), tuple(dict.fromkeys((path, *layout.files)))
    if not segments:
        return Opened(grid=grid, load=lambda: read_voxels(path, layout), files=files)

    def layers() -> NDArray[Any]:
        voxels = read_voxels(path, layout)
        if components == 1:
            return voxels.reshape(1, z, y, x)
        return np.moveaxis(voxels, dims - 1 - directions.index(None), 0).reshape(components, z, y, x)

    made = Segments(layers=segments, load=layers)
    return Opened(grid=grid, load=lambda: made.mask(None), files=files, segments=made)


def _segments(path: Path, head: bytes, layers: int) -> tuple[tuple[int, int], ...]:
    """Layer and value of each segment that 3D Slicer lists; () where it is no segmentation.

    Before version 4.11 every segment had a layer of its own, with the value 1.

    Raises:
        VoxelscaleError: a segment lies in a layer that is not there, or two are the same.
    """
    text = head[: head.find(b"\n\n") if b"\n\n" in head else None].decode("latin-1")
    said = dict(re.findall(r"^(Segment\d+_(?:ID|LabelValue|Layer)):=(.*?)\r?$", text, re.MULTILINE))
    found = []
    for number in sorted(int(key[7:-3]) for key in said if key.endswith("_ID")):
        place = {"Layer": number, "LabelValue": 1}
        for key in place:
            name = f"Segment{number}_{key}"
            (place[key],) = whole_numbers(path, name, said.get(name, str(place[key])), 1)
        if not (0 <= place["Layer"] < layers and place["LabelValue"] > 0):
            problem = f"segment {number} is value {place['LabelValue']} of layer {place['Layer']}"
            raise VoxelscaleError(f"{path}: {problem}, of {layers} layers", "save it again with 3D Slicer")
        found.append((place["Layer"], place["LabelValue"]))
    if len(set(found)) < len(found):
        raise VoxelscaleError(f"{path}: two segments share one value", "save it again with 3D Slicer")
    return tuple(found)


def _fields(path: Path, head: bytes) -> tuple[dict[str, str], int]:
    """The header's fields (not its free key/value pairs), and where what follows it begins.

    Raises:
        VoxelscaleError: a field occurs twice, or the header has no end.
    """
    fields: dict[str, str] = {}
    start = head.find(b"\n") + 1 or len(head)
    while start < len(head):
        end = head.find(b"\n", start)
        end = len(head) if end < 0 else end
        line = head[start:end].decode("latin-1").rstrip("\r")
        start = end + 1
        if not line:
            return fields, start
        key, sign, value = line.partition(":")
        if not sign or value.startswith("=") or line.startswith("#"):
            continue
        name = SYNONYMS.get(key.strip().lower(), key.strip().lower())
        if name in fields:
            raise VoxelscaleError(f"{path}: says {name[:60]!r} twice", TO_REWRITE)
        fields[name] = value.strip()
        if name == "data file" and is_list(value):
            return fields, start
    if len(head) == LONGEST_HEADER:
        raise VoxelscaleError(f"{path}: its header has no end", TO_REWRITE)
    return fields, start


def _directions(path: Path, fields: dict[str, str], dims: int) -> list[list[float] | None]:
    """For each axis its step in space, or None where it is not one of space.

    Raises:
        VoxelscaleError: there is not one for each axis, or the space is not the patient's.
    """
    text = fields.get("space directions")
    if text is None or fields.get("space", "").lower() not in TO_LPS:
        if dims != 3:
            check_header(path, whole_numbers(path, "sizes", fields["sizes"], dims), 1)
        hint = "write its space into its header, as 'space: left-posterior-superior'"
        named = f"(space: {fields['space'][:60]})" if "space" in fields else "(no space)"
        raise VoxelscaleError(f"{path}: does not say how it lies in the patient {named}", hint)
    words = re.findall(r"none|\([^()]*\)", text)
    if len(words) != dims:
        raise VoxelscaleError(f"{path}: {len(words)} space directions for {dims} axes", TO_REWRITE)
    return [None if word == "none" else _vector(path, "space directions", word) for word in words]


def _vector(path: Path, key: str, word: str) -> list[float]:
    return numbers(path, key, word.strip().removeprefix("(").removesuffix(")").replace(",", " "), 3)


def _affine(path: Path, fields: dict[str, str], steps: list[list[float]]) -> NDArray[np.float64]:
    """Voxel (z, y, x, 1) to LPS mm."""
    for step in steps:
        if not np.linalg.norm(step) > 0:
            shown = ", ".join(f"{s:g}" for s in step)
            raise VoxelscaleError(f"{path}: a voxel axis of ({shown})", TO_REWRITE)
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", "")))
    if not units <= {"mm", "", "millimeter", "millimeters"}:
        shown = ", ".join(sorted(units))[:60]
        raise VoxelscaleError(f"{path}: its lengths are {shown!r}", f"{TO_REWRITE}, in mm")
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(steps)[::-1].T
    affine[:3, 3] = _vector(path, "space origin", fields.get("space origin", ""))
    turned: NDArray[np.float64] = np.diag([*TO_LPS[fields["space"].lower()], 1.0]) @ affine
    return turned


def _layout(path: Path, fields: dict[str, str], shape: tuple[int, ...], head: bytes, start: int) -> Layout:
    kind, encoding = fields.get("type", "").lower(), fields.get("encoding", "").lower()
    if kind not in TYPES:
        hint = "give a scan of one whole or real number a voxel"
        raise VoxelscaleError(f"{path}: an unknown type of voxels ({kind[:60]!r})", hint)
    if encoding not in ENCODINGS:
        raise VoxelscaleError(f"{path}: an unknown encoding ({encoding[:60]!r})", "write it anew, as gzip")
    dtype, endian = np.dtype(TYPES[kind]), fields.get("endian", "").lower()
    if endian not in ("little", "big") and dtype.itemsize > 1 and ENCODINGS[encoding] != "text":
        raise VoxelscaleError(f"{path}: its endian is {endian[:60]!r}", TO_REWRITE)
    name = fields.get("data file")
    files = (path,) if name is None else data_files(path, name, head[start:], shape[0])
    offset = start if name is None else 0
    (skip,) = whole_numbers(path, "byte skip", fields.get("byte skip", "0"), 1)
    (lines,) = whole_numbers(path, "line skip", fields.get("line skip", "0"), 1)
    if not -1 <= skip <= MOST_SKIPPED:
        raise VoxelscaleError(f"{path}: a byte skip of {skip}", TO_REWRITE)
    if not 0 <= lines <= MOST_LINES:
        raise VoxelscaleError(f"{path}: a line skip of {lines}", TO_REWRITE)
    if lines:
        offset = _after_lines(path, files[0], offset, lines)
    return Layout(
        files=files,
        encoding=ENCODINGS[encoding],
        offset=-1 if skip < 0 else offset,
        skip=max(0, skip),
        dtype=dtype.newbyteorder(">" if endian == "big" else "<"),
        shape=shape,
    )


def _after_lines(path: Path, file: Path, offset: int, lines: int) -> int:
    with file.open("rb") as handle:
        handle.seek(offset)
        for _ in range(lines):
            line = handle.readline(LONGEST_HEADER)
            if not line.endswith(b"\n"):
                raise VoxelscaleError(f"{path}: fewer than the {lines} lines to skip", TO_REWRITE)
        return handle.tell()
