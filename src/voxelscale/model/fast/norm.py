"""Normalise, scale, shift and leaky ReLU of a channels-last map in one piece, fast on a processor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ROWS_FROM = {True: 1 << 16, False: 1 << 19}
"""Numbers in a map from which on `_RowsNorm` is faster than PyTorch's norms per sample, and batch norm."""


def leaky_relu_(x: Tensor, slope: float) -> Tensor:
    """Leaky ReLU in place (Maas et al. 2013); a slope of 1 leaves `x` alone."""
    return x if slope == 1 else F.leaky_relu_(x, slope)


def takes_rows(x: Tensor, weight: Tensor, samples: bool) -> bool:
    """Whether `_RowsNorm` can and should take it."""
    return (
        x.device.type == "cpu"
        and x.dim() > 2
        and x.numel() >= ROWS_FROM[samples]
        and x.movedim(1, -1).is_contiguous()
        and weight.dtype == torch.promote_types(x.dtype, torch.float32)
        # The compiler fuses PyTorch's own formulas by itself.
        and not torch.compiler.is_compiling()
    )


def rows_norm(
    x: Tensor, norm: Any, slope: float, *, samples: bool = False, groups: int = 0
) -> tuple[Tensor, Tensor]:
    """The normalised and activated map; and (mean, variance) of each sample, if `samples`, and channel."""
    result: tuple[Tensor, Tensor] = _RowsNorm.apply(  # type: ignore[no-untyped-call]
        x, norm.weight, norm.bias, samples, groups, slope, norm.eps
    )
    return result


class _RowsNorm(torch.autograd.Function):
    """Normalise, scale, shift and leaky ReLU of a channels-last feature map, statistics in float32.

    PyTorch's channels-last kernels loop over the channels of one voxel, of which a first level has 8
    or 16: too few for the vector units; and its instance norm copies to channels first and back. Here
    voxels are read in rows, one wide vector of columns x channels, for which the batch-norm kernels
    are fast; the columns' moments are then pooled into the channels', exactly as those of parts of a
    sample are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        samples: bool,
        groups: int,
        slope: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.columns, ctx.samples, ctx.groups = _columns(x), samples, groups
        output = torch.empty_like(x)
        kept = []
        for part, target in zip(_parts(x, samples), _parts(output, samples), strict=True):
            kept.append(_normalise(part, target, weight, bias, groups, ctx.columns, eps))
        leaky_relu_(output, slope)
        moments = torch.stack(kept, 1)
        ctx.slope, ctx.eps = slope, eps
        ctx.save_for_backward(x, weight, moments, *([output] if slope != 1 else []))
        ctx.mark_non_differentiable(moments)
        return output, moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, moments, *activated = ctx.saved_tensors
        if gradient.dtype != x.dtype or not gradient.movedim(1, -1).is_contiguous():
            gradient = torch.empty_like(x).copy_(gradient)
        if activated:
            gradient = torch.ops.aten.leaky_relu_backward(gradient, activated[0], ctx.slope, True)
        result = torch.empty_like(x)
        parts = (_parts(t, ctx.samples) for t in (x, gradient, result))
        sums = [
            _gradient(part, grad, out, weight, kept, ctx.groups, ctx.columns, ctx.eps)
            for part, grad, out, kept in zip(*parts, moments.unbind(1), strict=True)
        ]
        of_weight, of_bias = sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
        return result, of_weight, of_bias, None, None, None, None


def _parts(x: Tensor, samples: bool) -> tuple[Tensor, ...]:
    """Views ``(voxels, channels)`` of a channels-last map: one of each sample, or one of all."""
    rows = x.movedim(1, -1)
    if samples and x.shape[0] > 1:
        return rows.view(x.shape[0], -1, x.shape[1]).unbind(0)
    return (rows.view(-1, x.shape[1]),)


def _columns(x: Tensor) -> int:
    """Voxels read as one row: along the last axes, until the row is long enough for vector units."""
    columns = 1
    for size in reversed(x.shape[2:]):
        columns *= size
        if columns * x.shape[1] >= 256:
            break
    return columns


def _normalise(
    part: Tensor, out: Tensor, weight: Tensor, bias: Tensor, groups: int, columns: int, eps: float
) -> Tensor:
    """Writes the part, normalised, scaled and shifted, into `out`; its (mean, variance), (2, channels)."""
    channels = part.shape[1]
    blank = torch.empty(2, columns * channels, dtype=weight.dtype)
    rows = part.view(-1, columns * channels)
    mean, variance = torch.batch_norm_update_stats(rows, blank[0], blank[1], 0.0)
    mean, variance = _pool(mean.view(-1, channels), variance.view(-1, channels))
    if groups:
        mean, variance = (
            moment.repeat_interleave(channels // groups)
            for moment in _pool(mean.view(groups, -1).T, variance.view(groups, -1).T)
        )
    kept = torch.stack([mean, variance])
    wide = torch.cat([kept, torch.stack([weight, bias])]).repeat(1, columns)
    _affine(rows, out.view_as(rows), wide[2], wide[3], wide[0], wide[1], eps)
    return kept


def _pool(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of the union of equally large sets, ``(sets, ...)``."""
    across, mean = torch.var_mean(means, 0, correction=0)
    return mean, variances.mean(0) + across


def _affine(
    x: Tensor, out: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> None:
    """``(x - mean) / sqrt(variance + eps) * scale + shift`` by column, in the columns' precision."""
    empty = scale[:0]
    torch.ops.aten.native_batch_norm.out(
        x, scale, shift, mean, variance, False, 0.0, eps, out=out, save_mean=empty, save_invstd=empty
    )


def _gradient(
    part: Tensor,
    gradient: Tensor,
    out: Tensor,
    weight: Tensor,
    kept: Tensor,
    groups: int,
    columns: int,
    eps: float,
) -> Tensor:
    """Writes the gradient of a part into `out`; the gradients of weight and bias, ``(2, channels)``."""
    voxels, channels = part.shape
    mean, inverse = kept[0], (kept[1] + eps).rsqrt()
    rows, gradient = part.view(-1, columns * channels), gradient.view(-1, columns * channels)
    one = torch.ones(columns * channels, dtype=weight.dtype)
    wide_mean = mean.repeat(columns)
    # Of the columns, in this order: sums of gradient x (x - mean), sums of gradient.
    sums = torch.ops.aten.native_batch_norm_backward(
        gradient, rows, one, None, None, wide_mean, one, True, 0.0, [False, True, True]
    )[1:]
    total = torch.stack(sums).view(2, -1, channels).sum(1)
    # The factor is used in the map's precision, so the terms that make the gradient orthogonal to a
    # constant and to the normalised map must be built from the factor as it was rounded.
    factor = (inverse * weight).to(part.dtype)
    terms = total * factor
    if groups:
        terms = terms.view(2, groups, -1).mean(2).repeat_interleave(channels // groups, 1)
    terms[0] *= inverse.square()
    wide = (terms / -voxels).repeat(1, columns)
    result = out.view_as(rows)
    _affine(rows, result, wide[0], wide[1], wide_mean, one, 0.0)
    result.addcmul_(gradient, factor.repeat(columns))
    total[0] *= inverse
    return total
