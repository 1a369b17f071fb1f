"""Where a worker works: its devices, and its share of this machine's cores and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

from voxelscale.config import SearchConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.experiments.shares import Share


@dataclass(frozen=True, kw_only=True)
class Place(Share):
    """Where a worker works.

    Attributes:
        devices: names of its devices, as ``0``; a trial has one rank on each.
    """

    devices: tuple[str, ...]

    @property
    def kind(self) -> str:
        """Of its devices, as PyTorch names it."""
        return "cuda" if self.gpus else "cpu"

    def available_memory(self, limit_gib: float = 0.0) -> int:
        """Bytes that a trial may take on each device.

        Args:
            limit_gib: taken as it is; 0: what the devices have.
        """
        if limit_gib:
            return int(limit_gib * 2**30)
        if self.gpus:
            # In a process of its own: asking creates a context, which would hold memory for ever.
            code = "import torch; print(torch.cuda.mem_get_info()[0])"
            asked = subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, **self.environment},
                capture_output=True,
                text=True,
                check=True,
            )
            return int(asked.stdout)
        import torch

        from voxelscale.train.memory import available_memory

        return available_memory(torch.device("cpu")) // (self.sharers * len(self.devices))


def plan_places(search: SearchConfig) -> list[Place]:
    """The devices of each worker on this machine.

    Raises:
        VoxelscaleError: there are fewer GPUs than one trial needs.
    """
    from voxelscale.device import visible_gpus

    gpus, each = visible_gpus(), search.devices_per_trial
    if not gpus:
        count = search.workers or 1
        devices = tuple(str(device) for device in range(each))
        return [Place(devices=devices, sharers=count)] * count
    count = search.workers or len(gpus) // each
    if count < 1 or count * each > len(gpus):
        raise VoxelscaleError(
            f"{max(1, count)} workers with {each} GPUs each; {len(gpus)} are there",
            "lower search.workers or search.devices_per_trial",
        )
    groups = [tuple(gpus[place * each : (place + 1) * each]) for place in range(count)]
    return [Place(devices=group, gpus=group, sharers=count) for group in groups]
