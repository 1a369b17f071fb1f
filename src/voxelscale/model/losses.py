"""The loss that a training minimises, of one class or of regions; that of classes is in `softmax`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.functional import binary_cross_entropy_with_logits

AROUND = 9
"""Voxels along each axis within which `small_lesion_weight` sees how large a lesion is."""

IGNORED_LOGIT = -1e4
"""Where this is the logit and nothing is there, a voxel has no part in the loss: its probability is 0."""

LEAST_SMOOTH = 1e-6
"""Where there may be no voxel that takes part, so that Dice is not 0 / 0."""


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
    logits: Tensor,
    target: Tensor,
    *,
    dice: float = 1.0,
    cross_entropy: float = 1.0,
    smooth: float = 1.0,
    small: float = 0.0,
    top_k: float = 1.0,
    ignored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of (1 - soft Dice) and cross-entropy, mean over samples; and each sample's Dice.

    Args:
        logits: ``(batch, 1, ...)``, any float type; the arithmetic is at least float32.
        target: ``(batch, 1, ...)``, 0 or 1, any type.
        small: exponent of `small_lesion_weight`, which multiplies the cross-entropy; 0: no weights.
        top_k: share of each sample's voxels, those of the largest cross-entropy, that make its mean (Wu,
            Shen and van den Hengel, "Bridging category-level and instance-level semantic image
            segmentation", 2016); 1: all.
        ignored: ``(batch, 1, ...)`` bool, the voxels that take no part in anything; the target is 0 there.

    Returns:
        the loss, a scalar, and the soft Dice of each sample ``(batch,)``, detached.
    """
    if ignored is not None:
        logits, smooth = logits.masked_fill(ignored, IGNORED_LOGIT), max(smooth, LEAST_SMOOTH)
    weight = _voxel_weight(logits.detach(), target, small, top_k, ignored)
    fused = not torch.compiler.is_compiling()
    function = _DiceCrossEntropy.apply if fused else _dice_cross_entropy
    loss, overlap = function(logits, target, weight, dice, cross_entropy, smooth)
    return loss, overlap.detach()


def regions_dice_cross_entropy(
    logits: Tensor, target: Tensor, *, ignore: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """`dice_cross_entropy` of each region of each sample, mean over both; and each sample's mean Dice.

    Args:
        logits: ``(batch, regions, ...)``, any float type.
        target: ``(batch, 1, ...)``: the k-th bit is 1 where the k-th region is.
        ignore: whether voxels may be -1, which take no part in anything.
        options: as `dice_cross_entropy`; `small` and `top_k` of each region for itself.
    """
    batch, count = logits.shape[:2]
    places = torch.arange(count, dtype=torch.int16, device=target.device)
    places = places.view(1, -1, *[1] * (target.dim() - 2))
    masks = target.clamp_min(0).to(torch.int16) >> places & 1
    ignored = (target < 0).expand_as(masks).flatten(0, 1).unsqueeze(1) if ignore else None
    rows = logits.flatten(0, 1).unsqueeze(1), masks.float().flatten(0, 1).unsqueeze(1)
    loss, dice = dice_cross_entropy(*rows, ignored=ignored, **options)
    return loss, dice.view(batch, count).mean(1)


def deeply_supervised(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """The loss of logits; of several, their mean, with half the weight from one resolution to the next.

    As nnU-Net weighs its decoder's levels, with the target's nearest voxels.

    Args:
        logits: those of the target's size, or a list that begins with them.
        loss: from logits and target to the loss and each sample's Dice.

    Returns:
        the loss, a scalar, and the Dice of each sample at full size.
    """
    if isinstance(logits, Tensor):
        return loss(logits, target)
    weights = [0.5**level for level in range(len(logits))]
    results = [loss(part, _at_size(target, part.shape[2:])) for part in logits]
    each = [value * (weight / sum(weights)) for (value, _), weight in zip(results, weights, strict=True)]
    return torch.stack(each).sum(), results[0][1]


def _at_size(target: Tensor, size: Sequence[int]) -> Tensor:
    if target.shape[2:] == tuple(size):
        return target
    return F.interpolate(target.float(), tuple(size), mode="nearest-exact")


def small_lesion_weight(target: Tensor, exponent: float) -> Tensor:
    """What a lesion's voxel weighs by how little lesion there is around it; 1 elsewhere.

    ``(half of a cube / lesion voxels in the cube) ** exponent``, at least 1, for the cube about the voxel
    whose edge is `AROUND` voxels: a small lesion's weigh more, those of one that fills half of it do not.

    Args:
        target: ``(batch, 1, z, y, x)`` or ``(batch, 1, y, x)``, 0 or 1, float; of one slice it is a square.
    """
    if is_slice(target):
        return small_lesion_weight(target[:, :, 0], exponent).unsqueeze(2)
    if not on_processor(target):
        return _small_lesion_weight(target, exponent)
    # Most of a patch is no lesion; what is computed is the box around those of each sample.
    weight = torch.ones_like(target)
    for one, out in zip(target, weight, strict=True):
        places = one.nonzero()
        if len(places):
            low, high = places.amin(0).tolist(), places.amax(0).tolist()
            box = tuple(slice(first, last + 1) for first, last in zip(low, high, strict=True))
            out[box] = _small_lesion_weight(one[box][None], exponent)[0]
    return weight


def is_slice(x: Tensor) -> bool:
    """Whether it is a 2-D sample as 2-D trainings have it, ``(batch, channel, 1, y, x)``."""
    return x.dim() == 5 and x.shape[2] == 1


def on_processor(x: Tensor) -> bool:
    """Whether a processor's shortcuts are for it: not while compiling, nor of fake tensors."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def _small_lesion_weight(target: Tensor, exponent: float) -> Tensor:
    """By the definition."""
    share, dims = target, target.dim() - 2
    pool = F.avg_pool3d if dims == 3 else F.avg_pool2d
    for axis in range(dims):
        edge = [1] * dims
        edge[axis] = AROUND
        # By hand: the pooling's own padding refuses patches smaller than its window.
        sides = [n // 2 for n in reversed(edge) for _ in range(2)]
        share = pool(F.pad(share, sides), edge, stride=1)
    weight = (0.5 / share.clamp_min(AROUND**-dims)).pow(exponent).clamp_min(1)
    return torch.where(target > 0, weight, 1.0)


def _voxel_weight(
    logits: Tensor, target: Tensor, small: float, top_k: float, ignored: Tensor | None
) -> Tensor | None:
    """(batch, voxels) what each voxel's cross-entropy is multiplied by; None: 1 throughout."""
    if small == 0 and top_k == 1 and ignored is None:
        return None
    wide = torch.promote_types(logits.dtype, torch.float32)
    x, t = logits.to(wide), target.to(wide)
    weight = small_lesion_weight(t, small).flatten(1) if small else torch.ones_like(x).flatten(1)
    entropy = None
    if top_k < 1:
        entropy = binary_cross_entropy_with_logits(x.flatten(1), t.flatten(1), reduction="none")
        entropy *= weight
    return mean_weight(weight, entropy, top_k, None if ignored is None else ignored.flatten(1))


def mean_weight(weight: Tensor, entropy: Tensor | None, top_k: float, ignored: Tensor | None) -> Tensor:
    """What each voxel's cross-entropy is multiplied by, so that its mean is that of the chosen voxels.

    Args:
        weight: ``(batch, voxels)`` of each voxel.
        entropy: ``(batch, voxels)`` cross-entropy times the weight, 0 where ignored; None: all are chosen.
        top_k: share of each row's voxels that are chosen, those of the largest entropy.
        ignored: ``(batch, voxels)`` bool: are not chosen, and not counted.

    Returns:
        ``(batch, voxels)``.
    """
    chosen = None if ignored is None else ~ignored
    if entropy is not None:
        count = max(1, round(top_k * entropy.shape[1]))
        if chosen is None:
            chosen = entropy >= _nth_largest(entropy, count)
        else:
            counts = (top_k * chosen.sum(1)).round().clamp_min(1).long()
            chosen &= entropy >= _nth_largest_of_each(entropy, counts, count)
    if chosen is None:
        return weight
    # Their mean: each weighs what all of them weigh together, over how many they are.
    return weight * chosen * (weight.shape[1] / chosen.sum(1, keepdim=True).clamp_min(1))


def _nth_largest(values: Tensor, count: int) -> Tensor:
    """(batch, 1) the `count`-th largest of each row."""
    if not on_processor(values):
        return values.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    place = values.shape[1] - count
    # NumPy's selection is eight times faster than PyTorch's on processors with AVX-512.
    return torch.from_numpy(np.partition(values.numpy(), place, axis=1)[:, place : place + 1])


def _nth_largest_of_each(values: Tensor, counts: Tensor, most: int) -> Tensor:
    """(batch, 1) the largest of each row whose number ``(batch,)``, at most `most`, is its own."""
    if on_processor(values):
        rows = zip(values.chunk(len(values)), counts.tolist(), strict=True)
        return torch.cat([_nth_largest(row, count) for row, count in rows])
    return values.topk(most, dim=1).values.gather(1, counts[:, None] - 1)


def _dice_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, dice: float, cross_entropy: float, smooth: float
) -> tuple[Tensor, Tensor]:
    """By the definition."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits, target = logits.to(wide), target.to(wide)
    overlap = soft_dice(logits, target, smooth)
    entropy = binary_cross_entropy_with_logits(logits.flatten(1), target.flatten(1), weight)
    return dice * (1 - overlap.mean()) + cross_entropy * entropy, overlap


class _DiceCrossEntropy(torch.autograd.Function):
    """The same in few passes: forward and gradient share the one sigmoid, nothing else is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        dice: float,
        cross_entropy: float,
        smooth: float,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        x, t = logits.to(wide).flatten(1), target.to(wide).flatten(1)
        probability = x.sigmoid()
        overlap = torch.linalg.vecdot(probability, t)
        size = probability.sum(1) + t.sum(1) + smooth
        score = (2 * overlap + smooth) / size
        # -log p = softplus(-x) of a lesion's voxel, softplus(x) of another's.
        if weight is None:
            entropy = (F.softplus(x).sum() - (x * t).sum()) / x.numel()
        else:
            entropy = F.softplus(x).sub_(x * t).mul_(weight).sum() / x.numel()
        loss = dice * (1 - score.mean()) + cross_entropy * entropy
        ctx.save_for_backward(probability, t, size, score, weight)
        ctx.weights, ctx.shape, ctx.type = (dice, cross_entropy), logits.shape, logits.dtype
        ctx.mark_non_differentiable(score)
        return loss, score

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        probability, t, size, score, weight = ctx.saved_tensors
        dice, cross_entropy = ctx.weights
        # d score / d p = (2 t - score) / size
        of_size = gradient * dice / (len(size) * size)
        of_probability = torch.addcmul((score * of_size)[:, None], t, -2 * of_size[:, None])
        of_logits = of_probability.mul_(probability - probability.square())
        of_entropy = (probability - t).mul_(gradient * cross_entropy / t.numel())
        of_logits += of_entropy if weight is None else of_entropy.mul_(weight)
        return of_logits.to(ctx.type).view(ctx.shape), None, None, None, None, None
