"""Brightness, nnU-Net's ``MultiplicativeBrightnessTransform`` with a shift: another calibration of HU."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from voxelscale.config import AugmentConfig
from voxelscale.samples.draws import Draws, between

COIN, FACTOR, SHIFT = 4, 8, 9
"""Its places in the shared stream."""


@dataclass(frozen=True, kw_only=True)
class Brightness:
    """``factor * image + shift``, in units of normalised intensity."""

    factor: float
    shift: float

    @classmethod
    def draw(cls, config: AugmentConfig, draws: Draws) -> Brightness | None:
        """A factor within `brightness`, a shift within +/- 0.2."""
        if draws.coins[COIN] >= config.strength * config.p_brightness:
            return None
        factor = between(config.brightness, draws.amounts[FACTOR])
        return cls(factor=factor, shift=0.4 * draws.amounts[SHIFT] - 0.2)

    def __call__(self, image: Tensor, channel: int = 0) -> Tensor:
        """In place."""
        return image.mul_(self.factor).add_(self.shift)
