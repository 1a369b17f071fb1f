"""SimpleITK's images as scans, with every fault of a file told as one line."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from voxelscale.errors import VoxelscaleError
from voxelscale.formats._voxels import MOST_VOXELS as MOST_VOXELS
from voxelscale.formats._voxels import check_affine
from voxelscale.formats._voxels import check_header as check_header
from voxelscale.formats._voxels import not_finite as not_finite
from voxelscale.geometry import Scan, affine_from_itk

if TYPE_CHECKING:
    import SimpleITK as sitk


def to_scan(path: Path, image: sitk.Image) -> Scan:
    """An image of 3-D, or 4-D with one volume, as a scan.

    Raises:
        VoxelscaleError: spacing, origin or directions do not describe voxels in space.
    """
    import SimpleITK as sitk

    while image.GetDimension() > 3:
        image = image[..., 0]
    affine = affine_from_itk(image.GetOrigin(), image.GetSpacing(), image.GetDirection())
    x, y, z = image.GetSize()
    check_affine(path, (z, y, x), affine)
    return Scan(sitk.GetArrayFromImage(image), affine)


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
