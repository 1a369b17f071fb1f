"""The report of a run: how well, where, and how it was learnt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from voxelscale.channels import Channel
from voxelscale.console import count, warn
from voxelscale.dataset import DataSet
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.text import text_value
from voxelscale.files import read_json_object
from voxelscale.pages.page import cards, notes, write_page
from voxelscale.report.cases import toggles
from voxelscale.report.classes import class_sections
from voxelscale.report.curves import froc_chart, training_charts
from voxelscale.report.facts import (
    head,
    model_lines,
    model_section,
    models,
    warnings_of,
)
from voxelscale.report.findings import write_findings_page
from voxelscale.report.overlays import window_name
from voxelscale.report.pictures import Shown, chosen, mistakes, pictures
from voxelscale.report.tables import (
    Listed,
    all_findings,
    case_table,
    figure_cards,
    list_findings,
    size_table,
    time_card,
)
from voxelscale.train.log import read_events


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
            and where none is there and no scan predicted has labels, the page shows the findings alone.
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
    if evaluation is None and not there and not _labelled(data, predictions):
        write_findings_page(predictions, data, out, run)
        return
    summary = read_evaluation(folder)
    sources = {s.case: s for s in data.cases}
    events = read_events(run) if run else []
    by_class = summary.get("classes", {"": summary})
    without = summary.get("coverage", {}).get("counted_as_empty", ())
    listed, changed = list_findings(by_class, without, predictions, sources, data.reading)
    if changed:
        what = f"{folder}: the evaluation is of other findings than {predictions} has now"
        warn(f"{what}: run voxelscale evaluate again")

    def drawn(shown: Iterable[Shown]) -> Iterator[str]:
        return pictures(shown, predictions, sources, data.reading)

    made = list(dict.fromkeys(row["case"] for row in summary["cases"]))
    several = "classes" in summary
    body = (
        class_sections(summary, listed, events, drawn) if several else _body(summary, listed, events, drawn)
    )
    window = window_name(next((s.channels[0] for s in sources.values()), Channel()))
    sections = [
        _head(summary, run, window),
        *_warned(body, _warnings(summary, predictions, changed)),
        model_section(model_lines(models(predictions, made), run)),
        _facts(run) if run else "",
        f"<footer>{SEVERAL if several else ''}{FOOTER}</footer>",
    ]
    mean = summary["mean_dice" if several else "dice"]["mean"]
    write_page(f"Voxelscale report: {'mean ' if several else ''}Dice {text_value(mean)}", sections, out)


FOOTER = (
    "Dice = 2|A∩B| / (|A| + |B|). A finding hits a lesion when its centre lies within the "
    "lesion's radius (LUNA16). Surfaces are weighed by area. Dice and volume (predicted less true) "
    "of a lesion are of all components that share a voxel with it. Intervals: 95 %, bootstrap over "
    "patients. Positions are LPS mm, as in findings.csv. A lesion is missed when no finding of any "
    "confidence hits it."
)
SEVERAL = (
    "A lesion is a component of a class. The mean Dice is that over classes of each class's mean over "
    "cases; a case in which neither mask has a class has no Dice of it. "
)


def _warned(body: Sequence[str], warnings: Iterable[str]) -> list[str]:
    """The warnings right below the figures, which are the first section."""
    return [*body[:1], *warnings, *body[1:]]


def _body(
    summary: Mapping[str, Any],
    listed: Sequence[Listed],
    events: Sequence[Mapping[str, Any]],
    drawn: Callable[[Iterable[Shown]], Iterable[str]],
) -> list[str]:
    """The sections of one class; the first are its figures."""
    shown = [*chosen(summary["cases"]), *mistakes(summary["lesions"], listed)]
    return [
        cards([*figure_cards(summary), *time_card(events)]),
        "<h2>Curves</h2>",
        f'<div class="charts">{froc_chart(summary["froc"])}{"".join(training_charts(events))}</div>',
        "<h2>Overlays</h2>",
        toggles(["truth", "prediction", "mark"]),
        *drawn(shown),
        "<h2>Lesions by size</h2>",
        size_table(summary["sizes"]),
        "<h2>Cases</h2>",
        case_table(summary["cases"]),
        "<h2>Findings</h2>",
        all_findings(listed),
    ]


def _labelled(data: DataSet, predictions: Path) -> bool:
    """Whether scans that were predicted have labels, or, where none was predicted, any of them."""
    scans = data.scans
    predicted = [s for s in scans if (predictions / s.case / "findings.json").is_file()]
    return data.annotations is not None or any(s.labels for s in predicted or scans)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The content of a folder's ``evaluation.json``.

    Raises:
        VoxelscaleError: there is none, or it is no evaluation.
    """
    path = folder / "evaluation.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if "classes" in summary:
            summary["mean_dice"]["mean"], summary["cases"], summary["scans"]
        for own in summary["classes"].values() if "classes" in summary else [summary]:
            own["dice"]["mean"], own["cases"], own["lesions"], own["froc"]["points"]
            own["sizes"], own["surface_dice"][0], own["hd95_mm"]["median"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise VoxelscaleError(f"{path}: no evaluation there", "run voxelscale evaluate first") from None
    return dict(summary)


def _head(summary: Mapping[str, Any], run: Path | None, window: str) -> str:
    environment = read_json_object(run / "environment.json") if run else {}
    several = summary.get("classes")
    of = count(len(several), "class", "classes") if several else count(summary["lesion_count"], "lesion")
    parts = [count(summary["scans"], "scan"), of]
    if environment:
        ranks = environment["ranks"] * environment["virtual_workers"]
        parts.append(
            f"trained by {count(ranks, 'worker')} on {environment['device']}, "
            f"{environment['precision']}, torch {environment['torch']}"
        )
    return head("Voxelscale report", parts, window)


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


def _warnings(summary: Mapping[str, Any], predictions: Path, changed: Sequence[str]) -> Iterator[str]:
    """What the figures leave out, and what speaks against them."""
    yield notes(f"Have other findings now than the figures are of: {count(len(changed), 'case')}", changed)
    failed = [f"{f['case']}: {f['error']}" for f in summary.get("failed", [])]
    yield notes(f"Not evaluated: {count(len(failed), 'case')}", failed)
    coverage = summary.get("coverage", {})
    for name, words in COVERAGE.items():
        yield notes(f"{words}: {count(len(coverage.get(name, ())), 'case')}", coverage.get(name, ()))
    said = []
    for case in dict.fromkeys(row["case"] for row in summary["cases"]):
        said += [f"{case}: {text}" for text in warnings_of(predictions / case)]
    yield notes("Warnings of predict", said, "#ff9f1c")


def _facts(run: Path) -> str:
    environment = read_json_object(run / "environment.json")
    path = run / "config.yaml"
    config = path.read_text(encoding="utf-8") if path.is_file() else ""
    facts = "\n".join(f"{name}: {value}" for name, value in environment.items())
    return (
        f"<details><summary>Environment</summary><pre>{escape(facts)}</pre></details>"
        f"<details><summary>Config</summary><pre>{escape(config)}</pre></details>"
    )
