"""One anatomical point through every file format and orientation, judged by nibabel and SimpleITK."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

from voxelscale.formats import read_scan, read_slices
from voxelscale.geometry import Scan, affine_from_itk, to_itk

NEAR_MM = 0.01
MARKS = {1000: (1, 2, 3), 1100: (5, 0, 0), 1200: (0, 8, 0), 1300: (0, 0, 10), 1400: (4, 6, 9)}
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


Writer = Callable[[Scan, Path], Path]


def turn(x: float, y: float, z: float) -> NDArray[np.float64]:
    """A rotation by three angles, degrees."""
    out = np.eye(3)
    for axis, angle in enumerate(np.radians([x, y, z])):
        i, j = [k for k in range(3) if k != axis]
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        out = out @ step
    return out


PLACES = {
    "upright": np.eye(3),
    "oblique": turn(12, -7, 25),
    "flipped-z": np.diag([1.0, 1.0, -1.0]),
    "prone": np.diag([-1.0, -1.0, 1.0]),  # a half turn: the hardest for a quaternion
    "coronal": turn(88, 0, 3),
}


def patient(place: str) -> Scan:
    """Air with marks whose positions are the truth."""
    array = np.full((6, 9, 11), -1000, np.int16)
    for value, index in MARKS.items():
        array[index] = value
    return Scan(array, affine_from_itk((-120.5, 33.25, 900.0), (0.7, 0.8, 2.5), PLACES[place]))


def positions(scan: Scan) -> NDArray[np.float64]:
    """Where the marks lie, LPS mm."""
    found = [np.argwhere(scan.array == value) for value in MARKS]
    assert [len(f) for f in found] == [1] * len(MARKS)
    return scan.grid.index_to_mm(np.concatenate(found))


def by_nibabel(path: Path) -> NDArray[np.float64]:
    image = nibabel.load(path)
    values = np.asarray(image.dataobj)
    index = np.concatenate([np.argwhere(values == value) for value in MARKS])
    ras = index @ image.affine[:3, :3].T + image.affine[:3, 3]
    return np.asarray(ras * [-1, -1, 1])


def by_itk(path: Path) -> NDArray[np.float64]:
    image = sitk.ReadImage(str(path))
    values = sitk.GetArrayFromImage(image)
    index = np.concatenate([np.argwhere(values == value) for value in MARKS])
    return np.asarray([image.TransformIndexToPhysicalPoint(i[::-1].tolist()) for i in index])


def nifti(
    codes: tuple[int, int], storage: str = "", kind: type = nibabel.Nifti1Image, suffix: str = ".nii.gz"
) -> Writer:
    """A writer of NIfTI by nibabel: codes of qform and sform, axes stored as `storage`."""

    def write(scan: Scan, folder: Path) -> Path:
        image = kind(scan.array.T, RAS @ scan.affine[:, [2, 1, 0, 3]])
        if storage:
            image = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(storage)))
        affine = image.affine
        image.set_qform(affine if codes[0] else None, codes[0])
        image.set_sform(affine if codes[1] else None, codes[1])
        path = folder / f"scan{suffix}"
        nibabel.save(image, path)
        return path

    return write


def itk(suffix: str, order: tuple[int, int, int] = (0, 1, 2)) -> Writer:
    def write(scan: Scan, folder: Path) -> Path:
        path = folder / f"scan{suffix}"
        sitk.WriteImage(sitk.PermuteAxes(to_itk(scan), order), str(path))
        return path

    return write


def anatomical(letters: str) -> Writer:
    """MetaImage turned by ITK to letters of its AnatomicalOrientation (which name where axes begin)."""

    def write(scan: Scan, folder: Path) -> Path:
        path = folder / "scan.mhd"
        sitk.WriteImage(sitk.DICOMOrient(to_itk(scan), letters), str(path))
        return path

    return write


def nrrd(space: str, signs: tuple[int, int, int]) -> Writer:
    """NRRD as text by hand: positions in `space`, whose axes are LPS times `signs`."""

    def write(scan: Scan, folder: Path) -> Path:
        affine = np.diag([*signs, 1.0]) @ scan.affine
        vectors = ["(" + ",".join(repr(float(v)) for v in affine[:3, axis]) + ")" for axis in (2, 1, 0, 3)]
        x, y, z = reversed(scan.array.shape)
        lines = [
            "NRRD0005",
            "# by hand",
            "type: int16",
            "dimension: 3",
            f"space: {space}",
            f"sizes: {x} {y} {z}",
            f"space directions: {' '.join(vectors[:3])}",
            "kinds: domain domain domain",
            "endian: big",
            "encoding: raw",
            f"space origin: {vectors[3]}",
            "space:=a free key, no field",
        ]
        path = folder / "scan.nrrd"
        path.write_bytes("\n".join([*lines, "", ""]).encode() + scan.array.astype(">i2").tobytes())
        return path

    return write


WRITERS: dict[str, Writer] = {
    "nifti-sform": nifti((0, 1)),
    "nifti-qform": nifti((1, 0)),
    "nifti-both": nifti((1, 1)),
    "nifti-aligned": nifti((1, 2)),
    "nifti-ras": nifti((1, 1), "RAS"),
    "nifti-lps": nifti((1, 0), "LPS"),
    "nifti-las": nifti((1, 1), "LAS"),
    "nifti-psr": nifti((0, 2), "PSR"),
    "nifti-sal": nifti((1, 0), "SAL"),
    "nifti-2": nifti((1, 1), kind=nibabel.Nifti2Image, suffix=".nii"),
    "nifti-pair": nifti((1, 1), kind=nibabel.Nifti1Pair, suffix=".hdr"),
    "metaimage": itk(".mha"),
    "metaimage-permuted": itk(".mhd", (2, 0, 1)),
    "metaimage-RAI": anatomical("RAI"),
    "metaimage-LPS": anatomical("LPS"),
    "metaimage-PIR": anatomical("PIR"),
    "nrrd-itk": itk(".nrrd"),
    "nrrd-permuted": itk(".nhdr", (1, 2, 0)),
    "nrrd-lps": nrrd("left-posterior-superior", (1, 1, 1)),
    "nrrd-ras": nrrd("right-anterior-superior", (-1, -1, 1)),
    "nrrd-las": nrrd("left-anterior-superior", (1, -1, 1)),
    "nrrd-short": nrrd("LAS", (1, -1, 1)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", WRITERS)
def test_one_point_through_every_format(tmp_path: Path, name: str, place: str) -> None:
    scan = patient(place)
    truth = scan.grid.index_to_mm(list(MARKS.values()))
    path = WRITERS[name](scan, tmp_path)
    scan = read_scan(path)
    assert read_slices(path)[0].same_as(scan.grid, 1e-9)
    apart = {"voxelscale": np.abs(positions(scan) - truth).max()}
    if name != "nifti-2":  # which ITK cannot read
        apart["SimpleITK"] = np.abs(by_itk(path) - truth).max()
    assert max(apart.values()) < NEAR_MM, apart
    if name.startswith("nifti"):  # nibabel rounds quaternions near a half turn more coarsely
        assert np.abs(by_nibabel(path) - truth).max() < 2 * NEAR_MM


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8", "i8", "u8"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr"])
def test_values_of_every_type_are_itks(tmp_path: Path, dtype: str, suffix: str) -> None:
    low, high = (0, 120) if dtype[0] == "u" or dtype == "i1" else (-1000, 3000)
    values = np.random.default_rng(1).integers(low, high, (4, 5, 6)).astype(dtype)
    if dtype[0] == "f":
        values = values + np.asarray(0.5, dtype)
    path = tmp_path / f"scan{suffix}"
    image = sitk.GetImageFromArray(values)
    sitk.WriteImage(image, str(path), useCompression=suffix in (".mha", ".nhdr"))
    assert np.array_equal(read_scan(path).array, sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


@pytest.mark.parametrize("encoding", ["gzip", "bzip2", "ascii", "hex", "raw"])
@pytest.mark.parametrize("endian", ["little", "big"])
def test_encodings_of_nrrd(tmp_path: Path, encoding: str, endian: str) -> None:
    import bz2
    import gzip

    scan = patient("oblique")
    path = nrrd("left-posterior-superior", (1, 1, 1))(scan, tmp_path)
    head, _ = path.read_bytes().split(b"\n\n", 1)
    head = head.replace(b"endian: big", b"endian: " + endian.encode())
    head = head.replace(
        b"encoding: raw", b"encoding: " + encoding.encode() + b"\nline skip: 1\nbyte skip: 3"
    )
    raw = b"abc" + scan.array.astype("<i2" if endian == "little" else ">i2").tobytes()
    text = " ".join(str(v) for v in scan.array.ravel()).encode()
    data = {
        "raw": raw,
        "gzip": gzip.compress(raw[:100]) + gzip.compress(raw[100:]),  # two members are one file
        "bzip2": bz2.compress(raw[:100]) + bz2.compress(raw[100:]),
        "hex": raw.hex(" ", 40).encode(),
        "ascii": text,
    }[encoding]
    if encoding == "ascii":
        head = head.replace(b"byte skip: 3", b"byte skip: 0")
    path.write_bytes(head + b"\n\nthis line is to be skipped\n" + data)
    assert np.array_equal(read_scan(path).array, scan.array)


def test_slices_in_files_of_their_own(tmp_path: Path) -> None:
    scan = patient("oblique")
    for z, pixels in enumerate(scan.array):
        (tmp_path / f"slice{z}.raw").write_bytes(pixels.astype("<i2").tobytes())
    names = "\n".join(f"slice{z}.raw" for z in range(len(scan.array)))
    whole = itk(".mha")(scan, tmp_path)
    head = whole.read_bytes().split(b"LOCAL\n")[0]
    (tmp_path / "list.mhd").write_bytes(head + b"LIST\n" + names.encode() + b"\n")
    assert np.array_equal(read_scan(tmp_path / "list.mhd").array, scan.array)
    assert np.array_equal(by_itk(tmp_path / "list.mhd"), by_itk(whole))
    path = nrrd("left-posterior-superior", (1, 1, 1))(scan, tmp_path)
    head = path.read_bytes().split(b"\n\n")[0].replace(b"endian: big", b"endian: little")
    (tmp_path / "list.nhdr").write_bytes(head + b"\ndata file: LIST\n" + names.encode())
    assert np.array_equal(read_scan(tmp_path / "list.nhdr").array, scan.array)


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (2, 3), (0.5, 0.25), (0, 7), (np.nan, 0)])
def test_slope_and_intercept_are_nibabels(tmp_path: Path, slope: float, intercept: float) -> None:
    path = nifti((1, 1), suffix=".nii")(patient("oblique"), tmp_path)
    data = bytearray(path.read_bytes())
    data[112:120] = np.asarray([slope, intercept], "<f4").tobytes()
    path.write_bytes(data)
    assert np.array_equal(read_scan(path).array, np.asarray(nibabel.load(path).dataobj).T)


def test_big_endian_nifti(tmp_path: Path) -> None:
    scan = patient("oblique")
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.dtype(">i2"))
    image = nibabel.Nifti1Image(scan.array.T, RAS @ scan.affine[:, [2, 1, 0, 3]], header)
    nibabel.save(image, tmp_path / "scan.nii")
    assert (tmp_path / "scan.nii").read_bytes()[:4] == b"\0\0\x01\x5c"
    assert np.array_equal(read_scan(tmp_path / "scan.nii").array, scan.array)
    truth = scan.grid.index_to_mm(list(MARKS.values()))
    assert np.abs(positions(read_scan(tmp_path / "scan.nii")) - truth).max() < NEAR_MM
