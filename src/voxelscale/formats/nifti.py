"""NIfTI-1 and NIfTI-2, single file, plain or gzipped."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from voxelscale.errors import VoxelscaleError
from voxelscale.formats._itk import gunzipped_head, read_image
from voxelscale.geometry import Scan


def matches(path: Path, head: bytes) -> bool:
    """Whether the header's size and magic are NIfTI's (nifti1.h, nifti2.h)."""
    plain = gunzipped_head(path, head)
    return plain[344:348] in (b"n+1\0", b"ni1\0") or plain[4:8] in (b"n+2\0", b"ni2\0")


def read(path: Path) -> Scan:
    """The scan of a file; slope and intercept applied.

    Raises:
        VoxelscaleError: as `voxelscale.formats._itk.read_image`; or a spacing that is not above 0.
    """
    with path.open("rb") as handle:
        head = gunzipped_head(path, handle.read(1024))
    # ITK takes a negative or missing spacing for a positive one without a word.
    spacing = _spacing(head)
    if not np.isfinite(spacing).all() or min(spacing) <= 0:
        shown = " x ".join(f"{s:g}" for s in spacing)
        raise VoxelscaleError(f"{path}: a spacing of {shown} mm", "write its header anew (pixdim)")
    return read_image(path, "NiftiImageIO")


def _spacing(head: bytes) -> tuple[float, ...]:
    second = head[4:8] in (b"n+2\0", b"ni2\0")
    size_of_header = 540 if second else 348
    order = "<" if struct.unpack_from("<i", head)[0] == size_of_header else ">"
    if second:
        return struct.unpack_from(order + "3d", head, 112)
    return struct.unpack_from(order + "3f", head, 80)
