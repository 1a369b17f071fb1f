"""The batch files for Slurm, run by a real Slurm of two machines."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.cluster.machines import ROOT, environment, machines
from tests.cluster.slurm import Slurm, slurm
from tests.train.runs import apart, final_weights, seen_in

from voxelscale.config import Config, dump
from voxelscale.store import Store

SCRIPTS = ROOT / "examples" / "slurm"
HERE = ("--gpus-per-node=0", "--gpus=0", "--cpus-per-task=1", "--ntasks-per-node=1")
"""sbatch's options: what the batch files ask for and a machine of the tests does not have."""


URGENT = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    with machines(folder) as two, slurm(folder, two) as made:
        yield made


@dataclass(frozen=True)
class Job:
    """A batch file, given to a Slurm; its output is in `log`."""

    cluster: Slurm
    log: Path

    def submit(self, script: str, *words: str | Path, option: str = "--requeue") -> str:
        options = [f"--output={self.log}", f"--chdir={self.log.parent}", *HERE, option]
        return self.cluster.submit(*options, SCRIPTS / script, *words)

    def end(self, job: str, state: str = "COMPLETED") -> None:
        """Wait for its end, which must be that one."""
        self.cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=240)
        assert self.cluster.state(job) == state, self.log.read_text()


@pytest.fixture
def job(cluster: Slurm, tmp_path: Path) -> Job:
    return Job(cluster, tmp_path / "log.txt")


@pytest.fixture
def settings(tiny: Config, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(dump(replace(tiny, train=replace(tiny.train, batch_size=1))))
    return path


def wait_for(run: Path, least: int) -> None:
    deadline = time.monotonic() + 200
    while not (seen_in(run) and seen_in(run)[-1] >= least):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_training_that_is_asked_to_stop_is_queued_again_and_goes_on(
    job: Job, settings: Path, store: Store, tmp_path: Path
) -> None:
    run, options = tmp_path / "run", ("--config", settings, "--set", "train.samples=640")
    number = job.submit("train.sh", store.path, run, *options)
    wait_for(run, 48)
    job.cluster.run("scancel", "--signal=TERM", "--batch", number)  # as --signal=B:TERM does
    job.end(number)
    assert "Restarts=1" in job.cluster.run("scontrol", "show", "job", number)
    told = job.log.read_text()
    assert told.count("stopped and saved") == 1, told
    assert "an update: 1 patch x 2 ranks; 640 samples in all; resumes after" in told

    whole = tmp_path / "whole"
    alone = [sys.executable, "-m", "voxelscale.cli", "train", store.path, whole, *options]
    subprocess.run(
        [*map(str, alone), "--set", "train.ranks=2"], check=True, capture_output=True, env=environment()
    )
    assert apart(final_weights(run), final_weights(whole)) <= 1e-5


@pytest.mark.slow
def test_a_training_that_is_preempted_saves_and_goes_on(
    job: Job, settings: Path, store: Store, tmp_path: Path
) -> None:
    run, options = tmp_path / "run", ("--config", settings, "--set", "train.samples=640")
    number = job.submit("train.sh", store.path, run, *options)
    wait_for(run, 48)
    urgent = job.cluster.submit(*URGENT, "--wrap=true")
    job.end(number)
    assert job.cluster.state(urgent) == "COMPLETED"
    told = job.log.read_text()
    assert told.count("stopped and saved") == 1, told
    assert "640 samples in all; resumes after" in told
    assert seen_in(run)[-1] == 640


@pytest.mark.slow
def test_a_cancelled_training_saves_and_stays_cancelled(
    job: Job, settings: Path, store: Store, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ("--config", settings, "--set", "train.samples=4000")
    number = job.submit("train.sh", store.path, run, *options)
    wait_for(run, 48)
    job.cluster.run("scancel", number)
    job.end(number, "CANCELLED")
    deadline = time.monotonic() + 30
    while "stopped and saved" not in job.log.read_text():
        assert time.monotonic() < deadline, job.log.read_text()
        time.sleep(0.1)
    assert seen_in(run)[-1] < 4000


@pytest.mark.slow
def test_folds_are_an_array(job: Job, settings: Path, tiny: Config, scans: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "cv"
    prepare = [sys.executable, "-m", "voxelscale.cli", "prepare", scans, store, "--config", settings]
    subprocess.run(
        [*map(str, prepare), "--set", "prepare.folds=2"], check=True, capture_output=True, env=environment()
    )
    number = job.submit("folds.sh", store, scans, out, "--config", settings, option="--array=0-1")
    job.end(f"{number}_0")
    job.end(f"{number}_1")
    assert seen_in(out / "fold_0" / "run")[-1] == seen_in(out / "fold_1" / "run")[-1] == 40
    assert len(json.loads((out / "cv.json").read_text())["folds"]) == 2, "the last one has evaluated all"


@pytest.mark.slow
def test_each_task_of_a_search_is_a_worker(job: Job, settings: Path, store: Store, tmp_path: Path) -> None:
    out = tmp_path / "search"
    options = ("--config", settings, "--trials", "2", "--set", "search.samples=20")
    number = job.submit("search.sh", store.path, out, *options, option="--nodes=2")
    job.end(number)
    assert job.log.read_text().count("report in") == 2
    assert (out / "best.yaml").is_file()


@pytest.mark.slow
def test_a_scaling_study(job: Job, settings: Path, store: Store, tmp_path: Path) -> None:
    out = tmp_path / "study"
    options = ("--config", settings, "--workers", "1,2", "--recipes", "unchanged", "--seeds", "0")
    number = job.submit("scale.sh", store.path, out, *options)
    job.end(number)
    rows = json.loads((out / "scaling.json").read_text())["rows"]
    assert [row["workers"] for row in rows] == [1, 2]
