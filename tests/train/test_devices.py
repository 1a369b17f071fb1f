"""A training step on a device without contents: it mixes no devices, and the host never waits for it.

On PyTorch's ``meta`` device reading a value, choosing by one, and an operation with tensors of the
processor are errors, so what runs there queues its work and goes on.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelscale.config import Config
from voxelscale.model.losses import dice_cross_entropy
from voxelscale.model.unet import UNet
from voxelscale.ranks.workers import Workers
from voxelscale.train.engine import Engine
from voxelscale.train.task import Task

META = torch.device("meta")


def task() -> Task:
    class Numbers:
        def __getitem__(self, index: int) -> int:
            return index

    def collate(samples: Any) -> tuple[Tensor, Tensor]:
        shape = (len(samples), 1, 16, 16, 16)
        return torch.empty(shape, device=META), torch.empty(shape, device=META)

    with META:
        model = UNet(dims=3, depth=3, filters=4, norm="batch", deep_supervision=False)
    return Task(
        model=model,
        loss=lambda output, target: dice_cross_entropy(output, target, top_k=0.1, small=0.5),
        source=Numbers(),
        collate=collate,
        describe=str,
    )


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "lamb", "muon"])
def test_a_step_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two virtual workers, clipping, averaged weights: all that an update is."""
    config = Config()
    train = replace(config.train, samples=64, batch_size=2, virtual_workers=2, precision="fp32")
    optim = replace(config.optim, name=name, ema=0.1)  # type: ignore[arg-type]
    config = replace(config, train=train, optim=optim)
    # PyTorch has no fused AdamW for this device.
    adamw = partial(torch.optim.AdamW, foreach=True)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, **how: adamw(groups, **how))
    engine = Engine(task(), config, None, Workers(rank=0, ranks=1, virtual=2, device=META), 2)
    stream = engine._micro_batches()
    for step, _ in zip(engine.clock.steps(0), range(3), strict=False):
        engine._step(step, stream)
    assert all(p.grad is not None and p.grad.device == META for p in engine.model.parameters())


def test_a_wait_would_be_seen() -> None:
    """What makes the others able to fail."""
    for wait in (
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x + torch.ones(3),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait(torch.ones(3, device=META))
