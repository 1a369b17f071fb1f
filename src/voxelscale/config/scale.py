"""The section `scale` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from voxelscale.config.section import Rule, Section


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(Section):
    """The scaling study: its trainings, and the machine that times are modelled for."""

    workers: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of workers."""
    recipes: tuple[str, ...] = ("unchanged", "large_batch")
    """Recipes to train with: unchanged, or a name as in train.recipe, optionally with settings, such as
    large_batch:optim.warmup=0;optim.ema=0."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; intervals are over them."""
    jobs: int = 1
    """Trainings at a time on this machine; 0: one per core or GPU."""
    target: float = 0.9
    """Target of "time to a target Dice", as a share of the first recipe's Dice with one worker."""
    interconnect: str = "infiniband-edr"
    """Link between nodes: infiniband-edr, -hdr, -ndr, ethernet-10g, ..., or alpha=5us,beta=12GB/s."""
    node_devices: int = 1
    """Workers per node."""
    node_link: str = "nvlink-a100"
    """Link between the workers of one node."""
    measure: bool = False
    """Whether to measure and use the link between ranks on this machine."""

    def rules(self) -> Sequence[Rule]:
        return [
            ("workers", min(self.workers, default=0) >= 1, "at least one number, of 1 or more"),
            ("recipes", len(self.recipes) >= 1, "at least one name"),
            ("seeds", len(self.seeds) >= 1, "at least one number"),
            ("node_devices", self.node_devices >= 1, "at least 1"),
        ]
