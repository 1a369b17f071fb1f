"""What the tests of whole searches share: searches of seconds or less, and looking at them from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.train.runs import processes

from voxelscale.config import Config, dump, load
from voxelscale.experiments.once import TrainOnce
from voxelscale.search.definition import begin, reopen
from voxelscale.search.place import plan_places
from voxelscale.search.records import read_results
from voxelscale.search.results import SearchResults
from voxelscale.search.search import write_results
from voxelscale.search.worker import Worker

SPACE = {
    "optim.lr": {"float": [1e-3, 3e-2], "log": True},
    "model.filters": {"int": [2, 6], "step": 2},
}


def searched(tiny: Config, space: dict[str, Any] = SPACE, samples: int = 40, **search: Any) -> Config:
    """A search whose trials take seconds."""
    settings = {"trials": 4, "startup": 2, "pruner": "none", "rungs": 1, "lease_seconds": 4, **search}
    config = replace(tiny, train=replace(tiny.train, samples=samples, checkpoint_every=8))
    return replace(config, search=replace(config.search, space=space, **settings))


def search_emulated(
    config: Config, store: Path, out: Path, train: TrainOnce, stopped: Callable[[], bool] = lambda: False
) -> SearchResults:
    """A search whose workers are threads of this process; what it finds."""
    begin(config, store, out)
    faults: list[BaseException] = []

    def work(place: Any) -> None:
        try:
            Worker(reopen(out, store), place, stopped, train).go()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=[place]) for place in plan_places(config.search)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return write_results(reopen(out))


def command(config: Config, store: Path, out: Path, *more: str) -> list[str]:
    """`voxelscale search` with this config."""
    path = out.with_suffix(".config.yaml")
    path.write_text(dump(config))
    base = [sys.executable, "-m", "voxelscale.cli", "search", str(store), str(out)]
    return [*base, "--config", str(path), *more]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Start it in a session of its own."""
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(arguments: list[str], code: int = 0) -> str:
    """Run it to its end; what it printed."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def results_in(out: Path) -> SearchResults:
    """What the search has found by now."""
    found = reopen(out)
    return read_results(found.study, found.config, found.space)


def until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for something that a running search does."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers(out: Path) -> list[int]:
    """The worker processes of a search."""
    return [pid for pid, words in processes() if "voxelscale.search.process" in words and str(out) in words]


def trainings(out: Path) -> list[int]:
    """The training commands of a search."""
    inside = str(out / "trials")
    return [pid for pid, words in processes() if "voxelscale.cli" in words and inside in words]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Those of a run's ``metrics.jsonl``."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def checkpointed(out: Path) -> bool:
    """Whether a trial has written a checkpoint."""
    return any((out / "trials").glob("*/checkpoints/samples_*.ckpt"))


def kill_session(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the command alone; its workers are in sessions of their own."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def undisturbed_dice(tiny_store: Path, out: Path, number: int, folder: Path) -> float:
    """The last validation Dice of a trial's training, run once more without a search."""
    config = load(out / "trials" / f"{number:04d}.yaml")
    path = folder / "alone.yaml"
    path.write_text(dump(config))
    run = folder / "alone"
    words = [sys.executable, "-m", "voxelscale.cli", "-q", "train", str(tiny_store), str(run)]
    subprocess.run([*words, "--config", str(path)], check=True, capture_output=True, timeout=300)
    return float(events(run, "validation")[-1]["dice"])
