"""Named settings for large global batches, chosen by experiment (docs/benchmarks.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from voxelscale.config import Config, OptimConfig
from voxelscale.errors import VoxelscaleError

LARGE_FROM = 8
"""Workers from which ``recipe=auto`` changes settings: below, those of one worker keep their Dice."""

MUONS_RATE = {"adamw": 1.4, "muon": 0.7}
"""What the recipe `muon` multiplies the configured learning rate with, by the optimiser that this is for:
with one worker Muon takes a higher rate than AdamW."""

LARGE_BATCHS_RATE = 0.7
"""The same of `large_batch`, for every optimiser."""

SECOND_MOMENT = 0.95
"""Decay of Adam's second moment: with few updates a longer memory is not filled."""

MOMENTUM = 0.85
"""Muon's in its recipe; its usual 0.95 is too long a memory for 100 updates."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe changes.

    Attributes:
        warmup: share of the samples.
        grow_from: reference batches of the first updates.
        grow_share: share of the samples over which the global batch grows to that of all workers.
    """

    warmup: float
    grow_from: int
    grow_share: float


MUON = Recipe(warmup=0.02, grow_from=16, grow_share=0.2)
LARGE_BATCH = Recipe(warmup=0.1, grow_from=4, grow_share=0.4)


def resolve(config: Config, workers: int) -> tuple[Config, str]:
    """The config with its recipe for this number of workers, and a line about it ("" if there is none).

    In all of them the rate grows with the global batch as suits the optimiser (AdamW's and Muon's with its
    square root, SGD's linearly; `voxelscale.config.optim.OWN`), Adam's second moment is shorter, and the
    global batch grows from a few reference batches to that of all workers (Smith et al. 2018), as at first
    a training takes many steps, not many samples.

    ``muon``: Muon in place of the configured optimiser, with less momentum than usual, its own rate and
    a short warm-up. ``large_batch``: the configured optimiser with a lower rate, a longer warm-up and more
    growth, so more updates. ``auto``: ``muon`` where AdamW or Muon is configured, else ``large_batch``,
    both from `LARGE_FROM` workers on.

    Raises:
        VoxelscaleError: ``muon`` with the learning rate of another kind of optimiser.
    """
    recipe, line = config.train.recipe, ""
    plain = config.optim.used.scaling == "none" and not config.optim.grow_from
    if recipe == "none" and workers >= LARGE_FROM and plain:
        line = f"{workers} workers with one worker's settings lose Dice; train.recipe=auto keeps most of it"
    if recipe == "auto":
        recipe = "none"
        if workers >= LARGE_FROM:
            recipe = "muon" if config.optim.name in MUONS_RATE else "large_batch"
        line = f"recipe auto: {recipe} for {workers} workers"
    if recipe != "none":
        config = replace(config, optim=_muon(config) if recipe == "muon" else _large_batch(config))
        line = line or f"recipe {recipe} for {workers} workers"
    return replace(config, train=replace(config.train, recipe="none")), line


def _muon(config: Config) -> OptimConfig:
    factor = MUONS_RATE.get(config.optim.name)
    if factor is None:
        problem = (
            f"train.recipe=muon takes AdamW's or Muon's rate, not that of optim.name={config.optim.name}"
        )
        raise VoxelscaleError(problem, "set optim.name=adamw and its rate, or train.recipe=large_batch")
    rate = factor * config.optim.used.lr
    optim = replace(config.optim, name="muon", momentum=MOMENTUM, warmup=MUON.warmup)
    return _with(MUON, optim, rate)


def _large_batch(config: Config) -> OptimConfig:
    optim = replace(config.optim, warmup=max(config.optim.warmup, LARGE_BATCH.warmup))
    return _with(LARGE_BATCH, optim, LARGE_BATCHS_RATE * config.optim.used.lr)


def _with(recipe: Recipe, optim: OptimConfig, rate: float) -> OptimConfig:
    """What all recipes change alike."""
    return replace(
        optim,
        lr=round(rate, 12),
        scaling=None,
        betas=(optim.betas[0], min(optim.betas[1], SECOND_MOMENT)),
        grow_from=recipe.grow_from * optim.reference_batch,
        grow_share=recipe.grow_share,
    )
