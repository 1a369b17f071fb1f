"""PNG and TIFF: what Pillow and SimpleITK write is read as it was; what would lose something is refused."""

from __future__ import annotations

import contextlib
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, TiffImagePlugin

from voxelscale.channels import Channel
from voxelscale.config import ReadingConfig
from voxelscale.dataset import DataSet
from voxelscale.dataset.reading import read_case, read_image, read_lattice, read_more, read_truth
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import (
    detect_format,
    files_of,
    read_label,
    read_scan,
    read_slices,
    read_volumes,
    volumes_of,
)

READING = ReadingConfig()
RNG = np.random.default_rng(5)
GREY8 = RNG.integers(0, 256, (7, 11)).astype(np.uint8)
GREY16 = RNG.integers(0, 65536, (7, 11)).astype(np.uint16)
FLOAT = RNG.random((7, 11)).astype(np.float32) * 1e-3
RGB = RNG.integers(0, 256, (7, 11, 3)).astype(np.uint8)
LABELS = RNG.integers(0, 4, (7, 11)).astype(np.uint8)


def saved(path: Path, array: np.ndarray, **more: Any) -> Path:
    Image.fromarray(array).save(path, **more)
    return path


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize(
    "array", [GREY8, GREY16, FLOAT, GREY16.astype(np.int16) // 2], ids=lambda a: a.dtype
)
def test_grey_pictures(tmp_path: Path, ending: str, array: np.ndarray) -> None:
    if ending == "png" and array.dtype in (np.float32, np.int16):
        pytest.skip("PNG has no such samples")
    path = tmp_path / f"a.{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    assert detect_format(path) == "picture"
    scan = read_scan(path)
    assert scan.array.shape == (1, 7, 11)
    assert np.array_equal(scan.array[0], array)
    assert scan.spacing == (1, 1, 1)
    assert scan.grid.index_to_mm((0, 2, 3)).tolist() == [3, 2, 0]
    assert read_slices(path)[0].same_as(scan.grid)
    assert (volumes_of(path), files_of(path)) == (1, (path,))


def test_big_endian_and_compressed_tiffs(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(GREY16.astype(">u2")).save(path)
    assert path.read_bytes()[:2] == b"MM"
    assert np.array_equal(read_scan(path).array[0], GREY16)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
        saved(path, GREY16, compression=compression)
        assert np.array_equal(read_scan(path).array[0], GREY16)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_colours_are_channels(tmp_path: Path, ending: str) -> None:
    path = saved(tmp_path / f"a.{ending}", RGB)
    assert volumes_of(path) == 3
    for number, scan in enumerate(read_volumes(path, range(3))):
        assert np.array_equal(scan.array[0], RGB[..., number])
    assert np.array_equal(read_scan(path, volume=1).array[0], RGB[..., 1])
    with pytest.raises(VoxelscaleError, match="a picture in colours, 3 channels") as caught:
        read_scan(path)
    assert "reading.channels=[R, G, B]" in caught.value.hint
    opaque = np.concatenate([RGB, np.full((7, 11, 1), 255, np.uint8)], axis=-1)
    saved(path, opaque)
    assert np.array_equal(read_scan(path, volume=2).array[0], RGB[..., 2])
    opaque[3, 3, 3] = 254
    saved(path, opaque)
    with pytest.raises(VoxelscaleError, match="partly transparent"):
        read_scan(path, volume=2)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_palette_is_classes_of_a_mask_and_colours_of_an_image(
    tmp_path: Path, ending: str, bits: int
) -> None:
    if ending == "tif" and bits != 8:
        pytest.skip("Pillow writes none")
    indices = LABELS % 2 if bits == 1 else LABELS
    colours = [(7, 7, 7), (250, 0, 0), (0, 250, 0), (0, 0, 250)]
    picture = Image.fromarray(indices, mode="P")
    picture.putpalette([sample for colour in colours for sample in colour])
    path = tmp_path / f"a.{ending}"
    more: dict[str, Any] = {"bits": bits} if ending == "png" else {}
    picture.save(path, **more)
    assert np.array_equal(read_label(path).array[0], indices)
    expanded = np.asarray(colours)[indices]
    for number, scan in enumerate(read_volumes(path, range(3))):
        assert np.array_equal(scan.array[0], expanded[..., number])


def png(path: Path, rows: np.ndarray, depth: int, colour: int, width: int) -> Path:
    """A PNG by the specification: rows of packed samples, without filters."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_are_class_numbers_as_stored(tmp_path: Path, depth: int) -> None:
    values = RNG.integers(0, 2**depth, (6, 16)).astype(np.uint8)
    bits = np.unpackbits(values[..., None], axis=-1)[..., -depth:].reshape(6, -1)
    path = png(tmp_path / "a.png", np.packbits(bits, axis=1), depth, 0, 16)
    assert np.array_equal(read_label(path).array[0], values)
    assert np.array_equal(read_scan(path).array[0], values)


def test_masks(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", LABELS)
    assert np.array_equal(read_label(path).array[0], LABELS)
    saved(path, LABELS > 1)
    assert np.array_equal(read_label(path).array[0], LABELS > 1)
    saved(path, LABELS.astype(np.uint16) * 300)
    assert np.array_equal(read_label(path).array[0], LABELS.astype(int) * 300)
    saved(path, np.repeat(LABELS[..., None], 3, axis=-1))
    assert np.array_equal(read_label(path).array[0], LABELS), "grey written as colours"
    saved(path, RGB)
    with pytest.raises(VoxelscaleError, match="a mask in colours"):
        read_label(path)


def deep_colours(path: Path) -> Path:
    return png(path, np.zeros((4, 5 * 3), ">u2"), 16, 2, 5)


def deep_grey_with_alpha(path: Path) -> Path:
    return png(path, np.full((4, 5 * 2), 65535, ">u2"), 16, 4, 5)


def deep_tiff(path: Path) -> Path:
    deep = sitk.GetImageFromArray(np.zeros((4, 5, 3), np.uint16), isVector=True)
    sitk.WriteImage(deep, str(path.with_suffix(".tif")))
    return path.with_suffix(".tif")


def pages(path: Path) -> Path:
    first, second = Image.fromarray(GREY8), Image.fromarray(GREY8)
    first.save(path.with_suffix(".tif"), save_all=True, append_images=[second])
    return path.with_suffix(".tif")


def frames(path: Path) -> Path:
    first, second = Image.fromarray(GREY8), Image.fromarray(255 - GREY8)
    first.save(path, save_all=True, append_images=[second])
    return path


def turned(path: Path) -> Path:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[274] = 6
    Image.fromarray(GREY8).save(path.with_suffix(".tif"), tiffinfo=info)
    return path.with_suffix(".tif")


def turned_png(path: Path) -> Path:
    exif = Image.Exif()
    exif[274] = 3
    return saved(path, GREY8, exif=exif)


def white_is_zero(path: Path) -> Path:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[262] = 0
    Image.fromarray(GREY8).save(path.with_suffix(".tif"), tiffinfo=info)
    data = bytearray(path.with_suffix(".tif").read_bytes())
    at = data.find(struct.pack("<HH", 262, 3))
    data[at + 8 : at + 10] = b"\0\0"
    path.with_suffix(".tif").write_bytes(data)
    return path.with_suffix(".tif")


def cmyk(path: Path) -> Path:
    Image.fromarray(RGB).convert("CMYK").save(path.with_suffix(".tif"))
    return path.with_suffix(".tif")


def cut(path: Path) -> Path:
    saved(path, RNG.integers(0, 256, (200, 300)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:-20_000])
    return path


def bomb(path: Path) -> Path:
    return png(path, np.zeros((1, 1), np.uint8), 8, 0, 2**31 - 1)


def jpeg(path: Path) -> Path:
    return saved(path.with_suffix(".jpg"), GREY8)


def see_through(path: Path) -> Path:
    return saved(path, GREY8, transparency=int(GREY8[0, 0]))


BAD = [
    (deep_colours, "16 bits a sample in colours"),
    (deep_grey_with_alpha, "16 bits a sample grey with transparency"),
    (deep_tiff, "3 samples of 16 bits a pixel"),
    (pages, "2 pages"),
    (frames, "2 pages or frames"),
    (turned, "is to be turned"),
    (turned_png, "is to be turned"),
    (white_is_zero, "white is 0"),
    (cmyk, "4 samples a pixel"),
    (cut, "not readable as a picture"),
    (bomb, "pixels"),
    (jpeg, "a JPEG"),
    (see_through, "partly transparent"),
]


@pytest.mark.parametrize(("make", "words"), BAD, ids=[make.__name__ for make, _ in BAD])
def test_what_would_lose_something_is_refused(
    tmp_path: Path, make: object, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path / "a.png")  # type: ignore[operator]
    with pytest.raises(VoxelscaleError) as caught:
        read_scan(path)
    assert words in caught.value.message
    assert path.name in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert capfd.readouterr() == ("", "")


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["png", "tif", "lzw"]),
    at=st.floats(0, 1),
    byte=st.integers(0, 255),
    cut=st.booleans(),
)
def test_damaged_pictures_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, kind: str, at: float, byte: int, cut: bool
) -> None:
    """Whatever byte is changed, and wherever it ends: an error of ours, or a picture."""
    path = tmp_path_factory.mktemp("damaged") / f"a.{kind[:3] if kind != 'lzw' else 'tif'}"
    saved(path, GREY16, **({"compression": "tiff_lzw"} if kind == "lzw" else {}))
    data = bytearray(path.read_bytes())
    place = int(at * (len(data) - 1))
    data[place] = byte
    path.write_bytes(data[: place + 1] if cut else data)
    for read in (read_scan, read_label, volumes_of):
        with contextlib.suppress(VoxelscaleError):
            read(path)


def folders(folder: Path, *images: np.ndarray, ending: str = "png") -> DataSet:
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for number, array in enumerate(images):
        saved(folder / "images" / f"c{number}.{ending}", array)
        saved(folder / "labels" / f"c{number}.png", (LABELS > 1).astype(np.uint8))
    return DataSet(path=folder)


def test_folders_of_grey_pictures(tmp_path: Path) -> None:
    data = folders(tmp_path, GREY8, GREY8, ending="tif")
    assert data.channels == (Channel(name="grey", scheme="zscore"),)
    assert [source.case for source in data.cases] == ["c0", "c1"]
    scan, labels = read_case(data.cases[0], READING)
    assert np.array_equal(scan.array[0], GREY8)
    assert np.array_equal(labels.mask.array[0], LABELS > 1)
    assert np.array_equal(read_truth(data.cases[0], READING).array, labels.mask.array)
    assert read_more(data.cases[0], READING) == []


def test_folders_of_pictures_in_colours(tmp_path: Path) -> None:
    data = folders(tmp_path, RGB, RGB, GREY8)
    rgb = tuple(Channel(name=name, scheme="rgb") for name in "RGB")
    assert data.channels == rgb
    *whole, grey = data.cases
    for source in whole:
        assert (source.volumes, source.channels) == (3, rgb)
        scans = [read_image(source, READING), *read_more(source, READING)]
        assert np.array_equal(np.concatenate([scan.array for scan in scans]), np.moveaxis(RGB, -1, 0))
        assert read_lattice(source, READING).shape == (1, 7, 11)
    with pytest.raises(VoxelscaleError, match=r"c2\.png: is not in the colours of the others"):
        read_image(grey, READING)
    named = DataSet(path=tmp_path, reading=ReadingConfig(channels=("x", "y", "z")))
    assert [channel.scheme for channel in named.channels] == ["zscore"] * 3
    assert named.cases[0].volumes == 3
    loose = DataSet(path=tmp_path / "images").scans
    assert [scan.volumes for scan in loose[:2]] == [3, 3]


def test_nnunets_natural_pictures(tmp_path: Path) -> None:
    for kind, array in (("imagesTr/a_0000", RGB), ("labelsTr/a", LABELS)):
        (tmp_path / kind).parent.mkdir()
        saved(tmp_path / f"{kind}.png", array)
    (tmp_path / "dataset.json").write_text(
        '{"channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png", "numTraining": 1,'
        ' "labels": {"background": 0, "x": 1, "y": 2, "z": 3}}'
    )
    data = DataSet(path=tmp_path)
    assert [channel.scheme for channel in data.channels] == ["rgb"] * 3
    (source,) = data.cases
    assert np.array_equal(read_more(source, READING)[1].array[0], RGB[..., 2])
    assert np.array_equal(read_case(source, READING)[1].mask.array[0], LABELS)


def test_channels_of_one_size(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text("image_a,image_b,label\na.png,b.png,m.png\n")
    saved(tmp_path / "a.png", GREY8)
    saved(tmp_path / "b.png", GREY8[:5])
    saved(tmp_path / "m.png", LABELS)
    (source,) = DataSet(path=tmp_path / "cases.csv").cases
    with pytest.raises(VoxelscaleError, match=r"b\.png: 11 x 5 pixels, but a\.png has 11 x 7"):
        read_more(source, READING)


def test_previews_beside_scans_are_no_scans(tmp_path: Path) -> None:
    from tests.dataset.test_layouts import image, mask

    from voxelscale.formats import write_scan

    for kind, scan in (("images", image()), ("labels", mask())):
        write_scan(scan, tmp_path / kind / "a.nii.gz")
        saved(tmp_path / kind / "a.png", GREY8)
    (source,) = DataSet(path=tmp_path).cases
    assert (source.image.name, [label.name for label in source.labels]) == ("a.nii.gz", ["a.nii.gz"])
    assert [scan.image.name for scan in DataSet(path=tmp_path / "images").scans] == ["a.nii.gz"]


def test_text_of_a_png_is_not_looked_at(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "x" * 5000, zip=True)
    path = saved(tmp_path / "a.png", GREY8, pnginfo=info)
    assert np.array_equal(read_scan(path).array[0], GREY8)
