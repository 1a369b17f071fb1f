"""A submission to LUNA16 scored as the challenge scores it, from its tables.

https://luna16.grand-challenge.org/Evaluation; the rules that the page leaves open are those of the
challenge's script, ``noduleCADEvaluationLUNA16.py``. `docs/measures.md` lists them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.console import notice
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.bootstrap import MIN_PATIENTS, RESAMPLES, p_value, percentile_interval
from voxelscale.evaluate.froc import OPERATING_POINTS, Matches, froc, match_marks, pool, resampled
from voxelscale.files import write_atomic
from voxelscale.findings import LUNA16_COLUMNS
from voxelscale.tables import LONGEST_QUOTE, read_list, read_table

MOST_MARKS = 100
"""Marks of a scan that count, the most confident."""

UNKNOWN_DIAMETER_MM = 10.0
"""Diameter of a finding that the tables give a negative one."""

TABLE_COLUMNS = (*LUNA16_COLUMNS[:4], "diameter_mm")

_NOTHING = np.empty((0, 4))

Rows = Mapping[str, NDArray[np.float64]]
"""Of each series (n, 4): x, y, z in mm and the confidence or the diameter in mm."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a submission is held against.

    Attributes:
        path: the list of series, for messages.
        series: all scans of the challenge, those without nodules too.
        nodules: to be found.
        excluded: ignored in scoring.
    """

    path: Path
    series: tuple[str, ...]
    nodules: Rows
    excluded: Rows


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A submission held against the truth.

    Attributes:
        matches: one a scan, in the truth's order.
        marks: how many marks were held against it.
    """

    matches: tuple[Matches, ...]
    marks: int


def score_submission(
    submission: Path,
    *,
    annotations: Path,
    series: Path,
    excluded: Path | None = None,
    against: Path | None = None,
    out: Path | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Sensitivities at the seven operating points, CPM, counts and intervals of a submission.

    Args:
        submission: CSV with ``seriesuid,coordX,coordY,coordZ,probability``, mm in the world of the scans.
        annotations: CSV with ``seriesuid,coordX,coordY,coordZ,diameter_mm``: the nodules.
        series: a SeriesInstanceUID a line: the scans, those without nodules too.
        excluded: as `annotations`: findings that are ignored in scoring.
        against: another submission, to compare with.
        out: a JSON file to write the result to.
        resamples, seed: of the bootstrap over scans.

    Returns:
        plain values, named as the challenge names them: ``sensitivity`` at ``false_positives_per_scan``,
        ``cpm``, ``counts``, 95 % intervals; with `against` the same of it and the ``difference``. Intervals
        and p are None where fewer than `voxelscale.evaluate.bootstrap.MIN_PATIENTS` scans have a nodule.

    Raises:
        VoxelscaleError: a table cannot be read, or does not fit the list of series.
    """
    truth = read_truth_tables(annotations, series, excluded)
    paths = [submission] if against is None else [submission, against]
    scored = [hold_against(truth, read_submission(path, truth)) for path in paths]
    samples = resampled([pool(s.matches) for s in scored], resamples, seed)
    result = {
        **_summary(submission, scored[0], samples[0]),
        "scans": len(truth.series),
        "resamples": resamples,
        "seed": seed,
    }
    if against is not None:
        other = _summary(against, scored[1], samples[1])
        apart = samples[0].mean(axis=1) - samples[1].mean(axis=1)
        scans = _with_nodules(scored[0])
        difference = {
            "cpm": result["cpm"] - other["cpm"],
            "interval": percentile_interval(apart, scans),
            "p": p_value(apart, scans),
        }
        result |= {"against": other, "difference": difference}
    if out is not None:
        write_atomic(out, json.dumps(result, indent=1))
    return result


def hold_against(truth: Truth, submission: Rows) -> Scored:
    """Every scan's marks held against its nodules."""
    kept = [_most_confident(submission.get(uid, _NOTHING)) for uid in truth.series]
    matches = (
        match_marks(marks, truth.nodules.get(uid, _NOTHING), truth.excluded.get(uid, _NOTHING))
        for uid, marks in zip(truth.series, kept, strict=True)
    )
    return Scored(matches=tuple(matches), marks=sum(map(len, kept)))


def _most_confident(marks: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most `MOST_MARKS`: as the challenge does it, those above the first that is too many."""
    if len(marks) <= MOST_MARKS:
        return marks
    # Marks as confident as the one that must go all go: nothing says which of them to keep.
    kept: NDArray[np.float64] = marks[marks[:, 3] > np.sort(marks[:, 3])[-MOST_MARKS - 1]]
    return kept


def _summary(submission: Path, scored: Scored, samples: NDArray[np.float64]) -> dict[str, Any]:
    curve = froc(scored.matches)
    scans = _with_nodules(scored)
    return {
        "submission": str(submission),
        "false_positives_per_scan": list(OPERATING_POINTS),
        "sensitivity": [curve.sensitivity_at(point) for point in OPERATING_POINTS],
        "sensitivity_interval": [percentile_interval(values, scans) for values in samples.T],
        "cpm": curve.cpm,
        "cpm_interval": percentile_interval(samples.mean(axis=1), scans),
        "counts": _counts(scored),
    }


def _with_nodules(scored: Scored) -> int:
    """How many scans have a nodule."""
    return sum(bool(m.hits) for m in scored.matches)


def _counts(scored: Scored) -> dict[str, float]:
    """What the challenge's script prints, in its words."""
    nodules = sum(len(m.hits) for m in scored.matches)
    found = sum(not math.isnan(hit) for m in scored.matches for hit in m.hits)
    return {
        "True positives": found,
        "False positives": sum(len(m.false_positives) for m in scored.matches),
        "False negatives": nodules - found,
        "True negatives": 0,
        "Total number of candidates": scored.marks,
        "Total number of nodules": nodules,
        "Ignored candidates on excluded nodules": sum(m.on_excluded for m in scored.matches),
        "Ignored candidates which were double detections on a nodule": sum(
            m.doubles for m in scored.matches
        ),
        "Sensitivity": found / nodules,
        "Average number of candidates per scan": scored.marks / len(scored.matches),
    }


def read_truth_tables(annotations: Path, series: Path, excluded: Path | None) -> Truth:
    """The tables of the challenge. What they hold of scans that are not in the list is left out.

    Raises:
        VoxelscaleError: a table cannot be read, a line cannot be meant so, or no scan has a nodule.
    """
    listed = _read_series(series)
    nodules: Rows = _read_rows(annotations, TABLE_COLUMNS, repeats=False)
    if listed.keys().isdisjoint(nodules):
        raise VoxelscaleError(
            f"{annotations}: no nodule of a scan in {series}", "check that the tables match"
        )
    nodules = _of_listed(annotations, nodules, series, listed)
    others: Rows = {}
    if excluded is not None:
        # The challenge's own table says many of its findings twice, which changes nothing.
        others = _of_listed(excluded, _read_rows(excluded, TABLE_COLUMNS, repeats=True), series, listed)
    return Truth(path=series, series=tuple(listed), nodules=nodules, excluded=others)


def _of_listed(path: Path, rows: Rows, series: Path, listed: Mapping[str, int]) -> Rows:
    """The findings of the listed scans, those of unknown size with the default; the others are reported."""
    outside = [uid for uid in rows if uid not in listed]
    if outside:
        count = sum(len(rows[uid]) for uid in outside)
        notice(f"{path}: left out {count} findings in {len(outside)} scans that {series} does not list")
    for values in rows.values():
        values[values[:, 3] < 0, 3] = UNKNOWN_DIAMETER_MM
    return {uid: values for uid, values in rows.items() if uid in listed}


def read_submission(path: Path, truth: Truth) -> Rows:
    """The marks of a submission.

    Raises:
        VoxelscaleError: it cannot be read, a line cannot be meant so, or is of a scan that is not listed.
    """
    return _read_rows(path, LUNA16_COLUMNS, repeats=False, truth=truth)


def _read_series(path: Path) -> dict[str, int]:
    """The series in their order, each with its line."""
    lines: dict[str, int] = {}
    for number, uid in read_list(path, LUNA16_COLUMNS[0]):
        if uid in lines:
            raise VoxelscaleError(
                f"{path}: line {number} lists the series of line {lines[uid]} again: {uid[:LONGEST_QUOTE]}",
                "list every scan once: their number divides the false positives",
            )
        lines[uid] = number
    if not lines:
        raise VoxelscaleError(f"{path}: lists no series", "give one SeriesInstanceUID per line")
    return lines


def _read_rows(
    path: Path, columns: Sequence[str], *, repeats: bool, truth: Truth | None = None
) -> dict[str, NDArray[np.float64]]:
    """A table of points by series.

    Args:
        columns: the series' and the four numbers'.
        repeats: whether a line may say the same as another.
        truth: has the only series that may be there; None: any may.
    """
    table = read_table(path, columns)
    listed = frozenset(() if truth is None else truth.series)
    points: dict[str, list[tuple[float, ...]]] = {}
    seen: dict[tuple[Any, ...], int] = {}
    for number, cells in table.rows():
        uid = table.word(cells, columns[0])
        if truth is not None and uid not in listed:
            quoted = repr(uid[:LONGEST_QUOTE])
            hint = "drop the line, or list the series if the scan belongs to the evaluation"
            raise VoxelscaleError(f"{path}: line {number}: series {quoted} is not in {truth.path}", hint)
        point = table.numbers(number, cells, columns[1:])
        first = seen.setdefault((uid, *point), number)
        if first != number and not repeats:
            hint = "drop one of the two: both would count"
            raise VoxelscaleError(f"{path}: line {number} repeats line {first}", hint)
        points.setdefault(uid, []).append(point)
    return {uid: np.asarray(values, np.float64) for uid, values in points.items()}


def text_table(result: Mapping[str, Any]) -> list[str]:
    """What `score_submission` returned, in lines for a person."""
    lines = [f"{name}: {value:g}" for name, value in result["counts"].items()]
    lines += ["", "FP/scan  sensitivity  95 % interval"]
    columns = (result[key] for key in ("false_positives_per_scan", "sensitivity", "sensitivity_interval"))
    for point, value, bounds in zip(*columns, strict=True):
        lines.append(f"{point:7g}  {value:11.4f}  {_text_interval(bounds)}")
    lines.append(f"    CPM  {result['cpm']:11.4f}  {_text_interval(result['cpm_interval'])}")
    if "against" in result:
        other, apart = result["against"], result["difference"]
        lines += ["", f"CPM of {other['submission']}: {other['cpm']:.4f}"]
        known = "(no interval, no p)"
        if apart["interval"] is not None:
            low, high = apart["interval"]
            known = f"(95 % {low:+.4f} to {high:+.4f}), p = {apart['p']:.3f}"
        lines.append(f"difference: {apart['cpm']:+.4f} {known}")
    if result["cpm_interval"] is None:
        lines.append(f"no intervals: fewer than {MIN_PATIENTS} scans with a nodule")
    return lines


def _text_interval(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"
