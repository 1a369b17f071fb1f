"""The training store: a folder with one chunked, compressed file a case and one table.

::

    store/
      dataset.json           fingerprint, split, preparation, one entry a case
      cases/<case>.b2nd      Blosc2 NDArray (channels + 1, z, y, x) int16: the channels, then stored labels

A channel of CT holds HU; others are scaled (`voxelscale.store.channels`). Stored labels are those of
`voxelscale.classes.Classes`: a mask of 0 and 1 where there is one class.

A case's file also holds (as Blosc2 variable-length metadata) its entry of the table and, for each
lesion, indices of its voxels, so that a sampler never reads a whole mask. ``benchmarks/store.py`` is
why the format is Blosc2 and not Zarr.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.channels import AIR_HU, ONE_CT, Channel
from voxelscale.classes import LESION, Classes
from voxelscale.dataset.folds import Fold
from voxelscale.errors import VoxelscaleError
from voxelscale.files import not_written, put_in_place, write_atomic
from voxelscale.geometry import Grid, IntTriple, Triple
from voxelscale.store.channels import Kept, fill_of

__all__ = [
    "AIR_HU",
    "PLAN_FILE",
    "CaseInfo",
    "Reader",
    "Store",
    "case_path",
    "open_case",
    "open_store",
    "overlap_slices",
    "read_info",
    "write_case",
    "write_table",
]

PLAN_FILE = "plan.yaml"
"""In a store: what to train with on it (`voxelscale.train.plan`)."""

FORMAT, FORMAT_OF_ANY = 1, 2
"""Of a store of one CT channel and one class, and of any other."""

TABLE = "dataset.json"

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
        lesion_volumes_mm3: one a lesion (26-connected component of a class), largest first.
        lesion_classes: the number of each lesion's class, from 0; () where there is one class.
        channels: how each channel is kept; () of one CT channel.
        channel_hu: of several channels, what `intensities` is of the first; {} of those that are no CT.
        intensities: moments of the lesions' HU: count, mean, std, and percentiles 0.5, 50, 99.5.
        key: changes when the source files or the preparation do.
        findings: of the labels (`voxelscale.labels.annotation.Annotation`); a mere mask has none.
        lungs: first voxel and shape (z, y, x) in the store of the box around the lungs; None where they
            were not searched for, or not found.
        axes: where the file's own x, y and z axis point, as ``LPS`` or ``RAS``; "" in older stores.
        lost: lesions of the mask that resampling left without a voxel, and how many of the others it
            merged or cut (`voxelscale.store.lesions.Resampled`).
        scan: what the scan is (`voxelscale.store.plausible.About.kept`); {} in older stores.
        touching: values of the mask that touch each other though all are the one class.
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
    touching: tuple[int, ...] = ()
    lesion_classes: tuple[int, ...] = ()
    channels: tuple[Kept, ...] = ()
    channel_hu: tuple[dict[str, float], ...] = ()

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
        classes: what its labels distinguish.
        channels: of its images.
        folds: train and validation cases of each; () where there are none.
    """

    path: Path
    spacing: Triple
    fingerprint: dict[str, Any]
    cases: tuple[CaseInfo, ...]
    classes: Classes = LESION
    channels: tuple[Channel, ...] = ONE_CT
    folds: tuple[Fold, ...] = ()

    @property
    def kept_by_model(self) -> dict[str, Any]:
        """What a model keeps of the data that it is trained on (`voxelscale.store.plausible.TrainedOn`)."""
        return {name: self.fingerprint[name] for name in KEPT_BY_MODEL if name in self.fingerprint}

    def split(self, name: str) -> tuple[CaseInfo, ...]:
        """The cases of ``train``, ``val`` or ``test``."""
        return tuple(info for info in self.cases if info.split == name)

    def read(self, case: str) -> tuple[NDArray[np.int16], NDArray[Any]]:
        """The first channel and the stored labels of a whole case, (z, y, x)."""
        channels, labels = self.read_channels(case)
        return channels[0], labels

    def read_channels(self, case: str) -> tuple[NDArray[np.int16], NDArray[Any]]:
        """Channels (c, z, y, x) and stored labels (z, y, x) of a whole case."""
        opened = open_case(self.path, case)
        with _damage_reported(case_path(self.path, case)):
            array = opened[:]
        labels = array[-1]
        return array[:-1], labels.astype(np.uint8) if self.classes.plain else labels

    @property
    def fills(self) -> dict[str, tuple[int, ...]]:
        """By case, the stored value of each channel beyond the scan; of CT `AIR_HU`."""
        return {
            info.case: tuple(map(fill_of, self.channels, info.channels or [None] * len(self.channels)))
            for info in self.cases
        }


class Reader:
    """Reads regions of cases; one open handle a case and thread, as Blosc2's are not thread-safe.

    Args:
        path: of a store.
        fills: `Store.fills`; None: one channel of CT.
    """

    def __init__(self, path: Path, fills: Mapping[str, Sequence[int]] | None = None) -> None:
        self._path, self._fills = path, fills or {}
        self._local = threading.local()
        self._lesions: dict[str, list[NDArray[np.int32]]] = {}

    def region(self, case: str, start: Sequence[int], shape: Sequence[int]) -> NDArray[np.int16]:
        """``(c + 1, *shape)`` int16, channels and labels, of the window that begins at voxel `start`.

        Beyond the scan a channel has its fill, of CT `AIR_HU`, and the label is 0; `start` may be negative.

        Raises:
            VoxelscaleError: the case's file is missing or damaged.
        """
        handles = self._local.__dict__.setdefault("handles", {})
        if case not in handles:
            handles[case] = open_case(self._path, case)
        array = handles[case]
        inside, target = overlap_slices(start, shape, array.shape[1:])
        if all(side.stop - side.start == n for side, n in zip(inside, shape, strict=True)):
            with _damage_reported(case_path(self._path, case)):
                return np.asarray(array[(slice(None), *inside)])
        fills = np.asarray([*self._fills.get(case, (AIR_HU,)), 0], np.int16)
        out = np.empty((len(fills), *shape), np.int16)
        out[:] = fills[:, None, None, None]
        if all(side.stop > side.start for side in inside):
            with _damage_reported(case_path(self._path, case)):
                out[(slice(None), *target)] = array[(slice(None), *inside)]
        return out

    def lesions(self, case: str) -> list[NDArray[np.int32]]:
        """For each lesion of a case its indexed voxels, (n, 3) as (z, y, x)."""
        if case not in self._lesions:
            array = open_case(self._path, case)
            with _damage_reported(case_path(self._path, case)):
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
    """The Blosc2 array of a case, (channels + 1, z, y, x) int16.

    Raises:
        VoxelscaleError: the file is missing or damaged.
    """
    import blosc2

    blosc2.set_nthreads(1)  # readers are parallel already; nested threads would fight the device's
    path = case_path(store, case)
    with _damage_reported(path):
        # Not memory-mapped, though that reads a third faster: a file that is cut short later would end
        # the whole process by SIGBUS instead of raising.
        return blosc2.open(str(path), mode="r")


@contextlib.contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
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
    labels: NDArray[Any],
    lesions: Sequence[NDArray[np.int64]],
    chunk: int = 64,
) -> None:
    """Write a case's file, atomically; it gets its name once all of it has been read back.

    In the place of another file it takes the store's table away, which says what that one held: a
    preparation with other settings that ends too early leaves no store, instead of a mixed one.

    Args:
        image: (c, z, y, x), as `voxelscale.store.channels.keep` gives each; of one channel (z, y, x), too.
        labels: (z, y, x) stored labels.
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
    chunks = (1, *(min(chunk, n) for n in labels.shape))
    blocks = (1, *(max(1, min(32, n)) for n in chunks[1:]))
    parameters = {
        # Read many thousands of times, written once: LZ4HC takes an eighth more space than ZSTD and is
        # decompressed in a third of the time (benchmarks/store.py).
        "codec": blosc2.Codec.LZ4HC,
        "clevel": 9,
        "filters": [blosc2.Filter.SHUFFLE],
        "nthreads": 1,
    }
    voxels = np.concatenate([image.reshape(-1, *labels.shape), labels[None].astype(np.int16)])
    entry = json.dumps(asdict(info))
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
        stored = again.schunk.vlmeta
        whole = stored["info"] == entry and len(stored["lesions"]) == len(lesions)
        if not (whole and np.array_equal(again[:], voxels)):
            raise OSError("what was written reads differently")
        if path.exists():
            (store / TABLE).unlink(missing_ok=True)
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


def write_table(store: Store) -> None:
    """Write ``dataset.json``, atomically; from then on the store is whole."""
    usual = store.classes.plain and store.channels == ONE_CT
    table = {
        "format": FORMAT if usual else FORMAT_OF_ANY,
        "spacing": list(store.spacing),
        "fingerprint": store.fingerprint,
        "classes": store.classes.to_dict(),
        "channels": [channel.to_dict() for channel in store.channels],
        "folds": [asdict(fold) for fold in store.folds],
        "cases": [asdict(info) for info in sorted(store.cases, key=lambda info: info.case)],
    }
    write_atomic(store.path / TABLE, json.dumps(table, indent=1))


def open_store(path: Path) -> Store:
    """The store in a folder.

    Raises:
        VoxelscaleError: it is none, or of another format.
    """
    table_path = path / TABLE
    try:
        table = json.loads(table_path.read_text(encoding="utf-8"))
        if table["format"] not in (FORMAT, FORMAT_OF_ANY):
            hint = "prepare the data set again with this version"
            raise VoxelscaleError(f"{table_path}: format {table['format']}, not {FORMAT_OF_ANY}", hint)
        z, y, x = (float(step) for step in table["spacing"])
        if not (min(z, y, x) > 0 and sum((z, y, x)) < float("inf")):
            raise ValueError(f"a spacing of {z}, {y}, {x} mm")
        if not isinstance(table["fingerprint"], dict):
            raise ValueError("no fingerprint")
        cases = tuple(_info(entry) for entry in table["cases"])
        classes = Classes.from_dict(table["classes"]) if "classes" in table else LESION
        channels = tuple(Channel.from_dict(one) for one in table.get("channels", ())) or ONE_CT
        folds = tuple(_fold(one) for one in table.get("folds", ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        hint = "name the folder that voxelscale prepare wrote"
        if isinstance(error, FileNotFoundError) and (path / "cases").is_dir():
            hint = "voxelscale prepare did not come to its end: give the same command again"
        problem = "not there" if isinstance(error, FileNotFoundError) else f"not a store's table ({error})"
        raise VoxelscaleError(f"{table_path}: {problem}", hint) from None
    return Store(
        path=path,
        spacing=(z, y, x),
        fingerprint=table["fingerprint"],
        cases=cases,
        classes=classes,
        channels=channels,
        folds=folds,
    )


def _fold(entry: dict[str, Any]) -> Fold:
    train, val = (tuple(str(case) for case in entry[side]) for side in ("train", "val"))
    return Fold(train=train, val=val)


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
            "touching": tuple(entry.get("touching", ())),
            "lungs": tuple(tuple(side) for side in box) if box else None,
            "lesion_classes": tuple(entry.get("lesion_classes", ())),
            "channels": tuple(Kept.from_dict(one) for one in entry.get("channels", ())),
            "channel_hu": tuple(entry.get("channel_hu", ())),
        }
    )
    sizes = (*info.shape, *info.source_spacing)
    if Path(info.case).name != info.case or not min(sizes) > 0 or not sum(info.lesion_volumes_mm3) >= 0:
        raise ValueError(f"an entry that is no case's: {info.case[:60]!r}")
    _ = info.grid  # raises a ValueError where there is none
    return info
