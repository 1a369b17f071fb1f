"""Commands that make or change models: train, refine, ensemble, calibrate."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from voxelscale.console import count, notice
from voxelscale.errors import VoxelscaleError
from voxelscale.files import check_output

if TYPE_CHECKING:
    from voxelscale.config import Config


@verb("Training", goes_on=True)
def train(
    store: Annotated[Path, typer.Argument(help="Training store, from voxelscale prepare.")],
    run: Annotated[Path, typer.Argument(help="Folder of the run; an unfinished run is resumed.")],
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="MODEL", help="Begin with the weights of a model or checkpoint."),
    ] = None,
    fit_memory: Annotated[
        bool,
        typer.Option("--fit-memory", help="Take the largest patch of the same shape that fits."),
    ] = False,
    nodes: Annotated[int, typer.Option(help="Machines that train together; each runs this command.")] = 1,
    meet: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where they meet: one of them, and a free port of it.")
    ] = "",
    wait: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="How long they wait for each other; 300.")
    ] = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Train a U-Net, on any number of processes.

    \b
    voxelscale train store/ run/
    voxelscale train store/ run/ --set train.samples=20000 --set model.filters=16
    voxelscale train store/ run/ --set train.ranks=2          two processes on this machine
    voxelscale train store/ run/ --from model.vxs             fine-tune another model
    voxelscale train store/ run/ --fit-memory                 the largest patch that fits
    voxelscale train store/ run/ --nodes 2 --meet node1:29500   on each of two machines
    srun -N 2 -n 8 voxelscale train store/ run/                  eight tasks of Slurm

    The budget is train.samples patches, whatever the number of workers. Ctrl-C saves a checkpoint. After
    it, or after a crash, the same command resumes with the next sample. run/model.vxs is the model of the
    best validation; metrics.jsonl and tensorboard/ have the curves.

    --from takes a model.vxs, a run, a checkpoint in run/checkpoints/, or nnU-Net's checkpoint_final.pth.
    The network is that of the model, unless --config or --set say otherwise; what fits by name and shape is
    taken, and what is not is listed. train.freeze and optim.pretrained_lr hold what was taken back.
    """
    check_output(run)
    from voxelscale.config import load_stored
    from voxelscale.ranks.meeting import WAIT
    from voxelscale.ranks.nodes import ALONE, Nodes
    from voxelscale.train.launch import start

    together = Nodes.of(nodes, meet) if nodes != 1 or meet else ALONE
    if wait is not None:
        os.environ[WAIT] = str(wait)
    begun = run / "config.yaml"
    base = load_stored(begun) if begun.is_file() else None
    if from_ is not None:
        from voxelscale.model.shipped import shipped

        from_ = shipped(from_) or from_
        base = base or _network_of(from_)
        set_ = [*(set_ or ()), f"train.start_from={json.dumps(str(from_.absolute()))}"]
    settings = read_config(config, set_, base)
    if fit_memory and not begun.is_file():
        if together.count > 1:
            hint = "find it on one machine, then --set data.patch_size=..."
            raise VoxelscaleError("--fit-memory: several machines could find different patches", hint)
        from voxelscale.train.plan import fit_to_memory

        settings = fit_to_memory(settings, store)
    finished = start(settings, store, run, together)
    if os.environ.get("RANK", "0") != "0":
        return 0 if finished else 130  # rank 0 says it
    if not finished:
        notice(f"stopped and saved; to resume: voxelscale train {store} {run}")
        return 130
    print(f"model in {run / 'model.vxs'}")
    return 0


def _network_of(path: Path) -> Config:
    from voxelscale.train.pretrained import config_like

    return config_like(path)


@verb("Training", goes_on=True)
def refine(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or its model.vxs.")],
    store: Annotated[Path, typer.Argument(help="Training store of that run.")],
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Train a false-positive reduction network for a model.

    \b
    voxelscale refine run/ store/
    voxelscale refine run/ store/ --set refine.samples=30000

    The model predicts its own training scans. A small classification network then learns, from crops around
    its candidates and around the lesions, to tell false positives from lesions. It is stored in the model:
    from then on the confidence of a finding in predict is the geometric mean of both networks', and
    candidates down to refine.candidates are listed. Masks do not change. Calibrate the model afterwards.
    Ctrl-C saves; the same command resumes.
    """
    check_output(run.parent if run.is_file() else run)
    from voxelscale.model.bundle import read_bundle
    from voxelscale.tune.refine import refine as run_refine

    settings = read_config(config, set_, read_bundle(run).config)
    found = run_refine(run, store, settings)
    if found is None:
        notice(f"stopped and saved; to resume: voxelscale refine {run} {store}")
        return 130
    lesions = count(len(found.lesions), "lesion")
    others = count(len(found.others), "candidate that is", "candidates that are")
    print(f"trained on {lesions} and {others} none")
    print(f"false-positive reduction is in {run if run.is_file() else run / 'model.vxs'}")
    return 0


@verb("Training")
def ensemble(
    models: Annotated[list[Path], typer.Argument(help="Folders of runs, or model files; two or more.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Model file to write. Required.")] = None,
) -> None:
    """Combine several models into one.

    \b
    voxelscale train store/ run1/ --set train.seed=1
    voxelscale train store/ run2/ --set train.seed=2
    voxelscale ensemble run1/ run2/ --out all.vxs
    voxelscale predict all.vxs scans/ predictions/

    Their probabilities are averaged. The networks may differ in size, patch and spacing. Windows and
    thresholds are those of the first. Two networks take twice the time of one. The calibrations of the
    single models are not kept: calibrate the ensemble.
    """
    if out is None:
        out, models = _first_is_output(models)
    check_output(out, file=True)
    from voxelscale.tune.ensemble import ensemble as run_ensemble

    bundle = run_ensemble(models, out)
    print(f"{count(len(bundle.networks), 'network')} in {out}")


def _first_is_output(models: list[Path]) -> tuple[Path, list[Path]]:
    """(Output, models) of ``ensemble OUT MODELS...``, the command's former form.

    Raises:
        VoxelscaleError: the first cannot be a new model file, so --out is missing.
    """
    first, *others = models
    if first.suffix != ".vxs" or first.exists():
        names = " ".join(map(str, models))
        raise VoxelscaleError(
            "ensemble: missing option --out", f"voxelscale ensemble {names} --out all.vxs"
        )
    return first, others


@verb("Training")
def calibrate(
    model: Annotated[Path, typer.Argument(help="Folder of a run, or a model.vxs.")],
    predictions: Annotated[
        Path, typer.Argument(help="Predictions of this model, from voxelscale predict.")
    ],
    data: Annotated[Path, typer.Argument(help="Data set with the true masks, as for prepare.")],
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Calibrate the confidence of a model's findings.

    \b
    voxelscale predict run/ scans/ val/ --store store/ --split val
    voxelscale calibrate run/ val/ scans/

    Fits a rising curve from a finding's score to the share of such findings that are lesions, and stores it
    in model.vxs. From then on predict reports it as the probability. The order of findings does not change,
    so neither does the FROC curve. Use at least 5 scans that the model was not trained on, with 10 lesions
    found and 10 false positives: fewer are refused, and below 100 of each there is a warning. Also writes
    calibration.json and calibration.svg (reliability diagram) next to the model.
    """
    check_output(model.parent if model.is_file() else model)
    from voxelscale.tune.calibrate import calibrate_run

    truth = data_set(data, read_config(config, set_), layout, annotations)
    summary = calibrate_run(model, predictions, truth)
    found, scans = count(summary["findings"], "finding"), count(summary["scans"], "scan")
    print(f"{found} of {scans}, {summary['hits']} of them lesions")
    print(
        f"ECE {summary['ece_before']:.3f} before, {summary['ece_after']:.3f} after "
        f"({summary['method']}, cross-validated by scans)"
    )
    print(f"calibrated model in {model}, reliability diagram in calibration.svg next to it")
    return print_failed(rows_of(summary), "read")
