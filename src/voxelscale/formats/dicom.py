"""A DICOM series: a folder of slices, or one of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.formats._itk import check_header, to_scan, told_of
from voxelscale.geometry import Scan

POSITION, ORIENTATION = "0020|0032", "0020|0037"

GAP_MM = 0.05
"""How much the steps between slices may differ, beside 1 %: positions are decimal text of at most 16
characters (PS3.5, DS), often rounded to a tenth."""

TILT = 0.02
"""Greatest sine between the slices' normal and the step between them; about one degree."""


def matches(path: Path, head: bytes) -> bool:
    """Whether it has DICOM's preamble, or begins with a group-2 or group-8 element (no preamble)."""
    return head[128:132] == b"DICM" or (head[:2] in (b"\x02\x00", b"\x08\x00") and head[3:4] == b"\x00")


def read(path: Path) -> Scan:
    """The one series of a folder, or the series that a file belongs to; slices in order, in HU.

    Raises:
        VoxelscaleError: there is none or more than one series, slices are missing or unevenly spaced,
            or the gantry was tilted.
    """
    import SimpleITK as sitk

    files = _series(path)
    if len(files) < 2:
        raise VoxelscaleError(f"{path}: 2-D: a single slice", "give the folder with the whole series")
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    headers = [_header(Path(file)) for file in files]
    _check_spacing(path, [header for header, _ in headers])
    first = headers[0][1]
    check_header(path, (*first.GetSize()[:2], len(files)), first.GetNumberOfComponents())
    reader.SetFileNames(files)
    with told_of(path, "its slices cannot be read", "copy or export the series again"):
        image = reader.Execute()
    return to_scan(path, image)


def _series(path: Path) -> tuple[str, ...]:
    """The files of the series, ordered along the slices' normal by GDCM."""
    import SimpleITK as sitk

    folder = path if path.is_dir() else path.parent
    find = sitk.ImageSeriesReader.GetGDCMSeriesFileNames
    with told_of(path, "its DICOM files cannot be read", "copy or export the series again"):
        uids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        series = [tuple(find(str(folder), uid)) for uid in uids]
    if not series:
        raise VoxelscaleError(
            f"{path}: no DICOM series in this folder", "give the folder that holds the slices"
        )
    if not path.is_dir():
        mine = [files for files in series if path.name in {Path(file).name for file in files}]
        if not mine:
            raise VoxelscaleError(f"{path}: not a DICOM image", "give the folder that holds the slices")
        return mine[0]
    if len(series) > 1:
        counts = ", ".join(str(len(files)) for files in series)
        hint = "give each series a folder of its own, or name one of its files"
        raise VoxelscaleError(f"{path}: {len(series)} series in one folder, of {counts} slices", hint)
    return series[0]


def _header(path: Path) -> tuple[NDArray[np.float64], Any]:
    """Position and the two in-plane directions of a slice, nine numbers; and ITK's reader of it."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    with told_of(path, "its header cannot be read", "copy or export the series again"):
        reader.ReadImageInformation()
    keys = set(reader.GetMetaDataKeys())
    if not {POSITION, ORIENTATION} <= keys:
        raise VoxelscaleError(f"{path}: has no position in the patient", "leave out scouts and reports")
    texts = reader.GetMetaData(POSITION), reader.GetMetaData(ORIENTATION)
    try:
        numbers = np.asarray([float(word) for text in texts for word in text.split("\\")])
    except ValueError:
        numbers = np.empty(0)
    if numbers.shape != (9,) or not np.isfinite(numbers).all():
        raise VoxelscaleError(f"{path}: its position in the patient is not readable", "export it again")
    return numbers, reader


def _check_spacing(path: Path, headers: list[NDArray[np.float64]]) -> None:
    table = np.asarray(headers)
    positions, directions = table[:, :3], table[:, 3:]
    if np.abs(directions - directions[0]).max() > 1e-3:
        raise VoxelscaleError(
            f"{path}: its slices are turned against each other", "export the series again"
        )
    normal = np.cross(directions[0, :3], directions[0, 3:])
    steps = np.diff(positions, axis=0)
    gaps = steps @ normal
    least, most, usual = float(gaps.min()), float(gaps.max()), float(np.median(gaps))
    if usual <= 0 or most - least > 0.01 * usual + GAP_MM:
        hint = "a slice is missing or doubled: export the series again, or remove the double"
        raise VoxelscaleError(f"{path}: slices {least:.3f} to {most:.3f} mm apart", hint)
    sideways = steps - gaps[:, None] * normal
    if np.linalg.norm(sideways, axis=1).max() > TILT * usual + 1e-2:
        hint = "correct the tilt first, for instance with dcm2niix"
        raise VoxelscaleError(f"{path}: a tilted gantry (slices are shifted along the image)", hint)
