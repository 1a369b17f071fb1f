"""Named settings for large global batches."""

from __future__ import annotations

from dataclasses import replace

from voxelscale.config import Config

LARGE_FROM = 8
"""Workers from which ``recipe=auto`` takes ``large_batch``: up to there the finding is that one worker's
settings keep their Dice."""


def resolve(config: Config, workers: int) -> tuple[Config, str]:
    """The config with its recipe applied, and what to tell about it ("" where there is none)."""
    recipe = config.train.recipe
    if recipe == "auto":
        recipe = "large_batch" if workers >= LARGE_FROM else "none"
    if recipe == "none":
        return replace(config, train=replace(config.train, recipe="none")), ""
    return config, ""
