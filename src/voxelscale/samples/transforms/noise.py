"""Gaussian noise, nnU-Net's ``GaussianNoiseTransform``: quantum noise of a scan at a lower dose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from voxelscale.config import AugmentConfig
from voxelscale.samples.draws import Draws, Stream

COIN, AMOUNT = 1, 6
"""Its places in the shared stream."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Independent normal noise in every voxel.

    Attributes:
        std: in units of normalised intensity.
        seed: of the device's generator.
    """

    std: float
    seed: int

    @classmethod
    def draw(cls, config: AugmentConfig, draws: Draws) -> Noise | None:
        """A standard deviation of at most `noise_std`."""
        std = config.noise_std * draws.amounts[AMOUNT]
        if draws.coins[COIN] >= config.strength * config.p_noise or not std:
            return None
        return cls(std=std, seed=int(draws.stream(Stream.NOISE).integers(2**63)))

    def __call__(self, image: Tensor, channel: int = 0) -> Tensor:
        """Added to (z, y, x) in place; of each channel another."""
        source = torch.Generator(image.device).manual_seed((self.seed + channel) % 2**63)
        noise = torch.randn(image.shape, generator=source, device=image.device)
        return image.add_(noise, alpha=self.std)
