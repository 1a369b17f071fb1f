"""One trial of the study as a training command of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from voxelscale.config import dump
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic
from voxelscale.scale.study import Outcome, Trial
from voxelscale.train.log import read_events


def train_trial(trial: Trial, run: Path, store: Path, jobs: int) -> Outcome:
    """Train it with ``voxelscale train`` in `run`, going on where that was stopped.

    Real ranks as far as devices go, each playing its share of the workers.

    Args:
        jobs: trainings that share this machine.

    Raises:
        VoxelscaleError: the training failed for another reason than that it diverged.
    """
    ranks = real_ranks(trial.workers, trial.config.train.ranks, jobs)
    threads = max(1, (os.cpu_count() or 1) // (jobs * ranks))
    virtual = trial.workers // ranks
    how = replace(trial.config.train, ranks=ranks, virtual_workers=virtual, threads=threads)
    config = replace(trial.config, train=how)
    path = run.with_suffix(".yaml")
    write_atomic(path, dump(config))
    command = [sys.executable, "-m", "voxelscale.cli", "--quiet", "train", str(store), str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [*command, "--config", str(path)], env=environment, capture_output=True, text=True, check=False
    )
    events = read_events(run)
    if events and events[-1]["event"] == "diverged":
        return Outcome(dice=0.0, diverged=True)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        raise _fault(run, done.stderr)
    curve = [(int(e["samples"]), float(e["dice"])) for e in events if e["event"] == "validation"]
    return Outcome(dice=curve[-1][1], curve=tuple(curve))


def real_ranks(workers: int, wanted: int, jobs: int) -> int:
    """The largest number of processes that divides `workers` and for which there are devices.

    Args:
        wanted: ``train.ranks``; 0: one a GPU, or one on CPUs, where a rank computes on all cores.
        jobs: trainings that share the devices.
    """
    if not wanted:
        import torch

        wanted = max(1, torch.cuda.device_count() // jobs)
    return max(n for n in range(1, min(wanted, workers) + 1) if workers % n == 0)


def _fault(run: Path, stderr: str) -> VoxelscaleError:
    lines = stderr.strip().splitlines()
    said = [line for line in lines if line.startswith("error: ")] or lines[-1:] or ["no word"]
    hints = [line[6:] for line in lines if line.startswith("hint: ")]
    return VoxelscaleError(f"{run}: {said[-1].removeprefix('error: ')}", hints[-1] if hints else "")
