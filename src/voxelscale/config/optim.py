"""The section `optim` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from voxelscale.config.section import Rule, Section


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """Update rule and schedule."""

    name: Literal["adamw", "sgd", "lars", "lamb", "muon"] = "adamw"
    """Update rule; sources in `voxelscale.train.optim`."""
    lr: float = 1e-3
    """Highest learning rate at a global batch of `reference_batch`."""
    scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the learning rate grows with the global batch."""
    reference_batch: int = 2
    """Global batch (patches per update, all workers together) for which `lr` was tuned."""
    max_lr: float = 0.0
    """Maximum of the scaled learning rate; 0: no limit."""
    weight_decay: float = 1e-2
    """Decoupled (AdamW, LAMB, Muon) or L2 (SGD, LARS); norms and biases are excluded."""
    momentum: float = 0.99
    """Momentum of SGD (Nesterov), LARS and Muon."""
    betas: tuple[float, float] = (0.9, 0.999)
    """beta1 and beta2 of AdamW and LAMB, and of Muon's AdamW part."""
    eps: float = 1e-8
    """Epsilon of AdamW and LAMB, added to the root of the second moment."""
    trust: float = 1e-3
    """Trust coefficient of LARS."""
    schedule: Literal["poly", "cosine", "linear", "step", "constant"] = "poly"
    """Schedule of the learning rate after the warm-up; poly has exponent 0.9, as in nnU-Net."""
    step_at: tuple[float, ...] = (0.5, 0.75)
    """Milestones of schedule=step, as shares of the budget after the warm-up."""
    step_factor: float = 0.1
    """Factor of the learning rate at each milestone of schedule=step."""
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

    def rules(self) -> Sequence[Rule]:
        return [
            ("lr", self.lr > 0, "above 0"),
            ("reference_batch", self.reference_batch >= 1, "at least 1"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "at least 0 and below 1, both"),
            ("grow_from", self.grow_from >= 0, "at least 0"),
            ("grow_share", 0 <= self.grow_share < 1, "at least 0 and below 1"),
            ("ema", 0 <= self.ema < 1, "at least 0 and below 1"),
            ("warmup", 0 <= self.warmup < 1, "at least 0 and below 1"),
        ]
