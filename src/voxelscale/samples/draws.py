"""What will be done to a sample, drawn on the CPU from the sample's own generator.

The set of transformations and their order are nnU-Net's (Isensee et al., Nature Methods 2021,
Supplementary Note 2); the arithmetic is in `voxelscale.samples.augment`, on the training device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxelscale.config import AugmentConfig, IntTriple, Triple


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """One sample's transformations; None or 0 where one is left out.

    Attributes:
        region: voxels (z, y, x) to read, so that the patch is covered after `matrix`.
        matrix: (3, 3), offset from the patch's centre to offset in the region, in voxels (z, y, x).
        noise_std, blur_sigma (voxels), factor, shift, gamma, resolution: see `AugmentConfig`.
        flips: whether each of z, y, x is mirrored.
    """

    region: IntTriple
    matrix: NDArray[np.float64] | None = None
    noise_std: float = 0.0
    blur_sigma: float = 0.0
    factor: float = 1.0
    shift: float = 0.0
    gamma: float = 1.0
    resolution: float = 1.0
    flips: tuple[bool, bool, bool] = (False, False, False)


def draw_augmentation(
    config: AugmentConfig, random: np.random.Generator, patch: IntTriple, spacing: Triple, dims: int = 3
) -> Augmentation:
    """Draw a sample's transformations.

    Every number is drawn whether it is used or not, so that changing one probability leaves the
    other transformations of every sample as they were.
    """
    if not config.enabled:
        return Augmentation(region=patch)
    coins, amounts = random.random(6), random.random(12)
    c = config
    likely = (c.p_affine, c.p_noise, c.p_blur, c.p_gamma, c.p_brightness, c.p_low_resolution)
    turned, noisy, blurred, bent, brighter, coarser = coins < c.strength * np.asarray(likely)
    angles = (2 * amounts[:3] - 1) * np.radians(config.rotate_deg)
    zooms = config.scale[0] * (config.scale[1] / config.scale[0]) ** amounts[3:6]
    flips = random.random(3) < 0.5
    if dims == 2:
        angles[:2], zooms[0], flips[0] = 0.0, 1.0, False
    matrix = _matrix(angles, zooms, spacing) if turned else None
    z, y, x = (bool(f) and config.flip for f in flips)
    return Augmentation(
        region=region_of(matrix, patch),
        matrix=matrix,
        noise_std=config.noise_std * amounts[6] if noisy else 0.0,
        blur_sigma=_between(config.blur_sigma, amounts[7]) if blurred else 0.0,
        factor=_between(config.brightness, amounts[8]) if brighter else 1.0,
        shift=0.4 * amounts[9] - 0.2 if brighter else 0.0,
        gamma=_between(config.gamma, amounts[10]) if bent else 1.0,
        resolution=_between(config.low_resolution, amounts[11]) if coarser else 1.0,
        flips=(z, y, x),
    )


def region_of(matrix: NDArray[np.float64] | None, patch: IntTriple) -> IntTriple:
    """Voxels of the smallest centred region that holds the transformed patch and a border of one.

    It is larger than the patch by an even number along each axis, so that both have one centre; an
    axis along which nothing moves keeps its size.
    """
    if matrix is None:
        return patch
    reach = np.abs(matrix) @ (np.asarray(patch) - 1)
    sizes = []
    for needed, n, row, axis in zip(reach, patch, matrix, range(3), strict=True):
        if n == 1 and np.allclose(row, np.eye(3)[axis]):
            sizes.append(1)
        else:
            margin = max(0, math.ceil((needed + 3 - n) / 2))
            sizes.append(n + 2 * margin)
    return sizes[0], sizes[1], sizes[2]


def _between(limits: Sequence[float], share: float) -> float:
    return float(limits[0] + (limits[1] - limits[0]) * share)


def _matrix(
    angles: NDArray[np.float64], zooms: NDArray[np.float64], spacing: Triple
) -> NDArray[np.float64]:
    """Rotation about x, y, z (radians) after zooming, in mm, expressed in voxels (z, y, x)."""
    matrix = np.diag(1 / zooms)
    for angle, (i, j) in zip(angles, ((0, 1), (0, 2), (1, 2)), strict=True):
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    step = np.asarray(spacing)
    return np.asarray(matrix * step / step[:, None], dtype=np.float64)
