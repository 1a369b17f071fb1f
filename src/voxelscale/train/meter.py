"""Loss, speed and wishes, the same in all ranks without stalling any."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from voxelscale.train.distributed import Workers


@dataclass(frozen=True, kw_only=True)
class Word:
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
    """Sums of a step, reduced in the background and read one step later.

    On one CPU process they are read at once.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._late = workers.ranks > 1 or workers.device.type != "cpu"
        self._now = torch.zeros(5, device=workers.device)
        self._flying: tuple[Tensor, Any] | None = None
        self.word = Word()
        self._loss = self._measure = self.waited = 0.0
        self._steps = self._timed = 0
        self._since = time.monotonic()

    def add(self, loss: Tensor, measure: Tensor) -> None:
        """One worker's share of this step's means."""
        self._now[:2] += torch.stack([loss, measure])

    def end_step(
        self, samples: int, *, stop: bool = False, save: bool = False, ready: bool = False
    ) -> Word:
        """Send off this step's sums, of so many samples, and this rank's wishes."""
        self._now[2:] = torch.tensor([float(stop), float(save), float(ready)])
        self.land()
        work = dist.all_reduce(self._now, async_op=True) if self._workers.ranks > 1 else None
        self._flying = (self._now, work)
        self._now = torch.zeros_like(self._now)
        self._timed += samples
        if not self._late:
            self.land()
        return self.word

    def land(self) -> Word:
        """Wait for the sums in flight: none may be when a process group goes or a model is kept."""
        if self._flying is None:
            return self.word
        sums, work = self._flying
        self._flying = None
        if work is not None:
            work.wait()
        loss, measure, stop, save, ready = sums.tolist()
        loss, measure = loss / self._workers.ranks, measure / self._workers.ranks
        finite = loss == loss and abs(loss) != float("inf")
        self.word = Word(
            stop=stop > 0, save=save > 0, ready=round(ready) == self._workers.ranks, finite=finite
        )
        self._loss, self._measure, self._steps = self._loss + loss, self._measure + measure, self._steps + 1
        return self.word

    def fulfil(self) -> None:
        """Take back the wishes, now met, for a checkpoint and for the end of a validation."""
        self.word = replace(self.word, save=False, ready=False)

    def read(self) -> dict[str, float]:
        """Means and speed since `restart`."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        steps = max(self._steps, 1)
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
