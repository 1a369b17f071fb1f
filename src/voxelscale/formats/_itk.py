"""Reading through SimpleITK, with every fault of a file told as one line."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Scan, from_itk

if TYPE_CHECKING:
    import SimpleITK as sitk

MOST_VOXELS = 2**31
"""A header that claims more is lying, or the scan does not fit anyway (4 GiB of int16)."""


def read_image(path: Path, io: str, source: Path | None = None) -> Scan:
    """A file through one of ITK's readers, as a scan; `source` is where to read it, if elsewhere.

    Raises:
        VoxelscaleError: see `check_header`; or the voxels cannot be read, as when the file is cut short.
    """
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(source or path))
    reader.SetImageIO(io)
    with told_of(path, "its header cannot be read", "copy or download it again, or write it anew"):
        reader.ReadImageInformation()
    check_header(path, reader.GetSize(), reader.GetNumberOfComponents())
    with told_of(
        path, "its voxels cannot be read: it is cut short or damaged", "copy or download it again"
    ):
        image = reader.Execute()
    return to_scan(path, image)


def check_header(path: Path, size: Sequence[int], components: int) -> None:
    """Raise a VoxelscaleError unless a header is one of a scan that can be read.

    Args:
        size: voxels along (x, y, z, ...), as ITK counts.
        components: values a voxel.
    """
    if components != 1:
        hint = "give a scan with one value a voxel"
        raise VoxelscaleError(f"{path}: {components} values a voxel (colour?)", hint)
    while len(size) > 3 and size[-1] == 1:
        size = size[:-1]
    if len(size) > 3:
        raise VoxelscaleError(f"{path}: {len(size)}-D, {size[3]} volumes", "split it and give one volume")
    if len(size) < 3 or min(size) < 2:
        shown = " x ".join(map(str, size))
        raise VoxelscaleError(f"{path}: 2-D ({shown} voxels)", "give the whole volume, not one slice")
    if np.prod(np.asarray(size, dtype=np.float64)) > MOST_VOXELS:
        shown = " x ".join(map(str, size))
        raise VoxelscaleError(f"{path}: claims {shown} voxels, more than {MOST_VOXELS}", "crop it first")


def check_data_file(path: Path, data: str) -> None:
    """Raise a VoxelscaleError unless the file of voxels that a header names lies beside it."""
    target = path.parent / data
    if target.resolve().parent != path.parent.resolve():
        raise VoxelscaleError(f"{path}: its data file lies in another folder", "put both in one folder")
    if not target.is_file():
        raise VoxelscaleError(f"{path}: its data file {data} is missing", "put it beside the header")


def to_scan(path: Path, image: sitk.Image) -> Scan:
    """An image of 3-D, or 4-D with one volume, as a scan.

    Raises:
        VoxelscaleError: spacing, origin or directions do not describe voxels in space.
    """
    while image.GetDimension() > 3:
        image = image[..., 0]
    geometry = np.concatenate([image.GetOrigin(), image.GetSpacing(), image.GetDirection()])
    if not np.isfinite(geometry).all():
        raise VoxelscaleError(f"{path}: NaN or infinity in its geometry", "write its header anew")
    if min(image.GetSpacing()) <= 0:
        raise VoxelscaleError(f"{path}: a spacing of {min(image.GetSpacing())} mm", "write its header anew")
    try:
        return from_itk(image)
    except ValueError as error:
        raise VoxelscaleError(f"{path}: {error}", "write its header anew") from None


def not_finite(path: Path, count: int) -> VoxelscaleError:
    """What is said of a scan with NaN or infinity in it."""
    hint = "replace them, for instance by -1024 (air)"
    return VoxelscaleError(f"{path}: {count} voxels are NaN or infinite", hint)


@contextmanager
def told_of(path: Path, problem: str, hint: str) -> Iterator[None]:
    """Within it ITK's exceptions become a VoxelscaleError, and what it prints on stderr is kept back."""
    import SimpleITK as sitk

    warned = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        with _stderr_held():
            yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1].split("): ")[-1] if lines else ""
        raise VoxelscaleError(f"{path}: {problem} ({reason[:160]})", hint) from None
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warned)


@contextmanager
def _stderr_held() -> Iterator[None]:
    # NIfTI's and NRRD's C libraries print to the process's stderr past every warning switch.
    with tempfile.TemporaryFile() as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def gunzipped_head(path: Path, head: bytes, size: int = 1024) -> bytes:
    """The first bytes of a file, looked at through gzip where it is gzipped."""
    if not head.startswith(b"\x1f\x8b"):
        return head
    return _quietly(lambda: gzip.open(path).read(size))


def _quietly(read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (OSError, EOFError, ValueError):
        return b""
