"""Training samples by global index: which scan, which patch, and reading them ahead.

Sample ``i`` of a run is a pure function of ``(seed, i)``. No epochs, no shuffles in memory, no worker
seeds: any number of ranks, and a resumed run, draw the same stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from voxelscale.config import AugmentConfig, DataConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.randomness import generator
from voxelscale.samples.augment import Augmentation, draw_augmentation
from voxelscale.samples.draws import Draws, Stream
from voxelscale.samples.order import item_of
from voxelscale.samples.transforms.affine import Reaching, reaching
from voxelscale.store import CaseInfo, Reader, Store

Drawn = TypeVar("Drawn")
Drawn_co = TypeVar("Drawn_co", covariant=True)


class Source(Protocol[Drawn_co]):
    """Samples by their global index."""

    def __getitem__(self, index: int, /) -> Drawn_co:
        """Sample `index`, any number from 0 on; a pure function of it."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as read, before normalising and augmenting.

    Attributes:
        index: its global index.
        case: which scan.
        start: voxel (z, y, x) of the store at which `region` begins; may be negative.
        region: (c + 1, z, y, x) int16, channels and stored labels; larger than the patch where it will be
            rotated or zoomed.
        augmentation: what the device will do to it.
    """

    index: int
    case: str
    start: tuple[int, int, int]
    region: NDArray[np.int16]
    augmentation: Augmentation

    @cached_property
    def labels(self) -> tuple[Reaching, ...]:
        """The labels in the region; looked for once, by the thread that reads."""
        return reaching(self.region[-1], self.augmentation.turn, self.augmentation.patch)


class PatchSource:
    """The map from a global index to a sample of a store's training cases.

    Args:
        store: where to read.
        data: patch size, foreground share, how many cases, and how many patches of each.
        augment: what is drawn for the device.
        seed: of the run.
        dims: 2 or 3; in 2-D nothing turns out of the slice.

    Raises:
        VoxelscaleError: the store has no training case.
    """

    def __init__(
        self, store: Store, data: DataConfig, augment: AugmentConfig, seed: int, dims: int = 3
    ) -> None:
        cases = store.split("train")
        self.cases: Sequence[CaseInfo] = cases[: data.cases] if data.cases else cases
        if not self.cases:
            raise VoxelscaleError(
                f"{store.path}: no training case", "give prepare.split a first share above 0"
            )
        self._with_lesions = _with_lesions(self.cases)
        self._by_class = {info.case: _by_class(info) for info in self.cases}
        self._reader = Reader(store.path, store.fills)
        self._data, self._augment, self._seed, self._dims = data, augment, seed, dims
        self._spacing = store.spacing

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, any number from 0 on."""
        info, centre = self._place(index)
        plan = draw_augmentation(
            self._augment,
            Draws(self._seed, index),
            self._data.patch_size,
            self._spacing,
            self._dims,
        )
        start = place_window(centre, self._data.patch_size, info.shape)
        margin = (np.asarray(plan.region) - self._data.patch_size) // 2
        z, y, x = (int(v) for v in np.asarray(start) - margin)
        region = self._reader.region(info.case, (z, y, x), plan.region)
        sample = Sample(index=index, case=info.case, start=(z, y, x), region=region, augmentation=plan)
        # Here, in a reader's thread, and not where the device waits for it.
        plan.draw_noise(len(region) - 1)
        _ = sample.labels
        return sample

    def _place(self, index: int) -> tuple[CaseInfo, NDArray[np.int64]]:
        """The case and the patch's centre voxel of a sample.

        Where patches are limited it is that of one of so many items, which all cases share evenly. The
        items of a lower limit are among those of a higher one.
        """
        cases, with_lesions = self.cases, self._with_lesions
        if limit := self._data.patches_per_case:
            index = item_of(index, limit * len(cases), self._seed)
            cases = [cases[index % len(cases)]]
            with_lesions = _with_lesions(cases)
        random = generator(self._seed, index, Stream.PLACE)
        foreground = random.random() < self._data.foreground and bool(with_lesions)
        pick, lesion, voxel = random.random(3)
        if not foreground:
            info = cases[int(pick * len(cases))]
            start, shape = info.lungs or ((0, 0, 0), info.shape)
            return info, start + random.integers(0, shape)
        info = with_lesions[int(pick * len(with_lesions))]
        # By class and by lesion first, so that a rare and a small one are seen as often as others.
        lesions, by_class = self._reader.lesions(info.case), self._by_class[info.case]
        of_class = by_class[int(lesion * len(by_class))]
        lesion = lesion * len(by_class) % 1
        voxels = lesions[of_class[int(lesion * len(of_class))]]
        reach = np.asarray(self._data.patch_size) // 3
        jitter = random.integers(-reach, reach, endpoint=True)
        return info, voxels[int(voxel * len(voxels))].astype(np.int64) + jitter


def _with_lesions(cases: Sequence[CaseInfo]) -> list[CaseInfo]:
    return [info for info in cases if info.lesion_volumes_mm3]


def _by_class(info: CaseInfo) -> list[list[int]]:
    """The numbers of a case's lesions, for each class that it has."""
    if not info.lesion_classes:
        return [list(range(len(info.lesion_volumes_mm3)))]
    numbers: dict[int, list[int]] = {}
    for number, at in enumerate(info.lesion_classes):
        numbers.setdefault(at, []).append(number)
    return [numbers[at] for at in sorted(numbers)]


def place_window(
    centre: Sequence[int] | NDArray[np.int64], size: Sequence[int], shape: Sequence[int]
) -> list[int]:
    """First voxel of a window of `size` around `centre`, moved to lie inside `shape`.

    Along an axis where the scan is smaller than the window, the scan lies in the window's middle.
    """
    starts = []
    for c, n, whole in zip(centre, size, shape, strict=True):
        inside = min(max(int(c) - n // 2, 0), whole - n)
        starts.append(inside if whole >= n else -((n - whole) // 2))
    return starts


def worker_indices(first: int, worker: int, workers: int, batch_size: int) -> range:
    """The global indices of one worker's micro-batch in the update that begins at sample `first`.

    ``W`` workers with ``b`` samples each cover ``[first, first + W b)``; worker ``w`` takes every index
    that is ``w`` modulo ``W``.
    """
    return range(first + worker, first + workers * batch_size, workers)


def read_ahead(
    source: Source[Drawn], batches: Iterable[Sequence[int]], readers: int, prefetch: int
) -> Iterator[list[Drawn]]:
    """The samples of each batch, in order, read by threads `prefetch` batches ahead.

    Threads suffice: decompression and array copies release the interpreter's lock.
    """
    waiting: deque[list[Future[Drawn]]] = deque()
    pending = iter(batches)
    pool = ThreadPoolExecutor(readers, thread_name_prefix="patch-reader")
    try:
        for indices in islice(pending, prefetch):
            waiting.append([pool.submit(source.__getitem__, index) for index in indices])
        while waiting:
            samples = [future.result() for future in waiting.popleft()]
            for indices in islice(pending, 1):
                waiting.append([pool.submit(source.__getitem__, index) for index in indices])
            yield samples
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
