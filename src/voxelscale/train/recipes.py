"""Named settings for large global batches, chosen by experiment (docs/benchmarks.md)."""

from __future__ import annotations

import math
from dataclasses import replace

from voxelscale.config import Config, OptimConfig
from voxelscale.errors import VoxelscaleError

LARGE_FROM = 8
"""Workers from which ``recipe=auto`` changes settings: below, those of one worker keep their Dice."""

MUON_RATE = {"adamw": 1.4, "muon": 0.7}
"""What the recipe `muon` multiplies the configured learning rate with, by the optimiser that this is for:
with one worker Muon takes a higher rate than AdamW."""

LARGE_BATCH_RATE = 0.7
"""The same of `large_batch`, for every optimiser."""

SECOND_MOMENT = 0.95
"""Decay of Adam's second moment: with few updates a longer memory is not filled."""

MOMENTUM = 0.85
"""Muon's in its recipe; its usual 0.95 is too long a memory for 100 updates."""

MUON_WARMUP = 0.02
"""Share of the samples."""

LARGE_BATCH_WARMUP = 0.1
GROW_FROM, GROW_SHARE = 4, 0.4
"""Of `large_batch`: reference batches of the first updates, and the share of the samples over which the
global batch grows from them to that of all workers."""

LONGEST = 1.4
"""The most that the recipe `muon` multiplies the samples with."""


def resolve(config: Config, workers: int) -> tuple[Config, str]:
    """The config with its recipe for this number of workers, and a line about it ("" if there is none).

    In all of them the rate grows with the global batch as suits the optimiser (AdamW's and Muon's with its
    square root, SGD's linearly; `voxelscale.config.optim.OWN`), and Adam's second moment is shorter.

    ``muon``: Muon in place of the configured optimiser, with less momentum than usual, its own rate, a
    short warm-up, and more samples (`longer`). ``large_batch``: the configured optimiser with a lower rate,
    a longer warm-up, and a global batch that grows from a few reference batches to that of all workers
    (Smith et al. 2018), as at first a training takes many steps, not many samples. ``auto``: ``muon`` where
    AdamW or Muon is configured, else ``large_batch``, both from `LARGE_FROM` workers on.

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
            recipe = "muon" if config.optim.name in MUON_RATE else "large_batch"
        line = f"recipe auto: {recipe} for {workers} workers"
    if recipe == "muon":
        factor = longer(workers)
        samples = round(factor * config.train.samples)
        config = replace(config, optim=_muon(config), train=replace(config.train, samples=samples))
        line = line or f"recipe muon for {workers} workers"
        line += f", {factor:g} times the samples" if factor > 1 else ""
    elif recipe == "large_batch":
        config = replace(config, optim=_large_batch(config))
        line = line or f"recipe large_batch for {workers} workers"
    return replace(config, train=replace(config.train, recipe="none")), line


def samples_of(config: Config, ranks: int) -> int:
    """Samples that a training by so many ranks takes, its recipe considered; 0 ranks count as one."""
    return resolve(config, max(1, ranks) * config.train.virtual_workers)[0].train.samples


def longer(workers: int) -> float:
    """What `muon` multiplies the samples with: 1 up to 4 workers, and 0.1 more for each doubling, until
    `LONGEST` with 64.

    At the same samples the few updates of many workers keep less of the Dice. In the time that a batch that
    grows takes, a constant one keeps more, as no worker waits meanwhile.
    """
    return round(min(LONGEST, max(1.0, 1 + 0.1 * math.log2(workers / 4))), 2)


def _muon(config: Config) -> OptimConfig:
    factor = MUON_RATE.get(config.optim.name)
    if factor is None:
        problem = (
            f"train.recipe=muon takes AdamW's or Muon's rate, not that of optim.name={config.optim.name}"
        )
        raise VoxelscaleError(problem, "set optim.name=adamw and its rate, or train.recipe=large_batch")
    rate = factor * config.optim.used.lr
    optim = replace(config.optim, name="muon", momentum=MOMENTUM, warmup=MUON_WARMUP, grow_from=0)
    return _scaled(optim, rate)


def _large_batch(config: Config) -> OptimConfig:
    optim = replace(
        config.optim,
        warmup=max(config.optim.warmup, LARGE_BATCH_WARMUP),
        grow_from=GROW_FROM * config.optim.reference_batch,
        grow_share=GROW_SHARE,
    )
    return _scaled(optim, LARGE_BATCH_RATE * config.optim.used.lr)


def _scaled(optim: OptimConfig, rate: float) -> OptimConfig:
    """What both recipes change alike."""
    betas = (optim.betas[0], min(optim.betas[1], SECOND_MOMENT))
    return replace(optim, lr=round(rate, 12), scaling=None, betas=betas)
