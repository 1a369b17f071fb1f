"""A run may be killed at any instant; the same command goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from tests.train.runs import apart, final_weights, identical, seen_in, with_train
from voxelscale.config import Config, dump
from voxelscale.data.store import Store
from voxelscale.errors import VoxelscaleError
from voxelscale.predict.bundle import read_bundle
from voxelscale.train.launch import start
from voxelscale.train.log import read_events

SAMPLES = 240


@pytest.fixture(scope="module")
def config(tiny: Config) -> Config:
    return with_train(tiny, samples=SAMPLES, checkpoint_every=8, keep=3)


@pytest.fixture(scope="module")
def whole(config: Config, store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of a run that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert start(config, store.path, run)
    return final_weights(run)


@pytest.fixture(scope="module")
def whole_two(config: Config, store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The same with two workers of one sample each: over so many steps the rounding of one worker's
    larger batches would be blown up to 1e-4.
    """
    run = tmp_path_factory.mktemp("whole_two") / "run"
    two = replace(config, train=replace(config.train, virtual_workers=2, batch_size=1))
    assert start(two, store.path, run)
    return final_weights(run)


def command(config: Config, store: Store, run: Path, *more: str) -> list[str]:
    path = run.parent / "config_used.yaml"
    path.write_text(dump(config))
    base = [sys.executable, "-m", "voxelscale.cli", "train", str(store.path), str(run)]
    return [*base, "--config", str(path), *more]


def begin(arguments: list[str], run: Path, least: int) -> subprocess.Popen[str]:
    """Start it and wait until it has seen `least` samples."""
    process = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (seen_in(run) and seen_in(run)[-1] >= least):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def finish(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


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
    two = command(config, store, run, "--set", "train.ranks=2", "--set", "train.batch_size=1")
    process = begin(two, run, 24)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    process = begin(two, run, 64)
    process.kill()  # the command only; its ranks must notice
    process.communicate()
    assert seen_in(run)[-1] < SAMPLES
    deadline = time.monotonic() + 30
    while any(str(run) in line for line in _commands()):
        assert time.monotonic() < deadline, "ranks are left behind"
        time.sleep(0.2)
    one = ["train.ranks=1", "train.virtual_workers=2", "train.batch_size=1"]
    finish(command(config, store, run, *(word for setting in one for word in ("--set", setting))))
    assert apart(final_weights(run), whole_two) <= 1e-5


def _commands() -> list[str]:
    lines = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                lines.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return lines


def test_a_killed_rank_is_told_and_the_run_goes_on(
    config: Config, store: Store, tmp_path: Path, whole_two: dict[str, Tensor]
) -> None:
    run = tmp_path / "run"
    two = command(config, store, run, "--set", "train.ranks=2", "--set", "train.batch_size=1")
    process = begin(two, run, 16)
    ranks = [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit()
        and b"launch\0rank" in _read(p / "cmdline")
        and str(run).encode() in _read(p / "cmdline")
    ]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 2, errors
    assert f"error: {run}: the training failed" in errors
    finish(two)
    assert apart(final_weights(run), whole_two) <= 1e-5


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_a_damaged_checkpoint_is_passed_over(
    config: Config,
    store: Store,
    tmp_path: Path,
    whole: dict[str, Tensor],
    harm: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert start(config, store.path, run)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= harm == "flip"
    newest.write_bytes(data[: len(data) - 100 * (harm == "cut")])
    assert start(config, store.path, run)
    assert "truncated or altered" in capsys.readouterr().err
    assert identical(final_weights(run), whole)


def test_what_a_run_leaves_behind(config: Config, store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(config, store.path, run)
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


def test_going_on_with_another_config_is_refused(config: Config, store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(config, store.path, run)
    with pytest.raises(VoxelscaleError, match=r"begun with model\.norm=instance, not group"):
        start(with_train(config, "group"), store.path, run)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(VoxelscaleError, match="holds files but no run"):
        start(config, store.path, tmp_path / "other")
