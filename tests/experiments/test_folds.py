"""Cross-validation from the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Command
from tests.train.runs import processes, seen_in

from voxelscale.config import Config, dump, load
from voxelscale.dataset import DataSet
from voxelscale.experiments import at_once
from voxelscale.experiments.at_once import run_at_once
from voxelscale.experiments.once import INTERRUPTED
from voxelscale.formats import read_label
from voxelscale.model.bundle import read_bundle
from voxelscale.store import open_store
from voxelscale.store.prepare import prepare
from voxelscale.train.log import STOP_FILE


@pytest.fixture(scope="module")
def folded(scans: Path, settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two folds."""
    folder = tmp_path_factory.mktemp("folded")
    config = load(settings)
    data = DataSet(path=scans, reading=config.reading)
    prepare(data.cases, folder, config.prepare)
    return folder


@pytest.fixture(scope="module")
def settings(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quick = replace(
        tiny,
        train=replace(tiny.train, samples=40, validate_every=0),
        prepare=replace(tiny.prepare, folds=2),
        optim=replace(tiny.optim, lr=0.01),
        predict=replace(tiny.predict, probabilities=True),
    )
    path = tmp_path_factory.mktemp("settings") / "cv.yaml"
    path.write_text(dump(quick))
    return path


def test_every_scan_is_predicted_by_a_model_that_has_not_seen_it(
    scans: Path, settings: Path, tmp_path: Path, voxelscale: Command
) -> None:
    store, out = tmp_path / "store", tmp_path / "cv"
    assert voxelscale("prepare", scans, store, "--config", settings)[0] == 0
    command = ["cv", store, scans, out, "--config", settings]
    code, text, errors = voxelscale(*command, "--folds", "1")
    assert (code, text) == (0, "1 fold to go: 0\n"), errors
    first = (out / "fold_1" / "run" / "model.vxs").read_bytes()
    code, text, errors = voxelscale(*command, "--jobs", "2")
    assert code == 0, errors
    assert "several models" not in errors
    assert (out / "fold_1" / "run" / "model.vxs").read_bytes() == first

    folds = open_store(store).folds
    assert len(folds) == 2
    val = [{case for case, split in fold.split_of.items() if split == "val"} for fold in folds]
    assert not val[0] & val[1]
    evaluation = json.loads((out / "evaluation" / "evaluation.json").read_text())
    cases = evaluation["cases"]
    assert {row["case"] for row in cases} == val[0] | val[1]
    summary = json.loads((out / "cv.json").read_text())
    rows = summary["folds"]
    assert summary["dice"] == evaluation["dice"]
    assert summary["cpm"] == evaluation["froc"]["cpm"]
    for fold, row in enumerate(rows):
        own = [case["dice"] for case in cases if case["case"] in val[fold]]
        assert row["dice"] == pytest.approx(np.mean([dice for dice in own if dice is not None]))
        run, again = out / f"fold_{fold}" / "run", tmp_path / f"again_{fold}"
        assert read_bundle(run).config.data.fold == fold
        assert voxelscale("predict", run, scans, again, "--store", store, "--split", "val")[0] == 0
        for case in val[fold]:
            mask, same = (read_label(p / case / "mask.nii.gz").array for p in (out / "predictions", again))
            assert np.array_equal(mask, same)

    assert voxelscale(*command)[1] == text, "again it only reports"

    best = tmp_path / "best"
    code, _, errors = voxelscale("best", out, scans, best)
    assert code == 0, errors
    (row,) = json.loads((best / "best.json").read_text())["configurations"]
    assert row["dice"] == pytest.approx(summary["dice"]["mean"], abs=1e-9), "near the lungs, too"
    assert row["cpm"] == pytest.approx(summary["cpm"], abs=0.02), "scores are in steps of 1/255"
    assert len(read_bundle(best / "model.vxs").networks) == 2
    assert not read_bundle(best / "model.vxs").config.predict.probabilities
    assert voxelscale("predict", best / "model.vxs", scans, tmp_path / "new")[0] == 0


def test_all_folds_have_one_config(
    scans: Path, settings: Path, folded: Path, tmp_path: Path, voxelscale: Command
) -> None:
    """Their predictions are evaluated as one cross-validation."""
    config = load(settings, ["data.fold=0", "train.threads=3"])  # threads may differ
    (tmp_path / "fold_0" / "run").mkdir(parents=True)
    (tmp_path / "fold_0" / "run" / "config.yaml").write_text(dump(config))
    for changed in ("model.filters=6", "predict.threshold=0.3"):
        words = ("--folds", "1", "--config", settings, "--set", changed)
        code, _, errors = voxelscale("cv", folded, scans, tmp_path, *words)
        assert code == 2
        assert f"fold_0/run: was started with {changed.partition('=')[0]}=" in errors
        assert not (tmp_path / "fold_1").exists()


def test_an_error_of_one_of_several_at_a_time_is_one_line(
    scans: Path, settings: Path, folded: Path, tmp_path: Path, voxelscale: Command
) -> None:
    (tmp_path / "fold_1").mkdir()
    (tmp_path / "fold_1" / "run").write_text("in the way")
    code, _, errors = voxelscale("cv", folded, scans, tmp_path, "--config", settings, "--jobs", "2")
    told = [line for line in errors.splitlines() if line.startswith(("error: ", "hint: "))]
    assert code == 2, errors
    assert len(told) == 2
    assert told[0].startswith("error: fold 1: ")
    assert "Traceback" not in errors
    assert (tmp_path / "fold_0" / "run" / "model.vxs").is_file(), "the other one has gone on"


def test_a_fold_that_another_has_stopped_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a batch system stops one process: what is left must not pass for a whole cross-validation."""

    def begin(*facts: Any) -> Any:
        *_, fold, share = facts
        code = f"raise SystemExit({INTERRUPTED if fold else 0})"
        process, errors = subprocess.Popen([sys.executable, "-c", code]), (tmp_path / "said").open("wb+")
        return at_once._Running(fold=fold, share=share, process=process, errors=errors)

    monkeypatch.setattr(at_once, "_begin", begin)
    monkeypatch.setattr(at_once, "LOOK", 0.05)
    data = DataSet(path=tmp_path, reading=Config().reading)
    assert not run_at_once(Config(), tmp_path, data, tmp_path, [0, 1], jobs=2)
    assert run_at_once(Config(), tmp_path, data, tmp_path, [0], jobs=2)


def test_folds_at_a_time_are_stopped_and_go_on(
    scans: Path, settings: Path, folded: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "voxelscale.cli", "cv", folded, scans, tmp_path, "--jobs", "2"]
    words += ["--config", settings, "--set", "train.samples=1000000"]
    process = subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True)
    runs = [tmp_path / f"fold_{fold}" / "run" for fold in (0, 1)]
    deadline = time.monotonic() + 120
    while not all(seen_in(run) for run in runs):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped and saved; the same command resumes" in errors
    assert not [words for _, words in processes() if str(tmp_path) in words]
    assert not any((run / STOP_FILE).exists() for run in runs)


def test_what_cannot_be_cross_validated(
    scans: Path, settings: Path, store: object, tmp_path: Path, voxelscale: Command
) -> None:
    path = store.path  # type: ignore[attr-defined]
    for words, said in (
        ((), "has no folds"),
        (("--folds", "0"), "no folds"),
        (("--folds", "one"), "not numbers"),
        (("--folds", "0", "--set", "data.fold=0"), "data.fold"),
    ):
        code, _, errors = voxelscale("cv", path, scans, tmp_path / "cv", "--config", settings, *words)
        assert (code, said in errors) == (2, True), errors
