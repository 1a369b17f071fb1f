"""The clock of a training: which samples make up an update, and who computes which of them.

Everything follows from the number of samples seen, so that a run resumes at the same place on any number
of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from voxelscale.errors import VoxelscaleError
from voxelscale.samples.patches import worker_indices


@dataclass(frozen=True, kw_only=True)
class Step:
    """One update.

    Attributes:
        number: from 0 on.
        first: global index of its first sample.
        slots: different micro-batches in it; all workers have one each where there are as many.
        batch_size: samples of a micro-batch.
    """

    number: int
    first: int
    slots: int
    batch_size: int

    @property
    def global_batch(self) -> int:
        """Samples of the update."""
        return self.slots * self.batch_size

    @property
    def end(self) -> int:
        """Samples seen after it."""
        return self.first + self.global_batch

    def share(self, mine: range) -> list[tuple[range, float]]:
        """What a rank computes for the workers `mine`: indices of each micro-batch, and its weight.

        Where there are fewer micro-batches than workers, several workers share one: real ones compute
        it each, as they would else be idle; of one rank's own it is computed once and weighs more.
        """
        counts: dict[int, int] = {}
        for worker in mine:
            slot = worker % self.slots
            counts[slot] = counts.get(slot, 0) + 1
        return [(self.indices(slot), count / len(mine)) for slot, count in counts.items()]

    def indices(self, slot: int) -> range:
        """The global indices of a micro-batch."""
        return worker_indices(self.first, slot, self.slots, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """Updates of one size: from sample `first` to `end`, beginning with update `number`."""

    first: int
    end: int
    slots: int
    number: int


class Clock:
    """All updates of a training.

    Args:
        samples: the budget; the last update may go beyond it.
        workers: all of them, real and virtual.
        batch_size: samples of a worker's micro-batch.
        grow_from: global batch of the first updates, from which it doubles stage by stage (Smith et al.,
            "Don't decay the learning rate, increase the batch size", 2018); 0: full from the start.
        grow_share: share of the budget over which it grows, the same number of updates at each size.
    """

    def __init__(
        self, samples: int, workers: int, batch_size: int, grow_from: int = 0, grow_share: float = 0.0
    ) -> None:
        self.batch_size = batch_size
        self._stages: list[_Stage] = []
        sizes = _growing(workers, max(1, grow_from // batch_size)) if grow_from and grow_share else []
        updates = max(1, round(samples * grow_share / (batch_size * sum(sizes)))) if sizes else 0
        for slots in sizes:
            self._add(slots, updates * slots * batch_size, samples)
        self._add(workers, samples, samples)

    def _add(self, slots: int, length: int, samples: int) -> None:
        first, number = 0, 0
        if self._stages:
            last = self._stages[-1]
            first = last.end
            number = last.number + (last.end - last.first) // (last.slots * self.batch_size)
        size = slots * self.batch_size
        steps = math.ceil(min(length, samples - first) / size)
        if steps > 0:
            self._stages.append(_Stage(first=first, end=first + steps * size, slots=slots, number=number))

    @property
    def end(self) -> int:
        """Samples seen after the last update."""
        return self._stages[-1].end

    @property
    def updates(self) -> int:
        """How many there are."""
        last = self._stages[-1]
        return last.number + (last.end - last.first) // (last.slots * self.batch_size)

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Of each stretch of updates of one size: samples seen and updates made at its end."""
        size = self.batch_size
        return tuple((s.end, s.number + (s.end - s.first) // (s.slots * size)) for s in self._stages)

    def steps(self, seen: int) -> Iterator[Step]:
        """The updates that are left after `seen` samples.

        Raises:
            VoxelscaleError: `seen` lies within an update.
        """
        for stage in self._stages:
            size = stage.slots * self.batch_size
            if stage.first < seen < stage.end and (seen - stage.first) % size:
                raise VoxelscaleError(
                    f"stopped at sample {seen}, within a batch of {size}",
                    "resume with a number of workers and a batch size whose product divides it",
                )
        return (step for stage in self._stages for step in self._steps(stage, seen))

    def _steps(self, stage: _Stage, seen: int) -> Iterator[Step]:
        size = stage.slots * self.batch_size
        for first in range(max(seen, stage.first), stage.end, size):
            number = stage.number + (first - stage.first) // size
            yield Step(number=number, first=first, slots=stage.slots, batch_size=self.batch_size)


def _growing(workers: int, least: int) -> list[int]:
    """Numbers of slots from about `least` to below `workers`, each a divisor of it and twice the last."""
    sizes: list[int] = []
    slots = least
    while slots < workers:
        divisor = next(d for d in range(min(slots, workers), 0, -1) if workers % d == 0)
        if divisor not in sizes:
            sizes.append(divisor)
        slots *= 2
    return sizes
