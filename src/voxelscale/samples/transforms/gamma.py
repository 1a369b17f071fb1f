"""Gamma, nnU-Net's ``GammaTransform``: tissues of another contrast, as after contrast medium."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from voxelscale.config import AugmentConfig
from voxelscale.samples.draws import Draws, between

COIN, AMOUNT = 3, 10
"""Its places in the shared stream."""


@dataclass(frozen=True, kw_only=True)
class Gamma:
    """A power of the intensity between the patch's minimum and maximum, which stay."""

    exponent: float

    @classmethod
    def draw(cls, config: AugmentConfig, draws: Draws) -> Gamma | None:
        """An exponent within `gamma`."""
        exponent = between(config.gamma, draws.amounts[AMOUNT])
        taken = draws.coins[COIN] < config.strength * config.p_gamma and exponent != 1
        return cls(exponent=exponent) if taken else None

    def __call__(self, image: Tensor, channel: int = 0) -> Tensor:
        """In place."""
        low, high = image.aminmax()
        extent = (high - low).clamp_min(1e-6)
        return image.sub_(low).div_(extent).clamp_(0, 1).pow_(self.exponent).mul_(extent).add_(low)
