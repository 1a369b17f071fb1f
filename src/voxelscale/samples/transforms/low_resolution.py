"""Low resolution, nnU-Net's ``SimulateLowResolutionTransform``: a scan of coarser voxels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from voxelscale.config import AugmentConfig
from voxelscale.samples.draws import Draws, between
from voxelscale.samples.transforms.separable import along_axes

COIN, AMOUNT = 5, 11
"""Its places in the shared stream."""


@dataclass(frozen=True, kw_only=True)
class LowResolution:
    """Sampled down along every axis (nearest voxel), and up again (linear).

    Attributes:
        resolution: share of the voxels that are left along an axis, below 1.
    """

    resolution: float

    @classmethod
    def draw(cls, config: AugmentConfig, draws: Draws) -> LowResolution | None:
        """A resolution within `low_resolution`."""
        resolution = between(config.low_resolution, draws.amounts[AMOUNT])
        taken = draws.coins[COIN] < config.strength * config.p_low_resolution and resolution < 1
        return cls(resolution=resolution) if taken else None

    def __call__(self, image: Tensor, channel: int = 0) -> Tensor:
        """(z, y, x) of the same size."""
        return along_axes(image, self.matrix)

    def matrix(self, n: int) -> Tensor:
        """A line of n voxels sampled down and up again, (n, n)."""
        # What becomes of each unit line is a column of the map.
        size = max(1, round(n * self.resolution))
        # "nearest" would take the voxel at the lower border, and move the image against its label.
        coarse = F.interpolate(torch.eye(n)[None], size=size, mode="nearest-exact")
        return F.interpolate(coarse, size=n, mode="linear", align_corners=False)[0].T.contiguous()
