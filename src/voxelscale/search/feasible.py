"""What a training will cost, known before it costs anything: memory, arithmetic, parameters.

`benchmarks/feasible.py` holds it against processes that train.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from voxelscale.classes import LESION, Classes
from voxelscale.config import Config, DataConfig, LossConfig, OptimConfig, TrainConfig, Triple
from voxelscale.device import choose_precision
from voxelscale.model.unet import plan_pooling
from voxelscale.train.memory import Simulation, needed, seen_at_once, simulate
from voxelscale.train.recipes import samples_of


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a training takes.

    Attributes:
        memory: bytes at the peak of a step, on one device (`voxelscale.train.memory.estimate_memory`).
        flop: floating-point operations of the convolutions and matrix products, forward and backward, of
            all samples; a multiplication and an addition are two. Validations are not in it.
        parameters: of the network.
    """

    memory: int
    flop: float
    parameters: int


def cost_of(
    config: Config, spacing: Triple, device: str, *, channels: int = 1, classes: Classes = LESION
) -> Cost:
    """Memory, arithmetic and parameters of a training, without running it.

    It takes a second; configs that differ in nothing that counts (rate, seed, ...) share one answer. On a
    GPU ``precision=auto`` is taken as bfloat16, because asking the device would initialise it.

    Args:
        spacing: of the store, mm (z, y, x), by which pooling is planned.
        device: ``cpu`` or ``cuda``.
        channels: of the store's images.
        classes: of its labels.

    Raises:
        VoxelscaleError: the patch is too small for the depth, or there is no such network.
    """
    precision = config.train.precision
    if precision == "auto":
        native = device != "cpu" or choose_precision("auto", torch.device("cpu")) == torch.bfloat16
        precision = "bf16" if native else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    step = _simulated(_what_counts(config), spacing, dtype, channels, classes)
    flop = step.flop / seen_at_once(config) * samples_of(config, config.train.ranks)
    return Cost(memory=needed(step, device, config, channels), flop=flop, parameters=step.parameters)


def constraints(
    config: Config,
    spacing: Triple,
    device: str,
    available: int,
    *,
    channels: int = 1,
    classes: Classes = LESION,
) -> dict[str, float]:
    """How far a training is from what can run: feasible where every number is 0 or less.

    ``memory`` is needed / available - 1. ``pooling`` counts the levels whose pooling would halve no axis
    of the patch; memory is then that of the network without them.

    Args:
        available: bytes on one device.
        spacing, device, channels, classes: as for `cost_of`.

    Raises:
        VoxelscaleError: there is no such network.
    """
    dims, depth = config.model.dims, config.model.depth
    pools = plan_pooling(config.data.patch_size[-dims:], spacing[-dims:], depth)
    # An idle pooling leaves everything as it is, so those below it are idle, too.
    idle = sum(max(stride) == 1 for stride in pools) if config.model.name == "unet" else 0
    able = replace(config, model=config.model.of_depth(depth - idle))
    memory = cost_of(able, spacing, device, channels=channels, classes=classes).memory
    return {"memory": memory / max(1, available) - 1, "pooling": float(idle)}


@lru_cache(maxsize=4096)
def _simulated(
    config: Config, spacing: Triple, precision: torch.dtype, channels: int, classes: Classes
) -> Simulation:
    return simulate(config, spacing, precision, channels=channels, classes=classes)


def _what_counts(config: Config) -> Config:
    """A config with what changes a step's memory or arithmetic, all else by default."""
    train, optim = config.train, config.optim
    return Config(
        data=DataConfig(patch_size=config.data.patch_size),
        model=config.model,
        loss=LossConfig(small=0.5 * (config.loss.small > 0), top_k=config.loss.top_k),
        optim=OptimConfig(
            name=optim.name, momentum=0.9 * (optim.used.momentum > 0), ema=0.1 * (optim.ema > 0)
        ),
        train=TrainConfig(
            batch_size=train.batch_size,
            virtual_workers=train.virtual_workers if config.model.norm == "sync_batch" else 1,
            channels_last=train.formatted,
            checkpoint_activations=train.checkpoint_activations,
        ),
    )
