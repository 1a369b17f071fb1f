"""Loss, speed and signals, the same in all ranks without stalling any."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from voxelscale.ranks.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What all ranks know after a step; with several ranks, of the step before.

    Attributes:
        stop: a stop was requested.
        save: a checkpoint is due by the clock.
        ready: every rank has its share of the pending validation.
        finite: the loss was finite in every rank.
    """

    stop: bool = False
    save: bool = False
    ready: bool = False
    finite: bool = True


class Meter:
    """Sums of a step over the ranks, and their signals, in one all-reduce that nobody waits for.

    It is read when the next step's is started, so that ranks and GPUs are never idle for it; one process on
    a CPU, which has nothing to wait for, reads it at once. From a GPU the sums are copied into pinned
    memory in the order of its own work, and an event says when they are there: reading them waits for the
    step before, never for the one that was just queued.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._delayed = workers.ranks > 1 or workers.device.type != "cpu"
        self._now = torch.zeros(5, device=workers.device)  # loss, measure, stop, save, ready
        self._pending: tuple[Tensor, Any] | None = None
        self._cuda = workers.device.type == "cuda"
        self.signals = Signals()
        self._loss = self._measure = self.waited = 0.0
        self._steps = self._timed = 0
        self._since = time.monotonic()

    def add(self, loss: Tensor, measure: Tensor) -> None:
        """One worker's share of this step's means."""
        self._now[:2] += torch.stack([loss, measure])

    def end_step(
        self, samples: int, *, stop: bool = False, save: bool = False, ready: bool = False
    ) -> Signals:
        """Start the all-reduce of this step's sums, over `samples` samples, and of this rank's signals."""
        flags = torch.tensor([float(stop), float(save), float(ready)], pin_memory=self._cuda)
        self._now[2:].copy_(flags, non_blocking=True)
        self.land()
        work = dist.all_reduce(self._now, async_op=True) if self._workers.ranks > 1 else None
        self._pending = self._on_the_way(work) if self._cuda else (self._now, work)
        self._now = torch.zeros_like(self._now)
        self._timed += samples
        if not self._delayed:
            self.land()
        return self.signals

    def _on_the_way(self, work: Any) -> tuple[Tensor, Any]:
        """The sums in pinned memory, and the event after which they are there."""
        if work is not None:
            work.wait()  # of NCCL the stream waits, not this thread
        landed = torch.empty(self._now.shape, pin_memory=True)
        landed.copy_(self._now, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return landed, event

    def land(self) -> Signals:
        """Wait for the pending sums: none may be when a process group ends or a model is kept."""
        if self._pending is None:
            return self.signals
        sums, work = self._pending
        self._pending = None
        if work is not None:
            work.synchronize() if self._cuda else work.wait()
        loss, measure, stop, save, ready = sums.tolist()
        loss, measure = loss / self._workers.ranks, measure / self._workers.ranks
        finite = loss == loss and abs(loss) != float("inf")
        self.signals = Signals(
            stop=stop > 0, save=save > 0, ready=round(ready) == self._workers.ranks, finite=finite
        )
        self._loss, self._measure, self._steps = self._loss + loss, self._measure + measure, self._steps + 1
        return self.signals

    def clear(self) -> None:
        """Clear the signals for a checkpoint and for the end of a validation, which were acted on."""
        self.signals = replace(self.signals, save=False, ready=False)

    def read(self) -> dict[str, float]:
        """Means and speed since `restart`; NaN means where no step's sums are there yet."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        steps = self._steps or math.nan
        return {
            "loss": self._loss / steps,
            "dice": self._measure / steps,
            "samples_per_second": self._timed / elapsed,
            "input_wait": self.waited / elapsed,
        }

    def restart(self) -> None:
        """Begin new means."""
        self._loss = self._measure = self.waited = 0.0
        self._steps = self._timed = 0
        self._since = time.monotonic()
