"""NIfTI-1 and NIfTI-2, single file, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voxelscale.errors import VoxelscaleError
from voxelscale.formats._itk import check_header, gunzipped_head, not_finite, read_image
from voxelscale.geometry import Scan


def matches(path: Path, head: bytes) -> bool:
    """Whether the header's size and magic are NIfTI's (nifti1.h, nifti2.h)."""
    plain = gunzipped_head(path, head)
    return plain[344:348] in (b"n+1\0", b"ni1\0") or plain[4:8] in (b"n+2\0", b"ni2\0")


def read(path: Path) -> Scan:
    """The scan of a file; slope and intercept applied.

    Raises:
        VoxelscaleError: as `voxelscale.formats._itk.read_image`; or a spacing that is not above 0, a file
            cut short, NaN or infinite voxels.
    """
    with path.open("rb") as handle:
        raw = handle.read(1024)
    head = gunzipped_head(path, raw)
    zipped = raw.startswith(b"\x1f\x8b")
    fields = _fields(head)
    # ITK takes a negative or missing spacing for a positive one without a word.
    if not np.isfinite(fields.spacing).all() or min(fields.spacing) <= 0:
        shown = " x ".join(f"{s:g}" for s in fields.spacing)
        raise VoxelscaleError(f"{path}: a spacing of {shown} mm", "write its header anew (pixdim)")
    check_header(path, fields.size, fields.components)
    if head[344:348] != b"ni1\0":
        _check_length(path, fields, zipped)
        if fields.float_type:
            _check_finite(path, fields, zipped)
    # ITK also goes by the name, which says nothing here.
    extension = ".nii.gz" if zipped else ".nii"
    if path.name.lower().endswith(extension) or head[344:348] == b"ni1\0":
        return read_image(path, "NiftiImageIO")
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"scan{extension}"
        link.symlink_to(path.resolve())
        return read_image(path, "NiftiImageIO", link)


@dataclass(frozen=True, kw_only=True)
class _Fields:
    """Of the header: voxels along each axis, values a voxel; byte offset and length of the voxels;
    spacing in mm; NumPy's name of their type if it is a float, else "".
    """

    size: tuple[int, ...]
    components: int
    offset: int
    length: int
    spacing: tuple[float, ...]
    float_type: str


def _fields(head: bytes) -> _Fields:
    second = head[4:8] in (b"n+2\0", b"ni2\0")
    order = "<" if struct.unpack_from("<i", head)[0] == (540 if second else 348) else ">"
    if second:
        datatype, bits = struct.unpack_from(order + "2h", head, 12)
        dims = struct.unpack_from(order + "8q", head, 16)
        spacing = struct.unpack_from(order + "3d", head, 112)
        (offset,) = struct.unpack_from(order + "q", head, 168)
    else:
        dims = struct.unpack_from(order + "8h", head, 40)
        datatype, bits = struct.unpack_from(order + "2h", head, 70)
        spacing = struct.unpack_from(order + "3f", head, 80)
        (offset,) = struct.unpack_from(order + "f", head, 108)
    length = math.prod(dims[1 : dims[0] + 1]) * bits // 8
    float_type = {16: order + "f4", 64: order + "f8"}.get(datatype, "")
    # The fifth axis is that of vectors, as of colours.
    return _Fields(
        size=dims[1 : min(dims[0], 4) + 1],
        components=dims[5] if dims[0] >= 5 else 1,
        offset=int(offset),
        length=length,
        spacing=spacing,
        float_type=float_type,
    )


def _check_length(path: Path, fields: _Fields, zipped: bool) -> None:
    """ITK fills up what is missing at a file's end with whatever is in memory; refuse it instead."""
    needed = fields.offset + fields.length
    size = path.stat().st_size
    if zipped:
        with path.open("rb") as handle:
            handle.seek(-4, os.SEEK_END)
            # gzip's last field is the plain length modulo 2**32 (RFC 1952).
            if struct.unpack("<I", handle.read(4))[0] == needed % 2**32:
                return
        size = sum(map(len, _blocks(path, zipped)))
    if size < needed:
        problem = f"its voxels cannot be read: it is cut short or damaged ({size} of {needed} bytes)"
        raise VoxelscaleError(f"{path}: {problem}", "copy or download it again")


def _check_finite(path: Path, fields: _Fields, zipped: bool) -> None:
    """ITK replaces NaN by 0, soft tissue's HU, without a word."""
    bad, skip, left = 0, fields.offset, fields.length
    for block in _blocks(path, zipped):
        data = block[skip : skip + left]
        skip, left = max(0, skip - len(block)), left - len(data)
        if data:
            bad += int(np.count_nonzero(~np.isfinite(np.frombuffer(data, fields.float_type))))
    if bad:
        raise not_finite(path, bad)


def _blocks(path: Path, zipped: bool) -> Iterator[bytes]:
    """The plain content in pieces of whole voxels (352 bytes of header are), until it ends or breaks."""
    with gzip.open(path) if zipped else path.open("rb") as handle:
        while True:
            try:
                block = handle.read(1 << 22)
            except (OSError, EOFError, zlib.error):
                return
            if not block:
                return
            yield block
