"""Commands that score predictions: evaluate, compare, froc, report."""

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
    data_set,
    print_failed,
    read_config,
    rows_of,
    verb,
)
from voxelscale.files import check_output


@verb("Evaluation")
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder that voxelscale predict wrote.")],
    data: Annotated[Path, typer.Argument(help="Data set with the true masks, as for prepare.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder to write; by default PREDICTIONS.")
    ] = None,
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Also score cases without a prediction, as if nothing was found.")
    ] = False,
) -> int:
    """Score predictions: Dice, surface distances, sensitivity, FROC.

    \b
    voxelscale evaluate predictions/ scans/

    Dice, surface Dice and HD95 per case; sensitivity by lesion size, and by kind, margin and place for
    synthetic nodules; FROC by LUNA16's rule; components matched by IoU; 95 % intervals. docs/measures.md
    defines each. Several classes are scored one by one, with the mean Dice over them. Writes
    evaluation.json and cases.csv. Cases without a true mask are left out; with
    reading.allow_empty=true they count as healthy. A case that predict was to predict and did not is an
    error.
    """
    check_output(out or predictions)
    from voxelscale.evaluate.evaluate import evaluate_folder
    from voxelscale.evaluate.text import text_summary

    truth = data_set(data, read_config(config, set_), layout, annotations)
    summary = evaluate_folder(predictions, truth, out or predictions, missing_is_empty=all_)
    print("\n".join(text_summary(summary)))
    return print_failed(rows_of(summary), "evaluated")


@verb("Evaluation")
def compare(
    predictions_a: Annotated[Path, typer.Argument(help="Predictions of model A, from voxelscale predict.")],
    predictions_b: Annotated[Path, typer.Argument(help="Predictions of model B.")],
    data: Annotated[Path, typer.Argument(help="Data set with the true masks, as for prepare.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file to write.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the bootstrap.")] = 0,
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Compare two models on the same scans, with p-values.

    \b
    voxelscale compare predictions/ other_predictions/ scans/
    voxelscale compare predictions/ other_predictions/ scans/ --json

    On the cases that both predicted: the differences A - B of mean Dice, CPM and sensitivity at 1 false
    positive per scan, with 95 % intervals and two-sided p-values by paired bootstrap over patients. For
    Dice also Wilcoxon's signed-rank test. Of several classes each by itself, with p-values corrected for
    their number (Holm), and the mean Dice over them.
    """
    if out is not None:
        check_output(out, file=True)
    from voxelscale.evaluate.compare import compare_folders, text_table

    result = compare_folders(
        predictions_a,
        predictions_b,
        data_set(data, read_config(config, set_), layout, annotations),
        out=out,
        seed=seed,
    )
    print(json.dumps(result) if as_json else "\n".join(text_table(result)))
    return print_failed(rows_of(result), "compared")


@verb("Evaluation")
def froc(
    submission: Annotated[Path, typer.Argument(help="CSV: seriesuid,coordX,coordY,coordZ,probability.")],
    annotations: Annotated[Path, typer.Option(help="CSV of the nodules, with diameter_mm.")],
    series: Annotated[Path, typer.Option(help="File of the scans, one SeriesInstanceUID per line.")],
    excluded: Annotated[
        Path | None, typer.Option(help="CSV of findings that are ignored in scoring.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Second submission, to compare with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file to write.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the bootstrap.")] = 0,
) -> None:
    """Score a LUNA16 submission as the challenge does.

    \b
    voxelscale froc findings.csv --annotations annotations.csv --excluded annotations_excluded.csv \\
        --series seriesuids.csv
    voxelscale froc a.csv --against b.csv --annotations annotations.csv --series seriesuids.csv --json

    Sensitivity at 1/8 to 8 false positives per scan, their mean (CPM) and the challenge's counts, with 95 %
    intervals by bootstrap over scans. --against adds the difference in CPM, its interval and p-value.
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
    predictions: Annotated[Path, typer.Argument(help="Folder that voxelscale predict wrote.")],
    data: Annotated[Path, typer.Argument(help="Scans, or the data set with the true masks.")],
    evaluation: Annotated[
        Path | None, typer.Option(help="Folder of evaluation.json; by default PREDICTIONS.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the training run, for its curves.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="HTML page to write.")] = Path("report.html"),
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Write one self-contained HTML page about predictions.

    \b
    voxelscale report predictions/ scans/ --run run/ --out report.html
    voxelscale report predictions/ dicom_folder/              scans without masks: findings only

    With true masks the page shows what voxelscale evaluate measured: curves, intervals, the best and the
    worst case, the most confident false positive and the largest missed lesion. Without them it lists the
    findings of each scan with their positions, and shows the most confident ones.
    """
    check_output(out, file=True)
    from voxelscale.report.report import write_report

    scans = data_set(data, read_config(config, set_), layout, annotations)
    write_report(evaluation, predictions, scans, out, run)
    print(f"report in {out}")
