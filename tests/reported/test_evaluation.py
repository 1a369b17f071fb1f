"""Evaluation says what its figures are of: healthy scans, missing predictions, excluded findings."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from tests.conftest import Command
from tests.evaluate.test_evaluate import finding

from voxelscale.dataset.listing import list_sources
from voxelscale.dataset.stamps import source_stamp
from voxelscale.files import digest_of
from voxelscale.findings import lesions_of_mask, read_findings, write_findings
from voxelscale.formats import read_label, write_scan
from voxelscale.geometry import Scan
from voxelscale.predict.record import record_cases

HEALTHY = ("--set", "reading.allow_empty=true")

Reported = Callable[..., Path]


def evaluation(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "evaluation.json").read_text()))


def figures(summary: dict[str, Any]) -> tuple[Any, ...]:
    return (
        summary["scans"],
        round(summary["froc"]["cpm"], 3),
        round(summary["iou"][0]["precision"], 3),
        summary["dice"]["mean"],
        summary["healthy"],
    )


# Healthy scans.


@pytest.mark.parametrize("table", ["set.csv", "set_empty_masks.csv"])
def test_healthy_scans_count_with_their_false_positives(
    voxelscale: Command, reported: Reported, tmp_path: Path, table: str
) -> None:
    """Without a mask where allow_empty says so, and with an empty one: the same."""
    folder = reported("evaluate_healthy_scans")
    options = HEALTHY if table == "set.csv" else ()
    code, out, err = voxelscale(
        "evaluate", folder / "predictions", folder / table, *options, "--out", tmp_path / "o"
    )
    assert code == 0, err
    healthy = {"scans": 3, "without_false_positives": 0, "false_positives": 6}
    assert figures(evaluation(tmp_path / "o")) == (4, 0.429, 0.143, 0.25, healthy)
    assert "4 scans, 1 lesion\n" in out
    assert "3 healthy scans: 0 without a false positive, 6 false positives in all" in out
    assert "CPM 0.429 (no interval: 1 patient with a lesion)" in out


def test_scans_without_a_mask_are_left_out_with_a_word(voxelscale: Command, reported: Reported) -> None:
    folder = reported("evaluate_healthy_scans")
    (folder / "nodules.csv").write_text("case,x,y,z,diameter_mm\nstranger,0,0,0,5\n")
    code, out, err = voxelscale("--quiet", "evaluate", folder / "predictions", folder / "set.csv")
    assert code == 0
    assert "nodules.csv has no nodule of a scored case" in err
    assert "1 scan, 1 lesion" in out
    assert "left out 3 predicted cases without a mask (healthy1, healthy2, healthy3)" in err
    assert "reading.allow_empty=true" in err
    summary = evaluation(folder / "predictions")
    assert summary["coverage"]["without_truth"] == ["healthy1", "healthy2", "healthy3"]


def test_healthy_scans_count_in_a_comparison(voxelscale: Command, reported: Reported) -> None:
    """B finds nothing in the healthy scans: it has no Dice there, and is better for it."""
    folder = reported("evaluate_healthy_scans")
    a, b = folder / "predictions", folder / "clean"
    shutil.copytree(a, b)
    for case in ("healthy1", "healthy2", "healthy3"):
        shutil.copy(folder / "empty" / f"{case}.nii.gz", b / case / "mask.nii.gz")
        (b / case / "findings.json").write_text("[]")
    code, out, err = voxelscale("compare", a, b, folder / "set.csv", *HEALTHY, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["scans"], result["scans_with_dice"], result["scans_with_lesions"]) == (4, 4, 1)
    dice, cpm = result["measures"]["dice"], result["measures"]["cpm"]
    assert (dice["a"], dice["b"]) == (0.25, 1.0)
    assert (round(cpm["a"], 3), cpm["b"]) == (0.429, 1.0)
    assert (dice["interval"], dice["p"], dice["wilcoxon_p"], cpm["p"]) == (None,) * 4
    code, out, _ = voxelscale("compare", a, b, folder / "set.csv", *HEALTHY)
    assert "no interval, no p: 4 patients, 5 are needed" in out
    assert "no interval, no p: 1 patient with a lesion, 5 are needed" in out


def test_without_any_lesion_there_is_no_cpm(voxelscale: Command, reported: Reported) -> None:
    folder = reported("evaluate_healthy_scans")
    rows = (folder / "set.csv").read_text().splitlines()
    (folder / "healthy.csv").write_text("\n".join([rows[0], *rows[2:]]) + "\n")
    for case in ("healthy2", "healthy3"):
        shutil.copy(folder / "empty" / f"{case}.nii.gz", folder / "predictions" / case / "mask.nii.gz")
        (folder / "predictions" / case / "findings.json").write_text("[]")
    code, out, err = voxelscale("evaluate", folder / "predictions", folder / "healthy.csv", *HEALTHY)
    assert code == 0, err
    summary = evaluation(folder / "predictions")
    assert summary["froc"]["cpm"] is None
    assert summary["sensitivity_at_1_fp"] is None
    assert (summary["dice"]["mean"], summary["dice"]["cases"]) == (0.0, 1)
    assert "sensitivity and CPM: no value without a lesion; 0.667 false positives per scan" in out
    assert "2 scans without: both masks are empty" in out
    page = folder / "page.html"
    code, _, err = voxelscale(
        "report", folder / "predictions", folder / "healthy.csv", "--out", page, *HEALTHY
    )
    assert (code, page.is_file()) == (0, True), err


# Missing predictions.


@pytest.fixture
def predicted(scans: Path, tmp_path: Path) -> Path:
    """Predictions of three of five scans: the truth, half of it, nothing (the hard case)."""
    folder = tmp_path / "predictions"
    for number, source in enumerate(list_sources(scans)[:3]):
        truth = read_label(source.labels[0])
        mask = truth.array.copy()
        if number:
            mask[:, :, : mask.shape[2] // (3 - number)] = 0
        write_scan(Scan(mask, truth.affine), folder / source.case / "mask.nii.gz")
        found = lesions_of_mask(source.case, mask, truth.grid)
        write_findings(found, folder / source.case / "findings.csv", folder / source.case / "findings.json")
    return folder


def test_a_prediction_that_was_asked_for_and_is_missing_is_an_error(
    voxelscale: Command, scans: Path, predicted: Path
) -> None:
    cases = [source.case for source in list_sources(scans)]
    record_cases(predicted, cases[:3])
    code, _, err = voxelscale("evaluate", predicted, scans)
    assert (code, "no prediction of 2 cases with truth" in err, "warning" in err) == (0, True, False)
    before = evaluation(predicted)
    assert before["coverage"]["with_truth"] == 5
    assert (before["coverage"]["scored"], before["coverage"]["missing"]) == (3, cases[3:])
    shutil.rmtree(predicted / cases[2])
    code, out, err = voxelscale("evaluate", predicted, scans)
    assert code == 2
    assert "scored 2 of 5 cases with truth" in out
    assert f"1 not evaluated: {cases[2]}" in err
    assert "no prediction, though predict.json lists it" in err
    after = evaluation(predicted)
    assert [row["case"] for row in after["failed"]] == [cases[2]]
    # Counted as empty, the figures are those of the hard case, in which nothing is found.
    code, _, err = voxelscale("evaluate", predicted, scans, "--all")
    assert code == 0, err
    everything = evaluation(predicted)
    assert everything["coverage"]["counted_as_empty"] == cases[2:]
    assert "scored as if nothing was found" in err
    assert everything["scans"] == 5
    found = before["dice"]["mean"] * 3
    assert everything["dice"]["mean"] == pytest.approx(found / 5)
    assert everything["lesion_count"] > before["lesion_count"]


def test_a_missing_prediction_that_no_record_knows_is_a_warning(
    voxelscale: Command, scans: Path, predicted: Path
) -> None:
    cases = [source.case for source in list_sources(scans)]
    code, out, err = voxelscale("--quiet", "evaluate", predicted, scans)
    assert code == 0
    assert f"warning: {predicted}: no prediction of 2 cases with truth ({cases[3]}, {cases[4]})" in err
    assert "; scored 3 of 5 cases with truth" in out


@pytest.mark.parametrize("file", ["mask.nii.gz", "findings.json"])
def test_half_a_prediction_is_an_error(
    voxelscale: Command, scans: Path, predicted: Path, file: str
) -> None:
    case = list_sources(scans)[1].case
    (predicted / case / file).unlink()
    code, out, err = voxelscale("evaluate", predicted, scans)
    assert (code, f"{predicted / case}: holds no {file}" in err) == (2, True)
    assert "scored 2 of 5" in out


def test_predictions_that_do_not_belong_there_are_named(
    voxelscale: Command, scans: Path, predicted: Path
) -> None:
    sources = list_sources(scans)
    shutil.copytree(predicted / sources[0].case, predicted / "stranger")
    stamp = digest_of([source_stamp(sources[0])])[:16]
    facts = [{"model": "one", "scan": stamp}, {"model": "one", "scan": "old"}, {"model": "two"}]
    for source, fact in zip(sources, facts, strict=False):
        (predicted / source.case / "case.json").write_text(json.dumps(fact))
    code, _, err = voxelscale("--quiet", "evaluate", predicted, scans)
    assert code == 0
    assert "left out 1 prediction without a case there (stranger)" in err
    assert f"by another one than most: 1 prediction ({sources[2].case})" in err
    assert f"1 prediction ({sources[1].case}) of other files than the scans here" in err
    coverage = evaluation(predicted)["coverage"]
    assert (coverage["unknown"], coverage["stale"]) == (["stranger"], [sources[1].case])
    assert coverage["other_models"] == [sources[2].case]
    (predicted / sources[2].case / "case.json").unlink()
    _, _, err = voxelscale("--quiet", "evaluate", predicted, scans)
    assert f"(no case.json): 1 prediction ({sources[2].case})" in err


def test_no_prediction_of_the_data_set_at_all(voxelscale: Command, scans: Path, predicted: Path) -> None:
    for number, folder in enumerate(sorted(path for path in predicted.iterdir() if path.is_dir())):
        folder.rename(predicted / f"other{number}")
    code, _, err = voxelscale("--quiet", "evaluate", predicted, scans)
    assert (code, len(err.splitlines())) == (2, 2)
    assert "but 3 predictions (other0, other1, other2)" in err
    assert "reading.names" in err


def test_a_scan_listed_twice_is_named(
    voxelscale: Command, scans: Path, predicted: Path, tmp_path: Path
) -> None:
    source = list_sources(scans)[0]
    table = tmp_path / "twice.csv"
    rows = [[name, source.image, source.labels[0]] for name in (source.case, "again")]
    with table.open("w", newline="") as handle:
        csv.writer(handle).writerows([["case", "image", "label"], *rows])
    shutil.copytree(predicted / source.case, predicted / "again")
    code, _, err = voxelscale("--quiet", "evaluate", predicted, table)
    assert code == 0
    assert f"one scan under several names, counted each time: {source.case}, again" in err


# Findings.


def test_findings_outside_the_scan_are_an_error(voxelscale: Command, scans: Path, predicted: Path) -> None:
    """As of places in RAS instead of LPS."""
    case = list_sources(scans)[0].case
    path = predicted / case / "findings.json"
    path.write_text(json.dumps([asdict(finding(900.0, 0.5, case=case))]))
    code, _, err = voxelscale("--quiet", "evaluate", predicted, scans)
    assert code == 2
    assert f"{path}: the finding at (900.0, 0.0, 0.0) mm lies outside the scan" in err


@pytest.mark.parametrize(("value", "quoted"), [("NaN", "nan"), ("95.0", "95"), ("-0.1", "-0.1")])
def test_a_confidence_that_is_none_is_an_error(
    voxelscale: Command, scans: Path, predicted: Path, value: str, quoted: str
) -> None:
    case = list_sources(scans)[0].case
    path = predicted / case / "findings.json"
    row = {**asdict(finding(0.0, 0.5, case=case)), "probability": "HERE"}
    path.write_text(json.dumps([row]).replace('"HERE"', value))
    code, _, err = voxelscale("--quiet", "evaluate", predicted, scans)
    assert (code, str(path) in err, quoted in err) == (2, True, True)


def test_values_that_no_mask_has_are_an_error(voxelscale: Command, scans: Path, predicted: Path) -> None:
    code, _, err = voxelscale("--quiet", "evaluate", predicted, scans, "--set", "reading.labels=[7]")
    assert (code, "no voxel of the values 7" in err) == (2, True)


def sphere(folder: Path, places: list[tuple[float, float, float]]) -> np.ndarray[Any, Any]:
    """A mask of 40 voxels of 1 mm each way, with a ball of 6 mm at each place (x, y, z)."""
    z, y, x = np.indices((40, 40, 40))
    mask = np.zeros((40, 40, 40), np.uint8)
    for at in places:
        mask |= ((x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2 <= 9).astype(np.uint8)
    return mask


def luna16(folder: Path) -> list[tuple[float, float, float]]:
    """A scan in LUNA16's layout, a nodule and two excluded findings; predictions on all, one beside."""
    uid = "1.2.3.4"
    places = [(10.0, 10.0, 10.0), (30.0, 10.0, 10.0), (10.0, 30.0, 10.0), (30.0, 30.0, 30.0)]
    data = folder / "data"
    (data / "subset0").mkdir(parents=True)
    hu = np.full((40, 40, 40), -800, np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(hu), str(data / "subset0" / f"{uid}.mhd"))
    head = "seriesuid,coordX,coordY,coordZ,diameter_mm\n"
    (data / "annotations.csv").write_text(f"{head}{uid},10,10,10,6\n")
    (data / "annotations_excluded.csv").write_text(f"{head}{uid},30,10,10,8\n{uid},10,30,10,-1\n")
    mask = sphere(folder, places)
    affine = np.eye(4)[:, [2, 1, 0, 3]]
    write_scan(Scan(mask, affine), folder / "predictions" / uid / "mask.nii.gz")
    found = [replace(f, probability=0.9) for f in lesions_of_mask(uid, mask, Scan(mask, affine).grid)]
    write_findings(found, folder / "findings.csv", folder / "predictions" / uid / "findings.json")
    return places


def test_findings_on_excluded_ones_are_ignored(voxelscale: Command, tmp_path: Path) -> None:
    """LUNA16's rule, for findings and components: of four one is right, two are ignored, one is wrong."""
    luna16(tmp_path)
    code, _, err = voxelscale("evaluate", tmp_path / "predictions", tmp_path / "data")
    assert code == 0, err
    summary = evaluation(tmp_path / "predictions")
    (row,) = summary["cases"]
    assert (row["lesions"], row["detected"], row["false_positives"], row["ignored"]) == (1, 1, 1, 2)
    for matched in summary["iou"]:
        assert (matched["true_positives"], matched["false_positives"]) == (1, 1)
    (tmp_path / "data" / "annotations_excluded.csv").unlink()
    voxelscale("evaluate", tmp_path / "predictions", tmp_path / "data")
    (row,) = evaluation(tmp_path / "predictions")["cases"]
    assert (row["false_positives"], row["ignored"]) == (3, 0)


def test_a_comparison_ignores_them_too(voxelscale: Command, tmp_path: Path) -> None:
    luna16(tmp_path)
    shutil.copytree(tmp_path / "predictions", tmp_path / "others")
    path = next((tmp_path / "others").glob("*/findings.json"))
    kept = [found for found in read_findings(path) if found.x < 20 > found.y]
    assert len(kept) == 1
    write_findings(kept, tmp_path / "findings.csv", path)
    code, out, err = voxelscale(
        "compare", tmp_path / "predictions", tmp_path / "others", tmp_path / "data", "--json"
    )
    assert code == 0, err
    cpm = json.loads(out)["measures"]["cpm"]
    # With one false positive of one scan at the hit's confidence: 1/8 to 1 linear, then 1.
    assert cpm["a"] == pytest.approx((0.125 + 0.25 + 0.5 + 4) / 7)
    assert cpm["b"] == 1.0
