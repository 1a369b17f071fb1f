"""Trainings on several machines, each of which is a network namespace: they meet, part, and meet again."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.cluster.machines import ROOT, Machines, environment, machines
from tests.train.runs import apart, final_weights, seen_in, told
from torch import Tensor

from voxelscale.config import Config, dump
from voxelscale.store import Store

SAMPLES = 640
"""Long enough to be disturbed."""

OWN = "voxelscale train store/ run/ --nodes 2"
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Machines]:
    with machines(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def settings(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of two ranks of one sample each."""
    path = tmp_path_factory.mktemp("settings") / "config.yaml"
    train = replace(tiny.train, samples=SAMPLES, batch_size=1, checkpoint_every=16)
    path.write_text(dump(replace(tiny, train=train)))
    return path


@pytest.fixture(scope="module")
def on_one(settings: Path, store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of two ranks on one machine."""
    run = tmp_path_factory.mktemp("one") / "run"
    command = [sys.executable, "-m", "voxelscale.cli", "train", str(store.path), str(run)]
    command += ["--config", str(settings), "--set", "train.ranks=2"]
    subprocess.run(command, check=True, capture_output=True, env=environment())
    return final_weights(run)


def documented(pattern: str, store: Store, run: Path, settings: Path) -> list[str]:
    """The guide's command that begins so, with our folders and one rank a machine."""
    found = re.search(rf"^{pattern}(?:.*\\\n)*.*$", GUIDE, re.MULTILINE)
    assert found, pattern
    words = shlex.split(found.group().replace("\\\n", " "))
    ours = {"store/": str(store.path), "run/": str(run), "8": "1"}
    assert ours.keys() - {"8"} <= set(words), words
    return ["env", *(ours.get(word, word) for word in words), "--config", str(settings)]


def begin(two: Machines, name: str, command: list[str], run: Path, least: int) -> subprocess.Popen[str]:
    """Start it there, and wait until the run has seen `least` samples."""
    process = two.start(name, command)
    deadline = time.monotonic() + 200
    while least and not (seen_in(run) and seen_in(run)[-1] >= least):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [OWN, "TORCH.* torchrun --nnodes 2"])
def test_two_machines_as_documented_train_to_the_weights_of_one(
    two: Machines, settings: Path, store: Store, on_one: dict[str, Tensor], tmp_path: Path, pattern: str
) -> None:
    run = tmp_path / "run"
    command = documented(pattern, store, run, settings)
    for process in [two.start(name, command) for name in two.names]:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    assert apart(final_weights(run), on_one) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["node1", "node2"])
def test_a_machine_that_is_killed_and_started_again_goes_on_with_the_other(
    two: Machines, settings: Path, store: Store, on_one: dict[str, Tensor], tmp_path: Path, victim: str
) -> None:
    run = tmp_path / "run"
    command = documented(OWN, store, run, settings)
    (other,) = set(two.names) - {victim}
    staying = two.start(other, command)
    killed = begin(two, victim, command, run, 128)
    os.killpg(killed.pid, signal.SIGKILL)
    assert seen_in(run)[-1] < SAMPLES, "it must come before the end"
    for process in (two.start(victim, command), staying):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    assert apart(final_weights(run), on_one) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_machine_is_asked_and_both_save_and_stop(
    two: Machines, settings: Path, store: Store, tmp_path: Path, number: int
) -> None:
    run = tmp_path / "run"
    command = documented(OWN, store, run, settings)
    first = two.start("node1", command)
    second = begin(two, "node2", command, run, 64)
    os.kill(second.pid, number)
    for process in (first, second):
        out, _ = process.communicate(timeout=100)
        assert process.returncode == 130, out
        assert "stopped and saved" in out
    assert 64 <= seen_in(run)[-1] < SAMPLES


def test_a_machine_that_cannot_be_reached_is_one_error(
    two: Machines, settings: Path, store: Store, tmp_path: Path
) -> None:
    command = documented(OWN, store, tmp_path / "run", settings)
    two.cut("node1")
    both = [two.start(name, [*command, "--wait", "3"]) for name in two.names]
    errors = [told(process.communicate(timeout=100)[0])[0] for process in both]
    assert errors[0] == "error: not all of 2 machines came to node1:29500 within 3 s"
    assert errors[1].startswith("error: node1:29500 was not reached within 3 s (")
    assert [process.returncode for process in both] == [2, 2]
    assert not (tmp_path / "run").exists()


def test_ctrl_c_ends_the_wait(two: Machines, settings: Path, store: Store, tmp_path: Path) -> None:
    command = documented(OWN, store, tmp_path / "run", settings)
    process = two.start("node1", command)
    assert process.stdout
    assert process.stdout.readline() == "waiting for 1 other machine at node1:29500, at most 300 s\n"
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 130, out


@pytest.mark.slow
def test_an_error_of_a_rank_is_reported_on_every_machine(
    two: Machines, settings: Path, store: Store, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = documented(OWN, store, run, settings)
    wild = ("name=sgd", "lr=1e30", "warmup=0", "gradient_clipping=0")
    command += [word for setting in wild for word in ("--set", f"optim.{setting}")]
    command += ["--set", "model.norm=none"]
    for process in [two.start(name, command) for name in two.names]:
        error, _ = told(process.communicate(timeout=200)[0])
        assert "the training diverged" in error
        assert process.returncode == 2


@pytest.mark.slow
def test_ranks_that_nobody_starts_again_tell_once_of_a_lost_one(
    settings: Path, store: Store, tmp_path: Path
) -> None:
    run, ranks = tmp_path / "run", []
    for rank in range(3):
        told_by_srun = {
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "3",
            "SLURM_STEP_TASKS_PER_NODE": "3",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
        }
        command = [sys.executable, "-m", "voxelscale.cli", "--quiet", "train", str(store.path), str(run)]
        command += ["--config", str(settings), "--set", "train.samples=6000"]
        variables = {**environment(), **told_by_srun}
        ranks.append(subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True))
    deadline = time.monotonic() + 200
    while not seen_in(run):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks[2].kill()
    errors = "".join(rank.communicate(timeout=100)[1] for rank in ranks[:2])
    assert told(errors)[0] == f"error: {run}: another rank was lost"
    assert [rank.returncode for rank in ranks[:2]] == [2, 2]
