"""Normalising and augmenting a micro-batch on the training device.

Each sample's result depends on that sample alone, so that it is the same in any batch on any rank. A
sample costs what it drew: nothing is computed over the batch that only some of it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from voxelscale.config import IntTriple
from voxelscale.randomness import generator
from voxelscale.samples.draws import Augmentation
from voxelscale.samples.patches import NOISE, Sample


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


Box = tuple[slice, slice, slice]


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
    image = torch.empty((len(samples), 1, *patch), device=device)
    mask = torch.zeros((len(samples), 1, *patch), device=device)
    for row, sample in enumerate(samples):
        labels = sample.region[1] if sample.region[1].max() else None
        hu = torch.from_numpy(sample.region[0]).to(device, non_blocking=True)
        plan = sample.augmentation
        if plan.matrix is None:
            axes = [axis for axis, flip in enumerate(plan.flips) if flip]
            values = image[row, 0].copy_(hu.flip(axes)).clamp_(normalise.low, normalise.high)
            if labels is not None:
                mask[row, 0] = torch.from_numpy(labels).to(device, non_blocking=True).flip(axes)
        else:
            # Mirroring is a matter of signs for a patch that is resampled anyway.
            matrix = plan.matrix * np.where(plan.flips, -1.0, 1.0)
            values = _turn(hu.float().clamp_(normalise.low, normalise.high), matrix, patch)
            if labels is not None:
                _turn_mask(labels, matrix, mask[row, 0])
        image[row, 0] = _intensities(normalise.standardise(values), plan, seed, sample.index)
    return image, mask


def _turn_mask(region: NDArray[np.int16], matrix: NDArray[np.float64], out: Tensor) -> None:
    """Write the turned mask (1 where its trilinear value is at least one half) into `out`, zeros so far.

    Lesions are small: only the box of the patch that their box in the region can reach is computed.
    """
    reached = _reach(region, matrix, out.shape)
    if any(side.start >= side.stop for side in reached):
        return
    labels = torch.from_numpy(region).to(out.device, non_blocking=True).float()
    out[reached] = (_turn(labels, matrix, out.shape, reached) >= 0.5).float()


def _reach(region: NDArray[np.int16], matrix: NDArray[np.float64], patch: Sequence[int]) -> Box:
    """The box of the patch outside which a turned mask is 0."""
    rows = np.bitwise_or.reduce(region, axis=2)
    zs, ys = np.flatnonzero(rows.any(axis=1)), np.flatnonzero(rows.any(axis=0))
    xs = np.flatnonzero(region[zs[0] : zs[-1] + 1, ys[0] : ys[-1] + 1].any(axis=(0, 1)))
    middle = (np.asarray(region.shape) - 1) / 2
    # Linear interpolation carries a voxel less than one voxel further.
    sides = [(found[0] - 1, found[-1] + 1) for found in (zs, ys, xs)]
    corners = (np.array(list(product(*sides))) - middle) @ np.linalg.inv(matrix).T
    places = corners + (np.asarray(patch) - 1) / 2
    low = np.maximum(np.floor(places.min(axis=0)), 0).astype(int)
    high = np.minimum(np.ceil(places.max(axis=0)) + 1, patch).astype(int)
    z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return z, y, x


def _turn(
    region: Tensor, matrix: NDArray[np.float64], patch: Sequence[int], box: Box | None = None
) -> Tensor:
    """A box of the patch (all of it: None) interpolated trilinearly in the region around it.

    Args:
        region: (z, y, x) float32, which holds everything that `matrix` reaches.
        matrix: offset from the patch's centre to offset from the region's, voxels.
        patch: voxels (z, y, x).
        box: of the patch.
    """
    lines = []
    for axis, n in enumerate(patch):
        line = torch.arange(n, dtype=torch.float32, device=region.device) - (n - 1) / 2
        lines.append(line[box[axis]] if box else line)
    sample = _by_planes if region.device.type == "cpu" else _by_voxels
    return sample(region, lines, matrix)


def _offsets(lines: Sequence[Tensor], row: NDArray[np.float64]) -> Tensor:
    """``row @ (z, y, x)`` for every voxel of the grid of three lines of offsets."""
    z, y, x = (line * float(weight) for line, weight in zip(lines, row, strict=True))
    return z[:, None, None] + (y[:, None] + x)


def _by_voxels(region: Tensor, lines: Sequence[Tensor], matrix: NDArray[np.float64]) -> Tensor:
    """As `_turn`, by the library's 3-D sampling: one kernel on GPUs, slow on CPUs."""
    # grid_sample counts in half-extents, from -1 to 1 between the outermost voxel centres; x, y, z.
    scale = 2 / np.maximum(np.asarray(region.shape) - 1, 1)
    grid = torch.stack([_offsets(lines, matrix[axis] * scale[axis]) for axis in (2, 1, 0)], dim=-1)
    return F.grid_sample(region[None, None], grid[None], padding_mode="border", align_corners=True)[0, 0]


def _by_planes(region: Tensor, lines: Sequence[Tensor], matrix: NDArray[np.float64]) -> Tensor:
    """As `_turn`, by the library's 2-D sampling, which is vectorised on CPUs where the 3-D is not.

    The planes lie below one another in one tall image, and its two channels are the same memory, the
    second one plane further on: one look-up gives both planes around a point, which are then mixed.
    In float32 a place in the tall image is exact to about 1e-7 of its height: 0.001 voxel for 128^3.
    """
    depth, height, width = region.shape
    planes = min(depth, 2)
    tall = (depth - planes + 1) * height
    image = region.contiguous().as_strided((1, planes, tall, width), (0, height * width, width, 1))
    z = _offsets(lines, matrix[0]).add_((depth - 1) / 2)
    plane = z.floor()
    up, across = 2 / max(tall - 1, 1), 2 / max(width - 1, 1)
    y = _offsets(lines, matrix[1] * up).add_(((height - 1) - (tall - 1)) / 2 * up)
    y.add_(plane, alpha=height * up)
    x = _offsets(lines, matrix[2] * across)
    grid = torch.view_as_real(torch.complex(x, y)).view(1, -1, x.shape[2], 2)
    found = F.grid_sample(image, grid, padding_mode="border", align_corners=True)
    found = found.view(planes, *x.shape)
    return found[0].lerp_(found[-1], z.sub_(plane))


def _intensities(image: Tensor, plan: Augmentation, seed: int, index: int) -> Tensor:
    """Noise, blur, brightness, low resolution, gamma of (z, y, x), in place; each where it was drawn."""
    if plan.noise_std:
        key = int(generator(seed, index, NOISE).integers(2**63))
        source = torch.Generator(image.device).manual_seed(key)
        noise = torch.randn(image.shape, generator=source, device=image.device)
        image.add_(noise, alpha=plan.noise_std)
    if plan.blur_sigma:
        image = _along_axes(image, [_blur(n, plan.blur_sigma) for n in image.shape])
    if plan.factor != 1 or plan.shift:
        image.mul_(plan.factor).add_(plan.shift)
    if plan.resolution < 1:
        image = _along_axes(image, [_coarsen(n, plan.resolution) for n in image.shape])
    if plan.gamma != 1:
        image = _gamma(image, plan.gamma)
    return image


def _along_axes(volume: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """A separable linear map of (z, y, x): along each axis of n voxels its own (n, n) matrix.

    Matrix products of a patch's size take a fraction of the time of one-channel convolutions.
    """
    along_z, along_y, along_x = (matrix.to(volume.device) for matrix in matrices)
    out = (along_z @ volume.flatten(1)).view(volume.shape)
    return along_y @ out @ along_x.T


def _blur(n: int, sigma: float) -> Tensor:
    """Gaussian blur of a line of n voxels as a matrix (n, n), sigma in voxels; the ends are repeated."""
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    places = (torch.arange(n)[:, None] + offsets).clamp_(0, n - 1)
    return torch.zeros(n, n).scatter_add_(1, places, (kernel / kernel.sum()).expand(n, -1))


def _coarsen(n: int, resolution: float) -> Tensor:
    """A line of n voxels sampled down (nearest) and up again (linear), as a matrix (n, n)."""
    # What becomes of each unit line is a column of the map.
    coarse = F.interpolate(torch.eye(n)[None], size=max(1, round(n * resolution)), mode="nearest")
    return F.interpolate(coarse, size=n, mode="linear", align_corners=False)[0].T.contiguous()


def _gamma(volume: Tensor, gamma: float) -> Tensor:
    low, high = volume.aminmax()
    extent = (high - low).clamp_min(1e-6)
    return volume.sub_(low).div_(extent).clamp_(0, 1).pow_(gamma).mul_(extent).add_(low)
