"""What the training makes small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.functional import binary_cross_entropy_with_logits


def soft_dice(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Soft Dice of each sample, ``(batch,)`` in (0, 1].

    ``(2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)`` with p the sigmoid (Milletari et al.,
    "V-Net", 2016, without the squares). It is computed per sample, never over a rank's batch: the
    objective must not change with the number of workers.

    Args:
        logits: ``(batch, 1, ...)``.
        target: ``(batch, 1, ...)``, 0 or 1, float.
        smooth: voxels added above and below, which makes an empty patch's Dice 1 when nothing is
            predicted.
    """
    probability = logits.sigmoid().flatten(1)
    target = target.flatten(1)
    overlap = (probability * target).sum(1)
    return (2 * overlap + smooth) / (probability.sum(1) + target.sum(1) + smooth)


def dice_cross_entropy(
    logits: Tensor, target: Tensor, *, dice: float = 1.0, cross_entropy: float = 1.0, smooth: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The weighted sum of (1 - soft Dice) and cross-entropy, mean over samples; and each sample's Dice.

    Args:
        logits: ``(batch, 1, ...)``, any float type; the arithmetic is at least float32.
        target: ``(batch, 1, ...)``, 0 or 1, any type.

    Returns:
        the loss, a scalar, and the soft Dice of each sample ``(batch,)``, detached.
    """
    fused = not torch.compiler.is_compiling()
    function = _DiceCrossEntropy.apply if fused else _dice_cross_entropy
    loss, overlap = function(logits, target, dice, cross_entropy, smooth)
    return loss, overlap.detach()


def _dice_cross_entropy(
    logits: Tensor, target: Tensor, dice: float, cross_entropy: float, smooth: float
) -> tuple[Tensor, Tensor]:
    """By the definition."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits, target = logits.to(wide), target.to(wide)
    overlap = soft_dice(logits, target, smooth)
    entropy = binary_cross_entropy_with_logits(logits, target)
    return dice * (1 - overlap.mean()) + cross_entropy * entropy, overlap


class _DiceCrossEntropy(torch.autograd.Function):
    """The same in few passes: forward and gradient share the one sigmoid, nothing else is kept."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, dice: float, cross_entropy: float, smooth: float
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        x, t = logits.to(wide).flatten(1), target.to(wide).flatten(1)
        probability = x.sigmoid()
        overlap = torch.linalg.vecdot(probability, t)
        size = probability.sum(1) + t.sum(1) + smooth
        score = (2 * overlap + smooth) / size
        # -log p = softplus(-x) of a lesion's voxel, softplus(x) of another's.
        entropy = (F.softplus(x).sum() - (x * t).sum()) / x.numel()
        loss = dice * (1 - score.mean()) + cross_entropy * entropy
        ctx.save_for_backward(probability, t, size, score)
        ctx.weights, ctx.shape, ctx.type = (dice, cross_entropy), logits.shape, logits.dtype
        ctx.mark_non_differentiable(score)
        return loss, score

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        probability, t, size, score = ctx.saved_tensors
        dice, cross_entropy = ctx.weights
        # d score / d p = (2 t - score) / size
        of_size = gradient * dice / (len(size) * size)
        of_probability = torch.addcmul((score * of_size)[:, None], t, -2 * of_size[:, None])
        of_logits = of_probability.mul_(probability - probability.square())
        of_logits += (probability - t).mul_(gradient * cross_entropy / t.numel())
        return of_logits.to(ctx.type).view(ctx.shape), None, None, None, None
