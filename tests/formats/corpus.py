"""Broken and hostile files: each is made by a function of a folder, beside what must be said of it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
import torch
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from tests.formats.test_formats import write_series

from voxelscale.files import write_sealed
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, affine_from_itk, to_itk

SHAPE = (6, 9, 11)
VOXELS = 2 * 6 * 9 * 11
BOMB = zlib.compressobj(9, wbits=31)
BOMB_BYTES = b"".join([BOMB.compress(bytes(1 << 20)) for _ in range(600)]) + BOMB.flush()
"""600 MiB of zeros in 600 KiB."""


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """One file.

    Attributes:
        make: writes it into a folder and returns its path.
        words: must stand in the message; "": it must be read.
    """

    name: str
    make: Callable[[Path], Path]
    words: str


def scan() -> Scan:
    """A small valid scan, oblique."""
    turn = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])
    values = np.random.default_rng(0).integers(-1024, 2000, SHAPE).astype(np.int16)
    return Scan(values, affine_from_itk((-120.5, 33.25, 900.0), (0.7, 0.8, 2.5), turn))


def valid(suffix: str, folder: Path) -> bytes:
    """The bytes of a valid file, and the file."""
    path = folder / f"valid{suffix}"
    if suffix in (".mhd", ".nhdr", ".hdr") or suffix == ".mha":
        sitk.WriteImage(to_itk(scan()), str(path))
    else:
        write_scan(scan(), path)
    return path.read_bytes()


def _written(folder: Path, suffix: str, data: bytes) -> Path:
    path = folder / f"scan{suffix}"
    path.write_bytes(data)
    return path


def _long(path: Path) -> Path:
    """The file made 1 GiB long, with zeros that take no space."""
    os.truncate(path, 1 << 30)
    return path


def _hostile(name: str, words: str, suffix: str, change: Callable[[bytes, Path], bytes]) -> Hostile:
    def make(folder: Path) -> Path:
        return _written(folder, suffix, change(valid(suffix, folder), folder))

    return Hostile(name=name, make=make, words=words)


# ---------------------------------------------------------------- NIfTI

Edit = tuple[int, str, tuple[float | bytes, ...]]
"""Byte in the header, struct's code, values."""


def edited(data: bytes, *edits: Edit) -> bytes:
    """NIfTI bytes with numbers of the header replaced."""
    out = bytearray(data)
    for start, code, values in edits:
        struct.pack_into("<" + code, out, start, *values)
    return bytes(out)


DIM, TYPE, BITS, PIXDIM, OFFSET, SLOPE = 40, 70, 72, 76, 108, 112
UNITS, CODES, QUATERNION, SROW, MAGIC = 123, 252, 256, 280, 344
NAN, INF = float("nan"), float("inf")

NIFTI_EDITS: dict[str, tuple[str, list[Edit]]] = {
    "dims-larger": ("cut short", [(DIM + 6, "h", (7,))]),
    "dims-smaller": ("more voxels than", [(DIM + 6, "h", (5,))]),
    "dims-negative": ("claims", [(DIM + 4, "h", (-9,))]),
    "dims-zero": ("claims", [(DIM + 2, "h", (0,))]),
    "dims-greatest": ("more than", [(DIM + 2, "3h", (32767, 32767, 32767))]),
    "dims-just-below-the-limit": ("cut short", [(DIM + 2, "3h", (1290, 1290, 1290))]),
    "dims-none": ("0 dimensions", [(DIM, "h", (0,))]),
    "dims-eight": ("8 dimensions", [(DIM, "h", (8,))]),
    "dims-negative-count": ("-3 dimensions", [(DIM, "h", (-3,))]),
    "one-slice": ("2-D", [(DIM + 6, "h", (1,))]),
    "four-d": ("2 volumes", [(DIM, "h", (4,)), (DIM + 6, "2h", (3, 2))]),
    "five-d": ("2 values a voxel", [(DIM, "h", (5,)), (DIM + 6, "3h", (3, 1, 2))]),
    "seven-d": ("values a voxel", [(DIM, "h", (7,)), (DIM + 8, "4h", (1, 32767, 32767, 32767))]),
    "bitpix-8": ("8 bits a voxel", [(BITS, "h", (8,))]),
    "bitpix-negative": ("-16 bits", [(BITS, "h", (-16,))]),
    "datatype-float": ("16 bits a voxel", [(TYPE, "h", (16,))]),
    "datatype-unknown": ("unknown type", [(TYPE, "h", (77,))]),
    "datatype-bits": ("single bits", [(TYPE, "2h", (1, 1))]),
    "datatype-rgb": ("colours", [(TYPE, "2h", (128, 24))]),
    "datatype-complex": ("complex", [(TYPE, "2h", (32, 64))]),
    "datatype-float128": ("float128", [(TYPE, "2h", (1536, 128))]),
    "spacing-negative": ("spacing", [(PIXDIM + 4, "f", (-0.7,))]),
    "spacing-zero": ("spacing", [(PIXDIM + 8, "f", (0,))]),
    "spacing-nan": ("spacing", [(PIXDIM + 8, "f", (NAN,))]),
    "spacing-inf": ("spacing", [(PIXDIM + 12, "f", (INF,))]),
    "spacing-tiny": ("spacing", [(PIXDIM + 4, "3f", (1e-30,) * 3), (CODES, "2h", (1, 0))]),
    "spacing-huge": ("spacing", [(PIXDIM + 4, "3f", (1e30,) * 3), (CODES, "2h", (1, 0))]),
    "spacing-against-sform": ("mm apart", [(PIXDIM + 12, "f", (3.5,)), (CODES, "2h", (0, 1))]),
    "sform-nan": ("NaN or infinity", [(SROW + 4, "f", (NAN,))]),
    "sform-inf": ("NaN or infinity", [(SROW + 12, "f", (-INF,))]),
    "sform-far": ("origin", [(SROW + 12, "f", (1e30,)), (CODES, "2h", (0, 1))]),
    "sform-zero": ("mm apart", [(SROW, "12f", (0,) * 12)]),
    "sform-singular": (
        "right angles",
        [(SROW, "12f", (0.7, 0.8, *([0] * 8), 2.5, 0)), (CODES, "2h", (0, 1))],
    ),
    "sform-sheared": (
        "right angles",
        [(SROW, "12f", (0.7, 0.48, 0, 0, 0, 0.64, *([0] * 4), 2.5, 0)), (CODES, "2h", (0, 1))],
    ),
    "qform-against-sform": ("mm apart", [(QUATERNION, "3f", (0.5, 0.1, 0.1))]),
    "qform-elsewhere": ("mm apart", [(QUATERNION + 12, "f", (77,))]),
    "qform-no-rotation": ("no rotation", [(QUATERNION, "3f", (2, 2, 2)), (CODES, "2h", (1, 0))]),
    "qform-nan": ("no rotation", [(QUATERNION, "3f", (NAN, 0, 0)), (CODES, "2h", (1, 0))]),
    "no-form": ("does not say how it lies", [(CODES, "2h", (0, 0))]),
    "in-metres": ("metres", [(UNITS, "B", (1,))]),
    "offset-inside-header": ("in its header", [(OFFSET, "f", (100,))]),
    "offset-negative": ("begin at byte", [(OFFSET, "f", (-352,))]),
    "offset-nan": ("begin at byte", [(OFFSET, "f", (NAN,))]),
    "offset-huge": ("begin at byte", [(OFFSET, "f", (1e30,))]),
    "offset-at-end": ("cut short", [(OFFSET, "f", (1500,))]),
    "slope-zero": ("", [(SLOPE, "2f", (0, 5))]),
    "slope-nan": ("", [(SLOPE, "2f", (NAN, NAN))]),
    "slope-inf": ("slope and intercept", [(SLOPE, "2f", (INF, 0))]),
    "intercept-nan": ("slope and intercept", [(SLOPE, "2f", (1, NAN))]),
    "slope-greatest": ("infinite", [(SLOPE, "2f", (3e38, 0))]),
    "size-of-header": ("damaged", [(0, "i", (999,))]),
    "magic-of-a-pair": ("missing", [(MAGIC, "4s", (b"ni1\0",))]),
}


def _swapped_size(data: bytes, _: Path) -> bytes:
    return data[:4][::-1] + data[4:]


def _edits(edits: list[Edit]) -> Callable[[bytes, Path], bytes]:
    return lambda data, _: edited(data, *edits)


NIFTI = [
    *(
        _hostile(f"nifti-{name}", words, ".nii", _edits(edits))
        for name, (words, edits) in NIFTI_EDITS.items()
    ),
    _hostile("nifti-wrong-endian", "dimensions", ".nii", _swapped_size),
    _hostile("nifti-cut-in-header", "not a scan", ".nii", lambda d, _: d[:300]),
    _hostile("nifti-cut-after-header", "cut short", ".nii", lambda d, _: d[:348]),
    _hostile("nifti-cut-in-extension", "cut short", ".nii", lambda d, _: d[:350]),
    _hostile("nifti-cut-in-voxels", "cut short", ".nii", lambda d, _: d[:-1]),
    _hostile(
        "nifti-garbage",
        "dimensions",
        ".nii",
        lambda d, _: d[:4] + b"\xa7" * 340 + d[344:348] + b"\x5b" * 2000,
    ),
    _hostile("gzip-cut-in-header", "not a scan", ".nii.gz", lambda d, _: d[:15]),
    _hostile("gzip-cut-in-voxels", "cut short", ".nii.gz", lambda d, _: d[:700]),
    _hostile("gzip-without-trailer", "cut short", ".nii.gz", lambda d, _: d[:-8]),
    _hostile("gzip-cut-in-trailer", "cut short", ".nii.gz", lambda d, _: d[:-3]),
    _hostile("gzip-checksum", "damaged", ".nii.gz", lambda d, _: d[:-8] + b"\0\0\0\0" + d[-4:]),
    _hostile("gzip-length", "damaged", ".nii.gz", lambda d, _: d[:-4] + b"\xff\xff\xff\xff"),
    _hostile("gzip-trailing-rubbish", "", ".nii.gz", lambda d, _: d + b"rubbish" * 100),
    _hostile("gzip-trailing-zeros", "", ".nii.gz", lambda d, _: d + bytes(4096)),
    _hostile("gzip-of-gzip", "not a scan", ".nii.gz", lambda d, _: gzip.compress(d)),
    _hostile(
        "gzip-members",
        "",
        ".nii",
        lambda d, _: b"".join(gzip.compress(d[i : i + 100]) for i in range(0, len(d), 100)),
    ),
    _hostile(
        "gzip-empty-members",
        "cut short",
        ".nii",
        lambda d, _: gzip.compress(d[:352]) + gzip.compress(b"") * 200_000,
    ),
    _hostile("gzip-bomb-behind", "more voxels than", ".nii", lambda d, _: gzip.compress(d) + BOMB_BYTES),
    _hostile(
        "gzip-bomb-of-voxels",
        "cut short",
        ".nii",
        lambda d, _: gzip.compress(edited(d, (DIM + 2, "3h", (1290,) * 3))[:352] + bytes(1 << 24)),
    ),
    _hostile("gzip-bomb-alone", "not a scan", ".nii.gz", lambda *_: BOMB_BYTES),
    _hostile(
        "gzip-endless-name",
        "not a scan",
        ".nii.gz",
        lambda *_: b"\x1f\x8b\x08\x08\0\0\0\0\0\x03" + b"a" * (30 << 20),
    ),
]


def _analyze(folder: Path) -> Path:
    """Analyze 7.5, as nibabel writes it."""
    import nibabel

    path = folder / "scan.hdr"
    nibabel.save(nibabel.AnalyzeImage(scan().array.T, np.eye(4)), path)
    return path


def _pair(folder: Path, change: Callable[[Path, Path], Path]) -> Path:
    valid(".hdr", folder)
    return change(folder / "valid.hdr", folder / "valid.img")


def _img_missing(header: Path, image: Path) -> Path:
    image.unlink()
    return header


def _img_cut(header: Path, image: Path) -> Path:
    image.write_bytes(image.read_bytes()[:-5])
    return header


def _img_fifo(header: Path, image: Path) -> Path:
    image.unlink()
    os.mkfifo(image)
    return header


def _img_link(header: Path, image: Path) -> Path:
    image.unlink()
    image.symlink_to("/dev/zero")
    return header


PAIRS = [
    Hostile(name="analyze", make=_analyze, words="Analyze 7.5"),
    Hostile(name="pair-by-its-img", make=lambda f: _pair(f, lambda _, i: i), words="without their header"),
    Hostile(name="pair-whole", make=lambda f: _pair(f, lambda h, _: h), words=""),
    Hostile(name="pair-img-missing", make=lambda f: _pair(f, _img_missing), words="missing"),
    Hostile(name="pair-img-cut", make=lambda f: _pair(f, _img_cut), words="cut short"),
    Hostile(name="pair-img-fifo", make=lambda f: _pair(f, _img_fifo), words="missing"),
    Hostile(name="pair-img-dev-zero", make=lambda f: _pair(f, _img_link), words="another folder"),
]

# ---------------------------------------------------------------- MetaImage


def _line(key: str, value: str) -> Callable[[bytes, Path], bytes]:
    """The header's line of a key replaced; its voxels kept."""

    def change(data: bytes, _: Path) -> bytes:
        lines = data.split(b"\n", 13)
        out = [f"{key} = {value}".encode() if ln.startswith(f"{key} =".encode()) else ln for ln in lines]
        assert out != lines
        return b"\n".join(out)

    return change


def _before_data(text: bytes) -> Callable[[bytes, Path], bytes]:
    return lambda data, _: data.replace(b"ElementDataFile", text + b"\nElementDataFile", 1)


META_LINES = [
    ("dims-larger", "DimSize", "11 9 7", "cut short"),
    ("dims-smaller", "DimSize", "11 9 5", "more voxels than"),
    ("dims-negative", "DimSize", "11 -9 6", "claims"),
    ("dims-2e31", "DimSize", "2147483648 2147483648 2147483648", "more than"),
    ("dims-overflow", "DimSize", "1e308 1e308 1e308", "DimSize"),
    ("dims-just-below", "DimSize", "1290 1290 1290", "cut short"),
    ("dims-few", "DimSize", "11 9", "DimSize"),
    ("dims-words", "DimSize", "a b c", "DimSize"),
    ("dims-fraction", "DimSize", "11 9 6.5", "DimSize"),
    ("ndims-huge", "NDims", "1000000000", "dimensions"),
    ("ndims-none", "NDims", "", "NDims"),
    ("ndims-two", "NDims", "2", "DimSize"),
    ("spacing-zero", "ElementSpacing", "0 1 1", "spacing"),
    ("spacing-nan", "ElementSpacing", "nan 1 1", "spacing"),
    ("spacing-inf", "ElementSpacing", "inf 1 1", "NaN or infinity"),
    ("spacing-huge", "ElementSpacing", "1e5 1e5 1e5", "spacing"),
    ("spacing-tiny", "ElementSpacing", "1e-5 1e-5 1e-5", "spacing"),
    ("origin-nan", "Offset", "nan 0 0", "NaN or infinity"),
    ("origin-far", "Offset", "1e300 0 0", "origin"),
    ("matrix-singular", "TransformMatrix", "1 0 0 1 0 0 0 0 1", "right angles"),
    ("matrix-zero", "TransformMatrix", "0 0 0 0 0 0 0 0 0", "rotation"),
    ("matrix-inf", "TransformMatrix", "inf 0 0 0 1 0 0 0 1", "NaN or infinity"),
    ("matrix-short", "TransformMatrix", "1 0 0 0 1 0", "TransformMatrix"),
    ("type-unknown", "ElementType", "MET_FLOAT128", "unknown type"),
    ("type-array", "ElementType", "MET_FLOAT_ARRAY", "unknown type"),
    ("type-double", "ElementType", "MET_DOUBLE", "cut short"),
    ("type-char", "ElementType", "MET_CHAR", "more voxels than"),
    ("packed-not", "CompressedData", "True", "damaged"),
    ("packed-perhaps", "CompressedData", "Perhaps", "CompressedData"),
    ("text-not", "BinaryData", "False", "damaged"),
    ("data-passwd", "ElementDataFile", "../../../../../../etc/passwd", "another folder"),
    ("data-absolute", "ElementDataFile", "/etc/passwd", "another folder"),
    ("data-dev-zero", "ElementDataFile", "/dev/zero", "another folder"),
    ("data-folder", "ElementDataFile", ".", "another folder"),
    ("data-itself", "ElementDataFile", "scan.mha", "itself"),
    ("data-pattern", "ElementDataFile", "%s%n%99999999999d.raw 1 9 1", "pattern"),
    ("data-long-name", "ElementDataFile", "x" * 5000, "cannot be there"),
    ("data-nul", "ElementDataFile", "a\0b", "cannot be there"),
    ("data-none", "ElementDataFile", "", "another folder"),
]


def _packed(head: bytes) -> bytes:
    return head.replace(b"CompressedData = False", b"CompressedData = True")


def _million_names(data: bytes, _: Path) -> bytes:
    head = data.split(b"LOCAL\n")[0]
    return head + b"LIST\n" + b"a.raw\n" * 1_000_000


def _data_beside(make: Callable[[Path], object]) -> Callable[[bytes, Path], bytes]:
    """The header names beside.raw, which `make` puts there."""

    def change(data: bytes, folder: Path) -> bytes:
        make(folder / "beside.raw")
        return data.split(b"LOCAL\n")[0] + b"beside.raw\n"

    return change


META = [
    *(_hostile(f"meta-{name}", words, ".mha", _line(key, value)) for name, key, value, words in META_LINES),
    _hostile("meta-cut-in-header", "no end", ".mha", lambda d, _: d[:200]),
    _hostile("meta-cut-in-voxels", "cut short", ".mha", lambda d, _: d[:-1]),
    _hostile("meta-bom", "not a scan", ".mha", lambda d, _: b"\xef\xbb\xbf" + d),
    _hostile("meta-utf16", "not a scan", ".mha", lambda d, _: d.decode("latin-1").encode("utf-16")),
    _hostile(
        "meta-garbage", "line without", ".mha", lambda *_: b"ObjectType = Image\n" + bytes(range(256)) * 9
    ),
    Hostile(
        name="meta-first-line-of-1-gib",
        words="no end",
        make=lambda f: _long(_written(f, ".mha", b"NDims = 3")),
    ),
    _hostile("meta-key-twice", "twice", ".mha", _before_data(b"DimSize = 11 9 5")),
    _hostile("meta-synonym-twice", "twice", ".mha", _before_data(b"Position = 7 7 7")),
    _hostile("meta-unicode-key", "", ".mha", _before_data("Größe = ∞".encode())),
    _hostile("meta-channels", "3 values", ".mha", _before_data(b"ElementNumberOfChannels = 3")),
    _hostile(
        "meta-channels-huge", "values a voxel", ".mha", _before_data(b"ElementNumberOfChannels = 1e18")
    ),
    _hostile("meta-rescaled", "rescaled", ".mha", _before_data(b"ElementToIntensityFunctionSlope = 2")),
    _hostile("meta-header-size-huge", "HeaderSize", ".mha", _before_data(b"HeaderSize = 99999999999")),
    _hostile("meta-header-size-negative", "HeaderSize", ".mha", _before_data(b"HeaderSize = -5")),
    _hostile("meta-list-of-a-million", "data files", ".mha", _million_names),
    _hostile("meta-data-fifo", "missing", ".mha", _data_beside(os.mkfifo)),
    _hostile(
        "meta-data-link", "another folder", ".mha", _data_beside(lambda p: p.symlink_to("/etc/passwd"))
    ),
    _hostile(
        "meta-data-link-zero", "another folder", ".mha", _data_beside(lambda p: p.symlink_to("/dev/zero"))
    ),
    _hostile(
        "meta-data-link-circle", "cannot be there", ".mha", _data_beside(lambda p: p.symlink_to(p.name))
    ),
    _hostile("meta-data-is-a-folder", "missing", ".mha", _data_beside(Path.mkdir)),
    _hostile("meta-data-empty", "cut short", ".mha", _data_beside(Path.touch)),
    _hostile(
        "meta-bomb",
        "more voxels than",
        ".mha",
        lambda d, _: _packed(d.split(b"LOCAL\n")[0]) + b"LOCAL\n" + BOMB_BYTES,
    ),
]

# ---------------------------------------------------------------- NRRD

NRRD_HEAD = (
    "NRRD0005\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 11 9 6\n"
    "space directions: (0.7,0,0) (0,0.8,0) (0,0,2.5)\nkinds: domain domain domain\nendian: little\n"
    "encoding: raw\nspace origin: (1,2,3)\n"
)


def nrrd(change: tuple[str, str] = ("", ""), more: str = "", data: bytes = b"") -> Callable[[Path], Path]:
    """NRRD with a piece of its header replaced or lines added, and other voxels."""
    assert change[0] in NRRD_HEAD

    def make(folder: Path) -> Path:
        head = NRRD_HEAD.replace(*change) if change[0] else NRRD_HEAD
        return _written(folder, ".nrrd", f"{head}{more}\n".encode() + (data or scan().array.tobytes()))

    return make


NRRD_CASES: list[tuple[str, str, Callable[[Path], Path]]] = [
    ("whole", "", nrrd()),
    ("sizes-larger", "cut short", nrrd(("11 9 6", "11 9 7"))),
    ("sizes-smaller", "more voxels than", nrrd(("11 9 6", "11 9 5"))),
    ("sizes-negative", "claims", nrrd(("11 9 6", "11 9 -6"))),
    ("sizes-2e31", "more than", nrrd(("11 9 6", "2147483648 2147483648 2147483648"))),
    ("sizes-few", "sizes", nrrd(("11 9 6", "11 9"))),
    ("dimension-huge", "dimensions", nrrd(("dimension: 3", "dimension: 999999999"))),
    ("dimension-missing", "dimension", nrrd(("dimension: 3\n", ""))),
    ("type-block", "unknown type", nrrd(("type: short", "type: block"))),
    ("type-missing", "unknown type", nrrd(("type: short\n", ""))),
    ("endian-missing", "endian", nrrd(("endian: little\n", ""))),
    ("endian-middle", "endian", nrrd(("little", "middle"))),
    ("encoding-unknown", "unknown encoding", nrrd(("raw", "zrl"))),
    ("encoding-gzip-not", "damaged", nrrd(("raw", "gzip"))),
    ("encoding-bzip2-not", "damaged", nrrd(("raw", "bzip2"))),
    ("encoding-hex-not", "damaged", nrrd(("raw", "hex"))),
    ("encoding-ascii-not", "damaged", nrrd(("raw", "ascii"))),
    ("encoding-ascii-long-number", "damaged", nrrd(("raw", "ascii"), data=b"1" * 5_000_000)),
    ("encoding-ascii-out-of-range", "damaged", nrrd(("raw", "ascii"), data=b"99999 " * 594)),
    ("encoding-ascii-nan", "damaged", nrrd(("raw", "ascii"), data=b"nan " * 594)),
    ("gzip-bomb", "more voxels than", nrrd(("raw", "gzip"), data=BOMB_BYTES)),
    ("bzip2-bomb", "more voxels than", nrrd(("raw", "bzip2"), data=bz2.compress(bytes(200 << 20)))),
    ("bzip2-cut", "cut short", nrrd(("raw", "bzip2"), data=bz2.compress(scan().array.tobytes())[:-20])),
    ("cut-in-voxels", "cut short", nrrd(data=bytes(VOXELS - 1))),
    ("space-missing", "how it lies", nrrd(("space: left-posterior-superior\n", ""))),
    ("space-scanner", "how it lies", nrrd(("left-posterior-superior", "scanner-xyz"))),
    ("directions-missing", "how it lies", nrrd(("space directions: (0.7,0,0) (0,0.8,0) (0,0,2.5)\n", ""))),
    ("directions-zero", "voxel axis", nrrd(("(0.7,0,0)", "(0,0,0)"))),
    ("directions-nan", "voxel axis", nrrd(("(0.7,0,0)", "(nan,0,0)"))),
    ("directions-inf", "NaN or infinity", nrrd(("(0.7,0,0)", "(inf,0,0)"))),
    ("directions-1e300", "spacing", nrrd(("(0.7,0,0)", "(1e300,0,0)"))),
    ("directions-singular", "right angles", nrrd(("(0,0.8,0)", "(0.8,0,0)"))),
    ("directions-two", "space directions", nrrd(("(0,0,2.5)", ""))),
    ("directions-of-words", "space directions", nrrd(("(0,0,2.5)", "(a,b,c)"))),
    ("directions-none", "values a voxel", nrrd(("(0,0,2.5)", "none"))),
    ("origin-nan", "NaN or infinity", nrrd(("(1,2,3)", "(nan,2,3)"))),
    ("origin-missing", "space origin", nrrd(("space origin: (1,2,3)\n", ""))),
    ("units-cm", "lengths", nrrd(more='space units: "cm" "cm" "cm"\n')),
    ("field-twice", "twice", nrrd(more="sizes: 11 9 5\n")),
    ("unicode-field", "", nrrd(more="größe: ∞\nschlüssel:=wert\n")),
    ("byte-skip-huge", "byte skip", nrrd(more="byte skip: 99999999999999\n")),
    ("byte-skip-negative", "byte skip", nrrd(more="byte skip: -7\n")),
    ("byte-skip-to-end", "", nrrd(more="byte skip: -1\n")),
    ("byte-skip-beyond", "cut short", nrrd(more="byte skip: 1000\n")),
    ("byte-skip-end-of-gzip", "compressed", nrrd(("raw", "gzip"), more="byte skip: -1\n")),
    ("line-skip-huge", "line skip", nrrd(more="line skip: 2000000000\n")),
    ("line-skip-beyond", "lines to skip", nrrd(more="line skip: 99\n", data=b"1\n2\n")),
    ("data-passwd", "another folder", nrrd(more="data file: ../../../../etc/passwd\n")),
    ("data-absolute", "another folder", nrrd(more="data file: /etc/passwd\n")),
    ("data-itself", "itself", nrrd(more="data file: scan.nrrd\n")),
    ("data-pattern", "pattern", nrrd(more="data file: %n%n%n 1 2 1\n")),
    ("data-list-of-a-million", "data files", nrrd(more="data file: LIST\n", data=b"a.raw\n" * 1_000_000)),
    ("data-list-empty", "lists 0", nrrd(more="data file: LIST", data=b"\n")),
    ("no-blank-line", "cut short", lambda f: _written(f, ".nrrd", NRRD_HEAD.encode())),
    ("magic-only", "dimension", lambda f: _written(f, ".nrrd", b"NRRD0005")),
    ("garbage", "twice", lambda f: _written(f, ".nrrd", b"NRRD0005\n" + bytes(range(256)) * 99)),
    ("first-line-of-1-gib", "no end", lambda f: _long(_written(f, ".nrrd", b"NRRD0005"))),
    ("header-of-2-mib", "no end", lambda f: _written(f, ".nrrd", b"NRRD0005\n" + b"# x\n" * (1 << 19))),
]
NRRD = [Hostile(name=f"nrrd-{name}", make=make, words=words) for name, words, make in NRRD_CASES]

# ---------------------------------------------------------------- paths


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "scan.nii")
    return folder / "scan.nii"


def _circle(folder: Path) -> Path:
    (folder / "scan.nii").symlink_to("scan.nii")
    return folder / "scan.nii"


PATHS = [
    Hostile(name="path-fifo", make=_fifo, words="neither a file nor a folder"),
    Hostile(name="path-dev-zero", make=lambda _: Path("/dev/zero"), words="neither a file nor a folder"),
    Hostile(name="path-circle", make=_circle, words="no such file"),
    Hostile(name="path-long", make=lambda f: f / ("x" * 5000), words="cannot be read"),
    Hostile(name="path-nul", make=lambda f: f / "a\0b.nii", words="no such file"),
    Hostile(name="path-empty", make=lambda f: _written(f, ".nii", b""), words="empty"),
    Hostile(name="path-one-byte", make=lambda f: _written(f, ".nii", b"\x1f"), words="not a scan"),
    Hostile(name="path-zeros", make=lambda f: _written(f, ".nii", bytes(5000)), words="not a scan"),
]

# ---------------------------------------------------------------- DICOM

Change = Callable[[pydicom.FileDataset], None]


def _series(folder: Path) -> list[Path]:
    write_series(folder / "ct", scan())
    return sorted((folder / "ct").iterdir())


def _dicom(change: Change) -> Callable[[Path], Path]:
    """A series with an attribute of every slice changed."""

    def make(folder: Path) -> Path:
        for file in _series(folder):
            dataset = pydicom.dcmread(file)
            change(dataset)
            dataset.save_as(file)
        return folder / "ct"

    return make


def _dicom_bytes(change: Callable[[bytes], bytes], only: int = 99) -> Callable[[Path], Path]:
    """A series with the bytes of every slice, or only the first ones, changed."""

    def make(folder: Path) -> Path:
        for file in _series(folder)[:only]:
            file.write_bytes(change(file.read_bytes()))
        return folder / "ct"

    return make


def _set(**values: object) -> Change:
    def change(dataset: pydicom.FileDataset) -> None:
        for name, value in values.items():
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)

    return change


def _raw(tag: tuple[int, int], vr: str, value: bytes) -> Change:
    """An element whose text no writer would write."""

    def change(dataset: pydicom.FileDataset) -> None:
        from pydicom.dataelem import RawDataElement
        from pydicom.tag import Tag

        raw = RawDataElement(Tag(tag), vr, len(value), value, 0, False, True)
        dataset._dict[Tag(tag)] = raw

    return change


def _coded(syntax: str, *pieces: bytes) -> Change:
    """Encapsulated pixel data of these fragments."""

    def change(dataset: pydicom.FileDataset) -> None:
        from pydicom.encaps import encapsulate

        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
        dataset.PixelData = encapsulate(list(pieces), has_bot=False)
        dataset["PixelData"].is_undefined_length = True
        dataset["PixelData"].VR = "OB"

    return change


PIXELS = struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW")
_NESTED = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"


def _before_pixels(insert: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(PIXELS, insert + PIXELS, 1)


def _pixel_length(length: bytes) -> Callable[[bytes], bytes]:
    right = struct.pack("<2xI", 2 * SHAPE[1] * SHAPE[2])
    return lambda data: data.replace(PIXELS + right, PIXELS + b"\0\0" + length)


def _laughs(ends: str) -> str:
    """Eight lists, each of nine of the one before."""
    pairs = zip("abcdefgh", "bcdefghi", strict=True)
    return "".join(ends.format(b, ",".join([f"*{a}"] * 9)) for a, b in pairs)


def _deflated(dataset: pydicom.FileDataset) -> None:
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.PixelData = bytes(40 << 20)  # far more than rows x columns


RLE_BOMB = struct.pack("<16I", 2, 64, 65, *[0] * 13) + b"\x81\0" * (1 << 20)

DICOM_CASES: list[tuple[str, Callable[[Path], Path]]] = [
    ("length-absurd", _dicom_bytes(_before_pixels(b"\x20\x00\x00\x40LT\xff\xfe"))),
    ("length-4-gib", _dicom_bytes(_before_pixels(b"\x20\x00\x00\x40OB\0\0\xf0\xff\xff\xff"))),
    ("pixels-4-gib", _dicom_bytes(_pixel_length(b"\xfe\xff\xff\xff"))),
    ("nested-10000-deep", _dicom_bytes(_before_pixels(_NESTED * 10_000))),
    (
        "nested-items",
        _dicom_bytes(_before_pixels(_NESTED[:12] + b"\xfe\xff\x00\xe0\0\0\0\0" * 100_000), only=1),
    ),
    ("preamble-cut", _dicom_bytes(lambda d: d[:100])),
    ("cut-after-magic", _dicom_bytes(lambda d: d[:132])),
    ("cut-in-meta", _dicom_bytes(lambda d: d[:170])),
    ("cut-in-header", _dicom_bytes(lambda d: d[: len(d) // 2])),
    ("cut-in-pixels", _dicom_bytes(lambda d: d[:-30])),
    ("garbage", _dicom_bytes(lambda d: d[:132] + bytes(range(256)) * 20)),
    ("pixels-few", _dicom(_set(PixelData=b"\0" * 20))),
    ("pixels-missing", _dicom(_set(PixelData=None))),
    ("rows-65535", _dicom(_set(Rows=65535, Columns=65535))),
    ("rows-zero", _dicom(_set(Rows=0))),
    ("rows-missing", _dicom(_set(Rows=None))),
    ("frames-2e31", _dicom(_set(Rows=65535, Columns=65535, NumberOfFrames="2147483647"))),
    ("frames-negative", _dicom(_set(NumberOfFrames="-4"))),
    ("bits-7", _dicom(_set(BitsAllocated=7))),
    ("bits-zero", _dicom(_set(BitsAllocated=0))),
    ("bits-stored-33", _dicom(_set(BitsStored=33))),
    ("samples-3", _dicom(_set(SamplesPerPixel=3))),
    ("samples-zero", _dicom(_set(SamplesPerPixel=0))),
    ("spacing-zero", _dicom(_set(PixelSpacing=[0, 0]))),
    ("spacing-negative", _dicom(_set(PixelSpacing=[-1, 1]))),
    ("spacing-huge", _dicom(_set(PixelSpacing=[1e6, 1e6]))),
    ("spacing-nan", _dicom(_raw((0x28, 0x30), "DS", b"nan\\nan "))),
    ("spacing-word", _dicom(_raw((0x28, 0x30), "DS", b"wide\\tall "))),
    ("spacing-missing", _dicom(_set(PixelSpacing=None))),
    ("position-inf", _dicom(_raw((0x20, 0x32), "DS", b"inf\\0\\0 "))),
    ("position-missing", _dicom(_set(ImagePositionPatient=None))),
    ("orientation-zero", _dicom(_set(ImageOrientationPatient=[0] * 6))),
    ("orientation-parallel", _dicom(_set(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]))),
    ("orientation-short", _dicom(_raw((0x20, 0x37), "DS", b"1\\0\\0\\0"))),
    ("slope-inf", _dicom(_raw((0x28, 0x1053), "DS", b"inf "))),
    ("slope-1e300", _dicom(_raw((0x28, 0x1053), "DS", b"1e300 "))),
    ("slope-word", _dicom(_raw((0x28, 0x1053), "DS", b"much"))),
    ("fragments-garbage", _dicom(_coded(JPEG2000Lossless, b"\xff\x4f\xff\x51" + b"\xa5" * 100))),
    ("fragments-empty", _dicom(_coded(JPEG2000Lossless, b"\0\0"))),
    ("fragments-rle-lying", _dicom(_coded(RLELossless, b"\x02\0\0\0" + b"\xff" * 60 + b"\x81\0" * 50))),
    ("fragments-rle-bomb", _dicom(_coded(RLELossless, RLE_BOMB))),
    ("fragments-too-many", _dicom(_coded(RLELossless, *[b"\0\0"] * 5000))),
    ("fragments-cut", _dicom_bytes(_pixel_length(b"\xff\xff\xff\xff"))),
    ("deflated-bomb", _dicom(_deflated)),
]
DICOM = [Hostile(name=f"dicom-{name}", make=make, words="") for name, make in DICOM_CASES]
"""Their words are the folder's and the files' names: of many a fault there is more than one way to tell."""

# ---------------------------------------------------------------- configs, data sets, models, stores

CONFIGS = {
    "python-object": "!!python/object/apply:os.system ['touch /tmp/voxelscale-was-here']",
    "python-name": "train: !!python/name:os.system",
    "billion-laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n" + _laughs("{0}: &{0} [{1}]\n") + "train: *i\n",
    "laughs-in-a-known-key": "train:\n  samples: [&a [x, x, x, x, x, x, x, x, x], "
    + _laughs("&{0} [{1}], ")
    + "*i]\n",
    "circle": "train: &a {samples: *a}",
    "merge-bomb": "a: &a {x: 1}\n" + "".join(f"m{i}: &b{i}\n  <<: [*a, *a]\n" for i in range(50)),
    "deep": "[" * 5000 + "]" * 5000,
    "deep-mapping": "{a: " * 3000 + "1" + "}" * 3000,
    "date": "train: {samples: 2001-99-99}",
    "sexagesimal": "train: {samples: 1:99:99:99}",
    "integer-of-10000-digits": "train: {samples: " + "9" * 10_000 + "}",
    "float-overflow": "train: {samples: 1e400}",
    "not-a-mapping": "- a\n- b",
    "section-as-value": "train: 5",
    "unknown-key": "train: {sampels: 5}",
    "key-of-numbers": "1: 2",
    "key-of-none": "~: 2",
    "key-of-a-list": "? [a, b]\n: 2",
    "tabs": "train:\n\tsamples: 5",
    "binary": "\x00\x01\x02",
    "two-documents": "train: {samples: 5}\n---\ntrain: {samples: 6}",
    "negative": "train: {samples: -5}",
    "nan": "optim: {lr: .nan}",
}


def config(text: str) -> Callable[[Path], Path]:
    """A config file."""

    def make(folder: Path) -> Path:
        path = folder / "hostile.yaml"
        path.write_text(text)
        return path

    return make


TABLES: dict[str, bytes] = {
    "nul": b"image,label\na\0b.nii,c.nii\n",
    "field-of-10-mib": b"image,label\n" + b"a" * (10 << 20) + b",b\n",
    "no-columns": b"x,y\n1,2\n",
    "no-rows": b"image,label\n",
    "no-image": b"image,label\n,b.nii\n",
    "binary": bytes(range(256)) * 50,
    "utf16": "image,label\na,b\n".encode("utf-16"),
    "open-quote": b'image,label\n"a,b\n',
    "twice": b"image,label,case\na.nii,b.nii,x\nc.nii,d.nii,x\n",
    "traversal": b"image,label\n../../../../etc/passwd,../../../../etc/passwd\n",
    "device": b"image,label\n/dev/zero,/dev/zero\n",
}


def table(data: bytes) -> Callable[[Path], Path]:
    """A CSV of images and masks."""

    def make(folder: Path) -> Path:
        path = folder / "hostile.csv"
        path.write_bytes(data)
        return path

    return make


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


def _store(**changes: object) -> bytes:
    entry = {
        "case": "case",
        "patient": "p",
        "split": "train",
        "shape": [8, 8, 8],
        "affine": np.eye(4).tolist(),
        "source_spacing": [1, 1, 1],
        "lesion_volumes_mm3": [5.0],
        "intensities": {},
        "key": "k",
    }
    whole: dict[str, object] = {"format": 1, "spacing": [1, 1, 1], "fingerprint": {"digest": "d"}}
    return json.dumps({**whole, "cases": [entry], **changes}).encode()


STORES: dict[str, bytes] = {
    "empty": b"",
    "not-json": b"{",
    "deep": DEEP,
    "list": b"[]",
    "null": b"null",
    "number-of-10000-digits": b'{"format": ' + b"9" * 10_000 + b"}",
    "other-format": _store(format=99),
    "no-cases": _store(cases=None),
    "cases-of-text": _store(cases=["a", "b"]),
    "spacing-of-text": _store(spacing="abc"),
    "spacing-nan": _store(spacing=[NAN, 1, 1]),
    "spacing-zero": _store(spacing=[0, 1, 1]),
    "fingerprint-of-text": _store(fingerprint="x"),
    "case-elsewhere": _store(cases=[json.loads(_store())["cases"][0] | {"case": "../../../etc/passwd"}]),
    "shape-of-text": _store(cases=[json.loads(_store())["cases"][0] | {"shape": ["a", "b", "c"]}]),
    "shape-negative": _store(cases=[json.loads(_store())["cases"][0] | {"shape": [-8, 8, 8]}]),
    "affine-short": _store(cases=[json.loads(_store())["cases"][0] | {"affine": [[1]]}]),
    "volumes-of-text": _store(cases=[json.loads(_store())["cases"][0] | {"lesion_volumes_mm3": ["x"]}]),
}


def store(data: bytes) -> Callable[[Path], Path]:
    """A store's folder with this table."""

    def make(folder: Path) -> Path:
        (folder / "store").mkdir()
        (folder / "store" / "dataset.json").write_bytes(data)
        return folder / "store"

    return make


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/voxelscale-was-here",)


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _bundle(**changes: object) -> bytes:
    from voxelscale.config import Config, to_dict

    normal = {"mean": 0.0, "std": 1.0, "low": -1.0, "high": 1.0}
    whole = {"format": 1, "config": to_dict(Config()), "weights": {}, "spacing": [1.0, 1.0, 1.0]}
    return _saved({**whole, "normalisation": normal, "trained": {}, **changes})


BUNDLES: dict[str, Callable[[], bytes]] = {
    "pickle": lambda: pickle.dumps(_Evil()),
    "pickle-in-torch": lambda: _saved(_Evil()),
    "pickle-as-weights": lambda: _bundle(weights=_Evil()),
    "list": lambda: _saved([1, 2]),
    "cut": lambda: _bundle()[:500],
    "garbage": lambda: bytes(range(256)) * 20,
    "other-format": lambda: _bundle(format=77),
    "no-spacing": lambda: _bundle(spacing=None),
    "spacing-of-text": lambda: _bundle(spacing="abc"),
    "config-of-text": lambda: _bundle(config="x"),
    "config-unknown-key": lambda: _bundle(config={"evil": 1}),
    "weights-list": lambda: _bundle(weights=[1, 2]),
    "normalisation-list": lambda: _bundle(normalisation=[1]),
    "normalisation-nan": lambda: _bundle(normalisation={"mean": NAN}),
}


def bundle(data: Callable[[], bytes], sealed: bool = True) -> Callable[[Path], Path]:
    """A model's file with a right checksum: whoever alters it can compute that, too."""

    def make(folder: Path) -> Path:
        path = folder / "model.vxs"
        if sealed:
            write_sealed(path, data())
        else:
            path.write_bytes(data())
        return path

    return make


SCANS = [*NIFTI, *PAIRS, *META, *NRRD, *PATHS]
