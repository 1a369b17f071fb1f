"""FROC as LUNA16 counts it: the challenge's own answers, its rules by hand, and a slow recount."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import SHARED, Command
from tests.evaluate.test_evaluate import finding

from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.froc import OPERATING_POINTS, Matches, froc, match, pool, resampled
from voxelscale.evaluate.luna16 import score_submission

LUNA16 = SHARED / "luna16"
needs_tables = pytest.mark.skipif(not LUNA16.is_dir(), reason="no shared/data")

MARK_HEAD = "seriesuid,coordX,coordY,coordZ,probability"
NODULE_HEAD = "seriesuid,coordX,coordY,coordZ,diameter_mm"

Row = tuple[str, float, float, float, float]


def table(head: str, rows: Sequence[Sequence[object]]) -> str:
    return "\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n"


def write(
    folder: Path,
    marks: Sequence[Row],
    nodules: Sequence[Row],
    excluded: Sequence[Row] = (),
    series: Sequence[str] = ("a",),
    name: str = "marks.csv",
) -> None:
    (folder / name).write_text(table(MARK_HEAD, marks))
    (folder / "nodules.csv").write_text(table(NODULE_HEAD, nodules))
    (folder / "excluded.csv").write_text(table(NODULE_HEAD, excluded))
    (folder / "series.csv").write_text("\n".join(series) + "\n")


def score(folder: Path, resamples: int = 20, **more: Any) -> dict[str, Any]:
    return score_submission(
        folder / "marks.csv",
        annotations=folder / "nodules.csv",
        excluded=folder / "excluded.csv",
        series=folder / "series.csv",
        resamples=resamples,
        **more,
    )


def counts(result: Mapping[str, Any]) -> tuple[float, ...]:
    """True and false positives, missed; on excluded findings, doubles; marks."""
    names = (
        "True positives",
        "False positives",
        "False negatives",
        "Ignored candidates on excluded nodules",
    )
    more = ("Ignored candidates which were double detections on a nodule", "Total number of candidates")
    return tuple(result["counts"][name] for name in (*names, *more))


def options(folder: Path) -> list[object]:
    return [
        *("--annotations", folder / "nodules.csv"),
        *("--excluded", folder / "excluded.csv"),
        *("--series", folder / "series.csv"),
    ]


# The challenge's own answers.


@needs_tables
@pytest.mark.parametrize("which", ["a", "b"])
def test_agrees_with_the_challenge(voxelscale: Command, which: str) -> None:
    code, out, err = voxelscale(
        *("froc", LUNA16 / "judge" / f"submission_{which}.csv", "--json"),
        *("--annotations", LUNA16 / "annotations.csv"),
        *("--excluded", LUNA16 / "annotations_excluded.csv"),
        *("--series", LUNA16 / "seriesuids.csv"),
    )
    assert (code, err) == (0, "")
    ours = json.loads(out)
    expected = json.loads((LUNA16 / "judge" / f"expected_{which}.json").read_text())
    assert ours["false_positives_per_scan"] == expected["false_positives_per_scan"]
    assert [round(value, 9) for value in ours["sensitivity"]] == expected["sensitivity"]
    assert ours["cpm"] == pytest.approx(expected["cpm"], abs=1e-9)
    assert set(ours["counts"]) == set(expected["counts"])
    for name, value in expected["counts"].items():
        assert round(ours["counts"][name], 9) == value, name


# Each rule by a small table.


def test_the_surface_of_a_nodule_is_outside(tmp_path: Path) -> None:
    write(tmp_path, [("a", 3, 4, 0, 0.9), ("a", 2, 4, 1, 0.8)], [("a", 0, 0, 0, 10)])
    assert counts(score(tmp_path)) == (1, 1, 0, 0, 0, 2)


def test_of_several_hits_the_most_confident_counts(tmp_path: Path) -> None:
    marks: list[Row] = [("a", 1, 0, 0, 0.2), ("a", 2, 0, 0, 0.7), ("a", 0, 1, 0, 0.4), ("a", 50, 0, 0, 0.5)]
    write(tmp_path, marks, [("a", 0, 0, 0, 10)])
    result = score(tmp_path)
    assert counts(result) == (1, 1, 0, 0, 2, 4)
    assert result["sensitivity"] == [1.0] * 7  # the best hit comes before the false positive


def test_a_mark_within_two_nodules_finds_both(tmp_path: Path) -> None:
    write(tmp_path, [("a", 1, 0, 0, 0.5)], [("a", 0, 0, 0, 4), ("a", 2, 0, 0, 4), ("a", 9, 0, 0, 4)])
    result = score(tmp_path)
    assert counts(result) == (2, 0, 1, 0, 0, 1)
    assert result["cpm"] == pytest.approx(2 / 3)


def test_marks_on_excluded_findings_are_ignored_unless_they_hit(tmp_path: Path) -> None:
    marks: list[Row] = [("a", 30, 0, 0, 0.9), ("a", 4, 0, 0, 0.8), ("a", 60, 0, 0, 0.7)]
    excluded: list[Row] = [("a", 30, 0, 0, 6), ("a", 30, 1, 0, 6), ("a", 6, 0, 0, 6)]
    write(tmp_path, marks, [("a", 0, 0, 0, 10)], excluded)
    assert counts(score(tmp_path)) == (1, 1, 0, 1, 0, 3)
    write(tmp_path, marks, [("a", 0, 0, 0, 10)])
    assert counts(score(tmp_path)) == (1, 2, 0, 0, 0, 3)


@pytest.mark.parametrize(("x", "ignored"), [(4.9, 1), (5.0, 0)])
def test_an_excluded_finding_without_a_size_has_10_mm(tmp_path: Path, x: float, ignored: int) -> None:
    write(tmp_path, [("a", x, 0, 0, 0.9)], [("a", 99, 0, 0, 4)], [("a", 0, 0, 0, -1)])
    assert counts(score(tmp_path)) == (0, 1 - ignored, 1, ignored, 0, 1)


def test_a_hundred_marks_a_scan_count(tmp_path: Path) -> None:
    far: list[Row] = [("a", 100 + n, 0, 0, 0.5 + n / 1000) for n in range(100)]
    nodule: list[Row] = [("a", 0, 0, 0, 10)]
    write(tmp_path, [("a", 0, 0, 0, 0.4), *far], nodule)
    assert counts(score(tmp_path)) == (0, 100, 1, 0, 0, 100)
    write(tmp_path, [("a", 0, 0, 0, 0.9), *far], nodule)
    assert counts(score(tmp_path)) == (1, 99, 0, 0, 0, 100)
    write(tmp_path, far, nodule)
    assert counts(score(tmp_path)) == (0, 100, 1, 0, 0, 100)


def test_marks_as_confident_as_the_101st_are_dropped(tmp_path: Path) -> None:
    sure: list[Row] = [("a", 0, 0, 0, 0.9), *(("a", 100 + n, 0, 0, 0.8) for n in range(97))]
    tied: list[Row] = [("a", 300 + n, 0, 0, 0.5) for n in range(4)]
    write(tmp_path, [*tied, *sure], [("a", 0, 0, 0, 10)])
    assert counts(score(tmp_path)) == (1, 97, 0, 0, 0, 98)
    write(tmp_path, [*tied[2:], *sure, ("b", 0, 0, 0, 0.1)], [("a", 0, 0, 0, 10)], series=("a", "b"))
    assert counts(score(tmp_path)) == (1, 100, 0, 0, 0, 101)


def test_scans_without_nodules_or_marks_divide_the_false_positives(tmp_path: Path) -> None:
    marks: list[Row] = [("a", 50, 0, 0, 0.9), ("a", 0, 0, 0, 0.8)]
    write(tmp_path, marks, [("a", 0, 0, 0, 10)])
    assert score(tmp_path)["sensitivity"] == [0, 0, 0, 1, 1, 1, 1]
    write(tmp_path, marks, [("a", 0, 0, 0, 10)], series=("a", "b", "c", "d"))
    result = score(tmp_path)
    assert result["sensitivity"] == [0, 1, 1, 1, 1, 1, 1]
    assert result["counts"]["Average number of candidates per scan"] == 0.5


def test_the_curve_is_linear_where_marks_tie(tmp_path: Path) -> None:
    """A hit and two false positives of one confidence: a line from (0, 0) to (2, 1)."""
    marks: list[Row] = [("a", 0, 0, 0, 0.5), ("a", 50, 0, 0, 0.5), ("a", 60, 0, 0, 0.5)]
    write(tmp_path, marks, [("a", 0, 0, 0, 10)])
    assert score(tmp_path)["sensitivity"] == pytest.approx([0.0625, 0.125, 0.25, 0.5, 1, 1, 1])


@pytest.mark.parametrize(("wrong", "at_one"), [(24, 1.0), (25, 0.5)])
def test_a_step_on_an_operating_point_rounds_as_in_the_challenge(wrong: int, at_one: float) -> None:
    """7 / 25 * 25 / 7 is above 1 in binary, 7 / 24 * 24 / 7 is not; scikit-learn's roc_curve, with which
    the challenge reads the step, gives 0.5 and 1."""
    confidences = tuple(0.9 if n < 7 else 0.1 for n in range(wrong))
    scans = [Matches(hits=(0.95, 0.5), false_positives=confidences)]
    scans += [Matches(hits=(), false_positives=())] * 6
    assert froc(scans).sensitivity_at(1.0) == at_one


def test_no_hit_and_no_mark_are_a_cpm_of_0(tmp_path: Path) -> None:
    write(tmp_path, [("a", 50, 0, 0, 0.9)], [("a", 0, 0, 0, 10)])
    result = score(tmp_path)
    assert (result["cpm"], result["cpm_interval"]) == (0.0, None)  # of one scan
    assert result["sensitivity_interval"] == [None] * 7
    write(tmp_path, [], [("a", 0, 0, 0, 10)])
    assert score(tmp_path)["cpm"] == 0.0


@pytest.mark.filterwarnings("error")
def test_confidences_and_places_may_be_any_numbers(tmp_path: Path) -> None:
    marks: list[Row] = [("a", 0, 0, 0, 1.5e308), ("a", 50, 0, 0, -1.5e308), ("a", 1e200, 0, 0, -7)]
    write(tmp_path, marks, [("a", 0, 0, 0, 10)])
    result = score(tmp_path)
    assert (counts(result), result["cpm"]) == ((1, 2, 0, 0, 0, 3), 1.0)


# Against a recount that knows nothing of arrays.

COORDINATE = st.integers(-4, 4)
UIDS = ("a", "b", "c", "d")


def rows(least: int, values: st.SearchStrategy[float]) -> st.SearchStrategy[list[Row]]:
    row = st.tuples(st.sampled_from(UIDS), COORDINATE, COORDINATE, COORDINATE, values)
    return st.lists(row, min_size=least, max_size=30, unique=True)


def recount(
    marks: list[Row], nodules: list[Row], excluded: list[Row]
) -> tuple[tuple[float, ...], list[float]]:
    """The counts and the seven sensitivities, mark by mark and threshold by threshold."""

    def within(mark: Row, sphere: Row) -> bool:
        squares = sum((m - s) ** 2 for m, s in zip(mark[1:4], sphere[1:4], strict=True))
        size = 10 if sphere[4] < 0 else sphere[4]
        return mark[0] == sphere[0] and 4 * squares < size**2

    best, doubles = [], 0
    for nodule in nodules:
        hits = [mark[4] for mark in marks if within(mark, nodule)]
        doubles += max(len(hits) - 1, 0)
        best += [max(hits)] if hits else []
    free = [mark for mark in marks if not any(within(mark, nodule) for nodule in nodules)]
    wrong = [mark[4] for mark in free if not any(within(mark, other) for other in excluded)]
    points = [(0.0, 0.0)]
    for threshold in sorted({*best, *wrong}, reverse=True):
        above = sum(p >= threshold for p in wrong)
        rate = above / len(wrong) * len(wrong) / len(UIDS) if wrong else 0.0
        points.append((rate, sum(p >= threshold for p in best) / len(nodules)))
    read = []
    for point in OPERATING_POINTS:
        before = [p for p in points if p[0] <= point][-1]
        after = next((p for p in points if p[0] > point), None)
        share = 0.0 if after is None else (point - before[0]) / (after[0] - before[0])
        read.append(before[1] + share * ((after or before)[1] - before[1]))
    found = len(best)
    ignored = len(free) - len(wrong)
    return (found, len(wrong), len(nodules) - found, ignored, doubles, len(marks)), read


@settings(max_examples=60)
@given(
    rows(0, st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.7, 1.0])),
    rows(1, st.sampled_from([1.0, 2.0, 3.0, 4.5, 6.0, -1.0])),
    rows(0, st.sampled_from([2.0, 3.0, -1.0])),
)
def test_against_a_slow_recount(
    tmp_path_factory: pytest.TempPathFactory, marks: list[Row], nodules: list[Row], excluded: list[Row]
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    write(folder, marks, nodules, excluded, UIDS)
    result = score(folder, resamples=100)
    expected, sensitivities = recount(marks, nodules, excluded)
    assert counts(result) == expected
    assert result["sensitivity"] == pytest.approx(sensitivities, abs=1e-12)
    assert result["cpm"] == pytest.approx(sum(sensitivities) / 7, abs=1e-12)


# Intervals and comparisons.


def test_resamples_are_curves_of_the_scans_drawn() -> None:
    nan = float("nan")
    scans = [
        Matches(hits=(0.9, 0.5), false_positives=(0.8, 0.5)),
        Matches(hits=(nan, 0.3), false_positives=(0.4, 0.2)),
        Matches(hits=(0.7,), false_positives=()),
        Matches(hits=(), false_positives=(0.6,) * 3),
    ]
    ours = resampled([pool(scans)], 50, seed=3)[0]
    random = np.random.Generator(np.random.Philox(key=3))
    drawn = 0
    for values in ours:
        sample = [scans[i] for i in random.integers(0, 4, 4)]
        if any(scan.hits for scan in sample):
            drawn += 1
            assert values == pytest.approx([froc(sample).sensitivity_at(p) for p in OPERATING_POINTS])
        else:
            assert np.isnan(values).all()
    assert drawn > 40


def test_an_interval_is_as_wide_as_the_binomials(tmp_path: Path) -> None:
    """100 scans with a nodule each, half of them found: the sensitivity's standard error is 0.05."""
    uids = [f"s{n}" for n in range(100)]
    write(
        tmp_path,
        [(uid, 0, 0, 0, 0.9) for uid in uids[::2]],
        [(uid, 0, 0, 0, 10) for uid in uids],
        series=uids,
    )
    result = score(tmp_path, resamples=1000)
    low, high = result["cpm_interval"]
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)
    assert np.asarray(result["sensitivity_interval"]) == pytest.approx(
        np.asarray([[low, high]] * 7), abs=1e-12
    )
    assert score(tmp_path, resamples=1000)["cpm_interval"] == [low, high]
    assert score(tmp_path, resamples=30, seed=1) != score(tmp_path, resamples=30, seed=2)


def two_submissions(folder: Path) -> None:
    """marks.csv finds the nodules of scans 0 to 29 of 40, other.csv of 10 to 29 and 35 to 37."""
    uids = [f"s{n}" for n in range(40)]
    nodules: list[Row] = [(uid, 0, 0, 0, 10) for uid in uids]
    write(folder, [(uid, 0, 0, 0, 0.9) for uid in [*uids[10:30], *uids[35:38]]], nodules, name="other.csv")
    write(folder, [(uid, 0, 0, 0, 0.9) for uid in uids[:30]], nodules, series=uids)


def test_a_submission_against_itself_differs_by_nothing(tmp_path: Path) -> None:
    two_submissions(tmp_path)
    same = score(tmp_path, against=tmp_path / "marks.csv")
    assert same["difference"] == {"cpm": 0.0, "interval": [0.0, 0.0], "p": 1.0}
    assert same["against"]["cpm_interval"] == same["cpm_interval"]


def test_two_submissions_are_compared_in_pairs(tmp_path: Path) -> None:
    """The scans' differences are +1 ten times, -1 three times, 0 else: mean 7/40, standard error
    sqrt(13/40 - (7/40)^2) / sqrt(40) = 0.0858. Unpaired it would be 0.104."""
    two_submissions(tmp_path)
    result = score(tmp_path, resamples=1000, against=tmp_path / "other.csv")
    assert result["against"]["cpm"] == pytest.approx(23 / 40)
    difference = result["difference"]
    assert difference["cpm"] == pytest.approx(7 / 40)
    low, high = difference["interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * 0.0858, abs=0.013)
    # P(a normal with this mean and error is below half a scan): 2 * Phi(-(0.175 - 0.0125) / 0.0858).
    assert difference["p"] == pytest.approx(0.058, abs=0.03)
    (tmp_path / "marks.csv").rename(tmp_path / "first.csv")
    (tmp_path / "other.csv").rename(tmp_path / "marks.csv")
    turned = score(tmp_path, resamples=1000, against=tmp_path / "first.csv")["difference"]
    assert turned["cpm"] == -difference["cpm"]
    assert turned["interval"] == pytest.approx([-high, -low], abs=1e-12)
    assert turned["p"] == difference["p"]


def test_a_difference_in_every_draw_has_the_least_p(tmp_path: Path) -> None:
    uids = ["a", "b", "c", "d", "e"]
    write(tmp_path, [], [(uid, 0, 0, 0, 10) for uid in uids], series=uids, name="none.csv")
    write(tmp_path, [(u, 0, 0, 0, 0.9) for u in uids], [(u, 0, 0, 0, 10) for u in uids], series=uids)
    difference = score(tmp_path, resamples=99, against=tmp_path / "none.csv")["difference"]
    assert difference == {"cpm": 1.0, "interval": [1.0, 1.0], "p": 0.02}


def test_fewer_than_5_scans_with_a_nodule_give_no_interval(voxelscale: Command, tmp_path: Path) -> None:
    uids = ["a", "b", "c", "d", "e", "f"]
    for nodules, known in ((4, False), (5, True)):
        spheres: list[Row] = [(uid, 0, 0, 0, 10) for uid in uids[:nodules]]
        write(tmp_path, [("a", 0, 0, 0, 0.9)], spheres, series=uids)
        result = score(tmp_path, against=tmp_path / "marks.csv")
        values = (result["cpm_interval"], result["difference"]["interval"], result["difference"]["p"])
        assert [value is not None for value in values] == [known] * 3
        assert [value is not None for value in result["sensitivity_interval"]] == [known] * 7
        code, out, _ = voxelscale("froc", tmp_path / "marks.csv", *options(tmp_path))
        assert code == 0
        assert ("no intervals: fewer than 5 scans with a nodule" in out) != known


# The command.


def test_the_command_prints_a_table_and_writes_json(voxelscale: Command, tmp_path: Path) -> None:
    two_submissions(tmp_path)
    code, out, err = voxelscale(
        *("froc", tmp_path / "marks.csv", *options(tmp_path)),
        *("--against", tmp_path / "other.csv", "--out", tmp_path / "new" / "scores.json"),
    )
    assert (code, err) == (0, "")
    written = json.loads((tmp_path / "new" / "scores.json").read_text())
    lines = out.splitlines()
    assert "True positives: 30" in lines
    assert "False negatives: 10" in lines
    low, high = written["cpm_interval"]
    assert f"    CPM       0.7500  {low:.4f} to {high:.4f}" in lines
    assert (
        sum(line.split()[:2] == [f"{point:g}", "0.7500"] for line in lines for point in OPERATING_POINTS)
        == 7
    )
    low, high = written["difference"]["interval"]
    p = written["difference"]["p"]
    assert lines[-1] == f"difference: +0.1750 (95 % {low:+.4f} to {high:+.4f}), p = {p:.3f}"

    code, out, err = voxelscale("froc", tmp_path / "marks.csv", *options(tmp_path), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out).items() <= {**written}.items()
    assert "difference" not in json.loads(out)


def test_tables_of_more_scans_serve_a_subset(voxelscale: Command, tmp_path: Path) -> None:
    nodules: list[Row] = [("a", 0, 0, 0, 10), ("z", 0, 0, 0, 10), ("z", 40, 0, 0, 10)]
    write(tmp_path, [("a", 0, 0, 0, 0.9)], nodules, [("z", 0, 0, 0, -1)])
    code, out, err = voxelscale("--verbose", "froc", tmp_path / "marks.csv", *options(tmp_path), "--json")
    assert code == 0
    assert json.loads(out)["counts"]["Total number of nodules"] == 1
    first, second = err.splitlines()
    assert "nodules.csv: left out 2 findings in 1 scans" in first
    assert "excluded.csv: left out 1 findings in 1 scans" in second


def test_forms_of_tables_that_are_right(tmp_path: Path) -> None:
    """A byte order mark, Windows' line ends, other columns in another order, blank lines, a header."""
    write(tmp_path, [("a", 0, 0, 0, 0.9)], [("a", 0, 0, 0, 10)], [("a", 90, 0, 0, -1)] * 2)
    expected = score(tmp_path)
    (tmp_path / "marks.csv").write_bytes(
        b"\xef\xbb\xbfprobability, remark ,coordZ,coordY,coordX,seriesuid\r\n\r\n"
        b"0.9,good,0,0,0, a \r\n,,,,,\r\n"
    )
    (tmp_path / "series.csv").write_text("seriesuid\na\n\n")
    assert score(tmp_path) == expected


GOOD = b"a,0,0,0,0.9"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("marks.csv", None, "marks.csv: no such file"),
        ("marks.csv", b"", "marks.csv: empty"),
        ("marks.csv", b"\n \n", "marks.csv: empty"),
        ("marks.csv", MARK_HEAD[:-12].encode() + b"\n" + GOOD, "line 1 names no column probability"),
        (
            "marks.csv",
            b"coordX," + MARK_HEAD.encode() + b"\n0," + GOOD,
            "line 1 names twice the column coordX",
        ),
        ("marks.csv", b"a,1,2,3,0.5\n", "line 1 names no column seriesuid"),
        ("marks.csv", b"%s\na,0,0,0,high", "line 3: probability is 'high', not a finite number"),
        ("marks.csv", b"%s\na,0,,0,0.5", "line 3: coordY is '', not a finite number"),
        ("marks.csv", b"%s\na,0,0,0,NaN", "line 3: probability is 'NaN', not a finite number"),
        ("marks.csv", b"%s\na,0,0,0,inf", "line 3: probability is 'inf', not a finite number"),
        ("marks.csv", b"%s\na,-inf,0,0,1", "line 3: coordX is '-inf', not a finite number"),
        ("marks.csv", b"%s\n\na,0,0,1e999,1", "line 4: coordZ is '1e999', not a finite number"),
        ("marks.csv", b"%s\na,0,0", "line 3 is cut short"),
        ("marks.csv", b"%s\na,0,0,1,0.5\na,0,0,0.0,0.90", "line 4 repeats line 2"),
        ("marks.csv", b"%s\nb,0,0,0,0.5", "line 3: series 'b' is not in"),
        ("marks.csv", b"%s\nM\xfcller,0,0,0,1", "line 3 is not UTF-8 text"),
        ("marks.csv", "seriesuid".encode("utf-16-le"), "line 1 is not UTF-8 text"),
        ("marks.csv", "seriesuid".encode("utf-16"), "line 1 names no column coordX: 'seriesuid'"),
        ("marks.csv", b"%s\n" + b"x" * 200_000, "line 3 is not readable as CSV"),
        ("nodules.csv", None, "nodules.csv: no such file"),
        ("nodules.csv", MARK_HEAD.encode() + b"\n" + GOOD, "line 1 names no column diameter_mm"),
        ("nodules.csv", NODULE_HEAD.encode() + b"\na,0,0,0,nan", "line 2: diameter_mm is 'nan'"),
        ("nodules.csv", NODULE_HEAD.encode() + b"\na,0,0,0,5\na,0,0,0,5", "line 3 repeats line 2"),
        ("nodules.csv", NODULE_HEAD.encode() + b"\n", "nodules.csv: no nodule of a scan in"),
        ("nodules.csv", NODULE_HEAD.encode() + b"\nz,0,0,0,5\n", "nodules.csv: no nodule of a scan in"),
        ("excluded.csv", NODULE_HEAD.encode() + b"\na,0,0,0,big", "line 2: diameter_mm is 'big'"),
        ("series.csv", None, "series.csv: no such file"),
        ("series.csv", b"\n", "series.csv: lists no series"),
        ("series.csv", b"a\nb\na\n", "line 3 lists the series of line 1 again: a"),
    ],
)
def test_a_table_that_is_wrong_is_named_with_its_line(
    voxelscale: Command, tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    write(tmp_path, [("a", 0, 0, 0, 0.9)], [("a", 0, 0, 0, 10)])
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content.replace(b"%s", MARK_HEAD.encode() + b"\n" + GOOD))
    code, out, err = voxelscale("froc", tmp_path / "marks.csv", *options(tmp_path))
    lines = err.strip().splitlines()
    assert (code, out, len(lines)) == (2, "", 2), err
    assert lines[0].startswith(f"error: {tmp_path / name}: ")
    assert words in lines[0]
    assert lines[1].startswith("hint: ")


def test_the_other_submission_is_checked_too(tmp_path: Path) -> None:
    write(tmp_path, [("a", 0, 0, 0, 0.9)], [("a", 0, 0, 0, 10)])
    (tmp_path / "other.csv").write_text(f"{MARK_HEAD}\nb,0,0,0,0.5\n")
    with pytest.raises(VoxelscaleError, match=r"other\.csv: line 2: series 'b' is not in"):
        score(tmp_path, against=tmp_path / "other.csv")


# Our own masks.


def test_a_masks_tiny_lesion_counts_as_3_mm_and_a_tables_does_not(tmp_path: Path) -> None:
    found = [finding(1.4, 0.9), finding(1.6, 0.8)]
    matches = match([finding(0.0, diameter=1.0)], found)
    assert (matches.hits, matches.false_positives) == ((0.9,), (0.8,))
    write(tmp_path, [("a", 1.4, 0, 0, 0.9), ("a", 1.6, 0, 0, 0.8)], [("a", 0, 0, 0, 1)])
    assert counts(score(tmp_path)) == (0, 2, 1, 0, 0, 2)


def test_findings_on_excluded_ones_are_ignored() -> None:
    found = [finding(0.0, 0.9), finding(2.0, 0.6), finding(30.0, 0.8), finding(60.0, 0.7)]
    matches = match([finding(0.0)], found, excluded=[finding(1.0), finding(30.0)])
    assert matches == Matches(hits=(0.9,), false_positives=(0.7,), doubles=1, on_excluded=1)
