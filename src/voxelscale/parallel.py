"""The same work on many items, over processes, where one item's fault does not stop the rest."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
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

    Raises:
        VoxelscaleError: the system ended a process, as it does where memory runs out.
    """
    if not items:
        return
    if here:
        yield from _one_by_one(work, items, label, name)
        return
    count = min(workers or os.cpu_count() or 1, len(items))
    context = _start_method(work)
    with (
        Progress(label, len(items)) as progress,
        ProcessPoolExecutor(count, mp_context=context, initializer=_begin_worker) as pool,
    ):
        try:
            with _ctrl_c_waits():
                jobs = {pool.submit(work, item): item for item in items}
            for done, job in enumerate(as_completed(jobs), start=1):
                item = jobs[job]
                try:
                    result: Made | VoxelscaleError = job.result()
                except VoxelscaleError as error:
                    result = error
                progress.update(done, name(item))
                yield item, result
        except BrokenProcessPool:
            hint = "if memory ran out, fewer processes need less: --set prepare.workers=1"
            raise VoxelscaleError(f"{label}: the system ended one of its processes", hint) from None
        except BaseException:
            # Waiting here: the pool's own exit would take the cancelling back.
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start_method(work: Callable[[Item], Made]) -> BaseContext:
    """How workers start: never by a fork of this process, whose threads of ITK and Blosc2 they would miss.

    On Linux they are forked from a process that has imported the module of `work` and used nothing of it:
    only the first pool of this process waits for imports.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    function = work.func if isinstance(work, partial) else work
    context.set_forkserver_preload([function.__module__])
    return context


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C reaches the whole process group, but this process alone decides what becomes of the others.

    So it is blocked in those that start meanwhile, and comes here when they have started.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    resource_tracker.ensure_running()  # its start would unblock the signal
    # Both: other processes inherit what is blocked, and other threads of this one still get the signal.
    handler = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if asked:
        signal.raise_signal(signal.SIGINT)


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

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # started from another thread, it is not blocked
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def _end_with_parent() -> None:
    """A pool's workers would wait for ever for one that was killed."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
