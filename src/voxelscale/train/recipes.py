"""Named settings for large global batches, chosen by experiment (docs/benchmarks.md)."""

from __future__ import annotations

from dataclasses import replace

from voxelscale.config import Config, OptimConfig

LARGE_FROM = 8
"""Workers from which ``recipe=auto`` takes ``large_batch``: below, those of one worker keep their Dice."""

GROW_FROM, GROW_SHARE = 4, 0.4
"""``large_batch`` begins with so many reference batches an update and grows over this share of the run."""

WARMUP, SECOND_MOMENT, RATE = 0.1, 0.95, 0.7
"""Its warm-up, its decay of AdamW's second moment (with few updates a longer memory is not filled), and
what the configured rate is multiplied by before it is scaled."""


def resolve(config: Config, workers: int) -> tuple[Config, str]:
    """The config with its recipe for this number of workers, and a line about it ("" if there is none).

    ``large_batch``: the rate, a little lower, grows with the global batch as suits the optimiser (AdamW's
    with its square root, SGD's linearly; `voxelscale.config.optim.OWN`); a longer warm-up, a shorter second
    moment; and a global batch that grows from a few reference batches to that of all workers (Smith et al.
    2018), as at first it takes many steps, not many samples. The optimiser stays as it is configured.
    """
    recipe, line = config.train.recipe, ""
    if recipe == "auto":
        recipe = "large_batch" if workers >= LARGE_FROM else "none"
        line = f"recipe auto: {recipe} for {workers} workers"
    if recipe == "large_batch":
        config = replace(config, optim=_large_batch(config))
        line = line or f"recipe large_batch for {workers} workers"
    return replace(config, train=replace(config.train, recipe="none")), line


def _large_batch(config: Config) -> OptimConfig:
    optim = config.optim
    return replace(
        optim,
        lr=round(RATE * optim.lr, 12),
        scaling=None,
        warmup=max(optim.warmup, WARMUP),
        betas=(optim.betas[0], min(optim.betas[1], SECOND_MOMENT)),
        grow_from=GROW_FROM * optim.reference_batch,
        grow_share=GROW_SHARE,
    )
