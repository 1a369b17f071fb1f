"""Upsampling a decoder's map and joining the skip to it, with as few copies as can be.

A transposed convolution whose kernel equals its stride is a 1-wide convolution to ``prod(stride)`` times
the channels, followed by a rearrangement: several times faster on a processor than PyTorch's general one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Stride = tuple[int, ...]


def unpack_strides(x: Tensor, stride: Stride) -> Tensor:
    """``(batch, prod(stride) * c, *size)`` to ``(batch, c, *(size * stride))``, channels last in memory."""
    size = x.shape[2:]
    dims = len(size)
    channels = x.shape[1] // math.prod(stride)
    blocks = x.movedim(1, -1).reshape(x.shape[0], *size, *stride, channels)
    order = [0, *(axis for i in range(dims) for axis in (1 + i, 1 + dims + i)), 1 + 2 * dims]
    full = blocks.permute(order).reshape(
        x.shape[0], *(n * s for n, s in zip(size, stride, strict=True)), channels
    )
    return full.movedim(-1, 1)


def join(skip: Tensor, packed: Tensor, stride: Stride) -> Tensor:
    """The skip's channels, then those of `packed`, unpacked by `unpack_strides` and cut to its size."""
    whole = all(n == p * s for n, p, s in zip(skip.shape[2:], packed.shape[2:], stride, strict=True))
    last = skip.movedim(1, -1).is_contiguous() and packed.movedim(1, -1).is_contiguous()
    if whole and last and skip.dtype == packed.dtype and not torch.compiler.is_compiling():
        return _Join.apply(skip, packed, stride)  # type: ignore[no-any-return, no-untyped-call]
    up = unpack_strides(packed, stride)
    for axis, size in enumerate(skip.shape[2:], start=2):
        if up.shape[axis] != size:
            up = up.narrow(axis, 0, size)
    return torch.cat([skip, up.to(skip.dtype)], dim=1)


class _Join(torch.autograd.Function):
    """Unpacking and concatenation of channels-last maps with one copy of each, forward and backward."""

    @staticmethod
    def forward(ctx: Any, skip: Tensor, packed: Tensor, stride: Stride) -> Tensor:
        ctx.stride, ctx.channels = stride, skip.shape[1]
        size, channels = packed.shape[2:], packed.shape[1] // math.prod(stride)
        joined = skip.new_empty(skip.shape[0], *skip.shape[2:], skip.shape[1] + channels)
        joined[..., : skip.shape[1]].copy_(skip.movedim(1, -1))
        blocks = packed.movedim(1, -1).view(-1, *size, *stride, channels)
        _blocks(joined[..., skip.shape[1] :], stride).copy_(blocks)
        return joined.movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows = gradient.movedim(1, -1)
        packed = _blocks(rows[..., ctx.channels :], ctx.stride).flatten(1 + len(ctx.stride)).movedim(-1, 1)
        return rows[..., : ctx.channels].movedim(-1, 1), packed, None


def mean_pool(x: Tensor, stride: Stride) -> Tensor:
    """Means of blocks of `stride` voxels, in the map's own precision and memory format.

    PyTorch's mean-pooling of volumes gives channels first, float32 under autocast on processors, and has no
    deterministic gradient on GPUs. What remains at a border is a smaller block.
    """
    if max(stride) == 1:
        return x
    rows = x.movedim(1, -1)
    whole = all(n % step == 0 for n, step in zip(x.shape[2:], stride, strict=True))
    if whole and rows.is_contiguous():
        dims = len(stride)
        return _blocks(rows, stride).mean(tuple(range(1 + dims, 1 + 2 * dims))).movedim(-1, 1)
    if x.device.type != "cpu":
        for axis, step in enumerate(stride, start=1):
            rows = _means(rows, axis, step)
        return rows.movedim(-1, 1)
    pool = F.avg_pool2d if len(stride) == 2 else F.avg_pool3d
    return pool(x, stride, ceil_mode=True).to(x.dtype)


def _means(rows: Tensor, axis: int, step: int) -> Tensor:
    """Means of `step` neighbours along an axis; of those that remain, their own."""
    whole = rows.shape[axis] // step * step
    parts: Tensor = rows.narrow(axis, 0, whole).unflatten(axis, (-1, step))  # type: ignore[no-untyped-call]
    if whole == rows.shape[axis]:
        return parts.mean(axis + 1)
    rest = rows.narrow(axis, whole, rows.shape[axis] - whole)
    return torch.cat([parts.mean(axis + 1), rest.mean(axis, keepdim=True)], axis)


def _blocks(rows: Tensor, stride: Stride) -> Tensor:
    """View of ``(batch, *(size * stride), channels)`` as ``(batch, *size, *stride, channels)``."""
    for axis, step in enumerate(stride):
        rows = rows.unflatten(1 + 2 * axis, (-1, step))  # type: ignore[no-untyped-call]
    dims = len(stride)
    return rows.permute(0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1)
