"""Proposals that never repeat, pruners with explicit resources."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from voxelscale.config import SearchConfig, load
from voxelscale.search.lease import hand_over
from voxelscale.search.sampling import make_pruner, make_sampler, rungs, should_prune
from voxelscale.search.storage import open_storage


def settings(*sets: str) -> SearchConfig:
    return load(None, [f"search.{text}" for text in sets]).search


def study_in(folder: Path, config: SearchConfig, samples: int = 1000) -> optuna.Study:
    return optuna.create_study(
        storage=open_storage("", folder),
        study_name="s",
        load_if_exists=True,
        direction="maximize",
        sampler=make_sampler(config),
        pruner=make_pruner(config, samples),
    )


def propose(study: optuna.Study) -> tuple[int, dict[str, float]]:
    trial = study.ask()
    params = {"x": trial.suggest_float("x", 0, 1), "k": trial.suggest_int("k", 1, 4)}
    return trial.number, params


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_workers_with_equal_seeds_propose_different_first_trials(tmp_path: Path, sampler: str) -> None:
    config = settings(f"sampler={sampler}", "seed=3")
    workers = [study_in(tmp_path, config) for _ in range(4)]
    points = [propose(worker)[1] for worker in workers]
    assert len({tuple(p.values()) for p in points}) == 4


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_is_repeated_with_its_seed_and_another_seed_is_another(
    tmp_path: Path, sampler: str
) -> None:
    def run(name: str, seed: int) -> list[dict[str, float]]:
        study = study_in(tmp_path / name, settings(f"sampler={sampler}", f"seed={seed}", "startup=4"))
        points = []
        for _ in range(12):
            number, params = propose(study)
            study.tell(number, -((params["x"] - 0.3) ** 2))
            points.append(params)
        return points

    assert run("a", 1) == run("b", 1)
    assert run("c", 2) != run("a", 1)


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_model_of_few_points_proposes_none_of_them_twice(tmp_path: Path, sampler: str) -> None:
    study, points = study_in(tmp_path, settings(f"sampler={sampler}", "startup=3")), []
    for _ in range(14):
        trial = study.ask()
        params = (trial.suggest_int("a", 1, 5), trial.suggest_int("b", 1, 5))
        study.tell(trial, -abs(params[0] - 2) - abs(params[1] - 3))
        points.append(params)
    assert len(set(points[3:])) == len(points[3:])


def test_pending_trials_keep_others_away(tmp_path: Path) -> None:
    """Many workers who ask at once, before any is told, spread out."""
    study = study_in(tmp_path, settings("startup=8"))
    for _ in range(16):
        number, params = propose(study)
        study.tell(number, -((params["x"] - 0.3) ** 2))
    pending = [propose(study)[1] for _ in range(32)]
    assert len({tuple(p.values()) for p in pending}) == 32


def test_rungs_are_given_in_samples_and_are_the_same_for_everybody() -> None:
    assert rungs(settings(), 2700) == [100, 300, 900]
    assert rungs(settings("factor=2", "rungs=2"), 1000) == [250, 500]
    assert rungs(settings(), 2) == []


@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median"])
def test_hopeless_trials_are_pruned_and_good_ones_are_not(tmp_path: Path, pruner: str) -> None:
    config = settings(f"pruner={pruner}")
    study = study_in(tmp_path, config, 2700)
    ended, noise = {True: 0, False: 0}, np.random.default_rng(0).normal(0, 0.01, 30)
    for k in range(30):
        good = k % 3 == 0
        number, _ = propose(study)
        for step in (100, 300, 900, 2700):
            trial = study.get_trials()[number]
            optuna.Trial(study, trial._trial_id).report((0.8 if good else 0.2) + noise[k], step)
            if step < 2700 and should_prune(study, study.get_trials()[number], []):
                study.tell(number, state=TrialState.PRUNED)
                ended[good] += 1
                break
        else:
            study.tell(number, 0.8 if good else 0.2)
    assert ended[False] / 20 > 0.2 + ended[True] / 10


def test_values_of_a_trial_that_was_taken_over_count_once(tmp_path: Path) -> None:
    study = study_in(tmp_path, settings("factor=2", "rungs=1"), 20)
    number, _ = propose(study)
    first = optuna.Trial(study, study.get_trials()[number]._trial_id)
    first.report(0.9, 10)
    assert not should_prune(study, study.get_trials()[number], [])
    hand_over(study, study.get_trials()[number])
    resumed, _ = propose(study)
    second = optuna.Trial(study, study.get_trials()[resumed]._trial_id)
    second.report(0.9, 10)
    assert not should_prune(study, study.get_trials()[resumed], [number])
    # Of 0.9 and 0.5 the better half goes on; were 0.9 counted twice, the better half of three would.
    other, _ = propose(study)
    optuna.Trial(study, study.get_trials()[other]._trial_id).report(0.95, 10)
    assert not should_prune(study, study.get_trials()[other], [number])
    values = [
        t.system_attrs["completed_rung_0"]
        for t in study.get_trials()
        if "completed_rung_0" in t.system_attrs and t.number != number
    ]
    assert values == [0.9, 0.95]


def test_several_objectives_are_not_pruned() -> None:
    pruner = make_pruner(settings("objectives=[dice,time]"), 1000)
    assert isinstance(pruner, optuna.pruners.NopPruner)
