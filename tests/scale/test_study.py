"""The study's plan and sums, against figures by hand; then the command, with real trainings."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from voxelscale.config import Config, dump, load
from voxelscale.data.store import Store
from voxelscale.errors import VoxelscaleError
from voxelscale.scale.study import Outcome, Trial, interval, plan, run_study
from voxelscale.scale.trials import real_ranks
from voxelscale.train.optim import peak_rate


def config(*sets: str) -> Config:
    few = ["scale.workers=[1,4]", "scale.seeds=[0,1]", "train.samples=640", "train.batch_size=1"]
    return load(None, [*few, "optim.reference_batch=1", *sets])


def made_up(trial: Trial, run: Path) -> Outcome:
    """Dice falls with the logarithm of the workers, less so with the recipe."""
    loss = 0.1 if trial.recipe == "unchanged" else 0.01
    dice = 0.8 + 0.01 * trial.seed - loss * (trial.workers.bit_length() - 1)
    return Outcome(dice=dice, curve=((320, dice - 0.05), (640, dice)))


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
        assert rate == pytest.approx(factor * config().optim.lr)


def test_settings_over_a_recipe() -> None:
    name = "large_batch:optim.warmup=0;optim.grow_from=0"
    (trial, *_) = plan(config(f'scale.recipes=["{name}"]', "scale.workers=[64]"))
    assert (trial.config.optim.warmup, trial.config.optim.scaling) == (0.0, "sqrt")
    assert trial.updates == 10
    with pytest.raises(VoxelscaleError, match="no_such"):
        plan(config('scale.recipes=["large_batch:optim.no_such=1"]'))
    with pytest.raises(VoxelscaleError, match="recipe"):
        plan(config("scale.recipes=[larger_batch]"))


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
    assert interval(values) == pytest.approx((low, high), abs=1e-4)
    assert interval([0.5]) == (0.5, 0.5)


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    study = config("scale.recipes=[unchanged]")
    done: list[str] = []

    def fails_at_the_third(trial: Trial, run: Path) -> Outcome:
        if len(done) == 2:
            raise VoxelscaleError("no power", "plug it in")
        done.append(trial.name)
        return made_up(trial, run)

    with pytest.raises(VoxelscaleError, match="no power"):
        run_study(study, tmp_path, fails_at_the_third)
    begun = len(done)

    def counted(trial: Trial, run: Path) -> Outcome:
        done.append(trial.name)
        return made_up(trial, run)

    rows = run_study(study, tmp_path, counted)
    assert begun == 2
    assert len(done) == len(set(done)) == 4
    assert rows == run_study(study, tmp_path, fails_at_the_third), "nothing is left to train"
    more = replace(study, scale=replace(study.scale, workers=(1, 2, 4)))
    assert len(run_study(more, tmp_path, counted)) == 3
    assert len(done) == 6
    with pytest.raises(VoxelscaleError, match="another config"):
        run_study(config("optim.lr=0.5"), tmp_path, counted)


@pytest.mark.parametrize(("workers", "wanted", "ranks"), [(64, 8, 8), (12, 8, 6), (7, 4, 1), (1, 8, 1)])
def test_real_ranks_divide_the_workers(workers: int, wanted: int, ranks: int) -> None:
    assert real_ranks(workers, wanted, 1) == ranks


def test_the_command(tiny: Config, store: Store, tmp_path: Path) -> None:
    """Real trainings at 1 and 4 workers, two recipes; again it only tells."""
    small = replace(
        tiny,
        train=replace(tiny.train, samples=48, batch_size=1, ranks=0),
        optim=replace(tiny.optim, reference_batch=1),
    )
    path = tmp_path / "study.yaml"
    path.write_text(dump(small))
    command = [sys.executable, "-m", "voxelscale.cli", "scale", str(store.path), str(tmp_path / "out")]
    command += ["--config", str(path), "--workers", "1,4", "--seeds", "0", "--jobs", "2"]
    command += ["--interconnect", "alpha=5us,beta=12GB/s"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert len(list((tmp_path / "out" / "runs").glob("*/model.vxs"))) == 4
    facts = json.loads((tmp_path / "out" / "scaling.json").read_text())
    by = {(row["recipe"], row["workers"]): row for row in facts["rows"]}
    assert len(by) == 4
    for row in by.values():
        assert 0 <= row["dice"] <= 1
        assert row["seconds"] > 0
    assert by["unchanged", 1]["relative"] == 1
    one, four = by["unchanged", 1], by["unchanged", 4]
    assert four["samples_per_second"] > 2 * one["samples_per_second"]
    assert "<svg" in (tmp_path / "out" / "scaling.svg").read_text()
    page = (tmp_path / "out" / "scaling.html").read_text()
    assert "beta 12.00 GB/s" in page
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.stdout == first.stdout
    assert "large_batch" in again.stdout
