"""One training of many, as a real process: how it ends, and what its caller learns of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.train.runs import processes, seen_in, with_train

from voxelscale.config import Config
from voxelscale.experiments.once import Order, Training, TrainingResult, train_once
from voxelscale.store import Store
from voxelscale.train.log import STOP_FILE, note_out_of_memory, read_events

ENDLESS = 10**6
"""Samples of a training that will not end by itself."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def training(config: Config, store: Store, run: Path, samples: int = 24, **how: float) -> Training:
    config = with_train(config, samples=samples, checkpoint_every=8)
    return Training(config=config, store=store.path, run=run, threads=1, **how)  # type: ignore[arg-type]


def go_on() -> Order:
    return "go on"


def once_begun(
    run: Path, order: Order = "go on", do: Callable[[], None] = lambda: None
) -> Callable[[], Order]:
    """The order to a training that has written a checkpoint; `do` is done once before."""
    done = False

    def decide() -> Order:
        nonlocal done
        if not seen_in(run):
            return "go on"
        if not done:
            done = True
            do()
        return order

    return decide


def pids_of(run: Path) -> list[int]:
    return [pid for pid, words in processes() if str(run) in words]


def kill(run: Path, number: signal.Signals) -> None:
    for pid in pids_of(run):
        os.kill(pid, number)


def points(run: Path) -> tuple[tuple[int, float], ...]:
    return tuple((e["samples"], e["dice"]) for e in read_events(run) if e["event"] == "validation")


def test_it_finishes_and_every_validation_is_reported_once(tiny: Config, store: Store, run: Path) -> None:
    config = replace(tiny, train=replace(tiny.train, validate_at=(8, 16)))
    seen: list[tuple[int, float]] = []

    def validated(samples: int, dice: float) -> bool:
        seen.append((samples, dice))
        return False

    result = train_once(training(config, store, run), go_on, validated)
    assert result == TrainingResult(ending="finished", curve=points(run))
    assert [samples for samples, _ in result.curve] == [8, 16, 24]
    assert result.dice == result.curve[-1][1]
    assert tuple(seen) == result.curve
    assert (run / "model.vxs").is_file()


@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_by_a_validation_it_saves_and_goes_on(
    tiny: Config, store: Store, run: Path, ranks: int
) -> None:
    train = replace(tiny.train, validate_at=(8,), ranks=ranks)
    job = training(replace(tiny, train=train), store, run, samples=2000)
    stopped = train_once(job, go_on, lambda samples, dice: samples == 8)
    assert (stopped.ending, stopped.fault) == ("stopped", None)
    assert stopped.curve == points(run)
    assert 8 <= seen_in(run)[-1] < 2000
    assert not pids_of(run)
    assert not (run / STOP_FILE).exists()
    if ranks == 1:
        seen: list[int] = []

        def validated(samples: int, dice: float) -> bool:
            seen.append(samples)
            return False

        again = train_once(job, once_begun(run, "stop"), validated)
        assert again.ending == "stopped"
        assert seen == [8], "an earlier part's validation is reported, too"
        assert again.curve == stopped.curve


def test_it_is_stopped_by_an_order(tiny: Config, store: Store, run: Path) -> None:
    result = train_once(training(tiny, store, run, ENDLESS), once_begun(run, "stop"))
    assert result == TrainingResult(ending="stopped")
    assert result.dice is None
    assert seen_in(run)


def test_it_is_killed_by_an_order(tiny: Config, store: Store, run: Path) -> None:
    result = train_once(training(tiny, store, run, ENDLESS), once_begun(run, "kill"))
    assert result.ending == "killed"
    assert not pids_of(run)


def test_it_is_stopped_after_its_time(tiny: Config, store: Store, run: Path) -> None:
    result = train_once(training(tiny, store, run, ENDLESS, seconds=3.0, grace=300.0), go_on)
    assert result == TrainingResult(ending="late")
    assert seen_in(run), "it has saved"


def test_one_that_hangs_is_killed_after_its_time(tiny: Config, store: Store, run: Path) -> None:
    job = training(tiny, store, run, ENDLESS, seconds=8.0, grace=1.0)
    result = train_once(job, once_begun(run, do=lambda: kill(run, signal.SIGSTOP)))
    assert result.ending == "late"
    assert not pids_of(run)


def test_one_that_somebody_kills_has_failed(tiny: Config, store: Store, run: Path) -> None:
    job = training(tiny, store, run, ENDLESS)
    result = train_once(job, once_begun(run, do=lambda: kill(run, signal.SIGKILL)))
    assert result.ending == "failed"
    assert result.fault
    assert "exit code -9" in result.fault.message


def test_one_that_diverges_says_so(tiny: Config, store: Store, run: Path) -> None:
    wild = replace(tiny, optim=replace(tiny.optim, name="sgd", lr=1e30, gradient_clipping=0.0, warmup=0.0))
    wild = replace(wild, model=replace(wild.model, norm="none"))
    result = train_once(training(wild, store, run), go_on)
    assert result.ending == "diverged"
    assert result.fault
    assert "the loss is not finite" in result.fault.message


def test_one_that_needs_too_much_memory_says_so(tiny: Config, store: Store, run: Path) -> None:
    large = replace(tiny, data=replace(tiny.data, patch_size=(1600, 1600, 1600)))
    result = train_once(training(large, store, run), go_on)
    assert result.ending == "out of memory"
    assert result.fault
    assert "1600x1600x1600" in result.fault.message


def test_why_an_earlier_one_ended_is_not_why_this_one_does(tiny: Config, tmp_path: Path, run: Path) -> None:
    """One that ends before it has a log of its own."""
    run.mkdir()
    note_out_of_memory(run)
    job = Training(config=tiny, store=tmp_path / "no_store", run=run, threads=1)
    assert train_once(job, go_on).ending == "failed"


def test_one_that_cannot_begin_has_failed(tiny: Config, tmp_path: Path, run: Path) -> None:
    job = Training(config=tiny, store=tmp_path / "no_store", run=run, threads=1)
    result = train_once(job, go_on)
    assert result.ending == "failed"
    assert result.fault
    assert "no_store/dataset.json: not there" in result.fault.message
    assert result.fault.hint
