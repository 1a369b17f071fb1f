"""The section `predict` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from voxelscale.config.section import IntTriple, Rule, Section
from voxelscale.console import first_and_more
from voxelscale.errors import VoxelscaleError

MOST_NAMED = 20
"""Classes that a message names."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Section):
    """Sliding window and findings."""

    patch_size: IntTriple | None = None
    """Voxels (z, y, x) of a window; null: the training patch."""
    overlap: float = 0.5
    """Overlap of neighbouring windows as a share of a window, 0 to below 1."""
    batch_size: int = 4
    """Windows per forward pass; where a GPU has the memory, up to 32 of 64^3 voxels after the first
    pass."""
    threshold: float = 0.5
    """Upper hysteresis threshold: lesion probability that at least one voxel of a finding has."""
    low_threshold: float | None = None
    """Lower hysteresis threshold: connected voxels with at least this probability belong to the finding and
    its mask; null: the same as `threshold`."""
    candidates: float = 0.05
    """Lesion probability above which a component is listed as a less certain finding, outside the mask."""
    merge_mm: float = 0.0
    """Findings at most this far apart (mm between surfaces) are merged; 0: off."""
    min_volume_mm3: float = 10.0
    """Smaller components are dropped; a 3 mm sphere has 14 mm3."""
    smallest_mm3: dict[str, Any] = field(default_factory=dict, hash=False)
    """Smallest component that stays of a class, in mask and findings, as {liver: 5000}; beside
    `min_volume_mm3`, which takes nothing out of the mask of classes that exclude each other."""
    largest_only: tuple[str, ...] = ()
    """Classes of which only the largest component stays, in mask and findings; it has no candidates
    beside it."""
    test_time_augmentation: bool = False
    """Test-time augmentation: average over the copies mirrored along the axes that the training mirrored;
    for all three 8 times the work."""
    lungs: bool | None = None
    """Whether to predict only in and around the lungs, if they are found; null: if the model was trained on
    chests."""
    refuse_unusable: bool = True
    """Whether a scan that the model cannot be meant for (a mask, grey levels, two slices) is an error;
    false: it is predicted with a warning."""
    skip_air: bool = True
    """Whether to skip windows with nothing but air around the patient."""
    probabilities: bool = False
    """Whether to keep each class's probability, times 255 as a whole number, on the scan's own voxels."""

    def rules(self) -> Sequence[Rule]:
        edges = self.patch_size or (1,)
        return [
            ("patch_size", min(edges) >= 1, "at least 1 voxel along each axis, or null"),
            ("overlap", 0 <= self.overlap < 1, "at least 0 and below 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("threshold", 0 < self.threshold < 1, "between 0 and 1"),
            (
                "low_threshold",
                self.low_threshold is None or 0 < self.low_threshold <= self.threshold,
                "above 0 and at most predict.threshold, or null",
            ),
            *self.shares("candidates"),
            *self.at_least_0("min_volume_mm3"),
            ("merge_mm", 0 <= self.merge_mm < float("inf"), "at least 0 mm"),
            (
                "smallest_mm3",
                all(_is_volume(volume) for volume in self.smallest_mm3.values()),
                "a volume of each class, at least 0 mm3",
            ),
        ]

    def check_classes(self, names: Sequence[str]) -> None:
        """Raise a VoxelscaleError where a rule is for a class that is none of these."""
        for key, ruled in (("smallest_mm3", self.smallest_mm3), ("largest_only", self.largest_only)):
            if unknown := [name for name in ruled if name not in names]:
                what = f"config: predict.{key} names {unknown[0]}, which is no class of the model"
                raise VoxelscaleError(what, f"its classes are {first_and_more(names, MOST_NAMED)}")


def _is_volume(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
