"""What the training makes small."""

from __future__ import annotations

from torch import Tensor
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
        logits: ``(batch, 1, ...)``, any float type; the arithmetic is float32.
        target: ``(batch, 1, ...)``, 0 or 1, any type.

    Returns:
        the loss, a scalar, and the soft Dice of each sample ``(batch,)``, detached.
    """
    logits, target = logits.float(), target.float()
    overlap = soft_dice(logits, target, smooth)
    entropy = binary_cross_entropy_with_logits(logits, target)
    return dice * (1 - overlap.mean()) + cross_entropy * entropy, overlap.detach()
