"""The section `prepare` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from voxelscale.config.section import Rule, Section, Triple


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Section):
    """From scans and masks to the training store."""

    spacing: Triple | None = None
    """Target spacing (z, y, x) in mm; null: the data set's median."""
    split: Triple = (0.7, 0.15, 0.15)
    """Shares of patients in train, val and test."""
    seed: int = 0
    """Shuffles the patients before the split."""
    keep_small: bool = False
    """Whether a lesion that falls between the voxels of the target spacing is kept by one voxel of it (a
    whole voxel, so larger than it is); otherwise it is lost, with a warning."""
    lungs: bool = False
    """Whether to find the lungs, so that patches away from lesions are drawn around them only."""
    plan: bool = True
    """Whether `voxelscale prepare` is to plan patch, depth and batch from the data set and the memory,
    into the store's plan.yaml."""
    memory_gib: float = 0.0
    """Memory of one device that is planned for; 0: what this machine's has free."""
    chunk: int = 64
    """Edge of a compressed chunk in voxels."""
    workers: int = 0
    """Parallel processes; 0: one a core."""

    def rules(self) -> Sequence[Rule]:
        return [
            ("split", min(self.split) >= 0 and sum(self.split) > 0, "shares, at least one above 0"),
            ("spacing", self.spacing is None or min(self.spacing) > 0, "above 0 mm"),
            ("memory_gib", self.memory_gib >= 0, "at least 0"),
        ]
