"""Checks of headers, and voxels read from files that nobody vouches for.

The file-based formats are read with NumPy and Python's own decompressors, not through C libraries that
trust a header: a lying one cannot crash the process, and what is read is bounded by what the header
claims, what the header claims by what the file can hold.
"""

from __future__ import annotations

import bz2
import contextlib
import io
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Grid, IntTriple, Slices

MOST_VOXELS = 2**31
"""A header that claims more is lying, or the scan does not fit anyway (4 GiB of int16)."""

SHORTEST_MM, LONGEST_MM, FARTHEST_MM = 0.01, 5000.0, 1e6
"""Least spacing, greatest edge of a scan, greatest coordinate of its origin that can be a patient's."""

SKEW = 1e-3
"""Greatest cosine between two voxel axes: 0.3 mm over the length of a chest."""

LONGEST_HEADER = 1 << 20
"""Bytes of a text header that are looked at; those of segmentations list every segment."""

MOST_SKIPPED = 1 << 26
"""Bytes between a header and its voxels (64 MiB); more is no extension but a lie."""

HEAD = 1 << 16
BLOCK = 1 << 22
PIECE = 1 << 14
"""Bytes read, decompressed and compressed, at a time: the latter is copied once a member."""

MOST_MEMBERS = 100_000
GZIP = b"\x1f\x8b"
TO_COPY = "copy or download it again"
TO_REWRITE = "write its header anew"
WHOLE_VOLUME = "give the whole volume, not one slice"

Encoding = Literal["raw", "deflate", "bzip2", "text", "hex"]


@dataclass(frozen=True, kw_only=True)
class Segments:
    """What the header of a segmentation says of its segments.

    Attributes:
        layers: (layer, value in that layer) of each segment; segments may overlap in different layers.
        load: reads the layers, (layer, z, y, x).
    """

    layers: tuple[tuple[int, int], ...]
    load: Callable[[], NDArray[Any]]

    @property
    def numbers(self) -> tuple[int, ...]:
        """What a segment is called: its value where no two share one, else its place, from 1."""
        values = tuple(value for _, value in self.layers)
        return values if len(set(values)) == len(values) else tuple(range(1, len(values) + 1))

    def mask(self, wanted: Sequence[int] | None) -> NDArray[np.int32]:
        """(z, y, x) numbers of segments; where several overlap a wanted one, else the last, is taken."""
        layers = self.load()
        out = np.zeros(layers.shape[1:], np.int32)
        parts = zip(self.numbers, self.layers, strict=True)
        for number, (layer, value) in sorted(parts, key=lambda part: part[0] in (wanted or ())):
            out[layers[layer] == value] = number
        return out

    def each(self) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """The number of each segment, and where it is (z, y, x)."""
        layers = self.load()
        for number, (layer, value) in zip(self.numbers, self.layers, strict=True):
            yield number, layers[layer] == value


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A scan of which the header has been read, and nothing else.

    Attributes:
        grid: where its voxels lie.
        load: reads them, (z, y, x), with slope and intercept applied.
        slices: of DICOM, the slices that the scan is made of.
        load_classes: of DICOM, reads them as class numbers, which are never mixed by resampling.
        files: that hold header and voxels, where these are known.
        segments: of a segmentation with layers, by which a mask is made of it.
        volumes: how many it holds, along a fourth axis or as colours; `load` reads the only one.
        load_volumes: of several, reads them, (volume, z, y, x).
    """

    grid: Grid
    load: Callable[[], NDArray[Any]]
    slices: Slices | None = None
    load_classes: Callable[[], NDArray[Any]] | None = None
    files: tuple[Path, ...] = ()
    segments: Segments | None = None
    volumes: int = 1
    load_volumes: Callable[[], NDArray[Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the voxels of a scan lie, and how.

    Attributes:
        files: one after another they hold the voxels.
        encoding: of each file; ``deflate`` is gzip or zlib, which their first bytes distinguish.
        offset: bytes to skip in each file before it is decoded; -1: what the voxels do not need.
        skip: bytes to skip once it is decoded.
        dtype: with its byte order.
        shape: voxels along (z, y, x); of a segmentation with an axis of its layers, too.
    """

    files: tuple[Path, ...]
    encoding: Encoding = "raw"
    offset: int = 0
    skip: int = 0
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        """Bytes of all voxels."""
        return math.prod(self.shape) * self.dtype.itemsize


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
    shown = " x ".join(map(str, size))[:80]
    if min(size, default=0) < 1:
        raise VoxelscaleError(f"{path}: claims {shown} voxels", TO_REWRITE)
    if len(size) < 3:
        raise VoxelscaleError(f"{path}: 2-D ({shown} voxels)", WHOLE_VOLUME)
    if math.prod(size) > MOST_VOXELS:
        raise VoxelscaleError(f"{path}: claims {shown} voxels, more than {MOST_VOXELS}", "crop it first")


def several_volumes(path: Path, volumes: int) -> VoxelscaleError:
    """What is said of a NIfTI of four axes where one volume is wanted."""
    hint = "split it and give one volume, or name each in reading.channels"
    return VoxelscaleError(f"{path}: 4-D, {volumes} volumes", hint)


def check_affine(path: Path, shape: IntTriple, affine: NDArray[np.float64]) -> None:
    """Raise a VoxelscaleError unless an affine describes voxels in a patient.

    Args:
        shape: voxels along (z, y, x).
        affine: (4, 4), voxel index (z, y, x, 1) to LPS mm.
    """
    if not np.isfinite(affine).all():
        raise VoxelscaleError(f"{path}: NaN or infinity in its geometry", TO_REWRITE)
    columns, origin = affine[:3, :3], affine[:3, 3]
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        spacing = np.sqrt((columns**2).sum(axis=0))
        units = columns / spacing
        cosines = np.abs(units.T @ units - np.eye(3))
    shown = " x ".join(f"{s:g}" for s in spacing[::-1])
    if not min(spacing) >= SHORTEST_MM or not max(spacing * shape) <= LONGEST_MM:
        raise VoxelscaleError(f"{path}: a spacing of {shown} mm", TO_REWRITE)
    if not np.abs(origin).max() <= FARTHEST_MM:
        raise VoxelscaleError(f"{path}: an origin {np.abs(origin).max():g} mm away", TO_REWRITE)
    if not cosines.max() <= SKEW:
        hint = "resample it onto a right-angled grid, for instance with SimpleITK"
        raise VoxelscaleError(f"{path}: its voxel axes do not stand at right angles", hint)


def not_finite(path: Path, count: int) -> VoxelscaleError:
    """What is said of a scan with NaN or infinity in it."""
    hint = "replace them, for instance by -1024 (air)"
    return VoxelscaleError(f"{path}: {count} voxels are NaN or infinite", hint)


def numbers(path: Path, key: str, text: str, count: int) -> list[float]:
    """The `count` numbers of a text header's field, at least one.

    Raises:
        VoxelscaleError: there are not so many, or something else.
    """
    try:
        found = [float(word) for word in text.split()]
    except ValueError:
        found = []
    if len(found) != count:
        raise VoxelscaleError(f"{path}: its {key} is {text[:60]!r}", TO_REWRITE)
    return found


def whole_numbers(path: Path, key: str, text: str, count: int) -> list[int]:
    """As `numbers`, but whole ones."""
    found = numbers(path, key, text, count)
    if not all(abs(n) < 2**63 and n == int(n) for n in found):
        raise VoxelscaleError(f"{path}: its {key} is {text[:60]!r}", TO_REWRITE)
    return [int(n) for n in found]


def data_file(path: Path, name: str) -> Path:
    """The file of voxels that a header names, which must lie beside it.

    Raises:
        VoxelscaleError: it is missing, in another folder (also by a link), the header itself, or no file.
    """
    shown = name if len(name) <= 80 else f"{name[:80]}…"
    try:
        target = path.parent / name
        found = target.resolve()
        if found.parent != path.parent.resolve():
            raise VoxelscaleError(f"{path}: its data file lies in another folder", "put both in one folder")
        if found == path.resolve():
            raise VoxelscaleError(f"{path}: names itself as its data file", TO_REWRITE)
        if not target.is_file():
            raise VoxelscaleError(f"{path}: its data file {shown!r} is missing", "put it beside the header")
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL, a circle of links
        raise VoxelscaleError(
            f"{path}: its data file {shown!r} cannot be there", "put it beside the header"
        ) from None
    return target


def is_list(said: str) -> bool:
    """Whether a header names its data files in the lines that follow it."""
    return said.upper().split()[:1] == ["LIST"]


def data_files(path: Path, said: str, rest: bytes, slices: int) -> tuple[Path, ...]:
    """The files of voxels that a header names: one, or a list of them, one or several slices each.

    Args:
        said: what the header says, read as Latin-1.
        rest: what follows it.

    Raises:
        VoxelscaleError: as `data_file`; or it is a pattern; or a list of none, or of more than slices.
    """
    if "%" in said:
        hint = "convert it to one file, for instance with SimpleITK"
        raise VoxelscaleError(f"{path}: its data files are a pattern", hint)
    lines = filter(bytes.strip, rest.splitlines()) if is_list(said) else [said.encode("latin-1")]
    names = [line.strip().decode("utf-8", "replace") for line in lines]
    if not 1 <= len(names) <= slices:
        raise VoxelscaleError(f"{path}: lists {len(names)} data files for {slices} slices", TO_REWRITE)
    return tuple(data_file(path, name) for name in names)


def plain_head(path: Path, size: int) -> bytes:
    """The first bytes of a file, looked at through gzip where it is gzipped; fewer if it breaks off."""
    with path.open("rb") as handle:
        head = handle.read(HEAD)
    if not head.startswith(GZIP):
        return head[:size]
    plain = b""
    with contextlib.suppress(zlib.error, EOFError):
        for block in _members(io.BytesIO(head), lambda: zlib.decompressobj(31), GZIP, size):
            plain += block
            if len(plain) >= size:
                break
    return plain[:size]


def read_voxels(path: Path, layout: Layout) -> NDArray[Any]:
    """The voxels (z, y, x) of a scan, in the machine's byte order.

    Args:
        path: the scan's, for messages.

    Raises:
        VoxelscaleError: a file is cut short, damaged, or holds a slice or more beyond what its header
            says; or there is not the memory for it.
    """
    _check_memory(path, layout.length)
    data = bytearray()
    beyond = 0
    try:
        for block in _plain(path, layout):
            wanted = layout.length - len(data)
            data += block[:wanted]
            # Read on to the end: that is where gzip keeps its checksum.
            beyond += max(0, len(block) - wanted)
            if beyond >= math.prod(layout.shape[1:]) * layout.dtype.itemsize:
                problem = "holds more voxels than its header says"
                raise VoxelscaleError(f"{path}: {problem}", TO_REWRITE)
    except (zlib.error, OSError, EOFError, ValueError) as error:
        raise VoxelscaleError(
            f"{path}: its voxels cannot be read: it is cut short or damaged ({error})", TO_COPY
        ) from None
    if len(data) < layout.length:
        raise cut_short(path, len(data), layout.length)
    array = np.frombuffer(data, layout.dtype).reshape(layout.shape)
    return array if layout.dtype.isnative else array.byteswap().view(layout.dtype.newbyteorder("="))


def cut_short(path: Path, found: int, needed: int) -> VoxelscaleError:
    """What is said of a file that ends before its voxels do."""
    problem = f"its voxels cannot be read: it is cut short or damaged ({found} of {needed} bytes)"
    return VoxelscaleError(f"{path}: {problem}", TO_COPY)


def _check_memory(path: Path, needed: int) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * needed > total:
        problem = (
            f"takes {needed / 2**30:.1f} GiB, more than half of this machine's {total / 2**30:.1f} GiB"
        )
        raise VoxelscaleError(f"{path}: {problem}", "crop it first, or use a machine with more memory")


def _plain(path: Path, layout: Layout) -> Iterator[bytes]:
    """The decoded content of all files in blocks of some MiB, what is to be skipped left out."""
    offsets = _offsets(path, layout)
    for file, offset in zip(layout.files, offsets, strict=True):
        with file.open("rb") as handle:
            handle.seek(offset)
            skip = layout.skip
            for block in _decode(handle, layout):
                yield block[skip:]
                skip = max(0, skip - len(block))


def _offsets(path: Path, layout: Layout) -> list[int]:
    """Where each file's content begins; files that cannot hold the voxels are refused unread."""
    sizes = [file.stat().st_size for file in layout.files]
    if layout.offset < 0:
        if layout.encoding != "raw":
            raise VoxelscaleError(f"{path}: data at the end of a compressed file", TO_REWRITE)
        each = layout.length // len(sizes)
        offsets = [size - each for size in sizes]
        if min(offsets) < 0:
            raise cut_short(path, min(sizes), each)
        return offsets
    found = sum(max(0, size - layout.offset - layout.skip) for size in sizes)
    if layout.encoding == "raw" and found < layout.length:
        raise cut_short(path, found, layout.length)
    return [layout.offset] * len(sizes)


def _decode(handle: BinaryIO, layout: Layout) -> Iterator[bytes]:
    if layout.encoding == "deflate":
        return _members(handle, lambda: zlib.decompressobj(47), GZIP)
    if layout.encoding == "bzip2":
        return _members(handle, bz2.BZ2Decompressor, b"BZ")
    blocks = iter(lambda: handle.read(BLOCK), b"")
    if layout.encoding == "hex":
        return _unhexed(blocks)
    if layout.encoding == "text":
        return _parsed(blocks, layout.dtype)
    return blocks


def _members(handle: BinaryIO, new: Callable[[], Any], magic: bytes, most: int = BLOCK) -> Iterator[bytes]:
    """Decompress a file of one or several members, compressed streams one behind the other.

    What follows a whole member and does not begin as another is left alone.

    Args:
        new: makes a decompressor, of zlib or bz2, for one member.
        magic: the first bytes of a member.
        most: bytes that are decompressed at a time.
    """
    pending = b""
    for _ in range(MOST_MEMBERS):
        machine = new()
        while not machine.eof:
            # bz2 keeps what it was given until all of it is out; zlib hands back the rest.
            if not pending and getattr(machine, "needs_input", True):
                pending = handle.read(PIECE)
                if not pending:
                    raise EOFError("the end of its compressed data is missing")
            yield machine.decompress(pending, most)
            pending = getattr(machine, "unconsumed_tail", b"")
        pending = machine.unused_data
        if len(pending) < len(magic):
            pending += handle.read(PIECE)
        if not pending.startswith(magic):
            return


def _unhexed(blocks: Iterator[bytes]) -> Iterator[bytes]:
    odd = b""
    for block in blocks:
        digits = odd + b"".join(block.split())
        odd = digits[len(digits) // 2 * 2 :]
        yield bytes.fromhex(digits[: len(digits) // 2 * 2].decode("ascii"))


def _parsed(blocks: Iterator[bytes], dtype: np.dtype[Any]) -> Iterator[bytes]:
    """Numbers in text as the bytes of voxels."""
    rest = b""
    for block in blocks:
        for start in range(0, len(block), BLOCK >> 6):
            text = rest + block[start : start + (BLOCK >> 6)]
            cut = max(text.rfind(b" "), text.rfind(b"\n"), text.rfind(b"\t")) + 1
            rest = text[cut:]
            if len(rest) > 1000:
                raise ValueError("a number of over 1000 digits")
            yield _voxels_of(text[:cut].split(), dtype)
    yield _voxels_of(rest.split(), dtype)


def _voxels_of(words: list[bytes], dtype: np.dtype[Any]) -> bytes:
    values = np.array([float(word) for word in words], np.float64)
    if dtype.kind != "f":
        limits = np.iinfo(dtype)
        if not ((values >= limits.min) & (values <= limits.max) & (values == np.rint(values))).all():
            raise ValueError(f"a number that is no {dtype.name}")
    with np.errstate(over="ignore"):
        return values.astype(dtype).tobytes()
