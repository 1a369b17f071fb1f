"""False-positive reduction: a small network on a crop around each finding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from voxelscale.config import IntTriple

CHANNELS = (16, 32, 64)
STEP = 2 ** len(CHANNELS)
"""Crops have a multiple of so many voxels along each axis."""
EDGE_MM = 48.0
"""About the edge of a crop: a nodule (up to 30 mm) and what it hangs on."""


class FalsePositiveNet(nn.Module):
    """Crop to the logit of its middle being a lesion: three levels of two convolutions, then a mean.

    False-positive reduction by a second network on crops is the field's way since LUNA16 (Setio et al.,
    2017).
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for channels in CHANNELS:
            for inputs in (before, channels):
                convolution = nn.Conv3d(inputs, channels, 3, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm3d(channels), nn.ReLU()]
            layers.append(nn.MaxPool3d(2))
            before = channels
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 1, z, y, x)``, normalised as for the first network, to ``(batch, 1)``."""
        return self.head(self.features(x).mean((2, 3, 4)))  # type: ignore[no-any-return]


def crop_shape(spacing: Sequence[float]) -> IntTriple:
    """Voxels (z, y, x) of a crop at a spacing in mm."""
    z, y, x = (STEP * max(1, round(EDGE_MM / step / STEP)) for step in spacing)
    return z, y, x


def crop_start(centre: Sequence[float], shape: Sequence[int]) -> IntTriple:
    """First voxel of the crop about a place, which may be fractional; it may lie outside the scan."""
    z, y, x = (round(float(c)) - n // 2 for c, n in zip(centre, shape, strict=True))
    return z, y, x
