"""The section `augment` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from voxelscale.config.section import Rule, Section, Triple


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Section):
    """Augmentation on the device, similar to nnU-Net's; every p is a probability per sample."""

    enabled: bool = True
    """Whether to augment; false: no augmentation."""
    flip: bool = True
    """Mirror each axis with probability one half."""
    strength: float = 1.0
    """Factor of every p, to at most 1; mirroring is not changed."""
    p_affine: float = 0.3
    """Probability of the affine transform: rotation and scaling together."""
    rotate_deg: Triple = (15.0, 15.0, 30.0)
    """Largest rotation about the x, y and z axis in degrees."""
    scale: tuple[float, float] = (0.8, 1.25)
    """Range of the scaling factor, drawn separately for each axis."""
    p_noise: float = 0.15
    """Probability of Gaussian noise."""
    noise_std: float = 0.1
    """Maximum standard deviation of the noise, in units of normalised intensity."""
    p_blur: float = 0.1
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.5, 1.0)
    """Range of the blur's sigma in voxels."""
    p_gamma: float = 0.2
    """Probability of a gamma curve between the patch's minimum and maximum."""
    gamma: tuple[float, float] = (0.7, 1.5)
    """Range of the exponent."""
    p_brightness: float = 0.2
    """Probability of a multiplicative and additive change of brightness."""
    brightness: tuple[float, float] = (0.8, 1.25)
    """Range of the factor; the shift is drawn within +/- 0.2."""
    p_low_resolution: float = 0.1
    """Probability of simulated low resolution: down-sampling, then up-sampling."""
    low_resolution: tuple[float, float] = (0.5, 1.0)
    """Range of the down-sampling factor."""

    def rules(self) -> Sequence[Rule]:
        return [
            ("strength", self.strength >= 0, "at least 0"),
        ]
