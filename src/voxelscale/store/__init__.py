"""The training store: a folder with one chunked, compressed file a case and one table.

::

    store/
      dataset.json           fingerprint, split, preparation, one entry a case
      cases/<case>.b2nd      Blosc2 NDArray (2, z, y, x) int16: HU, then mask 0/1

A case's file also holds (as Blosc2 variable-length metadata) its entry of the table and, for each
lesion, indices of its voxels, so that a sampler never reads a whole mask. ``benchmarks/store.py`` is
why the format is Blosc2 and not Zarr.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.files import not_written, put_in_place, write_atomic
from voxelscale.geometry import Grid, IntTriple, Triple

PLAN_FILE = "plan.yaml"
"""In a store: what to train with on it (`voxelscale.train.plan`)."""

FORMAT = 1
AIR_HU = -1024
"""Value beyond the borders of a scan."""

KEPT_BY_MODEL = (
    *("cases", "patients", "source_spacing", "extent_mm", "lesion_hu", "lesion_diameter_mm"),
    *("lesions_per_case", "scans"),
)
"""Entries of the fingerprint."""

VOXELS_PER_LESION = 4096
"""At most this many voxels of a lesion are indexed; more would not change the sampling."""


@dataclass(frozen=True, kw_only=True)
class CaseInfo:
    """What the table says of a case.

    Attributes:
        case: its name.
        patient: cases of one patient are never on both sides of a split.
        split: ``train``, ``val`` or ``test``.
        shape: voxels (z, y, x) in the store.
        affine: 4 x 4 rows, store voxel (z, y, x, 1) to LPS mm.
        source_spacing: the scan's own spacing (z, y, x), mm.
        lesion_volumes_mm3: one a lesion (26-connected component), largest first.
        intensities: moments of the lesions' HU: count, mean, std, and percentiles 0.5, 50, 99.5.
        key: changes when the source files or the preparation do.
        findings: of the labels (`voxelscale.labels.annotation.Annotation`); a mere mask has none.
        lungs: first voxel and shape (z, y, x) in the store of the box around the lungs; None where they
            were not searched for, or not found.
        axes: where the file's own x, y and z axis point, as ``LPS`` or ``RAS``; "" in older stores.
        lost: lesions of the mask that resampling left without a voxel, and how many of the others it
            merged or cut (`voxelscale.store.lesions.Resampled`).
        scan: what the scan is (`voxelscale.store.plausible.About.kept`); {} in older stores.
    """

    case: str
    patient: str
    split: str = ""
    shape: IntTriple
    affine: tuple[tuple[float, ...], ...]
    source_spacing: Triple
    lesion_volumes_mm3: tuple[float, ...]
    intensities: dict[str, float]
    key: str
    lungs: tuple[IntTriple, IntTriple] | None = None
    findings: tuple[dict[str, Any], ...] = ()
    axes: str = ""
    lost: tuple[dict[str, Any], ...] = ()
    merged: int = 0
    cut: int = 0
    scan: dict[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> Grid:
        """Where the stored voxels lie."""
        return Grid(self.shape, np.asarray(self.affine))


@dataclass(frozen=True, kw_only=True)
class Store:
    """An open training store.

    Attributes:
        path: its folder.
        spacing: of every case, (z, y, x) in mm.
        fingerprint: of the data set; see `voxelscale.store.prepare.fingerprint`.
        cases: sorted by name.
    """

    path: Path
    spacing: Triple
    fingerprint: dict[str, Any]
    cases: tuple[CaseInfo, ...]

    @property
    def kept_by_model(self) -> dict[str, Any]:
        """What a model keeps of the data that it is trained on (`voxelscale.store.plausible.TrainedOn`)."""
        return {name: self.fingerprint[name] for name in KEPT_BY_MODEL if name in self.fingerprint}

    def split(self, name: str) -> tuple[CaseInfo, ...]:
        """The cases of ``train``, ``val`` or ``test``."""
        return tuple(info for info in self.cases if info.split == name)

    def read(self, case: str) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """HU and mask of a whole case, (z, y, x)."""
        opened = open_case(self.path, case)
        with _damage_told(case_path(self.path, case)):
            array = opened[:]
        return array[0], array[1].astype(np.uint8)


class Reader:
    """Reads regions of cases; one open handle a case and thread, as Blosc2's are not thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        self._lesions: dict[str, list[NDArray[np.int32]]] = {}

    def region(self, case: str, start: Sequence[int], shape: Sequence[int]) -> NDArray[np.int16]:
        """``(2, *shape)`` int16, HU and mask, of the window that begins at voxel `start`.

        Beyond the scan HU is `AIR_HU` and the mask 0; `start` may be negative.

        Raises:
            VoxelscaleError: the case's file is missing or damaged.
        """
        handles = self._local.__dict__.setdefault("handles", {})
        if case not in handles:
            handles[case] = open_case(self._path, case)
        array = handles[case]
        inside, target = overlap_slices(start, shape, array.shape[1:])
        if all(side.stop - side.start == n for side, n in zip(inside, shape, strict=True)):
            with _damage_told(case_path(self._path, case)):
                return np.asarray(array[(slice(None), *inside)])
        out = np.zeros((2, *shape), np.int16)
        out[0] = AIR_HU
        if all(side.stop > side.start for side in inside):
            with _damage_told(case_path(self._path, case)):
                out[(slice(None), *target)] = array[(slice(None), *inside)]
        return out

    def lesions(self, case: str) -> list[NDArray[np.int32]]:
        """For each lesion of a case its indexed voxels, (n, 3) as (z, y, x)."""
        if case not in self._lesions:
            array = open_case(self._path, case)
            with _damage_told(case_path(self._path, case)):
                flat = array.schunk.vlmeta["lesions"]
            shape = array.shape[1:]
            self._lesions[case] = [
                np.stack(np.unravel_index(np.frombuffer(raw, "<i4"), shape), axis=1).astype(np.int32)
                for raw in flat
            ]
        return self._lesions[case]


def overlap_slices(
    start: Sequence[int], shape: Sequence[int], whole: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a window that may lie beyond an array meets it: in the array, and in the window.

    Where they do not meet, some slice of the array ends before it begins.
    """
    low = [max(0, s) for s in start]
    high = [min(s + n, size) for s, n, size in zip(start, shape, whole, strict=True)]
    return (
        tuple(map(slice, low, high)),
        tuple(slice(a - s, h - s) for a, h, s in zip(low, high, start, strict=True)),
    )


def open_case(store: Path, case: str) -> Any:
    """The Blosc2 array of a case, (2, z, y, x) int16.

    Raises:
        VoxelscaleError: the file is missing or damaged.
    """
    import blosc2

    blosc2.set_nthreads(1)  # readers are parallel already; nested threads would fight the device's
    path = case_path(store, case)
    with _damage_told(path):
        # Not memory-mapped, though that reads a third faster: a file that is cut short later would end
        # the whole process by SIGBUS instead of raising.
        return blosc2.open(str(path), mode="r")


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Blosc2 opens and reads; a file may turn unreadable at any time."""
    try:
        yield
    except FileNotFoundError:
        raise VoxelscaleError(f"{path}: no such file", "run voxelscale prepare again") from None
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        hint = "put back a copy of it, or delete it and run voxelscale prepare again"
        raise VoxelscaleError(f"{path}: damaged ({error})", hint) from None


def case_path(store: Path, case: str) -> Path:
    """Where a case's file lies."""
    return store / "cases" / f"{case}.b2nd"


def write_case(
    store: Path,
    info: CaseInfo,
    image: NDArray[np.int16],
    mask: NDArray[np.uint8],
    lesions: Sequence[NDArray[np.int64]],
    chunk: int = 64,
) -> None:
    """Write a case's file, atomically; it gets its name once all of it has been read back.

    Args:
        image: (z, y, x) HU.
        mask: (z, y, x) 0 or 1.
        lesions: for each, the flat (C-order) indices of voxels to sample from.
        chunk: edge of a chunk; a quarter of a chunk's voxels along each axis is one block, the unit
            that is decompressed.

    Raises:
        VoxelscaleError: it cannot be written.
    """
    import blosc2

    blosc2.set_nthreads(1)
    path = case_path(store, info.case)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part.b2nd")
    chunks = (1, *(min(chunk, n) for n in image.shape))
    blocks = (1, *(max(1, min(32, n)) for n in chunks[1:]))
    parameters = {
        # Read many thousands of times, written once: LZ4HC takes an eighth more space than ZSTD and is
        # decompressed in a third of the time (benchmarks/store.py).
        "codec": blosc2.Codec.LZ4HC,
        "clevel": 9,
        "filters": [blosc2.Filter.SHUFFLE],
        "nthreads": 1,
    }
    voxels, entry = np.stack([image, mask.astype(np.int16)]), json.dumps(asdict(info))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = blosc2.asarray(
            voxels,
            urlpath=str(temporary),
            mode="w",
            chunks=chunks,
            blocks=blocks,
            cparams=parameters,
        )
        array.schunk.vlmeta["info"] = entry
        array.schunk.vlmeta["lesions"] = [flat.astype("<i4").tobytes() for flat in lesions]
        del array
        # Blosc2 does not look whether the disk took what it wrote.
        again = blosc2.open(str(temporary), mode="r")
        told = again.schunk.vlmeta
        whole = told["info"] == entry and len(told["lesions"]) == len(lesions)
        if not (whole and np.array_equal(again[:], voxels)):
            raise OSError("what was written reads differently")
        put_in_place(temporary, path)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise not_written(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_info(store: Path, case: str) -> CaseInfo | None:
    """The entry that a case's file holds, or None where there is no whole file."""
    if not case_path(store, case).is_file():
        return None
    try:
        array = open_case(store, case)  # its metadata does not outlive it
        return _info(json.loads(array.schunk.vlmeta["info"]))
    except (VoxelscaleError, KeyError, TypeError, ValueError):
        return None


def write_table(
    store: Path, spacing: Triple, fingerprint: dict[str, Any], cases: Sequence[CaseInfo]
) -> None:
    """Write ``dataset.json``, atomically; from then on the store is whole."""
    table = {
        "format": FORMAT,
        "spacing": list(spacing),
        "fingerprint": fingerprint,
        "cases": [asdict(info) for info in sorted(cases, key=lambda info: info.case)],
    }
    write_atomic(store / "dataset.json", json.dumps(table, indent=1))


def open_store(path: Path) -> Store:
    """The store in a folder.

    Raises:
        VoxelscaleError: it is none, or of another format.
    """
    table_path = path / "dataset.json"
    try:
        table = json.loads(table_path.read_text(encoding="utf-8"))
        if table["format"] != FORMAT:
            hint = "prepare the data set again with this version"
            raise VoxelscaleError(f"{table_path}: format {table['format']}, not {FORMAT}", hint)
        z, y, x = (float(step) for step in table["spacing"])
        if not (min(z, y, x) > 0 and sum((z, y, x)) < float("inf")):
            raise ValueError(f"a spacing of {z}, {y}, {x} mm")
        if not isinstance(table["fingerprint"], dict):
            raise ValueError("no fingerprint")
        cases = tuple(_info(entry) for entry in table["cases"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        hint = "name the folder that voxelscale prepare wrote"
        problem = "not there" if isinstance(error, FileNotFoundError) else f"not a store's table ({error})"
        raise VoxelscaleError(f"{table_path}: {problem}", hint) from None
    return Store(path=path, spacing=(z, y, x), fingerprint=table["fingerprint"], cases=cases)


def _info(entry: dict[str, Any]) -> CaseInfo:
    z, y, x = entry["shape"]
    sz, sy, sx = entry["source_spacing"]
    box = entry.get("lungs")
    info = CaseInfo(
        **{
            **entry,
            "shape": (z, y, x),
            "source_spacing": (sz, sy, sx),
            "affine": tuple(tuple(row) for row in entry["affine"]),
            "lesion_volumes_mm3": tuple(entry["lesion_volumes_mm3"]),
            "findings": tuple(entry.get("findings", ())),
            "lost": tuple(entry.get("lost", ())),
            "lungs": tuple(tuple(side) for side in box) if box else None,
        }
    )
    sizes = (*info.shape, *info.source_spacing)
    if Path(info.case).name != info.case or not min(sizes) > 0 or not sum(info.lesion_volumes_mm3) >= 0:
        raise ValueError(f"an entry that is no case's: {info.case[:60]!r}")
    _ = info.grid  # raises a ValueError where there is none
    return info
