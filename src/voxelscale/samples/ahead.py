"""Micro-batches that are on a GPU before the training asks for them.

What `make_batch` does to a micro-batch are many small kernels, which take the host longer to start than the
GPU to run. On a GPU a thread starts them for the next micro-batches, on a stream of their own, while the
training's step is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

from voxelscale.device import stream_of

Collate = Callable[[Sequence[Any]], tuple[Any, Any]]
"""Samples to the network's input and target."""

Made = tuple[list[Any], tuple[Any, Any]]
"""A micro-batch's samples, and what `Collate` made of them."""


class Side(Protocol):
    """Where the thread that works ahead computes."""

    def entered(self) -> AbstractContextManager[Any]:
        """What the thread computes within this is computed there."""

    def mark(self) -> Any:
        """What has been started there up to now; called within `entered`."""

    def receive(self, made: Any, mark: Any) -> None:
        """Let the caller's stream wait for what was marked; it may then use the tensors that were made."""


class CudaSide:
    """A stream of its own on a GPU; nobody but the GPU ever waits for it.

    Its few small kernels go before those of the training, which will need what they make: a lower number is
    a higher priority.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, stream_of(device, -2)

    def entered(self) -> AbstractContextManager[Any]:
        """Within it this thread's kernels go to the stream."""
        torch.cuda.set_device(self._device)  # a thread begins with the first GPU
        return torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event:
        """An event of the stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def receive(self, made: Any, mark: torch.cuda.Event) -> None:
        """Also keeps the tensors' memory from being used again before the caller's stream is done."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(mark)
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
                leaf.record_stream(current)


def on_device(
    stream: Iterator[list[Any]], collate: Collate, device: torch.device, ahead: int = 2
) -> Generator[Made, None, None]:
    """Each micro-batch's samples, and its input and target on the device, in order.

    On a GPU they are made ahead, by a thread (`beside`); elsewhere when they are asked for, by the caller.

    Args:
        stream: each micro-batch's samples; on a GPU the thread takes from it, and closes it.
        ahead: micro-batches on a GPU that wait to be asked for, at most.

    Raises:
        Exception: whatever `stream` or `collate` raises.
    """
    if device.type == "cuda":
        return beside(stream, collate, CudaSide(device), ahead)
    return ((samples, collate(samples)) for samples in stream)


def beside(
    stream: Iterator[list[Any]], collate: Collate, side: Side, ahead: int
) -> Generator[Made, None, None]:
    """As `on_device`, by a thread that computes elsewhere; it ends when this generator is closed.

    The thread begins when the first micro-batch is asked for. If it is reading when the generator is
    closed, that is waited for.
    """
    made: SimpleQueue[tuple[Made, Any] | BaseException | None] = SimpleQueue()
    free, closed = threading.Semaphore(ahead), threading.Event()

    def work() -> None:
        try:
            with side.entered():
                while free.acquire() and not closed.is_set():
                    samples = next(stream, None)
                    if samples is None or closed.is_set():
                        break
                    made.put(((samples, collate(samples)), side.mark()))
            made.put(None)
        except BaseException as error:
            made.put(error)
        finally:
            if close := getattr(stream, "close", None):
                close()

    # A daemon: a generator that an error's traceback holds must not keep the process from ending.
    thread = threading.Thread(target=work, name="input", daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                try:
                    raise item
                finally:
                    del item  # this frame and the error would keep each other, and what was on the GPU
            handed, mark = [item[0]], item[1]
            del item
            side.receive(handed[0][1], mark)
            free.release()
            yield handed.pop()  # nothing here holds it while it is used
    finally:
        closed.set()
        free.release()
        if thread is not threading.current_thread():  # where the garbage collector closes
            thread.join()
