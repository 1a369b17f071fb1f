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
    """How the rate grows with the global batch."""
    reference_batch: int = 2
    """Global batch (patches per update, all workers together) for which `lr` was tuned."""
    max_lr: float = 0.0
    """The scaled rate is never above this; 0: no limit."""
    weight_decay: float = 1e-2
    """Decoupled (AdamW, LAMB, Muon) or L2 (SGD, LARS); norms and biases are excluded."""
    momentum: float = 0.99
    """Of SGD (with Nesterov's look-ahead), LARS and Muon."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the two moments of AdamW and LAMB, and of Muon's AdamW part."""
    eps: float = 1e-8
    """Added to the root of AdamW's and LAMB's second moment."""
    trust: float = 1e-3
    """LARS's coefficient of the layer-wise rate."""
    schedule: Literal["poly", "cosine", "linear", "step", "constant"] = "poly"
    """How the rate falls after the warm-up; poly has exponent 0.9, as nnU-Net's."""
    step_at: tuple[float, ...] = (0.5, 0.75)
    """Shares of the budget left after the warm-up at which schedule=step lowers the rate."""
    step_factor: float = 0.1
    """What schedule=step multiplies the learning rate by at each of them."""
    warmup: float = 0.05
    """Share of the samples over which the rate rises linearly from 0."""
    gradient_clipping: float = 12.0
    """Gradient clipping: maximum norm of the gradient; 0: no clipping."""
    grow_from: int = 0
    """Global batch of the first updates, from which it doubles up to that of all workers; 0: full from the
    start."""
    grow_share: float = 0.25
    """Share of the budget over which it grows, the same number of updates at each size."""
    ema: float = 0.0
    """Time constant of the weights' moving average (EMA) as a share of the budget, so the same for every
    number of workers; the averaged weights are what is validated and kept. 0: none."""

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
