"""One update is the same, however the workers are shared out over processes; with real Gloo ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.runs import apart, final_weights, with_train
from voxelscale.config import Config
from voxelscale.store import Store
from voxelscale.train.launch import start

STEPS, BATCH = 20, 4


def train(config: Config, store: Store, run: Path, **how: int) -> Path:
    settings = {"samples": STEPS * BATCH, "checkpoint_every": STEPS * BATCH, **how}
    assert start(with_train(config, config.model.norm, **settings), store.path, run)
    return run


@pytest.mark.parametrize("norm", ["instance", "sync_batch", "group"])
def test_ranks_and_virtual_workers_equal_one_worker(
    tiny: Config, store: Store, tmp_path: Path, norm: str
) -> None:
    config = with_train(tiny, norm)
    # Which voxels are the hardest is a step function: a rounding apart may choose another one.
    config = replace(config, loss=replace(config.loss, top_k=1.0))
    one = final_weights(train(config, store, tmp_path / "one", ranks=1, batch_size=4))
    virtual = train(config, store, tmp_path / "virtual", ranks=1, virtual_workers=2, batch_size=2)
    ranks = train(config, store, tmp_path / "ranks", ranks=2, batch_size=2)
    assert apart(final_weights(virtual), one) <= 1e-4
    assert apart(final_weights(ranks), one) <= 1e-4


def test_plain_batch_norm_sees_each_workers_own_batch(tiny: Config, store: Store, tmp_path: Path) -> None:
    config = with_train(tiny, "batch")
    one = final_weights(train(config, store, tmp_path / "one", ranks=1, batch_size=4))
    virtual = train(config, store, tmp_path / "virtual", ranks=1, virtual_workers=2, batch_size=2)
    ranks = train(config, store, tmp_path / "ranks", ranks=2, batch_size=2)
    assert apart(final_weights(ranks), final_weights(virtual)) <= 1e-4
    # It is another objective than one worker's with the whole batch: the very effect to be emulated.
    assert apart(final_weights(virtual), one) > 1e-3


def test_ranks_times_virtual_workers(tiny: Config, store: Store, tmp_path: Path) -> None:
    config = with_train(tiny, "batch")
    four = train(config, store, tmp_path / "four", ranks=1, virtual_workers=4, batch_size=1)
    mixed = train(config, store, tmp_path / "mixed", ranks=2, virtual_workers=2, batch_size=1)
    assert apart(final_weights(mixed), final_weights(four)) <= 1e-4


@pytest.mark.slow
def test_a_thousand_workers(tiny: Config, store: Store, tmp_path: Path) -> None:
    """1,024 emulated workers of one sample are 512 of two: one update of the same samples."""
    config = with_train(tiny, "group", samples=1024, checkpoint_every=1024)
    many = with_train(config, "group", virtual_workers=1024, batch_size=1)
    fewer = with_train(config, "group", virtual_workers=512, batch_size=2)
    assert start(many, store.path, tmp_path / "many")
    assert start(fewer, store.path, tmp_path / "fewer")
    assert apart(final_weights(tmp_path / "many"), final_weights(tmp_path / "fewer")) <= 1e-4
