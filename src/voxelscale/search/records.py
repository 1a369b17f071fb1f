"""What the storage knows of a search, read into plain results."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from voxelscale.config import Config, SearchConfig
from voxelscale.search.lease import CONTINUES, OWNER, stretches_of, valid_attempts
from voxelscale.search.results import SearchResults, State, Stretch, TrialResult
from voxelscale.search.space import Space, keys_of

OUTCOME, NOTE, ENDED, IMPORTED, COST, CURVE = "outcome", "note", "ended", "imported", "cost", "curve"
"""Attributes of a trial: how it ended (a `State`), in words, and when (seconds since the epoch); whether
it comes from an earlier search; what it was thought to cost; (samples, Dice) where Dice is not the only
objective."""

MAXIMISED = {"dice": True, "time": False, "parameters": False}
COUNTED: tuple[State, ...] = ("waiting", "running", "done", "pruned", "diverged", "failed")
"""What counts towards the number of trials that is wanted."""

UNFINISHED: tuple[State, ...] = ("waiting", "running")

ENOUGH = 8
"""Trials from which importances say anything."""


def directions(config: SearchConfig) -> list[StudyDirection]:
    """Of the objectives."""
    both = {True: StudyDirection.MAXIMIZE, False: StudyDirection.MINIMIZE}
    return [both[MAXIMISED[name]] for name in config.objectives]


def latest(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The last attempt of each trial, by the first one's number; dropped proposals are left out."""
    return sorted(valid_attempts(trials), key=lambda t: head_of(trials, t))


def head_of(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> int:
    """The number of a trial's first attempt."""
    while (before := trial.user_attrs.get(CONTINUES)) is not None:
        trial = trials[before]
    return trial.number


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The latest attempts that count towards the number of trials that is wanted."""
    return [t for t in latest(trials) if state_of(t) in COUNTED and IMPORTED not in t.user_attrs]


def state_of(trial: FrozenTrial) -> State:
    """The state of a trial, in the search's own words."""
    if trial.state == TrialState.WAITING:
        return "waiting"
    if trial.state == TrialState.RUNNING:
        return "running"
    outcome: State = trial.user_attrs.get(
        OUTCOME, "done" if trial.state == TrialState.COMPLETE else "failed"
    )
    return outcome


def wanted(config: SearchConfig, space: Space) -> int:
    """How many trials are wanted; a grid has as many as it has points."""
    return len(space.grid()) if config.sampler == "grid" else config.trials


def read_results(study: Study, config: Config, space: Space) -> SearchResults:
    """All that is known of a search by now."""
    search = config.search
    trials = study.get_trials(deepcopy=False)
    keys, log = keys_of(space)
    return SearchResults(
        name=search.study,
        objectives=search.objectives,
        maximise=tuple(MAXIMISED[name] for name in search.objectives),
        keys=keys,
        log=log,
        target=wanted(search, space),
        sampler=search.sampler,
        pruner=search.pruner,
        trials=[_result(trials, trial, space) for trial in latest(trials)],
        importances=importances(study),
    )


def _result(trials: Sequence[FrozenTrial], trial: FrozenTrial, space: Space) -> TrialResult:
    state = state_of(trial)
    params = space.active(trial.params or trial.system_attrs.get("fixed_params", {}))
    return TrialResult(
        number=head_of(trials, trial),
        state=state,
        params=params,
        values=tuple(trial.values or ()) if state in ("done", "pruned") else (),
        curve=tuple(sorted(_curve(trial).items())),
        stretches=tuple(_stretches(trial)),
        note=trial.user_attrs.get(NOTE, ""),
    )


def _curve(trial: FrozenTrial) -> dict[int, float]:
    return {
        int(samples): dice for samples, dice in trial.user_attrs.get(CURVE, [])
    } | trial.intermediate_values


def _stretches(trial: FrozenTrial) -> list[Stretch]:
    running = trial.state == TrialState.RUNNING
    facts = stretches_of(trial, trial.user_attrs.get(ENDED)) if OWNER in trial.user_attrs else []
    found = [
        Stretch(
            worker=str(fact["worker"]),
            devices=tuple(f"{fact['worker']}/{device}" for device in fact["devices"]),
            begun=float(fact["begun"]),
            ended=float(fact["ended"]),
        )
        for fact in facts
    ]
    if running and found and trial.user_attrs.get(ENDED) is None:
        last = found[-1]
        found[-1] = Stretch(worker=last.worker, devices=last.devices, begun=last.begun, ended=None)
    return found


def importances(study: Study) -> dict[str, float]:
    """How much each key decides which trials are among the best, by PED-ANOVA, largest first.

    (Watanabe, Bansal and Hutter, "PED-ANOVA: efficiently quantifying hyperparameter importance in
    arbitrary subspaces", IJCAI 2023.) Over the trials that ran to their end; {} where there are fewer
    than `ENOUGH`.
    """
    trials = study.get_trials(deepcopy=False)
    done = [t for t in trials if t.state == TrialState.COMPLETE and state_of(t) == "done"]
    if len(done) < ENOUGH:
        return {}
    view = optuna.create_study(directions=study.directions)
    view.add_trials(done)
    # With a target the evaluator asks what makes it low.
    sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    try:
        found = optuna.importance.get_param_importances(view, target=lambda t: sign * t.values[0])
    except (ValueError, RuntimeError):  # every value the same, or a key that never varies
        return {}
    return dict(found)
