"""NIfTI-1 and NIfTI-2, single file or a pair of .hdr and .img, plain or gzipped.

Sources: nifti1.h and nifti2.h of the NIfTI Data Format Working Group. NIfTI's world is RAS+; ours LPS.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.formats._voxels import (
    GZIP,
    MOST_SKIPPED,
    TO_COPY,
    TO_REWRITE,
    Layout,
    Opened,
    check_affine,
    check_header,
    data_file,
    plain_head,
    read_voxels,
)
from voxelscale.geometry import Grid

DISAGREE_MM = 0.5
"""How far apart qform and sform may put a corner: a quaternion of float32 near a half turn is that
coarse over a body."""

TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"} | {
    1024: "i8",
    1280: "u8",
}
OTHERS = {1: "single bits", 32: "complex numbers", 1792: "complex numbers", 2048: "complex numbers"} | {
    1536: "float128",
    128: "colours (RGB)",
    2304: "colours (RGBA)",
}
SECOND = (b"n+2\0", b"ni2\0")
PAIRED = (b"ni1\0", b"ni2\0")


def matches(path: Path, head: bytes) -> bool:
    """Whether the header's magic is NIfTI's."""
    plain = plain_head(path, 540) if head.startswith(GZIP) else head
    return plain[344:348] in (b"n+1\0", b"ni1\0") or plain[4:8] in SECOND


def is_analyze(path: Path, head: bytes) -> bool:
    """Whether it is the header of Analyze 7.5, NIfTI's forerunner, which has no magic."""
    plain = plain_head(path, 348) if head.startswith(GZIP) else head[:348]
    if len(plain) < 348 or matches(path, head):
        return False
    for order in "<>":
        (size,) = struct.unpack_from(order + "i", plain)
        dims = struct.unpack_from(order + "5h", plain, 40)
        if size == 348 and 1 <= dims[0] <= 7 and min(dims[1:4]) >= 1:
            return True
    return False


def open_scan(path: Path) -> Opened:
    """The scan of a file; slope and intercept applied, sform before qform.

    Raises:
        VoxelscaleError: its header contradicts itself or does not say where the voxels lie, or its
            voxels cannot be read; see also `voxelscale.formats._voxels`.
    """
    head = plain_head(path, 540)
    header = _header(path, head)
    check_header(path, header.size, header.components)
    x, y, z = header.size[:3]
    affine = _affine(path, header)
    check_affine(path, (z, y, x), affine)
    file, offset = path, int(header.offset)
    if header.paired:
        file = _image_file(path)
    elif offset < len(header.raw):
        raise VoxelscaleError(f"{path}: its voxels begin at byte {offset}, in its header", TO_REWRITE)
    zipped = _is_zipped(file)
    layout = Layout(
        files=(file,),
        encoding="deflate" if zipped else "raw",
        offset=0 if zipped else offset,
        skip=offset if zipped else 0,
        dtype=header.dtype,
        shape=(z, y, x),
    )
    return Opened(
        grid=Grid((z, y, x), affine),
        load=lambda: _scaled(path, read_voxels(path, layout), header.slope, header.intercept),
        files=(path, file) if header.paired else (path,),
    )


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What counts of a header.

    Attributes:
        raw: its bytes.
        size: voxels along (x, y, z, t).
        components: values a voxel.
        offset: byte at which the voxels begin.
        pixdim: qfac, then the spacing (x, y, z).
        forms: codes of qform and sform, 0 where it is not given.
        quaternion: b, c, d, then the offset (x, y, z), RAS mm.
        rows: of the sform, twelve numbers.
        units: code of the lengths' unit.
    """

    raw: bytes
    paired: bool
    size: tuple[int, ...]
    components: int
    dtype: np.dtype[Any]
    offset: float
    slope: float
    intercept: float
    pixdim: tuple[float, ...]
    forms: tuple[int, int]
    quaternion: tuple[float, ...]
    rows: tuple[float, ...]
    units: int


def _header(path: Path, head: bytes) -> _Header:
    second = head[4:8] in SECOND
    length = 540 if second else 348
    raw = head[:length]
    order = next((o for o in "<>" if struct.unpack_from(o + "i", head)[0] == length), "")
    if len(raw) < length or not order:
        raise VoxelscaleError(f"{path}: its NIfTI header is cut short or damaged", TO_COPY)

    def take(first: tuple[str, int], other: tuple[str, int]) -> tuple[Any, ...]:
        code, start = other if second else first
        return struct.unpack_from(order + code, raw, start)

    dims = take(("8h", 40), ("8q", 16))
    datatype, bits = take(("2h", 70), ("2h", 12))
    (offset,) = take(("f", 108), ("q", 168))
    slope, intercept = take(("2f", 112), ("2d", 176))
    (units,) = take(("B", 123), ("i", 500))
    if not 1 <= dims[0] <= 7:
        raise VoxelscaleError(f"{path}: claims {dims[0]} dimensions", TO_REWRITE)
    if not math.isfinite(offset) or not 0 <= offset <= MOST_SKIPPED:
        raise VoxelscaleError(f"{path}: its voxels begin at byte {offset:g}", TO_REWRITE)
    return _Header(
        raw=raw,
        paired=raw[4:8] in PAIRED if second else raw[344:348] in PAIRED,
        size=tuple(dims[1 : min(dims[0], 4) + 1]),
        components=math.prod(dims[5 : dims[0] + 1]),  # colours, vectors and the like
        dtype=_dtype(path, datatype, bits, order),
        offset=offset,
        slope=slope,
        intercept=intercept,
        pixdim=take(("4f", 76), ("4d", 104)),
        forms=take(("2h", 252), ("2i", 344)),
        quaternion=take(("6f", 256), ("6d", 352)),
        rows=take(("12f", 280), ("12d", 400)),
        units=units & 7,
    )


def _dtype(path: Path, datatype: int, bits: int, order: str) -> np.dtype[Any]:
    if datatype not in TYPES:
        known = OTHERS.get(datatype, f"an unknown type of voxels ({datatype})")
        raise VoxelscaleError(f"{path}: holds {known}", "give a scan of one whole or real number a voxel")
    dtype = np.dtype(order + TYPES[datatype])
    if bits != 8 * dtype.itemsize:
        raise VoxelscaleError(f"{path}: {bits} bits a voxel of type {dtype.name}", TO_REWRITE)
    return dtype


def _affine(path: Path, header: _Header) -> NDArray[np.float64]:
    """Voxel (z, y, x, 1) to LPS mm."""
    spacing = np.asarray(header.pixdim[1:])
    if not np.isfinite(spacing).all() or not min(spacing) > 0:
        shown = " x ".join(f"{s:g}" for s in spacing)
        raise VoxelscaleError(f"{path}: a spacing of {shown} mm", f"{TO_REWRITE} (pixdim)")
    if header.units in (1, 3):
        unit = "metres" if header.units == 1 else "micrometres"
        raise VoxelscaleError(f"{path}: its lengths are {unit}", "write its header anew, in mm")
    by_qform, by_sform = (code > 0 for code in header.forms)
    if not by_qform and not by_sform:
        hint = "set its sform, for instance with nibabel's set_sform(affine, 1)"
        raise VoxelscaleError(f"{path}: does not say how it lies (qform and sform codes are 0)", hint)
    ras = np.eye(4)
    ras[:3] = np.reshape(header.rows, (3, 4)) if by_sform else _qform(path, header)
    if by_sform and np.isfinite(ras).all():
        far = np.asarray(header.size[:3]) - 1
        apart = float(np.abs((np.sqrt((ras[:3, :3] ** 2).sum(axis=0)) - spacing) * far).max())
        if by_qform and apart <= DISAGREE_MM:
            corners = np.indices((2, 2, 2)).reshape(3, -1) * far[:, None]
            other = _qform(path, header) - ras[:3]
            apart = float(np.linalg.norm(other[:, :3] @ corners + other[:, 3:], axis=0).max())
        if not apart <= DISAGREE_MM:
            what = "its sform and qform" if by_qform else "its sform and pixdim"
            hint = "set the code of the wrong one to 0, for instance with nibabel's set_qform(None, 0)"
            raise VoxelscaleError(f"{path}: {what} lie {apart:.2f} mm apart", hint)
    affine: NDArray[np.float64] = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ras[:, [2, 1, 0, 3]]
    return affine


def _qform(path: Path, header: _Header) -> NDArray[np.float64]:
    """The quaternion's (3, 4) matrix, voxel (x, y, z, 1) to RAS mm (nifti1.h, method 2)."""
    b, c, d = header.quaternion[:3]
    left = 1 - (b * b + c * c + d * d)
    if not left > -1e-4:
        raise VoxelscaleError(f"{path}: its qform is no rotation", TO_REWRITE)
    if left < 1e-7:  # a half turn, rounded
        size = math.sqrt(1 - left)
        a, b, c, d = 0.0, b / size, c / size, d / size
    else:
        a = math.sqrt(left)
    turn = [
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ]
    steps = np.asarray(header.pixdim[1:])
    steps[2] *= -1 if header.pixdim[0] < 0 else 1
    return np.column_stack([np.asarray(turn) * steps, header.quaternion[3:]])


def _scaled(path: Path, array: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    # A slope of 0 says that there is none; so, by custom, does NaN.
    if slope == 0 or math.isnan(slope) or (slope, intercept) == (1, 0):
        return array
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        problem = f"its slope and intercept are {slope:g} and {intercept:g}"
        raise VoxelscaleError(f"{path}: {problem}", f"{TO_REWRITE} (scl_slope, scl_inter)")
    kind = np.float32 if array.dtype.itemsize <= 2 or array.dtype == np.float32 else np.float64
    out: NDArray[Any] = array.astype(kind)
    with np.errstate(over="ignore"):
        np.multiply(out, slope, out=out)
        np.add(out, intercept, out=out)
    return out


def _image_file(path: Path) -> Path:
    """The .img that belongs to a .hdr."""
    stem, dot, end = path.name.rpartition(".HDR" if ".HDR" in path.name else ".hdr")
    name = f"{stem}{'.IMG' if dot == '.HDR' else '.img'}{end}" if dot else f"{path.name}.img"
    zipped = f"{name}.gz"
    return data_file(path, zipped if (path.parent / zipped).is_file() else name)


def _is_zipped(path: Path) -> bool:
    """Whether a file begins with gzip's magic."""
    with path.open("rb") as handle:
        return handle.read(2) == GZIP
