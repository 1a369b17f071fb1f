"""Random 64^3 and 128^3 patch reads and size on disk: our store, nnU-Net's, raw .npy, Zarr v3.

    python benchmarks/store.py [--out store.json] [--scan FILE]

Every contender holds the same volume (HU and mask) and is read at the same places, interleaved in one run,
one thread each, from the page cache, in processor time; a patch is checked against the volume first.
nnU-Net keeps float32 images and int16 masks in two files, with the chunks and blocks that it computes
(it must be installed: benchmarks/prepare.py says how); all others int16 in one.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle, ZstdCodec

from voxelscale.config import PhantomConfig
from voxelscale.formats import read_scan
from voxelscale.phantom import make_phantom
from voxelscale.store import CaseInfo, Reader, write_case

PATCHES, CHUNK, ROUNDS = (64, 128), 64, 9
Read = Callable[[Sequence[int], int], NDArray[Any]]


def volume(scan: Path | None) -> NDArray[np.int16]:
    """(2, z, y, x) int16: a real scan where one is named, else a fine phantom."""
    if scan is not None:
        hu = read_scan(scan).array.astype(np.int16)
        return np.stack([hu, (hu > 200).astype(np.int16)])
    phantom = make_phantom(PhantomConfig(spacing=(1.25, 0.8, 0.8)), 0)
    return np.stack([phantom.image.array, phantom.label.array.astype(np.int16)])


def our_store(data: NDArray[np.int16], folder: Path) -> Read:
    """As `prepare` writes it and the training's readers read it."""
    empty = CaseInfo(
        case="case",
        patient="",
        shape=(data.shape[1], data.shape[2], data.shape[3]),
        affine=tuple(tuple(row) for row in np.eye(4).tolist()),
        source_spacing=(1, 1, 1),
        lesion_volumes_mm3=(),
        intensities={},
        key="",
    )
    write_case(folder, empty, data[0], data[1].astype(np.uint8), [])
    reader = Reader(folder)
    return lambda start, patch: reader.region("case", start, (patch,) * 3)


def npy_store(data: NDArray[np.int16], folder: Path) -> Read:
    """Memory-mapped; a read is the copy that a training needs."""
    folder.mkdir()
    np.save(folder / "case.npy", data)
    mapped = np.load(folder / "case.npy", mmap_mode="r")
    return lambda start, patch: np.array(mapped[box(start, patch)])


def nnunet_store(data: NDArray[np.int16], folder: Path) -> Read:
    """float32 and int16, as its preprocessing saves them for patches of 128^3 and its loader opens them."""
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    folder.mkdir()
    image, mask = data[:1].astype(np.float32), data[1:]
    blocks, chunks = comp_blosc2_params(image.shape, (128, 128, 128), image.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(mask.shape, (128, 128, 128), mask.itemsize)
    nnUNetDatasetBlosc2.save_case(
        image,
        mask,
        {},
        str(folder / "case"),
        chunks=chunks,
        blocks=blocks,
        chunks_seg=chunks_seg,
        blocks_seg=blocks_seg,
    )
    opened = nnUNetDatasetBlosc2(str(folder)).load_case("case")[:2]

    def read(start: Sequence[int], patch: int) -> NDArray[Any]:
        where = box(start, patch)
        return np.concatenate([np.asarray(array[where]) for array in opened])

    return read


def zarr_store(data: NDArray[np.int16], path: Path, codec: Any, shards: bool) -> Read:
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
    chunks = (1, *(min(CHUNK, n) for n in data.shape[1:]))
    whole = tuple(-(-n // c) * c for n, c in zip(data.shape, chunks, strict=True))
    array = zarr.create_array(
        store=str(path),
        shape=data.shape,
        dtype=data.dtype,
        chunks=chunks,
        shards=whole if shards else None,
        compressors=codec,
        zarr_format=3,
    )
    array[:] = data
    opened = zarr.open_array(str(path), mode="r")
    return lambda start, patch: np.asarray(opened[box(start, patch)])


def box(start: Sequence[int], patch: int) -> tuple[slice, ...]:
    """The patch's part of an array (channel, z, y, x)."""
    return (slice(None), *(slice(s, s + patch) for s in start))


def contenders(data: NDArray[np.int16], folder: Path) -> dict[str, Read]:
    """Each by name; a store's path is its name in the folder."""
    blosc_codec = BloscCodec(cname="zstd", clevel=5, shuffle=BloscShuffle.bitshuffle, typesize=2)
    return {
        "ours": our_store(data, folder / "ours"),
        "raw .npy, mapped": npy_store(data, folder / "raw .npy, mapped"),
        "nnU-Net .b2nd": nnunet_store(data, folder / "nnU-Net .b2nd"),
        "zarr v3, blosc": zarr_store(data, folder / "zarr v3, blosc", blosc_codec, shards=False),
        "zarr v3, blosc, sharded": zarr_store(data, folder / "zarr v3, blosc, sharded", blosc_codec, True),
        "zarr v3, zstd": zarr_store(data, folder / "zarr v3, zstd", ZstdCodec(level=3), shards=False),
    }


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def places(shape: tuple[int, ...], patch: int, count: int, random: np.random.Generator) -> list[list[int]]:
    """Where patches begin."""
    return [[int(random.integers(0, max(1, n - patch + 1))) for n in shape[1:]] for _ in range(count)]


def measure(data: NDArray[np.int16], folder: Path) -> list[dict[str, Any]]:
    """Milliseconds a read, median and spread over rounds, in which the contenders take turns."""
    readers = contenders(data, folder)
    rows = []
    for patch in (p for p in PATCHES if min(data.shape[1:]) >= p):
        random = np.random.default_rng(0)
        times: dict[str, list[float]] = {name: [] for name in readers}
        for start in places(data.shape, patch, 5, random):
            for name, read in readers.items():
                assert np.array_equal(read(start, patch), data[box(start, patch)]), name
        count = 40 * 64**3 // patch**3
        for _ in range(ROUNDS):
            starts = places(data.shape, patch, count, random)
            for name, read in readers.items():
                started = time.process_time()
                for start in starts:
                    read(start, patch)
                times[name].append((time.process_time() - started) / count * 1e3)
        rows += [_row(name, patch, t, times, folder, data.size // 2) for name, t in times.items()]
    return rows


def _row(
    name: str, patch: int, own: list[float], times: dict[str, list[float]], folder: Path, voxels: int
) -> dict[str, Any]:
    raw = statistics.median(times["raw .npy, mapped"])
    return {
        "store": name,
        "patch": patch,
        "ms": round(statistics.median(own), 3),
        "least_ms": round(min(own), 3),
        "greatest_ms": round(max(own), 3),
        "reads_per_second": round(1e3 / statistics.median(own)),
        "times_raw": round(statistics.median(own) / raw, 2),
        "bytes_per_voxel": round(size_of(folder / name) / voxels, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--scan", type=Path, help="a CT to store instead of a phantom")
    arguments = parser.parse_args()
    data = volume(arguments.scan)
    folder = Path(tempfile.mkdtemp())
    try:
        rows = measure(data, folder)
    finally:
        shutil.rmtree(folder)
    print(f"volume {data.shape}, random reads, {ROUNDS} rounds")
    columns = f"{'ms/read':>8} {'range':>16} {'reads/s':>8} {'x raw':>6} {'bytes/voxel':>12}"
    print(f"{'store':24} {'patch':>6} {columns}")
    for r in rows:
        spread = f"{r['least_ms']:.2f} to {r['greatest_ms']:.2f}"
        print(
            f"{r['store']:24} {r['patch']:4}^3 {r['ms']:8.2f} {spread:>16} {r['reads_per_second']:8}"
            f" {r['times_raw']:6.2f} {r['bytes_per_voxel']:12.3f}"
        )
    if arguments.out:
        versions = {"blosc2": blosc2.__version__, "zarr": zarr.__version__, "numpy": np.__version__}
        facts = {
            "shape": data.shape,
            "python": platform.python_version(),
            "versions": versions,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
