"""The section `data` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from voxelscale.config.section import IntTriple, Rule, Section


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What one training sample is."""

    patch_size: IntTriple = (64, 64, 64)
    """Voxels (z, y, x) of a training patch; for a 2-D model the first must be 1."""
    foreground: float = 0.5
    """Share of samples centred on a lesion voxel; the rest are centred anywhere in the scan."""
    fold: int | None = None
    """Which of the store's folds to train on, from 0: its validation scans choose the model; null: the
    store's own split."""
    cases: int = 0
    """Number of training scans to use; 0: all."""
    patches_per_case: int = 0
    """Number of different patches per training scan, which are then repeated; 0: no limit."""
    readers: int = 2
    """Threads that read and decompress patches."""
    prefetch: int = 4
    """Micro-batches read ahead."""

    def rules(self) -> Sequence[Rule]:
        return [
            ("patch_size", min(self.patch_size) >= 1, "at least 1 voxel along each axis"),
            ("foreground", 0 <= self.foreground <= 1, "between 0 and 1"),
            ("fold", self.fold is None or self.fold >= 0, "at least 0, or null"),
            *self.at_least_0("patches_per_case", "cases"),
            ("readers", self.readers >= 1, "at least 1"),
            ("prefetch", self.prefetch >= 1, "at least 1"),
        ]
