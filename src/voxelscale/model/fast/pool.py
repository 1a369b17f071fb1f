"""Max-pooling over windows that do not overlap, with a gradient that is the same every time.

PyTorch's own has no deterministic gradient on GPUs. What both ways here keep is each window's place of its
maximum, one byte; by it every voxel's gradient is written once.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from voxelscale.model.fast.kernels import as_rows, empty_rows, takes_kernels

Stride = tuple[int, ...]


def max_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """Max-pooling in the map's own precision, by the way that is fast on its device.

    On CPUs it is PyTorch's, without autocast, which would make the map and its gradient float32; on GPUs
    our kernel, or formulas where it is not to be had and PyTorch is asked for deterministic algorithms.

    Args:
        pool: an `nn.MaxPool2d` or `nn.MaxPool3d`. Only PyTorch's way is taken if its windows overlap or
            leave voxels out at a border (no ``ceil_mode``).
    """
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return pool(x)  # type: ignore[no-any-return]
    kernel = takes_kernels(x, "triton_pool")
    formulas = x.device.type != "cpu" and torch.are_deterministic_algorithms_enabled()
    stride = _windows(pool, x.dim() - 2) if kernel or formulas else None
    if stride is None:
        return pool(x)  # type: ignore[no-any-return]
    return _MaxPool.apply(x, stride, kernel)  # type: ignore[no-any-return, no-untyped-call]


def _windows(pool: Any, dims: int) -> Stride | None:
    """The windows' edges; None where they overlap, leave voxels out or are too large for a byte."""
    edges, strides, pads, dilations = (
        (value,) * dims if isinstance(value, int) else tuple(value)
        for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    plain = edges == strides and max(pads) == 0 and max(dilations) == 1 and not pool.return_indices
    return edges if plain and pool.ceil_mode and math.prod(edges) <= 256 else None


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: Stride, kernel: bool) -> Tensor:
        size = [-(-n // step) for n, step in zip(x.shape[2:], stride, strict=True)]
        output = empty_rows(x, size)
        places = torch.empty_like(output, dtype=torch.uint8)
        if kernel:
            from voxelscale.model.fast.triton_pool import largest

            largest(x, output, places, stride)
        else:
            _largest(x, output, places, stride)
        ctx.save_for_backward(places)
        ctx.stride, ctx.kernel, ctx.size = stride, kernel, x.shape[2:]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        result = empty_rows(gradient, ctx.size)
        if ctx.kernel:
            from voxelscale.model.fast.triton_pool import spread

            spread(as_rows(gradient, gradient), places, result, ctx.stride)
        else:
            _spread(gradient, places, result, ctx.stride)
        return result, None, None


def _largest(x: Tensor, output: Tensor, places: Tensor, stride: Stride) -> None:
    """Writes each window's maximum, the first of several or a NaN, and its place in scan order."""
    output.fill_(-torch.inf)
    places.zero_()
    for place, part in enumerate(_parts(x, stride)):
        best, kept = _corner(output, part), _corner(places, part)
        better = (part > best) | part.isnan()
        best.copy_(torch.where(better, part, best))
        kept.masked_fill_(better, place)


def _spread(gradient: Tensor, places: Tensor, result: Tensor, stride: Stride) -> None:
    """Writes each window's gradient to its maximum, and 0 to its other voxels."""
    for place, part in enumerate(_parts(result, stride)):
        part.copy_(torch.where(_corner(places, part) == place, _corner(gradient, part), 0))


def _parts(x: Tensor, stride: Stride) -> list[Tensor]:
    """Views of the voxels that lie at each place of their windows, in scan order."""
    steps = [range(step) for step in stride]
    cuts = [
        tuple(slice(start, None, step) for start, step in zip(starts, stride, strict=True))
        for starts in itertools.product(*steps)
    ]
    return [x[:, :, *cut] for cut in cuts]


def _corner(x: Tensor, part: Tensor) -> Tensor:
    """Those of the windows that have such a voxel; the last along an axis may not."""
    return x[:, :, *(slice(size) for size in part.shape[2:])]
