"""Normalised and augmented micro-batches, on the training device.

Each sample's result depends on that sample alone, so that it is the same in any batch on any rank. A
sample costs what it drew: nothing is computed over the batch that only some of it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from voxelscale.config import IntTriple
from voxelscale.samples.patches import Sample
from voxelscale.samples.transforms.affine import warp, warp_mask
from voxelscale.samples.transforms.mirror import mirror


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """HU to network input: clip to [low, high], subtract the mean, divide by the std (nnU-Net's for CT).

    Attributes:
        low, high, mean, std: HU.
    """

    low: float
    high: float
    mean: float
    std: float

    @classmethod
    def of_fingerprint(cls, lesion_hu: dict[str, float]) -> Normalisation:
        """From a store's ``fingerprint["lesion_hu"]``."""
        return cls(
            low=lesion_hu["percentile_00_5"],
            high=lesion_hu["percentile_99_5"],
            mean=lesion_hu["mean"],
            std=lesion_hu["std"],
        )

    def __call__(self, hu: Tensor) -> Tensor:
        """HU of any shape and number type to float32, always a copy."""
        values = hu.to(torch.float32, copy=True)
        return self.standardise(values.clamp_(self.low, self.high))

    def standardise(self, clipped: Tensor) -> Tensor:
        """The second half, in place."""
        return clipped.sub_(self.mean).div_(self.std)


def make_batch(
    samples: Sequence[Sample], patch: IntTriple, normalise: Normalisation, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Samples to the network's input and target.

    Returns:
        images ``(batch, 1, z, y, x)`` float32 and masks ``(batch, 1, z, y, x)`` float32 of 0 and 1,
        both on `device`.
    """
    image = torch.empty((len(samples), 1, *patch), device=device)
    mask = torch.zeros((len(samples), 1, *patch), device=device)
    for row, sample in enumerate(samples):
        plan = sample.augmentation
        labels = sample.region[1] if sample.region[1].max() else None
        hu = torch.from_numpy(sample.region[0]).to(device, non_blocking=True)
        if plan.matrix is None:
            values = image[row, 0].copy_(mirror(hu, plan.mirrored)).clamp_(normalise.low, normalise.high)
            if labels is not None:
                there = torch.from_numpy(labels).to(device, non_blocking=True)
                mask[row, 0] = mirror(there, plan.mirrored)
        else:
            # Mirroring is a matter of signs for a patch that is resampled anyway.
            matrix = plan.matrix * np.where(plan.mirrored, -1.0, 1.0)
            values = warp(hu.float().clamp_(normalise.low, normalise.high), matrix, patch)
            if labels is not None:
                warp_mask(labels, matrix, mask[row, 0])
        values = normalise.standardise(values)
        for transform in plan.intensity:
            values = transform(values)
        image[row, 0] = values
    return image, mask
