"""One update is the same, however the workers are shared out over processes; with real Gloo ranks.

Weights are compared over the stretch that training has moved them, not over their size: a training that
goes elsewhere is then a large number, however little it has moved. Only rounding may tell two trainings
apart. In fp32 it is far below any limit in the first update, but over many a top-k loss may choose another
voxel and a ReLU fall the other way. In bf16 Muon and AdamW may move weights whose gradients are rounding
alone as far as any other. So there the gradients themselves are compared, as the first update of plain SGD,
and after many updates the limit is the arithmetic's own rounding: how far one worker's bf16 is from fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.runs import apart, final_weights, with_train
from voxelscale.config import Config
from voxelscale.store import Store
from voxelscale.train.launch import start
from voxelscale.train.loop import patch_task

STEPS, BATCH = 20, 4

ONE = {"ranks": 1, "batch_size": 4}
VIRTUAL = {"ranks": 1, "virtual_workers": 2, "batch_size": 2}
RANKS = {"ranks": 2, "batch_size": 2}

Weights = dict[str, Tensor]
Train = Callable[..., Weights]


@pytest.fixture
def train(store: Store, tmp_path: Path) -> Train:
    """The weights after `steps` updates of a config, with other settings of ``train``."""

    def trained(config: Config, how: dict[str, int], steps: int = STEPS, **more: Any) -> Weights:
        run = tmp_path / f"run_{len(list(tmp_path.iterdir()))}"
        settings = {"samples": steps * BATCH, "checkpoint_every": steps * BATCH, **how, **more}
        assert start(with_train(config, config.model.norm, **settings), store.path, run)
        return final_weights(run)

    return trained


def initial(config: Config, store: Store) -> Weights:
    """A network's parameters before training."""
    model = patch_task(config, store, torch.device("cpu")).model
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def distance(a: Weights, b: Weights, first: Weights) -> float:
    """||a - b|| over ||b - first||, of the parameters."""

    def far(one: Weights, other: Weights) -> float:
        return math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in first))

    return far(a, b) / far(b, first)


@pytest.mark.parametrize("norm", ["instance", "sync_batch", "group"])
def test_ranks_and_virtual_workers_equal_one_worker(
    tiny: Config, store: Store, train: Train, norm: str
) -> None:
    """With the default loss and optimiser: the first update to rounding, and twenty nearly."""
    config = with_train(tiny, norm)
    first = initial(config, store)
    assert config.loss.top_k < 1
    assert distance(train(config, VIRTUAL, 1), train(config, ONE, 1), first) <= 1e-4
    one = train(config, ONE)
    assert distance(train(config, VIRTUAL), one, first) <= 3e-2
    assert distance(train(config, RANKS), one, first) <= 3e-2


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_workers_are_equal_in_bf16(tiny: Config, store: Store, train: Train, norm: str) -> None:
    config = with_train(tiny, norm)
    first = initial(config, store)
    half = replace(config, train=replace(config.train, precision="bf16"))
    plain = replace(half, optim=replace(half.optim, name="sgd", momentum=0.0, weight_decay=0.0))
    # Eight bits of mantissa: a rounding is up to 0.004.
    assert distance(train(plain, VIRTUAL, 1), train(plain, ONE, 1), first) <= 2e-2
    one, full = train(half, ONE), train(config, ONE)
    rounding = distance(one, full, first)
    assert 0 < rounding < 0.2
    assert distance(train(half, VIRTUAL), one, first) <= rounding
    if norm == "instance":  # ranks take seconds to start, and the norm makes no difference to them
        assert distance(train(half, RANKS), one, first) <= rounding


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_batch_norm_sees_each_workers_own_batch(
    tiny: Config, store: Store, train: Train, precision: str
) -> None:
    """Two workers of two samples are not one of four: another objective, whatever the arithmetic."""
    config = with_train(tiny, "batch")
    config = replace(config, train=replace(config.train, precision=precision))  # type: ignore[arg-type]
    first = initial(config, store)
    one, virtual = train(config, ONE), train(config, VIRTUAL)
    if precision == "fp32":
        assert distance(train(config, RANKS), virtual, first) <= 3e-2
    assert distance(virtual, one, first) > 0.1


def test_ranks_times_virtual_workers(tiny: Config, store: Store, train: Train, tmp_path: Path) -> None:
    """The average in a checkpoint is that of all ranks' statistics, too."""
    config = with_train(tiny, "batch")
    config = replace(config, optim=replace(config.optim, ema=0.3))
    four = train(config, {"ranks": 1, "virtual_workers": 4, "batch_size": 1})
    mixed = train(config, {"ranks": 2, "virtual_workers": 2, "batch_size": 1})
    assert distance(mixed, four, initial(config, store)) <= 3e-2
    averages = [final_weights(tmp_path / run, "average") for run in ("run_0", "run_1")]
    assert apart(*({n: w for n, w in each.items() if "running" in n} for each in averages)) <= 1e-3


@pytest.mark.slow
def test_a_thousand_workers(tiny: Config, store: Store, tmp_path: Path) -> None:
    """1,024 emulated workers of one sample are 512 of two: one update of the same samples."""
    config = with_train(tiny, "group", samples=1024, checkpoint_every=1024)
    many = with_train(config, "group", virtual_workers=1024, batch_size=1)
    fewer = with_train(config, "group", virtual_workers=512, batch_size=2)
    assert start(many, store.path, tmp_path / "many")
    assert start(fewer, store.path, tmp_path / "fewer")
    assert apart(final_weights(tmp_path / "many"), final_weights(tmp_path / "fewer")) <= 1e-4
