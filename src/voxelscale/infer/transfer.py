"""Between main memory and a GPU, while the GPU computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from voxelscale.device import upload
from voxelscale.infer.memory import free_memory

What = TypeVar("What")

PIECE = 2**26
"""Bytes of a volume that are copied to page-locked memory at a time: PyTorch keeps that memory."""

SHARE = 4
"""A volume is kept on a GPU where it takes less than one part in so many of the free memory."""


def resident(volume: Tensor, device: torch.device) -> Tensor:
    """A volume on the device, so that its windows are cut there; in main memory where it is too large."""
    if device.type == "cpu" or volume.device.type != "cpu" or volume.nbytes * SHARE >= free_memory(device):
        return volume
    try:
        out = torch.empty(volume.shape, dtype=volume.dtype, device=device)
    except torch.OutOfMemoryError:
        return volume
    source, target, step = volume.contiguous().view(-1), out.view(-1), PIECE // volume.element_size()
    for first in range(0, len(source), step):
        target[first : first + step].copy_(upload(source[first : first + step], device))
    return out


def to_host(values: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Begin to copy a GPU's tensor to main memory; what is returned waits until it is there, and gives it.

    Kernels that are started afterwards may change the tensor.
    """
    if values.device.type != "cuda":
        arrived = values.to("cpu", dtype, copy=True)
        return lambda: arrived
    source = values.to(dtype).contiguous()
    buffer = torch.empty(source.shape, dtype=dtype, pin_memory=True)
    buffer.copy_(source, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        done.synchronize()
        return buffer

    return wait


def landed(each: Iterator[tuple[What, Tensor]], dtype: torch.dtype) -> Iterator[tuple[What, Tensor]]:
    """Tensors of a GPU, in main memory: each is copied while the GPU computes the next one."""
    before: tuple[What, Callable[[], Tensor]] | None = None
    for what, values in each:
        following = what, to_host(values, dtype)
        if before:
            yield before[0], before[1]()
        before = following
    if before:
        yield before[0], before[1]()
