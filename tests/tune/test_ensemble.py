"""Several networks as one: the mean of their probabilities, in a file like any model's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import Command

from voxelscale.config import Config, load
from voxelscale.console import count
from voxelscale.dataset.listing import list_sources
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_sealed
from voxelscale.geometry import Grid, Scan, Triple, affine_from_itk
from voxelscale.model.build import build_model
from voxelscale.model.bundle import Bundle, Calibration, load_untrusted, read_bundle, write_bundle
from voxelscale.predict.predictor import Predictor
from voxelscale.predict.record import Record, read_record
from voxelscale.samples.batch import Normalisation
from voxelscale.store.fingerprint import open_fold
from voxelscale.store.prepare import prepare

CPU = torch.device("cpu")


def made(config: Config, seed: int, spacing: Triple = (5.0, 4.0, 4.0), low: float = -1000.0) -> Bundle:
    """A network that was never trained."""
    torch.manual_seed(seed)
    network = build_model(config.model, config.data.patch_size, spacing)
    return Bundle(
        config=config,
        weights=network.state_dict(),
        spacing=spacing,
        normalisation=Normalisation(low=low, high=400.0, mean=-400.0, std=300.0),
        trained={"samples": seed},
    )


@pytest.fixture
def models(tiny: Config, tmp_path: Path) -> list[Path]:
    """Three that differ in weights; one in its size, one in spacing and normalisation."""
    larger = load(sets=["model.filters=6", "model.depth=2", "data.patch_size=[16,16,16]"], base=tiny)
    each = [made(tiny, 0), made(larger, 1), made(tiny, 2, spacing=(6.0, 5.0, 5.0), low=-900.0)]
    curve = Calibration(scores=(0.0, 1.0), probabilities=(0.0, 0.5))
    each[0] = replace(each[0], calibration=curve)
    for number, bundle in enumerate(each):
        (tmp_path / f"run{number}").mkdir()
        write_bundle(tmp_path / f"run{number}" / "model.vxs", bundle)
    return [tmp_path / f"run{number}" for number in range(3)]


def scan() -> Scan:
    grid = Grid((20, 24, 26), affine_from_itk((3, -7, 11), (4, 4, 5), np.eye(3)))
    return Scan(np.random.default_rng(0).normal(-500, 300, grid.shape), grid.affine)


@pytest.mark.parametrize("lungs", [False, True])
def test_its_probability_is_the_mean(
    voxelscale: Command, models: list[Path], tmp_path: Path, lungs: bool
) -> None:
    assert voxelscale("ensemble", *models, "--out", tmp_path / "all.vxs")[0] == 0
    config = replace(read_bundle(models[0]).config.predict, lungs=lungs)
    parts = [
        Predictor(read_bundle(path), config, CPU, torch.float32).probability(scan()) for path in models
    ]
    assert np.abs(parts[0] - parts[1]).max() > 0.01
    together = Predictor(read_bundle(tmp_path / "all.vxs"), config, CPU, torch.float32)
    assert together.probability(scan()) == pytest.approx(np.mean(parts, axis=0), abs=1e-6)


def test_what_one_fold_validates_on_the_others_were_trained_on(
    voxelscale: Command, tiny: Config, scans: Path, tmp_path: Path
) -> None:
    """`predict --split val` says so of an ensemble of folds, and records it for `calibrate`."""
    prepared = replace(tiny.prepare, split=(0.8, 0.0, 0.2), folds=2)
    prepare(list_sources(scans), tmp_path / "store", prepared)
    folds = [open_fold(tmp_path / "store", number) for number in (0, 1)]
    models = [tmp_path / f"fold{number}.vxs" for number in (0, 1)]
    for number, (fold, path) in enumerate(zip(folds, models, strict=True)):
        bundle = made(load(sets=[f"data.fold={number}"], base=tiny), number)
        write_bundle(path, replace(bundle, trained={"data": fold.fingerprint["digest"]}))
    assert voxelscale("ensemble", *models, "--out", tmp_path / "all.vxs")[0] == 0
    val, test = ({info.case for info in folds[0].split(name)} for name in ("val", "test"))
    assert val
    assert test

    def predicted(model: Path, split: str) -> tuple[Record | None, str]:
        out = tmp_path / f"{model.stem}-{split}"
        told = voxelscale("predict", model, scans, out, "--store", tmp_path / "store", "--split", split)
        assert told[0] == 0, told[2]
        return read_record(out), told[2]

    for model, split in ((models[0], "val"), (tmp_path / "all.vxs", "test")):
        assert "was trained on" not in predicted(model, split)[1]
    record, told = predicted(tmp_path / "all.vxs", "val")
    assert f"of {count(len(val), 'scan')} of the split val a network of this model was trained on" in told
    assert record is not None
    assert record.splits == {
        folds[0].fingerprint["digest"]: dict.fromkeys(sorted(val), "val"),
        folds[1].fingerprint["digest"]: dict.fromkeys(sorted(val), "train"),
    }


def test_it_is_a_model_as_any(voxelscale: Command, models: list[Path], scans: Path, tmp_path: Path) -> None:
    code, out, err = voxelscale("--quiet", "ensemble", *models, "--out", tmp_path / "all.vxs")
    assert (code, err, out) == (0, "", f"3 networks in {tmp_path / 'all.vxs'}\n")
    bundle = read_bundle(tmp_path / "all.vxs")
    assert bundle.calibration is None, "a calibration is of one model's scores"
    assert [one.trained for one in bundle.networks] == [{"samples": n} for n in range(3)]
    assert [one.spacing for one in bundle.networks] == [(5, 4, 4), (5, 4, 4), (6, 5, 5)]
    arguments = ["predict", tmp_path / "all.vxs", scans, tmp_path / "out", "--set", "predict.threshold=0.9"]
    assert voxelscale("--quiet", *arguments)[0] == 0
    facts = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/case.json")]
    assert {fact["model"] for fact in facts} == {bundle.identity}


def test_ensembles_give_their_networks(voxelscale: Command, models: list[Path], tmp_path: Path) -> None:
    two, all_, same = (tmp_path / name for name in ("two.vxs", "all.vxs", "same.vxs"))
    assert voxelscale("ensemble", *models[:2], "--out", two)[0] == 0
    assert voxelscale("ensemble", two, models[2], "--out", all_)[0] == 0
    assert voxelscale("ensemble", *models, "--out", same)[0] == 0
    assert len(read_bundle(all_).networks) == 3
    assert read_bundle(all_).identity == read_bundle(same).identity != read_bundle(two).identity


def test_the_output_may_come_first_but_no_model_is_overwritten(
    voxelscale: Command, models: list[Path], tmp_path: Path
) -> None:
    """The command's former form, `ensemble OUT MODELS...`, still works where OUT does not exist."""
    assert voxelscale("ensemble", tmp_path / "new.vxs", *models)[0] == 0
    before = (models[0] / "model.vxs").read_bytes()
    code, _, err = voxelscale("ensemble", models[0] / "model.vxs", *models[1:])
    assert code == 2
    assert "missing option --out" in err
    assert (models[0] / "model.vxs").read_bytes() == before


def test_identity_is_of_what_makes_the_scores(tiny: Config) -> None:
    bundle = made(tiny, 0)
    curve = Calibration(scores=(0.0, 1.0), probabilities=(0.0, 0.5))
    assert replace(bundle, calibration=curve, trained={}).identity == bundle.identity
    others = [
        made(tiny, 1),
        replace(bundle, spacing=(5.0, 4.0, 4.5)),
        replace(bundle, normalisation=replace(bundle.normalisation, low=-900.0)),
        replace(bundle, others=(made(tiny, 1),)),
    ]
    assert len({bundle.identity, *(other.identity for other in others)}) == 5


def test_mistakes_are_reported(voxelscale: Command, models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "all.vxs"
    for arguments, words in (
        ([models[0], "--out", out], "an ensemble of 1"),
        ([models[0], models[1], models[0] / "model.vxs", "--out", out], "holds the same weights as"),
        ([models[0], tmp_path / "none", "--out", out], "none"),
        ([models[0], models[1], "--out", tmp_path / "all"], "no name for a model file"),
        ([models[0], models[1]], "missing option --out"),
    ):
        code, _, err = voxelscale("ensemble", *arguments)
        assert (code, len(err.strip().splitlines())) == (2, 2)
        assert words in err
    assert not out.exists()


@pytest.mark.parametrize("others", [None, {}, [None], [{}], [{"weights": {}}] * 100])
def test_what_is_no_ensemble_is_refused(models: list[Path], tmp_path: Path, others: object) -> None:
    import io

    content = load_untrusted(models[0] / "model.vxs") | {"format": 2, "others": others}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_sealed(tmp_path / "bad.vxs", buffer.getvalue())
    with pytest.raises(VoxelscaleError, match="not a model bundle"):
        read_bundle(tmp_path / "bad.vxs")
