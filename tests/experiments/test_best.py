"""`voxelscale best` on cross-validations whose probabilities are made up, so that what is best is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import Command
from tests.pages import Page

from voxelscale.classes import Classes
from voxelscale.config import Config, PredictConfig
from voxelscale.dataset import DataSet
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.bootstrap import drawn
from voxelscale.evaluate.evaluate import evaluate_folder
from voxelscale.experiments.best import figures
from voxelscale.experiments.best.best import _names
from voxelscale.experiments.best.figures import choose
from voxelscale.findings import write_findings
from voxelscale.formats import write_scan
from voxelscale.geometry import Grid, Scan, affine_from_itk
from voxelscale.model.build import build_model
from voxelscale.model.bundle import Bundle, read_bundle, write_bundle
from voxelscale.predict.case import probability_file
from voxelscale.predict.classes import found_by
from voxelscale.predict.kept import KeptMaps
from voxelscale.samples.batch import Normalisation

GRID = Grid((10, 24, 24), affine_from_itk((-20, 5, 60), (1, 1, 2), np.diag([-1, -1, 1])))
CASES, FOLDS = 7, 3
Array = NDArray[np.float32]
Draw = Callable[[np.random.Generator, Array, int], Array]
"""Probabilities from a random number generator, a true class (0 or 1) and the number of the case."""


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bootstrap: enough for p below 0.05."""
    monkeypatch.setattr(figures, "RESAMPLES", 200)


@dataclass(frozen=True)
class Made:
    """A data set whose every case has an ellipsoid of each class; two cases are of one patient."""

    path: Path
    classes: Classes
    truth: list[Array]

    @property
    def data(self) -> DataSet:
        return DataSet(path=self.path / "cases.csv", reading=self._reading)

    @property
    def _reading(self) -> Any:
        from voxelscale.config import ReadingConfig

        values = {
            name: list(own) for name, own in zip(self.classes.names, self.classes.values, strict=True)
        }
        if self.classes.regions:
            return ReadingConfig(labels=values, regions_class_order=self.classes.order)
        return ReadingConfig(labels=values)

    @property
    def sets(self) -> list[str]:
        values = {
            name: list(own) for name, own in zip(self.classes.names, self.classes.values, strict=True)
        }
        sets = ["--set", f"reading.labels={json.dumps(values)}"]
        if self.classes.regions:
            sets += ["--set", f"reading.regions_class_order={list(self.classes.order)}"]
        return sets


KINDS = {
    "one": Classes(names=("tumour",), values=((1,),)),
    "classes": Classes(names=("liver", "tumour"), values=((1,), (2,))),
    "regions": Classes(names=("whole", "core"), values=((1, 2), (2,)), regions=True, order=(1, 2)),
}


def ball(centre: Sequence[int], radius: float) -> NDArray[np.bool_]:
    apart = (np.moveaxis(np.indices(GRID.shape), 0, -1) - centre) * GRID.spacing
    return np.asarray(np.linalg.norm(apart, axis=-1) <= radius)


def made(folder: Path, kind: str = "one") -> Made:
    classes = KINDS[kind]
    rows, truths = ["case,image,label,patient,fold"], []
    for number in range(CASES):
        labels = ball((5, 8 + number % 5, 10), 5 + number % 3).astype(np.uint8)
        if kind != "one":
            labels[ball((5, 8 + number % 5, 10), 3)] = 2
        write_scan(Scan(np.full(GRID.shape, 40, np.int16), GRID.affine), folder / f"i{number}.nii.gz")
        write_scan(Scan(labels, GRID.affine), folder / f"l{number}.nii.gz")
        patient = f"p{max(number, 1)}"  # the first two are one's
        fold = max(number, 1) % FOLDS
        rows.append(f"c{number},i{number}.nii.gz,l{number}.nii.gz,{patient},{fold}")
        each = [np.isin(labels, values) for values in classes.values]
        truths.append(np.stack(each).astype(np.float32))
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    return Made(path=folder, classes=classes, truth=truths)


def model(config: Config, classes: Classes, seed: int) -> Bundle:
    torch.manual_seed(seed)
    network = build_model(config.model, config.data.patch_size, (2.0, 1.0, 1.0), 1, classes.outputs)
    return Bundle(
        config=config,
        weights=network.state_dict(),
        spacing=(2.0, 1.0, 1.0),
        normalisation=Normalisation(low=-1000.0, high=400.0, mean=-400.0, std=300.0),
        trained={},
        classes=classes,
    )


def cross_validated(
    folder: Path, of: Made, tiny: Config, draw: Draw, *, seed: int = 0, kept: bool = True, **predict: Any
) -> Path:
    """What `voxelscale cv` would have written, had the folds' networks said what `draw` draws."""
    rules = PredictConfig(min_volume_mm3=0, lungs=False, **predict)
    bundles = [model(replace(tiny, predict=rules), of.classes, 10 * seed + fold) for fold in range(FOLDS)]
    for fold, bundle in enumerate(bundles):
        write_bundle(folder / f"fold_{fold}" / "run" / "model.vxs", bundle)
    for number, truth in enumerate(of.truth):
        random = np.random.default_rng([seed, number])
        each = np.stack([draw(random, one, number) for one in truth])
        if not (of.classes.single or of.classes.regions):
            each /= np.maximum(1, each.sum(axis=0))
        fold = max(number, 1) % FOLDS
        case = folder / f"fold_{fold}" / "predictions" / f"c{number}"
        write_case(case, of.classes, rules, np.rint(255 * each).astype(np.uint8), bundles[fold], kept)
        shutil.copytree(case, folder / "predictions" / f"c{number}")
    (folder / "cv.json").write_text("{}")
    return folder


def write_case(
    folder: Path, classes: Classes, rules: PredictConfig, each: NDArray[np.uint8], by: Bundle, kept: bool
) -> None:
    def shown(at: int) -> Array:
        return np.asarray(each[at] / np.float32(255), np.float32)

    found: Any = shown(0) if classes.single else [KeptMaps(classes, GRID, shown)]
    findings, mask = found_by(rules, folder.name, classes, found, GRID)
    written = mask if classes.single else classes.written(mask)
    write_scan(Scan(written, GRID.affine), folder / "mask.nii.gz")
    write_findings(findings, folder / "findings.csv", folder / "findings.json")
    (folder / "case.json").write_text(json.dumps({"model": by.identity}))
    for name, values in zip(classes.names, each, strict=True):
        if kept:
            write_scan(Scan(values, GRID.affine), folder / probability_file(classes, name))


def noisy(share: float, level: float = 0.5) -> Draw:
    """Nearly right, but for so many voxels around, which are as wrong in this configuration alone."""

    def draw(random: np.random.Generator, truth: Array, number: int) -> Array:
        near = ball((5, 10, 10), 8)
        wrong = near & (random.random(truth.shape) < share)
        return np.where(wrong, np.abs(truth - 0.55 - level / 100), 0.1 + 0.8 * truth).astype(np.float32)

    return draw


def too_low(random: np.random.Generator, truth: Array, number: int) -> Array:
    """The truth at 0.35, and a speck of 4 mm3 beside it; in every case alike."""
    probability = 0.05 + 0.3 * truth
    probability[0:2, 0, 0] = 0.45
    return probability.astype(np.float32)


def with_more(random: np.random.Generator, truth: Array, number: int) -> Array:
    """The truth, and of what is large another part elsewhere of 60 % of its size."""
    probability = 0.05 + 0.9 * truth
    if (voxels := int(truth.sum())) > 100:
        elsewhere = probability[:, :, 20:].copy()
        elsewhere.reshape(-1)[: int(0.6 * voxels)] = 0.9
        probability[:, :, 20:] = elsewhere
    return np.asarray(probability, np.float32)


def blind(random: np.random.Generator, truth: Array, number: int) -> Array:
    """Nothing is seen."""
    return np.zeros_like(truth)


def read(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "best.json").read_text())
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_the_predictions_and_of_their_mean(
    kind: str, tmp_path: Path, tiny: Config, voxelscale: Command
) -> None:
    of = made(tmp_path / "data", kind)
    a = cross_validated(tmp_path / "a", of, tiny, noisy(0.2), seed=1)
    b = cross_validated(tmp_path / "b", of, tiny, noisy(0.3), seed=2)
    code, text, errors = voxelscale("best", a, b, of.path / "cases.csv", tmp_path / "best", *of.sets)
    assert code == 0, errors
    result = read(tmp_path / "best")
    assert (result["cases"], result["patients"], result["folds"]) == (CASES, CASES - 1, [0, 1, 2])
    for folder, row in zip((a, b), result["configurations"], strict=False):
        own = evaluate_folder(folder / "predictions", of.data, tmp_path / "evaluation", one_model=False)
        dice = own["mean_dice"]["mean"] if "classes" in own else own["dice"]["mean"]
        each = list(own["classes"].values()) if "classes" in own else [own]
        assert row["name"] == folder.name
        assert row["dice"] == pytest.approx(dice, abs=1e-9)
        assert row["cpm"] == pytest.approx(np.mean([one["froc"]["cpm"] for one in each]), abs=1e-9)
        assert [one["dice"] for one in row["classes"]] == pytest.approx(
            [one["dice"]["mean"] for one in each], abs=1e-9
        )
    mean = result["configurations"][2]
    assert mean["name"] == "a + b"
    assert mean["dice"] == pytest.approx(mean_dice(of, noisy(0.2), noisy(0.3)), abs=1e-9)
    assert mean["difference"] == mean["dice"] - max(row["dice"] for row in result["configurations"][:2])
    assert "rule: the single configuration with the highest mean Dice" in text
    page = Page((tmp_path / "best" / "best.html").read_text())
    assert len(page.all("table")) == 3 + (kind != "one"), "configurations, classes, settings, each fold"


def mean_dice(of: Made, *draws: Draw) -> float:
    """By definition: of the mask that the mean of both probabilities makes."""
    table = np.zeros((len(of.classes.names), CASES))
    for number, truth in enumerate(of.truth):
        kept = []
        for seed, draw in enumerate(draws, start=1):
            random = np.random.default_rng([seed, number])
            each = np.stack([draw(random, one, number) for one in truth])
            if not (of.classes.single or of.classes.regions):
                each /= np.maximum(1, each.sum(axis=0))
            kept.append(np.rint(255 * each) / 255)
        mean = np.mean(kept, axis=0)
        if of.classes.single or of.classes.regions:
            masks = mean >= 0.5
            if of.classes.regions:
                masks[0] |= masks[1]  # as a mask of nested regions has it
        else:
            first = np.concatenate([1 - mean.sum(axis=0, keepdims=True), mean]).argmax(axis=0)
            masks = np.stack([first == at + 1 for at in range(len(mean))])
        for at, (mask, true) in enumerate(zip(masks, truth, strict=True)):
            table[at, number] = 2 * (mask * true).sum() / (mask.sum() + true.sum())
    return float(table.mean())


def test_an_average_is_taken_where_it_is_clearly_better(
    tmp_path: Path, tiny: Config, voxelscale: Command
) -> None:
    of = made(tmp_path / "data")
    a = cross_validated(tmp_path / "a", of, tiny, noisy(0.2), seed=1)
    b = cross_validated(tmp_path / "b", of, tiny, noisy(0.2), seed=2)
    c = cross_validated(tmp_path / "blind", of, tiny, blind, seed=3)
    code, text, _ = voxelscale("best", a, b, of.path / "cases.csv", tmp_path / "best", *of.sets)
    result = read(tmp_path / "best")
    assert code == 0
    assert result["chosen"] == "a + b"
    mean = result["configurations"][2]
    assert mean["p_holm"] == mean["p"] < 0.05
    assert 0 < mean["interval"][0] < mean["difference"] < mean["interval"][1]
    bundle = read_bundle(tmp_path / "best" / "model.vxs")
    wanted = [read_bundle(run / f"fold_{fold}" / "run").identity for run in (a, b) for fold in range(FOLDS)]
    assert [one.identity for one in bundle.networks] == wanted
    assert f"model of 6 networks in {tmp_path / 'best' / 'model.vxs'}" in text

    assert voxelscale("best", a, c, of.path / "cases.csv", tmp_path / "other", *of.sets)[0] == 0
    assert read(tmp_path / "other")["chosen"] == "a", "the average is worse"


def test_the_rule() -> None:
    def row(
        dice: float, average: bool = False, apart: float = 0.0, p: float | None = None
    ) -> dict[str, Any]:
        return {"dice": dice, "cpm": 1 - dice, "average": average, "difference": apart, "p_holm": p}

    singles = [row(0.7), row(0.8), row(0.75)]
    assert choose(singles, "dice") == 1
    assert choose(singles, "cpm") == 0
    assert choose([*singles, row(0.9, True, 0.1, 0.06)], "dice") == 1, "chance would make it so, too"
    assert choose([*singles, row(0.9, True, 0.1, None)], "dice") == 1, "too few patients for a p-value"
    assert choose([*singles, row(0.9, True, 0.1, 0.04)], "dice") == 3
    assert choose([*singles, row(0.7, True, -0.1, 0.01)], "dice") == 1, "surely worse"
    assert choose([*singles, row(0.9, True, 0.1, 0.01), row(0.95, True, 0.15, 0.04)], "dice") == 4


@pytest.mark.parametrize("kind", ["one", "regions"])
def test_threshold_and_smallest_component_are_found_and_go_into_the_model(
    kind: str, tmp_path: Path, tiny: Config, voxelscale: Command
) -> None:
    of = made(tmp_path / "data", kind)
    a = cross_validated(tmp_path / "a", of, tiny, too_low)
    code, text, errors = voxelscale("best", a, of.path / "cases.csv", tmp_path / "best", *of.sets)
    assert code == 0, errors
    tuning = read(tmp_path / "best")["tuning"]
    names = read_bundle(a / "fold_0" / "run").classes.names
    wanted = {"predict.threshold": 0.1, "predict.smallest_mm3": dict.fromkeys(names, 10)}
    assert tuning["found"] == wanted
    assert tuning["without_fold"] == dict.fromkeys(map(str, range(FOLDS)), wanted)
    assert tuning["before"] == 0.0
    assert tuning["after_on_the_same_cases"] == tuning["after_on_left_out_folds"] == 1.0
    assert tuning["kept"]
    assert tuning["p"] < 0.01
    assert "1.000 as found, on folds that did not choose them" in text
    predict = read_bundle(tmp_path / "best" / "model.vxs").config.predict
    assert (predict.threshold, predict.smallest_mm3) == (0.1, dict.fromkeys(names, 10))


@pytest.mark.parametrize(("kind", "kept"), [(k, True) for k in KINDS] + [("classes", False)])
def test_the_largest_component_is_found_with_and_without_probabilities(
    kind: str, kept: bool, tmp_path: Path, tiny: Config, voxelscale: Command
) -> None:
    of = made(tmp_path / "data", kind)
    a = cross_validated(tmp_path / "a", of, tiny, with_more, kept=kept)
    b = cross_validated(tmp_path / "b", of, tiny, blind, seed=1)
    code, text, errors = voxelscale("best", a, b, of.path / "cases.csv", tmp_path / "best", *of.sets)
    assert code == 0, errors
    result = read(tmp_path / "best")
    said = "a was run without predict.probabilities=true: no averages and no thresholds"
    assert (said in text, result["left_out"]) == (not kept, "" if kept else said)
    assert [row["name"] for row in result["configurations"]] == ["a", "b", "a + b"][: 2 + kept]
    tuning = result["tuning"]
    first = read_bundle(a / "fold_0" / "run").classes.names[0]
    assert tuning["found"]["predict.largest_only"] == [first], "no smallest volume is right for all cases"
    assert tuning["kept"]
    assert tuning["after_on_the_same_cases"] == tuning["after_on_left_out_folds"] == 1.0
    predict = read_bundle(tmp_path / "best" / "model.vxs").config.predict
    assert (predict.largest_only, predict.threshold, predict.candidates) == ((first,), 0.5, 0.05)


def test_what_only_fits_the_cases_that_chose_it_is_not_kept(
    tmp_path: Path, tiny: Config, voxelscale: Command
) -> None:
    """In each fold another threshold is right, so what the others choose is wrong there."""

    def draw(random: np.random.Generator, truth: Array, number: int) -> Array:
        level = (0.25, 0.55, 0.85)[max(number, 1) % FOLDS]
        ring = ball((5, 10, 12), 9) & (truth == 0)
        return np.where(truth > 0, level + 0.1, np.where(ring, level, 0.0)).astype(np.float32)

    of = made(tmp_path / "data")
    a = cross_validated(tmp_path / "a", of, tiny, draw)
    code, text, errors = voxelscale("best", a, of.path / "cases.csv", tmp_path / "best", *of.sets)
    assert code == 0, errors
    tuning = read(tmp_path / "best")["tuning"]
    assert tuning["found"]
    assert tuning["after_on_the_same_cases"] > tuning["before"] >= tuning["after_on_left_out_folds"]
    assert not tuning["kept"]
    assert "the settings stay as they were" in text
    predict = read_bundle(tmp_path / "best" / "model.vxs").config.predict
    assert (predict.threshold, predict.smallest_mm3, predict.largest_only) == (0.5, {}, ())


def test_patients_are_drawn_whole() -> None:
    units = np.asarray([0, 1, 1, 2, 0])
    for sample in drawn(5, 50, 3, units):
        times = np.bincount(sample, minlength=5)
        assert times[0] == times[4]
        assert times[1] == times[2]
        assert times[0] + times[1] + times[3] == 3
    alone = [list(sample) for sample in drawn(5, 20, 3, np.arange(5))]
    assert alone == [list(sample) for sample in drawn(5, 20, 3)]


def test_what_does_not_go_together_is_one_line(tmp_path: Path, tiny: Config, voxelscale: Command) -> None:
    of = made(tmp_path / "data")
    a = cross_validated(tmp_path / "a", of, tiny, too_low)
    cases = of.path / "cases.csv"

    def told(*folders: Path) -> str:
        code, _, errors = voxelscale("--quiet", "best", *folders, cases, tmp_path / "best", *of.sets)
        lines = errors.splitlines()
        assert code == 2, errors
        assert [line.partition(":")[0] for line in lines if not line.startswith("warning")] == [
            "error",
            "hint",
        ]
        return errors

    def changed(name: str, change: Callable[[Path], object]) -> Path:
        shutil.copytree(a, tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    assert "no whole cross-validation" in told(tmp_path / "data")
    assert "no whole cross-validation" in told(changed("half", lambda f: (f / "cv.json").unlink()))

    def move(folder: Path) -> None:
        shutil.move(folder / "fold_1/predictions/c1", folder / "fold_2/predictions/c1")

    assert "predicted by another model than" in told(changed("moved", move))
    lost = changed("lost", lambda f: shutil.rmtree(f / "predictions" / "c3"))
    assert "of other cases: c3 is in" in told(a, lost)
    other = made(tmp_path / "more", "regions")
    assert "of other classes or channels" in told(
        a, cross_validated(tmp_path / "b", replace(other, truth=[t for t in other.truth]), tiny, too_low)
    )
    code, _, errors = voxelscale("best", a, cases, tmp_path / "best", "--metric", "iou")
    assert (code, "--metric iou: no such metric" in errors) == (2, True)


def test_other_folds_are_refused(tmp_path: Path, tiny: Config, voxelscale: Command) -> None:
    of = made(tmp_path / "data")
    a = cross_validated(tmp_path / "a", of, tiny, too_low)
    b = cross_validated(tmp_path / "b", of, tiny, too_low, seed=1)
    old, new = b / "fold_1/predictions/c1", b / "fold_2/predictions/c1"
    shutil.move(old, new)
    facts = json.dumps({"model": read_bundle(b / "fold_2" / "run").identity})
    (b / "predictions" / "c1" / "case.json").write_text(facts)
    code, _, errors = voxelscale("best", a, b, of.path / "cases.csv", tmp_path / "best", *of.sets)
    assert code == 2
    assert "of other folds: c1 is in fold 1 of one, 2 of the other" in errors


def test_configurations_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / exp / "small" / "cv" for exp in ("one", "two")]
    assert _names(folders) == ["one/small/cv", "two/small/cv"]
    assert _names([tmp_path / "a", tmp_path / "b" / "c"]) == ["a", "c"]
    with pytest.raises(VoxelscaleError, match="named twice"):
        _names([folders[0], folders[0]])
