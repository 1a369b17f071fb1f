"""What each of several trainings at a time has of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue


@dataclass(frozen=True, kw_only=True)
class Share:
    """One training's part of this machine.

    Attributes:
        gpus: names for ``CUDA_VISIBLE_DEVICES``; () where there are none.
        sharers: trainings that share the cores.
    """

    gpus: tuple[str, ...] = ()
    sharers: int = 1

    @property
    def environment(self) -> dict[str, str]:
        """For a process: which GPUs it sees."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}

    def threads(self, ranks: int = 1) -> int:
        """CPU threads of each rank of a training."""
        return max(1, (os.cpu_count() or 1) // (self.sharers * ranks))


def share_devices(jobs: int, gpus: Sequence[str] | None = None) -> SimpleQueue[Share]:
    """The shares of as many trainings at a time; each takes one and puts it back.

    Args:
        gpus: names of those to share out; None: those that this process may use. Where there are fewer than
            trainings, several use the same.
    """
    if gpus is None:
        from voxelscale.device import visible_gpus

        gpus = visible_gpus()
    each = max(1, len(gpus) // jobs)
    shares: SimpleQueue[Share] = SimpleQueue()
    for job in range(jobs):
        first = job * each % len(gpus) if gpus else 0
        shares.put(Share(gpus=tuple(gpus[first : first + each]), sharers=jobs))
    return shares
