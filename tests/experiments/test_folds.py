"""Cross-validation from the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Command

from voxelscale.config import Config, dump
from voxelscale.formats import read_label
from voxelscale.model.bundle import read_bundle
from voxelscale.store import open_store


@pytest.fixture(scope="module")
def settings(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quick = replace(
        tiny,
        train=replace(tiny.train, samples=40, validate_every=0),
        prepare=replace(tiny.prepare, folds=2),
        optim=replace(tiny.optim, lr=0.01),
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
    code, text, errors = voxelscale(*command)
    assert code == 0, errors
    assert "several models" not in errors
    assert (out / "fold_1" / "run" / "model.vxs").read_bytes() == first

    folds = open_store(store).folds
    assert len(folds) == 2
    val = [{case for case, split in fold.split_of.items() if split == "val"} for fold in folds]
    assert not val[0] & val[1]
    cases = json.loads((out / "evaluation" / "evaluation.json").read_text())["cases"]
    assert {row["case"] for row in cases} == val[0] | val[1]
    rows = json.loads((out / "cv.json").read_text())["folds"]
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
