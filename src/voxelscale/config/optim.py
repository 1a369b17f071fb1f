"""The section `optim` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from voxelscale.config.section import Rule, Section

Scaling = Literal["none", "linear", "sqrt"]


class Own(NamedTuple):
    """What an optimiser takes where the config says null."""

    lr: float
    momentum: float
    weight_decay: float
    scaling: Scaling


OWN: dict[str, Own] = {
    "adamw": Own(1e-3, 0.99, 1e-2, "sqrt"),
    "sgd": Own(1e-2, 0.99, 3e-5, "linear"),
    "lars": Own(1.0, 0.9, 5e-4, "linear"),
    "lamb": Own(1e-2, 0.99, 1e-2, "sqrt"),
    "muon": Own(5e-3, 0.95, 1e-2, "sqrt"),
}
"""By optimiser. AdamW's rate and decay are PyTorch's; SGD's rate, momentum and decay nnU-Net's. LARS's
momentum and decay are those of You, Gitman and Ginsburg 2017; its rate of 1 leaves the size of a step to
the trust coefficient. LAMB's decay is that of You et al. 2020, its rate a share of each kernel's size.
Muon's decay is AdamW's (Liu et al. 2025), its momentum Jordan's (2024), its rate measured
(docs/benchmarks.md). The rate of SGD and LARS grows linearly (Goyal et al. 2017), that of adaptive rules
with the square root (Malladi et al. 2022; for Muon assumed). AdamW and LAMB use no momentum: 0.99 stands
there because the digests of earlier runs hold it."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """Update rule and schedule."""

    name: Literal["adamw", "sgd", "lars", "lamb", "muon"] = "muon"
    """Update rule; sources in `voxelscale.train.optim`."""
    lr: float | None = None
    """Highest learning rate at a global batch of `reference_batch`; null: 5e-3 for Muon, 1e-3 for AdamW,
    1e-2 for SGD and LAMB, 1 for LARS."""
    scaling: Scaling | None = "none"
    """How the learning rate grows with the global batch; null: linear for SGD and LARS, sqrt for others."""
    reference_batch: int = 2
    """Global batch (patches per update, all workers together) for which `lr` was tuned."""
    max_lr: float = 0.0
    """Maximum of the scaled learning rate; 0: no limit."""
    weight_decay: float | None = None
    """Decoupled (AdamW, LAMB, Muon) or L2 (SGD, LARS); norms and biases are excluded. null: 0.01 for AdamW,
    LAMB and Muon, 3e-5 for SGD, 5e-4 for LARS."""
    momentum: float | None = None
    """Momentum of SGD (Nesterov), LARS and Muon; null: 0.99 for SGD, 0.9 for LARS, 0.95 for Muon."""
    betas: tuple[float, float] = (0.9, 0.999)
    """beta1 and beta2 of AdamW and LAMB, and of Muon's AdamW part."""
    eps: float = 1e-8
    """Epsilon of AdamW and LAMB, added to the root of the second moment."""
    trust: float = 1e-3
    """Trust coefficient of LARS."""
    schedule: Literal["poly", "cosine", "linear", "step", "constant"] = "poly"
    """Schedule of the learning rate after the warm-up; poly has exponent 0.9, as in nnU-Net."""
    step_at: tuple[float, ...] = (0.5, 0.75)
    """Milestones of schedule=step, as shares of the budget."""
    step_factor: float = 0.1
    """Factor of the learning rate at each milestone of schedule=step."""
    pretrained_lr: float = 1.0
    """Factor of the learning rate of the weights taken from `train.start_from`; 0.1 changes them slowly."""
    warmup: float = 0.05
    """Linear warm-up from 0, as a share of the samples."""
    gradient_clipping: float = 12.0
    """Gradient clipping: maximum norm of the gradient; 0: no clipping."""
    grow_from: int = 0
    """Global batch of the first updates; it then doubles up to that of all workers. 0: no growing."""
    grow_share: float = 0.25
    """Share of the budget over which the global batch grows, with the same number of updates at each
    size."""
    ema: float = 0.0
    """Time constant of the weights' exponential moving average (EMA) as a share of the budget, the same for
    every number of workers. The averaged weights are validated and saved. 0: no EMA."""

    @property
    def used(self) -> Own:
        """Rate, momentum, weight decay and scaling as used: the optimiser's own where they are null."""
        own = OWN[self.name]
        given = (self.lr, self.momentum, self.weight_decay, self.scaling)
        return Own(*(a if b is None else b for a, b in zip(own, given, strict=True)))  # type: ignore[arg-type]

    def settled(self) -> OptimConfig:
        """The same with nothing left to the optimiser."""
        return replace(self, **self.used._asdict())

    def rules(self) -> Sequence[Rule]:
        return [
            ("lr", self.lr is None or self.lr > 0, "above 0"),
            ("pretrained_lr", 0 < self.pretrained_lr <= 1, "above 0, at most 1"),
            ("reference_batch", self.reference_batch >= 1, "at least 1"),
            ("momentum", self.momentum is None or 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "at least 0 and below 1, both"),
            *self.at_least_0("max_lr", "weight_decay", "gradient_clipping", "grow_from"),
            ("eps", self.eps > 0, "above 0"),
            ("trust", self.trust > 0, "above 0"),
            *self.shares("step_at"),
            ("step_factor", 0 < self.step_factor <= 1, "above 0, at most 1"),
            ("grow_share", 0 <= self.grow_share < 1, "at least 0 and below 1"),
            ("ema", 0 <= self.ema < 1, "at least 0 and below 1"),
            ("warmup", 0 <= self.warmup < 1, "at least 0 and below 1"),
        ]
