"""A training as a child process: asked to stop, killed, and gone with the process that started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from tests.train.runs import SAMPLES, apart, final_weights, processes, rank_processes, seen_in, with_train
from voxelscale.config import Config, dump, load
from voxelscale.errors import VoxelscaleError
from voxelscale.store import Store
from voxelscale.train.child import Child, start_child
from voxelscale.train.log import STOP_FILE, read_events

ENDLESS = 10**6
"""Samples of a training that will not end by itself."""


def on(config: Config, ranks: int, samples: int) -> Config:
    return with_train(config, ranks=ranks, virtual_workers=2 // ranks, batch_size=1, samples=samples)


def until(done: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def begun(child: Child, least: int = 16) -> None:
    """Wait until it has seen so many samples."""
    run = child.run
    until(lambda: (seen_in(run) and seen_in(run)[-1] >= least) or child.poll() is not None, "no checkpoint")
    assert child.poll() is None, child.fault()


def left_of(run: Path) -> list[str]:
    """The processes that have to do with a run."""
    return [words for _, words in processes() if str(run) in words]


@pytest.mark.parametrize("ranks", [1, 2])
def test_asked_to_stop_it_saves_and_the_next_goes_on(
    config: Config, store: Store, tmp_path: Path, whole_two: dict[str, Tensor], ranks: int
) -> None:
    run, settings = tmp_path / "runs" / "one", on(config, ranks, SAMPLES)
    child = start_child(settings, store.path, run, threads=1)
    begun(child)
    child.ask_to_stop()
    assert child.wait(0) in (None, 130)
    assert child.wait(60) == 130, child.fault()
    assert child.poll() == 130
    assert 0 < seen_in(run)[-1] < SAMPLES
    assert not (run / STOP_FILE).exists()
    assert load(run.with_suffix(".yaml")) == settings
    again = start_child(settings, store.path, run, threads=1)
    assert again.wait() == 0, again.fault()
    assert apart(final_weights(run), whole_two) <= 1e-5


def test_what_is_asked_before_it_listens_is_not_lost(config: Config, store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start_child(on(config, 1, ENDLESS), store.path, run, threads=1)
    child.ask_to_stop()
    assert not run.exists(), "it has had no time"
    assert child.wait(120) == 130, child.fault()
    assert seen_in(run)
    assert not (run / STOP_FILE).exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_it_leaves_nobody(config: Config, store: Store, tmp_path: Path, ranks: int) -> None:
    run = tmp_path / "run"
    child = start_child(on(config, ranks, ENDLESS), store.path, run, threads=1)
    begun(child)
    assert len(rank_processes(run)) == (0 if ranks == 1 else 2)
    (run / STOP_FILE).touch()
    child.kill()
    assert not left_of(run)
    assert not (run / STOP_FILE).exists()
    assert child.poll() == child.wait() == -signal.SIGKILL
    assert "exit code -9" in child.fault().message
    child.kill()  # twice is once


def test_a_command_that_somebody_kills_counts_as_running_until_its_ranks_are_gone(
    config: Config, store: Store, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    child = start_child(on(config, 2, ENDLESS), store.path, run, threads=1)
    begun(child)
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.wait()
    assert child.poll() is None
    assert child.wait(30) == -signal.SIGKILL
    assert not left_of(run)


PARENT = """
import sys
from pathlib import Path
from voxelscale.config import load
from voxelscale.train.child import start_child
child = start_child(load(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]), threads=1)
print(child.process.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_ends_when_its_parent_is_killed(
    config: Config, store: Store, tmp_path: Path, ranks: int
) -> None:
    run, path = tmp_path / "run", tmp_path / "config.yaml"
    path.write_text(dump(on(config, ranks, ENDLESS)))
    arguments = [sys.executable, "-c", PARENT, str(path), str(store.path), str(run)]
    parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    until(lambda: seen_in(run), "no checkpoint")
    environments = [environment_of(number) for number in (pid, *rank_processes(run))]
    assert [f"VOXELSCALE_PARENT={parent.pid}" in words for words in environments] == [True] + [False] * (
        0 if ranks == 1 else 2
    )
    parent.kill()
    parent.communicate()
    until(lambda: not left_of(run), f"left behind: {left_of(run)}", seconds=15)


def environment_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def test_its_fault_is_reported(config: Config, tmp_path: Path) -> None:
    child = start_child(config, tmp_path / "no_store", tmp_path / "run", threads=1)
    assert child.wait() == 2
    fault = child.fault()
    assert isinstance(fault, VoxelscaleError)
    assert fault.message.startswith(f"{tmp_path / 'run'}: ")
    assert "no_store/dataset.json: not there" in fault.message
    assert fault.hint


@pytest.mark.usefixtures("cold_starts")
def test_its_environment(config: Config, tmp_path: Path) -> None:
    """What is given lies over this process's own."""
    child = start_child(
        config, tmp_path / "store", tmp_path / "run", threads=3, environment={"CUDA_VISIBLE_DEVICES": "5"}
    )
    try:
        until(lambda: "OMP_NUM_THREADS=3" in environment_of(child.process.pid), "no threads", seconds=5)
        assert "CUDA_VISIBLE_DEVICES=5" in environment_of(child.process.pid)
    finally:
        child.kill()


TOO_LARGE = """
import sys, torch
from voxelscale import cli
from voxelscale.train import engine

def too_large(self, now, stream):
    if self.state.seen >= 8 and self.workers.rank == self.workers.ranks - 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return step(self, now, stream)

step, engine.Engine._step = engine.Engine._step, too_large
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_out_of_memory_in_a_command(config: Config, store: Store, tmp_path: Path, ranks: int) -> None:
    """In any rank: two lines to a person, an event to the process that started it."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(TOO_LARGE))
    run = tmp_path / "run"
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    settings = on(config, ranks, SAMPLES)
    child = start_child(settings, store.path, run, threads=1, environment={"PYTHONPATH": path})
    assert child.wait(120) == 2
    fault = child.fault()
    assert "a step of 1 patches of 16x16x16 voxels does not fit; " in fault.message
    assert fault.message.count(str(run)) == 1
    assert "--fit-memory" in fault.hint
    noted = [event for event in read_events(run)[-2:] if event["event"] == "out_of_memory"]
    assert json.dumps(noted) == json.dumps([{"event": "out_of_memory", "samples": noted[0]["samples"]}])
    assert 8 <= noted[0]["samples"] <= 10
    assert seen_in(run)[-1] == 8
