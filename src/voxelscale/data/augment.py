"""Normalising and augmenting a micro-batch on the training device.

Each sample's result depends on that sample alone, so that it is the same in any batch on any rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from voxelscale.config import IntTriple
from voxelscale.data.augment_plan import Augmentation
from voxelscale.data.patches import NOISE, Sample
from voxelscale.data.randomness import generator


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
        """HU of any shape and number type to float32."""
        return hu.float().clamp(self.low, self.high).sub_(self.mean).div_(self.std)


def make_batch(
    samples: Sequence[Sample],
    patch: IntTriple,
    normalise: Normalisation,
    device: torch.device,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Samples to the network's input and target.

    Returns:
        images ``(batch, 1, z, y, x)`` float32 and masks ``(batch, 1, z, y, x)`` float32 of 0 and 1,
        both on `device`.
    """
    images, masks = zip(*(_cut(sample, patch, normalise, device) for sample in samples), strict=True)
    image, mask = torch.stack(images)[:, None], torch.stack(masks)[:, None]
    image = _intensities(image, samples, seed)
    for row, sample in enumerate(samples):
        axes = [axis + 1 for axis, flip in enumerate(sample.augmentation.flips) if flip]
        if axes:
            image[row], mask[row] = image[row].flip(axes), mask[row].flip(axes)
    return image, mask


def _cut(
    sample: Sample, patch: IntTriple, normalise: Normalisation, device: torch.device
) -> tuple[Tensor, Tensor]:
    """One sample's patch (z, y, x), turned and zoomed; image normalised, mask 0 or 1."""
    region = torch.from_numpy(sample.region).to(device, non_blocking=True)
    image, mask = normalise(region[0]), region[1].float()
    matrix = sample.augmentation.matrix
    if matrix is None:
        return image, mask
    # grid_sample counts in half-extents, from -1 to 1 between the outermost voxel centres.
    scale = (np.asarray(patch) - 1)[None] / np.maximum(np.asarray(image.shape) - 1, 1)[:, None]
    turn = torch.from_numpy((matrix * scale).astype(np.float32)).to(device)
    axes = [
        torch.linspace(-1, 1, n, device=device) if n > 1 else torch.zeros(1, device=device) for n in patch
    ]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) @ turn.T
    grid = places.flip(-1)[None]  # x, y, z
    both = torch.stack([image, mask])[None]
    turned = F.grid_sample(both, grid, mode="bilinear", padding_mode="border", align_corners=True)[0]
    return turned[0], (turned[1] >= 0.5).float()


def _intensities(image: Tensor, samples: Sequence[Sample], seed: int) -> Tensor:
    """Noise, blur, brightness, low resolution, gamma; each where its sample drew it."""
    plans = [sample.augmentation for sample in samples]
    for row, (sample, plan) in enumerate(zip(samples, plans, strict=True)):
        if plan.noise_std:
            key = int(generator(seed, sample.index, NOISE).integers(2**63))
            source = torch.Generator(image.device).manual_seed(key)
            noise = torch.randn(image.shape[1:], generator=source, device=image.device)
            image[row] += plan.noise_std * noise
        if plan.blur_sigma:
            image[row] = _blur(image[row], plan.blur_sigma)
    factors, shifts = _column(plans, "factor", image), _column(plans, "shift", image)
    image = image * factors + shifts
    for row, plan in enumerate(plans):
        if plan.resolution < 1:
            image[row] = _coarsen(image[row : row + 1], plan.resolution)[0]
        if plan.gamma != 1:
            image[row] = _gamma(image[row], plan.gamma)
    return image


def _column(plans: Sequence[Augmentation], name: str, like: Tensor) -> Tensor:
    values = [float(getattr(plan, name)) for plan in plans]
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1, 1)


def _blur(volume: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of (1, z, y, x), sigma in voxels."""
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=volume.device, dtype=volume.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    out = volume[None]
    for axis in range(3):
        if out.shape[2 + axis] == 1:
            continue
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = len(kernel)
        pad = [0] * 6
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = radius
        out = F.conv3d(F.pad(out, pad, mode="replicate"), kernel.view(shape))
    return out[0]


def _coarsen(volume: Tensor, resolution: float) -> Tensor:
    """(1, 1, z, y, x) sampled down (nearest) and up again (linear)."""
    size = [max(1, round(n * resolution)) if n > 1 else 1 for n in volume.shape[2:]]
    coarse = F.interpolate(volume, size=size, mode="nearest")
    return F.interpolate(coarse, size=volume.shape[2:], mode="trilinear", align_corners=False)


def _gamma(volume: Tensor, gamma: float) -> Tensor:
    low, high = volume.aminmax()
    extent = (high - low).clamp_min(1e-6)
    return ((volume - low) / extent) ** gamma * extent + low
