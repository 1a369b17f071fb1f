"""Several classes, regions and ignored voxels: one class after the other, and voxels cut away by hand."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.conftest import Command
from tests.evaluate.scored import evaluate_case
from tests.several import CLASSES, write_predictions, write_several
from tests.several import REGIONS as NESTED

from voxelscale.classes import IGNORED, Classes
from voxelscale.config import ReadingConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.compare import Score, compare_classes, compare_scores, holm, text_table
from voxelscale.evaluate.evaluate import (
    CaseResult,
    evaluate_classes,
    evaluate_folder,
    summarise,
    summarise_classes,
)
from voxelscale.evaluate.froc import Matches
from voxelscale.evaluate.per_class import mean_dice
from voxelscale.evaluate.text import text_summary
from voxelscale.evaluate.truth import Sphere, Truth, truth_of
from voxelscale.findings import Finding, lesions_of_mask
from voxelscale.formats import read_label, write_scan
from voxelscale.geometry import Scan, reorient

THREE = Classes(names=("a", "b", "c"), values=((1,), (2,), (3,)))
REGIONS = Classes(
    names=("whole", "core", "rim"), values=((1, 2, 3), (2, 3), (3,)), regions=True, order=(1, 2, 3)
)
AFFINE = np.array([[0, 0, 0.7, -3.0], [0, 0.9, 0, 11.0], [2.0, 0, 0, 40.0], [0, 0, 0, 1.0]])


def blobs(seed: int, classes: Classes) -> NDArray[np.int16]:
    """Stored labels: boxes of values, one over the other; now and then a class is missing."""
    random = np.random.default_rng(seed)
    mask = np.zeros((10, 14, 16), np.int64)
    for value in random.permutation([1, 2, 3, 1, 2, 3])[: random.integers(0, 7)]:
        start = random.integers(0, (7, 10, 12))
        size = random.integers(1, 5, 3)
        mask[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = value
    return np.asarray(classes.stored(mask), np.int16)


def found_in(stored: NDArray[np.int16], classes: Classes, seed: int) -> list[Finding]:
    """A finding at each component, of falling confidence, and some at random."""
    random = np.random.default_rng(seed)
    grid = Scan(stored, AFFINE).grid
    found = []
    for name, there in classes.each(stored):
        for lesion in lesions_of_mask("x", there, grid):
            found.append(_named(lesion, name, float(random.random())))
        x, y, z = grid.index_to_mm(random.random(3) * (9, 13, 15))
        wrong = Finding(
            case="x",
            x=x,
            y=y,
            z=z,
            index=(0, 0, 0),
            diameter_mm=4,
            axial_diameter_mm=4,
            volume_mm3=30,
            probability=float(random.random()),
            label=name,
        )
        found.append(wrong)
    return found


def _named(finding: Finding, name: str, probability: float) -> Finding:
    return replace(finding, label=name, probability=probability)


def by_hand(
    case: str,
    truth: NDArray[np.int16],
    prediction: NDArray[np.int16],
    found: Sequence[Finding],
    classes: Classes,
) -> list[CaseResult]:
    """One binary evaluation a class."""
    results = []
    for at, name in enumerate(classes.names):
        if classes.regions:
            masks = [((m > 0) & (m >> at) % 2 == 1).astype(np.uint8) for m in (truth, prediction)]
        else:
            masks = [(m == at + 1).astype(np.uint8) for m in (truth, prediction)]
        own = [f for f in found if f.label == name]
        first, second = (Scan(m, AFFINE) for m in masks)
        results.append(evaluate_case(case, first, second, own))
    return results


@pytest.mark.parametrize("classes", [THREE, REGIONS], ids=["classes", "regions"])
def test_figures_of_each_class_are_those_of_its_mask_alone(classes: Classes) -> None:
    ours, theirs = [], []
    for seed in range(12):
        truth, prediction = blobs(seed, classes), blobs(seed + 6, classes)
        found = found_in(prediction, classes, seed)
        whole = Truth(case=f"{seed}", mask=Scan(truth, AFFINE), ignored=(), classes=classes)
        ours.append(evaluate_classes(whole, prediction, found))
        theirs.append(by_hand(f"{seed}", truth, prediction, found, classes))
    by_class = dict(zip(classes.names, zip(*ours, strict=True), strict=True))
    summary = summarise_classes(by_class)
    for at, name in enumerate(classes.names):
        alone = summarise([each[at] for each in theirs])
        assert summary["classes"][name] == alone
        assert [
            {k: v for k, v in row.items() if k != "class"}
            for row in summary["cases"]
            if row["class"] == name
        ] == (alone["cases"])
    means = [own["dice"]["mean"] for own in summary["classes"].values()]
    assert summary["mean_dice"]["mean"] == pytest.approx(np.mean(means))
    assert summary["scans"] == 12
    assert len(summary["cases"]) == 36
    lines = text_summary(summary)
    assert [line for line in lines if line.startswith("class ")] == [
        f"class {name}" for name in classes.names
    ]
    assert f"  {text_summary(summary['classes'][classes.names[1]])[1]}" in lines
    assert lines[-1].startswith(f"mean Dice over 3 classes {np.mean(means):.3f} (95 % ")


@pytest.mark.parametrize(
    "classes",
    [
        Classes(names=("a", "b"), values=((1,), (2,)), ignore=(3,)),
        Classes(names=("a", "b"), values=((1, 2), (2,)), regions=True, order=(1, 2), ignore=(3,)),
        Classes(names=("a",), values=((1, 2),), ignore=(3,)),
    ],
    ids=["classes", "regions", "one"],
)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**20))
def test_ignored_voxels_are_as_if_cut_away(classes: Classes, seed: int) -> None:
    truth = blobs(seed, classes)
    ignored = truth == IGNORED
    prediction = np.maximum(blobs(seed + 1, classes), 0)
    found = found_in(np.where(ignored, 0, prediction), classes, seed)
    if classes.single:
        found = [_named(f, "", f.probability) for f in found]
    whole = Truth(
        case="x", mask=Scan(truth, AFFINE), ignored=(), classes=classes, uncounted=Scan(ignored, AFFINE)
    )
    voxels = np.rint(whole.mask.grid.mm_to_index([(f.x, f.y, f.z) for f in found])).astype(int)
    there = [bool(ignored[tuple(voxel)]) for voxel in voxels]
    cut_truth, cut = (np.where(ignored, 0, stored) for stored in (truth, prediction))
    for at, result in enumerate(evaluate_classes(whole, prediction, found)):
        own = [(f, out) for f, out in zip(found, there, strict=True) if f.label in ("", classes.names[at])]
        first, second = (Scan(classes.where(m, at).astype(np.uint8), AFFINE) for m in (cut_truth, cut))
        alone = evaluate_case("x", first, second, [f for f, _ in own])
        counted = evaluate_case("x", first, second, [f for f, out in own if not out])
        assert result.overlap == alone.overlap
        assert result.surface == alone.surface
        assert [f.volume_mm3 for f in result.lesions] == [f.volume_mm3 for f in alone.lesions]
        # What lies there may be the only one to hit a lesion beside, but is never a false positive.
        np.testing.assert_array_equal(result.matches.hits, alone.matches.hits)
        assert result.matches.false_positives == counted.matches.false_positives


def test_a_component_around_ignored_voxels_is_no_false_positive() -> None:
    classes = Classes(names=("a", "b"), values=((1,), (2,)), ignore=(3,))
    truth = np.zeros((9, 9, 9), np.int16)
    truth[3:6, 3:6, 3:6] = IGNORED
    prediction = np.zeros_like(truth)
    prediction[2:7, 2:7, 2:7] = 1
    found = found_in(prediction, classes, 1)[:1]
    whole = Truth(
        case="x",
        mask=Scan(truth, AFFINE),
        ignored=(Sphere(0.0, 0.0, 0.0, 1.0),),
        classes=classes,
        uncounted=Scan(truth == IGNORED, AFFINE),
    )
    result, other = evaluate_classes(whole, prediction, found)
    assert (result.overlap.prediction, result.matches.on_excluded) == (5**3 - 3**3, 1)
    assert result.matches.false_positives == ()
    assert [m.false_positives for m in result.iou_matches] == [(), ()]
    assert other.both_empty


def test_the_mean_over_classes_by_hand() -> None:
    """The classes' means are taken first; a class without a Dice is left out, as is a case."""
    found = mean_dice([[1.0, 0.5, None, None], [0.25, None, None, None], [None] * 4], "abcd")
    counts = {"classes": 2, "cases": 2, "patients": 2}
    assert found == {"mean": pytest.approx((0.75 + 0.25) / 2), "interval": None, **counts}
    assert mean_dice([[None], [None]], "a") == {"mean": None, "interval": None} | dict.fromkeys(counts, 0)


def test_the_interval_of_the_mean_is_the_bootstraps() -> None:
    random = np.random.default_rng(0)
    dices = random.random((3, 8))
    dices[1, 2:] = np.nan
    listed = [[None if math.isnan(d) else d for d in row] for row in dices]
    low, high = mean_dice(listed, "abcdefgh")["interval"]
    # A patient's second scan narrows nothing.
    twice = mean_dice([row + row for row in listed], "abcdefgh" * 2)
    assert twice["interval"] == pytest.approx([low, high])
    assert (twice["cases"], twice["patients"]) == (16, 8)
    draws = np.random.Generator(np.random.Philox(key=0))
    means = []
    for _ in range(1000):
        drawn = dices[:, draws.integers(0, 8, 8)]
        means.append(np.mean([np.nanmean(row) for row in drawn if not np.isnan(row).all()]))
    assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5]))


def score(dice: float | None, hit: float = math.nan) -> Score:
    return Score(dice=dice, matches=Matches(hits=(hit,), false_positives=(0.5,)))


def test_two_models_class_by_class() -> None:
    random = np.random.default_rng(3)
    pairs = {
        name: {
            str(n): (score(float(random.random()), 0.6), score(float(random.random() * easy), 0.4))
            for n in range(9)
        }
        for name, easy in (("a", 0.2), ("b", 0.9), ("c", 0.4))
    }
    pairs["c"]["3"] = (score(None), score(0.0))
    result = compare_classes(pairs)
    ps = {}
    for name, own in pairs.items():
        alone = compare_scores(own)
        ours = result["classes"][name]
        for measure, row in alone["measures"].items():
            assert {k: v for k, v in ours["measures"][measure].items() if "holm" not in k} == row
        ps[name] = alone["measures"]["dice"]["p"]
    corrected = {name: result["classes"][name]["measures"]["dice"]["p_holm"] for name in pairs}
    assert corrected == dict(zip(ps, holm(list(ps.values())), strict=True))
    mean = result["mean_dice"]
    for model, letter in enumerate("ab"):
        known = [[pair[model].dice for pair in own.values()] for own in pairs.values()]
        assert mean[letter] == pytest.approx(
            np.mean([np.mean([d for d in row if d is not None]) for row in known])
        )
        assert mean[letter] == pytest.approx(mean_dice(known, "012345678")["mean"])
    assert mean["interval"][0] < mean["difference"] < mean["interval"][1]
    lines = text_table({**result, "a": "one", "b": "two"})
    assert sum(line.startswith("class ") for line in lines) == 3
    assert "corrected for 3 classes (Holm)" in lines[-1]
    same = compare_classes({name: {n: (a, a) for n, (a, _) in own.items()} for name, own in pairs.items()})
    assert (same["mean_dice"]["difference"], same["mean_dice"]["p"]) == (0, 1)


def test_holm_against_its_definition() -> None:
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([None]) == [None]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.001, 0.5))
def test_holm_rejects_what_the_procedure_steps_down_to(ps: list[float], level: float) -> None:
    rejected, left = set(), len(ps)
    for at in sorted(range(len(ps)), key=lambda at: ps[at]):
        if ps[at] * left > level:
            break
        rejected.add(at)
        left -= 1
    corrected = holm(ps)
    assert {at for at, p in enumerate(corrected) if p is not None and p <= level} == rejected


@pytest.mark.parametrize("classes", [CLASSES, NESTED], ids=["classes", "regions"])
def test_the_commands_on_files(classes: Classes, voxelscale: Command, tmp_path: Path) -> None:
    """The figures are those of binary data sets of one class each, cut by hand where labels are ignored."""
    data = write_several(tmp_path / "data", classes)
    assert data.classes == classes
    made = write_predictions(data, tmp_path / "a")
    write_predictions(data, tmp_path / "b", shift=2)
    code, out, err = voxelscale("evaluate", tmp_path / "a", tmp_path / "data")
    assert code == 0, err
    summary = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert list(summary["classes"]) == list(classes.names)
    for at, name in enumerate(classes.names):
        results = []
        for source in data.cases:
            raw = reorient(read_label(source.labels[0]))
            stored, found = made[source.case]
            if classes.regions:
                true = np.isin(raw.array, classes.values[at])
                predicted = (np.maximum(stored.array, 0) >> at) % 2 == 1
            else:
                true, predicted = raw.array == at + 1, stored.array == at + 1
            predicted = predicted & (raw.array != 3)
            voxels = np.rint(raw.grid.mm_to_index([(f.x, f.y, f.z) for f in found])).astype(int)
            own = [
                f
                for f, v in zip(found, voxels, strict=True)
                if f.label == name and raw.array[tuple(v)] != 3
            ]
            first, second = (Scan(m.astype(np.uint8), raw.affine) for m in (true, predicted))
            results.append(evaluate_case(source.case, first, second, own))
        alone = json.loads(json.dumps(summarise(results)))
        ours = summary["classes"][name]
        ignored = [row.pop("ignored") for row in ours["cases"]]
        assert ignored == [1 if at == 0 else 0] * 6
        for row in alone["cases"]:
            row.pop("ignored")
        assert ours == alone
    assert summary["coverage"]["scored"] == summary["scans"] == 6
    table = list(csv.DictReader((tmp_path / "a" / "cases.csv").open()))
    assert [row["class"] for row in table] == list(classes.names) * 6
    assert f"class {classes.names[0]}" in out.splitlines()
    assert out.splitlines()[-1].startswith("mean Dice over 2 classes")
    code, out, err = voxelscale("compare", tmp_path / "a", tmp_path / "b", tmp_path / "data", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["mean_dice"]["a"] == pytest.approx(summary["mean_dice"]["mean"])
    for name in classes.names:
        measures, own = result["classes"][name]["measures"], summary["classes"][name]
        assert measures["dice"]["a"] == pytest.approx(own["dice"]["mean"])
        assert measures["cpm"]["a"] == pytest.approx(own["froc"]["cpm"])
        assert measures["dice"]["p_holm"] >= measures["dice"]["p"]


def test_predictions_of_other_classes_are_reported(voxelscale: Command, tmp_path: Path) -> None:
    data = write_several(tmp_path / "data", CLASSES, cases=3)
    write_predictions(data, tmp_path / "a")
    first, second, _ = (tmp_path / "a" / source.case for source in data.cases)
    mask = read_label(first / "mask.nii.gz")
    mask.array[0, 0, 0] = 7
    write_scan(mask, first / "mask.nii.gz")
    path = second / "findings.json"
    path.write_text(path.read_text().replace('"rim"', '"liver"'))
    code, _, err = voxelscale("evaluate", tmp_path / "a", tmp_path / "data")
    assert code == 2
    assert (
        f"{first / 'mask.nii.gz'}: values without a name: 7; predicted masks of <core>, rim have 1, 2"
        in err
    )
    assert f'{path}: a finding of the class "liver"; the data set has <core>, rim' in err
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text())["scans"] == 1
    path.write_text(path.read_text().replace('"label": "liver"', '"label": ""'))
    assert "a finding that names no class" in voxelscale("evaluate", tmp_path / "a", tmp_path / "data")[2]


def test_a_missing_prediction_counts_as_empty_in_every_class(tmp_path: Path) -> None:
    data = write_several(tmp_path / "data", NESTED, cases=2)
    summary = evaluate_folder(tmp_path / "none", data, tmp_path / "out", missing_is_empty=True)
    assert [row["dice"] for row in summary["cases"]] == [0, 0, 0, None]
    assert summary["mean_dice"] == {"mean": 0, "interval": None} | dict.fromkeys(
        ("classes", "cases", "patients"), 2
    )


def test_lesions_of_several_classes_are_refused_where_one_is_needed(tmp_path: Path) -> None:
    source = write_several(tmp_path / "data", CLASSES, cases=1).cases[0]
    with pytest.raises(VoxelscaleError, match=r"c0: several classes \(<core>, rim\)") as caught:
        _ = truth_of(source, ReadingConfig()).lesions
    assert "reading.labels" in caught.value.hint
