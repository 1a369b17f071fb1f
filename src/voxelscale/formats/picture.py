"""Pictures: PNG and TIFF of one plane, grey or in colours, as scans of one slice of pixels 1 mm wide.

Pillow decodes them. Their resolution is that of a printer or a screen and is not looked at. Sources: the
PNG specification (W3C, third edition), TIFF 6.0.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.formats._voxels import MOST_VOXELS, TO_COPY, Opened
from voxelscale.geometry import Grid

if TYPE_CHECKING:
    from PIL.Image import Image

PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
JPEG = b"\xff\xd8\xff"

BITS, PHOTOMETRIC, ORIENTATION, SAMPLES, SAMPLE_FORMAT = 258, 262, 274, 277, 339
"""Tags of TIFF."""

GREYS = {(1, 1), (8, 1), (16, 1), (16, 2), (32, 2), (32, 3)}
"""Bits and format (1: unsigned, 2: signed, 3: float) of grey TIFFs that Pillow reads as they are."""

TO_CONVERT = "write it as a grey or RGB picture of 8 bits, or a grey one of 16 bits"

BROKEN = (
    *(OSError, ValueError, SyntaxError, KeyError, TypeError, IndexError, EOFError),
    *(ArithmeticError, AttributeError, struct.error, zlib.error),
)
"""What Pillow raises of a damaged file."""


def matches(path: Path, head: bytes) -> bool:
    """Whether it begins as PNG or TIFF."""
    return head.startswith((PNG, *TIFF))


def open_scan(path: Path) -> Opened:
    """The picture of a file: a scan of one slice (1, y, x), of colours three volumes.

    Of a palette the colours count; as classes its indices.

    Raises:
        VoxelscaleError: it is damaged, has several pages, is partly transparent, or keeps more than Pillow
            would read of it.
    """
    with _opened(path) as picture:
        width, height = picture.size
        _check(path, picture)
        colours = picture.mode in ("RGB", "RGBA", "P")
    grid = Grid((1, height, width), np.eye(4)[:, [2, 1, 0, 3]])
    return Opened(
        grid=grid,
        load=lambda: _values(path)[0],
        load_volumes=lambda: _values(path),
        load_classes=lambda: _classes(path),
        volumes=3 if colours else 1,
        files=(path,),
    )


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """A picture whose header has been read; what Pillow raises within is reported as one line."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("PNG", "TIFF")) as picture:
                yield picture
    except VoxelscaleError:
        raise
    except Image.DecompressionBombError as error:
        raise VoxelscaleError(f"{path}: {error}", "cut it into smaller pictures") from None
    except MemoryError:
        raise
    except BROKEN as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise VoxelscaleError(f"{path}: not readable as a picture ({reason})", TO_COPY) from None


def _check(path: Path, picture: Any) -> None:
    """Raise a VoxelscaleError where reading it would lose something, or is ambiguous."""
    width, height = picture.size
    if width < 1 or height < 1 or width * height > MOST_VOXELS // 4:
        raise VoxelscaleError(f"{path}: {width} x {height} pixels", "cut it into smaller pictures")
    if getattr(picture, "n_frames", 1) > 1:
        hint = "write each page as a file, or the volume as NIfTI"
        raise VoxelscaleError(f"{path}: {picture.n_frames} pages or frames", hint)
    if picture.getexif().get(ORIENTATION, 1) != 1:
        hint = "write it upright, without the orientation tag"
        raise VoxelscaleError(f"{path}: says that it is to be turned (EXIF orientation)", hint)
    kind = _kind_of_png(path) if picture.format == "PNG" else _kind_of_tiff(picture)
    if kind:
        raise VoxelscaleError(f"{path}: {kind}", TO_CONVERT)
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "F") and picture.mode[:4] != "I;16":
        raise VoxelscaleError(f"{path}: a picture of mode {picture.mode}", TO_CONVERT)


def _kind_of_png(path: Path) -> str:
    """What a PNG is, where Pillow would cut it; by its header."""
    with path.open("rb") as handle:
        head = handle.read(26)
    depth, colour = head[24], head[25]
    names = {2: "in colours", 4: "grey with transparency", 6: "in colours with transparency"}
    return f"16 bits a sample {names[colour]}" if depth == 16 and colour in names else ""


def _kind_of_tiff(picture: Any) -> str:
    """The same of a TIFF; by its tags."""
    tags = picture.tag_v2
    bits = {int(b) for b in np.atleast_1d(tags.get(BITS, 1))}
    formats = {int(f) for f in np.atleast_1d(tags.get(SAMPLE_FORMAT, 1))}
    samples = int(tags.get(SAMPLES, 1))
    if len(bits) > 1 or len(formats) > 1:
        return "samples of several kinds"
    if samples == 1:
        kind = (bits.pop(), formats.pop())
        photometric = int(tags.get(PHOTOMETRIC, 1))
        if photometric == 0 and kind != (1, 1):
            return "white is 0 (PhotometricInterpretation)"
        grey = kind in GREYS and photometric in (0, 1, 3)
        return "" if grey else f"samples of {kind[0]} bits (format {kind[1]})"
    if bits != {8} or formats != {1}:
        return f"{samples} samples of {min(bits)} bits a pixel"
    return "" if picture.mode in ("RGB", "RGBA", "LA") else f"{samples} samples a pixel ({picture.mode})"


def _values(path: Path) -> NDArray[Any]:
    """(volume, 1, y, x) samples: one volume of a grey picture, three of one in colours."""
    with _opened(path) as picture:
        clear = picture.mode in ("RGBA", "LA") or "transparency" in picture.info
        if clear and int(np.asarray(picture.convert("RGBA"))[..., 3].min()) < 255:
            raise VoxelscaleError(f"{path}: partly transparent", "write it without an alpha channel")
        if picture.mode in ("RGBA", "P", "RGB"):
            return np.ascontiguousarray(np.moveaxis(np.asarray(picture.convert("RGB")), -1, 0)[:, None])
        return _grey(path, picture)[None, None]


def _classes(path: Path) -> NDArray[Any]:
    """(1, y, x) class numbers: the samples of a grey picture, the indices of a palette."""
    with _opened(path) as picture:
        if picture.mode == "P":
            return np.array(picture)[None]
        if picture.mode in ("RGB", "RGBA"):
            colours = np.asarray(picture.convert("RGB"))
            if (colours != colours[..., :1]).any():
                hint = "write its class numbers as grey levels or as the indices of a palette"
                raise VoxelscaleError(f"{path}: a mask in colours", hint)
            return np.array(colours[..., 0])[None]
        return _grey(path, picture)[None]


def _grey(path: Path, picture: Any) -> NDArray[Any]:
    """(y, x) samples as they are stored."""
    if picture.mode == "LA":
        return np.array(picture)[..., 0]
    array = np.array(picture)
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if picture.format == "PNG" and array.dtype == np.uint8:
        with path.open("rb") as handle:
            depth = handle.read(25)[24]
        # Pillow spreads samples of 2 and 4 bits over 0 to 255.
        return array // {2: 85, 4: 17}.get(depth, 1)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
