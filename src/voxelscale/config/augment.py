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
    """Mirror each axis of `flip_axes` with probability one half."""
    flip_axes: str = "zyx"
    """Axes that may be mirrored, of the letters z, y and x; those along which classes differ are
    better left out. `predict.test_time_augmentation` mirrors the same ones."""
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

    @property
    def mirrored(self) -> str:
        """The axes that are mirrored, all in all."""
        return self.flip_axes if self.enabled and self.flip else ""

    def rules(self) -> Sequence[Rule]:
        each_once = len(set(self.flip_axes)) == len(self.flip_axes) and set(self.flip_axes) <= set("zyx")
        return [
            ("flip_axes", each_once, "letters of zyx, each at most once"),
            *self.at_least_0("strength", "rotate_deg", "noise_std", "blur_sigma"),
            *self.shares("p_affine", "p_noise", "p_blur", "p_gamma", "p_brightness", "p_low_resolution"),
            *self.ranges("scale", "gamma", "brightness", "low_resolution"),
            ("blur_sigma", self.blur_sigma[0] <= self.blur_sigma[1], "minimum and maximum, in this order"),
        ]
