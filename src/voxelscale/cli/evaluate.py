"""Commands that measure: evaluate, compare, froc, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from voxelscale.cli.common import (
    Annotations,
    ConfigFile,
    Layout,
    Sets,
    read_config,
    rows_of,
    tell_failed,
    verb,
)
from voxelscale.files import check_output


@verb("Evaluation")
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="What voxelscale predict wrote.")],
    data: Annotated[Path, typer.Argument(help="The data set with the true masks, as for prepare.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; PREDICTIONS where not said.")] = None,
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Score cases without a prediction, too: nothing was found there.")
    ] = False,
) -> int:
    """Score predictions: Dice, surfaces, sensitivity, FROC.

    \b
    voxelscale evaluate predictions/ scans/

    Dice, surface Dice and HD95 of each case; lesions by size, and synthetic ones by kind, margin and place;
    FROC by LUNA16's rule; components matched by IoU. docs/measures.md says how each is counted.
    Writes evaluation.json and cases.csv. Cases without a true mask are left out, or are healthy with
    prepare.allow_empty=true. A case that predict was asked for and that has no prediction is an error.
    """
    check_output(out or predictions)
    from voxelscale.evaluate.evaluate import evaluate_folder
    from voxelscale.evaluate.text import text_summary

    settings = read_config(config, set_).prepare
    folder = out or predictions
    summary = evaluate_folder(
        predictions, data, folder, settings, layout, annotations, missing_is_empty=all_
    )
    print("\n".join(text_summary(summary)))
    return tell_failed(rows_of(summary), "evaluated")


@verb("Evaluation")
def compare(
    predictions_a: Annotated[Path, typer.Argument(help="What voxelscale predict wrote.")],
    predictions_b: Annotated[Path, typer.Argument(help="The same of another model.")],
    data: Annotated[Path, typer.Argument(help="The data set with the true masks, as for prepare.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, too.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of the bootstrap.")] = 0,
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Say whether one model is better than another.

    \b
    voxelscale compare predictions/ other_predictions/ scans/
    voxelscale compare predictions/ other_predictions/ scans/ --json

    On the cases that both predicted: the difference of mean Dice, of CPM and of sensitivity at 1 FP/scan,
    A less B, with 95 % intervals and two-sided p-values by paired bootstrap over scans; of Dice by
    Wilcoxon's signed ranks, too.
    """
    if out is not None:
        check_output(out, file=True)
    from voxelscale.evaluate.compare import compare_folders, text_table

    result = compare_folders(
        predictions_a,
        predictions_b,
        data,
        config=read_config(config, set_).prepare,
        layout=layout,
        annotations=annotations,
        out=out,
        seed=seed,
    )
    print(json.dumps(result) if as_json else "\n".join(text_table(result)))
    return tell_failed(rows_of(result), "compared")


@verb("Evaluation")
def froc(
    submission: Annotated[Path, typer.Argument(help="CSV: seriesuid,coordX,coordY,coordZ,probability.")],
    annotations: Annotated[Path, typer.Option(help="CSV of the nodules, with diameter_mm.")],
    series: Annotated[Path, typer.Option(help="The scans, a SeriesInstanceUID a line.")],
    excluded: Annotated[
        Path | None, typer.Option(help="CSV of findings that are ignored in scoring.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Another submission, to compare with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, too.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of the bootstrap.")] = 0,
) -> None:
    """Score a submission to LUNA16 as the challenge does.

    \b
    voxelscale froc findings.csv --annotations annotations.csv --excluded annotations_excluded.csv \\
        --series seriesuids.csv
    voxelscale froc a.csv --against b.csv --annotations annotations.csv --series seriesuids.csv --json

    Sensitivity at 1/8 to 8 false positives per scan, their mean (CPM) and the challenge's counts, with
    95 % intervals by bootstrap over scans. --against adds the difference of CPM, its interval and p.
    """
    if out is not None:
        check_output(out, file=True)
    from voxelscale.evaluate.luna16 import score_submission, text_table

    result = score_submission(
        submission,
        annotations=annotations,
        series=series,
        excluded=excluded,
        against=against,
        out=out,
        seed=seed,
    )
    print(json.dumps(result) if as_json else "\n".join(text_table(result)))


@verb("Evaluation")
def report(
    predictions: Annotated[Path, typer.Argument(help="What voxelscale predict wrote.")],
    data: Annotated[Path, typer.Argument(help="The scans, or the data set with true masks.")],
    evaluation: Annotated[Path | None, typer.Option(help="Where evaluation.json is, if elsewhere.")] = None,
    run: Annotated[Path | None, typer.Option(help="The training's folder, for its curves.")] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Write one self-contained HTML page.

    \b
    voxelscale report predictions/ scans/ --run run/ --out report.html
    voxelscale report predictions/ dicom_folder/              findings alone, of scans without masks

    With true masks it shows what voxelscale evaluate measured: curves, intervals, the best and the worst
    case, the most confident false positive and the largest missed lesion. Without them it lists each scan's
    findings with their positions and shows the most confident ones.
    """
    check_output(out, file=True)
    from voxelscale.report.report import write_report

    settings = read_config(config, set_).prepare
    write_report(evaluation, predictions, data, out, run, settings, layout, annotations)
    print(f"report in {out}")
