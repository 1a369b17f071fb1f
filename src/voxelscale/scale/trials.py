"""One trial of the study as a training command of its own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from voxelscale.scale.study import Stop, Trial, TrialScore
from voxelscale.train.child import Child, start_child
from voxelscale.train.log import read_events


def train_trial(trial: Trial, run: Path, stop: Stop, *, store: Path, jobs: int) -> TrialScore:
    """Train it with ``voxelscale train`` in `run`, resuming if it was stopped.

    Real ranks as far as devices go, each emulating its share of the workers.

    Args:
        stop: whether it is to save and stop.
        jobs: trainings that share this machine.

    Raises:
        KeyboardInterrupt: it was stopped.
        VoxelscaleError: the training failed for another reason than that it diverged.
    """
    ranks = real_ranks(trial.workers, trial.config.train.ranks, jobs)
    threads = max(1, (os.cpu_count() or 1) // (jobs * ranks))
    virtual = trial.workers // ranks
    how = replace(trial.config.train, ranks=ranks, virtual_workers=virtual, threads=threads)
    config = replace(trial.config, train=how)
    child = start_child(config, store, run, threads=threads)
    code = _end_of(child, stop)
    events = read_events(run)
    if events and events[-1]["event"] == "diverged":
        return TrialScore(dice=0.0, diverged=True)
    if code == 130 or stop.at_once:
        raise KeyboardInterrupt
    if code != 0:
        raise child.fault()
    curve = [(int(e["samples"]), float(e["dice"])) for e in events if e["event"] == "validation"]
    return TrialScore(dice=curve[-1][1], curve=tuple(curve))


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


def _end_of(child: Child, stop: Stop) -> int:
    """Its exit code; the study's request to stop is passed on, because it has no terminal that sends
    Ctrl-C."""
    while (code := child.wait(0.1)) is None:
        if stop.at_once:
            child.kill()
        elif stop.asked:
            child.ask_to_stop()
    return code
