"""The section `loss` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from voxelscale.config.section import Rule, Section


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Soft Dice + cross-entropy."""

    dice: float = 1.0
    """Weight of the soft Dice of the lesion, computed per sample."""
    cross_entropy: float = 5.0
    """Weight of the voxel-wise cross-entropy, which is a mean over voxels."""
    smooth: float = 1.0
    """Added to the soft Dice's numerator and denominator, in voxels."""
    small: float = 0.5
    """Exponent of the extra weight that voxels of small lesions have in the cross-entropy; 0: none, 1:
    inverse to the amount of lesion around them."""
    top_k: float = 0.1
    """Top-k cross-entropy: share of a patch's voxels, those with the largest loss, that count; 1: all."""

    def rules(self) -> Sequence[Rule]:
        return [
            *self.at_least_0("dice", "cross_entropy", "smooth"),
            ("dice", self.dice > 0 or self.cross_entropy > 0, "above 0 where loss.cross_entropy is 0"),
            ("small", 0 <= self.small <= 2, "between 0 and 2"),
            ("top_k", 0 < self.top_k <= 1, "above 0 and at most 1"),
        ]
