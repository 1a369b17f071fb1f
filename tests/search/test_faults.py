"""A search with its processes killed, stopped and starved: nothing is lost, nothing is run twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tests.search.runs import (
    checkpointed,
    command,
    events,
    finish,
    kill_session,
    results_in,
    searched,
    start,
    trainings,
    undisturbed_dice,
    until,
    workers,
)
from tests.train.runs import fill, told

from voxelscale.config import Config
from voxelscale.store import Store

pytestmark = pytest.mark.slow
SAMPLES = 240
"""Of a trial: seconds of training, so that it can be disturbed."""


def assert_whole(out: Path, trials: int) -> None:
    """Every trial that was wanted ran to its end, and no point twice."""
    results = results_in(out)
    assert [t.state for t in results.trials] == ["done"] * trials
    points = [tuple(t.params.items()) for t in results.trials]
    assert len(set(points)) == trials


def last_run(out: Path, number: int) -> int:
    """The folder of a trial's last attempt, by its number."""
    found = results_in(out).trials[number]
    study_runs = sorted(int(p.name) for p in (out / "trials").iterdir() if p.is_dir())
    dice = found.values[0]
    matching = [r for r in study_runs if _dice(out, r) == dice]
    assert matching, "no training has told this value"
    return matching[-1]


def _dice(out: Path, run: int) -> float:
    validations = events(out / "trials" / f"{run:04d}", "validation")
    return float(validations[-1]["dice"]) if validations else -1.0


def test_a_killed_worker_s_trial_is_resumed_and_ends_as_if_undisturbed(
    tiny: Config, store: Store, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(command(searched(tiny, samples=SAMPLES, trials=3), store.path, out, "--workers", "2"))
    until(lambda: checkpointed(out), process)
    os.kill(workers(out)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert "killed by SIGKILL" in errors
    assert_whole(out, 3)
    resumed = [t for t in results_in(out).trials if len(t.stretches) > 1]
    assert len(resumed) == 1
    assert not trainings(out)
    again = last_run(out, resumed[0].number)
    starts = events(out / "trials" / f"{again:04d}", "train")
    assert starts, "it has its curve from the start"
    assert resumed[0].values[0] == pytest.approx(
        undisturbed_dice(store.path, out, again, tmp_path), abs=1e-4
    )


def test_everything_is_killed_and_the_same_command_goes_on(
    tiny: Config, store: Store, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = command(searched(tiny, samples=SAMPLES, trials=3), store.path, out, "--workers", "2")
    for _ in range(2):
        process = start(arguments)
        until(lambda: len(trainings(out)) > 0 and checkpointed(out), process)
        kill_session(process)
        for pid in [*workers(out), *trainings(out)]:
            os.kill(pid, signal.SIGKILL)
        until(lambda: not workers(out) and not trainings(out))
    finish(arguments)
    assert_whole(out, 3)


def test_a_killed_command_leaves_no_process_behind(tiny: Config, store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(command(searched(tiny, samples=20_000, trials=2), store.path, out, "--workers", "2"))
    until(lambda: checkpointed(out), process)
    kill_session(process)
    until(lambda: not workers(out) and not trainings(out))
    assert {t.state for t in results_in(out).trials} <= {"waiting", "running"}


def test_ctrl_c_saves_and_the_same_command_goes_on(tiny: Config, store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = command(searched(tiny, samples=SAMPLES, trials=2), store.path, out)
    process = start(arguments)
    until(lambda: checkpointed(out), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "resumes" in told(errors)[1]
    assert not workers(out)
    assert not trainings(out)
    assert [t.state for t in results_in(out).trials] == ["waiting"], "handed over at once, no lease awaited"
    assert (out / "search.html").is_file()
    finish(arguments)
    assert_whole(out, 2)
    assert len(results_in(out).trials[0].stretches) == 2


def test_a_worker_that_was_suspended_past_its_lease_changes_nothing(
    tiny: Config, store: Store, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(
        command(
            searched(tiny, samples=SAMPLES, trials=2, lease_seconds=3), store.path, out, "--workers", "2"
        )
    )
    until(lambda: checkpointed(out) and len(trainings(out)) == 2, process)
    asleep = workers(out)[0]
    os.kill(asleep, signal.SIGSTOP)
    until(lambda: sum(len(t.stretches) > 1 for t in results_in(out).trials) == 1, process)
    until(lambda: all(t.state == "done" for t in results_in(out).trials), process)
    before = results_in(out).trials
    os.kill(asleep, signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [(t.params, t.values) for t in results_in(out).trials] == [(t.params, t.values) for t in before]
    assert_whole(out, 2)


def test_a_full_disk_is_reported_and_nothing_is_lost(tiny: Config, store: Store, small_disk: Path) -> None:
    out = small_disk / "out"
    arguments = command(searched(tiny, samples=SAMPLES, trials=2), store.path, out)
    process = start(arguments)
    until(lambda: checkpointed(out), process)
    fill(small_disk / "filler")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2, errors
    assert "cannot be written" in told(errors)[0]
    (small_disk / "filler").unlink()
    finish(arguments)
    assert_whole(out, 2)
