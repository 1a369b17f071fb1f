"""The same work on many items, over processes, where one item's fault does not stop the rest."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from voxelscale.console import Progress
from voxelscale.errors import VoxelscaleError

Item = TypeVar("Item")
Made = TypeVar("Made")


def map_processes(
    work: Callable[[Item], Made],
    items: Sequence[Item],
    *,
    label: str,
    name: Callable[[Item], str],
    workers: int = 0,
    here: bool = False,
) -> Iterator[tuple[Item, Made | VoxelscaleError]]:
    """Each item with its result, or with the fault of its input, in the order they are ready.

    Args:
        work: a function that can be pickled.
        label: what the progress bar says.
        name: what it says of an item.
        workers: processes; 0: one a core.
        here: whether to do it in this process, one after another.
    """
    if not items:
        return
    if here:
        yield from _one_by_one(work, items, label, name)
        return
    count = min(workers or os.cpu_count() or 1, len(items))
    # spawn: the threads of ITK and Blosc2 do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with (
        Progress(label, len(items)) as progress,
        ProcessPoolExecutor(count, mp_context=context, initializer=_begin_worker) as pool,
    ):
        jobs = {pool.submit(work, item): item for item in items}
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                item = jobs[job]
                try:
                    result: Made | VoxelscaleError = job.result()
                except VoxelscaleError as error:
                    result = error
                progress.update(done, name(item))
                yield item, result
        except BaseException:
            # Waiting here: the pool's own exit would take the cancelling back.
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _one_by_one(
    work: Callable[[Item], Made], items: Sequence[Item], label: str, name: Callable[[Item], str]
) -> Iterator[tuple[Item, Made | VoxelscaleError]]:
    with Progress(label, len(items)) as progress:
        for done, item in enumerate(items, start=1):
            result: Made | VoxelscaleError
            try:
                result = work(item)
            except VoxelscaleError as error:
                result = error
            progress.update(done, name(item))
            yield item, result


def _begin_worker() -> None:
    import SimpleITK as sitk

    # Ctrl-C reaches the whole process group; the parent alone decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
