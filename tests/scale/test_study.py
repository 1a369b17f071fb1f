"""The study's plan and sums, against figures by hand; then the command, with real trainings."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats
from tests.conftest import Command
from tests.experiments.emulated import Emulated
from tests.scale.test_cost import STEP
from tests.train.runs import processes, seen_in

from voxelscale.config import Config, dump, load
from voxelscale.console import Progress
from voxelscale.errors import VoxelscaleError
from voxelscale.experiments.once import Ending
from voxelscale.experiments.shares import Share, share_devices
from voxelscale.scale import scale as command
from voxelscale.scale import study as study_module
from voxelscale.scale.advice import CostedRow, verdict
from voxelscale.scale.cost import MODEL, StepCost
from voxelscale.scale.study import Stop, Trial, TrialScore, claim, plan, run_study, summarise, t_interval
from voxelscale.scale.trials import real_ranks, train_trial
from voxelscale.store import Store
from voxelscale.train.log import read_events
from voxelscale.train.optim import peak_rate


def config(*sets: str) -> Config:
    few = ["scale.workers=[1,4]", "scale.seeds=[0,1]", "train.samples=640", "train.batch_size=1"]
    return load(None, [*few, "optim.reference_batch=1", *sets])


def made_up(trial: Trial, run: Path, stop: Stop) -> TrialScore:
    """Dice falls with the logarithm of the workers, less so with the recipe."""
    loss = 0.1 if trial.recipe == "unchanged" else 0.01
    dice = 0.8 + 0.01 * trial.seed - loss * (trial.workers.bit_length() - 1)
    return TrialScore(dice=dice, curve=((320, dice - 0.05), (640, dice)))


def test_the_plan_has_every_trial_with_its_recipe_applied() -> None:
    trials = plan(config("scale.recipes=[unchanged, large_batch]"))
    assert len({trial.name for trial in trials}) == len(trials) == 8
    assert {(t.recipe, t.workers, t.seed) for t in trials} == {
        (r, w, s) for r in ("unchanged", "large_batch") for w in (1, 4) for s in (0, 1)
    }
    for trial in trials:
        assert trial.config.train.seed == trial.seed
        assert trial.config.train.samples == 640
        rate = peak_rate(trial.config.optim, trial.global_batch)
        factor = 1.0 if trial.recipe == "unchanged" else 0.7 * trial.workers**0.5
        assert rate == pytest.approx(factor * config().optim.used.lr)


def test_settings_over_a_recipe() -> None:
    name = "large_batch:optim.warmup=0;optim.grow_from=0"
    (trial, *_) = plan(config(f'scale.recipes=["{name}"]', "scale.workers=[64]"))
    assert (trial.config.optim.warmup, trial.config.optim.used.scaling) == (0.0, "sqrt")
    assert trial.updates == 10
    with pytest.raises(VoxelscaleError, match="no_such"):
        plan(config('scale.recipes=["large_batch:optim.no_such=1"]'))
    with pytest.raises(VoxelscaleError, match="recipe"):
        plan(config("scale.recipes=[larger_batch]"))


def test_what_cannot_be_emulated_is_refused_before_anything_is_trained(
    store: Store, tmp_path: Path, voxelscale: Command
) -> None:
    sets = ("model.norm=sync_batch", "scale.recipes=[unchanged, large_batch]", "scale.workers=[1, 8]")
    words = [word for one in sets for word in ("--set", one)]
    code, _, errors = voxelscale("scale", store.path, tmp_path / "study", *words)
    assert code == 2
    assert "recipe large_batch: its growing batch cannot be emulated with sync_batch" in errors
    assert "1 device for 8 workers" in errors
    assert not (tmp_path / "study" / "runs").exists()


def test_a_step_is_timed_again_on_another_machine(
    tiny: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def measure(config: Config, _: Store) -> StepCost:
        timed.append(config.train.checkpoint_activations)
        return STEP

    monkeypatch.setattr("voxelscale.scale.measure.measure_step", measure)
    monkeypatch.setattr("voxelscale.scale.measure.measure_start", lambda *_: 1.0)
    less = replace(tiny, train=replace(tiny.train, checkpoint_activations=True))
    for machine in ("a laptop", "a GPU"):
        monkeypatch.setattr(command, "_machine", lambda machine=machine: machine)
        for one in (tiny, tiny, less):
            command._step(one, store, tmp_path)
    assert timed == [False, True] * 2


def test_sums_by_hand(tmp_path: Path) -> None:
    rows = run_study(config("scale.recipes=[unchanged, large_batch]"), tmp_path, made_up, jobs=2)
    by = {(row.recipe, row.workers): row for row in rows}
    four = by["unchanged", 4]
    assert four.dice == pytest.approx(statistics.mean([0.6, 0.61]))
    assert four.relative == pytest.approx((0.6 / 0.8 + 0.61 / 0.81) / 2)
    assert four.updates == 160
    assert four.samples_to_target is None
    assert by["unchanged", 1].samples_to_target == 320
    assert by["large_batch", 4].relative_own == pytest.approx((0.78 / 0.8 + 0.79 / 0.81) / 2)
    assert by["large_batch", 4].samples_to_target == 320


def test_intervals_are_students() -> None:
    values = [0.71, 0.74, 0.78, 0.7]
    low, high = stats.t.interval(0.95, 3, statistics.mean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx((low, high), abs=1e-4)
    assert t_interval([0.5]) == (0.5, 0.5)


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    study = config("scale.recipes=[unchanged]")
    done: list[str] = []

    def fails_at_the_third(trial: Trial, run: Path, stop: Stop) -> TrialScore:
        if len(done) == 2:
            raise VoxelscaleError("no power", "plug it in")
        done.append(trial.name)
        return made_up(trial, run, stop)

    with pytest.raises(VoxelscaleError, match="no power"):
        run_study(study, tmp_path, fails_at_the_third)
    begun = len(done)

    def counted(trial: Trial, run: Path, stop: Stop) -> TrialScore:
        done.append(trial.name)
        return made_up(trial, run, stop)

    rows = run_study(study, tmp_path, counted)
    assert begun == 2
    assert len(done) == len(set(done)) == 4
    assert rows == run_study(study, tmp_path, fails_at_the_third), "nothing is left to train"
    more = replace(study, scale=replace(study.scale, workers=(1, 2, 4)))
    assert len(run_study(more, tmp_path, counted)) == 3
    assert len(done) == 6
    with pytest.raises(VoxelscaleError, match="another config"):
        run_study(config("optim.lr=0.5"), tmp_path, counted)


def test_a_study_is_of_one_store(tiny: Config, store: Store, tmp_path: Path) -> None:
    """What was trained on another store is no result of this one."""
    claim(tiny, tmp_path)  # a study of before its store was noted
    claim(tiny, tmp_path, "another store's digest")
    with pytest.raises(VoxelscaleError, match="another store"):
        command.scale(tiny, store.path, tmp_path)
    assert not (tmp_path / "steps").exists(), "it is refused before anything is measured"


@pytest.mark.parametrize(("words", "measured"), [((), True), (("--no-measure",), False)])
def test_the_option_wins_over_the_config(
    words: tuple[str, ...],
    measured: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    voxelscale: Command,
) -> None:
    asked: list[Config] = []

    def ask(config: Config, *_: Path) -> list[CostedRow]:
        asked.append(config)
        return []

    monkeypatch.setattr(command, "scale", ask)
    assert voxelscale("scale", tmp_path, tmp_path, "--set", "scale.measure=true", *words)[0] == 0
    assert asked[0].scale.measure is measured


def test_recipes_of_the_same_settings_share_a_training(tmp_path: Path) -> None:
    """Two at a time in one folder would be in each other's way."""
    trained: list[Path] = []

    def noted(trial: Trial, run: Path, stop: Stop) -> TrialScore:
        trained.append(run)
        return made_up(trial, run, stop)

    study = config("scale.recipes=[unchanged, auto]", "scale.workers=[1, 2, 8]", "scale.seeds=[0]")
    rows = run_study(study, tmp_path, noted, jobs=6)
    assert len(trained) == len(set(trained)) == 4, "auto is another recipe from 8 workers on"
    assert [(row.recipe, row.workers) for row in rows] == [
        (r, w) for r in study.scale.recipes for w in (1, 2, 8)
    ]
    assert rows[0].dice == rows[3].dice


def test_what_stands_there_twice_is_no_further_seed() -> None:
    for twice in ("workers=[1, 1, 4]", "seeds=[0, 0]", "recipes=[muon, muon]"):
        with pytest.raises(VoxelscaleError) as caught:
            config(f"scale.{twice}")
        assert "each once" in caught.value.hint


def test_one_seed_left_to_compare_with_gives_no_interval() -> None:
    """Where one worker has a Dice with one of two seeds only, nothing is certain."""
    trials = plan(config("scale.recipes=[unchanged]"))
    one, many = summarise(trials, [TrialScore(dice=d) for d in (0.5, 0.5, 0.0, 0.2)], 0.9)
    assert [(row.workers, row.relative, row.relative_low) for row in (one, many)] == [
        (1, 1, None),
        (4, 1, None),
    ]
    assert verdict(many, 0.9) == "not certain"


def test_progress_counts_the_samples_of_running_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training of minutes must be seen to go on before it ends; a study that goes on starts there."""
    shown: list[tuple[int, str]] = []

    class Recorded(Progress):
        def update(self, done: int, note: str = "", left: float | None = None) -> None:
            shown.append((done, note))

    def half_way(trial: Trial, run: Path, stop: Stop) -> TrialScore:
        run.mkdir(parents=True)
        half = trial.config.train.samples // 2
        (run / "metrics.jsonl").write_text(json.dumps({"event": "train", "samples": half}) + "\n")
        if trial.workers == 4:
            raise VoxelscaleError("no power", "plug it in")
        begun = len(shown)
        while len(shown) < begun + 2:
            time.sleep(0.01)
        return made_up(trial, run, stop)

    monkeypatch.setattr(study_module, "Progress", Recorded)
    monkeypatch.setattr(study_module, "LOOK", 0.01)
    study = config("scale.seeds=[0]", "scale.recipes=[unchanged]", "scale.workers=[1, 4]")
    budget = study.train.samples
    with pytest.raises(VoxelscaleError, match="no power"):
        run_study(study, tmp_path, half_way)
    assert (budget // 2, "samples; 0 of 2 trainings done") in shown
    assert (budget, "samples; 1 of 2 trainings done; unchanged, 1 worker, seed 0: Dice 0.800") in shown
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)
    shown.clear()
    run_study(study, tmp_path, made_up)
    assert shown[0][0] >= budget + budget // 2


@pytest.mark.parametrize(("workers", "wanted", "ranks"), [(64, 8, 8), (12, 8, 6), (7, 4, 1), (1, 8, 1)])
def test_real_ranks_divide_the_workers(workers: int, wanted: int, ranks: int) -> None:
    assert real_ranks(workers, wanted) == ranks


def test_a_trial_that_fails_lets_the_others_save_and_stop(tmp_path: Path) -> None:
    stopped: list[str] = []
    begun = threading.Event()

    def one_fails(trial: Trial, run: Path, stop: Stop) -> TrialScore:
        if trial.workers == 1:
            begun.wait(60)
            raise VoxelscaleError("no power", "plug it in")
        begun.set()
        while not stop.asked:
            time.sleep(0.01)
        stopped.append(trial.name)
        raise KeyboardInterrupt

    with pytest.raises(VoxelscaleError, match="no power"):
        run_study(config("scale.seeds=[0]", "scale.recipes=[unchanged]"), tmp_path, one_fails, jobs=2)
    assert len(stopped) == 1


INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
from tests.scale.test_study import config
from voxelscale.scale.study import run_study

def waits(trial, run, stop):
    for wish in ("asked", "at_once"):
        time.sleep(0.5)  # the main thread is to be waiting
        os.kill(os.getpid(), signal.SIGINT)
        while not getattr(stop, wish):
            time.sleep(0.01)
        os.write(1, f"{wish}\\n".encode())
    raise KeyboardInterrupt

try:
    run_study(config(), Path(sys.argv[1]), waits)
except KeyboardInterrupt:
    os.write(1, b"interrupted\\n")
"""


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "study")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert sorted(done.stdout.split()) == ["asked", "at_once", "interrupted"], done.stderr
    assert "once more to stop at once" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_trial_is_trained_by_as_many_real_ranks_as_divide_its_workers(tmp_path: Path) -> None:
    (trial,) = plan(config("scale.recipes=[unchanged]", "scale.workers=[12]", "scale.seeds=[3]"))
    trial = replace(trial, config=replace(trial.config, train=replace(trial.config.train, ranks=8)))
    train = Emulated(dice=lambda _: 0.7)
    score = train_trial(
        trial, tmp_path / "run", Stop(), store=tmp_path, shares=share_devices(1), train=train
    )
    assert score == TrialScore(dice=0.7, curve=((640, 0.7),))
    (trained,) = train.trained
    assert (trained.config.train.ranks, trained.config.train.virtual_workers) == (6, 2)
    assert trained.config.train.seed == 3


@pytest.mark.parametrize(
    ("jobs", "gpus", "shares"),
    [
        (2, ["0", "1", "2", "3"], [("0", "1"), ("2", "3")]),
        (3, ["4", "5", "6", "7"], [("4",), ("5",), ("6",)]),
        (3, ["0", "1"], [("0",), ("1",), ("0",)]),
        (2, [], [(), ()]),
    ],
)
def test_trainings_at_a_time_have_gpus_of_their_own(
    jobs: int, gpus: list[str], shares: list[tuple[str, ...]]
) -> None:
    queue = share_devices(jobs, gpus)
    assert [queue.get() for _ in range(jobs)] == [Share(gpus=each, sharers=jobs) for each in shares]
    assert queue.empty()


def test_a_training_sees_the_gpus_of_its_share_alone(tmp_path: Path) -> None:
    (trial,) = plan(config("scale.recipes=[unchanged]", "scale.workers=[12]", "scale.seeds=[3]"))
    trial = replace(trial, config=replace(trial.config, train=replace(trial.config.train, ranks=0)))
    shares, train = share_devices(2, ["0", "1", "5", "7"]), Emulated(dice=lambda _: 0.7)
    for run in ("one", "other", "third"):
        train_trial(trial, tmp_path / run, Stop(), store=tmp_path, shares=shares, train=train)
    seen = [one.environment["CUDA_VISIBLE_DEVICES"] for one in train.trained]
    assert seen == ["0,1", "5,7", "0,1"]
    assert {one.config.train.ranks for one in train.trained} == {2}


def test_how_a_training_ends_decides_its_score(tmp_path: Path) -> None:
    (trial, *_) = plan(config("scale.recipes=[unchanged]"))

    def score(ending: Ending, stop: Stop = Stop()) -> TrialScore:  # noqa: B008
        train = Emulated(ending=lambda _: ending)
        return train_trial(
            trial, tmp_path / "run", stop, store=tmp_path, shares=share_devices(1), train=train
        )

    assert score("diverged") == TrialScore(dice=0.0, diverged=True)
    with pytest.raises(VoxelscaleError, match="made up"):
        score("failed")
    with pytest.raises(KeyboardInterrupt):
        score("finished", Stop(asked=True))
    with pytest.raises(KeyboardInterrupt):
        score("killed")


def test_a_trial_that_is_to_stop_at_once(tiny: Config, store: Store, tmp_path: Path) -> None:
    (trial, *_) = plan(replace(tiny, train=replace(tiny.train, samples=10**6)))
    with pytest.raises(KeyboardInterrupt):
        train_trial(
            trial,
            tmp_path / "run",
            Stop(asked=True, at_once=True),
            store=store.path,
            shares=share_devices(1),
        )
    assert not [words for _, words in processes() if str(tmp_path) in words]


def test_ctrl_c_saves_the_trainings_and_the_same_command_goes_on(
    tiny: Config, store: Store, tmp_path: Path
) -> None:
    # Only a training that stops well leaves a checkpoint before its end.
    train = replace(tiny.train, samples=300, batch_size=1, ranks=0, checkpoint_every=10**6)
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(dump(replace(tiny, train=replace(train, checkpoint_seconds=0.0))))
    out.mkdir()
    (out / "model_check.json").write_text(
        json.dumps({"lines": [], "model": MODEL})
    )  # the time model is not what is tested
    command = [sys.executable, "-m", "voxelscale.cli", "scale", str(store.path), str(out)]
    command += ["--config", str(path), "--workers", "1,2", "--recipes", "unchanged", "--seeds", "0"]
    command += ["--jobs", "2", "--interconnect", "alpha=5us,beta=12GB/s"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while not all(logs := [read_events(run) for run in (out / "runs").glob("w*[!l]")]) or len(logs) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everybody
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "the same command resumes" in errors
    assert not [words for _, words in processes() if str(out) in words]
    before = {run: read_events(run) for run in (out / "runs").glob("w*[!l]")}
    assert len(before) == 2
    assert all(0 < seen_in(run)[-1] < 300 for run in before)
    assert not list(out.glob("trials/*"))
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    for run, events in before.items():
        assert read_events(run)[: len(events)] == events, "it went on, and did not begin again"
        assert read_events(run)[-1]["samples"] == 300


def test_the_command(tiny: Config, store: Store, tmp_path: Path, voxelscale: Command) -> None:
    """Real trainings at 1 and 4 workers, two recipes; again it only reports."""
    small = replace(
        tiny,
        train=replace(tiny.train, samples=48, batch_size=1, ranks=0),
        optim=replace(tiny.optim, reference_batch=1),
    )
    path = tmp_path / "study.yaml"
    path.write_text(dump(small))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model_check.json").write_text('{"lines": ["of an earlier model"]}')
    command = ["scale", store.path, tmp_path / "out", "--config", path, "--workers", "1,4"]
    command += ["--seeds", "0", "--jobs", "2", "--interconnect", "alpha=5us,beta=12GB/s"]
    command += ["--cluster", "reedbush-l", "--set", "scale.price_per_hour=36"]
    command += ["--recipes", "unchanged,muon"]
    code, first, errors = voxelscale(*command)
    assert code == 0, errors
    assert len(list((tmp_path / "out" / "runs").glob("*/model.vxs"))) == 4
    facts = json.loads((tmp_path / "out" / "scaling.json").read_text())
    by = {(row["recipe"], row["workers"]): row for row in facts["rows"]}
    assert len(by) == 4
    for row in by.values():
        assert 0 <= row["dice"] <= 1
        assert row["seconds"] > 0
        assert row["start_seconds"] > 0, "a process starts and imports"
        assert row["seconds"] > row["start_seconds"]
        assert row["price"] == pytest.approx(36 * row["workers"] * row["seconds"] / 3600)
    cluster = facts["cluster"]
    assert (cluster["devices"], cluster["between"]) == (4, "alpha=5us,beta=12GB/s")
    assert facts["network"]["hidden"] in (0, 1)
    assert facts["model_check"]["model"] == MODEL, "it was checked again"
    assert "of an earlier model" not in facts["notes"]
    assert by["unchanged", 1]["relative"] == 1
    one, four = by["unchanged", 1], by["unchanged", 4]
    # How much more depends on how busy this machine is: workers wait for the slowest.
    assert four["samples_per_second"] > one["samples_per_second"]
    assert "<svg" in (tmp_path / "out" / "scaling.svg").read_text()
    page = (tmp_path / "out" / "scaling.html").read_text()
    assert "beta 12.00 GB/s" in page
    assert voxelscale(*command)[1] == first
    assert "muon" in first
