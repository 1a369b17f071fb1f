"""One trial of the study: which real ranks train it, and what came of it."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from voxelscale.errors import VoxelscaleError
from voxelscale.experiments.once import Order, Training, TrainOnce, train_once
from voxelscale.scale.study import Stop, Trial, TrialScore


def train_trial(
    trial: Trial, run: Path, stop: Stop, *, store: Path, jobs: int, train: TrainOnce = train_once
) -> TrialScore:
    """Train it in `run`, resuming if it was stopped.

    Real ranks as far as devices go, each emulating its share of the workers.

    Args:
        stop: whether it is to save and stop.
        jobs: trainings that share this machine.
        train: trains once.

    Raises:
        KeyboardInterrupt: it was stopped.
        VoxelscaleError: the training failed for another reason than that it diverged.
    """
    ranks = real_ranks(trial.workers, trial.config.train.ranks, jobs)
    threads = max(1, (os.cpu_count() or 1) // (jobs * ranks))
    virtual = trial.workers // ranks
    how = replace(trial.config.train, ranks=ranks, virtual_workers=virtual, threads=threads)
    config = replace(trial.config, train=how)

    def order() -> Order:
        return "kill" if stop.at_once else "stop" if stop.asked else "go on"

    # However long its last step takes: it is stopped at once only where that is asked for.
    result = train(Training(config=config, store=store, run=run, threads=threads, grace=math.inf), order)
    if result.ending in ("stopped", "killed"):
        raise KeyboardInterrupt
    if result.ending == "diverged":
        return TrialScore(dice=0.0, diverged=True)
    if result.ending != "finished" or result.dice is None:
        raise result.fault or VoxelscaleError(f"{run}: its training has no validation", "train it alone")
    return TrialScore(dice=result.dice, curve=result.curve)


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
