"""The section `prepare` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from voxelscale.config.section import Rule, Section, Triple


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Section):
    """From scans and masks to the training store."""

    spacing: Triple | None = None
    """Target spacing (z, y, x) in mm; null: planned from the data set (docs/data.md)."""
    split: Triple = (0.7, 0.15, 0.15)
    """Shares of patients in train, val and test."""
    seed: int = 0
    """Seed of the split and of the folds, which shuffles the patients."""
    splits: str = ""
    """A splits_final.json as nnU-Net has it (folds, each with its lists train and val), or the cases that
    validate in each fold, as {"0": [a, b], "1": [c]}; "": the data set's own (such a file, a column split
    or fold of its CSV, LUNA16's subsets), or else prepare.split."""
    folds: int = 0
    """Number of folds by patient, where the data set gives none; 0: none, as data.fold is not used. Test
    scans are in no fold."""
    normalisation: tuple[Literal["ct", "zscore", "minmax", "rgb", "none"], ...] = ()
    """Normalisation of each channel: ct (clipped and scaled by the lesions' HU), zscore (of the case),
    minmax (of the case, to 0..1), rgb (255 is 1) or none; []: by the channels' names."""
    keep_small: bool = False
    """Whether a lesion that falls between the voxels of the target spacing keeps one voxel, which is larger
    than the lesion; false: it is lost, with a warning."""
    lungs: bool = False
    """Whether to find the lungs and draw background patches only around them."""
    plan: bool = True
    """Whether `voxelscale prepare` plans patch, depth and batch from the data set and the memory, in the
    store's plan.yaml."""
    memory_gib: float = 0.0
    """Memory of one device to plan for, GiB; 0: what is free on this machine's device."""
    chunk: int = 64
    """Edge of a compressed chunk in voxels."""
    workers: int = 0
    """Parallel processes; 0: one per core."""

    def rules(self) -> Sequence[Rule]:
        return [
            ("split", min(self.split) >= 0 and sum(self.split) > 0, "shares, at least one above 0"),
            ("spacing", self.spacing is None or min(self.spacing) > 0, "above 0 mm"),
            ("folds", self.folds == 0 or self.folds >= 2, "0, or at least 2"),
            ("chunk", self.chunk >= 1, "at least 1"),
            *self.at_least_0("memory_gib", "seed", "workers"),
        ]
