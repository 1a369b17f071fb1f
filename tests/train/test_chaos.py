"""Random ranks are killed again and again during one training; it ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.runs import apart, final_weights, rank_processes, seen_in, two_ranks, with_train
from voxelscale.config import Config
from voxelscale.store import Store
from voxelscale.train.launch import start

KILLS = 6


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ranks_killed_again_and_again(tiny: Config, store: Store, tmp_path: Path) -> None:
    config = with_train(tiny, samples=480, checkpoint_every=8, keep=2, validate_every=48)
    workers = replace(config, train=replace(config.train, virtual_workers=2, batch_size=1))
    assert start(workers, store.path, tmp_path / "whole")

    seed = int(time.time())
    print(f"seed {seed}")
    dice, run = random.Random(seed), tmp_path / "run"
    arguments = two_ranks(config, store, run, max_restarts=2 * KILLS)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    killed = 0
    while killed < KILLS:
        # While the ranks start, or up to 16 samples on and within the steps after; by samples, as on a fast
        # machine a second is enough to train to the end.
        ahead = dice.choice([0, 8, 16])
        goal, deadline = newest(run) + ahead, time.monotonic() + 120
        while newest(run) < goal or not rank_processes(run):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(dice.random() * (0.1 if ahead else 1.5))
        for victim in dice.sample(ranks := rank_processes(run), min(1, len(ranks))):
            os.kill(victim, signal.SIGKILL)
            killed += 1
            wait_gone(victim)
    assert newest(run) < 480, "all kills must come before the end"
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert apart(final_weights(run), final_weights(tmp_path / "whole")) <= 1e-4


def newest(run: Path) -> int:
    return max(seen_in(run), default=0)


def wait_gone(pid: int) -> None:
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        time.sleep(0.01)
