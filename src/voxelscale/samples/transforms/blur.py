"""Gaussian blur, nnU-Net's ``GaussianBlurTransform``: a softer reconstruction kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from voxelscale.config import AugmentConfig
from voxelscale.samples.draws import Draws, between
from voxelscale.samples.transforms.separable import along_axes

COIN, AMOUNT = 2, 7
"""Its places in the shared stream."""


@dataclass(frozen=True, kw_only=True)
class Blur:
    """A Gaussian kernel along every axis, cut off at 3 sigma.

    Attributes:
        sigma: voxels.
    """

    sigma: float

    @classmethod
    def draw(cls, config: AugmentConfig, draws: Draws) -> Blur | None:
        """A sigma within `blur_sigma`."""
        sigma = between(config.blur_sigma, draws.amounts[AMOUNT])
        taken = draws.coins[COIN] < config.strength * config.p_blur and sigma
        return cls(sigma=sigma) if taken else None

    def __call__(self, image: Tensor, channel: int = 0) -> Tensor:
        """(z, y, x) blurred; the outermost voxels are repeated beyond the border."""
        return along_axes(image, self.matrix)

    def matrix(self, n: int) -> Tensor:
        """The blur of a line of n voxels, (n, n)."""
        radius = max(1, round(3 * self.sigma))
        offsets = torch.arange(-radius, radius + 1)
        kernel = torch.exp(-0.5 * (offsets / self.sigma) ** 2)
        places = (torch.arange(n)[:, None] + offsets).clamp_(0, n - 1)
        return torch.zeros(n, n).scatter_add_(1, places, (kernel / kernel.sum()).expand(n, -1))
