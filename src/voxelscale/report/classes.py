"""What a report shows of several classes: one table of all, and a section for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from voxelscale.console import count
from voxelscale.evaluate.text import text_value
from voxelscale.pages.page import cards, legend, sortable_table, swatch
from voxelscale.report.cases import toggles
from voxelscale.report.curves import froc_chart, training_charts
from voxelscale.report.pictures import Shown, chosen, mistakes
from voxelscale.report.tables import (
    Listed,
    all_findings,
    case_table,
    cell,
    figure_cards,
    size_table,
    sort_key,
    text_range,
    time_card,
)

MOST_OPEN = 4
"""More classes than these are folded away, each behind its name."""

MOST_COLUMNS = 8
"""Classes that have a column in the table of cases."""


def class_sections(
    summary: Mapping[str, Any],
    listed: Sequence[Listed],
    events: Sequence[Mapping[str, Any]],
    drawn: Callable[[Iterable[Shown]], Iterable[str]],
) -> list[str]:
    """The sections of an evaluation of several classes, HTML; the first are the figures.

    Args:
        summary: `voxelscale.evaluate.evaluate.summarise_classes`.
        listed: all findings.
        events: of the training.
        drawn: makes the pictures.
    """
    classes = summary["classes"]
    training = "".join(training_charts(events))
    lesions = [{**one, "class": name} for name, own in classes.items() for one in own["lesions"]]
    cases = _means_of_cases(summary["cases"])
    return [
        cards([*_cards(summary), *time_card(events)]),
        "<h2>Classes</h2>",
        _table(classes),
        f'<h2>Curves</h2><div class="charts">{training}</div>' if training else "",
        "<h2>Overlays</h2>",
        toggles(["truth", "prediction", "mark"], several=True),
        legend(list(classes)),
        *drawn([*chosen(cases, "mean Dice"), *mistakes(lesions, listed)]),
        "<h2>Cases</h2>",
        _cases(cases, list(classes)),
        "<h2>Class by class</h2>",
        *(
            _section(at, name, own, is_open=len(classes) <= MOST_OPEN)
            for at, (name, own) in enumerate(classes.items())
        ),
        "<h2>Findings</h2>",
        all_findings(listed),
    ]


def _cards(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    mean = summary["mean_dice"]
    known = [
        (own["dice"]["mean"], name)
        for name, own in summary["classes"].items()
        if own["dice"]["mean"] is not None
    ]
    facts = [
        (
            f"Dice, mean of {count(mean['classes'], 'class', 'classes')}",
            text_value(mean["mean"]),
            text_range(mean["interval"], mean["cases"]),
        )
    ]
    if known:
        low, high = min(known), max(known)
        facts += [
            ("Dice, lowest class", text_value(low[0]), low[1]),
            ("Dice, highest class", text_value(high[0]), high[1]),
        ]
    return facts


def _table(classes: Mapping[str, Any]) -> str:
    columns = [
        *("Class", "Dice", "95 % interval", "Surface Dice, 1 mm", "HD95, mm, median", "Cases"),
        *("Lesions", "Sensitivity at 1 FP/scan", "CPM"),
    ]
    rows = []
    for at, (name, own) in enumerate(classes.items()):
        dice, hd95 = own["dice"], own["hd95_mm"]["median"]
        interval = dice["interval"]
        values = [
            (text_value(own["surface_dice"][0]["mean"]), own["surface_dice"][0]["mean"]),
            ("-" if hd95 is None else f"{hd95:.1f}", hd95),
            (str(dice["cases"]), dice["cases"]),
            (str(own["lesion_count"]), own["lesion_count"]),
            (text_value(own["sensitivity_at_1_fp"]), own["sensitivity_at_1_fp"]),
            (text_value(own["froc"]["cpm"]), own["froc"]["cpm"]),
        ]
        rows.append(
            [
                (f'{swatch(at)}<a href="#class-{at}" style="color:inherit">{escape(name)}</a>', name),
                (cell("dice", dice["mean"]), sort_key(dice["mean"])),
                (
                    "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
                    sort_key(dice["mean"]),
                ),
                *((text, sort_key(value)) for text, value in values),
            ]
        )
    return sortable_table(columns, rows, "Classes")


def _section(at: int, name: str, own: Mapping[str, Any], *, is_open: bool) -> str:
    parts = [
        cards(figure_cards(own)),
        f'<div class="charts" style="margin-top:14px">{froc_chart(own["froc"])}</div>',
        "<h3>Lesions by size</h3>",
        size_table(own["sizes"]),
        "<h3>Cases</h3>",
        case_table(own["cases"]),
    ]
    title = f"<b>{swatch(at)}{escape(name)}</b>, Dice {text_value(own['dice']['mean'])}"
    opened = " open" if is_open else ""
    return f'<details id="class-{at}"{opened}><summary>{title}</summary>{"".join(parts)}</details>'


def _means_of_cases(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each case with its mean ``dice`` over the classes that have one there, and those of the classes."""
    each: dict[str, dict[str, float | None]] = {}
    for row in rows:
        each.setdefault(row["case"], {})[row["class"]] = row["dice"]
    means = []
    for case, dices in each.items():
        known = [dice for dice in dices.values() if dice is not None]
        means.append({"case": case, "dice": float(np.mean(known)) if known else None, "classes": dices})
    return means


def _cases(cases: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The cases with their mean Dice, the lowest class, and the classes where they are few."""
    single = list(names) if len(names) <= MOST_COLUMNS else []
    rows = []
    for case in cases:
        known = {name: dice for name, dice in case["classes"].items() if dice is not None}
        lowest = min(known, key=lambda name: known[name], default="")
        low = known.get(lowest)
        rows.append(
            [
                (escape(case["case"]), case["case"]),
                (cell("dice", case["dice"]), sort_key(case["dice"])),
                (f"{escape(lowest)} {text_value(low)}".strip(), sort_key(low)),
                (str(len(known)), str(len(known))),
                *((text_value(case["classes"].get(n)), sort_key(case["classes"].get(n))) for n in single),
            ]
        )
    columns = ["Case", "Mean Dice", "Lowest class", "Classes", *(f"Dice, {name}" for name in single)]
    return sortable_table(columns, rows, "Cases")
