"""Mirroring, nnU-Net's ``MirrorTransform``: a lesion may lie on either side of the body."""

from __future__ import annotations

from torch import Tensor

from voxelscale.config import AugmentConfig
from voxelscale.samples.draws import Draws

Mirrored = tuple[bool, bool, bool]
"""Whether each of z, y, x is mirrored."""


def draw(config: AugmentConfig, draws: Draws, dims: int) -> Mirrored:
    """Each axis of the config's with probability one half; never z of a slice."""
    z, y, x = (
        axis in config.mirrored and bool(share < 0.5)
        for axis, share in zip("zyx", draws.mirrors, strict=True)
    )
    return z and dims == 3, y, x


def mirror(volume: Tensor, mirrored: Mirrored) -> Tensor:
    """A copy of (z, y, x)."""
    return volume.flip([axis for axis, flip in enumerate(mirrored) if flip])
