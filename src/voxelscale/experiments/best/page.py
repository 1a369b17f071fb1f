"""What ``voxelscale best`` found: lines for the terminal, and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from voxelscale.console import count
from voxelscale.evaluate.text import text_value
from voxelscale.experiments.best.figures import METRICS
from voxelscale.pages.page import cards, notes, plain_table, write_page

MOST_COLUMNS = 12
"""Classes that have a column."""

JUDGED = {
    "before": "as they were",
    "after_on_the_same_cases": "as found, on the cases that chose them (too good)",
    "after_on_left_out_folds": "as found, on folds that did not choose them",
}
"""Figures of the settings, in words."""


def text(result: Mapping[str, Any]) -> list[str]:
    """What `voxelscale.experiments.best.best.best` returned, in lines for a person."""
    rows = result["configurations"]
    width = max(len("configuration"), *(len(row["name"]) for row in rows))
    head = (
        f"{'configuration':{width}}    Dice     CPM  at 1 FP/scan  to best single  95 % interval         p"
    )
    return [
        f"{_cases(result)}, {count(len(result['folds']), 'fold')}",
        head,
        *(_line(row, width) for row in rows),
        *filter(None, [result["left_out"]]),
        f"chosen: {result['chosen']}",
        f"rule: {result['rule']}",
        *_tuning_lines(result["tuning"], METRICS[result["metric"]]),
    ]


def _cases(result: Mapping[str, Any]) -> str:
    return f"{count(result['cases'], 'case')} of {count(result['patients'], 'patient')}"


def _line(row: Mapping[str, Any], width: int) -> str:
    dice, cpm, found = (text_value(row[key]) for key in ("dice", "cpm", "sensitivity_at_1_fp"))
    start = f"{row['name']:{width}}  {dice:>6}  {cpm:>6}  {found:>12}"
    if row["difference"] is None:
        return start
    start = f"{start}  {row['difference']:+14.3f}"
    if row["p"] is None:
        return start
    low, high = row["interval"]
    return f"{start}  {low:+.3f} to {high:+.3f}  {_p(row):8.3f}"


def _p(row: Mapping[str, Any]) -> float | None:
    """Of averages that which is corrected for their number."""
    p: float | None = row.get("p_holm", row["p"])
    return p


def _tuning_lines(tuning: Mapping[str, Any], metric: str) -> list[str]:
    if told := _as_they_were(tuning):
        return [f"settings: {told}"]
    lines = [f"settings found: {_said(tuning['found'], '=')}"]
    lines += [f"  {metric} {text_value(tuning[key])} {words}" for key, words in JUDGED.items()]
    return lines if tuning["kept"] else [*lines, "  no better there: the settings stay as they were"]


def _as_they_were(tuning: Mapping[str, Any]) -> str:
    """Why no settings were found; "" where some were."""
    if not tuning["tried"]:
        return f"as they were: {tuning['why']}"
    return "" if tuning["found"] else "as they were: nothing that was tried is better"


def _said(settings: Mapping[str, Any], equals: str) -> str:
    return ", ".join(f"{key}{equals}{value}" for key, value in settings.items())


def write_best_page(result: Mapping[str, Any], out: Path) -> None:
    """Write one self-contained HTML page.

    Args:
        result: of `voxelscale.experiments.best.best.best`.

    Raises:
        VoxelscaleError: the file cannot be written.
    """
    classes = result["classes"]
    sections = [
        f"<header><h1>Best configuration</h1><p>Unseen predictions of {_cases(result)} in "
        f"{count(len(result['folds']), 'fold')}: each of models not trained on the case.</p></header>",
        cards(_cards(result)),
        notes("Left out", [result["left_out"]] if result["left_out"] else []),
        "<h2>Configurations</h2>",
        _configurations(result["configurations"], result["chosen"]),
        f"<p>Chosen is {escape(result['rule'])}. Differences are to the best single configuration; p of "
        "averages is corrected for their number. In brackets are 95 % intervals.</p>",
        _by_class(result["configurations"], classes) if len(classes) > 1 else "",
        "<h2>Settings of prediction</h2>",
        _tuning(result["tuning"], METRICS[result["metric"]]),
    ]
    write_page("Best configuration", sections, out)


def _cards(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    row = next(row for row in result["configurations"] if row["name"] == result["chosen"])
    facts = [("Chosen", str(result["chosen"]), count(result["networks"], "network"))]
    for key, name in (("dice", "Mean Dice"), ("cpm", "CPM")):
        facts.append((name, text_value(row[key]), _interval(row[f"{key}_interval"])))
    return facts


def _interval(bounds: Sequence[float] | None) -> str:
    return "no interval" if bounds is None else f"95 % {bounds[0]:.3f} to {bounds[1]:.3f}"


def _brackets(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f" ({bounds[0]:.3f} to {bounds[1]:.3f})"


def _configurations(rows: Sequence[Mapping[str, Any]], chosen: str) -> str:
    columns = ("Configuration", "Mean Dice", "CPM", "Sensitivity at 1 FP/scan", "Difference", "p")
    cells = []
    for row in rows:
        name = escape(row["name"])
        figures = (
            f"{text_value(row[key])}{_brackets(row[f'{key}_interval'])}"
            for key in ("dice", "cpm", "sensitivity_at_1_fp")
        )
        apart = "-" if row["p"] is None else f"{row['difference']:+.3f}{_brackets(row['interval'])}"
        cells.append(
            [f"<b>{name}</b>" if row["name"] == chosen else name, *figures, apart, text_value(_p(row))]
        )
    return plain_table(columns, cells, "Configurations")


def _by_class(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> str:
    shown = classes[:MOST_COLUMNS]
    cells = [
        [escape(row["name"]), *(text_value(own["dice"]) for own in row["classes"][: len(shown)])]
        for row in rows
    ]
    more = len(classes) - len(shown)
    note = f"<p>{count(more, 'more class', 'more classes')} in best.json.</p>" if more else ""
    return "<h2>Dice of each class</h2>" + plain_table(("Configuration", *shown), cells, "Classes") + note


def _tuning(tuning: Mapping[str, Any], metric: str) -> str:
    if told := _as_they_were(tuning):
        return f"<p>{escape(told.capitalize())}.</p>"
    rows = [[escape(words), text_value(tuning[key])] for key, words in JUDGED.items()]
    if tuning["p"] is not None:
        apart = f"{tuning['difference']:+.3f}{_brackets(tuning['interval'])}, p = {tuning['p']:.3f}"
        rows.append(["difference of the last to the first", apart])
    without = [
        [escape(fold), escape(_said(own, " = ") or "as they were")]
        for fold, own in tuning["without_fold"].items()
    ]
    kept = "The model has them." if tuning["kept"] else "No better there: the model does not have them."
    return (
        f"<p>Found: {escape(_said(tuning['found'], ' = '))}. {kept}</p>"
        + plain_table(("Settings", metric), rows, "What the settings give")
        + "<p>Without each fold was found:</p>"
        + plain_table(("Without fold", "Settings found"), without, "Settings of each fold")
    )
