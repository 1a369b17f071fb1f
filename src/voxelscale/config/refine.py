"""The section `refine` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from voxelscale.config.section import Rule, Section


@dataclass(frozen=True, kw_only=True)
class RefineConfig(Section):
    """False-positive reduction: a network that classifies the candidates of the first one."""

    candidates: float = 0.01
    """Minimum lesion probability of a component that is a candidate."""
    samples: int = 16_000
    """Crops to train on, half of them of lesions."""
    batch_size: int = 32
    """Crops per update."""
    lr: float = 2e-3
    """Highest learning rate, after the warm-up."""

    def rules(self) -> Sequence[Rule]:
        return [
            ("candidates", 0 < self.candidates < 1, "between 0 and 1"),
            ("samples", self.samples >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 2, "at least 2"),
            ("lr", self.lr > 0, "above 0"),
        ]
