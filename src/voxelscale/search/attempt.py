"""One attempt at a trial: a training in processes of its own, watched through what it writes.

Only the worker that owns the trial talks to the study; the training's ranks know nothing of it. The
parameters are frozen into a config file before the training starts, the validation Dice comes back
through ``metrics.jsonl``, and a file asks all ranks to stop together.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from voxelscale.config import Config
from voxelscale.errors import VoxelscaleError
from voxelscale.train.child import Child, start_child
from voxelscale.train.log import OUT_OF_MEMORY, STOP_FILE

POLL = 0.5
"""Seconds between checks of a running training."""

GRACE = 30.0
"""Seconds that a training has to save and stop before it is killed."""

Ending = Literal["finished", "pruned", "stopped", "lost", "late", "diverged", "out of memory", "failed"]


FATAL: dict[str, Ending] = {"diverged": "diverged", OUT_OF_MEMORY: "out of memory"}
"""Events that say why a training failed."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What is to be trained, where and by what.

    Attributes:
        config: of the training, frozen.
        store: what `voxelscale prepare` wrote.
        run: the training's folder.
        marks: samples after which its validation Dice is reported, the budget among them.
        threads: of each rank.
        environment: laid over this process's own, as ``CUDA_VISIBLE_DEVICES``.
        seconds: after which it is ended; 0: no limit.
    """

    config: Config
    store: Path
    run: Path
    marks: Sequence[int]
    threads: int
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AttemptResult:
    """How an attempt ended.

    Attributes:
        ending: in a word.
        dice: of the last validation; None where there was none.
        fault: its error, if it failed.
    """

    ending: Ending
    dice: float | None = None
    fault: VoxelscaleError | None = None


def run_attempt(
    attempt: Attempt,
    report: Callable[[int, float], bool],
    stopped: Callable[[], bool],
    lost: Callable[[], bool],
) -> AttemptResult:
    """Train until the budget is spent, the trial is pruned, or something ends it.

    Args:
        report: called with (samples, validation Dice) once for each mark; returns whether to prune.
        stopped: whether this worker was asked to stop.
        lost: whether the trial has been taken over by another.
    """
    child = start_child(
        attempt.config,
        attempt.store,
        attempt.run,
        threads=attempt.threads,
        environment=attempt.environment,
    )
    try:
        return _watch(child, attempt, report, stopped, lost)
    finally:
        if child.poll() is None:
            child.kill()


def _watch(
    child: Child,
    attempt: Attempt,
    report: Callable[[int, float], bool],
    stopped: Callable[[], bool],
    lost: Callable[[], bool],
) -> AttemptResult:
    begun, curve = time.monotonic(), Curve(attempt.run, attempt.marks)
    while True:
        code = child.wait(POLL)
        for samples, dice in curve.new():
            if report(samples, dice):
                _stop(child)
                return AttemptResult(ending="pruned", dice=dice)
        if code is not None:
            return _ended(child, code, curve)
        if lost():
            child.kill()
            return AttemptResult(ending="lost", dice=curve.dice)
        if stopped():
            _stop(child)
            return AttemptResult(ending="stopped", dice=curve.dice)
        if 0 < attempt.seconds < time.monotonic() - begun:
            _stop(child)
            return AttemptResult(ending="late", dice=curve.dice)


def _ended(child: Child, code: int, curve: Curve) -> AttemptResult:
    if code == 0:
        return AttemptResult(ending="finished", dice=curve.dice)
    if curve.fatal:
        return AttemptResult(ending=FATAL[curve.fatal], dice=curve.dice, fault=child.fault())
    return AttemptResult(ending="failed", dice=curve.dice, fault=child.fault())


def _stop(child: Child) -> None:
    """All ranks together, with a checkpoint if they can."""
    with contextlib.suppress(OSError):
        child.ask_to_stop()
    if child.wait(GRACE) is None:
        child.kill()


class Curve:
    """The validations of a training, read from its ``metrics.jsonl`` while it is written.

    A training resumed from a checkpoint first drops the events after it by renaming a shortened
    file into place, and they come again; each mark is still reported once.

    Attributes:
        dice: of the newest validation; None before the first.
        fatal: event of `FATAL` that the training ended with; "" where there was none.

    Args:
        run: the training's folder.
        marks: samples after which a validation is reported; one taken a little later, at the end of a
            global batch, counts for the mark before it.
    """

    def __init__(self, run: Path, marks: Sequence[int]) -> None:
        self.dice: float | None = None
        self.fatal = ""
        self._path, self._marks = run / "metrics.jsonl", sorted(marks)
        self._told: set[int] = set()
        self._inode, self._offset = -1, 0

    def new(self) -> list[tuple[int, float]]:
        """(mark, Dice) of the validations that have come since the last call."""
        found = []
        for event in self._events():
            if event["event"] in FATAL:
                self.fatal = event["event"]
            if event["event"] != "validation":
                continue
            self.dice = float(event["dice"])
            mark = max((m for m in self._marks if m <= event["samples"]), default=None)
            if mark is not None and mark not in self._told:
                self._told.add(mark)
                found.append((mark, self.dice))
        return found

    def _events(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as handle:
                inode = os.fstat(handle.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset = inode, 0
                handle.seek(self._offset)
                text = handle.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        events = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
        return events


def copy_run(old: Path, new: Path) -> bool:
    """Start a run from the state of another, in a folder of its own; False if there is nothing to copy.

    The process that wrote the other may be alive after all, somewhere out of sight: what it writes from
    now on must not reach the new one, and files that it drops meanwhile are not missed.
    """
    if new.exists() or not (old / "config.yaml").is_file():
        return new.exists()
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
    return True


def drop_checkpoints(run: Path) -> None:
    """A trial that has ended is not gone on with; its model and its curves stay."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
