"""How many windows go through a network at a time: as many as fit into the memory of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

Result = TypeVar("Result")

MOST_VOXELS = 2**23
"""Of the windows that go at a time, where a GPU has the memory for more than asked: 32 of 64^3 voxels, or
4 of 128^3. That keeps it busy. A map of up to 255 channels then has fewer than 2^31 elements; beyond that
libraries have been wrong."""


@dataclass
class PassSize:
    """Windows that go through a network together; a window's logits do not depend on it.

    Attributes:
        now: of the next pass.
        most: it may grow to.
    """

    now: int
    most: int

    def halve(self, failed: int) -> None:
        """So many windows did not fit: from now on take half."""
        self.now = self.most = max(1, min(self.now, failed // 2))

    def grow(self, each: int, free: int) -> None:
        """Take as many as half of the free memory holds, at least as many as now.

        Args:
            each: bytes that a window takes.
            free: bytes.
        """
        self.now = max(self.now, min(self.most, free // 2 // max(1, each)))
        self.most = self.now


def free_memory(device: torch.device) -> int:
    """Bytes that tensors may still take on a GPU; 0 of other devices.

    That is what the driver has left, and what PyTorch keeps of the memory that tensors have freed.
    """
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def with_peak(work: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """What a piece of work gives, and by how many bytes it raised what is in use on a GPU, at most.

    PyTorch counts where it allocates, so nobody waits for the GPU. It counts what all threads take, and
    the process's own peak begins anew.
    """
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    return result, torch.cuda.max_memory_allocated(device) - before
