"""The tables of a report: figures, lesions by size, cases, and the findings with what they hit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from voxelscale.config import ReadingConfig
from voxelscale.console import duration, warn
from voxelscale.dataset import Source
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.bootstrap import MIN_PATIENTS
from voxelscale.evaluate.froc import inside_any, lies_in
from voxelscale.evaluate.text import size_name, text_change, text_value
from voxelscale.evaluate.truth import Sphere, Truth, truth_of
from voxelscale.findings import Finding, read_findings
from voxelscale.pages.page import plain_table, sortable_table
from voxelscale.report.cases import confidence, further, meter

MOST_FINDINGS = 200
"""Rows of the list of findings; `voxelscale predict` may list hundreds a scan."""


def figure_cards(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The main figures of one class, as `voxelscale.pages.page.cards` takes them."""
    dice, found = summary["dice"], summary["sensitivity_at_1_fp"]
    with_lesions = summary.get("scans_with_lesions", summary["scans"])
    return [
        (
            "Dice, mean of cases",
            text_value(dice["mean"]),
            text_range(dice["interval"], dice.get("cases", summary["scans"])),
        ),
        (
            "Dice, all voxels pooled",
            text_value(summary["dice_pooled"]),
            f"lowest of a case {text_value(dice['least'])}",
        ),
        (
            "Sensitivity at 1 FP/scan",
            text_value(found),
            text_range(summary["sensitivity_at_1_fp_interval"], with_lesions),
        ),
        ("CPM", text_value(summary["froc"]["cpm"]), "mean of 7 operating points"),
        _surface_card(summary),
    ]


def time_card(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """How long the training took, from a run's events; [] without a step."""
    trained = [e for e in events if e["event"] == "train"]
    last = trained[-1:]
    return [("Training time", duration(e["seconds"]), f"{e['samples']:,} samples") for e in last]


def _surface_card(summary: Mapping[str, Any]) -> tuple[str, str, str]:
    narrow, median = summary["surface_dice"][0], summary["hd95_mm"]["median"]
    note = "" if median is None else f"HD95 {median:.1f} mm, median"
    return f"Surface Dice at {narrow['tolerance_mm']:g} mm", text_value(narrow["mean"]), note


def text_range(interval: Sequence[float] | None, cases: int) -> str:
    """An interval, or why there is none; older evaluations wrote one even of one case."""
    if interval is None or cases < 2:
        return f"no interval (fewer than {MIN_PATIENTS} patients)"
    return f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}"


Listed = tuple[Finding, str]
"""A finding, and what it hits: one of `LESION`, `NEITHER`, `WRONG`."""

LESION, NEITHER, WRONG = "lesion", "not counted", "false positive"


def list_findings(
    by_class: Mapping[str, Mapping[str, Any]],
    without: Sequence[str],
    predictions: Path,
    sources: Mapping[str, Source],
    reading: ReadingConfig,
) -> tuple[list[Listed], list[str]]:
    """All cases' findings, each with what it hits by the evaluation's rule; and the cases that have other
    findings now than were evaluated.

    Args:
        by_class: the evaluation of each class by name; of the only one its name is "".
        without: cases that have no prediction.
    """
    lesions = {name: _by_case(own["lesions"]) for name, own in by_class.items()}
    listed: list[Listed] = []
    changed = []
    rows = zip(*(own["cases"] for own in by_class.values()), strict=True)
    for case, of_case in ((each[0]["case"], each) for each in rows):
        if case in without:
            continue
        try:
            findings = read_findings(predictions / case / "findings.json")
            # Read only where the evaluation says that something was neither right nor wrong to find.
            ignored = any(row.get("ignored") for row in of_case)
            truth = truth_of(sources[case], reading) if ignored else None
            one = "" if "" in by_class else None
            marked = [(f, lesions[f.label if one is None else one].get(case, ())) for f in findings]
        except (VoxelscaleError, KeyError) as error:
            warn(f"{case}: its findings are not listed: {error}")
            continue
        found = [(finding, _hit(finding, own, truth)) for finding, own in marked]
        listed += found
        each = zip(by_class, of_case, strict=True)
        if any(_other(found, name, row, lesions[name].get(case, ())) for name, row in each):
            changed.append(case)
    return listed, changed


def _other(
    listed: Sequence[Listed], name: str, row: Mapping[str, Any], lesions: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether a case's findings of a class ("": of all) cannot be those that its row is of."""
    own = [(finding.probability, hit) for finding, hit in listed if not name or finding.label == name]
    confident = {one["probability"] for one in lesions if one["detected"]}
    wrong = sum(hit == WRONG for _, hit in own)
    return wrong != row["false_positives"] or not confident <= {p for p, hit in own if hit == LESION}


def _hit(finding: Finding, lesions: Sequence[Mapping[str, float]], truth: Truth | None) -> str:
    place = np.asarray([(finding.x, finding.y, finding.z)])
    if inside_any(place, [Sphere(one["x"], one["y"], one["z"], one["diameter_mm"]) for one in lesions]):
        return LESION
    ignored = truth and (inside_any(place, truth.ignored) | lies_in(place, truth.uncounted))
    return NEITHER if ignored else WRONG


def _by_case(lesions: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    grouped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in lesions:
        grouped[one["case"]].append(one)
    return grouped


def size_table(sizes: Sequence[Mapping[str, Any]]) -> str:
    """Lesions by their diameter."""
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


def case_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """The cases of one class with their figures."""
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
    rows = [[(cell(key, case[key]), sort_key(case[key])) for key in columns] for case in cases]
    return sortable_table(list(columns.values()), rows, "Cases")


def cell(key: str, value: Any) -> str:
    """A figure of a case as `case_table` shows it, HTML."""
    if value is None:
        return "-"
    if key == "dice":
        return f"{meter(value)}{value:.3f}"
    if isinstance(value, float):
        return f"{value:.1f}" if key == "hd95_mm" else f"{value:.3f}"
    return escape(f"{value:,}" if isinstance(value, int) else str(value))


def sort_key(value: Any) -> str:
    """What the page sorts by; what has no value, as the distance to an empty mask, comes last."""
    return "Infinity" if value is None else str(value)


def all_findings(listed: Sequence[Listed]) -> str:
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
    names = sorted({f.label for f, _ in listed})
    if names != [""]:
        columns.insert(1, "Class")
        for row, (finding, _) in zip(rows, ordered, strict=False):
            row.insert(1, (escape(finding.label), str(names.index(finding.label))))
    return sortable_table(columns, rows, "Findings", "wide tall") + further(
        len(ordered) - MOST_FINDINGS, "each case's findings.json"
    )
