"""The augmentation: its transforms, in the order in which they are applied.

The set and the order are nnU-Net's (Isensee et al., Nature Methods 2021, Supplementary Note 2). What
a sample gets is drawn on the CPU; the arithmetic runs on the training device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from voxelscale.config import AugmentConfig, IntTriple, Triple
from voxelscale.samples.draws import Draws
from voxelscale.samples.transforms import affine, mirror
from voxelscale.samples.transforms.blur import Blur
from voxelscale.samples.transforms.brightness import Brightness
from voxelscale.samples.transforms.gamma import Gamma
from voxelscale.samples.transforms.low_resolution import LowResolution
from voxelscale.samples.transforms.noise import Noise

Transform = Callable[[Tensor, int], Tensor]
"""A normalised channel (z, y, x), which may be changed in place, and its number, to one of that shape."""

INTENSITY: list[Callable[[AugmentConfig, Draws], Transform | None]] = [
    Noise.draw,
    Blur.draw,
    Brightness.draw,
    LowResolution.draw,
    Gamma.draw,
]
"""After mirroring and the affine transform; each draws a sample's transform, None where it has none."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """One sample's transforms.

    Attributes:
        patch: voxels (z, y, x).
        region: voxels (z, y, x) to read, so that the patch is covered after `matrix`.
        mirrored: whether each of z, y, x is.
        matrix: of the affine transform, if any.
        intensity: the others, in order.
    """

    patch: IntTriple
    region: IntTriple
    mirrored: mirror.Mirrored = (False, False, False)
    matrix: affine.Matrix | None = None
    intensity: tuple[Transform, ...] = ()

    @property
    def turn(self) -> affine.Matrix | None:
        """`matrix` with the mirroring, which is a matter of signs for a patch that is resampled anyway."""
        return None if self.matrix is None else self.matrix * np.where(self.mirrored, -1.0, 1.0)

    def draw_noise(self, channels: int) -> None:
        """Draw the noise of every channel now, in the thread that reads, rather than when it is added."""
        for transform in self.intensity:
            if isinstance(transform, Noise):
                for channel in range(channels):
                    transform.normal(channel, self.patch)


def draw_augmentation(
    config: AugmentConfig, draws: Draws, patch: IntTriple, spacing: Triple, dims: int = 3
) -> Augmentation:
    """Draw a sample's transforms.

    Args:
        patch: voxels (z, y, x).
        spacing: mm (z, y, x), in which rotations are rigid.
        dims: 2 or 3; in 2-D nothing turns out of the slice.
    """
    if not config.enabled:
        return Augmentation(patch=patch, region=patch)
    matrix = affine.draw(config, draws, spacing, dims)
    drawn = (draw(config, draws) for draw in INTENSITY)
    return Augmentation(
        patch=patch,
        region=affine.region_of(matrix, patch),
        mirrored=mirror.draw(config, draws, dims),
        matrix=matrix,
        intensity=tuple(transform for transform in drawn if transform),
    )
