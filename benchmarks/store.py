"""Random 64^3 patch reads and size on disk: Blosc2 NDArray against Zarr v3, at the same chunking.

    python benchmarks/store.py [--out store.json] [--scan FILE]

Every contender holds the same volume (HU and mask, int16) in the same chunks and is read at the same
places, interleaved in one run, one thread each; a patch is checked against the volume before timing.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle, ZstdCodec

from voxelscale.config import PhantomConfig
from voxelscale.data.phantom import make_phantom
from voxelscale.formats import read_scan

PATCH, CHUNK, ROUNDS, READS = 64, 64, 9, 40
Read = Callable[[tuple[slice, ...]], NDArray[np.int16]]


def volume(scan: Path | None) -> NDArray[np.int16]:
    """(2, z, y, x) int16: a real scan where one is named, else a fine phantom."""
    if scan is not None:
        hu = read_scan(scan).array.astype(np.int16)
        return np.stack([hu, (hu > 200).astype(np.int16)])
    phantom = make_phantom(PhantomConfig(spacing=(1.25, 0.8, 0.8)), 0)
    return np.stack([phantom.image.array, phantom.label.array.astype(np.int16)])


def blosc2_store(data: NDArray[np.int16], path: Path, block: int, codec: str, level: int) -> Read:
    """With LZ4HC bytes are shuffled and the file is mapped, as the training store does it."""
    fast = codec == "LZ4HC"
    blosc2.set_nthreads(1)
    chunks = (1, *(min(CHUNK, n) for n in data.shape[1:]))
    blosc2.asarray(
        data,
        urlpath=str(path),
        mode="w",
        chunks=chunks,
        blocks=(1, *(min(block, n) for n in chunks[1:])),
        cparams={
            "codec": blosc2.Codec[codec],
            "clevel": level,
            "filters": [blosc2.Filter.SHUFFLE if fast else blosc2.Filter.BITSHUFFLE],
            "nthreads": 1,
        },
    )
    array = blosc2.open(str(path), mode="r", mmap_mode="r" if fast else None)
    return lambda box: np.asarray(array[box])


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
    return lambda box: np.asarray(opened[box])


def contenders(data: NDArray[np.int16], folder: Path) -> dict[str, Read]:
    """Each by name; a store's path is its name in the folder."""
    blosc_codec = BloscCodec(cname="zstd", clevel=5, shuffle=BloscShuffle.bitshuffle, typesize=2)
    return {
        "blosc2 LZ4HC, 32^3 blocks": blosc2_store(
            data, folder / "blosc2 LZ4HC, 32^3 blocks", 32, "LZ4HC", 9
        ),
        "blosc2 ZSTD, 32^3 blocks": blosc2_store(data, folder / "blosc2 ZSTD, 32^3 blocks", 32, "ZSTD", 5),
        "blosc2 ZSTD, 64^3 blocks": blosc2_store(data, folder / "blosc2 ZSTD, 64^3 blocks", 64, "ZSTD", 5),
        "zarr v3, blosc": zarr_store(data, folder / "zarr v3, blosc", blosc_codec, shards=False),
        "zarr v3, blosc, sharded": zarr_store(data, folder / "zarr v3, blosc, sharded", blosc_codec, True),
        "zarr v3, zstd": zarr_store(data, folder / "zarr v3, zstd", ZstdCodec(level=3), shards=False),
    }


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def boxes(shape: tuple[int, ...], random: np.random.Generator) -> list[tuple[slice, ...]]:
    places = [[int(random.integers(0, max(1, n - PATCH + 1))) for n in shape[1:]] for _ in range(READS)]
    return [(slice(None), *(slice(s, s + PATCH) for s in place)) for place in places]


def measure(data: NDArray[np.int16], folder: Path) -> list[dict[str, Any]]:
    """Milliseconds a read, median and spread over rounds, in which the contenders take turns."""
    readers = contenders(data, folder)
    random = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in readers}
    for box in boxes(data.shape, random)[:5]:
        for name, read in readers.items():
            assert np.array_equal(read(box), data[box]), name
    for _ in range(ROUNDS):
        places = boxes(data.shape, random)
        for name, read in readers.items():
            started = time.perf_counter()
            for box in places:
                read(box)
            times[name].append((time.perf_counter() - started) / READS * 1e3)
    fastest = min(statistics.median(t) for t in times.values())
    return [
        {
            "store": name,
            "ms": round(statistics.median(t), 3),
            "least_ms": round(min(t), 3),
            "greatest_ms": round(max(t), 3),
            "ratio": round(statistics.median(t) / fastest, 2),
            "bytes_per_voxel": round(size_of(folder / name) / (data.size // 2), 3),
        }
        for name, t in times.items()
    ]


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
    print(f"volume {data.shape}, random {PATCH}^3 reads, {ROUNDS} rounds of {READS}")
    print(f"{'store':26} {'ms/read':>8} {'range':>16} {'ratio':>6} {'bytes/voxel':>12}")
    for r in rows:
        spread = f"{r['least_ms']:.2f} to {r['greatest_ms']:.2f}"
        print(f"{r['store']:26} {r['ms']:8.2f} {spread:>16} {r['ratio']:6.2f} {r['bytes_per_voxel']:12.3f}")
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
