"""Confidence, calibrated: what the maps promise, and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import Command
from tests.evaluate.test_evaluate import finding as plain_finding
from tests.tune.test_ensemble import made

from voxelscale.config import Config, ReadingConfig
from voxelscale.dataset.listing import list_sources
from voxelscale.dataset.reading import read_truth
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.froc import froc, match
from voxelscale.findings import Finding, lesions_of_mask, read_findings, write_findings
from voxelscale.geometry import Grid, Scan, affine_from_itk
from voxelscale.model.bundle import Calibration, read_bundle, write_bundle
from voxelscale.predict.predictor import Predictor
from voxelscale.predict.record import record_cases
from voxelscale.tune.calibrate import FITS, ScoredFindings, calibrate, cross_validated, score_findings
from voxelscale.tune.reliability import BINS, calibration_error, reliability, reliability_panel

Curve = Callable[[Any], Any]


def judged(truth: Curve, count: int = 600, scans: int = 40, seed: int = 0) -> ScoredFindings:
    """Findings whose chance to be a lesion is a function of their score."""
    random = np.random.default_rng(seed)
    score = random.uniform(0.02, 0.999, count)
    hit = random.random(count) < np.asarray(truth(score))
    return ScoredFindings(score=score, hit=hit, scan=random.integers(0, scans, count))


def finding(x: float, score: float, case: str = "a", diameter: float = 10.0) -> Finding:
    return replace(plain_finding(x, score, diameter, case), score=score)


def test_too_sure_a_model_is_put_right() -> None:
    """Of findings at score s a share s**3 are lesions."""
    _, summary = calibrate(judged(lambda s: s**3))
    assert summary["ece_before"] > 0.2
    assert summary["ece_after"] < 0.06
    assert summary["log_loss"][summary["method"]] < summary["log_loss"]["before"]
    calibration, _ = calibrate(judged(lambda s: s**3, count=5000))
    scores = np.array([0.2, 0.5, 0.8, 0.95])
    assert calibration(scores) == pytest.approx(scores**3, abs=0.05)


def test_the_better_map_is_chosen() -> None:
    """A logistic truth, and one with a step, which no logistic curve can follow."""
    logistic = judged(lambda s: 1 / (1 + ((1 - s) / s) ** 2 * np.exp(1.5)))
    step = judged(lambda s: np.where(s < 0.5, 0.15, np.where(s < 0.8, 0.2, 0.95)), count=3000)
    assert calibrate(logistic)[1]["method"] == "platt"
    assert calibrate(step)[1]["method"] == "isotonic"
    assert calibrate(step)[0](np.array([0.3, 0.65, 0.9])) == pytest.approx([0.15, 0.2, 0.95], abs=0.05)


def test_a_calibrated_model_stays_as_it_is() -> None:
    calibration, summary = calibrate(judged(lambda s: s, count=4000))
    scores = np.linspace(0.05, 0.95, 19)
    assert calibration(scores) == pytest.approx(scores, abs=0.05)
    assert summary["ece_after"] < 0.03


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(FITS)),
    st.integers(0, 10**6),
    st.floats(0, 1),
    st.sampled_from([0, 1, 2, 9]),
)
def test_the_order_never_changes(name: str, seed: int, share: float, digits: int) -> None:
    """Not even where scores are as close as can be, hits are lesions by chance, or fewer the surer."""
    random = np.random.default_rng(seed)
    score: np.ndarray[Any, np.dtype[np.float64]] = random.random(60)
    score = np.round(score, digits) if digits else (score > 0.5).astype(np.float64)
    hit = random.random(60) < share * (1 - score)
    calibration = FITS[name](score, hit)
    asked = np.unique(np.concatenate([score, random.random(40), [0, 1, 0.5, 0.5 + 1e-9, 1 - 1e-9]]))
    probability = calibration(asked)
    assert (np.diff(probability) > 0).all()
    assert probability[0] >= 0
    assert probability[-1] <= 1


def test_the_froc_never_changes(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    lesions = [[finding(40.0 * i, 1.0) for i in range(3)] for _ in range(12)]
    found = [
        [finding(float(random.uniform(-60, 140)), float(p)) for p in 1 - random.random(8) ** 6]
        for _ in lesions
    ]
    calibration, _ = calibrate(score_findings(list(zip(lesions, found, strict=True))))
    after = []
    for row in found:
        told = [replace(f, probability=float(calibration(f.probability))) for f in row]
        write_findings(told, tmp_path / "f.csv", tmp_path / "f.json")
        read = read_findings(tmp_path / "f.json")
        table = (tmp_path / "f.csv").read_text().splitlines()[1:]
        assert [float(line.split(",")[-1]) for line in table] == [f.probability for f in read]
        after.append(read)
    curves = [froc([match(a, b) for a, b in zip(lesions, rows, strict=True)]) for rows in (found, after)]
    assert np.array_equal(curves[0].sensitivity, curves[1].sensitivity)
    assert np.array_equal(curves[0].fp_per_scan, curves[1].fp_per_scan)
    assert curves[1].thresholds[1:] == pytest.approx(calibration(curves[0].thresholds[1:].tolist()))


def test_what_counts_is_luna16s_rule_and_the_score() -> None:
    lesions = [finding(0.0, 1.0), finding(50.0, 1.0)]
    found = [
        replace(finding(1.0, 0.9), probability=0.1),  # calibrated once already: the score counts
        finding(-2.0, 0.8),  # a second hit on the same lesion: ignored
        finding(20.0, 0.7),
        replace(finding(51.0, 0.6), score=None),  # of an older version
    ]
    told = score_findings([(lesions, found), ([], [finding(3.0, 0.3)])])
    order = np.argsort(-told.score)
    assert told.score[order].tolist() == [0.9, 0.7, 0.6, 0.3]
    assert told.hit[order].tolist() == [True, False, True, False]
    assert told.scan[order].tolist() == [0, 0, 0, 1]


def test_no_finding_is_judged_by_a_map_that_saw_its_scan() -> None:
    """A fit that remembers what it saw finds nothing of it again."""
    known = judged(lambda s: s, count=100, scans=7)
    seen: list[set[float]] = []

    def remember(score: np.ndarray[tuple[int, ...], np.dtype[np.float64]], hit: object) -> Calibration:
        seen.append(set(score.tolist()))
        return Calibration(scores=(0.0, 1.0), probabilities=(0.0, 1.0))

    assert cross_validated(remember, known) == pytest.approx(known.score)
    assert len(seen) == 5
    for scan in range(7):
        own = set(known.score[known.scan == scan].tolist())
        assert sum(not own & fitted for fitted in seen) == 1
        assert sum(own <= fitted for fitted in seen) == 4


def test_expected_calibration_error_by_hand() -> None:
    probability = np.repeat([0.2, 0.8], 50)
    hit = np.concatenate([np.arange(50) < 20, np.arange(50) < 30])
    assert calibration_error(probability, hit) == pytest.approx(0.2)
    assert calibration_error(probability, hit[::-1]) == pytest.approx((abs(0.2 - 0.6) + abs(0.8 - 0.4)) / 2)
    rows = reliability(probability, hit)
    assert [row["findings"] for row in rows] == [10] * BINS
    assert [row["share"] for row in rows] == pytest.approx([0.4] * 5 + [0.6] * 5)
    # Wilson's interval of 4 in 10, as tabulated.
    assert rows[0]["interval"] == pytest.approx([0.1682, 0.6873], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda j: replace(j, score=j.score[:19], hit=j.hit[:19], scan=j.scan[:19]),
            "19 findings are too few",
        ),
        (lambda j: replace(j, hit=np.ones(30, bool)), "all of the 30 findings"),
        (lambda j: replace(j, hit=np.zeros(30, bool)), "none of the 30 findings"),
        (lambda j: replace(j, scan=np.zeros(30, int)), "of 1 scan; 5 are needed"),
        (lambda j: replace(j, scan=np.arange(30) % 2), "of 2 scans; 5 are needed"),
        (
            lambda j: replace(j, hit=np.arange(30) < 9),
            "9 of the findings are lesions, 21 are not; 10 of each",
        ),
        (
            lambda j: replace(j, hit=np.arange(30) > 8),
            "21 of the findings are lesions, 9 are not; 10 of each",
        ),
    ],
)
def test_too_little_to_calibrate_on(change: Callable[[ScoredFindings], ScoredFindings], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        calibrate(change(judged(lambda s: s, count=30)))


@pytest.fixture(scope="module")
def model(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained nothing."""
    folder = tmp_path_factory.mktemp("run")
    write_bundle(folder / "model.vxs", made(tiny, 0))
    return folder


def made_up(scans: Path, out: Path, wrong: int, model: Path | None = None) -> None:
    """Predictions too sure of themselves: each lesion found, and so many false ones a scan."""
    random = np.random.default_rng(0)
    for source in list_sources(scans):
        truth = read_truth(source, ReadingConfig())
        lesions = lesions_of_mask(source.case, truth.array, truth.grid)
        right = [replace(f, probability=p, score=p) for f in lesions for p in [random.uniform(0.7, 1)]]
        # Along an edge of the scan, where no lesion is.
        edge = truth.grid.index_to_mm([(0, 0, i) for i in range(wrong)])
        sure = [float(random.uniform(0.4, 0.95)) for _ in edge]
        far = [
            replace(finding(x, p, source.case), y=y, z=z) for (x, y, z), p in zip(edge, sure, strict=True)
        ]
        folder = out / source.case
        write_findings([*right, *far], folder / "findings.csv", folder / "findings.json")
        if model is not None:
            (folder / "case.json").write_text(json.dumps({"model": read_bundle(model).identity}))


def test_the_command(voxelscale: Command, model: Path, scans: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.vxs").write_bytes((model / "model.vxs").read_bytes())
    made_up(scans, tmp_path / "val", wrong=20, model=run)
    code, out, err = voxelscale("--quiet", "calibrate", run, tmp_path / "val", scans)
    summary = json.loads((run / "calibration.json").read_text())
    assert summary["scans"] == 5
    assert summary["findings"] == 100 + summary["hits"]
    few = f"calibrated on {summary['hits']} lesions and 100 false findings of 5 scans: below 100 of each"
    assert (code, err) == (0, f"warning: {few}, the calibration is rough\n")
    assert summary["ece_after"] < summary["ece_before"] / 2
    assert f"ECE {summary['ece_before']:.3f} before, {summary['ece_after']:.3f} after" in out
    drawing = ElementTree.fromstring((run / "calibration.svg").read_text())
    said = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert f"before: ECE {summary['ece_before']:.3f}" in said
    assert f"Share of {summary['findings']} findings that are lesions" in said
    panel = reliability_panel(summary)
    ideal, *bins = panel.lines
    assert [len(line.points) for line in (ideal, *bins)] == [2, BINS, BINS]
    assert [len(line.intervals) for line in bins] == [0, BINS]
    calibration = read_bundle(run).calibration
    assert calibration is not None
    assert list(calibration.scores) == summary["scores"]
    assert float(calibration(0.6)) < 0.2
    # Again on the same predictions, the same.
    before = (run / "calibration.json").read_bytes()
    assert voxelscale("--quiet", "calibrate", run / "model.vxs", tmp_path / "val", scans)[0] == 0
    assert (run / "calibration.json").read_bytes() == before


def test_predictions_of_another_model_are_refused(
    voxelscale: Command, model: Path, scans: Path, tmp_path: Path
) -> None:
    bundle = read_bundle(model)
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    write_bundle(run / "model.vxs", bundle)
    made_up(scans, tmp_path / "val", wrong=20)
    folders = sorted(path for path in (tmp_path / "val").iterdir() if path.is_dir())
    for folder in folders:
        (folder / "case.json").write_text(json.dumps({"model": bundle.identity}))
    assert voxelscale("--quiet", "calibrate", run, tmp_path / "val", scans)[0] == 0
    # Calibrated, it is still the model that made them.
    assert voxelscale("--quiet", "calibrate", run, tmp_path / "val", scans)[0] == 0
    other.mkdir()
    weights = {name: weight * 2 for name, weight in bundle.weights.items()}
    write_bundle(other / "model.vxs", replace(bundle, weights=weights))
    code, _, err = voxelscale("--quiet", "calibrate", other, tmp_path / "val", scans)
    assert code == 2
    assert f"{folders[0]}: predicted by another model than {other}" in err
    assert f"voxelscale predict {other}" in err
    assert read_bundle(other).calibration is None


def test_what_makes_a_calibration_doubtful_is_said(
    voxelscale: Command, model: Path, scans: Path, tmp_path: Path
) -> None:
    """Two scans are refused; training scans, and predictions that do not say by which model, are named."""
    run, val = tmp_path / "run", tmp_path / "val"
    run.mkdir()
    bundle = read_bundle(model)
    write_bundle(run / "model.vxs", replace(bundle, trained={**bundle.trained, "data": "this store"}))
    made_up(scans, val, wrong=20)
    cases = sorted(path.name for path in val.iterdir())
    record_cases(val, cases[:3], "train", "this store")
    record_cases(val, cases[3:], "train", "another store")
    code, _, err = voxelscale("--quiet", "calibrate", run, val, scans)
    assert code == 0, err
    assert "the model was trained on 3 scans of these" in err
    assert "5 predictions without case.json" in err
    before = (run / "model.vxs").read_bytes()
    for case in cases[2:]:
        shutil.rmtree(val / case)
    code, _, err = voxelscale("--quiet", "calibrate", run, val, scans)
    assert code == 2
    assert "are needed" in err
    assert (run / "model.vxs").read_bytes() == before


def test_later_predictions_are_calibrated(model: Path, tmp_path: Path) -> None:
    bundle = read_bundle(model)
    config = replace(bundle.config.predict, threshold=0.5, candidates=0.3)
    grid = Grid((20, 24, 24), affine_from_itk((0, 0, 0), (4, 4, 5), np.eye(3)))
    image = Scan(np.random.default_rng(0).normal(-500, 300, grid.shape), grid.affine)
    halved = Calibration(scores=(0.0, 1.0), probabilities=(0.0, 0.5))
    write_bundle(tmp_path / "model.vxs", replace(bundle, calibration=halved))
    plain, _ = Predictor(bundle, config, torch.device("cpu"), torch.float32).look("a", image)
    after, _ = Predictor(
        read_bundle(tmp_path / "model.vxs"), config, torch.device("cpu"), torch.float32
    ).look("a", image)
    assert plain
    assert all(f.probability == f.score for f in plain)
    assert [f.score for f in after] == [f.score for f in plain]
    assert [f.probability for f in after] == pytest.approx([float(halved(f.probability)) for f in plain])
    assert [f.index for f in after] == [f.index for f in plain]


def test_mistakes_are_reported(voxelscale: Command, model: Path, scans: Path, tmp_path: Path) -> None:
    code, _, err = voxelscale("--quiet", "calibrate", tmp_path, tmp_path, scans)
    assert (code, "holds no model.vxs" in err) == (2, True)
    code, _, err = voxelscale("--quiet", "calibrate", model, tmp_path / "none", scans)
    assert (code, "no prediction of a case of" in err) == (2, True)
    made_up(scans, tmp_path / "few", wrong=1)
    code, _, err = voxelscale("--quiet", "calibrate", model, tmp_path / "few", scans)
    lines = err.strip().splitlines()
    assert (code, len(lines)) == (2, 2)
    assert "findings are too few to calibrate on; 20 are needed" in lines[0]
    assert "--split val" in lines[1]
    assert read_bundle(model).calibration is None


@pytest.mark.parametrize(
    "curve",
    [
        ((0.0, 1.0), (0.5, 0.4)),
        ((0.0, 0.5, 0.5, 1.0), (0.0, 0.1, 0.2, 0.3)),
        ((0.1, 1.0), (0.0, 1.0)),
        ((0.0, 1.0), (0.0, 1.5)),
        ((0.0, 1.0), (0.0, float("nan"))),
        ((0.0, 1.0), (0.0,)),
    ],
)
def test_a_calibration_that_is_none_is_refused(
    model: Path, tmp_path: Path, curve: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    spoilt = Calibration(scores=curve[0], probabilities=curve[1])
    write_bundle(tmp_path / "model.vxs", replace(read_bundle(model), calibration=spoilt))
    with pytest.raises(VoxelscaleError, match="not a model bundle"):
        read_bundle(tmp_path / "model.vxs")
