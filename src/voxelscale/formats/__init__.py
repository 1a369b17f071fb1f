"""Reading and writing scans; the format is found by content, never by the file's name.

One file per family, each with ``matches(path, head)`` and ``open_scan(path)``; `FAMILIES` is the registry.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.formats import dicom, meta, nifti, nrrd
from voxelscale.formats._voxels import Opened, check_affine, not_finite
from voxelscale.geometry import Grid, Scan, to_itk

FAMILIES = {"nifti": nifti, "metaimage": meta, "nrrd": nrrd, "dicom": dicom}

WRITTEN = (".nii.gz", ".nii", ".mha", ".nrrd")
"""Extensions that `write_scan` knows."""

SAME_PLACE_MM = 0.05
"""How far a mask's corners may lie from its image's: formats that keep their geometry in float32 or
in decimal text lose up to a few hundredths of a millimetre over an oblique volume."""


def detect_format(path: Path) -> str:
    """``nifti``, ``metaimage``, ``nrrd`` or ``dicom``.

    Raises:
        VoxelscaleError: the path is missing, unreadable, empty, none of these, or Analyze 7.5.
    """
    with _told(path):
        if not path.exists():
            raise VoxelscaleError(f"{path}: no such file or folder", "check the path")
        if path.is_dir():
            return "dicom"
        if not path.is_file():  # a pipe or a device might never end
            raise VoxelscaleError(f"{path}: neither a file nor a folder", "check the path")
        with path.open("rb") as handle:
            head = handle.read(1024)
    if not head:
        raise VoxelscaleError(f"{path}: empty (0 bytes)", "copy or download it again")
    for name, family in FAMILIES.items():
        if family.matches(path, head):
            return name
    if nifti.is_analyze(path, head):
        hint = "convert it to NIfTI with what wrote it, and check left and right"
        raise VoxelscaleError(f"{path}: Analyze 7.5, which does not say how it lies in the patient", hint)
    header = path.with_suffix(".hdr")
    if path.suffix.lower() == ".img" and header.is_file():
        raise VoxelscaleError(f"{path}: voxels without their header", f"name {header.name} instead")
    hint = "give NIfTI, MetaImage, NRRD, or a folder with a DICOM series"
    raise VoxelscaleError(f"{path}: not a scan in a known format", hint)


def read_scan(path: Path, series: str = "", fill_gaps: int = 0, files: Sequence[Path] = ()) -> Scan:
    """A CT scan: HU as int16 where nothing is lost by it, else float32.

    Args:
        series: SeriesInstanceUID, for a DICOM folder that holds several.
        fill_gaps: how many slices in a row a DICOM series may lack; they are interpolated.
        files: those of the series, where they are known; else the folder's are opened to find them.

    Raises:
        VoxelscaleError: it is not one whole, three-dimensional, finite scan.
    """
    with _told(path):
        opened = _open(path, series, fill_gaps, files)
    return _loaded(path, opened, opened.load)


def _loaded(path: Path, opened: Opened, load: Callable[[], NDArray[Any]]) -> Scan:
    with _told(path):
        array = _as_hu(load())
        bad = int(array.size - np.isfinite(array).sum()) if array.dtype.kind == "f" else 0
    if bad:
        raise not_finite(path, bad)
    return Scan(array, opened.grid.affine, opened.slices)


def read_grid(path: Path, series: str = "", fill_gaps: int = 0, files: Sequence[Path] = ()) -> Grid:
    """The lattice that `read_scan` would give, from the headers alone.

    Raises:
        VoxelscaleError: as `read_scan`, but for what only the voxels show.
    """
    with _told(path):
        return _open(path, series, fill_gaps, files).grid


def _open(path: Path, series: str, fill_gaps: int, files: Sequence[Path]) -> Opened:
    name = detect_format(path)
    if name == "dicom":
        opened = dicom.open_scan(path, series, fill_gaps, files)
    else:
        opened = FAMILIES[name].open_scan(path)
    check_affine(path, opened.grid.shape, opened.grid.affine)
    return opened


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """A disk, or a memory, that does not give what is asked."""
    try:
        yield
    except OSError as error:
        raise VoxelscaleError(
            f"{path}: cannot be read ({error.strerror or error})", "check its permissions"
        ) from None
    except MemoryError:
        hint = "crop it first, or use a machine with more memory"
        raise VoxelscaleError(f"{path}: does not fit into memory", hint) from None


def read_label(path: Path) -> Scan:
    """A mask: class numbers as uint8 where they fit, else int32.

    Raises:
        VoxelscaleError: as `read_scan`; or values that are no whole numbers, or negative.
    """
    with _told(path):
        opened = _open(path, "", 0, ())
    scan = _loaded(path, opened, opened.load_classes or opened.load)
    array = scan.array
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        raise VoxelscaleError(f"{path}: a mask with fractions", "threshold it to whole class numbers first")
    if array.size and array.min() < 0:
        raise VoxelscaleError(
            f"{path}: a mask with negative values", "is this the image rather than the mask?"
        )
    if array.size and array.max() >= 2**31:
        raise VoxelscaleError(f"{path}: a mask with values up to {array.max():g}", "is this a mask?")
    fits = array.size == 0 or array.max() <= 255
    return Scan(array.astype(np.uint8 if fits else np.int32), scan.affine)


def check_same_place(label: Path, mask: Scan, image: Path, scan: Scan) -> None:
    """Raise a VoxelscaleError that says how mask and image differ, if they do."""
    if mask.grid.same_as(scan.grid, SAME_PLACE_MM):
        return
    hint = "resample the mask onto its image, or check that the pair belongs together"
    if mask.array.shape != scan.array.shape:
        sizes = [" x ".join(map(str, reversed(s.array.shape))) for s in (mask, scan)]
        raise VoxelscaleError(f"{label}: {sizes[0]} voxels, but {image.name} has {sizes[1]}", hint)
    corners = np.indices((2, 2, 2)).reshape(3, -1).T * (np.asarray(scan.array.shape) - 1)
    apart = np.linalg.norm(mask.grid.index_to_mm(corners) - scan.grid.index_to_mm(corners), axis=1).max()
    raise VoxelscaleError(f"{label}: lies up to {apart:.2f} mm away from {image.name}", hint)


def write_scan(scan: Scan, path: Path) -> None:
    """Write .nii, .nii.gz, .mha or .nrrd, atomically and compressed, without any patient metadata.

    Raises:
        VoxelscaleError: the extension is another, or the file cannot be written.
    """
    import SimpleITK as sitk

    extension = next((e for e in WRITTEN if path.name.lower().endswith(e)), None)
    if extension is None:
        raise VoxelscaleError(f"{path}: not a format to write", f"use one of {', '.join(WRITTEN)}")
    temporary = path.with_name(f".{os.getpid()}.part.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(to_itk(scan), str(temporary), useCompression=True)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        hint = "free some space or choose another folder"
        raise VoxelscaleError(f"{path}: cannot be written ({reason})", hint) from None
    finally:
        temporary.unlink(missing_ok=True)


def _as_hu(array: NDArray[Any]) -> NDArray[Any]:
    """int16 where every value survives it, else float32."""
    if array.dtype == np.int16:
        return array
    if array.size and array.min() >= -32768 and array.max() <= 32767:  # NaN is neither
        short = array.astype(np.int16)
        if np.array_equal(short, array):
            return short
    with np.errstate(over="ignore"):  # what is too large turns infinite, which is refused
        return array.astype(np.float32)
