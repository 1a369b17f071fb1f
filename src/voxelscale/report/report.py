"""The report of a run: how well, where, and how it was learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from voxelscale.config import PrepareConfig
from voxelscale.console import count, notice
from voxelscale.data.listing import Source, list_sources
from voxelscale.data.names import names_of
from voxelscale.data.reading import read_image, read_truth
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.froc import OPERATING_POINTS
from voxelscale.evaluate.text import size_name, text_change, text_value
from voxelscale.files import write_atomic
from voxelscale.formats import read_label
from voxelscale.geometry import Scan
from voxelscale.report.charts import Line, line_chart
from voxelscale.report.overlays import overlay_views
from voxelscale.train.log import read_events


def write_report(
    evaluation: Path,
    predictions: Path,
    data: Path,
    out: Path,
    run: Path | None = None,
    config: PrepareConfig | None = None,
    layout: str = "auto",
    annotations: Path | None = None,
) -> None:
    """Write one self-contained HTML page.

    Args:
        evaluation: folder with ``evaluation.json``, as `voxelscale evaluate` wrote it.
        predictions: what it evaluated: ``<case>/mask.nii.gz``.
        data: the data set with images and masks.
        out: the page.
        run: the training's folder, for its curves and config; None: without them.
        config, layout, annotations: as for the evaluation.

    Raises:
        VoxelscaleError: there is no evaluation.
    """
    summary = read_evaluation(evaluation)
    config = config or PrepareConfig()
    sources = list_sources(data, layout, annotations, names_of(config, predictions))
    events = read_events(run) if run else []
    sections = [
        _head(summary, run),
        _cards(summary, events),
        _warnings(summary),
        "<h2>Curves</h2>",
        _charts(summary, events),
        _overlays(summary, predictions, {s.case: s for s in sources}, config),
        "<h2>Lesions by size</h2>",
        _sizes(summary["sizes"]),
        "<h2>Cases</h2>",
        _cases(summary["cases"]),
        _facts(run) if run else "",
        "<footer>Dice = 2|A∩B| / (|A| + |B|). A finding hits a lesion when its centre lies within the "
        "lesion's radius (LUNA16). Surfaces are weighed by area. Dice and volume (predicted less true) "
        "of a lesion are of all components that share a voxel with it. Intervals: 95 %, bootstrap over "
        "scans.</footer>",
    ]
    page = resources.files("voxelscale.report").joinpath("page.html").read_text(encoding="utf-8")
    title = f"Voxelscale report: Dice {text_value(summary['dice']['mean'])}"
    write_atomic(out, Template(page).substitute(title=escape(title), body="\n".join(sections)))


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
    environment = _json(run / "environment.json") if run else {}
    parts = [count(summary["scans"], "scan"), count(summary["lesion_count"], "lesion")]
    if environment:
        ranks = environment["ranks"] * environment["virtual_workers"]
        parts.append(
            f"trained by {ranks} worker{'s' * (ranks > 1)} on {environment['device']}, "
            f"{environment['precision']}, torch {environment['torch']}"
        )
    return f'<h1>Voxelscale report</h1><p class="lead">{escape(" · ".join(parts))}</p>'


def _cards(summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> str:
    dice, found = summary["dice"], summary["sensitivity_at_1_fp"]
    cards = [
        ("Dice, mean of cases", text_value(dice["mean"]), _range(dice["interval"])),
        (
            "Dice, all voxels pooled",
            text_value(summary["dice_pooled"]),
            f"least case {text_value(dice['least'])}",
        ),
        ("Sensitivity at 1 FP/scan", text_value(found), _range(summary["sensitivity_at_1_fp_interval"])),
        ("CPM", text_value(summary["froc"]["cpm"]), "mean of 7 operating points"),
        _surface_card(summary),
    ]
    if events:
        trained = [e for e in events if e["event"] == "train"]
        if trained:
            seconds = trained[-1]["seconds"]
            text = f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
            cards.append(("Training time", text, f"{trained[-1]['samples']:,} samples"))
    body = "".join(
        f'<div class="card"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<span>{escape(note)}</span></div>"
        for name, value, note in cards
    )
    return f'<div class="cards">{body}</div>'


def _surface_card(summary: Mapping[str, Any]) -> tuple[str, str, str]:
    narrow, median = summary["surface_dice"][0], summary["hd95_mm"]["median"]
    note = "" if median is None else f"HD95 {median:.1f} mm, median"
    return f"Surface Dice at {narrow['tolerance_mm']:g} mm", text_value(narrow["mean"]), note


def _range(interval: Sequence[float] | None) -> str:
    if interval is None:
        return "no interval: too few cases"
    return f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}"


def _warnings(summary: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<div>{escape(f['case'])}: {escape(f['error'])}</div>" for f in summary.get("failed", [])
    )
    return f'<div class="warn"><b>Not evaluated</b>{lines}</div>' if lines else ""


def _charts(summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> str:
    froc = summary["froc"]
    curve = list(zip(froc["fp_per_scan"], froc["sensitivity"], strict=True))
    if curve:
        curve.append((OPERATING_POINTS[-1], max(froc["sensitivity"])))
    points = [(p["fp_per_scan"], p["sensitivity"]) for p in froc["points"] if curve]
    charts = [
        line_chart(
            [
                Line(name="FROC", points=curve, stairs=True),
                Line(name="LUNA16's points", points=points, dots=True),
            ],
            x_label="false positives per scan",
            y_label="sensitivity",
            y_range=(0.0, 1.0),
            x_ticks=OPERATING_POINTS,
        )
    ]
    trained = [e for e in events if e["event"] == "train"]
    validated = [(e["samples"], e["dice"]) for e in events if e["event"] == "validation" and "dice" in e]
    if trained:
        dice = [
            Line(name="validation, whole scans", points=validated, dots=True),
            Line(name="training, soft Dice of patches", points=_smooth(trained, "dice")),
        ]
        loss = [Line(name="training loss", points=_smooth(trained, "loss"))]
        charts.append(line_chart(dice, x_label="samples", y_label="Dice", y_range=(0.0, 1.0)))
        charts.append(line_chart(loss, x_label="samples", y_label="loss"))
    return f'<div class="charts">{"".join(charts)}</div>'


def _smooth(events: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """A running mean over a twentieth of the events: single batches differ wildly."""
    width = max(1, len(events) // 20)
    values = [e[name] for e in events]
    means = [float(np.mean(values[max(0, i + 1 - width) : i + 1])) for i in range(len(values))]
    return [(e["samples"], mean) for e, mean in zip(events, means, strict=True)]


def _overlays(
    summary: Mapping[str, Any], predictions: Path, sources: Mapping[str, Source], config: PrepareConfig
) -> str:
    ordered = sorted(summary["cases"], key=lambda row: -_dice_of(row))
    chosen = {0: "best", len(ordered) - 1: "worst"}
    chosen.setdefault(len(ordered) // 2, "median")
    toggles = "".join(
        f'<label><input type="checkbox" name="{name}" checked>'
        f'<i style="background:{colour}"></i>{name}</label>'
        for name, colour in (("truth", "#4dd964"), ("prediction", "#ff9f1c"))
    )
    blocks = [f'<h2>Overlays <span class="toggles">{toggles}</span></h2>']
    for number in sorted(chosen):
        row = ordered[number]
        title = f"{chosen[number].capitalize()} case: Dice {text_value(row['dice'])}"
        try:
            views = _views(predictions / row["case"] / "mask.nii.gz", sources[row["case"]], config)
        except (VoxelscaleError, KeyError) as error:
            notice(f"warning: no overlay of {row['case']}: {error}")
            continue
        drawn = "".join(f"<div>{svg}{escape(caption)}</div>" for caption, svg in views)
        blocks.append(
            f'<div class="case"><h3>{escape(title)}<small>{escape(row["case"])}</small></h3>'
            f'<div class="views">{drawn}</div></div>'
        )
    return "".join(blocks)


def _dice_of(row: Mapping[str, Any]) -> float:
    """For the order: a healthy scan in which nothing was found has none, and is right."""
    return 1.0 if row["dice"] is None else float(row["dice"])


def _views(mask: Path, source: Source, config: PrepareConfig) -> list[tuple[str, str]]:
    prediction = read_label(mask)
    empty = Scan(0 * prediction.array, prediction.affine)
    truth = read_truth(source, config) if source.labels else empty
    return overlay_views(read_image(source, config.fill_gaps, config.select), truth, prediction)


def _sizes(sizes: Sequence[Mapping[str, Any]]) -> str:
    names = ("Diameter", "Lesions", "Found", "Sensitivity", "At 1 FP/scan", "Dice", "Volume")
    rows = []
    for size in sizes:
        if not size["lesions"]:
            continue
        cells = [
            size_name(size),
            str(size["lesions"]),
            str(size["detected"]),
            f"{_meter(size['sensitivity'])}{size['sensitivity']:.3f}",
            text_value(size["sensitivity_at_1_fp"]),
            text_value(size["dice"]),
            text_change(size["volume_error"]),
        ]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table>{table}</table></div>'


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
    head = "".join(f'<th><button type="button">{name}</button></th>' for name in columns.values())
    rows = []
    for case in cases:
        cells = "".join(
            f'<td data-value="{escape(_sort_key(case[key]), quote=True)}">{_cell(key, case[key])}</td>'
            for key in columns
        )
        rows.append(f"<tr>{cells}</tr>")
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table class="sortable">{table}</table></div>'


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "dice":
        return f"{_meter(value)}{value:.3f}"
    if isinstance(value, float):
        return f"{value:.1f}" if key == "hd95_mm" else f"{value:.3f}"
    return escape(f"{value:,}" if isinstance(value, int) else str(value))


def _sort_key(value: Any) -> str:
    """What the page sorts by; the distance to an empty mask is infinite."""
    return "Infinity" if value is None else str(value)


def _meter(share: float) -> str:
    return f'<span class="meter"><i style="width:{100 * share:.0f}%"></i></span>'


def _facts(run: Path) -> str:
    environment = _json(run / "environment.json")
    path = run / "config.yaml"
    config = path.read_text(encoding="utf-8") if path.is_file() else ""
    facts = "\n".join(f"{name}: {value}" for name, value in environment.items())
    return (
        f"<details><summary>Environment</summary><pre>{escape(facts)}</pre></details>"
        f"<details><summary>Config</summary><pre>{escape(config)}</pre></details>"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
