"""How long a search still takes."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from voxelscale.search.lease import EARLIER, OWNER
from voxelscale.search.records import ENDED
from voxelscale.search.search import time_left


def trials(*facts: tuple[TrialState, float, float | None]) -> list[FrozenTrial]:
    """Trials with a state, when they began and when they ended."""
    study = optuna.create_study()
    for state, begun, ended in facts:
        owner = {"worker": "w", "devices": ["0"], "begun": begun}
        attributes = {OWNER: owner} | ({} if ended is None else {ENDED: ended})
        value = 0.5 if state == TrialState.COMPLETE else None
        study.add_trial(create_trial(state=state, value=value, user_attrs=attributes))
    return study.get_trials()


def test_nothing_is_said_before_a_trial_has_ended() -> None:
    assert time_left(trials((TrialState.RUNNING, 0, None)), 10, 500) is None


def test_trials_that_have_ended_stand_for_those_that_have_not() -> None:
    """Two of 10 took 100 and 300 s (pruned); two workers have spent 50 s each on the next two."""
    known = trials(
        (TrialState.COMPLETE, 0, 300),
        (TrialState.PRUNED, 0, 100),
        (TrialState.RUNNING, 300, None),
        (TrialState.RUNNING, 300, None),
    )
    assert time_left(known, 10, 350) == pytest.approx((8 * 200 - 2 * 50) / 2)


def test_it_shrinks_while_a_trial_runs_and_waits_at_zero_for_a_slow_one() -> None:
    known = trials((TrialState.COMPLETE, 0, 100), (TrialState.RUNNING, 100, None))
    left = [time_left(known, 2, now) for now in (100, 150, 200, 1000)]
    assert left == [100, 50, 0, 0]


def test_earlier_attempts_count() -> None:
    (first,) = trials((TrialState.COMPLETE, 500, 600))
    first.user_attrs[EARLIER] = [{"worker": "w", "devices": ["0"], "begun": 0, "ended": 100}]
    assert time_left([first], 3, 600) == pytest.approx(400)
