"""What SEG and RTSTRUCT share: reading a DICOM object whose content nobody vouches for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from voxelscale.errors import VoxelscaleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydicom.dataset import FileDataset

LARGEST = 2**31
"""Bytes of an object at most."""


def read_dataset(path: Path, tags: Sequence[str] | None = None) -> FileDataset:
    """A DICOM object, or only these of its elements.

    Raises:
        VoxelscaleError: it cannot be read.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError

    if path.stat().st_size > LARGEST:
        raise VoxelscaleError(f"{path}: larger than {LARGEST >> 30} GiB", "is this the right file?")
    try:
        return pydicom.dcmread(path, specific_tags=list(tags) if tags else None)
    except (
        InvalidDicomError,
        OSError,
        ValueError,
        AttributeError,
        KeyError,
        TypeError,
        EOFError,
        RecursionError,
    ) as error:
        hint = "copy or export it again"
        raise VoxelscaleError(f"{path}: not readable as DICOM ({type(error).__name__})", hint) from None
