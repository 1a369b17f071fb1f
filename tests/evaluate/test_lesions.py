"""Lesion by lesion: overlaps, sizes, matching by IoU, synthetic nodules."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from numpy.typing import NDArray
from tests.conftest import Command
from tests.evaluate.scored import evaluate_case

from voxelscale.evaluate.evaluate import summarise
from voxelscale.evaluate.froc import Matches, match
from voxelscale.evaluate.lesions import (
    SIZE_BINS_MM,
    Components,
    average_precision,
    by_size,
    detection_figures,
    lesion_overlaps,
    match_by_iou,
    pair_components,
)
from voxelscale.evaluate.nodules import Nodule, by_trait, read_nodules
from voxelscale.evaluate.text import text_summary
from voxelscale.findings import Finding, lesions_of_mask
from voxelscale.geometry import Grid, Scan

NAN = math.nan
MILLIMETRE = np.diag([1.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]]
"""Affine of voxels of 1 mm."""


def grid(mask: NDArray[np.bool_]) -> Grid:
    return Grid(mask.shape, MILLIMETRE)


def row(text: str) -> NDArray[np.bool_]:
    """A mask along x: ``##..#``."""
    return np.asarray([[[letter == "#" for letter in text]]])


def findings_of(mask: NDArray[np.bool_], *confidences: float) -> list[Finding]:
    """The components of a mask, in their order, with these confidences."""
    found = lesions_of_mask("a", mask, grid(mask))
    return [replace(f, probability=p) for f, p in zip(found, confidences, strict=True)]


def test_a_lesion_is_held_against_all_that_touches_it() -> None:
    truth = row("..####....##....##.")
    found = row("###.##.#..###......")
    paired = pair_components(truth, found, grid(truth), findings_of(found, 0.9, 0.8, 0.7, 0.6))
    assert paired.shared.tolist() == [[1, 2, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]]
    assert paired.confidence.tolist() == [0.9, 0.8, 0.7, 0.6]
    first, second, third = lesion_overlaps(paired)
    assert (first.truth, first.prediction, first.both) == (4, 5, 3)
    assert (first.dice, first.volume_error) == (2 * 3 / 9, 0.25)
    assert (second.dice, second.volume_error) == (0.8, 0.5)
    assert (third.dice, third.volume_error) == (0.0, None)


def test_a_component_that_is_no_finding_is_least_confident() -> None:
    found = row("###....###")
    far = replace(findings_of(found, 0.9, 0.8)[1], x=20.0)
    paired = pair_components(found, found, grid(found), [far])
    assert paired.confidence.tolist() == [0.0, 0.0]
    moved = [replace(f, x=f.x + 1e-3) for f in findings_of(found, 0.9, 0.8)]
    assert pair_components(found, found, grid(found), moved).confidence.tolist() == [0.9, 0.8]


def test_fragments_are_as_confident_as_the_finding_they_are_joined_in() -> None:
    found = row("###...####..........##")
    first, _, apart = findings_of(found, 0.9, 0.9, 0.2)
    joined = replace(first, x=5.1, axial_diameter_mm=10.0, probability=0.9)
    paired = pair_components(found, found, grid(found), [joined, apart])
    assert paired.confidence.tolist() == [0.9, 0.9, 0.2]


def components(
    iou: list[list[int]], truth: list[int], prediction: list[int], confidence: list[float]
) -> Components:
    return Components(
        truth=np.asarray(truth),
        prediction=np.asarray(prediction),
        shared=np.asarray(iou).reshape(len(truth), len(prediction)),
        confidence=np.asarray(confidence),
        ignored=np.zeros(len(prediction), bool),
    )


def test_the_most_confident_chooses_first() -> None:
    # IoU with the first lesion: 4 / 12 and 6 / 10; with the second 0 and 2 / 14.
    found = components([[4, 6], [0, 2]], [8, 8], [8, 8], [0.9, 0.8])
    assert match_by_iou(found, 0.1).hits == (0.9, 0.8)
    strict = match_by_iou(found, 0.2)
    assert (strict.hits[0], strict.false_positives) == (0.9, (0.8,))
    assert math.isnan(strict.hits[1])
    assert match_by_iou(found, 0.5).false_positives == (0.9,)
    assert match_by_iou(found, 0.5).hits[0] == 0.8
    equal = replace(found, confidence=np.asarray([0.5, 0.5]))
    assert match_by_iou(equal, 0.2).hits[0] == 0.5


def test_an_iou_just_at_the_threshold_matches() -> None:
    found = components([[5]], [10], [5], [0.7])
    assert match_by_iou(found, 0.5).hits == (0.7,)
    assert match_by_iou(components([[5]], [10], [6], [0.7]), 0.5).false_positives == (0.7,)


def test_nothing_to_match() -> None:
    assert match_by_iou(components([], [], [3, 4], [0.2, 0.4]), 0.1).false_positives == (0.4, 0.2)
    assert all(math.isnan(hit) for hit in match_by_iou(components([], [3, 4], [], []), 0.1).hits)
    nothing = detection_figures([Matches(hits=(), false_positives=())])
    assert (nothing["sensitivity"], nothing["precision"], nothing["average_precision"]) == (
        None,
        None,
        None,
    )
    missed = detection_figures([Matches(hits=(NAN,), false_positives=())])
    assert (missed["sensitivity"], missed["precision"], missed["average_precision"]) == (0.0, None, 0.0)


def test_average_precision_by_hand() -> None:
    """Right, wrong, right, missed: precision 1 up to a third, 2/3 up to two thirds, then nothing."""
    matches = [
        Matches(hits=(0.9, NAN), false_positives=(0.8,)),
        Matches(hits=(0.7,), false_positives=(0.1,)),
    ]
    assert average_precision(matches) == pytest.approx((34 * 1 + 33 * 2 / 3) / 101)
    figures = detection_figures(matches)
    assert (figures["sensitivity"], figures["precision"]) == (2 / 3, 0.5)
    assert (figures["true_positives"], figures["false_positives"]) == (2, 2)


def test_equal_confidences_come_in_together() -> None:
    first, second = Matches(hits=(0.5,), false_positives=()), Matches(hits=(), false_positives=(0.5,))
    assert average_precision([first, second]) == average_precision([second, first]) == pytest.approx(0.5)


CONFIDENCES = st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5])


@given(
    st.lists(
        st.builds(
            lambda hits, wrong: Matches(hits=tuple(hits), false_positives=tuple(wrong)),
            st.lists(st.one_of(CONFIDENCES, st.just(NAN)), max_size=4),
            st.lists(CONFIDENCES, max_size=4),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_average_precision_against_counting(matches: list[Matches]) -> None:
    hits = [hit for m in matches for hit in m.hits]
    wrong = [p for m in matches for p in m.false_positives]
    ours = average_precision(matches)
    if not hits:
        assert ours is None
        return
    points = []
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5):
        right = sum(hit >= threshold for hit in hits)
        marks = right + sum(p >= threshold for p in wrong)
        points += [(right, right / marks)] if marks else []
    best = [
        max((p for right, p in points if 100 * right >= k * len(hits)), default=0.0) for k in range(101)
    ]
    assert ours == pytest.approx(sum(best) / 101)


LESIONS_AND_MARKS = [(9, 12), (0, 4), (16, 6), (5, 0), (7, 9)]


def scan_of_pairs(random: np.random.Generator, lesions: int, marks: int) -> Components:
    """Components of random sizes that share random numbers of voxels."""
    truth, prediction = random.integers(40, 60, lesions), random.integers(40, 60, marks)
    shared = random.integers(0, 40, (lesions, marks)) * (random.random((lesions, marks)) < 0.5)
    confidence = random.random(marks)
    return Components(
        truth=truth,
        prediction=prediction,
        shared=shared,
        confidence=confidence,
        ignored=np.zeros(len(prediction), bool),
    )


def numbered(scan: int, count: int) -> NDArray[np.int64]:
    """What stands for boxes: (count, 2) the scan's number and the component's."""
    return np.stack([np.full(count, scan), np.arange(count)], axis=-1)


@pytest.mark.parametrize("seed", range(4))
def test_matches_and_average_precision_are_monais(seed: int) -> None:
    """MONAI's are nnDetection's. 37 lesions, as then no sensitivity lies just on one of the 101."""
    random = np.random.default_rng(seed)
    scans = [scan_of_pairs(random, lesions, marks) for lesions, marks in LESIONS_AND_MARKS]
    iou = [(f.shared / (f.truth[:, None] + f.prediction - f.shared)).T for f in scans]
    metric = COCOMetric(classes=["lesion"], iou_list=[0.1, 0.5], max_detection=[100])
    theirs = matching_batch(
        iou_fn=lambda marks, lesions: iou[marks[0, 0]][marks[:, 1]][:, lesions[:, 1]],
        iou_thresholds=metric.iou_thresholds,
        pred_boxes=[numbered(scan, len(found.prediction)) for scan, found in enumerate(scans)],
        pred_classes=[np.zeros(len(found.prediction), int) for found in scans],
        pred_scores=[found.confidence for found in scans],
        gt_boxes=[numbered(scan, len(found.truth)) for scan, found in enumerate(scans)],
        gt_classes=[np.zeros(len(found.truth), int) for found in scans],
    )
    expected, _ = metric(theirs)
    for threshold in (0.1, 0.5):
        figures = detection_figures([match_by_iou(found, threshold) for found in scans])
        name = f"IoU_{threshold:.2f}_MaxDet_100"
        assert 0 < figures["average_precision"] < 1
        assert figures["average_precision"] == pytest.approx(float(expected[f"AP_{name}"]), abs=1e-9)
        assert np.float32(figures["sensitivity"]) == expected[f"AR_{name}"]  # theirs is float32


@given(
    st.integers(0, 2**20), st.floats(0.45, 0.55), st.floats(0.45, 0.55), st.sampled_from([0.1, 0.3, 0.5])
)
@settings(max_examples=40)
def test_pairs_and_matches_against_scipy(seed: int, first: float, second: float, threshold: float) -> None:
    """SciPy's components, each pair's IoU voxel by voxel, and the greedy rule written out."""
    random = np.random.default_rng(seed)
    masks = [
        scipy.ndimage.gaussian_filter(random.random((8, 9, 10)), 1) > level for level in (first, second)
    ]
    count = len(lesions_of_mask("a", masks[1], grid(masks[1])))
    findings = findings_of(masks[1], *(random.permutation(count) / max(count, 1)).tolist())
    paired = pair_components(masks[0], masks[1], grid(masks[0]), findings)
    labels = [scipy.ndimage.label(mask, np.ones((3, 3, 3))) for mask in masks]
    parts = [[labelled == n for n in range(1, count + 1)] for labelled, count in labels]
    iou = {
        (i, j): np.count_nonzero(a & b) / np.count_nonzero(a | b)
        for (i, a), (j, b) in itertools.product(enumerate(parts[0]), enumerate(parts[1]))
    }
    confidence = [f.probability for f in findings]
    hits, wrong = dict[int, float](), []
    for j in sorted(range(len(confidence)), key=lambda j: -confidence[j]):
        free = {i: iou[i, j] for i in range(len(parts[0])) if i not in hits and iou[i, j] >= threshold}
        if free:
            hits[max(free, key=lambda i: (free[i], -i))] = confidence[j]
        else:
            wrong.append(confidence[j])
    ours = match_by_iou(paired, threshold)
    assert [h for h in ours.hits if not math.isnan(h)] == [hits[i] for i in sorted(hits)]
    assert list(ours.false_positives) == wrong
    for lesion, part in zip(lesion_overlaps(paired), parts[0], strict=True):
        touching = np.any([np.zeros_like(part), *(p for p in parts[1] if (p & part).any())], axis=0)
        expected = (part.sum(), touching.sum(), (part & touching).sum())
        assert (lesion.truth, lesion.prediction, lesion.both) == expected


def lesion(diameter: float) -> Finding:
    return replace(findings_of(row("#"), 1.0)[0], diameter_mm=diameter)


def test_sizes_by_hand() -> None:
    (low, *_), (one, two, *_) = (
        SIZE_BINS_MM[0],
        lesion_overlaps(pair_components(row("##.##"), row("##.#."), Grid((1, 1, 5), MILLIMETRE), [])),
    )
    lesions = [lesion(d) for d in (3.0, 5.9, 6.0, 40.0)]
    missed = replace(one, prediction=0, both=0)
    rows = by_size(lesions, [0.9, 0.2, NAN, 0.5], [one, two, missed, one], threshold=0.5)
    assert [(r["from_mm"], r["below_mm"]) for r in rows] == [
        (low, 6),
        (6, 8),
        (8, 15),
        (15, 30),
        (30, None),
    ]
    small, six, empty, _, mass = rows
    assert (small["lesions"], small["detected"], small["sensitivity_at_1_fp"]) == (2, 2, 0.5)
    assert small["dice"] == pytest.approx((1 + 2 / 3) / 2)
    assert (small["volume_error"], small["absolute_volume_error"], small["segmented"]) == (-0.25, 0.25, 2)
    assert (six["sensitivity"], six["dice"], six["volume_error"], six["segmented"]) == (0.0, 0.0, None, 0)
    assert (empty["lesions"], empty["sensitivity"], empty["dice"]) == (0, None, None)
    assert (mass["sensitivity"], mass["sensitivity_at_1_fp"]) == (1.0, 1.0)


def nodule(x: float, **traits: str) -> Nodule:
    return Nodule(x=x, y=0.0, z=0.0, diameter_mm=8.0, traits=traits)


def test_nodules_by_trait() -> None:
    solid, glass = nodule(0.0, kind="solid", place="wall"), nodule(6.0, kind="ground glass")
    finding = replace(findings_of(row("#"), 0.8)[0], x=1.0)
    assert match([solid, glass], [finding]).hits[0] == 0.8
    assert math.isnan(match([solid, glass], [finding]).hits[1])
    assert all(math.isnan(hit) for hit in match([solid], []).hits)
    assert match([], [finding]).hits == ()
    table = by_trait([solid, glass], [0.8, NAN], threshold=0.9)
    assert [(r["value"], r["sensitivity"]) for r in table["kind"]] == [
        ("ground glass", 0.0),
        ("solid", 1.0),
    ]
    assert [r["sensitivity_at_1_fp"] for r in table["kind"]] == [0.0, 0.0]
    assert [r["lesions"] for r in table["place"]] == [1]
    assert "margin" not in table


HEAD = "case,x,y,z,diameter_mm,kind,margin,place,hu\n"


def test_a_table_of_nodules(tmp_path: Path) -> None:
    assert read_nodules(tmp_path) == {}
    (tmp_path / "nodules.csv").write_text(
        HEAD + "a,1,2,3,8,solid,smooth,wall,30\nb,4,5,6,7,solid,,free,1\n"
    )
    read = read_nodules(tmp_path)
    assert read == read_nodules(tmp_path / "dataset.csv")
    assert read["a"] == [
        Nodule(
            x=1.0,
            y=2.0,
            z=3.0,
            diameter_mm=8.0,
            traits={"kind": "solid", "margin": "smooth", "place": "wall"},
        )
    ]
    assert read["b"][0].traits == {"kind": "solid", "place": "free"}
    (tmp_path / "nodules.csv").write_text("patient,size\n1,2\n")
    assert read_nodules(tmp_path) == {}  # somebody else's


@pytest.mark.parametrize("cell", ["", "x", "nan", "inf"])
def test_a_broken_table_of_nodules_is_reported(
    voxelscale: Command, scans: Path, tmp_path: Path, cell: str
) -> None:
    (tmp_path / "dataset.csv").write_text((scans / "dataset.csv").read_text())
    (tmp_path / "nodules.csv").write_text(HEAD + f"a,1,2,3,{cell},solid,smooth,wall,30\n")
    code, out, err = voxelscale("evaluate", tmp_path, tmp_path)
    assert (code, out) == (2, "")
    assert f"nodules.csv: line 2: diameter_mm is {cell!r}, not a finite number" in err


def test_a_cut_off_line_of_a_table_of_nodules_is_reported(
    voxelscale: Command, scans: Path, tmp_path: Path
) -> None:
    (tmp_path / "dataset.csv").write_text((scans / "dataset.csv").read_text())
    (tmp_path / "nodules.csv").write_text(HEAD + "a,1,2\n")
    code, out, err = voxelscale("evaluate", tmp_path, tmp_path)
    assert (code, out) == (2, "")
    assert "nodules.csv: line 2 is cut short: 3 of 9 cells" in err


def ball(radius: float, shift: int = 0) -> NDArray[np.uint8]:
    z, y, x = np.indices((30, 30, 40)) - np.asarray([15, 15, 12 + shift]).reshape(3, 1, 1, 1)
    inside: NDArray[np.uint8] = (z**2 + y**2 + x**2 <= radius**2).astype(np.uint8)
    return inside


def test_the_whole_summary_of_three_cases() -> None:
    """One found, one missed, one with nothing to find."""
    found, nothing = ball(6), 0 * ball(6)
    hit = replace(lesions_of_mask("a", found, grid(found != 0))[0], probability=0.7)
    traits = {"kind": "solid"}
    known = [Nodule(x=hit.x, y=hit.y, z=hit.z, diameter_mm=12.0, traits=traits)]
    results = [
        evaluate_case("a", Scan(ball(5), MILLIMETRE), Scan(found, MILLIMETRE), [hit], known),
        evaluate_case("b", Scan(ball(5), MILLIMETRE), Scan(nothing, MILLIMETRE), []),
        evaluate_case("c", Scan(nothing, MILLIMETRE), Scan(nothing, MILLIMETRE), []),
    ]
    summary = summarise(results)
    json.dumps(summary, allow_nan=False)
    narrow, wide = summary["surface_dice"]
    assert (narrow["tolerance_mm"], wide["tolerance_mm"]) == (1, 2)
    # Two empty masks have no Dice, no surface and no distance: they make no mean better.
    assert wide["mean"] == pytest.approx((1 + 0) / 2)
    assert 1 / 3 < narrow["mean"] <= wide["mean"]
    assert (summary["dice"]["cases"], wide["cases"]) == (2, 2)
    assert summary["hd95_mm"]["one_mask_empty"] == 1
    assert summary["hd95_mm"]["cases"] == 1
    assert 1 < summary["hd95_mm"]["mean"] < 2  # about 1.4 mm
    assert [case["hd95_mm"] is None for case in summary["cases"]] == [False, True, True]
    assert [case["dice"] is None for case in summary["cases"]] == [False, False, True]
    assert summary["healthy"] == {"scans": 1, "without_false_positives": 1, "false_positives": 0}
    sizes = {size["from_mm"]: size for size in summary["sizes"]}
    assert (sizes[8.0]["lesions"], sizes[8.0]["sensitivity"]) == (2, 0.5)
    growth = np.count_nonzero(found) / np.count_nonzero(ball(5)) - 1
    assert sizes[8.0]["volume_error"] == pytest.approx(growth)
    assert summary["nodules"]["kind"][0]["sensitivity"] == 1.0
    loose, strict = summary["iou"]
    assert (loose["iou"], loose["sensitivity"], loose["precision"]) == (0.1, 0.5, 1.0)
    assert strict["average_precision"] == pytest.approx(51 / 101)
    text = "\n".join(text_summary(summary))
    assert "1 without: one mask is empty" in text
    assert "1 scan without: both masks are empty" in text
    assert "1 healthy scan: 1 without a false positive, 0 false positives in all" in text
    assert "(no interval: 2 patients)" in text
    assert "(no interval: 2 patients with a lesion)" in text
    assert "8 to 15 mm" in text
    assert "kind solid" in text


def test_where_in_the_scan_a_lesion_lies_makes_no_difference() -> None:
    results = [
        evaluate_case("a", Scan(ball(5, at), MILLIMETRE), Scan(ball(4, at + 1), MILLIMETRE), [])
        for at in (0, 17)
    ]
    assert results[0].surface == results[1].surface
    assert results[0].lesion_overlaps == results[1].lesion_overlaps
    assert [r.lesions[0].index[2] for r in results] == pytest.approx([12, 29])
    assert [r.lesions[0].x for r in results] == pytest.approx([12, 29])
