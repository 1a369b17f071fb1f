"""Whole searches through the command, with real trainings."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.search.runs import command, events, finish, results_in, searched
from tests.train.runs import told

from voxelscale.config import Config, load, to_dict
from voxelscale.search.definition import begin
from voxelscale.search.lease import LOSSES, hand_over
from voxelscale.search.results import utilisation
from voxelscale.store import Store


def cli(*words: str | Path) -> subprocess.CompletedProcess[str]:
    base = [sys.executable, "-m", "voxelscale.cli"]
    return subprocess.run([*base, *map(str, words)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def done(tiny: Config, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of four trials by two workers."""
    out = tmp_path_factory.mktemp("search") / "out"
    finish(command(searched(tiny), store.path, out, "--workers", "2"))
    return out


def test_a_search_finds_the_best_of_its_trials_and_begins_with_the_default(done: Path) -> None:
    results = results_in(done)
    assert [t.state for t in results.trials] == ["done"] * 4
    assert results.best is not None
    assert results.best.values[0] == max(t.values[0] for t in results.trials)
    assert results.trials[0].params == {"optim.lr": 1e-3, "model.filters": 4}
    for trial in results.trials:
        told = events(done / "trials" / f"{trial.number:04d}", "validation")
        assert trial.values == (told[-1]["dice"],), "the value is what the training wrote"
        assert dict(trial.curve)[40] == told[-1]["dice"]
    assert len({s.worker for t in results.trials for s in t.stretches}) == 2
    assert 0.5 < utilisation(results, 0) <= 1


def test_the_best_config_is_what_train_takes(done: Path, store: Store, tmp_path: Path) -> None:
    best = results_in(done).best
    assert best is not None
    config = load(done / "best.yaml")
    assert (config.optim.lr, config.model.filters) == (
        best.params["optim.lr"],
        best.params["model.filters"],
    )
    assert (config.train.validate_at, config.train.samples) == ((), 40)
    trained = cli("-q", "train", store.path, tmp_path / "run", "--config", done / "best.yaml")
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "model.vxs").is_file()


def test_the_same_command_again_adds_what_is_wanted_and_repeats_nothing(
    done: Path, store: Store, tiny: Config
) -> None:
    before = {t.number: t.values for t in results_in(done).trials}
    again = command(searched(tiny), store.path, done)
    finish(again)
    assert {t.number: t.values for t in results_in(done).trials} == before
    out = finish([*again, "--trials", "5", "--retrain"])
    results = results_in(done)
    assert len(results.trials) == 5
    assert {t.number: t.values for t in results.trials}.items() >= before.items()
    assert (done / "best" / "model.vxs").is_file()
    assert "best trial" in out


def test_status_and_report_are_for_anybody_at_any_time(done: Path) -> None:
    status = cli("search", "status", done, "--follow")
    assert status.returncode == 0
    assert "done" in status.stdout
    assert "best Dice" in status.stdout
    (done / "search.html").unlink()
    assert cli("search", "report", done).returncode == 0
    assert "parallel" in (done / "search.html").read_text().lower()


def test_another_definition_is_refused_in_the_same_folder(done: Path, store: Store, tiny: Config) -> None:
    config = searched(tiny, {"optim.lr": {"float": [1e-4, 1e-2]}})
    refused = cli("search", store.path, done, "--config", _written(config, done))
    assert refused.returncode == 2
    assert "another search.space" in told(refused.stderr)[0]
    config = replace(searched(tiny), model=replace(tiny.model, depth=3))
    refused = cli("search", store.path, done, "--config", _written(config, done))
    assert "another model.depth" in told(refused.stderr)[0]


def test_a_warm_start_takes_comparable_trials_as_known(done: Path, store: Store, tiny: Config) -> None:
    out = done.parent / "warm"
    config = searched(tiny, trials=1, warm_start=str(done))
    said = finish(command(config, store.path, out))
    assert "trials taken as known" in said
    known, earlier = results_in(out), results_in(done)
    assert {t.values for t in earlier.done} <= {t.values for t in known.done}
    assert len(known.done) == len(earlier.done) + 1, "they do not count towards what is wanted"
    other = done.parent / "other"
    config = searched(tiny, trials=2, samples=24, warm_start=str(done))
    assert "are tried first" in finish(command(config, store.path, other))
    best = earlier.best
    assert best is not None
    assert best.params in [t.params for t in results_in(other).trials]


def test_what_cannot_run_is_not_run_and_does_not_count(store: Store, tiny: Config, tmp_path: Path) -> None:
    space = {"data.patch_size": {"int": [16, 144], "step": 64}, "model.depth": {"categorical": [2, 7]}}
    config = searched(tiny, space, trials=2, memory_gib=0.25, samples=8)
    said = finish(command(config, store.path, tmp_path / "out"))
    results = results_in(tmp_path / "out")
    assert [dict(t.params) for t in results.done] == [{"data.patch_size": 16, "model.depth": 2}]
    notes = {t.note for t in results.trials if t.state == "infeasible"}
    assert any("GiB are there" in note for note in notes), notes
    assert any("pooled" in note for note in notes), notes
    assert "nothing new in the space" in said
    assert not (tmp_path / "out" / "trials" / "0001").exists()


def test_a_trial_that_runs_out_of_memory_is_infeasible_and_not_a_failure(
    store: Store, tiny: Config, tmp_path: Path
) -> None:
    """The search is told of more memory than there is; the training itself finds out."""
    space = {"data.patch_size": {"categorical": [[16, 16, 16], [1600, 1600, 1600]]}}
    config = searched(tiny, space, sampler="grid", memory_gib=1e6, samples=8)
    finish(command(config, store.path, tmp_path / "out"))
    states = [(t.state, t.note) for t in results_in(tmp_path / "out").trials]
    assert states == [("done", ""), ("infeasible", "out of memory while it trained")]


def test_a_space_in_which_nothing_can_run_is_told(store: Store, tiny: Config, tmp_path: Path) -> None:
    config = searched(tiny, memory_gib=0.0001, samples=8)
    told = finish(command(config, store.path, tmp_path / "out"), code=2)
    assert "none of the first" in told
    assert "search.memory_gib" in told


def test_a_grid_is_run_once_each(store: Store, tiny: Config, tmp_path: Path) -> None:
    space = {"model.filters": {"int": [2, 4], "step": 2}, "model.norm": {"categorical": ["batch", "none"]}}
    config = searched(tiny, space, sampler="grid", samples=8)
    finish(command(config, store.path, tmp_path / "out", "--workers", "2"))
    points = [json.dumps(dict(t.params)) for t in results_in(tmp_path / "out").done]
    assert len(points) == len(set(points)) == 4


def test_a_trial_that_diverges_is_told_and_learned_from(store: Store, tiny: Config, tmp_path: Path) -> None:
    space = {"optim.lr": {"categorical": [1e-3, 1e30]}, "model.filters": {"int": [2, 4], "step": 2}}
    config = searched(tiny, space, trials=4, sampler="grid", samples=16)
    config = replace(config, optim=replace(config.optim, clip=0.0, warmup=0.0))
    finish(command(config, store.path, tmp_path / "out"))
    results = results_in(tmp_path / "out")
    states = {(t.params["optim.lr"], t.state) for t in results.trials}
    assert states == {(1e-3, "done"), (1e30, "diverged")}
    assert all("diverged" in t.note for t in results.trials if t.state == "diverged")
    assert results.best is not None
    assert results.best.params["optim.lr"] == 1e-3


def test_a_trial_that_kills_its_workers_is_given_up(store: Store, tiny: Config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = searched(tiny, trials=1)
    begun = begin(config, store.path, out)
    for _ in range(5):
        trial = begun.study.ask()
        begun.space.suggest(trial)
        hand_over(begun.study, begun.study.get_trials()[trial.number], count=LOSSES)
    finish(command(config, store.path, out), code=2)
    ended = [(t.state, t.note) for t in results_in(out).trials]
    assert ended == [("failed", "its worker was lost 5 times")]
    assert not (out / "trials").exists(), "it was not trained again"


def test_several_objectives_have_a_front(store: Store, tiny: Config, tmp_path: Path) -> None:
    config = searched(tiny, trials=3, samples=8, objectives=("dice", "parameters"))
    finish(command(config, store.path, tmp_path / "out", "--workers", "2"))
    results = results_in(tmp_path / "out")
    assert all(len(t.values) == 2 and t.values[1] > 100 for t in results.done)
    assert 1 <= len(results.front) <= 3
    assert "Pareto" in (tmp_path / "out" / "search.html").read_text()


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--storage", "sqlite:///x.db"], "SQLite", "journal"),
        (["--set", "search.space={model.dept: {int: [1, 2]}}"], "model.dept", "model.depth"),
        (["--set", "search.sampler=tpee"], "search.sampler", "tpe"),
        (["--trials", "0"], "search.trials", "at least 1"),
        (["--set", "train.ranks=2"], "train.ranks", "--devices-per-trial 2"),
    ],
)
def test_a_faulty_search_is_told_in_two_lines(
    store: Store, tmp_path: Path, words: list[str], message: str, hint: str
) -> None:
    refused = cli("search", store.path, tmp_path / "out", *words)
    assert refused.returncode == 2
    lines = told(refused.stderr)
    assert message in lines[0]
    assert hint in lines[1]


def test_no_search_there_is_told(tmp_path: Path) -> None:
    for verb in ("status", "report"):
        refused = cli("search", verb, tmp_path)
        assert refused.returncode == 2
        assert "no search there" in told(refused.stderr)[0]


def _written(config: Config, beside: Path) -> Path:
    import yaml

    path = beside.with_suffix(".other.yaml")
    path.write_text(yaml.safe_dump(to_dict(config)))
    return path
