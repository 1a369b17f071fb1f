from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.runs import apart, final_weights, with_train
from voxelscale.config import Config, OptimConfig, load
from voxelscale.errors import VoxelscaleError
from voxelscale.store import Store
from voxelscale.train import launch
from voxelscale.train.engine import Engine
from voxelscale.train.launch import start
from voxelscale.train.log import read_events
from voxelscale.train.optim import peak_rate
from voxelscale.train.recipes import LARGE_FROM, resolve, samples_of


@pytest.mark.parametrize("sets", [[], ["optim.scaling=sqrt"], ["optim.grow_from=4"]])
def test_none_changes_nothing_but_says_so_where_dice_is_lost(sets: list[str]) -> None:
    config = load(None, sets)
    assert resolve(config, LARGE_FROM - 1) == (config, "")
    settled, told = resolve(config, 64)
    assert settled == config
    assert ("64 workers" in told and "train.recipe=auto" in told) == (not sets)


@pytest.mark.parametrize("workers", [1, LARGE_FROM - 1, LARGE_FROM, 1024])
def test_auto_goes_by_the_number_of_workers_and_says_so(workers: int) -> None:
    config = load(None, ["train.recipe=auto"])
    settled, told = resolve(config, workers)
    wanted = "muon" if workers >= LARGE_FROM else "none"
    more = {8: ", 1.1 times the samples", 1024: ", 1.4 times the samples"}.get(workers, "")
    assert told == f"recipe auto: {wanted} for {workers} workers{more}"
    named = replace(config, train=replace(config.train, recipe=wanted))  # type: ignore[arg-type]
    assert settled == resolve(named, workers)[0]
    assert (settled.optim != OptimConfig()) == (workers >= LARGE_FROM)


def test_muon_takes_the_rate_of_adamw_alone() -> None:
    sets = ["train.recipe=muon", "optim.name=adamw", "optim.lr=2e-3", "optim.reference_batch=4"]
    config = load(None, sets)
    settled, told = resolve(config, 64)
    optim = settled.optim
    assert told == "recipe muon for 64 workers, 1.4 times the samples"
    assert (optim.name, optim.grow_from) == ("muon", 0)
    assert peak_rate(optim, 64 * 4) == pytest.approx(1.4 * 8 * 2e-3)
    assert optim.used.momentum < 0.95
    own, _ = resolve(load(None, ["train.recipe=muon"]), 64)
    assert own.optim.used.lr == pytest.approx(3.5e-3), "0.7 of Muon's own"
    with pytest.raises(VoxelscaleError, match=r"optim\.name=lars"):
        resolve(load(None, ["optim.name=lars"], config), 64)


def test_more_workers_take_more_samples_until_64() -> None:
    config = load(None, ["train.recipe=muon", "train.samples=1000"])
    found = {workers: samples_of(config, workers) for workers in (1, 4, 8, 16, 32, 64, 128, 4096)}
    assert list(found.values()) == [1000, 1000, 1100, 1200, 1300, 1400, 1400, 1400]
    assert samples_of(load(None, ["train.recipe=large_batch"], config), 64) == 1000
    assert samples_of(load(None, ["train.virtual_workers=8"], config), 0) == 1100, "0 is one"


def test_another_optimiser_is_kept() -> None:
    config = load(None, ["train.recipe=auto", "optim.name=sgd", "optim.lr=0.3", "optim.warmup=0.4"])
    settled, told = resolve(config, 64)
    assert told == "recipe auto: large_batch for 64 workers"
    assert (settled.optim.name, settled.optim.warmup) == ("sgd", 0.4)
    assert settled.optim.lr == pytest.approx(0.7 * 0.3)


@pytest.mark.parametrize(("name", "factor"), [("adamw", 8.0), ("muon", 8.0), ("sgd", 64.0), ("lars", 64.0)])
def test_the_rate_grows_as_suits_the_optimiser(name: str, factor: float) -> None:
    config = load(None, ["train.recipe=large_batch", f"optim.name={name}", "optim.lr=0.1"])
    settled, _ = resolve(config, 64)
    peak = peak_rate(settled.optim, 64 * settled.optim.reference_batch)
    assert peak == pytest.approx(0.7 * 0.1 * factor)
    # The optimiser may still be changed after it, as a study's recipes do.
    other = load(None, ["optim.name=sgd"], settled)
    assert peak_rate(other.optim, 64 * other.optim.reference_batch) == pytest.approx(0.07 * 64)
    assert other.optim.used.momentum == 0.99


def test_a_run_of_before_is_resumed_with_the_values_that_it_lists(
    tiny: Config, store: Store, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = replace(tiny, train=replace(tiny.train, samples=16, checkpoint_every=8))
    assert start(config, store.path, run)
    held = load(run / "config.yaml").optim
    assert (held.momentum, held.weight_decay, held.scaling) == (0.95, 0.01, "none"), "nothing is left open"
    assert start(replace(config, train=replace(config.train, samples=16)), store.path, run)
    sgd = replace(config, optim=replace(config.optim, name="sgd"))
    before = replace(sgd, optim=replace(sgd.optim, momentum=0.99, weight_decay=0.01))
    assert start(before, store.path, tmp_path / "sgd")
    with pytest.raises(VoxelscaleError, match=r"optim\.weight_decay=0\.01, not 3e-05"):
        start(sgd, store.path, tmp_path / "sgd")
    assert start(before, store.path, tmp_path / "sgd")
    adamw = replace(config, optim=replace(config.optim, name="adamw"))  # the default of before
    assert start(adamw, store.path, tmp_path / "adamw")
    with pytest.raises(VoxelscaleError, match=r"optim\.name=adamw, not muon"):
        start(config, store.path, tmp_path / "adamw")


def test_it_trains_and_is_kept_with_the_model(tiny: Config, store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = replace(
        tiny,
        train=replace(tiny.train, samples=96, batch_size=1, virtual_workers=8, recipe="auto"),
        optim=replace(tiny.optim, reference_batch=1),
    )
    assert start(config, store.path, run)
    events = read_events(run)
    assert max(event["lr"] for event in events if event["event"] == "train") > tiny.optim.used.lr
    assert events[-1]["dice"] >= 0
    assert events[-1]["samples"] == 112, "1.1 times as many, in whole updates"


def test_ranks_that_stop_within_the_added_samples_are_not_done(
    tiny: Config, store: Store, tmp_path: Path
) -> None:
    train = replace(tiny.train, samples=96, batch_size=1, ranks=2, virtual_workers=4, recipe="muon")
    config = replace(tiny, train=replace(train, checkpoint_every=8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run_ranks", lambda *_, **__: None)
        patch.setattr(launch, "check_claim", lambda *_: None)
        patch.setattr(launch, "read_events", lambda _: [{"samples": 104}])
        assert not start(config, store.path, tmp_path / "run")
        patch.setattr(launch, "read_events", lambda _: [{"samples": 112}])
        assert start(config, store.path, tmp_path / "run")


def test_a_run_of_what_auto_once_was_is_resumed_by_name(tiny: Config, store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = replace(
        tiny, train=replace(tiny.train, samples=64, batch_size=1, virtual_workers=8, recipe="large_batch")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_stop_file", lambda engine: engine.state.seen >= 16)
        assert not start(config, store.path, run)
    auto = replace(config, train=replace(config.train, recipe="auto"))
    with pytest.raises(VoxelscaleError, match="other settings of the optimiser") as caught:
        start(auto, store.path, run)
    assert "auto once was large_batch" in caught.value.hint
    assert start(config, store.path, run)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_growing_batch_is_the_same_for_ranks_and_virtual_workers(
    tiny: Config, store: Store, tmp_path: Path, norm: str
) -> None:
    folder = tmp_path
    optim = replace(tiny.optim, grow_from=1, grow_share=0.5, ema=0.1, scaling="sqrt")
    config = replace(with_train(tiny, norm, samples=48, batch_size=1, checkpoint_every=48), optim=optim)
    virtual = replace(config, train=replace(config.train, virtual_workers=4))
    ranks = replace(config, train=replace(config.train, ranks=2, virtual_workers=2))
    assert start(virtual, store.path, folder / "virtual")
    assert start(ranks, store.path, folder / "ranks")
    assert apart(final_weights(folder / "ranks"), final_weights(folder / "virtual")) <= 1e-4


def test_growing_and_virtual_sync_batch_are_refused(tiny: Config, store: Store, tmp_path: Path) -> None:
    config = with_train(tiny, "sync_batch", virtual_workers=2)
    config = replace(config, optim=replace(config.optim, grow_from=1))
    with pytest.raises(VoxelscaleError, match="sync_batch"):
        start(config, store.path, tmp_path / "run")


def test_gradients_sent_as_bf16_train_nearly_alike(tiny: Config, store: Store, tmp_path: Path) -> None:
    folder = tmp_path
    config = with_train(tiny, samples=32, batch_size=1, ranks=2, checkpoint_every=32)
    half = replace(config, train=replace(config.train, compress="bf16"))
    assert start(config, store.path, folder / "full")
    assert start(half, store.path, folder / "half")
    assert 0 < apart(final_weights(folder / "half"), final_weights(folder / "full")) < 0.02
