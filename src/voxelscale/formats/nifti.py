"""NIfTI-1 and NIfTI-2, single file or a pair of .hdr and .img, plain or gzipped.

nibabel reads the header; the voxels are read within bounds (`voxelscale.formats._voxels`). NIfTI's world is
RAS+; ours is LPS.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.formats._voxels import (
    GZIP,
    MOST_SKIPPED,
    MOST_VOXELS,
    TO_COPY,
    TO_REWRITE,
    Layout,
    Opened,
    check_affine,
    check_header,
    data_file,
    plain_head,
    read_voxels,
    several_volumes,
)
from voxelscale.geometry import Grid

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header

DISAGREE_MM = 0.5
"""How far apart qform and sform may put a corner: a quaternion of float32 near a half turn is that
coarse over a body."""

ROUNDED, HALF_TURN = 1e-4, 1e-7
"""How far the squares of b, c and d of a rounded quaternion may exceed 1; how near to it they are a half
turn."""

OTHERS = {"binary": "single bits", "RGB": "colours (RGB)", "RGBA": "colours (RGBA)"}
"""nibabel's names of types of voxels that are no numbers."""

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
    header, paired = _header(path)
    dims = header["dim"].tolist()
    if not 1 <= dims[0] <= 7:
        raise VoxelscaleError(f"{path}: claims {dims[0]} dimensions", TO_REWRITE)
    start = float(header["vox_offset"])
    if not math.isfinite(start) or not 0 <= start <= MOST_SKIPPED:
        raise VoxelscaleError(f"{path}: its voxels begin at byte {start:g}", TO_REWRITE)
    dtype, offset = _dtype(path, header), int(start)
    # Axes beyond the fourth, which is time or channels, hold colours, vectors and the like.
    volumes = dims[4] if dims[0] >= 4 else 1
    size = dims[1 : min(dims[0], 4) + 1]
    check_header(path, size[:3] if volumes > 1 else size, math.prod(dims[5 : dims[0] + 1]))
    x, y, z = dims[1:4]
    if x * y * z * volumes > MOST_VOXELS:
        raise several_volumes(path, volumes)
    affine = _affine(path, header)
    check_affine(path, (z, y, x), affine)
    file = _image_file(path) if paired else path
    if not paired and offset < header.sizeof_hdr:
        raise VoxelscaleError(f"{path}: its voxels begin at byte {offset}, in its header", TO_REWRITE)
    zipped = _is_zipped(file)
    layout = Layout(
        files=(file,),
        encoding="deflate" if zipped else "raw",
        offset=0 if zipped else offset,
        skip=offset if zipped else 0,
        dtype=dtype,
        shape=(volumes, z, y, x) if volumes > 1 else (z, y, x),
    )
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])

    def load() -> NDArray[Any]:
        return _scaled(path, read_voxels(path, layout), slope, intercept)

    return Opened(
        grid=Grid((z, y, x), affine),
        load=load,
        volumes=volumes,
        load_volumes=load if volumes > 1 else None,
        files=(path, file) if paired else (path,),
    )


def _header(path: Path) -> tuple[Nifti1Header, bool]:
    """The header, neither checked nor corrected; and whether the voxels lie in a file of their own."""
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    head = plain_head(path, Nifti2Header.sizeof_hdr)
    second = head[4:8] in SECOND
    kind = Nifti2Header if second else Nifti1Header
    raw = head[: kind.sizeof_hdr]
    order = next((o for o in "<>" if struct.unpack_from(o + "i", head)[0] == kind.sizeof_hdr), "")
    if len(raw) < kind.sizeof_hdr or not order:
        raise VoxelscaleError(f"{path}: its NIfTI header is cut short or damaged", TO_COPY)
    return kind(raw, order, check=False), (raw[4:8] if second else raw[344:348]) in PAIRED


def _dtype(path: Path, header: Nifti1Header) -> np.dtype[Any]:
    """The type of the voxels, with its byte order."""
    from nibabel.nifti1 import data_type_codes

    code, bits = int(header["datatype"]), int(header["bitpix"])
    dtype: np.dtype[Any] = np.dtype(np.void)
    name = "none"
    if code in data_type_codes.code:
        dtype, name = header.get_data_dtype(), data_type_codes.label[code]
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        holds = f"an unknown type of voxels ({code})" if name in ("none", "all") else OTHERS.get(name, name)
        raise VoxelscaleError(f"{path}: holds {holds}", "give a scan of one whole or real number a voxel")
    if bits != 8 * dtype.itemsize:
        raise VoxelscaleError(f"{path}: {bits} bits a voxel of type {dtype.name}", TO_REWRITE)
    return dtype


def _affine(path: Path, header: Nifti1Header) -> NDArray[np.float64]:
    """Voxel (z, y, x, 1) to LPS mm."""
    spacing = np.asarray(header["pixdim"][1:4], np.float64)
    if not np.isfinite(spacing).all() or not min(spacing) > 0:
        shown = " x ".join(f"{s:g}" for s in spacing)
        raise VoxelscaleError(f"{path}: a spacing of {shown} mm", f"{TO_REWRITE} (pixdim)")
    if unit := {1: "metres", 3: "micrometres"}.get(int(header["xyzt_units"]) & 7):
        raise VoxelscaleError(f"{path}: its lengths are {unit}", f"{TO_REWRITE}, in mm")
    by_qform, by_sform = header["qform_code"] > 0, header["sform_code"] > 0
    if not by_qform and not by_sform:
        hint = "set its sform, for instance with nibabel's set_sform(affine, 1)"
        raise VoxelscaleError(f"{path}: does not say how it lies (qform and sform codes are 0)", hint)
    ras = np.eye(4)
    ras[:3] = header.get_sform()[:3] if by_sform else _qform(path, header)
    if by_sform and np.isfinite(ras).all():
        far = header["dim"][1:4] - 1.0
        apart = float(np.abs((np.linalg.norm(ras[:3, :3], axis=0) - spacing) * far).max())
        if by_qform and apart <= DISAGREE_MM:
            corners = np.indices((2, 2, 2)).reshape(3, -1) * far[:, None]
            other = _qform(path, header) - ras[:3]
            apart = float(np.linalg.norm(other[:, :3] @ corners + other[:, 3:], axis=0).max())
        if not apart <= DISAGREE_MM:
            what = "its sform and qform" if by_qform else "its sform and pixdim"
            hint = "correct pixdim, for instance with nibabel's header.set_zooms"
            if by_qform:
                hint = "set the code of the wrong one to 0, for instance with nibabel's set_qform(None, 0)"
            raise VoxelscaleError(f"{path}: {what} lie {apart:.2f} mm apart", hint)
    affine: NDArray[np.float64] = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ras[:, [2, 1, 0, 3]]
    return affine


def _qform(path: Path, header: Nifti1Header) -> NDArray[np.float64]:
    """The quaternion's matrix (3, 4), voxel (x, y, z, 1) to RAS mm (nifti1.h, method 2).

    Not by nibabel's `get_qform`, which refuses quaternions that rounding made longer than 1, and takes
    turns near a half one for it: over a body that is a hundredth of a millimetre.
    """
    from nibabel.quaternions import quat2mat

    b, c, d = (float(header[f"quatern_{name}"]) for name in "bcd")
    left = 1 - (b * b + c * c + d * d)
    if not left > -ROUNDED:
        raise VoxelscaleError(f"{path}: its qform is no rotation", TO_REWRITE)
    turn = quat2mat([math.sqrt(left) if left > HALF_TURN else 0.0, b, c, d])
    steps = header["pixdim"][1:4] * (1.0, 1.0, -1.0 if header["pixdim"][0] < 0 else 1.0)
    return np.column_stack([turn * steps, [float(header[f"qoffset_{name}"]) for name in "xyz"]])


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
