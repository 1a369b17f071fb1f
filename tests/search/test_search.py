"""Whole searches: two by the command with real trainings, the others with emulated ones."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Command
from tests.experiments.emulated import Emulated
from tests.search.conftest import Server
from tests.search.runs import command, events, finish, results_in, search_emulated, searched
from tests.train.runs import told

from voxelscale.config import Config, load, to_dict
from voxelscale.console import set_verbosity
from voxelscale.errors import VoxelscaleError
from voxelscale.experiments.once import Training
from voxelscale.search import worker
from voxelscale.search.definition import begin, reopen
from voxelscale.search.lease import LOSSES, hand_over
from voxelscale.search.storage import JOURNAL
from voxelscale.search.timeline import utilisation
from voxelscale.store import Store


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
    assert results.trials[0].params == {"optim.lr": Config().optim.used.lr, "model.filters": 4}
    for trial in results.trials:
        told = events(done / "trials" / f"{trial.number:04d}", "validation")
        assert trial.values == (told[-1]["dice"],), "the value is what the training wrote"
        assert dict(trial.curve)[40] == told[-1]["dice"]
    assert len({s.worker for t in results.trials for s in t.stretches}) == 2
    assert 0.5 < utilisation(results, 0) <= 1


def test_the_best_config_is_what_train_takes(
    done: Path, store: Store, tmp_path: Path, voxelscale: Command
) -> None:
    best = results_in(done).best
    assert best is not None
    config = load(done / "best.yaml")
    assert (config.optim.lr, config.model.filters) == (
        best.params["optim.lr"],
        best.params["model.filters"],
    )
    assert (config.train.validate_at, config.train.samples) == ((), 40)
    code, _, errors = voxelscale(
        "-q", "train", store.path, tmp_path / "run", "--config", done / "best.yaml"
    )
    assert code == 0, errors
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


def test_status_and_report_are_for_anybody_at_any_time(done: Path, voxelscale: Command) -> None:
    code, out, _ = voxelscale("search", "status", done, "--follow")
    assert code == 0
    assert "done" in out
    assert "best Dice" in out
    (done / "search.html").unlink()
    assert voxelscale("search", "report", done)[0] == 0
    assert "parallel" in (done / "search.html").read_text().lower()


def test_another_definition_is_refused_in_the_same_folder(
    done: Path, store: Store, tiny: Config, voxelscale: Command
) -> None:
    config = searched(tiny, {"optim.lr": {"float": [1e-4, 1e-2]}})
    code, _, errors = voxelscale("search", store.path, done, "--config", _written(config, done))
    assert code == 2
    assert "another search.space" in told(errors)[0]
    config = replace(searched(tiny), model=replace(tiny.model, depth=3))
    code, _, errors = voxelscale("search", store.path, done, "--config", _written(config, done))
    assert "another model.depth" in told(errors)[0]


@pytest.mark.parametrize(
    ("name", "searched_too", "refused"),
    [("adamw", False, False), ("sgd", False, True), ("adamw", True, True)],
)
def test_a_search_of_before_lists_what_is_now_left_to_the_optimiser(
    tiny: Config, store: Store, tmp_path: Path, name: str, searched_too: bool, refused: bool
) -> None:
    space = {"optim.name": {"categorical": ["adamw", "sgd"]}} if searched_too else {}
    now = searched(load(None, [f"optim.name={name}"], tiny), {"optim.lr": {"float": [1e-4, 1e-2]}, **space})
    before = replace(now, optim=replace(now.optim, momentum=0.99, weight_decay=0.01))
    begin(before, store.path, tmp_path / "out")
    if refused:
        with pytest.raises(VoxelscaleError, match=r"another optim\.weight_decay"):
            begin(now, store.path, tmp_path / "out")
    else:
        begin(now, store.path, tmp_path / "out")


def test_what_is_to_be_tried_first_is_tried_when_there_are_trials_for_it(
    store: Store, tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_verbosity(1)
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "optim: {lr: 0.02}\nmodel: {filters: 2, residual: true}\ntrain: {samples: 9, ranks: 1}\n"
    )
    out, train = tmp_path / "out", Emulated()
    for trials in (1, 2):  # with one there is none for it
        config = searched(tiny, trials=trials, first=(str(mine),), samples=16)
        results = search_emulated(config, store.path, out, train)
    assert [t.state for t in results.trials] == ["done"] * 2
    assert results.trials[1].params == {"optim.lr": 0.02, "model.filters": 2}
    said = "mine.yaml: model.residual not searched: the values of the search's config are taken"
    assert said in capsys.readouterr().err


def test_a_warm_start_takes_comparable_trials_as_known(
    done: Path, store: Store, tiny: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    set_verbosity(1)
    config = searched(tiny, trials=1, warm_start=str(done))
    known, earlier = search_emulated(config, store.path, done.parent / "warm", Emulated()), results_in(done)
    assert "trials taken as known" in capsys.readouterr().err
    assert {t.values for t in earlier.done} <= {t.values for t in known.done}
    assert len(known.done) == len(earlier.done) + 1, "they do not count towards what is wanted"
    config = searched(tiny, trials=2, samples=24, warm_start=str(done))
    other = search_emulated(config, store.path, done.parent / "other", Emulated())
    assert "are tried first" in capsys.readouterr().err
    best = earlier.best
    assert best is not None
    assert best.params in [t.params for t in other.trials]


def test_on_other_devices_a_trial_is_another(
    done: Path, store: Store, tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its global batch is another, unless the search chooses each trial's ranks."""
    any_ranks = replace(tiny, train=replace(tiny.train, ranks=0))
    begin(searched(any_ranks, devices_per_trial=2), store.path, tmp_path / "out")
    with pytest.raises(VoxelscaleError, match=r"another search\.devices_per_trial"):
        begin(searched(any_ranks, devices_per_trial=1), store.path, tmp_path / "out")
    space = {"train.ranks": {"categorical": [1]}}
    for devices in (2, 1):
        begin(searched(any_ranks, space, devices_per_trial=devices), store.path, tmp_path / "chosen")

    set_verbosity(1)
    warm = searched(any_ranks, warm_start=str(done), devices_per_trial=2)
    begin(warm, store.path, tmp_path / "warm")
    assert "are tried first" in capsys.readouterr().err


def test_what_cannot_run_is_not_run_and_does_not_count(
    store: Store,
    tiny: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 25)
    set_verbosity(1)
    space = {"data.patch_size": {"int": [16, 144], "step": 64}, "model.depth": {"categorical": [2, 7]}}
    config = searched(tiny, space, trials=2, memory_gib=0.25, samples=8, sampler="random")
    train = Emulated()
    results = search_emulated(config, store.path, tmp_path / "out", train)
    assert [dict(t.params) for t in results.done] == [{"data.patch_size": 16, "model.depth": 2}]
    notes = {t.note for t in results.trials if t.state == "infeasible"}
    assert any("GiB are there" in note for note in notes), notes
    assert any("pooled" in note for note in notes), notes
    assert "nothing new in the space" in capsys.readouterr().err
    assert len(train.trained) == 1
    assert not (tmp_path / "out" / "trials" / "0001").exists()


def test_a_trial_that_runs_out_of_memory_is_infeasible_and_not_a_failure(
    store: Store, tiny: Config, tmp_path: Path
) -> None:
    """The search is given more memory than there is; the training itself finds out."""
    space = {"data.patch_size": {"categorical": [[16, 16, 16], [1600, 1600, 1600]]}}
    config = searched(tiny, space, sampler="grid", memory_gib=1e6, samples=8)
    train = Emulated(ending=lambda c: "finished" if c.data.patch_size[0] == 16 else "out of memory")
    results = search_emulated(config, store.path, tmp_path / "out", train)
    states = [(t.state, t.note) for t in results.trials]
    assert states == [("done", ""), ("infeasible", "out of memory while it trained")]


def test_a_space_in_which_nothing_can_run_is_reported(store: Store, tiny: Config, tmp_path: Path) -> None:
    config = searched(tiny, memory_gib=0.0001, samples=8)
    told = finish(command(config, store.path, tmp_path / "out"), code=2)
    assert "none of the first" in told
    assert "search.memory_gib" in told


def test_a_grid_is_run_once_each(store: Store, tiny: Config, tmp_path: Path) -> None:
    space = {"model.filters": {"int": [2, 4], "step": 2}, "model.norm": {"categorical": ["batch", "none"]}}
    config = searched(tiny, space, sampler="grid", samples=8, workers=2)
    results = search_emulated(config, store.path, tmp_path / "out", Emulated())
    points = [json.dumps(dict(t.params)) for t in results.done]
    assert len(points) == len(set(points)) == results.target == 4


def test_a_trial_that_diverges_is_reported_and_learned_from(
    store: Store, tiny: Config, tmp_path: Path
) -> None:
    space = {"optim.lr": {"categorical": [1e-3, 1e30]}, "model.filters": {"int": [2, 4], "step": 2}}
    config = searched(tiny, space, trials=4, sampler="grid", samples=16)
    train = Emulated(ending=lambda c: "diverged" if c.optim.used.lr > 1 else "finished")
    results = search_emulated(config, store.path, tmp_path / "out", train)
    states = {(t.params["optim.lr"], t.state) for t in results.trials}
    assert states == {(1e-3, "done"), (1e30, "diverged")}
    assert all(t.note == "made up" for t in results.trials if t.state == "diverged")
    values = {t.value for t in reopen(tmp_path / "out").study.get_trials() if t.params["optim.lr"] == 1e30}
    assert values == {0.0}, "the worst Dice, from which samplers learn"
    assert results.best is not None
    assert results.best.params["optim.lr"] == 1e-3


def test_a_training_that_fails_is_tried_once_more(store: Store, tiny: Config, tmp_path: Path) -> None:
    endings = iter(["failed", "finished"])
    train = Emulated(ending=lambda config: next(endings))  # type: ignore[arg-type]
    (trial,) = search_emulated(searched(tiny, trials=1), store.path, tmp_path / "out", train).trials
    assert trial.state == "done"
    assert len(trial.stretches) == len(train.trained) == 2
    first, second = (t.run for t in train.trained)
    assert (second / "config.yaml").is_file()
    assert not first.exists(), "the second went on in a copy of it"
    assert not (second / "checkpoints").exists(), "nobody will go on with it"


def test_a_worker_whose_trainings_keep_failing_gives_up(store: Store, tiny: Config, tmp_path: Path) -> None:
    train = Emulated(ending=lambda config: "failed")
    config = searched(tiny, trials=9)
    with pytest.raises(VoxelscaleError, match="3 trainings in a row failed: made up"):
        search_emulated(config, store.path, tmp_path / "out", train)
    results = results_in(tmp_path / "out")
    assert [(t.state, t.note, len(t.stretches)) for t in results.trials] == [("failed", "made up", 2)] * 3


def test_a_training_that_takes_too_long_has_failed(store: Store, tiny: Config, tmp_path: Path) -> None:
    config = searched(tiny, trials=1, trial_seconds=45)
    train = Emulated(ending=lambda config: "late")
    (trial,) = search_emulated(config, store.path, tmp_path / "out", train).trials
    assert (trial.state, trial.note) == ("failed", "took too long")
    assert [t.seconds for t in train.trained] == [45]


def test_a_stopped_worker_hands_its_trial_over(store: Store, tiny: Config, tmp_path: Path) -> None:
    wishes: list[bool] = []
    config, out = searched(tiny, trials=2), tmp_path / "out"
    train = Emulated(meanwhile=lambda training: wishes.append(True))
    stopped = search_emulated(config, store.path, out, train, lambda: bool(wishes))
    assert [t.state for t in stopped.trials] == ["waiting"], "at once, no lease is awaited"
    results = search_emulated(config, store.path, out, Emulated())
    assert [(t.state, len(t.stretches)) for t in results.trials] == [("done", 2), ("done", 1)]


def test_hopeless_trials_are_pruned_at_their_rung(store: Store, tiny: Config, tmp_path: Path) -> None:
    space = {"optim.lr": {"categorical": [1e-2, 1e-9, 1e-8]}}
    config = searched(tiny, space, samples=2000, sampler="grid", pruner="asha", factor=5)
    results = search_emulated(config, store.path, tmp_path / "out", Emulated())
    assert [t.state for t in results.trials] == ["done", "pruned", "pruned"]
    assert [[samples for samples, _ in t.curve] for t in results.trials] == [[400, 2000], [400], [400]]


def test_what_has_spent_its_own_budget_is_done(store: Store, tiny: Config, tmp_path: Path) -> None:
    """Where budgets are searched, the end of a short one may be a rung of the others."""
    space = {"train.samples": {"categorical": [2000, 400]}, "optim.lr": {"categorical": [1e-2, 1e-9]}}
    config = searched(tiny, space, samples=2000, sampler="grid", pruner="asha", factor=5)
    train = Emulated(dice=lambda c: c.optim.used.lr * c.train.samples)
    results = search_emulated(config, store.path, tmp_path / "out", train)
    states = [(t.params["train.samples"], t.params["optim.lr"], t.state) for t in results.trials]
    assert states == [
        (2000, 1e-2, "done"),
        (2000, 1e-9, "pruned"),
        (400, 1e-2, "done"),
        (400, 1e-9, "done"),
    ]


def test_a_trial_that_was_pruned_past_its_rung_is_not_asked_again(
    store: Store, tiny: Config, tmp_path: Path
) -> None:
    """What an attempt was let past, its successor is too, however good the others have become since."""
    space = {"optim.lr": {"categorical": [1e-9, 1e-2, 1e-3]}}
    config = searched(tiny, space, samples=2000, sampler="grid", pruner="asha", factor=5)
    out, wishes = tmp_path / "out", list[bool]()
    search_emulated(
        config, store.path, out, Emulated(meanwhile=lambda _: wishes.append(True)), lambda: bool(wishes)
    )
    results = search_emulated(config, store.path, out, Emulated())
    (first,) = (t for t in results.trials if t.params["optim.lr"] == 1e-9)
    assert (first.state, len(first.stretches)) == ("done", 2)


def test_a_config_that_somebody_named_is_trained_to_its_end(
    store: Store, tiny: Config, tmp_path: Path
) -> None:
    """However low its Dice at a rung: others are held against it. So it is after an interruption."""
    (tmp_path / "poor.yaml").write_text("optim: {lr: 1.0e-9}\n")
    space = {"optim.lr": {"float": [1e-9, 1e-2], "log": True}}
    how: dict[str, Any] = {
        "samples": 2000,
        "pruner": "asha",
        "factor": 5,
        "first": (str(tmp_path / "poor.yaml"),),
    }
    config, begun = searched(tiny, space, sampler="random", trials=2, **how), list[float]()
    train = Emulated(meanwhile=lambda training: begun.append(training.config.optim.used.lr))
    search_emulated(config, store.path, tmp_path / "out", train, lambda: 1e-9 in begun)
    results = search_emulated(config, store.path, tmp_path / "out", Emulated())
    assert [(t.state, len(t.stretches)) for t in results.trials] == [("done", 1), ("done", 2)]
    assert results.trials[1].params["optim.lr"] == pytest.approx(1e-9)


def test_two_workers_share_one_search(store: Store, tiny: Config, tmp_path: Path) -> None:
    config = searched(tiny, trials=5, workers=2)
    train = Emulated(meanwhile=lambda training: time.sleep(0.1))
    results = search_emulated(config, store.path, tmp_path / "out", train)
    assert [t.state for t in results.trials] == ["done"] * 5
    assert len({tuple(t.params.items()) for t in results.trials}) == 5
    assert len({s.worker for t in results.trials for s in t.stretches}) == 2


def test_a_journal_cut_in_mid_write_is_gone_on_with(store: Store, tiny: Config, tmp_path: Path) -> None:
    config, out, wishes = searched(tiny, trials=2), tmp_path / "out", list[bool]()
    train = Emulated(meanwhile=lambda training: wishes.append(True))
    search_emulated(config, store.path, out, train, lambda: bool(wishes))
    os.truncate(out / JOURNAL, (out / JOURNAL).stat().st_size - 5)
    results = search_emulated(config, store.path, out, Emulated())
    assert [t.state for t in results.trials] == ["done"] * 2


def test_a_database_that_restarts_is_waited_for(
    store: Store, tiny: Config, tmp_path: Path, postgresql: Server
) -> None:
    out = tmp_path / "out"
    shared = {"study": str(tmp_path), "storage": postgresql.url}
    config = searched(tiny, trials=3, lease_seconds=20, workers=2, **shared)  # type: ignore[arg-type]
    once = iter([True])

    def restart(training: Training) -> None:
        if next(once, False):
            postgresql.stop()
            threading.Timer(3, postgresql.start).start()

    results = search_emulated(config, store.path, out, Emulated(meanwhile=restart))
    assert [t.state for t in results.trials] == ["done"] * 3


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
    config = searched(tiny, trials=3, samples=8, objectives=("dice", "parameters"), workers=2)
    results = search_emulated(config, store.path, tmp_path / "out", Emulated())
    assert all(len(t.values) == 2 and t.values[1] > 100 for t in results.done)
    assert 1 <= len(results.front) <= 3
    assert "Pareto" in (tmp_path / "out" / "search.html").read_text()


@pytest.mark.parametrize("objectives", [("time",), ("dice", "time"), ("parameters", "dice")])
def test_what_diverged_is_no_quick_or_small_trial(
    store: Store, tiny: Config, tmp_path: Path, objectives: tuple[str, ...]
) -> None:
    """The sampler would take it for the best of its kind."""
    space = {"optim.lr": {"categorical": [1e-3, 1e30]}}
    config = searched(tiny, space, sampler="grid", samples=16, objectives=objectives)
    train = Emulated(ending=lambda c: "diverged" if c.optim.used.lr > 1 else "finished")
    results = search_emulated(config, store.path, tmp_path / "out", train)
    assert [t.state for t in results.trials] == ["done", "diverged"]
    told = {t.params["optim.lr"]: t.values for t in reopen(tmp_path / "out").study.get_trials()}
    assert (told[1e-3] is None, told[1e30]) == (False, None)


def test_a_high_dice_is_not_pruned_where_time_is_minimised(
    store: Store, tiny: Config, tmp_path: Path
) -> None:
    space = {"optim.lr": {"categorical": [1e-9, 1e-8, 1e-2]}}
    config = searched(
        tiny, space, samples=2000, sampler="grid", pruner="asha", factor=5, objectives=("time",)
    )
    results = search_emulated(config, store.path, tmp_path / "out", Emulated())
    assert [t.state for t in results.trials] == ["done"] * 3
    assert [[samples for samples, _ in t.curve] for t in results.trials] == [[400, 2000]] * 3


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
def test_a_faulty_search_is_reported_in_two_lines(
    store: Store, tmp_path: Path, words: list[str], message: str, hint: str, voxelscale: Command
) -> None:
    code, _, errors = voxelscale("search", store.path, tmp_path / "out", *words)
    assert code == 2
    lines = told(errors)
    assert message in lines[0]
    assert hint in lines[1]


def test_no_search_there_is_reported(tmp_path: Path, voxelscale: Command) -> None:
    for verb in ("status", "report"):
        code, _, errors = voxelscale("search", verb, tmp_path)
        assert code == 2
        assert "no search there" in told(errors)[0]


def _written(config: Config, beside: Path) -> Path:
    import yaml

    path = beside.with_suffix(".other.yaml")
    path.write_text(yaml.safe_dump(to_dict(config)))
    return path
