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
    recipes: tuple[str, ...] = ("unchanged", "auto")
    """Recipes to train with: unchanged, or a name as in train.recipe, optionally with settings, such as
    muon:optim.warmup=0;optim.ema=0."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; intervals are over them."""
    jobs: int = 1
    """Trainings at a time on this machine; 0: one per core or GPU."""
    target: float = 0.9
    """Target of "time to a target Dice", as a share of the first recipe's Dice with one worker."""
    cluster: str = ""
    """Cluster that times are modelled for: reedbush-h, reedbush-l, dgx-a100, dgx-h100, ethernet, laptop;
    "": one device a node. It sets the next four keys where they are null."""
    interconnect: str | None = None
    """Link between nodes: infiniband-edr, -hdr, -ndr, ethernet-10g, ..., or alpha=5us,beta=12GB/s; null:
    the cluster's, or infiniband-edr."""
    node_devices: int | None = None
    """Workers per node; null: the cluster's, or 1."""
    node_link: str | None = None
    """Link between the workers of one node; null: the cluster's, or nvlink-a100."""
    rails: int | None = None
    """Network adapters of a node, which its workers share; null: the cluster's, or 1."""
    hidden: float | None = None
    """Share of communication and reading that runs beside the arithmetic; null: 1 where the step was
    measured on a GPU, 0 on a processor, all of whose cores compute."""
    price_per_hour: float | None = None
    """Price of one device (worker) for an hour, in any currency; null: no prices are reported."""
    watts: float | None = None
    """Power of one device with its share of the node, in watts; null: no energy is reported."""
    measure: bool = False
    """Whether to measure and use the link between ranks on this machine."""

    def rules(self) -> Sequence[Rule]:
        return [
            *self.each_once("workers", "recipes", "seeds"),
            ("workers", min(self.workers, default=0) >= 1, "numbers of 1 or more"),
            ("node_devices", self.node_devices is None or self.node_devices >= 1, "at least 1"),
            ("rails", self.rails is None or self.rails >= 1, "at least 1"),
            *self.at_least_0("seeds", "jobs", "price_per_hour", "watts"),
            ("target", 0 < self.target <= 1, "above 0, at most 1"),
            ("hidden", self.hidden is None or 0 <= self.hidden <= 1, "at least 0 and at most 1"),
        ]
