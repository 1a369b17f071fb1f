from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from tests.evaluate.scored import evaluate_case

from voxelscale.evaluate.evaluate import summarise
from voxelscale.evaluate.froc import Matches, froc, match
from voxelscale.evaluate.overlap import Overlap, overlap
from voxelscale.findings import Finding, lesions_of_mask
from voxelscale.geometry import Scan


def finding(x: float, probability: float = 1.0, diameter: float = 10.0, case: str = "a") -> Finding:
    return Finding(
        case=case,
        x=x,
        y=0.0,
        z=0.0,
        index=(0.0, 0.0, x),
        diameter_mm=diameter,
        axial_diameter_mm=diameter,
        volume_mm3=math.pi / 6 * diameter**3,
        probability=probability,
    )


@given(st.integers(0, 2**20), st.floats(0, 0.6), st.floats(0, 0.6))
def test_dice_is_simpleitks(seed: int, first: float, second: float) -> None:
    random = np.random.default_rng(seed)
    a, b = (random.random((5, 6, 7)) < share for share in (first, second))
    ours = overlap(a, b)
    if not a.any() and not b.any():
        assert ours.dice == 1.0
        return
    measure = sitk.LabelOverlapMeasuresImageFilter()
    measure.Execute(*(sitk.GetImageFromArray(m.astype(np.uint8)) for m in (a, b)))
    assert ours.dice == pytest.approx(measure.GetDiceCoefficient(), abs=1e-12)


def test_counts_pool() -> None:
    total = Overlap(truth=4, prediction=2, both=1) + Overlap(truth=6, prediction=8, both=5)
    assert total.dice == 2 * 6 / (10 + 10)
    with pytest.raises(ValueError, match="same grid"):
        overlap(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)))


def test_hits_follow_luna16s_rule() -> None:
    lesions = [finding(0.0), finding(30.0, diameter=4.0)]
    found = [
        finding(4.9, 0.4),
        finding(-3.0, 0.9),
        finding(5.1, 0.8),
        finding(32.1, 0.7),
        finding(31.9, 0.6),
    ]
    matches = match(lesions, found)
    assert matches.hits == (0.9, 0.6)  # the better of two hits counts, the other is neither
    assert sorted(matches.false_positives) == [0.7, 0.8]
    assert all(math.isnan(h) for h in match(lesions, []).hits)
    assert match([], found).false_positives == tuple(f.probability for f in found)


def test_froc_by_hand() -> None:
    nan = float("nan")
    scans = [
        Matches(hits=(0.9, 0.5), false_positives=(0.8,)),
        Matches(hits=(nan, 0.3), false_positives=(0.4, 0.2)),
    ]
    curve = froc(scans)
    points = list(
        zip(curve.thresholds.tolist(), curve.fp_per_scan.tolist(), curve.sensitivity.tolist(), strict=True)
    )
    assert points == [
        (math.inf, 0, 0),
        (0.9, 0, 0.25),
        (0.8, 0.5, 0.25),
        (0.5, 0.5, 0.5),
        (0.4, 1.0, 0.5),
        (0.3, 1.0, 0.75),
        (0.2, 1.5, 0.75),
    ]
    assert curve.sensitivity_at(0.49) == 0.25
    assert curve.sensitivity_at(1.0) == 0.75
    assert curve.cpm == pytest.approx((0.25 + 0.25 + 0.5 + 0.75 * 4) / 7)
    assert froc([Matches(hits=(), false_positives=())]).cpm == 0.0


@given(
    st.lists(
        st.tuples(
            st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=4),
            st.lists(st.floats(0, 1), max_size=4),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_froc_against_counting(scans: list[tuple[list[float], list[float]]]) -> None:
    matches = [Matches(hits=tuple(h), false_positives=tuple(f)) for h, f in scans]
    curve = froc(matches)
    lesions = sum(len(h) for h, _ in scans)
    for threshold, wrong, found in zip(curve.thresholds, curve.fp_per_scan, curve.sensitivity, strict=True):
        assert wrong * len(scans) == pytest.approx(sum(p >= threshold for _, f in scans for p in f))
        hits = sum(p >= threshold for h, _ in scans for p in h)
        assert found * max(lesions, 1) == pytest.approx(hits if lesions else 0)
    assert (np.diff(curve.fp_per_scan) >= 0).all()
    assert (np.diff(curve.sensitivity) >= 0).all()


def test_a_summary_of_two_cases() -> None:
    truth = np.zeros((8, 8, 8), np.uint8)
    truth[2:5, 2:5, 2:5] = 1
    half = truth.copy()
    half[2] = 0
    affine = np.diag([1.0, 1.0, 1.0, 1.0])[:, [2, 1, 0, 3]]
    hit = Finding(
        case="a",
        x=3,
        y=3,
        z=3,
        index=(3, 3, 3),
        diameter_mm=3,
        axial_diameter_mm=3,
        volume_mm3=27,
        probability=0.8,
    )
    results = [
        evaluate_case("a", Scan(truth, affine), Scan(half, affine), [hit]),
        evaluate_case("b", Scan(truth, affine), Scan(0 * truth, affine), []),
    ]
    summary = summarise(results)
    dice = 2 * 18 / (27 + 18)
    assert summary["dice"]["mean"] == pytest.approx(dice / 2)
    assert summary["dice"]["least"] == 0
    assert summary["dice_pooled"] == pytest.approx(2 * 18 / (54 + 18))
    assert summary["sensitivity_at_1_fp"] == 0.5
    assert summary["dice"]["interval"] is None  # two cases only
    assert summary["sensitivity_at_1_fp_interval"] is None
    # 5 scans, 2 of them good: a sample has none of these in 7.8 %, 4 or more in 8.7 %, 5 in 1 % of draws.
    five = [replace(result, case=str(n)) for n, result in enumerate([*results, *results, results[1]])]
    low, high = summarise(five)["dice"]["interval"]
    assert low == 0
    assert high == pytest.approx(0.8 * dice)
    assert [row["detected"] for row in summary["cases"]] == [1, 0]
    # A second scan of each patient narrows nothing, and ten scans of two patients have no interval.
    again = summarise([replace(r, case=f"{r.case}-{n}", patient=r.case) for n in (1, 2) for r in five])
    once = summarise(five)
    assert (again["scans"], again["patients"], again["dice"]["cases"]) == (10, 5, 10)
    for figure in ("dice", "froc"):
        key = "interval" if figure == "dice" else "cpm_interval"
        assert again[figure][key] == pytest.approx(once[figure][key])
    few = summarise([replace(r, patient="ab"[n % 2]) for n, r in enumerate(five)])
    assert (few["dice"]["interval"], few["froc"]["cpm_interval"]) == (None, None)
    assert [row["detected"] for row in summary["lesions"]] == [True, False]


@pytest.mark.parametrize("step", [1.0, 5.0])
def test_a_picture_is_measured_as_one(step: float) -> None:
    """A disc has the diameter of a disc, is hit within its radius, and its faces are no surface."""
    affine = np.diag([step, 1.0, 1.0, 1.0])[[2, 1, 0, 3]]
    apart = np.hypot(*np.ogrid[-64:64, -64:64])[None]
    truth, prediction = (Scan((apart <= radius).astype(np.uint8), affine) for radius in (40, 33))
    (lesion,) = lesions_of_mask("a", truth.array, truth.grid)
    assert lesion.diameter_mm == pytest.approx(80, abs=0.5)
    off = replace(finding(lesion.x + 30), y=lesion.y, z=lesion.z)
    score = evaluate_case("a", truth, prediction, [off])
    assert score.matches.hits == (1.0,)
    assert score.surface.dice == (0, 0)
    assert score.surface.hd95_mm == pytest.approx(7, abs=0.75)
