"""A run may be killed at any instant; the same command goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from tests.train.runs import (
    SAMPLES,
    apart,
    begin,
    command,
    final_weights,
    finish,
    identical,
    processes,
    rank_processes,
    seen_in,
    told,
    two_ranks,
    with_train,
)
from voxelscale.config import Config, load
from voxelscale.console import set_verbosity
from voxelscale.errors import VoxelscaleError
from voxelscale.model.bundle import read_bundle
from voxelscale.store import Store
from voxelscale.train.launch import claim, start
from voxelscale.train.log import read_events


@pytest.fixture(scope="module")
def whole_run(config: Config, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert start(config, store.path, run)
    return run


@pytest.fixture(scope="module")
def whole(whole_run: Path) -> dict[str, Tensor]:
    """Its weights."""
    return final_weights(whole_run)


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole_run, tmp_path / "run")


def test_killed_at_a_random_step(
    config: Config, store: Store, tmp_path: Path, whole: dict[str, Tensor]
) -> None:
    run, arguments = tmp_path / "run", command(config, store, tmp_path / "run")
    for least in sorted(random.Random(time.time()).sample(range(8, SAMPLES - 24, 2), 2)):
        process = begin(arguments, run, least)
        process.kill()
        process.communicate()
        assert seen_in(run)[-1] < SAMPLES, "the run must be killed before it ends"
    finish(arguments)
    assert identical(final_weights(run), whole)
    trained = [e["samples"] for e in read_events(run) if e["event"] == "train"]
    assert trained == sorted(set(trained))
    assert trained[-1] == SAMPLES


def test_ctrl_c_saves_and_says_how_to_go_on(
    config: Config, store: Store, tmp_path: Path, whole: dict[str, Tensor]
) -> None:
    run, arguments = tmp_path / "run", command(config, store, tmp_path / "run")
    process = begin(arguments, run, 16)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"voxelscale train {store.path} {run}" in errors
    assert "Traceback" not in errors
    assert 0 < seen_in(run)[-1] < SAMPLES
    finish(arguments)
    assert identical(final_weights(run), whole)


def test_ctrl_c_and_kill_with_two_ranks(
    config: Config, store: Store, tmp_path: Path, whole_two: dict[str, Tensor]
) -> None:
    """The number of workers may change when a run goes on: the stream of samples does not."""
    run = tmp_path / "run"
    two = two_ranks(config, store, run)
    process = begin(two, run, 24)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    process = begin(two, run, 64)
    process.kill()  # the command only; its ranks must notice
    process.communicate()
    assert seen_in(run)[-1] < SAMPLES
    deadline = time.monotonic() + 30
    while any(str(run) in words for _, words in processes()):
        assert time.monotonic() < deadline, "ranks are left behind"
        time.sleep(0.2)
    finish(two_ranks(config, store, run, ranks=1, virtual_workers=2))
    assert apart(final_weights(run), whole_two) <= 1e-5


def test_a_killed_rank_is_started_again(
    config: Config, store: Store, tmp_path: Path, whole_two: dict[str, Tensor]
) -> None:
    run = tmp_path / "run"
    process = begin(two_ranks(config, store, run), run, 16)
    os.kill(random.choice(rank_processes(run)), signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "a rank was lost; resuming from the last checkpoint" in errors
    assert "Traceback" not in errors
    assert apart(final_weights(run), whole_two) <= 1e-5


def test_a_killed_rank_without_restarts_is_reported(
    config: Config, store: Store, tmp_path: Path, whole_two: dict[str, Tensor]
) -> None:
    run = tmp_path / "run"
    process = begin(two_ranks(config, store, run, max_restarts=0), run, 16)
    os.kill(rank_processes(run)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2, errors
    error, hint = told(errors)
    assert "was killed by SIGKILL" in error
    assert "the same command resumes" in hint
    finish(two_ranks(config, store, run))
    assert apart(final_weights(run), whole_two) <= 1e-5


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_a_damaged_checkpoint_is_passed_over(
    config: Config,
    store: Store,
    run: Path,
    whole: dict[str, Tensor],
    harm: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= harm == "flip"
    newest.write_bytes(data[: len(data) - 100 * (harm == "cut")])
    assert start(config, store.path, run)
    assert "truncated or altered" in capsys.readouterr().err
    assert identical(final_weights(run), whole)


def test_what_a_run_leaves_behind(config: Config, run: Path) -> None:
    assert len(seen_in(run)) == config.train.keep
    events = read_events(run)
    assert events[-1]["event"] == "validation"
    assert 0 <= events[-1]["dice"] <= 1
    assert {"loss", "dice", "samples_per_second", "input_wait", "lr"} <= events[0].keys()
    assert list((run / "tensorboard").iterdir())
    assert json.loads((run / "environment.json").read_text())["ranks"] == 1
    bundle = read_bundle(run)
    assert bundle.config == config
    assert bundle.trained["validation_dice"] == events[-1]["dice"]
    assert not list(run.glob(".*"))


def test_going_on_with_another_config_is_refused(
    config: Config, store: Store, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(VoxelscaleError, match=r"started with model\.norm=instance, not group"):
        start(with_train(config, "group"), store.path, run)
    smaller = replace(config, predict=replace(config.predict, smallest_mm3={"lesion": 50.0}))
    claim(tmp_path / "smaller", smaller)
    with pytest.raises(
        VoxelscaleError, match=r"started with predict\.smallest_mm3=\{'lesion': 50.0\}, not"
    ):
        claim(tmp_path / "smaller", config)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(VoxelscaleError, match="holds files but no run"):
        start(config, store.path, tmp_path / "other")


def test_a_run_that_was_refused_before_its_first_step_can_be_corrected(
    config: Config, store: Store, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", with_train(config, samples=16)
    with pytest.raises(VoxelscaleError, match=r"data\.fold is 7"):
        start(replace(config, data=replace(config.data, fold=7)), store.path, run)
    huge = replace(config, data=replace(config.data, patch_size=(3200, 3200, 3200)))
    with pytest.raises(VoxelscaleError, match="GiB are available"):
        start(huge, store.path, run)
    assert not (run / "config.yaml").exists()
    assert start(config, store.path, run)
    assert read_bundle(run).config == config
    assert "out_of_memory" not in (run / "metrics.jsonl").read_text()
    # A run whose config somebody removed is no new one.
    (run / "config.yaml").unlink()
    with pytest.raises(VoxelscaleError, match="holds files but no run"):
        start(config, store.path, run)


def lengthen(run: Path, samples: int, longer: int) -> None:
    """Let a run that has ended go on: otherwise it keeps its budget."""
    text = (run / "config.yaml").read_text()
    assert text.count(f"  samples: {samples}\n") == 1
    (run / "config.yaml").write_text(text.replace(f"  samples: {samples}\n", f"  samples: {longer}\n"))


def test_the_global_batch_stays_when_a_run_goes_on(config: Config, store: Store, tmp_path: Path) -> None:
    """One worker of 2 patches and two virtual ones of 1 are one run; another global batch is refused."""
    run = tmp_path / "run"
    assert start(with_train(config, samples=8, batch_size=2), store.path, run)
    lengthen(run, 8, 16)
    four = with_train(config, samples=16, batch_size=2, virtual_workers=2)
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(VoxelscaleError, match=r"started with a global batch of 2, not 4 \(2 workers x 2\)"):
        start(four, store.path, run)
    assert (run / "config.yaml").read_bytes() == before
    assert start(with_train(config, samples=16, batch_size=1, virtual_workers=2), store.path, run)
    assert seen_in(run)[-1] == 16


@pytest.mark.parametrize("setting", ["optim.grow_from=2", "train.recipe=muon"])
def test_each_workers_batch_stays_where_the_batch_grows(
    config: Config, store: Store, tmp_path: Path, setting: str
) -> None:
    """It grows by whole workers: with another batch of each the updates would be others."""
    run, growing = tmp_path / "run", load(sets=[setting], base=config)
    assert start(with_train(growing, samples=8, batch_size=2, virtual_workers=2), store.path, run)
    with pytest.raises(VoxelscaleError, match=r"started with train\.batch_size=2, not 4"):
        start(with_train(growing, samples=8, batch_size=4, virtual_workers=1), store.path, run)


def test_batch_norms_own_batch_stays_when_a_run_goes_on(
    config: Config, store: Store, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert start(with_train(config, "batch", samples=8, batch_size=2), store.path, run)
    with pytest.raises(VoxelscaleError, match=r"started with train\.batch_size=2, not 1"):
        start(with_train(config, "batch", samples=8, batch_size=1, virtual_workers=2), store.path, run)


def test_a_training_says_what_it_does_and_where_it_goes_on(
    config: Config, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_verbosity(1)
    run = tmp_path / "run"
    few = with_train(config, samples=16, batch_size=2, validate_every=8)
    assert start(few, store.path, run)
    said = capsys.readouterr().err.splitlines()
    events = read_events(run)
    scores = {e["samples"]: e["dice"] for e in events if e["event"] == "validation"}
    assert said[0].startswith("train: CPU, 1 thread, float32, channels last; ")
    assert said[0].endswith(" parameters")
    assert said[1].startswith(
        "train: 3 cases to train on, 1 to validate on; patches of 16 x 16 x 16 voxels"
    )
    assert said[2] == "train: an update: 2 patches x 1 rank; 16 samples in all; a new run"
    assert f"validation dice {scores[16]:.3f} at sample 16" in said[-1]
    lengthen(run, 16, 24)
    assert start(with_train(few, samples=24), store.path, run)
    again = capsys.readouterr().err.splitlines()
    assert "24 samples in all; resumes after 16 of 24 samples (" in again[2]
