"""Commands of models: train, refine, ensemble, calibrate."""

from __future__ import annotations

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
from voxelscale.console import count, notice
from voxelscale.files import check_output


@verb("Training", goes_on=True)
def train(
    store: Annotated[Path, typer.Argument(help="What voxelscale prepare wrote.")],
    run: Annotated[Path, typer.Argument(help="Folder of the run; if it has begun, it goes on.")],
    fit_memory: Annotated[
        bool,
        typer.Option("--fit-memory", help="Take the largest patch of its shape that fits."),
    ] = False,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Train a U-Net on any number of processes.

    \b
    voxelscale train store/ run/
    voxelscale train store/ run/ --set train.samples=20000 --set model.filters=16
    voxelscale train store/ run/ --set train.ranks=2          two processes on this machine
    voxelscale train store/ run/ --fit-memory                 the largest patch that fits
    torchrun --nnodes 2 --nproc-per-node 8 --no-python voxelscale train store/ run/

    The budget is in samples (patches). Ctrl-C saves; killed or not, the same command goes on with the
    very next sample. The best model on the validation scans is run/model.vxs; metrics.jsonl and
    tensorboard/ have the curves.
    """
    check_output(run)
    from voxelscale.config import load
    from voxelscale.train.launch import fit_to_memory, start

    begun = run / "config.yaml"
    settings = read_config(config, set_, load(begun) if begun.is_file() else None)
    if fit_memory and not begun.is_file():
        settings = fit_to_memory(settings, store)
    if not start(settings, store, run):
        notice(f"stopped and saved; to go on: voxelscale train {store} {run}")
        return 130
    print(f"model in {run / 'model.vxs'}")
    return 0


@verb("Training", goes_on=True)
def refine(
    run: Annotated[Path, typer.Argument(help="A trained run's folder, or its model.vxs.")],
    store: Annotated[Path, typer.Argument(help="The store that it was trained on.")],
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Train false-positive reduction for a model.

    \b
    voxelscale refine run/ store/
    voxelscale refine run/ store/ --set refine.samples=30000

    The model looks at its own training scans; a second, small network learns from crops around what it
    found there, and around the lesions, to tell them apart. It becomes part of the model: predict then
    gives each finding the geometric mean of both confidences, and also lists what only reaches
    refine.candidates. Masks stay. Calibrate afterwards. Ctrl-C saves; the same command goes on.
    """
    check_output(run.parent if run.is_file() else run)
    from voxelscale.model.bundle import read_bundle
    from voxelscale.tune.refine import refine as run_refine

    settings = read_config(config, set_, read_bundle(run).config)
    found = run_refine(run, store, settings)
    if found is None:
        notice(f"stopped and saved; to go on: voxelscale refine {run} {store}")
        return 130
    lesions = count(len(found.lesions), "lesion")
    others = count(len(found.others), "candidate that is", "candidates that are")
    print(f"trained on {lesions} and {others} none")
    print(f"false-positive reduction is in {run if run.is_file() else run / 'model.vxs'}")
    return 0


@verb("Training")
def ensemble(
    out: Annotated[Path, typer.Argument(help="The model file to write, as all.vxs.")],
    models: Annotated[list[Path], typer.Argument(help="Runs' folders, or model files; two or more.")],
) -> None:
    """Put several models into one file.

    \b
    voxelscale train store/ run1/ --set train.seed=1
    voxelscale train store/ run2/ --set train.seed=2
    voxelscale ensemble all.vxs run1/ run2/
    voxelscale predict all.vxs scans/ predictions/

    The networks' probabilities are averaged; they may differ in size, patch and spacing. Windows and
    thresholds are those of the first. Two networks take twice the time of one. Calibrate the new model:
    the calibrations of the single models are not kept.
    """
    check_output(out, file=True)
    from voxelscale.tune.ensemble import ensemble as run_ensemble

    bundle = run_ensemble(models, out)
    print(f"{count(len(bundle.networks), 'network')} in {out}")


@verb("Training")
def calibrate(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a model.vxs.")],
    predictions: Annotated[Path, typer.Argument(help="What voxelscale predict wrote with it.")],
    data: Annotated[Path, typer.Argument(help="The data set with the true masks, as for prepare.")],
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Make a model's confidence mean what it says.

    \b
    voxelscale predict run/ scans/ val/ --store store/ --split val
    voxelscale calibrate run/ val/ scans/

    Fits a rising map from a finding's score to the share of such findings that are lesions, and writes it
    into model.vxs; from then on predict gives it as the confidence. Which finding goes before which, and
    so the FROC, stays as it is. Use at least 5 scans that the model was not trained on, with
    10 lesions found and 10 false findings; fewer are refused, below 100 of each there is a warning. Beside
    the model calibration.json and calibration.svg (reliability diagram) are written.
    """
    check_output(model.parent if model.is_file() else model)
    from voxelscale.tune.calibrate import calibrate_run

    settings = read_config(config, set_).prepare
    summary = calibrate_run(model, predictions, data, settings, layout, annotations)
    found, scans = count(summary["findings"], "finding"), count(summary["scans"], "scan")
    print(f"{found} of {scans}, {summary['hits']} of them lesions")
    print(
        f"ECE {summary['ece_before']:.3f} before, {summary['ece_after']:.3f} after "
        f"({summary['method']}, cross-validated by scans)"
    )
    print(f"calibrated model in {model}, reliability diagram in calibration.svg beside it")
    return tell_failed(rows_of(summary), "read")
