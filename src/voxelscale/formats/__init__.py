"""Reading and writing scans; the format is found by content, never by the file's name.

One file per family, each with ``matches(path, head)`` and ``open_scan(path)``; `FAMILIES` is the registry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.console import count, warn
from voxelscale.errors import VoxelscaleError
from voxelscale.files import TO_WRITE, not_written, own_word, put_in_place
from voxelscale.formats import dicom, meta, nifti, nrrd, picture
from voxelscale.formats._itk import reported_as
from voxelscale.formats._voxels import (
    MOST_VOXELS,
    WHOLE_VOLUME,
    Opened,
    check_affine,
    not_finite,
    several_volumes,
)
from voxelscale.geometry import Grid, IntTriple, Scan, Slices, crop_or_pad, to_itk

# DICOM may begin as a TIFF.
FAMILIES = {"nifti": nifti, "metaimage": meta, "nrrd": nrrd, "dicom": dicom, "picture": picture}

WRITTEN = (".nii.gz", ".nii", ".mha", ".nrrd")
"""Extensions that `write_scan` knows."""

HEADERS = (".mhd", ".nhdr", ".hdr", ".hdr.gz")
"""Extensions of headers whose voxels lie in another file."""

DATA = (".raw", ".zraw", ".raw.gz", ".img", ".img.gz")
"""Extensions of such files."""

WHOLE = 1e-3
"""How far a mask's values may be from whole numbers: nibabel scales floats saved as integers, which
brings 1 back as 1.00002."""

SAME_PLACE_MM = 0.05
"""How far a mask's corners may lie from its image's: formats that keep their geometry in float32 or
in decimal text lose up to a few hundredths of a millimetre over an oblique volume."""


def detect_format(path: Path) -> str:
    """``nifti``, ``metaimage``, ``nrrd``, ``dicom`` or ``picture``.

    Raises:
        VoxelscaleError: the path is missing, unreadable, empty, none of these, or Analyze 7.5.
    """
    with _reported(path):
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
    if path.name.lower().endswith(DATA):
        header = next((h for e in HEADERS if (h := path.with_name(_stem(path) + e)).is_file()), None)
        hint = f"name {header.name} instead" if header else f"put its {' or '.join(HEADERS[:3])} beside it"
        raise VoxelscaleError(f"{path}: voxels without their header", hint)
    if head.startswith(picture.JPEG):
        hint = "give the original as PNG or TIFF: JPEG blurs what is drawn and what is measured"
        raise VoxelscaleError(f"{path}: a JPEG, which is not read", hint)
    hint = "give NIfTI, MetaImage, NRRD, or a folder with a DICOM series"
    raise VoxelscaleError(f"{path}: not a scan in a known format", hint)


def read_scan(
    path: Path,
    series: str = "",
    fill_gaps: int = 0,
    files: Sequence[Path] = (),
    select: Sequence[str] = (),
    volume: int | None = None,
) -> Scan:
    """A scan: its values (HU of CT) as int16 where nothing is lost by it, else float32.

    Args:
        series: SeriesInstanceUID, for a DICOM folder that holds several.
        fill_gaps: how many slices in a row a DICOM series may lack; they are interpolated.
        files: those of the series, where they are known; else the folder's are opened to find them.
        select: ``attribute=value`` of the acquisition to take, where a DICOM series holds several.
        volume: which one to take, from 0, of a file that holds several; None: it is to hold one.

    Raises:
        VoxelscaleError: it is not one whole, three-dimensional, finite scan.
    """
    if volume is not None:
        return read_volumes(path, [volume])[0]
    with _reported(path):
        opened = _open(path, series, fill_gaps, files, select)
        _check_single(path, opened)
        if opened.segments is not None:
            raise VoxelscaleError(f"{path}: a segmentation, not a scan", "name the scan it was drawn on")
        array = _finite(path, _as_hu(opened.load()))
    return Scan(array, opened.grid.affine, opened.slices)


def read_volumes(path: Path, wanted: Sequence[int]) -> list[Scan]:
    """Volumes of a file that holds several (NIfTI of four axes, a picture in colours), numbered from 0.

    Raises:
        VoxelscaleError: as `read_scan`; or it holds fewer.
    """
    with _reported(path):
        opened = _open(path, "", 0, ())
        if opened.load_volumes is None or max(wanted, default=0) >= opened.volumes:
            what = f"{path}: {count(opened.volumes, 'volume')}, not {max(wanted, default=0) + 1}"
            raise VoxelscaleError(what, "name as many channels as it holds in reading.channels")
        volumes = opened.load_volumes()
        arrays = [_finite(path, np.array(_as_hu(volumes[number]))) for number in wanted]
    return [Scan(array, opened.grid.affine) for array in arrays]


def volumes_of(path: Path) -> int:
    """How many volumes a file holds, by its header; 1 of what cannot be read, of which reading says why."""
    try:
        if not path.is_file() or (name := detect_format(path)) == "dicom":
            return 1
        opened: Opened = FAMILIES[name].open_scan(path)
    except (VoxelscaleError, OSError):
        return 1
    return opened.volumes


def check_scan(scan: Scan) -> None:
    """Check a scan that does not come from a file as one that does.

    Raises:
        VoxelscaleError: a voxel is NaN or infinite, or its affine describes no voxels in a patient.
    """
    _finite(Path("the scan"), scan.array)
    check_affine(Path("the scan"), scan.grid.shape, scan.affine)


def _finite(path: Path, array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind == "f" and (bad := int(array.size - np.isfinite(array).sum())):
        raise not_finite(path, bad)
    return array


def _check_single(path: Path, opened: Opened) -> None:
    """Raise a VoxelscaleError of a file that holds several volumes, of which none is chosen."""
    if opened.volumes == 1:
        return
    if opened.load_classes is not None:
        hint = "name its channels: reading.channels=[R, G, B]"
        raise VoxelscaleError(f"{path}: a picture in colours, {opened.volumes} channels", hint)
    raise several_volumes(path, opened.volumes)


def read_slices(
    path: Path,
    series: str = "",
    fill_gaps: int = 0,
    files: Sequence[Path] = (),
    select: Sequence[str] = (),
    volume: int | None = None,
) -> tuple[Grid, Slices | None]:
    """The lattice that `read_scan` would give, and the DICOM slices that it is made of; None: no DICOM.

    The voxels are not read.

    Raises:
        VoxelscaleError: as `read_scan`, but for what only the voxels show.
    """
    with _reported(path):
        opened = _open(path, series, fill_gaps, files, select)
    if volume is None:
        _check_single(path, opened)
    return opened.grid, opened.slices


def _open(
    path: Path,
    series: str,
    fill_gaps: int,
    files: Sequence[Path],
    select: Sequence[str] = (),
    *,
    flat: bool = False,
) -> Opened:
    """Open a file by its format.

    Args:
        flat: whether a volume of one slice will do, as the mask of a picture is.
    """
    name = detect_format(path)
    if name == "dicom":
        opened = dicom.open_scan(path, series, fill_gaps, files, select)
    else:
        opened = FAMILIES[name].open_scan(path)
    if name == "picture":  # which may be larger than a patient
        return opened
    check_affine(path, opened.grid.shape, opened.grid.affine)
    if min(opened.grid.shape) < 2 and not flat and name != "dicom":
        shown = " x ".join(map(str, reversed(opened.grid.shape)))
        raise VoxelscaleError(f"{path}: 2-D ({shown} voxels)", WHOLE_VOLUME)
    return opened


@contextmanager
def _reported(path: Path) -> Iterator[None]:
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


def read_label(path: Path, values: Sequence[int] | None = None) -> Scan:
    """A mask: class numbers as uint8 where they fit, else int32.

    Of a 3D Slicer segmentation the numbers are the label values of its segments; where layers of
    overlapping segments use one value twice, the segments' places in the file, from 1.

    Args:
        values: those that are asked for; where segments overlap they are kept.

    Raises:
        VoxelscaleError: as `read_scan`; or values that are no whole numbers, or negative.
    """
    with _reported(path):
        opened = _open(path, "", 0, (), flat=True)
        if opened.load_classes is None:
            _check_single(path, opened)
        if opened.segments is not None:
            array: NDArray[Any] = opened.segments.mask(values)
        else:
            array = _as_whole(path, (opened.load_classes or opened.load)())
    if array.size and array.min() < 0:
        raise VoxelscaleError(
            f"{path}: a mask with negative values", "is this the image rather than the mask?"
        )
    if array.size and array.max() >= 2**31:
        raise VoxelscaleError(f"{path}: a mask with values up to {array.max():g}", "is this a mask?")
    fits = array.size == 0 or array.max() <= 255
    return Scan(array.astype(np.uint8 if fits else np.int32), opened.grid.affine)


def read_segments(path: Path) -> Iterator[tuple[int, Scan]]:
    """The number, as `read_label` has it, and the place (bool) of each segment of a 3D Slicer segmentation.

    None of any other file, and of one layer, in which no two overlap.

    Raises:
        VoxelscaleError: as `read_label`.
    """
    with _reported(path):
        opened = _open(path, "", 0, (), flat=True)
        if opened.segments is not None and len({layer for layer, _ in opened.segments.layers}) > 1:
            for number, where in opened.segments.each():
                yield number, Scan(where, opened.grid.affine)


def _as_whole(path: Path, array: NDArray[Any]) -> NDArray[Any]:
    """A mask's values, rounded where they are whole numbers but for rounding."""
    if array.dtype.kind != "f":
        return array
    if bad := int(array.size - np.isfinite(array).sum()):
        raise not_finite(path, bad)
    whole: NDArray[Any] = np.rint(array)
    if array.size and float(np.abs(array - whole).max()) > WHOLE:
        raise VoxelscaleError(f"{path}: a mask with fractions", "threshold it to whole class numbers first")
    return whole


def is_segmentation(path: Path) -> bool:
    """Whether a file is a segmentation of 3D Slicer, which often lies beside its scan."""
    try:
        return detect_format(path) == "nrrd" and nrrd.open_scan(path).segments is not None
    except (VoxelscaleError, OSError):
        return False  # whoever reads it says what is wrong


def files_of(path: Path) -> tuple[Path, ...]:
    """Every file that reading a scan or a mask opens: the header's data files, too, or a whole folder's.

    What cannot be opened stands for itself, and a missing file for nothing.
    """
    if not path.is_dir() and not path.is_file():
        return ()
    try:
        name = detect_format(path)
        if name == "dicom":
            return dicom.files_of(path)
        opened: Opened = FAMILIES[name].open_scan(path)
    except (VoxelscaleError, OSError):
        return (path,)
    return opened.files


def without_data_files(paths: Sequence[Path]) -> list[Path]:
    """The files of a folder without those that only hold the voxels of a header among them."""
    headers = [path for path in paths if path.name.lower().endswith(HEADERS)]
    held = {file for header in headers for file in files_of(header)[1:]}
    stems = {_stem(header) for header in headers}  # of a header that cannot be read

    def is_data(path: Path) -> bool:
        return path in held or (path.name.lower().endswith(DATA) and _stem(path) in stems)

    return [path for path in paths if not is_data(path)]


def _stem(path: Path) -> str:
    name = path.name
    return next((name[: -len(e)] for e in (*HEADERS, *DATA) if name.lower().endswith(e)), name)


def on_lattice(label: Path, mask: Scan, image: Path, grid: Grid) -> Scan:
    """A mask on its image's lattice; both in LPS order (`voxelscale.geometry.reorient`).

    A mask that covers another box of the same lattice, as segmentations that are cropped to what is drawn
    in them, is put at its place. A warning says so, but of 3D Slicer's segmentations, which are usually
    cropped; and how much lies outside the image and is left out.

    Raises:
        VoxelscaleError: they lie on different lattices; the message says how they differ.
    """
    if mask.grid.same_as(grid, SAME_PLACE_MM):
        return mask
    start = _offset(mask.grid, grid)
    if start is None:
        raise _elsewhere(label, mask.grid, image, grid)
    placed = crop_or_pad(mask, [-n for n in start], grid.shape)
    drawn, kept = int((mask.array > 0).sum()), int((placed.array > 0).sum())
    if drawn and not kept:
        hint = "check that the pair belongs together"
        raise VoxelscaleError(f"{label}: all it marks lies outside {image.name}", hint)
    if not is_segmentation(label):
        part, whole = (" x ".join(map(str, reversed(shape))) for shape in (mask.array.shape, grid.shape))
        where = ", ".join(map(str, reversed(start)))
        warn(f"{label}: {part} voxels that begin at voxel ({where}) of the {whole} of {image.name}")
    if kept < drawn:
        warn(f"{label}: {drawn - kept} of {drawn} voxels lie outside {image.name} and are left out")
    return Scan(placed.array, grid.affine)


def _offset(part: Grid, whole: Grid) -> IntTriple | None:
    """The voxel (z, y, x) of `whole` at which `part` begins; None where they are not of one lattice.

    Two scans whose positions were lost both begin at 0: the same first voxel is no sign of one lattice.
    And what is as large as the image is no part of it, but lies wrong.
    """
    if part.shape == whole.shape:
        return None
    start = whole.mm_to_index(part.origin)
    first = [round(float(n)) for n in start]
    if not any(first) or max(abs(n) for n in first) > MOST_VOXELS:
        return None
    z, y, x = first
    same = whole.window((z, y, x), part.shape).same_as(part, SAME_PLACE_MM)
    return (z, y, x) if same else None


def _elsewhere(label: Path, mask: Grid, image: Path, scan: Grid) -> VoxelscaleError:
    """What is said of a mask that does not lie on its image."""
    hint = "resample the mask onto its image, or check that the pair belongs together"
    if mask.shape != scan.shape:
        sizes = [" x ".join(map(str, reversed(shape))) for shape in (mask.shape, scan.shape)]
        return VoxelscaleError(f"{label}: {sizes[0]} voxels, but {image.name} has {sizes[1]}", hint)
    corners = np.indices((2, 2, 2)).reshape(3, -1).T * (np.asarray(scan.shape) - 1)
    apart = np.linalg.norm(mask.index_to_mm(corners) - scan.index_to_mm(corners), axis=1).max()
    return VoxelscaleError(f"{label}: lies up to {apart:.2f} mm away from {image.name}", hint)


def check_same_place(label: Path, mask: Scan, image: Path, scan: Scan) -> None:
    """Raise a VoxelscaleError that says how mask and image differ, if they do."""
    if not mask.grid.same_as(scan.grid, SAME_PLACE_MM):
        raise _elsewhere(label, mask.grid, image, scan.grid)


def write_scan(scan: Scan, path: Path) -> None:
    """Write .nii, .nii.gz, .mha or .nrrd, atomically and compressed, without any patient metadata.

    Raises:
        VoxelscaleError: the extension is another, or the file cannot be written.
    """
    import SimpleITK as sitk

    extension = next((e for e in WRITTEN if path.name.lower().endswith(e)), None)
    if extension is None:
        raise VoxelscaleError(f"{path}: not a format to write", f"use one of {', '.join(WRITTEN)}")
    temporary = path.with_name(f".{own_word()}.part.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with reported_as(path, "cannot be written", TO_WRITE):
            sitk.WriteImage(to_itk(scan), str(temporary), useCompression=True)
        _check_written(temporary, scan)
        put_in_place(temporary, path)
    except OSError as error:
        raise not_written(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _check_written(path: Path, scan: Scan) -> None:
    """Read a file back: on a full disk ITK ends without a word after half of it."""
    try:
        whole = np.array_equal(
            FAMILIES[detect_format(path)].open_scan(path).load(),
            scan.array,
            equal_nan=scan.array.dtype.kind == "f",
        )
    except VoxelscaleError:
        whole = False
    if not whole:
        raise OSError("the file was cut short: is the disk full, or a limit reached?")


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
