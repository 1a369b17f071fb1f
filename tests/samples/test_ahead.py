"""The thread that makes micro-batches ahead, with a processor's stand-in for a GPU's stream."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from voxelscale.samples.ahead import beside, on_device

WAIT = 20.0
"""Seconds after which a test gives up."""


class Side:
    """Notes what a GPU's stream would be asked for."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.marks: list[int] = []
        self.received: list[tuple[Any, int]] = []

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.thread = threading.current_thread()
        yield

    def mark(self) -> int:
        self.marks.append(len(self.marks))
        return self.marks[-1]

    def receive(self, made: Any, mark: int) -> None:
        self.received.append((made, mark))


class Stream:
    """Micro-batches of numbers, which say when they are read."""

    def __init__(self, count: int) -> None:
        self.left, self.read, self.closed = iter(range(count)), threading.Semaphore(0), False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> list[int]:
        number = next(self.left)
        self.read.release()
        return [number]

    def close(self) -> None:
        self.closed = True


def doubled(samples: Sequence[Any]) -> tuple[int, int]:
    return samples[0], 2 * samples[0]


def ended(thread: threading.Thread | None) -> bool:
    assert thread is not None
    thread.join(WAIT)
    return not thread.is_alive()


def test_everything_comes_in_order_each_with_its_own_mark() -> None:
    side, stream = Side(), Stream(30)
    got = list(beside(stream, doubled, side, 2))
    assert got == [([n], (n, 2 * n)) for n in range(30)]
    assert side.received == [((n, 2 * n), n) for n in range(30)]
    assert side.thread is not threading.current_thread()
    assert ended(side.thread)
    assert stream.closed


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_so_many_are_ready_and_no_more(ahead: int) -> None:
    stream = Stream(100)
    batches = beside(stream, doubled, Side(), ahead)
    for taken in range(4):
        next(batches)
        # What is handed out makes room for one more; each is waited for, and then there is none.
        for _ in range(ahead + 1 if taken == 0 else 1):
            assert stream.read.acquire(timeout=WAIT)
        assert not stream.read.acquire(timeout=0.05)
    batches.close()


@pytest.mark.parametrize("fault", [ValueError("damaged"), torch.OutOfMemoryError("no room")])
@pytest.mark.parametrize("at", ["stream", "collate"])
def test_an_error_comes_out_after_what_was_sound(fault: Exception, at: str) -> None:
    def stream() -> Iterator[list[int]]:
        yield from ([0], [1])
        if at == "stream":
            raise fault
        yield [2]

    def collate(samples: Sequence[int]) -> tuple[int, int]:
        if samples[0] == 2:
            raise fault
        return doubled(samples)

    side = Side()
    batches = beside(stream(), collate, side, 2)
    assert [next(batches)[0], next(batches)[0]] == [[0], [1]]
    with pytest.raises(type(fault)) as caught:
        next(batches)
    assert caught.value is fault
    assert ended(side.thread)


def test_closing_ends_the_thread_that_waits_for_space() -> None:
    side, stream = Side(), Stream(100)
    batches = beside(stream, doubled, side, 1)
    next(batches)
    assert stream.read.acquire(timeout=WAIT)
    batches.close()
    assert ended(side.thread)
    assert stream.closed


def test_closing_ends_the_thread_that_reads() -> None:
    reading, go_on = threading.Event(), threading.Event()

    def stream() -> Iterator[list[int]]:
        yield [0]
        reading.set()
        assert go_on.wait(WAIT)
        yield [1]

    side, made = Side(), []

    def collate(samples: Sequence[int]) -> tuple[int, int]:
        made.append(samples[0])
        return doubled(samples)

    batches = beside(stream(), collate, side, 2)
    next(batches)
    assert reading.wait(WAIT)
    closing = threading.Thread(target=batches.close)
    closing.start()
    go_on.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    assert ended(side.thread)
    assert made == [0], "what nobody will take is not made"


def test_a_batch_is_held_by_its_user_alone() -> None:
    stream = iter([[0]] * 5)
    batches = beside(stream, lambda samples: (torch.zeros(3), torch.zeros(3)), Quiet(), 1)
    held = weakref.ref(next(batches)[1][0])
    gc.collect()
    assert held() is None
    batches.close()


class Quiet(Side):
    """Keeps nothing."""

    def receive(self, made: Any, mark: int) -> None:
        assert mark in self.marks


def test_a_processor_makes_each_when_it_is_asked_for() -> None:
    did: list[tuple[str, int, threading.Thread]] = []

    def note(what: str) -> Callable[[Any], None]:
        return lambda number: did.append((what, number, threading.current_thread()))

    def stream() -> Iterator[list[int]]:
        for number in range(2):
            note("read")(number)
            yield [number]

    def collate(samples: Sequence[int]) -> tuple[int, int]:
        note("make")(samples[0])
        return doubled(samples)

    here = threading.current_thread()
    for device in ("cpu", "meta"):
        did.clear()
        for samples, made in on_device(stream(), collate, torch.device(device)):
            assert made == doubled(samples)
            note("use")(samples[0])
        assert did == [(what, n, here) for n in range(2) for what in ("read", "make", "use")]
