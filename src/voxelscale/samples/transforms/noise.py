"""Gaussian noise, nnU-Net's ``GaussianNoiseTransform``: quantum noise of a scan at a lower dose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelscale.config import AugmentConfig
from voxelscale.device import upload
from voxelscale.randomness import generator
from voxelscale.samples.draws import Draws, Stream

COIN, AMOUNT = 1, 6
"""Its places in the shared stream."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Independent normal noise in every voxel, the same on every device.

    It is drawn in main memory, by NumPy's counter-based generator: 19 ms for 128^3 voxels on one core.
    PyTorch's takes 5 there, but differs between devices; runs with noise that used it have other weights.
    Readers draw it ahead, beside one another.

    Attributes:
        std: in units of normalised intensity.
        seed: of the noise.
    """

    std: float
    seed: int
    _drawn: dict[int, NDArray[np.float32]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def draw(cls, config: AugmentConfig, draws: Draws) -> Noise | None:
        """A standard deviation of at most `noise_std`."""
        std = config.noise_std * draws.amounts[AMOUNT]
        if draws.coins[COIN] >= config.strength * config.p_noise or not std:
            return None
        return cls(std=std, seed=int(draws.stream(Stream.NOISE).integers(2**63)))

    def normal(self, channel: int, shape: Sequence[int]) -> NDArray[np.float32]:
        """Standard normal noise of a channel, (z, y, x); kept, so that it is drawn once."""
        if channel not in self._drawn:
            source = generator(self.seed, channel, Stream.NOISE)
            self._drawn[channel] = source.standard_normal(tuple(shape), dtype=np.float32)
        return self._drawn[channel]

    def __call__(self, image: Tensor, channel: int = 0) -> Tensor:
        """Added to (z, y, x) in place; of each channel another."""
        noise = torch.from_numpy(self.normal(channel, image.shape))
        return image.add_(upload(noise, image.device), alpha=self.std)
