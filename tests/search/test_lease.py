"""Who owns a trial: takeovers, late results, and Optuna's traps around them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna import Study
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from voxelscale.search.lease import (
    BEAT,
    CONTINUES,
    FAULTS,
    LOSSES,
    OWNER,
    Lease,
    Watch,
    end_trial,
    hand_over,
    is_gone,
    is_valid,
    own,
    process_name,
    stretches_of,
    superseded,
)
from voxelscale.search.records import OUTCOME, counted, head_of, latest, state_of
from voxelscale.search.storage import open_storage

Opens = Callable[[], Study]
"""The same study as another process would see it: by a storage object of its own."""


@pytest.fixture(params=["journal", "postgresql"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opens:
    """A new study, in each kind of storage."""
    url = request.getfixturevalue("postgresql").url if request.param == "postgresql" else ""

    def study() -> Study:
        return optuna.create_study(
            storage=open_storage(url, tmp_path),
            study_name=str(tmp_path),
            load_if_exists=True,
            direction="maximize",
        )

    return study


def begin(study: Study, x: float = 0.5) -> Trial:
    trial = study.ask(fixed_distributions={"x": optuna.distributions.FloatDistribution(0, 1)})
    own(trial, "w", ["0"])
    return trial


def trial_of(study: Study, number: int) -> FrozenTrial:
    return study.get_trials(deepcopy=False)[number]


def test_a_process_is_known_to_be_gone_only_when_it_is() -> None:
    assert not is_gone(process_name())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        machine = process_name().rsplit(":", 2)[0]
        name = f"{machine}:{child.pid}:{_started(child.pid)}"
        assert not is_gone(name)
    finally:
        child.kill()
    # Unwaited for it is a zombie, which has ended, too.
    while not is_gone(name):
        time.sleep(0.01)
    child.wait()
    assert is_gone(name)
    assert is_gone(f"{machine}:{os.getpid()}:1"), "the number was given to another process since"
    assert not is_gone("elsewhere:1:1"), "of other machines nothing is known"


def _started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def test_a_trial_is_lost_when_its_beat_stands_still_for_a_lease_and_not_before(opened: Opens) -> None:
    study, now = opened(), [100.0]
    trial = begin(study)
    trial.set_user_attr(OWNER, {**trial.user_attrs[OWNER], "process": "elsewhere:1:1"})
    watch = Watch(60, clock=lambda: now[0])
    assert not watch.lost(trial_of(study, 0)), "seen for the first time"
    now[0] += 59
    assert not watch.lost(trial_of(study, 0))
    trial.set_user_attr(BEAT, [1, 0.0])
    now[0] += 59
    assert not watch.lost(trial_of(study, 0)), "it has beaten since"
    now[0] += 61
    assert watch.lost(trial_of(study, 0))


def test_clocks_of_machines_need_not_agree(opened: Opens) -> None:
    study = opened()
    trial = begin(study)
    trial.set_user_attr(OWNER, {**trial.user_attrs[OWNER], "process": "elsewhere:1:1"})
    trial.set_user_attr(BEAT, [1, time.time() - 10**6])  # by a clock that is days behind
    watch = Watch(60)
    assert not watch.lost(trial_of(study, 0))
    assert not watch.lost(trial_of(study, 0))


def test_a_live_trial_is_never_failed_by_another_process(opened: Opens) -> None:
    mine, theirs = opened(), opened()
    # Seconds of lease: a busy machine may stand still for one.
    trial, watch = begin(mine), Watch(2.5)
    with Lease(trial, lease_seconds=2.5) as lease:
        until = time.monotonic() + 6
        while time.monotonic() < until:
            assert not watch.lost(trial_of(theirs, 0))
            time.sleep(0.02)
    assert not lease.lost
    assert end_trial(mine, 0, TrialState.COMPLETE, [0.7])


def test_a_late_result_of_an_expired_lease_changes_nothing(opened: Opens) -> None:
    mine, theirs = opened(), opened()
    trial = begin(mine)
    trial.report(0.3, 10)
    hand_over(theirs, trial_of(theirs, 0))
    next_one = theirs.ask()
    with pytest.raises(UpdateFinishedTrialError):
        trial.report(0.9, 20)
    with pytest.raises(UpdateFinishedTrialError):
        trial.set_user_attr(OUTCOME, "done")
    assert not end_trial(mine, 0, TrialState.COMPLETE, [0.9])
    assert trial_of(theirs, 0).state == TrialState.FAIL
    assert trial_of(theirs, 0).intermediate_values == {10: 0.3}
    assert is_valid(theirs, trial_of(theirs, next_one.number))
    assert end_trial(theirs, next_one.number, TrialState.COMPLETE, [0.5])
    assert [t.value for t in latest(mine.get_trials())] == [0.5]


def test_the_owner_learns_from_its_beat_that_the_trial_was_taken(opened: Opens) -> None:
    mine, theirs = opened(), opened()
    with Lease(begin(mine), lease_seconds=0.2) as lease:
        hand_over(theirs, trial_of(theirs, 0))
        until = time.monotonic() + 10
        while not lease.lost and time.monotonic() < until:
            time.sleep(0.01)
    assert lease.lost


def test_a_successor_has_the_same_parameters_and_counts_as_the_same_trial(opened: Opens) -> None:
    study = opened()
    first = begin(study)
    hand_over(study, trial_of(study, 0), ended=first.user_attrs[OWNER]["begun"] + 7)
    second = begin(study)
    assert second.params == first.params
    hand_over(study, trial_of(study, 1))
    third = begin(study)
    trials = study.get_trials()
    assert [t.number for t in latest(trials)] == [2]
    assert head_of(trials, trials[2]) == 0
    assert superseded(trials) == {0, 1}
    assert len(counted(trials)) == 1
    stretches = stretches_of(trial_of(study, third.number))
    assert [s["worker"] for s in stretches] == ["w", "w", "w"]
    assert stretches[0]["ended"] == pytest.approx(first.user_attrs[OWNER]["begun"] + 7)


def test_two_who_take_over_the_same_trial_leave_one_to_run(opened: Opens) -> None:
    mine, theirs = opened(), opened()
    begin(mine)
    stale = trial_of(theirs, 0)
    hand_over(mine, trial_of(mine, 0))
    # As of a second process that looked before the first one wrote: one successor too many.
    theirs.enqueue_trial(stale.params, user_attrs={CONTINUES: 0})
    assert not end_trial(theirs, 0, TrialState.FAIL)
    asked = [mine.ask(), theirs.ask()]
    assert [is_valid(mine, trial_of(mine, t.number)) for t in asked] == [True, False]


def test_a_takeover_that_was_cut_off_is_completed_by_whoever_runs_the_successor(opened: Opens) -> None:
    study = opened()
    trial = begin(study)
    study.enqueue_trial(trial.params, user_attrs={CONTINUES: 0})  # killed before it ended the old one
    successor = study.ask()
    assert is_valid(study, trial_of(study, successor.number))
    assert trial_of(study, 0).state == TrialState.FAIL


def test_a_trial_that_ended_just_before_it_was_taken_over_is_not_run_again(opened: Opens) -> None:
    study = opened()
    trial = begin(study)
    stale = trial_of(study, 0)
    end_trial(study, trial.number, TrialState.COMPLETE, [0.5])
    hand_over(study, stale)
    successor = study.ask()
    assert not is_valid(study, trial_of(study, successor.number))
    end_trial(study, successor.number, TrialState.FAIL)
    assert [t.value for t in latest(study.get_trials()) if state_of(t) == "done"] == [0.5]


def test_a_queued_trial_whose_worker_died_before_it_began_is_queued_again(opened: Opens) -> None:
    study = opened()
    study.enqueue_trial({"x": 0.25})
    study.ask()  # and gone
    hand_over(study, trial_of(study, 0))
    assert begin(study).params == {"x": 0.25}


def test_a_proposal_whose_worker_died_before_it_was_drawn_is_dropped(opened: Opens) -> None:
    study = opened()
    study.ask()
    hand_over(study, trial_of(study, 0))
    assert latest(study.get_trials()) == []


def test_losses_and_faults_are_counted_over_all_attempts(opened: Opens) -> None:
    study = opened()
    for count in (LOSSES, "", FAULTS, LOSSES):
        begin(study)
        running = next(t for t in study.get_trials() if t.state == TrialState.RUNNING)
        hand_over(study, running, count=count)
    last = begin(study)
    assert (last.user_attrs[LOSSES], last.user_attrs[FAULTS]) == (2, 1)
