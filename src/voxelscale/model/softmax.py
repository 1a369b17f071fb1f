"""The loss of classes that exclude each other: soft Dice and cross-entropy of a softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from voxelscale.model.losses import (
    AROUND,
    LEAST_SMOOTH,
    is_slice,
    mean_weight,
    on_processor,
    small_lesion_weight,
)


def softmax_dice_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore: bool = False,
    dice: float = 1.0,
    cross_entropy: float = 1.0,
    smooth: float = 1.0,
    small: float = 0.0,
    top_k: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of (1 - soft Dice) and cross-entropy, mean over samples; and each sample's Dice.

    A sample's Dice is the mean over the foreground classes, present in it or not; the formula is that of
    `voxelscale.model.losses.soft_dice`.

    Args:
        logits: ``(batch, 1 + classes, ...)``, background first, any float type.
        target: ``(batch, 1, ...)``: 0 background, 1 the first class and so on, of any type.
        ignore: whether voxels may be -1, which take no part in anything.
        smooth, small, top_k: as `voxelscale.model.losses.dice_cross_entropy`; `small` of each class by its
            own mask, `top_k` of each sample's voxels that take part.

    Returns:
        the loss, a scalar, and the soft Dice of each sample ``(batch,)``, detached.
    """
    labels = target.flatten(1).long()
    ignored = labels < 0 if ignore else None
    labels = labels.clamp_min(0) if ignore else labels
    wide = torch.promote_types(logits.dtype, torch.float32)
    weight = _small_weight(labels.view(target.shape), small, logits.shape[1], wide) if small else None
    loss, score = _DiceSoftmax.apply(  # type: ignore[no-untyped-call]
        logits, labels, weight, ignored, dice, cross_entropy, max(smooth, LEAST_SMOOTH), top_k
    )
    return loss, score.mean(1).detach()


def _small_weight(labels: Tensor, exponent: float, count: int, dtype: torch.dtype) -> Tensor:
    """(batch, voxels) `small_lesion_weight` of each class's voxels in its own mask, 1 of background.

    Args:
        labels: ``(batch, 1, z, y, x)`` or ``(batch, 1, y, x)``.
        count: classes, background included.
    """
    if is_slice(labels):
        labels = labels[:, :, 0]
    if on_processor(labels):
        around = torch.stack([_own_around(one[0]) for one in labels])[:, None]
        weight = (0.5 * AROUND ** (labels.dim() - 2) / around.to(dtype)).pow(exponent).clamp_min(1)
        return torch.where(labels > 0, weight, 1.0).flatten(1)
    weight = torch.ones_like(labels, dtype=dtype)
    for label in range(1, count):
        mask = labels == label
        weight = torch.where(mask, small_lesion_weight(mask.to(dtype), exponent), weight)
    return weight.flatten(1)


def _own_around(labels: Tensor) -> Tensor:
    """(z, y, x) int16, of each voxel of a class those of the same class in the cube about it; elsewhere 1.

    Counted in whole numbers, class by class in its box: twenty times faster than by pooling.
    """
    counts = torch.ones_like(labels, dtype=torch.int16)
    for label in labels.flatten().bincount().nonzero().flatten().tolist():
        if label:
            mask = labels == label
            box = tuple(_extent(mask, axis) for axis in range(mask.dim()))
            part = mask[box]
            counts[box] = torch.where(part, _around(part), counts[box])
    return counts


def _extent(mask: Tensor, axis: int) -> slice:
    """From the first to the last place along an axis that has voxels of the mask."""
    others = [other for other in range(mask.dim()) if other != axis]
    places = mask.any(others).nonzero()
    return slice(int(places[0]), int(places[-1]) + 1)


def _around(mask: Tensor) -> Tensor:
    """How many voxels of the mask are in the cube about each voxel, int16; `AROUND` voxels long."""
    counts = mask.to(torch.int16)
    for axis, size in enumerate(mask.shape):
        sides = [0, 0] * (mask.dim() - 1 - axis) + [AROUND // 2] * 2
        framed = F.pad(counts, sides)
        counts = framed.narrow(axis, 0, size).clone()
        for start in range(1, AROUND):
            counts += framed.narrow(axis, start, size)
    return counts


def _sums(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """(batch, count) the sum over the voxels of each label, of values and labels (batch, voxels)."""
    if on_processor(values):
        sums = torch.zeros(len(values), count, dtype=torch.float64)
        return sums.scatter_add_(1, labels, values.double()).to(values.dtype)
    # On a GPU a sum by label would be in an order that changes from run to run.
    return torch.stack([(values * (labels == label)).sum(1) for label in range(count)], 1)


class _DiceSoftmax(torch.autograd.Function):
    """In few passes over the logits; forward and gradient share one softmax, the only map that is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        ignored: Tensor | None,
        dice: float,
        cross_entropy: float,
        smooth: float,
        top_k: float,
    ) -> tuple[Tensor, Tensor]:
        wide, count = torch.promote_types(logits.dtype, torch.float32), logits.shape[1]
        probability = F.log_softmax(logits.to(wide).flatten(2), 1)
        entropy = -probability.gather(1, labels[:, None])[:, 0]
        probability.exp_()
        picked = (-entropy).exp_()  # the probability of each voxel's own class
        if ignored is not None:
            entropy.masked_fill_(ignored, 0)
            picked.masked_fill_(ignored, 0)
            probability.masked_fill_(ignored[:, None], 0)
        there = torch.ones_like(picked) if ignored is None else (~ignored).to(wide)
        overlap, volume = (_sums(values, labels, count)[:, 1:] for values in (picked, there))
        size = probability.sum(2)[:, 1:] + volume + smooth
        score = (2 * overlap + smooth) / size
        if not (weight is None and ignored is None and top_k == 1):
            weight = there if weight is None else weight
            weight = mean_weight(weight, entropy * weight if top_k < 1 else None, top_k, ignored)
        mean = entropy.mean() if weight is None else (entropy * weight).mean()
        ctx.save_for_backward(probability, labels, picked, size, score, weight)
        ctx.weights, ctx.shape, ctx.type = (dice, cross_entropy), logits.shape, logits.dtype
        ctx.mark_non_differentiable(score)
        return dice * (1 - score.mean()) + cross_entropy * mean, score

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        probability, labels, picked, size, score, weight = ctx.saved_tensors
        dice, cross_entropy = ctx.weights
        # d score / d p = (2 t - score) / size; background, which comes first, has no score.
        of_size = gradient * dice / (score.numel() * size)
        everywhere, own = F.pad(score * of_size, (1, 0)), F.pad(-2 * of_size, (1, 0))
        of_own = own.gather(1, labels) * picked
        # d p_j / d x_k = p_j ((j = k) - p_k): less the mean of the gradient over the classes.
        mean = torch.bmm(everywhere[:, None], probability)[:, 0] + of_own
        of_entropy = gradient * cross_entropy / labels.numel()
        of_entropy = of_entropy.expand_as(mean) if weight is None else of_entropy * weight
        of_logits = probability * everywhere[:, :, None]
        of_logits.addcmul_(probability, (of_entropy - mean)[:, None])
        of_logits.scatter_add_(1, labels[:, None], (of_own - of_entropy)[:, None])
        return of_logits.to(ctx.type).view(ctx.shape), *[None] * 7
