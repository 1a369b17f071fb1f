"""The report of a run: how well, where, and how it was learnt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.config import ReadingConfig
from voxelscale.console import count, duration, warn
from voxelscale.dataset import DataSet, Source
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.froc import LEAST_DIAMETER_MM, match_marks
from voxelscale.evaluate.text import size_name, text_change, text_value
from voxelscale.evaluate.truth import truth_of
from voxelscale.findings import Finding, read_findings
from voxelscale.pages.page import cards, notes, plain_table, sortable_table, write_page
from voxelscale.report.cases import confidence, further, meter, read_scans, toggles
from voxelscale.report.curves import froc_chart, training_charts
from voxelscale.report.facts import (
    head,
    model_lines,
    model_section,
    models,
    read_json,
    warnings_of,
)
from voxelscale.report.findings import write_findings_page
from voxelscale.report.overlays import Place
from voxelscale.train.log import read_events

MOST_FINDINGS = 200
"""Rows of the list of findings; `voxelscale predict` may list hundreds a scan."""


def write_report(
    evaluation: Path | None,
    predictions: Path,
    data: DataSet,
    out: Path,
    run: Path | None = None,
) -> None:
    """Write one self-contained HTML page; of scans without labels one of their findings.

    Args:
        evaluation: folder with ``evaluation.json``, as `voxelscale evaluate` wrote it; None: `predictions`,
            and where none is there and the scans have no labels, the page shows the findings alone.
        predictions: what it evaluated: ``<case>/mask.nii.gz``.
        data: the data set with images and masks.
        out: the page.
        run: the training's folder, for its curves and config; None: without them.

    Raises:
        VoxelscaleError: there is no evaluation, though there are labels.
    """
    data = data.named_as_in(predictions)
    folder = evaluation or predictions
    there = (folder / "evaluation.json").is_file()
    if evaluation is None and not there and not _labelled(data):
        write_findings_page(predictions, data, out, run)
        return
    summary = read_evaluation(folder)
    sources = {s.case: s for s in data.cases}
    events = read_events(run) if run else []
    listed = list(_listed(summary, predictions, sources, data.reading))
    made = [row["case"] for row in summary["cases"]]
    sections = [
        _head(summary, run),
        _cards(summary, events),
        *_warnings(summary, predictions),
        "<h2>Curves</h2>",
        f'<div class="charts">{froc_chart(summary["froc"])}{"".join(training_charts(events))}</div>',
        "<h2>Overlays</h2>",
        toggles(["truth", "prediction", "mark"]),
        *_overlays(summary, listed, predictions, sources, data.reading),
        "<h2>Lesions by size</h2>",
        _sizes(summary["sizes"]),
        "<h2>Cases</h2>",
        _cases(summary["cases"]),
        "<h2>Findings</h2>",
        _findings(listed),
        model_section(model_lines(models(predictions, made), run)),
        _facts(run) if run else "",
        "<footer>Dice = 2|A∩B| / (|A| + |B|). A finding hits a lesion when its centre lies within the "
        "lesion's radius (LUNA16). Surfaces are weighed by area. Dice and volume (predicted less true) "
        "of a lesion are of all components that share a voxel with it. Intervals: 95 %, bootstrap over "
        "scans. Positions are LPS mm, as in findings.csv. A lesion is missed when no finding of any "
        "confidence hits it.</footer>",
    ]
    write_page(f"Voxelscale report: Dice {text_value(summary['dice']['mean'])}", sections, out)


def _labelled(data: DataSet) -> bool:
    """Whether any of the scans has labels, and so should be evaluated."""
    return data.annotations is not None or any(s.labels for s in data.scans)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The content of a folder's ``evaluation.json``.

    Raises:
        VoxelscaleError: there is none, or it is no evaluation.
    """
    path = folder / "evaluation.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        summary["dice"]["mean"], summary["cases"], summary["lesions"], summary["froc"]["points"]
        summary["sizes"], summary["surface_dice"][0], summary["hd95_mm"]["median"]
    except (OSError, ValueError, KeyError, TypeError):
        raise VoxelscaleError(f"{path}: no evaluation there", "run voxelscale evaluate first") from None
    return dict(summary)


def _head(summary: Mapping[str, Any], run: Path | None) -> str:
    environment = read_json(run / "environment.json") if run else {}
    parts = [count(summary["scans"], "scan"), count(summary["lesion_count"], "lesion")]
    if environment:
        ranks = environment["ranks"] * environment["virtual_workers"]
        parts.append(
            f"trained by {count(ranks, 'worker')} on {environment['device']}, "
            f"{environment['precision']}, torch {environment['torch']}"
        )
    return head("Voxelscale report", parts)


def _cards(summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> str:
    dice, found = summary["dice"], summary["sensitivity_at_1_fp"]
    with_lesions = summary.get("scans_with_lesions", summary["scans"])
    facts = [
        (
            "Dice, mean of cases",
            text_value(dice["mean"]),
            _range(dice["interval"], dice.get("cases", summary["scans"])),
        ),
        (
            "Dice, all voxels pooled",
            text_value(summary["dice_pooled"]),
            f"lowest of a case {text_value(dice['least'])}",
        ),
        (
            "Sensitivity at 1 FP/scan",
            text_value(found),
            _range(summary["sensitivity_at_1_fp_interval"], with_lesions),
        ),
        ("CPM", text_value(summary["froc"]["cpm"]), "mean of 7 operating points"),
        _surface_card(summary),
    ]
    if trained := [e for e in events if e["event"] == "train"]:
        last = trained[-1]
        facts.append(("Training time", duration(last["seconds"]), f"{last['samples']:,} samples"))
    return cards(facts)


def _surface_card(summary: Mapping[str, Any]) -> tuple[str, str, str]:
    narrow, median = summary["surface_dice"][0], summary["hd95_mm"]["median"]
    note = "" if median is None else f"HD95 {median:.1f} mm, median"
    return f"Surface Dice at {narrow['tolerance_mm']:g} mm", text_value(narrow["mean"]), note


def _range(interval: Sequence[float] | None, cases: int) -> str:
    """An interval, or of how few cases there is none; older evaluations wrote one even of one case."""
    if interval is None or cases < 2:
        return f"no interval ({count(cases, 'case')})"
    return f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}"


COVERAGE = {
    "missing": "Have no prediction, and are not in the figures",
    "counted_as_empty": "Have no prediction, and count as if nothing had been found",
    "without_truth": "Were predicted, but have no mask: left out",
    "unknown": "Were predicted, but are not in the data set: left out",
    "unfinished": "Do not say by which model they were predicted",
    "other_models": "Were predicted by another model than most",
    "stale": "Were predicted from other files than the scans here",
    "twice": "Are the same scan as another one",
}
"""Lists of cases in the evaluation's ``coverage``, in words."""


def _warnings(summary: Mapping[str, Any], predictions: Path) -> Iterator[str]:
    """What the figures leave out, and what speaks against them."""
    failed = [f"{f['case']}: {f['error']}" for f in summary.get("failed", [])]
    yield notes(f"Not evaluated: {count(len(failed), 'case')}", failed)
    coverage = summary.get("coverage", {})
    for name, words in COVERAGE.items():
        yield notes(f"{words}: {count(len(coverage.get(name, ())), 'case')}", coverage.get(name, ()))
    said = []
    for case in (row["case"] for row in summary["cases"]):
        said += [f"{case}: {text}" for text in warnings_of(predictions / case)]
    yield notes("Warnings of predict", said, "#ff9f1c")


Listed = tuple[Finding, str]
"""A finding, and what it hits: one of `LESION`, `NEITHER`, `WRONG`."""

LESION, NEITHER, WRONG = "lesion", "not counted", "false positive"


def _listed(
    summary: Mapping[str, Any], predictions: Path, sources: Mapping[str, Source], reading: ReadingConfig
) -> Iterator[Listed]:
    """All cases' findings, each with what it hits by the evaluation's rule."""
    without = set(summary.get("coverage", {}).get("counted_as_empty", ()))
    for row in summary["cases"]:
        case = row["case"]
        if case in without:
            continue
        lesions = _spheres([one for one in summary["lesions"] if one["case"] == case])
        try:
            findings = read_findings(predictions / case / "findings.json")
            # Read only where the evaluation says that something was neither right nor wrong to find.
            ignored = truth_of(sources[case], reading).ignored if row.get("ignored") else ()
        except (VoxelscaleError, KeyError) as error:
            warn(f"{case}: its findings are not listed: {error}")
            continue
        excluded = _spheres([{name: getattr(one, name) for name in PLACED} for one in ignored])
        for finding in findings:
            mark = np.asarray([(finding.x, finding.y, finding.z, finding.probability)])
            matches = match_marks(mark, lesions, excluded)
            yield finding, WRONG if matches.false_positives else NEITHER if matches.on_excluded else LESION


PLACED = ("x", "y", "z", "diameter_mm")


def _spheres(rows: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
    """(n, 4), as `match_marks` takes them, with the smallest diameter that the evaluation gives them."""
    spheres = [(one["x"], one["y"], one["z"], max(one["diameter_mm"], LEAST_DIAMETER_MM)) for one in rows]
    return np.asarray(spheres, np.float64).reshape(-1, 4)


def _overlays(
    summary: Mapping[str, Any],
    listed: Sequence[Listed],
    predictions: Path,
    sources: dict[str, Source],
    reading: ReadingConfig,
) -> Iterator[str]:
    """The best, median and worst case, the largest missed lesion and the most confident false positive."""
    for title, case, place, note in [*_chosen(summary["cases"]), *_mistakes(summary, listed)]:
        scans = read_scans(case, sources, predictions, reading)
        if scans is not None:
            yield scans.block(title, f"{case}{note}", place)


Shown = tuple[str, str, Place | None, str]
"""A picture's title, its case, where to look, and what else is to be said."""


def _chosen(cases: Sequence[Mapping[str, Any]]) -> Iterator[Shown]:
    ordered = sorted(cases, key=lambda row: -_dice_of(row))
    names = {0: "Best", len(ordered) // 2: "Median", len(ordered) - 1: "Worst"}
    if len(ordered) <= 2:
        names = {0: "Best", len(ordered) - 1: "Worst"} if len(ordered) == 2 else {0: "Only"}
    for number, name in sorted(names.items()):
        row = ordered[number]
        yield f"{name} case: Dice {text_value(row['dice'])}", row["case"], None, ""


def _mistakes(summary: Mapping[str, Any], listed: Sequence[Listed]) -> Iterator[Shown]:
    missed = [one for one in summary["lesions"] if not one["detected"]]
    if missed:
        one = max(missed, key=lambda lesion: lesion["diameter_mm"])
        place = Place(centre=(one["x"], one["y"], one["z"]), diameter_mm=one["diameter_mm"])
        title = f"Largest missed lesion: {one['diameter_mm']:.1f} mm"
        yield title, one["case"], place, _at(place)
    wrong = [finding for finding, hit in listed if hit == WRONG]
    if wrong:
        first = max(wrong, key=lambda finding: finding.probability)
        place = Place(centre=(first.x, first.y, first.z), diameter_mm=first.diameter_mm)
        title = f"Most confident false positive: {first.probability:.3f}"
        yield title, first.case, place, f"{_at(place)}, diameter {first.diameter_mm:.1f} mm"


def _at(place: Place) -> str:
    x, y, z = place.centre
    return f", at ({x:.1f}, {y:.1f}, {z:.1f}) mm"


def _dice_of(row: Mapping[str, Any]) -> float:
    """For the order: a healthy scan in which nothing was found has none, and is right."""
    return 1.0 if row["dice"] is None else float(row["dice"])


def _sizes(sizes: Sequence[Mapping[str, Any]]) -> str:
    columns = ("Diameter", "Lesions", "Found", "Sensitivity", "At 1 FP/scan", "Dice", "Volume")
    rows = [
        [
            size_name(size),
            str(size["lesions"]),
            str(size["detected"]),
            f"{meter(size['sensitivity'])}{size['sensitivity']:.3f}",
            text_value(size["sensitivity_at_1_fp"]),
            text_value(size["dice"]),
            text_change(size["volume_error"]),
        ]
        for size in sizes
        if size["lesions"]
    ]
    return plain_table(columns, rows, "Lesions by size") if rows else "<p>No lesion.</p>"


def _cases(cases: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "case": "Case",
        "dice": "Dice",
        "surface_dice_1mm": "Surface Dice, 1 mm",
        "hd95_mm": "HD95, mm",
        "lesions": "Lesions",
        "detected": "Found",
        "false_positives": "False positives",
        "truth_voxels": "Voxels, truth",
        "predicted_voxels": "Voxels, predicted",
    }
    rows = [[(_cell(key, case[key]), _sort_key(case[key])) for key in columns] for case in cases]
    return sortable_table(list(columns.values()), rows, "Cases")


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "dice":
        return f"{meter(value)}{value:.3f}"
    if isinstance(value, float):
        return f"{value:.1f}" if key == "hd95_mm" else f"{value:.3f}"
    return escape(f"{value:,}" if isinstance(value, int) else str(value))


def _sort_key(value: Any) -> str:
    """What the page sorts by; the distance to an empty mask is infinite."""
    return "Infinity" if value is None else str(value)


def _findings(listed: Sequence[Listed]) -> str:
    """All cases' findings, most confident first, and whether they hit a lesion."""
    if not listed:
        return "<p>No finding.</p>"
    ordered = sorted(listed, key=lambda pair: -pair[0].probability)
    rows = [
        [
            (escape(f.case), f.case),
            (confidence(f), f"{f.probability!r}"),
            (f"<b>{hit}</b>" if hit == WRONG else hit, str((WRONG, NEITHER, LESION).index(hit))),
            (f"{f.x:.1f}", f"{f.x}"),
            (f"{f.y:.1f}", f"{f.y}"),
            (f"{f.z:.1f}", f"{f.z}"),
            (f"{f.diameter_mm:.1f}", f"{f.diameter_mm}"),
            (f"{f.volume_mm3:,.0f}", f"{f.volume_mm3}"),
        ]
        for f, hit in ordered[:MOST_FINDINGS]
    ]
    columns = ["Case", "Confidence", "Hits", "x, mm", "y, mm", "z, mm", "Diameter, mm", "Volume, mm³"]
    return sortable_table(columns, rows, "Findings", "wide tall") + further(
        len(ordered) - MOST_FINDINGS, "each case's findings.json"
    )


def _facts(run: Path) -> str:
    environment = read_json(run / "environment.json")
    path = run / "config.yaml"
    config = path.read_text(encoding="utf-8") if path.is_file() else ""
    facts = "\n".join(f"{name}: {value}" for name, value in environment.items())
    return (
        f"<details><summary>Environment</summary><pre>{escape(facts)}</pre></details>"
        f"<details><summary>Config</summary><pre>{escape(config)}</pre></details>"
    )
