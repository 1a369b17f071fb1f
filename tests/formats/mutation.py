"""Valid files of every reader, and mutations of them that are a pure function of (seed, index)."""

from __future__ import annotations

import gzip
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from tests.formats.corpus import NRRD_HEAD, nrrd, scan
from tests.formats.test_formats import write_series

from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, to_itk

Random = np.random.Generator

WHOLE = (0, 1, 2, 3, 7, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
REAL = (0.0, -0.0, 1e-45, 1e-30, 0.5, 1.0, -1.0, 1e6, 1e30, 3e38, float("inf"), float("-inf"), float("nan"))
TEXT = (
    b"0",
    b"-1",
    b"1e9",
    b"-0.0",
    b"nan",
    b"inf",
    b"2147483648",
    b"1e400",
    b"9" * 400,
    b"",
    b"x",
    b"65536",
)


def write_valid(folder: Path) -> None:
    """One folder a kind: the file to read is the one named ``scan``, or the folder where there is none."""
    small = Scan(scan().array[:3, :4, :5], scan().affine)
    image = to_itk(small)

    def kind(name: str) -> Path:
        (folder / name).mkdir(parents=True)
        return folder / name

    for suffix in (".nii", ".nii.gz", ".nrrd"):
        write_scan(small, kind(f"written{suffix}") / f"scan{suffix}")
    for suffix, packed in (
        (".mha", False),
        (".mha", True),
        (".mhd", False),
        (".nhdr", True),
        (".hdr", False),
    ):
        sitk.WriteImage(image, str(kind(f"itk{suffix}-{packed}") / f"scan{suffix}"), useCompression=packed)
    real = sitk.Cast(image, sitk.sitkFloat32)
    for suffix in (".nii", ".mha", ".nrrd"):
        sitk.WriteImage(real, str(kind(f"real{suffix}") / f"scan{suffix}"))
    second = nibabel.Nifti2Image(small.array.T, np.diag([-0.7, -0.8, 2.5, 1]))
    nibabel.save(second, kind("nifti-2") / "scan.nii")
    text = " ".join(map(str, scan().array.ravel())).encode()
    nrrd(("raw", "ascii"), data=text)(kind("nrrd-ascii"))
    nrrd(("raw", "hex"), more="line skip: 0\n", data=scan().array.tobytes().hex().encode())(
        kind("nrrd-hex")
    )
    listed = kind("nrrd-list")
    (listed / "scan.nhdr").write_text(f"{NRRD_HEAD}data file: LIST\na.raw\nb.raw\n")
    for name, part in (("a.raw", scan().array[:3]), ("b.raw", scan().array[3:])):
        (listed / name).write_bytes(part.tobytes())
    for number in range(2):  # weighs more than one of twenty
        write_series(kind(f"dicom-{number}"), small, uid=f"1.2.3.{number}")


def mutate(data: bytes, other: bytes, random: Random) -> bytes:
    """One to four changes; what is inside of gzip is changed as often as gzip itself."""
    if data.startswith(b"\x1f\x8b") and random.random() < 0.6:
        return gzip.compress(mutate(gzip.decompress(data), other, random), 1)
    for _ in range(int(random.integers(1, 5))):
        change = CHANGES[int(random.integers(len(CHANGES)))]
        data = change(data, other, random)
    return data


def _place(data: bytes, random: Random) -> int:
    """Mostly in the header."""
    end = len(data) if random.random() < 0.3 else min(len(data), 1200)
    return int(random.integers(max(1, end)))


def _flip(data: bytes, _: bytes, random: Random) -> bytes:
    out, place = bytearray(data or b"\0"), _place(data, random)
    out[place] ^= 1 << int(random.integers(8))
    return bytes(out)


def _byte(data: bytes, _: bytes, random: Random) -> bytes:
    place = _place(data, random)
    return data[:place] + bytes([int(random.choice([0, 1, 9, 10, 32, 127, 128, 255]))]) + data[place + 1 :]


def _number(data: bytes, _: bytes, random: Random) -> bytes:
    """A binary number, at a multiple of two."""
    place = _place(data, random) // 2 * 2
    new: bytes
    if random.random() < 0.5:
        code = str(random.choice(list("hiq")))
        size = struct.calcsize(code)
        raw = (int(random.choice(WHOLE)) * int(random.choice([1, -1]))) % 2 ** (8 * size)
        new = raw.to_bytes(size, "little" if random.random() < 0.8 else "big")
    else:
        code = str(random.choice(["<f", ">f", "<d"]))
        new = struct.pack(code, float(random.choice(REAL)))
    return data[:place] + new + data[place + len(new) :]


def _text(data: bytes, _: bytes, random: Random) -> bytes:
    """A number, or a word, of a text."""
    pattern = rb"-?\d+(\.\d+)?" if random.random() < 0.7 else rb"[A-Za-z]{3,}"
    found = list(re.finditer(pattern, data[:1500]))
    if not found:
        return data
    hit = found[int(random.integers(len(found)))]
    other = found[int(random.integers(len(found)))].group()
    new = TEXT[int(random.integers(len(TEXT)))] if random.random() < 0.7 else other
    return data[: hit.start()] + new + data[hit.end() :]


def _cut(data: bytes, _: bytes, random: Random) -> bytes:
    return data[: _place(data, random)]


def _span(data: bytes, random: Random) -> tuple[int, int]:
    start = _place(data, random)
    return start, start + int(2 ** random.uniform(0, 10))


def _delete(data: bytes, _: bytes, random: Random) -> bytes:
    start, end = _span(data, random)
    return data[:start] + data[end:]


def _double(data: bytes, _: bytes, random: Random) -> bytes:
    start, end = _span(data, random)
    return data[:end] + data[start:end] * int(random.integers(1, 5)) + data[end:]


def _splice(data: bytes, other: bytes, random: Random) -> bytes:
    start, end = _span(other, random)
    place = _place(data, random)
    return data[:place] + other[start:end] + data[place + (end - start) * int(random.integers(2)) :]


def _lines(data: bytes, _: bytes, random: Random) -> bytes:
    """Two lines of a text exchanged."""
    lines = data.split(b"\n", 20)
    a, b = random.integers(len(lines), size=2)
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


CHANGES: list[Callable[[bytes, bytes, Random], bytes]] = [
    _flip,
    _byte,
    _number,
    _number,
    _text,
    _text,
    _cut,
    _delete,
    _double,
    _splice,
    _lines,
]


class Mutants:
    """The inputs of a run, written one after another into a folder of its own."""

    def __init__(self, valid: Path, work: Path, seed: int) -> None:
        self._kinds = sorted(path for path in valid.iterdir() if path.is_dir())
        self._files = {kind: sorted(kind.iterdir()) for kind in self._kinds}
        self._bytes = {file: file.read_bytes() for files in self._files.values() for file in files}
        self._work, self._seed = work, seed
        for kind in self._kinds:
            shutil.copytree(kind, work / kind.name, dirs_exist_ok=True)
        self._spoilt: Path | None = None

    def write(self, index: int) -> tuple[str, Path]:
        """Put mutant number `index` on disk: its kind and the path to read."""
        if self._spoilt is not None:
            (self._work / self._spoilt.parent.name / self._spoilt.name).write_bytes(
                self._bytes[self._spoilt]
            )
        random = np.random.Generator(np.random.Philox(key=self._seed, counter=[index, 0, 0, 0]))
        kind = self._kinds[int(random.integers(len(self._kinds)))]
        files = self._files[kind]
        file = files[int(random.integers(len(files)))]
        others = list(self._bytes.values())
        data = mutate(self._bytes[file], others[int(random.integers(len(others)))], random)
        (self._work / kind.name / file.name).write_bytes(data)
        self._spoilt = file
        named = [f for f in files if f.name.startswith("scan.") and f.suffix not in (".raw", ".img")]
        named = [f for f in named if not f.name.endswith(".raw.gz")]
        folder = self._work / kind.name
        return kind.name, folder / named[0].name if named else folder
