"""Update rules and schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from voxelscale.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or SGD with Nesterov momentum; no decay of norms and biases."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def learning_rate(config: OptimConfig, seen: int, samples: int) -> float:
    """The rate for the step that begins after `seen` of `samples` samples.

    Linear warm-up over the share `config.warmup`, then poly ``(1 - t) ** 0.9`` (nnU-Net), cosine
    ``(1 + cos(pi t)) / 2`` (Loshchilov and Hutter 2017) or constant. A function of samples, not of
    steps: it is the same for every number of workers.
    """
    progress = min(seen / samples, 1.0)
    if progress < config.warmup:
        # The first step must not be wasted on a rate of zero.
        return config.lr * max(progress / config.warmup, 0.02)
    t = (progress - config.warmup) / (1 - config.warmup)
    factor = {"poly": (1 - t) ** 0.9, "cosine": (1 + math.cos(math.pi * t)) / 2, "constant": 1.0}
    return float(config.lr * factor[config.schedule])


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give it to every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
