"""One training of many: in processes of its own, watched through what it writes.

A search and a scaling study train through `train_once` and know nothing else of a training. The config is
frozen into a file before the training starts, its validations come back through ``metrics.jsonl``, and a
file asks all its ranks to save and stop together. A function of the same signature (`TrainOnce`) can take
its place, as in tests.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from voxelscale.config import Config
from voxelscale.errors import VoxelscaleError
from voxelscale.train.child import Child, start_child
from voxelscale.train.log import OUT_OF_MEMORY, STOP_FILE, read_events

POLL = 0.5
"""Seconds between looks at a running training."""

GRACE = 30.0
"""Seconds that a training has to save and stop before it is killed."""

INTERRUPTED = 130
"""Exit code of a training that was asked to save and stop."""

Order = Literal["go on", "stop", "kill"]
"""To a running training; to ``stop`` is to save first, all ranks together."""

Ending = Literal["finished", "stopped", "late", "killed", "diverged", "out of memory", "failed"]

FATAL: dict[str, Ending] = {"diverged": "diverged", OUT_OF_MEMORY: "out of memory"}
"""Events that say why a training failed."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is to be trained, where and by what.

    Attributes:
        config: of the training.
        store: what `voxelscale prepare` wrote.
        run: the training's folder; one that holds checkpoints is resumed from the newest.
        threads: of each rank.
        environment: laid over this process's own, as ``CUDA_VISIBLE_DEVICES``.
        seconds: time limit, after which it is stopped.
        grace: seconds that it has to save and stop before it is killed.
    """

    config: Config
    store: Path
    run: Path
    threads: int
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = math.inf
    grace: float = GRACE


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a training ended.

    Attributes:
        ending: ``finished``, or why not: ``stopped`` by an order, ``late`` by its time limit, ``killed`` by
            an order; ``diverged``, ``out of memory`` or ``failed`` otherwise.
        curve: (samples, Dice) of every validation of the run, samples rising.
        fault: its error message, where it was a fault that ended it.
    """

    ending: Ending
    curve: tuple[tuple[int, float], ...] = ()
    fault: VoxelscaleError | None = None

    @property
    def dice(self) -> float | None:
        """Of the last validation; None where there was none."""
        return self.curve[-1][1] if self.curve else None


class TrainOnce(Protocol):
    """`train_once`, or what takes its place."""

    def __call__(
        self,
        training: Training,
        /,
        order: Callable[[], Order],
        validated: Callable[[int, float], bool] = ...,
    ) -> TrainingResult:
        """Train, as `train_once` does."""


def train_once(
    training: Training,
    /,
    order: Callable[[], Order],
    validated: Callable[[int, float], bool] = lambda samples, dice: False,
) -> TrainingResult:
    """Train until the budget is spent, or something ends it.

    Args:
        order: asked a few times a second.
        validated: is given (samples, Dice) of each validation once, those of an earlier part of the run
            among them; whether the training is to stop.

    Raises:
        VoxelscaleError: it could not be started.
    """
    log = _Log(training.run)
    child = start_child(
        training.config,
        training.store,
        training.run,
        threads=training.threads,
        environment=training.environment,
    )
    try:
        return _watch(child, log, training, order, validated)
    finally:
        if child.poll() is None:
            child.kill()


def samples_seen(run: Path) -> int:
    """Samples that a run has been trained on so far, as its log has them."""
    events = read_events(run)
    return int(events[-1]["samples"]) if events else 0


def copy_run(old: Path, new: Path) -> None:
    """Copy a run, to resume it in a folder of its own; nothing if it has not begun or the copy is there.

    The process that wrote the old one may still be alive on another machine. What it writes from now on
    must not reach the new one, and files that it deletes meanwhile are left out.

    Raises:
        VoxelscaleError: the copy cannot be written.
    """
    if new.exists() or not (old / "config.yaml").is_file():
        return
    part = new.with_name(f".{new.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for path in sorted(old.rglob("*")):
            there = part / path.relative_to(old)
            if path.is_dir():
                there.mkdir(parents=True, exist_ok=True)
            elif not path.name.startswith(".") and path.name != STOP_FILE:
                there.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(path, there)
        part.rename(new)
    except OSError as error:
        raise VoxelscaleError(f"{new}: cannot be written ({error.strerror})", "free some space") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def drop_checkpoints(run: Path) -> None:
    """Delete what only resuming a run needs; its model and its curves stay."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def _watch(
    child: Child,
    log: _Log,
    training: Training,
    order: Callable[[], Order],
    validated: Callable[[int, float], bool],
) -> TrainingResult:
    asked: Ending | None = None
    late_at, kill_at = time.monotonic() + training.seconds, math.inf
    while True:
        code = child.wait(POLL)
        unwanted = any([validated(*point) for point in log.new_validations()])
        if code is not None:
            return _result(child, code, log, asked)
        wish, now = order(), time.monotonic()
        if wish == "kill" or now > kill_at:
            child.kill()
            return TrainingResult(ending=asked or "killed", curve=log.curve)
        if asked is None and (unwanted or wish == "stop" or now > late_at):
            asked = "stopped" if unwanted or wish == "stop" else "late"
            kill_at = now + training.grace
            child.ask_to_stop()


def _result(child: Child, code: int, log: _Log, asked: Ending | None) -> TrainingResult:
    """Of a training that has ended by itself or after it was asked to."""
    if code == 0:
        return TrainingResult(ending="finished", curve=log.curve)
    if not log.fatal and (code == INTERRUPTED or (asked and code == -signal.SIGTERM)):
        return TrainingResult(ending=asked or "stopped", curve=log.curve)
    return TrainingResult(ending=log.fatal or "failed", curve=log.curve, fault=child.fault())


class _Log:
    """The ``metrics.jsonl`` of a training, read while it is written.

    A training resumed from a checkpoint first drops the events after it, by renaming a shortened file
    into place; they come again.

    Attributes:
        fatal: why the training failed, as far as it says so; not why an earlier one in the folder did.
    """

    def __init__(self, run: Path) -> None:
        self.fatal: Ending | None = None
        self._path = run / "metrics.jsonl"
        self._validations: dict[int, float] = {}
        self._reported: set[int] = set()
        self._inode, self._offset = -1, 0
        self._read()
        self.fatal = None

    @property
    def curve(self) -> tuple[tuple[int, float], ...]:
        """(samples, Dice) of the validations, samples rising."""
        return tuple(sorted(self._validations.items()))

    def new_validations(self) -> list[tuple[int, float]]:
        """(samples, Dice) of those that have not been returned before."""
        self._read()
        new = [point for point in self.curve if point[0] not in self._reported]
        self._reported |= {samples for samples, _ in new}
        return new

    def _read(self) -> None:
        for event in self._new_events():
            self.fatal = FATAL.get(event["event"], self.fatal)
            if event["event"] == "validation":
                self._validations[int(event["samples"])] = float(event["dice"])

    def _new_events(self) -> Iterator[dict[str, Any]]:
        try:
            with self._path.open("rb") as handle:
                inode = os.fstat(handle.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset, self.fatal = inode, 0, None
                    self._validations.clear()
                handle.seek(self._offset)
                text = handle.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)
