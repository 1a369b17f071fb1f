"""One trial of the study: which devices and real ranks train it, and what came of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

from voxelscale.errors import VoxelscaleError
from voxelscale.experiments.once import Order, Training, TrainOnce, train_once
from voxelscale.experiments.shares import Share
from voxelscale.scale.study import Stop, Trial, TrialScore


def train_trial(
    trial: Trial,
    run: Path,
    stop: Stop,
    *,
    store: Path,
    shares: SimpleQueue[Share],
    train: TrainOnce = train_once,
) -> TrialScore:
    """Train it in `run`, resuming if it was stopped, on a share of the machine of its own.

    Real ranks as far as devices go, each emulating its part of the workers.

    Args:
        stop: whether it is to save and stop.
        shares: one for each training at a time.
        train: trains once.

    Raises:
        KeyboardInterrupt: it was stopped.
        VoxelscaleError: the training failed for another reason than that it diverged.
    """
    share = shares.get()
    try:
        return _train(trial, run, stop, store, share, train)
    finally:
        shares.put(share)


def _train(trial: Trial, run: Path, stop: Stop, store: Path, share: Share, train: TrainOnce) -> TrialScore:
    ranks = real_ranks(trial.workers, trial.config.train.ranks or len(share.gpus))
    threads = share.threads(ranks)
    virtual = trial.workers // ranks
    how = replace(trial.config.train, ranks=ranks, virtual_workers=virtual, threads=threads)
    training = Training(
        config=replace(trial.config, train=how),
        store=store,
        run=run,
        threads=threads,
        environment=share.environment,
        # However long its last step takes: it is stopped at once only where that is asked for.
        grace=math.inf,
    )

    def order() -> Order:
        return "kill" if stop.at_once else "stop" if stop.asked else "go on"

    result = train(training, order)
    if result.ending in ("stopped", "killed"):
        raise KeyboardInterrupt
    if result.ending == "diverged":
        return TrialScore(dice=0.0, diverged=True)
    if result.ending != "finished" or result.dice is None:
        raise result.fault or VoxelscaleError(f"{run}: its training has no validation", "train it alone")
    return TrialScore(dice=result.dice, curve=result.curve)


def real_ranks(workers: int, wanted: int) -> int:
    """The largest number of processes up to `wanted`, at least one, that divides `workers`."""
    return max(n for n in range(1, min(max(1, wanted), workers) + 1) if workers % n == 0)
