"""What the tests of training share: running it, and looking at its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from voxelscale.config import Config
from voxelscale.predict.bundle import load_untrusted


def with_train(config: Config, norm: str = "instance", **train: int) -> Config:
    return replace(
        config,
        train=replace(config.train, **train),  # type: ignore[arg-type]
        model=replace(config.model, norm=norm),  # type: ignore[arg-type]
    )


def final_weights(run: Path) -> dict[str, Tensor]:
    """Weights and buffers of the newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("samples_*.ckpt"))[-1]
    weights: dict[str, Tensor] = load_untrusted(newest)["model"]
    return weights


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """||a - b|| / ||b|| over all weights and running statistics."""
    assert a.keys() == b.keys()
    return float((_flat(a) - _flat(b)).norm() / _flat(b).norm())


def _flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([w.double().flatten() for w in weights.values() if w.is_floating_point()])


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def seen_in(run: Path) -> Sequence[int]:
    """Samples after which there is a checkpoint."""
    return sorted(int(p.stem.split("_")[1]) for p in (run / "checkpoints").glob("samples_*.ckpt"))
