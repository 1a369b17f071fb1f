"""Two models on the same scans: paired bootstrap, signed ranks, and the command."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import Command

from voxelscale.dataset import DataSet
from voxelscale.dataset.listing import list_sources
from voxelscale.evaluate.bootstrap import MIN_PATIENTS, p_value, percentile_interval, resampled_means
from voxelscale.evaluate.compare import Pair, Score, compare_scores, wilcoxon_p
from voxelscale.evaluate.evaluate import evaluate_folder
from voxelscale.evaluate.froc import Matches
from voxelscale.files import write_csv
from voxelscale.findings import lesions_of_mask, write_findings
from voxelscale.formats import read_label, write_scan
from voxelscale.geometry import Scan

NAN = math.nan
NOTHING = (None, None)


def score(dice: float, hits: tuple[float, ...] = (), wrong: tuple[float, ...] = ()) -> Score:
    return Score(dice=dice, matches=Matches(hits=hits, false_positives=wrong))


SCORES = st.builds(
    score,
    st.floats(0, 1),
    st.lists(st.sampled_from([0.2, 0.5, 0.9, NAN]), min_size=2, max_size=2).map(tuple),
    st.lists(st.sampled_from([0.3, 0.6]), max_size=3).map(tuple),
)


@settings(max_examples=30)
@given(st.lists(SCORES, min_size=1, max_size=8))
def test_a_model_against_itself(scores: list[Score]) -> None:
    result = compare_scores({str(n): (s, s) for n, s in enumerate(scores)}, resamples=50)
    for row in result["measures"].values():
        assert row["a"] == row["b"]
        enough = len(scores) >= MIN_PATIENTS
        assert (row["difference"], row["interval"], row["p"]) == (0, *(([0, 0], 1) if enough else NOTHING))
    assert result["measures"]["dice"]["wilcoxon_p"] == (1 if enough else None)


@settings(max_examples=30)
@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=8))
def test_the_other_way_round_is_the_same_with_the_other_sign(pairs: list[Pair]) -> None:
    there = compare_scores({str(n): pair for n, pair in enumerate(pairs)}, resamples=50)
    back = compare_scores({str(n): (b, a) for n, (a, b) in enumerate(pairs)}, resamples=50)
    for name, row in there["measures"].items():
        other = back["measures"][name]
        assert row["difference"] == pytest.approx(-other["difference"], abs=1e-12)
        if len(pairs) < MIN_PATIENTS:
            assert (row["interval"], other["interval"]) == NOTHING
        else:
            turned = [-bound for bound in other["interval"][::-1]]
            assert row["interval"] == pytest.approx(turned, abs=1e-12)
        assert row["p"] == other["p"]
    assert there["measures"]["dice"]["wilcoxon_p"] == back["measures"]["dice"]["wilcoxon_p"]


def test_a_model_that_is_better_everywhere() -> None:
    pairs = {
        str(n): (score(0.8 + n / 100, hits=(0.9, 0.8)), score(0.7 + n / 200, hits=(0.9, NAN)))
        for n in range(12)
    }
    result = compare_scores(pairs)
    dice, cpm = result["measures"]["dice"], result["measures"]["cpm"]
    differences = [0.1 + n / 200 for n in range(12)]
    assert dice["difference"] == pytest.approx(np.mean(differences))
    assert min(differences) < dice["interval"][0] < dice["difference"] < dice["interval"][1]
    assert dice["p"] == pytest.approx(2 / 1001)  # the least that 1,000 draws can give
    assert dice["wilcoxon_p"] == pytest.approx(2 / 2**12)  # all 12 of one sign, of 2 ** 12 ways
    assert (cpm["a"], cpm["b"], cpm["interval"]) == (1.0, 0.5, [0.5, 0.5])
    assert result["measures"]["sensitivity_at_1_fp"]["difference"] == 0.5
    assert (result["scans"], result["lesion_count"]) == (12, 24)
    assert result == compare_scores(pairs)
    assert (
        result["measures"]["dice"]["interval"]
        != compare_scores(pairs, seed=1)["measures"]["dice"]["interval"]
    )


def test_pairs_are_not_torn_apart() -> None:
    """What makes a scan hard for both drops out: spread over scans, but always one hundredth apart."""
    pairs = {str(n): (score(n / 20 + 0.01), score(n / 20)) for n in range(20)}
    dice = compare_scores(pairs)["measures"]["dice"]
    assert dice["interval"] == pytest.approx([0.01, 0.01])
    assert dice["p"] < 0.01


def test_a_patients_second_scan_is_no_further_evidence() -> None:
    random = np.random.default_rng(2)
    once = {
        str(n): (score(random.random(), (0.9, 0.4)), score(random.random(), (0.8, NAN), (0.5,)))
        for n in range(8)
    }
    twice = {
        f"{n}-{scan}": tuple(replace(one, patient=n) for one in pair)
        for scan in (1, 2)
        for n, pair in once.items()
    }
    alone, both = compare_scores(once), compare_scores(twice)  # type: ignore[arg-type]
    assert (both["scans"], both["scans_with_dice"], both["patients_with_dice"]) == (16, 16, 8)
    for name, row in alone["measures"].items():
        assert both["measures"][name].pop("interval") == pytest.approx(row.pop("interval"))
        assert both["measures"][name] == pytest.approx(row)


def test_patients_are_those_of_the_data_set(
    voxelscale: Command, scans: Path, predicted: tuple[Path, Path], tmp_path: Path
) -> None:
    four = list_sources(scans)[:4]
    rows = [(s.case, s.image, (s.labels or ("",))[0], f"p{at // 2}") for at, s in enumerate(four)]
    write_csv(tmp_path / "set.csv", [("case", "image", "label", "patient"), *rows])
    code, out, err = voxelscale("compare", *predicted, tmp_path / "set.csv", "--json")
    assert code == 0, err
    assert (json.loads(out)["scans"], json.loads(out)["patients_with_dice"]) == (4, 2)
    code, _, err = voxelscale("evaluate", predicted[0], tmp_path / "set.csv", "--out", tmp_path)
    assert code == 0, err
    assert json.loads((tmp_path / "evaluation.json").read_text())["patients"] == 2


def test_without_lesions_only_the_dice_is_compared() -> None:
    result = compare_scores({"a": (score(0.5), score(0.25)), "b": (score(1.0), score(1.0))})
    assert result["measures"]["dice"]["difference"] == 0.125
    assert set(result["measures"]["cpm"].values()) == {None}
    assert set(result["measures"]["sensitivity_at_1_fp"].values()) == {None}
    json.dumps(result, allow_nan=False)


def test_signed_ranks_by_hand() -> None:
    """Ranks 1, 2, 3 and one of them negative: of the 8 ways of signs, 4 have a rank sum as small, 1."""
    assert wilcoxon_p(np.asarray([0.3, -0.1, 0.2])) == pytest.approx(0.5)
    assert wilcoxon_p(np.asarray([0.3, -0.1, 0.0, 0.2])) == pytest.approx(0.5)  # no sign, no rank
    assert wilcoxon_p(np.asarray([1e-17, 0.0])) == 1


def test_p_values_by_hand() -> None:
    assert p_value(np.asarray([0.1] * 97 + [-0.1] * 2)) == pytest.approx(2 * 3 / 100)
    assert p_value(np.asarray([0.1] * 9)) == pytest.approx(0.2)
    assert p_value(np.asarray([0.0] * 9)) == 1
    assert p_value(np.asarray([1e-17] * 9)) == 1  # rounding is no difference
    assert p_value(np.asarray([NAN, 0.1, -0.1, NAN])) == 1
    assert p_value(np.asarray([NAN])) is None
    assert percentile_interval(np.asarray([NAN])) is None
    assert percentile_interval(np.asarray([NAN, *np.arange(41)])) == pytest.approx([1, 39])


def test_means_are_of_samples_as_large_as_the_scans() -> None:
    means = resampled_means(np.asarray([[0.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 2.0]]), resamples=400)
    assert means.shape == (2, 400)
    assert set(means[0]) == {0, 0.25, 0.5, 0.75, 1}
    assert means[1] == pytest.approx(2 * means[0])  # the same samples
    assert means[0].mean() == pytest.approx(0.75, abs=0.05)


@pytest.fixture
def predicted(scans: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two models on four scans: the truth, and the truth less some slices; one of them lacks a scan."""
    folders = tmp_path / "good", tmp_path / "worse"
    for number, source in enumerate(list_sources(scans)[:4]):
        assert source.labels
        truth = read_label(source.labels[0])
        for model, folder in enumerate(folders):
            mask = truth.array.copy()
            inside = np.flatnonzero(mask.any(axis=(1, 2)))
            mask[inside[0] : inside[0] + model * (1 + number)] = 0
            write_scan(Scan(mask, truth.affine), folder / source.case / "mask.nii.gz")
            found = lesions_of_mask(source.case, mask, truth.grid)
            write_findings(
                found, folder / source.case / "findings.csv", folder / source.case / "findings.json"
            )
    return folders


def test_the_command(
    voxelscale: Command, scans: Path, predicted: tuple[Path, Path], tmp_path: Path
) -> None:
    good, worse = predicted
    code, out, _ = voxelscale("compare", good, worse, scans, "--json", "--out", tmp_path / "compared.json")
    assert code == 0
    result = json.loads(out)
    assert result == json.loads((tmp_path / "compared.json").read_text())
    evaluations = [evaluate_folder(folder, DataSet(path=scans), folder) for folder in predicted]
    for model, evaluation in zip("ab", evaluations, strict=True):
        measures = result["measures"]
        assert measures["dice"][model] == pytest.approx(evaluation["dice"]["mean"])
        assert measures["cpm"][model] == pytest.approx(evaluation["froc"]["cpm"])
        assert measures["sensitivity_at_1_fp"][model] == evaluation["sensitivity_at_1_fp"]
    assert result["measures"]["dice"]["difference"] > 0
    assert result["cases"][0]["dice_a"] == 1
    code, out, _ = voxelscale("compare", good, worse, scans)
    lines = out.splitlines()
    assert (code, lines[:2]) == (0, [f"A: {good}", f"B: {worse}"])
    assert f"{result['measures']['dice']['difference']:+.3f}" in out
    assert "Wilcoxon" in lines[-1]


def test_cases_that_one_of_them_lacks_are_left_out(
    voxelscale: Command, scans: Path, predicted: tuple[Path, Path]
) -> None:
    good, worse = predicted
    shutil.rmtree(next(worse.iterdir()))
    code, out, err = voxelscale("compare", good, worse, scans, "--json")
    assert (code, json.loads(out)["scans"]) == (0, 3)
    assert f"{good}: left out 1 case that the other one lacks" in err
    assert len(json.loads(out)["only_a"]) == 1
    assert json.loads(out)["only_b"] == []


def test_one_scan_under_two_names_is_two_cases(
    voxelscale: Command, scans: Path, predicted: tuple[Path, Path], tmp_path: Path
) -> None:
    """As two readers' masks of a scan: each is a case, as for evaluate."""
    source = list_sources(scans)[0]
    table = tmp_path / "readers.csv"
    rows = [f"{name},{source.image},{source.labels[0]}" for name in (source.case, "again")]
    table.write_text("\n".join(["case,image,label", *rows]))
    for folder in predicted:
        shutil.copytree(folder / source.case, folder / "again")
    code, out, err = voxelscale("compare", *predicted, table, "--json")
    assert (code, json.loads(out)["scans"]) == (0, 2), err


def test_a_broken_prediction_is_reported_and_the_others_are_compared(
    voxelscale: Command, scans: Path, predicted: tuple[Path, Path]
) -> None:
    good, worse = predicted
    broken = sorted(worse.iterdir())[0]
    (broken / "findings.json").write_text("{")
    code, out, err = voxelscale("compare", good, worse, scans, "--json")
    assert (code, json.loads(out)["scans"]) == (2, 3)
    assert f"{broken / 'findings.json'}: not a list of findings" in err
    assert f"1 not compared: {broken.name}" in err


def test_nothing_in_common_is_reported(
    voxelscale: Command, scans: Path, predicted: tuple[Path, Path], tmp_path: Path
) -> None:
    code, out, err = voxelscale("compare", predicted[0], tmp_path / "nowhere", scans, "--quiet")
    assert (code, out, len(err.splitlines())) == (2, "", 2)
    assert "no case of" in err
