"""Compressed pixels: RLE decoded by pydicom, the JPEGs by GDCM through SimpleITK.

Each frame's code is handed over alone, to GDCM in a file without any other attribute: it then
decodes and does nothing else, and scale, padding and places stay in one hand.
"""

from __future__ import annotations

import struct
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.formats._itk import reported_as
from voxelscale.formats.dicom.header import Pixels

RLE, JPEG_2000 = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.9"
READ = (
    RLE,
    "1.2.840.10008.1.2.4.50",  # JPEG baseline
    "1.2.840.10008.1.2.4.51",  # JPEG extended, 12 bits
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
)
"""Transfer syntaxes (PS3.5, A.4) that can be read."""

PROBLEM = "its pixels are cut short or damaged"
COPY = "copy or export the series again"


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it pydicom's remarks on odd code stay off the screen: what is wrong is an error below."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pydicom")
        yield


def decoded(pixels: Pixels, wanted: Iterable[int], handle: BinaryIO) -> Iterator[NDArray[Any]]:
    """The stored numbers (y, x) of some frames of an open file with compressed pixels.

    Raises:
        VoxelscaleError: the transfer syntax is another, or the code is cut short, damaged, or of another
            size than the header says.
    """
    if pixels.syntax not in READ:
        hint = "decompress it first, for instance with gdcmconv --raw or dcmdjpeg"
        raise VoxelscaleError(f"{pixels.path}: transfer syntax {pixels.syntax} cannot be read", hint)
    codes = _codes(pixels, handle)
    with tempfile.TemporaryDirectory(prefix="voxelscale-") as folder:
        alone = Path(folder) / "frame.dcm"
        for index in wanted:
            if pixels.syntax == RLE:
                # GDCM refuses some pictures of odd sizes, and is no faster.
                yield _decode_rle(pixels, codes[index])
                continue
            size = _coded_size(pixels.syntax, codes[index])
            if size != (pixels.rows, pixels.columns):
                what = f"{PROBLEM} (a picture of {size[1]} x {size[0]} voxels)"
                raise VoxelscaleError(f"{pixels.path}: {what}", COPY)
            _write_alone(pixels, codes[index], alone)
            yield _decode(pixels, alone)


@_quiet()
def _codes(pixels: Pixels, handle: BinaryIO) -> list[bytes]:
    """Each frame's code (PS3.5, A.4), its fragments joined."""
    from pydicom.encaps import generate_frames

    handle.seek(pixels.offset)
    try:
        codes = list(generate_frames(handle.read(), number_of_frames=pixels.frames))
    except Exception as error:
        # pydicom may end a garbled file in any kind of error.
        raise VoxelscaleError(f"{pixels.path}: {PROBLEM} ({type(error).__name__})", COPY) from None
    if len(codes) != pixels.frames:
        what = f"{PROBLEM} ({len(codes)} of {pixels.frames} frames)"
        raise VoxelscaleError(f"{pixels.path}: {what}", COPY)
    return codes


def _coded_size(syntax: str, code: bytes) -> tuple[int, int]:
    """Rows and columns that the code itself claims, by which a decoder takes memory; 0 where it does not.

    JPEG and JPEG-LS: the frame header (ISO 10918-1 B.2.2, ISO 14495-1 C.2.2); JPEG 2000: SIZ, which
    follows the start of the codestream at once (ISO 15444-1 A.5.1).
    """
    if syntax.startswith(JPEG_2000):
        start = code.find(b"\xff\x4f\xff\x51")
        if start < 0 or len(code) < start + 24:
            return 0, 0
        right, bottom, left, top = struct.unpack(">4I", code[start + 8 : start + 24])
        return bottom - top, right - left
    place = 2
    while place + 9 <= len(code) and code[place] == 0xFF:
        marker = code[place + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = struct.unpack(">2H", code[place + 5 : place + 9])
            return rows, columns
        place += 1 if marker == 0xFF else 2 + struct.unpack(">H", code[place + 2 : place + 4])[0]
    return 0, 0


@_quiet()
def _write_alone(pixels: Pixels, code: bytes, path: Path) -> None:
    """A file with one frame and no more than a decoder needs."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import SecondaryCaptureImageStorage

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pixels.syntax
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = "2.25.1"
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.Rows, file.Columns = pixels.rows, pixels.columns
    file.BitsAllocated, file.BitsStored, file.HighBit = pixels.allocated, pixels.stored, pixels.high
    file.PixelRepresentation = int(pixels.signed)
    file.PixelData = encapsulate([code])
    file["PixelData"].VR = "OB"
    file.save_as(path, enforce_file_format=True)


@_quiet()
def _decode_rle(pixels: Pixels, code: bytes) -> NDArray[Any]:
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder

    try:
        array, _ = get_decoder(RLE).as_array(
            encapsulate([code]),
            raw=True,
            decoding_plugin="pydicom",
            rows=pixels.rows,
            columns=pixels.columns,
            number_of_frames=1,
            samples_per_pixel=1,
            photometric_interpretation="MONOCHROME2",
            bits_allocated=pixels.allocated,
            bits_stored=pixels.stored,
            pixel_representation=int(pixels.signed),
            pixel_keyword="PixelData",
        )
    except Exception as error:
        # As in `_codes`.
        raise VoxelscaleError(f"{pixels.path}: {PROBLEM} ({type(error).__name__})", COPY) from None
    return np.asarray(array)


def _decode(pixels: Pixels, path: Path) -> NDArray[Any]:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    with reported_as(pixels.path, PROBLEM, COPY):
        decoded: NDArray[Any] = sitk.GetArrayFromImage(reader.Execute())
    size = pixels.rows * pixels.columns
    if decoded.size != size or decoded.dtype.itemsize * 8 != pixels.allocated:
        raise VoxelscaleError(f"{pixels.path}: {PROBLEM} ({decoded.size} of {size} voxels)", COPY)
    return decoded.reshape(pixels.rows, pixels.columns).view(
        np.dtype(f"{'i' if pixels.signed else 'u'}{pixels.allocated // 8}")
    )
